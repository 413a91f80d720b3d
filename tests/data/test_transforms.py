import pickle

import pytest
import torch
from torchvision.tv_tensors import BoundingBoxes

from tmask.data.transforms import train_transforms


def item():
    """An image and two instances, each mask exactly filling its box."""
    image = torch.randint(0, 256, (3, 9, 14), dtype=torch.uint8)
    boxes = torch.tensor([[1.0, 2.0, 5.0, 6.0], [7.0, 0.0, 14.0, 3.0]])
    masks = torch.zeros(2, 9, 14, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return image, {"image_id": 4, "boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks}


def test_boxes_of_torchvision_s_other_formats_move_as_plain_ones_do():
    image, target = item()
    expected = train_transforms(1, 0)(image, target)[1]["boxes"]
    typed = BoundingBoxes([[1.0, 2, 4, 4], [7, 0, 7, 3]], format="XYWH", canvas_size=(9, 14))
    found = train_transforms(1, 0)(image, target | {"boxes": typed})[1]["boxes"]
    assert torch.equal(found, expected)
    assert type(found) is torch.Tensor


def test_probability_is_kept():
    image, target = item()
    flips = pickle.loads(pickle.dumps(train_transforms(0.3, 0.0)))  # as for a loader's workers
    moved = [flips(image, target)[0] for _ in range(400)]
    assert 0.22 < sum(torch.equal(one, image.flip(2)) for one in moved) / 400 < 0.38


@pytest.mark.parametrize("least", [1.0, 0.4])
def test_boxes_alone_move_as_those_that_masks_fill(least):
    """A crop clips a box to its window, and drops what it leaves nothing of."""
    image, target = item()
    bare = {name: value for name, value in target.items() if name != "masks"}
    transforms, counts = train_transforms(0.5, 0.5, min_crop=least), set()
    for seed in range(20):
        torch.manual_seed(seed)
        expected_image, expected = transforms(image, target)
        torch.manual_seed(seed)
        found_image, found = transforms(image, bare)
        assert torch.equal(found_image, expected_image)
        assert found.keys() == bare.keys()
        assert all(torch.equal(found[name], expected[name]) for name in ("boxes", "labels"))
        counts.add(len(found["boxes"]))
        none = transforms(image, {"boxes": target["boxes"][:0], "masks": target["masks"][:0]})[1]
        assert none["boxes"].shape == (0, 4)
        assert none["masks"].shape[0] == 0
    assert counts == ({0, 1, 2} if least < 1 else {2})


@pytest.mark.parametrize(("hflip", "vflip"), [(1.1, 0), (0, -0.1)])
def test_probabilities_are_checked(hflip, vflip):
    with pytest.raises(ValueError, match=r"flip: expected a probability in 0..1"):
        train_transforms(hflip, vflip)
