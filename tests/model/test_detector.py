"""The detector whole: torchvision's contract, padded interface, losses, edge cases; every variant: test_variants.py."""

import re

import pytest
import torch
from torch import nn

import tmask
from tests.model.conftest import KEYPOINTS, SMALL, Batch, images_and_targets, losses_of, small
from tmask.structures import Targets
from tmask_kernels import unpack_masks


@pytest.mark.parametrize("masks", ["probability", "bool", "rle", "none"])
def test_inference_contract(masks: str, small_model: tmask.MaskRCNN) -> None:
    """Also of images that require a gradient, which results have none of."""
    images, _ = images_and_targets()
    with torch.no_grad():
        results = small_model.eval()(images, masks=masks)
    assert len(results) == 2
    for image, result in zip(images, results, strict=True):
        height, width = image.shape[1:]
        count = len(result["scores"])
        assert 0 < count <= SMALL["max_detections"]
        assert result["boxes"].shape == (count, 4)
        assert (result["boxes"] >= 0).all()
        assert (result["boxes"][:, 2:] <= torch.tensor([width, height]) + 1e-3).all()
        assert (result["scores"].diff() <= 0).all()
        assert ((result["labels"] >= 1) & (result["labels"] <= 3)).all()
        if masks == "none":
            assert "masks" not in result
        elif masks == "rle":
            assert [mask["size"] for mask in result["masks"]] == [[height, width]] * count
        else:
            shape = (count, 1, height, width) if masks == "probability" else (count, height, width)
            assert result["masks"].shape == shape
    for result, other in zip(small_model([i.requires_grad_() for i in images], masks=masks), results, strict=True):
        torch.testing.assert_close(result["boxes"], other["boxes"])
        torch.testing.assert_close(result["scores"], other["scores"])
        assert masks != "rle" or result["masks"] == other["masks"]


def test_training_gives_a_gradient_to_the_images(small_model: tmask.MaskRCNN) -> None:
    """That the resize takes it back rightly: test_transform.py."""
    images, targets = images_and_targets()
    losses = small_model([image.requires_grad_() for image in images], targets)
    for gradient in torch.autograd.grad(sum(losses.values()), images):
        assert gradient.isfinite().all()
        assert gradient.any()


def test_targets_without_masks_are_an_error(small_model: tmask.MaskRCNN, batch: Batch) -> None:
    with pytest.raises(ValueError, match=r"targets\.masks: expected packed masks"):
        small_model.forward_padded(batch[0], batch[1]._replace(masks=None))


