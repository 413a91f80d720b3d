"""paste_masks (W10): 100 masks of 28 x 28 into 800 x 1333 pixels: bools, bits and runs, by the peers' rules.

The rules of torchvision and detectron2 differ, so each has a case of its own. Run lengths are checked by drawing them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from bench.cases import CASES, PasteCase, sized
from bench.contest import Call, Contest
from bench.machine import device
from bench.rle import decode_rle
from bench.variants import variants
from tmask_kernels import paste_masks, unpack_masks
from tmask_kernels.ops.paste_masks.reference import is_inside, resample

THRESHOLD = 0.5
# A pixel whose exact value is so near the threshold may fall to either side in float32.
CLOSE = 1e-5


class Given(NamedTuple):
    case: PasteCase
    masks: Tensor  # [K, M, M]
    boxes: Tensor  # [K, 4]

    @property
    def size(self) -> tuple[int, int]:
        return self.case.height, self.case.width


def _wanted(case: str, mode: str, dtype: str, layout: str, provider: str) -> bool:
    """Peers by their own rule; neither gives bits."""
    return {
        "triton": True,
        "torchvision": case == "W10" and mode != "packed",
        "detectron2": case == "W10-detectron2" and mode != "packed",
        "compile": (case, mode) == ("W10", "bool"),
        "reference": True,
    }[provider]


@variants(
    cases=["W10", "W10-detectron2"],
    modes=["bool", "packed", "rle"],
    providers=["triton", "torchvision", "detectron2", "compile", "reference"],
    where=_wanted,
)
def test_paste_masks(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
    contest(lambda: pasting(case, mode))


def pasting(name: str, output: str) -> Contest:
    case, size = sized(cast(PasteCase, CASES[name]))
    return Contest(
        inputs=lambda: Given(case, *case.inputs(device())),
        providers={
            "triton": ours("triton", output),
            "torchvision": torchvision(output),
            "detectron2": detectron2(output),
            "compile": compiled,
            "reference": ours("reference", output),
        },
        truth=truth,
        check=lambda got, expected: check(got, expected, case.width, output),
        work=case.work(output),
        size=size,
    )


def ours(backend: str, output: str) -> Callable[[Given], Call]:
    return lambda given: (
        lambda: paste_masks(
            given.masks, given.boxes, given.size, output=output, convention=given.case.convention, backend=backend
        )
    )


def compiled(given: Given) -> Call:
    """The reference without its chunks, which the compiler would unroll."""
    case, masks, boxes = given
    y, x = (torch.arange(length, dtype=torch.float32, device=masks.device) for length in given.size)

    @torch.compile
    def paste() -> Tensor:
        return is_inside(resample(masks, boxes, y, x, case.convention), THRESHOLD, case.convention)

    return paste


def torchvision(output: str) -> Callable[[Given], Call]:
    def provider(given: Given) -> Call:
        def paste() -> Tensor:
            return paste_masks_in_image(given.masks[:, None], given.boxes, given.size)[:, 0] > THRESHOLD

        return paste if output == "bool" else run_lengths(paste)

    return provider


def detectron2(output: str) -> Callable[[Given], Call]:
    def provider(given: Given) -> Call:
        from detectron2.layers.mask_ops import paste_masks_in_image as paste_detectron2

        def paste() -> Tensor:
            return paste_detectron2(given.masks, given.boxes, given.size, threshold=THRESHOLD)

        return paste if output == "bool" else run_lengths(paste)

    return provider


def run_lengths(paste: Callable[[], Tensor]) -> Call:
    """As both libraries' users do: the masks go to the host, and pycocotools encodes them there."""
    from pycocotools import mask as coco_mask

    def call() -> list[dict[str, Any]]:
        full = paste().cpu().numpy().transpose(1, 2, 0).astype(np.uint8, order="F")  # [H, W, K], column-major
        return coco_mask.encode(full)

    return call


class Truth(NamedTuple):
    inside: Tensor  # [K, H, W] bool
    sure: Tensor  # [K, H, W] bool


def truth(given: Given) -> Truth:
    """From the reference's values in float64, at coordinates in float64."""
    case = given.case
    value = paste_masks(
        given.masks.double(), given.boxes.double(), given.size,
        output="probability", convention=case.convention, backend="reference",
    )  # fmt: skip
    return Truth(is_inside(value, THRESHOLD, case.convention), (value - THRESHOLD).abs() > CLOSE)


def check(got: Any, expected: Truth, width: int, output: str) -> None:
    if output == "packed":
        got = unpack_masks(got, width)
    elif output == "rle":
        got = torch.stack([decode_rle(one) for one in got]).to(expected.inside.device)
    assert got.dtype == torch.bool
    assert got.shape == expected.inside.shape
    wrong = ((got != expected.inside) & expected.sure).sum().item()
    assert not wrong, f"{wrong} pixels are on the wrong side of the threshold"
