"""One comparison: the same work by several providers on the same inputs. Right first, then timed, in turn.

`compare` asks each provider of a `Contest` for its call, runs the call once against the truth, and times the calls that
were right. Whatever a provider does, its row says so and the others go on.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._functorch.config

from bench import machine
from bench.machine import Work
from bench.process import Journal
from bench.result import VARIANT, Row
from bench.timing import Samples, median, peak_mib, percentile, synchronize, time_in_turn
from tmask_kernels.backend import interpreter_enabled

Call = Callable[[], Any]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
COMPILE_SECONDS = 400.0  # compiling a model is silent for minutes, and no sign of hanging


class OutcomeError(Exception):
    """What becomes of a provider in place of a time: a status of `bench.result` and why."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class UnavailableError(OutcomeError):
    """A provider cannot serve here: its package, its dtype, its device or its backend is missing."""

    def __init__(self, reason: str) -> None:
        super().__init__("unavailable", reason)


class ContextLostError(Exception):
    """The CUDA context died; the row that killed it is in the journal."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """The work of one variant.

    A provider maps the inputs to the call to time, and does there what is not timed (a forward pass before a timed
    backward, the capture of a graph). `check(output, truth, provider)` raises AssertionError. `roof` is the dtype of
    the products where it is not the key's.
    """

    inputs: Callable[[], Any]
    providers: Mapping[str, Callable[[Any], Call]]
    truth: Callable[[Any], Any]
    check: Callable[[Any, Any, str], None]
    work: Work
    size: str = "full"
    roof: str | None = None


def compare(contest: Contest, keys: Sequence[str], journal: Journal) -> dict[str, tuple[Row, Samples]]:
    """Gate and time the providers that `keys` name; return a row for each key, and its samples.

    Raises:
        ContextLostError: the CUDA context died; the other keys have no row.
    """
    found: dict[str, tuple[Row, Samples]] = {}
    where = machine.device()
    _begin_afresh()

    def settle(row: Row, samples: Samples) -> None:
        found[row.key] = row, samples
        journal.write(row.line())

    def begin(key: str) -> None:
        journal.write({"begin": key, "patience": COMPILE_SECONDS if "compile" in key else 0.0})

    def failed(error: Exception, *keys: str, what: str = "") -> None:
        for key in keys:
            settle(_row_of_error(key, error, contest, what), Samples())
        if not machine.lives():  # the other providers must not be blamed for their later errors
            raise ContextLostError(keys[0]) from None

    begin(keys[0])
    what = "inputs: "
    try:
        inputs = contest.inputs()
        what = "truth: "
        truth = contest.truth(inputs)
    except Exception as error:
        failed(error, *keys, what=what)
        return found

    calls: dict[str, Call] = {}
    memory: dict[str, float | None] = {}
    for key in keys:
        begin(key)
        try:
            calls[key], memory[key] = _gate(contest, key.rpartition("/")[2], inputs, truth, where)
        except Exception as error:
            failed(error, key)
        if key not in calls:
            _leave_memory()  # only here: inside the handler the error still held the frames' tensors
    del truth

    for key, times in time_in_turn(calls, where, begin, lambda key, error: failed(error, key)).items():
        settle(_timed_row(key, times, memory[key], contest), times)
    return found


def _gate(contest: Contest, name: str, inputs: Any, truth: Any, where: torch.device) -> tuple[Call, float | None]:
    """Return the call of a provider whose result was right, and its peak MiB."""
    if name not in contest.providers:
        raise UnavailableError(f"{name} has no such op")
    interpreted = name.startswith("triton") and where.type != "cuda"
    if interpreted and not interpreter_enabled():
        raise UnavailableError("Triton needs a GPU or its interpreter (TRITON_INTERPRET=1)")
    call = contest.providers[name](inputs)
    out = call()
    synchronize(where)
    try:
        contest.check(out, truth, name)
    except AssertionError as error:
        raise OutcomeError("wrong", str(error)) from None
    if interpreted:
        raise OutcomeError("passed", "right; Triton's interpreter is no timing")
    del out
    # The capture took the memory of a graph: a replay takes none.
    return call, None if name.endswith("-graph") else peak_mib(call, where)


def _row_of_error(key: str, error: Exception, contest: Contest, what: str) -> Row:
    status, text = "failed", f"{type(error).__name__}: {error}"
    if isinstance(error, OutcomeError):
        status, text = error.status, str(error)
    elif isinstance(error, ImportError) or "does not exist for this op" in text or "cannot serve this call" in text:
        status, text = "unavailable", str(error)
    elif isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in text:
        status = "out of memory"
    return Row(key=key, status=status, reason=what + text, **_cost(contest))


def _timed_row(key: str, samples: Samples, memory: float | None, contest: Contest) -> Row:
    low, middle, high = (percentile(samples.device, share) * 1e6 for share in (0.2, 0.5, 0.8))
    row = Row(key=key, status="timed", rounds=len(samples.device), peak_mib=memory, roof=contest.roof, **_cost(contest))
    row.median_us, row.p20_us, row.p80_us, row.wall_us = middle, low, high, median(samples.wall) * 1e6
    row.gbps = row.bytes / middle / 1e3
    row.roof_share = machine.roofs().floor_us(contest.work, row.roof or row.dtype) / middle
    return row


def _cost(contest: Contest) -> dict[str, Any]:
    return {"bytes": contest.work.bytes, "flops": contest.work.flops, "size": contest.size}


def _begin_afresh() -> None:
    """Drop the state of the last contest that could decide this one."""
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
        with contextlib.suppress(Exception):  # a lost context raises here too; `machine.lives` says so
            torch.cuda.empty_cache()


def gradients(out: Any, leaves: Sequence[torch.Tensor], upstream: torch.Tensor) -> Call:
    """Return the backward of `out` alone, which can be called again and again."""
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def variants(
    *,
    cases: Sequence[str],
    providers: Sequence[str],
    modes: Sequence[str] = ("forward",),
    dtypes: Sequence[str] = ("fp32",),
    layouts: Sequence[str] = ("-",),
    where: Callable[..., bool] = lambda case, mode, dtype, layout, provider: True,
) -> pytest.MarkDecorator:
    """Parametrise ``test(case, mode, dtype, layout, provider, contest)``; `where` leaves combinations out.

    "-" is a dtype or layout that does not matter.
    """
    rows = [row for row in itertools.product(cases, modes, dtypes, layouts, providers) if where(*row)]
    return pytest.mark.parametrize(VARIANT, rows, ids=["-".join(row) for row in rows])
