"""Pictures of what a model found: masks, boxes, skeletons and labels drawn into the image, and grids of such pictures.

Letters: K instances, H W image size, h w size of a picture. A picture is uint8 [3, h, w], RGB.
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tmask.model.transform import xyxy

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

PICTURE_SIDE = 512  # small images are enlarged to about this short side, so that labels can be read
_MAX_ASPECT = 4  # but their long side to no more than this many times as much
MASK_ALPHA = 0.45  # weight of an instance's colour over the image
GAP = 8  # pixels between and around the pictures of a grid
_GOLDEN = 0.618034  # steps of this much around the colour circle never come back near an earlier one soon
_MAX_HIDDEN = 0.1  # part of a label's plate that may lie on other labels
_MAX_COVERED = 0.2  # part of a picture that labels may hide; the surest instances come first
_MAX_NAME = 60  # characters of a class name; longer ones are cut, and shorter ones where the picture ends
_PAD = 3  # pixels between a label's text and the edge of its plate
_GROUND: Colour = (255, 255, 255)
_INK: Colour = (20, 20, 20)


def draw_instances(
    image: Tensor,
    result: Mapping[str, Any],
    class_names: Sequence[str],
    *,
    min_score: float = 0.0,
    side: int = PICTURE_SIDE,
    edges: Sequence[tuple[int, int]] = (),
) -> Tensor:
    """Draw instances into their image, each in a colour of its own: uint8 [3, h, w].

    image: uint8 [3, H, W] RGB. result: ``boxes`` [K, 4] xyxy in pixels of the image and ``labels`` [K]; may hold
    ``scores`` [K] and ``masks``: COCO run lengths (K dicts), [K, H, W] bool or uint8, or probabilities, [K, 1, H, W]
    too, as torchvision gives them; and ``keypoints`` [K, Kp, 3] of x, y and a value above 0 where there is one: dots,
    with lines between those of `edges`, pairs of numbers from 0. Label i is named ``class_names[i - 1]``; a single
    class is not named, and one that the font cannot write by its number, ``class i``. Instances below `min_score` are
    left out, and in a crowded picture labels that would hide another one or too much of the picture.
    The picture is the image enlarged by the whole factor that brings its short side nearest to `side`, at least 1, and
    fewer times if it is long and thin. Run lengths are decoded one at a time.

    Tensors may be on any device. Errors: ValueError for an image of another dtype or shape, masks of another size, and
    a label without a name.
    """
    from PIL import Image, ImageDraw

    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"image: expected uint8 [3, H, W], got {image.dtype} {tuple(image.shape)}")
    size = (int(image.shape[1]), int(image.shape[2]))
    factor = max(1, min(round(side / max(1, min(size))), _MAX_ASPECT * side // max(1, *size)))
    boxes, labels, scores = _to_numpy(xyxy(result["boxes"])), _to_numpy(result["labels"]), result.get("scores")
    scores = None if scores is None else _to_numpy(scores)
    masks = result.get("masks")
    if masks is not None:
        _check_masks(masks, len(boxes), size)
    wrong = [int(label) for label in labels if not 1 <= label <= len(class_names)]
    if wrong:
        raise ValueError(f"labels: expected 1..{len(class_names)}, one a class name, got {wrong[0]}")
    shown = [k for k in range(len(boxes)) if scores is None or scores[k] >= min_score]
    # The largest first, so that small instances lie on top.
    shown.sort(key=lambda k: -float((boxes[k, 2] - boxes[k, 0]) * (boxes[k, 3] - boxes[k, 1])))

    picture = Image.fromarray(_to_numpy(image.permute(1, 2, 0)))
    pixels = np.array(picture.resize((size[1] * factor, size[0] * factor), Image.Resampling.BICUBIC))
    if masks is not None:
        for k in shown:
            mask, top, left = _crop(masks[k])
            mask = mask.repeat(factor, axis=0).repeat(factor, axis=1)  # the outline stays the mask's, not a smooth one
            window = pixels[top * factor :, left * factor :][: mask.shape[0], : mask.shape[1]]
            _tint(window, mask, _colour(k), line=max(1, round(min(pixels.shape[:2]) / 300)))
    canvas = Image.fromarray(pixels)
    draw = ImageDraw.Draw(canvas)
    for k in shown:
        line = max(1, round(min(canvas.size) / 600))
        draw.rectangle(_inside(boxes[k] * factor, canvas.size), outline=_colour(k), width=line)
    if result.get("keypoints") is not None:
        keypoints = _to_numpy(result["keypoints"])
        for k in shown:
            _draw_skeleton(draw, keypoints[k] * (factor, factor, 1), edges, _colour(k), min(canvas.size))
    font = _font(max(11, round(min(canvas.size) / 34)))
    taken: list[Box] = []
    first = shown[::-1] if scores is None else sorted(shown, key=lambda k: -float(scores[k]))
    for k in first:
        if sum(_overlap(plate, plate) for plate in taken) > _MAX_COVERED * canvas.size[0] * canvas.size[1]:
            break
        name = str(class_names[int(labels[k]) - 1]) if len(class_names) > 1 else ""
        score = "" if scores is None else f"{scores[k]:.2f}"
        text = _label(name, f"class {int(labels[k])}", score, font, canvas.size[0])
        if text:
            _write_label(draw, text, _inside(boxes[k] * factor, canvas.size), _colour(k), font, canvas.size, taken)
    return _from_numpy(np.array(canvas))


def comparison(
    image: Tensor,
    prediction: Mapping[str, Any],
    truth: Mapping[str, Any],
    class_names: Sequence[str],
    *,
    min_score: float = 0.5,
    edges: Sequence[tuple[int, int]] = (),
) -> Tensor:
    """The prediction beside the ground truth, with captions; arguments as of `draw_instances`."""
    pair = [
        draw_instances(image, prediction, class_names, min_score=min_score, edges=edges),
        draw_instances(image, truth, class_names, edges=edges),
    ]
    return grid(pair, columns=2, captions=["prediction", "ground truth"])


def grid(pictures: Sequence[Tensor], *, columns: int, captions: Sequence[str] | None = None) -> Tensor:
    """Arrange pictures uint8 [3, h, w] of any sizes row by row on white, each with its caption above it.

    Errors: ValueError without pictures, for columns < 1 or another number of captions than pictures.
    """
    from PIL import Image, ImageDraw

    if not pictures:
        raise ValueError("pictures: expected at least one, got none")
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    if captions is not None and len(captions) != len(pictures):
        raise ValueError(f"captions: expected {len(pictures)}, one a picture, got {len(captions)}")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    widths = [max(picture.shape[2] for picture in pictures[c::columns]) for c in range(columns)]
    heights = [max(picture.shape[1] for picture in pictures[r * columns : (r + 1) * columns]) for r in range(rows)]
    text_size = max(13, round(min(*widths, *heights) / 26))
    strip = 0 if captions is None else round(text_size * 1.7)
    canvas = Image.new(
        "RGB", (sum(widths) + GAP * (columns + 1), sum(heights) + rows * strip + GAP * (rows + 1)), _GROUND
    )
    draw = ImageDraw.Draw(canvas)
    for i, picture in enumerate(pictures):
        r, c = divmod(i, columns)
        x = GAP * (c + 1) + sum(widths[:c])
        y = GAP * (r + 1) + sum(heights[:r]) + strip * (r + 1)
        canvas.paste(Image.fromarray(_to_numpy(picture.permute(1, 2, 0))), (x, y))
        if captions is not None:
            draw.text((x, y - strip / 2), captions[i], fill=_INK, font=_font(text_size), anchor="lm")
    return _from_numpy(np.array(canvas))


def save_png(target: str | Path | BinaryIO, picture: Tensor) -> None:
    """Write a picture uint8 [3, h, w] as PNG to a path, whose folder is made if need be, or to an open file."""
    from PIL import Image

    if isinstance(target, str | Path):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_to_numpy(picture.permute(1, 2, 0))).save(target, format="PNG")


def _check_masks(masks: Any, count: int, size: tuple[int, int]) -> None:
    """Raise ValueError unless there are `count` masks of `size` (H, W)."""
    if isinstance(masks, Tensor):
        shapes = {tuple(masks.shape[-2:])}
    else:
        shapes = {tuple(int(side) for side in run["size"]) for run in masks}
    if len(masks) != count or shapes - {size}:
        got = f"{len(masks)} of {', '.join(f'{h}x{w}' for h, w in sorted(shapes)) or 'no size'}"
        raise ValueError(f"masks: expected {count} of {size[0]}x{size[1]} pixels, got {got}")


def _crop(mask: Any) -> tuple[npt.NDArray[np.bool_], int, int]:
    """A mask of any form, cut to its pixels: bool [h, w], and row and column of its corner. It may be empty."""
    from pycocotools import mask as coco_mask

    if isinstance(mask, Tensor):
        mask = mask[0] if mask.dim() == 3 else mask
        dense = _to_numpy(mask >= 0.5 if mask.is_floating_point() else mask != 0)
        rows, columns = (np.flatnonzero(dense.any(axis)) for axis in (1, 0))
        if not len(rows):
            return dense[:0, :0], 0, 0
        x, y, w, h = columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]
    else:
        x, y, w, h = (int(value) for value in coco_mask.toBbox(mask))
        dense = coco_mask.decode(mask)
    return dense[y : y + h, x : x + w].astype(bool), int(y), int(x)


def _colour(k: int) -> Colour:
    """A strong colour for instance k, far from those of its neighbours in number."""
    red, green, blue = colorsys.hsv_to_rgb(0.02 + k * _GOLDEN % 1.0, (0.95, 0.75)[k % 2], (1.0, 0.9, 0.8)[k % 3])
    return int(red * 255), int(green * 255), int(blue * 255)


def _tint(pixels: Pixels, mask: npt.NDArray[np.bool_], colour: Colour, *, line: int) -> None:
    """Colour the pixels of `mask`, and fully those within `line` pixels of its outline, in place."""
    core = _erode(mask, line)
    outline = mask & ~core
    values = np.arange(256)
    for channel, tone in enumerate(colour):
        tinted = (values * (1 - MASK_ALPHA) + tone * MASK_ALPHA).astype(np.uint8)
        plane = pixels[..., channel]
        plane[core] = tinted[plane[core]]
        plane[outline] = tone


def _erode(mask: npt.NDArray[np.bool_], steps: int) -> npt.NDArray[np.bool_]:
    """The pixels of `mask` whose neighbours up to `steps` away, diagonals too, all are in it; none is beyond it."""
    core = np.pad(mask, steps)
    for axis in (0, 1):
        core = core.swapaxes(0, axis)
        width = 1  # pixel i stands for i .. i + width - 1
        while width < 2 * steps + 1:
            shift = min(width, 2 * steps + 1 - width)
            core = core[:-shift] & core[shift:]
            width += shift
        core = core.swapaxes(0, axis)
    return core


def _draw_skeleton(draw: ImageDraw, points: Any, edges: Sequence[tuple[int, int]], colour: Colour, side: int) -> None:
    """Lines and dots of keypoints [Kp, 3] in pixels of a picture whose short side is `side`."""
    line, radius = max(1, round(side / 220)), max(2.0, side / 150)
    for width, tone in ((line + 2, _GROUND), (line, colour)):  # a rim of white stands out from the mask
        for a, b in edges:
            if points[a, 2] > 0 and points[b, 2] > 0:
                draw.line((*points[a, :2], *points[b, :2]), fill=tone, width=width)
    for x, y, shown in points:
        if shown > 0:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline=_GROUND)


def _inside(box: Any, size: tuple[int, int]) -> Box:
    """Corners of a box of pixels, in order and inside a picture of `size` (w, h)."""
    x1, y1, x2, y2 = (float(value) for value in np.nan_to_num(np.asarray(box, dtype=np.float64)))
    x1, y1 = min(max(x1, 0.0), size[0] - 1.0), min(max(y1, 0.0), size[1] - 1.0)
    return x1, y1, min(max(x2 - 1, x1), size[0] - 1.0), min(max(y2 - 1, y1), size[1] - 1.0)


def _write_label(
    draw: ImageDraw,
    text: str,
    box: Box,
    colour: Colour,
    font: FreeTypeFont | ImageFont,
    size: tuple[int, int],
    taken: list[Box],
) -> None:
    """Write `text` on a plate of `colour` at the place around `box` that hides least of the labels in `taken`.

    Nothing is written if that still is more than `_MAX_HIDDEN` of the plate.
    """
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    w, h = right - left + 2 * _PAD, bottom - top + 2 * _PAD
    x1, y1, x2, y2 = box
    places = [(x1, y1 - h), (x2 - w, y1 - h), (x1, y2), (x2 - w, y2), (x1, y1), (x1, y2 - h), (x2, y1), (x1 - w, y1)]
    plates = []
    for x, y in places:
        x, y = min(max(x, 0), max(0, size[0] - w)), min(max(y, 0), max(0, size[1] - h))
        plates.append((x, y, x + w, y + h))
    hidden = [sum(_overlap(plate, other) for other in taken) for plate in plates]
    best = hidden.index(min(hidden))  # the first of equals
    if hidden[best] > _MAX_HIDDEN * w * h:
        return
    plate = plates[best]
    taken.append(plate)
    draw.rectangle(plate, fill=colour)
    dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140  # perceived lightness, Rec. 601
    draw.text((plate[0] + _PAD - left, plate[1] + _PAD - top), text, fill=_INK if dark else _GROUND, font=font)


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _label(name: str, number: str, score: str, font: FreeTypeFont | ImageFont, width: int) -> str:
    """Name and score, the name cut to what fits into `width` pixels, or `number` if the font lacks its characters."""
    name = " ".join(name.split())
    unknown = bytes(font.getmask("\uffff"))  # what the font draws for a character it lacks
    if any(bytes(font.getmask(character)) == unknown for character in set(name) - {" "}):
        name = number
    whole = name
    for length in range(min(len(whole), _MAX_NAME), 0, -1):
        name = whole if length == len(whole) else whole[:length].rstrip() + "\u2026"
        if font.getlength(f"{name} {score}".strip()) <= width - 2 * _PAD:
            break
    return f"{name} {score}".strip()


@functools.cache
def _font(size: int) -> FreeTypeFont | ImageFont:
    """The font that comes with matplotlib, so that pictures look the same everywhere: Latin, Greek, Cyrillic, ..."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _to_numpy(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()


def _from_numpy(pixels: Pixels) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
