"""Mask^X R-CNN: masks of classes that have boxes alone, by what their mask predictors are made of."""

from bench.ablate.table import Claim, Table, Variant
from bench.ablate.tables._settings import BOXES_ONLY, MASK_X, MASK_X_R101

TABLE = Table(
    title="Masks of classes that have boxes alone: what their weights are made of",
    about="Some classes have no masks in training. A class-agnostic head can only segment what they have in common "
    "with the others; weight transfer makes a predictor for each from its weights in the box head. Drawn leaves have "
    "boxes alone, and rise or fall as the bars, wedges and dumbbells do that have masks: only the class says which of "
    "two shapes in one box is meant.",
    source=f"{MASK_X} table 1a, from above: both inputs, the regressor's, the classifier's, and far below the agnostic "
    "head. With an MLP fused in, both inputs have 23.8 mask AP on the classes without masks (R101-FPN, table 2)",
    metrics=("segm/AP_boxes_only", "segm/AP_with_masks", "bbox/AP"),
    variants={
        "agnostic": Variant(label="class-agnostic", model={"mask_class_agnostic": True}),
        "cls": Variant(label="classifier's weights", model={"mask_transfer": {"inputs": "cls"}}),
        "box": Variant(label="regressor's weights", model={"mask_transfer": {"inputs": "box"}}),
        "cls_box": Variant(label="both", model={"mask_transfer": {"inputs": "cls_box"}}),
    },
    claims=(
        Claim(better="cls_box", worse="agnostic", metric="segm/AP_boxes_only", published="above"),
        Claim(better="cls", worse="agnostic", metric="segm/AP_boxes_only", published="above"),
        Claim(better="box", worse="agnostic", metric="segm/AP_boxes_only", published="above"),
        Claim(better="cls_box", worse="box", metric="segm/AP_boxes_only", published="above", small=False),
        Claim(better="box", worse="cls", metric="segm/AP_boxes_only", published="above", small=False),
    ),
    small=BOXES_ONLY,
    full=MASK_X_R101,
)
