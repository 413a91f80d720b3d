"""``tmask ablate``: the ablations of the checkout, which the installed package does not hold."""

from __future__ import annotations

import sys
from pathlib import Path

from tmask.checks import nearest
from tmask.cli import bench
from tmask.cli.common import UsageError, check_out, device_of, usage
from tmask.cli.options import add_device, make_parser, parse


def ablate_command(argv: list[str]) -> int:
    """Train the variants of a published table with several seeds: did its direction come out?"""
    parser = make_parser("ablate", ablate_command, "NAME")
    parser.add_argument("name", type=str, help=f"The table: {', '.join(table_names())}.")
    text = "Runs of each variant, at least 1; a later call may add more. (default: %(default)s)"
    parser.add_argument("--seeds", type=int, default=3, metavar="INT", help=text)
    text = "Folder of the table; null: runs/ablate/NAME."
    parser.add_argument("--out", type=str | None, default=None, metavar="FOLDER", help=text)
    add_device(parser)
    text = "Folder of COCO 2017, to train R50 (or R101) at full size on a GPU; null: a tiny model on drawn shapes."
    parser.add_argument("--coco", type=str | None, default=None, metavar="FOLDER", help=text)
    text = "File of torchvision's ImageNet weights, with --coco."
    parser.add_argument("--backbone_weights", type=str | None, default=None, metavar="FILE", help=text)
    parser.add_argument("--background", action="store_true", help="Go on without this terminal.")
    args = parse(parser, argv)
    if not (bench.ROOT / "bench" / "ablate" / "__main__.py").is_file():
        raise ValueError("the ablations are in tmask's source, not in the installed package: run it in a checkout")
    if args.name not in table_names():
        raise UsageError(f"unknown table {args.name!r}: expected {nearest(args.name, table_names())}")
    if args.seeds < 1:
        raise UsageError(f"--seeds: expected at least 1, got {args.seeds}")
    if args.coco is not None and not Path(args.coco).is_dir():
        raise UsageError(f"--coco: no such folder: {args.coco}")
    device = usage(lambda: device_of(args.device))
    out = Path(args.out or Path("runs", "ablate", args.name))
    check_out(out)
    command = [sys.executable, "-m", "bench.ablate", args.name, "--seeds", str(args.seeds), "--out", str(out.resolve())]
    for name in ("coco", "backbone_weights"):
        path = getattr(args, name)
        command += [f"--{name}", str(Path(path).resolve())] if path is not None else []
    command += ["--background"] if args.background else ["--with_parent"]
    return bench.run(command, bench.environment(device))


def table_names() -> list[str]:
    """Return the names of the tables; an installed package has none."""
    import yaml

    path = bench.ROOT / "bench" / "ablate" / "tables.yaml"
    return sorted(yaml.safe_load(path.read_text(encoding="utf-8"))["tables"]) if path.is_file() else []
