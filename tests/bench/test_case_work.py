"""W9 to W11 and the mask losses: least bytes by the design's table, and inputs on which the peers agree by rule."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from bench.cases import CASES, FocalCase, MatchCase, PasteCase
from bench.ops import matcher, paste_masks
from bench.rle import decode_rle

CPU = torch.device("cpu")


def work_of(name: str, *arguments: str) -> Any:
    return CASES[name].work(*arguments)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("megabytes", "bytes"),
    [
        (6.4, work_of("W9").bytes),
        (107, work_of("W10", "bool").bytes),
        (107 / 8, work_of("W10", "packed").bytes),
        (10.7, sum(work_of("W11", "fp32", mode).bytes for mode in ("forward", "backward"))),
        (5.4, sum(work_of("W11", "bf16", mode).bytes for mode in ("forward", "backward"))),
    ],
    ids=["W9", "W10 bool", "W10 packed", "W11 fp32", "W11 bf16"],
)
def test_least_bytes_are_those_of_the_design(megabytes, bytes):
    # A row of 1,333 bits takes 42 words, which are 3 % more than an eighth of its bytes.
    assert bytes / 1e6 == pytest.approx(megabytes, rel=0.035 if megabytes == 107 / 8 else 0.01)


def test_a_pyramid_has_as_many_anchors_as_the_focal_loss_has_columns():
    assert cast(MatchCase, CASES["W9"]).rpn.anchors == cast(FocalCase, CASES["W11"]).columns == 268_569


@pytest.mark.parametrize("small", [True, False], ids=["reduced", "full"])
def test_every_box_overlaps_an_anchor(small):
    case = cast(MatchCase, CASES["W9"])
    anchors, boxes = (case.small() if small else case).inputs(CPU)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    for one in boxes.flatten(0, 1):
        inside = ((centres > one[:2]) & (centres < one[2:])).all(1)
        assert inside.any()


def test_a_wrong_match_is_found():
    case = cast(MatchCase, CASES["W9"]).small()
    given = matcher.Given(case, *case.inputs(CPU))
    expected = matcher.truth(given)
    right = matcher.ours("reference")(given)()
    matcher.check(right, expected)
    assert {int(n) for n in expected.matches.clamp(max=0).unique()} == {-2, -1, 0}
    labels = [matcher.Labelled(m.clamp(min=0), (m >= 0).long() - (m == -2).long()) for m in right[0]]
    matcher.check(labels, expected)
    matched = int(expected.matches[expected.sure & (expected.matches >= 0)][0])
    for old, new in ((-2, -1), (-1, -2), (matched, matched + 1), (matched, -1)):
        with pytest.raises(AssertionError, match="matches"):
            matcher.check([torch.where(m == old, new, m) for m in right[0]], expected)
    with pytest.raises(AssertionError, match="ious"):
        matcher.check((right[0], right[1] + 1e-5), expected)


def test_run_lengths_are_drawn_as_pycocotools_draws_them():
    bound = torch.tensor([0.5, 0.02, -1, 2])[:, None, None]  # half, nearly all, all, none of the pixels
    masks = torch.rand(4, 37, 23, generator=torch.Generator().manual_seed(0)) > bound
    encoded = coco_mask.encode(masks.numpy().transpose(1, 2, 0).astype(np.uint8, order="F"))
    for mask, rle in zip(masks, encoded, strict=True):
        assert torch.equal(decode_rle(rle), mask)


@pytest.mark.parametrize("output", ["bool", "packed", "rle"])
def test_a_wrong_pixel_is_found(output):
    case = cast(PasteCase, CASES["W10"]).small()
    given = paste_masks.Given(case, *case.inputs(CPU))
    expected = paste_masks.truth(given)
    out = paste_masks.ours("reference", output)(given)()
    paste_masks.check(out, expected, case.width, output)
    index = tuple((expected.inside & expected.sure).nonzero()[0])
    flipped = expected._replace(inside=expected.inside.index_put(tuple(i[None] for i in index), torch.tensor(False)))
    with pytest.raises(AssertionError, match="1 pixels"):
        paste_masks.check(out, flipped, case.width, output)
    exempt = flipped._replace(sure=expected.sure.index_put(tuple(i[None] for i in index), torch.tensor(False)))
    paste_masks.check(out, exempt, case.width, output)
