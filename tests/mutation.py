"""Mutation tests: the same checks must turn red on a copy of the code with one thing broken."""

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

_count = itertools.count()


def mutant(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """Import a copy of `module` in which `old`, which must occur exactly once, reads `new`.

    The copy registers its custom ops under a namespace of its own, so it lives beside the original.
    """
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__file__}"
    name = f"mutant_{next(_count)}"
    path = folder / f"{name}.py"
    path.write_text(source.replace(old, new).replace('"tmask::', f'"tmask_{name}::'))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy
