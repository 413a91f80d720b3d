"""A model without masks (Faster R-CNN, with keypoints Keypoint R-CNN): what it leaves out, and what stays."""

from typing import Any

import pytest
import torch

import tmask
from tests.model.conftest import KEYPOINTS, NECKS, detected, images_and_targets, losses_of, small


def pair(**settings: Any) -> tuple[tmask.MaskRCNN, tmask.MaskRCNN]:
    """A model with masks and one without, of the same weights."""
    whole, bare = (small(**settings, masks=masks) for masks in (True, False))
    bare.load_state_dict({name: whole.state_dict()[name] for name in bare.state_dict()})
    return whole, bare


@pytest.mark.parametrize("settings", [*NECKS.values(), {"keypoints": KEYPOINTS}], ids=[*NECKS, "keypoints"])
def test_all_but_the_masks_is_that_of_the_model_with_masks(settings: dict[str, Any]) -> None:
    whole, bare = pair(**settings)
    names = {name for name in whole.state_dict() if not name.startswith("roi_heads.mask_")}
    assert bare.state_dict().keys() == names != whole.state_dict().keys()
    assert bare.roi_heads.mask_parts() == []
    found = [detected(model) for model in (whole, bare)]
    assert found[1].masks is None
    assert (found[1].keypoints is not None) == ("keypoints" in settings)
    for one, other in zip(found[0]._replace(masks=None), found[1], strict=True):
        assert one is other is None or torch.equal(one, other)
    losses = [losses_of(model) for model in (whole, bare)]
    assert losses[0].pop("loss_mask") > 0
    assert losses[0] == losses[1]


@pytest.mark.parametrize("form", ["probability", "bool", "rle", "none"])
def test_no_form_of_masks_is_given(form: str) -> None:
    with torch.no_grad():
        for result in pair()[1].eval()(images_and_targets()[0], masks=form):
            assert list(result) == ["boxes", "labels", "scores"], "torchvision's FasterRCNN"
            assert len(result["boxes"]) > 0


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


def test_masks_alone_cannot_learn() -> None:
    with pytest.raises(ValueError, match=r"^only: expected none for a model without masks, got 'masks'$"):
        pair()[1].freeze_detector()
