"""Every kernel variant that the ops launch compiles for every architecture, within its budget."""

import ast
import importlib
import pkgutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from triton.runtime.jit import JITFunction

from tests.compile_only.harness import ARCHES, BASE, KNOWN_SPILLS, check, numbers, recorded
from tests.compile_only.record import Case, cases, variants
from tests.compile_only.resources import compile_kernel
from tmask_kernels import decode_keypoints, mask_targets, ops, padded_nms, rpn_proposals
from tmask_kernels.ops.proposals.example import ANCHORS
from tmask_kernels.testing import op_specs

pytestmark = pytest.mark.compile_only

ROOT = Path(__file__).parents[2]
CARDS = ("sm_86", "sm_89", "sm_120")  # RTX 30, 40 and 50
SHARED = 99 * 1024  # bytes of a program there: CUDA C++ Programming Guide, technical specifications


def every(cases: list[Case] | tuple[Case, ...], arches: tuple[str, ...]) -> pytest.MarkDecorator:
    """Parametrise a test ``(case, arch)``."""
    pairs = [(case, arch) for case in cases for arch in arches]
    return pytest.mark.parametrize(("case", "arch"), pairs, ids=[f"{case.name}-{arch}" for case, arch in pairs])


def takes_much(case: Case) -> bool:
    """Whether a case comes near a limit on the A100. A case without a record may."""
    taken = numbers(recorded().get((case.name, "sm_80", BASE)))
    return not taken or taken["registers"] >= 112 or taken["shared"] > SHARED / 4


@every(cases(), ARCHES)
def test_budget(case: Case, arch: str) -> None:
    check(case, arch)


@every(list(filter(takes_much, cases())), CARDS)
def test_fits_the_cards_that_most_users_own(case: Case, arch: str) -> None:
    got = compile_kernel(case.launch, arch)
    assert got.spills <= KNOWN_SPILLS.get(case.name, (0, ""))[0], got
    assert got.shared <= SHARED, got


def more_cases() -> list[Case]:
    """The variants of the SPECS in float32 that are no rows of the table: odd channels, strides and sizes."""
    known = {case.launch.key for case in cases()}
    return [case for case in cases("SPECS") if case.launch.key not in known and not _is_half(case)]


def _is_half(case: Case) -> bool:
    return any("fp16" in str(kind) for kind in case.launch.signature.values()) or "bf16" in str(case.launch.signature)


@every(more_cases(), ("sm_90",))
def test_small_cases_compile_without_spills(case: Case, arch: str) -> None:
    got = compile_kernel(case.launch, arch)
    assert got.spills == 0, got


def test_every_kernel_has_a_budget() -> None:
    """A jit function whose name ends in "_kernel" is one that the host launches; no other is."""
    modules = [importlib.import_module(name) for _, name, _ in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}.")]
    kernels = {
        value.fn
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    recorded = {case.launch.kernel.fn for case in cases()}
    assert len(kernels) > 25
    assert {kernel.__qualname__ for kernel in kernels ^ recorded} == set()


def test_every_op_with_a_kernel_has_budgets() -> None:
    """Of an op's own: a kernel shared with another op would hide that it has none."""
    ops = {path.relative_to(ROOT / "tmask_kernels/ops").parts[0] for path in ROOT.glob("tmask_kernels/ops/*/kernels*")}
    folders = {name for name in ops if importlib.import_module(f"tmask_kernels.ops.{name}.example").BUDGETS}
    assert folders == ops


def test_names_are_unique() -> None:
    names = [case.name for case in cases()]
    assert len(names) == len(set(names))
    assert set(KNOWN_SPILLS) <= set(names)


def test_every_wide_kernel_is_launched() -> None:
    for spec in op_specs("BUDGETS"):
        assert set(spec.wide.values()) <= {"load", "store", "load store"}, spec.name
    wide = {name for spec in op_specs("BUDGETS") for name in spec.wide}
    assert wide == {case.launch.name for case in cases() if case.wide}


def test_every_launch_says_whether_products_and_sums_fuse() -> None:
    """Triton 3.10 turns the default of `enable_fp_fusion` off; results must not change with it."""
    launches = [
        (f"{path.name}:{node.lineno}", {keyword.arg for keyword in node.keywords})
        for path in ROOT.glob("tmask_kernels/**/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    assert launches
    assert not [where for where, keywords in launches if "enable_fp_fusion" not in keywords]


def keypoints(images: int, boxes: int) -> object:
    valid = torch.ones(images, boxes, dtype=torch.bool)
    maps = torch.zeros(images, boxes, 17, 56, 56)
    return decode_keypoints(maps, torch.rand(images, boxes, 4), valid, backend="triton")


def targets(images: int, masks: int, rois: int, height: int, words: int) -> object:
    packed, index = torch.zeros(images, masks, height, words, dtype=torch.int32), torch.zeros(images, rois).long()
    given = packed, torch.rand(images, rois, 4), index, 28
    return mask_targets(*given, convention="detectron2", image_sizes=torch.full((images, 2), 9), backend="triton")


def proposals(height: int, width: int, dtype: torch.dtype) -> object:
    sizes = [(height // k, width // k) for k in (1, 2)]
    logits, deltas = ([torch.zeros(2, c, *size, dtype=dtype) for size in sizes] for c in (3, 12))
    return rpn_proposals(
        logits,
        deltas,
        torch.full((2, 2), 30),
        ANCHORS,
        padded_size=(8 * height, 8 * width),
        pre_nms_top_n=20,
        post_nms_top_n=25,
        nms_threshold=0.7,
        min_size=0.1,
        score_threshold=0.0,
        backend="triton",
    )


RPN_SIZES = ((24, 20), (33, 17), (64, 48), (11, 4))


@pytest.mark.parametrize(
    ("run", "sizes"),
    [
        pytest.param(keypoints, ((2, 3), (1, 7), (3, 5)), id="decode_keypoints"),
        pytest.param(targets, ((2, 3, 5, 16, 2), (1, 1, 1, 33, 1), (3, 16, 32, 64, 16)), id="mask_targets"),
        pytest.param(partial(proposals, dtype=torch.float32), RPN_SIZES, id="rpn_proposals-fp32"),
        pytest.param(partial(proposals, dtype=torch.bfloat16), RPN_SIZES, id="rpn_proposals-bf16"),
    ],
)
def test_one_variant_serves_all_sizes(run: Callable[..., object], sizes: tuple[tuple[int, ...], ...]) -> None:
    """A training draws many image sizes and counts. Each further variant would compile anew."""
    found = [{launch.key for launch in variants(partial(run, *size))} for size in sizes]
    assert found[0]
    assert [len(one - found[0]) for one in found] == [0] * len(sizes)


def test_another_variant_is_seen() -> None:
    """Of NMS whose boxes are one by one in memory or not: the test above can fail."""
    boxes, scores = torch.rand(2, 70, 8), torch.rand(2, 70)
    both = [
        {launch.key for launch in variants(partial(padded_nms, given, scores, 0.5, max_output=9, backend="triton"))}
        for given in (boxes[..., :4], boxes[..., ::2])
    ]
    assert both[0] != both[1]
