"""Image files that Pillow does not write, byte by byte."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

Entry = tuple[int, int, int, int]  # tag, type, count, value or its place
Pixels = Any  # [H, W, bands]

# What a viewer does with the stored pixels at each EXIF orientation.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def encoded(pixels: Pixels, kind: str = "PNG", **how: Any) -> bytes:
    """A file of `pixels` as Pillow writes it, of another `kind` if asked."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **how)
    return file.getvalue()


def tiff(pixels: Pixels = None, *, order: str = "<", pages: Sequence[dict[str, Any]] = (), **page: Any) -> bytes:
    """An uncompressed TIFF 6.0 of one page (see `_page`) or of `pages`, by byte order."""
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    listed = list(pages) or [{"pixels": pixels, **page}]
    for number, one in enumerate(listed, start=1):
        out += _page(len(out), order, last=number == len(listed), **one)
    return out


def _page(
    at: int,
    order: str,
    *,
    last: bool,
    pixels: Pixels,
    bits: int | None = None,
    planar: bool = False,
    photometric: int | None = None,
    extra: Sequence[int] = (),
    more: Sequence[tuple[int, int, Sequence[int]]] = (),
    data: bytes | None = None,
) -> bytes:
    """One IFD at the byte `at`, its values and its pixels, a strip or a strip a band. `more`: tag, type, values."""
    height, width, bands = pixels.shape
    strips = bands if planar else 1
    if data is None:
        data = (pixels.transpose(2, 0, 1) if planar else pixels).astype(pixels.dtype.newbyteorder(order)).tobytes()
    if photometric is None:
        photometric = 2 if bands - len(extra) >= 3 else 1
    signed = 2 if pixels.dtype.kind == "i" else 1
    tags: dict[int, tuple[int, Sequence[int]]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits or 8 * pixels.dtype.itemsize] * bands),
        259: (3, [1]),
        262: (3, [photometric]),
        273: (4, [0] * strips),
        277: (3, [bands]),
        278: (4, [height]),
        279: (4, [len(data) // strips] * strips),
        284: (3, [2 if planar else 1]),
        **({338: (3, list(extra))} if extra else {}),
        339: (3, [signed] * bands),
        **{tag: (kind, values) for tag, kind, values in more},
    }
    formats = {3: "H", 4: "I"}
    place = at + 2 + 12 * len(tags) + 4
    start = place + sum(size for kind, values in tags.values() if (size := len(values) * (2 * kind - 4)) > 4)
    entries = outside = b""
    for tag, (kind, values) in sorted(tags.items()):
        if tag == 273:
            values = [start + i * (len(data) // strips) for i in range(strips)]
        packed = struct.pack(f"{order}{len(values)}{formats[kind]}", *values)
        entries += struct.pack(order + "HHI", tag, kind, len(values))
        entries += packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(order + "I", place + len(outside))
        outside += packed if len(packed) > 4 else b""
    end = start + len(data)
    following = 0 if last else end
    return struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", following) + outside + data


def exif(orientation: int | None = None, more: Sequence[Entry] = ()) -> bytes:
    """EXIF data of these entries; their IFD starts at 8, the pair -1, 0 is at 200 and the pair 0, 0 at 208."""
    turn = [] if orientation is None else [(0x112, 3, 1, orientation)]
    return b"II*\0" + _ifd(8, [struct.pack("<HHII", *entry) for entry in sorted([*turn, *more])])


def with_exif(pixels: Pixels, suffix: str, orientation: int | None = None, more: Sequence[Entry] = ()) -> bytes:
    """A file of RGB `pixels` with that EXIF data; in a TIFF the tags of the image are among them."""
    kind = Image.registered_extensions()[f".{suffix}"]
    if kind != "TIFF":
        return encoded(pixels, kind, exif=b"Exif\0\0" + exif(orientation, more))
    own = {(0x112, 3, 1, orientation or 1), *more}
    height, width, _ = pixels.shape
    numbers = {256: width, 257: height, 262: 2, 277: 3, 278: height, 279: pixels.size, 273: 400, 259: 1, 284: 1}
    entries = own | {(tag, 4, 1, value) for tag, value in numbers.items()} | {(258, 3, 3, 216)}
    packed = [struct.pack("<HHII", *entry) for entry in sorted(entries)]
    return (b"II*\0" + _ifd(8, packed)).ljust(400, b"\0") + pixels.tobytes()


def _ifd(at: int, entries: Sequence[bytes]) -> bytes:
    """An IFD after a head of 4 bytes, and the values at 200, 208 and 216 of the file."""
    ifd = struct.pack("<IH", at, len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    return ifd.ljust(196, b"\0") + struct.pack("<iiii", -1, 0, 0, 0) + struct.pack("<HHH", 8, 8, 8)
