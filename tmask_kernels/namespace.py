"""The namespace of the package's custom ops, ``torch.ops.tmask``, which nothing else names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "tmask"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


class CustomOp:
    """A function that PyTorch dispatches, traces as one node and differentiates by a rule of its own.

    `torch.library.custom_op` makes the same. It also looks in each call whether an output shares memory with an input,
    which takes longer than all else that it does; the tests of all ops look once.

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
        return self._overload(*args, **kwargs)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Say what the outputs of tensors without values look like. Usable as a decorator."""
        torch.library.register_fake(self.name, fake, lib=_LIBRARY)
        return fake

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., Any] | None = None
    ) -> None:
        """Differentiate by `backward`, with what `setup_context` keeps; as `torch.library.register_autograd`."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=_LIBRARY)


OPS: dict[str, CustomOp] = {}


def custom_op(name: str) -> Callable[[Callable[..., Any]], CustomOp]:
    """Make a function a custom op of this name, which changes none of its arguments."""
    return lambda body: CustomOp(name, body)
