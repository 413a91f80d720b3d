"""Every argument of every public op, given wrong values: a ValueError that names op, argument, expected and got.

`OPS` lists a good call of each op with the kind of each argument; `BAD` lists wrong values of each kind. What is not
wrong for one argument is in its `fine`. ``python -m tests.kernels.test_arguments`` prints what escapes.
"""

from __future__ import annotations

import collections
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

import tmask_kernels as K
from tmask_kernels import modules

SPEC = K.AnchorSpec(((16.0,), (32.0,)), (0.5, 1.0), strides=(4, 8))


@dataclass(frozen=True)
class Arg:
    """A good `value` and its `kind`, a key of `BAD`. `fine`: labels of values of that kind that this argument takes;
    `more`: wrong values of this argument alone."""

    kind: str
    value: Any
    fine: tuple[str, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """`names`: what else a message may call the op or an argument, as a module has its op's messages."""

    call: Callable[..., Any]
    args: dict[str, Arg]
    names: dict[str, str] = field(default_factory=dict)


def use_backend(backend: str) -> None:
    with K.use_backend(backend):
        pass


def boxes(*shape: int) -> Tensor:
    return torch.tensor([1.0, 1.0, 6.0, 7.0]).expand(*shape, 4).clone()


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


BACKEND = Arg("choice", "reference", ("None",))
NONE = ("None",)
PYRAMID = [torch.rand(2, 3, 16, 16), torch.rand(2, 3, 8, 8)]
POOL_OPTIONS = {
    "aligned": Arg("flag", True),
    "reduction": Arg("choice", "mean"),
    "interpolation": Arg("choice", "bilinear"),
    "cubic_coeff": Arg("number", -0.5, ("negative", "zero", "large")),
    "backend": BACKEND,
}
UNIT = {"too low": -0.001, "too high": 1.001}

ELSEWHERE = {"elsewhere": torch.ones(2, 2, device="meta")}
IMAGES = {"unlike": torch.zeros(3, 2), "three": torch.zeros(2, 3)} | ELSEWHERE
ALONE = Arg("given", None, more={"without padded boxes": torch.ones(2, 3, dtype=torch.bool)})
ROIS = Arg("rois", [boxes(3), boxes(1)])

OPS: dict[str, Op] = {
    "nms": Op(K.nms, {
        "boxes": Arg("floats", boxes(3)),
        "scores": Arg("floats", ones(3), more={"unlike": ones(2)}),
        "iou_threshold": Arg("number", 0.5, ("zero", "one tensor"), UNIT),
        "max_output": Arg("whole", 2, ("None", "zero")),
        "backend": BACKEND,
    }),
    "batched_nms": Op(K.batched_nms, {
        "boxes": Arg("floats", boxes(3)),
        "scores": Arg("floats", ones(3), more={"unlike": ones(2)}),
        "idxs": Arg("integers", ones(3, dtype=torch.int64), more={"unlike": ones(2, dtype=torch.int64)}),
        "iou_threshold": Arg("number", 0.5, ("zero", "one tensor"), UNIT),
        "max_output": Arg("whole", 2, ("None", "zero")),
        "backend": BACKEND,
    }),
    "padded_nms": Op(K.padded_nms, {
        "boxes": Arg("floats", boxes(2, 3)),
        "scores": Arg("floats", ones(2, 3), more={"unlike": ones(2, 2)}),
        "iou_threshold": Arg("number", 0.5, ("zero", "one tensor", "tensor"),
                             UNIT | {"three": ones(3), "complex": ones(2) * 1j, "elsewhere": ones(2).to("meta")}),
        "valid": Arg("bools", ones(2, 3, dtype=torch.bool), NONE),
        "max_output": Arg("whole", 2, ("zero",)),
        "backend": BACKEND,
    }),
    "soft_nms": Op(K.soft_nms, {
        "boxes": Arg("floats", boxes(3)),
        "scores": Arg("floats", ones(3), more={"unlike": ones(2)}),
        "method": Arg("choice", "linear"),
        "iou_threshold": Arg("number", 0.5, ("zero",), UNIT),
        "sigma": Arg("number", 0.5, ("large",)),
        "score_threshold": Arg("number", 0.001, ("zero", "large")),
        "backend": BACKEND,
    }),
    "encode_boxes": Op(K.encode_boxes, {
        "boxes": Arg("floats", boxes(3), ("another axis", "an axis less")),
        "anchors": Arg("floats", boxes(3), ("another axis", "an axis less"), {"unlike": boxes(2)}),
        "weights": Arg("numbers", (1.0, 1.0, 2.0, 2.0)),
        "backend": BACKEND,
    }),
    "decode_boxes": Op(K.decode_boxes, {
        "deltas": Arg("floats", boxes(2, 3), ("another axis", "an axis less")),
        "anchors": Arg("floats", boxes(2, 3), ("another axis", "an axis less"), {"unlike": boxes(2)}),
        "weights": Arg("numbers", (1.0, 1.0, 2.0, 2.0)),
        "scale_clamp": Arg("number", 4.0, ("zero", "inf", "large")),
        "image_size": Arg("pair", (20, 30), NONE, IMAGES | {"complex": torch.zeros(2, 2) * 1j}),
        "backend": BACKEND,
    }),
    "rpn_proposals": Op(K.rpn_proposals, {
        "objectness": Arg("maps", [ones(2, 2, 4, 4), ones(2, 2, 2, 2)], (), {"unlike": [ones(2, 3, 4, 4)] * 2}),
        "deltas": Arg("maps", [ones(2, 8, 4, 4), ones(2, 8, 2, 2)], (), {"unlike": [ones(2, 8, 4, 4)] * 2}),
        "image_sizes": Arg("reals", torch.tensor([[16, 16], [12, 16]]), more=IMAGES),
        "spec": Arg("object", SPEC),
        "padded_size": Arg("pair", (16, 16)),
        "pre_nms_top_n": Arg("whole", 5),
        "post_nms_top_n": Arg("whole", 3),
        "nms_threshold": Arg("number", 0.7, ("zero",), UNIT),
        "min_size": Arg("number", 0.0, ("zero", "large")),
        "score_threshold": Arg("number", 0.0, ("zero", "negative", "large")),
        "backend": BACKEND,
    }),
    "detections": Op(K.detections, {
        "class_scores": Arg("floats", ones(2, 3, 4)),
        "boxes": Arg("floats", boxes(2, 3, 4), more={"unlike": boxes(2, 3, 3)}),
        "valid": Arg("bools", ones(2, 3, dtype=torch.bool)),
        "image_sizes": Arg("reals", torch.tensor([[16, 16], [12, 16]]), more=IMAGES),
        "score_threshold": Arg("number", 0.05, ("zero", "negative", "large")),
        "nms_threshold": Arg("number", 0.5, ("zero",), UNIT),
        "max_detections": Arg("whole", 4),
        "min_size": Arg("number", 0.01, ("zero", "large")),
        "backend": BACKEND,
    }),
    "match_anchors": Op(K.match_anchors, {
        "anchors": Arg("floats", boxes(5), more={"unlike": boxes(3, 5)}),
        "gt_boxes": Arg("floats", boxes(2, 3)),
        "gt_valid": Arg("bools", ones(2, 3, dtype=torch.bool)),
        "gt_crowd": Arg("bools", torch.zeros(2, 3, dtype=torch.bool), NONE),
        "high": Arg("number", 0.7, (), UNIT),
        "low": Arg("number", 0.3, ("zero",), UNIT | {"over high": 0.8}),
        "allow_low_quality": Arg("flag", True),
        "backend": BACKEND,
    }),
    "mask_targets": Op(K.mask_targets, {
        "packed": Arg("int32s", ones(2, 3, 8, 1, dtype=torch.int32), ("wide",)),
        "boxes": Arg("floats", boxes(2, 4)),
        "gt_index": Arg("int64s", torch.zeros(2, 4, dtype=torch.int64)),
        "size": Arg("whole", 7),
        "convention": Arg("choice", "detectron2"),
        "image_sizes": Arg("reals", torch.tensor([[8, 8], [8, 8]]), NONE, IMAGES),
        "backend": BACKEND,
    }),
    "mask_bce": Op(K.mask_bce, {
        "logits": Arg("floats", ones(2, 3, 4, 4), more={"oblong": ones(2, 3, 4, 5), "no channel": ones(2, 0, 4, 4)}),
        "classes": Arg("int64s", torch.zeros(2, dtype=torch.int64), more={"unlike": ones(3, dtype=torch.int64)}),
        "targets": Arg("reals or bools", ones(2, 4, 4), more={"unlike": ones(2, 4, 5)}),
        "valid": Arg("bools", ones(2, dtype=torch.bool)),
        "backend": BACKEND,
    }),
    "paste_masks": Op(K.paste_masks, {
        "masks": Arg("floats or bools", ones(2, 4, 4), more={"oblong": ones(2, 4, 5), "empty": ones(2, 0, 0)}),
        "boxes": Arg("floats", boxes(2), more={"unlike": boxes(3)}),
        "image_size": Arg("pair", (20, 30)),
        "logits": Arg("flag", False),
        "threshold": Arg("number", 0.5, (), {"too high": 1.001}),
        "output": Arg("choice", "bool"),
        "convention": Arg("choice", "detectron2"),
        "backend": BACKEND,
    }),
    "paste_masks_batched": Op(K.paste_masks_batched, {
        "masks": Arg("floats or bools", ones(2, 3, 4, 4), more={"oblong": ones(2, 3, 4, 5)}),
        "boxes": Arg("floats", boxes(2, 3), more={"unlike": boxes(2, 2)}),
        "counts": Arg("counts", [1, 3]),
        "image_sizes": Arg("pairs", [(20, 30), (9, 9)], more={"one": [(20, 30)]}),
        "logits": Arg("flag", False),
        "threshold": Arg("number", 0.5, (), {"too high": 1.001}),
        "output": Arg("choice", "rle"),
        "convention": Arg("choice", "detectron2"),
        "backend": BACKEND,
    }),
    "decode_keypoints": Op(K.decode_keypoints, {
        "heatmaps": Arg("floats", ones(1, 2, 3, 4, 4), ("wide",), more={"no row": ones(1, 2, 3, 0, 4)}),
        "boxes": Arg("floats", boxes(1, 2), more={"unlike": boxes(1, 3)}),
        "valid": Arg("bools", ones(1, 2, dtype=torch.bool), NONE),
        "backend": BACKEND,
    }),
    "sigmoid_focal_loss": Op(K.sigmoid_focal_loss, {
        "inputs": Arg("floats", ones(2, 3)),
        "targets": Arg("reals or bools", ones(2, 3), more={"unlike": ones(3)}),
        "alpha": Arg("number", 0.25, ("zero", "negative"), {"too high": 1.001}),
        "gamma": Arg("number", 2.0, ("zero", "large")),
        "reduction": Arg("choice", "mean"),
        "backend": BACKEND,
    }),
    "softmax_focal_loss": Op(K.softmax_focal_loss, {
        "inputs": Arg("floats", ones(2, 3), ("wide",), more={"one class": ones(2, 1), "scalar": torch.tensor(1.0)}),
        "labels": Arg("int64s", ones(2, dtype=torch.int64), more={"unlike": ones(3, dtype=torch.int64)}),
        "alpha": Arg("number", 0.25, ("zero", "negative"), {"too high": 1.001}),
        "gamma": Arg("number", 2.0, ("zero", "large")),
        "reduction": Arg("choice", "sum"),
        "backend": BACKEND,
    }),
    "roi_align": Op(K.roi_align, {
        "input": Arg("floats", ones(2, 3, 8, 8), ("wide",)),
        "boxes": ROIS,
        "valid": ALONE,
        "output_size": Arg("size", (2, 2)),
        "spatial_scale": Arg("number", 0.5, ("large",)),
        "sampling_ratio": Arg("whole", 2, ("zero", "negative"), {"huge": 2**31}),
        **POOL_OPTIONS,
    }),
    "multiscale_roi_align": Op(K.multiscale_roi_align, {
        "features": Arg("maps", PYRAMID, (), {"one of another dtype": [PYRAMID[0], PYRAMID[1].half()],
                                              "one of other channels": [PYRAMID[0], PYRAMID[1][:, :2]]}),
        "boxes": Arg("floats", boxes(2, 3)),
        "valid": Arg("bools", ones(2, 3, dtype=torch.bool), NONE),
        "output_size": Arg("size", (2, 2)),
        "spatial_scales": Arg("numbers", [0.25, 0.125], more={"quarters": [0.5, 0.125], "thirds": [0.3, 0.15]}),
        "sampling_ratio": Arg("whole", 2, ("zero", "negative"), {"huge": 2**31}),
        "canonical_scale": Arg("number", 224, ("large",), {"huge": 1e300}),
        "canonical_level": Arg("whole", 4, ("zero", "negative"), {"huge": 2000, "deep": -2000}),
        "level_convention": Arg("choice", "torchvision"),
        **POOL_OPTIONS,
    }),
    "roi_pool": Op(K.roi_pool, {
        "input": Arg("floats", ones(2, 3, 8, 8), ("wide",)),
        "boxes": Arg("floats", boxes(2, 3)),
        "valid": Arg("bools", ones(2, 3, dtype=torch.bool), NONE),
        "output_size": Arg("size", (2, 2)),
        "spatial_scale": Arg("number", 0.5, ("large",)),
        "backend": BACKEND,
    }),
    "RoIAlign": Op(lambda input, rois, **options: modules.RoIAlign(**options)(input, rois), {
        "input": Arg("floats", ones(2, 3, 8, 8), ("wide",)),
        "rois": ROIS,
        "output_size": Arg("size", (2, 2)),
        "spatial_scale": Arg("number", 0.5, ("large",)),
        "sampling_ratio": Arg("whole", 2, ("zero", "negative"), {"huge": 2**31}),
        **POOL_OPTIONS,
    }, {"RoIAlign": "roi_align", "rois": "boxes"}),
    "RoIPool": Op(lambda input, rois, **options: modules.RoIPool(**options)(input, rois), {
        "input": Arg("floats", ones(2, 3, 8, 8), ("wide",)),
        "rois": ROIS,
        "output_size": Arg("size", (2, 2)),
        "spatial_scale": Arg("number", 0.5, ("large",)),
        "backend": BACKEND,
    }, {"RoIPool": "roi_pool", "rois": "boxes"}),
    "MultiScaleRoIAlign": Op(
        lambda x, boxes, image_shapes, **options: modules.MultiScaleRoIAlign(**options)(x, boxes, image_shapes), {
        "x": Arg("map of maps", {"0": PYRAMID[0], "1": PYRAMID[1]}),
        "boxes": ROIS,
        "image_shapes": Arg("pairs", [(64, 64), (64, 60)]),
        "featmap_names": Arg("names", ["0", "1"]),
        "output_size": Arg("size", (2, 2)),
        "sampling_ratio": Arg("whole", 2, ("zero", "negative"), {"huge": 2**31}),
        "canonical_scale": Arg("number", 224, ("large",), {"huge": 1e300}),
        "canonical_level": Arg("whole", 4, ("zero", "negative"), {"huge": 2000}),
        "level_convention": Arg("choice", "torchvision"),
        **POOL_OPTIONS,
    }, {"MultiScaleRoIAlign": "multiscale_roi_align", "x": "features"}),
    "pyramid_levels": Op(K.pyramid_levels, {
        "boxes": Arg("reals", boxes(3), ("another axis", "an axis less", "elsewhere")),
        "spatial_scales": Arg("numbers", [0.25, 0.125], ("shorter",),
                              {"quarters": [0.5, 0.125], "thirds": [0.3, 0.15]}),
        "canonical_scale": Arg("number", 224, ("large",), {"huge": 1e300}),
        "canonical_level": Arg("whole", 4, ("zero", "negative"), {"huge": 2000}),
        "level_convention": Arg("choice", "torchvision"),
    }),
    "AnchorSpec": Op(K.AnchorSpec, {
        "sizes": Arg("levels of numbers", ((16.0,), (32.0,)), (), {"huge": ((1e300,), (1.0,))}),
        "aspect_ratios": Arg("numbers", (0.5, 1.0), ("shorter", "longer"),
                             {"one a level": ((0.5, 1.0), (0.5, 1.0)), "tiny": (1e-300,)}),
        "strides": Arg("wholes", (4, 8), NONE),
        "offset": Arg("number", 0.0, ("zero", "negative", "large")),
        "rounded": Arg("flag", False),
    }),
    "make_anchors": Op(K.make_anchors, {
        "spec": Arg("object", SPEC),
        "feature_sizes": Arg("pairs", [(4, 4), (2, 2)], ("zero",), {"one": [(4, 4)]}),
        "image_size": Arg("pair", (16, 16)),
        "device": Arg("device", "cpu", NONE),
    }),
    "use_backend": Op(use_backend, {"backend": Arg("choice", "auto")}),
    "pack_masks": Op(K.pack_masks, {
        "masks": Arg("bools or bytes", ones(2, 8, 9, dtype=torch.bool),
                     ("another axis", "an axis less", "elsewhere", "wide"), {"flat": ones(3, dtype=torch.bool)}),
    }),
    "unpack_masks": Op(K.unpack_masks, {
        "packed": Arg("int32s", ones(2, 8, 1, dtype=torch.int32), ("another axis", "an axis less", "elsewhere"),
                      {"flat": ones(3, dtype=torch.int32)}),
        "width": Arg("whole", 9, (), {"too wide": 33}),
    }),
}  # fmt: skip

# Of each kind of argument the wrong values: label -> value, or a function of the good value that makes one.
NO_TENSOR: dict[str, Any] = {
    "None": None,
    "text": "boxes",
    "number": 3,
    "list": lambda good: good.tolist(),
    "array": lambda good: good.numpy(),
    "tensors in a list": lambda good: [good],
    "dict": lambda good: {"0": good},
}
ANY_TENSOR = NO_TENSOR | {
    "complex": lambda good: good * 1j,
    "another axis": lambda good: good[None],
    "an axis less": lambda good: good[0],
    "elsewhere": lambda good: good.to("meta"),
    "sparse": lambda good: good.to_sparse(),
    "wide": lambda good: torch.cat([good, good], -1),
}
# Of two tensors that do not fit one another the message may name the other.
MUTUAL = ("elsewhere", "another axis", "an axis less", "wide", "shorter", "longer")
DTYPES = {
    "floats": (torch.int64, torch.bool, torch.float8_e5m2),
    "integers": (torch.float32, torch.float64),
    "int64s": (torch.int32, torch.float32, torch.bool),
    "int32s": (torch.int64, torch.float32, torch.bool),
    "bools": (torch.float32, torch.uint8),
    "reals": (torch.bool,),
    "reals or bools": (torch.float8_e5m2,),
    "floats or bools": (torch.int64, torch.uint8),
    "bools or bytes": (torch.float32, torch.int64),
}
NUMBER: dict[str, Any] = {
    "None": None,
    "text": "0.5",
    "bool": True,
    "complex": 0.5j,
    "list": [0.5],
    "array": np.array([0.5, 0.5]),
    "one tensor": torch.tensor(0.5),
    "tensor": torch.tensor([0.5, 0.5]),
    "NaN": math.nan,
    "inf": math.inf,
    "negative inf": -math.inf,
    "beyond floats": 10**400,
    "negative": -1.0,
    "zero": 0.0,
    "large": 1e6,
}
WHOLE: dict[str, Any] = {
    "None": None,
    "text": "7",
    "bool": True,
    "float": 7.0,
    "array of floats": np.float32(7),
    "list": [7],
    "array": np.array([7, 7]),
    "tensor": torch.tensor([7, 7]),
    "NaN": math.nan,
    "inf": math.inf,
    "beyond int64": 2**70,
    "negative": -1,
    "zero": 0,
}
PAIR: dict[str, Any] = {
    "None": None,
    "text": "77",
    "number": 7,
    "one": (7,),
    "three": (7, 7, 7),
    "floats": (7.0, 7),
    "texts": ("7", "7"),
    "bools": (True, True),
    "nested": ((7, 7), (7, 7)),
    "Nones": (None, None),
    "NaN": (math.nan, 7),
    "zero": (0, 7),
    "negative": (7, -1),
    "beyond int64": (7, 2**70),
    "tensor": torch.tensor([7.0, 7.0]),
    "array": np.array([7.5, 7.5]),
    "dict": {"height": 7, "width": 7},
}
LIST: dict[str, Any] = {
    "None": None,
    "text": "ab",
    "number": 2,
    "empty": [],
    "dict": {0: 1, 1: 2},
    "Nones": [None, None],
}
BAD: dict[str, dict[str, Any]] = {
    **{
        kind: ANY_TENSOR | {str(dtype): (lambda good, dtype=dtype: good.to(dtype)) for dtype in dtypes}
        for kind, dtypes in DTYPES.items()
    },
    "number": NUMBER,
    "whole": WHOLE,
    "pair": PAIR,
    "size": PAIR | {"zero number": 0, "float": 7.0, "bool": True} | {"number": -7},
    "flag": {"None": None, "text": "yes", "number": 1.0, "list": [True], "tensor": torch.tensor([True])},
    "choice": {"None": None, "unknown": "unknown", "number": 3, "list": ["mean"], "empty": "",
               "array": np.array(["mean", "max"]), "upper case": lambda good: good.upper()},
    "numbers": LIST | {
        "shorter": lambda good: good[:1],
        "longer": lambda good: [*good, *good],
        "texts": lambda good: ["1"] * len(good),
        "bools": lambda good: [True] * len(good),
        "NaNs": lambda good: [math.nan] * len(good),
        "infs": lambda good: [math.inf] * len(good),
        "zeros": lambda good: [0.0] * len(good),
        "negatives": lambda good: [-g for g in good],
        "nested": lambda good: [good] * len(good),
        "tensor": lambda good: torch.tensor([good]),
    },
    "wholes": LIST | {"shorter": (4,), "longer": (4, 8, 16), "floats": (4.0, 8.0), "zeros": (0, 0),
                      "negatives": (-4, 8), "texts": ("4", "8"), "bools": (True, True)},
    "levels of numbers": LIST | {"flat": (16.0, 32.0), "an empty level": ((16.0,), ()), "texts": ("16", "32"),
                                 "zeros": ((0.0,), (1.0,)), "NaNs": ((math.nan,), (1.0,)),
                                 "infs": ((math.inf,), (1.0,)), "bools": ((True,), (1.0,)),
                                 "nested": (((16.0,),), ((32.0,),))},
    "maps": LIST | {
        "shorter": lambda good: good[:1],
        "longer": lambda good: [*good, good[-1]],
        "tensor": lambda good: good[0],
        "a dict of maps": lambda good: dict(enumerate(good)),
        "an ordered dict of maps": lambda good: collections.OrderedDict((str(i), g) for i, g in enumerate(good)),
        "arrays": lambda good: [g.numpy() for g in good],
        "an array": lambda good: [good[0], good[1].numpy()],
        "three axes": lambda good: [g[0] for g in good],
        "integers": lambda good: [g.long() for g in good],
        "complex": lambda good: [g * 1j for g in good],
        "elsewhere": lambda good: [good[0], good[1].to("meta")],
        "images": lambda good: [good[0], good[1][:1]],
    },
    "map of maps": LIST | {
        "dict": {0: 1, 1: 2},
        "list": lambda good: list(good.values()),
        "tensor": lambda good: good["0"],
        "other names": lambda good: {"p2": good["0"], "p3": good["1"]},
        "arrays": lambda good: {name: g.numpy() for name, g in good.items()},
        "Nones in it": lambda good: dict.fromkeys(good),
        "three axes": lambda good: {name: g[0] for name, g in good.items()},
        "no row": lambda good: {name: g[:, :, :0] for name, g in good.items()},
        "integers": lambda good: {name: g.long() for name, g in good.items()},
    },
    "rois": LIST | {
        "an image less": lambda good: good[:1],
        "an image more": lambda good: [*good, good[0]],
        "a list of lists": lambda good: [g.tolist() for g in good],
        "arrays": lambda good: [g.numpy() for g in good],
        "rows of four": lambda good: good[0],
        "rows of five in a list": lambda good: [torch.cat([g[:, :1], g], 1) for g in good],
        "one axis": lambda good: [g[0] for g in good],
        "integers": lambda good: [g.long() for g in good],
        "an integer image": lambda good: [good[0], good[1].long()],
        "complex": lambda good: [g * 1j for g in good],
        "elsewhere": lambda good: [good[0], good[1].to("meta")],
        "image beyond the last": torch.tensor([[2.0, 1, 1, 5, 5]]),
        "image before the first": torch.tensor([[-1.0, 1, 1, 5, 5]]),
        "dict of images": lambda good: dict(enumerate(good)),
        "integer rows": torch.tensor([[1, 1, 1, 5, 5]]),
        "array": lambda good: good[0].numpy(),
    },
    "counts": LIST | {"shorter": [1], "longer": [1, 1, 1], "floats": [1.0, 2.0], "floats in a tensor": torch.ones(2),
                      "two axes": torch.ones(2, 1, dtype=torch.int64), "array": np.array([1.5, 2.5]),
                      "negatives": [-1, 1], "too many": [1, 4], "bools": [True, True], "texts": ["1", "1"],
                      "NaN": [math.nan, 1]},
    "pairs": LIST | {
        "flat": (20, 30),
        "ones": [(20,), (30,)],
        "threes": [(20, 30, 3), (20, 30, 3)],
        "floats": [(20.5, 30.0), (9.0, 9.0)],
        "texts": [("20", "30"), ("9", "9")],
        "zero": [(0, 5), (0, 5)],
        "negatives": [(20, -1), (9, 9)],
        "tensor": torch.tensor([[20.0, 30.0], [9.0, 9.0]]),
        "bools": [(True, True), (True, True)],
    },
    "names": {"None": None, "text": "01", "number": 2, "numbers": [0, 1], "empty": [], "Nones": [None]},
    "given": {},
    "object": {"None": None, "text": "spec", "dict": {"sizes": ((1.0,),)}, "class": K.AnchorSpec},
    "device": {"text": "gpu", "list": ["cpu"], "float": 0.5},
}  # fmt: skip


def wrong_values(arg: Arg) -> Iterator[tuple[str, Any]]:
    for label, bad in (BAD[arg.kind] | arg.more).items():
        if label not in arg.fine:
            yield label, bad(arg.value) if callable(bad) and not isinstance(bad, type) else bad


def backends(op: Op) -> Iterator[dict[str, Any]]:
    """The good values of all arguments, once for each backend that a wrong one may reach."""
    good = {name: arg.value for name, arg in op.args.items()}
    for backend in ("auto", "reference", "triton") if "backend" in good else ("",):
        yield good | ({"backend": backend} if backend else {})


CASES = {
    f"{name}-{argument}-{label}": (name, argument, label)
    for name, op in OPS.items()
    for argument, arg in op.args.items()
    for label in (BAD[arg.kind] | arg.more)
    if label not in arg.fine
}


def outcome(name: str, argument: str, label: str, backend: dict[str, Any]) -> str:
    """ "ok" if it is refused as it shall be, else what happens."""
    op = OPS[name]
    bad = dict(wrong_values(op.args[argument]))[label]
    try:
        op.call(**(backend | {argument: bad}))
    except ValueError as error:
        text = str(error)
        arguments = list(op.args) if label in MUTUAL else [argument]
        words = ["|".join({*words, *(op.names.get(word, word) for word in words)}) for words in ([name], arguments)]
        pattern = rf"(?:{words[0]}): ([\w, ]*)\b(?:{words[1]})\b[^:]*: expected .*, got .*"
        if re.fullmatch(pattern, text) and len(text) < 300:
            return "ok"
        return f"message: {text}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    return "accepted"


def test_every_public_name_is_here() -> None:
    assert set(OPS) == set(K.__all__)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_wrong_argument_is_named(case: tuple[str, str, str]) -> None:
    for given in backends(OPS[case[0]]):
        assert outcome(*case, given) == "ok", given.get("backend")


# What users of torchvision and detectron2 write in other forms: op, its other values and the plain ones.
OTHER_FORMS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("nms", {"iou_threshold": np.float32(0.5), "max_output": np.int64(2)}, {}),
    ("nms", {"iou_threshold": torch.tensor(0.5)}, {}),
    ("nms", {"iou_threshold": 1}, {"iou_threshold": 1.0}),
    ("batched_nms", {"idxs": torch.zeros(3, dtype=torch.bool)}, {"idxs": torch.zeros(3, dtype=torch.int64)}),
    ("batched_nms", {"max_output": np.uint8(2), "iou_threshold": torch.tensor([0.5])}, {}),
    ("padded_nms", {"max_output": np.int32(2), "iou_threshold": torch.tensor([0.5, 0.5])}, {}),
    ("soft_nms", {"sigma": np.float64(0.5), "score_threshold": 0}, {"score_threshold": 0.0}),
    ("encode_boxes", {"weights": [1, 1, np.float32(2), 2]}, {}),
    ("decode_boxes", {"weights": [1, 1, 2, 2], "image_size": [np.int64(20), 30]}, {}),
    ("decode_boxes", {"image_size": torch.tensor([[20, 30], [20, 30]])}, {}),
    ("decode_boxes", {"scale_clamp": math.inf}, {"scale_clamp": 1e30}),
    ("rpn_proposals", {"padded_size": torch.Size((16, 16)), "pre_nms_top_n": np.int64(5), "min_size": 0}, {}),
    ("rpn_proposals", {"objectness": tuple(OPS["rpn_proposals"].args["objectness"].value)}, {}),
    ("detections", {"max_detections": np.int64(4), "score_threshold": np.float64(0.05)}, {}),
    ("match_anchors", {"high": 1, "low": 0, "allow_low_quality": np.bool_(True)}, {"high": 1.0, "low": 0.0}),
    ("mask_targets", {"size": np.int64(7)}, {}),
    ("mask_bce", {"targets": torch.ones(2, 4, 4, dtype=torch.bool)}, {}),
    ("paste_masks", {"image_size": [np.int64(20), 30], "threshold": np.float64(0.5), "logits": np.bool_(False)}, {}),
    ("paste_masks", {"image_size": torch.Size((20, 30)), "output": "rle"}, {"output": "rle"}),
    ("paste_masks_batched", {"counts": torch.tensor([1, 3]), "image_sizes": [[20, 30], [9, 9]]}, {}),
    ("paste_masks_batched", {"counts": [np.int64(1), 3], "image_sizes": ((20, 30), torch.Size((9, 9)))}, {}),
    ("sigmoid_focal_loss", {"targets": torch.ones(2, 3, dtype=torch.bool), "gamma": 2, "alpha": np.float64(0.25)}, {}),
    ("softmax_focal_loss", {"gamma": 2, "alpha": np.float64(0.25)}, {}),
    ("roi_align", {"output_size": 2, "boxes": tuple(ROIS.value), "aligned": np.bool_(True)}, {}),
    ("roi_align", {"output_size": [2, np.int64(2)], "sampling_ratio": np.int64(2)}, {}),
    ("roi_align", {"spatial_scale": 1}, {"spatial_scale": 1.0}),
    ("roi_align", {"output_size": np.int64(2), "cubic_coeff": -1, "spatial_scale": np.float32(0.5)}, {}),
    ("multiscale_roi_align", {"output_size": torch.Size((2, 2)), "features": tuple(PYRAMID)}, {}),
    ("multiscale_roi_align", {"spatial_scales": (np.float32(0.25), 1 / 8), "canonical_level": np.int64(4)}, {}),
    ("roi_pool", {"output_size": [2, 2], "spatial_scale": np.float64(0.5)}, {}),
    ("RoIAlign", {"output_size": [np.int64(2), 2]}, {}),
    ("RoIPool", {"output_size": np.int64(2)}, {}),
    ("MultiScaleRoIAlign", {"x": collections.OrderedDict(zip("01", PYRAMID, strict=True)), "output_size": 2}, {}),
    ("MultiScaleRoIAlign", {"image_shapes": [torch.Size((64, 64)), [np.int64(64), 60]]}, {}),
    ("pyramid_levels", {"spatial_scales": (np.float32(0.25), 1 / 8), "canonical_scale": np.int64(224)}, {}),
    ("AnchorSpec", {"sizes": [[16], [32]], "aspect_ratios": [0.5, 1], "strides": [np.int64(4), 8]}, {}),
    ("make_anchors", {"feature_sizes": ([4, 4], torch.Size((2, 2))), "image_size": [16, np.int64(16)]}, {}),
    ("make_anchors", {"device": torch.device("cpu")}, {}),
    ("unpack_masks", {"width": np.int64(9)}, {}),
]  # fmt: skip


