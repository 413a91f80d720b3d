"""Out of memory, in a process, on a GPU or in a data worker: the message names the options to lower."""

import faulthandler
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.engine.toy import after, command, saved
from tmask.engine import predict as prediction
from tmask.engine.checkpoint import CheckpointError
from tmask.engine.device import memory_fault
from tmask.engine.interrupt import Interrupted
from tmask.model.detector import MaskRCNN

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.20 GiB is "
    "free. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."
)
BUS = (
    "DataLoader worker (pid 77) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit."
)
WORKER = "a data worker died, most likely as memory or shared memory (/dev/shm; docker: --shm-size) ran out"


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (torch.OutOfMemoryError(CUDA), "process"),
        (MemoryError(), "process"),
        (RuntimeError("CUDA error: out of memory"), "process"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "process"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory: you"), "process"),
        (OSError(12, "Cannot allocate memory"), "process"),
        (RuntimeError(BUS), "worker"),
        (RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. "), "worker"),
        (RuntimeError("DataLoader worker (pid(s) 77, 78) exited unexpectedly"), "worker"),
        (RuntimeError("unable to write to file </torch_77_1_0>: No space left on device (28)"), "worker"),
        (RuntimeError("DataLoader worker (pid 77) is killed by signal: Segmentation fault. "), None),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), None),
        (OSError(28, "No space left on device"), None),
        (ValueError("images/out of memory.png: no such file"), None),
        (Interrupted(signal.SIGINT), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_it_is_known_by_type_or_words(error: BaseException, fault: str | None) -> None:
    assert memory_fault(error) == fault
    wrapped = RuntimeError("a.png: not done")
    wrapped.__cause__ = error
    assert memory_fault(wrapped) == fault


class Ending:
    """A data set whose item ends the worker by a signal."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> int:
        faulthandler.disable()  # pytest's would print the worker's stack
        os.kill(os.getpid(), self.number)
        return i


@pytest.mark.parametrize(("number", "fault"), [(signal.SIGKILL, "worker"), (signal.SIGABRT, None)])
def test_what_torch_says_itself(number: int, fault: str | None) -> None:
    with pytest.raises(RuntimeError) as error:
        list(DataLoader(Ending(number), num_workers=1))  # type: ignore[arg-type]
    assert memory_fault(error.value) == fault
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**55)
    assert memory_fault(error.value) == "process"


FIRST = "lower, the most effective first:"
LOWER = (
    f"{FIRST} --train.batch_size (now 2), --model.min_size (now 32), --model.max_size (now 64), "
    "--train.precision bf16 (now fp32), --model.box_batch_size (now 8)"
)
LOWER_OF_WORKERS = (
    f"{FIRST} --data.num_workers (now 1), --train.batch_size (now 2), --data.min_sizes (now (24, 32)), "
    "--model.max_size (now 64), --train.precision bf16 (now fp32), --model.box_batch_size (now 8)"
)
GO_ON = (
    "--train.batch_size and --model.* may change in a new run with --init out/checkpoint.pt; to go on from step 3: "
    "tmask train --config out/config.yaml --out out --resume out/checkpoint.pt --device cpu"
)


@pytest.fixture
def fail(data: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command whose model raises after so many calls; returns the last line of its errors."""
    real = MaskRCNN.forward_padded

    def run(calls: int, error: BaseException, name: str, *more: str) -> str:
        monkeypatch.setattr(MaskRCNN, "forward_padded", after(calls, real, error))
        assert command(name, *more) == 1
        monkeypatch.setattr(MaskRCNN, "forward_padded", real)
        return capsys.readouterr().err.splitlines()[-1]

    return run


def test_training_saves_and_names_the_options(fail: Any) -> None:
    what = "out of memory (CUDA out of memory. Tried to allocate 20.00 GiB)"
    line = fail(3, torch.OutOfMemoryError(CUDA), "train", "--train.steps", "6")
    assert line == f"tmask train: error: {what}; {LOWER}; {GO_ON}"
    assert saved(Path("out"))["step"] == 3
    options = ("--out", "none", "--data.num_workers", "1", "--data.min_sizes", "[24,32]")
    said = BUS.split(". ")
    line = fail(0, RuntimeError(BUS), "train", *options)
    assert line == f"tmask train: error: {WORKER} ({said[0]}. {said[1]}); {LOWER_OF_WORKERS}"
    assert not Path("none").exists()


def test_a_state_that_cannot_be_saved_then_is_told_too(fail: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "checkpoint out/checkpoint.pt: cannot be written: No space left on device"
    monkeypatch.setattr("tmask.engine.loop.save_checkpoint", after(0, lambda *_: None, CheckpointError(reason)))
    line = fail(3, MemoryError(), "train", "--train.steps", "6")
    assert line == f"tmask train: error: out of memory; {LOWER}; step 3: {reason}; there is none before it"


def test_evaluation_and_prediction_name_theirs(
    fail: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("train", "--out", "run", "--train.steps", "1") == 0
    lower = f"{FIRST} --batch_size (now 2), --max_detections (now 50), --precision bf16 (now fp32)"
    line = fail(0, MemoryError("Unable to allocate 9 GiB"), "eval", "--num_workers", "1")
    assert line == f"tmask eval: error: out of memory (Unable to allocate 9 GiB); {lower}, --num_workers (now 1)"
    monkeypatch.setattr(
        prediction, "_detect", after(1, prediction._detect, torch.OutOfMemoryError("CUDA out of memory."))
    )
    assert command("predict") == 1
    said = (
        f"tmask predict: error: out of memory (CUDA out of memory); {FIRST} --max_detections (now 1000), "
        "--precision bf16 (now fp32); what is done is in out, and the same command goes on there, but "
        "other settings begin anew with --overwrite"
    )
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert command("predict") == 0
    assert "1 of 4 images were done before" in capsys.readouterr().err
