"""Contests of the whole model: the gates refuse a broken model, and the counted operations are those of the model."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import tmask
from bench.cases._model import CASES
from bench.model import inference, training
from bench.model._pair import Pair
from bench.model.inference import LEAST, LEAST_OF_PEERS, SAME, Found, Likeness, check_alike
from tmask.structures import ImageBatch, Targets
from tmask_kernels import use_backend
from tmask_kernels.ops.roi_align import op as roi_align


def detections(count: int = 40) -> Found:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * 200
    boxes = torch.cat([corner, corner + 20 + torch.rand(count, 2, generator=generator) * 40], 1)
    scores = torch.rand(count, generator=generator).sort(descending=True).values * 0.9 + 0.1
    labels = torch.randint(1, 9, (count,), generator=generator)
    return Found(boxes, scores, labels, torch.rand(20, 16, 16, generator=generator) > 0.5)


WRONG: dict[str, Callable[[Found], Found]] = {
    "labels": lambda d: d._replace(labels=d.labels % 8 + 1),
    "boxes": lambda d: d._replace(boxes=d.boxes + 12),
    "scores": lambda d: d._replace(scores=d.scores * 0.5),
    "masks": lambda d: d._replace(masks=~d.masks),
    "half": lambda d: Found(d.boxes[20:], d.scores[20:], d.labels[20:], d.masks[:0]),
    "none": lambda d: Found(d.boxes[:0], d.scores[:0], d.labels[:0], d.masks[:0]),
}


@pytest.mark.parametrize("least", [SAME, LEAST])
def test_a_wrong_result_is_refused(least: Likeness) -> None:
    check_alike([detections()], [detections()], least)
    for broken in WRONG.values():
        with pytest.raises(AssertionError):
            check_alike([broken(detections())], [detections()], least)


def test_a_peer_in_half_precision_may_be_coarse() -> None:
    given = detections()
    coarse = given._replace(boxes=(given.boxes / 8).round() * 8, scores=given.scores * 0.6)
    check_alike([coarse], [given], LEAST_OF_PEERS)
    for wreck, least in ((coarse, LEAST), *((WRONG[name](given), LEAST_OF_PEERS) for name in ("labels", "none"))):
        with pytest.raises(AssertionError):
            check_alike([wreck], [given], least)


# ---- a whole contest, as the benchmark runs it


@pytest.mark.parametrize("contest", ["inference", "training"])
@pytest.mark.parametrize("broken", [False, True], ids=["right", "broken"])
def test_a_contest_refuses_a_broken_model(contest: str, broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In full float32, whatever the precision of the timed call allows: another threshold, a kernel that is off."""
    if contest == "inference":
        made = inference.BENCH.contest("inference-b1", "results", "bf16", "nhwc")
        wrong = {"box_nms_threshold": 0.4} if broken else {}
        load = tmask.load_torchvision
        monkeypatch.setattr(tmask, "load_torchvision", lambda weights, **given: load(weights, **given | wrong))
    else:
        made = training.BENCH.contest("training-b2", "step", "bf16", "nhwc")
        pool = roi_align.multiscale_roi_align_cpu
        monkeypatch.setattr(
            roi_align, "multiscale_roi_align_cpu", lambda *given: pool(*given) * (1.01 if broken else 1)
        )
    pair = made.inputs()
    truth = made.truth(pair)
    made.check(made.providers["torchvision"](pair)(), truth, "torchvision")
    with pytest.raises(AssertionError, match="in full float32") if broken else contextlib.nullcontext():
        made.check(made.providers["tmask"](pair)(), truth, "tmask")


def test_only_a_peer_under_autocast_may_be_coarse() -> None:
    true = {"loss": torch.tensor(1.0)}
    pair = Pair(CASES["training-b2"], "step", "", "nhwc", None, None, [], [])  # type: ignore[arg-type]
    for ours, dtype, refused in ((False, "bf16", False), (False, "fp32", True), (True, "bf16", True)):
        truth = training.Truth(pair._replace(dtype=dtype), true, true, None)
        with pytest.raises(AssertionError) if refused else contextlib.nullcontext():
            training.check({"loss": torch.tensor(1.3)}, truth, ours)


# ---- counted work


@pytest.mark.parametrize("size", ["full", pytest.param("reduced", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["inference-b1", "training-b2"])
@pytest.mark.filterwarnings("ignore:.*has no triton backend")
def test_counted_operations(name: str, size: str) -> None:
    """Counts those of the layers: our ops are single nodes here, which count as none."""
    case = CASES[name] if size == "full" else CASES[name].small()
    height, width = (-(-side // 32) * 32 for side in (case.height, case.width))
    with FakeTensorMode(), use_backend("triton"):
        model = tmask.build_model(
            "r50_fpn", 91, backbone=case.backbone, convention="torchvision", warn_if_untrained=False,
            fpn_channels=case.channels, mask_head_channels=case.channels, box_head_dim=case.hidden, **case.settings,
        )  # fmt: skip
        images = ImageBatch(torch.empty(1, 3, height, width), torch.empty(1, 2, dtype=torch.int64))
        some = torch.empty(1, 15, dtype=torch.bool)
        masks = torch.empty(1, 15, height, width // 32, dtype=torch.int32)
        targets = Targets(torch.empty(1, 15, 4), some.long(), some, some, masks, some)
        with FlopCounterMode(display=False) as counter:
            if case.training:
                torch.stack(list(model.forward_padded(images, targets).values())).sum().backward()
            else:
                with torch.no_grad():
                    model.eval().forward_padded(images)
    assert case.work("fp32").flops == case.images * counter.get_total_flops()
    assert case.work("fp32").bytes > 4 * sum(parameter.numel() for parameter in model.parameters())
