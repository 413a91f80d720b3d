"""An error in a run: the last whole update is saved first, never a torn or spoilt one, and the way on is told."""

import errno
import json
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bad_inputs import COMMANDS
from tests.engine.toy import (
    BrokenError,
    Loader,
    Model,
    after,
    assert_same,
    broken_model,
    command,
    copies,
    files,
    logged,
    run,
    saved,
    toy,
)
from tmask import cli
from tmask.data.images import BadImageError
from tmask.data.loader import EpochBatchSampler
from tmask.data.shapes import write_shapes
from tmask.engine.checkpoint import CheckpointError
from tmask.engine.log import JsonLines, NonFiniteLossError
from tmask.engine.optimizer import WeightAverage

# No checkpoint comes by itself; three batches an update, so that an error may come in the middle of one.
RARE = {"accumulate": 3, "ema_decay": 0.9, "checkpoint_every": 100, "log_every": 1, "clip_norm": 0.5}


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", "log.jsonl")


class BrokenLoader(Loader):
    """An item that cannot be read, in the second batch of the fourth update."""

    def _batches(self) -> Iterator[Any]:
        for item in super()._batches():
            if len(self.read) == 11:
                raise BadImageError("7.png: cannot be read")
            yield item


# Errors when three updates are whole: of a forward pass, or of a patched function after so many calls. Two come in the
# second batch of an update, which is the first of an epoch.
FORWARD = {"forward": BrokenError, "memory": MemoryError, "exit": SystemExit}
PATCHED = {
    "backward": (Tensor, "backward", 10, None),
    "clipping": (torch.nn.utils, "clip_grad_norm_", 3, None),
    "log": (JsonLines, "write", 2, full()),
}


@pytest.mark.parametrize("place", ["data", "evaluation", *FORWARD, *PATCHED])
def test_a_run_goes_on_behind_the_last_whole_update(place: str, tmp_path: Path) -> None:
    whole, first, second = copies(3)
    run(tmp_path / "whole", whole, toy(**RARE))
    options: dict[str, Any] = {"loader": BrokenLoader()} if place == "data" else {}
    if place == "evaluation":
        options["evaluate_fn"] = after(0, lambda model: {})
    if place in FORWARD:
        first.forward_padded = after(10, first.forward_padded, FORWARD[place]())  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        if place in PATCHED:
            owner, name, calls, error = PATCHED[place]
            patch.setattr(owner, name, after(calls, getattr(owner, name), error))
        expected = pytest.raises((BrokenError, BadImageError, OSError, MemoryError, SystemExit))
        with expected as told:
            run(tmp_path / "parts", first, toy(**RARE, eval_every=3 * (place == "evaluation")), **options)
    assert (told.value.checkpoint_step, told.value.not_saved) == (3, "")  # type: ignore[union-attr]
    assert told.value.__notes__ == [f"{tmp_path / 'parts' / 'checkpoint.pt'} is the checkpoint of step 3"]
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"checkpoint.pt", "log.jsonl"}
    run(tmp_path / "parts", second, toy(**RARE), resume=True)
    assert first.seen[:9] + second.seen == whole.seen
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "parts"))


@pytest.mark.parametrize(("owner", "name"), [(torch.optim.AdamW, "step"), (WeightAverage, "update")])
def test_an_update_that_is_half_written_is_not_saved(owner: Any, name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """The checkpoint on disk stays."""
    monkeypatch.setattr(owner, name, after(4, getattr(owner, name)))
    with pytest.raises(BrokenError) as error:
        run(tmp_path, config=toy(**{**RARE, "checkpoint_every": 2}))
    torn = "step 5 broke off while it changed the weights, so that they cannot be saved"
    assert error.value.__notes__ == [f"{torn}; {tmp_path / 'checkpoint.pt'} is the checkpoint of step 4"]
    assert saved(tmp_path)["step"] == 4


def test_a_worker_that_dies_while_the_weights_are_written_costs_no_step(tmp_path: Path, monkeypatch: Any) -> None:
    """torch's handler raises wherever the program is."""

    def handler(*_: Any) -> None:
        raise BrokenError

    def step(self: Any, *args: Any) -> Any:
        result = real(self, *args)
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGCHLD)
        return result

    real, calls = torch.optim.AdamW.step, list[int]()
    before = signal.signal(signal.SIGCHLD, handler)
    try:
        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(BrokenError) as error:
            run(tmp_path, config=toy(**RARE))
        assert signal.getsignal(signal.SIGCHLD) is handler
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert error.value.__notes__ == [f"{tmp_path / 'checkpoint.pt'} is the checkpoint of step 5"]


