"""The comparison of run lengths with whole masks says whether they differ."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import mask_evaluation
from tests.engine.predictions import make_model, write_checkpoint
from tmask.config import TrainConfig
from tmask.data.shapes import write_shapes


def test_one_other_pixel_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TrainConfig(batch_size=2, precision="fp32")
    write_checkpoint(tmp_path / "a.pt", make_model(), train_config=dataclasses.asdict(training))
    images, annotations = write_shapes(tmp_path / "shapes", num_images=3, seed=0, size=64)
    arguments = ["--checkpoint", str(tmp_path / "a.pt"), "--images", str(images), "--annotations", str(annotations)]
    assert mask_evaluation.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 images, 15 detections, 0 masks differ"
    assert lines[1] == "largest whole masks of one image: 0.0 MB"  # 5 masks of 64 x 64 bytes
    assert any(line.startswith("segm/AP75 ") and line.endswith("the same") for line in lines)

    def spoilt(masks: torch.Tensor) -> list[dict[str, Any]]:
        masks = masks.clone()
        masks[0, -1, -1] ^= True
        return encode(masks)

    encode = mask_evaluation.encode
    monkeypatch.setattr(mask_evaluation, "encode", spoilt)
    assert mask_evaluation.main(arguments) == 1
    assert "15 detections, 3 masks differ" in capsys.readouterr().out
