"""COCO evaluation of a checkpoint's masks twice: by run lengths, and by whole masks in the image.

``python -m bench.mask_evaluation --checkpoint FILE --images DIR --annotations FILE`` runs the model once over the data
set, turns its detections into COCO results on each path, and prints how many texts differ, every figure that does, and
the time of each path. The whole masks are `paste_masks`' bools, encoded by pycocotools. The exit code is 1 if anything
differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tmask.data.coco import CocoDataset
from tmask.data.loader import make_loader
from tmask.engine.checkpoint import load_model
from tmask.engine.device import autocast
from tmask.engine.evaluate import coco_metrics, coco_results
from tmask.model.postprocess import to_list

PATHS = ("rle", "bool")  # forms of `to_list`


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; 0 if both paths give the same."""
    parser = argparse.ArgumentParser(prog="python -m bench.mask_evaluation", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint.pt of a run")
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--annotations", type=Path, required=True, help="COCO annotation file")
    options = parser.parse_args(arguments)
    model, saved = load_model(options.checkpoint, torch.device("cpu"))
    training = saved["train_config"]
    dataset = CocoDataset(options.images, options.annotations)
    results, seconds, largest = detect(model, dataset, training["batch_size"], training["precision"])

    differ = sum(a != b for a, b in zip(*results.values(), strict=True))
    print(f"{len(dataset)} images, {len(results['rle'])} detections, {differ} masks differ")
    print(f"largest whole masks of one image: {largest / 1e6:.1f} MB")
    print(f"time of run lengths / time of whole masks: {seconds['rle'] / seconds['bool']:.3f}")
    limit = training["eval_max_detections"]
    metrics = {path: coco_metrics(dataset.coco.dataset, results[path], max_detections=limit) for path in PATHS}
    for name, value in metrics["rle"].items():
        other = metrics["bool"][name]
        print(f"{name:<24} {value!r:<22} " + ("the same" if value == other else f"{other!r} by whole masks"))
    return int(differ > 0 or metrics["rle"] != metrics["bool"])


def detect(
    model: Any, dataset: CocoDataset, batch_size: int, precision: str
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float], int]:
    """COCO results and seconds of each of PATHS, and the bytes of the largest image's whole masks."""
    results: dict[str, list[dict[str, Any]]] = {path: [] for path in PATHS}
    seconds, largest = dict.fromkeys(PATHS, 0.0), 0
    model.eval()
    with torch.inference_mode():
        for batch in make_loader(dataset, model.transform, batch_size=batch_size, shuffle=False):
            with autocast(torch.device("cpu"), precision):
                found = model.forward_padded(batch.images, compact=True)
            for path in PATHS:
                start = time.perf_counter()
                images = to_list(found, batch.images.sizes, batch.original_sizes, masks=path, convention=model.paste)
                for image_id, image in zip(batch.image_ids, images, strict=True):
                    if path == "bool":
                        largest = max(largest, image["masks"].numel())
                        image["masks"] = encode(image["masks"])
                    results[path] += coco_results(image_id, image, dataset.category_ids)
                seconds[path] += time.perf_counter() - start
    return results, seconds, largest


def encode(masks: torch.Tensor) -> list[dict[str, Any]]:
    """pycocotools' run lengths of whole masks, [K, H, W] bool."""
    from pycocotools import mask as coco_mask

    columns = masks.to(torch.uint8).permute(1, 2, 0).numpy()  # [H, W, K], which it wants in Fortran's order
    runs = coco_mask.encode(columns.copy(order="F"))
    return [{"size": list(run["size"]), "counts": run["counts"].decode()} for run in runs]


if __name__ == "__main__":
    sys.exit(main())
