"""The run lengths of an image's masks, which a device may still be computing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class RunLengths:
    """COCO's run lengths of the K masks of an image. The device may still be computing them.

    Ops return it for ``output="run_lengths"``, and do not wait. So a program can give the device its next work before
    it reads the result.

    Args:
        texts: waits for the device and returns COCO's strings of these masks and perhaps of others.
        image_size: (H, W).
        first: the place of these masks' first string.
        number: K.
    """

    def __init__(
        self, texts: Callable[[], Sequence[str]], image_size: tuple[int, int], first: int, number: int
    ) -> None:
        self._texts = texts
        self.image_size = image_size
        self._part = slice(first, first + number)

    def __len__(self) -> int:
        """Return K."""
        return self._part.stop - self._part.start

    def to_coco(self) -> list[dict[str, Any]]:
        """Wait for the device; return K dicts ``{"size": [H, W], "counts": str}``, as pycocotools encodes the masks."""
        texts = self._texts()[self._part] if len(self) else ()
        return [{"size": list(self.image_size), "counts": text} for text in texts]
