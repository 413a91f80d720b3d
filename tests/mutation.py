"""Mutation tests: the same checks must turn red on a copy of the code with one thing broken."""

import importlib.util
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from tmask_kernels.backend import interpreter_enabled

_count = itertools.count()


def mutant(
    module: ModuleType, old: str, new: str, folder: Path, *, through: ModuleType | Sequence[ModuleType] = ()
) -> ModuleType:
    """Import a copy of `module` in which `old`, which must occur exactly once, reads `new`.

    `through` is a module that imports `module`, or a chain of modules that each import the one before: then a copy of
    the last is returned that imports the broken one. Copies register their custom ops under a namespace of their own,
    so they live beside the originals. Copies of kernels skip the test where they would be compiled: on a GPU programs
    run side by side, so a broken one may be right by luck, or take the CUDA context with it.
    """
    source = _source(module)
    if "@triton.jit" in source and not interpreter_enabled():
        pytest.skip("copies of kernels with an error are for Triton's interpreter")
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__file__}"
    broken = _load(source.replace(old, new), folder)
    for importer in (through,) if isinstance(through, ModuleType) else through:
        package, _, name = module.__name__.rpartition(".")
        source = _source(importer)
        rewired = source.replace(f"from {module.__name__} import", f"from {broken.__name__} import")
        rewired = rewired.replace(f"from {package} import {name}\n", f"import {broken.__name__} as {name}\n")
        assert rewired != source, f"{importer.__name__} does not import {module.__name__}"
        module, broken = importer, _load(rewired, folder)
    return broken


def _source(module: ModuleType) -> str:
    assert module.__file__ is not None
    return Path(module.__file__).read_text()


def _load(source: str, folder: Path) -> ModuleType:
    name = f"mutant_{next(_count)}"
    path = folder / f"{name}.py"
    path.write_text(source.replace('"tmask::', f'"tmask_{name}::'))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy
    spec.loader.exec_module(copy)
    return copy
