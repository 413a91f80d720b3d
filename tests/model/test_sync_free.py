"""The padded path never waits for the host: zero blocking operations, also inside our custom ops."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

import tmask
import tmask_kernels
from tests.model.conftest import KEYPOINTS, SMALL, images_and_targets
from tests.model.sync import count_blocking
from tmask.model import rpn
from tmask.model.postprocess import to_list
from tmask.structures import Detections, ImageBatch, Targets
from tmask_kernels.backend import resolve, use_backend

OPS = [  # those with a choice of backends
    path.parent.name
    for path in sorted(Path(tmask_kernels.__file__).parent.glob("ops/*/op.py"))
    if "resolve(" in path.read_text()
]


def run(mode: str, model: tmask.MaskRCNN, batch: tuple[ImageBatch, Targets]) -> None:
    if mode == "inference":
        with torch.no_grad():
            model.eval().forward_padded(batch[0])
        return
    losses = model.forward_padded(*batch)
    assert isinstance(losses, dict)
    torch.stack(list(losses.values())).sum().backward()


@contextlib.contextmanager
def triton_where_there_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Every op takes Triton if it can, else its reference: what ``auto`` does on a GPU. Yields the ops that ran it."""
    used = set()

    def prefer(op: str, backend: str | None, reasons: dict[str, list[str]], **options: Any) -> str:
        chosen = "triton" if reasons.get("triton", ["none"]) == [] else "reference"
        if chosen == "triton":
            used.add(op)
        return resolve(op, chosen, reasons, **options)

    for op in OPS:
        monkeypatch.setattr(importlib.import_module(f"tmask_kernels.ops.{op}.op"), "resolve", prefer)

    # The interpreter reads the arguments on the host, as no launch on a GPU does: leave it out of the count.
    interpret: Callable[..., None] = GridExecutor.__call__

    def launch(self: GridExecutor, *args: object, **kwargs: object) -> None:
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            interpret(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    yield used


# ``auto`` on a CPU takes torchvision's ragged ops, so it is not what is tested here.
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_reference_backend(mode: str, small_model: tmask.MaskRCNN, batch: tuple[ImageBatch, Targets]) -> None:
    with use_backend("reference"), count_blocking() as found:
        run(mode, small_model, batch)
    assert not found


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU see tests/gpu/test_model.py")
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_triton_backend(mode: str, keypoint_batch: tuple[ImageBatch, Targets], monkeypatch: pytest.MonkeyPatch) -> None:
    """Few RoIs of few bins: the interpreter runs a program for each row of each."""
    counts = {"rpn_post_nms_top_n_train": 8, "rpn_post_nms_top_n_test": 8, "box_batch_size": 8, "max_detections": 3}
    sides = {"box_pool_size": 2, "mask_pool_size": 2, "keypoints": {**KEYPOINTS, "pool_size": 2}}
    model = tmask.build_model("tiny", num_classes=4, **{**SMALL, **counts, **sides})
    with triton_where_there_is_a_kernel(monkeypatch) as used, count_blocking() as found:
        run(mode, model, keypoint_batch)
    assert not found
    assert used >= {"multiscale_roi_align", "mask_targets" if mode == "train" else "decode_keypoints"}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU see tests/gpu/test_model.py")
@pytest.mark.parametrize(("mode", "op"), [("train", "roi_align"), ("inference", "roi_pool")])
def test_triton_backend_of_a_single_level(mode: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = tmask.build_model(
        "tiny_c5", num_classes=4, **SMALL, roi_extractor={"op": op}, anchor_sizes=((16.0, 32.0, 64.0),)
    )
    batch = model.transform(*images_and_targets())
    with triton_where_there_is_a_kernel(monkeypatch) as used, count_blocking() as found:
        run(mode, model, batch)  # type: ignore[arg-type]
    assert not found
    assert ("roi_pool" if op == "roi_pool" else "multiscale_roi_align") in used


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_an_item_in_the_model_is_found(
    mode: str, small_model: tmask.MaskRCNN, batch: tuple[ImageBatch, Targets], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = rpn.rpn_proposals

    def with_item(*args: object, **kwargs: object) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, counts = real(*args, **kwargs)
        assert counts[0].item() >= 0
        return boxes, scores, counts

    monkeypatch.setattr(rpn, "rpn_proposals", with_item)
    with use_backend("reference"), count_blocking() as found:
        run(mode, small_model, batch)
    assert found


def test_an_item_in_a_custom_op_is_found(
    small_model: tmask.MaskRCNN, batch: tuple[ImageBatch, Targets], monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = torch._library.custom_ops.OPDEFS["tmask::mask_targets_reference"]
    real = definition._init_fn

    def with_item(packed: Tensor, *args: object) -> Tensor:
        assert packed.sum().item() >= 0
        return real(packed, *args)

    monkeypatch.setattr(definition, "_init_fn", with_item)
    with use_backend("reference"), count_blocking() as found:
        run("train", small_model, batch)
    assert found


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU see tests/gpu/test_model.py")
@pytest.mark.parametrize("masks", ["rle", "bool"])
def test_results_of_a_batch_wait_as_often_as_those_of_an_image(masks: str) -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(3, 2, 4, generator=generator) * 5
    boxes[..., 2:] += boxes[..., :2]
    whole = Detections(
        boxes, torch.rand(3, 2), torch.ones(3, 2, dtype=torch.int64), torch.tensor([2, 1, 2]), torch.rand(3, 2, 4, 4)
    )
    found, image_sizes, sizes = [], torch.tensor([[8, 9]] * 3), [(8, 9), (4, 6), (9, 5)]
    for n in (1, 3):
        part = Detections(*(value[:n] for value in whole[:5] if value is not None))
        with use_backend("triton"), count_blocking() as waits:
            results = to_list(part, image_sizes[:n], sizes[:n], masks=masks)
        assert [len(result["masks"]) for result in results] == [2, 1, 2][:n]
        found.append(waits)
    assert (
        found[0] == found[1] == {"Tensor.tolist": 1} | ({"Tensor.cpu": 2, "Tensor.numpy": 2} if masks == "rle" else {})
    )


READS: dict[str, Callable[[Tensor], object]] = {
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x.sum().item(),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0.5],
    "bool": lambda x: bool(x.sum() > 0),
    "masked_select": lambda x: x.masked_select(x > 0.5),
    "unique": lambda x: x.unique(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "where": lambda x: torch.where(x > 0.5),
    "repeat_interleave": lambda x: x.repeat_interleave((x > 0.5).long()),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_the_counter_sees(read: Callable[[Tensor], object]) -> None:
    x = torch.rand(9)
    with count_blocking() as found:
        read(x)
    assert sum(found.values()) >= 1


@pytest.mark.parametrize("name", READS)
def test_the_counter_sees_it_inside_a_custom_op(name: str) -> None:
    @torch.library.custom_op(f"tmask_hidden::{name.replace(' ', '_')}", mutates_args=())
    def hidden(x: Tensor) -> Tensor:
        READS[name](x)
        return x + 1

    with count_blocking() as found:
        hidden(torch.rand(9))
    assert sum(found.values()) >= 1


def test_the_counter_lets_static_ops_pass() -> None:
    x = torch.rand(9)
    with count_blocking() as found:
        x.topk(3).values.repeat_interleave(2)
        torch.where(x > 0.5, x, 0.0)[torch.arange(3)]
        x.masked_fill(x > 0.5, 0.0)
    assert not found
