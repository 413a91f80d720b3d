"""A training step of Mask R-CNN, torchvision's and ours: losses, gradients and the update of fused SGD.

Each starts from the batch as its own loader hands it over, on the device. torchvision takes lists of images and targets
and normalises and pads inside the model; ours takes padded tensors with packed masks.

The gate has two parts. In full float32 our losses of the same anchors and RoIs must be torchvision's within SAME. Then
the losses of each timed step must be near those of its own library for the same seed. TF32 and half precision move
proposals, and so the sample of RoIs: hence the width of NEAR. Letters: N images, S sampled slots, P proposals.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contest import Call, Contest, variants
from bench.graph import captured
from bench.machine import device, tf32
from bench.model._pair import PROVIDERS, Pair, contest_of, problem_of
from tmask.config import TrainConfig
from tmask.engine.device import autocast, to_device
from tmask.engine.optimizer import build_optimizer
from tmask.model.sampling import Sample
from tmask.structures import Proposals

SEED = 0
SAME, NEAR = 1e-3, 0.1  # of a loss
NEAR_OF_PEERS = 0.5  # under autocast torchvision's boxes are in bf16, and so it samples quite other RoIs
# So small that the weights keep their values: hundreds of steps on one batch would otherwise lead anywhere.
RATE = 1e-8

Losses = Mapping[str, Tensor]


class Truth(NamedTuple):
    """Losses in full float32 after the same seed, of each library, and how ours differ from torchvision's."""

    theirs: Losses
    ours: Losses
    problem: str | None


def _wanted(case: str, mode: str, dtype: str, layout: str, provider: str) -> bool:
    """To compile takes minutes, and a graph holds a step's memory: once a dtype, on channels_last, small in float32."""
    if device().type == "cpu" and layout == "nchw":
        return False
    return provider in ("tmask", "torchvision") or (layout == "nhwc" and (case == "training-b2" or dtype == "bf16"))


