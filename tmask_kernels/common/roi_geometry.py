"""The geometry of RoIAlign: everything that decides where the samples of a box lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RoIGeometry:
    """The settings that RoIAlign's forward and its gradients must share.

    A custom op's schema cannot hold this class. `flatten` turns it into the op's arguments, `unflatten` reads them.
    """

    scales: tuple[float, ...]  # cells a pixel, one a level
    thresholds: tuple[float, ...]  # px^2, one fewer: a box of this area or more belongs to the next level
    sampling_ratio: int  # samples a bin along an axis; 0 or less: ceil(bin size)
    aligned: bool  # shift boxes by half a cell, so that pixel centres meet
    cubic: float | None = None  # Keys' coefficient of bicubic samples; None: bilinear ones

    def flatten(self) -> tuple[list[float], list[float], int, bool, float | None]:
        """Return the fields as the arguments of a custom op."""
        return list(self.scales), list(self.thresholds), self.sampling_ratio, self.aligned, self.cubic

    @classmethod
    def unflatten(cls, *fields: Any) -> RoIGeometry:
        """Rebuild the geometry from the arguments of a custom op."""
        scales, thresholds, *others = fields
        return cls(tuple(scales), tuple(thresholds), *others)

    def launch_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of a kernel that follow from the geometry."""
        return {
            "scales": tuple(float(scale) for scale in self.scales),
            "thresholds": tuple(float(area) for area in self.thresholds) or (0.0,),
            "NUM_LEVELS": len(self.scales),
            "SAMPLING_RATIO": max(self.sampling_ratio, 0),
            "CUBIC": self.cubic,
            "ALIGNED": self.aligned,
        }
