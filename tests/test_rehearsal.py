"""The tests that need a GPU run here too, small, so that none meets a GPU for the first time with a mistake in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py"))  # apart, for several workers
QUICK = "test_model.py"


@pytest.mark.parametrize("file", [pytest.param(f, marks=[] if f == QUICK else pytest.mark.slow) for f in FILES])
def test_gpu_tests_pass_in_a_rehearsal(file: str) -> None:
    command = [sys.executable, "-m", "pytest", f"tests/gpu/{file}", "--rehearse", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
