"""soft_nms: hand-made answers, a plain loop in Python, edges one by one, mutants."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.tools import INF, NAN, UNIT, crowded, distinct_scores, each_mutant
from tests.mutation import mutant
from tmask_kernels import soft_nms
from tmask_kernels.ops.soft_nms import kernels as kernels_soft
from tmask_kernels.ops.soft_nms import reference as soft_reference
from tmask_kernels.testing import guarded, poisoned_empty

HALF = [0.0, 0.0, 10.0, 5.0]  # IoU 0.5 with UNIT
FAR = [50.0, 0.0, 60.0, 10.0]


def loop(
    boxes: Tensor, scores: Tensor, method: str, iou_threshold: float, sigma: float, score_threshold: float
) -> tuple[list[int], list[float]]:
    """Soft-NMS in Python's floats."""
    left = dict(enumerate(scores.tolist()))
    rows, indices, taken = boxes.double().tolist(), [], []
    while left:
        best = max(left, key=lambda i: (left[i], -i))
        if left[best] < score_threshold:
            break
        indices.append(best)
        taken.append(left.pop(best))
        a = rows[best]
        for i in left:
            b = rows[i]
            inter = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
            iou = inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)
            if method == "gaussian":
                left[i] *= math.exp(-iou * iou / sigma)
            elif iou > iou_threshold:
                left[i] *= 1 - iou
    return indices, taken


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("settings", [(0.3, 0.5, 1e-3), (0.0, 0.1, 0.0), (0.6, 3.0, 0.2)], ids=str)
def test_equals_the_loop(method, settings, backend, device, monkeypatch):
    monkeypatch.setattr(kernels_soft, "BLOCK", 32)
    iou_threshold, sigma, score_threshold = settings
    boxes, scores = crowded(40), distinct_scores(40)
    options = {"iou_threshold": iou_threshold, "sigma": sigma, "score_threshold": score_threshold}
    indices, taken = soft_nms(boxes.to(device), scores.to(device), method=method, **options, backend=backend)
    expected, expected_scores = loop(boxes, scores, method, *settings)
    assert indices.dtype == torch.int64
    assert taken.dtype == torch.float32
    # Scores that rounding moves past each other are far below these.
    n = sum(score > 1e-3 for score in expected_scores)
    assert n > 10
    assert indices[:n].tolist() == expected[:n]
    torch.testing.assert_close(taken[:n].cpu(), torch.tensor(expected_scores[:n]), rtol=1e-4, atol=0)
    assert len(indices) == len(taken) == len(expected) or score_threshold == 0


EDGES = {
    # boxes, scores, taken at a threshold of 0.5 and a score of 0.05 by linear decay, their new scores
    "lowered by IoU": ([UNIT, HALF, FAR], [0.75, 0.5, 0.25], [0, 1, 2], [0.75, 0.5, 0.25]),  # a tie with 0.5
    "over the threshold": ([UNIT, [0.0, 0.0, 10.0, 7.5], FAR], [0.75, 0.5, 0.25], [0, 2, 1], [0.75, 0.25, 0.125]),
    "duplicates are dropped": ([UNIT, UNIT, FAR], [0.5, 0.75, 0.25], [1, 2], [0.75, 0.25]),
    "equal scores by rising index": ([FAR, UNIT, UNIT], [0.5, 0.5, 0.5], [0, 1], [0.5, 0.5]),
    "below the score": ([UNIT, FAR], [0.75, 0.01], [0], [0.75]),
    "just the score": ([UNIT, FAR], [0.75, 0.0625], [0, 1], [0.75, 0.0625]),
    "none": ([UNIT, FAR], [0.01, -1.0], [], []),
    "NaN score": ([UNIT, UNIT, FAR], [NAN, 0.5, NAN], [1], [0.5]),
    "infinite scores": ([UNIT, UNIT, FAR], [INF, INF, -INF], [0], [INF]),
    "NaN coordinate": ([[0.0, NAN, 10.0, 10.0], UNIT, UNIT], [0.75, 0.5, 0.25], [0, 1], [0.75, 0.5]),
    "NaN coordinate below": ([UNIT, [NAN, 0.0, 10.0, 10.0]], [0.75, 0.5], [0, 1], [0.75, 0.5]),
    "inf coordinate": ([[0.0, 0.0, INF, 10.0], UNIT], [0.75, 0.5], [0, 1], [0.75, 0.5]),
    "all inf": ([[-INF, -INF, INF, INF]] * 2, [0.75, 0.5], [0, 1], [0.75, 0.5]),
    "zero area": ([[5.0, 5.0, 5.0, 5.0]] * 2, [0.75, 0.5], [0, 1], [0.75, 0.5]),
    "inverted": ([[10.0, 10.0, 0.0, 0.0]] * 2 + [UNIT], [0.75, 0.5, 0.25], [0, 1, 2], [0.75, 0.5, 0.25]),
    "one that is lowered lowers with its own": (
        [[0.0, 0.0, 16.0, 1.0], [0.0, 0.0, 12.0, 1.0], FAR], [1.0, 0.5, 0.25], [0, 2, 1], [1.0, 0.25, 0.125],
    ),
    "negative coordinates": ([[-20.0, -20.0, -10.0, -10.0], [-20.0, -20.0, -10.0, -12.5]], [0.75, 0.5], [0, 1],
                             [0.75, 0.125]),
}  # fmt: skip


