"""From the RPN's maps to proposals and from class scores to detections, end to end, against torchvision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor

from bench.cases._shared import ITEM, STRIDES, Bench, Case, by_name, rois
from bench.cases.nms import CLASSES, NMSCase
from bench.contest import DTYPES, Call
from bench.machine import Work, device
from bench.standings import Aim
from tmask_kernels import AnchorSpec, detections, make_anchors, rpn_proposals
from tmask_kernels.common.reference import box_iou

MIN_PROPOSAL, MIN_DETECTION = 1e-3, 1e-2  # torchvision's least sides in pixels
SCORE = 0.05  # of a candidate of nms-classes
CANDIDATES = 0.02  # their share of nms-classes
NEAR = 0.1  # pixels, or hundredths of a score, between two boxes that are the same
# An IoU or a score next to its threshold may fall on either side, and then a few boxes behind it do too.
SHARE = 0.99
# Half-precision logits tie by the dozen: torchvision takes any of the tied, we the one with the lowest index.
TIED_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class RPNCase(Case):
    """From the RPN's maps of N images to proposals."""

    images: int = 2
    height: int = 800
    width: int = 1344
    pre_nms_top_n: int = 2000
    post_nms_top_n: int = 1000
    nms_threshold: float = 0.7

    def small(self) -> RPNCase:
        return replace(self, height=128, width=160, pre_nms_top_n=64, post_nms_top_n=64)

    @property
    def spec(self) -> AnchorSpec:
        """torchvision's anchors."""
        return AnchorSpec(sizes=((32,), (64,), (128,), (256,), (512,)), aspect_ratios=(0.5, 1.0, 2.0), rounded=True)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of P2 to P6; P6 is every second cell of P5."""
        levels = [(self.height // s, self.width // s) for s in STRIDES[:4]]
        return [*levels, ((levels[-1][0] + 1) // 2, (levels[-1][1] + 1) // 2)]

    @property
    def anchors(self) -> int:
        """Of one image."""
        return 3 * sum(h * w for h, w in self.sizes)

    @property
    def candidates(self) -> int:
        """Of one image that enter the NMS."""
        return sum(min(self.pre_nms_top_n, 3 * h * w) for h, w in self.sizes)

    def inputs(self, dtype: torch.dtype, where: torch.device) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return logits [N, 3, H, W], high near objects, and deltas [N, 12, H, W] of each level, sizes [N, 2]."""
        generator = torch.Generator().manual_seed(8)
        anchors = make_anchors(self.spec, self.sizes, (self.height, self.width))  # [A, 4]
        logits = torch.randn(self.images, self.anchors, generator=generator) - 6
        for image, objects in enumerate(rois(self.images, 30, self.height, self.width, objects=(30, 30), seed=9)):
            for one in objects:
                logits[image] = torch.maximum(logits[image], logits[image] + 9 * box_iou(anchors, one))
        objectness, deltas = [], []
        start = 0
        for h, w in self.sizes:
            level = logits[:, start : start + 3 * h * w].view(self.images, h, w, 3).permute(0, 3, 1, 2)
            objectness.append(level.to(where, dtype).contiguous())
            deltas.append((torch.randn(self.images, 12, h, w, generator=generator) * 0.2).to(where, dtype))
            start += 3 * h * w
        return objectness, deltas, torch.tensor([[self.height, self.width]] * self.images, device=where)

    def work(self, dtype: str, mode: str = "forward") -> Work:
        """Every logit, the deltas of those that enter the NMS, and the proposals with their scores and counts."""
        item = ITEM[dtype]
        read = self.images * (self.anchors + 4 * self.candidates) * item
        return Work(bytes=read + self.images * (self.post_nms_top_n * 20 + 8), flops=20 * self.images * self.candidates)


CASES = by_name(
    RPNCase(name="proposals-rpn", what="an RPN's maps of 2 images to 1,000 proposals each", aims={"": Aim(times=10)})
)


class DetectionCase(NMSCase):
    """The whole of a box head's postprocessing, on the boxes of an NMS case."""

    def work(self, dtype: str = "fp32", mode: str = "forward") -> Work:
        """Every score and the boxes over the threshold are read, the detections written with score and label."""
        slots = self.boxes * len(self.lengths)
        return Work(bytes=slots * 4 + round(slots * CANDIDATES) * 16 + self.keep * (16 + 4 + 8))


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


