"""The standard work, W1 to W13, each a named, seeded case. Letters: N images, K boxes of an image, C channels,
S segments, H W sides in pixels.

A case says what the work is, makes inputs that look like a detector's, and counts the fewest bytes and the operations
of the definition; `small` is the same work at a size that a CPU, and Triton's interpreter, does in a moment. RoIs have
log-uniform scales, varied aspect and stand in clusters around a few objects, as proposals do: uniform boxes would
touch far more distinct feature cells, and NMS would remove almost none of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from bench.machine import device
from bench.work import Work
from tmask_kernels import AnchorSpec, make_anchors
from tmask_kernels.ops.nms.reference import box_iou
from tmask_kernels.ops.roi_align.reference import axis_weights, box_levels
from tmask_kernels.testing import random_boxes

STRIDES = (4, 8, 16, 32, 64)  # P2 to P6
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2, "-": 4}  # bytes of an element; "-": the op takes float32 only
IOU_FLOPS = 13  # two minima, two maxima, two differences, two clamps, three of the union, a division, a comparison


class Case(Protocol):
    """What all cases share."""

    @property
    def name(self) -> str:
        """As in the table of workloads."""

    def small(self: Self) -> Self:
        """The same work at a reduced size."""


Self = TypeVar("Self", bound=Case)


def sized(case: Self) -> tuple[Self, str]:
    """The case at the size for this machine, and which that is: "full" on a GPU, "reduced" on a CPU."""
    return (case, "full") if device().type == "cuda" else (case.small(), "reduced")


# ---- RoIAlign: W1 to W4


@dataclass(frozen=True, kw_only=True)
class RoICase:
    """Pooling RoIs from one or several FPN levels of N images of height x width pixels, channels innermost or not."""

    name: str
    images: int = 2
    height: int = 800
    width: int = 1344
    strides: tuple[int, ...] = STRIDES[:4]
    channels: int = 256
    rois: int  # of all images
    pooled: int = 7
    sampling_ratio: int = 2
    aligned: bool = False  # torchvision's MultiScaleRoIAlign cannot
    clustered: bool = True
    interpolation: str = "bilinear"
    reduction: str = "mean"

    def small(self) -> RoICase:
        # Of a pyramid several levels are to be used; of one map an adaptive grid has few samples.
        height, width = (384, 448) if len(self.strides) > 1 else (128, 160)
        return replace(self, height=height, width=width, channels=16, rois=8 * self.images)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each level in cells."""
        return [(self.height // s, self.width // s) for s in self.strides]

    @property
    def scales(self) -> list[float]:
        return [1 / s for s in self.strides]

    @property
    def thresholds(self) -> list[float]:
        """Area in px^2 from which a RoI leaves level i for the next (Lin et al. 2017, equation 1)."""
        return [(224 * s / 16) ** 2 for s in self.strides[1:]]

    def boxes(self) -> Tensor:
        """[N, P, 4] float32 xyxy in pixels, on the CPU."""
        each = self.rois // self.images
        if self.clustered:
            return rois(self.images, each, self.height, self.width)
        size = min(800.0, float(min(self.height, self.width)))
        flat = random_boxes(self.rois, height=self.height, width=self.width, min_size=16, max_size=size)
        return flat.view(self.images, each, 4)

    def features(self, dtype: torch.dtype, memory_format: torch.memory_format, where: torch.device) -> list[Tensor]:
        """Random features [N, C, H / stride, W / stride] of each level."""
        generator = torch.Generator(where).manual_seed(1)
        return [
            torch.randn(self.images, self.channels, h, w, generator=generator, device=where)
            .to(dtype)
            .contiguous(memory_format=memory_format)
            for h, w in self.sizes
        ]

    def work(self, dtype: str, mode: str) -> Work:
        """Forward: RoIs, each cell that any sample touches, and the output. Backward: RoIs, the gradient of the output,
        and every cell's gradient written, since those that no RoI touches are zero.

        Operations: 4 taps of a sample, each a product and a sum; the definition's, not those of a separable form.
        """
        samples, cells = _count(self)
        item = ITEM[dtype]
        out = self.rois * self.channels * self.pooled**2 * item
        maps = self.images * sum(h * w for h, w in self.sizes)
        moved = (cells if mode == "forward" else maps) * self.channels * item
        return Work(bytes=out + moved + self.rois * 16, flops=8 * samples * self.channels)


@functools.cache
def _count(case: RoICase) -> tuple[int, int]:
    """Samples of all RoIs, and the distinct cells that they touch."""
    boxes = case.boxes()
    levels = box_levels(boxes, case.thresholds)  # [N, P]
    samples = cells = 0
    for level, ((height, width), scale) in enumerate(zip(case.sizes, case.scales, strict=True)):
        for image in range(case.images):
            corners = boxes[image][levels[image] == level] * scale - (0.5 if case.aligned else 0.0)  # [P', 4]
            sides = corners[:, 2:] - corners[:, :2]
            if not case.aligned:
                sides = sides.clamp(min=1)
            # A bin mixes the rows of its samples with their columns, so a RoI touches all its rows x all its columns.
            x = axis_weights(corners[:, 0], sides[:, 0], case.pooled, width, case.sampling_ratio).gt(0).any(1).float()
            y = axis_weights(corners[:, 1], sides[:, 1], case.pooled, height, case.sampling_ratio).gt(0).any(1).float()
            cells += int((y.T @ x).gt(0).sum())
            ratio = float(case.sampling_ratio)
            grid = torch.full_like(sides, ratio) if ratio > 0 else (sides / case.pooled).ceil()
            samples += int(grid.prod(1).sum()) * case.pooled**2
    return samples, cells


def rois(
    num_images: int,
    per_image: int,
    height: int,
    width: int,
    *,
    smallest: float = 16,
    largest: float = 800,
    objects: tuple[int, int] = (10, 50),
    spread: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Proposal-like boxes [N, K, 4], xyxy float32 pixels, clustered around 10-50 objects an image.

    `smallest` and `largest` bound the scale sqrt(w h) of the objects. A box has almost the shape and place of its
    object; `spread` is how far it is off.
    """
    generator = torch.Generator().manual_seed(seed)
    boxes = [
        _cluster(per_image, height, width, (smallest, largest), objects, spread, generator)[0]
        for _ in range(num_images)
    ]
    return torch.stack(boxes)


def _cluster(
    count: int,
    height: int,
    width: int,
    scales: tuple[float, float],
    objects: tuple[int, int],
    spread: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Boxes [K, 4] of one image, and the number of each one's object [K]."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def normal(deviation: float) -> Tensor:
        return torch.randn(count, 2, generator=generator) * deviation * spread

    number = int(torch.randint(objects[0], objects[1] + 1, (1,), generator=generator))
    centre = uniform(number, 2) * torch.tensor([width, height])
    smallest, largest = scales[0], max(scales[0], min(scales[1], height, width))
    scale = smallest * (largest / smallest) ** uniform(number)
    aspect = 0.3 * 10 ** uniform(number)  # 0.3 to 3
    side = torch.stack([scale / aspect.sqrt(), scale * aspect.sqrt()], dim=1)
    owner = torch.randint(number, (count,), generator=generator)
    near_side = side[owner] * torch.exp(normal(0.2))
    near_centre = centre[owner] + normal(0.15) * side[owner]
    boxes = torch.cat([near_centre - near_side / 2, near_centre + near_side / 2], dim=1)
    return boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2, dtype=torch.float32)), owner


# ---- NMS: W5 to W7


class Segments(NamedTuple):
    """Input of `padded_nms`."""

    boxes: Tensor  # [S, K, 4] float32
    scores: Tensor  # [S, K] float32, no two of a segment equal
    valid: Tensor  # [S, K] bool


@dataclass(frozen=True, kw_only=True)
class NMSCase:
    """NMS of S segments of at most K boxes: RPN levels, classes, or one long list."""

    name: str
    kind: str  # "levels", "classes" or "list"
    lengths: tuple[int, ...]  # boxes of each segment; K is the largest
    threshold: float
    keep: int  # at most so many of a segment
    kept: float  # about so large a share of the boxes is kept

    def small(self) -> NMSCase:
        few = {"levels": 96, "classes": 64, "list": 256}[self.kind]
        lengths = tuple(min(n, few) - (few // 2 if n < max(self.lengths) else 0) for n in self.lengths)
        return replace(self, lengths=lengths[-12:], keep=min(self.keep, few))

    @property
    def boxes(self) -> int:
        """K, boxes of the longest segment."""
        return max(self.lengths)

    @property
    def segments_an_image(self) -> int:
        return 5 if self.kind == "levels" else len(self.lengths)

    def inputs(self, where: torch.device) -> Segments:
        make = {"levels": _level_segments, "classes": _class_segments, "list": _list_segment}[self.kind]
        return Segments(*(t.to(where) for t in make(self)))

    def work(self) -> Work:
        """Boxes and scores read, indices and counts written; every kept box is held against every one kept before."""
        S, kept = len(self.lengths), [n * self.kept for n in self.lengths]
        moved = sum(self.lengths) * (16 + 4) + S * (min(self.keep, self.boxes) + 1) * 8
        return Work(bytes=moved, flops=int(sum(n * (n - 1) / 2 for n in kept) * IOU_FLOPS))


def _scores(*shape: int, seed: int) -> Tensor:
    """Scores in 0..1 [..., K], most of them low, no two of a row equal."""
    generator = torch.Generator().manual_seed(seed)
    rows, K = int(torch.tensor(shape[:-1]).prod()), shape[-1]
    ranks = torch.stack([torch.randperm(K, generator=generator) for _ in range(rows)]).view(shape)
    return ((ranks.double() + 0.5) / K).pow(4).float()


def _level_segments(case: NMSCase) -> tuple[Tensor, Tensor, Tensor]:
    """Five levels of each image in turn, a level's boxes as large as its anchors."""
    S, K = len(case.lengths), case.boxes
    boxes = [
        rois(1, K, 800, 1344, smallest=8 * STRIDES[s % 5] / 2, largest=8 * STRIDES[s % 5] * 2, seed=2 + s)[0]
        for s in range(S)
    ]
    valid = torch.arange(K) < torch.tensor(case.lengths)[:, None]
    return torch.stack(boxes), _scores(S, K, seed=3), valid


def _class_segments(case: NMSCase) -> tuple[Tensor, Tensor, Tensor]:
    """The same RoIs in every class, moved a little; a RoI scores over 0.05 in few classes, a background RoI in none."""
    S, K = len(case.lengths), case.boxes
    generator = torch.Generator().manual_seed(4)
    boxes, owner = _cluster(K, 800, 1344, (16, 800), (10, 50), 1.0, generator)  # [K, 4], [K]
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)  # [K, 4]
    moved = boxes + torch.randn(S, K, 4, generator=generator) * 0.03 * sides
    logits = torch.randn(S + 1, K, generator=generator)  # the last row: background
    logits[-1] += 3
    likely = torch.randint(S, (2, 50), generator=generator)[:, owner]  # [2, K]: an object looks like two classes
    logits.scatter_add_(0, likely, torch.rand(2, K, generator=generator) * torch.tensor([[8.0], [4.0]]))
    scores = logits.softmax(0)[:-1]
    return moved, scores, scores > 0.05


def _list_segment(case: NMSCase) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes around so many objects that about the wanted share is kept, in an image that grows with their number."""
    K = case.boxes
    objects = max(1, round(K * case.kept))
    side = round(200 * objects**0.5)
    boxes = rois(1, K, side, side, smallest=16, largest=128, objects=(objects, objects), spread=0.4, seed=6)
    return boxes, _scores(1, K, seed=7), torch.ones(1, K, dtype=torch.bool)


# ---- RPN proposals: W8


@dataclass(frozen=True, kw_only=True)
class RPNCase:
    """From the RPN's maps of N images to proposals."""

    name: str
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
        """Logits [N, 3, H, W] and deltas [N, 12, H, W] of each level, sizes [N, 2]. An anchor near an object scores."""
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

    def work(self, dtype: str) -> Work:
        """Every logit, the deltas of those that enter the NMS, and the proposals with their scores and counts."""
        item = ITEM[dtype]
        read = self.images * (self.anchors + 4 * self.candidates) * item
        return Work(bytes=read + self.images * (self.post_nms_top_n * 20 + 8), flops=20 * self.images * self.candidates)


# ---- Matching, pasting, losses: W9 to W11, and the mask losses of W13


@dataclass(frozen=True, kw_only=True)
class MatchCase:
    """The anchors of the RPN against the ground truth of N images."""

    name: str
    images: int = 2
    height: int = 800
    width: int = 1344
    gt: int = 100  # boxes of an image, G
    high: float = 0.7
    low: float = 0.3

    def small(self) -> MatchCase:
        return replace(self, height=128, width=160, gt=12)

    @property
    def rpn(self) -> RPNCase:
        return RPNCase(name=self.name, images=self.images, height=self.height, width=self.width)

    def inputs(self, where: torch.device) -> tuple[Tensor, Tensor]:
        """Anchors [A, 4] and boxes [N, G, 4]. Each box overlaps an anchor: libraries differ on those that do not."""
        rpn = self.rpn
        anchors = make_anchors(rpn.spec, rpn.sizes, (self.height, self.width))
        boxes = random_boxes(
            self.images * self.gt, height=self.height, width=self.width, min_size=20, max_size=600, seed=10
        )
        return anchors.to(where), boxes.view(self.images, self.gt, 4).to(where)

    def work(self) -> Work:
        """Anchors and boxes read, four bytes an anchor and image written; each anchor against each box."""
        answers = self.images * self.rpn.anchors
        moved = self.rpn.anchors * 16 + self.images * self.gt * 16 + answers * 4
        return Work(bytes=moved, flops=answers * self.gt * IOU_FLOPS)


@dataclass(frozen=True, kw_only=True)
class PasteCase:
    """K masks of M x M pasted into one image by the rule of a library."""

    name: str
    masks: int = 100
    side: int = 28
    height: int = 800
    width: int = 1333
    convention: str = "torchvision"

    def small(self) -> PasteCase:
        return replace(self, masks=12, height=120, width=161)

    def inputs(self, where: torch.device) -> tuple[Tensor, Tensor]:
        """Probabilities [K, M, M], soft blobs with rough outlines, and boxes [K, 4].

        Boxes are no smaller than a detector leaves them, and their outlines, once torchvision has grown them by two
        cells, are not so near an integer that float32 could cut them to another one.
        """
        boxes = rois(1, 4 * self.masks, self.height, self.width, seed=11)[0].double()
        grown = (boxes[:, 2:] - boxes[:, :2]) * (1 / self.side)
        edges = torch.cat([boxes[:, :2] - grown, boxes[:, 2:] + grown], dim=1)
        clear = ((edges - edges.round()).abs() > 1e-3).all(1) & ((boxes[:, 2:] - boxes[:, :2]) >= 4).all(1)
        boxes = boxes[clear][: self.masks].float()
        assert len(boxes) == self.masks
        generator = torch.Generator().manual_seed(12)
        at = (torch.arange(self.side) + 0.5) / self.side - 0.5
        radii = 0.3 + 0.15 * torch.rand(self.masks, 2, 1, 1, generator=generator)
        distance = (at[:, None] / radii[:, 0]).square() + (at / radii[:, 1]).square()  # [K, M, M]
        logits = 6 * (1 - distance) + torch.randn(distance.shape, generator=generator)
        return logits.sigmoid().to(where), boxes.to(where)

    def work(self, mode: str) -> Work:
        """Masks and boxes read, the output written once: a byte a pixel, a bit a pixel, or runs. A blob has a run of
        ones and one of zeros in each column of its box, four bytes each.

        Operations: 4 taps of each pixel of a box.
        """
        _, boxes = self.inputs(torch.device("cpu"))
        sides = (boxes[:, 2:] - boxes[:, :2]).double()
        words = -(-self.width // 32)
        out = {
            "bool": self.masks * self.height * self.width,
            "packed": self.masks * self.height * words * 4,
            "rle": int(sides[:, 0].sum()) * 8,
        }[mode]
        return Work(bytes=self.masks * (self.side**2 * 4 + 16) + out, flops=8 * int(sides.prod(1).sum()))


@dataclass(frozen=True, kw_only=True)
class FocalCase:
    """The focal loss of a detector's logits, summed."""

    name: str
    rows: int
    columns: int
    positives: float  # share of ones among the targets

    def small(self) -> FocalCase:
        return replace(self, rows=min(self.rows, 64), columns=min(self.columns, 999))

    def inputs(self, dtype: torch.dtype, where: torch.device) -> tuple[Tensor, Tensor]:
        """Logits around the prior of 0.01 that RetinaNet begins with, and targets of 0 and 1: [rows, columns] each."""
        generator = torch.Generator().manual_seed(13)
        logits = torch.randn(self.rows, self.columns, generator=generator) * 2 - 4.6
        targets = (torch.rand(self.rows, self.columns, generator=generator) < self.positives).float()
        return logits.to(where, dtype), targets.to(where, dtype)

    def work(self, dtype: str, mode: str) -> Work:
        """Logits and targets read; backward reads them again and writes the gradient. About 20 operations of the loss
        and 30 of its gradient, exponentials and logarithms counted once."""
        moved, flops = (2, 20) if mode == "forward" else (3, 30)
        elements = self.rows * self.columns
        return Work(bytes=moved * elements * ITEM[dtype], flops=flops * elements)


@dataclass(frozen=True, kw_only=True)
class MaskLossCase:
    """The mask head's targets and loss in a training step: S positive RoIs of each of N images."""

    name: str
    images: int = 2
    rois: int = 128  # of an image, S
    gt: int = 20  # masks of an image, G
    height: int = 800
    width: int = 1344
    side: int = 28
    classes: int = 80

    def small(self) -> MaskLossCase:
        return replace(self, rois=8, gt=3, height=120, width=160, classes=5)

    def ground_truth(self, where: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Masks [N, G, H, W] bool, ellipses; RoIs [N, S, 4] float32 around them; the mask of each RoI [N, S]."""
        boxes = random_boxes(
            self.images * self.gt, height=self.height, width=self.width, min_size=24, max_size=500, seed=14
        ).view(self.images, self.gt, 4)
        centre, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2
        y, x = torch.arange(self.height) + 0.5, torch.arange(self.width) + 0.5
        high = ((y - centre[..., 1:]) / half[..., 1:]).square()  # [N, G, H]
        wide = ((x - centre[..., :1]) / half[..., :1]).square()  # [N, G, W]
        masks = high[..., None] + wide[..., None, :] < 1
        generator = torch.Generator().manual_seed(15)
        owner = torch.randint(self.gt, (self.images, self.rois), generator=generator)
        near = boxes.gather(1, owner[..., None].expand(-1, -1, 4))
        near = near + torch.randn(near.shape, generator=generator) * 0.1 * half.gather(
            1, owner[..., None].expand(-1, -1, 2)
        ).repeat(1, 1, 2)
        limit = torch.tensor([self.width, self.height] * 2, dtype=torch.float32)
        return masks.to(where), near.clamp(min=0).minimum(limit).to(where), owner.to(where)

    def logits(self, dtype: torch.dtype, where: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [K, C, M, M], the channel of each RoI [K] and targets [K, M, M] float32, K = N * S."""
        generator = torch.Generator().manual_seed(16)
        K = self.images * self.rois
        logits = torch.randn(K, self.classes, self.side, self.side, generator=generator)
        classes = torch.randint(self.classes, (K,), generator=generator)
        targets = torch.rand(K, self.side, self.side, generator=generator)
        return logits.to(where, dtype), classes.to(where), targets.to(where)

    def target_work(self) -> Work:
        """The bits under each RoI and its box read, float32 targets written. Each pixel under a RoI is sampled about
        once: 4 taps, each a product and a sum."""
        _, boxes, _ = self.ground_truth(torch.device("cpu"))
        pixels = int((boxes[..., 2:] - boxes[..., :2]).double().prod(-1).sum())
        K = self.images * self.rois
        return Work(bytes=pixels // 8 + K * (16 + 8 + self.side**2 * 4), flops=8 * pixels)

    def loss_work(self, dtype: str, mode: str) -> Work:
        """One channel of each RoI and its targets read; backward writes the gradient of every channel."""
        K = self.images * self.rois
        read = K * self.side**2 * (ITEM[dtype] + 4)
        written = K * self.classes * self.side**2 * ITEM[dtype] if mode == "backward" else 4
        return Work(bytes=read + written, flops=10 * K * self.side**2)


# ---- The model: W12 and W13


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """Mask R-CNN with a ResNet and FPN on N images of a size that no resize changes; W is padded to 32 pixels."""

    name: str
    images: int
    training: bool = False
    height: int = 800
    width: int = 1333
    backbone: str = "resnet50"
    channels: int = 256  # of the FPN and the mask head
    hidden: int = 1024  # of the box head
    proposals: int | None = None  # limits the RPN's lists; None: the defaults
    objects: tuple[int, int] = (10, 20)  # of an image

    def small(self) -> ModelCase:
        return replace(
            self,
            images=min(self.images, 2),
            height=192,
            width=253,
            backbone="resnet18",
            channels=32,
            hidden=128,
            proposals=100,
        )

    @property
    def settings(self) -> dict[str, int]:
        """What both libraries are built with, under the names they share."""
        sizes = {"min_size": self.height, "max_size": self.width}
        limits = [f"rpn_{when}_nms_top_n_{mode}" for when in ("pre", "post") for mode in ("train", "test")]
        return sizes if self.proposals is None else sizes | dict.fromkeys(limits, self.proposals)

    def work(self, dtype: str) -> Work:
        """Products of all layers, a multiply-add counted twice; the weights once and the images."""
        flops, parameters = MODEL_FLOPS[self.backbone, self.training], MODEL_PARAMETERS[self.backbone]
        pixels = self.images * 3 * self.height * self.width
        # Training reads and writes weight, momentum and gradient in float32; inference reads the weights.
        moved = parameters * (24 if self.training else ITEM[dtype]) + pixels * 4
        return Work(bytes=moved, flops=self.images * flops)


# Of one image, at full size with resnet50 and reduced with resnet18. Inference: 1,000 RoIs (reduced: 200) and 100
# masks. Training: 512 RoIs (reduced: at most so many), 128 mask slots, and a backward that ends at the frozen first
# stage. Counted by `FlopCounterMode`; a test counts again.
MODEL_FLOPS = {
    ("resnet50", False): 538_387_167_744,
    ("resnet50", True): 1_577_520_066_048,
    ("resnet18", False): 5_848_546_560,
    ("resnet18", True): 17_545_753_344,
}
MODEL_PARAMETERS = {"resnet50": 44_401_393, "resnet18": 11_564_657}


# ---- The table

_W1 = RoICase(name="W1", rois=1024)
_W3 = RoICase(name="W3", images=1, rois=1000)
_W4 = RoICase(
    name="W4-ratio2", images=1, height=1024, width=1024, strides=(4,), channels=512, rois=512, clustered=False
)  # fmt: skip
_IMAGE_LEVELS = (2000, 2000, 2000, 2000, 819)  # P6 has 13 x 21 cells of 3 anchors


def _long_list(name: str, boxes: int, kept: float) -> NMSCase:
    return NMSCase(name=name, kind="list", lengths=(boxes,), threshold=0.5, keep=boxes, kept=kept)


_ALL: Sequence[Case] = (
    _W1,
    replace(_W1, name="W1b"),
    RoICase(name="W2", rois=256, pooled=14),
    _W3,
    replace(_W3, name="W3-bicubic", interpolation="bicubic"),
    replace(_W3, name="W3-max", reduction="max"),
    _W4,
    replace(_W4, name="W4-ratio0", sampling_ratio=0),
    NMSCase(name="W5", kind="levels", lengths=_IMAGE_LEVELS * 2, threshold=0.7, keep=1000, kept=0.36),
    NMSCase(name="W6", kind="classes", lengths=(1000,) * 80, threshold=0.5, keep=100, kept=0.01),
    _long_list("W7-1k", 1_000, 0.3),
    _long_list("W7-10k", 10_000, 0.3),
    _long_list("W7-100k", 100_000, 0.3),
    _long_list("W7-1M", 1_000_000, 0.3),
    _long_list("W7-10k-dense", 10_000, 0.03),
    RPNCase(name="W8"),
    MatchCase(name="W9"),
    PasteCase(name="W10"),
    PasteCase(name="W10-detectron2", convention="detectron2"),
    FocalCase(name="W11", rows=2, columns=268_569, positives=0.001),
    FocalCase(name="W11-head", rows=1024, columns=80, positives=1 / 80),
    MaskLossCase(name="W13-masks"),
    ModelCase(name="W12-b1", images=1),
    ModelCase(name="W12-b8", images=8),
    ModelCase(name="W13-b2", images=2, training=True),
    ModelCase(name="W13-b16", images=16, training=True),
)

CASES: dict[str, Case] = {case.name: case for case in _ALL}
