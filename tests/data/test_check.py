"""Images are read before the first step: their headers, all of their pixels, or none; bad ones may be left out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.engine.predictions import make_model
from tmask.data.check import check_images
from tmask.data.coco import CocoDataset
from tmask.data.loader import EpochBatchSampler, make_loader
from tmask.data.shapes import write_shapes

CUT, SIZE, EMPTY, GONE = "image file is truncated", "expected 64x64 pixels", "empty, or of no known format", "no such"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images. Four are bad: one in its pixels, two in their headers, and one is missing."""
    images, _ = write_shapes(tmp_path, num_images=12, seed=1, size=64)
    files = sorted(images.iterdir())
    files[1].write_bytes(files[1].read_bytes()[:-30])
    Image.fromarray(np.zeros((64, 63, 3), np.uint8)).save(files[4])
    files[5].write_bytes(b"")
    files[9].unlink()
    return tmp_path


def opened(folder: Path, **options: Any) -> CocoDataset:
    return CocoDataset(folder / "images", folder / "annotations.json", **options)


def faults(dataset: CocoDataset) -> dict[int, str]:
    """The word that tells each reason."""
    return {i: next(w for w in (CUT, SIZE, EMPTY, GONE) if w in text) for i, text in dataset.left_out.items()}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("check", [None, "full", "headers"])
def test_bad_images_are_left_out_and_counted(folder: Path, check: str | None, workers: int) -> None:
    dataset = opened(folder, allow_missing=True)
    assert faults(dataset) == {9: GONE}
    state = torch.get_rng_state()
    shown: list[Any] = []
    with pytest.warns(UserWarning, match="left out") as told:
        check_images(
            dataset, check, skip_bad=True, num_workers=workers, watch=lambda looks: shown.append(looks) or looks
        )
    assert torch.equal(torch.get_rng_state(), state)
    assert len(shown[0]) == 12
    cut = {} if check == "headers" else {1: CUT}
    assert faults(dataset) == {**cut, 4: SIZE, 5: EMPTY, 9: GONE}
    (warning,) = [str(item.message) for item in told if item.category is UserWarning]
    texts = [dataset.left_out[i] for i in sorted(dataset.left_out)]
    assert warning == f"{dataset.annotation_file}: left out {len(texts)} of 12 images: {'; '.join(texts)}"
    left = set(range(12)) - dataset.left_out.keys()
    assert set(dataset.coco.imgs) == {dataset.images[i]["id"] for i in left}
    assert {item["image_id"] for item in dataset.coco.anns.values()} <= set(dataset.coco.imgs)
    assert dataset.num_instances == len(dataset.coco.anns) == sum(dataset.mask_counts.values())


def test_without_the_setting_all_of_them_are_counted_and_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"annotations.json: 1 of 12 images do not exist"):
        opened(folder)
    (folder / "images" / "000009.png").write_bytes(b"")
    with pytest.raises(ValueError, match=f"^3 of 12 images are bad: .*000004.png: {SIZE}.*; .*000005.*; .*000009.*$"):
        check_images(opened(folder))
    for i in (0, 2, 3):
        (folder / "images" / f"00000{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^7 of 12 images are bad: .*000000.png: .*000004.png: [^;]*; and 2 more$"):
        check_images(opened(folder), "full", num_workers=2)
    check_images(opened(folder), "off")


def test_impossible_checks_are_refused(folder: Path) -> None:
    dataset = opened(folder, allow_missing=True)
    with pytest.raises(ValueError, match=r"^check: expected 'full'\?, got 'ful'$"):
        check_images(dataset, "ful")
    with pytest.raises(ValueError, match=r"^check: expected one of full, headers with skip_bad, got 'off'$"):
        check_images(dataset, "off", skip_bad=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_loader_gives_the_others(folder: Path, shuffle: bool) -> None:
    dataset = opened(folder, allow_missing=True, packed_masks=True)
    check_images(dataset, skip_bad=True)
    loader = make_loader(dataset, make_model().transform, batch_size=3, shuffle=shuffle, aspect_grouping=shuffle)
    ids = [number for batch in loader for number in batch.image_ids]
    assert len(loader) == 3
    assert (sorted(ids) if shuffle else ids) == [i + 1 for i in range(12) if i not in (1, 4, 5, 9)]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("ratios", [None, [0.5, 2.0, 2.0] * 7])
def test_what_is_left_out_changes_nothing_before_its_turn(drop_last: bool, ratios: list[float] | None) -> None:
    """So a run that breaks off at it has seen what a run without it would have seen."""
    options: dict[str, Any] = {"batch_size": 4, "shuffle": True, "aspect_ratios": ratios, "drop_last": drop_last}
    whole = EpochBatchSampler(21, **options)
    every = EpochBatchSampler(21, batch_size=1, shuffle=False)
    for epoch in range(3):
        every.set_epoch(epoch)
        batches = whole.batches(epoch)
        for place, batch in enumerate(batches):
            for bad in batch:
                sampler = EpochBatchSampler(21, left_out={bad}, **options)
                found = sampler.batches(epoch)
                assert len(found) == len(sampler)
                assert found[:place] == batches[:place]
                indices = [i for part in found for i in part]
                assert bad not in indices
                assert len(set(indices)) == len(indices) == 20
                sampler.set_epoch(epoch, start=place)
                seeds = {i: seed for part in sampler for i, seed in part}
                assert seeds.items() <= {i: seed for part in every for i, seed in part}.items()
