"""A rule of the kernels' source, read with ast: a constant stands on the right of an operator beside a tensor.

A global `tl.constexpr` on the left is asked first by Python. Under Triton's interpreter it wraps the whole tensor as
another constant, which Triton 3.8 refuses in the next operation. Compiled kernels do not see the difference.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {path.relative_to(ROOT): path.read_text() for path in sorted(ROOT.glob("tmask_kernels/**/*.py"))}
KERNELS = {path: source for path, source in SOURCES.items() if "@triton.jit" in source}


def names(*nodes: ast.AST) -> set[str]:
    return {name.id for node in nodes for name in ast.walk(node) if isinstance(name, ast.Name)}


def constants(source: str) -> set[str]:
    """Names that a module gives to a `tl.constexpr`."""
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return {name for node in assigned if "constexpr(" in ast.unparse(node) for name in names(*node.targets)}


def constants_on_the_left(source: str, known: set[str]) -> list[str]:
    """Operators in functions with only constants on the left, and a tensor on the right, as "line: expression"."""
    found = []
    for function in ast.parse(source).body:
        for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
            match node:
                case ast.BinOp(left=left, right=right) | ast.Compare(left=left, comparators=[right]):
                    if names(left) and names(left) <= known and not names(right) <= known:
                        found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


KNOWN = set().union(*map(constants, KERNELS.values()))


@pytest.mark.parametrize("path", KERNELS, ids=str)
def test_constants_stand_on_the_right(path: Path) -> None:
    assert constants_on_the_left(KERNELS[path], KNOWN) == [], path


def test_the_constants_are_found() -> None:
    assert {"_CROWD_COVER", "_UNIT", "PADDING", "BEYOND", "DOT_IN_FP32"} <= KNOWN


@pytest.mark.parametrize(
    ("line", "faults"),
    [
        ("x > C * (x * x)", ["C * (x * x)"]),
        ("C - x", ["C - x"]),
        ("C < x", ["C < x"]),
        ("(C - 1) & x", ["C - 1 & x"]),
        ("-C * tl.load(p)", ["-C * tl.load(p)"]),
        ("x * x * C", []),
        ("x * (1.0 / C / D)", []),
        ("x[:, None] == C", []),
        ("2 * x", []),
    ],
)
def test_what_the_rule_finds(line: str, faults: list[str]) -> None:
    source, known = f"def kernel(p, x):\n    return {line}\n", constants("C, D = tl.constexpr(1), tl.constexpr(2)")
    assert constants_on_the_left(source, known) == [f"2: {fault}" for fault in faults]
