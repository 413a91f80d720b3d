"""The confusion matrix is counted right, and the pictures show whole labels, however many classes there are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.predictions import read_pixels
from tmask.engine import plots
from tmask.engine.evaluate import coco_metrics

NAMES = ["cat", "dog", "cow"]


def data(names: list[str], objects: list[tuple[int, int, int, int]], found: list[tuple[int, int, int, float]]) -> Any:
    """Objects (image, class, x, iscrowd) and detections (image, class, x, score) of 10 x 10 pixels at (x, 0)."""
    truth = {
        "images": [{"id": 2**63 + i, "height": 20, "width": 400} for i in range(2)],
        "categories": [{"id": -k, "name": name} for k, name in enumerate(reversed(names))][::-1],
        "annotations": [],
    }
    ids = [item["id"] for item in sorted(truth["categories"], key=lambda item: item["id"])]
    for image, k, x, crowd in objects:
        truth["annotations"].append(
            {"id": 0, "image_id": 2**63 + image, "category_id": ids[k], "bbox": [x, 0, 10, 10], "iscrowd": crowd}
        )
    results = [
        {"image_id": 2**63 + image, "category_id": ids[k], "bbox": [x, 0, 10, 10], "score": score}
        for image, k, x, score in found
    ]
    return truth, results


def test_the_confusion_matrix_is_counted_by_its_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = [(0, 0, 0, 0), (0, 0, 50, 0), (0, 1, 100, 0), (0, 1, 200, 0), (1, 2, 0, 0), (1, 2, 300, 1)]
    found = [
        (0, 0, 1, 0.9),  # right
        (0, 1, 50, 0.8),  # of another class, and first: takes the object from the next
        (0, 0, 51, 0.7),  # no object is left: background
        (0, 1, 100, 0.5),  # right, just sure enough
        (0, 1, 200, 0.49),  # not sure enough: the dog is not found
        (0, 2, 150, 0.9),  # nothing there
        (1, 2, 6, 0.9),  # IoU 0.25: the cow is not found, and there is no object
        (1, 2, 300, 0.9),  # in a crowd: does not count
        (0, 2, 0, 0.95),  # IoU 0.82 with the first cat, best of all... taken below
    ]
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "draw_confusion", lambda *given: drawn.append(given))
    truth, results = data(NAMES, objects, found[:-1])
    coco_metrics(truth, results, kinds=["bbox"], plots=tmp_path)
    path, counts, names, kind, score, iou = drawn[0]
    assert (path, names, kind, score, iou) == (tmp_path / "confusion-bbox.png", NAMES, "bbox", 0.5, 0.5)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1], [1, 0, 2, 0]]
    truth, results = data(NAMES, objects, found)  # the best detection takes the first cat as a cow
    coco_metrics(truth, results, kinds=["bbox"], plots=tmp_path)
    assert drawn[1][1].tolist() == [[0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 1], [2, 0, 2, 0]]


def is_framed(path: Path) -> bool:
    """Whether nothing reaches the edge of the picture, and something is in it."""
    pixels = read_pixels(path).permute(1, 2, 0).numpy()
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return bool((edges == 255).all() and (pixels < 255).any())


@pytest.mark.parametrize(
    ("count", "name"),
    [(1, "W" * 60), pytest.param(31, "W" * 60, marks=pytest.mark.slow), (2, "cat"), (2, "$x^{2$_"), (3, "鸟")],
)
def test_no_label_is_cut(count: int, name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    names = [f"{name} {k}" if name == "cat" else name for k in range(count)]
    objects = [(0, k, k, 0) for k in range(count)]
    truth, results = data(names, objects, [(0, k, k, 0.9) for k in range(count)])
    coco_metrics(truth, results, kinds=["bbox"], plots=tmp_path / "new")
    assert [path.name for path in sorted((tmp_path / "new").iterdir())] == [
        "confusion-bbox.png",
        "precision-recall-bbox.png",
    ]
    assert all(is_framed(path) for path in (tmp_path / "new").iterdir())
    assert not recwarn.list


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """matplotlib's figures in place of their files."""
    from matplotlib.figure import Figure

    saved: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: saved.append(self) or file.write(b"x"))
    return saved


def test_the_curves_are_those_of_the_figures(tmp_path: Path, figures: list[Any]) -> None:
    """Read from the picture's axes: the area below the mean curve is the AP that the panel names."""
    objects = [(0, k, 20 * i + 100 * k, 0) for k in range(2) for i in range(5)]
    found = [(0, k, 20 * i + 100 * k + 2 * k, 0.9 - i / 10 - k / 20) for k in range(2) for i in range(4)]
    truth, results = data(NAMES, objects, [*found, (0, 1, 350, 0.85)])
    metrics = coco_metrics(truth, results, kinds=["bbox"], plots=tmp_path)
    curves, confusion = figures
    panels = {axes.get_title(): axes for axes in curves.axes}
    assert list(panels) == [
        f"{key} {100 * metrics[f'bbox/AP{end}']:5.1f}"
        for key, end in (("all classes", ""), ("cat", "/cat"), ("dog", "/dog"))
    ]
    for axes, end in zip(panels.values(), ("", "/cat", "/dog"), strict=True):
        lines = {line.get_label(): line.get_ydata() for line in axes.lines}
        for label, name in (("IoU 0.5", "AP50"), ("IoU 0.75", "AP75"), ("mean over IoU 0.5 to 0.95", "AP")):
            assert lines[label].mean() == pytest.approx(metrics[f"bbox/{name}{end}"])
    assert 0 < metrics["bbox/AP/dog"] < metrics["bbox/AP50/dog"] < metrics["bbox/AP50/cat"] < 1
    matrix = confusion.axes[0]
    assert [text.get_text() for text in matrix.get_yticklabels()] == ["cat", "dog", "background"]  # no cow anywhere
    assert [(text.get_position(), text.get_text()) for text in matrix.texts] == [
        ((0, 0), "4"), ((2, 0), "1"), ((1, 1), "4"), ((2, 1), "1"), ((1, 2), "1"),
    ]  # fmt: skip


def test_of_many_classes_those_with_the_most_objects_are_shown(
    tmp_path: Path, figures: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "_MOST_CLASSES", 2)
    objects = [(0, k, 20 * i + 100 * k, 0) for k, count in enumerate((2, 1, 3)) for i in range(count)]
    truth, results = data(NAMES, objects, [(image, k, x, 0.9) for image, k, x, _ in objects])
    coco_metrics(truth, results, kinds=["bbox"], plots=tmp_path)
    curves, confusion = figures
    assert [axes.get_title().split("  ")[0] for axes in curves.axes] == ["all classes", "cat", "cow"]
    assert [text.get_text() for text in confusion.axes[0].get_yticklabels()] == ["cat", "cow", "background"]
    assert all(any("2 of 3 classes" in text.get_text() for text in figure.texts) for figure in figures)


def test_without_objects_there_are_no_curves(tmp_path: Path) -> None:
    truth, results = data(NAMES, [], [(0, 0, 0, 0.9)])
    coco_metrics(truth, results, kinds=["bbox"], plots=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["confusion-bbox.png"]