def ours(given: Maps, backend: str) -> Any:
    case, *maps = given
    return rpn_proposals(
        *maps,
        case.spec,
        padded_size=(case.height, case.width),
        pre_nms_top_n=case.pre_nms_top_n,
        post_nms_top_n=case.post_nms_top_n,
        nms_threshold=case.nms_threshold,
        min_size=MIN_PROPOSAL,
        score_threshold=0.0,
        backend=backend,
    )


def torchvision_proposals(given: Maps) -> Call:
    """Its anchors, its decoder and its filter. In float32: its decoder would round anchors to the dtype of the deltas,
    in bfloat16 by up to four pixels."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

    case = given.case
    generator = AnchorGenerator(case.spec.sizes, (case.spec.aspect_ratios,) * len(case.spec.sizes))
    top = dict.fromkeys(("training", "testing"), case.pre_nms_top_n)
    keep = dict.fromkeys(("training", "testing"), case.post_nms_top_n)
    rpn = RegionProposalNetwork(generator, torch.nn.Identity(), 0.7, 0.3, 256, 0.5, top, keep, case.nms_threshold)
    rpn.eval()
    sizes = [(case.height, case.width)] * case.images
    images = ImageList(torch.empty(case.images, 3, case.height, case.width, device=given.sizes.device), sizes)
    counts = [x.shape[1:].numel() for x in given.objectness]

    def call() -> Any:
        objectness, deltas = [x.float() for x in given.objectness], [x.float() for x in given.deltas]
        anchors = rpn.anchor_generator(images, objectness)
        flat_objectness, flat_deltas = concat_box_prediction_layers(objectness, deltas)
        boxes = rpn.box_coder.decode(flat_deltas, anchors).view(case.images, -1, 4)
        return rpn.filter_proposals(boxes, flat_objectness, sizes, counts)

    return call


def ours_detections(given: Classified, backend: str) -> Any:
    scores, boxes = given.scores[None], given.boxes[None]
    return detections(
        scores,
        boxes,
        valid=torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device),
        image_sizes=torch.tensor([given.size], device=scores.device),
        score_threshold=SCORE,
        nms_threshold=given.case.threshold,
        min_size=MIN_DETECTION,
        max_detections=given.case.keep,
        backend=backend,
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
        large = ops.remove_small_boxes(boxes, MIN_DETECTION)
        boxes, scores, labels = boxes[large], scores[large], labels[large]
        kept = ops.batched_nms(boxes, scores, labels, case.threshold)[: case.keep]
        return [boxes[kept]], [scores[kept]], [labels[kept]]

    return call


def check(got: Any, truth: tuple[Any, bool], provider: str) -> None:
    """Of each image almost all true boxes must be there, and almost nothing else. `truth` ends with: no scores tie."""
    share = SHARE if truth[1] or provider != "torchvision" else TIED_SHARE
    for image, (own, true) in enumerate(zip(_images(got), _images(truth[0]), strict=True)):
        assert abs(len(own) - len(true)) <= (1 - share) * len(true), f"image {image}: {len(own)}, not {len(true)}"
        near = (own[:, None] - true).abs().amax(-1) < NEAR  # [n, n']
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


def classified(case: NMSCase, mode: str, dtype: str, layout: str) -> Classified:
    boxes, scores, _ = case.inputs(device())  # of each class in turn
    return Classified(case, scores.T.contiguous(), boxes.transpose(0, 1).contiguous(), (800, 1344))


PROPOSALS = Bench(
    cases=CASES,
    inputs=lambda case, mode, dtype, layout: Maps(case, *case.inputs(DTYPES[dtype], device())),
    ours=ours,
    peers={"torchvision": torchvision_proposals},
    truth=lambda given: (ours(given, "reference"), given.objectness[0].dtype == torch.float32),
    check=check,
    graph=True,
)
test_rpn_proposals = PROPOSALS.test(
    dtypes=["fp32", "bf16"],
    where=lambda case, mode, dtype, layout, provider: provider != "reference" or dtype == "fp32",
)
DETECTIONS = replace(
    PROPOSALS,
    cases=by_name(DetectionCase(**CLASSES)),
    inputs=classified,
    ours=ours_detections,
    peers={"torchvision": torchvision_detections},
    truth=lambda given: (ours_detections(given, "reference"), True),
)
test_detections = DETECTIONS.test()
