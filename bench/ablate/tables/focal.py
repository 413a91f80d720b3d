"""Cross-entropy against focal loss, in the RPN and in the box head."""

from bench.ablate.table import Claim, Table, Variant
from bench.ablate.tables._settings import MIXED, R50_FPN

TABLE = Table(
    title="Cross-entropy or focal loss",
    about="Focal loss was made for one-stage detectors, whose background outnumbers objects a thousandfold. The RPN "
    "and the sampled RoIs of a two-stage one have been balanced already: no direction is published, nor expected.",
    source="Lin et al., Focal Loss for Dense Object Detection (2017), COCO, of a one-stage detector alone: "
    "cross-entropy 31.1 box AP, focal loss 34.0",
    metrics=("bbox/AP", "bbox/AP75", "segm/AP"),
    variants={
        "ce": Variant(label="cross-entropy"),
        "focal_rpn": Variant(label="focal in the RPN", model={"losses": {"rpn_objectness": "focal"}}),
        "focal_box": Variant(label="focal in the box head", model={"losses": {"classifier": "softmax_focal"}}),
        "focal_both": Variant(
            label="focal in both",
            model={"losses": {"rpn_objectness": "focal", "classifier": "softmax_focal"}},
        ),
    },
    claims=(
        Claim(better="focal_both", worse="ce", metric="bbox/AP", small=False),
        Claim(better="focal_rpn", worse="ce", metric="bbox/AP", small=False),
        Claim(better="focal_box", worse="ce", metric="bbox/AP", small=False),
    ),
    small=MIXED,
    full=R50_FPN,
)
