"""The command line: ``tmask train | eval | predict | convert | demo | validate | info | bench | ablate``, a file each.

Each command builds its own parser when the command is called.
Exit codes: 0 done; 1 the run failed; 2 the command line or a config file is wrong; 130 interrupted (143 by SIGTERM).
An error is one line on stderr; ``TMASK_DEBUG=1`` shows the traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from tmask.checks import nearest
from tmask.cli.ablate import ablate_command
from tmask.cli.bench import bench_command
from tmask.cli.common import UsageError, describe_error, fail, one_line
from tmask.cli.convert import convert_command
from tmask.cli.demo import demo_command
from tmask.cli.eval import eval_command
from tmask.cli.predict import predict_command
from tmask.cli.train import train_command
from tmask.cli.validate import info_command, validate_command

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train_command,
    "eval": eval_command,
    "predict": predict_command,
    "convert": convert_command,
    "demo": demo_command,
    "validate": validate_command,
    "info": info_command,
    "bench": bench_command,
    "ablate": ablate_command,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"tmask {version('tmask')}")
        return 0
    name = args[0]
    python_format = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"tmask {name}: warning: {one_line(str(message))}\n"
    try:
        if name not in COMMANDS:
            raise UsageError(f"unknown command {name!r}: expected {nearest(name, COMMANDS)}")
        return COMMANDS[name](args[1:])
    except SystemExit as stop:  # --help and --print_config end this way
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt as stop:
        return fail(f"tmask {name}: {str(stop) or 'interrupted'}", getattr(stop, "exit_code", 130))
    except (UsageError, argparse.ArgumentError) as error:
        if _debug():
            raise
        prog = f"tmask {name}" if name in COMMANDS else "tmask"
        return fail(f"{prog}: error: {error} (see {prog} --help)", 2)
    except Exception as error:  # users see one line, not a traceback
        if _debug():
            raise
        return fail(f"tmask {name}: error: {describe_error(error)}", 1)
    finally:
        warnings.formatwarning = python_format


def _debug() -> bool:
    return os.environ.get("TMASK_DEBUG") == "1"


def _help() -> str:
    lines = ["usage: tmask COMMAND [options]", ""]
    lines += [f"  {name:<9} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "tmask COMMAND --help shows the options. TMASK_DEBUG=1 shows tracebacks."])
