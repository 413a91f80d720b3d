"""Reading image files: every mode, orientation and damage."""

import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests.image_files import UPRIGHT, encoded, tiff, with_exif
from tmask.data.images import Header, image_suffixes, read_header, read_picture

COLOURS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def read_image(path, **options):
    return read_picture(path, **options).pixels


def as_tensor(pixels):
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def assert_picture(path, pixels, *, transparent=False):
    picture = read_picture(path)
    assert torch.equal(picture.pixels, as_tensor(pixels))
    assert picture.transparent == transparent


def assert_refused(path, message):
    """By the header alone, too."""
    for read in (read_picture, read_header):
        with pytest.raises(ValueError, match=message):
            read(path)


FOUR = np.concatenate([COLOURS, COLOURS[..., :1]], axis=2)
BITMAP = struct.pack("<IiiHHIIiiIIIII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0, 0xF800, 0x7E0, 0x1F)
MASK = {"pixels": COLOURS[..., :1], "more": [(254, 4, [4])]}
PREVIEW = {"save_all": True, "append_images": [Image.fromarray(np.full((8, 8, 3), 10, dtype=np.uint8))]}
# A file, its pixels, and whether some are not opaque.
PICTURES = {
    "grey, whose suffix is another's.jpg": (encoded(COLOURS[..., 0]), COLOURS[..., :1], False),
    "black and white.png": (encoded(COLOURS[..., 0] > 127), np.where(COLOURS[..., :1] > 127, 255, 0), False),
    "colours.tif": (tiff(COLOURS), COLOURS, False),
    "planes.tif": (tiff(COLOURS, planar=True), COLOURS, False),
    "4 bits, stretched.pgm": (b"P5\n2 1\n15\n" + bytes([0, 15]), [[[0], [255]]], False),
    "2 bits, stretched.tif": (
        tiff(np.zeros((1, 4, 1)), bits=2, data=bytes([0b00011011])),
        [[[0], [85], [170], [255]]],
        False,
    ),
    "5, 6 and 5 bits, a mode called BGR;16.bmp": (
        b"BM" + struct.pack("<IHHI", 18 + len(BITMAP), 0, 0, 14 + len(BITMAP)) + BITMAP + b"\x00\xf8\xe0\x07",
        [[[255, 0, 0], [0, 255, 0]]],
        False,
    ),
    "an undeclared fourth band, which counts as alpha.tif": (tiff(FOUR), COLOURS, True),
    "a page that masks the image.tif": (tiff(pages=[{"pixels": COLOURS}, MASK]), COLOURS, True),
    "a photograph with previews.jpg": (
        encoded(np.full((8, 8, 3), 200, dtype=np.uint8), "MPO", **PREVIEW),
        np.full((8, 8, 3), 200),
        False,
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_of_a_file(tmp_path, name):
    data, pixels, transparent = PICTURES[name]
    (tmp_path / name).write_bytes(data)
    height, width, _ = np.shape(pixels)
    assert_picture(tmp_path / name, np.broadcast_to(pixels, (height, width, 3)), transparent=transparent)
    assert read_header(tmp_path / name) == Header(height, width, 1, transparent)


def deep_png(colour_type, channels):
    """A 4x3 PNG of 16 bits a channel; PIL writes grey ones only."""
    rows = b"".join(b"\0" + bytes(range(4 * channels * 2)) for _ in range(3))
    head = struct.pack(">IIBBBBB", 4, 3, 16, colour_type, 0, 0, 0)
    chunks = [b"IHDR" + head, b"IDAT" + zlib.compress(rows), b"IEND"]
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.jp2"])
def test_alpha_is_dropped_and_not_blended(tmp_path, name):
    how = {"lossless": True, "exact": True} if name == "a.webp" else {}
    for mode, colours in (("RGBA", COLOURS), ("LA", COLOURS[..., :1])):
        if mode == "LA" and name == "a.webp":
            continue
        for least in (0, 254, 255):
            alpha = np.full((4, 6, 1), 255, dtype=np.uint8)
            alpha[1, 2] = least
            Image.fromarray(np.concatenate([colours, alpha], axis=2), mode).save(tmp_path / name, **how)
            if name != "a.webp":  # whose writer leaves opaque alpha out
                assert read_header(tmp_path / name) == Header(4, 6, 1, True)
            assert_picture(tmp_path / name, np.broadcast_to(colours, (4, 6, 3)), transparent=least < 255)


@pytest.mark.parametrize(
    ("mode", "transparency", "used"),
    [
        ("P", bytes([0, 100, 255]), True),
        ("P", bytes([255, 255, 255]), False),
        ("P", None, False),
        ("L", 1, True),  # the grey value that is transparent
        ("L", 77, False),  # of which there is no pixel
        ("RGB", (1, 1, 1), True),
    ],
)
def test_transparent_colours_are_dropped(tmp_path, mode, transparency, used):
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), mode="P" if mode == "P" else "L")
    colours = np.array([[0, 1, 2]] * 3).T
    if mode == "P":
        colours = np.arange(10, 100, 10).reshape(3, 3)
        image.putpalette(colours.flatten().tolist())
    image.convert(mode).save(tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency}))
    assert read_header(tmp_path / "a.png").has_alpha == (transparency is not None)
    assert_picture(tmp_path / "a.png", colours[None].astype(np.uint8), transparent=used)


