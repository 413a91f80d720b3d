"""Mask loss: a sigmoid for each class against a softmax over the classes."""

from bench.ablate.table import Claim, Table, Variant
from bench.ablate.tables import CROSSED, MASK_RCNN, R50_C4

TABLE = Table(
    title="Sigmoid or softmax of the mask",
    about="With a sigmoid each class has a mask of its own, and the box head says which one counts. With a softmax "
    "the classes compete for each pixel, so the mask head must know the class as well as the outline: a pixel shared "
    "between two classes is above one half for neither. The drawn data leave it no way out, as classes look alike "
    "and two of them fill the same box, where a pixel of one is background to the other; photographs are kinder.",
    source=f"{MASK_RCNN}, R50-C4",
    metrics=("segm/AP", "segm/AP75", "bbox/AP"),
    variants={
        "sigmoid": Variant("sigmoid", published="30.3 mask AP"),
        "softmax": Variant("softmax", {"model.losses": {"mask": "softmax"}}, "24.8 mask AP"),
    },
    claims=(Claim("sigmoid", "softmax", "segm/AP", 5.5),),
    small=CROSSED,
    full=R50_C4,
    finding="Evaluated with a threshold of 0.3 or 0.2 in place of 0.5, the first seed of the softmax has a mask AP of "
    "12.0 and 19.6 instead of 2.9: what it loses is mostly the pixels that it shares out, and still it stays below.",
)
