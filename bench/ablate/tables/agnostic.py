"""One mask for each class against one mask for all classes."""

from bench.ablate.table import Claim, Table, Variant
from bench.ablate.tables import CROSSED, MASK_RCNN, R50_C4

TABLE = Table(
    title="Class-specific or class-agnostic masks",
    about="In photographs a box mostly says which object is meant, and one mask for all classes is nearly as good. The "
    "drawn shapes are made against it: two of them fill the same box, and only the class tells them apart.",
    source=f"{MASK_RCNN}, R50-C4",
    metrics=("segm/AP", "segm/AP75", "bbox/AP"),
    variants={
        "specific": Variant("class-specific", published="30.3 mask AP"),
        "agnostic": Variant("class-agnostic", {"model.mask_class_agnostic": True}, "29.7 mask AP"),
    },
    claims=(Claim("specific", "agnostic", "segm/AP", 0.6),),
    small=CROSSED,
    full=R50_C4,
)
