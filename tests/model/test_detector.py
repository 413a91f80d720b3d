"""The detector whole: torchvision's contract, padded interface, losses, edge cases, compact against padded."""

import copy
import dataclasses
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import tmask
from tests.model.conftest import KEYPOINTS, NECKS, SMALL, images_and_targets
from tmask.structures import Detections, ImageBatch, Targets
from tmask_kernels import unpack_masks

LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}


def test_training_contract(small_model: tmask.MaskRCNN) -> None:
    losses = small_model(*images_and_targets())
    assert set(losses) == LOSSES
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.shape == (), name
        assert loss.dtype == torch.float32, name
        assert torch.isfinite(loss), name
    missing = [name for name, p in small_model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing, f"no gradient reaches {missing}"


@pytest.mark.parametrize("masks", ["probability", "bool", "rle", "none"])
def test_inference_contract(masks: str, small_model: tmask.MaskRCNN) -> None:
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
        assert (result["boxes"][:, 2] <= width + 1e-3).all()
        assert (result["boxes"][:, 3] <= height + 1e-3).all()
        assert (result["scores"].diff() <= 0).all()
        assert ((result["labels"] >= 1) & (result["labels"] <= 3)).all()
        if masks == "none":
            assert "masks" not in result
        elif masks == "rle":
            assert [mask["size"] for mask in result["masks"]] == [[height, width]] * count
        else:
            shape = (count, 1, height, width) if masks == "probability" else (count, height, width)
            assert result["masks"].shape == shape


def test_training_gives_a_gradient_to_the_images(small_model: tmask.MaskRCNN) -> None:
    """The gradient of the losses to the padded batch, taken back through the resize alone."""
    images, targets = images_and_targets()
    images = [image.requires_grad_() for image in images]
    torch.manual_seed(0)  # the losses draw samples
    found = torch.autograd.grad(sum(small_model(images, targets).values()), images)

    batch, padded_targets = small_model.transform([image.detach() for image in images], targets)
    leaf = batch.tensor.requires_grad_()
    torch.manual_seed(0)
    losses = small_model.forward_padded(batch._replace(tensor=leaf), padded_targets, compact=True)
    (upstream,) = torch.autograd.grad(sum(losses.values()), leaf)
    std = torch.tensor(small_model.transform.image_std)[:, None, None]
    for image, gradient, padded in zip(images, found, upstream, strict=True):
        height, width = small_model.transform([image.detach()])[0].sizes[0].tolist()
        resized = torch.nn.functional.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
        (expected,) = torch.autograd.grad(resized, image, padded[:, :height, :width] / std)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("masks", ["probability", "bool", "rle", "none"])
def test_inference_on_images_that_require_a_gradient(masks: str, small_model: tmask.MaskRCNN) -> None:
    images, _ = images_and_targets()
    small_model.eval()
    with torch.no_grad():
        expected = small_model(images, masks=masks)
    results = small_model([image.requires_grad_() for image in images], masks=masks)
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result["boxes"], other["boxes"])
        torch.testing.assert_close(result["scores"], other["scores"])
        assert masks != "rle" or result["masks"] == other["masks"]


def test_training_without_targets_is_an_error(small_model: tmask.MaskRCNN) -> None:
    with pytest.raises(ValueError, match="targets: expected Targets in training mode"):
        small_model(images_and_targets()[0])


def test_targets_without_masks_are_an_error(small_model: tmask.MaskRCNN, batch: tuple[ImageBatch, Targets]) -> None:
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


def test_masks_of_some_objects_only(small_model: tmask.MaskRCNN, batch: tuple[ImageBatch, Targets]) -> None:
    images, targets = batch
    assert targets.masks is not None
    none = targets._replace(has_mask=torch.zeros_like(targets.has_mask))
    losses = small_model.forward_padded(images, none)
    assert losses["loss_mask"] == 0
    assert losses["loss_classifier"] > 0


