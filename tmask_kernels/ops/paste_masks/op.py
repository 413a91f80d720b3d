"""Predicted masks pasted into the image. Letters as in reference.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ...backend import check_no_transform, resolve, triton_reasons
from ...common.checks import (
    check_choice,
    check_flag,
    check_list,
    check_number,
    check_size,
    check_tensor,
    check_values,
    check_whole,
    wrong,
)
from ...namespace import custom_op
from ...packed import WORD
from ...run_lengths import RunLengths
from .reference import paste_masks_reference

Pasted = Tensor | RunLengths | list[dict[str, Any]]
RUN_OUTPUTS = ("rle", "run_lengths")
MAX_PIXELS = 2**30  # of an image in the kernels, which count its pixels in int32


@overload
def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    logits: bool = ...,
    threshold: float = ...,
    output: Literal["probability", "bool", "packed"] = ...,
    convention: str = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    logits: bool = ...,
    threshold: float = ...,
    output: Literal["rle"],
    convention: str = ...,
    backend: str | None = ...,
) -> list[dict[str, Any]]: ...


@overload
def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    logits: bool = ...,
    threshold: float = ...,
    output: Literal["run_lengths"],
    convention: str = ...,
    backend: str | None = ...,
) -> RunLengths: ...


@overload
def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    logits: bool = ...,
    threshold: float = ...,
    output: str,
    convention: str = ...,
    backend: str | None = ...,
) -> Pasted: ...


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    logits: bool = False,
    threshold: float = 0.5,
    output: str = "bool",
    convention: str = "detectron2",
    backend: str | None = None,
) -> Pasted:
    """Resample each M x M mask to the pixels of the image inside its box. Not differentiable.

    The convention ``"detectron2"`` samples at pixel centres, counts cells beyond the mask as 0, and is inside where
    value >= threshold; a box without area, or inverted, has no pixel. The convention ``"torchvision"`` grows the mask
    by a ring of zeros, cuts the grown box to integers, resizes the mask
    (`torchvision.models.detection.roi_heads.paste_masks_in_image`), and is inside where value > threshold. Values agree
    with the originals up to float32 rounding; all backends agree bit for bit. A box with a NaN or infinite corner has
    no pixel.

    Args:
        masks: [K, M, M] float, probabilities or logits; or bool, the probabilities 0 and 1 in float32.
        boxes: [K, 4], xyxy in pixels of the image. A box may reach beyond the image.
        image_size: (H, W).
        logits: whether `masks` are logits. The sigmoid is applied before interpolation.
        threshold: in (0, 1].
        output: probability, bool, packed, rle or run_lengths.
        convention: detectron2 or torchvision.
        backend: triton or reference.

    Returns:
        ``"probability"``: [K, H, W] float32 (float64 for float64 masks), 0 outside the box. ``"bool"``: [K, H, W].
        ``"packed"``: [K, H, ceil(W / 32)] int32, as `pack_masks` of the bools. ``"rle"``: K dicts ``{"size": [H, W],
        "counts": str}``, COCO's compressed run lengths of the bools, as `pycocotools.mask.encode` writes them; it waits
        for the device. ``"run_lengths"``: a `RunLengths` whose `to_coco` returns these dicts; with Triton, the device
        computes it while the host goes on. These two do not trace. The other outputs never wait.

    Raises:
        ValueError: a shape, dtype, name or threshold is wrong.
    """
    _check_masks("paste_masks", masks, boxes, ("K",), logits)
    threshold = _check_options("paste_masks", masks, threshold, output, convention)
    image_size = height, width = check_size("paste_masks", "image_size", image_size)
    chosen = _choose("paste_masks", masks, boxes, image_size, backend)
    masks, boxes = _prepare(masks, boxes, logits, chosen)
    if output in RUN_OUTPUTS:
        return _runs(masks[None], boxes[None], [len(masks)], [image_size], threshold, convention, output, chosen)[0]
    if chosen == "triton":
        from .kernels import dense as kernels

        return kernels.paste_masks(masks, boxes, height, width, threshold, output, convention)
    return _paste(masks, boxes, height, width, threshold, output, convention)


def paste_masks_batched(
    masks: Tensor,
    boxes: Tensor,
    counts: Tensor | Sequence[int],
    image_sizes: Sequence[tuple[int, int]],
    *,
    logits: bool = False,
    threshold: float = 0.5,
    output: str = "bool",
    convention: str = "detectron2",
    backend: str | None = None,
) -> Sequence[Pasted]:
    """Call `paste_masks` for N padded images of their own sizes; the results are equal bit for bit.

    Run lengths take as many launches and waits for N images as for one, with Triton. Other outputs take one launch an
    image and no wait. The arguments that are not listed are those of `paste_masks`.

    Args:
        masks: [N, D, M, M].
        boxes: [N, D, 4].
        counts: how many masks of each image to paste, whole numbers in 0..D. Reading a tensor on a device is a wait.
        image_sizes: (H, W) of each image.

    Returns:
        A list of the N results.

    Raises:
        ValueError: as of `paste_masks`, or a count is beyond D.
    """
    op = "paste_masks_batched"
    _check_masks(op, masks, boxes, ("N", "D"), logits)
    threshold = _check_options(op, masks, threshold, output, convention)
    N, D = masks.shape[:2]
    sizes = check_list(op, "image_sizes", image_sizes, f"{N} (height, width), one an image", N)
    image_sizes = [check_size(op, f"image_sizes[{i}]", size) for i, size in enumerate(sizes)]
    numbers = _counts(op, counts, N, D)
    largest = max(image_sizes, key=math.prod, default=(1, 1))
    chosen = _choose(op, masks, boxes, largest, backend)
    if output in RUN_OUTPUTS:
        prepared = _prepare(masks, boxes, logits, chosen)
        return _runs(*prepared, numbers, image_sizes, threshold, convention, output, chosen)
    parts = zip(masks, boxes, numbers, image_sizes, strict=True)
    settings: dict[str, Any] = {"logits": logits, "threshold": threshold, "convention": convention, "backend": chosen}
    return [paste_masks(m[:number], b[:number], size, output=output, **settings) for m, b, number, size in parts]


def _runs(
    masks: Tensor,
    boxes: Tensor,
    numbers: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    threshold: float,
    convention: str,
    output: str,
    chosen: str,
) -> Sequence[RunLengths | list[dict[str, Any]]]:
    """Return the run lengths of the first masks of N images: masks [N, D, M, M], boxes [N, D, 4]."""
    if chosen == "triton":
        from .kernels.runs import paste_runs

        if output == "run_lengths":  # read later, when the caller's tensors may have changed
            masks, boxes = masks.clone(), boxes.clone()
        found = paste_runs(masks, boxes, numbers, sizes, threshold, convention)
    else:
        from .rle import paste_rle

        found = []
        with torch.autocast(masks.device.type, enabled=False):
            for m, b, number, size in zip(masks, boxes, numbers, sizes, strict=True):
                texts = paste_rle(m[:number], b[:number], size, threshold, convention=convention)
                found.append(RunLengths(texts.copy, size, 0, number))
    return found if output == "run_lengths" else [one.to_coco() for one in found]


def _choose(op: str, masks: Tensor, boxes: Tensor, image_size: tuple[int, int], backend: str | None) -> str:
    reasons: dict[str, list[str]] = {"triton": _triton_reasons(masks, boxes, image_size), "reference": []}
    return resolve(op, backend, reasons, device=masks.device)


def _prepare(masks: Tensor, boxes: Tensor, logits: bool, chosen: str) -> tuple[Tensor, Tensor]:
    """Return the probabilities of the masks, and the boxes, in the precision that the backend reads."""
    masks, boxes = masks.detach(), boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32))
    if masks.dtype == torch.bool:
        masks = masks.float()
    if logits or chosen == "reference":
        masks = masks.to(torch.promote_types(masks.dtype, torch.float32))
    return masks.sigmoid() if logits else masks, boxes


def _triton_reasons(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> list[str]:
    reasons = triton_reasons(masks, boxes)
    if torch.float64 in (masks.dtype, boxes.dtype):
        reasons.append("computes in float32, not float64")
    if image_size[0] * image_size[1] > MAX_PIXELS:
        reasons.append("serves images of up to 2^30 pixels")
    return reasons


def _check_masks(op: str, masks: Tensor, boxes: Tensor, letters: tuple[str, ...], logits: bool) -> None:
    dtype = "float" if check_flag(op, "logits", logits) else "float or bool"
    check_tensor(op, "masks", masks, (*letters, "M", "M"), dtype)
    if not 1 <= masks.shape[-2] == masks.shape[-1]:
        raise wrong(op, "masks", f"{dtype} [{', '.join(letters)}, M, M] with M >= 1", masks)
    check_tensor(op, "boxes", boxes, (*masks.shape[:-2], 4), "float", device=masks.device)


def _check_options(op: str, masks: Tensor, threshold: float, output: str, convention: str) -> float:
    """Check the options; return the threshold as a float."""
    check_choice(op, "output", output, ("probability", "bool", "packed", *RUN_OUTPUTS))
    if output in RUN_OUTPUTS:
        check_no_transform(op, f"output={output!r} reads values on the host", vmap_alone=False)
        check_values(op, "masks", masks)
    check_choice(op, "convention", convention, ("detectron2", "torchvision"))
    return check_number(op, "threshold", threshold, high=1, above=0)


def _counts(op: str, counts: Tensor | Sequence[int], N: int, D: int) -> list[int]:
    """Return the N counts, in 0..D, as ints."""
    if isinstance(counts, Tensor):
        check_tensor(op, "counts", counts, (N,), "integer")
        check_values(op, "counts", counts)
        counts = counts.tolist()
    items = check_list(op, "counts", counts, f"{N} whole numbers in 0..{D}, one an image", N)
    return [check_whole(op, f"counts[{i}]", number, 0, D) for i, number in enumerate(items)]


# One node of a compiled graph: the reference's loop over chunks of instances would unroll.
@custom_op("paste_masks_reference")
def _paste(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, output: str, convention: str
) -> Tensor:
    with torch.autocast(masks.device.type, enabled=False):
        return paste_masks_reference(masks, boxes, (height, width), threshold, output, convention=convention)


@_paste.register_fake
def _(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, output: str, convention: str) -> Tensor:
    count = masks.shape[0]
    if output == "packed":
        return masks.new_empty((count, height, -(-width // WORD)), dtype=torch.int32)
    return masks.new_empty((count, height, width), dtype=torch.bool if output == "bool" else masks.dtype)
