"""Packed masks from the file to the batch equal byte masks bit for bit, and need less memory."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional._utils import _KERNEL_REGISTRY
from torchvision.tv_tensors import Mask

from tests.allocations import peak_allocated
from tests.data.conftest import coco, polygon, write_coco
from tests.model.conftest import TRANSFORM
from tmask.data.coco import CocoDataset
from tmask.data.transforms import JointTransform, PackedMasks, train_transforms
from tmask.model import transform
from tmask.model.transform import ImageTransform
from tmask_kernels import pack_masks

ALL = {"hflip": 0.5, "vflip": 0.5, "min_crop": 0.5, "min_sizes": (40, 50, 64)}


def image_transform(side: int) -> ImageTransform:
    return dataclasses.replace(TRANSFORM, min_size=side, max_size=1344)


def crowded(folder: Path, count: int, height: int, width: int) -> tuple[Path, Path]:
    """One image with `count` polygons, run lengths and compressed run lengths in turn."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (width, height), (9, 60, 200)).save(folder / "images" / "0.png")
    annotations = []
    for k, (x, y, w, h) in enumerate(np.random.default_rng(0).uniform(0.05, 0.2, (count, 4)) * ([width, height] * 2)):
        form: Any = polygon(x * 3, y * 3, w, h)
        run = coco_mask.frPyObjects(form, height, width)[0]
        if k % 3 == 1:
            edges = np.flatnonzero(np.diff(coco_mask.decode(run).ravel(order="F"), prepend=0, append=2))
            form = {"size": [height, width], "counts": np.diff(edges, prepend=0).tolist()}
        elif k % 3 == 2:
            form = {"size": [height, width], "counts": run["counts"].decode()}
        annotations.append({"bbox": [x * 3, y * 3, w, h], "segmentation": form})
    return write_coco(folder, coco([("0.png", width, height)], annotations))


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transform._PIXELS_AT_ONCE, "cpu", 3 * 40 * 70)


