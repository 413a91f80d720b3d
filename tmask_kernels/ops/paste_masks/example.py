"""Masks pasted into one image and into a batch, in every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...common.spec import FEATURE_DTYPES, Inputs, OpSpec, uniform
from .op import paste_masks, paste_masks_batched


def _paste_inputs() -> Inputs:
    boxes = torch.tensor([[3.2, 1.1, 30.7, 9.4], [-5.0, -3.5, 12.0, 20.0], [20.0, 7.0, 21.5, 30.0]])
    return {"masks": uniform(3, 28, 28), "boxes": boxes}


def _paste(output: str, convention: str = "detectron2", width: int = 41) -> Callable[[Inputs, str], Any]:
    def call(x: Inputs, backend: str) -> Any:
        return paste_masks(x["masks"], x["boxes"], (13, width), output=output, convention=convention, backend=backend)

    return call


def _paste_batch_inputs() -> Inputs:
    one = _paste_inputs()
    return {"masks": uniform(3, 3, 28, 28, seed=1), "boxes": torch.stack([one["boxes"] * s for s in (1.0, 0.5, 0.7)])}


def _paste_batch(output: str) -> Callable[[Inputs, str], Any]:
    def call(x: Inputs, backend: str) -> Any:
        sizes = [(13, 41), (20, 9), (11, 33)]
        found: Any = paste_masks_batched(x["masks"], x["boxes"], [2, 0, 3], sizes, output=output, backend=backend)
        return [one for image in found for one in image]

    return call


SPECS = (
    OpSpec(name="paste_masks (probability)", make=_paste_inputs, call=_paste("probability"), features=("masks",)),
    OpSpec(name="paste_masks (bool)", make=_paste_inputs, call=_paste("bool")),
    OpSpec(name="paste_masks (packed)", make=_paste_inputs, call=_paste("packed")),
    OpSpec(name="paste_masks (rle)", make=_paste_inputs, call=_paste("rle"), ragged=True),
    OpSpec(name="paste_masks_batched (bool)", make=_paste_batch_inputs, call=_paste_batch("bool")),
    OpSpec(name="paste_masks_batched (rle)", make=_paste_batch_inputs, call=_paste_batch("rle"), ragged=True),
)

BUDGETS = tuple(
    OpSpec(
        name=f"paste_masks ({output}, {convention})",
        make=_paste_inputs,
        call=_paste(output, convention, width=161),  # a row of four words of bits and more, as in a detector
        features=("masks",),
        dtypes=dtypes,
        wide={} if output == "rle" else {"_paste_kernel": "store"},
    )
    for output, convention, dtypes in (
        ("bool", "detectron2", FEATURE_DTYPES[:2]),
        ("bool", "torchvision", FEATURE_DTYPES[:1]),
        ("packed", "detectron2", FEATURE_DTYPES[:1]),
        ("packed", "torchvision", FEATURE_DTYPES[:1]),
        ("probability", "detectron2", FEATURE_DTYPES[::2]),
        ("rle", "detectron2", FEATURE_DTYPES[::2]),
        ("rle", "torchvision", FEATURE_DTYPES[:1]),
    )
)
