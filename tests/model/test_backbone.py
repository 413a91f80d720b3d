"""Backbone and FPN: strides, odd sizes, torchvision's weights, norms, frozen layers."""

import warnings
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet

import tmask
from tmask.model.backbone import ResNet, load_backbone
from tmask.model.fpn import FPN

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101"]


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "resnet50"])
@pytest.mark.parametrize("size", [(64, 96), (61, 83), (33, 100)], ids=str)
def test_strides_at_any_size(name: str, size: tuple[int, int]) -> None:
    backbone = ResNet(name)
    levels = FPN(backbone.out_channels, 8)(list(backbone(torch.rand(2, 3, *size)).values()))
    assert len(levels) == 5
    for level, stride in zip(levels, (4, 8, 16, 32, 64), strict=True):
        assert level.shape == (2, 8, -(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvision_state_dict_loads_whole(name: str, suffix: str, tmp_path: Path) -> None:
    theirs = getattr(resnet, name)()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(theirs.state_dict(), path)
    else:
        pytest.importorskip("safetensors.torch").save_file(theirs.state_dict(), path)
    ours = ResNet(name, norm="frozen_bn")
    load_backbone(ours, str(path))
    x = torch.rand(1, 3, 64, 64)
    theirs.eval()
    y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    y = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(y))))
    torch.testing.assert_close(ours.eval()(x)["c5"], y, rtol=1e-4, atol=1e-5)


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_backbone(ResNet("resnet10"), str(tmp_path / "none.pth"))
    torch.save(resnet.resnet18().state_dict(), tmp_path / "r18.pth")
    for name, message in {
        "resnet10": r"unknown layer1\.1\.conv1\.weight; .* and \d+ more",
        "resnet34": r"missing layer1\.2\.conv1\.weight; .* and \d+ more",
        "resnet50": r"missing layer1\.0\.conv3\.weight; .* and \d+ more",
    }.items():
        with pytest.raises(ValueError, match=rf"r18\.pth does not fit: {message}$"):
            load_backbone(ResNet(name), str(tmp_path / "r18.pth"))


def test_files_without_the_counters_of_batch_norms_load(tmp_path: Path) -> None:
    weights = {k: v for k, v in resnet.resnet18().state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "old.pth")
    ours = ResNet("resnet18", norm="bn")
    load_backbone(ours, str(tmp_path / "old.pth"))
    assert torch.equal(ours.state_dict()["layer4.1.conv2.weight"], weights["layer4.1.conv2.weight"])


@pytest.mark.parametrize("norm", ["bn", "frozen_bn", "gn"])
def test_every_norm_trains(norm: str) -> None:
    backbone = ResNet("resnet10", norm=norm)
    sum(x.float().square().mean() for x in backbone(torch.rand(2, 3, 64, 64)).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())


@pytest.mark.parametrize(("layers", "first_trainable"), [(5, "conv1"), (4, "layer1"), (3, "layer2"), (1, "layer4")])
def test_trainable_layers_count_from_the_top(layers: int, first_trainable: str) -> None:
    backbone = ResNet("resnet10", trainable_layers=layers)
    trainable = [name for name, p in backbone.named_parameters() if p.requires_grad]
    assert trainable[0].startswith(first_trainable)


def test_frozen_random_layers_warn() -> None:
    with pytest.warns(UserWarning, match="frozen backbone parameters hold random weights"):
        tmask.build_model("tiny", trainable_layers=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tmask.build_model("tiny")


def test_a_backbone_of_ones_own() -> None:
    class Stripes(torch.nn.Module):
        out_channels = (3, 3, 3, 3)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {f"c{i}": torch.nn.functional.avg_pool2d(x, 2**i) for i in range(2, 6)}

    model = tmask.build_model("tiny", backbone=Stripes())
    boxes = torch.tensor([[10.0, 10.0, 60.0, 60.0]])
    target = {"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64), "masks": torch.ones(1, 128, 128)}
    losses = model([torch.rand(3, 128, 128)], [target])
    assert all(torch.isfinite(loss) for loss in losses.values())
