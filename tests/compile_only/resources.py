"""Compiles a Triton kernel without a GPU and reads what it costs from the assembly text and the binary."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx  # comes with torch

# NVIDIA A100, H100/H200, B200 and AMD MI300.
ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one compiled kernel takes. Widths are bytes a thread moves in its widest such instruction, 0 without any.

    `spills`: on NVIDIA bytes of used stack (register spills, local arrays), on AMD spilled registers. `scratch`: bytes
    of private memory a thread on AMD. `loads[d]`: global load instructions inside d nested loops, in the program text.
    `agprs` and `sgprs` are AMD's accumulation and scalar registers; there `registers` are the vector registers.
    """

    registers: int
    spills: int
    shared: int
    load_bytes: int
    store_bytes: int
    atomic_bytes: int
    loads: tuple[int, ...]
    uses_tf32: bool
    scratch: int = 0
    agprs: int = 0
    sgprs: int = 0


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, Any],
    constexprs: Mapping[str, Any],
    *,
    divisible_by_16: Sequence[str] = (),
    arch: str,
    num_warps: int = 4,
    num_stages: int | None = None,
    enable_fp_fusion: bool = True,
    max_registers: int | None = None,
) -> Resources:
    """Compile a jitted kernel for `arch` (one of ``ARCHES``) and read its resources; arguments as in `Case`."""
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
    amd = arch.startswith("gfx")
    gpu = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion} | (
        {} if num_stages is None else {"num_stages": num_stages}
    )
    if max_registers is not None and not amd:
        options["maxnreg"] = max_registers
    source = ASTSource(kernel, types, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=options)
    if amd:
        return _read_amd(compiled.asm["amdgcn"], compiled.metadata.shared)
    return _read_nvidia(compiled.asm, compiled.metadata.shared)


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


# The modifiers of an instruction, then its vector length and type: ".L1::evict_last.v4.b32", ".gpu.add.f16x2".
_PTX_TYPE = r"[\w.:]*?(?:\.v(?P<vector>[248]))?\.[a-z]+(?P<bits>\d+)(?P<pair>x2)?(?=\s)"
_PTX_LOAD = re.compile(r"\bld\.global" + _PTX_TYPE)
_PTX_ASYNC = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+)")


def _read_nvidia(asm: Mapping[str, Any], dynamic_shared: int) -> Resources:
    ptx, usage = asm["ptx"], _cuobjdump(asm["cubin"])
    number = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    spills = number["STACK"] + number["LOCAL"]
    # ptxas 12.9 reserves stack in some kernels that neither store to it nor load from it.
    if spills and not re.search(r"\b(LDL|STL)\b", asm["sass"]):
        spills = 0

    def widths(pattern: str) -> list[int]:
        return [_ptx_bytes(match) for match in re.finditer(pattern + _PTX_TYPE, ptx)]

    return Resources(
        registers=number["REG"],
        spills=spills,
        shared=max(number["SHARED"], dynamic_shared),
        load_bytes=max([*widths(r"\bld\.global"), *(int(size, 0) for size in _PTX_ASYNC.findall(ptx))], default=0),
        store_bytes=max(widths(r"\bst\.global"), default=0),
        atomic_bytes=max(widths(r"\b(?:atom|red)\.global"), default=0),
        loads=at_depths(ptx, lambda line: bool(_PTX_LOAD.search(line) or _PTX_ASYNC.search(line))),
        uses_tf32=".tf32" in ptx,
    )


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
_AMD_TYPE = r"\b(?:global|buffer|flat)_{}_\w*?(ubyte|sbyte|byte|ushort|sshort|short|dword|f32|f64|f16|bf16)(x[234])?"


def _read_amd(text: str, dynamic_shared: int) -> Resources:
    """What an amdgcn text states in its metadata and shows in its instructions; LDS is asked for at the launch."""
    number = {key: int(value) for key, value in re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", text, re.MULTILINE)}

    def widths(name: str) -> list[int]:
        # Packed half atomics ("pk_add_f16") move 4 bytes.
        found = re.findall(_AMD_TYPE.format(name), text)
        return [_AMD_BYTES.get(word, 4) * int(times[1:] or 1) for word, times in found]

    load = re.compile(_AMD_TYPE.format("load"))
    return Resources(
        registers=number["vgpr_count"],
        spills=number["vgpr_spill_count"] + number["sgpr_spill_count"],
        shared=max(number["group_segment_fixed_size"], dynamic_shared),
        load_bytes=max(widths("load"), default=0),
        store_bytes=max(widths("store"), default=0),
        atomic_bytes=max(widths("atomic"), default=0),
        loads=at_depths(text, lambda line: bool(load.search(line))),
        uses_tf32="xf32" in text,
        scratch=number["private_segment_fixed_size"],
        agprs=number["agpr_count"],
        sgprs=number["sgpr_count"],
    )


_LABEL = re.compile(r"^(?:\$L__|\.L)BB(\d+_\d+):")
_BRANCH = re.compile(r"^\s*(@!?%p\d+\s+bra|bra|s_cbranch|s_branch)\S*\s+(?:\$L__|\.L)BB(\d+_\d+)\b")
_END = re.compile(r"^\s*(?:ret;|s_endpgm)")


def at_depths(text: str, wanted: Any) -> tuple[int, ...]:
    """How many lines for which `wanted(line)` is true stand inside 0, 1, 2... nested loops of an assembly text.

    A loop is a strongly connected part of the flow graph; without the edges back to its entry, the parts that are
    still connected are the loops inside it.
    """
    graph: networkx.DiGraph = networkx.DiGraph()
    block, blocks = "entry", 0
    graph.add_node(block, count=0)
    for line in text.splitlines():
        if label := _LABEL.match(line):
            _enter(graph, block, label[1])
            block = label[1]
        if block and wanted(line):
            graph.nodes[block]["count"] += 1
        branch = _BRANCH.match(line)
        if branch:
            _enter(graph, block, branch[2])
        if branch or _END.match(line):
            blocks += 1
            goes_on = branch is not None and (branch[1].startswith("@") or branch[1] == "s_cbranch")
            # Code behind a jump that is always taken is reached through a label only.
            after = f"after {blocks}" if goes_on else ""
            _enter(graph, block, after)
            block = after
    found: Counter[int] = Counter()
    for name, depth in _depths(graph, 0).items():
        found[depth] += graph.nodes[name]["count"]
    return tuple(found[depth] for depth in range(max((d for d in found if found[d]), default=0) + 1))


def _enter(graph: networkx.DiGraph, block: str, target: str) -> None:
    if target not in graph:
        graph.add_node(target, count=0)
    if block and target:
        graph.add_edge(block, target)


def _depths(graph: networkx.DiGraph, depth: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in networkx.strongly_connected_components(graph):
        inner = graph.subgraph(part).copy()
        if not inner.edges:
            found |= dict.fromkeys(part, depth)
            continue
        entries = {to for start, to in graph.edges if to in part and start not in part} or {next(iter(part))}
        inner.remove_edges_from([edge for edge in inner.edges if edge[1] in entries])
        found |= _depths(inner, depth + 1)
    return found
