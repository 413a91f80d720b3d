"""``tmask validate`` and ``tmask info``: what the ops do on this machine."""

from __future__ import annotations

from tmask.cli.common import device_of, make_parser, parse, usage


def validate_command(argv: list[str]) -> int:
    """Compare every op of tmask_kernels, on every backend and dtype, with its float64 reference."""
    from tmask.validate import run_validation, select_ops

    parser = make_parser("validate", validate_command)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--ops", type=list[str] | None, default=None, help='only these ops, e.g. ["nms"]')
    args = parse(parser, argv)
    device = usage(lambda: device_of(args.device))
    usage(lambda: select_ops(args.ops))
    return run_validation(device, ops=args.ops, as_json=args.json)


def info_command(argv: list[str]) -> int:
    """Show versions, devices, presets and which backend serves each op here, with the reasons."""
    from tmask.validate import describe

    parse(make_parser("info", info_command), argv)
    print(describe())
    return 0
