"""A resumed run is the uninterrupted one, bit for bit, and reads nothing twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.toy import CPU, BrokenError, Loader, Model, after, assert_same, batch, copies, logged, run, saved, toy
from tmask.config import KeypointConfig, ModelConfig
from tmask.engine.checkpoint import CheckpointError, save_checkpoint
from tmask.engine.loop import _Saver
from tmask.engine.state import BatchStream

PLAIN = {"log_every": 1}
# Five batches an epoch: with two batches an update the third update crosses the border of an epoch.
EVERYTHING = {
    **{"accumulate": 2, "ema_decay": 0.9, "schedule": "cosine", "warmup_steps": 4, "clip_norm": 0.5},
    **{"weight_decay": 0.1, "log_every": 1},
}


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and rate of each update."""
    return [(row["step"], row["loss"], row["lr"]) for row in logged(folder)]


@pytest.mark.parametrize(
    ("settings", "stop"),
    [
        pytest.param(PLAIN, 5, id="plain-epoch-end"),
        pytest.param(PLAIN, 7, id="plain-mid-epoch"),
        pytest.param(EVERYTHING, 6, id="everything-mid-epoch"),
        pytest.param(EVERYTHING, 2, id="everything-before-the-border"),
        pytest.param(EVERYTHING, 3, id="everything-across-the-border"),
        pytest.param(EVERYTHING, 5, id="everything-epoch-end"),
        pytest.param({**EVERYTHING, "optimizer": "sgd"}, 4, id="sgd"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, settings: Any, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed it goes on from the last checkpoint. After an error: test_errors.py."""
    config, (whole, first, second) = toy(**settings), copies(3)
    loaders = [Loader() for _ in range(3)]
    run(tmp_path / "whole", whole, config, loader=loaders[0])
    used = stop * config.accumulate
    first.forward_padded = after(used + config.accumulate, first.forward_padded)  # type: ignore[method-assign]
    with monkeypatch.context() as patch:
        patch.setattr(_Saver, "rescue", lambda *_: "")
        with pytest.raises(BrokenError):
            run(tmp_path / "parts", first, toy(**settings, checkpoint_every=stop), loader=loaders[1])
    assert saved(tmp_path / "parts")["step"] == stop
    torch.manual_seed(99)
    result = run(tmp_path / "parts", second, config, loader=loaders[2], resume=True)
    assert first.seen[:used] + second.seen == whole.seen
    assert loaders[2].read == loaders[0].read[used:]  # nothing already used is read again
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "parts"))
    assert result.step == config.steps


def test_a_loader_that_cannot_begin_inside_an_epoch_is_refused() -> None:
    plain = [batch(1.0)]
    with pytest.raises(ValueError, match="train_loader: expected a batch sampler with set_epoch"):
        BatchStream(plain, CPU, epoch=1, position=1)
    assert next(iter(BatchStream(plain, CPU, epoch=1))) is plain[0]


def test_data_too_short_for_the_position_is_refused_before_anything_changes(tmp_path: Path) -> None:
    run(tmp_path)
    save_checkpoint(tmp_path / "checkpoint.pt", saved(tmp_path) | {"position": 6, "step": 3})
    log = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="expected the data of the run, 6 batches an epoch or more, got 5"):
        run(tmp_path, resume=True)
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_an_average_turned_on_later_begins_at_the_weights(tmp_path: Path) -> None:
    run(tmp_path)
    evaluated = []

    def evaluate(model: Model) -> dict[str, float]:
        evaluated.append(model.conv.weight.detach().clone())
        return {"segm/AP": 0.0}

    run(tmp_path, config=toy(ema_decay=0.5), resume=True, evaluate_fn=evaluate)
    assert torch.equal(evaluated[0], saved(tmp_path)["model"]["conv.weight"])
    result = run(tmp_path, config=toy(ema_decay=0.5, steps=13), resume=True)
    end = saved(tmp_path)
    assert torch.equal(end["ema"]["conv.weight"], end["model"]["conv.weight"])
    assert torch.equal(result.model.conv.weight, end["model"]["conv.weight"])


def test_a_finished_run_is_saved_elsewhere_as_it_is(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b", resume=tmp_path / "a" / "checkpoint.pt")
    assert_same(saved(tmp_path / "a"), saved(tmp_path / "b"))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_memory_format_may_change(tmp_path: Path, optimizer: Any) -> None:
    models = [Model() for _ in range(3)]
    for model in models:
        model.conv = nn.Conv2d(3, 1, 3, padding=1)
        model.load_state_dict(models[0].state_dict())
    settings: dict[str, Any] = {"optimizer": optimizer, "lr": 0.01}
    run(tmp_path / "whole", models[0], toy(**settings))
    run(tmp_path, models[1], toy(steps=5, channels_last=False, **settings))
    run(tmp_path, models[2], toy(**settings), resume=True)
    torch.testing.assert_close(models[2].conv.weight, models[0].conv.weight, rtol=1e-4, atol=1e-5)


def test_settings_are_those_of_the_present_run(tmp_path: Path) -> None:
    """Weight decay, and the number of batches an update: it goes on behind the last one."""
    run(tmp_path, config=toy(steps=3, accumulate=2))
    loader = Loader()
    run(tmp_path, config=toy(steps=4, weight_decay=0.25), loader=loader, resume=True)
    assert loader.read == [(1, 1)]
    assert [group["weight_decay"] for group in saved(tmp_path)["optimizer"]["param_groups"]] == [0.25]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_gpu_goes_on_where_it_was(tmp_path: Path, optimizer: Any, precision: Any) -> None:
    config = toy(**{**EVERYTHING, "optimizer": optimizer, "precision": precision, "lr": 0.01, "schedule": "constant"})
    whole, *parts = copies(3)
    run(tmp_path / "whole", whole, config, device="cuda")
    run(tmp_path, parts[0], toy(**{**vars(config), "steps": 7}), device="cuda")
    result = run(tmp_path, parts[1], config, device="cuda", resume=True)
    assert parts[0].seen + parts[1].seen == whole.seen
    ends = [saved(folder) for folder in (tmp_path / "whole", tmp_path)]
    assert_same(*[{name: end[name] for name in ("epoch", "position", "rng", "scaler")} for end in ends])
    assert {tensor.device.type for tensor in result.model.state_dict().values()} == {"cuda"}
    for kind in ("model", "ema"):  # the convolution's gradient may sum in another order
        torch.testing.assert_close(ends[0][kind], ends[1][kind], rtol=1e-3, atol=1e-4)


def test_resume_refuses_other_categories(tmp_path: Path) -> None:
    """Other settings: docs/bad-input.md."""
    disc, star, ring = {"id": 1, "name": "disc"}, {"id": 2, "name": "star"}, {"id": 1, "name": "ring"}
    for label, categories in enumerate(([disc], [star, disc]), start=1):
        run(tmp_path, categories=categories)
        model = Model()
        before = model.state_dict()["conv.weight"].clone()
        for others, what in (([*categories[:-1], ring], ".*'ring'"), (categories[:-1], "None")):
            with pytest.raises(CheckpointError, match=rf"the category of label {label}: .*'disc'.* -> {what}"):
                run(tmp_path, model, resume=True, categories=others)
        assert torch.equal(model.state_dict()["conv.weight"], before)
        run(tmp_path, resume=True, categories=categories)


def test_a_checkpoint_from_before_a_setting_existed_goes_on(tmp_path: Path) -> None:
    def model(**settings: Any) -> Model:
        own = Model()
        own.config = ModelConfig(num_classes=3, **settings)  # type: ignore[assignment]
        return own

    run(tmp_path, model())
    path, old = tmp_path / "checkpoint.pt", saved(tmp_path)
    for name in ("neck", "keypoints", "loss_keypoint"):
        del old["model_config"][name]
    del old["model_config"]["roi_extractor"]["interpolation"]
    del old["train_config"]["only"], old["train_config"]["decay_norm_and_bias"]
    save_checkpoint(path, old)
    for own, config, message in (
        (model(min_size=640), toy(), "the model differs: min_size: 800 -> 640"),
        (model(keypoints=KeypointConfig()), toy(), "the model differs: keypoints: None"),
        (model(), toy(decay_norm_and_bias=False), "the run differs: decay_norm_and_bias: True -> False$"),
    ):
        with pytest.raises(CheckpointError, match=f"cannot resume, {message}"):
            run(tmp_path, own, config, resume=True)
    run(tmp_path, model(), toy(steps=13), resume=True)
    assert saved(tmp_path)["model_config"]["neck"] == "fpn"
    save_checkpoint(path, old | {"model_config": {"necks": "fpn"}})
    with pytest.raises(CheckpointError, match=r"checkpoint.pt: model config: unknown ModelConfig setting 'necks'"):
        run(tmp_path, model(), resume=True)
