"""Thumbnails in one picture, and that picture within a page."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from PIL import Image

BUDGET = 2_600_000  # bytes of the sheet; in the page it takes a third more
TRIES = ((96, 80), (96, 65), (80, 60), (64, 60), (64, 45), (48, 45), (32, 40), (24, 20))  # side and quality
FEW = 100  # thumbnails by which the size of all is foreseen
STEPS = (90, 75, 60, 40)  # quality of single pictures


def sheet(thumbnails: np.ndarray) -> tuple[str, int]:
    """All thumbnails, uint8 [N, s, s, 3], as a data URI of at most 3.5 MB, row by row; and how many stand in a row.

    Where they take too much, they lose size and quality.
    """
    across = math.ceil(math.sqrt(len(thumbnails)))
    some = thumbnails[:: len(thumbnails) // FEW + 1]
    data = b""
    for side, quality in TRIES:
        if side > thumbnails.shape[1] and quality < TRIES[0][1]:
            continue  # they are smaller already
        if len(webp(tiled(some, across, side), quality)) * len(thumbnails) > BUDGET * len(some):
            continue
        data = webp(tiled(thumbnails, across, side), quality)
        if len(data) <= BUDGET:
            break
    return uri(data or webp(tiled(thumbnails, across, TRIES[-1][0]), TRIES[-1][1])), across


def tiled(thumbnails: np.ndarray, across: int, side: int) -> Image.Image:
    own = min(side, thumbnails.shape[1])
    whole = Image.new("RGB", (across * own, -(-len(thumbnails) // across) * own), (128, 128, 128))
    for at, pixels in enumerate(thumbnails):
        one = Image.fromarray(pixels)
        if one.width != own:
            one = one.resize((own, own), Image.Resampling.LANCZOS)
        whole.paste(one, (at % across * own, at // across * own))
    return whole


def single(image: Image.Image, budget: int) -> str:
    """One picture as a data URI, of as good a quality as `budget` bytes allow."""
    data = b""
    for quality in STEPS:
        data = webp(image, quality)
        if len(data) <= budget:
            break
    return uri(data)


def webp(image: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "webp", quality=quality, method=4)
    return out.getvalue()


def uri(data: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(data).decode()
