"""W4-pool: RoIPool on the map of W4. Letters as in `bench.cases`."""

from __future__ import annotations

from dataclasses import dataclass

from bench.cases.case import ITEM
from bench.cases.roi_align import RoICase
from bench.work import Work
from tmask_kernels.ops.roi_pool.reference import bin_cells, listed_boxes

INDEX_BYTES = 4  # where a bin's largest cell stands, which the forward keeps for the backward


@dataclass(frozen=True, kw_only=True)
class RoIPoolCase(RoICase):
    """The largest cell of each bin of RoIs, from one map."""

    def work(self, dtype: str, mode: str) -> Work:
        """Forward: RoIs, each cell that lies in any bin, and the output. Backward: RoIs, the gradient of the output and
        the place that it goes to, and every cell's gradient written.

        Operations: a comparison for each cell of each bin; of the backward an addition for each bin.
        """
        compared, cells = self.count_touched()
        item, out = ITEM[dtype], self.rois * self.channels * self.pooled**2
        if mode == "forward":
            return Work(bytes=(out + cells * self.channels) * item + self.rois * 16, flops=compared * self.channels)
        maps = self.images * self.sizes[0][0] * self.sizes[0][1] * self.channels
        return Work(bytes=(out + maps) * item + out * INDEX_BYTES + self.rois * 16, flops=out)

    def count_touched(self) -> tuple[int, int]:
        """Cells of all bins, and the distinct ones."""
        (height, width), scale = self.sizes[0], self.scales[0]
        images, corners, usable = listed_boxes(self.boxes(), None, self.images, scale)
        rows = bin_cells(corners[:, 1], corners[:, 3], usable, scale, self.pooled, height)  # [K, PH, H]
        columns = bin_cells(corners[:, 0], corners[:, 2], usable, scale, self.pooled, width)  # [K, PW, W]
        compared = int((rows.sum((1, 2)) * columns.sum((1, 2))).sum())
        y, x = rows.any(1).float(), columns.any(1).float()  # a RoI's bins leave no gap
        cells = sum(int((y[images == n].T @ x[images == n]).gt(0).sum()) for n in range(self.images))
        return compared, cells
