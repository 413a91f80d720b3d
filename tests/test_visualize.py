import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from torchvision.tv_tensors import BoundingBoxes

from tmask import visualize
from tmask.visualize import comparison, draw_instances, grid, save_png

NAMES = ["disc", "square"]


def grey(height=40, width=60):
    return torch.full((3, height, width), 128, dtype=torch.uint8)


def result(height=40, width=60, **extra):
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, 5:15, 5:20] = True
    masks[1, 20:35, 30:50] = True
    boxes = torch.tensor([[5.0, 5.0, 20.0, 15.0], [30.0, 20.0, 50.0, 35.0]])
    return {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks, **extra}


def forms(masks):
    runs = coco_mask.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))
    return {
        "bool": masks,
        "uint8": masks.to(torch.uint8),
        "probability": masks.float() * 0.9,
        "torchvision": masks[:, None].float() * 0.9,
        "bytes": runs,
        "text": [{"size": run["size"], "counts": run["counts"].decode()} for run in runs],
    }


def test_every_form_of_mask_draws_the_same():
    first = None
    for name, masks in forms(result()["masks"]).items():
        picture = draw_instances(grey(), {**result(), "masks": masks}, NAMES)
        first = picture if first is None else first
        assert torch.equal(picture, first), name


def test_boxes_of_torchvision_s_other_formats_draw_the_same():
    boxes = BoundingBoxes([[5.0, 5, 15, 10], [30, 20, 20, 15]], format="XYWH", canvas_size=(40, 60))
    picture = draw_instances(grey(), result() | {"boxes": boxes}, NAMES)
    assert torch.equal(picture, draw_instances(grey(), result(), NAMES))


def test_skeletons_are_drawn_between_visible_keypoints():
    keypoints = torch.zeros(2, 3, 3)
    keypoints[0] = torch.tensor([[8.0, 8.0, 1.0], [50.0, 8.0, 2.0], [50.0, 35.0, 0.0]])
    picture = draw_instances(grey(), result(keypoints=keypoints), NAMES, edges=[(0, 1), (1, 2)])
    plain = draw_instances(grey(), result(), NAMES)
    scale = picture.shape[2] // 60
    drawn = (picture != plain).any(0)
    assert drawn[8 * scale, 22 * scale : 48 * scale].all()  # the line from the first to the second
    assert not drawn[12 * scale :].any()  # none to the third, and no dot there
    without = draw_instances(grey(), result(keypoints=keypoints), NAMES)
    assert (without != plain).any(0)[8 * scale, 8 * scale]  # the dots alone
    assert not (without != plain).any(0)[8 * scale, 20 * scale : 40 * scale].any()


def test_each_instance_has_its_colour_inside_its_mask_and_the_rest_is_untouched():
    """One class and no score: no label lies over the masks."""
    one = {**result(), "labels": torch.tensor([1, 1])}
    picture = draw_instances(grey(), one, ["nucleus"], side=40)
    assert picture[:, 10, 12].tolist() != picture[:, 30, 40].tolist()
    drawn = (picture != 128).any(0)
    assert torch.equal(drawn, result()["masks"].any(0))


def test_no_instances_give_the_plain_image():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    for masks in (None, [], torch.zeros(0, 40, 60, dtype=torch.bool)):
        assert torch.equal(draw_instances(grey(), {**empty, "masks": masks}, NAMES, side=40), grey())


def test_scores_below_the_bound_are_left_out():
    scores = torch.tensor([0.2, 0.9])
    picture = draw_instances(grey(), result(scores=scores), NAMES, min_score=0.5)
    assert picture[:, 10 * 13, 12 * 13].tolist() == [128] * 3
    assert picture[:, 30 * 13, 40 * 13].tolist() != [128] * 3


