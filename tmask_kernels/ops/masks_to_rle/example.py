"""Masks of whole images to run lengths."""

from __future__ import annotations

from typing import Any

import torch

from ...common.spec import FEATURE_DTYPES, Inputs, OpSpec, normal
from .op import masks_to_rle


def _logits() -> Inputs:
    """Smooth shapes in 37 x 45 pixels: a column is a word of rows and part of another one."""
    return {"masks": torch.nn.functional.interpolate(normal(1, 3, 5, 6), (37, 45), mode="bilinear")[0]}


def _encode(x: Inputs, backend: str) -> list[dict[str, Any]]:
    return masks_to_rle(x["masks"], 0.0, backend=backend)


def _encode_bools(x: Inputs, backend: str) -> list[dict[str, Any]]:
    return masks_to_rle(x["masks"] > 0, backend=backend)


def _wide_logits() -> Inputs:
    """A row of them is a multiple of 16 bytes, as in most images."""
    return {"masks": normal(2, 64, 256)}


SPECS = (
    OpSpec(name="masks_to_rle (logits)", make=_logits, call=_encode, ragged=True),
    OpSpec(name="masks_to_rle (bool)", make=_logits, call=_encode_bools, ragged=True),
)

BUDGETS = (
    OpSpec(
        name="masks_to_rle (logits)",
        make=_wide_logits,
        call=_encode,
        features=("masks",),
        dtypes=FEATURE_DTYPES,
    ),
    OpSpec(name="masks_to_rle (bool)", make=_wide_logits, call=_encode_bools),
)
