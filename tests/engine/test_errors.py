"""An error in a run: the last whole update is saved first, never a torn or spoilt one, and the way on is told."""

import dataclasses
import errno
import json
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bad_inputs import COMMANDS
from tests.engine.test_resume import assert_same
from tests.engine.toy import CONFIG, Loader, Model, run
from tmask import cli
from tmask.data.images import BadImageError
from tmask.data.loader import EpochBatchSampler
from tmask.data.shapes import write_shapes
from tmask.engine.checkpoint import CheckpointError, load_checkpoint
from tmask.engine.ema import WeightAverage
from tmask.engine.log import JsonLines, read_log
from tmask.engine.report import NonFiniteLossError
from tmask.engine.train import _Saver

# No checkpoint comes by itself; three batches an update, so that an error may come in the middle of one.
RARE = dataclasses.replace(CONFIG, accumulate=3, ema_decay=0.9, checkpoint_every=100, log_every=1, clip_norm=0.5)


class BrokenError(Exception):
    pass


def after(calls: int, function: Callable[..., Any], error: BaseException | None = None) -> Callable[..., Any]:
    """`function`, which raises once it has done its work for that many and one times."""
    count = 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        result = function(*args, **kwargs)
        if count == calls + 1:
            raise error or BrokenError
        return result

    return broken


class BrokenLoader(Loader):
    """An item that cannot be read, in the second batch of the fifth update."""

    def _batches(self) -> Iterator[Any]:
        for item in super()._batches():
            if len(self.read) == 14:
                raise BadImageError("7.png: cannot be read")
            yield item


def broken_run(place: str, out: Path, model: Model, patch: pytest.MonkeyPatch) -> None:
    """A run with an error at `place`, when four updates are whole."""
    options: dict[str, Any] = {}
    config = RARE
    if place == "data":
        options["loader"] = BrokenLoader()
    elif place == "forward":
        model.forward_padded = after(13, model.forward_padded)  # type: ignore[method-assign]
    elif place == "backward":
        patch.setattr(Tensor, "backward", after(13, Tensor.backward))
    elif place == "clipping":
        patch.setattr(torch.nn.utils, "clip_grad_norm_", after(4, torch.nn.utils.clip_grad_norm_))
    elif place == "log":
        full = OSError(errno.ENOSPC, "No space left on device", "log.jsonl")
        patch.setattr(JsonLines, "write", after(3, JsonLines.write, full))
    elif place == "evaluation":
        config = dataclasses.replace(config, eval_every=4)
        options["evaluate_fn"] = after(0, lambda model: {})
    elif place == "memory":
        model.forward_padded = after(13, model.forward_padded, MemoryError())  # type: ignore[method-assign]
    elif place == "exit":
        model.forward_padded = after(13, model.forward_padded, SystemExit(3))  # type: ignore[method-assign]
    with pytest.raises((BrokenError, BadImageError, OSError, MemoryError, SystemExit)) as error:
        run(out, model, config, **options)
    assert (error.value.checkpoint_step, error.value.not_saved) == (4, "")  # type: ignore[union-attr]
    assert error.value.__notes__ == [f"{out / 'checkpoint.pt'} is the checkpoint of step 4"]


PLACES = ("data", "forward", "backward", "clipping", "log", "evaluation", "memory", "exit")


