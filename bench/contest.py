"""One comparison: the same work by several providers on the same inputs. Right first, then timed, in turn.

A benchmark file builds a `Contest`; `compare` asks each provider for its call, runs it once against the truth, and
times those that were right. Whatever a provider does, its row says so and the others go on.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config

from bench import context, machine
from bench.rows import Journal, Row, row_of
from bench.timing import Samples, median, peak_mib, percentile, synchronize, time_in_turn
from bench.work import Work
from tmask_kernels.backend import interpreter_enabled

Call = Callable[[], Any]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE_SECONDS = 400.0

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


class UnavailableError(Exception):
    """A provider cannot serve here: its package, its dtype or its device is missing."""


class NotBuiltError(Exception):
    """The project does not have this op, or this kernel of it, yet."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What a benchmark file gives.

    `providers` maps a name to a function that takes the inputs and gives the call to time; preparation (a forward pass
    before a timed backward, a captured graph) belongs into that function. `truth` gives what `check(output, truth)`
    compares with, once for all providers; `check` raises AssertionError. `work` counts the least bytes and operations,
    `roof` names the dtype of its products where that is not the key's.
    """

    inputs: Callable[[], Any]
    providers: Mapping[str, Callable[[Any], Call]]
    truth: Callable[[Any], Any]
    check: Callable[[Any, Any], None]
    work: Work
    size: str = "full"
    roof: str | None = None


class ContextLostError(Exception):
    """The CUDA context died; the row that killed it is in the journal."""


def compare(contest: Contest, keys: Sequence[str], journal: Journal) -> dict[str, tuple[Row, Samples]]:
    """Gate and time the providers that `keys` name; a row (and its samples, if timed) for each key.

    Rows that the journal has already are taken from it. Errors: ContextLostError.
    """
    found = {key: (journal.rows[key], Samples()) for key in keys if key in journal.rows}
    keys = [key for key in keys if key not in found]
    if not keys:
        return found
    where = machine.device()
    _begin_afresh()

    def failed(key: str, error: Exception, what: str = "") -> None:
        row = _row_of_error(key, error, contest, what)
        found[key] = (row, Samples())
        journal.add(row)

    def failed_in_turn(key: str, error: Exception) -> None:
        failed(key, error)
        if not context.lives():  # the others must not be blamed for what they do from here on
            raise ContextLostError(key) from None

    journal.write({"begin": keys[0]})
    part = "inputs"
    try:
        inputs = contest.inputs()
        part = "truth"
        truth = contest.truth(inputs)
    except Exception as error:
        for key in keys:
            failed(key, error, f"{part}: ")
        if not context.lives():
            raise ContextLostError(keys[0]) from None
        return found

    calls: dict[str, Call] = {}
    memory: dict[str, float | None] = {}
    for key in keys:
        journal.write(_begin(key))
        try:
            calls[key], memory[key] = _gate(contest, key.rpartition("/")[2], inputs, truth, where)
        except Exception as error:  # a provider may fail in any way; the others go on
            failed_in_turn(key, error)
        if key not in calls:
            _leave_memory()  # only here: inside the handler the error still held the frames' tensors
    del truth

    for key, times in time_in_turn(calls, where, lambda key: journal.write(_begin(key)), failed_in_turn).items():
        row = _timed_row(key, times, memory[key], contest)
        found[key] = (row, times)
        journal.add(row)
    return found


def _begin(key: str) -> dict[str, Any]:
    """The line that says so; compiling a model is silent for minutes, and no sign of hanging."""
    return {"begin": key} | ({"patience": COMPILE_SECONDS} if "compile" in key else {})


class _PassedError(Exception):
    """Its result is right, and it has no time here."""


class _WrongError(Exception):
    """Its result is not the truth."""


def _gate(contest: Contest, name: str, inputs: Any, truth: Any, where: torch.device) -> tuple[Call, float | None]:
    """The call of a provider whose result was right, and its peak MiB."""
    if name not in contest.providers:
        raise NotBuiltError(f"{name} has no such op")
    if _interpreted(name) and not interpreter_enabled():
        raise UnavailableError("Triton needs a GPU or its interpreter (TRITON_INTERPRET=1)")
    call = contest.providers[name](inputs)
    out = call()
    synchronize(where)
    try:
        contest.check(out, truth)
    except AssertionError as error:
        raise _WrongError(str(error)) from None
    if _interpreted(name):
        raise _PassedError("right; Triton's interpreter is no timing")
    del out
    # The memory of a graph was taken when it was captured: a replay takes none.
    return call, None if name.endswith("-graph") else peak_mib(call, where)


def _interpreted(provider: str) -> bool:
    return provider.startswith("triton") and machine.device().type != "cuda"


def _row_of_error(key: str, error: Exception, contest: Contest, what: str) -> Row:
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, _PassedError):
        status, text = "passed", str(error)
    elif isinstance(error, _WrongError):
        status, text = "wrong", str(error)
    elif isinstance(error, NotBuiltError) or "does not exist for this op" in text:
        status, text = "not built", str(error)
    elif isinstance(error, UnavailableError | ImportError) or "cannot serve this call" in text:
        status, text = "unavailable", str(error)
    elif isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in text:
        status = "out of memory"
    else:
        status = "failed"
    return row_of(key, status, what + text, bytes=contest.work.bytes, flops=contest.work.flops, size=contest.size)


def _timed_row(key: str, times: Samples, memory: float | None, contest: Contest) -> Row:
    middle = median(times.device)
    dtype = key.split("/")[3]
    return row_of(
        key,
        "timed",
        "",
        median_us=middle * 1e6,
        p20_us=percentile(times.device, 0.2) * 1e6,
        p80_us=percentile(times.device, 0.8) * 1e6,
        wall_us=median(times.wall) * 1e6,
        rounds=len(times.device),
        peak_mib=memory,
        bytes=contest.work.bytes,
        flops=contest.work.flops,
        gbps=contest.work.bytes / middle / 1e9,
        roof_share=machine.roofs().floor_us(contest.work, contest.roof or dtype) / (middle * 1e6),
        size=contest.size,
        roof=contest.roof,
    )


def _begin_afresh() -> None:
    """What the contest before has left behind must not decide this one."""
    _leave_memory()
    # `gradients` repeats a backward, and a compiled graph whose buffers are donated may refuse that.
    torch._functorch.config.donated_buffer = False
    if "torch._dynamo" in sys.modules:
        # torch.compile counts the versions of a function over the whole process: the second would be made for any
        # shape, and the ninth would run eagerly under the name of a compiled one.
        torch.compiler.reset()


def _leave_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(Exception):  # a lost context raises here too; `context.lives` says so
            torch.cuda.empty_cache()


def gradients(out: Any, leaves: Sequence[torch.Tensor], upstream: torch.Tensor) -> Call:
    """The backward of `out` alone, ready to be called again and again."""
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)