def assert_same_item(packed: tuple[Tensor, dict[str, Any]], dense: tuple[Tensor, dict[str, Any]]) -> None:
    assert torch.equal(packed[0], dense[0])
    assert packed[1].keys() == dense[1].keys()
    masks = dense[1]["masks"]
    assert packed[1]["masks"].dtype == torch.int32
    assert packed[1]["masks"].shape == (*masks.shape[:2], -(-masks.shape[2] // 32))
    assert torch.equal(packed[1]["masks"], pack_masks(masks))
    for name in packed[1].keys() - {"masks"}:
        a, b = torch.as_tensor(packed[1][name]), torch.as_tensor(dense[1][name])
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.mark.usefixtures("few_at_once")
def test_a_seed_gives_the_items_and_batches_of_byte_masks(tmp_path: Path) -> None:
    files = crowded(tmp_path, 11, 40, 70)
    sets = [CocoDataset(*files, packed_masks=packed) for packed in (True, False)]
    assert_same_item(sets[0][0], sets[1][0])
    assert sets[0][0][1]["has_mask"].all()
    moved, sizes = 0, set()
    for dataset in sets:
        dataset.transforms = train_transforms(**ALL)
    for seed in range(12):
        items = []
        for dataset in sets:
            torch.manual_seed(seed)
            items.append(dataset[0])
        assert_same_item(*items)
        moved += len(items[0][1]["boxes"]) < 11
        sizes.add(items[0][1]["min_size"])
        batches = [image_transform(48)([image], [target]) for image, target in items]
        for a, b in zip((*batches[0][0], *batches[0][1]), (*batches[1][0], *batches[1][1]), strict=True):
            assert a is b is None or torch.equal(a, b)
    assert moved, "no crop dropped an instance"
    assert sizes == set(ALL["min_sizes"])  # type: ignore[call-overload]


@pytest.mark.parametrize("side", [40, 64], ids=["same size", "resized"])
def test_chunks_do_not_show(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = torch.rand(7, 40, 70) > 0.5
    target = {"boxes": torch.tensor([[3.0, 4.0, 60.0, 30.0]] * 7), "labels": torch.arange(1, 8), "masks": masks}
    whole = image_transform(side)([torch.rand(3, 40, 70)], [target])[1]
    monkeypatch.setitem(transform._PIXELS_AT_ONCE, "cpu", 3 * side**2)
    parts = image_transform(side)([torch.rand(3, 40, 70)], [target])[1]
    assert torch.equal(whole.masks, parts.masks)  # type: ignore[union-attr,arg-type]
    assert whole.masks.flatten(2).any(2).all()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("count", "height", "width", "resident"),
    [(250, 256, 256, 2_048_000), pytest.param(100, 800, 1344, 13_440_000, marks=pytest.mark.slow)],
    ids=["250 of 256 x 256", "100 of 800 x 1344"],
)
def test_memory(tmp_path: Path, count: int, height: int, width: int, resident: int) -> None:
    """The whole path, image included, takes less than byte masks alone (16 and 108 MB) would."""
    dataset = CocoDataset(*crowded(tmp_path, count, height, width), packed_masks=True)
    dataset.transforms = train_transforms(1.0, 1.0)

    def batch() -> Any:
        image, target = dataset[0]
        return image_transform(min(height, width))([image], [target])[1]

    with peak_allocated() as peak:
        targets = batch()
    assert targets.masks.nbytes == resident == count * height * width // 8
    # numpy's, which PyTorch does not see: the decoded masks of one chunk.
    assert resident < peak.bytes + transform._PIXELS_AT_ONCE["cpu"] < {256: 14, 800: 72}[height] * 10**6


MOVES: dict[str, Callable[[], Any]] = {
    "resize": lambda: v2.Resize((33, 50)),
    "rotation": lambda: v2.RandomRotation(30),
    "affine": lambda: v2.RandomAffine(20, (0.1, 0.1)),
    "perspective": lambda: v2.RandomPerspective(p=1.0),
    "zoom out": lambda: v2.RandomZoomOut(p=1.0),
    "resized crop": lambda: v2.RandomResizedCrop((31, 47)),
    "center crop": lambda: v2.CenterCrop(20),
    "elastic": lambda: v2.ElasticTransform(),
    "colour": lambda: v2.ColorJitter(0.5),
}


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize("name", MOVES)
def test_other_transforms_move_bits_as_they_move_bytes(name: str) -> None:
    masks = (torch.rand(7, 40, 70) > 0.6).byte()
    image, boxes = torch.randint(0, 256, (3, 40, 70), dtype=torch.uint8), torch.tensor([[3.0, 4.0, 60.0, 30.0]] * 7)
    items = []
    for given in (pack_masks(masks), masks):
        torch.manual_seed(3)
        items.append(JointTransform(MOVES[name]())(image, {"boxes": boxes, "masks": given}))
    assert_same_item(*items)


def test_no_transform_passes_packed_masks_by() -> None:
    """Whatever has a rule for torchvision's masks needs one for ours: without, v2 leaves them as they are."""
    moving = {function for function, known in _KERNEL_REGISTRY.items() if Mask in known}
    ours = {function for function, known in _KERNEL_REGISTRY.items() if PackedMasks in known}
    assert {function.__name__ for function in moving - ours} <= {"get_size", "to_dtype", "five_crop", "ten_crop"}
    assert F.horizontal_flip in ours


def test_without_instances(content: dict[str, Any], write: Callable[[object], tuple[Path, Path]]) -> None:
    dataset = CocoDataset(*write(content), transforms=train_transforms(1, 1, min_crop=0.5), packed_masks=True)
    image, target = dataset[1]
    assert target["masks"].shape == (0, image.shape[1], 1)
    _, targets = image_transform(64)([image], [target])
    assert targets is not None
    assert not targets.valid.any()


def test_a_file_of_width_1_and_wrong_widths() -> None:
    """32 words are not taken for 32 pixels; one pixel a row reads alike in both forms."""
    target = {"boxes": torch.tensor([[0.0, 0.0, 1.0, 9.0]]), "labels": torch.tensor([1])}
    masks = torch.ones(1, 9, 1, dtype=torch.uint8)
    both = [image_transform(32)([torch.rand(3, 9, 1)], [target | {"masks": m}])[1] for m in (masks, pack_masks(masks))]
    assert torch.equal(both[0].masks, both[1].masks)  # type: ignore[union-attr,arg-type]
    with pytest.raises(ValueError, match=r"\['masks'\]: expected shape \(1, 9, 40\), got \(1, 9, 1\)"):
        image_transform(32)([torch.rand(3, 9, 40)], [target | {"masks": pack_masks(masks)}])