def test_boxes_alone_and_boxes_beyond_the_image():
    boxes = torch.tensor([[-10.0, -10.0, 500.0, 400.0], [50.0, 30.0, 20.0, 10.0], [float("nan"), 0.0, 5.0, 5.0]])
    picture = draw_instances(grey(), {"boxes": boxes, "labels": torch.tensor([1, 1, 2])}, NAMES)
    assert (picture != 128).any()


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("names", [NAMES, ["nucleus"]], ids=["two classes", "one class"])
def test_labels_stand_above_the_box_and_a_single_class_is_not_named(names, scored):
    one = {**result(), "labels": torch.tensor([1, 1]), "masks": None}
    if scored:
        one["scores"] = torch.tensor([0.5, 0.5])
    above = draw_instances(grey(), one, names)[:, : 5 * 13, 5 * 13 : 20 * 13]
    assert (above != 128).any() == (scored or len(names) > 1)


def test_labels_that_would_hide_others_are_left_out():
    """Fifty labels of one box: only as many as find room around it, none over another."""
    draw, taken = ImageDraw.Draw(Image.new("RGB", (400, 400))), []
    for _ in range(50):
        arguments = ("square 0.50", (150.0, 150.0, 250.0, 250.0), (255, 0, 0), visualize._font(14), (400, 400))
        visualize._write_label(draw, *arguments, taken)
    assert 4 <= len(taken) <= 8
    assert all(visualize._overlap(a, b) == 0 for a, b in itertools.combinations(taken, 2))


@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [(1, 1, 512), (1, 3000, 1), (3000, 1, 1), (20, 400, 5), (40, 60, 13), (600, 900, 1)],
)
def test_small_images_are_enlarged_within_reason(height, width, factor):
    boxes = torch.tensor([[0.0, 0.0, width, height]])
    masks = torch.ones(1, height, width, dtype=torch.bool)
    found = {"boxes": boxes, "labels": torch.tensor([2]), "scores": torch.tensor([0.5]), "masks": masks}
    picture = draw_instances(grey(height, width), found, ["a", "a long name"])
    assert picture.shape == (3, height * factor, width * factor)
    assert (picture != 128).any()


def test_names_are_written_if_the_font_can_and_cut_where_the_picture_ends():
    font = visualize._font(14)
    for name in ("disc", "Löwe", "велосипед", "κύκλος", "two words"):
        assert visualize._label(name, "class 7", "0.50", font, 1000) == f"{name} 0.50"
    assert visualize._label("汽车", "class 7", "0.50", font, 1000) == "class 7 0.50"
    assert visualize._label("two\n lines", "class 7", "", font, 1000) == "two lines"
    assert visualize._label("", "class 7", "0.50", font, 1000) == "0.50"
    assert visualize._label("", "class 7", "", font, 1000) == ""
    long = visualize._label("x" * 500, "class 7", "0.50", font, 200)
    assert long.startswith("xxxx")
    assert long.endswith("x… 0.50")
    assert 150 < font.getlength(long) <= 200
    assert len(visualize._label("i" * 500, "class 7", "", font, 10**6)) == visualize._MAX_NAME + 1


