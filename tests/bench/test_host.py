"""The host's time of each op: every op has a row."""

import os
import subprocess
import sys

from bench.result import ROOT
from tmask_kernels.testing import op_specs


def run(code: str, interpret: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_every_op_has_a_time() -> None:
    done = run("from bench import host; host.CALLS = host.REPEATS = 1; print(*host.report(), sep='\\n')", "0")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows[2:]] == [spec.name for spec in op_specs()]
    assert [bool(row[2]) for row in rows[2:]] == [bool(spec.gradients) for spec in op_specs()]
    assert all(float(row[1]) > 0 for row in rows)


def test_the_interpreter_is_refused() -> None:
    done = run("from bench.__main__ import main; raise SystemExit(main(['host']))", "1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET: expected 0" in done.stderr
