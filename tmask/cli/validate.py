"""``tmask validate`` and ``tmask info``: what the ops do on this machine."""

from __future__ import annotations

import os
import subprocess
import sys

from tmask.cli.common import device_of, usage
from tmask.cli.options import add_device, make_parser, parse


def validate_command(argv: list[str]) -> int:
    """Compare every op of tmask_kernels, on every backend and dtype, with its float64 reference."""
    from tmask.validate import run_validation, select_ops
    from tmask_kernels.backend import interpreter_enabled
    from tmask_kernels.machine import triton_fault

    parser = make_parser("validate", validate_command)
    text = "Only these ops, such as nms,roi_align; null: all."
    parser.add_argument("--ops", type=str | None, default=None, metavar="NAMES", help=text)
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="Print the rows as JSON, at the end.")
    args = parse(parser, argv)
    device = usage(lambda: device_of(args.device))
    # The quotes and brackets are of a JSON list.
    ops = None if args.ops is None else [name.strip(" []\"'") for name in args.ops.split(",")]
    usage(lambda: select_ops(ops))
    if device.type == "cpu" and not interpreter_enabled() and triton_fault() is None:
        return _interpreted([*argv, "--device", "cpu"])
    return run_validation(device, ops=ops, as_json=args.json)


def _interpreted(argv: list[str]) -> int:
    """The command again under Triton's interpreter, which must be on before Python imports Triton."""
    command = [sys.executable, "-m", "tmask", "validate", *argv]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    if os.name == "posix":  # the same process: a signal reaches it, and its exit code is this one's
        os.execve(sys.executable, command, environment)
    return subprocess.run(command, env=environment, check=False).returncode


def info_command(argv: list[str]) -> int:
    """Show versions, devices, presets and which backend serves each op here, with the reasons."""
    from tmask.validate import describe

    parse(make_parser("info", info_command), argv)
    print(describe())
    return 0
