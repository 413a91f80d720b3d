"""The demo's own settings learn: a third of its steps reach a bar that luck does not."""

from pathlib import Path

import pytest
import torch

from tmask.demo import DemoConfig, run_demo


@pytest.mark.slow
def test_a_third_of_the_demo_learns(tmp_path: Path) -> None:
    metrics = run_demo(
        DemoConfig(out=str(tmp_path), steps=400, train_images=2000, val_images=100), device=torch.device("cpu")
    )
    assert metrics["segm/AP"] >= 0.2
    assert metrics["bbox/AP"] >= 0.2
    assert (tmp_path / "pictures" / "overview.png").stat().st_size > 10_000
