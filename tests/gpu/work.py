"""The work of the benchmarks, at full size, as cases of the ops. Only this file of the folder names bench cases."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import CASES
from bench.cases._shared import rois
from tests.gpu.tools import FULL_SIZE_FP32, MEBIBYTE, assert_same_bits
from tmask_kernels import (
    decode_keypoints,
    detections,
    mask_bce,
    mask_targets,
    match_anchors,
    multiscale_roi_align,
    pack_masks,
    padded_nms,
    paste_masks,
    roi_pool,
    rpn_proposals,
    sigmoid_focal_loss,
)
from tmask_kernels.common.reference import box_iou
from tmask_kernels.common.spec import FEATURE_DTYPES
from tmask_kernels.ops.anchors.reference import level_strides
from tmask_kernels.ops.proposals import op as proposals_op
from tmask_kernels.ops.proposals.kernels import candidates as kernels_candidates
from tmask_kernels.ops.proposals.reference import rpn_candidates_reference, select_best_reference
from tmask_kernels.testing import TOLERANCES, Inputs, OpSpec, Tolerance, assert_close

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
FULL_TOLERANCES = TOLERANCES | {torch.float32: Tolerance(**FULL_SIZE_FP32)}
RPN = {"high": 0.7, "low": 0.3, "allow_low_quality": True}
HEAD = {"high": 0.5, "low": 0.5, "allow_low_quality": False}

ROIS, MASK_ROIS, BICUBIC, LARGEST = "roi-align-box-head", "roi-align-mask-head", "roi-align-bicubic", "roi-align-max"
ONE_MAP, ADAPTIVE, POOL = "roi-align-map", "roi-align-map-adaptive", "roi-pool-map"
NMS = ("nms-rpn", "nms-classes", "nms-1k", "nms-10k", "nms-10k-dense", "nms-100k")
LEVELS, LIST, MEDIUM, LONG_LIST, MILLION = "nms-rpn", "nms-1k", "nms-10k", "nms-100k", "nms-1m"
PROPOSALS, ANCHORS, KEYPOINTS = "proposals-rpn", "match-anchors", "keypoints"
MASKS, MASKS_OF_DETECTRON2 = "paste-masks", "paste-masks-detectron2"
FOCAL, FOCAL_HEAD, MASK_LOSS = "focal-rpn", "focal-box-head", "mask-loss"


def case_of(name: str, full: bool) -> Any:
    """The bench case; in a rehearsal smaller than its `small`: the interpreter runs one program after another."""
    case = CASES[name]
    if full:
        return case
    small: Any = case.small()
    if hasattr(small, "pooled"):
        return replace(small, height=64, width=96, rois=2 * small.images, channels=6, pooled=min(small.pooled, 4))
    if name in NMS or name == MILLION:  # a list of 140 boxes and more is taken in steps
        few = 140 if small.kind == "list" else 100
        return replace(small, lengths=tuple(min(n, few) for n in small.lengths[-3:]))
    return small


@dataclass(frozen=True, kw_only=True)
class Work:
    """A case of an op at full size.

    `check(inputs, outputs)` asserts what the outputs should be. Without it they equal the reference: in float64 on the
    same inputs, within `tolerances`, if the op has gradients, and else the reference on the CPU, bit for bit.
    """

    spec: OpSpec
    check: Callable[[Inputs, Any], None] | None = None
    tolerances: dict[torch.dtype, Tolerance] | None = None
    gradient_tolerance: Tolerance | None = None
    scale: int = 1  # of the gradient of a mean: keeps it among the normal numbers of float16, as a loss scale does


def pool(case: Any, features: Sequence[Tensor], boxes: Tensor, backend: str = "triton") -> Tensor:
    if "pool" in case.name:
        index = torch.zeros(len(boxes[0]), 1, device=boxes.device)
        rows = torch.cat([index, boxes[0]], 1)  # one image
        return roi_pool(features[0], rows, case.pooled, case.scales[0], backend=backend)
    return multiscale_roi_align(
        features,
        boxes,
        case.pooled,
        case.scales,
        sampling_ratio=case.sampling_ratio,
        aligned=case.aligned,
        level_convention="torchvision",
        interpolation=case.interpolation,
        reduction=case.reduction,
        backend=backend,
    )


def pooling(name: str, layout: str, full: bool, device: torch.device) -> Work:
    case = case_of(name, full)
    levels = tuple(f"level{i}" for i in range(len(case.strides)))

    def make() -> Inputs:
        features = case.features(torch.float32, LAYOUTS[layout], device)
        return {**dict(zip(levels, features, strict=True)), "boxes": case.boxes().to(device)}

    def call(x: Inputs, backend: str) -> Tensor:
        return pool(case, [x[level] for level in levels], x["boxes"], backend)

    # Of two samples that differ by less than float32 tells apart either may be the largest: a few in a million.
    apart = Tolerance(max=math.inf, rms=0.01) if case.reduction == "max" else None
    spec = OpSpec(name=name, make=make, call=call, features=levels, dtypes=FEATURE_DTYPES, gradients=levels)
    return Work(spec=spec, tolerances=FULL_TOLERANCES, gradient_tolerance=apart)


def focal_loss(name: str, reduction: str, gamma: float, full: bool, device: torch.device) -> Work:
    case = case_of(name, full)

    def make() -> Inputs:
        return dict(zip(("logits", "targets"), case.inputs(torch.float32, device), strict=True))

    def call(x: Inputs, backend: str) -> Tensor:
        return sigmoid_focal_loss(x["logits"], x["targets"], 0.25, gamma, reduction, backend=backend)

    both = ("logits", "targets")
    spec = OpSpec(name=name, make=make, call=call, features=both, dtypes=FEATURE_DTYPES, gradients=("logits",))
    return Work(spec=spec, scale=case.rows * case.columns if reduction == "mean" else 1)


def mask_loss(layout: str, full: bool, device: torch.device) -> Work:
    """Two of three RoIs are valid."""
    case = case_of(MASK_LOSS, full)

    def make() -> Inputs:
        logits, classes, targets = case.inputs(torch.float32, device)
        logits = logits.contiguous(memory_format=LAYOUTS[layout])
        valid = torch.arange(len(classes), device=device) % 3 > 0
        return {"logits": logits, "classes": classes, "targets": targets, "valid": valid}

    def call(x: Inputs, backend: str) -> Tensor:
        return mask_bce(x["logits"], x["classes"], x["targets"], valid=x["valid"], backend=backend)

    features = ("logits",)
    spec = OpSpec(name="mask_bce", make=make, call=call, features=features, dtypes=FEATURE_DTYPES, gradients=features)
    return Work(spec=spec, scale=case.images * case.rois * case.side**2)


def targets(convention: str, padded: bool, full: bool, device: torch.device) -> Work:
    case = case_of(MASK_LOSS, full)
    case = case if full else replace(case, rois=2, gt=2, height=30, width=40, side=3)

    def make() -> Inputs:
        masks, boxes, index = case.ground_truth(device)
        inputs = {"packed": pack_masks(masks), "boxes": boxes, "index": index}
        sizes = torch.tensor([[case.height, case.width], [case.height - 17, case.width - 17]], device=device)
        return {**inputs, "sizes": sizes} if padded else inputs

    def call(x: Inputs, backend: str) -> Tensor:
        given = x["packed"], x["boxes"], x["index"], case.side
        return mask_targets(*given, convention=convention, image_sizes=x.get("sizes"), backend=backend)

    return Work(spec=OpSpec(name="mask_targets", make=make, call=call))


def matching(settings: dict[str, Any], crowds: bool, full: bool, device: torch.device) -> Work:
    """Every fifth box is a crowd region, every seventh padding."""
    case = case_of(ANCHORS, full)

    def make() -> Inputs:
        anchors, boxes = case.inputs(device)
        place = torch.arange(boxes.shape[1], device=device).expand(len(boxes), -1)
        crowd = place % 5 == 4
        anchors = anchors if full else anchors[::29]
        return {"anchors": anchors, "gt": boxes, "valid": ~crowd & (place % 7 != 6), "crowd": crowd}

    def call(x: Inputs, backend: str) -> Any:
        crowd = x["crowd"] if crowds else None
        return match_anchors(x["anchors"], x["gt"], x["valid"], gt_crowd=crowd, **settings, backend=backend)

    return Work(spec=OpSpec(name="match_anchors", make=make, call=call))


def pasting(name: str, output: str, full: bool, device: torch.device) -> Work:
    case = case_of(name, full)
    size = (case.height, case.width) if full else (7, 19)

    def make() -> Inputs:
        masks, boxes = case.inputs(device)
        return {"masks": masks, "boxes": boxes} if full else {"masks": masks[:2], "boxes": boxes[:2] / 8}

    def call(x: Inputs, backend: str) -> Any:
        return paste_masks(x["masks"], x["boxes"], size, output=output, convention=case.convention, backend=backend)

    return Work(spec=OpSpec(name="paste_masks", make=make, call=call))


def keypoints(full: bool, device: torch.device) -> Work:
    case = case_of(KEYPOINTS, full)

    def make() -> Inputs:
        heatmaps, boxes = case.inputs(torch.float32, device)
        valid = torch.arange(boxes.shape[1], device=device)[None] % 7 != 5
        return {"heatmaps": heatmaps if full else heatmaps[..., :1, :5, :5], "boxes": boxes, "valid": valid}

    def call(x: Inputs, backend: str) -> Any:
        return decode_keypoints(x["heatmaps"], x["boxes"], x["valid"], backend=backend)

    dtypes = FEATURE_DTYPES
    return Work(spec=OpSpec(name="decode_keypoints", make=make, call=call, features=("heatmaps",), dtypes=dtypes))


def selection(name: str, full: bool, device: torch.device) -> Work:
    """NMS, held against its definition."""
    case = case_of(name, full)

    def make() -> Inputs:
        return dict(zip(("boxes", "scores", "valid"), case.inputs(device), strict=True))

    def call(x: Inputs, backend: str) -> Any:
        given = x["boxes"], x["scores"], case.threshold
        return padded_nms(*given, valid=x["valid"], max_output=case.keep, backend=backend)

    def check(x: Inputs, found: Any) -> None:
        indices, counts = found
        assert counts.sum() > len(counts)
        for s, count in enumerate(counts.tolist()):
            assert (indices[s, count:] == -1).all()
            given = x["boxes"][s], x["scores"][s], x["valid"][s]
            assert_greedy(*given, indices[s, :count], case.threshold, case.keep)

    return Work(spec=OpSpec(name=name, make=make, call=call), check=check)


TILE = 2**25  # IoUs at once
CHECKED = 20_000  # boxes of a segment whose fate is worked out; a sample of longer segments


def assert_greedy(boxes: Tensor, scores: Tensor, valid: Tensor, kept: Tensor, threshold: float, limit: int) -> None:
    """Assert that `kept` is the result of greedy NMS on one segment.

    Greedy NMS keeps a box exactly if no kept box of higher score overlaps it; only one set has that property. `kept`
    is sorted by falling score. Beyond `limit` kept boxes nothing is said.
    """
    assert len(kept) <= limit
    assert valid[kept].all()
    assert len(kept.unique()) == len(kept)
    assert (scores[kept].diff() < 0).all()
    boxes, limit_fp32 = boxes.float(), torch.tensor(threshold, dtype=torch.float32, device=boxes.device)
    candidates = valid.nonzero()[:, 0]
    if len(kept) == limit:  # NMS does not look at what scores less than the last kept box
        candidates = candidates[scores[candidates] >= scores[kept[-1]]]
    if len(candidates) > CHECKED:
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0))[:CHECKED]
        candidates = candidates[order.to(boxes.device)]
    is_kept = torch.zeros_like(valid)
    is_kept[kept] = True
    for rows in candidates.split(max(1, TILE // max(1, len(kept)))):
        over = box_iou(boxes[rows, None], boxes[kept]) > limit_fp32  # [rows, kept]
        over &= scores[kept] > scores[rows, None]
        wrong = over.any(1) == is_kept[rows]
        assert not wrong.any(), f"{int(wrong.sum())} of {len(rows)} boxes, first {rows[wrong][:5].tolist()}"


def proposals(layout: str, full: bool, device: torch.device) -> Work:
    """Checked stage by stage: the candidates to rounding, and what the reference makes of these to the bit."""
    case = case_of(PROPOSALS, full)
    names = [f"{kind}{level}" for kind in ("logits", "deltas") for level in range(5)]

    def make() -> Inputs:
        logits, deltas, sizes = case.inputs(torch.float32, device)
        maps = [m.contiguous(memory_format=LAYOUTS[layout]) for m in (*logits, *deltas)]
        return {**dict(zip(names, maps, strict=True)), "sizes": sizes}

    def given(x: Inputs) -> tuple[list[Tensor], list[Tensor], Tensor]:
        return [x[name] for name in names[:5]], [x[name] for name in names[5:]], x["sizes"]

    def call(x: Inputs, backend: str) -> Any:
        return rpn_proposals(
            *given(x),
            case.spec,
            padded_size=(case.height, case.width),
            pre_nms_top_n=case.pre_nms_top_n,
            post_nms_top_n=case.post_nms_top_n,
            nms_threshold=case.nms_threshold,
            min_size=1e-3,
            score_threshold=0.0,
            backend=backend,
        )

    def check(x: Inputs, found: Any) -> None:
        strides = level_strides(case.spec, case.sizes, (case.height, case.width))
        half_sides = [side for level in case.spec.half_sides for pair in level for side in pair]
        steps = [float(step) for pair in strides for step in pair]
        limits = {"scale_clamp": proposals_op.SCALE_CLAMP, "min_size": 1e-3, "score_threshold": 0.0}
        top_n = case.pre_nms_top_n
        boxes, scores, valid = kernels_candidates.rpn_candidates(
            *given(x), half_sides, steps, case.spec.offset, top_n, *limits.values()
        )
        expected = rpn_candidates_reference(*given(x), case.spec, strides, top_n=top_n, **limits)
        assert_close(boxes, expected[0].double())
        assert_close(scores, expected[1].double())
        assert (valid != expected[2]).sum() <= 2, "a side at min_size may fall on either side of it"
        limit = min(case.post_nms_top_n, boxes.shape[1])
        kept, _ = padded_nms(boxes, scores, case.nms_threshold, valid=valid, max_output=limit, backend="reference")
        boxes, scores, _, counts = select_best_reference(boxes, scores, kept, case.images, case.post_nms_top_n, False)
        assert (counts > 10).all()
        assert_same_bits(found, (boxes, scores, counts))

    spec = OpSpec(name="rpn_proposals", make=make, call=call, features=tuple(names), dtypes=FEATURE_DTYPES)
    return Work(spec=spec, check=check)


def final_detections(full: bool, device: torch.device) -> Work:
    """1,000 RoIs and 80 classes of two images. A RoI scores over 0.05 in a few of them."""
    count, classes = (1000, 80) if full else (40, 3)

    def make() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(2, count, classes + 1, generator=generator) * 2
        boxes = rois(2, count, 800, 1344)[:, :, None] + torch.randn(2, count, classes, 4, generator=generator)
        valid = torch.arange(count) < torch.tensor([[count], [count - 7]])
        sizes = torch.tensor([[800, 1344], [700, 1200]])
        values = {"class_scores": logits.softmax(-1)[..., 1:], "boxes": boxes, "valid": valid, "image_sizes": sizes}
        return {name: value.to(device) for name, value in values.items()}

    def call(x: Inputs, backend: str) -> Any:
        return detections(**x, score_threshold=0.05, nms_threshold=0.5, max_detections=100, backend=backend)

    def check(x: Inputs, found: Any) -> None:
        assert (found[3] > 10).all()
        assert_same_bits(found, call(x, "reference"))

    return Work(spec=OpSpec(name="detections", make=make, call=call), check=check)


def _works() -> Iterator[tuple[str, Build]]:
    """Every piece of work by its name."""
    for name, layout in itertools.product((ROIS, MASK_ROIS, BICUBIC, LARGEST, ONE_MAP, ADAPTIVE, POOL), LAYOUTS):
        yield f"{name}-{layout}", partial(pooling, name, layout)
    for name, reduction, gamma in itertools.product((FOCAL, FOCAL_HEAD), ("none", "mean", "sum"), (2.0, 1.5)):
        yield f"{name}-{reduction}-{gamma}", partial(focal_loss, name, reduction, gamma)
    for layout in LAYOUTS:
        yield f"mask_bce-{layout}", partial(mask_loss, layout)
        yield f"rpn_proposals-{layout}", partial(proposals, layout)
    for convention, padded in itertools.product(("detectron2", "torchvision"), (True, False)):
        yield f"mask_targets-{convention}{'-padded' if padded else ''}", partial(targets, convention, padded)
    for (name, settings), crowds in itertools.product({"rpn": RPN, "head": HEAD}.items(), (True, False)):
        yield f"match_anchors-{name}{'-crowds' if crowds else ''}", partial(matching, settings, crowds)
    for name, output in itertools.product((MASKS, MASKS_OF_DETECTRON2), ("bool", "packed", "probability", "rle")):
        yield f"{name}-{output}", partial(pasting, name, output)
    for name in (*NMS, MILLION):
        yield name, partial(selection, name)
    yield "detections", final_detections
    yield "decode_keypoints", keypoints


Build = Callable[[bool, torch.device], Work]  # whether at full size, and where
WORK: dict[str, Build] = dict(_works())

# Captured in a CUDA graph, forward and backward.
GRAPHS = (
    *(f"{ROIS}-{layout}" for layout in LAYOUTS),
    f"{FOCAL}-sum-2.0",
    "mask_bce-nchw",
    "match_anchors-rpn-crowds",
    *NMS[:3],
    "rpn_proposals-nchw",
    "detections",
)

# Bytes that the forward may take beyond its outputs, and the backward beyond its gradients.
SPARE = {
    **{f"{ROIS}-{layout}": 2 * MEBIBYTE for layout in LAYOUTS},
    f"{BICUBIC}-nhwc": 2 * MEBIBYTE,
    f"{FOCAL}-sum-2.0": MEBIBYTE,
    "mask_bce-nchw": MEBIBYTE,
    "mask_targets-detectron2": 512,  # PyTorch's blocks are of 512 bytes
    "match_anchors-rpn-crowds": 800 + 3 * 2**21,  # the best of each box; the allocator rounds up to 2 MiB at most
    f"{MASKS}-bool": int(1.3 * MEBIBYTE),
    f"{MASKS}-packed": int(1.1 * MEBIBYTE),
    f"{MASKS}-rle": 32 * MEBIBYTE,
    LONG_LIST: int(0.1 * 100_000**2 / 8),  # a tenth of a matrix of bits
}
