"""Random augmentation of an image together with its boxes and masks, by torchvision.transforms.v2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

Target = dict[str, Any]


@dataclass(frozen=True)
class JointTransform:
    """Run a v2 transform on (image, target), boxes and masks included; plain tensors in, plain tensors out.

    `transform` may move and recolour, but must keep every instance: the other fields of the target pass through.
    It pickles if `transform` does.
    """

    transform: Callable[[Any, Any], Any]

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """[3, H, W] and a target as of `tmask.data.coco.CocoDataset`."""
        size = (image.shape[-2], image.shape[-1])
        wrapped = dict(target)
        wrapped["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
        wrapped["masks"] = tv_tensors.Mask(target["masks"])
        out_image, out = self.transform(tv_tensors.Image(image), wrapped)
        for name in ("boxes", "masks"):
            out[name] = out[name].as_subclass(torch.Tensor)
        return out_image.as_subclass(torch.Tensor), out


def train_transforms(hflip: float, vflip: float) -> JointTransform:
    """Flip left-right with probability `hflip` and up-down with `vflip`, drawn from torch's global generator.

    Errors: ValueError for a probability outside 0..1.
    """
    for name, value in (("hflip", hflip), ("vflip", vflip)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a probability in 0..1, got {value}")
    return JointTransform(v2.Compose([v2.RandomHorizontalFlip(hflip), v2.RandomVerticalFlip(vflip)]))
