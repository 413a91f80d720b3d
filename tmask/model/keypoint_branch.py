"""Keypoint branch: RoIs in, the loss of their keypoints or their keypoints out. The layers are keypoint_head.py.

Letters: N images, G ground-truth boxes, P RoIs an image, D detections an image, R rows (RoIs of all images), Kp
keypoints, M heat-map side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tmask.model.roi_extractor import Head, Pool, run_head, to_slots
from tmask.structures import SampledRois, Targets
from tmask_kernels import decode_keypoints


@dataclass(frozen=True, kw_only=True)
class KeypointBranch:
    """What a keypoint head learns and how its heat maps are read. It has no parameters: the head comes with each call.

    The head sees features of `pool_size` cells a side and gives heat maps of `size` a side.
    """

    pool_size: int
    size: int

    def loss(self, pool: Pool, head: Head, rois: SampledRois, targets: Targets, *, compact: bool) -> Tensor:
        """Mean cross-entropy, over the M x M cells, of the keypoints of positive RoIs that are visible and inside.

        0 with a graph if there is none. RoIs without one are not computed. Source: He et al. 2017, section 5.
        """
        if targets.keypoints is None:
            raise ValueError("targets.keypoints: expected keypoints [N, G, Kp, 3], got None")
        rows = rois.gt_index.clamp(min=0)[:, :, None, None].expand(-1, -1, *targets.keypoints.shape[2:])
        own = targets.keypoints.gather(1, rows)  # [N, P, Kp, 3]
        cells, learns = encode_keypoints(own, rois.boxes, self.size)
        learns = learns & rois.positive[:, :, None]  # [N, P, Kp]
        logits, chosen = run_head(head, pool, rois.boxes, learns.any(2), self.pool_size, compact=compact)
        cells, learns = cells.flatten(0, 1)[chosen], learns.flatten(0, 1)[chosen]  # [R, Kp]
        entropy = F.cross_entropy(logits.flatten(2).flatten(0, 1), cells.flatten(), reduction="none")
        total = torch.where(learns.flatten(), entropy, 0.0).sum()
        return total / learns.sum().clamp(min=1)

    def keypoints(self, pool: Pool, head: Head, boxes: Tensor, valid: Tensor, *, compact: bool) -> Tensor:
        """Return x, y and score [N, D, Kp, 3] of the keypoints of boxes [N, D, 4], valid [N, D].

        x and y are pixels of the padded image. The score is the heat map's value there. Invalid boxes get zeros.
        """
        logits, chosen = run_head(head, pool, boxes, valid, self.pool_size, compact=compact)
        xy, scores = decode_keypoints(to_slots(logits, chosen, valid), boxes, valid)
        return torch.cat([xy, scores[..., None]], dim=-1).float()


def encode_keypoints(keypoints: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the cell of each keypoint in the heat map of its RoI, and whether it has one.

    Args:
        keypoints: [..., Kp, 3], x, y and visibility.
        boxes: [..., 4] in the same pixels.
        size: side of the heat map, in cells.

    Returns:
        The cells [..., Kp] int64, row by row: ``floor((y - y1) * size / h) * size + floor((x - x1) * size / w)``. The
        right and the bottom edge belong to the last cell. And [..., Kp] bool: False, with the cell 0, for a keypoint
        that is not visible (0) or outside the box.

    Decoding picks a pixel. Where a pixel has its centre at the cell's centre, as in boxes whose sides are odd multiples
    of `size`, decoding returns the point to within half a cell; elsewhere to half a pixel more. See "Accuracy" in the
    README of decode_keypoints for cells at the border and small boxes.
    """
    corner, far = boxes[..., None, :2], boxes[..., None, 2:]  # [..., 1, 2]
    xy = keypoints[..., :2]
    inside = ((xy >= corner) & (xy <= far) & (far > corner)).all(-1)
    valid = inside & (keypoints[..., 2] > 0)
    # Rounding may bring a point just before the far edge to `size` too.
    place = ((xy - corner) * size / (far - corner)).floor().clamp(max=size - 1)
    x, y = torch.where(valid[..., None], place, 0.0).to(torch.int64).unbind(-1)
    return y * size + x, valid
