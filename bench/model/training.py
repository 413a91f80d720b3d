"""A training step of Mask R-CNN, torchvision's and ours: losses, gradients and the update of fused SGD.

Each starts from the batch as its own loader hands it over, on the device. torchvision takes lists of images and targets
and normalises and pads inside the model; ours takes padded tensors with packed masks.

The gate has two parts. In full float32 our losses must be those of the reference ops within SAME. Then the losses of
each timed step must be near those of its own library for the same seed. TF32 and half precision move proposals, and so
the sample of RoIs: hence the width of NEAR. That the losses of one sample are torchvision's is a test
(tests/model/test_torchvision_parity.py): the two libraries draw other samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.contest import Call
from bench.graph import captured
from bench.machine import device, tf32
from bench.model._pair import Pair, bench_of, problem_of
from tmask.config import TrainConfig
from tmask.engine.device import autocast, to_device
from tmask.engine.optimizer import build_optimizer
from tmask_kernels import use_backend

SEED = 0
SAME, NEAR = 1e-3, 0.1  # of a loss
NEAR_OF_PEERS = 0.5  # under autocast torchvision's boxes are in bf16, and so it samples quite other RoIs
# So small that the weights keep their values: hundreds of steps on one batch would otherwise lead anywhere.
RATE = 1e-8

Losses = Mapping[str, Tensor]


class Truth(NamedTuple):
    """Losses in full float32 after the same seed, of each library, and how ours differ from the reference ops'."""

    pair: Pair
    theirs: Losses
    ours: Losses
    problem: str | None


def prepare(pair: Pair, ours: bool, how: str) -> Call:
    """Return the step to time, of a copy of the model: a step changes its weights."""
    model = copy.deepcopy(pair.ours if ours else pair.theirs)
    forward: Callable[..., Losses] = model.forward_padded if ours else model
    if how == "compile":  # with the random numbers of eager mode, for the gate
        whole = {"fullgraph": True, "dynamic": False} if ours else {}
        forward = torch.compile(forward, options={"fallback_random": True}, **whole)
    if ours:
        batch = pair.ours.transform(pair.images, pair.targets)
        images, targets = to_device(batch, device(), channels_last=pair.layout == "nhwc")
    optimizer = build_optimizer(model, TrainConfig(lr=RATE))

    @tf32()
    def step() -> Losses:
        """A step of tmask's own trainer, at one rate and, in float32, with TF32."""
        optimizer.zero_grad(set_to_none=True)
        with autocast(device(), pair.dtype):
            if ours:
                losses = forward(images, targets, compact=not images.tensor.is_cuda)
            else:
                losses = forward(pair.images, [dict(target) for target in pair.targets])
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
        total.backward()
        optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}

    call = captured(step) if how == "graph" else step
    torch.manual_seed(SEED)  # the next call is the gate's
    return call


@torch.no_grad()
def true_losses(pair: Pair) -> Truth:
    """The truth of a contest."""

    def losses(model: Any) -> Losses:
        torch.manual_seed(SEED)
        found: Losses = model(pair.images, [dict(target) for target in pair.targets])
        return found

    with tf32(allowed=False):
        theirs, ours = losses(pair.theirs), losses(pair.ours)
        with use_backend("reference"):
            true = losses(pair.ours)
    return Truth(pair, theirs, true, problem_of(lambda: check_near(ours, true, SAME)))


def check_near(given: Losses, true: Losses, tolerance: float) -> None:
    """Raises AssertionError unless each loss is within the relative tolerance."""
    assert given.keys() == true.keys(), f"losses {sorted(given)}, expected {sorted(true)}"
    for name, loss in true.items():
        off = abs(float(given[name]) / float(loss) - 1)
        assert off <= tolerance, f"{name} {float(given[name]):.5f}, expected {float(loss):.5f} within {tolerance:.1%}"


def check(got: Losses, truth: Truth, ours: bool) -> None:
    assert not ours or truth.problem is None, f"in full float32: {truth.problem}"
    near = NEAR if ours or truth.pair.dtype == "fp32" else NEAR_OF_PEERS
    check_near(got, truth.ours if ours else truth.theirs, SAME if truth.pair.full else near)


def _wanted(case: str, mode: str, dtype: str, layout: str, provider: str) -> bool:
    """To compile takes minutes, and a graph holds a step's memory: once a dtype, on channels_last, small in float32."""
    if device().type == "cpu" and layout == "nchw":
        return False
    return provider in ("tmask", "torchvision") or (layout == "nhwc" and (case == "training-b2" or dtype == "bf16"))


BENCH = bench_of(prepare, true_losses, check)
test_training = BENCH.test(
    cases=["training-b2", "training-b16"],
    modes=["step"],
    dtypes=["bf16", "fp32"],
    layouts=["nhwc", "nchw"],
    where=_wanted,
)
