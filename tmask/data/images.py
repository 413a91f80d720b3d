"""Image files as tensors, for training and for prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_image(path: str | Path) -> Tensor:
    """An image file as uint8 [3, H, W] RGB: grey is repeated, alpha dropped, EXIF orientation not applied.

    Errors: ValueError, naming the file, if it cannot be read or is not an 8-bit image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode = image.mode
            # PIL would clip the 16-bit grey of microscopes to 255.
            deep = mode.startswith(("I", "F"))
            pixels = None if deep else np.array(image.convert("RGB"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error
    if pixels is None:
        raise ValueError(f"{path}: expected an image of 8 bits a channel, got mode {mode!r}")
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
