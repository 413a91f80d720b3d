"""A model without masks (Faster R-CNN, with keypoints Keypoint R-CNN): what it leaves out, and what stays."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tmask
from tests.model.conftest import KEYPOINTS, NECKS, SMALL, images_and_targets
from tests.model.sync import count_blocking
from tmask.structures import Detections, ImageBatch, Targets
from tmask_kernels import use_backend


def pair(**settings: Any) -> tuple[tmask.MaskRCNN, tmask.MaskRCNN]:
    """A model with masks and one without, of the same weights."""
    torch.manual_seed(0)
    whole, bare = (tmask.build_model("tiny", num_classes=4, **SMALL | settings, masks=masks) for masks in (True, False))
    bare.load_state_dict({name: whole.state_dict()[name] for name in bare.state_dict()})
    return whole, bare


@pytest.mark.parametrize("keypoints", [False, True], ids=["boxes", "keypoints"])
def test_all_but_the_mask_head_is_built(keypoints: bool) -> None:
    whole, bare = pair(**({"keypoints": KEYPOINTS} if keypoints else {}))
    names = {name for name in whole.state_dict() if not name.startswith("roi_heads.mask_")}
    assert bare.state_dict().keys() == names != whole.state_dict().keys()
    assert bare.roi_heads.mask_parts() == []


@pytest.mark.parametrize("neck", NECKS)
def test_boxes_and_losses_are_those_of_the_model_with_masks(neck: str) -> None:
    whole, bare = pair(**NECKS[neck])
    images, targets = images_and_targets()
    losses = []
    for model in (whole, bare):
        torch.manual_seed(1)
        losses.append(model(images, targets))
    assert losses[0].pop("loss_mask") > 0
    assert losses[0] == losses[1]
    sum(losses[1].values()).backward()
    assert all(p.grad is not None for p in bare.parameters() if p.requires_grad)
    with torch.no_grad():
        found = [model.eval()(images) for model in (whole, bare)]
    for one, other in zip(*found, strict=True):
        assert list(other) == ["boxes", "labels", "scores"], "torchvision's FasterRCNN"
        assert len(other["boxes"]) > 0
        assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("form", ["probability", "bool", "rle", "none"])
def test_no_form_of_masks_is_given(form: str) -> None:
    with torch.no_grad():
        assert "masks" not in pair()[1].eval()(images_and_targets()[0], masks=form)[0]


@pytest.mark.parametrize("masks", [None, torch.zeros(1, 2, 3), "of another form"], ids=["none", "wrong", "no tensor"])
def test_masks_of_the_targets_are_not_looked_at(masks: Any) -> None:
    model = pair()[1]
    images, targets = images_and_targets()
    torch.manual_seed(1)
    expected = model(images, targets)
    for target in targets:
        del target["masks"]
        target |= {} if masks is None else {"masks": masks, "has_mask": torch.ones(7)}
    torch.manual_seed(1)
    assert model(images, targets) == expected
    _, padded = model.transform(images, targets)
    assert padded is not None
    assert padded.masks is None
    assert not padded.has_mask.any()


def test_keypoints_are_learnt_and_found(keypoint_batch: tuple[ImageBatch, Targets]) -> None:
    images, targets = keypoint_batch
    whole, bare = pair(keypoints=KEYPOINTS)
    losses, found = [], []
    for model, own in ((whole, targets), (bare, targets._replace(masks=None))):
        torch.manual_seed(1)
        losses.append(dict(model.forward_padded(images, own)))  # type: ignore[arg-type]
        with torch.no_grad():
            found.append(model.eval().forward_padded(images))
    assert losses[0].pop("loss_mask") > 0
    assert losses[0] == losses[1]
    assert losses[1]["loss_keypoint"] > 0
    assert isinstance(found[0], Detections)
    assert isinstance(found[1], Detections)
    assert found[1].masks is None
    assert found[1].keypoints is not None
    for one, other in zip(found[0]._replace(masks=None), found[1], strict=True):
        assert one is other is None or torch.equal(one, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_nothing_waits(mode: str) -> None:
    model = pair()[1]
    images, targets = model.transform(*images_and_targets())
    with use_backend("reference"), count_blocking() as found:
        if mode == "train":
            torch.stack(list(model.forward_padded(images, targets).values())).sum().backward()  # type: ignore[union-attr]
        else:
            with torch.no_grad():
                model.eval().forward_padded(images)
    assert not found


def test_compact_is_the_same() -> None:
    model = pair(keypoints=KEYPOINTS)[1].eval()
    batch, _ = model.transform(images_and_targets()[0])
    with torch.no_grad():
        fields: list[list[Tensor]] = [
            [value for value in model.forward_padded(batch, compact=compact) if value is not None]
            for compact in (False, True)
        ]
    assert len(fields[0]) == 5
    for one, other in zip(*fields, strict=True):
        torch.testing.assert_close(one, other)


def test_masks_alone_cannot_learn() -> None:
    with pytest.raises(ValueError, match=r"^only: expected none for a model without masks, got 'masks'$"):
        pair()[1].freeze_detector()