@pytest.mark.parametrize("edge", EDGES.values(), ids=EDGES.keys())
def test_edges(edge, backend, device):
    boxes, scores, indices, taken = edge
    args = torch.tensor(boxes, device=device), torch.tensor(scores, device=device)
    got = soft_nms(*args, iou_threshold=0.5, score_threshold=0.0625, backend=backend)
    assert got[0].tolist() == indices
    assert got[1].tolist() == taken


def test_gaussian_lowers_below_the_threshold_too(backend, device):
    args = torch.tensor([UNIT, HALF], device=device), torch.tensor([0.75, 0.5], device=device)
    _, taken = soft_nms(*args, method="gaussian", sigma=0.5, iou_threshold=1.0, backend=backend)
    torch.testing.assert_close(taken.cpu(), torch.tensor([0.75, 0.5 * math.exp(-0.5)]))


def check_soft(module: Any, device: torch.device) -> None:
    """The kernel of `module` against the reference: linear bit for bit, several blocks."""
    boxes, scores = torch.cat([crowded(32), torch.tensor([UNIT, HALF, FAR, [NAN] * 4]) - 128.0]), distinct_scores(36)
    boxes[7] = boxes[6]
    scores[10:20] = scores[35]
    scores[[5, 6, 7, 32, 33, 34]] = torch.tensor([NAN, INF, INF, 1.0, 0.5, 0.03125])
    for gaussian in (False, True):
        args = guarded(boxes.to(device)), guarded(scores.to(device)), gaussian, 0.5, 0.5, 0.03125
        with poisoned_empty():
            got = module.soft_nms(*args)
        expected = soft_reference.soft_nms_reference(*args)
        assert expected[2] < 35
        assert got[0].equal(expected[0])
        assert got[2].equal(expected[2])
        if gaussian:
            torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=0)
        else:
            assert got[1].equal(expected[1])


def test_kernel_equals_reference_behind_guard_bands(device, monkeypatch):
    monkeypatch.setattr(kernels_soft, "BLOCK", 32)
    check_soft(kernels_soft, device)


MUTANTS = {
    "tie": ("iou > iou_threshold", "iou >= iou_threshold"),
    "decay": ("1.0 - iou, 1.0)", "iou, 1.0)"),
    "gaussian": ("iou * iou", "iou"),
    "block": ("top > best_score", "top >= best_score"),
    "index": ("tl.min(tl.where(score == top, rows, K), axis=0)", "tl.max(tl.where(score == top, rows, 0), axis=0)"),
    "taken": ("(rows == last) | ", ""),
    "score": ("best_score >= score_threshold", "best_score > score_threshold"),
    "end": ("mask=mask, other=-float", "mask=mask, other=float"),
    "count": ("count += running.to(tl.int32)", "count += 1"),
}


@each_mutant(MUTANTS)
def test_a_broken_kernel_fails(device, tmp_path, monkeypatch, name):
    broken = mutant(kernels_soft, *MUTANTS[name], tmp_path)
    monkeypatch.setattr(broken, "BLOCK", 32)
    with pytest.raises(AssertionError):
        check_soft(broken, device)
