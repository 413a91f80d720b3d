"""torchvision's Mask R-CNN and ours with the same weights, the pictures they see, and the benchmark between them.

The weights are random. Pictures calibrate the batch norms and the scale of the logits, so that activations, scores and
the number of detections are like those of a trained model. Letters: N images, G objects of an image, h w its size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d

import tmask
from bench.cases._model import CASES, ModelCase
from bench.cases._shared import Bench
from bench.contest import LAYOUTS, Call, UnavailableError
from bench.machine import device

PROVIDERS = ["tmask", "torchvision", "tmask-graph", "tmask-compile", "torchvision-compile"]
NUM_CLASSES = 91  # COCO's numbering, background included
CLASS_STD = 1.5  # of the class logits: in an image a few hundred pairs of RoI and class score over 0.05
MASK_STD = 3.0  # of the mask logits: most pixels are clearly inside or outside


class Pair(NamedTuple):
    """Both models on the device of the benchmarks, and their pictures there."""

    case: ModelCase
    mode: str
    dtype: str
    layout: str
    theirs: Any
    ours: tmask.MaskRCNN
    images: list[Tensor]  # [3, h, w] float in 0..1
    targets: list[dict[str, Tensor]]

    @property
    def full(self) -> bool:
        """Whether the timed work is done in full float32; on a GPU float32 takes TF32."""
        return self.dtype == "fp32" and device().type == "cpu"


def bench_of(
    prepare: Callable[[Pair, bool, str], Call], truth: Callable[[Pair], Any], check: Callable[[Any, Any, bool], None]
) -> Bench:
    """The benchmark of all PROVIDERS.

    `prepare` takes the models, whether ours runs, and how ("", "compile" or "graph"), and returns the call to time.
    `check` takes a result, the truth, and whether the result is ours.
    """

    def call_of(provider: str, pair: Pair) -> Call:
        library, _, how = provider.partition("-")
        if how and device().type != "cuda":
            raise UnavailableError("compiled or captured on a GPU only; on a CPU the tests trace it whole")
        return prepare(pair, library == "tmask", how)

    return Bench(
        cases=CASES,
        inputs=make_pair,
        peers={provider: functools.partial(call_of, provider) for provider in PROVIDERS},
        truth=truth,
        check=lambda got, true, provider: check(got, true, provider.startswith("tmask")),
        tf32=True,
    )


def make_pair(case: ModelCase, mode: str, dtype: str, layout: str) -> Pair:
    """Both models. The backbone's batch norms, stem and first stage are frozen, as in the usual fine-tuning."""
    images, targets = pictures(case)
    weights = _weights(case)
    theirs = _torchvision(case, FrozenBatchNorm2d)
    theirs.load_state_dict(weights)
    for stage in ("conv1", "layer1"):
        theirs.backbone.body[stage].requires_grad_(False)
    models = (theirs, tmask.load_torchvision(weights, **case.settings))
    return Pair(
        *(case, mode, dtype, layout),
        *(model.to(device(), memory_format=LAYOUTS[layout]).train(case.training) for model in models),
        [image.to(device()) for image in images],
        [{name: value.to(device()) for name, value in target.items()} for target in targets],
    )


def pictures(case: ModelCase) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Blurred noise with ellipses of other noise: images [3, h, w] and torchvision's targets, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    height, width = case.height, case.width
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")

    def noise() -> Tensor:
        small = torch.rand(1, 3, -(-height // 16), -(-width // 16), generator=generator)
        return F.interpolate(small, size=(height, width), mode="bicubic")[0].clamp(0, 1)

    images, targets = [], []
    for _ in range(case.images):
        count = int(torch.randint(case.objects[0], case.objects[1] + 1, (1,), generator=generator))
        centre = torch.rand(count, 2, generator=generator) * 0.8 + 0.1
        half = 0.02 * 10 ** torch.rand(count, 2, generator=generator)  # 0.02 to 0.2 of a side
        boxes = (torch.cat([centre - half, centre + half], 1).clamp(0, 1)) * torch.tensor([width, height] * 2)
        mid, radius = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        # One object at a time: G float planes of 800 x 1333 would be a gigabyte for the large batches.
        inside = [((x - m[0]) / r[0]) ** 2 + ((y - m[1]) / r[1]) ** 2 <= 1 for m, r in zip(mid, radius, strict=True)]
        masks = torch.stack(inside)  # [G, h, w]
        image, other = noise(), 1 - noise()
        images.append(torch.where(masks.any(0), other, image))
        labels = torch.randint(1, NUM_CLASSES, (count,), generator=generator)
        targets.append({"boxes": boxes, "labels": labels, "masks": masks.to(torch.uint8)})
    return images, targets


@functools.lru_cache(maxsize=4)
def _weights(case: ModelCase) -> dict[str, Tensor]:
    """torchvision's state dict with frozen batch norms."""
    torch.manual_seed(0)
    model = _torchvision(case, nn.BatchNorm2d).to(device())
    _calibrate(model, [image.to(device()) for image in pictures(case)[0][:2]])
    return {name: value.cpu() for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}


def _torchvision(case: ModelCase, norm: type[nn.Module]) -> Any:
    """``maskrcnn_resnet50_fpn``, or the same with another ResNet and other widths."""
    body = getattr(resnet, case.backbone)(weights=None, norm_layer=norm)
    levels = {f"layer{i + 1}": str(i) for i in range(4)}
    C = case.channels
    return TorchvisionMaskRCNN(
        BackboneWithFPN(body, levels, [body.inplanes // 8 * 2**i for i in range(4)], C),
        box_head=TwoMLPHead(C * 7**2, case.hidden),
        box_predictor=FastRCNNPredictor(case.hidden, NUM_CLASSES),
        mask_head=MaskRCNNHeads(C, (C,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(C, C, NUM_CLASSES),
        **case.settings,
    )


@torch.no_grad()
def _calibrate(model: Any, images: list[Tensor]) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average over the pictures
    model.train()
    batch, _ = model.transform(images)
    model.backbone(batch.tensors)
    model.eval()
    features = model.backbone(batch.tensors)
    logits, _ = model.rpn.head(list(features.values()))
    model.rpn.head.cls_logits.weight /= torch.cat([x.flatten() for x in logits]).std()
    proposals, _ = model.rpn(batch, features)
    heads = model.roi_heads
    scores, _ = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, proposals, batch.image_sizes)))
    heads.box_predictor.cls_score.weight *= CLASS_STD / scores.std()
    some = [boxes[:20] for boxes in proposals]
    masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, some, batch.image_sizes)))
    heads.mask_predictor.mask_fcn_logits.weight *= MASK_STD / masks.std()


def problem_of(check: Callable[[], None]) -> str | None:
    """The message of the AssertionError that `check` raises, or None."""
    try:
        check()
    except AssertionError as error:
        return str(error)
    return None
