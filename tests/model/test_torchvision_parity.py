"""torchvision's Mask R-CNN and ours with the same weights, stage by stage: equal inputs must have equal outputs.

The weights are random. Running statistics of the batch norms are measured on the images, and the logits scaled, so that
activations, scores and the number of detections are those of a trained model.
"""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn

import tmask
from tmask.data.coco import CocoDataset
from tmask.model.sampling import Sample
from tmask.structures import Detections, Proposals
from tmask_kernels import unpack_masks

SMALL = {"min_size": 192, "max_size": 320}
SCORE_THRESHOLD = 0.05  # both libraries' default


@dataclass
class Pair:
    theirs: nn.Module
    ours: tmask.MaskRCNN
    images: list[Tensor]
    targets: list[dict[str, Tensor]]

    def mode(self, training: bool) -> "Pair":
        self.theirs.train(training)
        self.ours.train(training)
        return self


def generated() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two blurred-noise images of odd sizes with three and two ellipses."""
    generator = torch.Generator().manual_seed(3)
    images, targets = [], []
    for height, width, count in ((185, 271, 3), (240, 163, 2)):
        noise = torch.rand(1, 3, height // 8, width // 8, generator=generator)
        images.append(F.interpolate(noise, size=(height, width), mode="bicubic")[0].clamp(0, 1))
        centre = torch.rand(count, 2, generator=generator) * 0.5 + 0.25
        half = torch.rand(count, 2, generator=generator) * 0.15 + 0.08
        boxes = torch.cat([centre - half, centre + half], 1) * torch.tensor([width, height, width, height])
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
        inside = ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1
        targets.append({"boxes": boxes, "labels": torch.arange(1, count + 1), "masks": inside.to(torch.uint8)})
    return images, targets


def real(folder: Any, split: str, count: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """The first images of coco-mini, crowds left out as torchvision's own training does."""
    dataset = CocoDataset(folder / "coco-mini/images", folder / f"coco-mini/instances_{split}.json")
    images, targets = [], []
    for i in range(min(count, len(dataset))):
        image, target = dataset[i]
        keep = ~target["iscrowd"]
        images.append(image.float() / 255)
        targets.append({name: target[name][keep] for name in ("boxes", "labels", "masks")})
    return images, targets


def make_pair(
    images: list[Tensor], targets: list[dict[str, Tensor]], build: Any = maskrcnn_resnet50_fpn, **settings: int
) -> Pair:
    torch.manual_seed(0)
    theirs = build(weights=None, weights_backbone=None, **settings)
    calibrate(theirs, images[:4])
    ours = tmask.load_torchvision(theirs.state_dict(), **settings)
    for module in [*theirs.modules(), *ours.modules()]:
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # training steps leave the statistics as they are: tests share a pair
    return Pair(theirs, ours, images, targets)


@torch.no_grad()
def calibrate(model: Any, images: list[Tensor]) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain average over what it sees
    model.train()
    batch, _ = model.transform(images)
    features = model.backbone(batch.tensors)
    model.eval()
    features = model.backbone(batch.tensors)
    logits, _ = model.rpn.head(list(features.values()))
    model.rpn.head.cls_logits.weight /= torch.cat([x.flatten() for x in logits]).std()
    proposals, _ = model.rpn(batch, features)
    heads = model.roi_heads
    scores, _ = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, proposals, batch.image_sizes)))
    heads.box_predictor.cls_score.weight *= 1.5 / scores.std()


