"""RoIPool against RoIAlign, and what RoIAlign samples, on the one map of stride 32."""

from bench.ablate.table import Claim, Drawn, Setting, Table, Variant
from bench.ablate.tables._settings import MASK_RCNN

# Two samples a bin side for all, as adaptive ones cost the maximum of them several times as much on a CPU.
SAMPLES = 2

TABLE = Table(
    title="RoIPool or RoIAlign at stride 32",
    about="RoIPool takes whole cells, so it is off by up to half a cell: 16 pixels here, as much as half an object. "
    "The smaller objects are in cells, the more it matters, and most to AP75, which asks for tight masks.",
    source=f"{MASK_RCNN}, R50-C5; on R50-C4 RoIPool has 26.9, the maximum 30.2 and the mean 30.3",
    metrics=("segm/AP75", "segm/AP", "bbox/AP"),
    variants={
        "roi_pool": Variant(label="RoIPool", published="23.6 mask AP", model={"roi_extractor": {"op": "roi_pool"}}),
        "mean": Variant(
            label="RoIAlign, mean",
            published="30.9 mask AP",
            model={"roi_extractor": {"sampling_ratio": SAMPLES}},
        ),
        "max": Variant(
            label="RoIAlign, maximum",
            published="30.2 mask AP (C4)",
            model={"roi_extractor": {"sampling_ratio": SAMPLES, "reduction": "max"}},
        ),
        "bicubic": Variant(
            label="RoIAlign, bicubic",
            model={"roi_extractor": {"sampling_ratio": SAMPLES, "interpolation": "bicubic"}},
        ),
    },
    claims=(
        Claim(better="mean", worse="roi_pool", metric="segm/AP75", published=10.5),
        Claim(better="mean", worse="roi_pool", metric="segm/AP", published=7.3),
        Claim(better="mean", worse="max", metric="segm/AP", published=0.1, small=False),
        Claim(better="bicubic", worse="mean", metric="segm/AP", small=False),
    ),
    # Twice the size of the pictures: a map of 8 x 8 cells, and objects of 0.8 to 3.8 cells.
    small=Setting(
        preset="tiny",
        shapes=Drawn(variant="mixed", train_images=2000, val_images=200, size=128),
        model={"neck": "c5", "min_size": 256, "max_size": 256, "anchor_sizes": ((24.0, 40.0, 64.0, 96.0, 144.0),)},
        train={"steps": 1200, "batch_size": 4, "lr": 7e-4, "checkpoint_every": 100},
        data={"num_workers": 0},
    ),
    full=Setting(
        preset="r50_fpn",
        # The one level proposes as many boxes as those of a pyramid together.
        model={
            "neck": "c5",
            "anchor_sizes": ((32.0, 64.0, 128.0, 256.0, 512.0),),
            "rpn_pre_nms_top_n_train": 12_000,
            "rpn_pre_nms_top_n_test": 6_000,
        },
    ),
)
