"""Every argument of every public op, given wrong values: a ValueError that names op, argument, expected and got.

`OPS` lists a good value of each argument of each op with its kind; `BAD` lists wrong values of each kind.
"""

from __future__ import annotations

import collections
import inspect
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import tmask_kernels as K
from tests.kernels.tools import assert_same, tensors
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


def use_backend(backend: str) -> None:
    with K.use_backend(backend):
        pass


# What is called under the name of an op where that is not the public function.
CALLS: dict[str, Callable[..., Any]] = {
    "use_backend": use_backend,
    "RoIAlign": lambda input, rois, **options: modules.RoIAlign(**options)(input, rois),
    "RoIPool": lambda input, rois, **options: modules.RoIPool(**options)(input, rois),
    "MultiScaleRoIAlign": lambda x, boxes, image_shapes, **options: modules.MultiScaleRoIAlign(**options)(
        x, boxes, image_shapes
    ),
}
# What else a message may call an op or an argument, as a module has its op's messages.
OTHER_NAMES = {
    "RoIAlign": {"RoIAlign": "roi_align", "rois": "boxes"},
    "RoIPool": {"RoIPool": "roi_pool", "rois": "boxes"},
    "MultiScaleRoIAlign": {"MultiScaleRoIAlign": "multiscale_roi_align", "x": "features"},
}


def boxes(*shape: int) -> Tensor:
    return torch.tensor([1.0, 1.0, 6.0, 7.0]).expand(*shape, 4).clone()


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


NONE = ("None",)
UNIT = {"too low": -0.001, "too high": 1.001}
ELSEWHERE = {"elsewhere": torch.ones(2, 2, device="meta")}
IMAGES = {"unlike": torch.zeros(3, 2), "three": torch.zeros(2, 3)} | ELSEWHERE
BACKEND = Arg("choice", "reference", NONE)
# Arguments that several ops share.
SUPPRESSED = {
    "boxes": Arg("floats", boxes(3)),
    "scores": Arg("floats", ones(3), more={"unlike": ones(2)}),
    "iou_threshold": Arg("number", 0.5, ("zero", "one tensor"), UNIT),
    "max_output": Arg("whole", 2, ("None", "zero")),
}
FOCAL = {
    "inputs": Arg("floats", ones(2, 3)),
    "alpha": Arg("number", 0.25, ("zero", "negative"), {"too high": 1.001}),
    "gamma": Arg("number", 2.0, ("zero", "large")),
    "reduction": Arg("choice", "mean"),
}
PASTED = {
    "logits": Arg("flag", False),
    "threshold": Arg("number", 0.5, (), {"too high": 1.001}),
    "output": Arg("choice", "bool"),
    "convention": Arg("choice", "detectron2"),
}
PYRAMID = [torch.rand(2, 3, 16, 16), torch.rand(2, 3, 8, 8)]
ROIS = Arg("rois", [boxes(3), boxes(1)])
MAP = Arg("floats", ones(2, 3, 8, 8), ("wide",))
BINS = {"output_size": Arg("size", (2, 2)), "spatial_scale": Arg("number", 0.5, ("large",))}
SAMPLES = {
    "sampling_ratio": Arg("whole", 2, ("zero", "negative"), {"huge": 2**31}),
    "aligned": Arg("flag", True),
    "reduction": Arg("choice", "mean"),
    "interpolation": Arg("choice", "bilinear"),
    "cubic_coeff": Arg("number", -0.5, ("negative", "zero", "large")),
}
LEVELS = {
    "canonical_scale": Arg("number", 224, ("large",), {"huge": 1e300}),
    "canonical_level": Arg("whole", 4, ("zero", "negative"), {"huge": 2000, "deep": -2000}),
    "level_convention": Arg("choice", "torchvision"),
}
SCALES = {"quarters": [0.5, 0.125], "thirds": [0.3, 0.15]}

