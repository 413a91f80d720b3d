"""Text in pictures: labels on plates where they fit, and the legend."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

from tmask.visualize.colours import INK, WHITE, WRONG_COLOUR, Array, Colour, colour_of, meeting
from tmask.visualize.instances import WRONG, Instances

_TEXT = 1 / 10  # height of a label's text, as part of the side of its object
_MIN_TEXT = 11  # smallest readable text, in pixels
_MAX_HIDDEN = 0.1  # part of any object's box that one label may cover
_MAX_PLATE = 2.0  # area of a label's plate, as part of the box of its object
_MAX_NAME = 60  # characters of a class name; longer ones are cut, and shorter ones where the picture ends
_PAD = 3  # pixels between a label's text and the edge of its plate
_LEGEND_ROWS = 3
_LEGEND_TEXT = 13  # smallest text of the legend, in pixels


def draw_labels(
    draw: ImageDraw.ImageDraw, found: Instances, class_names: Sequence[str], order: Array, size: tuple[int, int]
) -> Array:
    """Write the labels of instances in `order`, each on a plate, where the plate fits.

    Args:
        found: Instances, with boxes in pixels of the picture.
        size: Width and height of the picture.

    Returns:
        The plates, [plates, 4] xyxy.
    """
    plates, sides = np.zeros((0, 4)), found.sides
    largest = max(_MIN_TEXT, round(min(size) / 34))
    for k in order:
        label = int(found.labels[k])
        name = str(class_names[label - 1]) if len(class_names) > 1 else ""
        score = "" if found.scores is None else f"{found.scores[k]:.2f}"
        font = font_of(round(min(max(sides[k] * _TEXT, _MIN_TEXT), largest)))
        text = _label(name, f"class {label}", score, font, size[0])
        if not text:
            continue
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        w, h = right - left + 2 * _PAD, bottom - top + 2 * _PAD
        plate = (
            _place((w, h), found.boxes[k], size, found.boxes, plates) if w * h <= _MAX_PLATE * sides[k] ** 2 else None
        )
        if plate is not None:
            plates = np.vstack([plates, plate])
            colour = colour_of(label, len(class_names))
            dark = np.dot(colour, (0.299, 0.587, 0.114)) > 140  # perceived lightness, Rec. 601
            draw.rectangle(tuple(plate), fill=colour)
            draw.text((plate[0] + _PAD - left, plate[1] + _PAD - top), text, fill=INK if dark else WHITE, font=font)
    return plates


def _place(plate: tuple[float, float], box: Array, size: tuple[int, int], boxes: Array, plates: Array) -> Array | None:
    """Return the first place [4] around `box` for a plate (w, h) that covers no other plate and little of any box."""
    (w, h), (x1, y1, x2, y2) = plate, box
    corners = [(x1, y1 - h), (x2 - w, y1 - h), (x1, y2), (x2 - w, y2), (x2, y1), (x1 - w, y1), (x1, y1), (x1, y2 - h)]
    starts = np.clip(corners, 0, np.maximum(0, np.subtract(size, plate)))
    places = np.hstack([starts, starts + plate])  # [8, 4]
    around = np.concatenate([places[:, :2].min(0), places[:, 2:].max(0)])
    boxes, plates = boxes[meeting(boxes, around)], plates[meeting(plates, around)]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    free = (_overlaps(places, boxes) <= _MAX_HIDDEN * areas).all(1) & (_overlaps(places, plates) == 0).all(1)
    return places[np.argmax(free)] if free.any() else None


def _overlaps(a: Array, b: Array) -> Array:
    """Return the common area of each pair of boxes: [a, 4] and [b, 4] give [a, b]."""
    corners = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    return np.maximum(corners[1] - corners[0], 0).prod(2)


def draw_legend(found: Instances, class_names: Sequence[str], width: int, short: int) -> Image.Image:
    """Return a strip with the classes, most frequent first, and the verdicts of a comparison: colours and counts."""
    font = font_of(max(_LEGEND_TEXT, round(short / 60)))
    line = font.size * 1.5
    entries: list[tuple[Colour | None, Colour | None, str]] = []  # fill, outline, text
    verdicts = Counter(found.verdicts.tolist() if found.verdicts is not None else ())
    for verdict in sorted(verdicts, key=lambda verdict: verdict != "hit"):
        entries.append((None, WRONG_COLOUR if verdict in WRONG else None, f"{verdict} {verdicts[verdict]}"))
    counts = Counter(found.labels.tolist())
    for label in sorted(counts, key=lambda label: (-counts[label], label)):
        name = str(class_names[label - 1])
        text = _label(name, f"class {label}", str(counts[label]), font, round(width - 2 * line))
        entries.append((colour_of(label, len(class_names)), None, text))
    places, x, row = [], _PAD, 0
    for i, (fill, outline, text) in enumerate(entries):
        step = font.getlength(text) + font.size + (line if fill or outline else 0)
        more = f"+ {len(entries) - i}"
        room = width - (font.getlength(more) + _PAD if i + 1 < len(entries) else 0)
        if row == _LEGEND_ROWS - 1 and x + step > room:
            entries[i:] = [(None, None, more)]
        elif x + step > width and x > _PAD:
            x, row = _PAD, row + 1
        places.append((x, row))
        x += step
    strip = Image.new("RGB", (width, round(line * (row + 1)) + 2 * _PAD), WHITE)
    draw, box = ImageDraw.Draw(strip), font.size
    for (fill, outline, text), (x, row) in zip(entries, places, strict=True):
        middle = _PAD + line * (row + 0.5)
        if fill or outline:
            corners = (x, middle - box / 2, x + box, middle + box / 2)
            draw.rectangle(corners, fill=fill, outline=outline, width=max(2, round(box / 8)) if outline else 0)
            x += line
        draw.text((x, middle), text, fill=INK, font=font, anchor="lm")
    return strip


def _label(name: str, number: str, score: str, font: FreeTypeFont, width: int) -> str:
    """Return name and score, the name cut to `width` pixels; `number` for a name with characters the font lacks."""
    name = _writable(" ".join(name.split()), font) or (number if name.strip() else "")
    whole = name
    for length in range(min(len(whole), _MAX_NAME), 0, -1):
        name = whole if length == len(whole) else whole[:length].rstrip() + "\u2026"
        if font.getlength(f"{name} {score}".strip()) <= width - 2 * _PAD:
            break
    return f"{name} {score}".strip()


@functools.lru_cache(1024)
def _writable(name: str, font: FreeTypeFont) -> str:
    """Return `name` if the font has all of its characters, else nothing."""
    unknown = bytes(font.getmask("\uffff"))  # what the font draws for a character it lacks
    return "" if any(bytes(font.getmask(character)) == unknown for character in set(name) - {" "}) else name


@functools.cache
def font_of(size: int) -> FreeTypeFont:
    """Return the font that comes with matplotlib, so that pictures look the same everywhere: Latin, Greek, Cyrillic."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
