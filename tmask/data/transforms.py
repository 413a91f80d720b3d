"""Random augmentation of an image together with its boxes and masks, by torchvision.transforms.v2."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tmask.model.transform import is_packed, mask_chunks, xyxy
from tmask_kernels import pack_masks, unpack_masks

Target = dict[str, Any]

# Pixels. Of what a crop leaves of a box; a narrower one may lose its area when the image is resized.
_MIN_SIDE = 0.01
_MOVED = ("boxes", "masks", "keypoints")
_OF_INSTANCES = (*_MOVED, "labels", "iscrowd", "has_mask", "visibility")


class PackedMasks(tv_tensors.TVTensor):
    """Packed masks [G, H, ceil(W / 32)] int32 of `width` pixels as a type that v2's transforms know.

    What moves pixels does so as for torchvision's own `Mask`, with a few masks at a time unpacked.
    """

    width: int

    @classmethod
    def of(cls, packed: Tensor, width: int) -> PackedMasks:
        """`packed` as it is, with its width in pixels."""
        masks = packed.as_subclass(cls)
        masks.width = width
        return masks


def _move(functional: Callable[..., Any], masks: PackedMasks, *args: Any, **kwargs: Any) -> PackedMasks:
    packed = masks.as_subclass(Tensor)
    moved, width = None, masks.width
    for chunk in list(mask_chunks(len(packed), packed.shape[1] * masks.width)) or [slice(0)]:
        dense = tv_tensors.Mask(unpack_masks(packed[chunk], masks.width).view(torch.uint8))
        part = functional(dense, *args, **kwargs).as_subclass(Tensor)
        width, part = part.shape[-1], pack_masks(part)
        moved = part.new_empty(len(packed), *part.shape[1:]) if moved is None else moved
        moved[chunk] = part
    assert moved is not None
    return PackedMasks.of(moved, width)


# All that have a kernel for `Mask`: v2 hands a type without one through unchanged.
for _functional in (
    F.horizontal_flip, F.vertical_flip, F.resize, F.crop, F.center_crop, F.resized_crop, F.pad, F.affine, F.rotate,
    F.perspective, F.elastic,
):  # fmt: skip
    F.register_kernel(_functional, PackedMasks)(functools.partial(_move, _functional))


@dataclass(frozen=True)
class JointTransform:
    """Run a v2 transform on (image, target), boxes, masks and keypoints included; plain tensors in, plain tensors out.

    `transform` may move and recolour, but must keep every instance: the other fields of the target pass through.
    It pickles if `transform` does. Masks are bytes or packed; a seed moves both alike.
    """

    transform: Callable[[Any, Any], Any]

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """Transform an image [3, H, W] and its target, as `tmask.data.coco.CocoDataset` returns them."""
        height, width = image.shape[-2:]
        masks = target.get("masks")
        wrapped = dict(target)
        wrapped["boxes"] = tv_tensors.BoundingBoxes(xyxy(target["boxes"]), format="XYXY", canvas_size=(height, width))
        if masks is not None:
            wrapped["masks"] = PackedMasks.of(masks, width) if is_packed(masks, width) else tv_tensors.Mask(masks)
        keypoints = target.get("keypoints")
        if keypoints is not None:
            # v2 counts pixels, as COCO does; ours are continuous, with the first pixel's centre at 0.5.
            wrapped["keypoints"] = tv_tensors.KeyPoints(keypoints[..., :2] - 0.5, canvas_size=(height, width))
            wrapped["visibility"] = keypoints[..., 2:]
        out_image, out = self.transform(tv_tensors.Image(image), wrapped)
        for name in ("boxes",) if masks is None else ("boxes", "masks"):
            out[name] = out[name].as_subclass(Tensor)
        if keypoints is not None:
            xy = out["keypoints"].as_subclass(Tensor) + 0.5
            out["keypoints"] = torch.cat([xy, out.pop("visibility")], dim=-1)
        return out_image.as_subclass(Tensor), out


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """v2's flip that also swaps keypoints: a mirror turns a left hand into a right one.

    After a flip keypoint i is the one that was ``flip_order[i]``; with an empty order all keep their numbers.
    """

    probability: float
    flip_order: tuple[int, ...] = ()

    def __call__(self, image: Any, target: Target) -> tuple[Any, Target]:
        """Image, boxes, masks and keypoints as v2's types."""
        if torch.rand(1) >= self.probability:
            return image, target
        out = target | {name: F.horizontal_flip(target[name]) for name in _MOVED if name in target}
        if self.flip_order and "keypoints" in out:
            order = list(self.flip_order)
            out["keypoints"] = tv_tensors.wrap(out["keypoints"][:, order], like=out["keypoints"])
            out["visibility"] = out["visibility"][:, order]
        return F.horizontal_flip(image), out