def test_an_image_without_masks_beside_one_with_them(
    small_model: tmask.MaskRCNN, batch: tuple[ImageBatch, Targets]
) -> None:
    """Its boxes are learnt from; its masks are unknown, not empty."""
    images, targets = images_and_targets()
    del targets[1]["masks"]
    padded, packed = small_model.transform(images, targets)
    assert packed is not None
    assert packed.has_mask.tolist() == [[True, True], [False, False]]
    unread = batch[1]._replace(has_mask=packed.has_mask)
    actual = same_state(small_model, padded, packed, compact=True)
    expected = same_state(small_model, batch[0], unread, compact=True)
    assert actual["loss_mask"] > 0
    for name in LOSSES:
        torch.testing.assert_close(actual[name], expected[name], msg=name)
    sum(actual.values()).backward()


def same_state(model: tmask.MaskRCNN, images: ImageBatch, targets: Targets | None, compact: bool):
    torch.manual_seed(3)
    return copy.deepcopy(model).forward_padded(images, targets, compact=compact)


def test_compact_gives_the_padded_result(small_model: tmask.MaskRCNN, batch: tuple[ImageBatch, Targets]) -> None:
    padded = same_state(small_model, *batch, compact=False)
    compact = same_state(small_model, *batch, compact=True)
    for name in LOSSES:
        torch.testing.assert_close(compact[name], padded[name])
    small_model.eval()
    with torch.no_grad():
        padded = same_state(small_model, batch[0], None, compact=False)
        compact = same_state(small_model, batch[0], None, compact=True)
    for name in Detections._fields[:5]:
        torch.testing.assert_close(getattr(compact, name), getattr(padded, name))


def test_padding_of_targets_changes_nothing(small_model: tmask.MaskRCNN, batch: tuple[ImageBatch, Targets]) -> None:
    images, targets = batch
    wider = Targets(
        *(None if f is None else torch.cat([f, torch.zeros_like(f), torch.zeros_like(f)], dim=1) for f in targets)
    )
    # The sampler draws one random key a candidate, so only losses over all candidates can be compared: with every
    # candidate in the sample the draw does not matter.
    small_model.rpn.batch_size = 10_000
    small_model.roi_heads.batch_size, small_model.roi_heads.positive_fraction = 200, 0.5
    small_model.rpn.positive_fraction = 0.5
    a, b = same_state(small_model, images, targets, False), same_state(small_model, images, wider, False)
    for name in LOSSES:
        torch.testing.assert_close(a[name], b[name])


def test_detections_of_an_image_do_not_depend_on_its_batch(small_model: tmask.MaskRCNN) -> None:
    """Same padded size, another image beside it: the same detections."""
    small_model.eval()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    with torch.no_grad():
        together, alone = small_model(images), small_model(images[1:2])
    for name in ("boxes", "scores", "masks"):
        torch.testing.assert_close(together[1][name], alone[0][name], rtol=1e-4, atol=1e-4)


def test_loss_weights(keypoint_model: tmask.MaskRCNN, keypoint_batch: tuple[ImageBatch, Targets]) -> None:
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
    torch.manual_seed(0)  # as the fixture
    weighted = tmask.build_model(keypoint_model.config, **settings)
    plain = same_state(keypoint_model, *keypoint_batch, compact=True)
    losses = same_state(weighted, *keypoint_batch, compact=True)
    assert set(losses) == {*LOSSES, "loss_keypoint"}
    for name, factor in factors.values():
        assert plain[name] > 0, name
        torch.testing.assert_close(losses[name], factor * plain[name], msg=name)


def test_mask_gradient_stays_in_the_class(small_model: tmask.MaskRCNN, batch: tuple[ImageBatch, Targets]) -> None:
    """The sigmoid mask loss reads channel k only: classes absent from the batch get a gradient of exactly 0."""
    images, targets = batch
    only_two = targets._replace(labels=torch.where(targets.valid, 2, 0))
    small_model.forward_padded(images, only_two)["loss_mask"].backward()
    grad = small_model.roi_heads.mask_head.predictor.weight.grad
    assert grad[2].abs().sum() > 0
    assert grad[[0, 1, 3]].abs().sum() == 0


