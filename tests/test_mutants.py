"""The tests of data, model and engine have power: each turns red on a copy of the project with one thing broken.

The whole project is copied, so an error is seen through everything that stands on it. Kernels and their references are
broken beside their own tests, by `mutation.mutant`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation import break_file

ROOT = Path(__file__).parents[1]

# File of tmask, what it reads, what the mutant reads, and the tests that must notice.
MUTANTS = {
    "beta of the box loss": ("model/losses.py", "beta=SMOOTH_L1_BETA", "beta=1.0",
        "model/test_torchvision_parity.py"),
    "background for a class": ("model/predictions.py", "dim=-1)[..., 1:]", "dim=-1)[..., :-1]",
        "model/test_losses.py"),
    "no lateral path": ("model/fpn.py", "merged[level] + F.interpolate", "F.interpolate",
        "model/test_torchvision_parity.py"),
    "P6 of larger windows": ("model/fpn.py", "kernel_size=1, stride=2", "kernel_size=2, stride=2",
        "model/test_torchvision_parity.py"),
    "ignored anchors are negative": ("model/rpn.py", "matches == -1", "matches < 0",
        "model/test_torchvision_parity.py"),
    "logits by anchor": ("model/rpn.py", "[x.permute(0, 2, 3, 1).flatten(1)", "[x.flatten(1)",
        "model/test_torchvision_parity.py"),
    "height for width": ("model/postprocess.py", ".flip(1).repeat(1, 2)", ".repeat(1, 2)", "model/test_keypoints.py"),
    "eyes not swapped": ("data/transforms.py", 'out["keypoints"][:, order]', 'out["keypoints"]',
        "data/test_keypoints.py"),
    "half a pixel": ("data/transforms.py", "keypoints[..., :2] - 0.5", "keypoints[..., :2]", "data/test_keypoints.py"),
    "slivers stay": ("data/transforms.py", "_MIN_SIDE).all(1)", "_MIN_SIDE).any(1)", "data/test_transforms.py"),
    "wide beside tall": ("data/loader.py", "int(ratio >= 1)", "0 * int(ratio)", "data/test_loader.py"),
    "one flip for all epochs": ("data/loader.py", "_mix(self.seed, epoch, i)", "_mix(self.seed, i)",
        "data/test_loader.py"),
    "used batches again": ("data/loader.py", "[self.start :]", "[:]", "data/test_loader.py"),
    "lines from 1": ("data/keypoints.py", "first - 1, second - 1", "first, second", "data/test_keypoints.py"),
    "average of the last step": ("engine/optimizer.py", "1 - self.decay", "self.decay", "engine/test_optimizer.py"),
    "warm-up over all steps": ("engine/optimizer.py", "step / config.warmup_steps", "step / config.steps",
        "engine/test_optimizer.py"),
    "norms decay": ("engine/optimizer.py", "exempt and not config", "exempt and config", "engine/test_optimizer.py"),
    "one epoch for ever": ("engine/state.py", "self.epoch + 1, 0", "self.epoch, 0", "engine/test_train.py"),
    "random state is not put back": ("engine/state.py", "if self._rng is not None", "if False",
        "engine/test_resume.py"),
    "rates of the checkpoint": ("engine/state.py", "group.update(values)", "pass", "engine/test_resume.py"),
    "bounds are not checked": ("checks.py", "require(bound.holds(value), name", "require(True, name", "test_config.py"),
}  # fmt: skip
FAST = ("norms decay",)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MUTANTS])
def test_a_mutant_turns_its_tests_red(name: str, tmp_path: Path) -> None:
    file, old, new, tests = MUTANTS[name]
    for part in ("tmask", "tmask_kernels", "tests", "bench"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    break_file(tmp_path / "tmask" / file, old, new)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", f"tests/{tests}"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]  # 2: not even collected
