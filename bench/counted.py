"""What the standard work costs at least, counted and not measured: bytes, operations, and the floor of its time.

``python -m bench.counted`` prints the tables; with ``--write`` it puts them into docs/performance.md, which derives the
figures. They need no GPU: a floor is the larger of bytes over bandwidth and operations over the rate of a product of
matrices (`Roofs.floor_us`), with figures of data sheets, or of a card once measured, in place of this machine's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.cases import (
    CASES,
    FocalCase,
    KeypointCase,
    MaskLossCase,
    MatchCase,
    ModelCase,
    NMSCase,
    PasteCase,
    RoICase,
    RPNCase,
)
from bench.machine import Roofs
from bench.rows import ROOT
from bench.standings import aim_of, digits, duration
from bench.work import Work
from tmask import build_model

PAGE = ROOT / "docs" / "performance.md"

# Memory, bf16 matrix product, fp32 product outside tensor cores. H100 and A100 are SXM with 80 GB, by data sheet; the
# first two figures of H200 are what a copy and a product reached on one, its fp32 is the data sheet's.
PAPER = {
    "H100": Roofs(3_350, 989, 67),
    "H200, measured": Roofs(4_300, 790, 67),
    "A100": Roofs(2_039, 312, 19.5),
}


# The device's own time of an empty kernel, about: a smaller floor says that launches decide.
LAUNCH_US = 2.0


@dataclass(frozen=True)
class Counted:
    """One line: a case in one mode and dtype."""

    case: str
    mode: str
    dtype: str
    work: Work

    def floor_us(self, roofs: Roofs) -> float:
        return roofs.floor_us(self.work, self.dtype)

    @property
    def bound(self) -> str:
        """What decides the time on an H100."""
        roofs = PAPER["H100"]
        if self.floor_us(roofs) < LAUNCH_US:
            return "launches"
        return "bytes" if roofs.floor_us(Work(self.work.bytes), self.dtype) == self.floor_us(roofs) else "flops"


def counted() -> list[Counted]:
    """Every case at full size, features and logits in bf16, whatever this machine is."""
    return [Counted(name, *line) for name, case in CASES.items() for line in _lines(name, case)]


def _lines(name: str, case: Any) -> Iterator[tuple[str, str, Work]]:
    """Mode, dtype and work of each line of a case."""
    match case:
        case RoICase():
            modes = {
                "W1": ["forward"],
                "W1b": ["backward"],
                "W2": ["forward", "backward"],
                "W4-pool": ["forward", "backward"],
            }
            yield from ((mode, "bf16", case.work("bf16", mode)) for mode in modes.get(name, ["forward"]))
        case NMSCase() | MatchCase():
            yield "forward", "fp32", case.work()
        case RPNCase():
            yield "forward", "bf16", case.work("bf16")
        case PasteCase():
            yield from ((mode, "fp32", case.work(mode)) for mode in ("bool", "packed", "rle"))
        case FocalCase():
            yield from ((mode, "bf16", case.work("bf16", mode)) for mode in ("forward", "backward"))
        case MaskLossCase():
            yield "targets", "fp32", case.target_work()
            yield from ((f"loss {mode}", "bf16", case.loss_work("bf16", mode)) for mode in ("forward", "backward"))
        case KeypointCase():
            yield "forward", "bf16", case.work("bf16")
        case ModelCase():
            yield "training" if case.training else "inference", "bf16", case.work("bf16")
        case _:
            raise TypeError(f"{name}: no line for a {type(case).__name__}")


def table() -> str:
    """The floors as a Markdown table."""
    head = ["case", "mode", "dtype", "least MB", "GFLOP", "flop/byte", *PAPER, "bound by", "aim"]
    rows = [
        [
            line.case,
            line.mode,
            line.dtype,
            digits(line.work.bytes / 1e6),
            digits(line.work.flops / 1e9),
            digits(line.work.flops / line.work.bytes),
            *(duration(line.floor_us(roofs)) for roofs in PAPER.values()),
            line.bound,
            str(aim_of(line.case, line.mode) or ""),
        ]
        for line in counted()
    ]
    return _markdown(head, rows)


def stages(case: ModelCase) -> dict[str, int]:
    """Operations of each stage of the model for one image in inference, a multiply-add counted twice.

    Layers are counted by torch on tensors without memory. The head of boxes sees every proposal, that of masks 100.
    """
    with torch.device("meta"):
        model = build_model("r50_fpn", num_classes=91, warn_if_untrained=False, **case.settings).eval()
        image = torch.empty(1, 3, case.height, -(-case.width // 32) * 32)
        pooled = model.config.rpn_post_nms_top_n_test, model.config.fpn_channels
        for_boxes = torch.empty(*pooled, *[model.config.box_pool_size] * 2)
        for_masks = torch.empty(model.config.max_detections, pooled[1], *[model.config.mask_pool_size] * 2)
    found: dict[str, int] = {}

    def count(stage: str, layer: Any, *given: Any) -> Any:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = layer(*given)
        found[stage] = counter.get_total_flops()
        return out

    maps = count("backbone", model.backbone, image)
    pyramid = count("FPN", model.fpn, list(maps.values()))
    count("RPN head", model.rpn.head, pyramid)
    count("box head", model.roi_heads.box_head, for_boxes)
    count("mask head", model.roi_heads.mask_head, for_masks)
    return found


def stage_table() -> str:
    """The stages of W12 as a Markdown table, with their floors."""
    case = CASES["W12-b1"]
    assert isinstance(case, ModelCase)
    found = stages(case)
    found["all"] = sum(found.values())
    rows = [
        [name, digits(flops / 1e9), *(duration(roofs.floor_us(Work(0, flops), "bf16")) for roofs in PAPER.values())]
        for name, flops in found.items()
    ]
    return _markdown(["stage", "GFLOP an image", *PAPER], rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


TABLES = {"floors": table, "stages": stage_table}


def page(text: str) -> str:
    """docs/performance.md with each of ``TABLES`` as it is counted now."""
    for name, make in TABLES.items():
        text = replace_table(text, name, make())
    return text


def replace_table(text: str, name: str, new: str) -> str:
    """`text` with the table `name`, which stands between two marks, replaced. Errors: ValueError without the marks."""
    before, begin, rest = text.partition(f"<!-- table {name}")
    mark, newline, rest = rest.partition("\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    if not end:
        raise ValueError(f"{PAGE.name}: expected a table {name!r} between its marks")
    return before + begin + mark + newline + new + end + after


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(PAGE.read_text()))
    elif sys.argv[1:]:
        raise SystemExit("usage: python -m bench.counted [--write]")
    else:
        print("\n".join(make() for make in TABLES.values()), end="")
