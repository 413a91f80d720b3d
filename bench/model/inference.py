"""Mask R-CNN inference, torchvision's and ours, with the same weights on the same images.

Modes: "detections", from a list of images to a list of dicts with float masks pasted into them; "results", the same to
the content of a COCO result file, run lengths on the host; "padded", ours alone, from a padded batch to padded
detections without the paste. The floor of all three is the network's products.

The gate has two parts. In full float32 our detections must be torchvision's. Then each timed call must find them again
as closely as its own precision allows. For float32 the benchmark switches on TF32 for the products and convolutions of
both. Letters: D detections of an image, h w its size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

from bench.contest import LAYOUTS, Call
from bench.graph import captured
from bench.machine import device, tf32
from bench.model._pair import Pair, bench_of, problem_of
from bench.rle import decode_rle, encoder
from tmask.engine.device import autocast
from tmask.model.postprocess import to_list
from tmask.structures import Detections, ImageBatch

MASKS = {"detections": "probability", "results": "rle"}

MASKS_COMPARED = 20  # of an image: the best ones
CLEARLY = 1.5  # times the lowest score of the list


class Likeness(NamedTuple):
    """How much of one result is in another.

    Half precision, and the TF32 of a GPU's convolutions, move a logit of this random network of 50 layers by some per
    cent of the spread of all logits, and among many overlapping RoIs another one wins. A detection that scores well
    above the last place is found again, though, near its place.
    """

    found: float  # share of the clear detections with an IoU of at least 0.5
    pixels: float  # median difference of a coordinate
    score: float  # median difference, as a share of the score
    masks: float  # mean IoU where box and label are the same


# Full precision, another order of sums: some 1e-6 of every value. A detection at a threshold or with the score of a
# neighbour that overlaps it may still go either way.
SAME = Likeness(found=0.99, pixels=0.01, score=1e-3, masks=0.98)
# bf16 on a CPU at full size, ours and torchvision's: 0.7 found, 2 pixels, 0.2 of a score.
LEAST = Likeness(found=0.5, pixels=8.0, score=0.4, masks=0.5)
# Under autocast torchvision decodes boxes in bf16, 4 to 8 pixels apart at this size. On a GPU its NMS of levels also
# moves them apart by thousands of pixels in bf16. Its users run that, so the benchmark times it, unless it is a wreck.
LEAST_OF_PEERS = Likeness(found=0.1, pixels=64.0, score=0.8, masks=0.2)


class Found(NamedTuple):
    """The detections of one image, by falling score, on one device."""

    boxes: Tensor  # [D, 4] float32
    scores: Tensor  # [D] float32
    labels: Tensor  # [D] int64
    masks: Tensor  # [min(D, MASKS_COMPARED), h, w] bool


class Truth(NamedTuple):
    """torchvision's detections in full float32, and how ours differ from them."""

    pair: Pair
    detections: list[Found]
    problem: str | None


@contextlib.contextmanager
def precision(pair: Pair) -> Iterator[None]:
    with tf32(), torch.no_grad(), autocast(device(), pair.dtype):
        yield


def prepare(pair: Pair, ours: bool, how: str) -> Call:
    """Return the call to time."""
    if not ours:
        encode = encoder() if pair.mode == "results" else None
        model = torch.compile(pair.theirs) if how else pair.theirs

        def their_call() -> Any:
            with precision(pair):
                results = model(pair.images)
            return results if encode is None else [_on_host(result, encode) for result in results]

        return their_call
    batch, _ = pair.ours.transform(pair.images)
    batch = batch._replace(tensor=batch.tensor.contiguous(memory_format=LAYOUTS[pair.layout]))
    with precision(pair):
        core = _core(pair, batch, how)

    def our_call() -> Any:
        with precision(pair):
            if pair.mode == "padded":
                return core(batch)
            images, _ = pair.ours.transform(pair.images)
            sizes = [(image.shape[1], image.shape[2]) for image in pair.images]
            results = to_list(core(images), images.sizes, sizes, masks=MASKS[pair.mode], convention=pair.ours.paste)
        return [_on_host(result) for result in results] if pair.mode == "results" else results

    return our_call


def _core(pair: Pair, batch: ImageBatch, how: str) -> Callable[[ImageBatch], Detections]:
    """Our padded core; around it is the model's own shell."""
    model = pair.ours
    if how == "":
        return lambda images: model.forward_padded(images, compact=not images.tensor.is_cuda)
    if how == "compile":
        return torch.compile(model.forward_padded, fullgraph=True, dynamic=False)
    static = ImageBatch(batch.tensor.clone(), batch.sizes.clone())
    replay = captured(lambda: model.forward_padded(static))

    def core(images: ImageBatch) -> Detections:
        if images is not batch:  # the padded mode's input is in place
            static.tensor.copy_(images.tensor)
            static.sizes.copy_(images.sizes)
        return replay()

    return core


def _on_host(result: dict[str, Any], encode: Callable[[Tensor], list[dict[str, Any]]] | None = None) -> dict[str, Any]:
    """One image's result as a result file needs it: numbers on the host, masks as run lengths."""
    masks = result["masks"] if encode is None else encode(result["masks"][:, 0] > 0.5)
    return {name: result[name].cpu() for name in ("boxes", "scores", "labels")} | {"masks": masks}


