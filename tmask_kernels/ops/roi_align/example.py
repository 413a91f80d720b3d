"""RoIAlign of one map, of its kinds, and of a pyramid."""

from __future__ import annotations

from functools import partial
from typing import Any

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


def _detector_inputs(layout: torch.memory_format) -> Inputs:
    """Four levels of 256 channels, odd widths, and padded boxes [2, 7, 4]."""
    sizes = {"p2": (25, 23), "p3": (13, 12), "p4": (7, 6), "p5": (4, 3)}
    levels = {name: normal(2, 256, *size).contiguous(memory_format=layout) for name, size in sizes.items()}
    return {**levels, "boxes": torch.rand(2, 7, 4), "valid": torch.ones(2, 7, dtype=torch.bool)}


def _map_inputs(channels: int, layout: torch.memory_format) -> Inputs:
    """One level, and boxes [K, 5]."""
    return {"features": normal(2, channels, 25, 23).contiguous(memory_format=layout), "rois": roi_inputs()["rois"]}


def _detector(x: Inputs, backend: str, size: int, **settings: Any) -> Tensor:
    levels, scales = [x[name] for name in LEVELS], (1 / 4, 1 / 8, 1 / 16, 1 / 32)
    return multiscale_roi_align(levels, x["boxes"], size, scales, valid=x["valid"], backend=backend, **settings)


def _map(x: Inputs, backend: str, aligned: bool, sampling_ratio: int) -> Tensor:
    return roi_align(x["features"], x["rois"], 7, 0.25, sampling_ratio, aligned, backend=backend)


def _budget(
    name: str,
    *dtypes: torch.dtype,
    layout: torch.memory_format = torch.channels_last,
    size: int = 7,
    gradients: tuple[str, ...] = (*PYRAMID, "p5", "boxes"),
    **settings: Any,
) -> OpSpec:
    """A pyramid pooled to size x size bins."""
    return OpSpec(
        name=f"multiscale_roi_align ({name})",
        make=partial(_detector_inputs, layout),
        call=partial(_detector, size=size, **settings),
        features=LEVELS,
        dtypes=dtypes,
        gradients=gradients,
        wide=WIDE if layout == torch.channels_last else {},
    )


def _map_budget(
    name: str,
    dtype: torch.dtype,
    *,
    channels: int = 512,
    aligned: bool = True,
    sampling_ratio: int = 2,
    layout: torch.memory_format = torch.contiguous_format,
    gradients: tuple[str, ...] = (),
) -> OpSpec:
    return OpSpec(
        name=f"roi_align ({name})",
        make=partial(_map_inputs, channels, layout),
        call=partial(_map, aligned=aligned, sampling_ratio=sampling_ratio),
        features=("features",),
        dtypes=(dtype,),
        gradients=gradients,
        wide=WIDE if layout == torch.channels_last else {},
    )


LEVELS = (*PYRAMID, "p5")
WIDE = {
    "_roi_align_kernel": "load store",
    "_gather_kernel": "load store",
    "_box_gradient_kernel": "load",
    "_roi_align_max_kernel": "load store",
    "_max_gather_kernel": "load store",
}
FP32, BF16, FP16 = FEATURE_DTYPES
NCHW: dict[str, Any] = {"layout": torch.contiguous_format}
CUBIC: dict[str, Any] = {"interpolation": "bicubic"}
MAX: dict[str, Any] = {"reduction": "max", "gradients": LEVELS}

BUDGETS = (
    _budget("7x7, channels_last", BF16, FP16, FP32),
    _budget("14x14, channels_last", BF16, size=14),
    _budget("14x14, channels_last, no gradient", FP32, size=14, gradients=()),
    _budget("7x7, channels_last, adaptive", BF16, sampling_ratio=0),
    _budget("7x7, channels_last, adaptive, no gradient to boxes", FP32, gradients=LEVELS, sampling_ratio=0),
    _budget("7x7, contiguous", FP32, **NCHW),
    _budget("7x7, contiguous, no gradient to boxes", BF16, gradients=LEVELS, **NCHW),
    _budget("7x7, contiguous, adaptive", BF16, FP32, gradients=LEVELS, sampling_ratio=0, **NCHW),
    _budget("7x7, channels_last, bicubic", BF16, **CUBIC),
    _budget("7x7, channels_last, bicubic, no gradient to boxes", FP32, gradients=LEVELS, **CUBIC),
    _budget("7x7, channels_last, bicubic, adaptive", BF16, sampling_ratio=0, **CUBIC),
    _budget("7x7, contiguous, bicubic", FP32, **CUBIC, **NCHW),
    _map_budget("512 channels, channels_last", BF16, layout=torch.channels_last),
    _map_budget("512 channels, contiguous", FP32),
    _map_budget("512 channels, contiguous, adaptive", FP32, sampling_ratio=0),
    _map_budget("contiguous, not aligned", FP32, channels=256, aligned=False, gradients=("rois",)),
    _budget("7x7, channels_last, max", BF16, FP32, **MAX),
    _budget("7x7, channels_last, max, no gradient", BF16, reduction="max", gradients=()),
    _budget("7x7, channels_last, max, adaptive", BF16, sampling_ratio=0, **MAX),
    _budget("7x7, contiguous, max", FP32, **NCHW, **MAX),
    _budget("7x7, channels_last, max, bicubic", BF16, **CUBIC, **MAX),
    _budget("7x7, contiguous, max, bicubic", FP32, **CUBIC, **NCHW, **MAX),
)
