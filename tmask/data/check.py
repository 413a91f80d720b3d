"""Whether the images of a data set can be read: known before the first step, not in the third hour."""

from __future__ import annotations

import typing
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from tmask.checks import listed, nearest
from tmask.config import CheckName
from tmask.data.coco import CocoDataset
from tmask.data.images import BadImageError, read_header, read_picture, warn_transparent, warn_turned
from tmask.data.loader import leave_stop_signals_to_the_trainer

CHECKS = typing.get_args(CheckName)
_ALPHAS_READ = 50  # images decoded after a check of headers, to know whether alpha is opaque: seconds

Look = tuple[int, bool, str]  # EXIF orientation, alpha (after a full check: not opaque), what is wrong or ""


def check_images(
    dataset: CocoDataset,
    check: str | None = None,
    *,
    skip_bad: bool = False,
    num_workers: int = 0,
    watch: Callable[[Iterable[Look]], Iterable[Look]] = iter,
) -> None:
    """Read all images; one warning counts undecided EXIF orientations, one alpha that is dropped.

    Args:
        dataset: The data set.
        check: ``headers`` reads kind and size of each file, ``full`` decodes its pixels too, as training does, and
            ``off`` opens none. None: headers, or full with `skip_bad`, as damage of the pixels would end a run.
        skip_bad: Leave bad images out of `dataset`, counted in one warning.
        num_workers: Processes of a full check; 0: this one.
        watch: What shows how far the check is: gives the items of its argument one after another.

    Raises:
        ValueError: An image cannot be read, or has another size than the file says; with `skip_bad`: all of them.
            The first ones are named.
    """
    check = check or ("full" if skip_bad else "headers")
    known = CHECKS[:-1] if skip_bad else CHECKS
    if check not in known:
        raise ValueError(f"check: expected {nearest(check, known)}{' with skip_bad' * skip_bad}, got {check!r}")
    faults, turned, with_alpha = dict(dataset.left_out), [], []
    for i, (orientation, has_alpha, fault) in enumerate(watch(_looks(dataset, check, num_workers))):
        if fault:
            faults[i] = fault
        else:
            turned += [dataset.image_path(i)] * (orientation != 1)
            with_alpha += [dataset.image_path(i)] * has_alpha
    total = len(dataset)
    if faults:
        named = listed([faults[i] for i in sorted(faults)], "; ")
        if not skip_bad or len(faults) == total:
            raise ValueError(named if len(faults) == 1 else f"{len(faults)} of {total} images are bad: {named}")
        dataset.leave_out(faults)
        warnings.warn(f"{dataset.annotation_file}: left out {len(faults)} of {total} images: {named}", stacklevel=2)
    if turned and dataset.apply_exif is None:
        dataset.told.add("exif")
        warn_turned(turned, total)
    # Whether alpha is opaque only the pixels tell. Of those that come later __getitem__ warns.
    count: int | None = total
    if check == "headers":
        count = total if len(with_alpha) <= _ALPHAS_READ else None
        with_alpha = [path for path in with_alpha[:_ALPHAS_READ] if read_picture(path).transparent]
    if with_alpha:
        dataset.told.add("alpha")
        warn_transparent(with_alpha, count)


def _looks(dataset: CocoDataset, check: str, num_workers: int) -> Iterable[Look]:
    if check == "off":
        return ()
    looks = _Looks(dataset, full=check == "full")
    if check == "headers" or num_workers == 0:
        return looks
    return DataLoader(
        looks,
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=leave_stop_signals_to_the_trainer,
        generator=torch.Generator(),  # else it draws from the caller's random state
    )


class _Looks(Dataset[Look]):
    """A look at each image file of a data set, at its pixels too if `full`."""

    def __init__(self, dataset: CocoDataset, *, full: bool) -> None:
        self.dataset, self.full = dataset, full

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Look]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, i: int) -> Look:
        dataset, turn = self.dataset, bool(self.dataset.apply_exif)
        if i in dataset.left_out:
            return 1, False, dataset.left_out[i]
        path = dataset.image_path(i)
        try:
            if self.full:
                pixels, orientation, has_alpha = read_picture(path, apply_exif=turn)
                height, width = pixels.shape[1:]
            else:
                height, width, orientation, has_alpha = read_header(path)
                if turn and orientation > 4:  # a quarter turn
                    height, width = width, height
            dataset.check_size(i, height, width, orientation)
        except BadImageError as error:
            return 1, False, str(error)
        return orientation, has_alpha, ""