@variants(
    cases=["training-b2", "training-b16"],
    modes=["step"],
    dtypes=["bf16", "fp32"],
    layouts=["nhwc", "nchw"],
    providers=PROVIDERS,
    where=_wanted,
)
def test_training(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
    contest(lambda: training(case, dtype, layout))


def training(name: str, dtype: str, layout: str) -> Contest:
    """The contest of one variant."""

    def prepare(pair: Pair, ours: bool, how: str) -> Call:
        model = copy.deepcopy(pair.ours if ours else pair.theirs)  # a step changes its weights
        forward: Callable[..., Losses] = model.forward_padded if ours else model
        if how == "compile":  # with the random numbers of eager mode, for the gate
            whole = {"fullgraph": True, "dynamic": False} if ours else {}
            forward = torch.compile(forward, options={"fallback_random": True}, **whole)
        if ours:
            batch = pair.ours.transform(pair.images, pair.targets)
            images, targets = to_device(batch, device(), channels_last=layout == "nhwc")
        optimizer = build_optimizer(model, TrainConfig(lr=RATE))

        @tf32()
        def step() -> Losses:
            """A step of tmask's own trainer, at one rate and, in float32, with TF32."""
            optimizer.zero_grad(set_to_none=True)
            with autocast(device(), dtype):
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

    def check(got: Losses, truth: Truth, ours: bool) -> None:
        assert not ours or truth.problem is None, f"in full float32, of the same RoIs: {truth.problem}"
        near = NEAR if ours or dtype == "fp32" else NEAR_OF_PEERS
        full = dtype == "fp32" and device().type == "cpu"
        check_near(got, truth.ours if ours else truth.theirs, SAME if full else near)

    return contest_of(name, dtype, layout, prepare, true_losses, check)


@torch.no_grad()
def true_losses(pair: Pair) -> Truth:
    """The truth of a contest."""
    with tf32(allowed=False):
        theirs, same = losses_of_one_sample(pair)
        torch.manual_seed(SEED)
        ours = pair.ours(pair.images, pair.targets)
    problem = same if isinstance(same, str) else problem_of(lambda: check_near(same, theirs, SAME))
    return Truth(theirs, ours, problem)


def check_near(given: Losses, true: Losses, tolerance: float) -> None:
    """Raises AssertionError unless each loss is within the relative tolerance."""
    assert given.keys() == true.keys(), f"losses {sorted(given)}, expected {sorted(true)}"
    for name, loss in true.items():
        off = abs(float(given[name]) / float(loss) - 1)
        assert off <= tolerance, f"{name} {float(given[name]):.5f}, expected {float(loss):.5f} within {tolerance:.1%}"


def losses_of_one_sample(pair: Pair) -> tuple[Losses, Losses | str]:
    """torchvision's losses after SEED, and ours of its anchors, its proposals and its RoIs.

    If the two libraries do not call the same candidates positive, the difference in words replaces our losses.
    """
    theirs, ours = pair.theirs, pair.ours
    proposals: list[Tensor] = []  # torchvision's, [P, 4] of each image

    def keep(module: Any, args: Any, out: Any) -> None:
        proposals.extend(out[0])

    def replace(module: Any, args: Any, out: Any) -> Any:
        most = max(map(len, proposals))
        boxes = torch.stack([F.pad(boxes, (0, 0, 0, most - len(boxes))) for boxes in proposals])  # [N, P, 4]
        counts = torch.tensor([len(boxes) for boxes in proposals], device=boxes.device)
        return Proposals(boxes, boxes[..., 0], counts), out[1]

    with contextlib.ExitStack() as stack:
        for their, our, padded in ((theirs.rpn, ours.rpn, ()), (theirs.roi_heads, ours.roi_heads, proposals)):
            drawn: list[list[Tensor]] = []
            stack.enter_context(mock.patch.object(their, "fg_bg_sampler", _recorded(their.fg_bg_sampler, drawn)))
            stack.enter_context(mock.patch.object(our, "sampler", _replay(drawn, padded)))
        stack.callback(theirs.rpn.register_forward_hook(keep).remove)
        stack.callback(ours.rpn.register_forward_hook(replace).remove)
        torch.manual_seed(SEED)
        their_losses = theirs(pair.images, [dict(target) for target in pair.targets])
        try:
            return their_losses, ours(pair.images, pair.targets)
        except AssertionError as error:
            return their_losses, str(error)


def _recorded(sampler: Any, drawn: list[list[Tensor]]) -> Any:
    """torchvision's sampler; `drawn` becomes its choice: the positives and the negatives of each image, 0 and 1."""

    def record(labels: list[Tensor]) -> list[list[Tensor]]:
        drawn[:] = sampler(labels)
        return drawn

    return record


def _replay(drawn: list[list[Tensor]], proposals: Sequence[Tensor]) -> Any:
    """Our sampler making the recorded choice.

    `proposals`: those of each image where the candidates are RoIs. Ours are padded to the longest list, and ground
    truth follows the padding.
    """

    def sampler(positive: Tensor, negative: Tensor, *, size: int, positive_fraction: float) -> Sample:
        slots = torch.arange(size, device=positive.device)
        samples = []
        for i, masks in enumerate(zip(*drawn, strict=True)):
            first, others = (mask.nonzero()[:, 0] for mask in masks)
            rows = torch.cat([first, others])
            if proposals:
                count = len(proposals[i])
                rows = torch.where(rows >= count, rows + max(map(len, proposals)) - count, rows)
            assert positive[i, rows[: len(first)]].all(), "a RoI is positive in torchvision alone"
            assert negative[i, rows[len(first) :]].all(), "a RoI is negative in torchvision alone"
            samples.append((F.pad(rows, (0, size - len(rows))), slots < len(first), slots < len(rows)))
        return Sample(*(torch.stack(column) for column in zip(*samples, strict=True)))

    return sampler
