"""Compiles Triton kernels without a GPU and reads what they cost: registers, spills, shared memory, access widths.

A file `test_<op>.py` beside this one lists `CASES` (a kernel, its argument types, its `Budget`) and calls `check` for
each case and target. `docs/compile-budgets.md` holds the numbers; `check` compares them too, so the page is never
stale. Write it anew with ``TRITON_INTERPRET=0 python -m tests.compile_only.harness --write``.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
TABLE = FOLDER.parents[1] / "docs" / "compile-budgets.md"

# NVIDIA A100, H100/H200, B200 and AMD MI300.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
NVIDIA = TARGETS[:3]


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes. Widths are bytes per thread of the widest such instruction, 0 if there is none.

    `spills` is bytes of stack on NVIDIA (register spills and local arrays), spilled registers on AMD.
    `loads` is the number of global load instructions in the program text, not the number executed.
    """

    registers: int
    spills: int
    shared: int
    load_bytes: int
    store_bytes: int
    atomic_bytes: int
    loads: int
    uses_tf32: bool


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most a kernel may take and the least width it must reach; a mapping gives a target its own value.

    Spills are 0 always. None leaves a width unchecked.
    """

    registers: int | Mapping[str, int]
    shared: int | Mapping[str, int] = 0
    load_bytes: int | Mapping[str, int] | None = None
    store_bytes: int | Mapping[str, int] | None = None
    atomic_bytes: int | Mapping[str, int] | None = None

    def limit(self, name: str, target: str) -> int | None:
        value = getattr(self, name)
        return value.get(target) if isinstance(value, Mapping) else value


@dataclass(frozen=True, kw_only=True)
class Case:
    """One compiled variant. `signature` maps run-time arguments to types ("*fp32", "i32", "fp32"...).

    Like Triton's launcher, give an integer argument that is 1 as a constexpr, and name pointers and integers that are
    multiples of 16 in `divisible_by_16`. A tuple argument takes a tuple of types; in it "=1" is an integer known to be
    1, and its name in `divisible_by_16` holds for all its members. `fp32` says that the arithmetic must be full fp32:
    no TF32 is allowed. `enable_fp_fusion` is the launch option: False where products and sums must round one by one.
    """

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    budget: Budget
    divisible_by_16: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int | None = None
    enable_fp_fusion: bool = True
    fp32: bool = True
    targets: Sequence[str] = field(default=TARGETS)


def every(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """Parametrise a test ``(case, target)`` over each case and each of its targets."""
    pairs = [(case, target) for case in cases for target in case.targets]
    return pytest.mark.parametrize(("case", "target"), pairs, ids=[f"{c.name}-{t}" for c, t in pairs])


def check(case: Case, target: str) -> None:
    """Assert that `case` compiled for `target` keeps its budget and that the table in docs/ shows its numbers."""
    got = compile_case(case, target)
    budget = case.budget
    assert got.spills == 0, f"{case.name} {target} spills: {got}"
    for name in ("registers", "shared"):
        limit = budget.limit(name, target)
        assert limit is None or getattr(got, name) <= limit, f"{case.name} {target}: {name} over {limit}: {got}"
    for name in ("load_bytes", "store_bytes", "atomic_bytes"):
        limit = budget.limit(name, target)
        assert limit is None or getattr(got, name) >= limit, f"{case.name} {target}: {name} under {limit}: {got}"
    assert not (case.fp32 and got.uses_tf32), f"{case.name} {target} computes in TF32"
    row = table_row(case, target, got)
    assert row in TABLE.read_text().splitlines(), (
        f"{TABLE.name} lacks this row; run TRITON_INTERPRET=0 python -m tests.compile_only.harness --write\n{row}"
    )


def compile_case(case: Case, target: str) -> Resources:
    """`compile_kernel` with the fields of `case`."""
    return compile_kernel(
        case.kernel,
        case.signature,
        case.constexprs,
        divisible_by_16=case.divisible_by_16,
        target=target,
        num_warps=case.num_warps,
        num_stages=case.num_stages,
        enable_fp_fusion=case.enable_fp_fusion,
    )


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, Any],
    constexprs: Mapping[str, Any],
    *,
    divisible_by_16: Sequence[str] = (),
    target: str,
    num_warps: int = 4,
    num_stages: int | None = None,
    enable_fp_fusion: bool = True,
) -> Resources:
    """Compile a jitted kernel for `target` (one of ``TARGETS``) and read its resources; see `Case`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    given = set(signature) | set(constexprs)
    assert given == set(names), f"{kernel.__name__}: missing {set(names) - given}, unknown {given - set(names)}"
    types: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(names):
        if name in constexprs:
            types[name], constants[(i,)] = "constexpr", constexprs[name]
            continue
        types[name] = _without_ones(signature[name])
        for path, kind in _leaves(signature[name], (i,)):
            if kind == "=1":
                constants[path] = 1
            elif name in divisible_by_16:
                attributes[path] = [["tt.divisibility", 16]]
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion} | (
        {} if num_stages is None else {"num_stages": num_stages}
    )
    source = ASTSource(kernel, types, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=options)
    if amd:
        return _amd_resources(compiled.asm["amdgcn"])
    return _nvidia_resources(compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared)


