"""How layers begin: weights whose variance suits what flows through, and biases of 0."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def msra(layers: Iterable[nn.Module]) -> None:
    """Before a ReLU: normal of std sqrt(2 / fan_out), which keeps the size of gradients.

    Source: He et al. 2015, "Delving Deep into Rectifiers", equation 14.
    """
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def xavier(layers: Iterable[nn.Module]) -> None:
    """Uniform of variance 1 / fan_in, which keeps the size of linear outputs: "Xavier" in FPN's original code."""
    for layer in layers:
        nn.init.kaiming_uniform_(layer.weight, a=1)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