def leaves(value: Any) -> list[Any]:
    """All tensors and plain values of nested lists and tuples."""
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("case", OTHER_FORMS, ids=lambda case: f"{case[0]}-{'-'.join(case[1])}")
def test_another_form_gives_the_same(case: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    name, other, plain = case
    for given in backends(OPS[name]):
        got, expected = leaves(OPS[name].call(**(given | other))), leaves(OPS[name].call(**(given | plain)))
        assert len(got) == len(expected)
        for one, two in zip(got, expected, strict=True):
            assert torch.equal(one, two) if isinstance(two, Tensor) else one == two
        assert name != "AnchorSpec" or hash(got[0]) == hash(expected[0])


def to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {name: to_meta(item) for name, item in value.items()}
    return [to_meta(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("AnchorSpec", "make_anchors", "use_backend")])
def test_meta_tensors_give_shapes(name: str) -> None:
    """Or a ValueError, where the shape depends on values."""
    op = OPS[name]
    given = {argument: arg.value for argument, arg in op.args.items()}
    if name in ("nms", "batched_nms", "soft_nms", "paste_masks_batched"):
        argument = "boxes" if "nms" in name else "masks"
        with pytest.raises(
            ValueError, match=f"{name}: {argument}: expected a tensor with values, got one on the device meta"
        ):
            op.call(**to_meta(given))
        return
    for one, two in zip(leaves(op.call(**to_meta(given))), leaves(op.call(**given)), strict=True):
        assert (one.device.type, one.shape, one.dtype) == ("meta", two.shape, two.dtype)


@pytest.mark.parametrize("backend", ["auto", "torchvision", "reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64], ids=str)
def test_no_boxes_of_any_dtype_keep_none(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """torchvision takes them; so does code that builds its tensors from empty lists."""
    if device.type != "cpu" and backend == "torchvision":
        pytest.skip("serves CPU tensors only")
    boxes, row = torch.empty(0, 4, dtype=dtype, device=device), torch.empty(0, dtype=dtype, device=device)
    scores = torch.empty(0, dtype=torch.int64, device=device)
    for kept in (
        K.nms(boxes, scores, 0.5, backend=backend),
        K.batched_nms(boxes, scores, row, 0.5, backend=backend),
        K.batched_nms(row, row, row, 0.5, max_output=3, backend=backend),
    ):
        assert (kept.dtype, kept.shape, kept.device.type) == (torch.int64, (0,), device.type)
    if backend == "auto" and device.type == "cpu":
        assert torch.equal(torchvision.ops.batched_nms(boxes, scores, row, 0.5), kept)
    with pytest.raises(ValueError, match=r"nms: boxes: expected float \[K, 4\], got torch.int64 \[2, 4\]"):
        K.nms(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2), 0.5)


# torchvision's own functions, and calls whose result ours must still give once they are ours.
NAMESAKES: dict[str, Callable[..., Any]] = {
    "nms": lambda op, **more: op(boxes(3) + torch.arange(3.0)[:, None], ones(3), 0.5, **more),
    "batched_nms": lambda op, **more: op(
        boxes(3) + torch.arange(3.0)[:, None], ones(3), torch.tensor([0, 1, 0]), 0.5, **more
    ),
    "roi_align": lambda op, **more: op(PYRAMID[0], ROIS.value, 2, 0.5, 2, True, **more),
    "roi_pool": lambda op, **more: op(PYRAMID[0], ROIS.value, 2, 0.5, **more),
    "sigmoid_focal_loss": lambda op, **more: op(PYRAMID[0], (PYRAMID[0] > 0.5).float(), 0.25, 2.0, "sum", **more),
}


@pytest.mark.parametrize("backend", [None, "torchvision", "reference", "triton"])
def test_our_ops_work_in_the_place_of_torchvisions(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sets ``torchvision.ops.nms = tmask_kernels.nms`` must not make ours call itself."""
    expected = {name: call(getattr(torchvision.ops, name)) for name, call in NAMESAKES.items()}
    theirs = {id(getattr(torchvision.ops, name)): name for name in NAMESAKES}
    classes = ("RoIAlign", "RoIPool", "MultiScaleRoIAlign")
    theirs |= {id(getattr(torchvision.ops, name)): name for name in classes}
    for module in [module for name, module in sys.modules.items() if name.startswith("torchvision")]:
        for attribute, value in list(vars(module).items()):
            if id(value) in theirs:
                monkeypatch.setattr(module, attribute, getattr(K, theirs[id(value)]))
    assert torchvision.ops.boxes.nms is K.nms
    more = {} if backend is None else {"backend": backend}
    for name, call in NAMESAKES.items():
        if backend == "torchvision" and name == "sigmoid_focal_loss":
            continue  # ours has no such backend
        torch.testing.assert_close(call(getattr(torchvision.ops, name), **more), expected[name])
    feature = PYRAMID[0].clone().requires_grad_()
    pooled = torchvision.ops.RoIAlign((2, 2), 0.5, 2, True)(feature, ROIS.value)
    torch.testing.assert_close(pooled, expected["roi_align"])
    pooled.sum().backward()
    torch.testing.assert_close(torchvision.ops.RoIPool((2, 2), 0.5)(feature, ROIS.value), expected["roi_pool"])
    many = torchvision.ops.MultiScaleRoIAlign(["0"], 2, 2)({"0": PYRAMID[0]}, ROIS.value, [(32, 32)] * 2)
    torch.testing.assert_close(many, K.roi_align(PYRAMID[0], ROIS.value, 2, 0.5, 2))
    best = K.soft_nms(boxes(2), ones(2))[0]
    assert best.tolist() == [0]


if __name__ == "__main__":
    found: dict[str, int] = collections.Counter()
    for case, key in CASES.items():
        told = {outcome(*key, given) for given in backends(OPS[key[0]])}
        worst = next(iter(sorted(told - {"ok"})), "ok")
        found[worst.split(":")[0]] += 1
        if worst != "ok":
            print(case, "|", " || ".join(sorted(t.replace("\n", " ") for t in told)))
    print(dict(found))
