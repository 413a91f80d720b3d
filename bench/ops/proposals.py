"""From the RPN's maps to proposals (W8) and from class scores to detections (W6), end to end, against torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from bench.cases import CASES, NMSCase, RPNCase, sized
from bench.contest import DTYPES, Call, Contest
from bench.graph import captured
from bench.machine import device
from bench.variants import variants
from bench.work import Work
from tmask_kernels import detections, rpn_proposals

MIN_SIZE = {"W8": 1e-3, "W6": 1e-2}  # torchvision's, in pixels
SCORE = 0.05  # of a candidate of W6
CANDIDATES = 0.02  # their share of W6
NEAR = 0.1  # pixels, or hundredths of a score, between two boxes that are the same
# An IoU or a score next to its threshold may fall on either side, and then a few boxes behind it do too.
SHARE = 0.99
# Half-precision logits tie by the dozen: torchvision takes any of the tied, we the one with the lowest index.
TIED_SHARE = 0.9


class Tied(NamedTuple):
    """A peer's result where scores tie and it promises no order among them."""

    value: Any


class Maps(NamedTuple):
    """The RPN's output for N images."""

    case: RPNCase
    objectness: list[Tensor]  # [N, 3, H, W] a level
    deltas: list[Tensor]  # [N, 12, H, W] a level
    sizes: Tensor  # [N, 2]


class Classified(NamedTuple):
    """The box head's output for one image."""

    case: NMSCase
    scores: Tensor  # [P, Cls]
    boxes: Tensor  # [P, Cls, 4]
    size: tuple[int, int]


