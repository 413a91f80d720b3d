"""The padded, batched values that flow through the model. Letters: N images, G ground-truth boxes, P proposals,
S sampled RoIs, D detections, M mask side, Kp keypoints, H W padded image size.

Each is a NamedTuple of tensors, so it is a pytree (torch.compile, torch.export and CUDA graphs take it as it is) and
never changes in place. All boxes are xyxy, float32, in pixels of the padded (resized) image. Rows past the valid ones
hold zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ImageBatch(NamedTuple):
    """Normalised images padded to one size."""

    tensor: Tensor  # [N, 3, H, W] float
    sizes: Tensor  # [N, 2] int64: height and width of each image before padding


class Targets(NamedTuple):
    """Ground truth padded to one count G."""

    boxes: Tensor  # [N, G, 4] float32
    labels: Tensor  # [N, G] int64, 1..num_classes-1; 0 in padding
    valid: Tensor  # [N, G] bool: a real annotation that is no crowd
    crowd: Tensor  # [N, G] bool: a COCO crowd region; neither target nor negative
    masks: Tensor | None  # [N, G, H, ceil(W / 32)] int32: pixel x is bit x % 32 of word x // 32
    has_mask: Tensor  # [N, G] bool
    keypoints: Tensor | None = None  # [N, G, Kp, 3] float32: x, y and visibility, 0 for none


class Proposals(NamedTuple):
    """What the RPN hands to the RoI heads, by falling score."""

    boxes: Tensor  # [N, P, 4] float32
    scores: Tensor  # [N, P] float32, objectness probability
    counts: Tensor  # [N] int64: rows at and past counts[n] are padding

    def valid(self) -> Tensor:
        """Which rows are proposals: [N, P] bool."""
        return torch.arange(self.boxes.shape[1], device=self.boxes.device) < self.counts[:, None]


class SampledRois(NamedTuple):
    """RoIs that the training losses of the heads see; all positives stand in the first slots."""

    boxes: Tensor  # [N, S, 4] float32
    labels: Tensor  # [N, S] int64: 0 for a negative
    gt_index: Tensor  # [N, S] int64: row in Targets; -1 unless positive
    positive: Tensor  # [N, S] bool
    valid: Tensor  # [N, S] bool: a slot that was filled


class Detections(NamedTuple):
    """The result of one batch, by falling score."""

    boxes: Tensor  # [N, D, 4] float32
    scores: Tensor  # [N, D] float32
    labels: Tensor  # [N, D] int64
    counts: Tensor  # [N] int64
    masks: Tensor | None  # [N, D, M, M] float32 probabilities, not yet pasted into the image
    keypoints: Tensor | None = None  # [N, D, Kp, 3] float32: x, y, score (the heat map's value there)

    def valid(self) -> Tensor:
        """Which rows are detections: [N, D] bool."""
        return torch.arange(self.boxes.shape[1], device=self.boxes.device) < self.counts[:, None]
