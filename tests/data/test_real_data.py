"""Loading of real annotations; needs the folder that TMASK_DATA names."""

import json

import pytest
import torch

from tmask.data.coco import CocoDataset
from tmask.data.loader import make_loader
from tmask.data.transforms import train_transforms
from tmask.engine.detect import coco_results
from tmask.engine.evaluate import coco_metrics
from tmask.model.transform import ImageTransform
from tmask.skeleton import PERSON
from tmask_kernels import pack_masks, unpack_masks

SETS = [
    ("nuclei", "train", 363, 11_585, 1),
    ("nuclei", "val", 96, 2_638, 1),
    ("coco-mini", "train", 65, 718, 80),
    ("coco-mini", "val", 24, 199, 80),
]


def load(folder, name, split, transforms=None):
    return CocoDataset(folder / name / "images", folder / name / f"instances_{split}.json", transforms=transforms)


@pytest.mark.parametrize(("name", "split", "images", "instances", "classes"), SETS, ids=lambda v: str(v))
def test_sets_load_whole(real_data, name, split, images, instances, classes):
    dataset = load(real_data, name, split)
    assert len(dataset) == images
    assert len(dataset.coco.anns) == instances
    assert dataset.num_classes == classes + 1


@pytest.mark.parametrize(("name", "split"), [("nuclei", "val"), ("coco-mini", "train"), ("coco-mini", "val")])
def test_masks_equal_those_of_pycocotools(real_data, name, split):
    dataset = load(real_data, name, split)
    crowds = 0
    for i in range(0, len(dataset), 4):
        image, target = dataset[i]
        height, width = image.shape[1:]
        annotations = dataset.coco.imgToAnns[target["image_id"]]
        masks = torch.stack([torch.from_numpy(dataset.coco.annToMask(item)) for item in annotations])
        assert torch.equal(target["masks"], masks)
        packed = pack_masks(target["masks"])
        assert unpack_masks(packed, width).sum((1, 2)).tolist() == masks.sum((1, 2)).tolist()
        assert target["iscrowd"].tolist() == [bool(item["iscrowd"]) for item in annotations]
        assert [dataset.category_ids[label - 1] for label in target["labels"].tolist()] == [
            item["category_id"] for item in annotations
        ]
        x1, y1, x2, y2 = target["boxes"].unbind(1)
        assert ((x1 >= 0) & (y1 >= 0) & (x2 <= width) & (y2 <= height) & (x2 > x1) & (y2 > y1)).all()
        crowds += int(target["iscrowd"].sum())
    assert name == "nuclei" or split == "val" or crowds


@pytest.mark.parametrize("name", ["nuclei", "coco-mini"])
def test_flips_keep_every_area(real_data, name):
    plain, flipped = load(real_data, name, "val"), load(real_data, name, "val", train_transforms(1.0, 1.0))
    for i in range(0, len(plain), 7):
        before, after = plain[i][1], flipped[i][1]
        assert after["masks"].sum((1, 2)).tolist() == before["masks"].sum((1, 2)).tolist()
        area = [(t["boxes"][:, 2:] - t["boxes"][:, :2]).prod(1) for t in (before, after)]
        torch.testing.assert_close(area[1], area[0], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("name", "side"), [("nuclei", 256), ("coco-mini", 320)])
def test_batches_of_real_images(real_data, name, side):
    dataset = load(real_data, name, "val", train_transforms(0.5, 0.0))
    transform = ImageTransform(
        num_classes=dataset.num_classes, min_size=side, max_size=2 * side, image_mean=(0.5, 0.5, 0.5),
        image_std=(0.25, 0.25, 0.25), size_divisible=32, antialias=True, mask_resize="bilinear", keep_crowds=True,
    )  # fmt: skip
    loader = make_loader(dataset, transform, batch_size=4, shuffle=True, aspect_grouping=True, num_workers=1)
    shown = []
    for batch in loader:
        n, _, height, width = batch.images.tensor.shape
        shown += batch.image_ids
        assert height % 32 == width % 32 == 0
        assert batch.images.tensor.isfinite().all()
        assert batch.targets.masks.shape[-2:] == (height, width // 32)
        inside = unpack_masks(batch.targets.masks, width)
        for k in range(n):
            h, w = batch.images.sizes[k].tolist()
            assert not inside[k, :, h:].any()
            assert not inside[k, :, :, w:].any()
    assert sorted(shown) == sorted(record["id"] for record in dataset.images)


@pytest.mark.parametrize(("split", "images", "persons", "known"), [("train", 13, 66, 33), ("val", 3, 16, 6)])
def test_keypoints_of_persons(real_data, split, images, persons, known):
    """Loaded as they stand in the file; and as results of their own they are all found."""
    path = real_data / "coco-mini" / f"person_keypoints_{split}.json"
    annotations = json.loads(path.read_text())["annotations"]
    dataset = CocoDataset(real_data / "coco-mini" / "images", path)
    assert (len(dataset), len(dataset.coco.anns), dataset.num_classes) == (images, persons, 2)
    assert len({item["image_id"] for item in annotations}) == images
    assert (dataset.keypoint_names, set(dataset.keypoint_edges)) == (PERSON.names, set(PERSON.edges))
    results, mirrored = [], []
    for i in range(images):
        _, target = dataset[i]
        own = [item for item in annotations if item["image_id"] == target["image_id"]]
        stored = torch.tensor([item["keypoints"] for item in own]).view(-1, 17, 3)
        assert torch.equal(target["keypoints"], stored + torch.tensor([0.5, 0.5, 0]))
        rows = target["keypoints"][..., 2].any(1)  # a person without keypoints is nothing to find
        assert rows.tolist() == [item["num_keypoints"] > 0 for item in own]
        result = {name: target[name][rows] for name in ("boxes", "labels", "keypoints")}
        result |= {"scores": torch.ones(len(result["labels"])), "keypoints_scores": result["keypoints"][..., 2]}
        result["masks"] = [{"size": target["masks"].shape[1:], "counts": ""}] * len(result["labels"])
        results += coco_results(target["image_id"], result, dataset.category_ids)
        result["keypoints"] = result["keypoints"][:, list(PERSON.flip_order)]
        mirrored += coco_results(target["image_id"], result, dataset.category_ids)
    assert len(results) == known
    metrics, wrong = (
        coco_metrics(dataset.coco.dataset, found, kinds=["keypoints"], keypoint_sigmas=PERSON.sigmas)
        for found in (results, mirrored)
    )
    assert [metrics[f"keypoints/{name}"] for name in ("AP", "AP50", "AR")] == pytest.approx([1, 1, 1])
    assert wrong["keypoints/AP"] < 0.5  # left is not right
