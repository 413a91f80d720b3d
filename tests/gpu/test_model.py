"""The whole detector on a GPU: as on the CPU, without waiting, in a graph, on another device, compiled."""

from contextlib import AbstractContextManager
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import tmask
from tests.gpu.tools import counting_waits, need_cuda, recorded, to, waiting_is_an_error
from tests.kernels.tools import assert_close_gradient, tensors
from tests.model.conftest import KEYPOINTS, VARIANTS, images_and_targets, padded, small
from tests.model.test_losses import FOCAL, WEIGHTS, head_inputs
from tmask.data.loader import Batch
from tmask.engine.detect import detect as coco_detections
from tmask.model import losses
from tmask.structures import Detections, ImageBatch, Targets
from tmask_kernels.testing import Tolerance, assert_close

pytestmark = pytest.mark.gpu

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# A sum of thousands of products in another order, layer after layer.
LAYERS = Tolerance(max=1e-3, rms=1e-4)


def build(full: bool, device: torch.device) -> tmask.MaskRCNN:
    """R50-FPN with random weights, which batch norm keeps in bounds; in a rehearsal a tiny one."""
    torch.manual_seed(0)
    scratch: dict[str, Any] = {"norm": "bn", "trainable_layers": 5, "box_score_threshold": 0.0}
    model = tmask.build_model("r50_fpn", **scratch) if full else small()
    return model.to(device).to(memory_format=torch.channels_last)


def batch_of(model: tmask.MaskRCNN, full: bool, device: torch.device) -> tuple[ImageBatch, Targets]:
    """Two images of 800 x 1333 with 20 objects each; in a rehearsal the small ones of tests/model."""
    if not full:
        return to(padded(model), device)
    generator = torch.Generator().manual_seed(0)
    images, objects = [torch.rand(3, 800, 1333, generator=generator) for _ in range(2)], []
    for _ in range(2):
        corner = torch.rand(20, 2, generator=generator) * torch.tensor([1000.0, 500.0])
        boxes = torch.cat([corner, corner + 20 + torch.rand(20, 2, generator=generator) * 270], 1)
        y, x = torch.arange(800)[:, None], torch.arange(1333)
        x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
        masks = ((x >= x1) & (x < x2) & (y >= y1) & (y < y2)).to(torch.uint8)
        objects.append({"boxes": boxes, "labels": torch.randint(1, 81, (20,), generator=generator), "masks": masks})
    batch, targets = model.transform(images, objects)
    assert targets is not None
    return to((batch._replace(tensor=batch.tensor.contiguous(memory_format=torch.channels_last)), targets), device)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def step(model: tmask.MaskRCNN, batch: tuple[ImageBatch, Targets], precision: str, device: torch.device) -> Tensor:
    with autocast(precision, device):
        losses = model.train().forward_padded(*batch)
    assert isinstance(losses, dict)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    return total.detach()


@torch.no_grad()
def detect(model: tmask.MaskRCNN, images: ImageBatch, precision: str, device: torch.device) -> Detections:
    with autocast(precision, device):
        found = model.eval().forward_padded(images)
    assert isinstance(found, Detections)
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_never_waits(mode: str, precision: str, full: bool, device: torch.device) -> None:
    model = build(full, device)
    batch = batch_of(model, full, device)

    def run() -> list[Tensor]:
        if mode == "train":
            return [step(model, batch, precision, device)]
        return tensors(detect(model, batch[0], precision, device))

    run()  # kernels compile
    with waiting_is_an_error(device):
        out = run()
    assert precision == "fp16" or all(t.isfinite().all() for t in out)  # untrained weights may overflow it
    if mode == "train":
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_transform_of_bytes_never_waits(full: bool, device: torch.device) -> None:
    """Of floats and of targets it reads the values once."""
    model = build(full, device)
    images = [torch.randint(0, 256, (3, 60, side), dtype=torch.uint8).to(device) for side in (80, 100)]
    model.transform(images)
    with waiting_is_an_error(device):
        batch, _ = model.transform(images)
    assert batch.sizes.device.type == device.type


WIDE: dict[str, Any] = {**VARIANTS["transfer"], "box_head_dim": 1024, "mask_head_channels": 256}


