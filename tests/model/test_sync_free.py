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
from tests.model.conftest import KEYPOINTS, Batch, detected, losses_of, padded, small, total
from tests.model.sync import count_blocking
from tmask.model.postprocess import to_list
from tmask.structures import Detections
from tmask_kernels.backend import resolve, use_backend
from tmask_kernels.namespace import OPS, custom_op

CHOICES = [  # those with a choice of backends
    path.parent.name
    for path in sorted(Path(tmask_kernels.__file__).parent.glob("ops/*/op.py"))
    if "resolve(" in path.read_text()
]


def run(mode: str, model: tmask.MaskRCNN, batch: Batch) -> None:
    if mode == "inference":
        detected(model, batch)
    else:
        total(losses_of(model, batch)).backward()


@contextlib.contextmanager
def triton_where_there_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Every op takes Triton if it can, else its reference: what ``auto`` does on a GPU. Yields the ops that ran it."""
    used = set()

    def prefer(op: str, backend: str | None, reasons: dict[str, list[str]], **options: Any) -> str:
        chosen = "triton" if reasons.get("triton", ["none"]) == [] else "reference"
        if chosen == "triton":
            used.add(op)
        return resolve(op, chosen, reasons, **options)

    for op in CHOICES:
        monkeypatch.setattr(importlib.import_module(f"tmask_kernels.ops.{op}.op"), "resolve", prefer)

    # The interpreter reads the arguments on the host, as no launch on a GPU does: leave it out of the count.
    interpret: Callable[..., None] = GridExecutor.__call__

    def launch(self: GridExecutor, *args: object, **kwargs: object) -> None:
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            interpret(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    yield used


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU see tests/gpu/test_model.py")
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_triton_backend(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few RoIs of few bins: the interpreter runs a program for each row of each."""
    counts = {"rpn_post_nms_top_n_train": 8, "rpn_post_nms_top_n_test": 8, "box_batch_size": 8, "max_detections": 3}
    model = small(**counts, box_pool_size=2, mask_pool_size=2, keypoints={**KEYPOINTS, "pool_size": 2})
    batch = padded(model)
    with triton_where_there_is_a_kernel(monkeypatch) as used, count_blocking() as found:
        run(mode, model, batch)
    assert not found
    assert used >= {"multiscale_roi_align", "mask_targets" if mode == "train" else "decode_keypoints"}


def test_an_item_in_a_custom_op_is_found(
    small_model: tmask.MaskRCNN, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = OPS["tmask::mask_targets_reference"]
    real = definition.body

    def with_item(packed: Tensor, *args: object) -> Tensor:
        assert packed.sum().item() >= 0
        return real(packed, *args)

    monkeypatch.setattr(definition, "body", with_item)
    with use_backend("reference"), count_blocking() as found:
        run("train", small_model, batch)
    assert found


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU see tests/gpu/test_model.py")
@pytest.mark.parametrize(("masks", "more"), [("rle", {"Tensor.numpy": 2}), ("bool", {})])
def test_results_of_a_batch_wait_as_often_as_those_of_an_image(masks: str, more: dict[str, int]) -> None:
    boxes = torch.rand(3, 2, 4) * 5
    boxes[..., 2:] += boxes[..., :2]
    labels, counts = torch.ones(3, 2, dtype=torch.int64), torch.tensor([2, 1, 2])
    whole = Detections(boxes, torch.rand(3, 2), labels, counts, torch.rand(3, 2, 4, 4))
    for n in (1, 3):
        part = Detections(*(value[:n] for value in whole[:5] if value is not None))
        with use_backend("triton"), count_blocking() as waits:
            results = to_list(part, torch.tensor([[8, 9]] * n), [(8, 9), (4, 6), (9, 5)][:n], masks=masks)
        assert [len(result["masks"]) for result in results] == [2, 1, 2][:n]
        assert waits == {"Tensor.tolist": 1} | more


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


@pytest.mark.parametrize("name", READS)
def test_the_counter_sees_it_also_inside_a_custom_op(name: str) -> None:
    @custom_op(f"hidden_{name.replace(' ', '_')}")
    def hidden(x: Tensor) -> Tensor:
        READS[name](x)
        return x + 1

    for read in (READS[name], hidden):
        with count_blocking() as found:
            read(torch.rand(9))
        assert sum(found.values()) >= 1
