"""The backbone: torchvision's weights, frozen layers, a module of the user's in its place."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet

import tmask
from tests.model.conftest import losses_of, small, total
from tmask.model.backbone import RESNETS, ResNet, as_backbone, load_backbone

NAMES = [name for name in RESNETS if name != "resnet10"]  # torchvision has no ResNet-10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_torchvision_state_dict_has_every_key(name: str, tmp_path: Path) -> None:
    """Names and shapes alone: the networks have no memory, and the file holds one number a tensor."""
    with torch.device("meta"):
        theirs, ours = getattr(resnet, name)(), ResNet(name)
    weights = {key: torch.zeros(()).expand(value.shape) for key, value in theirs.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pth")
    load_backbone(ours, str(tmp_path / "weights.pth"))
    assert set(ours.state_dict()) == {key for key in weights if not key.startswith("fc.")}
    del weights["layer4.0.conv1.weight"]
    torch.save(weights, tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"missing layer4\.0\.conv1\.weight"):
        load_backbone(ours, str(tmp_path / "less.pth"))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("resnet18", ".pth"), ("resnet18", ".safetensors"), ("resnet50", ".pth"), ("resnext50_32x4d", ".safetensors")],
)
def test_torchvision_weights_give_its_features(name: str, suffix: str, tmp_path: Path) -> None:
    theirs = getattr(resnet, name)()
    ours = ResNet(name, norm="frozen_bn")
    load_backbone(ours, str(_saved(theirs.state_dict(), tmp_path / f"weights{suffix}")))
    x = torch.rand(1, 3, 64, 64)
    theirs.eval()
    y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    y = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(y))))
    torch.testing.assert_close(ours.eval()(x)["c5"], y, rtol=1e-4, atol=1e-5)


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    path = _saved(resnet.resnet18().state_dict(), tmp_path / "r18.pth")
    for name, message in {
        "resnet10": r"unknown layer1\.1\.conv1\.weight; .* and \d+ more",
        "resnet34": r"missing layer1\.2\.conv1\.weight; .* and \d+ more",
        "resnet50": r"missing layer1\.0\.conv3\.weight; .* and \d+ more",
    }.items():
        with pytest.raises(ValueError, match=rf"r18\.pth does not fit: {message}$"):
            load_backbone(ResNet(name), str(path))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_names_that_of_torchvision(name: str) -> None:
    with torch.device("meta"):
        backbone = ResNet(name)
    with pytest.raises(ValueError, match=rf"^backbone_weights: no such file: a\.pth; .* https://\S+/{name}-\w+\.pth$"):
        load_backbone(backbone, "a.pth")


@pytest.mark.parametrize("form", ["without counters", "script", "detector", "checkpoint"])
def test_the_resnet_in_another_file_is_taken(form: str, tmp_path: Path) -> None:
    """Wrappers and averages: test_state_dict.py."""
    weights = resnet.resnet18().state_dict()
    content: Any = {"model": weights, "args": argparse.Namespace(lr=0.1), "epoch": 3}
    if form == "without counters":  # of batch norms, as old files are
        content = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    elif form == "detector":
        content["model"] = {f"backbone.body.{name}": tensor for name, tensor in weights.items() if name[:3] != "fc."}
        content["model"]["rpn.head.conv.0.0.weight"] = torch.zeros(1)
    elif form == "checkpoint":
        model = tmask.build_model("r18_fpn", 3, backbone_weights=str(_saved(weights, tmp_path / "r18.pth")))
        content = {"format": "tmask checkpoint", "model": model.state_dict(), "ema": None}
    ours = ResNet("resnet18")
    load_backbone(ours, str(_saved(content, tmp_path / "a.pth")))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.state_dict().items())


def _saved(content: Any, path: Path) -> Path:
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    return path


@pytest.mark.parametrize(("layers", "first_trainable"), [(5, "conv1"), (4, "layer1"), (3, "layer2"), (1, "layer4")])
def test_trainable_layers_count_from_the_top(layers: int, first_trainable: str) -> None:
    backbone = ResNet("resnet10", trainable_layers=layers)
    trainable = [name for name, p in backbone.named_parameters() if p.requires_grad]
    assert trainable[0].startswith(first_trainable)


@pytest.mark.filterwarnings("error")
def test_frozen_random_layers_warn() -> None:
    with pytest.warns(UserWarning, match="frozen backbone parameters hold random weights"):
        tmask.build_model("tiny", trainable_layers=3)
    tmask.build_model("tiny")


class Stripes(torch.nn.Module):
    """Blurred images are its maps; `shift` makes them trainable."""

    out_channels = (3, 3, 3, 3)

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {f"c{i}": torch.nn.functional.avg_pool2d(x + self.shift, 2**i, ceil_mode=True) for i in range(2, 6)}


class TimmLike(torch.nn.Module):
    """A list of maps, [N, 10 + stride, H / stride, W / stride], as timm's features_only; `as_dict`: by names."""

    def __init__(self, reductions: list[int], as_dict: bool = False) -> None:
        super().__init__()
        self.feature_info = SimpleNamespace(
            reduction=lambda: reductions, channels=lambda: [10 + reduction for reduction in reductions]
        )
        self.as_dict = as_dict
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(3, 10 + r, 1, stride=r) for r in reductions)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor] | dict[str, torch.Tensor]:
        maps = [conv(x) for conv in self.convs]
        return {str(i): x for i, x in enumerate(maps)} if self.as_dict else maps


