"""What the tests of the RoI ops share: the kinds of pooling, their maps and boxes, and the comparison with the truth.

Every kind pools boxes of one image of 22 x 38 pixels, with maps that Triton's interpreter pools in about a second.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tmask_kernels import multiscale_roi_align, roi_align, roi_pool
from tmask_kernels.ops.roi_align.kernels import forward
from tmask_kernels.ops.roi_align.kernels import max as max_forward
from tmask_kernels.ops.roi_pool.kernels import forward as pool_forward
from tmask_kernels.testing import assert_close, guarded, poisoned_empty, random_boxes

HEIGHT, WIDTH = 22, 38  # pixels
LEVEL_SIZE = 12.0  # boxes of 12 x 12 pixels and more belong to the second level
Grid = tuple[int, bool]  # sampling_ratio, aligned
FIXED, ADAPTIVE = (2, False), (0, True)  # the two published conventions
GRIDS = {"fixed": FIXED, "adaptive-aligned": ADAPTIVE, "fixed3-aligned": (3, True), "adaptive": (-1, False)}
SLOW = pytest.mark.slow
TORCHVISION = pytest.param("torchvision", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="serves the CPU"))
EACH_BACKEND = pytest.mark.parametrize("backend", ["reference", TORCHVISION, "triton"])
EACH_GRID = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
INTERPOLATIONS = pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])


@dataclass(frozen=True)
class Kind:
    """One kind of RoI pooling: the mean of samples, the largest sample, or the largest cell of rounded bins."""

    name: str
    cubic: float | None = None  # coefficient of bicubic samples; None means bilinear ones
    largest: bool = False
    rounded: bool = False  # RoIPool
    grids: tuple[Grid, ...] = (FIXED, ADAPTIVE)
    backends: tuple[str, ...] = ("reference", "triton")
    stride: int = 2  # pixels a cell of the finest level
    channels: int = 3
    to_boxes: bool = False  # compare the gradient to the boxes too

    def __str__(self) -> str:
        return self.name

    def maps(
        self, device: torch.device, *, images: int = 2, dtype: torch.dtype = torch.float32, channels_last: bool = False
    ) -> list[Tensor]:
        """The levels [images, C, H, W], of odd sizes, between guard bands of NaN; RoIPool has one."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        strides = [self.stride] if self.rounded else [self.stride, 2 * self.stride]
        shapes = [(images, self.channels, HEIGHT // stride, WIDTH // stride) for stride in strides]
        levels = [torch.randn(shape).to(device, dtype).contiguous(memory_format=layout) for shape in shapes]
        return [guarded(level).requires_grad_() for level in levels]

    def boxes(self, device: torch.device, count: int = 2) -> Tensor:
        """Boxes [2, count, 4] of both levels, some over the border."""
        boxes = random_boxes(2 * count, height=HEIGHT, width=WIDTH, min_size=3, max_size=25, seed=1)
        boxes = (boxes + 4 * torch.randn(2 * count, 1)).view(2, count, 4)
        return boxes.to(device).requires_grad_(self.to_boxes)

    def pool(
        self,
        features: list[Tensor],
        boxes: Any,
        size: int | tuple[int, int],
        *,
        backend: str | None,
        grid: Grid = (2, True),
        valid: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Call the op: `scale` is that of the first map."""
        on_gpu, is_double = features[0].device.type == "cuda", features[0].dtype == torch.float64
        if backend == "torchvision" and (on_gpu or (self.rounded and is_double)):
            pytest.skip("torchvision serves the CPU, and rounds the bins of float64 in float64")
        if backend == "triton" and on_gpu and is_double:
            pytest.skip("float64 runs in the interpreter only")
        scale = scale or 1 / self.stride
        shared: dict[str, Any] = {"valid": valid, "backend": backend}
        if self.rounded:
            return roi_pool(features[0], boxes, size, scale, **shared)
        if self.largest:
            shared["reduction"] = "max"
        if self.cubic is not None:
            shared |= {"interpolation": "bicubic", "cubic_coeff": self.cubic}
        if len(features) == 1:
            return roi_align(features[0], boxes, size, scale, *grid, **shared)
        shared |= {"canonical_scale": LEVEL_SIZE, "canonical_level": 1 - round(math.log2(scale))}
        scales = [scale / 2**i for i in range(len(features))]
        return multiscale_roi_align(features, boxes, size, scales, sampling_ratio=grid[0], aligned=grid[1], **shared)

    def launch(
        self,
        features: list[Tensor],
        boxes: Tensor,
        size: tuple[int, int],
        *,
        grid: Grid = (2, True),
        scale: float | None = None,
        module: ModuleType | None = None,
    ) -> Tensor:
        """Call the custom op of the kernel, of `module` in place of the sound one; with an index for the gradient."""
        scale = scale or 1 / self.stride
        if self.rounded:
            return (module or pool_forward).roi_pool(features[0], boxes, None, *size, scale, True)[0]
        thresholds = [(LEVEL_SIZE * 2**i) ** 2 for i in range(len(features) - 1)]
        geometry = ([scale / 2**i for i in range(len(features))], thresholds, *grid, self.cubic)
        if self.largest:
            return (module or max_forward).multiscale_roi_align_max(features, boxes, None, *size, *geometry, True)[0]
        return (module or forward).multiscale_roi_align(features, boxes, None, *size, *geometry)


ALL_BACKENDS, ALL_GRIDS = ("reference", "torchvision", "triton"), tuple(GRIDS.values())
KINDS = {
    kind.name: kind
    for kind in (
        Kind("bilinear", grids=ALL_GRIDS, backends=ALL_BACKENDS, channels=21),
        Kind("bicubic", cubic=-0.6, channels=5),
        Kind("max", largest=True, stride=4),
        Kind("max-bicubic", cubic=-0.6, largest=True, stride=4),
        Kind("boxes", grids=ALL_GRIDS, to_boxes=True),
        Kind("boxes-bicubic", cubic=-0.6, to_boxes=True),
        Kind("pool", rounded=True, grids=(FIXED,), backends=ALL_BACKENDS, channels=5),
    )
}


def each(*names: str, grids: bool = False, slow: str = "") -> Any:
    """Parametrize `kind` and `backend`: the kinds of these names, or all, with each of their backends.

    `grids` adds a `grid`, of which the last two are slow. The kernels of the kinds in `slow` take the interpreter long.
    """
    cases = []
    for kind, backend in ((KINDS[name], backend) for name in names or KINDS for backend in KINDS[name].backends):
        late = backend == "triton" and kind.name in slow.split()
        for name, grid in GRIDS.items() if grids else [("", None)]:
            if grid is None or grid in kind.grids:
                marks = [SLOW] if late or grid in ALL_GRIDS[2:] else []
                values = (kind, backend, grid) if grids else (kind, backend)
                cases.append(pytest.param(*values, id="-".join(filter(None, (kind.name, backend, name))), marks=marks))
    return pytest.mark.parametrize(("kind", "backend", "grid") if grids else ("kind", "backend"), cases)


def odd_boxes(device: torch.device) -> Tensor:
    """[12, 4]: one on each level, two at a border, then the degenerate; the last three are not finite."""
    inf, nan = math.inf, math.nan
    rows = [
        [3.3, 2.1, 10.2, 9.7],
        [5.6, 1.2, 29.9, 20.4],
        [0.5, 0.5, 37.25, 21.5],  # samples in the border's last half cell
        [15.0, 11.0, 45.0, 30.0],
        [12.0, 15.0, 12.0, 15.0],  # zero size
        [20.2, 19.1, 10.3, 7.4],  # inverted on both axes
        [20.2, 7.1, 10.3, 19.4],  # inverted on one
        [-225.0, -225.0, -175.0, -200.0],  # wholly outside
        [-7.3, -5.2, 50.7, 47.1],  # larger than the image
        [nan, 10.0, 20.0, 30.0],
        [10.0, 10.0, inf, 30.0],
        [-inf, 10.0, 20.0, nan],
    ]
    return torch.tensor(rows, device=device) + 0.013  # no sample is on a cell, where the slope jumps


def check(
    kind: Kind,
    features: list[Tensor],
    boxes: Tensor,
    size: int | tuple[int, int],
    *,
    backend: str = "triton",
    run: Callable[[list[Tensor], Tensor], Tensor] | None = None,
    weights: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Compare the op, or `run`, and its gradients with the reference in float64 on the same numbers.

    Returns:
        The output, and the gradients to the features and, where they need one, the boxes.
    """
    run = run or (lambda f, b: kind.pool(f, b, size, backend=backend, **options))
    with poisoned_empty():
        out = run(features, boxes)
    exact = [x.detach().double().requires_grad_() for x in features]
    exact_boxes = boxes.detach().double().requires_grad_() if boxes.requires_grad else boxes
    expected = kind.pool(exact, exact_boxes, size, backend="reference", **options)
    assert out.dtype == features[0].dtype
    assert_close(out, expected)
    leaves = {f"level {i}": x for i, x in enumerate(features)} | ({"the boxes": boxes} if boxes.requires_grad else {})
    weights = torch.randn_like(out) if weights is None else weights
    with poisoned_empty():
        gradients = torch.autograd.grad(out, list(leaves.values()), weights, retain_graph=True)
    exact_leaves = [*exact, exact_boxes][: len(leaves)]
    wanted = torch.autograd.grad(expected, exact_leaves, weights.double())
    for (name, leaf), got, want in zip(leaves.items(), gradients, wanted, strict=True):
        assert (got.dtype, got.shape) == (leaf.dtype, leaf.shape)
        if leaf is boxes and out.dtype != torch.float64 and got.dtype == torch.float64:
            got = got.float()  # as it was computed
        assert_close(got, want, name=f"gradient to {name}")
    return out, list(gradients)


# The definition, by loops


def keys_kernel(x: float, a: float) -> float:
    """Keys (1981), equation 8, term by term."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def sample(feature: Tensor, y: float, x: float, a: float | None) -> Tensor:
    """Feature [C, H, W] at a point: [C]. `a` is the bicubic coefficient, None means bilinear."""
    _, H, W = feature.shape
    if y < -1 or y > H or x < -1 or x > W:
        return torch.zeros_like(feature[:, 0, 0])
    y, x = min(max(y, 0.0), H - 1.0), min(max(x, 0.0), W - 1.0)
    if a is None:  # in an order that leaves equal cells equal
        rows = feature[:, [int(y), min(int(y) + 1, H - 1)]]
        rows = rows[:, 0] + (y - int(y)) * (rows[:, 1] - rows[:, 0])
        return rows[:, int(x)] + (x - int(x)) * (rows[:, min(int(x) + 1, W - 1)] - rows[:, int(x)])
    total = torch.zeros_like(feature[:, 0, 0])
    for row in range(math.floor(y) - 1, math.floor(y) + 3):
        for column in range(math.floor(x) - 1, math.floor(x) + 3):
            cell = feature[:, min(max(row, 0), H - 1), min(max(column, 0), W - 1)]
            total = total + keys_kernel(y - row, a) * keys_kernel(x - column, a) * cell
    return total


def brute_force(
    feature: Tensor, box: list[float], size: tuple[int, int], grid: Grid, *, cubic: float | None, largest: bool = False
) -> Tensor:
    """Mean or largest sample of the bins of one box in cells on [C, H, W], by loops: [C, PH, PW]."""
    ratio, aligned = grid
    x1, y1, x2, y2 = (c - (0.5 if aligned else 0.0) for c in box)
    h, w = y2 - y1, x2 - x1
    if not aligned:
        h, w = max(h, 1.0), max(w, 1.0)
    gh, gw = (ratio, ratio) if ratio > 0 else (math.ceil(h / size[0]), math.ceil(w / size[1]))
    offsets = [((i + 0.5) / gh, (j + 0.5) / gw) for i in range(gh) for j in range(gw)]
    found = []
    for ph in range(size[0]):
        for pw in range(size[1]):
            at = [(y1 + (ph + dy) * h / size[0], x1 + (pw + dx) * w / size[1]) for dy, dx in offsets]
            samples = torch.stack([feature.new_zeros(len(feature))] + [sample(feature, *p, cubic) for p in at])
            if largest and at:
                first = [column.index(max(column)) for column in samples[1:].detach().T.tolist()]
                found.append(torch.stack([samples[1 + i, c] for c, i in enumerate(first)]))
            else:
                found.append(samples.sum(0) / max(gh * gw, 1))
    return torch.stack(found, 1).view(-1, *size)
