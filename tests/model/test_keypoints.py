"""The keypoint branch: each part against its definition, torchvision's loss and its own inverse."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints, keypointrcnn_loss

import tmask
from tests.model.conftest import KEYPOINTS, SPOTS, detected, images_and_targets, losses_of, padded, small
from tmask.model.keypoint_branch import KeypointBranch, encode_keypoints
from tmask.model.postprocess import to_list
from tmask.structures import Detections, SampledRois, Targets
from tmask_kernels import decode_keypoints
from tmask_kernels.testing import assert_close

SIDE = 56
BOX = torch.tensor([10.0, 20.0, 66.0, 132.0])  # a cell is 1 x 2 pixels

# x, y, visibility; the cell (x, y) in BOX, None where there is none.
CELLS = {
    "top left corner": ((10, 20, 2), (0, 0)),
    "inside": ((12.7, 27.9, 2), (2, 3)),
    "on the border of two cells": ((13, 26, 2), (3, 3)),
    "just before it": ((12.999, 25.999, 2), (2, 2)),
    "hidden counts": ((12.7, 27.9, 1), (2, 3)),
    "unknown": ((12.7, 27.9, 0), None),
    "right edge": ((66, 20, 2), (55, 0)),
    "bottom edge": ((10, 132, 2), (0, 55)),
    "both edges": ((66, 132, 2), (55, 55)),
    "beyond the right edge": ((66.01, 30, 2), None),
    "beyond the bottom edge": ((30, 132.01, 2), None),
    "left of the box": ((9.99, 30, 2), None),
    "above the box": ((30, 19.99, 2), None),
    "not a number": ((float("nan"), 30, 2), None),
}


@pytest.mark.parametrize("case", CELLS)
def test_encoding(case: str) -> None:
    keypoint, expected = CELLS[case]
    cell, valid = encode_keypoints(torch.tensor([keypoint], dtype=torch.float32), BOX, SIDE)
    assert valid.tolist() == [expected is not None]
    assert cell.tolist() == [0 if expected is None else expected[1] * SIDE + expected[0]]


def test_a_point_just_inside_the_far_edges_has_the_last_cell_and_an_empty_box_has_none() -> None:
    """(x - x1) * 56 / w rounds to 56 there."""
    box = torch.tensor([20.4, 9.4, 62.2, 64.0])
    xy = torch.nextafter(box[2:], torch.tensor(0.0))
    assert ((xy - box[:2]) * SIDE / (box[2:] - box[:2])).max() == SIDE
    cell, valid = encode_keypoints(torch.cat([xy, torch.ones(1)])[None], box, SIDE)
    assert valid.all()
    assert cell.item() == SIDE * SIDE - 1
    for box in (torch.zeros(4), torch.tensor([5.0, 5.0, 5.0, 9.0])):
        cell, valid = encode_keypoints(torch.tensor([[box[0], box[1], 2.0]]), box, SIDE)
        assert not valid.any()
        assert not cell.any()


def boxes_of(sides: list[list[list[float]]]) -> Tensor:
    """Boxes [N, D, 4] of sides [N, D, 2], each in a place of its own, and on a grid that float32 holds exactly."""
    far = torch.tensor(sides)
    corner = 7.25 * torch.arange(1.0, 1 + far.numel()).view(far.shape) - 20
    return torch.cat([corner, corner + far], dim=2)


def test_in_any_box_an_encoded_point_comes_back_to_half_a_cell_and_half_a_pixel() -> None:
    """Sides from 28 pixels on: in smaller boxes a lone cell may lie between two pixels. At the border the surface rises
    towards the edge, and the point may come back anywhere in its cell: it is off by less than one.
    """
    corner = 40 * torch.rand(1, 24, 2) - 20
    boxes = torch.cat([corner, corner + 28 + 272 * torch.rand(1, 24, 2)], dim=2)
    low, high = boxes[:, :, None].split(2, dim=3)  # [1, 24, 1, 2]
    part = (1.1 * torch.rand(1, 24, 12, 2) - 0.05).clamp(0, 1)  # some on the edges
    xy = torch.lerp(low, high, part)
    cells, valid = encode_keypoints(torch.cat([xy, torch.ones(1, 24, 12, 1)], dim=-1), boxes, SIDE)
    assert valid.all()
    maps = F.one_hot(cells, SIDE * SIDE).float().unflatten(-1, (SIDE, SIDE))
    decoded, _ = decode_keypoints(maps, boxes)
    error, cell, pixel = (decoded - xy).abs(), (high - low) / SIDE, (high - low) / (high - low).ceil()
    border = (part < 1 / SIDE) | (part > 1 - 1 / SIDE)
    ratio = error / torch.where(border, cell, (cell + pixel) / 2)
    assert ratio.max() <= 1 + 1e-3
    assert ratio[~border].max() > 0.9  # the bound is no looser than it need be
    assert 20 < border.sum() < border.numel() / 4


class Fixed:
    """Stands for extractor and head: the heat maps are given, what was asked for is kept."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits  # [P, Kp, S, S]
        self.asked, self.boxes, self.side = torch.zeros(0), torch.zeros(0), 0

    def pool(self, boxes: Tensor, valid: Tensor, side: int) -> Tensor:
        self.asked, self.boxes, self.side = valid, boxes, side
        return torch.arange(valid.numel())

    def head(self, rows: Tensor) -> Tensor:
        return self.logits[rows]