def found(result: dict[str, Any]) -> Found:
    """A result in torchvision's form; masks as probabilities [D, 1, h, w] or COCO's run lengths."""
    masks, boxes = result["masks"], result["boxes"]
    if isinstance(masks, Tensor):
        pixels = masks[:MASKS_COMPARED, 0] > 0.5
    else:
        some = [decode_rle(rle) for rle in masks[:MASKS_COMPARED]]
        pixels = torch.stack(some) if some else torch.zeros(0, 1, 1, dtype=torch.bool)
    return Found(boxes.float(), result["scores"].float(), result["labels"], pixels.to(boxes.device))


@torch.no_grad()
def true_detections(pair: Pair) -> Truth:
    """The truth of a contest."""
    with tf32(allowed=False):
        theirs, ours = [found(r) for r in pair.theirs(pair.images)], [found(r) for r in pair.ours(pair.images)]
    return Truth(pair, theirs, problem_of(lambda: check_alike(ours, theirs, SAME)))


def check(results: Any, truth: Truth, ours: bool) -> None:
    assert not ours or truth.problem is None, f"in full float32: {truth.problem}"
    if isinstance(results, Detections):
        sizes = [(image.shape[1], image.shape[2]) for image in truth.pair.images]
        image_sizes = torch.tensor(sizes, device=results.boxes.device)
        results = to_list(results, image_sizes, sizes, masks="probability", convention="torchvision")
    given = [Found(*(value.to(device()) for value in found(result))) for result in results]
    near = LEAST if ours or truth.pair.dtype == "fp32" else LEAST_OF_PEERS
    check_alike(given, truth.detections, SAME if truth.pair.full else near)


def check_alike(got: Sequence[Found], true: Sequence[Found], least: Likeness) -> None:
    """Raises AssertionError unless the clear detections of each are found in the other, near their places."""
    for given, truth in zip(got, true, strict=True):
        for one, other, whose in ((truth, given, "true"), (given, truth, "given")):
            like = likeness(one, other)
            assert like.found >= least.found, f"{like.found:.0%} of the {whose} detections found again"
            assert like.pixels <= least.pixels, f"boxes off by {like.pixels:.1f} pixels"
            assert like.score <= least.score, f"scores off by {like.score:.0%}"
            assert like.masks >= least.masks, f"masks: mean IoU {like.masks:.2f}"


def likeness(one: Found, other: Found) -> Likeness:
    """How much of `one` is in `other`."""
    if not len(one.scores):
        return Likeness(1.0, 0.0, 0.0, 1.0)
    clear = one.scores >= min(CLEARLY * float(one.scores.min()), float(one.scores.max()))
    partner, iou, mask_iou = _partners(one, other)
    hit = clear & (iou >= 0.5)
    if not hit.any():
        return Likeness(0.0, 0.0, 0.0, 1.0)
    pixels = (one.boxes - partner.boxes)[hit].abs().median()
    score = ((one.scores - partner.scores).abs() / one.scores)[hit].median()
    masks = mask_iou[iou[: len(mask_iou)] >= 0.9]
    share = float(hit.sum() / clear.sum())
    return Likeness(share, float(pixels), float(score), float(masks.mean()) if len(masks) else 1.0)


def _partners(one: Found, other: Found) -> tuple[Found, Tensor, Tensor]:
    """For each detection of `one` the best of its label in `other`.

    Returns:
        The partners [D] (without their masks), the IoU of the boxes [D], and the IoU of the compared masks, 1 where the
        partner's mask is not compared.
    """
    if not len(other.boxes):  # a partner that overlaps none
        other = Found(other.boxes.new_zeros(1, 4), other.scores.new_zeros(1), other.labels.new_zeros(1), other.masks)
    overlap = box_iou(one.boxes, other.boxes) * (one.labels[:, None] == other.labels)  # [D, D']
    iou, pair = overlap.max(1)
    mask_iou = torch.ones(len(one.masks), device=one.boxes.device)
    for i, j in enumerate(pair[: len(one.masks)].tolist()):
        if j < len(other.masks):
            union = (one.masks[i] | other.masks[j]).sum()
            mask_iou[i] = torch.where(union > 0, (one.masks[i] & other.masks[j]).sum() / union, 1.0)
    return Found(other.boxes[pair], other.scores[pair], other.labels[pair], other.masks[:0]), iou, mask_iou


def _wanted(case: str, mode: str, dtype: str, layout: str, provider: str) -> bool:
    """torchvision has no padded form. To compile takes minutes: once a dtype, on channels_last, to whole results."""
    if (mode == "padded" and provider.startswith("torchvision")) or (device().type == "cpu" and layout == "nchw"):
        return False
    if provider in ("tmask", "torchvision"):
        return True
    full = layout == "nhwc" and mode != "detections"
    return full and (provider == "tmask-graph" or case == "inference-b1" or dtype == "bf16")


BENCH = bench_of(prepare, true_detections, check)
test_inference = BENCH.test(
    cases=["inference-b1", "inference-b8"],
    modes=["results", "detections", "padded"],
    dtypes=["bf16", "fp32"],
    layouts=["nhwc", "nchw"],
    where=_wanted,
)