def test_bf16_autocast_keeps_boxes_in_fp32(small_model: tmask.MaskRCNN, batch: tuple[ImageBatch, Targets]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        losses = small_model.forward_padded(*batch)
        small_model.eval()
        found = small_model.forward_padded(batch[0])
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert found.boxes.dtype == found.scores.dtype == found.masks.dtype == torch.float32
    # Coordinates in bf16 would have 8 bits: almost none of ours may fall on that grid.
    boxes = found.boxes[found.valid()]
    assert (boxes == boxes.bfloat16().float()).float().mean() < 0.3


@pytest.mark.parametrize("convention", ["torchvision", "detectron2"])
@pytest.mark.parametrize("preset", ["r18_fpn", "r50_fpn"])
@pytest.mark.filterwarnings("ignore:.*frozen backbone parameters")
def test_presets_run(preset: str, convention: str) -> None:
    model = tmask.build_model(
        preset, num_classes=3, convention=convention, min_size=64, max_size=96, box_batch_size=16,
        box_score_threshold=0.0,
        rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=20, max_detections=3,
    )  # fmt: skip
    losses = model(*images_and_targets())
    assert all(torch.isfinite(loss) for loss in losses.values())
    with torch.no_grad():
        assert len(model.eval()(images_and_targets()[0])[0]["scores"]) == 3


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "resnet34", "resnet50", "resnet101"])
def test_a_backbone_by_name(name: str) -> None:
    model = tmask.build_model("tiny", backbone=name)
    assert model.config.backbone == name
    assert len(model.backbone.layer3) == {"resnet10": 1, "resnet18": 2, "resnet34": 6, "resnet50": 6}.get(name, 23)


