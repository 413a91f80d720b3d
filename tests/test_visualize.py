import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from torchvision.tv_tensors import BoundingBoxes

from tmask.visualize import CROWD, FALSE, PARTS, comparison, draw_instances, grid, labels
from tmask.visualize.colours import SHADES, WRONG_COLOUR, choose_shades, colour_of
from tmask.visualize.instances import read_instances
from tmask.visualize.masks import MASK_ALPHA, crop_mask, draw_mask

NAMES = ["disc", "square"]
BARE = ("masks", "boxes", "keypoints")  # no text


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


def pixels(*arguments, **options):
    """The picture of `draw_instances`, [h, w, 3]."""
    return np.array(draw_instances(*arguments, **options)).astype(int)


def changed(picture, value=128):
    """Which pixels are not `value`, or not those of another picture: [h, w]."""
    return (picture != value).any(2)


@pytest.fixture
def texts(monkeypatch):
    """Every text that is written."""
    written, write = [], ImageDraw.ImageDraw.text

    def spy(self, place, text, *arguments, **options):
        written.append(text)
        write(self, place, text, *arguments, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    return written


def test_every_form_of_mask_and_image_draws_the_same():
    first = pixels(grey(), result(), NAMES)
    for name, masks in forms(result()["masks"]).items():
        assert np.array_equal(pixels(grey(), {**result(), "masks": masks}, NAMES), first), name
    array = np.ascontiguousarray(grey().permute(1, 2, 0).numpy())
    for image in (array, Image.fromarray(array), Image.fromarray(array).convert("RGBA")):
        assert np.array_equal(pixels(image, result(), NAMES), first)


def test_boxes_of_torchvision_s_other_formats_draw_the_same():
    boxes = BoundingBoxes([[5.0, 5, 15, 10], [30, 20, 20, 15]], format="XYWH", canvas_size=(40, 60))
    assert np.array_equal(pixels(grey(), result() | {"boxes": boxes}, NAMES), pixels(grey(), result(), NAMES))


def test_skeletons_are_drawn_between_visible_keypoints():
    keypoints = torch.zeros(2, 3, 3)
    keypoints[0] = torch.tensor([[8.0, 8.0, 1.0], [50.0, 8.0, 2.0], [50.0, 35.0, 0.0]])
    picture = pixels(grey(), result(keypoints=keypoints), NAMES, edges=[(0, 1), (1, 2)])
    plain = pixels(grey(), result(), NAMES)
    scale = picture.shape[1] // 60
    drawn = changed(picture, plain)
    assert drawn[8 * scale, 22 * scale : 48 * scale].all()  # the line from the first to the second
    assert not drawn[12 * scale :].any()  # none to the third, and no dot there
    dots = changed(pixels(grey(), result(keypoints=keypoints), NAMES), plain)
    assert dots[8 * scale, 8 * scale]
    assert not dots[8 * scale, 20 * scale : 40 * scale].any()


def test_a_class_has_its_colour_in_every_picture():
    """Whatever the order and the other instances."""
    whole = pixels(grey(), result(), NAMES, parts=["masks"])
    last = {name: value[1:] for name, value in result().items()}
    alone = pixels(grey(), last, NAMES, parts=["masks"])
    around = np.s_[20 * 13 - 5 : 35 * 13 + 5, 30 * 13 - 5 : 50 * 13 + 5]
    assert np.array_equal(whole[around], alone[around])
    assert whole[10 * 13, 12 * 13].tolist() != whole[30 * 13, 40 * 13].tolist()


def test_colours_of_classes_are_apart_and_none_is_that_of_an_error():
    for count in (2, 3, 5, 10):
        colours = [np.array(colour_of(label, count)) for label in range(1, count + 1)]
        assert min(np.abs(a - b).max() for a, b in itertools.combinations(colours, 2)) > 40
    for label, shade in itertools.product(range(1, 81), range(len(SHADES))):
        assert np.abs(np.array(colour_of(label, 80, shade)) - WRONG_COLOUR).max() > 60


def test_touching_instances_of_one_class_differ():
    """Rows of boxes that touch all their neighbours."""
    corners = [(10 * x, 10 * y) for y in range(6) for x in range(8)]
    boxes = np.array([[x, y, x + 10.5, y + 10.5] for x, y in corners])
    shades = choose_shades(boxes, np.ones(len(boxes)))
    for (a, p), (b, q) in itertools.combinations(zip(shades, corners, strict=True), 2):
        assert a != b or max(abs(p[0] - q[0]), abs(p[1] - q[1])) > 10
    order = np.random.default_rng(0).permutation(len(boxes))
    assert np.array_equal(choose_shades(boxes[order], np.ones(len(boxes))), shades[order])
    assert not choose_shades(boxes * [1, 1, 0.5, 0.5], np.arange(len(boxes))).any()  # one of each class: its own colour
    colours = [np.array(colour_of(1, 1, shade)) for shade in range(len(SHADES))]
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(colours, 2)) > 40


