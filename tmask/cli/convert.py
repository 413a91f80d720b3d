"""``tmask convert``."""

from __future__ import annotations

from pathlib import Path

from tmask.cli.common import UsageError, check_out
from tmask.cli.options import make_parser, parse


def convert_command(argv: list[str]) -> int:
    """Make a checkpoint of torchvision's COCO weights, with COCO's class names."""
    parser = make_parser("convert", convert_command, "WEIGHTS --out FILE")
    text = "File of torchvision's Mask or Faster R-CNN, such as maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth."
    parser.add_argument("weights", type=str, metavar="WEIGHTS", help=text)
    parser.add_argument("--out", type=str, required=True, metavar="FILE", help="The checkpoint; must not exist yet.")
    text = "Number added to a variance; null: 0 for torchvision's published files, else 1e-5."
    parser.add_argument("--norm_eps", type=float | None, default=None, metavar="NUMBER", help=text)
    args = parse(parser, argv)
    from tmask.engine.checkpoint import save_model
    from tmask.weights import coco_categories, load_torchvision, missing_weights

    if not Path(args.weights).is_file():
        raise UsageError(missing_weights("WEIGHTS", args.weights))
    out = Path(args.out)
    check_out(out.parent)
    if out.exists():
        raise UsageError(f"--out {out}: expected a new file, got one that exists")
    try:
        model = load_torchvision(args.weights, **({} if args.norm_eps is None else {"norm_eps": args.norm_eps}))
    except ValueError as error:
        raise ValueError(f"{args.weights}: {str(error).removeprefix('state_dict: ')}") from error
    config, categories = model.config, coco_categories()
    if config.num_classes != len(categories) + 1:
        expected = f"COCO's {len(categories) + 1} classes with the background"
        raise ValueError(f"{args.weights}: expected {expected}, got {config.num_classes}; see tmask.load_torchvision")
    save_model(out, model, categories)
    print(f"{out}: {config.backbone}, norm_eps {config.norm_eps:g}, {'masks' if config.masks else 'boxes alone'}")
    print(f"next: tmask predict --checkpoint {out} --images FOLDER --out FOLDER")
    return 0
