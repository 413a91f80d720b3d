"""RoIPool of one map, forward and backward, against the peers.

torchvision has no bfloat16 kernel: its bf16 rows cast to float32 and back, as its autocast does on CUDA alone. mmcv's
RoIPool does not round its boxes: it gets them rounded, in cells, so that the bins are the same up to the rounding of
their ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torchvision
from torch import Tensor

from bench.cases import roi_align
from bench.cases._shared import ITEM, by_name
from bench.cases.roi_align import Given, RoICase, one_map, peer_rows
from bench.contest import Call
from bench.machine import Work
from tmask_kernels import roi_pool
from tmask_kernels.ops.roi_pool.reference import bin_cells, listed_boxes, round_half_away
from tmask_kernels.testing import Tolerance, assert_close

INDEX_BYTES = 4  # the place of a bin's largest cell, which the forward keeps for the backward
# A bin of mmcv lacks a row or column of cells where float32 gives torchvision's last bin one more: in one box of forty.
ROUNDED_BINS = Tolerance(max=2.0, rms=0.05)


@dataclass(frozen=True, kw_only=True)
class RoIPoolCase(RoICase):
    """The largest cell of each bin of RoIs, from one map."""

    modes: tuple[str, ...] = ("forward", "backward")

    def work(self, dtype: str, mode: str = "forward") -> Work:
        """Forward: RoIs and each cell in a bin are read, the output is written; a comparison for each cell of a bin.
        Backward: RoIs, the gradient of the output and its place are read, every cell's gradient is written; an
        addition for each bin.
        """
        compared, cells = self.count_touched()
        item, out = ITEM[dtype], self.rois * self.channels * self.pooled**2
        if mode == "forward":
            return Work(bytes=(out + cells * self.channels) * item + self.rois * 16, flops=compared * self.channels)
        maps = self.images * self.sizes[0][0] * self.sizes[0][1] * self.channels
        return Work(bytes=(out + maps) * item + out * INDEX_BYTES + self.rois * 16, flops=out)

    def count_touched(self) -> tuple[int, int]:
        """Return the number of cells of all bins, and of the distinct cells."""
        (height, width), scale = self.sizes[0], self.scales[0]
        images, corners, usable = listed_boxes(self.boxes(), None, self.images, scale)
        rows = bin_cells(corners[:, 1], corners[:, 3], usable, scale, self.pooled, height)  # [K, PH, H]
        columns = bin_cells(corners[:, 0], corners[:, 2], usable, scale, self.pooled, width)  # [K, PW, W]
        compared = int((rows.sum((1, 2)) * columns.sum((1, 2))).sum())
        y, x = rows.any(1).float(), columns.any(1).float()  # a RoI's bins leave no gap
        cells = sum(int((y[images == n].T @ x[images == n]).gt(0).sum()) for n in range(self.images))
        return compared, cells


CASES = by_name(one_map(RoIPoolCase, name="roi-pool-map", what="512 RoIs to 7 x 7 from one map of 512 x 256 x 256"))


def ours(given: Given, backend: str) -> Tensor:
    case = given.case
    return roi_pool(given.features[0], given.boxes, case.pooled, case.scales[0], backend=backend)


def torchvision_pool(given: Given) -> Call:
    case, boxes = given.case, peer_rows(given.boxes)
    return lambda: torchvision.ops.roi_pool(given.features[0].float(), boxes, case.pooled, case.scales[0]).to(
        given.dtype
    )


def mmcv(given: Given) -> Call:
    from mmcv.ops import roi_pool as mmcv_roi_pool

    boxes = peer_rows(round_half_away(given.boxes * given.case.scales[0]))
    return lambda: mmcv_roi_pool(given.features[0], boxes, given.case.pooled, 1.0)


def check(got: Any, truth: list[Tensor], provider: str) -> None:
    if provider == "mmcv":
        (true,) = truth
        assert_close(got[0] if isinstance(got, tuple) else got, true, tolerance=ROUNDED_BINS)
    else:
        roi_align.check(got, truth, provider)


BENCH = roi_align.bench_of(ours, cases=CASES, peers={"torchvision": torchvision_pool, "mmcv": mmcv}, check=check)
test_roi_pool = BENCH.test(
    modes=["forward", "backward"],
    dtypes=["fp32", "bf16"],
    layouts=["nchw", "nhwc"],
    where=lambda case, mode, dtype, layout, provider: (
        (dtype, layout) in (("fp32", "nchw"), ("fp32", "nhwc"), ("bf16", "nhwc"))
        and (provider in ("triton", "torchvision") or (dtype, layout) == ("fp32", "nchw"))
    ),
)
