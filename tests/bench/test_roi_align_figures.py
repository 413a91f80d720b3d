"""docs/roi-align.md: its tables are current, its figures show what the ops do, and the claims of its text hold."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from bench import roi_align_figures as figures
from bench.roi_align_figures import COARSE, COARSE_BINS, FINE, PAGE, POOLS, draw, on_photograph, on_ramp, page
from tmask.config import RoIExtractorConfig
from tmask.presets import model_config
from tmask_kernels import roi_align

ALIGNED = "RoIAlign, `aligned=True`"


def test_the_page_is_current_and_a_stale_one_is_seen() -> None:
    text = PAGE.read_text()
    assert page(text) == text, "run python -m bench.roi_align_figures --write"
    stale = text.replace("| left | 152 |", "| left | 151 |")
    assert stale != text == page(stale)


@pytest.mark.parametrize("ratio", [2, 0], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_samples_are_where_the_op_reads(aligned: bool, ratio: int) -> None:
    """The mean of the map, interpolated at the drawn samples, is the op's output."""
    cells = figures.feature_map(COARSE)
    y, x = figures.samples(COARSE_BINS, COARSE, ratio, aligned)
    at = torch.stack(torch.meshgrid(y.flatten(), x.flatten(), indexing="ij")[::-1], -1)  # [PH * g, PW * g, 2]
    grid = (2 * at / torch.tensor([cells.shape[3], cells.shape[2]]) - 1)[None]
    read = F.grid_sample(cells, grid, mode="bilinear", padding_mode="border", align_corners=False)
    expected = F.avg_pool2d(read, (y.shape[1], x.shape[1]))
    out = roi_align(cells, figures.moved(0), COARSE_BINS, 1 / COARSE, ratio, aligned)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-3)


def test_a_winner_lies_in_each_bin_of_roi_pool() -> None:
    rows, columns, largest = figures.rounded(COARSE_BINS, COARSE)
    assert (torch.einsum("ih,hw,jw->ij", rows.float(), largest.float(), columns.float()) >= 1).all()
    covered = torch.einsum("ih,jw->hw", rows.float(), columns.float())
    assert not (largest & (covered == 0)).any()
    assert (covered > 1).any(), "bins share cells"


def test_bicubic_taps_reproduce_a_parabola_and_bilinear_ones_do_not() -> None:
    parabola = torch.arange(15.0).square()
    for name, number, error in (("bicubic", 16, 0.0), ("bilinear", 4, 0.25)):
        weights = figures.taps(6.0, 5.9, name)  # halfway between cells 5 and 6 along x
        assert (weights != 0).sum() == number
        value = (weights.sum(0)[:15] * parabola).sum()
        torch.testing.assert_close(value, torch.tensor(5.5**2 + error), rtol=0, atol=1e-5)


def test_the_page_is_right_about_shifts() -> None:
    middle = on_ramp("RoIPool").got[:, 3, 3]
    assert len(middle.unique()) == 2, "RoIPool stays and then jumps"
    assert float(middle.max() - middle.min()) == 1.0, "by a cell"
    aligned, largest = on_ramp(ALIGNED), on_ramp(f"{ALIGNED}, max")
    torch.testing.assert_close(aligned.got, aligned.exact, rtol=0, atol=1e-4)
    offset = largest.got - largest.exact
    assert float(offset.max() - offset.min()) < 1e-4, "the largest sample follows too"
    assert float(offset.min()) > 0.5, "ahead of the centre"
    for name in POOLS:
        error = on_photograph(name).rms()
        assert float(error[0]) == 0.0
        assert float(error[FINE]) < 1e-3, "at a whole cell all are exact"
        if name == "RoIPool":
            assert float(error[FINE // 2]) > 10
        else:
            assert float(error.max()) < (11 if "max" in name else 3)


def test_settings_of_the_page_are_settings() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    config = model_config("tiny", **yaml.safe_load(text)["model"])
    assert config.roi_extractor == RoIExtractorConfig(interpolation="bicubic", sampling_ratio=2)


@pytest.mark.slow
def test_figures_of_the_page_are_committed_and_drawn(tmp_path: Path) -> None:
    shown = re.findall(r"!\[.*?\]\(images/(.*?)\)", PAGE.read_text(), re.DOTALL)
    drawn = draw(tmp_path)
    assert shown == [path.name for path in drawn] == ["roi-align-samples.png", "roi-align-shift.png"]
    for path in drawn:
        assert path.stat().st_size > 20_000
        assert (figures.IMAGES / path.name).stat().st_size < 250_000
