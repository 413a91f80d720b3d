"""Ground truth to 28 x 28 mask targets and back into the image: the most that any mask head of this size can reach."""

from pathlib import Path

import pytest
import torch

from tmask.config import CONVENTIONS
from tmask.data.coco import CocoDataset
from tmask.engine.detect import coco_results
from tmask.engine.evaluate import coco_metrics
from tmask.model.transform import ImageTransform
from tmask_kernels import mask_targets, paste_masks


# torchvision's rule cuts boxes to whole pixels, which costs small objects most.
@pytest.mark.parametrize(("name", "least"), [("detectron2", 0.92), ("torchvision", 0.87)])
def test_ground_truth_survives_targets_and_paste(name: str, least: float, real_data: Path) -> None:
    """All 65 train images of coco-mini, resized as for training; crowds count as COCO counts them."""
    convention = CONVENTIONS[name]
    dataset = CocoDataset(real_data / "coco-mini/images", real_data / "coco-mini/instances_train.json")
    transform = ImageTransform(
        num_classes=dataset.num_classes, min_size=400, max_size=666, image_mean=(0.5,) * 3, image_std=(0.5,) * 3,
        size_divisible=32, antialias=False, mask_resize=convention.mask_resize, keep_crowds=False,
    )  # fmt: skip
    results = []
    for i in range(len(dataset)):
        image, target = dataset[i]
        batch, targets = transform([image], [target])
        assert targets is not None
        assert targets.masks is not None
        index = torch.arange(targets.boxes.shape[1])[None]
        masks = mask_targets(
            targets.masks, targets.boxes, index, 28, image_sizes=batch.sizes, convention=convention.mask_targets
        )
        real = targets.valid[0]
        boxes = target["boxes"][real]
        runs = paste_masks(masks[0, real], boxes, tuple(image.shape[1:]), output="rle", convention=convention.paste)
        result = {"boxes": boxes, "labels": target["labels"][real], "scores": torch.ones(len(boxes)), "masks": runs}
        results += coco_results(target["image_id"], result, dataset.category_ids)
    metrics = coco_metrics(dataset.coco.dataset, results)
    assert metrics["segm/AP"] >= least
    assert metrics["segm/AP50"] >= 0.98
    assert metrics["bbox/AP"] >= 0.98  # the boxes were not touched: anything less is the evaluator's doing
