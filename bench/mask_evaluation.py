"""Evaluates a checkpoint's masks twice, as run lengths and as whole masks of the image, and compares the figures.

``python -m bench.mask_evaluation --checkpoint FILE --images DIR --annotations FILE`` runs the model once over the data
set. It prints how many masks differ, every COCO figure, and the time of each path. pycocotools encodes the whole masks.
The exit code is 1 if anything differs.
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
from tmask.engine.detect import coco_results
from tmask.engine.device import autocast
from tmask.engine.evaluate import coco_metrics
from tmask.model.postprocess import to_list


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.mask_evaluation", description=__doc__)
    for name in ("checkpoint", "images", "annotations"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    model, saved = load_model(options.checkpoint, device)
    training = saved["train_config"]
    dataset = CocoDataset(options.images, options.annotations)
    results: dict[str, list[dict[str, Any]]] = {"rle": [], "bool": []}  # by the form of masks, as `to_list` calls it
    seconds, largest = dict.fromkeys(results, 0.0), 0
    model.eval()
    with torch.inference_mode():
        for batch in make_loader(dataset, model.transform, batch_size=training["batch_size"], shuffle=False):
            with autocast(device, training["precision"]):
                found = model.forward_padded(batch.images, compact=True)
            for form in results:
                start = time.perf_counter()
                images = to_list(found, batch.images.sizes, batch.original_sizes, masks=form, convention=model.paste)
                for image_id, image in zip(batch.image_ids, images, strict=True):
                    if form == "bool":
                        largest = max(largest, image["masks"].numel())
                        image["masks"] = encode(image["masks"])
                    results[form] += coco_results(image_id, image, dataset.category_ids)
                seconds[form] += time.perf_counter() - start

    differ = sum(a != b for a, b in zip(*results.values(), strict=True))
    print(f"{len(dataset)} images, {len(results['rle'])} detections, {differ} masks differ")
    print(f"largest whole masks of one image: {largest / 1e6:.1f} MB")
    print(f"time of run lengths / time of whole masks: {seconds['rle'] / seconds['bool']:.3f}")
    limit = training["eval_max_detections"]
    rle, whole = (coco_metrics(dataset.coco.dataset, found, max_detections=limit) for found in results.values())
    for name, value in rle.items():
        other = whole[name]
        print(f"{name:<24} {value!r:<22} " + ("the same" if value == other else f"{other!r} by whole masks"))
    return int(differ > 0 or rle != whole)


def encode(masks: torch.Tensor) -> list[dict[str, Any]]:
    """pycocotools' run lengths of whole masks, [K, H, W] bool."""
    from pycocotools import mask as coco_mask

    columns = masks.to(torch.uint8).permute(1, 2, 0).numpy()  # [H, W, K]; pycocotools wants Fortran's order
    runs = coco_mask.encode(columns.copy(order="F"))
    return [{"size": list(run["size"]), "counts": run["counts"].decode()} for run in runs]


if __name__ == "__main__":
    sys.exit(main())
