"""The settings that most tables share."""

from __future__ import annotations

import dataclasses

from bench.ablate.table import Drawn, Setting

MASK_RCNN = "He et al., Mask R-CNN (2017), COCO"
# Its ablations are of R50-FPN and trained in stages, so their figures say little beside ours and are left out.
MASK_X = "Hu et al., Learning to Segment Every Thing (2018), COCO, masks of VOC's classes alone: the order of"

# The demo's with fewer steps: 0.4 seconds each on two CPU cores.
_TRAINING = {"steps": 800, "batch_size": 8, "lr": 1e-3, "checkpoint_every": 100}

# The shapes of the demo.
MIXED = Setting(
    preset="tiny",
    shapes=Drawn(variant="mixed", train_images=2000, val_images=200, size=128),
    train=_TRAINING,
    data={"num_workers": 0},
)

# Pairs of thin shapes fill the same box: a mask is wrong wherever a head cannot say which of the two is meant. No
# flips, which would turn the classes into one another.
CROSSED = Setting(
    preset="tiny",
    shapes=Drawn(variant="crossed", train_images=2000, val_images=200, size=128),
    train=_TRAINING,
    data={"num_workers": 0, "hflip": 0.0},
)

# The same, where leaves have boxes alone: they share their directions with the others, and not their outline.
WITH_MASKS = ("rising bar", "falling bar", "rising wedge", "falling wedge", "rising dumbbell", "falling dumbbell")
BOXES_ONLY = dataclasses.replace(CROSSED, data={**CROSSED.data, "mask_classes": ",".join(WITH_MASKS)})

# The published schedule on one GPU: 90,000 steps of 16 images.
R50_FPN, R50_C4 = Setting(preset="r50_fpn"), Setting(preset="r50_c4")
MASK_X_R101 = Setting(preset="r101_fpn", data={"mask_classes": "voc"})