def _leaves(kind: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    """Each type in a nested tuple with its path."""
    if not isinstance(kind, tuple):
        yield path, kind
        return
    for i, member in enumerate(kind):
        yield from _leaves(member, (*path, i))


def _without_ones(kind: Any) -> Any:
    if isinstance(kind, tuple):
        return tuple(_without_ones(member) for member in kind)
    return "constexpr" if kind == "=1" else kind


def _nvidia_resources(ptx: str, cubin: bytes, dynamic_shared: int) -> Resources:
    usage = _cuobjdump(cubin)
    number = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    loads = [_ptx_bytes(m) for m in re.finditer(r"\bld\.global" + _PTX_TYPE, ptx)]
    loads += [int(size, 0) for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+)", ptx)]
    return Resources(
        registers=number["REG"],
        spills=number["STACK"] + number["LOCAL"],
        shared=max(number["SHARED"], dynamic_shared),
        load_bytes=max(loads, default=0),
        store_bytes=max((_ptx_bytes(m) for m in re.finditer(r"\bst\.global" + _PTX_TYPE, ptx)), default=0),
        atomic_bytes=max((_ptx_bytes(m) for m in re.finditer(r"\b(?:atom|red)\.global" + _PTX_TYPE, ptx)), default=0),
        loads=len(loads),
        uses_tf32=".tf32" in ptx,
    )


# The modifiers of an instruction, then its vector length and type: ".L1::evict_last.v4.b32", ".gpu.add.f16x2".
_PTX_TYPE = r"[\w.:]*?(?:\.v(?P<vector>[248]))?\.[a-z]+(?P<bits>\d+)(?P<pair>x2)?(?=\s)"


def _ptx_bytes(match: re.Match[str]) -> int:
    return int(match["vector"] or 1) * int(match["bits"]) * (2 if match["pair"] else 1) // 8


def _cuobjdump(cubin: bytes) -> str:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__ or "").parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout


_AMD_BYTES = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4, "f32": 4, "f64": 8}


def _amd_resources(text: str) -> Resources:
    number = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    kind = r"\b(?:global|buffer|flat)_{}_\w*?(ubyte|sbyte|byte|ushort|sshort|short|dword|f32|f64|f16|bf16)(x[234])?"

    def sizes(name: str) -> list[int]:
        # Packed half atomics ("pk_add_f16") move 4 bytes.
        found = re.findall(kind.format(name), text)
        return [_AMD_BYTES.get(word, 4) * int(times[1:] or 1) for word, times in found]

    return Resources(
        registers=number["vgpr_count"],
        spills=number["vgpr_spill_count"] + number["sgpr_spill_count"],
        shared=number["group_segment_fixed_size"],
        load_bytes=max(sizes("load"), default=0),
        store_bytes=max(sizes("store"), default=0),
        atomic_bytes=max(sizes("atomic"), default=0),
        loads=len(sizes("load")),
        uses_tf32="xf32" in text,
    )


def all_cases() -> list[Case]:
    """The `CASES` of every test file in this folder, in the order of the files."""
    cases: list[Case] = []
    for path in sorted(FOLDER.glob("test_*.py")):
        cases += getattr(importlib.import_module(f"tests.compile_only.{path.stem}"), "CASES", [])
    return cases


COLUMNS = ("kernel variant", "target", "registers (budget)", "spills", "shared bytes (budget)",
           "load bytes", "store bytes", "atomic bytes", "load instructions")  # fmt: skip


def table_row(case: Case, target: str, got: Resources) -> str:
    """The line of docs/compile-budgets.md for one compiled case: actual numbers, budgets in brackets."""
    cells: list[Any] = [case.name, target, f"{got.registers} ({case.budget.limit('registers', target)})", got.spills]
    cells.append(f"{got.shared} ({case.budget.limit('shared', target)})")
    for name in ("load_bytes", "store_bytes", "atomic_bytes"):
        least = case.budget.limit(name, target)
        cells.append(f"{getattr(got, name)}" + ("" if least is None else f" (≥ {least})"))
    return "| " + " | ".join(map(str, [*cells, got.loads])) + " |"


def table_head() -> str:
    """The text of docs/compile-budgets.md above its rows; names the Triton version the numbers belong to."""
    import triton

    return f"""# Compile budgets

What each Triton kernel takes when compiled for each target, and in brackets what it may take at most (registers and
shared memory) or must reach (bytes a thread moves in its widest load, store and atomic). Spills must be 0. Made with
Triton {triton.__version__}, without a GPU, by

    TRITON_INTERPRET=0 python -m tests.compile_only.harness --write

and checked line by line by `make test-compile`. Targets: sm_80 A100, sm_90 H100 and H200, sm_100 B200, gfx942 MI300.
Load instructions are counted in the program text.

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
"""


def write_table(compile_one: Callable[[Case, str], Resources] = compile_case) -> None:
    """Compile every case and write docs/compile-budgets.md."""
    rows = [table_row(case, target, compile_one(case, target)) for case in all_cases() for target in case.targets]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table_head() + "".join(row + "\n" for row in rows))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: TRITON_INTERPRET=0 python -m tests.compile_only.harness --write")
    os.environ["TRITON_INTERPRET"] = "0"
    # Run as a script this file is `__main__`; the cases are built from its importable copy.
    importlib.import_module("tests.compile_only.harness").write_table()
