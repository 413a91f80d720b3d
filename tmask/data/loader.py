"""From a data set to padded batches. What an epoch shows, and how it is flipped, depends on (seed, epoch) alone.

Not on the number of workers, nor on what ran before: a resumed run sees the batches it would have seen.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from tmask.structures import ImageBatch, Targets

Item = tuple[Tensor, dict[str, Any]]
# tmask.model.transform.ImageTransform, or anything called like it.
BatchTransform = Callable[[Sequence[Tensor], Sequence[Mapping[str, Tensor]] | None], tuple[ImageBatch, Targets | None]]


@dataclass(frozen=True)
class Batch:
    """N images, resized and padded, with their targets."""

    images: ImageBatch
    targets: Targets
    image_ids: list[int]
    original_sizes: list[tuple[int, int]]  # height, width before the resize

    def pin_memory(self) -> Batch:
        """Return the same batch in page-locked memory. DataLoader calls this."""
        images = ImageBatch(*(tensor.pin_memory() for tensor in self.images))
        pinned = {name: tensor.pin_memory() for name, tensor in self.targets._asdict().items() if tensor is not None}
        targets = self.targets._replace(**pinned)
        return Batch(images, targets, self.image_ids, self.original_sizes)


class DetectionData(Protocol):
    """The methods that a loader needs of a data set, such as `tmask.data.coco.CocoDataset`."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Item: ...
    def aspect_ratio(self, i: int) -> float:
        """Return width / height of image i without reading the image."""


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (index, seed) pairs; an item's seed sets its augmentation.

    Every index of 0..length-1 comes once an epoch. Without `shuffle` they come in order. With `aspect_ratios` (width /
    height, one an index) a batch holds only wide or only tall images, so that little of it is padding.

    With `drop_last` every batch is full: what the groups have left over makes mixed batches at the end, and only the
    last length % batch_size of that is left out; with `shuffle` others in each epoch.

    The indices of `left_out` never come. The others keep their order and their seeds: a run that goes on without an
    image that it could not read sees the batches that a run without it from the start would have seen.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        aspect_ratios: Sequence[float] | None = None,
        drop_last: bool = False,
        left_out: Collection[int] = (),
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        if aspect_ratios is not None and len(aspect_ratios) != length:
            raise ValueError(f"aspect_ratios: expected {length} values, got {len(aspect_ratios)}")
        self.length, self.batch_size, self.shuffle, self.seed = length, batch_size, shuffle, seed
        self.drop_last, self.left_out = drop_last, frozenset(left_out)
        self.epoch = self.start = 0
        self.groups = [0] * length if aspect_ratios is None else [int(ratio >= 1) for ratio in aspect_ratios]

    def set_epoch(self, epoch: int, *, start: int = 0) -> None:
        """Set the epoch of the next iteration, and skip its first `start` batches, which are used already.

        Raises:
            ValueError: `start` is beyond the end of the epoch.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start: expected in 0..{len(self)}, the batches of an epoch, got {start}")
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        groups = [group for i, group in enumerate(self.groups) if i not in self.left_out]
        if self.drop_last:
            return len(groups) // self.batch_size
        return sum(-(-groups.count(group) // self.batch_size) for group in set(groups))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for batch in self.batches(epoch)[self.start :]:
            yield [(i, _mix(self.seed, epoch, i)) for i in batch]

    def batches(self, epoch: int) -> list[list[int]]:
        """Return the indices of each batch of `epoch`, in order."""
        order = list(range(self.length))
        if self.shuffle:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        batches: list[list[int]] = []
        open_batches: dict[int, list[int]] = {}
        order = [i for i in order if i not in self.left_out]
        for i in order:
            batch = open_batches.setdefault(self.groups[i], [])
            batch.append(i)
            if len(batch) == self.batch_size:
                batches.append(open_batches.pop(self.groups[i]))
        if not self.drop_last:
            return [*batches, *open_batches.values()]
        # In the order of the epoch, not by group: else it would always be the same group that loses images.
        rest = {i for batch in open_batches.values() for i in batch}
        left = [i for i in order if i in rest]
        starts = range(0, len(left) - self.batch_size + 1, self.batch_size)
        return batches + [left[start : start + self.batch_size] for start in starts]


def make_loader(
    dataset: DetectionData,
    transform: BatchTransform,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int = 0,
    num_workers: int = 0,
    aspect_grouping: bool = False,
    drop_last: bool = False,
) -> DataLoader[Batch]:
    """Batches of `dataset`, made by `transform` in `num_workers` processes (0: in this one).

    The images in its ``left_out``, if it has that, never come.
    Call ``loader.batch_sampler.set_epoch(n)`` before each epoch. Without `shuffle` images come in order (leave
    `aspect_grouping` off then, or they do not). Batches are pinned where there is a GPU.
    An error of the data set or the transform is raised as it is, also out of a worker (whose traceback is its note).
    Errors: ValueError for a batch_size below 1 or a negative seed.
    """
    ratios = [dataset.aspect_ratio(i) for i in range(len(dataset))] if aspect_grouping else None
    sampler = EpochBatchSampler(
        len(dataset),
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        aspect_ratios=ratios,
        drop_last=drop_last,
        left_out=getattr(dataset, "left_out", ()),
    )
    return _Loader(
        _BatchMaker(dataset, transform),
        batch_sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=leave_stop_signals_to_the_trainer,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # else each epoch draws from the caller's random state
    )


class _BatchMaker(Dataset[Batch]):
    """Makes a batch from the (index, seed) of its items. Random transforms of an item depend on its seed alone."""

    def __init__(self, dataset: DetectionData, transform: BatchTransform) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch | _Failure:
        try:
            return self._batch([self._item(*key) for key in keys])
        except Exception as error:
            if get_worker_info() is None:
                raise
            return _Failure.of(error)

    def _item(self, index: int, seed: int) -> Item:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach into a GPU's random state too
            return self.dataset[index]

    def _batch(self, items: Sequence[Item]) -> Batch:
        sizes = [(image.shape[-2], image.shape[-1]) for image, _ in items]
        ids = [int(target["image_id"]) for _, target in items]
        try:
            images, targets = self.transform([image for image, _ in items], [target for _, target in items])
        except ValueError as error:
            raise ValueError(f"a batch of the images with the ids {ids}: {error}") from error
        assert targets is not None
        return Batch(images, targets, ids, sizes)


def _as_it_is(batch: Any) -> Any:
    return batch


class _Loader(DataLoader[Batch]):
    """Raises a worker's error unchanged; torch would make the message of the worker's traceback."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return map(_batch_or_error, super().__iter__())


@dataclass(frozen=True)
class _Failure:
    """A worker's error, which the worker returns in place of a batch."""

    error: Exception

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        error.add_note(f"In a worker of the loader:\n{traceback.format_exc()}")
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # the error cannot be pickled: keep its text
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return cls(error)


def _batch_or_error(made: Batch | _Failure) -> Batch:
    if not isinstance(made, _Failure):
        return made
    try:
        raise made.error
    finally:
        del made  # else error, traceback and frames hold one another, and the workers with them


def leave_stop_signals_to_the_trainer(worker: int) -> None:
    """Let only the parent's SIGTERM end a worker. A terminal's Ctrl-C and a scheduler's SIGTERM reach workers too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def _mix(*numbers: int) -> int:
    """Mix several numbers into one of 63 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
