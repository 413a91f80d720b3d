"""Targets cropped from packed masks."""

from __future__ import annotations

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


def _mask_targets(x: Inputs, backend: str) -> Tensor:
    return mask_targets(x["packed"], x["boxes"], x["index"], 3, convention="torchvision", backend=backend)


SPECS = (OpSpec(name="mask_targets", make=_mask_target_inputs, call=_mask_targets, features=("boxes",)),)
