"""One update: gradients averaged over batches, clipped, scaled, and the average of weights."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from tests.engine.toy import CONFIG, Loader, Model, batch, run
from tests.model.sync import count_blocking
from tmask.config import TrainConfig
from tmask.engine.checkpoint import load_checkpoint
from tmask.engine.ema import WeightAverage
from tmask.engine.log import LossBuffer, read_log
from tmask.engine.state import TrainState
from tmask.engine.train import _update
from tmask.structures import ImageBatch, Targets

SGD = dataclasses.replace(
    CONFIG, steps=1, optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=0.5, log_every=1, channels_last=False
)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.conv.parameters()])  # type: ignore[operator]


def mean_gradient(model: Model, count: int) -> tuple[Tensor, list[float]]:
    """The gradient averaged over the first `count` batches by hand, and the loss of each."""
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    loader = Loader()
    loader.set_epoch(0)
    gradients, losses = [], []
    for _, data in zip(range(count), loader, strict=False):
        model.zero_grad()
        loss = torch.stack(list(model.forward_padded(data.images, data.targets, compact=True).values())).sum()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.conv.parameters()]))  # type: ignore[union-attr]
        losses.append(loss.item())
    return torch.stack(gradients).mean(0), losses


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_the_gradient_is_the_mean_over_the_batches(tmp_path: Path, accumulate: int, clip: float | None) -> None:
    model = Model()
    gradient, losses = mean_gradient(model, accumulate)
    if clip is not None:
        assert gradient.norm() > clip
        gradient = gradient * clip / gradient.norm()
    before = flat(model)
    run(tmp_path, model, dataclasses.replace(SGD, accumulate=accumulate, clip_norm=clip))
    torch.testing.assert_close(flat(model), before - SGD.lr * gradient, rtol=1e-5, atol=1e-6)
    (row,) = read_log(tmp_path / "log.jsonl")
    assert row["loss"] == pytest.approx(sum(losses) / accumulate, rel=1e-6)
    assert model.calls == accumulate
    assert row["images_per_second"] * row["seconds_per_step"] == pytest.approx(2 * accumulate)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_gradient_scaler_changes_nothing_and_skips_what_overflows(clip: float | None) -> None:
    config = dataclasses.replace(SGD, accumulate=2, clip_norm=clip, ema_decay=0.5)
    plain, scaled = Model(), Model()
    scaled.load_state_dict(plain.state_dict())
    states = [TrainState(model, config, torch.device("cpu"), ()) for model in (plain, scaled)]
    states[1].scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for state in states:
        torch.manual_seed(0)
        state.optimizer.param_groups[0]["lr"] = config.lr
        _update(state, iter([batch(torch.tensor(2.0)), batch(torch.tensor(3.0))]))
    torch.testing.assert_close(flat(scaled), flat(plain), rtol=1e-5, atol=1e-6)
    before = flat(scaled)
    _update(states[1], iter([batch(torch.tensor(2.0)), batch(torch.tensor(1e30))]))  # its square is infinite
    assert torch.equal(flat(scaled), before)
    assert states[1].scaler.get_scale() == 512.0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_skipped_first_update_leaves_no_trace(optimizer: Any) -> None:
    config = dataclasses.replace(SGD, optimizer=optimizer, momentum=0.9)
    plain, skipping = Model(), Model()
    skipping.load_state_dict(plain.state_dict())
    states = [TrainState(model, config, torch.device("cpu"), ()) for model in (plain, skipping)]
    states[1].scaler = GradScaler("cpu", init_scale=1024.0)
    junk = [torch.full((1000,), torch.nan) for _ in range(100)]  # what new buffers would find in memory
    del junk
    _update(states[1], iter([batch(torch.tensor(1e30))]))
    for state in states:
        torch.manual_seed(0)
        for value in (2.0, 3.0, 4.0):
            _update(state, iter([batch(torch.tensor(value))]))
    torch.testing.assert_close(flat(skipping), flat(plain), rtol=1e-5, atol=1e-6)


class Silent(Model):
    """The same loss, without what the other tests read of it on the host."""

    def forward_padded(self, images: ImageBatch, targets: Targets, *, compact: bool) -> dict[str, Tensor]:
        out = self.norm(self.conv(images.tensor))
        return {"loss_a": (out.float().mean() - 1) ** 2, "loss_b": self.conv.bias.sum() ** 2}


@pytest.mark.parametrize("scaled", [False, True], ids=["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_update_never_waits_for_the_device(optimizer: Any, scaled: bool) -> None:
    config = dataclasses.replace(SGD, optimizer=optimizer, momentum=0.9, accumulate=2, clip_norm=0.1, ema_decay=0.5)
    state = TrainState(Silent(), config, torch.device("cpu"), ())
    state.scaler = GradScaler("cpu") if scaled else None
    buffer = LossBuffer(3)
    for _ in range(3):
        with count_blocking() as found:
            losses, _ = _update(state, iter([batch(torch.tensor(2.0)), batch(torch.tensor(3.0))]))
            buffer.add(losses)
        assert not found
    assert len(buffer.read()) == 3


def test_the_average_is_that_of_a_hand() -> None:
    model = Model()
    average = WeightAverage(model, 0.75)
    begin = model.conv.weight.detach().clone()
    weights, means = [], []
    for step in range(4):
        with torch.no_grad():
            model.conv.weight.fill_(float(step + 1))
        model.norm(torch.full((2, 1, 2, 2), float(step)))
        weights.append(float(step + 1))
        means.append(float(model.norm.running_mean))  # type: ignore[arg-type]
        average.update()
    # ((1 * .75 + 2 * .25) * .75 + 3 * .25) * .75 + 4 * .25; the first values have the rest of the weight.
    assert average.model.conv.weight.flatten().tolist() == [2.265625] * 3
    expected = 0.0
    for step, mean in enumerate(means):
        expected = mean if step == 0 else 0.75 * expected + 0.25 * mean
    assert float(average.model.norm.running_mean) == pytest.approx(expected, rel=1e-6)
    assert 0 < expected < means[-1]
    assert average.model.norm.num_batches_tracked.tolist() == 4  # whole numbers are copied
    assert not torch.equal(begin, average.model.conv.weight)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_evaluation_and_checkpoint_have_the_average(tmp_path: Path, decay: float) -> None:
    measured: list[Tensor] = []
    history: list[Tensor] = []

    def evaluate(model: Model) -> dict[str, float]:
        measured.append(flat(model).clone())
        return {"segm/AP": 0.0}

    model = Model()
    real = model.forward_padded
    model.forward_padded = lambda *a, **k: (history.append(flat(model)), real(*a, **k))[1]  # type: ignore[method-assign]
    config: TrainConfig = dataclasses.replace(CONFIG, steps=4, ema_decay=decay, eval_every=2)
    result = run(tmp_path, model, config, evaluate_fn=evaluate)
    weights = [*history[1:], flat(model)]  # after each update
    expected = [weights[0]]
    for now in weights[1:]:
        expected.append(decay * expected[-1] + (1 - decay) * now)
    assert len(measured) == 2
    torch.testing.assert_close(measured, [expected[1], expected[3]])
    saved = load_checkpoint(tmp_path / "checkpoint.pt")
    torch.testing.assert_close(saved["model"]["conv.bias"], model.conv.bias.detach())
    assert torch.equal(flat(result.model), measured[-1])
    if decay:
        assert torch.equal(saved["ema"]["conv.bias"], measured[-1][-1:])
        assert not torch.equal(saved["ema"]["conv.bias"], saved["model"]["conv.bias"])
        assert saved["ema"].keys() == saved["model"].keys()
    else:
        assert saved["ema"] is None
        assert result.model is model
