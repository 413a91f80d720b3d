"""Loading of real annotations; needs the folder that TMASK_DATA names."""

import json

import pytest
import torch

from tmask.data.coco import CocoDataset
from tmask.engine.detect import coco_results
from tmask.engine.evaluate import coco_metrics
from tmask.skeleton import PERSON
from tmask_kernels import pack_masks, unpack_masks


@pytest.mark.parametrize(
    ("name", "split", "images", "instances", "classes"),
    [
        ("nuclei", "train", 363, 11_585, 1),
        ("nuclei", "val", 96, 2_638, 1),
        ("coco-mini", "train", 65, 718, 80),
        ("coco-mini", "val", 24, 199, 80),
    ],
)
def test_masks_equal_those_of_pycocotools(real_data, name, split, images, instances, classes):
    dataset = CocoDataset(real_data / name / "images", real_data / name / f"instances_{split}.json")
    assert (len(dataset), len(dataset.coco.anns), dataset.num_classes) == (images, instances, classes + 1)
    crowds = 0
    for i in range(0, len(dataset), 4 if images < 100 else 24):
        image, target = dataset[i]
        height, width = image.shape[1:]
        annotations = dataset.coco.imgToAnns[target["image_id"]]
        masks = torch.stack([torch.from_numpy(dataset.coco.annToMask(item)) for item in annotations])
        assert torch.equal(target["masks"], masks)
        packed = pack_masks(target["masks"])
        assert unpack_masks(packed, width).sum((1, 2)).tolist() == masks.sum((1, 2)).tolist()
        assert target["iscrowd"].tolist() == [bool(item["iscrowd"]) for item in annotations]
        ids = [dataset.category_ids[label - 1] for label in target["labels"].tolist()]
        assert ids == [item["category_id"] for item in annotations]
        x1, y1, x2, y2 = target["boxes"].unbind(1)
        assert ((x1 >= 0) & (y1 >= 0) & (x2 <= width) & (y2 <= height) & (x2 > x1) & (y2 > y1)).all()
        crowds += int(target["iscrowd"].sum())
    assert name == "nuclei" or split == "val" or crowds


@pytest.mark.parametrize(("split", "images", "persons", "known"), [("train", 13, 66, 33), ("val", 3, 16, 6)])
def test_keypoints_of_persons(real_data, split, images, persons, known):
    """Keypoints equal the file's. As results they reach an AP of 1."""
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