@pytest.mark.parametrize(("extra", "mode"), [(1, "La"), (2, "LA")])
def test_multiplied_alpha_of_grey_is_taken_back(tmp_path, extra, mode):
    pixels = np.array([[[50, 128], [100, 255]]], dtype=np.uint8)
    (tmp_path / "a.tif").write_bytes(tiff(pixels, extra=[extra]))
    with Image.open(tmp_path / "a.tif") as image:
        assert image.mode == mode
    grey = [round(50 * 255 / 128) if mode == "La" else 50, 100]
    picture = read_picture(tmp_path / "a.tif")
    assert picture.transparent
    assert (picture.pixels[0, 0].float() - torch.tensor(grey)).abs().max() <= 1


GREY = np.arange(32, dtype=np.uint16).reshape(4, 8, 1)
DEEP = {
    "I;16.png": encoded(GREY[..., 0] * 2000),
    "I;16.tif": encoded(GREY[..., 0] * 2000, "TIFF"),
    "lzw.tif": encoded(GREY[..., 0] * 2000, "TIFF", compression="tiff_lzw"),
    # PIL would keep the top byte of each: a picture of 12 bits would be black.
    **{f"{mode};16.png": deep_png(kind, len(mode)) for kind, mode in ((2, "RGB"), (4, "LA"), (6, "RGBA"))},
    "floats.tif": encoded(GREY[..., 0].astype(np.float32), "TIFF"),
    "deep-planes.tif": tiff((GREY * 2000).repeat(3, axis=2), planar=True),
    "deep-big-endian.tif": tiff(GREY * 2000, order=">"),
    "12-bits.tif": tiff(GREY * 100, bits=12, data=bytes(48)),
    "four-deep-planes.tif": tiff((GREY * 2000).repeat(4, axis=2), planar=True, extra=[0]),
    "colours.ppm": b"P6\n8 4\n65535\n" + (GREY * 2000).repeat(3, axis=2).astype(">u2").tobytes(),
    "12-bits.ppm": b"P6\n8 4\n4095\n" + (GREY * 100).repeat(3, axis=2).astype(">u2").tobytes(),
    "12-bits.pgm": b"P5\n8 4\n4095\n" + (GREY * 100).astype(">u2").tobytes(),
    "grey.pgm": b"P5\n8 4\n65535\n" + (GREY * 2000).astype(">u2").tobytes(),
    "text.pgm": b"P2\n8 4\n1023\n" + b" ".join(b"%d" % value for value in GREY.flat),
    "text.ppm": b"P3\n8 4\n1023\n" + b" ".join(b"%d" % value for value in GREY.repeat(3)),
    "floats.pfm": b"Pf\n8 4\n-1.0\n" + GREY.astype("<f4").tobytes(),
    "a.sgi": struct.pack(">HBBHHHH", 474, 0, 2, 3, 8, 4, 3).ljust(512, b"\0") + bytes(8 * 4 * 3 * 2),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_eight_bits_are_refused_in_every_format(tmp_path, name):
    (tmp_path / name).write_bytes(DEEP[name])
    mode = f"mode '{name[:-4]}.?'" if ";16" in name else ".*"
    expected = rf"{name}: expected an image of 8 bits a channel, got {mode}; convert it \(magick"
    assert_refused(tmp_path / name, expected)


@pytest.mark.parametrize(
    ("depth", "message"),
    [(16, "expected an image of 8 bits a channel, got 16"), (0x88, "got signed ones"), (4, "or of fewer bits")],
)
@pytest.mark.parametrize("suffix", ["jp2", "j2k"])
def test_jpeg_2000_of_other_than_eight_bits_is_refused(tmp_path, suffix, depth, message):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(COLOURS).save(path)
    assert torch.equal(read_image(path), as_tensor(COLOURS))
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\x4f\xff\x51") + 42
    data[at + 3] = depth - 1  # of the second component
    path.write_bytes(data)
    assert_refused(path, message)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(COLOURS.view(np.int8)), "cannot be read as an image: a damaged TIFF, or one that is not 8-bit grey, RGB"),
        (tiff(FOUR, extra=[0], planar=True), "cannot be read as an image: a damaged TIFF, or one that is not"),
        (tiff(np.concatenate([FOUR, COLOURS[..., :1]], 2), extra=[2, 0]), "expected 3 bands, or one .* got 5"),
        (tiff(COLOURS[..., :2], extra=[0]), "expected 1 bands, or one more of alpha, got 2"),
        (tiff(COLOURS, photometric=6), "expected YCbCr of full resolution, got subsampled colours"),
        (tiff(COLOURS[..., :1], photometric=3, more=[(320, 3, [7] * 768)]), "expected a palette of 16 bits"),
        (tiff(COLOURS, more=[(254, 4, [1]), (330, 4, [8])]), "got a thumbnail, whose image is in a sub-IFD"),
    ],
    ids=["signed colours", "plane", "alpha and band", "grey and band", "YCbCr", "8-bit palette", "raw photograph"],
)
def test_what_pillow_would_read_to_other_pixels_is_refused(tmp_path, data, message):
    """Others: docs/bad-input.md."""
    (tmp_path / "a.tif").write_bytes(data)
    assert_refused(tmp_path / "a.tif", message)