def test_no_instances_give_the_plain_image():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    for masks in (None, [], torch.zeros(0, 40, 60, dtype=torch.bool)):
        picture = pixels(grey(), {**empty, "masks": masks}, NAMES, side=40)
        assert picture.shape == (40, 60, 3)
        assert not changed(picture).any()


def test_scores_below_the_bound_are_left_out():
    picture = pixels(grey(), result(scores=torch.tensor([0.2, 0.9])), NAMES, min_score=0.5)
    assert picture[10 * 13, 12 * 13].tolist() == [128] * 3
    assert picture[30 * 13, 40 * 13].tolist() != [128] * 3


def test_boxes_alone_and_boxes_beyond_the_image():
    boxes = torch.tensor([[-10.0, -10.0, 500.0, 400.0], [50.0, 30.0, 20.0, 10.0], [float("nan"), 0.0, 5.0, 5.0]])
    assert changed(pixels(grey(), {"boxes": boxes, "labels": torch.tensor([1, 1, 2])}, NAMES)).any()


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("names", [NAMES, ["nucleus"]], ids=["two classes", "one class"])
def test_labels_stand_above_the_box_and_a_single_class_is_not_named(names, scored, texts):
    one = {**result(), "labels": torch.tensor([1, 1]), "masks": None}
    if scored:
        one["scores"] = torch.tensor([0.5, 0.25])
    above = pixels(grey(), one, names)[: 5 * 13, 5 * 13 : 20 * 13]
    assert changed(above).any() == (scored or len(names) > 1)
    name, scores = "disc" if len(names) > 1 else "", ["0.50", "0.25"] if scored else ["", ""]
    assert texts == [f"{names[0]} 2", *filter(None, (f"{name} {score}".strip() for score in scores))]


