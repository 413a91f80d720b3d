"""A model small enough to know what training must do with it, and its data."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tmask.config import TrainConfig
from tmask.engine.train import train
from tmask.structures import ImageBatch, Targets

CONFIG = TrainConfig(
    steps=12,
    batch_size=2,
    optimizer="adamw",
    lr=0.05,
    schedule="constant",
    warmup_steps=0,
    precision="fp32",
    log_every=4,
    checkpoint_every=5,
)


class Model(nn.Module):
    """Learns the mean of its images, with noise from the random state; `poison_at` breaks one loss at that call.

    Batch norm only gathers statistics.
    """

    def __init__(self, poison_at: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)
        self.norm = nn.BatchNorm2d(1)
        self.poison_at, self.calls = poison_at, 0
        self.seen: list[float] = []
        self.formats: list[bool] = []
        self.dtypes: list[torch.dtype] = []

    def forward_padded(self, images: ImageBatch, targets: Targets, *, compact: bool) -> dict[str, Tensor]:
        self.seen.append(float(images.tensor[0, 0, 0, 0]))
        self.formats.append(images.tensor.is_contiguous(memory_format=torch.channels_last))
        out = self.conv(images.tensor)
        self.norm(out.detach())
        self.dtypes.append(out.dtype)
        noise = 0.01 * torch.rand((), device=out.device)
        loss = (out.float().mean() - 1 + noise) ** 2
        extra = self.conv.bias.sum() ** 2
        if self.calls == self.poison_at:
            extra = extra * float("nan")
        self.calls += 1
        return {"loss_a": loss, "loss_b": extra}


class Loader:
    """Five batches an epoch; what they are depends on the epoch alone. ``read`` lists (epoch, place) of those drawn."""

    def __init__(self) -> None:
        self.batch_sampler = self
        self.epoch = self.start = -1
        self.read: list[tuple[int, int]] = []

    def set_epoch(self, epoch: int, *, start: int = 0) -> None:
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Any]:
        torch.randint(0, 100, ())  # a plain DataLoader draws its base seed here
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self.epoch)
        order, parts = torch.randperm(5, generator=generator).tolist(), torch.rand(5, generator=generator)
        for place in range(self.start, 5):
            self.read.append((self.epoch, place))
            yield batch(order[place] + parts[place])


def batch(value: Tensor) -> Any:
    """Two images of one value."""
    return SimpleNamespace(
        images=ImageBatch(value.expand(2, 3, 4, 6).contiguous(), torch.tensor([[4, 6], [4, 6]])),
        targets=Targets(*[torch.zeros(2, 1)] * 4, None, torch.zeros(2, 1)),
    )


def run(out: Path, model: Model, config: TrainConfig = CONFIG, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    loader = kwargs.pop("loader", None) or Loader()
    return train(model, loader, config, out_dir=out, **{"device": "cpu", **kwargs})