@pytest.fixture(scope="module", params=["generated", pytest.param("coco-mini", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest) -> Pair:
    if request.param == "generated":
        return make_pair(*generated(), **SMALL)
    return make_pair(*real(request.getfixturevalue("real_data"), "val", 2), **SMALL)


def close(ours: Tensor, theirs: Tensor, relative: float = 1e-5) -> None:
    """Equal within `relative` of the largest value: the two may sum in another order."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=relative * max(1.0, float(theirs.abs().max())))


# ---- stage by stage


def test_transform(pair: Pair) -> None:
    theirs, their_targets = pair.theirs.transform(pair.images, copy.deepcopy(pair.targets))
    ours, our_targets = pair.ours.transform(pair.images, pair.targets)
    assert our_targets is not None
    assert torch.equal(ours.tensor, theirs.tensors)
    assert [tuple(size) for size in ours.sizes.tolist()] == theirs.image_sizes
    for i, target in enumerate(their_targets):
        count = len(target["boxes"])
        height, width = theirs.image_sizes[i]
        assert torch.equal(our_targets.boxes[i, :count], target["boxes"])
        assert torch.equal(our_targets.labels[i, :count], target["labels"])
        assert our_targets.masks is not None
        masks = unpack_masks(our_targets.masks[i], theirs.tensors.shape[-1])
        assert torch.equal(masks[:count, :height, :width], target["masks"].bool())
        assert not masks[count:].any()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_features(pair: Pair, training: bool) -> None:
    pair.mode(training)
    batch, _ = pair.ours.transform(pair.images)
    with torch.no_grad():
        ours = pair.ours.fpn(list(pair.ours.backbone(batch.tensor).values()))
        theirs = list(pair.theirs.backbone(batch.tensor).values())
    assert len(ours) == len(theirs) == 5
    for level in range(5):
        close(ours[level], theirs[level])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_proposals(pair: Pair, training: bool) -> None:
    pair.mode(training)
    batch, _ = pair.theirs.transform(pair.images)
    padded, padded_targets = pair.ours.transform(pair.images, pair.targets)
    with torch.no_grad():
        features = pair.theirs.backbone(batch.tensors)  # the same for both
        truth = [{"boxes": target["boxes"]} for target in pair.targets] if training else None
        theirs, _ = pair.theirs.rpn(batch, features, truth)
        ours, _ = pair.ours.rpn(list(features.values()), padded, padded_targets if training else None)
    for i, boxes in enumerate(theirs):
        assert int(ours.counts[i]) == len(boxes) > 100
        # torchvision's sort is not stable: boxes of one score may have another order, but all must be there.
        scores = ours.scores[i, : len(boxes)]
        same_box = (ours.boxes[i, : len(boxes), None] - boxes).abs().amax(-1) < 1e-2  # [ours, theirs]
        tied = (scores[:, None] - scores).abs() < 1e-6
        assert (same_box & tied).any(0).all()
        assert (same_box & tied).any(1).all()
        assert same_box.diagonal().float().mean() > 0.99
        assert not ours.boxes[i, len(boxes) :].any()


class Recorder:
    """torchvision's sampler, keeping the labels it was given and the rows it drew."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.labels, self.positive, self.negative = [], [], []  # of each image

    def __call__(self, labels: list[Tensor]) -> Any:
        drawn = self.sampler(labels)
        self.labels = list(labels)
        self.positive, self.negative = ([mask.nonzero()[:, 0] for mask in masks] for masks in drawn)
        return drawn


@dataclass
class Replay:
    """Our sampler making the recorded choice. Checks first that both libraries labelled the candidates alike.

    Of RoIs, `proposals` are theirs and `ours` the same boxes, padded and maybe in another order where scores are equal;
    the ground truth follows in both.
    """

    record: Recorder
    proposals: list[Tensor] | None = None
    ours: list[Proposals] | None = None

    def rows(self, i: int, theirs: Tensor) -> Tensor:
        if self.proposals is None or self.ours is None:
            return theirs
        boxes, own = self.proposals[i], self.ours[0].boxes[i, : int(self.ours[0].counts[i])]
        distance = torch.cdist(boxes, own, p=torch.inf)
        assert float(distance.amin(1).max()) < 1e-2
        truth = torch.arange(len(self.record.labels[i]) - len(boxes)) + self.ours[0].boxes.shape[1]
        return torch.cat([distance.argmin(1), truth])[theirs]

    def __call__(self, positive: Tensor, negative: Tensor, *, size: int, positive_fraction: float) -> Sample:
        rows = torch.zeros(len(positive), size, dtype=torch.int64)
        is_positive, valid = torch.zeros_like(rows, dtype=torch.bool), torch.zeros_like(rows, dtype=torch.bool)
        for i, labels in enumerate(self.record.labels):
            own = self.rows(i, torch.arange(len(labels)))
            assert torch.equal(positive[i, own], labels > 0)
            assert torch.equal(negative[i, own], labels == 0)
            drawn = torch.cat([self.rows(i, self.record.positive[i]), self.rows(i, self.record.negative[i])])
            rows[i, : len(drawn)] = drawn
            is_positive[i, : len(self.record.positive[i])] = True
            valid[i, : len(drawn)] = True
        assert is_positive.any(1).all()
        assert is_positive.sum(1).max() <= int(size * positive_fraction)
        return Sample(rows, is_positive, valid)


def replay(pair: Pair, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The losses of both models, ours on torchvision's sample of anchors and RoIs."""
    theirs, ours = pair.theirs, pair.ours
    anchors, rois = Recorder(theirs.rpn.fg_bg_sampler), Recorder(theirs.roi_heads.fg_bg_sampler)
    proposals: list[Tensor] = []
    padded: list[Proposals] = []
    hooks = [
        theirs.rpn.register_forward_hook(lambda module, args, out: proposals.extend(out[0])),
        ours.rpn.register_forward_hook(lambda module, args, out: padded.append(out[0])),
    ]
    samplers = ours.rpn.sampler, ours.roi_heads.sampler
    theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler = anchors, rois
    try:
        torch.manual_seed(seed)
        their_losses = theirs(pair.images, copy.deepcopy(pair.targets))
        ours.rpn.sampler = Replay(anchors)
        ours.roi_heads.sampler = Replay(rois, proposals, padded)
        our_losses = ours(pair.images, pair.targets)
    finally:
        for hook in hooks:
            hook.remove()
        theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler = anchors.sampler, rois.sampler
        ours.rpn.sampler, ours.roi_heads.sampler = samplers
    assert isinstance(our_losses, dict)
    return our_losses, their_losses


def assert_same_losses(pair: Pair) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    ours, theirs = replay(pair.mode(True))
    assert ours.keys() == theirs.keys()
    for name, loss in theirs.items():
        assert float(loss.detach()) > 1e-4, f"{name}: the comparison would say nothing"
        torch.testing.assert_close(ours[name], loss, rtol=1e-4, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    return ours, theirs


# A parameter of each stage.
PARAMETERS = {
    "backbone.layer4.2.conv3.weight": "backbone.body.layer4.2.conv3.weight",
    "fpn.lateral.0.weight": "backbone.fpn.inner_blocks.0.0.weight",
    "rpn.head.deltas.weight": "rpn.head.bbox_pred.weight",
    "roi_heads.box_head.regressor.weight": "roi_heads.box_predictor.bbox_pred.weight",
    "roi_heads.mask_head.deconv.weight": "roi_heads.mask_predictor.conv5_mask.weight",
}


def test_losses_and_gradients_of_the_same_sample(pair: Pair) -> None:
    ours, theirs = assert_same_losses(pair)
    own = [pair.ours.get_parameter(name) for name in PARAMETERS]
    other = [pair.theirs.get_parameter(name) for name in PARAMETERS.values()]
    gradients = torch.autograd.grad(sum(ours.values()), own), torch.autograd.grad(sum(theirs.values()), other)  # type: ignore[arg-type]
    for name, our_grad, their_grad in zip(PARAMETERS, *gradients, strict=True):
        assert float((our_grad - their_grad).norm() / their_grad.norm()) < 1e-3, name


def test_detections_of_the_same_features(pair: Pair) -> None:
    pair.mode(False)
    batch, _ = pair.theirs.transform(pair.images)
    padded, _ = pair.ours.transform(pair.images)
    with torch.no_grad():
        features = pair.theirs.backbone(batch.tensors)
        proposals, _ = pair.theirs.rpn(batch, features)
        theirs, _ = pair.theirs.roi_heads(features, proposals, batch.image_sizes)
        slots = max(len(boxes) for boxes in proposals)
        boxes = torch.stack([F.pad(boxes, (0, 0, 0, slots - len(boxes))) for boxes in proposals])
        counts = torch.tensor([len(boxes) for boxes in proposals])
        ours = pair.ours.roi_heads.detect(
            list(features.values())[:-1], Proposals(boxes, boxes[..., 0], counts), padded, compact=False
        )
    assert isinstance(ours, Detections)
    assert ours.masks is not None
    for i, result in enumerate(theirs):
        count = len(result["boxes"])
        assert int(ours.counts[i]) == count > 50
        assert torch.equal(ours.labels[i, :count], result["labels"])
        close(ours.scores[i, :count], result["scores"])
        close(ours.boxes[i, :count], result["boxes"])
        close(ours.masks[i, :count], result["masks"][:, 0], relative=1e-4)


def assert_same_results(pair: Pair) -> None:
    """In original pixels; pasted masks as probabilities, to the pixel."""
    pair.mode(False)
    with torch.no_grad():
        results = zip(pair.images, pair.theirs(pair.images), pair.ours(pair.images), strict=True)
    for image, result, own in results:
        assert own.keys() == result.keys()
        assert len(result["boxes"]) > 50
        assert torch.equal(own["labels"], result["labels"])
        close(own["boxes"], result["boxes"])
        close(own["scores"], result["scores"])
        if "masks" in result:
            assert own["masks"].shape == result["masks"].shape == (len(result["boxes"]), 1, *image.shape[1:])
            close(own["masks"], result["masks"], relative=1e-4)


def test_results_in_original_pixels(pair: Pair) -> None:
    assert_same_results(pair)


def test_a_detector_without_masks() -> None:
    """Losses of the same sample, and results in original pixels, of torchvision's Faster R-CNN."""
    images, targets = generated()
    targets = [{name: target[name] for name in ("boxes", "labels")} for target in targets]
    pair = make_pair(images, targets, fasterrcnn_resnet50_fpn, **SMALL)
    assert_same_losses(pair)
    assert_same_results(pair)


# ---- the whole model, as a user compares it


def check_whole(pair: Pair) -> None:
    """Compare the two models image by image, as a user sees them.

    Partners have one label, boxes within 0.01 px, scores within 1e-4, and masks with an IoU above 0.999 (but for pixels
    at the threshold). One detection of 200 may have no partner, if its score is at the threshold or the last of a list.
    """
    pair.mode(False)
    total = alone = 0
    for image in pair.images:
        with torch.no_grad():
            theirs, ours = pair.theirs([image])[0], pair.ours([image])[0]
        assert len(theirs["boxes"]) > 50
        same = theirs["labels"][:, None] == ours["labels"]  # [theirs, ours]
        same &= (theirs["boxes"][:, None] - ours["boxes"]).abs().amax(-1) <= 1e-2
        same &= (theirs["scores"][:, None] - ours["scores"]).abs() <= 1e-4
        for i, j in same.nonzero().tolist():
            mask, own = theirs["masks"][i] - 0.5, ours["masks"][j] - 0.5
            sure = (mask.abs() > 1e-5) & (own.abs() > 1e-5)
            union = int((sure & ((mask > 0) | (own > 0))).sum())
            assert not union or int((sure & (mask > 0) & (own > 0)).sum()) / union > 0.999
        lone = torch.cat([theirs["scores"][~same.any(1)], ours["scores"][~same.any(0)]])
        edges = torch.stack([torch.tensor(SCORE_THRESHOLD), theirs["scores"].min(), ours["scores"].min()])
        assert ((lone[:, None] - edges).abs().amin(1) < 1e-5).all()
        total, alone = total + len(theirs["boxes"]), alone + len(lone)
    assert alone <= 0.005 * total


@pytest.mark.slow
def test_whole_model_on_real_images_at_full_size(real_data: Any) -> None:
    """All images of coco-mini's val split at 800 x 1333."""
    check_whole(make_pair(*real(real_data, "val", 100)))


@pytest.mark.slow
@torch.no_grad()  # two graphs of this size would not fit into 24 GiB
def test_losses_of_real_images_at_full_size(real_data: Any) -> None:
    assert_same_losses(make_pair(*real(real_data, "train", 3)))


@pytest.mark.slow  # the comparison itself is not; this shows that it can fail
@pytest.mark.parametrize(
    "broken",
    [
        {"convention": "detectron2"},
        {"norm_eps": 1e-1},
        {"anchor_sizes": ((33.0,), (64.0,), (128.0,), (256.0,), (512.0,))},
        {"box_nms_threshold": 0.45},
    ],
    ids=lambda broken: next(iter(broken)),
)
def test_the_comparison_can_fail(pair: Pair, broken: dict[str, Any]) -> None:
    """A setting of another library, or one constant off, is seen."""
    other = tmask.load_torchvision(pair.theirs.state_dict(), **SMALL, **broken)
    with pytest.raises(AssertionError):
        check_whole(Pair(pair.theirs, other, pair.images[:1], pair.targets[:1]))
