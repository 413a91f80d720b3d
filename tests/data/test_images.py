import numpy as np
import pytest
import torch
from PIL import Image

from tmask.data.images import read_image


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_eight_bit_mode_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(np.full((4, 5, 3), 255, dtype=np.uint8)).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    assert torch.equal(read_image(path), torch.full((3, 4, 5), 255, dtype=torch.uint8))


def test_sixteen_bit_images_are_refused(tmp_path):
    Image.fromarray(np.full((4, 5), 3000, dtype=np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png: expected an image of 8 bits a channel, got mode 'I;16'"):
        read_image(tmp_path / "a.png")


def test_exif_orientation_is_not_applied(tmp_path):
    """COCO's annotations were drawn on the pixels as stored."""
    image = Image.fromarray(np.zeros((4, 6, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (3, 4, 6)
