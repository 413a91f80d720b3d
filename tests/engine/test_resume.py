"""A resumed run is the uninterrupted one, bit for bit, and reads nothing twice."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine.toy import CONFIG, Loader, Model, batch, run
from tmask.config import KeypointConfig, ModelConfig, TrainConfig
from tmask.engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tmask.engine.log import read_log
from tmask.engine.stream import BatchStream
from tmask.engine.train import _Saver

# Five batches an epoch: with two batches an update the third update stands across the border of an epoch.
EVERYTHING = dataclasses.replace(
    CONFIG, accumulate=2, ema_decay=0.9, schedule="cosine", warmup_steps=4, clip_norm=0.5, weight_decay=0.1, log_every=1
)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and rate of each update."""
    return [(row["step"], row["loss"], row["lr"]) for row in read_log(folder / "log.jsonl")]


def assert_same(a: Any, b: Any, place: str = "") -> None:
    """Two checkpoints hold the same bits."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_same(a[key], b[key], f"{place}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{place}/{i}")
    else:
        assert a == b, place


@pytest.mark.parametrize(
    ("config", "stop"),
    [
        pytest.param(dataclasses.replace(CONFIG, log_every=1), 5, id="plain-epoch-end"),
        pytest.param(dataclasses.replace(CONFIG, log_every=1), 7, id="plain-mid-epoch"),
        pytest.param(EVERYTHING, 6, id="everything-mid-epoch"),
        pytest.param(EVERYTHING, 2, id="everything-before-the-border"),
        pytest.param(EVERYTHING, 3, id="everything-across-the-border"),
        pytest.param(EVERYTHING, 5, id="everything-epoch-end"),
        pytest.param(dataclasses.replace(EVERYTHING, optimizer="sgd"), 4, id="sgd"),
    ],
)
@pytest.mark.parametrize("end", ["killed", "failed"])
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, config: TrainConfig, stop: int, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed it goes on from the last regular checkpoint, after an error from the last whole update."""
    whole, first, second = Model(), Model(), Model()
    first.load_state_dict(whole.state_dict())
    loaders = [Loader() for _ in range(3)]
    run(tmp_path / "whole", whole, config, loader=loaders[0])
    checkpoint = tmp_path / "parts" / "checkpoint.pt"
    saved_at, batches = dataclasses.replace(config, checkpoint_every=100), (stop + 1) * config.accumulate - 1
    if end == "killed":
        saved_at, batches = dataclasses.replace(config, checkpoint_every=stop), batches + 1
    with monkeypatch.context() as patch:
        if end == "killed":
            patch.setattr(_Saver, "rescue", lambda *_: "")
        with pytest.raises(KilledError) as error:
            run(tmp_path / "parts", ended_after(batches, first), saved_at, loader=loaders[1])
    assert error.value.__notes__ == [f"{checkpoint} is the checkpoint of step {stop}"]
    assert load_checkpoint(checkpoint)["step"] == stop
    torch.manual_seed(99)
    result = run(tmp_path / "parts", second, config, loader=loaders[2], resume=checkpoint)
    used = stop * config.accumulate
    assert first.seen[:used] + second.seen == whole.seen
    assert loaders[2].read == loaders[0].read[used:]  # nothing already used is read again
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    ends = [load_checkpoint(tmp_path / part / "checkpoint.pt") for part in ("whole", "parts")]
    assert_same(*ends)
    assert result.step == config.steps


class KilledError(Exception):
    pass


