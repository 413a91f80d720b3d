"""RoIAlign of one feature map or of a pyramid, all levels in one call. `reference` defines the letters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ...backend import resolve, triton_reasons
from ...common.boxes import boxes_as_tensor, check_features, check_image_indices, is_traced
from ...common.checks import check_choice, check_flag, check_list, check_number, check_size, check_whole
from ...common.pyramid import level_thresholds
from ...common.roi_geometry import RoIGeometry
from .cpu import multiscale_roi_align_cpu
from .reference import multiscale_roi_align_reference
from .reference_max import multiscale_roi_align_max_reference

MAX_TRITON_LEVELS = 5
# A million samples a bin. Larger grids exhaust memory or overflow int32 in some backends.
MAX_SAMPLING_RATIO = 1024
# Max of an adaptive grid stores a sample's row in 15 bits and its column in 16; a cell has up to two samples an axis.
MAX_ADAPTIVE_SIDE = 16_000
# The backward of max numbers tiles of 2 x 2 cells in float32, which holds whole numbers up to 2^24.
MAX_CELLS_OF_MAX = 2**25


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    valid: Tensor | None = None,
    reduction: Literal["mean", "max"] = "mean",
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    cubic_coeff: float = -0.5,
    backend: str | None = None,
) -> Tensor:
    """Return the mean, or the largest, of the samples in each bin of each box.

    A sample interpolates the feature map at a point of the bin. A sample outside [-1, H] x [-1, W] is 0 and counts in
    the mean and in the maximum. Boxes and sums are float32, or float64 for float64 input.

    Args:
        input: features [N, C, H, W]: float16, bfloat16, float32 or float64, contiguous or channels_last.
        boxes: xyxy in image pixels: [K, 5] with the image's index first, a list of N tensors [L, 4], or [N, P, 4].
        output_size: number of bins (PH, PW), or one number for both.
        spatial_scale: feature cells per pixel.
        sampling_ratio: samples per bin along each axis, up to 1,024. 0 or less means ceil(bin size).
        aligned: shift boxes by half a cell, so that pixel centres meet. If False, boxes are at least one cell long.
        valid: bool [N, P], only with boxes [N, P, 4].
        reduction: "mean", or "max" for the largest sample. NaN is larger than any number.
        interpolation: "bilinear" between 2 x 2 cells, or "bicubic" between 4 x 4 cells with Keys' kernel. A cell
            beyond the border has the border's value.
        cubic_coeff: coefficient of Keys' kernel. -0.5 reproduces quadratic functions away from the border; -0.75 is
            the coefficient of `torch.nn.functional.grid_sample`.
        backend: "triton", "torchvision", "reference", "auto", or None for the default.

    Returns:
        [K, C, PH, PW] in the dtype of `input` and, on CUDA, in its memory format; K = N * P for boxes [N, P, 4]. A box
        gives zeros and takes no gradient if it is not valid, has a NaN or infinite coordinate, or names an image that
        does not exist. An aligned box of size 0 or less gives zeros with an adaptive grid; with a fixed grid it gives
        the value at the point, or the mirrored crop.

        The result is differentiable in `input` and in `boxes`. The gradient of "max" goes to the cells of the largest
        sample, the first among equals, or nowhere if that sample lies outside. Only backend="reference" differentiates
        "max" in the boxes. A sample beyond the border's cell does not move with its box; a sample exactly on that cell
        does. Without `aligned` the end of a box of exactly one cell is free.

    Raises:
        ValueError: wrong shape, dtype, device or option. On a CPU in eager mode also for an image that does not exist.

    Sources: Mask R-CNN (He et al. 2017), section 3; Cubic convolution interpolation (Keys 1981).
    """
    check_features("roi_align", [input], "input")
    scale = check_number("roi_align", "spatial_scale", spatial_scale, above=0)
    geometry = _geometry("roi_align", [scale], [], sampling_ratio, aligned, interpolation, cubic_coeff)
    return _roi_align("roi_align", [input], boxes, valid, output_size, geometry, reduction, backend)


def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scales: Sequence[float],
    *,
    valid: Tensor | None = None,
    sampling_ratio: int = 2,
    aligned: bool = True,
    canonical_scale: float = 224,
    canonical_level: int = 4,
    level_convention: str = "detectron2",
    reduction: Literal["mean", "max"] = "mean",
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    cubic_coeff: float = -0.5,
    backend: str | None = None,
) -> Tensor:
    """Apply `roi_align` to each box on the pyramid level that fits the box.

    A box of ``area`` px^2 belongs to level ``floor(canonical_level + log2(sqrt(area) / canonical_scale))``, clamped to
    the given levels.

    Args:
        features: one [N, C, H, W] a level, finest first.
        boxes: as in `roi_align`.
        output_size: as in `roi_align`.
        spatial_scales: one a level, each half the previous one. The first is 2 ** -(finest level), as 1/4 for P2.
        valid: as in `roi_align`.
        sampling_ratio: as in `roi_align`.
        aligned: as in `roi_align`.
        canonical_scale: size in pixels of a box that belongs to `canonical_level`.
        canonical_level: see `canonical_scale`.
        level_convention: where the formula adds its epsilon. "torchvision" adds 1e-6 to the logarithm, and so moves
            boxes just under a boundary to the coarser level; "detectron2" adds 1e-8 inside the logarithm.
        reduction: as in `roi_align`.
        interpolation: as in `roi_align`.
        cubic_coeff: as in `roi_align`.
        backend: as in `roi_align`.

    Returns:
        [K, C, PH, PW], as `roi_align`.

    Raises:
        ValueError: as `roi_align`.

    Source of the levels: Feature Pyramid Networks (Lin et al. 2017), equation 1.
    """
    op = "multiscale_roi_align"
    thresholds = level_thresholds(spatial_scales, canonical_scale, canonical_level, level_convention, op=op)
    scales = [float(scale) for scale in spatial_scales]
    expected = f"a list of tensors [N, C, H, W], one a spatial scale ({len(scales)})"
    maps = check_list(op, "features", features, expected, len(scales))
    check_features(op, maps)
    geometry = _geometry(op, scales, thresholds, sampling_ratio, aligned, interpolation, cubic_coeff)
    return _roi_align(op, maps, boxes, valid, output_size, geometry, reduction, backend)


def _geometry(
    op: str,
    scales: list[float],
    thresholds: list[float],
    sampling_ratio: int,
    aligned: bool,
    interpolation: str,
    cubic_coeff: float,
) -> RoIGeometry:
    """Check the options of the geometry that both functions have, and return them as one value."""
    sampling_ratio = check_whole(op, "sampling_ratio", sampling_ratio, high=MAX_SAMPLING_RATIO)
    aligned = check_flag(op, "aligned", aligned)
    check_choice(op, "interpolation", interpolation, ("bilinear", "bicubic"))
    cubic_coeff = check_number(op, "cubic_coeff", cubic_coeff)
    cubic = cubic_coeff if interpolation == "bicubic" else None
    return RoIGeometry(tuple(scales), tuple(thresholds), sampling_ratio, aligned, cubic)


def _roi_align(
    op: str,
    features: list[Tensor],
    boxes: Tensor | Sequence[Tensor],
    valid: Tensor | None,
    output_size: int | tuple[int, int],
    geometry: RoIGeometry,
    reduction: str,
    backend: str | None,
) -> Tensor:
    size = check_size(op, "output_size", output_size, or_number=True)
    check_choice(op, "reduction", reduction, ("mean", "max"))
    boxes = boxes_as_tensor(op, features[0], boxes, valid)
    traced = is_traced(features[0])
    if boxes.dim() == 2 and boxes.device.type == "cpu" and not traced:
        check_image_indices(op, boxes, features[0].shape[0])
    boxes = boxes.to(torch.float64 if features[0].dtype == torch.float64 else torch.float32)

    device = features[0].device
    is_max, adaptive = reduction == "max", geometry.sampling_ratio <= 0
    torchvision = _torchvision_reasons(features, boxes, traced, is_max, geometry.cubic)
    triton = _triton_reasons(features, boxes, is_max, adaptive)
    reference = ["the adaptive grid of max is searched as far as the data say, which cannot be traced"]
    reference = reference if is_max and adaptive and traced else []
    reasons = {"triton": triton, "reference": reference, "torchvision": torchvision}
    chosen = resolve(op, backend, reasons, device=device, differentiable=True)
    if chosen == "torchvision":
        return multiscale_roi_align_cpu(features, boxes, valid, size, geometry)
    if chosen == "reference":
        pool = multiscale_roi_align_max_reference if is_max else multiscale_roi_align_reference
        return pool(features, boxes, valid, size, geometry)
    from .kernels import forward as kernels
    from .kernels import max as kernels_max

    shared = (features, boxes, valid, *size, *geometry.flatten())
    if is_max:
        keep_index = torch.is_grad_enabled() and any(f.requires_grad for f in features)
        return kernels_max.multiscale_roi_align_max(*shared, keep_index)[0]
    return kernels.multiscale_roi_align(*shared)


def _torchvision_reasons(
    features: list[Tensor], boxes: Tensor, traced: bool, is_max: bool, cubic: float | None
) -> list[str]:
    reasons = []
    if is_max:
        reasons.append("has no max of samples")
    if cubic is not None:
        reasons.append("has no bicubic interpolation")
    if features[0].device.type != "cpu":
        reasons.append("serves CPU tensors only")
    if traced:
        reasons.append("selects rows by value, which cannot be traced")
    if boxes.requires_grad and torch.is_grad_enabled():
        reasons.append("no gradient to the boxes")
    return reasons


def _triton_reasons(features: list[Tensor], boxes: Tensor, is_max: bool, adaptive: bool) -> list[str]:
    reasons = triton_reasons(features[0], boxes)
    if features[0].dtype == torch.float64 and features[0].device.type == "cuda":
        reasons.append("float64 features run in the interpreter only")
    if len(features) > MAX_TRITON_LEVELS:
        reasons.append(f"at most {MAX_TRITON_LEVELS} levels")
    if is_max and adaptive and max(max(f.shape[2:]) for f in features) > MAX_ADAPTIVE_SIDE:
        reasons.append(f"max of an adaptive grid: maps of at most {MAX_ADAPTIVE_SIDE} cells a side")
    if is_max and sum(f.shape[2] * f.shape[3] for f in features) > MAX_CELLS_OF_MAX:
        reasons.append(f"max: maps of at most {MAX_CELLS_OF_MAX} cells in all")
    if is_max and torch.is_grad_enabled() and boxes.requires_grad:
        reasons.append("no gradient to the boxes of max")
    return reasons
