"""The namespace of the package's custom ops, ``torch.ops.tmask``, which nothing else names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

NAMESPACE = "tmask"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


class CustomOp:
    """A function that PyTorch dispatches, traces as one node and differentiates by a rule of its own.

    `torch.library.custom_op` makes the same, and takes longer. It looks in each call whether an output shares memory
    with an input; the tests of all ops look once. Its derivatives walk each call's arguments as trees, to find lists
    of tensors; here the schema says where they are.

    Attributes:
        body: the function.
        name: its name in the namespace, as ``tmask::padded_nms``.
    """

    def __init__(self, name: str, body: Callable[..., Any]) -> None:
        self.body, self.name = body, f"{NAMESPACE}::{name}"
        schema = torch.library.infer_schema(body, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        self._overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        OPS[self.name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Dispatch a call."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._overload(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():  # past the derivative, which is in Python
            return self._overload(*args, **kwargs)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Say what the outputs of tensors without values look like. Usable as a decorator."""
        torch.library.register_fake(self.name, fake, lib=_LIBRARY)
        return fake

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., Any] | None = None
    ) -> None:
        """Differentiate by `backward`, with what `setup_context` keeps; as `torch.library.register_autograd`."""
        overload = self._overload
        schema = overload._schema
        lists = [i for i, argument in enumerate(schema.arguments) if str(argument.type) == "List[Tensor]"]
        returns_list = str(schema.returns[0].type) == "List[Tensor]"

        def split(args: Sequence[Any]) -> list[Any]:
            """Put the items of the lists of tensors in the place of the lists."""
            flat = list(args)
            for i in reversed(lists):
                flat[i : i + 1] = args[i]
            return flat

        def join(flat: Sequence[Any], lengths: Sequence[int]) -> list[Any]:
            """Undo `split`."""
            args = list(flat)
            for i, length in zip(lists, lengths, strict=True):
                args[i : i + length] = [args[i : i + length]]
            return args

        class Derivative(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, lengths: list[int], *flat: Any) -> Any:
                args = join(flat, lengths)
                with torch._C._AutoDispatchBelowAutograd():
                    out = overload(*args)
                ctx.lengths = lengths
                if setup_context is not None:
                    setup_context(ctx, args, out)
                return tuple(out) if returns_list else out  # autograd does not look into a list

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                needs = ctx.needs_input_grad
                ctx.needs_input_grad = join(needs[1:], ctx.lengths)
                try:
                    found = backward(ctx, *gradients)
                finally:
                    ctx.needs_input_grad = needs
                return None, *split(found if isinstance(found, tuple) else (found,))

        def call(*args: Any) -> Any:
            flat = split(args)
            if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in flat):
                out = Derivative.apply([len(args[i]) for i in lists], *flat)
                return list(out) if returns_list else out
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*args)

        _LIBRARY.impl(self.name.partition("::")[2], call, "Autograd")


OPS: dict[str, CustomOp] = {}


def custom_op(name: str) -> Callable[[Callable[..., Any]], CustomOp]:
    """Make a function a custom op of this name, which changes none of its arguments."""
    return lambda body: CustomOp(name, body)
