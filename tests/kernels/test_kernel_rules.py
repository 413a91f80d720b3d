"""Rules of the kernels' source that Triton's interpreter cannot show, read with ast.

A loop carries a name that differs before the loop and after a dry run of its body. Two names that share one value
before the loop, one of which the body assigns to the other, look unchanged: the compiled kernel computes with the
values of the first iteration. Python, and so the interpreter, carries both.

A constant is the right operand beside a tensor. Python asks the left operand first: a global `tl.constexpr` there wraps
the whole tensor under the interpreter, and Triton 3.8 refuses the result.
"""

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNEL_FILES = sorted(path for path in ROOT.glob("tmask_kernels/**/*.py") if "@triton.jit" in path.read_text())
EACH_FILE = pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: str(path.relative_to(ROOT)))

Names = dict[str, frozenset[str]]  # a name -> the values it may hold


class Aliases:
    """Walks a jit function and records the names that a loop would lose. A value is a string; only copies share one."""

    def __init__(self, function: ast.FunctionDef) -> None:
        self.lost: set[tuple[int, str, str]] = set()  # line of the loop, the name, the name that shares its value
        self._fresh = (f"#{n}" for n in itertools.count())
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        self.run(function.body, {argument.arg: frozenset({argument.arg}) for argument in arguments})

    def values(self, node: ast.expr, names: Names) -> frozenset[str]:
        """The values that an expression may be: those of names it copies, or a new one."""
        match node:
            case ast.Name(id=name):
                return names.get(name, frozenset({name}))
            case ast.IfExp(body=body, orelse=orelse):
                return self.values(body, names) | self.values(orelse, names)
            case ast.Call(func=ast.Attribute(value=value, attr="to")):  # returns its operand where the type is the same
                source = node.args[0] if isinstance(value, ast.Name) and value.id == "tl" else value
                return self.values(source, names)
            case ast.Call(func=ast.Attribute(attr="cast"), args=[source, *_]):
                return self.values(source, names)
            case ast.Subscript(value=source, slice=ast.Constant(value=index)):
                return frozenset(f"{value}[{index}]" for value in self.values(source, names))
            case ast.Attribute(value=source, attr=attr):
                return frozenset(f"{value}.{attr}" for value in self.values(source, names))
        return frozenset({next(self._fresh)})

    def assign(self, target: ast.expr, value: ast.expr, names: Names) -> Iterator[tuple[str, frozenset[str]]]:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=True):
                yield from self.assign(one, its, names)
        elif isinstance(target, ast.Tuple):
            whole = self.values(value, names)
            for index, one in enumerate(target.elts):
                assert isinstance(one, ast.Name)
                yield one.id, frozenset(f"{its}[{index}]" for its in whole)
        elif isinstance(target, ast.Name):
            yield target.id, self.values(value, names)

    def run(self, body: list[ast.stmt], names: Names) -> Names:
        """The names after `body`, where they were `names` before it."""
        names = dict(names)
        for statement in body:
            match statement:
                case ast.Assign(targets=targets, value=value):
                    for target in targets:
                        names |= dict(self.assign(target, value, names))  # all of the right side first
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    names |= dict(self.assign(target, value, names))
                case ast.AugAssign(target=ast.Name(id=name)):
                    names[name] = frozenset({next(self._fresh)})
                case ast.If(body=then, orelse=other):
                    one, two = self.run(then, names), self.run(other, names)
                    names = {name: one.get(name, frozenset()) | two.get(name, frozenset()) for name in one | two}
                case ast.For(body=inside) | ast.While(body=inside):
                    names = self.loop(statement, inside, names)
        return names

    def loop(self, node: ast.For | ast.While, body: list[ast.stmt], before: Names) -> Names:
        if isinstance(node, ast.For) and "static_range" in ast.unparse(node.iter):  # unrolled: nothing is carried
            return self.run(body, self.run(body, before))
        # Each name enters the body with a value of its own: what it leaves with tells whose value it was given.
        entry = {name: frozenset({f"entry:{name}"}) for name in before}
        after = self.run(body, entry)
        for name in before:
            for other in before:
                if other != name and entry[other] <= after[name] and before[name] & before[other]:
                    self.lost.add((node.lineno, name, other))
        self.run(body, before)  # loops inside see the names that share a value out here
        changed = {name for name in after if after[name] != entry.get(name)}
        return before | {name: frozenset({next(self._fresh)}) for name in changed}


