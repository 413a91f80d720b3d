"""Image files as tensors, for training and for prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ORIENTATION = 0x0112  # EXIF tag: how to turn the stored pixels for viewing


def read_image(path: str | Path, *, apply_exif: bool = False) -> Tensor:
    """An image file as uint8 [3, H, W] RGB.

    Grey is repeated. Alpha is dropped, not blended, so that training and prediction see one picture whatever ground a
    viewer would put below it; what was hidden shows. The EXIF orientation turns the image upright only with
    `apply_exif`: COCO's annotations were drawn on the pixels as they are stored. Of a photograph that carries previews
    (MPO) the first picture counts.

    Errors: ValueError, naming the file, if it cannot be read, has more than 8 bits a channel, or holds several images
    (an animation, pages).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            _check(image)
            if apply_exif and _orientation(image) != 1:
                image = ImageOps.exif_transpose(image)
            elif not apply_exif and image.format == "TIFF":
                # PIL turns it while it reads the pixels, unless the tag is gone.
                image.getexif().pop(_ORIENTATION, None)
            if "transparency" in image.info:  # PIL asks for this way with a warning
                image = image.convert("RGBA")
            pixels = np.array(image.convert("RGB"))  # [H, W, 3]
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except _UnsuitableError as error:
        raise ValueError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: cannot be read as an image: empty, or of no known format") from error
    except Exception as error:  # decoders raise whatever they please on a damaged file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as an image: {reason}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _orientation(image: Any) -> int:
    """How the image is to be turned, 1 for not at all; damaged EXIF data does not spoil the pixels."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # PIL raises whatever comes up
        return 1


class _UnsuitableError(Exception):
    """A sound image file of a kind that is not taken."""


def _check(image: Any) -> None:
    """Refuse what PIL would change in silence: it clips 16-bit grey to 255 and cuts 16-bit colours to the top byte."""
    stored = {image.mode, *(tile[3] if isinstance(tile[3], str) else tile[3][0] for tile in image.tile if tile[3])}
    deep = sorted(mode for mode in stored if str(mode).startswith(("I", "F")) or ";16" in str(mode))
    if deep:
        how = "magick IN -auto-level -depth 8 OUT.png stretches the darkest value to 0 and the brightest to 255"
        raise _UnsuitableError(f"expected an image of 8 bits a channel, got mode {deep[-1]!r}; convert it ({how})")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise _UnsuitableError(f"expected one image, got a file of {frames}; split it (magick IN OUT-%d.png)")
