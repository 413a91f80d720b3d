"""``tmask demo``."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

from tmask.cli.common import check_out, check_precision, device_of, going_on, make_parser, parse, usage
from tmask.config import from_dict


def demo_command(argv: list[str]) -> int:
    """Make a data set of shapes, train the tiny preset on it, evaluate and draw."""
    from tmask.demo import DemoConfig, run_demo

    parser = make_parser("demo", demo_command)
    hints = typing.get_type_hints(DemoConfig)
    for item in dataclasses.fields(DemoConfig):
        parser.add_argument(f"--{item.name}", type=hints[item.name], default=item.default, help=item.metadata["help"])
    args = parse(parser, argv)
    config = usage(lambda: from_dict(DemoConfig, args.as_dict()))
    usage(lambda: check_precision(device_of(config.device), config.precision))
    check_out(Path(config.out))
    names = ("batch_size", "image_size", "precision", "num_workers")
    with going_on(Path(config.out), config.device, {f"--{name}": getattr(config, name) for name in names}):
        run_demo(config, device=device_of(config.device))
    return 0