def lost_names(source: str) -> list[tuple[int, str, str]]:
    """(line of a loop, a name it would not carry, the name with the same value) of all jit functions of a file."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    jitted = [f for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]
    return sorted(set().union(*(Aliases(function).lost for function in jitted)))


@EACH_FILE
def test_loops_carry_all_names(path):
    faults = [
        f"{path.relative_to(ROOT)}:{line}: the loop would not carry {name!r}, which shares the value of {other!r}"
        for line, name, other in lost_names(path.read_text())
    ]
    assert not faults, "\n".join(faults)


ROTATION = """
@triton.jit
def kernel(p, n):
    a = tl.load(p)
    {before}
    for i in range(n):
        {body}
    tl.store(p, a + b)
"""


@pytest.mark.parametrize(
    ("before", "body", "lost"),
    [
        ("b = a", "a = b; b = tl.load(p + i)", ["a"]),
        ("b, c = a, a", "a, b, c = b, c, tl.load(p + i)", ["a", "b"]),
        ("b = a.to(tl.float32)", "a, b = b, a * 2", ["a"]),
        ("b = tl.cast(a, tl.float32)", "a, b = b, a * 2", ["a"]),
        ("b = a if EVEN else a + 1", "a, b = b, a * 2", ["a"]),
        ("pair = f(p); a = pair[0]; b = pair[0]", "a, b = b, a * 2", ["a"]),
        ("c = a; b = c", "c = a; a = b; b = c * 2", ["a", "c"]),
        ("b = a", "if i > 2: a = b\n        b = a * 2", ["a"]),
        ("b = a", "while b > 0:\n            a, b = b, a * 2", ["a"]),
        ("b = a + 0.0", "a, b = b, a * 2", []),
        ("b = f(a)", "a, b = b, a * 2", []),
        ("b = a", "a = a + b", []),
        ("b = a", "a = a * 2; b = b * 3", []),
        ("b = a", "a += 1; keep = a; a = keep", []),
        ("b = a; a = a * 2", "a, b = b, a * 2", []),
    ],
)
def test_what_a_loop_loses(before, body, lost):
    assert [name for _, name, _ in lost_names(ROTATION.format(before=before, body=body))] == lost


def test_the_old_keypoint_kernel_is_found():
    """The fault that this rule is for: decode_keypoints, compiled, was wrong by up to 455 px."""
    path = ROOT / "tmask_kernels/ops/decode_keypoints/kernels.py"
    now, old = "= low0 + 0.0, high0 + 0.0, low0 + 0.0, high0 + 0.0", "= low0, high0, low0, high0"
    source = path.read_text()
    assert source.count(now) == 1
    line = source[: source.index("for patch_y in")].count("\n") + 1
    found = lost_names(source.replace(now, old))
    assert [(at, name) for at, name, _ in found] == [(line, "high0"), (line, "high1"), (line, "low0"), (line, "low1")]


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


KNOWN = set().union(*(constants(path.read_text()) for path in KERNEL_FILES))


@EACH_FILE
def test_constants_stand_on_the_right(path):
    assert constants_on_the_left(path.read_text(), KNOWN) == [], path


def test_the_constants_are_found():
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
def test_what_the_rule_finds(line, faults):
    source, known = f"def kernel(p, x):\n    return {line}\n", constants("C, D = tl.constexpr(1), tl.constexpr(2)")
    assert constants_on_the_left(source, known) == [f"2: {fault}" for fault in faults]
