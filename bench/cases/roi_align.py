"""RoIAlign of a pyramid and of one map, forward and backward, against the peers.

torchvision has no bfloat16 kernel: its bf16 rows run under autocast, which computes in float32. Its half kernel
computes coordinates in half too, so the fp16 rows of all providers get RoIs that half precision holds, and torchvision
gets a loose tolerance. In nhwc torchvision copies the maps to nchw first, within its time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
import torchvision
from torch import Tensor

from bench.cases._shared import ITEM, LIBRARIES, STRIDES, Bench, Case, by_name, doubles, rois
from bench.contest import DTYPES, LAYOUTS, Call, Contest
from bench.machine import Work, device
from bench.standings import Aim
from tmask_kernels import multiscale_roi_align, roi_align
from tmask_kernels.common.pyramid import pyramid_levels
from tmask_kernels.ops.roi_align import reference
from tmask_kernels.testing import TOLERANCES, Tolerance, assert_close, random_boxes

# Between neighbouring cells of random features a coordinate off by a tenth of a cell, as half precision has it at 300
# cells, is an error of a few tenths; only gross mistakes are beyond these bounds.
HALF_COORDINATES = Tolerance(max=0.5, rms=0.1)
# float32 coordinates of up to 336 cells are off by 3e-5 cells, and so are values between cells that differ by several:
# the reference itself differs by 2e-5 between float32 and float64 at full size.
FLOAT_COORDINATES = Tolerance(max=1e-4, rms=1e-5)


@dataclass(frozen=True, kw_only=True)
class RoICase(Case):
    """Pooling RoIs from one or several FPN levels of N images of height x width pixels, channels innermost or not."""

    images: int = 2
    height: int = 800
    width: int = 1344
    strides: tuple[int, ...] = STRIDES[:4]
    channels: int = 256
    rois: int  # of all images
    pooled: int = 7
    sampling_ratio: int = 2
    aligned: bool = False  # torchvision's MultiScaleRoIAlign cannot
    clustered: bool = True
    interpolation: str = "bilinear"
    reduction: str = "mean"

    def small(self) -> RoICase:
        # Of a pyramid several levels are to be used; of one map an adaptive grid has few samples.
        height, width = (384, 448) if len(self.strides) > 1 else (128, 160)
        return replace(self, height=height, width=width, channels=16, rois=8 * self.images)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each level in cells."""
        return [(self.height // s, self.width // s) for s in self.strides]

    @property
    def scales(self) -> list[float]:
        return [1 / s for s in self.strides]

    def boxes(self) -> Tensor:
        """[N, P, 4] float32 xyxy in pixels, on the CPU."""
        each = self.rois // self.images
        if self.clustered:
            return rois(self.images, each, self.height, self.width)
        size = min(800.0, float(min(self.height, self.width)))
        flat = random_boxes(self.rois, height=self.height, width=self.width, min_size=16, max_size=size)
        return flat.view(self.images, each, 4)

    def features(self, dtype: torch.dtype, memory_format: torch.memory_format, where: torch.device) -> list[Tensor]:
        """Random features [N, C, H / stride, W / stride] of each level."""
        generator = torch.Generator(where).manual_seed(1)
        return [
            torch.randn(self.images, self.channels, h, w, generator=generator, device=where)
            .to(dtype)
            .contiguous(memory_format=memory_format)
            for h, w in self.sizes
        ]

    def work(self, dtype: str, mode: str = "forward") -> Work:
        """Forward: RoIs and each cell that a sample touches are read, the output is written. Backward: RoIs and the
        gradient of the output are read, and every cell's gradient is written, since untouched cells are zero.

        A bilinear sample has 4 taps and a bicubic one 16, each a product and a sum.
        """
        samples, cells = count_touched(self)
        item = ITEM[dtype]
        out = self.rois * self.channels * self.pooled**2 * item
        maps = self.images * sum(h * w for h, w in self.sizes)
        moved = (cells if mode == "forward" else maps) * self.channels * item
        taps = 16 if self.interpolation == "bicubic" else 4
        return Work(bytes=out + moved + self.rois * 16, flops=2 * taps * samples * self.channels)


@functools.cache
def count_touched(case: RoICase) -> tuple[int, int]:
    """Return the number of samples of all RoIs, and of the distinct cells that they touch: those with a gradient."""
    case, boxes = replace(case, channels=1, reduction="mean"), case.boxes()
    maps = [x.requires_grad_() for x in case.features(torch.float32, torch.contiguous_format, torch.device("cpu"))]
    ours(Given(case, maps, boxes, None), "reference").sum().backward()
    cells = sum(int(x.grad.count_nonzero()) for x in maps)
    ratio = float(case.sampling_ratio)
    scale = torch.tensor(case.scales)[pyramid_levels(boxes, case.scales)]  # [N, P]
    sides = (boxes[..., 2:] - boxes[..., :2]) * scale[..., None]
    grid = torch.full_like(sides, ratio) if ratio > 0 else (sides.clamp(min=1) / case.pooled).ceil()
    return int(grid.prod(-1).sum()) * case.pooled**2, cells


def one_map(kind: type[RoI], **fields: Any) -> RoI:
    """Return a case of 512 spread RoIs on one map of 1 x 512 x 256 x 256."""
    return kind(images=1, height=1024, width=1024, strides=(4,), channels=512, rois=512, clustered=False, **fields)


RoI = TypeVar("RoI", bound=RoICase)
BOX_HEAD = "roi-align-box-head"
BOTH = ("forward", "backward")
WHAT = "1,000 RoIs of 1 image to 7 x 7 from 4 levels"
ONE_IMAGE = RoICase(name="roi-align-one-image", what=WHAT, images=1, rois=1000)
BICUBIC = {"": Aim(words="≤ 2.5x the time of bilinear")}
MASK_HEAD = "256 RoIs of 2 images to 14 x 14 from 4 levels"
SIX = {"": Aim(times=6)}
CASES = by_name(
    RoICase(
        name=BOX_HEAD,
        what="1,024 RoIs of 2 images to 7 x 7 from 4 levels",
        modes=BOTH,
        aims={"forward": Aim(times=6, us=100), "backward": Aim(times=6)},
        rois=1024,
    ),
    RoICase(name="roi-align-mask-head", what=MASK_HEAD, modes=BOTH, aims=SIX, rois=256, pooled=14),
    ONE_IMAGE,
    replace(ONE_IMAGE, name="roi-align-bicubic", what="the same, bicubic", aims=BICUBIC, interpolation="bicubic"),
    replace(ONE_IMAGE, name="roi-align-max", what="the same, max in place of mean", reduction="max"),
    one_map(RoICase, name="roi-align-map", what="512 RoIs to 7 x 7 from one map of 512 x 256 x 256", aims=SIX),
    one_map(RoICase, name="roi-align-map-adaptive", what="the same, a sample a cell", aims=SIX, sampling_ratio=0),
)


class Given(NamedTuple):
    """The inputs of one variant."""

    case: RoICase
    features: list[Tensor]  # [N, C, H, W] a level
    boxes: Tensor  # [N, P, 4] float32
    upstream: Tensor | None  # [N * P, C, PH, PW] for a backward

    @property
    def dtype(self) -> torch.dtype:
        return self.features[0].dtype


def inputs(case: RoICase, mode: str, dtype: str, layout: str) -> Given:
    boxes = case.boxes().to(device())
    if dtype == "fp16":
        boxes = boxes.half().float()
    features = case.features(DTYPES[dtype], LAYOUTS[layout], device())
    if mode == "forward":
        return Given(case, features, boxes, None)
    shape = (case.rois, case.channels, case.pooled, case.pooled)
    upstream = torch.randn(shape, generator=torch.Generator(device()).manual_seed(2), device=device())
    upstream = upstream.to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
    return Given(case, [x.requires_grad_() for x in features], boxes, upstream)


def ours(given: Given, backend: str) -> Tensor:
    """`multiscale_roi_align`, or `roi_align` where there is one map."""
    case, features, boxes, _ = given
    options = {name: getattr(case, name) for name in ("sampling_ratio", "aligned", "interpolation", "reduction")}
    if len(features) == 1:
        return roi_align(features[0], boxes, case.pooled, case.scales[0], **options, backend=backend)
    options["level_convention"] = "torchvision"
    return multiscale_roi_align(features, boxes, case.pooled, case.scales, **options, backend=backend)


def compiled(given: Given) -> Call:
    """torch.compile of the reference, which works off its RoIs in one chunk then: a loop would be unrolled."""
    pool = torch.compile(lambda: ours(given, "reference"))

    def whole() -> Tensor:
        with mock.patch.object(reference, "CHUNK_ELEMENTS", 1 << 62):
            return pool()

    return whole


def _peer_boxes(given: Given) -> list[Tensor]:
    """A tensor an image; torchvision's kernels want them in the dtype of the features."""
    dtype = torch.float16 if given.dtype == torch.float16 else torch.float32
    return [boxes.to(dtype) for boxes in given.boxes]


def peer_rows(boxes: Sequence[Tensor]) -> Tensor:
    """Return the boxes of all images as rows [K, 5] with the number of their image."""
    return torchvision.ops._utils.convert_boxes_to_roi_format(list(boxes))


def torchvision_pool(given: Given) -> Call:
    case, boxes = given.case, _peer_boxes(given)
    if len(given.features) == 1:
        rest = peer_rows(boxes), case.pooled, case.scales[0], case.sampling_ratio, case.aligned
        run = functools.partial(torchvision.ops.roi_align, given.features[0], *rest)
    else:
        features = {str(level): feature for level, feature in enumerate(given.features)}
        module = torchvision.ops.MultiScaleRoIAlign([*features], case.pooled, case.sampling_ratio)
        run = functools.partial(module, features, boxes, [(case.height, case.width)] * case.images)

    def pool() -> Tensor:
        with torch.autocast(device().type, dtype=torch.bfloat16, enabled=given.dtype == torch.bfloat16):
            return run()

    return pool


def detectron2(given: Given) -> Call:
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.structures import Boxes

    case = given.case
    kind = "ROIAlignV2" if case.aligned else "ROIAlign"
    pooler = ROIPooler(case.pooled, case.scales, case.sampling_ratio, kind)
    boxes = [Boxes(b) for b in _peer_boxes(given)]
    return lambda: pooler(given.features, boxes)


def mmcv(given: Given) -> Call:
    from mmcv.ops import roi_align as mmcv_roi_align

    case, boxes = given.case, peer_rows(_peer_boxes(given))
    rest = case.pooled, case.scales[0], case.sampling_ratio, "avg", case.aligned
    return lambda: mmcv_roi_align(given.features[0], boxes, *rest)


def check(got: Any, truth: list[Tensor], provider: str) -> None:
    """Compare the output, or the gradient of each level."""
    for i, (own, true) in enumerate(zip(_listed(got), truth, strict=True)):
        allowed = FLOAT_COORDINATES if own.dtype == torch.float32 else TOLERANCES[own.dtype]
        if own.dtype == torch.float16 and provider in LIBRARIES:
            allowed = HALF_COORDINATES
        assert_close(own, true, tolerance=allowed, name=f"value {i}")


def _listed(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def bench_of(ours: Callable[[Given, str], Tensor], **fields: Any) -> Bench:
    """The truth is the reference in float64 on the same rounded inputs."""

    def truth(given: Given) -> list[Tensor]:
        upstream = None if given.upstream is None else given.upstream.double()
        exact = given._replace(features=doubles(given.features), upstream=upstream)
        return _listed(bench.providers["reference"](exact)())

    bench = Bench(
        inputs=inputs,
        ours=ours,
        truth=truth,
        leaves=lambda given: () if given.upstream is None else given.features,
        upstream=lambda given: given.upstream,
        **fields,
    )
    return bench


PEERS = {"torchvision": torchvision_pool, "detectron2": detectron2, "mmcv": mmcv, "compile": compiled}
BENCH = bench_of(ours, cases=CASES, peers=PEERS, check=check)


def _pyramid(case: str, mode: str, dtype: str, layout: str, provider: str) -> bool:
    """Every dtype and layout for the box head, two common ones for the others; slow or rare providers once."""
    common = (dtype, layout) in (("fp32", "nchw"), ("bf16", "nhwc"))
    if case == BOX_HEAD:
        fits = mode == "forward" or dtype != "fp16"
    else:
        fits = common and (mode == "forward" or case == "roi-align-mask-head")
    in_peers = case not in ("roi-align-bicubic", "roi-align-max")
    wanted = {
        "triton": True,
        "torchvision": in_peers,
        "detectron2": in_peers and (dtype, layout) == ("fp32", "nchw"),
        "compile": (case, dtype, layout) == (BOX_HEAD, "bf16", "nhwc"),
        "reference": common,
    }
    return fits and wanted.get(provider, False)


DTYPES_AND_LAYOUTS = {"dtypes": ["fp32", "bf16", "fp16"], "layouts": ["nchw", "nhwc"]}
test_multiscale_roi_align = BENCH.test(
    cases=[name for name in CASES if "-map" not in name],
    modes=["forward", "backward"],
    where=_pyramid,
    **DTYPES_AND_LAYOUTS,
)
test_roi_align = BENCH.test(
    cases=["roi-align-map", "roi-align-map-adaptive"],
    where=lambda case, mode, dtype, layout, provider: (
        (dtype, layout) in (("fp32", "nchw"), ("fp32", "nhwc"), ("bf16", "nhwc"), ("fp16", "nchw"))
        and (provider in ("triton", "torchvision") or (dtype, layout) == ("fp32", "nchw"))
        and provider != "compile"
    ),
    **DTYPES_AND_LAYOUTS,
)


def forward_launches() -> Contest:
    """One provider for each tile of the forward kernel."""
    from tmask_kernels.ops.roi_align.kernels import forward as kernels

    tiles = {
        f"bins={bins},groups={groups},warps={warps}": kernels.Tile(bins, groups, 64, warps)
        for bins, groups, warps in itertools.product((4, 8, 16, 32), (1, 2, 4), (1, 2, 4, 8))
        if 8 <= bins * groups * 64 / (32 * warps) <= 64  # elements a thread: a wide load, and no spills
    }
    launches = {name: {"pick_tile": lambda *_, tile=tile: tile} for name, tile in tiles.items()}
    return BENCH.sweep([BOX_HEAD, "forward", "bf16", "nhwc"], kernels, launches)


def backward_launches() -> Contest:
    """One provider for each tile of the backward's gather."""
    from tmask_kernels.ops.roi_align.kernels import backward as kernels

    tiles = {
        f"{height}x{width},block_c={block_c},rows={rows},warps={warps},registers={registers}": kernels.GatherTile(
            height, width, block_c, rows, warps, registers
        )
        for height, width in ((4, 16), (8, 8), (2, 16))
        for block_c in (64, 128)
        for rows in (2, 4)
        for warps, registers in ((2, 168), (2, 255), (4, 128), (4, 168), (8, 128))
        if 16 <= height * width * block_c / (32 * warps) <= 128  # sums a thread
    }
    launches = {name: {"pick_gather_tile": lambda *_, tile=tile: tile} for name, tile in tiles.items()}
    return BENCH.sweep([BOX_HEAD, "backward", "bf16", "nhwc"], kernels, launches)


SWEEPS = {"roi_align-forward": forward_launches, "roi_align-backward": backward_launches}
