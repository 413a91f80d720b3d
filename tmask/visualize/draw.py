"""Instances drawn into their image, predictions beside the ground truth, and grids of pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tmask.visualize.colours import INK, WHITE, WRONG_COLOUR, Array, Colour, choose_shades, colour_of
from tmask.visualize.instances import WRONG, Instances, read_instances, to_numpy, to_picture
from tmask.visualize.labels import draw_labels, draw_legend, font_of
from tmask.visualize.masks import draw_mask

PARTS = ("masks", "boxes", "keypoints", "labels", "legend")  # of a picture
FALSE, CROWD = -1, -2  # in the matches of a comparison: a detection without an object, and a detection in a crowd
PICTURE_SIDE = 512  # small images are enlarged to about this short side, so that labels can be read
COMPARISON_SIDE = 1600  # largest side of a picture in a comparison, in pixels
MIN_SIDE = 128  # smallest `max_side`: a legend takes up to 65 pixels of it
GAP = 8  # pixels between and around the pictures of a grid
_MAX_ASPECT = 4  # an enlarged image has a long side of at most this many times PICTURE_SIDE
_LINE = 1 / 60  # width of an outline, as part of the side of its object


def draw_instances(
    image: Any,
    result: Mapping[str, Any],
    class_names: Sequence[str],
    *,
    min_score: float = 0.0,
    parts: Collection[str] = PARTS,
    side: int = PICTURE_SIDE,
    max_side: int | None = None,
    edges: Sequence[tuple[int, int]] = (),
) -> Image.Image:
    """Draw instances into their image.

    Each class has a colour, by its number. Instances of one class whose boxes touch are filled with different shades
    of that colour. The width of lines and the size of text follow the size of the object. A label is left out if its
    plate would cover another label or more than a tenth of an object's box; the surest instances are labelled first.
    A strip below the image, the legend, lists the classes with their colours and numbers of instances.

    Args:
        image: A PIL image, an array uint8 [H, W, 3] or a tensor uint8 [3, H, W] on any device; RGB.
        result: ``boxes`` [K, 4] xyxy in pixels of the image and ``labels`` [K]. Optional: ``scores`` [K]; ``masks``, as
            COCO run lengths (K dicts), [K, H, W] bool or uint8, or probabilities, [K, 1, H, W] too; and ``keypoints``
            [K, Kp, 3] of x, y and a value above 0 where the keypoint is known.
        class_names: Label i is named ``class_names[i - 1]``, or ``class i`` if the font lacks a character of the name.
            The labels of a single class show the score alone.
        min_score: Lowest score of an instance in the picture.
        parts: What is drawn, of `PARTS`.
        side: The image is enlarged by the whole factor that brings its short side nearest to `side`, at least 1, and
            by a smaller factor if the image is long and thin.
        max_side: Largest side of the picture with its legend, in pixels; the image is reduced if need be. None: no
            limit.
        edges: Lines between keypoints, as pairs of numbers from 0.

    Returns:
        The picture. Run lengths are decoded one at a time, and only the columns of the mask.

    Raises:
        ValueError: The image has another type or shape, the masks have another size or number, a label has no name, a
            part is unknown, or `max_side` is below 128.
    """
    picture = to_picture(image)
    check_parts(parts)
    check_side(max_side)
    found = read_instances(result, class_names, picture.size, min_score)
    return _draw(picture, found, class_names, parts=parts, side=side, max_side=max_side, edges=edges)


def comparison(
    image: Any,
    prediction: Mapping[str, Any],
    truth: Mapping[str, Any],
    class_names: Sequence[str],
    matches: Sequence[int],
    *,
    parts: Collection[str] = PARTS,
    max_side: int | None = COMPARISON_SIDE,
    edges: Sequence[tuple[int, int]] = (),
) -> Image.Image:
    """Draw the prediction beside the ground truth. A detection and its object have the same colour.

    Detections without an object and objects without a detection have a red outline. The legends count hits, false
    detections and misses.

    Args:
        image, class_names, parts, edges: As in `draw_instances`.
        prediction, truth: Results as in `draw_instances`. ``iscrowd`` [K] of the truth marks crowds.
        matches: For each detection the number of its object, from 0; `FALSE`, or `CROWD` for a detection in a crowd.
            `tmask.engine.matching.match_instances` returns them.
        max_side: Largest side of each of the two pictures.

    Raises:
        ValueError: As `draw_instances`, or the number of matches is not that of the detections.
    """
    picture = to_picture(image)
    check_parts(parts)
    check_side(max_side)
    found, objects = (read_instances(result, class_names, picture.size) for result in (prediction, truth))
    if len(matches) != len(found.labels):
        raise ValueError(f"matches: expected {len(found.labels)}, one a detection, got {len(matches)}")
    matched, count = np.asarray(matches, dtype=np.int64), len(objects.labels)
    wrong = matched[(matched < CROWD) | (matched >= count)]
    if len(wrong):
        raise ValueError(f"matches: expected {CROWD}..{count - 1}, got {wrong[0]}")
    hit, alone = matched >= 0, np.flatnonzero(matched < 0)
    shades = choose_shades(
        np.concatenate([objects.boxes, found.boxes[alone]]), np.concatenate([objects.labels, found.labels[alone]])
    )
    rank = np.zeros(len(matched), dtype=np.int64)  # of each detection in `shades`
    rank[hit], rank[alone] = matched[hit], count + np.arange(len(alone))
    crowd = to_numpy(truth["iscrowd"]) if "iscrowd" in truth else np.zeros(count, dtype=bool)
    verdicts = np.where(np.isin(np.arange(count), matched), "hit", np.where(crowd, "crowd", "missed"))
    pair = (
        found._replace(
            shades=shades[rank], verdicts=np.where(hit, "hit", np.where(matched == CROWD, "in a crowd", "false"))
        ),
        objects._replace(shades=shades[:count], verdicts=verdicts),
    )
    pictures = [
        _draw(picture, item, class_names, parts=parts, side=PICTURE_SIDE, max_side=max_side, edges=edges)
        for item in pair
    ]
    return grid(pictures, columns=2, captions=["prediction", "ground truth"])


def grid(pictures: Sequence[Image.Image], *, columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """Arrange pictures of any sizes row by row on white, each with its caption above it.

    Raises:
        ValueError: There are no pictures, `columns` is below 1, or the number of captions is not that of pictures.
    """
    if not pictures:
        raise ValueError("pictures: expected at least one, got none")
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    if captions is not None and len(captions) != len(pictures):
        raise ValueError(f"captions: expected {len(pictures)}, one a picture, got {len(captions)}")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    widths = [max(picture.width for picture in pictures[c::columns]) for c in range(columns)]
    heights = [max(picture.height for picture in pictures[r * columns : (r + 1) * columns]) for r in range(rows)]
    text_size = max(13, round(min(*widths, *heights) / 26))
    strip = 0 if captions is None else round(text_size * 1.7)
    canvas = Image.new(
        "RGB", (sum(widths) + GAP * (columns + 1), sum(heights) + rows * strip + GAP * (rows + 1)), WHITE
    )
    draw = ImageDraw.Draw(canvas)
    for i, picture in enumerate(pictures):
        r, c = divmod(i, columns)
        x = GAP * (c + 1) + sum(widths[:c])
        y = GAP * (r + 1) + sum(heights[:r]) + strip * (r + 1)
        canvas.paste(picture, (x, y))
        if captions is not None:
            draw.text((x, y - strip / 2), captions[i], fill=INK, font=font_of(text_size), anchor="lm")
    return canvas


def check_parts(parts: Collection[str], name: str = "parts") -> None:
    """Raise ValueError unless all `parts` are names of `PARTS`."""
    unknown = [parts] if isinstance(parts, str) else [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"{name}: expected some of {', '.join(PARTS)}, got {unknown[0]!r}")


def check_side(max_side: int | None, name: str = "max_side") -> None:
    """Raise ValueError unless `max_side` is None or large enough for a legend."""
    if max_side is not None and max_side < MIN_SIDE:
        raise ValueError(f"{name}: expected at least {MIN_SIDE}, got {max_side}")


def _draw(
    image: Image.Image,
    found: Instances,
    class_names: Sequence[str],
    *,
    parts: Collection[str],
    side: int,
    max_side: int | None,
    edges: Sequence[tuple[int, int]],
) -> Image.Image:
    """Draw instances into a copy of the image, with a legend below it."""
    with_legend = "legend" in parts and len(found.labels) > 0
    size, scale, legend = _layout(image.size, found, class_names, with_legend, side, max_side)
    canvas = image.resize(size, Image.Resampling.BICUBIC) if size != image.size else image.copy()
    draw, short = ImageDraw.Draw(canvas), min(size)
    found = found._replace(boxes=found.boxes * scale)
    lines = np.clip(found.sides * _LINE, 1, max(1, short / 250))
    wrong = np.zeros(len(lines), bool) if found.verdicts is None else np.isin(found.verdicts, WRONG)
    colours = [colour_of(int(label), len(class_names)) for label in found.labels]
    outlines = [WRONG_COLOUR if bad else colour for bad, colour in zip(wrong, colours, strict=True)]
    order = np.argsort(-found.sides, kind="stable")  # the largest first, so that small instances lie on top
    if found.masks is not None and "masks" in parts:
        for k in order:
            fill = colour_of(int(found.labels[k]), len(class_names), found.shades[k])
            draw_mask(canvas, found.masks[k], scale, fill, outlines[k], float(lines[k] + wrong[k]))
    if "boxes" in parts:
        for k in order:
            x1, y1, x2, y2 = found.boxes[k]
            corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
            draw.rectangle(corners, outline=outlines[k], width=max(1, round(lines[k] / 2 + wrong[k])))
    if found.keypoints is not None and "keypoints" in parts:
        for k in order:
            _draw_skeleton(draw, found.keypoints[k] * (scale, scale, 1), edges, colours[k], short)
    if "labels" in parts:
        first = order[::-1] if found.scores is None else np.argsort(-found.scores, kind="stable")
        draw_labels(draw, found, class_names, first, size)
    if legend is None:
        return canvas
    whole = Image.new("RGB", (size[0], size[1] + legend.height), WHITE)
    whole.paste(canvas, (0, 0))
    whole.paste(legend, (0, size[1]))
    return whole


def _layout(
    size: tuple[int, int],
    found: Instances,
    class_names: Sequence[str],
    with_legend: bool,
    side: int,
    max_side: int | None,
) -> tuple[tuple[int, int], float, Image.Image | None]:
    """Return the size of the enlarged or reduced image, pixels of the picture a pixel of the image, and the legend."""
    scale: float = max(1, min(round(side / max(1, min(size))), _MAX_ASPECT * side // max(1, *size)))
    if max_side is not None:
        scale = min(scale, max_side / max(size))
    while True:
        width, height = (max(1, round(length * scale)) for length in size)
        legend = draw_legend(found, class_names, width, min(width, height)) if with_legend else None
        room = height if legend is None or max_side is None else max_side - legend.height
        if height <= room:
            return (width, height), scale, legend
        scale *= room / (height + 0.5)  # the legend of a narrower picture may have more rows


def _draw_skeleton(
    draw: ImageDraw.ImageDraw, points: Array, edges: Sequence[tuple[int, int]], colour: Colour, side: int
) -> None:
    """Lines and dots of keypoints [Kp, 3] in pixels of a picture whose short side is `side`."""
    line, radius = max(1, round(side / 220)), max(2.0, side / 150)
    for width, tone in ((line + 2, WHITE), (line, colour)):  # a rim of white stands out from the mask
        for a, b in edges:
            if points[a, 2] > 0 and points[b, 2] > 0:
                draw.line((*points[a, :2], *points[b, :2]), fill=tone, width=width)
    for x, y, shown in points:
        if shown > 0:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline=WHITE)
