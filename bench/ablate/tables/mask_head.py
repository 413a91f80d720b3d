"""Convolutions against fully connected layers in the mask head."""

from bench.ablate.table import Claim, Table, Variant
from bench.ablate.tables import CROSSED, MASK_RCNN, R50_FPN

TABLE = Table(
    title="FCN or MLP in the mask head",
    about="Convolutions keep the layout of the RoI and share their weights between its places; fully connected layers "
    "must learn every place for itself, from the same objects. Thin shapes leave little room for a mask that is near.",
    source=f"{MASK_RCNN}, R50-FPN",
    metrics=("segm/AP", "segm/AP75", "bbox/AP"),
    variants={
        "fcn": Variant("FCN", published="33.6 mask AP"),
        "mlp": Variant("MLP", {"model.mask_head": "mlp"}, "31.5 mask AP"),
    },
    claims=(Claim("fcn", "mlp", "segm/AP", 2.1),),
    small=CROSSED,
    full=R50_FPN,
)