@pytest.mark.parametrize("size", [(33, 65), (65, 33), (45, 67)], ids=str)
def test_sizes_that_no_stride_divides(size: tuple[int, int]) -> None:
    """No padding to multiples of 32, so every level is rounded up."""
    model = tmask.build_model("tiny", num_classes=3, **{**SMALL, "size_divisible": 1, "min_size": 33, "max_size": 99})
    target = {
        "boxes": torch.tensor([[4.0, 4.0, 30.0, 28.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, *size),
    }
    losses = model([torch.rand(3, *size)], [target])
    assert all(torch.isfinite(loss) for loss in losses.values())
    with torch.no_grad():
        result = model.eval()([torch.rand(3, *size)])[0]
    assert result["masks"].shape[1:] == (1, *size)


@pytest.mark.parametrize("convention", ["torchvision", "detectron2"])
def test_masks_are_resized_as_the_convention_says(convention: str) -> None:
    model = tmask.build_model("tiny", num_classes=3, convention=convention, min_size=80, max_size=80, size_divisible=1)
    masks = (torch.rand(2, 40, 40) > 0.5).to(torch.uint8)
    target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 28.0]] * 2), "labels": torch.ones(2).long(), "masks": masks}
    _, targets = model.transform([torch.rand(3, 40, 40)], [target])
    mode = "nearest" if convention == "torchvision" else "bilinear"
    expected = torch.nn.functional.interpolate(masks[None].float(), size=(80, 80), mode=mode)[0] >= 0.5
    assert torch.equal(unpack_masks(targets.masks[0], 80), expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"preset": "r50_fnp"}, "preset: expected 'r50_fpn'"),
        ({"min_sice": 3}, "unknown ModelConfig setting 'min_sice': expected 'min_size'"),
        ({"convention": "torchvison"}, "convention: expected 'torchvision'"),
        ({"num_classes": 1}, "num_classes: expected at least 2"),
        ({"rpn_nms_threshold": 1.5}, "rpn_nms_threshold: expected in 0..1, got 1.5"),
        ({"min_size": 500}, "min_size: expected in 1..max_size"),
        ({"norm": "frozen"}, "norm: expected 'frozen_bn'"),
        ({"backbone": "resnet81"}, "backbone: expected 'resnet18'"),
        ({"box_bg_iou": 0.6}, "box_bg_iou: expected at most box_fg_iou"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tmask.build_model(**{"preset": "tiny", **overrides})


def bad_inputs() -> dict[str, tuple[list[Tensor], list[dict[str, Tensor]] | None, str]]:
    images, targets = images_and_targets()
    return {
        "no images": ([], [], "images: expected at least one"),
        "batched": ([torch.rand(2, 3, 64, 64)], None, r"images\[0\]: expected a tensor \[3, h, w\]"),
        "one channel": ([torch.rand(1, 64, 64)], None, r"got \(1, 64, 64\)"),
        "integers": ([torch.ones(3, 64, 64, dtype=torch.int64)], None, "expected uint8 or a float dtype"),
        "count": (images, targets[:1], "targets: expected 2, one an image, got 1"),
        "no labels": (images, [{"boxes": torch.zeros(0, 4)}] * 2, "expected a key 'labels'"),
        "mask size": (images, [targets[0], {**targets[1], "masks": torch.zeros(1, 9, 9)}], r"targets\[1\]\['masks'\]"),
        "label 0": (
            images,
            [{**targets[0], "labels": torch.tensor([0, 1])}, targets[1]],
            r"\['labels'\]\[0\]: expected",
        ),
        "label past the last": (
            images,
            [targets[0], {**targets[1], "labels": torch.tensor([4])}],
            "expected 1..3, got 4",
        ),
        "xywh": (
            images,
            [targets[0], {**targets[1], "boxes": torch.tensor([[30.0, 9, 20, 30]])}],
            r"\[1\]\['boxes'\]\[0\]",
        ),
        "nan box": (
            images,
            [targets[0], {**targets[1], "boxes": torch.full((1, 4), torch.nan)}],
            "expected finite x1 < x2",
        ),
        "no area": (
            images,
            [targets[0], {**targets[1], "boxes": torch.tensor([[5.0, 5, 5, 9]])}],
            "expected finite x1 < x2",
        ),
        "box shape": (images, [{**targets[0], "boxes": torch.zeros(2, 5)}, targets[1]], r"\['boxes'\]: expected shape"),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_inputs(case: str, small_model: tmask.MaskRCNN) -> None:
    images, targets, message = bad_inputs()[case]
    if targets is None:
        small_model.eval()
    with pytest.raises(ValueError, match=message):
        small_model(images, targets)


def test_config_is_kept(small_model: tmask.MaskRCNN) -> None:
    assert dataclasses.asdict(small_model.config)["fpn_channels"] == 16
    assert small_model.config.num_classes == 4


KINDS = {
    "bn": {},
    "frozen_bn": {"norm": "frozen_bn", "trainable_layers": 5},
    "gn": {"norm": "gn", "fpn_channels": 32, "mask_head_channels": 32},
    "torchvision's convention": {"convention": "torchvision"},
    "keypoints": {"keypoints": KEYPOINTS},
    "c4": NECKS["c4"],
    "other losses": {"losses": {"mask": "softmax", "classifier": "sigmoid_focal", "rpn_objectness": "focal"}},
    "mask transfer": {"mask_transfer": {}},
    "RoIPool": {"roi_extractor": {"op": "roi_pool"}},
}
# Largest relative error of features and logits: the largest seen were 2e-6, 0.004 and 0.03.
DTYPES = {torch.float64: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}


@pytest.fixture
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def stages(model: tmask.MaskRCNN, images: Tensor, boxes: Tensor) -> list[Tensor]:
    """Features of padded images, and class logits, deltas and mask logits of the boxes [N, G, 4]."""
    heads, valid = model.roi_heads, torch.ones(boxes.shape[:2], dtype=torch.bool)
    features = model.fpn(list(model.backbone(images).values()))
    masks = heads._predicting(heads.mask_head)(heads.extractor(features, boxes, valid, heads.mask_branch.pool_size))
    return [*features, *heads.box_head(heads.extractor(features, boxes, valid, heads.box_pool_size)), masks]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_precision(kind: str, dtype: torch.dtype) -> None:
    """Features and logits are near those in float32; what comes out is float32, losses too."""
    torch.manual_seed(0)
    model = tmask.build_model("tiny", 4, **SMALL | KINDS[kind]).eval()
    images, targets = images_and_targets()
    if kind == "keypoints":
        for target in targets:
            target["keypoints"] = torch.cat([target["boxes"][:, :2] + 3, torch.ones(len(target["boxes"]), 1)], 1)
            target["keypoints"] = target["keypoints"][:, None].expand(-1, 3, -1)
    other = copy.deepcopy(model).to(dtype)
    batch, padded = model.transform(images, targets)
    assert padded is not None
    with torch.no_grad():
        expected, found = model(images), other([image.to(dtype) for image in images])
        expected_stages = stages(model, batch.tensor, padded.boxes)
        for one, two in zip(expected_stages, stages(other, batch.tensor.to(dtype), padded.boxes), strict=True):
            assert two.dtype == dtype
            assert (two.double() - one).norm() <= DTYPES[dtype] * one.double().norm()
    for one, two in zip(expected, found, strict=True):
        assert {name: value.dtype for name, value in two.items()} == {name: value.dtype for name, value in one.items()}
        if dtype == torch.float64:
            for name in one:
                torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-3)
    losses = [one.train()(images, targets) for one in (model, other)]
    for name, loss in losses[1].items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, losses[0][name], rtol=0.5, atol=0.5)  # each draws a sample of its own
    sum(losses[1].values()).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in other.parameters() if p.grad is not None)