def rois_and_targets(positive: list[list[bool]]) -> tuple[SampledRois, Targets]:
    """Two images with RoIs near two boxes each of 5 keypoints, some unknown, some outside."""
    generator = torch.Generator().manual_seed(4)
    is_positive = torch.tensor(positive)
    count = is_positive.shape[1]
    boxes = torch.tensor([[5.0, 5.0, 45.0, 60.0], [30.0, 20.0, 90.0, 70.0]]).expand(2, 2, 4)
    xy = torch.tensor([3.0, 3.0]) + 80 * torch.rand(2, 2, 5, 2, generator=generator)
    visibility = torch.randint(0, 3, (2, 2, 5, 1), generator=generator).float()
    known = torch.ones(2, 2, dtype=torch.bool)
    targets = Targets(boxes, torch.ones(2, 2).long(), known, ~known, None, ~known, torch.cat([xy, visibility], dim=-1))
    gt_index = torch.randint(0, 2, (2, count), generator=generator)
    near = boxes.gather(1, gt_index[..., None].expand(-1, -1, 4)) + 6 * torch.rand(2, count, 4, generator=generator)
    gt_index = torch.where(is_positive, gt_index, -1)
    return SampledRois(near, is_positive.long(), gt_index, is_positive, torch.ones_like(is_positive)), targets


def loss_of(logits: Tensor, rois: SampledRois, targets: Targets, *, compact: bool) -> tuple[Tensor, Tensor]:
    fixed = Fixed(logits)
    branch = KeypointBranch(pool_size=14, size=SIDE)
    return branch.loss(fixed.pool, fixed.head, rois, targets, compact=compact), fixed.asked


@pytest.mark.parametrize("compact", [False, True])
def test_loss_is_torchvisions(compact: bool) -> None:
    rois, targets = rois_and_targets([[True, True, True], [True, True, True]])
    torch.manual_seed(0)
    logits = torch.randn(6, 5, SIDE, SIDE)
    actual, _ = loss_of(logits, rois, targets, compact=compact)
    assert targets.keypoints is not None
    expected = keypointrcnn_loss(logits, list(rois.boxes), list(targets.keypoints), list(rois.gt_index))
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("compact", [False, True])
def test_loss_and_its_gradient_are_those_of_valid_keypoints_of_positives(compact: bool) -> None:
    rois, targets = rois_and_targets([[True, True, False], [True, False, False]])
    torch.manual_seed(0)
    logits = torch.randn(6, 5, SIDE, SIDE, requires_grad=True)
    loss, asked = loss_of(logits, rois, targets, compact=compact)
    assert targets.keypoints is not None
    own = torch.stack([targets.keypoints[n, g] for n in range(2) for g in rois.gt_index[n]])
    cells, valid = encode_keypoints(own, rois.boxes.flatten(0, 1), SIDE)
    valid &= rois.positive.flatten()[:, None]
    assert 0 < valid.sum() < 15  # of three positives with five each
    expected = F.cross_entropy(logits.flatten(2)[valid], cells[valid])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient.flatten(2).any(2), valid)  # exactly 0 for all others
    assert torch.equal(asked.flatten(), valid.any(1))


@pytest.mark.parametrize("compact", [False, True])
def test_no_valid_keypoint_gives_zero_with_a_graph(compact: bool) -> None:
    rois, targets = rois_and_targets([[False, False], [False, False]])
    logits = torch.full((4, 5, SIDE, SIDE), 1e4, requires_grad=True)
    loss, _ = loss_of(logits, rois, targets, compact=compact)
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient.any()


def test_targets_without_keypoints_are_refused() -> None:
    rois, targets = rois_and_targets([[True], [True]])
    with pytest.raises(ValueError, match=r"targets.keypoints: expected keypoints \[N, G, Kp, 3\], got None"):
        loss_of(torch.zeros(2, 5, SIDE, SIDE), rois, targets._replace(keypoints=None), compact=False)


def test_transform_moves_keypoints_as_boxes_and_lets_missing_ones_be_unknown(keypoint_model: tmask.MaskRCNN) -> None:
    _, targets = padded(keypoint_model)
    assert targets.keypoints is not None
    low, high = targets.boxes[..., :2], targets.boxes[..., 2:]
    for i, (part, visibility) in enumerate(SPOTS):
        xy, v = targets.keypoints[:, :, i].split((2, 1), dim=-1)
        assert_close(xy, low + part * (high - low))
        assert (v[..., 0][targets.valid] == visibility).all()
    assert not targets.keypoints[1, 1].any()  # padding
    _, targets = keypoint_model.transform(*images_and_targets())
    assert targets is not None
    assert targets.keypoints is not None
    assert targets.keypoints.shape == (2, 2, 3, 3)
    assert not targets.keypoints[..., 2].any()


