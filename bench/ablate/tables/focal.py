"""Cross-entropy against focal loss, in the RPN and in the box head."""

from bench.ablate.table import Claim, Table, Variant
from bench.ablate.tables import MIXED, R50_FPN

RPN, BOX = {"rpn_objectness": "focal"}, {"classifier": "softmax_focal"}

TABLE = Table(
    title="Cross-entropy or focal loss",
    about="Focal loss was made for one-stage detectors, whose background outnumbers objects a thousandfold. The RPN "
    "and the sampled RoIs of a two-stage one have been balanced already: no direction is published, nor expected.",
    source="Lin et al., Focal Loss for Dense Object Detection (2017), COCO, of a one-stage detector alone: "
    "cross-entropy 31.1 box AP, focal loss 34.0",
    metrics=("bbox/AP", "bbox/AP75", "segm/AP"),
    variants={
        "ce": Variant("cross-entropy"),
        "focal_rpn": Variant("focal in the RPN", {"model.losses": RPN}),
        "focal_box": Variant("focal in the box head", {"model.losses": BOX}),
        "focal_both": Variant("focal in both", {"model.losses": {**RPN, **BOX}}),
    },
    claims=tuple(Claim(name, "ce", "bbox/AP", small=False) for name in ("focal_both", "focal_rpn", "focal_box")),
    small=MIXED,
    full=R50_FPN,
)