def test_ink_that_may_be_inverted_is_refused(tmp_path):
    """Pillow takes every CMYK JPEG for Adobe's."""
    white = Image.new("RGB", (6, 4), (255, 255, 255)).convert("CMYK")
    for name in ("a.tif", "a.jpg"):
        white.save(tmp_path / name)
        assert_picture(tmp_path / name, np.full((4, 6, 3), 255, np.uint8))
    data = (tmp_path / "a.jpg").read_bytes()
    at = data.index(b"Adobe") - 4  # its segment
    (tmp_path / "a.jpg").write_bytes(data[:at] + data[at + 16 :])
    assert_refused(tmp_path / "a.jpg", "expected a CMYK JPEG of Adobe's kind")


SMALL = np.full((2, 3, 3), 9, dtype=np.uint8)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("tag", [(254, 4, [1]), (255, 3, [2])], ids=["new", "old"])
def test_of_a_tiff_with_overviews_the_full_image_is_read(tmp_path, tag, first):
    """Thumbnails may come before it."""
    path = tmp_path / "a.tif"
    pages = [{"pixels": COLOURS}, {"pixels": SMALL, "more": [tag]}, {"pixels": SMALL[:1], "more": [tag]}]
    path.write_bytes(tiff(pages=pages if first else pages[::-1]))
    assert read_header(path) == Header(4, 6, 1, False)
    assert_picture(path, COLOURS)
    for several in ([*pages, {"pixels": COLOURS}], pages[1:]):
        path.write_bytes(tiff(pages=several))
        assert_refused(path, "expected one image, got a file of 2")
    path.write_bytes(tiff(pages=pages[1:2]))  # all there is
    assert_picture(path, SMALL)


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp", "avif"])
def test_several_images_in_a_file_are_refused(tmp_path, suffix):
    path, pages = tmp_path / f"a.{suffix}", [Image.fromarray(np.roll(COLOURS, i, axis=1)) for i in range(3)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    assert_refused(path, f"a.{suffix}: expected one image, got a file of 3")
    pages[0].save(path)
    assert read_image(path).shape == (3, 4, 6)


# Tag, type (2 text, 3 and 4 numbers, 5 and 10 rationals, 8 and 9 signed, 77 unknown), count, value or its place: 8 is
# the IFD itself, 200 the pair -1, 0, 208 the pair 0, 0.
ODD_TAGS = {
    "-1/0": [(0x11A, 10, 1, 200), (0x11B, 5, 1, 208)],
    "negative width": [(0x9C9B, 8, 1, 0xFFFB)],
    "EXIF in itself": [(0x8769, 4, 1, 8)],
    "EXIF nowhere": [(0x8769, 4, 1, 0xFFFFFFF0)],
    "EXIF before the file": [(0x8769, 9, 1, 0xFFFFFFFB)],
    "EXIF as a text": [(0x8769, 2, 4, 0x64636261)],
    "GPS in itself": [(0x8825, 4, 1, 8), (0xA005, 4, 1, 8)],
    "text that ends early": [(0x10F, 2, 1000, 9999)],
    "unknown type": [(0x9999, 77, 5, 9999)],
    "more values than bytes": [(0x9999, 3, 0x7FFFFFFF, 0)],
    "resolution as a text": [(0x11A, 2, 4, 0x64636261), (0x128, 2, 4, 0x64636261)],
    "two units": [(0x128, 3, 2, 5)],
    "date as a number": [(0x132, 3, 1, 5)],
}
NO_ORIENTATIONS = [(0x112, 3, 1, 0), (0x112, 3, 1, 9), (0x112, 2, 4, 0x36), (0x112, 5, 1, 208), (0x112, 7, 1, 6)]


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_when_asked(tmp_path, orientation, suffix):
    """COCO's annotations were drawn on the pixels as stored."""
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(with_exif(COLOURS, suffix, orientation))
    for asked in ({}, {"apply_exif": False}):
        assert torch.equal(read_image(path, **asked), as_tensor(COLOURS))
    assert torch.equal(read_image(path, apply_exif=True), as_tensor(UPRIGHT[orientation](COLOURS)))
    assert read_header(path) == Header(4, 6, orientation, False)
    assert read_picture(path, apply_exif=True).orientation == orientation


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("odd", ODD_TAGS)
def test_odd_tags_neither_stop_the_turn_nor_warn(tmp_path, odd, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(with_exif(COLOURS, suffix, orientation=6, more=ODD_TAGS[odd]))
    assert read_header(path) == Header(4, 6, 6, False)
    stored, upright = read_image(path), read_image(path, apply_exif=True)
    assert torch.equal(upright, stored.transpose(1, 2).flip(2))
    if suffix in ("png", "tif"):
        assert torch.equal(stored, as_tensor(COLOURS))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("exif", [b"garbage", *NO_ORIENTATIONS], ids=str)
def test_an_orientation_that_is_none_turns_nothing(tmp_path, exif):
    path = tmp_path / "a.png"
    if exif == b"garbage":
        path.write_bytes(encoded(COLOURS, exif=b"Exif\0\0" + exif))
    else:
        path.write_bytes(with_exif(COLOURS, "png", more=[exif]))
        assert read_header(path).orientation == 1
    for apply_exif in (False, True):
        assert torch.equal(read_image(path, apply_exif=apply_exif), as_tensor(COLOURS))


@pytest.mark.filterwarnings("ignore")  # PIL's, of broken tags
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp"])
def test_damaged_files_are_named(tmp_path, suffix):
    path = tmp_path / f"a b[ü].{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    assert read_image(path).shape == (3, 40, 40)
    for content in (b"", b"no image", whole[:20], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^" + re.escape(f"{path}: cannot be read as an image: ")) as error:
            read_image(path)
        assert str(error.value).count(path.name) == 1
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=re.escape(f"{path}: cannot be read as an image: Is a directory") + "$"):
        read_image(path)
    path.rmdir()
    with pytest.raises(ValueError, match="no such file"):
        read_image(path)


@pytest.mark.filterwarnings("ignore")  # PIL's, of broken tags
def test_bytes_turned_at_random_raise_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpg", "tif"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(COLOURS).save(path)
        whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        messages = []
        for _ in range(60):
            bad = whole.copy()
            bad[rng.integers(0, len(bad), 3)] = rng.integers(0, 256, 3)
            path.write_bytes(bad.tobytes())
            try:
                read_image(path)
            except ValueError as error:
                messages.append(str(error))
        assert messages
        assert all(message.startswith(f"{path}: ") for message in messages)


def test_a_header_is_read_without_the_pixels(tmp_path):
    """In a PNG the tags may come after them; then the pixels alone tell of the turn."""
    path, data = tmp_path / "a.png", with_exif(COLOURS, "png", 6)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    assert read_header(path) == Header(4, 6, 1, False)
    assert read_picture(path).orientation == 6
    assert torch.equal(read_image(path, apply_exif=True), as_tensor(UPRIGHT[6](COLOURS)))
    path.write_bytes(data[: data.index(b"IDAT") + 10])
    assert read_header(path) == Header(4, 6, 6, False)
    with pytest.raises(ValueError, match=r"a.png: cannot be read as an image"):
        read_image(path)


def test_suffixes_are_those_of_what_can_be_read():
    known = image_suffixes()
    assert known >= {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".jp2", ".ppm"}
    assert known >= {".pgm", ".avif"}
    assert not known & {"", ".eps", ".h5", ".mpg", ".pdf", ".txt", ".json"}
