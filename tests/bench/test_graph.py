"""A capture that breaks says why, and gives its process up; without a GPU there is no capture."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from bench import graph, machine
from bench.contest import UnavailableError


class BreakingCapture:
    """As a CUDA graph whose capture broke: ending it is an error of its own."""

    def __init__(self, recorded: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


def test_a_broken_capture_gives_the_process_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_given_up", False)
    monkeypatch.setattr(graph, "device", lambda: SimpleNamespace(type="cuda"))
    for name in ("Stream", "current_stream", "stream", "synchronize", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", BreakingCapture)
    calls = []

    def call() -> None:
        calls.append(torch.is_autocast_cache_enabled())
        if len(calls) > graph.WARM_UP:
            raise ValueError("the host waits for the device")

    before = torch.is_autocast_cache_enabled()
    with pytest.raises(ValueError, match="the host waits for the device"):
        graph.captured(call)
    assert not machine.lives()
    assert calls == [False] * (graph.WARM_UP + 1)
    assert torch.is_autocast_cache_enabled() == before


def test_a_graph_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "device", lambda: torch.device("cpu"))
    with pytest.raises(UnavailableError, match="a CUDA graph needs a GPU"):
        graph.captured(lambda: None)
