"""Region proposal network: FPN levels in, proposals (and in training two losses) out.

Letters: N images, B anchors a cell, A anchors of all levels, P proposals, G ground-truth boxes, S sampled anchors,
C channels, H W size of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmask.model.losses import BoxLoss, Focal, rpn_losses
from tmask.model.sampling import Sampler, sample, take_rows
from tmask.structures import ImageBatch, Proposals, Targets
from tmask_kernels import AnchorSpec, make_anchors, match_anchors, rpn_proposals


class RPNHead(nn.Module):
    """A 3x3 convolution shared by all levels, then objectness and box deltas for the B anchors of each cell.

    `objectness_bias`: what the objectness begins with.
    """

    def __init__(self, channels: int, num_anchors: int, *, objectness_bias: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.deltas = nn.Conv2d(channels, 4 * num_anchors, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)  # Ren et al. 2015, section 3.1.3
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.constant_(self.objectness.bias, objectness_bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits [N, B, H, W] and deltas [N, 4B, H, W] for each level [N, C, H, W]."""
        hidden = [F.relu(self.conv(x)) for x in features]
        return [self.objectness(x) for x in hidden], [self.deltas(x) for x in hidden]


class TopN(NamedTuple):
    """A limit that differs between training and inference."""

    train: int
    test: int


class RPN(nn.Module):
    """Proposes boxes that may hold an object, whatever its class (Ren et al. 2015, "Faster R-CNN").

    `fg_iou`, `bg_iou`: an anchor is positive at or above the first, negative below the second. `batch_size` anchors
    an image enter the loss, at most `positive_fraction` of them positive. `pre_nms_top_n` is a level's limit,
    `post_nms_top_n` an image's. `min_size` in pixels. `sampler` draws the anchors of the losses. With `focal` the
    objectness learns from all anchors by that loss, and nothing is drawn. `box_loss` is that of positive anchors.
    """

    def __init__(
        self,
        *,
        channels: int,
        anchors: AnchorSpec,
        fg_iou: float,
        bg_iou: float,
        batch_size: int,
        positive_fraction: float,
        pre_nms_top_n: TopN,
        post_nms_top_n: TopN,
        nms_threshold: float,
        min_size: float,
        score_threshold: float,
        sampler: Sampler = sample,
        focal: Focal | None = None,
        box_loss: BoxLoss = "smooth_l1",
    ) -> None:
        super().__init__()
        self.head = RPNHead(
            channels,
            len(anchors.sizes[0]) * len(anchors.aspect_ratios),
            objectness_bias=0.0 if focal is None else focal.bias,
        )
        self.anchors = anchors
        self.fg_iou, self.bg_iou = fg_iou, bg_iou
        self.batch_size, self.positive_fraction = batch_size, positive_fraction
        self.pre_nms_top_n, self.post_nms_top_n = pre_nms_top_n, post_nms_top_n
        self.nms_threshold, self.min_size, self.score_threshold = nms_threshold, min_size, score_threshold
        self.sampler = sampler
        self.focal, self.box_loss = focal, box_loss

    def forward(
        self, features: Sequence[Tensor], images: ImageBatch, targets: Targets | None
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """Proposals of fixed size, and the losses if `targets` are given. No gradient flows through the proposals."""
        objectness, deltas = self.head(features)
        height, width = images.tensor.shape[-2:]
        boxes, scores, counts = rpn_proposals(
            [x.detach() for x in objectness],
            [x.detach() for x in deltas],
            images.sizes,
            self.anchors,
            padded_size=(height, width),
            pre_nms_top_n=self.pre_nms_top_n.train if self.training else self.pre_nms_top_n.test,
            post_nms_top_n=self.post_nms_top_n.train if self.training else self.post_nms_top_n.test,
            nms_threshold=self.nms_threshold,
            min_size=self.min_size,
            score_threshold=self.score_threshold,
        )
        losses = {} if targets is None else self._losses(objectness, deltas, (height, width), targets)
        return Proposals(boxes, scores, counts), losses

    def _losses(
        self, objectness: list[Tensor], deltas: list[Tensor], size: tuple[int, int], targets: Targets
    ) -> dict[str, Tensor]:
        feature_sizes = [(x.shape[-2], x.shape[-1]) for x in objectness]
        anchors = make_anchors(self.anchors, feature_sizes, size, device=targets.boxes.device)  # [A, 4]
        matches, _ = match_anchors(
            anchors,
            targets.boxes,
            targets.valid,
            gt_crowd=targets.crowd,
            high=self.fg_iou,
            low=self.bg_iou,
            allow_low_quality=True,
        )  # [N, A]
        # Anchors run by level, row, column, then anchor of the cell; the maps hold the anchor before the cell.
        logits = torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in objectness], dim=1)  # [N, A]
        flat = torch.cat([x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4) for x in deltas], dim=1)  # [N, A, 4]
        if self.focal is None:
            chosen = self.sampler(
                matches >= 0, matches == -1, size=self.batch_size, positive_fraction=self.positive_fraction
            )  # [N, S]
            logits, flat, anchors = logits.gather(1, chosen.rows), take_rows(flat, chosen.rows), anchors[chosen.rows]
            matches, positive, valid = matches.gather(1, chosen.rows), chosen.positive, chosen.valid
        else:
            anchors, positive, valid = anchors.expand_as(flat), matches >= 0, matches >= -1  # -2 is ignored
        objectness_loss, box_loss = rpn_losses(
            logits,
            flat,
            anchors,
            take_rows(targets.boxes, matches.clamp(min=0)),
            positive,
            valid,
            focal=self.focal,
            box_loss=self.box_loss,
        )
        return {"loss_objectness": objectness_loss, "loss_rpn_box_reg": box_loss}
