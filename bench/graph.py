"""CUDA graphs: a call recorded once and replayed with a single launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.contest import Call, UnavailableError
from bench.machine import device, give_up

WARM_UP = 3  # calls before the capture: compilation, allocator and library handles must not fall into it


def captured(call: Callable[[], Any]) -> Call:
    """Record `call` and return its replay, which fills and returns the same output tensors each time.

    The tensors that `call` reads must keep their memory, so autocast caches no weights meanwhile.

    Raises:
        UnavailableError: there is no GPU.
        Exception: `call` makes the host wait for the device, or fails.
    """
    if device().type != "cuda":
        raise UnavailableError("a CUDA graph needs a GPU")
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                out = call()
        except Exception as error:
            # The allocator and the generator still believe in the capture, so later work would fail.
            give_up()
            raise error.__context__ or error from None  # the end of a broken capture fails too, and hides its cause
    finally:
        torch.set_autocast_cache_enabled(cache)

    def replay() -> Any:
        graph.replay()
        return out

    return replay
