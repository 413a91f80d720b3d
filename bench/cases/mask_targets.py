"""mask_targets of a training step beside torchvision's, on the case of `bench.cases.mask_bce`.

torchvision keeps a byte a pixel, turns all masks of an image to floats and pools them, as its mask loss does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import roi_align

from bench.cases._shared import Bench
from bench.cases.mask_bce import CASES, MaskLossCase
from bench.contest import Call
from bench.machine import device
from tmask_kernels import mask_targets, pack_masks
from tmask_kernels.testing import Tolerance, assert_close

# A coordinate of up to 1,344 cells in float32 is off by 1e-4 cells, and the masks are steps from 0 to 1.
ROUNDING = Tolerance(max=1e-3, rms=1e-5)


class Given(NamedTuple):
    case: MaskLossCase
    masks: Tensor  # [N, G, H, W] uint8
    packed: Tensor  # [N, G, H, ceil(W / 32)] int32
    boxes: Tensor  # [N, S, 4]
    index: Tensor  # [N, S] int64


def ours(given: Given, backend: str) -> Tensor:
    side = given.case.side
    return mask_targets(given.packed, given.boxes, given.index, side, convention="torchvision", backend=backend)


def torchvision(given: Given) -> Call:
    def crop() -> Tensor:
        targets = []
        for masks, boxes, index in zip(given.masks, given.boxes, given.index, strict=True):
            rois = torch.cat([index[:, None].to(boxes), boxes], dim=1)  # [S, 5]
            targets.append(roi_align(masks[:, None].to(boxes), rois, (given.case.side, given.case.side), 1.0)[:, 0])
        return torch.stack(targets)

    return crop


def inputs(case: MaskLossCase, mode: str, dtype: str, layout: str) -> Given:
    masks, boxes, index = case.ground_truth(device())
    return Given(case, masks.to(torch.uint8), pack_masks(masks), boxes, index)


BENCH = Bench(
    cases=CASES,
    inputs=inputs,
    ours=ours,
    peers={"torchvision": torchvision},
    truth=lambda given: ours(given._replace(boxes=given.boxes.double()), "reference"),
    check=lambda got, truth, provider: assert_close(got, truth, tolerance=ROUNDING),
)
test_mask_targets = BENCH.test(modes=["targets"])
