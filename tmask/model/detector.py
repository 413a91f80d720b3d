"""Mask R-CNN whole: backbone -> FPN (or a single level) -> RPN -> RoI heads -> detections.

`forward_padded` is the model: fixed shapes, no host synchronisation. `forward` is a thin shell around it with
torchvision's contract, lists of images in and lists of dicts out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tmask.model.postprocess import to_list
from tmask.model.roi_heads import RoIHeads
from tmask.model.rpn import RPN
from tmask.model.transform import ImageTransform
from tmask.structures import Detections, ImageBatch, Targets


class MaskRCNN(nn.Module):
    """He et al. 2017, "Mask R-CNN". Build one with `tmask.build_model`.

    `loss_weights` maps each loss name to its factor in the sum. `paste` names the convention of `paste_masks`.
    """

    config: Any = None  # the ModelConfig it was built from, kept for checkpoints; nothing here reads it

    def __init__(
        self,
        *,
        transform: ImageTransform,
        backbone: nn.Module,
        fpn: nn.Module,
        rpn: RPN,
        roi_heads: RoIHeads,
        loss_weights: Mapping[str, float],
        paste: str,
    ) -> None:
        super().__init__()
        self.transform = transform
        self.backbone = backbone
        self.fpn = fpn
        self.rpn = rpn
        self.roi_heads = roi_heads
        self.loss_weights = dict(loss_weights)
        self.paste = paste
        self.detector_frozen = False

    def freeze_detector(self) -> None:
        """Freeze all but the mask head and its weight transfer, running statistics of batch norm included.

        This is the second stage of stage-wise training: Hu et al. 2018, section 3.2.

        Raises:
            ValueError: the model has no masks.
        """
        if not self.roi_heads.mask_parts():
            raise ValueError("only: expected none for a model without masks, got 'masks'")
        self.requires_grad_(False)
        for part in self.roi_heads.mask_parts():
            part.requires_grad_(True)
        self.detector_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode. Frozen layers stay in evaluation mode."""
        super().train(mode)
        if self.detector_frozen:
            # RPN and RoI heads stay in training mode: their top-N limits differ from evaluation's. Their children go to
            # evaluation mode, so that batch-norm statistics do not move.
            stay = [self.rpn, self.roi_heads, *self.roi_heads.mask_parts()]
            for part in (*self.children(), *self.rpn.children(), *self.roi_heads.children()):
                if part not in stay:
                    part.eval()
        return self

    def forward_padded(
        self, images: ImageBatch, targets: Targets | None = None, *, compact: bool = False
    ) -> dict[str, Tensor] | Detections:
        """Losses if `targets` are given, else detections in pixels of the padded images.

        The losses come weighted, each a float32 scalar under torchvision's name; train on their sum. No host
        synchronisation, unless `compact` drops empty slots before the mask head: same result, less work, and shapes
        that depend on data. It pays on a CPU.

        Features have the dtype of the weights. Errors: ValueError for weights of several dtypes outside autocast, and
        for a batch that leaves a norm a single value of a channel.
        """
        if self.training and targets is None:
            raise ValueError("targets: expected Targets in training mode, got None")
        try:
            return self._forward_padded(images, targets, compact=compact)
        except (RuntimeError, ValueError) as error:  # PyTorch's own name no setting
            cause = _cause(error, self, images.tensor)
            if cause is None:
                raise
            raise ValueError(cause) from error

    def _forward_padded(
        self, images: ImageBatch, targets: Targets | None, *, compact: bool
    ) -> dict[str, Tensor] | Detections:
        weight = next((p for p in self.backbone.parameters() if p.is_floating_point()), images.tensor)
        pixels = images.tensor.to(weight.dtype)  # of a model in half or double precision; boxes are float32 in all
        features = self.fpn(list(self.backbone(pixels).values()))  # P2-P6, or one level
        proposals, losses = self.rpn(features, images, targets)
        if targets is None:
            return self.roi_heads.detect(features, proposals, images, compact=compact)
        losses |= self.roi_heads.losses(features, proposals, images, targets, compact=compact)
        return {name: self.loss_weights[name] * loss.float() for name, loss in losses.items()}

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]] | None = None,
        *,
        masks: str = "probability",
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        """torchvision's contract: losses in training mode, else a list of dicts, one an image.

        images: [3, h, w] each, float in 0..1 or uint8, of any sizes. targets (training): dicts of ``boxes`` [G, 4]
        xyxy pixels, ``labels`` [G] in 1..num_classes-1, ``masks`` [G, h, w] of 0 and 1, and maybe ``iscrowd`` [G] and
        ``keypoints`` [G, Kp, 3].
        `masks` picks the form of the result's masks, see `tmask.model.postprocess.to_list`. A model without masks reads
        and gives none.
        """
        if not self.training:
            targets = None
        batch, padded_targets = self.transform(images, targets)
        result = self.forward_padded(batch, padded_targets, compact=not batch.tensor.is_cuda)
        if not isinstance(result, Detections):
            return result
        original_sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        return to_list(result, batch.sizes, original_sizes, masks=masks, convention=self.paste)


def _cause(error: Exception, model: nn.Module, pixels: Tensor) -> str | None:
    """Return the cause of a PyTorch error that the user can mend by a setting; None for any other error."""
    in_autocast = torch.is_autocast_enabled(pixels.device.type)
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    if isinstance(error, RuntimeError) and in_autocast and dtypes != ["float32"] and "type" in str(error):
        return (
            f"weights: expected float32 with torch.autocast, got {' and '.join(dtypes)}: model.float(), or no autocast"
        )
    if isinstance(error, RuntimeError) and len(dtypes) > 1 and "type" in str(error):
        mend = "give all the same, or keep all in float32 and use torch.autocast (in the commands --precision)"
        return f"weights: expected one dtype, got {' and '.join(dtypes)}: {mend}"
    if "more than 1 value per channel" not in str(error):
        return None
    size = f"batch_size {len(pixels)} of {pixels.shape[-2]} x {pixels.shape[-1]} pixels"
    if any(isinstance(module, _BatchNorm) and module.training for module in model.modules()):
        norm, mend = "bn", "larger --train.batch_size or --model.min_size, or --model.norm frozen_bn (or gn)"
    else:
        norm, mend = "gn", "larger --model.min_size, or --model.fpn_channels above the 32 groups"
    return f"norm {norm} needs more than one value a channel: {size} leaves a map of 1 x 1; {mend}"