@variants(
    cases=["W8"],
    dtypes=["fp32", "bf16"],
    providers=["triton", "triton-graph", "torchvision", "reference"],
    where=lambda case, mode, dtype, layout, provider: provider != "reference" or dtype == "fp32",
)
def test_rpn_proposals(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
    contest(lambda: proposing(case, dtype))


@variants(cases=["W6"], providers=["triton", "triton-graph", "torchvision", "reference"])
def test_detections(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
    contest(lambda: detecting(case))


def proposing(name: str, dtype: str) -> Contest:
    case, size = sized(cast(RPNCase, CASES[name]))

    def ours(backend: str) -> Callable[[Maps], Call]:
        return lambda given: (
            lambda: rpn_proposals(
                given.objectness,
                given.deltas,
                given.sizes,
                case.spec,
                padded_size=(case.height, case.width),
                pre_nms_top_n=case.pre_nms_top_n,
                post_nms_top_n=case.post_nms_top_n,
                nms_threshold=case.nms_threshold,
                min_size=MIN_SIZE["W8"],
                score_threshold=0.0,
                backend=backend,
            )
        )

    return Contest(
        inputs=lambda: Maps(case, *case.inputs(DTYPES[dtype], device())),
        providers={
            "triton": ours("triton"),
            "triton-graph": lambda given: captured(ours("triton")(given)),
            "torchvision": torchvision_proposals,
            "reference": ours("reference"),
        },
        truth=lambda given: ours("reference")(given)(),
        check=check,
        work=case.work(dtype),
        size=size,
    )


def torchvision_proposals(given: Maps) -> Call:
    """Its anchors, its decoder and its filter. In float32: its decoder would round anchors to the dtype of the deltas,
    in bfloat16 by up to four pixels."""
    case = given.case
    rpn = RegionProposalNetwork(
        AnchorGenerator(case.spec.sizes, (case.spec.aspect_ratios,) * len(case.spec.sizes)),
        torch.nn.Identity(),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": case.pre_nms_top_n, "testing": case.pre_nms_top_n},
        post_nms_top_n={"training": case.post_nms_top_n, "testing": case.post_nms_top_n},
        nms_thresh=case.nms_threshold,
    ).eval()
    sizes = [(case.height, case.width)] * case.images
    images = ImageList(torch.empty(case.images, 3, case.height, case.width, device=given.sizes.device), sizes)
    counts = [x.shape[1:].numel() for x in given.objectness]

    def call() -> Any:
        objectness, deltas = [x.float() for x in given.objectness], [x.float() for x in given.deltas]
        anchors = rpn.anchor_generator(images, objectness)
        flat_objectness, flat_deltas = concat_box_prediction_layers(objectness, deltas)
        boxes = rpn.box_coder.decode(flat_deltas, anchors).view(case.images, -1, 4)
        return rpn.filter_proposals(boxes, flat_objectness, sizes, counts)

    half = given.objectness[0].dtype != torch.float32
    return (lambda: Tied(call())) if half else call


def detecting(name: str) -> Contest:
    case, size = sized(cast(NMSCase, CASES[name]))

    def inputs() -> Classified:
        boxes, scores, _ = case.inputs(device())  # of each class in turn
        return Classified(case, scores.T.contiguous(), boxes.transpose(0, 1).contiguous(), (800, 1344))

    def ours(backend: str) -> Callable[[Classified], Call]:
        def call(given: Classified) -> Call:
            valid = torch.ones(1, len(given.scores), dtype=torch.bool, device=given.scores.device)
            sizes = torch.tensor([given.size], device=given.scores.device)
            return lambda: detections(
                given.scores[None],
                given.boxes[None],
                valid=valid,
                image_sizes=sizes,
                score_threshold=SCORE,
                nms_threshold=case.threshold,
                max_detections=case.keep,
                min_size=MIN_SIZE["W6"],
                backend=backend,
            )

        return call

    slots = case.boxes * len(case.lengths)
    return Contest(
        inputs=inputs,
        providers={
            "triton": ours("triton"),
            "triton-graph": lambda given: captured(ours("triton")(given)),
            "torchvision": torchvision_detections,
            "reference": ours("reference"),
        },
        truth=lambda given: ours("reference")(given)(),
        check=check,
        # Every score, the boxes of those that are over the threshold, and the detections with score and label.
        work=Work(bytes=slots * 4 + round(slots * CANDIDATES) * 16 + case.keep * (16 + 4 + 8)),
        size=size,
    )


def torchvision_detections(given: Classified) -> Call:
    """The steps of its box head behind the softmax and the decoder."""
    ops, case = torchvision.ops, given.case
    columns = torch.arange(given.scores.shape[1], device=given.scores.device).expand_as(given.scores)

    def call() -> Any:
        boxes = ops.clip_boxes_to_image(given.boxes, given.size).reshape(-1, 4)
        scores, labels = given.scores.reshape(-1), columns.reshape(-1)
        likely = torch.where(scores > SCORE)[0]
        boxes, scores, labels = boxes[likely], scores[likely], labels[likely]
        large = ops.remove_small_boxes(boxes, MIN_SIZE["W6"])
        boxes, scores, labels = boxes[large], scores[large], labels[large]
        kept = ops.batched_nms(boxes, scores, labels, case.threshold)[: case.keep]
        return [boxes[kept]], [scores[kept]], [labels[kept]]

    return call


def check(out: Any, truth: Any) -> None:
    """Of each image almost all true boxes must be there, and almost nothing else."""
    value, share = (out.value, TIED_SHARE) if isinstance(out, Tied) else (out, SHARE)
    for image, (got, true) in enumerate(zip(_images(value), _images(truth), strict=True)):
        assert abs(len(got) - len(true)) <= (1 - share) * len(true), f"image {image}: {len(got)}, not {len(true)}"
        near = (got[:, None] - true).abs().amax(-1) < NEAR  # [n, n']
        found, right = float(near.any(0).float().mean()), float(near.any(1).float().mean())
        assert min(found, right) >= share, f"image {image}: {found:.1%} of the true found, {right:.1%} of its own true"


def _images(out: Any) -> list[Tensor]:
    """Of each image [n, 5 or 6]: box, score in hundredths, and label.

    `out` is boxes, scores (and labels), lists of an image's tensors or padded tensors with the counts behind them.
    """
    if isinstance(out[0], Tensor):
        *columns, counts = out
        out = [[rows[:n] for rows, n in zip(column, counts.tolist(), strict=True)] for column in columns]
    boxes, scores, *labels = out
    return [
        torch.cat([box, 100 * score[:, None], *(x[:, None].to(box.dtype) for x in label)], 1)
        for box, score, *label in zip(boxes, scores, *labels, strict=True)
    ]
