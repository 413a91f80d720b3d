"""Image files as tensors, for training and for prediction.

Pillow reads some files to other pixels than they hold, and says nothing. What is known of this is refused here.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_ORIENTATION = 0x0112  # EXIF tag: how to turn the stored pixels for viewing
# Its values, and the transposition (of PIL.Image.Transpose) that turns the stored pixels upright. EXIF 2.32, 4.6.4.
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_TAGS_OF_IFDS = (0x8769, 0x8825, 0xA005)  # EXIF, GPS, interoperability: where their tags are
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")

# TIFF 6.0. Tags:
_SUBFILE, _OLD_SUBFILE, _BITS, _PHOTOMETRIC, _SAMPLES = 254, 255, 258, 262, 277
_COLORMAP, _SUB_IFDS, _SAMPLE_FORMAT, _SUBSAMPLING = 320, 330, 339, 530
_REDUCED, _MASK = 1, 4  # bits of _SUBFILE
_COLOURS = {2: 3, 5: 4, 6: 3, 8: 3}  # samples of a pixel, by _PHOTOMETRIC (RGB, CMYK, YCbCr, Lab); else 1

_CONVERT = "magick IN -auto-level -depth 8 OUT.png stretches the darkest value to 0 and the brightest to 255"
# Formats that Pillow identifies without a decoder of its own: stubs, videos, and what needs other programs.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


class BadImageError(ValueError):
    """An image file that cannot be read, would be read wrongly, or lacks the size of the annotation file."""


class Header(NamedTuple):
    """The facts about an image that its file tells before the pixels are decoded."""

    height: int  # as stored
    width: int
    orientation: int  # of EXIF, 1: as stored
    has_alpha: bool  # which may be opaque


class Picture(NamedTuple):
    """A decoded image, its EXIF orientation, and whether transparency was dropped."""

    pixels: Tensor  # [3, H, W] uint8 RGB
    orientation: int  # of EXIF, applied or not; 1: as stored
    transparent: bool  # some pixel is not opaque, which is dropped


def read_picture(path: str | Path, *, apply_exif: bool = False) -> Picture:
    """An image file as uint8 RGB.

    Grey is repeated, the colours of a palette are looked up. Alpha is dropped, not blended, so that training and
    prediction see one picture whatever ground a viewer would put below it; what was hidden shows. Of a photograph that
    carries previews (MPO) the first picture counts, of a TIFF with overviews the full one.

    Args:
        path: The file. Its content decides the format, not its suffix.
        apply_exif: Turn the image upright by its EXIF orientation. COCO's annotations were drawn on the pixels as they
            are stored.

    Raises:
        BadImageError: Names the file, if the file cannot be read, has more than 8 bits a channel, signed numbers or
            bands that are neither colour nor alpha, or holds several images (an animation, pages).
    """
    from PIL import Image

    with _opened(path) as (image, has_mask):
        orientation = 1
        if image.format == "TIFF":  # Pillow forgets the orientation of a TIFF with the load
            orientation = _orientation(image)
            _forget_exif(image)
        image.load()
        if image.format != "TIFF":  # in a PNG the tags may come after the pixels
            orientation = _orientation(image)
        transparent = has_mask
        if image.has_transparency_data:
            image = image.convert("LA") if image.mode == "La" else image
            image = image.convert("RGBA")
            transparent |= image.getchannel("A").getextrema()[0] < 255
        image = image.convert("RGB")
        if apply_exif and orientation != 1:
            image = image.transpose(Image.Transpose[_UPRIGHT[orientation]])
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return Picture(pixels, orientation, transparent)


def read_header(path: str | Path) -> Header:
    """Read the header alone. Raises the errors of `read_picture` except those of damaged pixels."""
    with _opened(path) as (image, has_mask):
        width, height = image.size
        if image.format == "TIFF":  # whose size is that of the turned image
            width, height = image.tag_v2[256], image.tag_v2[257]
        alpha = has_mask or image.mode.endswith(("A", "a")) or "transparency" in image.info
        return Header(height, width, _orientation(image), alpha)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of the formats that this machine can read."""
    from PIL import Image

    Image.init()
    formats = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in formats if name in Image.OPEN and name not in _NOT_DECODED)


