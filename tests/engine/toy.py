"""A toy model and its data, small enough to know what training must do with them; the smallest real runs; helpers."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.bad_inputs import COMMANDS
from tmask import cli
from tmask.config import TrainConfig
from tmask.engine.checkpoint import load_checkpoint
from tmask.engine.log import read_log
from tmask.engine.loop import fit
from tmask.structures import ImageBatch, Targets

CPU = torch.device("cpu")
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


def toy(**changes: Any) -> TrainConfig:
    """The config of the toy runs with some settings changed."""
    return dataclasses.replace(CONFIG, **changes)


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


def copies(count: int) -> list[Model]:
    """Models with the same weights."""
    models = [Model() for _ in range(count)]
    for model in models:
        model.load_state_dict(models[0].state_dict())
    return models


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


def batch(value: Tensor | float) -> Any:
    """Two images of one value."""
    return SimpleNamespace(
        images=ImageBatch(torch.full((2, 3, 4, 6), float(value)), torch.tensor([[4, 6], [4, 6]])),
        targets=Targets(*[torch.zeros(2, 1)] * 4, None, torch.zeros(2, 1)),
    )


def run(out: Path, model: Any = None, config: TrainConfig = CONFIG, **options: Any) -> Any:
    """Train a toy model; `resume` may be True, for the checkpoint in `out`."""
    torch.manual_seed(0)
    if options.get("resume") is True:
        options["resume"] = out / "checkpoint.pt"
    loader = options.pop("loader", None) or Loader()
    return fit(model or Model(), loader, config, out_dir=out, **{"device": "cpu", **options})


def saved(out: Path) -> dict[str, Any]:
    return load_checkpoint(out / "checkpoint.pt")


def logged(out: Path) -> list[dict[str, Any]]:
    return read_log(out / "log.jsonl")


def files(folder: Path | str) -> dict[Path, bytes]:
    """The content of every file below a folder."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def command(name: str, *more: str) -> int:
    """Run the smallest `tmask NAME` on ``data`` in the present folder; training writes to ``out``."""
    return cli.main([name, *COMMANDS[name].split(), *more])


class BrokenError(Exception):
    """An error that a test has put into a run."""


def after(calls: int, function: Callable[..., Any], error: BaseException | None = None) -> Callable[..., Any]:
    """`function`, which raises once it has done its work for that many and one times."""
    count = 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        result = function(*args, **kwargs)
        if count == calls + 1:
            raise error or BrokenError
        return result

    return broken


def broken_model(calls: int, error: BaseException | None = None, **options: Any) -> Model:
    """A model whose forward pass raises when it is done for that many and one times."""
    model = Model(**options)
    model.forward_padded = after(calls, model.forward_padded, error)  # type: ignore[method-assign]
    return model


def assert_same(a: Any, b: Any, place: str = "") -> None:
    """Two checkpoints hold the same bits."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_same(a[key], b[key], f"{place}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{place}/{i}")
    else:
        assert a == b, place
