"""Batches without end, from any point of any epoch, and the random state that goes with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch


class BatchStream:
    """Batches epoch after epoch, knowing at every moment how far it is.

    If the loader's batch sampler has ``set_epoch`` it is called before each epoch; the stream begins inside one by
    ``set_epoch(epoch, start=position)``, so that nothing already used is read again. `rng` is put back once the
    iterator of the loader is made, which may draw from the random state.

    Errors: ValueError to begin inside an epoch of a loader without ``set_epoch`` or of fewer batches; and, when it is
    gone through, for an empty loader.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        device: torch.device,
        *,
        epoch: int = 0,
        position: int = 0,
        rng: dict[str, Any] | None = None,
    ) -> None:
        self.loader, self.device = loader, device
        self.epoch = epoch
        self.position = position  # batches of this epoch given out
        self._rng = rng
        self._sampler: Any = getattr(loader, "batch_sampler", None)
        if position:
            sampler: Any = self._sampler
            if not hasattr(sampler, "set_epoch"):
                raise ValueError("train_loader: expected a batch sampler with set_epoch, to resume inside an epoch")
            if position > len(sampler):
                expected = f"expected the data of the run, {position} batches an epoch or more, got {len(sampler)}"
                raise ValueError(f"train_loader: cannot resume: {expected}")

    def __iter__(self) -> Iterator[Any]:
        while True:
            if self.position:
                self._sampler.set_epoch(self.epoch, start=self.position)
            elif hasattr(self._sampler, "set_epoch"):
                self._sampler.set_epoch(self.epoch)
            batches = iter(self.loader)
            if self._rng is not None:
                set_rng_state(self._rng, self.device)
                self._rng = None
            for batch in batches:
                self.position += 1
                yield batch
            if self.position == 0:
                raise ValueError("train_loader: expected at least one batch, got none (fewer images than batch_size?)")
            self.epoch, self.position = self.epoch + 1, 0


def rng_state(device: torch.device) -> dict[str, Any]:
    """The random state of torch on the CPU and, on CUDA, of `device`; plain tensors."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `rng_state` gave; a CUDA state is dropped on a machine without."""
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
