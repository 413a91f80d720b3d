"""RoIPool against RoIAlign, and what RoIAlign samples, on the one map of stride 32."""

from bench.ablate.table import Claim, Drawn, Setting, Table, Variant
from bench.ablate.tables import MASK_RCNN

# Two samples along each side of a bin: with adaptive sampling the maximum takes several times as long on a CPU.
ALIGN = {"sampling_ratio": 2}

TABLE = Table(
    title="RoIPool or RoIAlign at stride 32",
    about="RoIPool takes whole cells, so it is off by up to half a cell: 16 pixels here, as much as half an object. "
    "The smaller objects are in cells, the more it matters, and most to AP75, which asks for tight masks.",
    source=f"{MASK_RCNN}, R50-C5; on R50-C4 RoIPool has 26.9, the maximum 30.2 and the mean 30.3",
    metrics=("segm/AP75", "segm/AP", "bbox/AP"),
    variants={
        "roi_pool": Variant("RoIPool", {"model.roi_extractor": {"op": "roi_pool"}}, "23.6 mask AP"),
        "mean": Variant("RoIAlign, mean", {"model.roi_extractor": ALIGN}, "30.9 mask AP"),
        "max": Variant(
            "RoIAlign, maximum", {"model.roi_extractor": {**ALIGN, "reduction": "max"}}, "30.2 mask AP (C4)"
        ),
        "bicubic": Variant("RoIAlign, bicubic", {"model.roi_extractor": {**ALIGN, "interpolation": "bicubic"}}),
    },
    claims=(
        Claim("mean", "roi_pool", "segm/AP75", 10.5),
        Claim("mean", "roi_pool", "segm/AP", 7.3),
        Claim("mean", "max", "segm/AP", 0.1, small=False),
        Claim("bicubic", "mean", "segm/AP", small=False),
    ),
    # Images at twice their size: a map of 8 x 8 cells, and objects of 0.8 to 3.8 cells.
    small=Setting(
        "tiny",
        {
            "model.neck": "c5",
            "model.min_size": 256,
            "model.max_size": 256,
            "model.anchor_sizes": ((24.0, 40.0, 64.0, 96.0, 144.0),),
            "train.steps": 1200,
            "train.batch_size": 4,
            "train.lr": 7e-4,
            "train.checkpoint_every": 100,
            "data.num_workers": 0,
        },
        Drawn("mixed"),
    ),
    full=Setting(
        "r50_fpn",
        {
            "model.neck": "c5",
            "model.anchor_sizes": ((32.0, 64.0, 128.0, 256.0, 512.0),),
            # The one level proposes as many boxes as all levels of a pyramid together.
            "model.rpn_pre_nms_top_n_train": 12_000,
            "model.rpn_pre_nms_top_n_test": 6_000,
        },
    ),
)
