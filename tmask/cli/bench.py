"""``tmask bench``: the benchmarks of the checkout, which the installed package does not hold."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tmask.checks import nearest
from tmask.cli.common import UsageError, check_out, device_of, usage
from tmask.cli.options import add_device, make_parser, parse

ROOT = Path(__file__).resolve().parents[2]
GROUPS = ("all", "op", "model")


def bench_command(argv: list[str]) -> int:
    """Compare the speed of the ops and the model with torchvision's, once each is found right."""
    parser = make_parser("bench", bench_command, "[TARGET ...]")
    text = "op, model or all (the default), or ops by their names."
    parser.add_argument("targets", nargs="*", type=str, default=[], help=text)
    parser.add_argument("-k", "--only", type=str | None, default=None, help="Only rows that this pytest -k names.")
    text = "File of the result, written anew; null: runs/bench/result.json."
    parser.add_argument("--json", type=str | None, default=None, metavar="FILE", help=text)
    text = "Folder for PNG charts; null: no charts."
    parser.add_argument("--charts", type=str | None, default=None, metavar="FOLDER", help=text)
    add_device(parser)
    text = "Seconds after which the rest is left out; null: no limit."
    parser.add_argument("--budget", type=float | None, default=None, metavar="NUMBER", help=text)
    args = parse(parser, argv)
    if not (ROOT / "bench" / "__main__.py").is_file():
        raise ValueError("the benchmarks are in tmask's source, not in the installed package: run it in a checkout")
    for target in args.targets:
        if target not in (known := {*GROUPS, *op_names()}):
            raise UsageError(f"unknown op {target!r}: expected {nearest(target, known)}")
    device = usage(lambda: device_of(args.device))
    command = [sys.executable, "-m", "bench", "run", *args.targets]
    if args.budget is not None and not args.budget > 0:
        raise UsageError(f"--budget: expected more than 0 seconds, got {args.budget:g}")
    if args.json is not None:
        if Path(args.json).is_dir():
            raise UsageError(f"--json {args.json}: expected a file, got a folder")
        check_out(Path(args.json).parent, "json")
        command += ["--json", str(Path(args.json).resolve())]
    if args.charts is not None:
        check_out(Path(args.charts), "charts")
        command += ["--charts", str(Path(args.charts).resolve())]
    command += ["-k", args.only] if args.only else []
    command += ["--budget", str(args.budget)] if args.budget is not None else []
    missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the benchmarks need {' and '.join(missing)}: pip install 'tmask[dev]'")
    return run(command, environment(device))


def op_names() -> list[str]:
    """The names by which ``tmask bench`` knows the ops."""
    return sorted(path.stem for path in (ROOT / "bench" / "cases").glob("[!_]*.py"))


def environment(device: Any) -> dict[str, str]:
    """Return the environment of this process in which only `device` is visible."""
    changed = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if device.type == "cpu":
        changed["CUDA_VISIBLE_DEVICES"] = ""
    elif device.index is not None:
        seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        changed["CUDA_VISIBLE_DEVICES"] = seen[device.index] if seen else str(device.index)
    return {**os.environ, **changed}


def run(command: list[str], env: dict[str, str]) -> int:
    """Run a command to its end and return its exit code.

    A signal to this process stops the command too; the command still shows what it has measured.
    """
    from tmask.engine.interrupt import StopSignals

    with StopSignals() as stop:
        process = subprocess.Popen(command, cwd=ROOT, env=env)
        try:
            with stop.at_once():
                return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # a terminal has sent it one already; it heeds the first alone
            process.wait()
            raise
