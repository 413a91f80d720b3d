"""The whole model, inference and training. `bench/model` measures these cases."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.cases._shared import ITEM, Case, by_name
from bench.machine import Work
from bench.standings import Aim


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    """Mask R-CNN with a ResNet and FPN on N images of a size that no resize changes; W is padded to 32 pixels."""

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
        """The arguments that both libraries are built with, under the names they share."""
        sizes = {"min_size": self.height, "max_size": self.width}
        limits = [f"rpn_{when}_nms_top_n_{mode}" for when in ("pre", "post") for mode in ("train", "test")]
        return sizes if self.proposals is None else sizes | dict.fromkeys(limits, self.proposals)

    def work(self, dtype: str, mode: str = "forward") -> Work:
        """Count the products of all layers, a multiply-add twice, the weights once and the images."""
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


def _inference(images: int) -> ModelCase:
    what = f"R50-FPN inference of {images} images of 800 x 1333 to COCO results"
    aims = {"": Aim(times=4, times_fp32=8)}
    return ModelCase(name=f"inference-b{images}", what=what, modes=("results",), aims=aims, images=images)


def _training(images: int) -> ModelCase:
    what = f"R50-FPN training step of {images} images of 800 x 1333"
    aims = {"": Aim(times=4, us=images * 10_000)}  # 100 images a second
    return ModelCase(name=f"training-b{images}", what=what, modes=("step",), aims=aims, images=images, training=True)


CASES = by_name(_inference(1), _inference(8), _training(2), _training(16))
