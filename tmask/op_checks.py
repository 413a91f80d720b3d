"""One small seeded case an op: the table that `tmask validate` and `tmask info` go through.

A case makes its inputs on the CPU in float32, so that every backend, dtype and machine sees the same numbers. It names
which of them are features (they take the dtype under test and are float64 in the truth) and which take gradients. Sizes
are odd and small: the Triton interpreter runs one program after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tmask_kernels as K
from tmask_kernels.testing import random_boxes

FP32 = (torch.float32,)
FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class OpCheck:
    """One op: `make` gives its inputs, `call(inputs, backend)` its outputs (a tensor, a tuple, or a list)."""

    name: str
    make: Callable[[], Inputs]
    call: Callable[[Inputs, str], Any]
    features: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FP32
    gradients: tuple[str, ...] = ()


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed))


def _uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=_generator(seed))


def _boxes(count: int, side: float, *, seed: int = 0, min_size: float = 2.0) -> Tensor:
    return random_boxes(count, height=side, width=side, min_size=min_size, seed=seed)


# ---- RoIAlign, RoIPool


def _roi_inputs() -> Inputs:
    boxes = _boxes(7, 90.0, min_size=8.0)
    index = torch.tensor([0, 1, 0, 1, 1, 0, 0.0])
    return {"features": _normal(2, 5, 25, 23), "rois": torch.cat([index[:, None], boxes], dim=1)}


def _roi_align(x: Inputs, backend: str) -> Tensor:
    return K.roi_align(x["features"], x["rois"], (7, 7), 0.25, 2, aligned=True, backend=backend)


def _roi_pool(x: Inputs, backend: str) -> Tensor:
    return K.roi_pool(x["features"], x["rois"], (7, 7), 0.25, backend=backend)


def _bicubic(x: Inputs, backend: str) -> Tensor:
    """Few bins: a sample reads 16 cells, which the interpreter takes a minute for at the size of the other cases."""
    rois = x["rois"][:3]
    return K.roi_align(x["features"], rois, (3, 5), 0.25, 2, True, interpolation="bicubic", backend=backend)


def _max(x: Inputs, backend: str) -> Tensor:
    return K.roi_align(x["features"], x["rois"], 4, 0.25, 2, True, reduction="max", backend=backend)


def _pyramid_inputs() -> Inputs:
    boxes = torch.stack([_boxes(6, 120.0, seed=1, min_size=8.0), _boxes(6, 120.0, seed=2, min_size=8.0)])  # [2, 6, 4]
    levels = {"p2": _normal(2, 5, 31, 31), "p3": _normal(2, 5, 16, 16, seed=1), "p4": _normal(2, 5, 8, 8, seed=2)}
    return {**levels, "boxes": boxes, "valid": torch.arange(6)[None].expand(2, 6) < torch.tensor([[6], [4]])}


def _multiscale_roi_align(x: Inputs, backend: str) -> Tensor:
    levels = [x["p2"], x["p3"], x["p4"]]
    return K.multiscale_roi_align(
        levels, x["boxes"], 7, (1 / 4, 1 / 8, 1 / 16), valid=x["valid"], canonical_scale=56, backend=backend
    )


# ---- NMS, boxes, matching


def _nms_inputs() -> Inputs:
    boxes = torch.stack([_boxes(70, 60.0, seed=s, min_size=12.0) for s in (0, 1)])  # [2, 70, 4]
    valid = torch.arange(70)[None].expand(2, 70) < torch.tensor([[70], [41]])
    return {"boxes": boxes, "scores": _uniform(2, 70), "valid": valid, "classes": torch.arange(70) % 3}


def _padded_nms(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    return K.padded_nms(x["boxes"], x["scores"], 0.5, valid=x["valid"], max_output=40, backend=backend)


def _long_nms_inputs() -> Inputs:
    return {"boxes": _boxes(300, 100.0, min_size=12.0).view(2, 150, 4), "scores": _uniform(2, 150)}


def _long_nms(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    return K.padded_nms(x["boxes"], x["scores"], 0.5, max_output=150, backend=backend)


def _nms(x: Inputs, backend: str) -> Tensor:
    return K.nms(x["boxes"][0], x["scores"][0], 0.5, backend=backend)


def _batched_nms(x: Inputs, backend: str) -> Tensor:
    return K.batched_nms(x["boxes"][0], x["scores"][0], x["classes"], 0.5, backend=backend)


def _soft_nms(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    return K.soft_nms(x["boxes"][0], x["scores"][0], backend=backend)


def _coding_inputs() -> Inputs:
    anchors = _boxes(2 * 33, 100.0, seed=1).view(2, 33, 4)
    return {"boxes": _boxes(2 * 33, 100.0).view(2, 33, 4), "anchors": anchors, "deltas": 0.5 * _normal(2, 33, 4)}


def _encode_boxes(x: Inputs, backend: str) -> Tensor:
    return K.encode_boxes(x["boxes"], x["anchors"], (10.0, 10.0, 5.0, 5.0), backend=backend)


def _decode_boxes(x: Inputs, backend: str) -> Tensor:
    return K.decode_boxes(x["deltas"], x["anchors"], image_size=(90, 80), backend=backend)


def _match_inputs() -> Inputs:
    gt = torch.stack([_boxes(5, 100.0, seed=s, min_size=10.0) for s in (3, 4)])  # [2, 5, 4]
    kind = torch.tensor([[0, 0, 0, 1, 2], [0, 2, 2, 2, 2]])  # real, crowd, padding
    return {"anchors": _boxes(150, 100.0, min_size=8.0), "gt": gt, "valid": kind == 0, "crowd": kind == 1}


def _match_anchors(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    return K.match_anchors(
        x["anchors"],
        x["gt"],
        x["valid"],
        gt_crowd=x["crowd"],
        high=0.6,
        low=0.3,
        allow_low_quality=True,
        backend=backend,
    )


_SPEC = K.AnchorSpec(sizes=((16.0,), (32.0,)), aspect_ratios=(0.5, 1.0, 2.0), strides=(8, 16))


def _proposal_inputs() -> Inputs:
    return {
        "logits3": _normal(2, 3, 9, 11),
        "logits4": _normal(2, 3, 5, 6, seed=1),
        "deltas3": 0.3 * _normal(2, 12, 9, 11, seed=2),
        "deltas4": 0.3 * _normal(2, 12, 5, 6, seed=3),
        "sizes": torch.tensor([[70, 85], [64, 60]]),
    }


def _rpn_proposals(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    return K.rpn_proposals(
        [x["logits3"], x["logits4"]],
        [x["deltas3"], x["deltas4"]],
        x["sizes"],
        _SPEC,
        padded_size=(72, 88),
        pre_nms_top_n=60,
        post_nms_top_n=40,
        nms_threshold=0.7,
        min_size=1e-3,
        score_threshold=0.0,
        backend=backend,
    )


def _detection_inputs() -> Inputs:
    boxes = torch.stack([_boxes(20 * 3, 60.0, seed=s, min_size=12.0).view(20, 3, 4) for s in (5, 6)])
    valid = torch.arange(20)[None].expand(2, 20) < torch.tensor([[20], [13]])
    return {"scores": _uniform(2, 20, 3), "boxes": boxes, "valid": valid, "sizes": torch.tensor([[60, 60], [50, 55]])}


def _detections(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    return K.detections(
        x["scores"],
        x["boxes"],
        valid=x["valid"],
        image_sizes=x["sizes"],
        score_threshold=0.1,
        nms_threshold=0.5,
        max_detections=25,
        backend=backend,
    )


# ---- masks and losses


def _paste_inputs() -> Inputs:
    boxes = torch.tensor([[3.2, 1.1, 30.7, 9.4], [-5.0, -3.5, 12.0, 20.0], [20.0, 7.0, 21.5, 30.0]])
    return {"masks": _uniform(3, 28, 28), "boxes": boxes}


def _paste(output: str) -> Callable[[Inputs, str], Any]:
    def call(x: Inputs, backend: str) -> Any:
        return K.paste_masks(x["masks"], x["boxes"], (13, 41), output=output, backend=backend)

    return call


def _paste_batch_inputs() -> Inputs:
    one = _paste_inputs()
    return {"masks": _uniform(3, 3, 28, 28, seed=1), "boxes": torch.stack([one["boxes"] * s for s in (1.0, 0.5, 0.7)])}


def _paste_batch(output: str) -> Callable[[Inputs, str], Any]:
    def call(x: Inputs, backend: str) -> Any:
        sizes = [(13, 41), (20, 9), (11, 33)]
        found = K.paste_masks_batched(x["masks"], x["boxes"], [2, 0, 3], sizes, output=output, backend=backend)
        return [one for image in found for one in image]

    return call


def _keypoint_inputs() -> Inputs:
    """A box larger than its map, a smaller one, one beyond every corner, and a slot that is not valid."""
    rows = [[3.2, 1.1, 30.7, 19.4], [5.0, 3.5, 9.3, 8.0], [-20.0, -7.0, 1.5, 6.0], [0.0, 0.0, 9.0, 9.0]]
    valid = torch.tensor([[True, True], [True, False]])
    return {"heatmaps": 3 * _normal(2, 2, 2, 6, 7), "boxes": torch.tensor(rows).view(2, 2, 4), "valid": valid}


def _decode_keypoints(x: Inputs, backend: str) -> tuple[Tensor, Tensor]:
    return K.decode_keypoints(x["heatmaps"], x["boxes"], x["valid"], backend=backend)


def _mask_target_inputs() -> Inputs:
    masks = _uniform(2, 3, 13, 45) < 0.5
    boxes = torch.stack([random_boxes(2, height=13, width=45, min_size=3, max_size=9, seed=s) for s in (7, 8)])
    return {"packed": K.pack_masks(masks), "boxes": boxes, "index": torch.tensor([[0, -1], [1, 2]])}


def _mask_targets(x: Inputs, backend: str) -> Tensor:
    return K.mask_targets(x["packed"], x["boxes"], x["index"], 3, convention="torchvision", backend=backend)


def _focal_inputs() -> Inputs:
    return {"logits": 4 * _normal(53, 7), "targets": (_uniform(53, 7) < 0.2).float()}


def _sigmoid_focal_loss(x: Inputs, backend: str) -> Tensor:
    return K.sigmoid_focal_loss(x["logits"], x["targets"], backend=backend)


def _softmax_focal_inputs() -> Inputs:
    return {"logits": 3 * _normal(29, 7), "labels": torch.arange(29) % 7}


def _softmax_focal_loss(x: Inputs, backend: str) -> Tensor:
    return K.softmax_focal_loss(x["logits"], x["labels"], backend=backend)


def _mask_bce_inputs() -> Inputs:
    classes, valid = torch.tensor([0, 2, 1, 2, 0]), torch.tensor([True, True, False, True, True])
    return {"logits": 3 * _normal(5, 3, 14, 14), "targets": _uniform(5, 14, 14), "classes": classes, "valid": valid}


def _mask_bce(x: Inputs, backend: str) -> Tensor:
    return K.mask_bce(x["logits"], x["classes"], x["targets"], valid=x["valid"], backend=backend)


_PYRAMID, _MAPS = ("p2", "p3", "p4"), ("logits3", "logits4", "deltas3", "deltas4")

OP_CHECKS: tuple[OpCheck, ...] = (
    OpCheck(
        name="roi_align",
        make=_roi_inputs,
        call=_roi_align,
        features=("features",),
        dtypes=FEATURE_DTYPES,
        gradients=("features",),
    ),
    OpCheck(
        name="roi_pool",
        make=_roi_inputs,
        call=_roi_pool,
        features=("features",),
        dtypes=FEATURE_DTYPES,
        gradients=("features",),
    ),
    OpCheck(
        name="roi_align (bicubic)",
        make=_roi_inputs,
        call=_bicubic,
        features=("features",),
        dtypes=FEATURE_DTYPES,
        gradients=("features",),
    ),
    OpCheck(
        name="roi_align (max)",
        make=_roi_inputs,
        call=_max,
        features=("features",),
        dtypes=FEATURE_DTYPES,
        gradients=("features",),
    ),
    OpCheck(
        name="roi_align (boxes)",  # apart from the first: torchvision has no gradient to them
        make=_roi_inputs,
        call=_roi_align,
        features=("features",),
        dtypes=FEATURE_DTYPES,
        gradients=("features", "rois"),
    ),
    OpCheck(
        name="multiscale_roi_align",
        make=_pyramid_inputs,
        call=_multiscale_roi_align,
        features=_PYRAMID,
        dtypes=FEATURE_DTYPES,
        gradients=_PYRAMID,
    ),
    OpCheck(name="nms", make=_nms_inputs, call=_nms),
    OpCheck(name="batched_nms", make=_nms_inputs, call=_batched_nms),
    OpCheck(name="padded_nms", make=_nms_inputs, call=_padded_nms),
    OpCheck(name="padded_nms (long segments)", make=_long_nms_inputs, call=_long_nms),
    OpCheck(name="soft_nms", make=_nms_inputs, call=_soft_nms),
    OpCheck(name="encode_boxes", make=_coding_inputs, call=_encode_boxes, features=("boxes", "anchors")),
    OpCheck(
        name="decode_boxes",
        make=_coding_inputs,
        call=_decode_boxes,
        features=("deltas", "anchors"),
        gradients=("deltas",),
    ),
    OpCheck(name="match_anchors", make=_match_inputs, call=_match_anchors),
    OpCheck(name="rpn_proposals", make=_proposal_inputs, call=_rpn_proposals, features=_MAPS, dtypes=FEATURE_DTYPES),
    OpCheck(name="detections", make=_detection_inputs, call=_detections),
    OpCheck(name="paste_masks (probability)", make=_paste_inputs, call=_paste("probability"), features=("masks",)),
    OpCheck(name="paste_masks (bool)", make=_paste_inputs, call=_paste("bool")),
    OpCheck(name="paste_masks (packed)", make=_paste_inputs, call=_paste("packed")),
    OpCheck(name="paste_masks (rle)", make=_paste_inputs, call=_paste("rle")),
    OpCheck(name="paste_masks_batched (bool)", make=_paste_batch_inputs, call=_paste_batch("bool")),
    OpCheck(name="paste_masks_batched (rle)", make=_paste_batch_inputs, call=_paste_batch("rle")),
    OpCheck(
        name="decode_keypoints",
        make=_keypoint_inputs,
        call=_decode_keypoints,
        features=("heatmaps",),
        dtypes=FEATURE_DTYPES,
    ),
    OpCheck(name="mask_targets", make=_mask_target_inputs, call=_mask_targets, features=("boxes",)),
    OpCheck(
        name="sigmoid_focal_loss",
        make=_focal_inputs,
        call=_sigmoid_focal_loss,
        features=("logits",),
        dtypes=FEATURE_DTYPES,
        gradients=("logits",),
    ),
    OpCheck(
        name="softmax_focal_loss",
        make=_softmax_focal_inputs,
        call=_softmax_focal_loss,
        features=("logits",),
        dtypes=FEATURE_DTYPES,
        gradients=("logits",),
    ),
    OpCheck(
        name="mask_bce",
        make=_mask_bce_inputs,
        call=_mask_bce,
        features=("logits",),
        dtypes=FEATURE_DTYPES,
        gradients=("logits",),
    ),
)