def many(count, seed, side=900):
    """Boxes of all sizes at random, which overlap more the more there are."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(np.log(8), np.log(200), (count, 2)))
    starts = rng.uniform(0, side - sizes)
    boxes = torch.from_numpy(np.hstack([starts, starts + sizes]))
    return {"boxes": boxes, "labels": torch.from_numpy(rng.integers(1, 3, count)), "scores": torch.rand(count)}


@pytest.mark.parametrize("count", [1, 20, 300])
def test_a_plate_covers_no_other_plate_and_little_of_any_object(count):
    for seed in range(3):
        found = read_instances(many(count, seed), ["disc", "a longer name"], (900, 900))
        draw = ImageDraw.Draw(Image.new("RGB", (900, 900)))
        plates = labels.draw_labels(draw, found, ["disc", "a longer name"], np.arange(count), (900, 900))
        assert min(count, 5) <= len(plates) <= count or found.sides.max() < 40
        assert (plates >= 0).all()
        assert (plates <= 900).all()

        def common(a, b):
            return np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0).prod()

        assert all(common(a, b) == 0 for a, b in itertools.combinations(plates, 2))
        for plate, box in itertools.product(plates, found.boxes):
            assert common(plate, box) <= 0.1 * (box[2:] - box[:2]).prod() + 1e-9


def test_the_surest_are_labelled_first(texts):
    boxes = torch.tensor([[100.0, 100.0, 200.0, 200.0]]).repeat(60, 1)
    found = {"boxes": boxes, "labels": torch.ones(60, dtype=torch.int64), "scores": torch.arange(60) / 100}
    draw_instances(grey(600, 600), found, ["nucleus"], parts=["labels"])
    assert texts == [f"{(59 - k) / 100:.2f}" for k in range(len(texts))]
    assert 4 <= len(texts) <= 8


def test_text_and_lines_follow_the_object_and_the_image():
    """In a picture of 3,000 pixels a small object has a thin line and small text, a large one both larger."""
    boxes = torch.tensor([[100.0, 100, 140, 140], [1000, 1000, 2900, 2900]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 1]), "scores": torch.tensor([0.9, 0.8])}
    lines = pixels(grey(3000, 3000), found, NAMES, parts=["boxes"])
    widths = [changed(lines)[120, 90:130].sum(), changed(lines)[2000, 990:1100].sum()]
    assert widths == [1, 6]
    text = changed(pixels(grey(3000, 3000), found, NAMES, parts=["labels"]))
    heights = [text[:200].any(1).sum(), text[900:].any(1).sum()]
    assert heights[0] < 25 < 60 < heights[1]


@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [(1, 1, 512), (1, 3000, 1), (3000, 1, 1), (20, 400, 5), (40, 60, 13), (600, 900, 1)],
)
def test_small_images_are_enlarged_within_reason(height, width, factor):
    boxes = torch.tensor([[0.0, 0.0, width, height]])
    masks = torch.ones(1, height, width, dtype=torch.bool)
    found = {"boxes": boxes, "labels": torch.tensor([2]), "scores": torch.tensor([0.5]), "masks": masks}
    picture = draw_instances(grey(height, width), found, ["a", "a long name"])
    assert picture.width == width * factor
    assert 10 < picture.height - height * factor < 60  # the legend
    bare = pixels(grey(height, width), found, ["a", "a long name"], parts=BARE)
    assert bare.shape == (height * factor, width * factor, 3)
    assert changed(bare).any()


@pytest.mark.parametrize("max_side", [128, 129, 333, 1000, 5000])
@pytest.mark.parametrize("size", [(40, 60), (900, 100), (1, 3000), (2000, 3000)])
def test_the_largest_side_holds_with_the_legend(size, max_side):
    """Of a class, and of eighty, whose legend has several rows."""
    for count in (1, 80):
        boxes = torch.tensor([[0.0, 0.0, size[1], size[0]]]).repeat(count, 1)
        found = {"boxes": boxes, "labels": torch.arange(count) + 1}
        names = [f"class of number {k}" for k in range(count)]
        picture = draw_instances(grey(*size), found, names, max_side=max_side)
        whole = draw_instances(grey(*size), found, names)
        assert max(picture.size) <= max_side
        assert max(picture.size) >= min(max_side - 2, max(whole.size)) or min(picture.size) < 50


def test_a_reduced_picture_shows_the_same_places():
    picture = changed(pixels(grey(), result(), NAMES, parts=["masks"], max_side=60 * 3))
    assert picture.shape == (40 * 3, 60 * 3)
    expected = result()["masks"].any(0).numpy().repeat(3, 0).repeat(3, 1)
    assert (picture != expected).mean() < 0.02


@pytest.mark.parametrize("part", PARTS)
def test_a_part_left_out_takes_away_exactly_that(part):
    keypoints = torch.tensor([[[8.0, 8.0, 1.0], [18.0, 13.0, 1.0]], [[35.0, 22.0, 1.0], [45.0, 30.0, 1.0]]])
    found = result(scores=torch.tensor([0.9, 0.8]), keypoints=keypoints)

    def drawn(*parts):
        return pixels(grey(), found, NAMES, parts=parts, edges=[(0, 1)])

    plain, alone, whole = drawn(), drawn(part), drawn(*PARTS)
    rest = drawn(*(item for item in PARTS if item != part))
    assert not changed(plain).any()
    height = 40 * 13
    if part == "legend":
        assert rest.shape[0] == height < whole.shape[0] == alone.shape[0]
        assert np.array_equal(rest, whole[:height])
        assert np.array_equal(alone[:height], plain)
        return
    taken = changed(whole[:height], rest[:height])
    assert taken.any()
    assert not (taken & ~changed(alone)).any()
    assert np.array_equal(whole[height:], rest[height:])


def test_names_are_written_if_the_font_can_and_cut_where_the_picture_ends():
    font = labels.font_of(14)
    for name in ("disc", "Löwe", "велосипед", "κύκλος", "two words"):
        assert labels._label(name, "class 7", "0.50", font, 1000) == f"{name} 0.50"
    assert labels._label("汽车", "class 7", "0.50", font, 1000) == "class 7 0.50"
    assert labels._label("two\n lines", "class 7", "", font, 1000) == "two lines"
    assert labels._label("", "class 7", "0.50", font, 1000) == "0.50"
    assert labels._label("", "class 7", "", font, 1000) == ""
    long = labels._label("x" * 500, "class 7", "0.50", font, 200)
    assert long.startswith("xxxx")
    assert long.endswith("x… 0.50")
    assert 150 < font.getlength(long) <= 200
    assert len(labels._label("i" * 500, "class 7", "", font, 10**6)) == labels._MAX_NAME + 1


def test_the_legend_counts_the_classes_shown(texts):
    """The most frequent first; what has no room is a number."""
    names = [f"class of number {k}" for k in range(80)]
    found = {"boxes": torch.zeros(83, 4), "labels": torch.tensor([*range(1, 81), 7, 7, 9])}
    draw_instances(grey(600, 600), found, names, parts=["legend"])
    assert texts[:3] == ["class of number 6 3", "class of number 8 2", "class of number 0 1"]
    assert texts[-1] == f"+ {80 - (len(texts) - 1)}"
    texts.clear()
    scores = torch.tensor([0.9, 0.1])
    draw_instances(grey(), result(scores=scores), NAMES, parts=["legend"], min_score=0.5)
    assert texts == ["disc 1"]


def test_run_lengths_are_cut_as_they_are_decoded():
    rng = np.random.default_rng(0)
    for height, width, density in itertools.product((1, 7, 40), (1, 9, 30), (0.0, 0.03, 0.5, 1.0)):
        dense = rng.random((height, width)) < density
        run = coco_mask.encode(np.asfortranarray(dense.astype(np.uint8)))
        for form in (run, {**run, "counts": run["counts"].decode()}, torch.from_numpy(dense)):
            cut, top, left = crop_mask(form)
            whole = np.zeros_like(dense)
            whole[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
            assert np.array_equal(whole, dense)
            assert not dense.any() or (cut[0].any() and cut[-1].any() and cut[:, 0].any() and cut[:, -1].any())


def test_a_small_mask_of_a_large_image_takes_little_memory():
    """Run lengths are decoded one at a time, and only the columns of the mask."""
    dense = np.zeros((8000, 8000), dtype=np.uint8, order="F")
    dense[4000:4040, 5000:5040] = 1
    run = coco_mask.encode(dense)
    tracemalloc.start()
    cut, top, left = crop_mask(run)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (cut.all(), cut.shape, top, left) == (True, (40, 40), 4000, 5000)
    assert peak < 3 * 40 * 8000
    with pytest.raises(ValueError, match="masks: expected COCO's compressed run lengths, got damaged ones"):
        crop_mask({"size": [8, 8], "counts": "!"})


def covered(mask, scale, line):
    """The weights of tint and outline, 0..255, of a mask drawn into black: [h, w] each."""
    canvas = Image.new("RGB", (round(mask.shape[1] * scale), round(mask.shape[0] * scale)))
    draw_mask(canvas, torch.from_numpy(mask), scale, (255, 0, 0), (0, 255, 0), line)
    return np.array(canvas)[..., 0], np.array(canvas)[..., 1]


@pytest.mark.parametrize(("scale", "line"), [(1.0, 1.0), (1.0, 2.0), (2.0, 1.5), (4.0, 2.0), (3.7, 1.0), (0.5, 1.0)])
def test_a_mask_is_tinted_inside_a_smooth_outline(scale, line):
    """A disc: the outline is a ring of width `line` around the tint, with steps of brightness across its edge."""
    radius, centre = 40, 50
    y, x = np.mgrid[:100, :100] + 0.5
    tint, outline = covered(np.hypot(x - centre, y - centre) < radius, scale, line)
    y, x = (np.mgrid[: tint.shape[0], : tint.shape[1]] + 0.5) / scale
    inside = (radius - np.hypot(x - centre, y - centre)) * scale  # distance to the edge in pixels of the picture
    slack = 1.0 + 0.5 * scale
    assert not tint[inside < -slack].any()
    assert not outline[(inside < -slack) | (inside > line + slack)].any()
    assert np.abs(tint[inside > line + slack] - 255 * MASK_ALPHA).max() <= 1
    area = outline.sum() / 255
    assert area == pytest.approx(2 * np.pi * (radius * scale - line / 2) * line, rel=0.06)


@pytest.mark.parametrize("scale", [2.0, 4.0, 8.0])
def test_an_enlarged_outline_has_no_steps(scale):
    """Of an edge that falls by a pixel in five, which the enlarged pixels show as stairs."""
    y, x = np.mgrid[:60, :60] + 0.5
    tint, outline = covered(y < 20 + x / 5, scale, 1.0)
    edge = np.maximum(tint / (255 * MASK_ALPHA), outline / 255)[:, int(10 * scale) : int(-10 * scale)].sum(0)
    assert np.abs(np.diff(edge)).max() < 0.45 * scale  # of stairs: scale
    line = scale * (20 + (np.arange(len(edge)) / scale + 10) / 5)
    assert np.abs(edge - line).max() < 0.5 * scale


def test_masks_of_few_pixels_stay_visible():
    for scale, line in ((1.0, 1.0), (1.0, 2.0), (4.0, 1.0), (0.25, 1.0)):
        mask = np.zeros((32, 32), dtype=bool)
        mask[9, 13] = True
        tint, outline = covered(mask, scale, line)
        assert np.maximum(tint, outline).max() > 60
        y, x = np.nonzero(outline > 30)
        assert ((y.mean() + 0.5) / scale, (x.mean() + 0.5) / scale) == pytest.approx(
            (9.5, 13.5), abs=0.5 / min(scale, 1)
        )
    stripe = np.zeros((32, 32), dtype=bool)
    stripe[4:28, 10:12] = True
    tint, outline = covered(stripe, 1.0, 1.0)
    assert (np.maximum(tint, outline)[6:26, 10:12].min()) > 60


def test_masks_without_a_pixel_draw_their_box_alone():
    found = {**result(), "masks": torch.zeros(2, 40, 60, dtype=torch.bool)}
    for masks in forms(found["masks"]).values():
        picture = pixels(grey(), {**found, "masks": masks}, NAMES)
        assert np.array_equal(picture, pixels(grey(), {**found, "masks": None}, NAMES))


def test_image_and_result_are_not_changed():
    image, found = grey(600, 900), result(600, 900, scores=torch.tensor([0.5, 0.6]))
    before = {name: value.clone() for name, value in found.items()}
    whole = Image.fromarray(image.permute(1, 2, 0).numpy())
    for picture in (image, whole):
        draw_instances(picture, found, NAMES)
    assert torch.equal(image, grey(600, 900))
    assert np.array_equal(np.array(whole), image.permute(1, 2, 0).numpy())
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_grid_places_pictures_of_unequal_sizes():
    sizes = {(20, 10): 1, (10, 30): 2, (5, 5): 3}
    a, b, c = (Image.new("RGB", size, (value,) * 3) for size, value in sizes.items())
    out = grid([a, b, c], columns=2)
    assert out.size == (20 + 10 + 3 * 8, 30 + 5 + 3 * 8)
    for (width, height), value in sizes.items():
        assert (np.array(out) == value).sum() == width * height * 3
    captioned = grid([a, b, c], columns=2, captions=["a", "b", "c"])
    assert captioned.height > out.height


def panels(picture, height=40 * 13, width=60 * 13):
    """The images of a comparison, without caption and legend."""
    array = np.array(picture).astype(int)
    top = next(y for y in range(array.shape[0]) if array[y, 8].tolist() == [128] * 3)
    return array[top : top + height, 8 : 8 + width], array[top : top + height, 16 + width : 16 + 2 * width]


def test_comparison_gives_a_detection_the_colours_of_its_object(texts):
    """Of one class, in another order than the objects, one touched by a false detection."""
    truth = result() | {"labels": torch.tensor([1, 1])}
    found = {name: value.flip(0) for name, value in truth.items()}
    extra = torch.tensor([[18.0, 5.0, 28.0, 15.0]])
    extra_mask = torch.zeros(1, 40, 60, dtype=torch.bool)
    extra_mask[0, 5:15, 20:28] = True
    found = {
        "boxes": torch.cat([extra, found["boxes"]]),
        "labels": torch.ones(3, dtype=torch.int64),
        "masks": torch.cat([extra_mask, found["masks"]]),
    }
    left, right = panels(comparison(grey(), found, truth, ["nucleus"], [FALSE, 1, 0], parts=["masks", "legend"]))
    assert np.array_equal(left[:, : 19 * 13], right[:, : 19 * 13])
    assert np.array_equal(left[18 * 13 :], right[18 * 13 :])
    inside = np.s_[10 * 13, 24 * 13], np.s_[10 * 13, 10 * 13]
    assert left[inside[0]].tolist() != left[inside[1]].tolist()  # touching: another shade
    assert (left == WRONG_COLOUR).all(2)[:, 19 * 13 : 30 * 13].any()
    assert not (right == WRONG_COLOUR).all(2).any()
    assert texts == ["hit 2", "false 1", "nucleus 3", "hit 2", "nucleus 2", "prediction", "ground truth"]


def test_comparison_marks_misses_and_crowds(texts):
    truth = result() | {"iscrowd": torch.tensor([False, True])}
    found = {name: value[1:] for name, value in result().items()}
    left, right = panels(comparison(grey(), found, truth, NAMES, [CROWD], parts=["boxes", "legend"]))
    assert not (left == WRONG_COLOUR).all(2).any()
    red = (right == WRONG_COLOUR).all(2)
    assert red[: 18 * 13].any()
    assert not red[18 * 13 :].any()
    assert texts[:-2] == ["in a crowd 1", "square 1", "missed 1", "crowd 1", "disc 1", "square 1"]


def test_comparison_holds_the_largest_side():
    picture = comparison(grey(3000, 2000), result(3000, 2000), result(3000, 2000), NAMES, [0, 1], max_side=400)
    assert picture.width < 2 * 400
    assert 400 < picture.height < 450  # with the caption


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_instances(grey().float(), result(), NAMES), r"image: expected a PIL image, .* got torch.float32"),
        (lambda: draw_instances(grey().numpy(), result(), NAMES), r"image: expected .* got uint8 \(3, 40, 60\)"),
        (lambda: draw_instances("a.png", result(), NAMES), "image: expected .* got str"),
        (lambda: draw_instances(grey(), result(20, 60), NAMES), "masks: expected 2 of 40x60 pixels"),
        (lambda: draw_instances(grey(), {**result(), "masks": result()["masks"][:1]}, NAMES), "got 1 of 40x60"),
        (
            lambda: draw_instances(grey(), {**result(), "masks": forms(result(9, 8)["masks"])["text"]}, NAMES),
            "got 2 of 9x8",
        ),
        (lambda: draw_instances(grey(), {**result(), "labels": torch.tensor([1, 3])}, NAMES), "labels: expected 1..2"),
        (lambda: draw_instances(grey(), result(), NAMES, parts=["box"]), "parts: expected some of masks, .* got 'box'"),
        (lambda: draw_instances(grey(), result(), NAMES, parts="masks"), "parts: expected some of masks, .*, got 'mas"),
        (lambda: draw_instances(grey(), result(), NAMES, max_side=127), "max_side: expected at least 128, got 127"),
        (lambda: comparison(grey(), result(), result(), NAMES, [0]), "matches: expected 2, one a detection, got 1"),
        (lambda: comparison(grey(), result(), result(), NAMES, [0, 2]), "matches: expected -2..1, got 2"),
        (lambda: grid([], columns=2), "pictures: expected at least one"),
        (lambda: grid([Image.new("RGB", (1, 1))], columns=0), "columns: expected at least 1"),
        (lambda: grid([Image.new("RGB", (1, 1))], columns=1, captions=[]), "captions: expected 1"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
