"""W12 and W13: the whole model. Letters as in `bench.cases`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.cases.case import ITEM
from bench.work import Work


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
