"""Compiles a Triton kernel without a GPU and reads what it costs from the assembly text and the binary."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.compile_only.record import Launch


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one compiled kernel takes. Widths are bytes a thread moves in its widest such instruction, 0 without any.

    `spills`: on NVIDIA bytes of used stack (register spills, local arrays), on AMD spilled registers. `scratch`: bytes
    of private memory a thread on AMD. `loads`: global load instructions in the program text. `agprs` and `sgprs`
    are AMD's accumulation and scalar registers; there `registers` are the vector registers.
    """

    registers: int
    spills: int
    shared: int
    load_bytes: int
    store_bytes: int
    atomic_bytes: int
    loads: int
    uses_tf32: bool
    scratch: int = 0
    agprs: int = 0
    sgprs: int = 0


def compile_kernel(launch: Launch, arch: str) -> Resources:
    """Compile a launch for `arch`, as "sm_90" or "gfx942", and read what the kernel takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = arch.startswith("gfx")
    gpu = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options, constants = dict(launch.options), dict(launch.constants)
    if amd:  # what launchers leave out there: NVIDIA alone has these
        options.pop("maxnreg", None)
        constants = {k: "ieee" if v == "tf32x3" else v for k, v in constants.items()}
    source = ASTSource(launch.kernel, launch.signature, constants, launch.attributes)
    compiled = triton.compile(source, target=gpu, options=options)
    if amd:
        return _read_amd(compiled.asm["amdgcn"], compiled.metadata.shared)
    return _read_nvidia(compiled.asm, compiled.metadata.shared)


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
        loads=len(_PTX_LOAD.findall(ptx)) + len(_PTX_ASYNC.findall(ptx)),
        uses_tf32=bool(re.search(r"inputPrecision = tf32(?!x3)", str(asm["ttir"]))),
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

    return Resources(
        registers=number["vgpr_count"],
        spills=number["vgpr_spill_count"] + number["sgpr_spill_count"],
        shared=max(number["group_segment_fixed_size"], dynamic_shared),
        load_bytes=max(widths("load"), default=0),
        store_bytes=max(widths("store"), default=0),
        atomic_bytes=max(widths("atomic"), default=0),
        loads=len(re.findall(_AMD_TYPE.format("load"), text)),
        uses_tf32="xf32" in text,
        scratch=number["private_segment_fixed_size"],
        agprs=number["agpr_count"],
        sgprs=number["sgpr_count"],
    )