def test_the_loss_reaches_its_head_and_the_backbone(keypoint_model: tmask.MaskRCNN) -> None:
    parameters = dict(keypoint_model.named_parameters())
    names = [name for name in parameters if "keypoint_head" in name] + ["backbone.conv1.weight"]
    assert len(names) == 5
    loss = losses_of(keypoint_model)["loss_keypoint"]
    assert all(gradient.any() for gradient in torch.autograd.grad(loss, [parameters[name] for name in names]))


def test_impossible_keypoints_are_named(keypoint_model: tmask.MaskRCNN) -> None:
    images, targets = images_and_targets()
    keypoints = torch.tensor([[[9.0, 9.0, 2.0]] * 3, [[9.0, 5.0, 0.0]] * 3])
    for bad, message in (
        (keypoints.where(keypoints != 9, torch.nan), "[0, 0]: expected finite x, y and a vis"),
        (keypoints.where(keypoints != 2, -1.0), "[0, 0]: expected finite x, y and a vis"),
        (keypoints[:, :2], ": expected shape (2, 3, 3), got (2, 2, 3)"),
    ):
        targets[0]["keypoints"] = bad
        with pytest.raises(ValueError, match=re.escape(f"targets[0]['keypoints']{message}")):
            keypoint_model.transform(images, targets)
    targets[0]["keypoints"] = keypoints.where(keypoints != 5, -1.0)  # outside the image is fine
    keypoint_model.transform(images, targets)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("pool_size", [7, 14])
def test_the_built_branch_finds_what_was_encoded_for_its_head(pool_size: int, compact: bool) -> None:
    heads = small(keypoints=KEYPOINTS | {"pool_size": pool_size}).roi_heads
    side = heads.keypoint_head(torch.zeros(1, 16, pool_size, pool_size)).shape[-1]
    boxes = boxes_of((side * torch.tensor([[[1.0, 3], [5, 1]], [[3, 5], [5, 3]]])).tolist())
    sides = boxes[..., None, 2:] - boxes[..., None, :2]  # [2, 2, 1, 2]
    xy = boxes[..., None, :2] + sides * torch.tensor([[0.21, 0.8], [0.5, 0.33], [0.72, 0.64]])
    cells, inside = encode_keypoints(torch.cat([xy, torch.ones(2, 2, 3, 1)], dim=-1), boxes, heads.keypoint_branch.size)
    assert inside.all()
    maps = F.one_hot(cells.flatten(0, 1), side**2).float().unflatten(-1, (side, side))
    valid, fixed = torch.tensor([[True, True], [False, True]]), Fixed(maps)
    found = heads.keypoint_branch.keypoints(fixed.pool, fixed.head, boxes, valid, compact=compact)
    assert fixed.boxes is boxes
    assert fixed.side == pool_size
    assert ((found[..., :2] - xy).abs() * side / sides)[valid].max() <= 0.5 + 1e-3
    assert not found[~valid].any()
    theirs, scores = heatmaps_to_keypoints(maps, boxes.flatten(0, 1))
    assert torch.equal(found[valid][..., :2], theirs[valid.flatten()][..., :2])
    assert_close(found[valid][..., 2], scores[valid.flatten()].double())


def test_keypoints_of_the_model_are_those_of_its_detections(keypoint_model: tmask.MaskRCNN) -> None:
    peak = torch.zeros(3, SIDE, SIDE)
    peak[range(3), (10, 20, 30), (40, 15, 25)] = 1
    keypoint_model.roi_heads.keypoint_head.register_forward_hook(lambda head, x, out: peak.expand_as(out))
    found = detected(keypoint_model)
    expected, _ = decode_keypoints(peak.expand(2, 10, -1, -1, -1), found.boxes, found.valid())
    assert len(found.boxes[found.valid()].unique(dim=0)) > 10
    assert torch.equal(found.keypoints[..., :2], expected)


def test_results_are_in_original_pixels_and_padding_is_dropped() -> None:
    keypoints = torch.tensor([[[[20.0, 30.0, 7.5], [22.0, 30.0, -1.0]], [[0.0, 0.0, 0.0]] * 2]])  # [1, 2, 2, 3]
    boxes = torch.tensor([[[10.0, 20.0, 30.0, 40.0], [0.0, 0.0, 0.0, 0.0]]])
    one = torch.tensor([1])
    detections = Detections(boxes, torch.ones(1, 2), torch.ones(1, 2).long(), one, None, keypoints)
    (result,) = to_list(detections, torch.tensor([[60, 80]]), [(30, 160)])
    assert result["keypoints"].tolist() == [[[40, 15, 1], [44, 15, 1]]]
    assert result["keypoints_scores"].tolist() == [[7.5, -1.0]]
    assert result["boxes"].tolist() == [[20, 10, 60, 20]]
