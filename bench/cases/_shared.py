"""What the cases of all ops share: the base class, proposal-like boxes, and the change of a launch for a sweep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

from bench.contest import DTYPES, Call, Contest, gradients, variants
from bench.graph import captured
from bench.machine import Work, device
from bench.standings import Aim
from tmask_kernels.testing import Tolerance, assert_close

LIBRARIES = ("torchvision", "detectron2", "mmcv")  # peers whose arithmetic is not ours
STRIDES = (4, 8, 16, 32, 64)  # P2 to P6
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2, "-": 4}  # bytes of an element; "-": the op takes float32 only
IOU_FLOPS = 13  # two minima, two maxima, two differences, two clamps, three of the union, a division, a comparison


@dataclass(frozen=True, kw_only=True)
class Case:
    """A named piece of work: its sizes, seeded inputs, the least bytes and flops, and the aim."""

    name: str
    what: str  # one line for the reader of a table
    dtype: str = "bf16"  # the main one of features and logits; "fp32" where the op takes float32 alone
    modes: tuple[str, ...] = ("forward",)
    aims: Mapping[str, Aim] = field(default_factory=dict, hash=False)  # by mode; "": every mode

    def small(self: Self) -> Self:
        """Return the same work at a size that a CPU and Triton's interpreter do in a moment."""
        raise NotImplementedError

    def work(self, dtype: str, mode: str = "forward") -> Work:
        """Return the least bytes, each input read once and each output written once, and the definition's flops."""
        raise NotImplementedError

    def aim(self, mode: str) -> Aim | None:
        """Return the aim of a mode at full size on a GPU."""
        return self.aims.get(mode, self.aims.get(""))


Self = TypeVar("Self", bound=Case)


def by_name(*cases: Self) -> dict[str, Self]:
    """Return the cases by their names."""
    return {case.name: case for case in cases}