class Steep(Model):
    """Its loss is finite, and its gradient at the fourth step is not."""

    def forward_padded(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        losses = super().forward_padded(*args, **kwargs)
        steep = (self.conv.bias.sum() * 0).sqrt() if self.calls == 4 else 0.0
        return losses | {"loss_b": losses["loss_b"] + steep}


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    """Neither by another error that comes before the losses are read, nor by a checkpoint that is due."""
    config = toy(log_every=100, checkpoint_every=2)
    with pytest.raises(BrokenError) as error:
        run(tmp_path, broken_model(3, poison_at=2), config)
    assert error.value.not_saved.startswith("step 3: the loss is not finite: loss_b = nan.")  # type: ignore[attr-defined]
    assert error.value.checkpoint_step == saved(tmp_path)["step"] == 2  # type: ignore[attr-defined]
    with pytest.raises(NonFiniteLossError, match=r"^step 4: the weights are not finite: conv.bias\. Lower train.lr"):
        run(tmp_path, Steep(), config)
    assert saved(tmp_path)["step"] == 2


def test_a_failed_checkpoint_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", after(0, lambda *_: None, full()))  # a second call would not raise
    with pytest.raises(CheckpointError, match="there is none before it"):
        run(tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("resumed", [False, True])
def test_an_error_before_the_first_step_changes_nothing(tmp_path: Path, resumed: bool) -> None:
    if resumed:
        run(tmp_path, config=toy(steps=3))
    before = files(tmp_path)
    with pytest.raises(BrokenError) as error:
        run(tmp_path, broken_model(0), resume=resumed or None)
    assert files(tmp_path) == before
    assert error.value.checkpoint_step == (3 if resumed else None)  # type: ignore[attr-defined]


# The command.
def small_run(*more: str) -> int:
    return command("train", "--train.steps", "6", "--train.log_every", "1", *more)


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Twelve images in the folder of the test; the order in which they come."""
    monkeypatch.chdir(tmp_path)
    write_shapes("data", num_images=12, seed=1, size=32)
    sampler = EpochBatchSampler(12, batch_size=2, shuffle=True, aspect_ratios=[1.0] * 12, drop_last=True)
    return [i for batch in sampler.batches(0) for i in batch]


def spoil(image: int) -> Path:
    """Cut off the end of an image: its header is good."""
    path = Path(f"data/images/{image:06}.png")
    path.write_bytes(path.read_bytes()[:-30])
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_midway_costs_no_step(workers: int, order: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """And without it the run goes on as one that has left it out from the start."""
    bad = spoil(order[7])  # in the fourth batch
    assert small_run("--data.num_workers", str(workers)) == 1
    fault = f"{bad}: cannot be read as an image: image file is truncated"
    way_out = "mend the file, or add --data.skip_bad true --data.check full to leave such images out"
    again = "tmask train --config out/config.yaml --out out --resume out/checkpoint.pt --device cpu"
    said = f"tmask train: error: {fault}; {way_out}; to go on from step 3: {again}\n"
    assert capsys.readouterr().err.endswith(said)
    assert saved(Path("out"))["step"] == 3
    argv = [*shlex.split(again)[1:], "--data.skip_bad", "true", "--data.check", "full"]
    with pytest.warns(UserWarning, match=re.escape(f"data/annotations.json: left out 1 of 12 images: {fault}")):
        assert cli.main(argv) == 0
    assert Path("out/skipped.txt").read_text() == f"train: {fault}\n"
    with pytest.warns(UserWarning, match="left out 1 of 12 images"):
        assert small_run("--out", "whole", "--data.skip_bad", "true") == 0
    assert_same(saved(Path("out")), saved(Path("whole")))
    assert [row["loss"] for row in logged(Path("out"))] == [row["loss"] for row in logged(Path("whole"))]


def test_an_error_in_the_first_step_leaves_no_folder(order: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does it touch the run that is there."""
    bad = spoil(order[0])
    fault = f"tmask train: error: {bad}: cannot be read as an image: image file is truncated\n"
    assert small_run("--out", "new/folder") == 1
    assert capsys.readouterr().err == fault
    assert not Path("new").exists()
    for option, code in (("--data.min_crop 2", 2), ("--data.train_annotations data/images/000001.png", 1)):
        assert small_run("--out", "new/folder", *option.split()) == code
        assert not Path("new").exists()
    write_shapes("data", num_images=12, seed=1, size=32)
    assert small_run("--train.steps", "1") == 0
    before = files("out")
    spoil(order[0])
    assert small_run("--overwrite") == 1
    assert files("out") == before


@pytest.mark.usefixtures("order")
def test_skipped_validation_images_are_told_beside_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    val = ["--data.val_images", "data/images", "--data.val_annotations", "data/annotations.json", "--train.steps", "1"]
    bad = [spoil(2), spoil(5)]
    bad[0].unlink()
    with pytest.warns(UserWarning, match="left out 2 of 12 images"):
        assert small_run(*val, "--data.skip_bad", "true") == 0
    said = "2 images are left out: the figures are of the others"
    assert said in capsys.readouterr().out
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert metrics["images_left_out"] == 2
    faults = [f"{bad[0]}: no such file (image id 3)", f"{bad[1]}: cannot be read as an image: image file is truncated"]
    lines = Path("out/skipped.txt").read_text().splitlines()
    assert lines == [f"{split}: {fault}" for split in ("train", "val") for fault in faults]
    assert not [path for path in Path("out/pictures").iterdir() if "000002" in path.name]
    argv = ["eval", *COMMANDS["eval"].replace("run/", "out/").split()]
    with pytest.warns(UserWarning, match="left out 2 of 12 images"):
        assert cli.main([*argv, "--skip_bad", "true", "--out", "figures"]) == 0
    assert said in capsys.readouterr().out
    assert json.loads(Path("figures/metrics.json").read_text()) == pytest.approx(metrics)
    # The figures are those of a data set without the two.
    content = json.loads(Path("data/annotations.json").read_text())
    content["images"] = [item for item in content["images"] if item["id"] not in (3, 6)]
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] not in (3, 6)]
    Path("data/annotations.json").write_text(json.dumps(content))
    assert cli.main([*argv, "--out", "others"]) == 0
    del metrics["images_left_out"]
    assert json.loads(Path("others/metrics.json").read_text()) == pytest.approx(metrics)
