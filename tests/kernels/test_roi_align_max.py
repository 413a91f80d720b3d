"""RoIAlign's max: the definition by loops, the first of equals, the fp64 reference both ways, gradients, mutants."""

import itertools
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_roi_align import EACH_GRID, GRIDS, check_forward_and_backward, truth
from tests.kernels.test_roi_align_bicubic import sample as cubic_sample
from tests.mutation import mutant
from tmask_kernels import multiscale_roi_align, roi_align
from tmask_kernels.common.kernels import roi_axis
from tmask_kernels.ops.roi_align import op, reference_max
from tmask_kernels.ops.roi_align.kernels import max as kernels_max
from tmask_kernels.ops.roi_align.kernels import max_backward as kernels_max_backward
from tmask_kernels.ops.roi_align.kernels import touch as kernels_touch
from tmask_kernels.testing import assert_close, guarded, random_boxes

BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])
INTERPOLATIONS = pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
MAX: dict[str, Any] = {"reduction": "max"}


def feature_map(
    device: torch.device, *, C: int = 3, H: int = 5, W: int = 7, dtype: torch.dtype = torch.float32, last: bool = False
) -> Tensor:
    """[1, C, H, W] between guard bands of NaN; in channels_last it has more tiles of the gather."""
    x = torch.randn(1, C, H, W, device=device).to(dtype)
    return guarded(x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()


def few_values(feature: Tensor) -> Tensor:
    """The same of whole numbers, so that equal samples are everywhere, most of them 0 as behind a ReLU."""
    return (feature.detach() * 2).round().clamp(min=-1, max=1).requires_grad_()


def whole_boxes(device: torch.device) -> Tensor:
    """[6, 4] in cells, for 2 x 2 bins: what follows from them is exact in float32, so equal samples stay equal."""
    rows = [
        [-6.0, -4.0, 10.0, 8.0],  # beyond all borders: the samples outside come first in some bins, last in others
        [-2.0, 1.0, 6.0, 3.0],
        [2.0, 3.0, 6.0, 7.0],
        [0.5, 0.25, 4.5, 4.25],
        [3.25, 1.5, 5.25, 3.5],
        [4.0, 3.0, 12.0, 11.0],
    ]
    return torch.tensor(rows, device=device)


# The definition


def bilinear_sample(feature: Tensor, y: float, x: float) -> Tensor:
    """Feature [C, H, W] at a point: [C]."""
    _, H, W = feature.shape
    if y < -1 or y > H or x < -1 or x > W:
        return torch.zeros_like(feature[:, 0, 0])
    y, x = min(max(y, 0.0), H - 1.0), min(max(x, 0.0), W - 1.0)
    rows = feature[:, [int(y), min(int(y) + 1, H - 1)]]
    rows = rows[:, 0] + (y - int(y)) * (rows[:, 1] - rows[:, 0])
    return rows[:, int(x)] + (x - int(x)) * (rows[:, min(int(x) + 1, W - 1)] - rows[:, int(x)])


def brute_force(feature: Tensor, box: list[float], bins: int, ratio: int, aligned: bool, a: float | None) -> Tensor:
    """One box in cells on [C, H, W] by loops, straight from the definition: [C, bins, bins]."""
    x1, y1, x2, y2 = (c - (0.5 if aligned else 0.0) for c in box)
    h, w = y2 - y1, x2 - x1
    if not aligned:
        h, w = max(h, 1.0), max(w, 1.0)
    gh, gw = (ratio, ratio) if ratio > 0 else (math.ceil(h / bins), math.ceil(w / bins))
    points = [(i, j) for i in range(gh) for j in range(gw)]
    found = []
    for ph in range(bins):
        for pw in range(bins):
            at = [(y1 + (ph + (i + 0.5) / gh) * h / bins, x1 + (pw + (j + 0.5) / gw) * w / bins) for i, j in points]
            samples = [bilinear_sample(feature, *p) if a is None else cubic_sample(feature, *p, a) for p in at]
            for channel in range(len(feature)):
                values = [float(s[channel].detach()) for s in samples]
                found.append(samples[values.index(max(values))][channel] if values else feature.new_zeros(()))
    return torch.stack(found).view(bins, bins, -1).permute(2, 0, 1)


@pytest.mark.parametrize(("ratio", "aligned"), EACH_GRID)
@INTERPOLATIONS
def test_reference_follows_the_definition(interpolation: str, ratio: int, aligned: bool) -> None:
    feature = torch.randn(2, 4, 5, dtype=torch.float64)
    a = None if interpolation == "bilinear" else -0.6
    options = MAX | {"interpolation": interpolation, "cubic_coeff": -0.6, "backend": "reference"}
    for box in ([1.3, 1.1, 3.4, 3.9], [-3.3, -2.1, 9.2, 7.3], [3.2, 3.1, 3.9, 3.7], [-9.5, 1.0, 8.0, 3.0]):
        boxes = torch.tensor([[box]], dtype=torch.float64)
        out = roi_align(feature[None], boxes, 2, 1.0, ratio, aligned, **options)
        assert_close(out[0], brute_force(feature, box, 2, ratio, aligned, a))


def check_first_of_equals(device: torch.device, ratio: int, aligned: bool) -> None:
    """The reference against the loops, where nothing is rounded; `parity` holds the kernels to it on the same boxes."""
    feature = few_values(feature_map(device, C=2))
    boxes = whole_boxes(device)
    out = roi_align(feature, boxes[None], 2, 1.0, ratio, aligned, **MAX, backend="reference")
    plain = feature.detach().cpu().requires_grad_()
    expected = torch.stack([brute_force(plain[0], box, 2, ratio, aligned, None) for box in boxes.tolist()])
    assert torch.equal(out.detach().cpu(), expected.detach())
    weights = torch.arange(1.0, 1 + out.numel()).view_as(expected)  # another number for each bin
    (got,) = torch.autograd.grad(out, feature, weights.to(device))
    assert_close(got.cpu(), torch.autograd.grad(expected, plain, weights)[0].double())


@pytest.mark.parametrize(("ratio", "aligned"), GRIDS[:2])
def test_the_first_of_equals_takes_the_gradient(device: torch.device, ratio: int, aligned: bool) -> None:
    check_first_of_equals(device, ratio, aligned)


@BACKENDS
def test_samples_of_a_constant_are_equal(backend: str, device: torch.device) -> None:
    """At any coordinates, and for a number that binary has not: the first sample has the whole gradient."""
    feature = torch.full((1, 1, 6, 6), 0.3, device=device, requires_grad=True)
    boxes = torch.tensor([[[0.71, 0.33, 5.17, 4.9]]], device=device)
    out = roi_align(feature, boxes, 1, 1.0, 3, True, **MAX, backend=backend)
    assert out.item() == feature[0, 0, 0, 0].item()
    (gradient,) = torch.autograd.grad(out.sum(), feature)
    # The first sample lies a sixth of the box from its corner: y 0.5917, x 0.9533.
    expected = torch.tensor([[0.0191, 0.3893], [0.0276, 0.5641]], device=device)
    assert (gradient[0, 0, :2, :2] - expected).abs().max() < 1e-4
    assert not gradient[0, 0, 2:].any()


@BACKENDS
@pytest.mark.parametrize("ratio", [2, 0], ids=["fixed", "adaptive"])
def test_samples_outside_count_as_0(backend: str, device: torch.device, ratio: int) -> None:
    feature = torch.full((1, 1, 4, 4), -2.0, device=device, requires_grad=True)
    boxes = torch.tensor(
        [[[1.0, 1, 3, 3], [2, 2, 12, 3], [2, 2, 3, 12], [-9, 2, 3, 3], [20, 20, 24, 24]]], device=device
    )
    out = roi_align(feature, boxes, 1, 1.0, ratio, True, **MAX, backend=backend)
    assert out.flatten().tolist() == [-2, 0, 0, 0, 0]
    (gradient,) = torch.autograd.grad(out.sum(), feature)
    assert gradient.sum().item() == 1


@BACKENDS
def test_nan_wins(backend: str, device: torch.device) -> None:
    """As in torch.max, and the first of them; only in the bins that have a sample beside it."""
    feature = torch.zeros(1, 1, 4, 8, device=device)
    feature[0, 0, 1, 1], feature[0, 0, 0, 7], feature[0, 0, 2, 1] = math.nan, 5.0, math.nan
    feature.requires_grad_()
    out = roi_align(feature, torch.tensor([[[0.5, 0.5, 8.5, 4.5]]], device=device), (1, 2), 1.0, 4, True, **MAX,
                    backend=backend)  # fmt: skip
    assert out.isnan().flatten().tolist() == [True, False]
    (gradient,) = torch.autograd.grad(out[..., 0].sum(), feature)
    # The first is the sample at (0.5, 0.5).
    assert gradient[0, 0, :2, :2].tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert gradient.sum().item() == 1


# Against the reference in float64


def every_variant() -> list[Any]:
    """Layout, interpolation and grid; two of them show each, and the rest are marked slow."""
    variants = itertools.product((False, True), ("bilinear", "bicubic"), ((2, False), (0, True)))
    quick = ((True, "bilinear", (0, True)), (False, "bicubic", (2, False)))
    return [
        pytest.param(*variant, marks=[] if variant in quick else [pytest.mark.slow], id="-".join(map(str, variant)))
        for variant in variants
    ]


@BACKENDS
@pytest.mark.parametrize(("channels_last", "interpolation", "grid"), every_variant())
def test_backends_equal_the_truth(
    backend: str, device: torch.device, channels_last: bool, interpolation: str, grid: tuple[int, bool]
) -> None:
    ratio, aligned = grid
    features = [feature_map(device, H=4, W=5, last=channels_last), feature_map(device, H=2, W=3, last=channels_last)]
    boxes = torch.tensor([[[1.3, 0.6, 4.4, 3.9], [-1.3, -1.1, 8.2, 6.3]]], device=device)
    options = MAX | {"sampling_ratio": ratio, "aligned": aligned, "canonical_scale": 8, "canonical_level": 1}
    options["interpolation"] = interpolation
    check_forward_and_backward(
        lambda f: multiscale_roi_align(f, boxes, 2, [1.0, 0.5], **options, backend=backend),
        features,
        *truth(features, boxes, 2, [1.0, 0.5], **options),
    )


@BACKENDS
@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.float16, (1, 1)), (torch.bfloat16, (1, 6)), (torch.float64, (5, 7))], ids=str
)
def test_dtypes_and_odd_maps(backend: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if dtype == torch.float64 and device.type == "cuda" and backend == "triton":
        pytest.skip("float64 runs in the interpreter only")
    features = [feature_map(device, H=shape[0], W=shape[1], dtype=dtype)]
    boxes = torch.tensor([[[0.2, -0.4, 4.7, 3.1], [-0.3, -0.2, 0.9, 0.8]]], device=device)
    check_forward_and_backward(
        lambda f: multiscale_roi_align(f, boxes, (2, 1), [1.0], **MAX, backend=backend),
        features,
        *truth(features, boxes, (2, 1), [1.0], **MAX),
    )


@BACKENDS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN boxes in the interpreter
@pytest.mark.parametrize(("ratio", "aligned"), [pytest.param(2, False, id="fixed", marks=pytest.mark.slow), GRIDS[1]])
def test_odd_boxes(backend: str, device: torch.device, ratio: int, aligned: bool) -> None:
    inf, nan = math.inf, math.nan
    rows = [
        [1.0, 1.0, 5.0, 4.0],
        [3.1, 2.2, 3.1, 2.2],  # zero size
        [6.2, 4.1, 2.3, 1.4],  # inverted
        [6.2, 1.4, 2.3, 4.1],  # inverted on one axis
        [-90.0, -90.0, -70.0, -80.0],  # wholly outside
        [-31.3, -2.2, 40.7, 9.1],
        [nan, 1.0, 2.0, 3.0],
        [1.0, 1.0, inf, 3.0],
        [-inf, 1.0, 2.0, nan],
    ]
    boxes = torch.tensor([rows], device=device)
    feature = feature_map(device)
    expected, (exact,) = truth([feature], boxes, 2, [1.0], sampling_ratio=ratio, aligned=aligned, **MAX)
    out = roi_align(feature, boxes, 2, 1.0, ratio, aligned, **MAX, backend=backend)
    assert_close(out, expected)
    assert not out[6:].any()
    if ratio == 0:
        assert not out[1:4].any(), "no samples"
    (got,) = torch.autograd.grad(out.sum(), feature)
    assert_close(got, torch.autograd.grad(expected.sum(), exact)[0])


def check_huge_boxes(device: torch.device, **options: Any) -> None:
    """As many samples as float32 counts and more: those outside are 0, all but a few are never looked at."""
    feature = torch.full((1, 1, 4, 4), -1.0, device=device)
    rows = [[-1e9, -1e9, 2e9, 2e9], [-3e4, 1.0, 5e4, 2.0], [-3e28, 0.0, 2e10, 3e28], [1e30, 1e30, 2e30, 2e30]]
    for scale in (1.0, 1e10):  # the second overflows
        out = roi_align(feature, torch.tensor([rows], device=device), 1, scale, 0, True, **MAX, **options)
        assert not out.any()


@BACKENDS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflows in the interpreter
def test_huge_boxes(backend: str, device: torch.device) -> None:
    check_huge_boxes(device, backend=backend)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_without_a_look_at_the_unseen_huge_boxes_are_wrong(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = mutant(kernels_max, "unseen_y) > 0, 0.0", "unseen_y) < 0, 0.0", tmp_path)
    monkeypatch.setattr(kernels_max, "multiscale_roi_align_max", broken.multiscale_roi_align_max)
    with pytest.raises(AssertionError):
        check_huge_boxes(device, backend="triton")


# Forms of the arguments, empty inputs


@BACKENDS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN boxes in the interpreter
def test_forms_of_boxes_agree(backend: str, device: torch.device) -> None:
    feature = torch.randn(2, 3, 5, 7, device=device)
    boxes = random_boxes(4, height=5, width=7, min_size=2, device=device).view(2, 2, 4)
    padded = roi_align(feature, boxes, 2, **MAX, backend=backend)
    index = torch.tensor([1.0] * 2 + [0.0] * 2, device=device)[:, None]
    flat = roi_align(feature, torch.cat([index, boxes.flip(0).flatten(0, 1)], 1), 2, **MAX, backend=backend)
    assert torch.equal(flat, padded.view(2, 2, 3, 2, 2).flip(0).flatten(0, 1))
    valid = torch.tensor([[True, False], [False, False]], device=device)
    boxes[~valid] = math.nan
    out = roi_align(feature, boxes, 2, **MAX, valid=valid, backend=backend)
    assert torch.equal(out[0], padded[0])
    assert not out[1:].any()


@BACKENDS
@pytest.mark.parametrize(
    ("shape", "boxes"), [((1, 2, 4, 4), 0), ((0, 2, 4, 4), 3), ((1, 2, 0, 4), 3), ((1, 0, 4, 4), 3)], ids=str
)
def test_nothing_to_pool_keeps_the_graph(
    backend: str, device: torch.device, shape: tuple[int, ...], boxes: int
) -> None:
    feature = torch.zeros(shape, device=device, requires_grad=True)
    out = roi_align(feature, torch.ones(shape[0], boxes, 4, device=device), 2, **MAX, backend=backend)
    assert out.shape == (shape[0] * boxes, shape[1], 2, 2)
    assert not out.any()
    (gradient,) = torch.autograd.grad(out.sum(), feature)
    assert gradient.shape == feature.shape
    assert not gradient.any()


@pytest.mark.slow
def test_more_channels_than_a_block(device: torch.device) -> None:
    assert kernels_max_backward.pick_gather_tile(300, True, None).block_c < 300
    features = [feature_map(device, C=300, H=2, W=2, last=True)]
    boxes = torch.tensor([[[0.2, 0.3, 1.7, 2.1]]], device=device)
    check_forward_and_backward(
        lambda f: multiscale_roi_align(f, boxes, (1, 7), [1.0], **MAX, backend="triton"),
        features,
        *truth(features, boxes, (1, 7), [1.0], **MAX),
    )
    (gradient,) = torch.autograd.grad(
        multiscale_roi_align(features, boxes, (1, 7), [1.0], **MAX, backend="triton").sum(), features
    )
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def pool(
    module: ModuleType, feature: Tensor, boxes: Tensor, ratio: int, keep_index: bool, bins: int = 2
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = module.multiscale_roi_align_max(
        [feature], boxes, None, bins, bins, [1.0], [], ratio, True, None, keep_index
    )
    return found


@pytest.mark.parametrize(
    ("ratio", "dtype"),
    [(2, torch.int8), pytest.param(11, torch.int8, marks=pytest.mark.slow), (12, torch.int32), (0, torch.int32)],
    ids=str,
)
def test_the_index_is_kept_only_for_a_gradient(device: torch.device, ratio: int, dtype: torch.dtype) -> None:
    """A byte where the numbers of all samples fit; the last sample has the largest."""
    feature = torch.arange(9.0, device=device).view(1, 1, 3, 3)
    boxes = torch.tensor([[[0.5, 0.5, 2.5, 2.5]]], device=device)
    _, index = pool(kernels_max, feature, boxes[:, :0], ratio, False)
    _, sample = pool(kernels_max, feature, boxes, ratio, True, 1)
    assert not index.numel()
    assert sample.dtype == dtype
    last = ratio**2 - 1 if ratio else 65536 + 1  # of 2 x 2 samples
    assert sample.item() == last


def test_a_backward_without_the_index_is_refused(device: torch.device) -> None:
    feature = torch.zeros(1, 1, 4, 4, device=device, requires_grad=True)
    out, _ = pool(kernels_max, feature, torch.ones(1, 1, 4, device=device), 2, False)
    with pytest.raises(RuntimeError, match="keep_index=True"):
        out.sum().backward()


# Gradients


@pytest.mark.parametrize(
    ("interpolation", "ratio", "aligned"),
    [
        ("bilinear", 2, False),
        ("bilinear", 0, True),
        ("bicubic", 2, False),
        pytest.param("bicubic", 0, True, marks=pytest.mark.slow),
    ],
)
def test_reference_gradcheck(interpolation: str, ratio: int, aligned: bool) -> None:
    """Features and boxes; far enough apart that no small step makes another sample the largest."""
    feature = (torch.randperm(12).double().view(1, 1, 3, 4) / 10).requires_grad_()
    boxes = torch.tensor([[[0.3, 0.6, 3.7, 2.2], [-1.2, 0.4, 2.9, 2.3]]], dtype=torch.float64, requires_grad=True)

    def run(feature: Tensor, boxes: Tensor) -> Tensor:
        options = MAX | {"interpolation": interpolation, "backend": "reference"}
        return roi_align(feature, boxes, (2, 1), 1.0, ratio, aligned, **options)

    assert torch.autograd.gradcheck(run, (feature, boxes))


@BACKENDS
def test_many_gradients_of_one_cell_are_summed_in_fp32(backend: str, device: torch.device) -> None:
    """256 and eight ones on one cell: in bfloat16 256 + 1 is 256."""
    feature = torch.zeros(1, 1, 3, 3, device=device, dtype=torch.bfloat16)
    feature[..., 1, 1] = 1
    feature.requires_grad_()
    boxes = torch.tensor([0.5, 0.5, 2.5, 2.5], device=device).expand(1, 9, 4)  # one sample, on the middle cell
    upstream = torch.tensor([256.0] + [1.0] * 8, device=device, dtype=torch.bfloat16).view(9, 1, 1, 1)
    out = roi_align(feature, boxes, 1, 1.0, 1, True, **MAX, backend=backend)
    (gradient,) = torch.autograd.grad(out, feature, upstream)
    expected = torch.zeros_like(gradient)
    expected[..., 1, 1] = 264
    assert torch.equal(gradient, expected)


@pytest.mark.slow
def test_gradient_is_deterministic(device: torch.device) -> None:
    """The same bits twice, and no refusal in deterministic mode; more boxes than one word of the mask holds."""
    boxes = random_boxes(33, height=4, width=8, min_size=1, max_size=3, device=device)[None]
    features = [feature_map(device, C=2, H=4, W=8)]
    torch.use_deterministic_algorithms(True)
    try:
        out = multiscale_roi_align(features, boxes, 1, [1.0], sampling_ratio=1, **MAX, backend="triton")
        weights = torch.randn_like(out)
        (first,), (second,) = (torch.autograd.grad(out, features, weights, retain_graph=True) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
    expected, exact = truth(features, boxes, 1, [1.0], sampling_ratio=1, **MAX)
    assert_close(first, torch.autograd.grad(expected, exact, weights.double())[0])


# The choice of a backend, tracing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "torchvision"}, "torchvision.*has no max of samples"),
        ({"boxes": torch.ones(1, 1, 4, requires_grad=True), "backend": "triton"}, "triton.*no gradient to the boxes"),
        ({"input": torch.zeros(1, 1, 1, op.MAX_ADAPTIVE_SIDE + 1), "backend": "triton"}, "triton.*at most 16000 cells"),
        (
            {
                "input": torch.zeros(1, 1, 5793, 5793, device="meta"),
                "boxes": torch.ones(1, 1, 4, device="meta"),
                "sampling_ratio": 2,
                "backend": "triton",
            },
            "triton.*at most 33554432 cells in all",
        ),
    ],
    ids=["torchvision", "boxes", "large", "many cells"],
)
def test_backends_that_cannot(change: dict[str, Any], message: str) -> None:
    arguments = {"input": torch.zeros(1, 1, 4, 4), "boxes": torch.ones(1, 1, 4), "output_size": 2} | change
    with pytest.raises(ValueError, match=message):
        roi_align(**arguments, **MAX)


def test_an_adaptive_grid_is_not_traced_by_the_reference(device: torch.device) -> None:
    def run(feature: Tensor, boxes: Tensor) -> Tensor:
        return roi_align(feature, boxes, 2, **MAX, backend="reference")

    with pytest.raises(Exception, match="searched as far as the data say"):
        torch.compile(run, fullgraph=True, backend="eager")(
            torch.zeros(1, 1, 4, 4, device=device), torch.ones(1, 1, 4, device=device)
        )


@pytest.mark.parametrize(
    ("chosen", "ratio"),
    [
        pytest.param("reference", 2, marks=pytest.mark.slow),
        ("triton", 2),
        pytest.param("triton", 0, marks=pytest.mark.slow),
    ],
)
def test_compiles_whole(device: torch.device, chosen: str, ratio: int) -> None:
    features = [feature_map(device, C=2, H=3, W=4)]
    boxes = torch.tensor([[[0.3, 0.6, 3.4, 2.9]]], device=device)

    def run(features: list[Tensor], boxes: Tensor) -> Tensor:
        return multiscale_roi_align(features, boxes, 2, [1.0], sampling_ratio=ratio, **MAX, backend=chosen)

    out = torch.compile(run, fullgraph=True, backend="aot_eager")(features, boxes)
    expected = run(features, boxes)
    assert torch.equal(out, expected)
    weights = torch.randn_like(out)
    (got,), (want,) = (torch.autograd.grad(x, features, weights) for x in (out, expected))
    assert_close(got, want.double())


@pytest.mark.parametrize(
    "channels_last", [pytest.param(False, marks=pytest.mark.slow), True], ids=["contiguous", "channels_last"]
)
def test_opcheck(device: torch.device, channels_last: bool) -> None:
    features = [feature_map(device, C=2, H=2, W=4, last=channels_last)]
    boxes = torch.tensor([[[0.3, 0.2, 2.4, 1.9], [0.0, 0.0, 1.0, 1.0]]], device=device)
    valid = torch.tensor([[True, False]], device=device)
    options = ([1.0], [], 2, True, None)
    torch.library.opcheck(kernels_max.multiscale_roi_align_max, (features, boxes, valid, 1, 2, *options, True))
    grad, index = torch.randn(2, 2, 1, 2, device=device), torch.randint(-1, 4, (2, 2, 1, 2), device=device)
    torch.library.opcheck(
        kernels_max_backward.multiscale_roi_align_max_backward,
        (grad, index.to(torch.int8), boxes, valid, 1, [2], [4], channels_last, *options),
    )


# Mutants: each must turn the parity check red


def parity(module: ModuleType, device: torch.device, ratio: int) -> None:
    """Equal samples everywhere, inside and outside the map; two rows of tiles of the backward."""
    feature = few_values(feature_map(device, C=2))
    boxes = whole_boxes(device)[None]
    expected, exact = truth([feature], boxes, 2, [1.0], sampling_ratio=ratio, **MAX)
    check_forward_and_backward(lambda f: pool(module, f[0], boxes, ratio, True)[0], [feature], expected, exact)


FIXED, ADAPTIVE = 2, 0
FORWARD, BACKWARD = kernels_max, kernels_max_backward
MUTANTS = {
    "last of equals": (FIXED, FORWARD, "stays = (value <= best)", "stays = (value < best)"),
    "outside takes a gradient": (FIXED, FORWARD, "+ ix, -1)", "+ ix, 0)"),
    "a sample outside for one": (FIXED, FORWARD, "tl.where(inside_y, grid_w, 0.0)", "grid_w"),
    "a sample too few": (FIXED, FORWARD, "while ix < num_x", "while ix < num_x - 1"),
    "columns of the taps swapped": (FIXED, FORWARD, "v01 - v00, v00", "v00 - v01, v01"),
    "no sample before the window": (ADAPTIVE, roi_axis, "step - 0.5) - 1", "step - 0.5)"),
    "no sample after the window": (ADAPTIVE, roi_axis, "step - 0.5) + 1", "step - 1.5)"),
    "index read by another rule": (FIXED, BACKWARD, "kept % samples_a_row(SAMPLING_RATIO)", "kept % 3"),
    "gradient of bins that kept none": (FIXED, BACKWARD, "tl.where(kept >= 0, grad.to(ACC), 0.0)", "grad.to(ACC)"),
    "gradient not clamped": (FIXED, BACKWARD, "tl.minimum(tl.maximum(at, 0.0), length - 1.0)", "at"),
    "window left out": (ADAPTIVE, BACKWARD, "(first + sample", "(sample"),
    "a tile beside the bins left out": (FIXED, kernels_touch, "+ 0.01) + 1.0", "- 0.5)"),
    "another weight": (FIXED, roi_axis, "1.0 - tl.abs(at - cells)", "1.0 - (at - cells)"),
}  # fmt: skip
QUICK = {"last of equals", "no sample before the window"}


@pytest.mark.parametrize("ratio", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
def test_parity_is_green(device: torch.device, ratio: int) -> None:
    parity(kernels_max, device, ratio)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in MUTANTS])
def test_mutants_turn_parity_red(name: str, device: torch.device, tmp_path: Path) -> None:
    ratio, module, old, new = MUTANTS[name]
    broken = mutant(module, old, new, tmp_path, seen_from=kernels_max)
    with pytest.raises(AssertionError):
        parity(broken, device, ratio)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("stays = (value <= best)", "stays = (value < best)"),
        ("self._begin, self.turns = -1, ", "self._begin, self.turns = 0, "),
        ("beyond = self._past < self.grid", "beyond = self._past < 0"),
        ("torch.where(inside, y, -1.0)", "y"),
    ],
    ids=["last of equals", "none before the window", "none after the window", "outside takes a gradient"],
)
def test_mutants_of_the_reference(
    old: str, new: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = mutant(reference_max, old, new, tmp_path)
    monkeypatch.setattr(op, "multiscale_roi_align_max_reference", broken.multiscale_roi_align_max_reference)
    with pytest.raises(AssertionError):
        check_first_of_equals(device, 0, True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of a division by the step of a zero-size box
def test_a_zero_size_box_on_the_border_takes_no_gradient(device: torch.device) -> None:
    feature = torch.randn(1, 2, 4, 4, device=device, requires_grad=True)
    box = torch.tensor([[0, 1.0, -0.5, 3.0, -0.5]], device=device)  # its samples are at y = -1
    out = roi_align(feature, box, 2, 1.0, -1, True, reduction="max", backend="triton")
    (gradient,) = torch.autograd.grad(out.sum(), feature)
    assert not gradient.any()
