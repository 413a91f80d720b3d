"""Mutation tests: the same checks must turn red on a copy of the code with one thing broken."""

import importlib.util
import itertools
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tmask_kernels.backend import interpreter_enabled

_count = itertools.count()


def mutant(module: ModuleType, old: str, new: str, folder: Path, *, seen_from: ModuleType | None = None) -> ModuleType:
    """Import a copy of the package of `module` in which `old`, which must occur exactly once there, reads `new`.

    Returns the copy of `module`, or of `seen_from`, another module of the package: it imports the broken one as the
    original imports the sound one, whatever stands between them. The copy lives beside the original: it is a package
    of its own name in `folder`, and its custom ops have a namespace of their own. Copies of kernels skip the test where
    they would be compiled: on a GPU programs run side by side, so a broken one may be right by luck, or take the CUDA
    context with it.
    """
    assert module.__file__ is not None
    if "@triton.jit" in Path(module.__file__).read_text() and not interpreter_enabled():
        pytest.skip("copies of kernels with an error are for Triton's interpreter")
    original = module.__name__.partition(".")[0]
    copy = f"{original}_mutant_{next(_count)}"
    _copy_package(original, folder / copy)
    break_file(folder / copy / Path(module.__file__).relative_to(*sys.modules[original].__path__), old, new)
    _import_package(folder / copy)
    return importlib.import_module((seen_from or module).__name__.replace(original, copy, 1))


def break_file(path: Path, old: str, new: str) -> None:
    """Let a file read `new` in place of `old`, which must occur exactly once there."""
    source = path.read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {path}"
    path.write_text(source.replace(old, new))


def _copy_package(original: str, copy: Path) -> None:
    """Copy a package's source; imports that name the package, and the namespace of its ops, name the copy."""
    (root,) = sys.modules[original].__path__
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("__pycache__", "*.md"))
    for path in copy.rglob("*.py"):
        source = re.sub(rf"^(\s*(?:from|import) ){original}\b", rf"\g<1>{copy.name}", path.read_text(), flags=re.M)
        path.write_text(source.replace('NAMESPACE = "tmask"', f'NAMESPACE = "{copy.name}"'))


def _import_package(package: Path) -> None:
    """Import a package by its folder; its modules are then found through it."""
    spec = importlib.util.spec_from_file_location(
        package.name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[package.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[package.name])
