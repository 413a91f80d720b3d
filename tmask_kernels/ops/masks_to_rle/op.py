"""Masks of whole images as COCO's run lengths. Letters as in reference.py."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ...backend import check_no_transform, resolve, triton_reasons
from ...common.checks import check_choice, check_number, check_tensor, check_values, wrong
from ...run_lengths import RunLengths

MAX_PIXELS = 2**30  # of a mask in the kernels, which count its pixels in int32


@overload
def masks_to_rle(
    masks: Tensor, threshold: float = ..., *, output: Literal["rle"] = ..., backend: str | None = ...
) -> list[dict[str, Any]]: ...


@overload
def masks_to_rle(
    masks: Tensor, threshold: float = ..., *, output: Literal["run_lengths"], backend: str | None = ...
) -> RunLengths: ...


def masks_to_rle(
    masks: Tensor, threshold: float = 0.5, *, output: str = "rle", backend: str | None = None
) -> list[dict[str, Any]] | RunLengths:
    """Encode masks of any size, bools, probabilities or logits, as COCO's compressed run lengths.

    A pixel is inside where its value > threshold, or where a bool is True. NaN is not inside. With Triton the
    masks are read once, and only the run lengths go to the host.

    Args:
        masks: [K, H, W] float or bool.
        threshold: of float masks: 0.5 for probabilities, 0 for logits.
        output: rle or run_lengths.
        backend: triton or reference.

    Returns:
        ``"rle"``: K dicts ``{"size": [H, W], "counts": str}``, as `pycocotools.mask.encode` writes them; it waits for
        the device. ``"run_lengths"``: a `RunLengths` whose `to_coco` returns these dicts; with Triton, the device
        computes it while the host goes on. Neither traces.

    Raises:
        ValueError: a shape, dtype, name or threshold is wrong.
    """
    op = "masks_to_rle"
    check_tensor(op, "masks", masks, ("K", "H", "W"), "float or bool", hint=" with H, W >= 1")
    if min(masks.shape[1:]) < 1:
        raise wrong(op, "masks", "float or bool [K, H, W] with H, W >= 1", masks)
    threshold = check_number(op, "threshold", threshold)
    check_choice(op, "output", output, ("rle", "run_lengths"))
    check_no_transform(op, f"output={output!r} reads values on the host", vmap_alone=False)
    check_values(op, "masks", masks)
    masks = masks.detach()
    reasons = triton_reasons(masks)
    if masks.dtype == torch.float64:
        reasons.append("compares in float32, not float64")
    if masks.shape[1] * masks.shape[2] > MAX_PIXELS:
        reasons.append("serves masks of up to 2^30 pixels")
    if resolve(op, backend, {"triton": reasons, "reference": []}, device=masks.device) == "triton":
        from .kernels import encode

        found = encode(masks, threshold)
    else:
        from .reference import masks_to_rle_reference

        texts = masks_to_rle_reference(masks, threshold)
        found = RunLengths(lambda: texts, (masks.shape[1], masks.shape[2]), 0, len(masks))
    return found if output == "run_lengths" else found.to_coco()
