"""Targets cropped from packed masks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...common.spec import Inputs, OpSpec, uniform
from ...packed import pack_masks
from ...testing import random_boxes
from .op import mask_targets


def _mask_target_inputs() -> Inputs:
    masks = uniform(2, 3, 13, 45) < 0.5
    boxes = torch.stack([random_boxes(2, height=13, width=45, min_size=3, max_size=9, seed=s) for s in (7, 8)])
    return {"packed": pack_masks(masks), "boxes": boxes, "index": torch.tensor([[0, -1], [1, 2]])}


def _mask_targets(
    x: Inputs, backend: str, size: int = 3, convention: str = "torchvision", padded: bool = False
) -> Tensor:
    sizes = torch.tensor([[13, 45], [9, 40]]) if padded else None
    given = x["packed"], x["boxes"], x["index"], size
    return mask_targets(*given, convention=convention, image_sizes=sizes, backend=backend)


SPECS = (OpSpec(name="mask_targets", make=_mask_target_inputs, call=_mask_targets, features=("boxes",)),)

# The sides of a mask head's outputs, in images with padding and without.
BUDGETS = tuple(
    OpSpec(
        name=f"mask_targets ({side}x{side}, {convention}{', padded' if padded else ''})",
        make=_mask_target_inputs,
        call=partial(_mask_targets, size=side, convention=convention, padded=padded),
    )
    for side, convention, padded in (
        (28, "detectron2", True),
        (28, "torchvision", True),
        (28, "torchvision", False),
        (14, "detectron2", True),
        (7, "torchvision", True),
    )
)
