"""Who may import whom, read from the source with ast. docs/architecture.md explains the rules."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("tmask/**/*.py"), *ROOT.glob("tmask_kernels/**/*.py")])

# Import these only inside the function that uses them: `import tmask` must work without them.
LAZY = {"pycocotools", "jsonargparse", "tqdm", "matplotlib", "PIL", "safetensors", "timm", "yaml"}

# What each part of tmask may import of tmask. Lower parts never see higher ones.
LOW = {"structures"}
ALLOWED = {
    "structures": set(),
    "checks": set(),
    "skeleton": {"checks"},
    "config": {"checks", "skeleton"},
    "model": LOW | {"model"},
    "presets": {"checks", "config"},
    "build": LOW | {"model", "config", "presets"},
    "weights": {"model", "build", "checks", "config"},
    "data": LOW | {"checks", "model", "config", "data"},
    "engine": LOW | {"checks", "model", "config", "build", "weights", "data", "visualize", "engine", "skeleton"},
    "visualize": LOW | {"model", "data", "visualize"},
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Every imported module of a file, and whether the import runs when the file is imported."""
    found = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                package = path.relative_to(ROOT).parts[: -child.level] if child.level else ()
                module = ".".join([*package, *([child.module] if child.module else [])])
                found.append((module, top))
                # `from package import module` imports the module too.
                found.extend((f"{module}.{alias.name}", top) for alias in child.names)
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            visit(child, top and not function and not typing_only)

    visit(ast.parse(path.read_text()), True)
    return found


def faults(path: Path) -> list[str]:
    """The rules that `path` breaks."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_kernel_file = parts[0] == "tmask_kernels" and "kernels" in parts
    bad = []
    if parts[0] == "tmask_kernels" and re.search(r"^\s*(from|import) tmask_kernels\b", path.read_text(), re.M):
        bad.append("imports tmask_kernels by its name: relative imports let the package stand under another")
    for module, top in imports(path):
        head = module.split(".")
        if head[0] == "triton" and not is_kernel_file:
            bad.append(f"imports {module}: only kernels.py and files of a folder kernels may")
        if head[0] in ("tests", "bench"):
            bad.append(f"imports {module}: packages import neither tests nor bench")
        if head[0] in LAZY and top and parts[0] == "tmask_kernels":
            bad.append(f"imports {module} on import: tmask_kernels needs torch alone")
        if head[0] in LAZY and top and parts[:2] in {("tmask", "model"), ("tmask", "__init__"), ("tmask", "build")}:
            bad.append(f"imports {module} on import")
        if parts[0] == "tmask_kernels" and head[0] == "tmask":
            bad.append(f"imports {module}: tmask_kernels knows nothing of tmask")
        if parts[0] == "tmask_kernels" and parts[-1] == "reference" and head[-1] in ("op", "kernels"):
            bad.append(f"imports {module}: a reference stands on torch alone")
        if parts[0] == "tmask_kernels" and parts[-1] == "op" and "kernels" in head[1:] and top:
            bad.append(f"imports {module} on import: it would need triton")
        if parts[0] == "tmask" and head[0] == "tmask_kernels" and len(head) > 1:
            bad += _private_kernels_import(module)
        if parts[0] == "tmask" and head[0] == "tmask" and len(head) > 1 and parts[1] in ALLOWED:
            target = head[1]
            if target in ALLOWED | {"cli": set()} and target not in ALLOWED[parts[1]]:
                bad.append(f"imports {module}: {parts[1]} stands below or beside {target}")
    return bad


def _private_kernels_import(module: str) -> list[str]:
    import tmask_kernels

    head = module.split(".")
    public = set(tmask_kernels.__all__) | {"backend", "machine", "testing"}
    return [] if head[1] in public else [f"imports {module}: tmask uses tmask_kernels' public names only"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_rules(path: Path) -> None:
    assert faults(path) == []


@pytest.mark.parametrize(
    ("place", "line", "word"),
    [
        ("tmask_kernels/ops/nms/op.py", "import triton", "only kernels.py"),
        ("tmask_kernels/ops/nms/op.py", "from . import kernels", "would need triton"),
        ("tmask_kernels/ops/nms/op.py", "from tmask_kernels.backend import resolve", "by its name"),
        ("tmask_kernels/ops/nms/op.py", "import tmask.config", "knows nothing of tmask"),
        ("tmask_kernels/packed.py", "import pycocotools", "needs torch"),
        ("tmask_kernels/ops/nms/reference.py", "from .op import nms", "stands on torch"),
        ("tmask/model/rpn.py", "from tmask.presets import PRESETS", "stands below"),
        ("tmask/model/rpn.py", "import tqdm", "on import"),
        ("tmask/model/rpn.py", "from tmask_kernels.ops.nms.op import nms", "public names only"),
        ("tmask/data/coco.py", "from tmask.engine import train", "stands below"),
        ("tmask/weights.py", "from tmask.engine import checkpoint", "stands below"),
        ("tmask/engine/train.py", "import bench.cases", "neither tests nor bench"),
    ],
)
def test_a_broken_rule_is_found(
    place: str, line: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert any(word in fault for fault in faults(path)), faults(path)


def test_import_works_without_optional_packages() -> None:
    """`import tmask_kernels` needs torch alone, and `import tmask` none of the lazily imported packages."""
    lazy = sorted(LAZY - {"PIL"})  # torchvision itself imports PIL
    run_without([*lazy, "triton", "torchvision", "numpy"], "import tmask_kernels")
    run_without(
        [*lazy, "triton"],
        "import tmask_kernels, torch, tmask, tmask.model.detector\n"
        "tmask_kernels.nms(torch.tensor([[0., 0., 1., 1.]]), torch.ones(1), 0.5)\n",
    )


def run_without(packages: list[str], code: str) -> None:
    blocked = f"import sys\nfor name in {packages!r}: sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