OPS: dict[str, dict[str, Arg]] = {
    "nms": SUPPRESSED,
    "batched_nms": SUPPRESSED | {
        "idxs": Arg("integers", ones(3, dtype=torch.int64), more={"unlike": ones(2, dtype=torch.int64)}),
    },
    "padded_nms": {
        "boxes": Arg("floats", boxes(2, 3)),
        "scores": Arg("floats", ones(2, 3), more={"unlike": ones(2, 2)}),
        "iou_threshold": Arg("number", 0.5, ("zero", "one tensor", "tensor"),
                             UNIT | {"three": ones(3), "complex": ones(2) * 1j, "elsewhere": ones(2).to("meta")}),
        "valid": Arg("bools", ones(2, 3, dtype=torch.bool), NONE),
        "max_output": Arg("whole", 2, ("zero",)),
    },
    "soft_nms": {
        "boxes": SUPPRESSED["boxes"],
        "scores": SUPPRESSED["scores"],
        "method": Arg("choice", "linear"),
        "iou_threshold": Arg("number", 0.5, ("zero",), UNIT),
        "sigma": Arg("number", 0.5, ("large",)),
        "score_threshold": Arg("number", 0.001, ("zero", "large")),
    },
    "encode_boxes": {
        "boxes": Arg("floats", boxes(3), ("another axis", "an axis less")),
        "anchors": Arg("floats", boxes(3), ("another axis", "an axis less"), {"unlike": boxes(2)}),
        "weights": Arg("numbers", (1.0, 1.0, 2.0, 2.0)),
    },
    "decode_boxes": {
        "deltas": Arg("floats", boxes(2, 3), ("another axis", "an axis less")),
        "anchors": Arg("floats", boxes(2, 3), ("another axis", "an axis less"), {"unlike": boxes(2)}),
        "weights": Arg("numbers", (1.0, 1.0, 2.0, 2.0)),
        "scale_clamp": Arg("number", 4.0, ("zero", "inf", "large")),
        "image_size": Arg("pair", (20, 30), NONE, IMAGES | {"complex": torch.zeros(2, 2) * 1j}),
    },
    "rpn_proposals": {
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
    },
    "detections": {
        "class_scores": Arg("floats", ones(2, 3, 4)),
        "boxes": Arg("floats", boxes(2, 3, 4), more={"unlike": boxes(2, 3, 3)}),
        "valid": Arg("bools", ones(2, 3, dtype=torch.bool)),
        "image_sizes": Arg("reals", torch.tensor([[16, 16], [12, 16]]), more=IMAGES),
        "score_threshold": Arg("number", 0.05, ("zero", "negative", "large")),
        "nms_threshold": Arg("number", 0.5, ("zero",), UNIT),
        "max_detections": Arg("whole", 4),
        "min_size": Arg("number", 0.01, ("zero", "large")),
    },
    "match_anchors": {
        "anchors": Arg("floats", boxes(5), more={"unlike": boxes(3, 5)}),
        "gt_boxes": Arg("floats", boxes(2, 3)),
        "gt_valid": Arg("bools", ones(2, 3, dtype=torch.bool)),
        "gt_crowd": Arg("bools", torch.zeros(2, 3, dtype=torch.bool), NONE),
        "high": Arg("number", 0.7, (), UNIT),
        "low": Arg("number", 0.3, ("zero",), UNIT | {"over high": 0.8}),
        "allow_low_quality": Arg("flag", True),
    },
    "mask_targets": {
        "packed": Arg("int32s", ones(2, 3, 8, 1, dtype=torch.int32), ("wide",)),
        "boxes": Arg("floats", boxes(2, 4)),
        "gt_index": Arg("int64s", torch.zeros(2, 4, dtype=torch.int64)),
        "size": Arg("whole", 7),
        "convention": Arg("choice", "detectron2"),
        "image_sizes": Arg("reals", torch.tensor([[8, 8], [8, 8]]), NONE, IMAGES),
    },
    "mask_bce": {
        "logits": Arg("floats", ones(2, 3, 4, 4), more={"oblong": ones(2, 3, 4, 5), "no channel": ones(2, 0, 4, 4)}),
        "classes": Arg("int64s", torch.zeros(2, dtype=torch.int64), more={"unlike": ones(3, dtype=torch.int64)}),
        "targets": Arg("reals or bools", ones(2, 4, 4), more={"unlike": ones(2, 4, 5)}),
        "valid": Arg("bools", ones(2, dtype=torch.bool)),
    },
    "paste_masks": PASTED | {
        "masks": Arg("floats or bools", ones(2, 4, 4), more={"oblong": ones(2, 4, 5), "empty": ones(2, 0, 0)}),
        "boxes": Arg("floats", boxes(2), more={"unlike": boxes(3)}),
        "image_size": Arg("pair", (20, 30)),
    },
    "paste_masks_batched": PASTED | {
        "masks": Arg("floats or bools", ones(2, 3, 4, 4), more={"oblong": ones(2, 3, 4, 5)}),
        "boxes": Arg("floats", boxes(2, 3), more={"unlike": boxes(2, 2)}),
        "counts": Arg("counts", [1, 3]),
        "image_sizes": Arg("pairs", [(20, 30), (9, 9)], more={"one": [(20, 30)]}),
        "output": Arg("choice", "rle"),
    },
    "masks_to_rle": {
        "masks": Arg("floats or bools", ones(2, 3, 4), ("wide",), {"no row": ones(2, 0, 4)}),
        "threshold": Arg("number", 0.5, ("zero", "negative", "large")),
        "output": Arg("choice", "rle"),
    },
    "decode_keypoints": {
        "heatmaps": Arg("floats", ones(1, 2, 3, 4, 4), ("wide",), more={"no row": ones(1, 2, 3, 0, 4)}),
        "boxes": Arg("floats", boxes(1, 2), more={"unlike": boxes(1, 3)}),
        "valid": Arg("bools", ones(1, 2, dtype=torch.bool), NONE),
    },
    "sigmoid_focal_loss": FOCAL | {"targets": Arg("reals or bools", ones(2, 3), more={"unlike": ones(3)})},
    "softmax_focal_loss": FOCAL | {
        "inputs": Arg("floats", ones(2, 3), ("wide",), more={"one class": ones(2, 1), "scalar": torch.tensor(1.0)}),
        "labels": Arg("int64s", ones(2, dtype=torch.int64), more={"unlike": ones(3, dtype=torch.int64)}),
    },
    "roi_align": BINS | SAMPLES | {
        "input": MAP,
        "boxes": ROIS,
        "valid": Arg("given", None, more={"without padded boxes": torch.ones(2, 3, dtype=torch.bool)}),
    },
    "multiscale_roi_align": SAMPLES | LEVELS | {
        "features": Arg("maps", PYRAMID, (), {"one of another dtype": [PYRAMID[0], PYRAMID[1].half()],
                                              "one of other channels": [PYRAMID[0], PYRAMID[1][:, :2]]}),
        "boxes": Arg("floats", boxes(2, 3)),
        "valid": Arg("bools", ones(2, 3, dtype=torch.bool), NONE),
        "output_size": BINS["output_size"],
        "spatial_scales": Arg("numbers", [0.25, 0.125], more=SCALES),
    },
    "roi_pool": BINS | {
        "input": MAP,
        "boxes": Arg("floats", boxes(2, 3)),
        "valid": Arg("bools", ones(2, 3, dtype=torch.bool), NONE),
    },
    "RoIAlign": BINS | SAMPLES | {"input": MAP, "rois": ROIS, "backend": BACKEND},
    "RoIPool": BINS | {"input": MAP, "rois": ROIS, "backend": BACKEND},
    "MultiScaleRoIAlign": SAMPLES | LEVELS | {
        "x": Arg("map of maps", {"0": PYRAMID[0], "1": PYRAMID[1]}),
        "boxes": ROIS,
        "image_shapes": Arg("pairs", [(64, 64), (64, 60)]),
        "featmap_names": Arg("names", ["0", "1"]),
        "output_size": BINS["output_size"],
        "backend": BACKEND,
    },
    "pyramid_levels": LEVELS | {
        "boxes": Arg("reals", boxes(3), ("another axis", "an axis less", "elsewhere")),
        "spatial_scales": Arg("numbers", [0.25, 0.125], ("shorter",), SCALES),
    },
    "AnchorSpec": {
        "sizes": Arg("levels of numbers", ((16.0,), (32.0,)), (), {"huge": ((1e300,), (1.0,))}),
        "aspect_ratios": Arg("numbers", (0.5, 1.0), ("shorter", "longer"),
                             {"one a level": ((0.5, 1.0), (0.5, 1.0)), "tiny": (1e-300,)}),
        "strides": Arg("wholes", (4, 8), NONE),
        "offset": Arg("number", 0.0, ("zero", "negative", "large")),
        "rounded": Arg("flag", False),
    },
    "make_anchors": {
        "spec": Arg("object", SPEC),
        "feature_sizes": Arg("pairs", [(4, 4), (2, 2)], ("zero",), {"one": [(4, 4)]}),
        "image_size": Arg("pair", (16, 16)),
        "device": Arg("device", "cpu", NONE),
    },
    "use_backend": {"backend": Arg("choice", "auto")},
    "pack_masks": {
        "masks": Arg("bools or bytes", ones(2, 8, 9, dtype=torch.bool),
                     ("another axis", "an axis less", "elsewhere", "wide"), {"flat": ones(3, dtype=torch.bool)}),
    },
    "unpack_masks": {
        "packed": Arg("int32s", ones(2, 8, 1, dtype=torch.int32), ("another axis", "an axis less", "elsewhere"),
                      {"flat": ones(3, dtype=torch.int32)}),
        "width": Arg("whole", 9, (), {"too wide": 33}),
    },
}  # fmt: skip
for name, args in OPS.items():
    if "backend" in inspect.signature(CALLS.get(name, getattr(K, name))).parameters:
        args.setdefault("backend", BACKEND)

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


