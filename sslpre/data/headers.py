"""What headers and names tell of a source's images, from a few hundred of them: sizes, colours, files."""

from __future__ import annotations

import contextlib

import numpy as np

from sslpre.data import BadImage, Source
from sslpre.errors import SslpreError


def short_side(source: Source, at_most: int = 500) -> int:
    """Median of the shorter side in pixels, over up to `at_most` evenly spaced images, from their headers.

    Images with a damaged header do not count; if none is left, raises SslpreError (exit 4).
    """
    sides = []
    for i in _spread(len(source), at_most):
        try:
            sides.append(min(source.size(i)))
        except BadImage as error:
            last = error.reason  # named and counted when the image is decoded; here it only has no size
    if not sides:
        reason = f"the last one tried: {last}" if len(source) else "there are none"
        raise SslpreError(f"none of the images of `{source.where}` could be read; {reason}", "check the files", 4)
    return int(np.median(sides))


def grey_share(source: Source, at_most: int = 500) -> float | None:
    """Share of grey images in [0, 1], over up to `at_most` evenly spaced ones, by their headers.

    Images with a damaged header do not count; None if no other is left.
    """
    grey = []
    for i in _spread(len(source), at_most):
        with contextlib.suppress(BadImage):  # named and counted when the image is decoded; here it has no colour
            grey.append(source.grey(i))
    return sum(grey) / len(grey) if grey else None


def mixed(source: Source) -> str:
    """One line of warning where some images are grey and others in colour, by `grey_share`; else ""."""
    share = grey_share(source)
    if share is None or share in (0, 1):
        return ""
    percent = "under 1" if share < 0.01 else "over 99" if share > 0.99 else f"{share * 100:.0f}"
    return f"{percent} % of the images are grey files, the others in colour: that alone tells them apart"


def jpegs(source: Source, at_most: int = 20) -> bool:
    """Are most of the images JPEG files, by the names of a few?"""
    rows = _spread(len(source), at_most)
    return 2 * sum(source.name(i).lower().endswith((".jpg", ".jpeg")) for i in rows) > len(rows)


def _spread(count: int, at_most: int) -> list[int]:
    """Up to `at_most` of 0..count-1, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(np.int64)).tolist()
