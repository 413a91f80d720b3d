"""RoIAlign of one map, of its kinds, and of a pyramid."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.spec import FEATURE_DTYPES, Inputs, OpSpec, normal, roi_inputs, square_boxes
from .op import multiscale_roi_align, roi_align

PYRAMID = ("p2", "p3", "p4")


def _roi_align(x: Inputs, backend: str) -> Tensor:
    return roi_align(x["features"], x["rois"], (7, 7), 0.25, 2, aligned=True, backend=backend)


def _bicubic(x: Inputs, backend: str) -> Tensor:
    """Few bins: a sample reads 16 cells, which the interpreter takes a minute for at the size of the other cases."""
    rois = x["rois"][:3]
    return roi_align(x["features"], rois, (3, 5), 0.25, 2, True, interpolation="bicubic", backend=backend)


def _max(x: Inputs, backend: str) -> Tensor:
    return roi_align(x["features"], x["rois"], 4, 0.25, 2, True, reduction="max", backend=backend)


def _pyramid_inputs() -> Inputs:
    boxes = torch.stack([square_boxes(6, 120.0, seed=seed, min_size=8.0) for seed in (1, 2)])  # [2, 6, 4]
    levels = {"p2": normal(2, 5, 31, 31), "p3": normal(2, 5, 16, 16, seed=1), "p4": normal(2, 5, 8, 8, seed=2)}
    return {**levels, "boxes": boxes, "valid": torch.arange(6)[None].expand(2, 6) < torch.tensor([[6], [4]])}


def _multiscale_roi_align(x: Inputs, backend: str) -> Tensor:
    levels = [x["p2"], x["p3"], x["p4"]]
    return multiscale_roi_align(
        levels, x["boxes"], 7, (1 / 4, 1 / 8, 1 / 16), valid=x["valid"], canonical_scale=56, backend=backend
    )


SPECS = (
    OpSpec(
        name="roi_align",
        make=roi_inputs,
        call=_roi_align,
        features=("features",),
        dtypes=FEATURE_DTYPES,
        gradients=("features",),
    ),
    OpSpec(
        name="roi_align (bicubic)",
        make=roi_inputs,
        call=_bicubic,
        features=("features",),
        dtypes=FEATURE_DTYPES,
        gradients=("features",),
    ),
    OpSpec(
        name="roi_align (max)",
        make=roi_inputs,
        call=_max,
        features=("features",),
        dtypes=FEATURE_DTYPES,
        gradients=("features",),
    ),
    OpSpec(
        name="roi_align (boxes)",  # apart from the first: torchvision has no gradient to them
        make=roi_inputs,
        call=_roi_align,
        features=("features",),
        dtypes=FEATURE_DTYPES,
        gradients=("features", "rois"),
    ),
    OpSpec(
        name="multiscale_roi_align",
        make=_pyramid_inputs,
        call=_multiscale_roi_align,
        features=PYRAMID,
        dtypes=FEATURE_DTYPES,
        gradients=PYRAMID,
    ),
)
