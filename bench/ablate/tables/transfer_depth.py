"""Mask^X R-CNN: the depth of the function that makes mask predictors, and what masks of all classes would reach."""

from bench.ablate.table import Claim, Table, Variant
from bench.ablate.tables import BOXES_ONLY, MASK_X, MASK_X_R101

TABLE = Table(
    title="Masks of classes that have boxes alone: the depth of the transfer",
    about="How many layers the function has that makes a mask predictor of a class's weights in the box head. The "
    "oracle learns from the masks of all classes, and bounds what can be transferred.",
    source=f"{MASK_X} table 1b, two layers above one and three, and an oracle about 10 points higher",
    metrics=("segm/AP_boxes_only", "segm/AP_with_masks", "bbox/AP"),
    variants={
        "layers_1": Variant("1 layer", {"model.mask_transfer": {"layers": 1}}),
        "layers_2": Variant("2 layers", {"model.mask_transfer": {"layers": 2}}),
        "layers_3": Variant("3 layers", {"model.mask_transfer": {"layers": 3}}),
        "oracle": Variant("oracle: all masks", {"data.mask_classes": None}),
    },
    claims=(
        Claim("oracle", "layers_2", "segm/AP_boxes_only", "about +10"),
        Claim("layers_2", "layers_1", "segm/AP_boxes_only", "above", small=False),
        Claim("layers_2", "layers_3", "segm/AP_boxes_only", "above", small=False),
    ),
    small=BOXES_ONLY,
    full=MASK_X_R101,
)
