"""W13: a training step of Mask R-CNN, torchvision's and ours: losses, gradients and the update of fused SGD.

Each starts from the batch as its own loader hands it over, on the device: torchvision from lists of images and targets
(it normalises and pads inside the model), ours from padded tensors with packed masks.

The gate has two parts. In full float32 ours must give torchvision's losses of the same anchors and RoIs within 1e-3;
then the losses of each step that is timed must be near those of its own library for the same seed. TF32 and half
precision move proposals, and so the sample of RoIs: hence the width of `NEAR`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from bench.cases import CASES, ModelCase, sized
from bench.contest import Call, Contest
from bench.graph import captured
from bench.machine import device, tf32
from bench.model._models import Pair, make_pair, only_on_a_gpu
from bench.model._same_sample import losses_of_one_sample
from bench.variants import variants
from tmask.config import TrainConfig
from tmask.engine.device import autocast, to_device
from tmask.engine.optimizer import build_optimizer

SEED = 0
SAME = 1e-3  # of a loss
NEAR = 0.1  # of a loss
NEAR_OF_PEERS = 0.5  # torchvision's boxes under autocast are in bf16, and so it samples quite other RoIs (`_gate`)
# So small that the weights stay what they are: hundreds of steps on one batch would else lead anywhere.
RATE = 1e-8

Losses = Mapping[str, Tensor]


class Truth(NamedTuple):
    """Losses in full float32 after the same seed, of each library, and what ours lack to be torchvision's."""

    theirs: Losses
    ours: Losses
    problem: str | None


class Output(NamedTuple):
    """The losses of a step, and whose they are."""

    ours: bool
    losses: Losses


def _wanted(case: str, mode: str, dtype: str, layout: str, provider: str) -> bool:
    """To compile takes minutes, and a graph holds a step's memory: once a dtype, on channels_last, small in float32."""
    if device().type == "cpu" and layout == "nchw":  # says nothing there
        return False
    if provider in ("tmask", "torchvision"):
        return True
    return layout == "nhwc" and (case == "W13-b2" or dtype == "bf16")


@variants(
    cases=["W13-b2", "W13-b16"],
    modes=["step"],
    dtypes=["bf16", "fp32"],
    layouts=["nhwc", "nchw"],
    providers=["tmask", "torchvision", "tmask-graph", "tmask-compile", "torchvision-compile"],
    where=_wanted,
)
def test_training(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
    contest(lambda: training(case, dtype, layout))


def training(name: str, dtype: str, layout: str) -> Contest:
    case, size = sized(cast(ModelCase, CASES[name]))
    where = device()

    def step_of(model: nn.Module, forward: Callable[[], Losses], *, ours: bool) -> Callable[[], Output]:
        """A step as tmask's own trainer does it, at one rate and, of float32, with TF32 switched on."""
        optimizer = build_optimizer(model, TrainConfig(lr=RATE))

        @tf32()
        def step() -> Output:
            optimizer.zero_grad(set_to_none=True)
            with autocast(where, dtype):
                losses = forward()
                total = torch.stack([loss.float() for loss in losses.values()]).sum()
            total.backward()
            optimizer.step()
            return Output(ours, {name: loss.detach() for name, loss in losses.items()})

        return step

    def ours(compiled: bool = False, graph: bool = False) -> Callable[[Pair], Call]:
        def prepare(pair: Pair) -> Call:
            if compiled or graph:
                only_on_a_gpu()
            model = copy.deepcopy(pair.ours)  # a step changes its weights
            batch = pair.ours.transform(pair.images, pair.targets)
            images, targets = to_device(batch, where, channels_last=layout == "nhwc")
            forward = model.forward_padded
            if compiled:  # the same random numbers as in eager mode, for the gate
                forward = torch.compile(forward, fullgraph=True, dynamic=False, options={"fallback_random": True})
            step = step_of(model, lambda: forward(images, targets, compact=not images.tensor.is_cuda), ours=True)
            if graph:
                step = captured(step)
            torch.manual_seed(SEED)  # the next call is the gate's
            return step

        return prepare

    def theirs(compiled: bool) -> Callable[[Pair], Call]:
        def prepare(pair: Pair) -> Call:
            if compiled:
                only_on_a_gpu()
            model = copy.deepcopy(pair.theirs)
            forward = torch.compile(model, options={"fallback_random": True}) if compiled else model
            step = step_of(model, lambda: forward(pair.images, [dict(t) for t in pair.targets]), ours=False)
            torch.manual_seed(SEED)
            return step

        return prepare

    return Contest(
        inputs=lambda: make_pair(case, layout, training=True),
        providers={
            "tmask": ours(),
            "tmask-compile": ours(compiled=True),
            "tmask-graph": ours(graph=True),
            "torchvision": theirs(compiled=False),
            "torchvision-compile": theirs(compiled=True),
        },
        truth=true_losses,
        check=lambda got, truth: check(got, truth, dtype, full=dtype == "fp32" and where.type == "cpu"),
        work=case.work(dtype),
        size=size,
        roof="tf32" if dtype == "fp32" and where.type == "cuda" else None,
    )


@torch.no_grad()
def true_losses(pair: Pair) -> Truth:
    with tf32(allowed=False):
        theirs, same = losses_of_one_sample(pair, SEED)
        torch.manual_seed(SEED)
        ours = pair.ours(pair.images, pair.targets)
    problem = same if isinstance(same, str) else None
    if not isinstance(same, str):
        try:
            _check_near(same, theirs, SAME)
        except AssertionError as error:
            problem = str(error)
    return Truth(theirs, ours, problem)


def check(got: Output, truth: Truth, dtype: str, *, full: bool) -> None:
    """`full`: the step, of `dtype`, was done in full float32."""
    assert not got.ours or truth.problem is None, f"in full float32, of the same RoIs: {truth.problem}"
    near = NEAR if got.ours or dtype == "fp32" else NEAR_OF_PEERS
    _check_near(got.losses, truth.ours if got.ours else truth.theirs, SAME if full else near)


def _check_near(given: Losses, true: Losses, tolerance: float) -> None:
    assert given.keys() == true.keys(), f"losses {sorted(given)}, expected {sorted(true)}"
    for name, loss in true.items():
        off = abs(float(given[name]) / float(loss) - 1)
        assert off <= tolerance, f"{name} {float(given[name]):.5f}, expected {float(loss):.5f} within {tolerance:.1%}"
