"""Reading image files: every mode, orientation and damage."""

import re
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tmask.data.images import read_image

COLOURS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def as_tensor(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def write_deep_png(path, colour_type, channels):
    """A 4x3 PNG of 16 bits a channel; PIL writes grey ones only."""
    rows = b"".join(b"\0" + bytes(range(4 * channels * 2)) for _ in range(3))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 3, 16, colour_type, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    parts = [
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in [*chunks, (b"IEND", b"")]
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK"])
def test_every_eight_bit_mode_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(np.full((4, 5, 3), 255, dtype=np.uint8)).convert(mode)
    for name in ("a.jpg", "a.tif") if mode == "CMYK" else ("a.png",):
        image.save(tmp_path / name)
        assert torch.equal(read_image(tmp_path / name), torch.full((3, 4, 5), 255, dtype=torch.uint8))


def test_grey_is_repeated_and_bits_are_black_and_white(tmp_path):
    grey = COLOURS[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert torch.equal(read_image(tmp_path / "grey.png"), as_tensor(grey[:, :, None].repeat(3, axis=2)))
    Image.fromarray(grey > 127).save(tmp_path / "bits.png")
    bits = np.where(grey > 127, 255, 0).astype(np.uint8)
    assert torch.equal(read_image(tmp_path / "bits.png"), as_tensor(bits[:, :, None].repeat(3, axis=2)))


def test_alpha_is_dropped_and_not_blended(tmp_path):
    alpha = np.full((4, 6, 1), 0, dtype=np.uint8)
    Image.fromarray(np.concatenate([COLOURS, alpha], axis=2)).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png"), as_tensor(COLOURS))


def test_transparent_palettes_give_their_colours_without_a_warning(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "a.png", transparency=bytes([0, 100, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_image(tmp_path / "a.png")
    assert read[:, 0].T.tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]


@pytest.mark.parametrize(("name", "how"), [("a.png", {}), ("a.tif", {}), ("a.tif", {"compression": "tiff_lzw"})])
def test_sixteen_bit_grey_is_refused(tmp_path, name, how):
    Image.fromarray(np.full((4, 5), 3000, dtype=np.uint16)).save(tmp_path / name, **how)
    with pytest.raises(ValueError, match=rf"{name}: expected an image of 8 bits a channel, got mode 'I;16.*convert it"):
        read_image(tmp_path / name)


@pytest.mark.parametrize(("colour_type", "channels", "mode"), [(2, 3, "RGB"), (4, 2, "LA"), (6, 4, "RGBA")])
def test_sixteen_bit_colours_are_refused(tmp_path, colour_type, channels, mode):
    """PIL would keep the top byte of each: a picture of 12 bits would be black."""
    write_deep_png(tmp_path / "a.png", colour_type, channels)
    with pytest.raises(ValueError, match=f"8 bits a channel, got mode '{mode};16"):
        read_image(tmp_path / "a.png")


def test_float_images_are_refused(tmp_path):
    Image.fromarray(np.full((4, 5), 0.5, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="8 bits a channel, got mode 'F"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["gif", "tif", "png"])
def test_several_images_in_a_file_are_refused(tmp_path, suffix):
    pages = [Image.fromarray(np.roll(COLOURS, i, axis=1)) for i in range(3)]
    pages[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=f"a.{suffix}: expected one image, got a file of 3"):
        read_image(tmp_path / f"a.{suffix}")
    pages[0].save(tmp_path / f"one.{suffix}")
    assert read_image(tmp_path / f"one.{suffix}").shape == (3, 4, 6)


def test_a_photograph_with_previews_is_its_first_picture(tmp_path):
    pictures = [Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)) for value in (200, 10)]
    pictures[0].save(tmp_path / "a.mpo", save_all=True, append_images=pictures[1:])
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
    assert (read_image(tmp_path / "a.jpg") == 200).all()


# What a viewer does with the stored pixels [H, W] at each orientation.
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


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_when_asked(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(COLOURS).save(path, exif=exif)
    assert torch.equal(read_image(path), as_tensor(COLOURS))
    assert torch.equal(read_image(path, apply_exif=False), as_tensor(COLOURS))
    assert torch.equal(read_image(path, apply_exif=True), as_tensor(UPRIGHT[orientation](COLOURS)))


def test_exif_orientation_of_a_jpeg(tmp_path):
    """COCO's annotations were drawn on the pixels as stored."""
    image = Image.fromarray(np.zeros((4, 6, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (3, 4, 6)
    assert read_image(tmp_path / "a.jpg", apply_exif=True).shape == (3, 6, 4)


@pytest.mark.filterwarnings("ignore")  # PIL's, of broken tags
@pytest.mark.parametrize("exif", [b"garbage", b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0"])
def test_damaged_exif_data_does_not_spoil_the_pixels(tmp_path, exif):
    """No header, and a text as orientation."""
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=b"Exif\0\0" + exif)
    for apply_exif in (False, True):
        assert torch.equal(read_image(tmp_path / "a.png", apply_exif=apply_exif), as_tensor(COLOURS))


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


def test_the_content_decides_not_the_suffix(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.jpg", format="PNG")
    assert torch.equal(read_image(tmp_path / "a.jpg"), as_tensor(COLOURS))
