"""RoIPool, and RoIAlign with other samples, on the one map of stride 32."""

from bench.ablate.table import Claim, Table, Variant
from bench.ablate.tables._settings import MASK_RCNN, MIXED, R50_FPN

TABLE = Table(
    title="x",
    about="y",
    source=MASK_RCNN,
    metrics=("segm/AP75", "segm/AP", "bbox/AP"),
    variants={
        "roi_pool": Variant(label="RoIPool", published="23.6", model={"roi_extractor": {"op": "roi_pool"}}),
        "mean": Variant(label="RoIAlign, mean", published="30.9"),
    },
    claims=(Claim(better="mean", worse="roi_pool", metric="segm/AP75", published=10.5),),
    small=MIXED,
    full=R50_FPN,
)
