"""The tests that need a GPU run here too, small, so that none meets a GPU for the first time with a mistake in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "part",
    ["tests/gpu/test_model.py", pytest.param("tests/gpu", marks=pytest.mark.slow)],
)
def test_gpu_tests_pass_in_a_rehearsal(part: str) -> None:
    command = [sys.executable, "-m", "pytest", part, "--rehearse", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
