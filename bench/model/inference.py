"""W12: Mask R-CNN inference, torchvision's and ours, with the same weights on the same images.

Modes: "detections", a list of images to a list of dicts with float masks pasted into them; "results", the same to what
a COCO result file holds, run lengths on the host; "padded", ours alone: a padded batch to padded detections, without
the paste. The floor is that of the network's products in all three.

The gate has two parts. In full float32 ours must give torchvision's detections; then each call that is timed must
find them again as closely as its own precision lets it (`_gate`). For float32 the benchmark switches TF32 on, for
products and convolutions of both, where there is such a thing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bench.cases import CASES, ModelCase, sized
from bench.contest import LAYOUTS, Call, Contest
from bench.graph import captured
from bench.machine import device, tf32
from bench.model._gate import LEAST, LEAST_OF_PEERS, Found, check_alike, check_same, found
from bench.model._models import Pair, make_pair, only_on_a_gpu
from bench.variants import variants
from tmask.engine.device import autocast
from tmask.model.postprocess import to_list
from tmask.structures import Detections, ImageBatch

Core = Callable[[ImageBatch], Detections]

MASKS = {"detections": "probability", "results": "rle"}


class Truth(NamedTuple):
    """torchvision's detections in full float32, and what ours lacks to be the same."""

    detections: list[Found]
    problem: str | None


class Output(NamedTuple):
    """What a call gave, and whose it is."""

    ours: bool
    results: Any  # a list of dicts, or Detections


def _wanted(case: str, mode: str, dtype: str, layout: str, provider: str) -> bool:
    """torchvision has no padded form. To compile takes minutes: once a dtype, on channels_last, to whole results."""
    if mode == "padded" and provider.startswith("torchvision"):
        return False
    if device().type == "cpu" and layout == "nchw":  # says nothing there
        return False
    if provider in ("tmask", "torchvision"):
        return True
    if layout == "nchw" or mode == "detections":
        return False
    return provider == "tmask-graph" or case == "W12-b1" or dtype == "bf16"


@variants(
    cases=["W12-b1", "W12-b8"],
    modes=["results", "detections", "padded"],
    dtypes=["bf16", "fp32"],
    layouts=["nhwc", "nchw"],
    providers=["tmask", "torchvision", "tmask-graph", "tmask-compile", "torchvision-compile"],
    where=_wanted,
)
def test_inference(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
    contest(lambda: inference(case, mode, dtype, layout))


def inference(name: str, mode: str, dtype: str, layout: str) -> Contest:
    case, size = sized(cast(ModelCase, CASES[name]))
    where = device()

    @contextlib.contextmanager
    def precision() -> Iterator[None]:
        with tf32(), autocast(where, dtype):
            yield

    def ours(core_of: Callable[[Pair, ImageBatch], Core]) -> Callable[[Pair], Call]:
        """`core_of` gives what stands for the model's padded core; around it is the model's own shell."""

        @torch.no_grad()
        def prepare(pair: Pair) -> Call:
            batch, _ = pair.ours.transform(pair.images)
            batch = batch._replace(tensor=batch.tensor.contiguous(memory_format=LAYOUTS[layout]))
            with precision():
                core = core_of(pair, batch)

            @torch.no_grad()
            def call() -> Output:
                with precision():
                    if mode == "padded":
                        return Output(True, core(batch))
                    images, _ = pair.ours.transform(pair.images)
                    sizes = [(case.height, case.width)] * case.images
                    results = to_list(core(images), images.sizes, sizes, masks=MASKS[mode], convention=pair.ours.paste)
                return Output(True, [_on_host(result) for result in results] if mode == "results" else results)

            return call

        return prepare

    def theirs(compiled: bool) -> Callable[[Pair], Call]:
        def prepare(pair: Pair) -> Call:
            encode = _encoder() if mode == "results" else None
            if compiled:
                only_on_a_gpu()
            model = torch.compile(pair.theirs) if compiled else pair.theirs

            @torch.no_grad()
            def call() -> Output:
                with precision():
                    results = model(pair.images)
                return Output(False, results if encode is None else [_on_host(result, encode) for result in results])

            return call

        return prepare

    @torch.no_grad()
    def truth(pair: Pair) -> Truth:
        with tf32(allowed=False):
            theirs, ours = [found(r) for r in pair.theirs(pair.images)], [found(r) for r in pair.ours(pair.images)]
        return Truth(theirs, _problem(ours, theirs))

    def check(got: Output, truth: Truth) -> None:
        assert not got.ours or truth.problem is None, f"in full float32: {truth.problem}"
        results = _pasted(got.results, case) if isinstance(got.results, Detections) else got.results
        given = [Found(*(value.to(where) for value in found(result))) for result in results]
        if dtype == "fp32" and where.type == "cpu":  # on a GPU it takes TF32
            check_same(given, truth.detections)
        else:
            coarse = not got.ours and dtype != "fp32"
            check_alike(given, truth.detections, LEAST_OF_PEERS if coarse else LEAST)

    return Contest(
        inputs=lambda: make_pair(case, layout, training=False),
        providers={
            "tmask": ours(_eager),
            "tmask-compile": ours(_compiled),
            "tmask-graph": ours(_graph),
            "torchvision": theirs(compiled=False),
            "torchvision-compile": theirs(compiled=True),
        },
        truth=truth,
        check=check,
        work=case.work(dtype),
        size=size,
        roof="tf32" if dtype == "fp32" and where.type == "cuda" else None,
    )


def _eager(pair: Pair, batch: ImageBatch) -> Core:
    return lambda images: pair.ours.forward_padded(images, compact=not images.tensor.is_cuda)


def _compiled(pair: Pair, batch: ImageBatch) -> Core:
    only_on_a_gpu()
    return torch.compile(pair.ours.forward_padded, fullgraph=True, dynamic=False)


def _graph(pair: Pair, batch: ImageBatch) -> Core:
    static = ImageBatch(batch.tensor.clone(), batch.sizes.clone())
    replay = captured(lambda: pair.ours.forward_padded(static))

    def core(images: ImageBatch) -> Detections:
        if images is not batch:  # the padded mode's input is in place
            static.tensor.copy_(images.tensor)
            static.sizes.copy_(images.sizes)
        return replay()

    return core


def _pasted(detections: Detections, case: ModelCase) -> list[dict[str, Any]]:
    """Padded detections in torchvision's form."""
    sizes = [(case.height, case.width)] * case.images
    image_sizes = torch.tensor(sizes, device=detections.boxes.device)
    return to_list(detections, image_sizes, sizes, masks="probability", convention="torchvision")


def _on_host(result: dict[str, Any], encode: Callable[[Tensor], list[dict[str, Any]]] | None = None) -> dict[str, Any]:
    """One image's result as a result file needs it: numbers on the host, masks as run lengths."""
    masks = result["masks"] if encode is None else encode(result["masks"])
    return {name: result[name].cpu() for name in ("boxes", "scores", "labels")} | {"masks": masks}


def _encoder() -> Callable[[Tensor], list[dict[str, Any]]]:
    """Probabilities [D, 1, h, w] to run lengths, as torchvision's users do it. Errors: ImportError."""
    from pycocotools import mask as coco

    # [D, w, h] by rows is [h, w, D] by columns, which the encoder wants: so the GPU turns the masks.
    return lambda masks: coco.encode((masks[:, 0] > 0.5).to(torch.uint8).mT.contiguous().cpu().numpy().T)


def _problem(given: Sequence[Found], true: Sequence[Found]) -> str | None:
    try:
        check_same(given, true)
    except AssertionError as error:
        return str(error)
    return None