@pytest.mark.parametrize("which", ["one", "all"])
def test_images_without_objects_train(which: str, small_model: tmask.MaskRCNN) -> None:
    images, targets = images_and_targets()
    for i in range(2 if which == "all" else 1):
        size = images[i].shape[1:]
        targets[i] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "masks": torch.zeros(0, *size)}
    losses = small_model(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    if which == "all":
        assert losses["loss_mask"] == 0
        assert losses["loss_classifier"] > 0, "negatives must be sampled where there is no positive"


def test_an_image_without_masks_beside_one_with_them(small_model: tmask.MaskRCNN, batch: Batch) -> None:
    """Its boxes are learnt from; its masks are unknown, not empty."""
    images, targets = images_and_targets()
    del targets[1]["masks"]
    padded, packed = small_model.transform(images, targets)
    assert packed is not None
    assert packed.has_mask.tolist() == [[True, True], [False, False]]
    unread = batch[1]._replace(has_mask=packed.has_mask)
    actual, expected = losses_of(small_model, (padded, packed)), losses_of(small_model, (batch[0], unread))
    assert actual["loss_mask"] > 0
    for name, loss in expected.items():
        torch.testing.assert_close(actual[name], loss, msg=name)


def test_padding_of_targets_changes_nothing(small_model: tmask.MaskRCNN, batch: Batch) -> None:
    images, targets = batch
    wider = Targets(*(None if f is None else torch.cat([f, *[torch.zeros_like(f)] * 2], dim=1) for f in targets))
    # The sampler draws one random key a candidate, so only losses over all candidates can be compared: with every
    # candidate in the sample the draw does not matter.
    small_model.rpn.batch_size, small_model.rpn.positive_fraction = 10_000, 0.5
    small_model.roi_heads.batch_size, small_model.roi_heads.positive_fraction = 200, 0.5
    expected = losses_of(small_model, batch)
    for name, loss in losses_of(small_model, (images, wider)).items():
        torch.testing.assert_close(loss, expected[name], msg=name)


def test_detections_of_an_image_do_not_depend_on_its_batch(small_model: tmask.MaskRCNN) -> None:
    """Same padded size, another image beside it: the same detections."""
    images = list(torch.rand(3, 3, 64, 64))
    with torch.no_grad():
        together, alone = small_model.eval()(images), small_model(images[1:2])
    for name in ("boxes", "scores", "masks"):
        torch.testing.assert_close(together[1][name], alone[0][name], rtol=1e-4, atol=1e-4)


def test_loss_weights() -> None:
    """Each setting is the factor of its own loss and of no other."""
    factors = {
        "loss_rpn_objectness": ("loss_objectness", 2.0),
        "loss_rpn_box": ("loss_rpn_box_reg", 0.0),
        "loss_classifier": ("loss_classifier", 0.5),
        "loss_box": ("loss_box_reg", 5.0),
        "loss_mask": ("loss_mask", 3.0),
        "loss_keypoint": ("loss_keypoint", 7.0),
    }
    settings = {setting: factor for setting, (_, factor) in factors.items()}
    plain, losses = (losses_of(small(keypoints=KEYPOINTS, **chosen)) for chosen in ({}, settings))
    assert losses.keys() == {name for name, _ in factors.values()}
    for name, factor in factors.values():
        assert plain[name] > 0, name
        torch.testing.assert_close(losses[name], factor * plain[name], msg=name)


@pytest.mark.parametrize(("preset", "convention"), [("r18_fpn", "torchvision"), ("r50_fpn", "detectron2")])
@pytest.mark.filterwarnings("ignore:.*frozen backbone parameters")
def test_presets_run(preset: str, convention: str) -> None:
    limits = {"box_batch_size": 16, "rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20, "max_detections": 3}
    sizes = {"min_size": 64, "max_size": 96, "box_score_threshold": 0.0}
    model = tmask.build_model(preset, num_classes=3, convention=convention, **limits, **sizes)
    losses = model(*images_and_targets())
    assert all(torch.isfinite(loss) for loss in losses.values())
    with torch.no_grad():
        assert len(model.eval()(images_and_targets()[0])[0]["scores"]) == 3


@pytest.mark.parametrize(("convention", "mode"), [("torchvision", "nearest"), ("detectron2", "bilinear")])
def test_masks_are_resized_as_the_convention_says(convention: str, mode: str) -> None:
    model = small(convention=convention, min_size=80, max_size=80, size_divisible=1)
    masks = (torch.rand(2, 40, 40) > 0.5).to(torch.uint8)
    target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 28.0]] * 2), "labels": torch.ones(2).long(), "masks": masks}
    _, targets = model.transform([torch.rand(3, 40, 40)], [target])
    expected = torch.nn.functional.interpolate(masks[None].float(), size=(80, 80), mode=mode)[0] >= 0.5
    assert torch.equal(unpack_masks(targets.masks[0], 80), expected)


@pytest.mark.parametrize("norm", ["bn", "sync_bn"])
def test_batch_norm_of_one_value_a_channel_names_the_settings(norm: str) -> None:
    model = small(min_size=32, norm=norm)
    image, target = torch.rand(3, 32, 32), images_and_targets()[1][0]
    target = {name: value[:1] for name, value in target.items() if name != "masks"}
    message = (
        "norm bn needs more than one value a channel: batch_size 1 of 32 x 32 pixels leaves a map of 1 x 1; larger "
        "--train.batch_size or --model.min_size, or --model.norm frozen_bn (or gn)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model([image], [target])
    assert len(model([image] * 2, [target] * 2)) == 5
    assert len(model.eval()([image])) == 1
    model.train().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    assert len(model([image], [target])) == 5


def test_group_norm_of_one_value_a_group_names_the_settings() -> None:
    narrow, wide = (small(min_size=32, norm="gn", mask_head_channels=32, fpn_channels=width) for width in (32, 64))
    message = r"^norm gn needs more than one value a channel: batch_size 1 of 32 x 32 .* larger --model.min_size, or"
    with pytest.raises(ValueError, match=message):
        narrow.eval()([torch.rand(3, 32, 32)])
    assert len(wide.eval()([torch.rand(3, 32, 32)])) == 1
