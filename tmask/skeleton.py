"""A set of keypoints: names, lines between them, mirror pairs, and how exactly people place each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tmask.checks import require

Pairs = tuple[tuple[int, int], ...]

UNKNOWN_SIGMA = 0.05  # of keypoints nobody measured it for: between COCO's eyes and knees


class Skeleton(NamedTuple):
    """Kp keypoints, numbered from 0."""

    names: tuple[str, ...]
    edges: Pairs  # the lines of a picture
    flip_pairs: Pairs  # keypoints that a left-right flip swaps
    sigmas: tuple[float, ...]  # per-keypoint spread of annotators in OKS, as a part of the square root of the area

    @property
    def flip_order(self) -> tuple[int, ...]:
        """Return the number of the keypoint at each place after a left-right flip."""
        order = list(range(len(self.names)))
        for a, b in self.flip_pairs:
            order[a], order[b] = b, a
        return tuple(order)


# COCO's keypoints of a person, with the sigmas of COCO's evaluation (cocodataset.org, keypoints-eval).
PERSON = Skeleton(
    names=(
        *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow"),
        *("right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee"),
        *("left_ankle", "right_ankle"),
    ),
    edges=(
        *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10)),
        *((1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
    ),
    flip_pairs=((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)),
    sigmas=(
        *(0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062),
        *(0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
    ),
)


def make_skeleton(
    names: Sequence[str] | None = None,
    edges: Pairs | None = None,
    flip_pairs: Pairs | None = None,
    sigmas: Sequence[float] | None = None,
) -> Skeleton:
    """Make a skeleton and fill in the parts that are None.

    Args:
        names: Names of the keypoints; None: COCO's person.
        edges: Pairs of numbers; None: COCO's for a person, else none.
        flip_pairs: Pairs of numbers; None: names that differ only by left and right, whatever their case.
        sigmas: One number above 0 for each name; None: COCO's for a person, else `UNKNOWN_SIGMA`.

    Raises:
        ValueError: No name, a name twice, a number of no keypoint, a keypoint in two flip pairs, or wrong sigmas.
    """
    known = PERSON.names if names is None else tuple(names)
    person = known == PERSON.names
    if edges is None:
        edges = PERSON.edges if person else ()
    if flip_pairs is None:
        flip_pairs = _mirror_pairs(known)
    if sigmas is None:
        sigmas = PERSON.sigmas if person else (UNKNOWN_SIGMA,) * len(known)
    count = len(known)
    require(0 < count == len(set(known)), "names", "at least one, none of them twice", known)
    for name, pairs in (("edges", edges), ("flip_pairs", flip_pairs)):
        inside = all(0 <= a < count and 0 <= b < count and a != b for a, b in pairs)
        require(inside, name, f"pairs of numbers in 0..{count - 1}", pairs)
    swapped = [number for pair in flip_pairs for number in pair]
    require(len(swapped) == len(set(swapped)), "flip_pairs", "each keypoint in one pair at most", flip_pairs)
    require(len(sigmas) == count and min(sigmas) > 0, "sigmas", f"{count} numbers above 0, one a name", tuple(sigmas))
    return Skeleton(known, edges, flip_pairs, tuple(sigmas))


def _mirror_pairs(names: Sequence[str]) -> Pairs:
    names = [name.lower() for name in names]
    place = {name: i for i, name in enumerate(names)}
    pairs = ((i, place.get(name.replace("left", "right"))) for i, name in enumerate(names) if "left" in name)
    return tuple((left, right) for left, right in pairs if right is not None)
