"""Out of memory, in a process, on a GPU or in a data worker: the message names the options to lower."""

import faulthandler
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.bad_inputs import COMMANDS
from tests.engine.test_errors import after
from tmask import cli
from tmask.data.shapes import write_shapes
from tmask.engine import predict as prediction
from tmask.engine.checkpoint import CheckpointError, load_checkpoint
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


def train(*more: str) -> int:
    return cli.main(["train", *COMMANDS["train"].split(), "--train.steps", "6", *more])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_shapes("data", num_images=4, seed=1, size=32)
    return tmp_path


LOWER = (
    "lower, the most effective first: --train.batch_size (now 2), --model.min_size (now 32), --model.max_size (now 64)"
    ", --train.precision bf16 (now fp32), --model.box_batch_size (now 8)"
)
GO_ON = (
    "--train.batch_size and --model.* may change in a new run with --init out/checkpoint.pt; to go on from step 3: "
    "tmask train --config out/config.yaml --out out --resume out/checkpoint.pt --device cpu"
)


def test_training_saves_and_names_the_options(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = MaskRCNN.forward_padded
    monkeypatch.setattr(MaskRCNN, "forward_padded", after(3, real, torch.OutOfMemoryError(CUDA)))
    assert train() == 1
    what = "out of memory (CUDA out of memory. Tried to allocate 20.00 GiB)"
    assert capsys.readouterr().err.splitlines()[-1] == f"tmask train: error: {what}; {LOWER}; {GO_ON}"
    assert load_checkpoint("out/checkpoint.pt")["step"] == 3
    monkeypatch.setattr(MaskRCNN, "forward_padded", after(0, real, RuntimeError(BUS)))
    assert train("--out", "none", "--data.num_workers", "1", "--data.min_sizes", "[24,32]") == 1
    lower = (
        "lower, the most effective first: --data.num_workers (now 1), --train.batch_size (now 2), --data.min_sizes"
        " (now (24, 32)), --model.max_size (now 64), --train.precision bf16 (now fp32), --model.box_batch_size (now 8)"
    )
    said = BUS.split(". ")
    line = f"tmask train: error: {WORKER} ({said[0]}. {said[1]}); {lower}"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert not Path("none").exists()


def test_a_state_that_cannot_be_saved_then_is_told_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise CheckpointError("checkpoint out/checkpoint.pt: cannot be written: No space left on device")

    real = MaskRCNN.forward_padded
    monkeypatch.setattr(MaskRCNN, "forward_padded", after(3, real, MemoryError()))
    monkeypatch.setattr("tmask.engine.train.save_checkpoint", full)
    assert train() == 1
    failed = "step 3: checkpoint out/checkpoint.pt: cannot be written: No space left on device; there is none before it"
    assert capsys.readouterr().err.splitlines()[-1] == f"tmask train: error: out of memory; {LOWER}; {failed}"


def test_evaluation_and_prediction_name_theirs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--out", "run", "--train.steps", "1") == 0
    real = MaskRCNN.forward_padded
    monkeypatch.setattr(MaskRCNN, "forward_padded", after(0, real, MemoryError("Unable to allocate 9 GiB")))
    assert cli.main(["eval", *COMMANDS["eval"].split(), "--num_workers", "1"]) == 1
    lower = "lower, the most effective first: --batch_size (now 2), --max_detections (now 50), --precision bf16"
    said = f"tmask eval: error: out of memory (Unable to allocate 9 GiB); {lower} (now fp32), --num_workers (now 1)"
    assert capsys.readouterr().err.splitlines()[-1] == said
    monkeypatch.setattr(
        prediction, "_detect", after(1, prediction._detect, torch.OutOfMemoryError("CUDA out of memory."))
    )
    monkeypatch.setattr(MaskRCNN, "forward_padded", real)
    predict = ["predict", *COMMANDS["predict"].split()]
    assert cli.main(predict) == 1
    said = (
        "tmask predict: error: out of memory (CUDA out of memory); lower, the most effective first: --max_detections "
        "(now 1000), --precision bf16 (now fp32); what is done is in out, and the same command goes on there, but "
        "other settings begin anew with --overwrite"
    )
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert cli.main(predict) == 0
    assert "1 of 4 images were done before" in capsys.readouterr().err