def labelled(*values: Any) -> dict[str, Any]:
    return {str(value).replace("\n", ""): value for value in values}


NUMBER = labelled("0.5", True, 0.5j, [0.5], np.array([0.5, 0.5]), math.nan, -math.inf, 10**400)
NUMBER |= {"None": None, "one tensor": torch.tensor(0.5), "tensor": torch.tensor([0.5, 0.5]), "inf": math.inf}
NUMBER |= {"negative": -1.0, "zero": 0.0, "large": 1e6}
WHOLE = labelled("7", True, 7.0, [7], np.array([7, 7]), torch.tensor([7, 7]), math.nan, math.inf, 2**70)
WHOLE |= {"None": None, "negative": -1, "zero": 0, "array of floats": np.float32(7)}
PAIR = labelled("77", 7, (7,), (7, 7, 7), (7.0, 7), ("7", "7"), (True, True), ((7, 7), (7, 7)), (None, None))
PAIR |= labelled((math.nan, 7), (7, -1), (7, 2**70), torch.tensor([7.0, 7.0]), np.array([7.5, 7.5]), {"h": 7, "w": 7})
PAIR |= {"None": None, "zero": (0, 7)}
LIST = labelled(None, "ab", 2, [], {0: 1, 1: 2}, [None, None])


def each(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    """`change` applied to each tensor of a list or a dict."""
    return lambda good: pytree.tree_map(change, good)


MAPS = {
    "arrays": each(Tensor.numpy),
    "an axis less of each": each(lambda g: g[0]),
    "integers": each(Tensor.long),
    "complex": each(lambda g: g * 1j),
}
BAD: dict[str, dict[str, Any]] = {
    **{
        kind: ANY_TENSOR | {str(dtype): (lambda good, dtype=dtype: good.to(dtype)) for dtype in dtypes}
        for kind, dtypes in DTYPES.items()
    },
    "number": NUMBER,
    "whole": WHOLE,
    "pair": PAIR,
    "size": {k: v for k, v in PAIR.items() if k != "7"} | labelled(0, 7.0, True, -7),
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
    "maps": LIST | MAPS | {
        "shorter": lambda good: good[:1],
        "longer": lambda good: [*good, good[-1]],
        "tensor": lambda good: good[0],
        "a dict of maps": lambda good: dict(enumerate(good)),
        "an ordered dict of maps": lambda good: collections.OrderedDict((str(i), g) for i, g in enumerate(good)),
        "an array": lambda good: [good[0], good[1].numpy()],
        "elsewhere": lambda good: [good[0], good[1].to("meta")],
        "images": lambda good: [good[0], good[1][:1]],
    },
    "map of maps": LIST | MAPS | {
        "list": lambda good: list(good.values()),
        "tensor": lambda good: good["0"],
        "other names": lambda good: {"p2": good["0"], "p3": good["1"]},
        "Nones in it": lambda good: dict.fromkeys(good),
        "no row": each(lambda g: g[:, :, :0]),
    },
    "rois": LIST | MAPS | {
        "an image less": lambda good: good[:1],
        "an image more": lambda good: [*good, good[0]],
        "a list of lists": each(Tensor.tolist),
        "rows of four": lambda good: good[0],
        "rows of five in a list": each(lambda g: torch.cat([g[:, :1], g], 1)),
        "an integer image": lambda good: [good[0], good[1].long()],
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


def wrong_values(arg: Arg) -> dict[str, Any]:
    return {label: bad for label, bad in (BAD[arg.kind] | arg.more).items() if label not in arg.fine}


def call(name: str, **values: Any) -> Any:
    """The op of this name on good values, but for these."""
    good = {argument: arg.value for argument, arg in OPS[name].items()}
    return CALLS.get(name, getattr(K, name))(**(good | values))


def backends(name: str) -> list[dict[str, str]]:
    """The backends that a wrong value may reach."""
    return [{"backend": b} for b in ("auto", "reference", "triton")] if "backend" in OPS[name] else [{}]


CASES = [(name, k, label) for name, args in OPS.items() for k, arg in args.items() for label in wrong_values(arg)]


def test_every_public_name_is_here():
    assert set(OPS) == set(K.__all__)


@pytest.mark.parametrize(("name", "argument", "label"), CASES, ids="-".join)
def test_a_wrong_argument_is_named(name, argument, label):
    arg = OPS[name][argument]
    bad = wrong_values(arg)[label]
    bad = bad(arg.value) if callable(bad) and not isinstance(bad, type) else bad
    other = OTHER_NAMES.get(name, {})
    words = ["|".join({*words, *(other.get(w, w) for w in words)})
             for words in ([name], list(OPS[name]) if label in MUTUAL else [argument])]  # fmt: skip
    for backend in backends(name):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is read below
            call(name, **backend | {argument: bad})
        assert re.fullmatch(rf"(?:{words[0]}): ([\w, ]*)\b(?:{words[1]})\b[^:]*: expected .*, got .*", str(error.value))
        assert len(str(error.value)) < 300


# Calls that the kernels do not serve: op, values, what the message says.
NO_DOUBLE = "computes in float32, not float64"
UNSERVED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gradient of encode": ("encode_boxes", {"boxes": boxes(3).requires_grad_()}, "no Triton backward"),
    "gradient to soft targets": ("sigmoid_focal_loss", {"targets": ones(2, 3).requires_grad_()}, "gradient to targets"),
    "gradient to masks": ("mask_bce", {"targets": ones(2, 4, 4).requires_grad_()}, "gives no gradient to targets"),
    "wide heat maps": ("decode_keypoints", {"heatmaps": torch.zeros(1, 2, 1, 1, 1024)}, "up to 1023 columns"),
    "heat maps in float64": ("decode_keypoints", {"heatmaps": torch.zeros(1, 2, 3, 4, 4).double()}, NO_DOUBLE),
    "masks in float64": ("paste_masks", {"masks": ones(2, 4, 4).double()}, NO_DOUBLE),
    "huge images": ("paste_masks", {"image_size": (2**15, 2**15 + 1)}, r"up to 2\^30 pixels"),
    "targets of boxes in float64": ("mask_targets", {"boxes": boxes(2, 4).double()}, NO_DOUBLE),
    "targets of tall masks": (
        "mask_targets",
        {"packed": torch.zeros(2, 3, 8161, 1).int()},
        "up to 8,160 pixels a side",
    ),
    "targets of wide masks": ("mask_targets", {"packed": torch.zeros(2, 3, 1, 256).int()}, "up to 8,160 pixels"),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_what_the_kernels_do_not_serve_is_told(case):
    name, values, message = UNSERVED[case]
    with pytest.raises(ValueError, match=message):
        call(name, **values, backend="triton")


def test_kernels_of_boxes_refuse_float64_on_a_gpu():
    with FakeTensorMode():
        boxes = torch.zeros(2, 4, dtype=torch.float64, device="cuda")
        for op in (K.encode_boxes, K.decode_boxes):
            with pytest.raises(ValueError, match="float64 runs in the interpreter only"):
                op(boxes, boxes, backend="triton")
            assert op(boxes, boxes, backend="reference").dtype == torch.float64


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
    ("rpn_proposals", {"objectness": tuple(OPS["rpn_proposals"]["objectness"].value)}, {}),
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


@pytest.mark.parametrize("case", OTHER_FORMS, ids=lambda case: f"{case[0]}-{'-'.join(case[1])}")
def test_another_form_gives_the_same(case):
    name, other, plain = case
    for backend in backends(name):
        got, expected = call(name, **backend | other), call(name, **backend | plain)
        assert_same(got, expected)
        assert name != "AnchorSpec" or hash(got) == hash(expected)


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("AnchorSpec", "make_anchors", "use_backend")])
def test_meta_tensors_give_shapes(name):
    """Or a ValueError, where the shape depends on values."""
    meta = {k: pytree.tree_map_only(Tensor, lambda t: t.to("meta"), arg.value) for k, arg in OPS[name].items()}
    if name in ("nms", "batched_nms", "soft_nms", "paste_masks_batched", "masks_to_rle"):
        argument = "boxes" if "nms" in name else "masks"
        with pytest.raises(ValueError, match=f"{name}: {argument}: expected a tensor with values, got one on the dev"):
            call(name, **meta)
        return
    for one, two in zip(tensors(call(name, **meta)), tensors(call(name)), strict=True):
        assert (one.device.type, one.shape, one.dtype) == ("meta", two.shape, two.dtype)


@pytest.mark.parametrize("backend", ["auto", "torchvision", "reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64], ids=str)
def test_no_boxes_of_any_dtype_keep_none(dtype, backend, device):
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
def test_our_ops_work_in_the_place_of_torchvisions(backend, monkeypatch):
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