def test_a_model_built_in_double_precision(default_dtype: None) -> None:
    """torch.set_default_dtype(torch.float64) around all of it."""
    torch.manual_seed(0)
    model = tmask.build_model("tiny", 4, **SMALL, keypoints=KEYPOINTS).double().eval()
    images, targets = images_and_targets()
    expected = model(images)
    torch.set_default_dtype(torch.float64)
    built = tmask.build_model("tiny", 4, **SMALL, keypoints=KEYPOINTS)
    assert {parameter.dtype for parameter in built.parameters()} == {torch.float64}
    built.load_state_dict(model.state_dict())
    found = built.eval()(images)
    for one, two in zip(expected, found, strict=True):
        assert {name: value.dtype for name, value in two.items()} == {name: value.dtype for name, value in one.items()}
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5)
    for target in targets:
        target["keypoints"] = torch.zeros(len(target["boxes"]), 3, 3)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in built.train()(images, targets).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "part", ["backbone", "backbone.layer2", "fpn", "rpn", "roi_heads.box_head", "roi_heads.mask_head"]
)
def test_weights_of_several_precisions_are_refused_outside_autocast(
    part: str, dtype: torch.dtype, small_model: tmask.MaskRCNN
) -> None:
    small_model.eval().get_submodule(part).to(dtype)
    images, _ = images_and_targets()
    names = " and ".join(sorted(["float32", str(dtype).removeprefix("torch.")]))
    with pytest.raises(ValueError, match=f"^weights: expected one dtype, got {names}: .*torch.autocast .*--precision"):
        small_model(images)
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            assert len(small_model(images)) == 2


def test_weights_of_half_precision_in_an_autocast_that_refuses_them_are_named(small_model: tmask.MaskRCNN) -> None:
    images, _ = images_and_targets()
    expected = "^weights: expected float32 with torch.autocast, got float16: model.float()"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=expected):
        small_model.eval().half()(images)


def test_other_errors_stay_as_they_are(small_model: tmask.MaskRCNN) -> None:
    small_model.fpn.half()
    small_model.roi_heads.detect = None  # type: ignore[assignment]
    with pytest.raises(TypeError), torch.autocast("cpu", torch.bfloat16):
        small_model.eval()(images_and_targets()[0])


@pytest.mark.parametrize("norm", ["bn", "sync_bn"])
def test_batch_norm_of_one_value_a_channel_names_the_settings(norm: str) -> None:
    settings = {**SMALL, "min_size": 32, "norm": norm}
    model = tmask.build_model("tiny", 4, **settings)
    image, target = torch.rand(3, 32, 32), images_and_targets()[1][0]
    target = {name: value[:1] for name, value in target.items() if name != "masks"}
    message = (
        "norm bn needs more than one value a channel: batch_size 1 of 32 x 32 pixels leaves a map of 1 x 1; larger "
        "--train.batch_size or --model.min_size, or --model.norm frozen_bn (or gn)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model([image], [target])
    assert model([image] * 2, [target] * 2).keys() == LOSSES
    assert len(model.eval()([image])) == 1
    model.train().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    assert model([image], [target]).keys() == LOSSES


def test_group_norm_of_one_value_a_group_names_the_settings() -> None:
    settings: dict[str, object] = {**SMALL, "min_size": 32, "norm": "gn", "mask_head_channels": 32}
    message = r"^norm gn needs more than one value a channel: batch_size 1 of 32 x 32 .* larger --model.min_size, or"
    with pytest.raises(ValueError, match=message):
        tmask.build_model("tiny", 4, **settings | {"fpn_channels": 32}).eval()([torch.rand(3, 32, 32)])
    assert len(tmask.build_model("tiny", 4, **settings | {"fpn_channels": 64}).eval()([torch.rand(3, 32, 32)])) == 1