def many(count, height, width, side):
    """`count` squares in a row-by-row lattice, the later the surer."""
    corners = [(10 + 1.5 * side * (k % 20), 10 + 1.5 * side * (k // 20)) for k in range(count)]
    boxes = torch.tensor([[x, y, x + side, y + side] for x, y in corners])
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    labels = torch.ones(count, dtype=torch.int64)
    return {"boxes": boxes, "labels": labels, "scores": torch.arange(count) / count, "masks": masks}


def test_a_crowd_stays_visible_and_the_surest_are_labelled():
    """Three hundred instances, whose labels would hide nearly all."""
    found = many(300, 600, 900, 24)
    bare = draw_instances(grey(600, 900), {**found, "scores": None}, ["nucleus"])
    picture = draw_instances(grey(600, 900), found, ["nucleus"])
    labelled = (picture != bare).any(0)
    assert 0.1 < labelled.float().mean() < 0.25
    assert labelled[400:].float().mean() > 2 * labelled[:400].float().mean()


def test_run_lengths_are_decoded_one_at_a_time():
    found = many(50, 1000, 1000, 40)
    found["masks"] = coco_mask.encode(np.asfortranarray(found["masks"].permute(1, 2, 0).numpy().astype(np.uint8)))
    image = grey(1000, 1000)
    draw_instances(image, found, ["nucleus"])
    tracemalloc.start()
    draw_instances(image, found, ["nucleus"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 1000 * 1000  # the masks of all are 50


def test_masks_are_tinted_and_outlined_pixel_by_pixel():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    mask = np.zeros((30, 40), dtype=bool)
    mask[3:20, 5:30] = True
    mask[:10, 8:15] = True
    mask[12, 12] = False
    for line in (1, 2, 5):
        colour, expected = (250, 10, 77), pixels.copy()
        for y, x in zip(*np.nonzero(mask), strict=True):
            around = [(y + dy, x + dx) for dy in range(-line, line + 1) for dx in range(-line, line + 1)]
            whole = all(0 <= v < 30 and 0 <= u < 40 and mask[v, u] for v, u in around)
            tint = pixels[y, x] * (1 - visualize.MASK_ALPHA) + np.array(colour) * visualize.MASK_ALPHA
            expected[y, x] = tint.astype(np.uint8) if whole else colour
        drawn = pixels.copy()
        visualize._tint(drawn, mask, colour, line=line)
        assert np.array_equal(drawn, expected)


def test_masks_without_a_pixel_draw_their_box_alone():
    found = {**result(), "masks": torch.zeros(2, 40, 60, dtype=torch.bool)}
    for masks in forms(found["masks"]).values():
        picture = draw_instances(grey(), {**found, "masks": masks}, NAMES)
        assert torch.equal(picture, draw_instances(grey(), {**found, "masks": None}, NAMES))


def test_image_and_result_are_not_changed():
    image, found = grey(), result(scores=torch.tensor([0.5, 0.6]))
    before = {name: value.clone() for name, value in found.items()}
    draw_instances(image, found, NAMES)
    assert torch.equal(image, grey())
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_grid_places_pictures_of_unequal_sizes():
    a, b, c = (torch.full((3, h, w), v, dtype=torch.uint8) for h, w, v in [(10, 20, 1), (30, 10, 2), (5, 5, 3)])
    out = grid([a, b, c], columns=2)
    assert out.shape == (3, 30 + 5 + 3 * 8, 20 + 10 + 3 * 8)
    for value, picture in ((1, a), (2, b), (3, c)):
        assert (out == value).sum() == picture.numel()
    captioned = grid([a, b, c], columns=2, captions=["a", "b", "c"])
    assert captioned.shape[1] > out.shape[1]


def test_comparison_puts_the_prediction_left_of_the_truth(tmp_path):
    scores = torch.tensor([0.9, 0.1])
    picture = comparison(grey(), result(scores=scores), result(), NAMES)
    assert picture.shape[2] == 2 * 60 * 13 + 3 * 8
    save_png(tmp_path / "new" / "a.png", picture)
    read = np.array(Image.open(tmp_path / "new" / "a.png"))
    assert np.array_equal(read, picture.permute(1, 2, 0).numpy())
    with (tmp_path / "open").open("wb") as file:
        save_png(file, picture)
    assert (tmp_path / "open").read_bytes() == (tmp_path / "new" / "a.png").read_bytes()
    left, right = picture[:, -520:, 8:788], picture[:, -520:, -788:-8]
    assert ((left - right).abs() > 0).any(0)[26 * 10 :, 30 * 10 :].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_instances(grey().float(), result(), NAMES), r"image: expected uint8 \[3, H, W\]"),
        (lambda: draw_instances(grey(), result(20, 60), NAMES), "masks: expected 2 of 40x60 pixels"),
        (lambda: draw_instances(grey(), {**result(), "masks": result()["masks"][:1]}, NAMES), "got 1 of 40x60"),
        (
            lambda: draw_instances(grey(), {**result(), "masks": forms(result(9, 8)["masks"])["text"]}, NAMES),
            "got 2 of 9x8",
        ),
        (lambda: draw_instances(grey(), {**result(), "labels": torch.tensor([1, 3])}, NAMES), "labels: expected 1..2"),
        (lambda: grid([], columns=2), "pictures: expected at least one"),
        (lambda: grid([grey()], columns=0), "columns: expected at least 1"),
        (lambda: grid([grey()], columns=1, captions=[]), "captions: expected 1"),
    ],
    ids=["image", "masks", "count", "run lengths", "labels", "pictures", "columns", "captions"],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
