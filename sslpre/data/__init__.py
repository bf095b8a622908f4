"""Images: find them (`find`) or draw them (`sample`), decode them (`decode`), once (`store`, whose rows lie in memory,
`rows` and `shared`, or in a file, `packed`, in the `cache`, as there is `room`), bring them to the device (`stream`,
over the `ferry`)."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class BadImage(Exception):
    """One image cannot be used; `.reason` says why on one line. The run goes on: `stream` replaces the image."""

    def __init__(self, reason: str):
        self.reason = " ".join(reason.split())
        super().__init__(self.reason)


class Source(Protocol):
    """N images in a fixed order, read by number. All that takes a number is called from many threads at once."""

    @property
    def where(self) -> str:
        """As printed: `./images/train`, or `the built-in sample set`."""

    @property
    def fingerprint(self) -> str:
        """Hexadecimal; changes when an image is added, removed, renamed or resized on disk."""

    @property
    def written(self) -> str:
        """Hexadecimal; changes with `fingerprint`, the limit of pixels, and when a file was last modified."""

    @property
    def labels(self) -> np.ndarray:
        """int64 [N], an index into `classes`, -1 where unknown."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes; empty when there are none."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Printable name of image `i`, relative to `where`."""

    def read(self, i: int, side: int | None = None) -> np.ndarray:
        """Image `i` as uint8 [h, w, 3] RGB, upright. Raises BadImage.

        `side` says that the caller will shrink to side × side: the array may then be smaller than the image, but its
        shorter side is never below 2 · side on that account.
        """

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) of image `i` upright and in full, from its header alone. Raises BadImage."""

    def grey(self, i: int) -> bool:
        """Whether the header of image `i` says that it has no colour. Raises BadImage."""