@pytest.mark.parametrize("name", [*VARIANTS, "wide transfer"])
def test_variants_never_wait(name: str, full: bool, device: torch.device) -> None:
    if name == "wide transfer" and not full:
        pytest.skip("a rehearsal is small")
    model = small(**{**VARIANTS, "wide transfer": WIDE}[name])
    images, targets = to(padded(model), device)
    model, trained = model.to(device), model.parameters()
    if "transfer" in name:
        targets = targets._replace(has_mask=targets.labels == 1)
        trained = model.roi_heads.mask_transfer.parameters()
    step(model, (images, targets), "bf16", device)  # kernels compile
    detect(model, images, "bf16", device)
    with waiting_is_an_error(device):
        loss, found = step(model, (images, targets), "bf16", device), detect(model, images, "bf16", device)
    assert loss.isfinite()
    assert all(t.isfinite().all() for t in tensors(found))
    gradients = [p.grad for p in trained if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("class_loss", get_args(losses.ClassLoss))
@pytest.mark.parametrize("box_loss", get_args(losses.BoxLoss))
def test_losses_of_the_box_head_equal_the_cpu(
    box_loss: losses.BoxLoss, class_loss: losses.ClassLoss, device: torch.device
) -> None:
    """And their gradients. Both sides are float32, with other exponentials and arc tangents."""
    inputs = head_inputs(columns=4 - (class_loss == "sigmoid_focal"))
    with torch.no_grad():
        inputs["deltas"][0, 1] = -200.0  # sides that round to 0
    found = []
    for where in (device, torch.device("cpu")):
        x = {k: v.detach().to(where).requires_grad_(v.requires_grad) for k, v in inputs.items()}
        both = losses.box_losses(**x, class_loss=class_loss, focal=FOCAL, box_loss=box_loss, weights=WEIGHTS)
        found.append([*both, *torch.autograd.grad(both[0] + both[1], [x["class_logits"], x["deltas"]])])
    for got, expected in zip(*found, strict=True):
        assert_close_gradient(got.detach().cpu(), expected.detach(), tolerance=Tolerance(max=1e-4, rms=1e-5))


def assert_nearly_all(got: Tensor, expected: Tensor) -> None:
    """Boxes [N, D, 4] wherever they stand, since scores of random weights nearly tie, and but for a few that a score
    or an overlap at a threshold has moved out."""
    near = (torch.cdist(expected, got, p=torch.inf) < 0.1).any(-1)
    assert near.float().mean() > 0.9


def assert_same_detections(got: Detections, expected: Detections) -> None:
    """As from another order of sums."""
    assert_close(got.counts, expected.counts)
    assert_close(got.scores, expected.scores, tolerance=LAYERS)
    assert_nearly_all(got.boxes, expected.boxes)


@pytest.mark.parametrize("op", ["roi_align", "roi_pool"])
def test_equals_the_cpu(op: str, device: torch.device) -> None:
    """A small model in float32, stage by stage, since one box at a threshold would change all that follows."""
    model = small(roi_extractor={"op": op}).eval()
    images, targets = padded(model)
    with torch.no_grad():
        features = model.fpn(list(model.backbone(images.tensor).values()))
        proposals, _ = model.rpn(features, images, None)
        found = model.roi_heads.detect(features[:-1], proposals, images, compact=False)
        rpn_losses = model.rpn._losses(*model.rpn.head(features), images.tensor.shape[-2:], targets)
        model, images, targets = model.to(device), to(images, device), to(targets, device)
        features_there = model.fpn(list(model.backbone(images.tensor).values()))
        for got, expected in zip(features_there, features, strict=True):
            assert_close(got.cpu(), expected, tolerance=LAYERS)
        features = to(features, device)
        own, _ = model.rpn(features, images, None)
        assert_close(own.scores.cpu(), proposals.scores, tolerance=LAYERS)
        assert_nearly_all(own.boxes.cpu(), proposals.boxes)
        own = model.roi_heads.detect(features[:-1], to(proposals, device), images, compact=False)
        assert_same_detections(to(own, torch.device("cpu")), found)
        assert own.masks is not None
        assert ((own.masks >= 0) & (own.masks <= 1)).all()
        # The sampler draws from the device's own generator: only the names and the order of size agree.
        there = model.rpn._losses(*model.rpn.head(features), images.tensor.shape[-2:], targets)
    assert there.keys() == rpn_losses.keys()
    for name, loss in there.items():
        assert 0.2 < float(loss) / float(rpn_losses[name]) < 5, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inference_replays_from_a_graph(precision: str, full: bool, device: torch.device) -> None:
    model = build(full, device)
    images, _ = batch_of(model, full, device)

    def run() -> Detections:
        # Weights cast inside the capture would live in the graph's memory and be reused outside of it.
        torch.set_autocast_cache_enabled(False)
        try:
            return detect(model, images, precision, device)
        finally:
            torch.set_autocast_cache_enabled(True)

    replay = recorded(run, device)
    images.tensor.copy_(images.tensor.flip(0).flip(3))
    images.sizes.copy_(images.sizes.flip(0))
    expected = to(run(), device)
    assert (expected.counts > 0).all()
    assert_same_detections(replay(), expected)


def test_the_familiar_contract(full: bool, device: torch.device) -> None:
    """Lists in, lists out, masks pasted on the GPU in each form."""
    model = build(full, device).eval()
    images = [torch.rand(3, 90, 120, device=device), torch.rand(3, 70, 61, device=device)]
    for masks in ("probability", "bool", "rle"):
        with torch.no_grad():
            results = model(images, masks=masks)
        for image, result in zip(images, results, strict=True):
            count = len(result["scores"])
            assert count > 0
            assert {result[name].device.type for name in ("boxes", "scores", "labels")} == {device.type}
            if masks == "rle":
                assert [mask["size"] for mask in result["masks"]] == [list(image.shape[1:])] * count
            else:
                assert result["masks"].shape[-2:] == image.shape[1:]
                assert result["masks"].device.type == device.type
    found = model.train()(*to(images_and_targets(), device))
    assert all(loss.isfinite() for loss in found.values())


@pytest.mark.parametrize("keypoints", [False, True], ids=["masks", "keypoints"])
def test_evaluation_waits_as_often_for_a_batch_as_for_an_image(
    full: bool, keypoints: bool, device: torch.device
) -> None:
    """Counts, run lengths (twice) and a field of the results each, and what else there is: none of it grows with N."""
    model = build(full, device).eval()
    if keypoints:
        model = small(keypoints=KEYPOINTS).to(device).eval()
    found: dict[int, int] = {}
    for count in (1, 3, 1, 3) if device.type == "cuda" else (1, 3):  # kernels compile in the first rounds
        images = [torch.rand(3, 60 + 10 * i, 90) for i in range(count)]
        batch, _ = model.transform(images)
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        loader = [Batch(batch, None, list(range(count)), sizes)]  # type: ignore[arg-type]
        with counting_waits(device) as waits:
            results = coco_detections(model, loader, range(1, model.config.num_classes), device=device)
        assert {one["image_id"] for one in results} == set(range(count))
        found[count] = len(waits)
    need_cuda(device, "sync debug mode")
    assert found[1] == found[3] > 0


def test_works_on_a_device_that_is_not_the_current_one(full: bool, device: torch.device) -> None:
    model = build(full, device)
    batch = batch_of(model, full, device)
    assert step(model, batch, "fp32", device).isfinite()
    need_cuda(device, "second device")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1)
    assert step(model.to(other), to(batch, other), "bf16", other).device == other
    assert {t.device for t in tensors(detect(model, to(batch[0], other), "bf16", other))} == {other}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_compiles_to_one_graph(mode: str, full: bool, device: torch.device) -> None:
    need_cuda(device, "inductor backend for Triton kernels")
    model = build(full, device).train(mode == "train")
    batch = batch_of(model, full, device)
    compiled = torch.compile(model.forward_padded, fullgraph=True)
    if mode == "train":
        losses = compiled(*batch)
        torch.stack(list(losses.values())).sum().backward()
        assert all(loss.isfinite() for loss in losses.values())
        return
    with torch.no_grad():
        assert_same_detections(compiled(batch[0]), detect(model, batch[0], "fp32", device))