def warn_transparent(paths: Sequence[str | Path], total: int | None = None) -> None:
    """Warn once that the alpha of the images `paths` is dropped. `total`: number of all images, if known."""
    of = _listed(paths, total)
    warnings.warn(f"the alpha of {of} is not opaque, and dropped: what it hides shows", stacklevel=3)


def warn_turned(paths: Sequence[str | Path], total: int | None = None) -> None:
    """Warn once that the EXIF orientation of `paths` is not applied. `total`: number of all images, if known."""
    of = _listed(paths, total)
    warnings.warn(
        f"the EXIF orientation of {of} is not applied. Were the annotations drawn on upright images? true turns these "
        "upright, false keeps them as stored without this warning: --data.exif of train, --exif of eval and predict, "
        "apply_exif of CocoDataset",
        stacklevel=3,
    )


def _listed(paths: Sequence[str | Path], total: int | None) -> str:
    if total is None:
        return f"{paths[0]}, and of others like it,"
    return f"{len(paths)} of {total} images, first {paths[0]},"


class _UnsuitableError(Exception):
    """A valid image file of an unsupported kind."""


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, bool]]:
    """Open and check an image. Yield it, and whether a page of the file masks it. Errors name the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        # Pillow's warnings name no file, and tell of EXIF tags that nobody reads.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            yield image, _check(image, path)
    except FileNotFoundError as error:
        raise BadImageError(f"{path}: no such file") from error
    except _UnsuitableError as error:
        raise BadImageError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        known = "empty, or of no known format"
        with Path(path).open("rb") as file:
            is_tiff = file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
        if is_tiff:
            known = "a damaged TIFF, or one that is not 8-bit grey, RGB or CMYK"
        raise BadImageError(f"{path}: cannot be read as an image: {known}") from error
    except Exception as error:  # decoders raise whatever they please on a damaged file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadImageError(f"{path}: cannot be read as an image: {reason}") from error


def _orientation(image: Any) -> int:
    """Return the EXIF orientation, 1 for an upright image. Damaged EXIF data counts as 1."""
    from PIL import Image

    try:
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)  # that of a PNG would decode the pixels
        return int(value) if value in _UPRIGHT else 1
    except Exception:  # PIL raises whatever comes up
        return 1


def _forget_exif(image: Any) -> None:
    """Delete the EXIF tags: Pillow would turn the pixels of a TIFF by them, and may fail on odd ones."""
    with contextlib.suppress(Exception):
        exif = image.getexif()
        for tag in (_ORIENTATION, *_TAGS_OF_IFDS):
            if tag in exif:
                del exif[tag]  # without a look at the value


def _check(image: Any, path: str | Path) -> bool:
    """Refuse images that Pillow would change in silence. Return whether another page of a TIFF masks this one."""
    has_mask = _choose_page(image) if image.format == "TIFF" else False
    raw = [tile[3] if isinstance(tile[3], str) else tile[3][0] for tile in image.tile if tile[3]]
    # BGR;16 is 5, 6 and 5 bits. Of other 16-bit colours Pillow keeps the top byte, and it clips 16-bit grey to 255.
    deep = [mode for mode in {image.mode, *raw} if re.match(r"[IF]|(?!BGR).*;(12|16|32)", str(mode))]
    if deep:
        raise _deep(f"mode {max(deep)!r}")
    if image.mode not in _MODES:
        raise _UnsuitableError(f"expected grey, RGB, CMYK or a palette, got mode {image.mode!r}; convert it")
    if image.format == "TIFF":
        _check_tiff(image.tag_v2, image.mode, image.info["compression"])
    elif image.format == "PPM":
        limits = [value for tile in image.tile if isinstance(tile[3], tuple) for value in tile[3][1:]]
        if max(limits, default=0) > 255:
            raise _deep(f"values up to {max(limits)}")
    elif image.format == "SGI" and any(tile[0] == "SGI16" for tile in image.tile):
        raise _deep("16")
    elif image.format == "JPEG2000":
        _check_jpeg2000(path)
    elif image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        raise _UnsuitableError("expected a CMYK JPEG of Adobe's kind, where 0 is full ink; convert it to RGB")
    if image.format not in ("TIFF", "MPO") and getattr(image, "n_frames", 1) > 1:
        raise _several(image.n_frames)
    return has_mask


def _deep(got: str) -> _UnsuitableError:
    return _UnsuitableError(f"expected an image of 8 bits a channel, got {got}; convert it ({_CONVERT})")


def _several(count: int) -> _UnsuitableError:
    return _UnsuitableError(f"expected one image, got a file of {count}; split it (magick IN OUT-%d.png)")


def _choose_page(image: Any) -> bool:
    """Go to the one page of a TIFF that is neither overview nor mask. Return whether there is a mask."""
    kinds = []
    for page in range(image.n_frames):
        image.seek(page)
        tags = image.tag_v2
        kinds.append(tags.get(_SUBFILE, 0) | (_REDUCED if tags.get(_OLD_SUBFILE) == 2 else 0))
    full = [page for page, kind in enumerate(kinds) if not kind & (_REDUCED | _MASK)]
    if not full and _SUB_IFDS in image.tag_v2:  # as cameras write raw images
        raise _UnsuitableError("expected an image, got a thumbnail, whose image is in a sub-IFD; convert it")
    if not full and len(kinds) == 1:
        full = [0]
    if len(full) != 1:
        raise _several(len(full) or len(kinds))
    image.seek(full[0])
    return any(kind & _MASK for kind in kinds) and len(kinds) > 1


def _check_tiff(tags: Any, mode: str, compression: str) -> None:
    """Refuse what Pillow reads wrongly without showing it in the mode."""
    if max(tags.get(_BITS, (1,))) > 8:  # of planes, 8 bits are read
        raise _deep(f"{max(tags[_BITS])}")
    if set(tags.get(_SAMPLE_FORMAT, (1,))) != {1}:  # -1 is read as 255
        raise _UnsuitableError("expected unsigned values, got signed ones; convert it")
    photometric = tags.get(_PHOTOMETRIC, 0)
    colours = _COLOURS.get(photometric, 1)
    others = tags.get(_SAMPLES, colours) - colours - mode.endswith(("A", "a"))
    if others > 0:
        few = f"{colours} bands, or one more of alpha"
        raise _UnsuitableError(
            f"expected {few}, got {tags[_SAMPLES]}; choose those of the colours (gdal_translate -b 1 -b 2 -b 3 IN OUT)"
        )
    if photometric == 6 and compression == "raw" and tuple(tags.get(_SUBSAMPLING, (2, 2))) != (1, 1):
        raise _UnsuitableError("expected YCbCr of full resolution, got subsampled colours; convert it to RGB")
    if mode in ("P", "PA") and 0 < max(tags[_COLORMAP]) < 256:  # Pillow takes the top bytes: all black
        raise _UnsuitableError("expected a palette of 16 bits, as TIFF has them, got one of 8; convert it to RGB")


def _check_jpeg2000(path: str | Path) -> None:
    """Refuse colours of more than 8 bits, which Pillow shifts to 8. See the SIZ segment, ISO/IEC 15444-1 A.5.1."""
    with Path(path).open("rb") as file:
        data = file.read(2**20)
    at = data.find(b"\xff\x4f\xff\x51") + 40  # the number of components; three bytes a component follow
    depths = data[at + 2 :: 3][: int.from_bytes(data[at : at + 2], "big")]
    if any(depth & 0x7F > 7 for depth in depths):
        raise _deep(f"{max(depth & 0x7F for depth in depths) + 1}")
    if set(depths) != {7}:  # the bits less one; the top bit means signed
        raise _UnsuitableError("expected unsigned values of 8 bits, got signed ones or of fewer bits; convert it")