def ended_after(batches: int, model: Model) -> Model:
    """`model`, which ends its run in the batch after so many, when batch statistics and random state have changed."""
    real = model.forward_padded

    def forward(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        losses = real(*args, **kwargs)
        if model.calls == batches + 1:
            raise KilledError
        return losses

    model.forward_padded = forward  # type: ignore[method-assign]
    return model


def test_a_stream_begins_anywhere_without_reading_what_was_used() -> None:
    def values(epoch: int, position: int, count: int) -> tuple[list[tuple[int, int]], list[float]]:
        loader = Loader()
        stream = iter(BatchStream(loader, torch.device("cpu"), epoch=epoch, position=position))
        found = [float(next(stream).images.tensor[0, 0, 0, 0]) for _ in range(count)]
        return loader.read, found

    places, all_values = values(0, 0, 12)
    assert places == [(n // 5, n % 5) for n in range(12)]
    for used in (1, 4, 5, 7, 10):
        assert values(used // 5, used % 5, 12 - used) == (places[used:], all_values[used:])
    assert values(0, 5, 2) == (places[5:7], all_values[5:7])  # a checkpoint at the last batch of an epoch


def test_a_loader_that_cannot_begin_inside_an_epoch_is_refused() -> None:
    plain = [batch(torch.tensor(1.0))]
    with pytest.raises(ValueError, match="train_loader: expected a batch sampler with set_epoch"):
        BatchStream(plain, torch.device("cpu"), epoch=1, position=1)
    assert next(iter(BatchStream(plain, torch.device("cpu"), epoch=1))) is plain[0]


def test_data_too_short_for_the_position_is_refused_before_anything_changes(tmp_path: Path) -> None:
    run(tmp_path, Model())
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, load_checkpoint(path) | {"position": 6, "step": 3})
    log = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="expected the data of the run, 6 batches an epoch or more, got 5"):
        run(tmp_path, Model(), resume=path)
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_an_average_turned_on_later_begins_at_the_weights(tmp_path: Path) -> None:
    run(tmp_path, Model())
    evaluated = []
    config = dataclasses.replace(CONFIG, ema_decay=0.5)

    def evaluate(model: Model) -> dict[str, float]:
        evaluated.append(model.conv.weight.detach().clone())
        return {"segm/AP": 0.0}

    run(tmp_path, Model(), config, resume=tmp_path / "checkpoint.pt", evaluate_fn=evaluate)
    assert torch.equal(evaluated[0], load_checkpoint(tmp_path / "checkpoint.pt")["model"]["conv.weight"])
    result = run(tmp_path, Model(), dataclasses.replace(config, steps=13), resume=tmp_path / "checkpoint.pt")
    saved = load_checkpoint(tmp_path / "checkpoint.pt")
    assert torch.equal(saved["ema"]["conv.weight"], saved["model"]["conv.weight"])
    assert torch.equal(result.model.conv.weight, saved["model"]["conv.weight"])


def test_a_finished_run_is_saved_elsewhere_as_it_is(tmp_path: Path) -> None:
    run(tmp_path / "a", Model())
    run(tmp_path / "b", Model(), resume=tmp_path / "a" / "checkpoint.pt")
    assert_same(*[load_checkpoint(tmp_path / name / "checkpoint.pt") for name in "ab"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_memory_format_may_change(tmp_path: Path, optimizer: Any) -> None:
    config = dataclasses.replace(CONFIG, optimizer=optimizer, lr=0.01)
    models = [Model() for _ in range(3)]
    for model in models:
        model.conv = nn.Conv2d(3, 1, 3, padding=1)
        model.load_state_dict(models[0].state_dict())
    run(tmp_path / "whole", models[0], config)
    run(tmp_path, models[1], dataclasses.replace(config, steps=5, channels_last=False))
    run(tmp_path, models[2], config, resume=tmp_path / "checkpoint.pt")
    torch.testing.assert_close(models[2].conv.weight, models[0].conv.weight, rtol=1e-4, atol=1e-5)


def test_another_number_of_batches_an_update_goes_on_behind_the_last_one(tmp_path: Path) -> None:
    run(tmp_path, Model(), dataclasses.replace(CONFIG, steps=3, accumulate=2))
    loader = Loader()
    run(tmp_path, Model(), dataclasses.replace(CONFIG, steps=4), loader=loader, resume=tmp_path / "checkpoint.pt")
    assert loader.read == [(1, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_gpu_goes_on_where_it_was(tmp_path: Path, optimizer: Any, precision: Any) -> None:
    config = dataclasses.replace(EVERYTHING, optimizer=optimizer, precision=precision, lr=0.01, schedule="constant")
    whole, parts = Model(), [Model(), Model()]
    for model in parts:
        model.load_state_dict(whole.state_dict())
    run(tmp_path / "whole", whole, config, device="cuda")
    run(tmp_path, parts[0], dataclasses.replace(config, steps=7), device="cuda")
    result = run(tmp_path, parts[1], config, device="cuda", resume=tmp_path / "checkpoint.pt")
    assert parts[0].seen + parts[1].seen == whole.seen
    ends = [load_checkpoint(folder / "checkpoint.pt") for folder in (tmp_path / "whole", tmp_path)]
    assert_same(*[{name: end[name] for name in ("epoch", "position", "rng", "scaler")} for end in ends])
    assert {tensor.device.type for tensor in result.model.state_dict().values()} == {"cuda"}
    for kind in ("model", "ema"):  # the convolution's gradient may sum in another order
        torch.testing.assert_close(ends[0][kind], ends[1][kind], rtol=1e-3, atol=1e-4)


def test_settings_of_the_optimizer_are_those_of_the_present_run(tmp_path: Path) -> None:
    run(tmp_path, Model())
    config = dataclasses.replace(CONFIG, steps=13, weight_decay=0.25)
    run(tmp_path, Model(), config, resume=tmp_path / "checkpoint.pt")
    groups = load_checkpoint(tmp_path / "checkpoint.pt")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.25]


def test_resume_refuses_other_settings(tmp_path: Path) -> None:
    run(tmp_path, Model())
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(CheckpointError, match="the run differs: batch_size: 2 -> 4"):
        run(tmp_path, Model(), dataclasses.replace(CONFIG, batch_size=4), resume=path)
    for categories in ([{"id": 1, "name": "disc"}], [{"id": 2, "name": "star"}, {"id": 1, "name": "disc"}]):
        own = tmp_path / str(len(categories))
        run(own, Model(), categories=categories)
        model = Model()
        before = model.state_dict()["conv.weight"].clone()
        label = len(categories)
        with pytest.raises(CheckpointError, match=rf"the category of label {label}: .*'disc'.* -> .*'ring'"):
            run(own, model, resume=own / "checkpoint.pt", categories=[*categories[:-1], {"id": 1, "name": "ring"}])
        with pytest.raises(CheckpointError, match=rf"the category of label {label}: .*'disc'.* -> None"):
            run(own, model, resume=own / "checkpoint.pt", categories=categories[:-1])
        assert torch.equal(model.state_dict()["conv.weight"], before)
        run(own, Model(), resume=own / "checkpoint.pt", categories=categories)
    saved = load_checkpoint(path)
    save_checkpoint(path, saved | {"model_config": {"min_size": 800}})
    with pytest.raises(CheckpointError, match="the model differs: min_size: 800 -> None"):
        run(tmp_path, Model(), resume=path)


def test_a_checkpoint_from_before_a_setting_existed_goes_on(tmp_path: Path) -> None:
    def model(**settings: Any) -> Model:
        own = Model()
        own.config = ModelConfig(num_classes=3, **settings)  # type: ignore[assignment]
        return own

    run(tmp_path, model())
    path = tmp_path / "checkpoint.pt"
    saved = load_checkpoint(path)
    for name in ("neck", "keypoints", "loss_keypoint"):
        del saved["model_config"][name]
    del saved["model_config"]["roi_extractor"]["interpolation"]
    del saved["train_config"]["only"], saved["train_config"]["decay_norm_and_bias"]
    save_checkpoint(path, saved)
    for settings, message in (
        ({"min_size": 640}, "min_size: 800 -> 640"),
        ({"keypoints": KeypointConfig()}, "keypoints: None"),
    ):
        with pytest.raises(CheckpointError, match=f"cannot resume, the model differs: {message}"):
            run(tmp_path, model(**settings), resume=path)
    with pytest.raises(CheckpointError, match=r"the run differs: decay_norm_and_bias: True -> False$"):
        run(tmp_path, model(), dataclasses.replace(CONFIG, decay_norm_and_bias=False), resume=path)
    run(tmp_path, model(), dataclasses.replace(CONFIG, steps=13), resume=path)
    assert load_checkpoint(path)["model_config"]["neck"] == "fpn"
    save_checkpoint(path, saved | {"model_config": {"necks": "fpn"}})
    with pytest.raises(CheckpointError, match=r"checkpoint.pt: model config: unknown ModelConfig setting 'necks'"):
        run(tmp_path, model(), resume=path)
