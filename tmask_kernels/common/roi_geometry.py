"""Where the bins of a box lie on the levels of a pyramid: what RoIAlign's forward and gradients must agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RoIGeometry:
    """One value in place of five arguments.

    A custom op's schema knows no such class, so there its fields stand one by one, in this order.
    """

    scales: tuple[float, ...]  # cells a pixel, one a level
    thresholds: tuple[float, ...]  # px^2, one fewer: the area from which a box leaves a level for the next
    sampling_ratio: int  # samples a bin along an axis; 0 or less: ceil(bin size)
    aligned: bool  # shifted by half a cell
    cubic: float | None = None  # Keys' coefficient of bicubic samples; None: bilinear ones

    def flatten(self) -> tuple[list[float], list[float], int, bool, float | None]:
        """The fields as a custom op takes them."""
        return list(self.scales), list(self.thresholds), self.sampling_ratio, self.aligned, self.cubic

    @classmethod
    def unflatten(cls, *fields: Any) -> RoIGeometry:
        """The inverse of `flatten`."""
        scales, thresholds, *others = fields
        return cls(tuple(scales), tuple(thresholds), *others)

    def gradients(self) -> tuple[Any, ...]:
        """What a backward gives for the fields: None each.

        A single level has no thresholds, and autograd takes an empty list for a list of tensors: its gradient is one.
        """
        return None, None if self.thresholds else [], None, None, None

    def launch_arguments(self) -> dict[str, Any]:
        """The arguments of a kernel that depend on the geometry alone."""
        return {
            "scales": tuple(float(scale) for scale in self.scales),
            "thresholds": tuple(float(area) for area in self.thresholds) or (0.0,),
            "NUM_LEVELS": len(self.scales),
            "SAMPLING_RATIO": max(self.sampling_ratio, 0),
            "CUBIC": self.cubic,
            "ALIGNED": self.aligned,
        }
