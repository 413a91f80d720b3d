"""``tmask demo``."""

from __future__ import annotations

from pathlib import Path

from tmask.cli.common import check_out, check_precision, device_of, going_on, usage
from tmask.cli.options import options_of


def demo_command(argv: list[str]) -> int:
    """Make a data set of shapes, train the tiny preset on it, evaluate and draw."""
    from tmask.demo import DemoConfig, run_demo

    config: DemoConfig = options_of(DemoConfig, "demo", demo_command, argv)
    usage(lambda: check_precision(device_of(config.device), config.precision))
    check_out(Path(config.out))
    names = ("batch_size", "image_size", "precision", "num_workers")
    with going_on(Path(config.out), config.device, {f"--{name}": getattr(config, name) for name in names}):
        run_demo(config, device=device_of(config.device))
    return 0