BACKBONES: dict[str, Callable[[], torch.nn.Module]] = {
    "dict of maps": Stripes,
    "timm": lambda: TimmLike([4, 8, 16, 32]),
    "timm with stride 2": lambda: TimmLike([2, 4, 8, 16, 32]),
    "timm with names": lambda: TimmLike([2, 4, 8, 16, 32], as_dict=True),
}


@pytest.mark.parametrize("preset", ["tiny", "tiny_c5"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_of_ones_own_trains(kind: str, preset: str) -> None:
    model = small(preset, backbone=BACKBONES[kind]())
    loss = total(losses_of(model))
    loss.backward()
    assert loss.isfinite()
    reached = [p for p in model.backbone.parameters() if p.grad is not None and p.grad.any()]
    if kind == "dict of maps":
        assert len(reached) == 1
    else:
        strides = {p.shape[0] - 10 for p in reached}
        assert strides == ({4, 8, 16, 32} if preset == "tiny" else {32})


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050"])  # without and with a map of stride 2
def test_a_network_of_timm_trains(name: str) -> None:
    """Runs where timm is installed. Every parameter of it feeds one of the four maps."""
    network = pytest.importorskip("timm").create_model(name, pretrained=False, features_only=True)
    loss = total(losses_of(small(backbone=network)))
    loss.backward()
    assert loss.isfinite()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_without_timm_the_message_has_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    cure = r"^backbone: efficientnet_lite0 needs timm, got .*; pip install 'tmask\[pretrained\]'$"
    with pytest.raises(ValueError, match=cure):
        tmask.build_model("lite0_fpn")


def test_the_maps_of_a_timm_model_are_found_by_their_strides() -> None:
    backbone = as_backbone(TimmLike([2, 4, 8, 16, 32, 64]))
    assert backbone.out_channels == (14, 18, 26, 42)
    maps = backbone(torch.rand(1, 3, 64, 64))
    assert [(name, x.shape[1], x.shape[2]) for name, x in maps.items()] == [
        ("c2", 14, 16), ("c3", 18, 8), ("c4", 26, 4), ("c5", 42, 2),
    ]  # fmt: skip


def test_a_module_that_is_no_backbone_is_refused() -> None:
    for module, message in (
        (torch.nn.Conv2d(3, 4, 1), "backbone: expected a module with out_channels, the widths of its 4 maps .* got"),
        (TimmLike([2, 4, 8, 16]), r"backbone: expected maps of strides \(4, 8, 16, 32\), got \[2, 4, 8, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            tmask.build_model("tiny", backbone=module)
    with pytest.raises(ValueError, match=r"neck: expected 'fpn' or 'c5' with a backbone of your own"):
        tmask.build_model("r50_c4", backbone=Stripes())
    with torch.device("meta"):
        for norm in ("bn", "sync_bn"):  # of conv5 on RoIs, as the config refuses it
            own = ResNet("resnet10", norm=norm)
            with pytest.raises(
                ValueError, match="backbone: expected a ResNet of norm 'frozen_bn' or 'gn', as the neck"
            ):
                tmask.build_model("r50_c4", backbone=own)
            assert len(own.out_channels) == 4, "as it was"
        assert tmask.build_model("r50_c4", backbone=ResNet("resnet10", norm="frozen_bn")).config.neck == "c4"


def test_weights_do_not_go_with_a_backbone_of_ones_own() -> None:
    with pytest.raises(ValueError, match=r"backbone_weights: expected none beside a backbone of your own, got 'a.pth'"):
        tmask.build_model("tiny", backbone=Stripes(), backbone_weights="a.pth")
