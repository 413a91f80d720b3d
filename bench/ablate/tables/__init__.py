"""The tables, one file each, and the settings they share. A new file with a ``TABLE`` is a new table."""

import dataclasses

from bench.ablate.table import Drawn, Setting

MASK_RCNN = "He et al., Mask R-CNN (2017), COCO"
# Their ablations train R50-FPN in stages. Their figures say little beside ours, so the tables leave them out.
MASK_X = "Hu et al., Learning to Segment Every Thing (2018), COCO, masks of VOC's classes alone: the order of"

# The training of the demo with fewer steps: 0.4 seconds a step on two CPU cores.
_TRAINING = {"train.steps": 800, "train.batch_size": 8, "train.lr": 1e-3, "train.checkpoint_every": 100}

# The shapes of the demo.
MIXED = Setting("tiny", {**_TRAINING, "data.num_workers": 0}, Drawn("mixed"))

# Pairs of thin shapes fill the same box: a mask is wrong wherever a head cannot say which of the two is meant. A flip
# would turn one class into another, so there are no flips.
CROSSED = Setting("tiny", {**MIXED.changes, "data.hflip": 0.0}, Drawn("crossed"))

# The same, but leaves have boxes only. They share their directions with the other shapes, not their outline.
WITH_MASKS = ("rising bar", "falling bar", "rising wedge", "falling wedge", "rising dumbbell", "falling dumbbell")
BOXES_ONLY = dataclasses.replace(CROSSED, changes={**CROSSED.changes, "data.mask_classes": ",".join(WITH_MASKS)})

# The published schedule on one GPU: 90,000 steps of 16 images.
R50_FPN, R50_C4 = Setting("r50_fpn"), Setting("r50_c4")
MASK_X_R101 = Setting("r101_fpn", {"data.mask_classes": "voc"})
