"""Images that show the same: equal digests, and perceptual hashes that differ in few bits.

The hash is that of the low frequencies: Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions",
2010, https://www.phash.org/docs/pubs/thesis_zauner.pdf, section 3.2.1.
"""

import math
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslpre.ops.channels import luma

SIDE = 32  # pixels that an image is shrunk to
LOW = 8  # frequencies in each direction: 64 bits
FLAT = 2 / 255  # standard deviation below which an image shows nothing that could be compared
BITS = 3  # in which near duplicates differ at most; 4 parts of 16 bits then have one in common
CHUNK = 1 << 22  # pairs compared at a time


def perceptual(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [B, 3, H, W] → hashes, uint64 [B]; and whether each image shows enough to be compared, bool [B].

    A bit says whether a frequency of the grey image is above the median of them; the mean brightness has none.
    """
    grey = luma(images.to(torch.float32) / 255)
    small = F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True)[:, 0].cpu().double()
    basis = cosines(SIDE, LOW)
    low = (basis @ small @ basis.T).flatten(1)[:, 1:]  # without the mean
    bits = (low > low.median(1, keepdim=True).values).numpy()
    packed = np.packbits(bits, axis=1, bitorder="little")  # 63 bits in 8 bytes
    return packed.view(np.uint64)[:, 0], (small.std((1, 2), correction=0) > FLAT).numpy()


def cosines(side: int, count: int) -> Tensor:
    """The first `count` rows of the discrete cosine transform of `side` samples (type II)."""
    at = torch.arange(side, dtype=torch.float64) + 0.5
    return torch.cos(torch.arange(count, dtype=torch.float64)[:, None] * at * math.pi / side)


def groups(keys: Sequence[Hashable]) -> list[list[int]]:
    """Places of equal keys, of each key that is there more than once, in the order of the first of them."""
    found: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        found.setdefault(key, []).append(place)
    return [places for places in found.values() if len(places) > 1]


def near(one: np.ndarray, other: np.ndarray | None = None) -> np.ndarray:
    """Pairs (i, j) of hashes one[i] and other[j] that differ in at most 3 of 64 bits: int64 [P, 2], in order.

    Without `other` the pairs are within `one`, each once, i < j. Time follows the number of pairs that agree in one of
    four parts of 16 bits, not that of all pairs.
    """
    own = other is None
    second = one if other is None else other
    found = [pairs for part in range(4) for pairs in in_common(one, second, np.uint64(16 * part), own)]
    if not found:
        return np.empty((0, 2), np.int64)
    return np.unique(np.concatenate(found), axis=0)


def in_common(one: np.ndarray, other: np.ndarray, shift: np.uint64, own: bool) -> Iterator[np.ndarray]:
    """The pairs of `near` that have the 16 bits from `shift` in common, some at a time."""
    mine, theirs = ((hashes >> shift) & np.uint64(0xFFFF) for hashes in (one, other))
    order = np.argsort(theirs, kind="stable")
    first, last = (np.searchsorted(theirs[order], mine, side) for side in ("left", "right"))
    counts = last - first
    for rows in np.split(
        np.arange(len(one)), np.searchsorted(np.cumsum(counts), np.arange(CHUNK, counts.sum(), CHUNK))
    ):
        many = counts[rows]
        i = np.repeat(rows, many)
        j = order[np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many) + np.repeat(first[rows], many)]
        close = np.bitwise_count(one[i] ^ other[j]) <= BITS
        if own:
            close &= i < j
        yield np.stack([i[close], j[close]], 1)