@pytest.mark.parametrize("place", PLACES)
def test_a_run_goes_on_behind_the_last_whole_update(place: str, tmp_path: Path) -> None:
    whole, first, second = Model(), Model(), Model()
    first.load_state_dict(whole.state_dict())
    run(tmp_path / "whole", whole, RARE)
    with pytest.MonkeyPatch.context() as patch:
        broken_run(place, tmp_path / "parts", first, patch)
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"checkpoint.pt", "log.jsonl"}
    run(tmp_path / "parts", second, RARE, resume=tmp_path / "parts" / "checkpoint.pt")
    assert first.seen[:12] + second.seen == whole.seen
    assert_same(*[load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts")])


@pytest.mark.parametrize("place", ["optimizer", "average"])
def test_an_update_that_is_half_written_is_not_saved(place: str, tmp_path: Path, monkeypatch: Any) -> None:
    """The checkpoint on disk stays."""
    owner, name = {"optimizer": (torch.optim.AdamW, "step"), "average": (WeightAverage, "update")}[place]
    config = dataclasses.replace(RARE, checkpoint_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, after(4, getattr(owner, name)))
        with pytest.raises(BrokenError) as error:
            run(tmp_path / "parts", Model(), config)
    path = tmp_path / "parts" / "checkpoint.pt"
    torn = "step 5 broke off while it changed the weights, so that they cannot be saved"
    assert error.value.__notes__ == [f"{torn}; {path} is the checkpoint of step 4"]
    assert load_checkpoint(path)["step"] == 4


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
            run(tmp_path, Model(), RARE)
        assert signal.getsignal(signal.SIGCHLD) is handler
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert error.value.__notes__ == [f"{tmp_path / 'checkpoint.pt'} is the checkpoint of step 5"]


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    """Neither by another error that comes before the losses are read, nor by a checkpoint that is due."""
    config = dataclasses.replace(CONFIG, log_every=100, checkpoint_every=2)
    model = Model(poison_at=2)
    model.forward_padded = after(3, model.forward_padded)  # type: ignore[method-assign]
    with pytest.raises(BrokenError) as error:
        run(tmp_path, model, dataclasses.replace(config, checkpoint_every=2))
    assert error.value.not_saved.startswith("step 3: the loss is not finite: loss_b = nan.")  # type: ignore[attr-defined]
    assert error.value.checkpoint_step == load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2  # type: ignore[attr-defined]

    class Steep(Model):
        """Its loss is finite, and its gradient is not."""

        def forward_padded(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            losses = super().forward_padded(*args, **kwargs)
            steep = (self.conv.bias.sum() * 0).sqrt() if self.calls == 4 else 0.0
            return losses | {"loss_b": losses["loss_b"] + steep}

    with pytest.raises(NonFiniteLossError, match=r"^step 4: the weights are not finite: conv.bias\. Lower train.lr"):
        run(tmp_path, Steep(), config)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2


def test_a_checkpoint_that_cannot_be_written_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = Model()
    model.forward_padded = after(7, model.forward_padded)  # type: ignore[method-assign]
    real = _Saver.rescue

    def rescue(*args: Any) -> str:
        monkeypatch.setattr(torch, "save", full)
        return real(*args)

    monkeypatch.setattr(_Saver, "rescue", rescue)
    with pytest.raises(BrokenError) as error:
        run(tmp_path, model)
    path = tmp_path / "checkpoint.pt"
    failed = f"step 7: checkpoint {path}: cannot be written: No space left on device; the last good one is of step 5"
    assert error.value.__notes__ == [f"{failed}; {path} is the checkpoint of step 5"]
    assert load_checkpoint(path)["step"] == 5
    assert sorted(item.name for item in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl"]


def test_a_failed_checkpoint_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    calls: list[int] = []
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="there is none before it"):
        run(tmp_path, Model())
    assert len(calls) == 1


@pytest.mark.parametrize("resumed", [False, True])
def test_an_error_before_the_first_step_changes_nothing(tmp_path: Path, resumed: bool) -> None:
    if resumed:
        run(tmp_path, Model(), dataclasses.replace(CONFIG, steps=3))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model = Model()
    model.forward_padded = after(0, model.forward_padded)  # type: ignore[method-assign]
    with pytest.raises(BrokenError) as error:
        run(tmp_path, model, resume=tmp_path / "checkpoint.pt" if resumed else None)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert error.value.checkpoint_step == (3 if resumed else None)  # type: ignore[attr-defined]


# The command.
def small_run(*more: str) -> int:
    return cli.main(["train", *COMMANDS["train"].split(), "--train.steps", "6", "--train.log_every", "1", *more])


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
    command = "tmask train --config out/config.yaml --out out --resume out/checkpoint.pt --device cpu"
    said = f"tmask train: error: {fault}; {way_out}; to go on from step 3: {command}\n"
    captured = capsys.readouterr()
    assert captured.err.endswith(said)
    assert load_checkpoint("out/checkpoint.pt")["step"] == 3
    argv = [*shlex.split(command)[1:], "--data.skip_bad", "true", "--data.check", "full"]
    with pytest.warns(UserWarning, match=re.escape(f"data/annotations.json: left out 1 of 12 images: {fault}")):
        assert cli.main(argv) == 0
    assert Path("out/skipped.txt").read_text() == f"train: {fault}\n"
    with pytest.warns(UserWarning, match="left out 1 of 12 images"):
        assert small_run("--out", "whole", "--data.skip_bad", "true") == 0
    assert_same(*[load_checkpoint(f"{name}/checkpoint.pt") for name in ("out", "whole")])
    assert [row["loss"] for row in read_log("out/log.jsonl")] == [row["loss"] for row in read_log("whole/log.jsonl")]


def test_an_error_in_the_first_step_leaves_no_folder(order: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does it touch the run that stands there."""
    bad = spoil(order[0])
    fault = f"tmask train: error: {bad}: cannot be read as an image: image file is truncated\n"
    assert small_run("--out", "new/folder") == 1
    assert capsys.readouterr().err == fault
    assert not Path("new").exists()
    for option, code in (("--data.min_crop 2", 2), ("--data.train_annotations data/images/000001.png", 1)):
        assert small_run("--out", "new/folder", *option.split()) == code
        assert not Path("new").exists()
    write_shapes("data", num_images=12, seed=1, size=32)
    assert small_run() == 0
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    spoil(order[0])
    assert small_run("--overwrite") == 1
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before


def test_skipped_validation_images_are_told_beside_the_figures(
    order: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    val = ["--data.val_images", "data/images", "--data.val_annotations", "data/annotations.json", "--train.steps", "1"]
    bad = [spoil(2), spoil(5)]
    bad[0].unlink()
    with pytest.warns(UserWarning, match="left out 2 of 12 images"):
        assert small_run(*val, "--data.skip_bad", "true") == 0
    said = "2 images are left out: the figures are of the others"
    assert said in capsys.readouterr().out
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert metrics["images_left_out"] == 2
    lines = Path("out/skipped.txt").read_text().splitlines()
    expected = [
        f"{bad[0]}: no such file (image id 3)",
        f"{bad[1]}: cannot be read as an image: image file is truncated",
    ]
    assert lines == [f"{split}: {text}" for split in ("train", "val") for text in expected]
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