@dataclass(frozen=True)
class RandomCrop:
    """A step of a JointTransform: keep a random window, each side of it at least `least` times the image's.

    A box that the window cuts ends where the visible part of its mask does. Instances of which nothing is left, of
    the mask or, without one, of the box, are dropped from every field.
    """

    least: float

    def __call__(self, image: Any, target: Target) -> tuple[Any, Target]:
        """Image, boxes, masks and keypoints as v2's types."""
        size = image.shape[-2:]
        height, width = (max(1, round(side * (self.least + (1 - self.least) * float(torch.rand(()))))) for side in size)
        top, left = (int(torch.randint(side - kept + 1, ())) for side, kept in zip(size, (height, width), strict=True))
        crop = functools.partial(F.crop, top=top, left=left, height=height, width=width)
        out = target | {name: crop(target[name]) for name in _MOVED if name in target}

        boxes, before = out["boxes"].as_subclass(Tensor), target["boxes"].as_subclass(Tensor)  # [G, 4]
        if "masks" in out:
            visible = _boxes_of(out["masks"])
            has_mask = target.get("has_mask", torch.ones(len(boxes), dtype=torch.bool))  # [G]
            out["has_mask"] = has_mask & (visible[:, 2] > 0)
            cut = (boxes[:, 2:] - boxes[:, :2] < before[:, 2:] - before[:, :2] - _MIN_SIDE).any(1)
            fitted = torch.cat([boxes[:, :2].maximum(visible[:, :2]), boxes[:, 2:].minimum(visible[:, 2:])], dim=1)
            boxes = torch.where((cut & has_mask)[:, None], fitted, boxes)
            out["boxes"] = tv_tensors.wrap(boxes, like=out["boxes"])
        keep = (boxes[:, 2:] - boxes[:, :2] >= _MIN_SIDE).all(1)
        return crop(image), out | {name: _rows(out[name], keep) for name in _OF_INSTANCES if name in out}


@dataclass(frozen=True)
class RandomMinSize:
    """A step of a JointTransform: draw the short side that `ImageTransform` gives the image, one of `sizes`.

    The image is resized there and once, since a resize here would be undone.
    """

    sizes: tuple[int, ...]

    def __call__(self, image: Any, target: Target) -> tuple[Any, Target]:
        """The image as it is, and the target with ``min_size``."""
        return image, target | {"min_size": self.sizes[int(torch.randint(len(self.sizes), ()))]}


def train_transforms(
    hflip: float,
    vflip: float,
    *,
    min_crop: float = 1.0,
    min_sizes: Sequence[int] = (),
    flip_order: Sequence[int] = (),
) -> JointTransform:
    """Flip left-right with probability `hflip` and up-down with `vflip`, crop and draw a size.

    A crop keeps at least `min_crop` of each side, 1 all; `min_sizes` are the short sides to draw from, if any.
    `flip_order`: which keypoint stands at each place after a left-right flip; left out, none moves. All is drawn from
    torch's global generator, the flips first. Errors: ValueError for a probability outside 0..1.
    """
    for name, value in (("hflip", hflip), ("vflip", vflip)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a probability in 0..1, got {value}")
    steps: list[Callable[[Any, Any], Any]] = [
        RandomHorizontalFlip(hflip, tuple(flip_order)),
        v2.RandomVerticalFlip(vflip),
    ]
    steps += [RandomCrop(min_crop)] if min_crop < 1 else []
    steps += [RandomMinSize(tuple(min_sizes))] if min_sizes else []
    return JointTransform(v2.Compose(steps))


def _boxes_of(masks: Tensor) -> Tensor:
    """Return the box of each mask's pixels, xyxy float32 [G, 4]; zeros for a mask without a pixel."""
    plain = masks.as_subclass(Tensor)
    width = masks.width if isinstance(masks, PackedMasks) else plain.shape[2]
    boxes = torch.zeros(len(plain), 4)
    for chunk in mask_chunks(len(plain), plain.shape[1] * width):
        inside = unpack_masks(plain[chunk], width) if isinstance(masks, PackedMasks) else plain[chunk] != 0
        for axis, line in enumerate((inside.any(1).byte(), inside.any(2).byte())):  # [k, W], [k, H]
            boxes[chunk, axis] = line.argmax(1).float()
            boxes[chunk, axis + 2] = ((line.shape[1] - line.flip(1).argmax(1)) * line.amax(1)).float()
    return boxes


def _rows(values: Tensor, keep: Tensor) -> Tensor:
    kept = values.as_subclass(Tensor)[keep]
    if isinstance(values, PackedMasks):
        return PackedMasks.of(kept, values.width)
    return tv_tensors.wrap(kept, like=values) if isinstance(values, tv_tensors.TVTensor) else kept
