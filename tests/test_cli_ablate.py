"""`tmask ablate`: what it passes on to the ablations of the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tmask import cli
from tmask.cli import bench as bench_cli

ROOT = Path(__file__).parents[1]
STAND_IN = """
import json, os, sys
print(json.dumps([sys.argv[1:], os.environ.get("CUDA_VISIBLE_DEVICES")]), flush=True)
sys.exit(3)
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose ablations are the stand-in, with one table."""
    ablate = tmp_path / "bench" / "ablate"
    ablate.mkdir(parents=True)
    for folder in (ablate.parent, ablate):
        (folder / "__init__.py").touch()  # packages: another one may be on the path
    (ablate / "tables.yaml").write_text("tables: {pooling: {}}")
    (ablate / "__main__.py").write_text(STAND_IN)
    monkeypatch.setattr(bench_cli, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_passes_on_what_it_is_given(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = str(checkout / "runs" / "ablate" / "pooling")
    options = ["--seeds", "2", "--out", "o", "--coco", ".", "--backbone_weights", "w.pth", "--background"]
    given = ["--seeds", "2", "--out", f"{checkout}/o", "--coco", str(checkout)]
    given += ["--backbone_weights", f"{checkout}/w.pth", "--background"]
    for words, passed in (([], ["--seeds", "3", "--out", folder, "--with_parent"]), (options, given)):
        assert cli.main(["ablate", "pooling", *words, "--device", "cpu"]) == 3
        assert json.loads(capfd.readouterr().out) == [["pooling", *passed], ""]


def test_without_a_checkout_it_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(bench_cli, "ROOT", tmp_path)
    assert cli.main(["ablate", "focal"]) == 1
    message = "the ablations are in tmask's source, not in the installed package: run it in a checkout\n"
    assert capsys.readouterr().err == f"tmask ablate: error: {message}"


@pytest.mark.slow
def test_a_table_in_the_background_outlives_its_caller_and_can_be_stopped(tmp_path: Path) -> None:
    """The real thing, stopped before its first step: it says what it does, and a second one is refused meanwhile."""
    words = [sys.executable, "-m", "tmask", "ablate", "focal", "--out", "t", "--background", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}

    def call() -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = call()
    assert done.returncode == 0, done.stderr
    process = int(done.stdout.split("process ")[1].split()[0])
    assert f"stop:   kill {process}" in done.stdout
    log = tmp_path / "t" / "ablate.log"
    try:
        wait_for(lambda: "cross-entropy, seed 0: begins" in log.read_text())
        second = call()
        assert second.returncode == 2
        assert f"another tmask ablate (process {process} on" in second.stderr
    finally:
        os.kill(process, 15)
    wait_for(lambda: "stopped; the same command goes on" in log.read_text())
    assert "**Partial: 0 of 12 runs.**" in (tmp_path / "t" / "table.md").read_text()


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)
