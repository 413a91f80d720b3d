"""From images of any size to the padded batch of the model: resize, normalise, pad, pack masks.

Letters: N images, G ground-truth boxes, H W padded size, h w size of one image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors

from tmask.structures import ImageBatch, Targets
from tmask_kernels import pack_masks, unpack_masks

Target = Mapping[str, Any]

# Float images are of 0..1. Filters that overshoot and added noise stay in these limits; images of 0..255 and images
# that the caller has normalised do not.
_FLOAT_LIMITS = (-0.5, 2.0)

# Of masks that are not packed, or not yet: little for a CPU, whose memory crowded images would fill, enough for a GPU.
_PIXELS_AT_ONCE = {"cpu": 2**20, "cuda": 2**25}


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """Resize the short side to `min_size` unless the long side would pass `max_size`, then normalise and pad.

    It has no parameters and pickles, so loader workers can run it. `size_divisible` pads H and W to its multiples.
    `antialias`: filter when shrinking (detectron2's convention); torchvision's does not.
    `mask_resize`: how ground-truth masks are resized, ``bilinear`` (cut at 0.5) or ``nearest``.
    `keep_crowds`: hand crowd regions on, so that nothing inside them counts as a negative.
    `masks`: False leaves masks out. `num_keypoints`: of an instance; 0 leaves keypoints out.
    """

    num_classes: int
    min_size: int
    max_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    size_divisible: int
    antialias: bool
    mask_resize: str
    keep_crowds: bool
    masks: bool = True
    num_keypoints: int = 0

    def __call__(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> tuple[ImageBatch, Targets | None]:
        """Images [3, h, w], uint8 or float in 0..1, and torchvision's target dicts, as padded batches.

        A target holds ``boxes`` [G, 4] xyxy in pixels (torchvision's `BoundingBoxes` in any format without rotation),
        ``labels`` [G], ``masks`` [G, h, w] of 0 and 1 (integers other than 0 count as 1) or packed
        [G, h, ceil(w / 32)] int32 (`tmask_kernels.pack_masks`; left out if they are not known), and may hold
        ``iscrowd`` [G], ``has_mask`` [G] (without it a mask without a pixel counts as not known), ``keypoints``
        [G, Kp, 3] (x and y in pixels, and visibility, 0 for a keypoint that is not known, as all are without this
        entry) and ``min_size``, the short side of this image. Masks are never all held as bytes or floats, unless they
        came so.

        Errors: ValueError for wrong types, shapes, counts or devices, images, boxes or keypoints that are not
        finite, float images far outside 0..1 (but with an `image_mean` of 0, for images that come normalised, or above
        1), boxes without area (but of crowds), and labels outside 1..num_classes-1 (`num_classes` counts the
        background). On CUDA the values are read once, and not for uint8 images alone.
        """
        _check(images, targets, self.masks, self.num_keypoints)
        short = [self.min_size] * len(images)
        if targets is not None:
            short = [target.get("min_size", self.min_size) for target in targets]
        resized = [self._resize(image, min_size) for image, min_size in zip(images, short, strict=True)]
        sizes = [(image.shape[-2], image.shape[-1]) for image in resized]
        height = _round_up(max(size[0] for size in sizes), self.size_divisible)
        width = _round_up(max(size[1] for size in sizes), self.size_divisible)
        batch = resized[0].new_zeros(len(images), 3, height, width)
        # By index: autograd refuses writes into the views that iteration over a tensor yields.
        for i, image in enumerate(resized):
            batch[i, :, : image.shape[-2], : image.shape[-1]] = image
        packed = None
        if targets is not None:
            scaled = [
                self._resize_target(target, (image.shape[-2], image.shape[-1]), size, (height, width))
                for target, image, size in zip(targets, images, sizes, strict=True)
            ]
            packed = _stack(scaled)
        _check_values(images, packed, self.num_classes, unit=0 < max(self.image_mean) <= 1)
        return ImageBatch(batch, torch.tensor(sizes).to(batch.device, non_blocking=True)), packed

    def _resize(self, image: Tensor, min_size: int) -> Tensor:
        image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        mean, std = (_constant(values, image)[:, None, None] for values in (self.image_mean, self.image_std))
        image = (image - mean) / std
        short, long = min(image.shape[-2:]), max(image.shape[-2:])
        scale = min(min_size / short, self.max_size / long)
        if scale == 1:
            return image
        # The short side of a very long image would round to nothing.
        if self.antialias:
            size = [max(1, int(side * scale + 0.5)) for side in image.shape[-2:]]
        else:  # as F.interpolate rounds with a scale_factor that it is to recompute
            size = [max(1, int(side * scale)) for side in image.shape[-2:]]
        return F.interpolate(image[None], size=size, mode="bilinear", antialias=self.antialias)[0]

    def _resize_target(
        self,
        target: Target,
        before: tuple[int, int],
        after: tuple[int, int],
        padded: tuple[int, int],
    ) -> dict[str, Tensor]:
        """Resize one image's boxes and packed masks. The masks fill the padded size."""
        boxes = xyxy(target["boxes"]).float()
        scale = _constant([after[1] / before[1], after[0] / before[0]], boxes).repeat(2)
        count = len(boxes)
        crowd = target.get("iscrowd", boxes.new_zeros(count)).to(torch.bool)
        scaled = {
            "boxes": boxes * scale,
            "labels": target["labels"].to(torch.int64),
            "valid": ~crowd,
            "crowd": crowd & self.keep_crowds,
            "has_mask": torch.zeros_like(crowd),
        }
        if self.masks:
            scaled["masks"], has_pixel = self._resize_masks(target.get("masks"), boxes, before, after, padded)
            scaled["has_mask"] = target.get("has_mask", has_pixel).to(torch.bool)
        if self.num_keypoints:
            keypoints = target.get("keypoints", boxes.new_zeros(count, self.num_keypoints, 3)).float()
            scaled["keypoints"] = torch.cat([keypoints[..., :2] * scale[:2], keypoints[..., 2:]], dim=-1)
        return scaled

    def _resize_masks(
        self,
        masks: Tensor | None,
        boxes: Tensor,
        before: tuple[int, int],
        after: tuple[int, int],
        padded: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Return the packed masks of `boxes` [G, 4], and which masks have a pixel, [G] bool."""
        count, words = len(boxes), num_words(padded[1])
        has_pixel = torch.zeros(count, dtype=torch.bool, device=boxes.device)
        packed = torch.zeros(count, padded[0], words, dtype=torch.int32, device=boxes.device)
        if masks is not None:
            for chunk in mask_chunks(count, max(math.prod(before), math.prod(after)), masks.device.type):
                part = masks[chunk]
                if is_packed(part, before[1]):
                    part = unpack_masks(part, before[1])
                part = part if part.is_floating_point() or part.dtype == torch.bool else part != 0
                has_pixel[chunk] = part.flatten(1).any(1)
                if after != before:
                    part = F.interpolate(part.float()[:, None], size=after, mode=self.mask_resize)[:, 0]
                part = part if part.dtype == torch.bool else part >= 0.5
                packed[chunk, : after[0], : num_words(after[1])] = pack_masks(part)
        return packed, has_pixel


def _constant(values: Sequence[float], like: Tensor) -> Tensor:
    """Return float32 numbers on the device of `like`, by a copy that does not wait for a GPU."""
    return torch.tensor(values, dtype=torch.float32).to(like.device, non_blocking=True)


def xyxy(boxes: Tensor) -> Tensor:
    """Return plain boxes [G, 4] xyxy. torchvision's `BoundingBoxes` may have another format."""
    if not isinstance(boxes, tv_tensors.BoundingBoxes):
        return boxes
    if boxes.format != tv_tensors.BoundingBoxFormat.XYXY:
        from torchvision.transforms.v2.functional import convert_bounding_box_format

        boxes = convert_bounding_box_format(boxes, new_format="XYXY")
    return boxes.as_subclass(Tensor)


def mask_chunks(count: int, pixels: int, device: str = "cpu") -> Iterator[slice]:
    """Split `count` masks of `pixels` pixels into slices that may be unpacked at once, to a byte or a float a pixel."""
    step = max(1, _PIXELS_AT_ONCE.get(device, 2**20) // max(1, pixels))
    return (slice(first, first + step) for first in range(0, count, step))


def num_words(width: int) -> int:
    """Return the number of words in a row of packed masks of `width` pixels."""
    return -(-width // 32)


def is_packed(masks: Tensor, width: int) -> bool:
    """Return whether masks are packed rows of `width` pixels; else they hold a number a pixel."""
    return masks.dtype == torch.int32 and masks.shape[-1] == num_words(width)


def _stack(targets: Sequence[dict[str, Tensor]]) -> Targets:
    """Pad every field to the largest count of the batch (at least 1, so that no later stage meets an empty axis)."""
    count = max(1, max(len(target["boxes"]) for target in targets))
    fields = {}
    for name in targets[0]:
        first = targets[0][name]
        stacked = first.new_zeros(len(targets), count, *first.shape[1:])
        for i, target in enumerate(targets):
            stacked[i, : len(target[name])] = target[name]
        fields[name] = stacked
    return Targets(masks=fields.pop("masks", None), **fields)


def _check(images: Sequence[Tensor], targets: Sequence[Target] | None, with_masks: bool, num_keypoints: int) -> None:
    if not len(images):
        raise ValueError("images: expected at least one image, got an empty list")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"images[{i}]: expected a tensor [3, h, w], got {got}")
        if image.dtype != torch.uint8 and not image.dtype.is_floating_point:
            raise ValueError(f"images[{i}]: expected uint8 or a float dtype, got {image.dtype}")
        if image.device != images[0].device:
            raise ValueError(f"images[{i}]: expected on {images[0].device} like the first, got {image.device}")
    if targets is None:
        return
    if len(targets) != len(images):
        raise ValueError(f"targets: expected {len(images)}, one an image, got {len(targets)}")
    for i, (target, image) in enumerate(zip(targets, images, strict=True)):
        _check_target(f"targets[{i}]", target, image, with_masks, num_keypoints)


def _check_target(name: str, target: Target, image: Tensor, with_masks: bool, num_keypoints: int) -> None:
    if not isinstance(target, Mapping):
        raise ValueError(f"{name}: expected a dict, got {type(target).__name__}")
    for key in ("boxes", "labels"):
        if key not in target:
            raise ValueError(f"{name}: expected a key {key!r}, got {sorted(target)}")
    boxes = target["boxes"]
    count = len(boxes) if isinstance(boxes, Tensor) and boxes.ndim else 0
    shapes: dict[str, tuple[int, ...]] = {"boxes": (count, 4), "labels": (count,)}
    shapes["iscrowd"] = (count,)
    if with_masks:
        height, width = image.shape[-2:]
        masks = target.get("masks")
        packed = isinstance(masks, Tensor) and masks.ndim and is_packed(masks, width)
        shapes |= {"has_mask": (count,), "masks": (count, height, num_words(width) if packed else width)}
    if num_keypoints:
        shapes["keypoints"] = (count, num_keypoints, 3)
    for key, shape in shapes.items():
        if key not in target:
            continue
        value = target[key]
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}[{key!r}]: expected a tensor, got {type(value).__name__}")
        if tuple(value.shape) != shape:
            raise ValueError(f"{name}[{key!r}]: expected shape {shape}, got {tuple(value.shape)}")
        if value.device != image.device:
            raise ValueError(f"{name}[{key!r}]: expected on the image's device, {image.device}, got {value.device}")
    size, canvas = tuple(image.shape[-2:]), tuple(getattr(boxes, "canvas_size", image.shape[-2:]))
    if canvas != size:
        raise ValueError(f"{name}['boxes']: expected a canvas_size of {size}, the image's, got {canvas}")
    if target["labels"].dtype.is_floating_point and count:
        raise ValueError(f"{name}['labels']: expected an integer dtype, got {target['labels'].dtype}")
    if "min_size" in target and not (isinstance(target["min_size"], int) and target["min_size"] >= 1):
        raise ValueError(f"{name}['min_size']: expected whole pixels, at least 1, got {target['min_size']!r}")


def _check_values(images: Sequence[Tensor], targets: Targets | None, num_classes: int, *, unit: bool) -> None:
    """Check the values of all images, boxes and labels. CUDA is waited for once; the fault is searched only after that.

    `unit`: float images must be in 0..1.
    """
    floats = [(i, image) for i, image in enumerate(images) if image.is_floating_point()]
    broken = {i: ~image.isfinite().all() for i, image in floats}
    outside = {i: (image.amin() < _FLOAT_LIMITS[0]) | (image.amax() > _FLOAT_LIMITS[1]) for i, image in floats if unit}
    faults = [*broken.values(), *outside.values()]
    if targets is not None:
        faults += [_bad_rows(targets, num_classes).any()]
        faults += [] if targets.keypoints is None else [_bad_keypoints(targets, targets.keypoints).any()]
    if not faults or not bool(torch.stack(faults).any()):
        return
    for i, flag in broken.items():
        if flag:
            count = int((~images[i].isfinite()).sum())
            raise ValueError(f"images[{i}]: expected finite values, got {count} NaN or infinite of {images[i].numel()}")
    for i, flag in outside.items():
        if flag:
            low, high = (round(float(value), 3) for value in images[i].aminmax())
            why = "the model itself subtracts image_mean and divides by image_std; give 0..255 as uint8"
            raise ValueError(f"images[{i}]: expected float values in 0..1, got {low}..{high} ({why})")
    assert targets is not None
    bad = _bad_rows(targets, num_classes)
    if not bad.any():
        assert targets.keypoints is not None
        image, row, k = _bad_keypoints(targets, targets.keypoints).nonzero()[0].tolist()
        expected, got = "finite x, y and a visibility of 0 or more", targets.keypoints[image, row, k].tolist()
        raise ValueError(
            f"targets[{image}]['keypoints'][{row}, {k}]: expected {expected}, got {got} (after the resize)"
        )
    image, row = bad.nonzero()[0].tolist()
    box = [round(value, 2) for value in targets.boxes[image, row].tolist()]
    label = int(targets.labels[image, row])
    if targets.valid[image, row] and not 1 <= label < num_classes:
        raise ValueError(f"targets[{image}]['labels'][{row}]: expected 1..{num_classes - 1}, got {label}")
    expected = "finite x1 < x2 and y1 < y2"
    raise ValueError(f"targets[{image}]['boxes'][{row}]: expected {expected}, got {box} (after the resize)")


def _bad_rows(targets: Targets, num_classes: int) -> Tensor:
    """[N, G] bool: instances whose box or label is impossible, and crowds whose box is not finite."""
    boxes, labels = targets.boxes, targets.labels
    finite = torch.isfinite(boxes).all(-1)
    area = (boxes[..., 2:] > boxes[..., :2]).all(-1)
    known = (labels >= 1) & (labels < num_classes)
    return (targets.valid & ~(finite & area & known)) | (targets.crowd & ~finite)


def _bad_keypoints(targets: Targets, keypoints: Tensor) -> Tensor:
    """[N, G, Kp] bool: impossible keypoints of instances."""
    return targets.valid[..., None] & ~(keypoints.isfinite().all(-1) & (keypoints[..., 2] >= 0))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
