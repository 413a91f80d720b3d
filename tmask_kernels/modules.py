"""torchvision's RoI pooling modules with our ops behind them: change one import, or replace them in a model you have.

They are subclasses of torchvision's, so that its detectors take them (they check the type of what pools their RoIs),
with the same constructors, attributes and defaults, among them ``aligned=False`` and torchvision's rule of levels.
What is ours alone is keyword-only. None has parameters or buffers: state dicts stay as they are. Scripting them with
`torch.jit` is not supported; `torch.compile` is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from torchvision import ops

from .common.checks import check_list, check_size, check_tensor, wrong
from .ops.roi_align.op import multiscale_roi_align, roi_align
from .ops.roi_pool.op import roi_pool


class RoIAlign(ops.RoIAlign):
    """`torchvision.ops.RoIAlign` by `tmask_kernels.roi_align`, which says what each argument means.

    ``forward(input, rois)``: input [N, C, H, W], rois [K, 5] with the image's index first or a list of N [L, 4], to
    [K, C, PH, PW]. Errors: ValueError, of the options at the first call.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = False,
        *,
        reduction: Literal["mean", "max"] = "mean",
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        cubic_coeff: float = -0.5,
        backend: str | None = None,
    ) -> None:
        super().__init__(_checked("RoIAlign", output_size), spatial_scale, sampling_ratio, aligned)
        self.reduction, self.interpolation, self.cubic_coeff = reduction, interpolation, cubic_coeff
        self.backend = backend

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """Pool: [K, C, PH, PW]."""
        return roi_align(
            input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned,
            reduction=self.reduction, interpolation=self.interpolation, cubic_coeff=self.cubic_coeff,
            backend=self.backend,
        )  # fmt: skip

    def __repr__(self) -> str:
        return _with_ours(super().__repr__(), self)


class RoIPool(ops.RoIPool):
    """`torchvision.ops.RoIPool` by `tmask_kernels.roi_pool`. ``forward(input, rois)`` as of `RoIAlign`."""

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float, *, backend: str | None = None) -> None:
        super().__init__(_checked("RoIPool", output_size), spatial_scale)
        self.backend = backend

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """Pool: [K, C, PH, PW]."""
        return roi_pool(input, rois, self.output_size, self.spatial_scale, backend=self.backend)

    def __repr__(self) -> str:
        return _with_ours(super().__repr__(), self)


class MultiScaleRoIAlign(ops.MultiScaleRoIAlign):
    """`torchvision.ops.MultiScaleRoIAlign` by `tmask_kernels.multiscale_roi_align`: all levels in one launch.

    ``forward(x, boxes, image_shapes)``: x maps names to levels [N, C, H, W], finest first, of which those in
    `featmap_names` are used; boxes: a list of N [L, 4] in pixels; image_shapes: (height, width) of each image. Gives
    [K, C, PH, PW]. As in torchvision the first call fixes the scales, the largest image's height against each map's to
    the nearest power of two, and they stay in `scales`; of maps of one scale at the end the first is used.

    Errors: ValueError if x has none of the names, if there is no image, and if levels are missing in between. (There
    torchvision takes boxes from a wrong level, and leaves zeros for those beyond the last.) Other options at the first
    call.
    """

    scales: list[float] | None

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
        aligned: bool = False,
        level_convention: Literal["detectron2", "torchvision"] = "torchvision",
        reduction: Literal["mean", "max"] = "mean",
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        cubic_coeff: float = -0.5,
        backend: str | None = None,
    ) -> None:
        names = check_list("MultiScaleRoIAlign", "featmap_names", featmap_names, "a list of names")
        if not names or not all(isinstance(name, str) for name in names):
            raise wrong("MultiScaleRoIAlign", "featmap_names", "a list of names, at least one", featmap_names)
        super().__init__(
            featmap_names, _checked("MultiScaleRoIAlign", output_size), sampling_ratio,
            canonical_scale=canonical_scale, canonical_level=canonical_level,
        )  # fmt: skip
        self.aligned, self.level_convention = aligned, level_convention
        self.reduction, self.interpolation, self.cubic_coeff = reduction, interpolation, cubic_coeff
        self.backend = backend

    def forward(
        self, x: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Pool: [K, C, PH, PW]."""
        op = "MultiScaleRoIAlign"
        maps = [feature for name, feature in x.items() if name in self.featmap_names] if isinstance(x, Mapping) else []
        if not maps:
            got = list(x) if isinstance(x, Mapping) else x
            raise wrong(op, "x", f"a mapping with feature maps named {self.featmap_names}", got)
        if self.scales is None:
            shapes = check_list(op, "image_shapes", image_shapes, "(height, width) of each image")
            if not shapes:
                raise wrong(op, "image_shapes", "(height, width) of each image", image_shapes)
            height = max(check_size(op, f"image_shapes[{i}]", shape)[0] for i, shape in enumerate(shapes))
            for feature in maps:
                check_tensor(op, "x", feature, ("N", "C", "H", "W"), "float", hint=" with H >= 1")
                if feature.shape[2] < 1:
                    raise wrong(op, "x", "float [N, C, H, W] with H >= 1", feature)
            self.scales = [2.0 ** round(math.log2(feature.shape[-2] / height)) for feature in maps]
        # torchvision counts levels by their scales, so it does not reach a second map of the last one. Its MobileNet
        # detectors have such maps.
        used = len(self.scales)
        while used > 1 and self.scales[used - 1] == self.scales[used - 2]:
            used -= 1
        return multiscale_roi_align(
            maps[:used], boxes, self.output_size, self.scales[:used], sampling_ratio=self.sampling_ratio,
            aligned=self.aligned, canonical_scale=self.canonical_scale, canonical_level=self.canonical_level,
            level_convention=self.level_convention, reduction=self.reduction, interpolation=self.interpolation,
            cubic_coeff=self.cubic_coeff, backend=self.backend,
        )  # fmt: skip

    def __repr__(self) -> str:
        return _with_ours(super().__repr__(), self)


def _checked(name: str, output_size: int | Sequence[int]) -> Any:
    """`output_size` as it is, which torchvision keeps so. Errors: ValueError unless it is a number or a pair."""
    check_size(name, "output_size", output_size, or_number=True)
    return output_size


# The options of ours that a repr shows where they differ from torchvision's behaviour.
_DEFAULTS: dict[str, Any] = {
    "aligned": False,
    "level_convention": "torchvision",
    "reduction": "mean",
    "interpolation": "bilinear",
    "cubic_coeff": -0.5,
    "backend": None,
}


def _with_ours(text: str, module: Any) -> str:
    """torchvision's repr with what of ours is not the default."""
    ours = [
        f", {name}={getattr(module, name)!r}"
        for name, default in _DEFAULTS.items()
        if f"{name}=" not in text and getattr(module, name, default) != default
    ]
    return text.removesuffix(")") + "".join(ours) + ")"