def sized(case: Self) -> tuple[Self, str]:
    """Return the case at the size for this machine and that size: "full" on a GPU, "reduced" on a CPU."""
    return (case, "full") if device().type == "cuda" else (case.small(), "reduced")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The benchmark of an op: its cases, and what every variant of them does.

    `inputs(case, mode, dtype, layout)` makes the inputs of a variant, and `ours(inputs, backend)` does the work. A peer
    maps the inputs to a function that does the work; what it does before is not timed. `truth(inputs)` is the right
    result, and `check(result, truth, provider)` raises AssertionError. Where `leaves(inputs)` has tensors, the backward
    to them is the work, of the gradient `upstream(inputs)` (None: ones).
    """

    cases: Mapping[str, Any]
    inputs: Callable[[Any, str, str, str], Any]
    peers: Mapping[str, Callable[[Any], Call]]
    truth: Callable[[Any], Any]
    check: Callable[[Any, Any, str], None]
    ours: Callable[[Any, str], Any] | None = None  # None: no op, the peers alone
    leaves: Callable[[Any], Sequence[Tensor]] = lambda given: ()
    upstream: Callable[[Any], Tensor | None] = lambda given: None
    graph: bool = False  # ours is also captured into a CUDA graph
    tf32: bool = False  # on a GPU float32 work uses TF32

    @functools.cached_property
    def providers(self) -> dict[str, Callable[[Any], Call]]:
        """All by their names, in the order of the rows."""
        peers = {name: functools.partial(self.call, peer) for name, peer in self.peers.items()}
        if self.ours is None:
            return peers
        triton, reference = (
            functools.partial(self.call, lambda given, backend=backend: lambda: self.ours(given, backend))
            for backend in ("triton", "reference")
        )
        graph = {"triton-graph": lambda given: captured(triton(given))} if self.graph else {}
        return {"triton": triton, **graph, **peers, "reference": reference}

    def call(self, prepare: Callable[[Any], Call], given: Any) -> Call:
        """Return the call to time: the forward pass, or the backward of one that was done before."""
        run, leaves = prepare(given), self.leaves(given)
        if not leaves:
            return run
        out, upstream = run(), self.upstream(given)
        return gradients(out, leaves, torch.ones_like(out) if upstream is None else upstream)

    def contest(
        self, name: str, mode: str = "forward", dtype: str = "fp32", layout: str = "-", **providers: Any
    ) -> Contest:
        """Return the contest of one variant, between `providers` in place of its own if any is given."""
        case, size = sized(self.cases[name])
        return Contest(
            inputs=lambda: self.inputs(case, mode, dtype, layout),
            providers=providers or self.providers,
            truth=self.truth,
            check=self.check,
            work=case.work(dtype, mode),
            size=size,
            roof="tf32" if self.tf32 and dtype == "fp32" and size == "full" else None,
        )

    def sweep(self, variant: Sequence[str], module: Any, launches: Mapping[str, Mapping[str, Any]]) -> Contest:
        """Return the contest of a variant between launch configurations and the present launch, `triton`.

        Each of `launches` has other values for names of the kernel's `module`.
        """
        triton = self.providers["triton"]

        def launched(values: Mapping[str, Any], given: Any) -> Call:
            return mock.patch.multiple(module, **values)(triton(given))

        ours = {f"triton[{name}]": functools.partial(launched, values) for name, values in launches.items()}
        return self.contest(*variant, **{"triton": triton, **ours})

    def test(self, *, cases: Sequence[str] = (), **axes: Any) -> Callable[..., None]:
        """Return the pytest test of the variants that `axes` name (`bench.contest.variants`); of no `cases`, all."""

        @variants(cases=cases or [*self.cases], providers=[*self.providers], **axes)
        def test(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
            contest(lambda: self.contest(case, mode, dtype, layout))

        return test


def doubles(given: Sequence[Any]) -> list[Any]:
    """Return the inputs with floats in float64, for an exact result; a leaf stays a leaf."""
    return [
        x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in given
    ]


def bench_of_function(
    cases: Mapping[str, Any],
    ours: Callable[..., Tensor],
    allowed: Mapping[torch.dtype, Tolerance],
    peers: Mapping[str, Callable[..., Tensor]],
    **prepared: Callable[[Any], Call],
) -> Bench:
    """Return the benchmark of a function, forward and backward to its first argument.

    Args:
        cases: ``case.inputs(dtype, where)`` returns the arguments.
        ours: the function, with an argument `backend`.
        allowed: by dtype of the first argument, relative to the largest element, which for a gradient is far below 1.
        peers: functions; torch.compile of the reference is added.
        prepared: peers that are not functions, as `Bench` takes them.
    """

    def inputs(case: Any, mode: str, dtype: str, layout: str) -> tuple[Tensor, ...]:
        first, *others = case.inputs(DTYPES[dtype], device())
        return first.requires_grad_(mode == "backward"), *others

    def check(got: Any, truth: tuple[Any, Tolerance], provider: str) -> None:
        value, true = (x[0] if isinstance(x, tuple) else x for x in (got, truth[0]))
        scale = true.abs().max()
        assert_close(value.double() / scale, true / scale, tolerance=truth[1])

    functions = {**peers, "compile": torch.compile(lambda *given: ours(*given, backend="reference"))}
    called = {name: lambda given, f=function: lambda: f(*given) for name, function in functions.items()}
    bench = Bench(
        cases=cases,
        inputs=inputs,
        ours=lambda given, backend: ours(*given, backend=backend),
        peers=called | prepared,
        truth=lambda given: (bench.providers["reference"](doubles(given))(), allowed[given[0].dtype]),
        check=check,
        leaves=lambda given: given[:1] if given[0].requires_grad else (),
    )
    return bench


def rois(num_images: int, per_image: int, height: int, width: int, *, seed: int = 0, **limits: Any) -> Tensor:
    """Return proposal-like boxes [N, K, 4], xyxy float32 pixels: `cluster` of each image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([cluster(per_image, height, width, generator, **limits)[0] for _ in range(num_images)])


def cluster(
    count: int,
    height: int,
    width: int,
    generator: torch.Generator,
    *,
    smallest: float = 16,
    largest: float = 800,
    objects: tuple[int, int] = (10, 50),
    spread: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return boxes [K, 4] of one image, clustered around its objects, and the number of each box's object [K].

    Uniform boxes would touch far more distinct feature cells, and NMS would remove almost none of them.

    Args:
        smallest, largest: bounds of the scale sqrt(w h) of the objects.
        objects: bounds of their number.
        spread: distance of the boxes from their objects.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def normal(deviation: float) -> Tensor:
        return torch.randn(count, 2, generator=generator) * deviation * spread

    number = int(torch.randint(objects[0], objects[1] + 1, (1,), generator=generator))
    centre = uniform(number, 2) * torch.tensor([width, height])
    largest = max(smallest, min(largest, height, width))
    scale = smallest * (largest / smallest) ** uniform(number)
    aspect = 0.3 * 10 ** uniform(number)  # 0.3 to 3
    side = torch.stack([scale / aspect.sqrt(), scale * aspect.sqrt()], dim=1)
    owner = torch.randint(number, (count,), generator=generator)
    near_side = side[owner] * torch.exp(normal(0.2))
    near_centre = centre[owner] + normal(0.15) * side[owner]
    boxes = torch.cat([near_centre - near_side / 2, near_centre + near_side / 2], dim=1)
    return boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2, dtype=torch.float32)), owner
