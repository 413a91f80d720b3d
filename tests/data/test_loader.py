import contextlib
import dataclasses
import gc
import itertools
import multiprocessing
import subprocess
import sys
import textwrap

import pytest
import torch

from tests.model.conftest import TRANSFORM
from tmask.data.coco import CocoDataset
from tmask.data.loader import EpochBatchSampler, make_loader
from tmask.data.shapes import write_shapes
from tmask.data.transforms import train_transforms
from tmask_kernels import unpack_masks


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_images=10, seed=5, size=64)


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("length", "batch_size"), [(10, 3), (9, 3), (2, 4), (0, 2), (7, 1)], ids=str)
def test_an_epoch_shows_each_image_once(length, batch_size, grouped):
    ratios = [0.5 if i % 3 else 2.0 for i in range(length)] if grouped else None
    options = {"batch_size": batch_size, "shuffle": True, "aspect_ratios": ratios}
    sampler = EpochBatchSampler(length, **options)
    batches = sampler.batches(0)
    assert len(batches) == len(sampler) == len(list(sampler))
    assert sorted(flat(batches)) == list(range(length))
    assert not ratios or all(len({ratios[i] for i in batch}) == 1 for batch in batches)
    full = EpochBatchSampler(length, **options, drop_last=True).batches(0)
    assert [len(set(batch)) for batch in full] == [batch_size] * (length // batch_size)


@pytest.mark.parametrize(("wide", "tall"), [(17, 3), (3, 3), (18, 3), (7, 7), (16, 4)], ids=str)
def test_drop_last_loses_no_group(wide, tall):
    """Each epoch has as many full batches as the images give; the few left out are others in the next."""
    length, batch_size = wide + tall, 4
    ratios = [2.0] * wide + [0.5] * tall
    sampler = EpochBatchSampler(length, batch_size=batch_size, shuffle=True, aspect_ratios=ratios, drop_last=True)
    left_out = []
    for epoch in range(30):
        batches = sampler.batches(epoch)
        assert len(batches) == len(sampler) == length // batch_size
        assert all(len(batch) == batch_size for batch in batches)
        assert len(set(flat(batches))) == len(flat(batches))
        mixed = [len({ratios[i] for i in batch}) > 1 for batch in batches]
        pure = wide // batch_size + tall // batch_size
        assert not any(mixed[:pure])
        left_out.append(set(range(length)) - set(flat(batches)))
    assert {len(images) for images in left_out} == {length % batch_size}
    assert not set.intersection(*left_out)
    if wide % batch_size and length % batch_size:  # either group can lose one
        assert {ratios[i] for images in left_out for i in images} == {2.0, 0.5}


def test_order_and_seeds_of_items_depend_on_seed_and_epoch_only():
    def order(seed, epoch):
        sampler = EpochBatchSampler(50, batch_size=4, shuffle=True, seed=seed)
        torch.rand(epoch + 3)  # what else was drawn does not matter
        sampler.set_epoch(epoch)
        return flat(sampler)

    orders = [order(seed, epoch) for seed in (1, 2) for epoch in range(5)]
    assert order(1, 2) == orders[2]
    assert len({tuple(i for i, _ in one) for one in orders}) == 10
    assert len({seed for one in orders[:5] for _, seed in one}) == 5 * 50
    assert flat(EpochBatchSampler(10, batch_size=3, shuffle=False).batches(7)) == list(range(10))


def test_an_epoch_can_begin_anywhere():
    sampler = EpochBatchSampler(19, batch_size=4, shuffle=True)
    sampler.set_epoch(3)
    whole = list(sampler)
    for start in (0, 1, 4, 5):
        sampler.set_epoch(3, start=start)
        assert list(sampler) == whole[start:]
        assert len(sampler) == 5
    sampler.set_epoch(3)
    assert list(sampler) == whole
    for start in (-1, 6):
        with pytest.raises(ValueError, match=rf"start: expected in 0\.\.5, the batches of an epoch, got {start}"):
            sampler.set_epoch(0, start=start)


class Watched:
    """Records which items are read. Raises `error`, if given, at the third item."""

    def __init__(self, files, error=None, **options):
        self.data, self.error, self.read = CocoDataset(*files, **options), error, []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        self.read.append(i)
        if self.error and i == 2:
            raise self.error
        return self.data[i]


def loader_of(data, transform=TRANSFORM, **options):
    return make_loader(data, transform, **{"batch_size": 2, "shuffle": False, **options})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_was_used_is_not_read_again(shapes, num_workers):
    dataset = Watched(shapes, transforms=train_transforms(0.5, 0.5))
    loader = loader_of(dataset, shuffle=True, num_workers=num_workers)
    for epoch in (0, 2):  # workers stay
        loader.batch_sampler.set_epoch(epoch)
        whole = list(loader)
        assert [[i - 1 for i in batch.image_ids] for batch in whole] == loader.batch_sampler.batches(epoch)
    dataset.read.clear()
    loader.batch_sampler.set_epoch(2, start=3)
    rest = list(loader)
    assert [batch.image_ids for batch in rest] == [batch.image_ids for batch in whole[3:]]
    for ours, theirs in zip(rest, whole[3:], strict=True):
        assert torch.equal(ours.images.tensor, theirs.images.tensor)
    if num_workers == 0:  # workers read in processes of their own
        assert dataset.read == flat(loader.batch_sampler.batches(2)[3:])


@pytest.fixture
def no_workers() -> None:
    """Earlier tests may have left loaders in errors that only the garbage collector finds."""
    gc.collect()
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("no_workers")
def test_workers_leave_stop_signals_to_the_trainer(shapes):
    loader = loader_of(CocoDataset(*shapes), num_workers=2)
    batches = iter(loader)
    next(batches)
    workers = [str(process.pid) for process in multiprocessing.active_children()]
    for number in ("-INT", "-TERM"):
        subprocess.run(["kill", number, *workers], check=True)  # another process, as a terminal or a scheduler is
    assert len(list(batches)) == 4
    assert len(multiprocessing.active_children()) == len(workers) == 2
    del batches, loader  # and they end with the loader
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("no_workers")
def test_workers_end_when_their_process_says_so(shapes):
    """As multiprocessing does at the end of a process whose loader is still there."""
    batches = iter(loader_of(CocoDataset(*shapes), num_workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(timeout=30)
    assert worker.exitcode == 0


@pytest.mark.usefixtures("no_workers")
def test_workers_end_after_an_error(shapes):
    """At once, not when the garbage collector finds error, traceback and frames in a circle."""

    def use_up():
        for _ in loader_of(Watched(shapes, ValueError("a.png: broken")), batch_size=1, num_workers=1):
            assert len(multiprocessing.active_children()) == 1

    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            use_up()
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_wrong_arguments_are_named():
    for change, message in (
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"aspect_ratios": [1.0]}, "aspect_ratios: expected 10 values, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            EpochBatchSampler(10, **{"batch_size": 2, "shuffle": True, **change})


def test_batches_hold_images_targets_ids_and_sizes(shapes):
    dataset = CocoDataset(*shapes)
    batches = list(loader_of(dataset, batch_size=4))
    assert [len(batch.image_ids) for batch in batches] == [4, 4, 2]
    assert flat(batch.image_ids for batch in batches) == list(range(1, 11))
    first = batches[0]
    assert first.original_sizes == [(64, 64)] * 4
    assert first.images.tensor.shape == (4, 3, 64, 64)
    for n in range(4):
        target = dataset[n][1]
        count = len(target["labels"])
        assert first.targets.valid[n].tolist() == [g < count for g in range(first.targets.valid.shape[1])]
        assert torch.equal(first.targets.labels[n, :count], target["labels"])
        masks = unpack_masks(first.targets.masks[n, :count], 64)
        assert torch.equal(masks, target["masks"].bool())


def test_flips_do_not_depend_on_the_number_of_workers_nor_on_the_global_state(shapes):
    def epoch(num_workers, **options):
        data = CocoDataset(*shapes, **options)
        loader = loader_of(data, batch_size=4, shuffle=True, seed=3, num_workers=num_workers)
        loader.batch_sampler.set_epoch(1)
        torch.rand(1)
        state = torch.get_rng_state()
        batches = list(loader)
        assert torch.equal(torch.get_rng_state(), state)
        return [batch.image_ids for batch in batches], torch.cat([batch.images.tensor for batch in batches])

    flips = {"transforms": train_transforms(0.5, 0.5)}
    ids, images = epoch(0, **flips)
    for num_workers in (0, 2):
        other_ids, other = epoch(num_workers, **flips)
        assert other_ids == ids
        assert torch.equal(other, images)
    assert not torch.equal(images, epoch(0)[1])


def test_shapes_are_apart_by_choice_and_a_crowd_and_an_empty_image_share_a_batch(write, content):
    dataset = CocoDataset(*write(content))
    grouped = loader_of(dataset, shuffle=True, aspect_grouping=True)
    assert [batch.image_ids for batch in grouped] in ([[7], [3]], [[3], [7]])
    (batch,) = loader_of(dataset)
    assert batch.targets.crowd.tolist() == [[False, True, False], [False] * 3]
    assert batch.targets.valid.tolist() == [[True, False, True], [False] * 3]
    assert batch.original_sizes == [(10, 20), (12, 8)]


class OddError(Exception):
    """Cannot be unpickled: it passes other arguments to Exception than it takes."""

    def __init__(self, path, reason):
        super().__init__(f"{path}: {reason}")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_is_the_same_from_a_worker(shapes, num_workers):
    for error, kind, message in (
        (ValueError("a.png: broken"), ValueError, "a.png: broken"),
        (KeyError("boxes"), KeyError, "'boxes'"),
        (OddError("a.png", "odd"), RuntimeError if num_workers else OddError, "a.png: odd"),
    ):
        with pytest.raises(kind) as caught:
            list(loader_of(Watched(shapes, error), batch_size=1, num_workers=num_workers))
        assert str(caught.value).endswith(message)
        assert "\n" not in str(caught.value)
        assert num_workers == 0 or kind is RuntimeError or "in __getitem__" in caught.value.__notes__[0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_that_cannot_be_made_names_its_images(shapes, num_workers):
    transform = dataclasses.replace(TRANSFORM, num_classes=2)
    expected = r"^a batch of the images with the ids \[1, 2\]: targets\[0\]\['labels'\]\[\d\]: expected 1..1, got \d"
    with pytest.raises(ValueError, match=expected):
        list(loader_of(CocoDataset(*shapes), transform, num_workers=num_workers))


def test_a_process_with_an_unfinished_loader_ends(shapes):
    code = f"""
        from tests.data.test_loader import CocoDataset, loader_of
        loader = loader_of(CocoDataset(*{list(map(str, shapes))}), batch_size=1, num_workers=2)
        kept = [iter(loader), loader]
        kept.append(kept)
        print(next(kept[0]).image_ids)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1]\n", "")
