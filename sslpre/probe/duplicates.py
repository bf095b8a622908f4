"""Test images that are training images, to the bit or nearly: the first are not counted, the others are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslpre.ops.duplicates import near
from sslpre.probe.features import Centres

Pairs = tuple[tuple[str, str, str], ...]  # kind (`exact` or `near`), one image and the other


@dataclass(frozen=True)
class Duplicates:
    """Of `images` that were to be classified `removed` equal a training image pixel for pixel, at the encoder's size;
    `nearly` of the rest nearly do. Leave-one-out: that equal an image before them. pairs: one for each, if asked for.
    """

    images: int
    removed: int
    nearly: int
    pairs: Pairs | None = None

    @property
    def left(self) -> int:
        return self.images - self.removed

    def json(self) -> dict[str, Any]:
        plain = asdict(self) | {"left": self.left}
        return {key: value for key, value in plain.items() if value is not None}


def unseen(train: Centres, test: Centres) -> Tensor:
    """Rows of the test images that no training image equals: int64, rising."""
    known = set(train.digests)
    return torch.tensor([row for row, digest in enumerate(test.digests) if digest not in known], dtype=torch.int64)


def single(parts: Sequence[Centres]) -> Tensor:
    """Rows of all images, one part after the other, without those that equal one before them: int64, rising."""
    return torch.tensor(sorted(firsts([digest for part in parts for digest in part.digests]).values()))


def firsts(digests: Sequence[bytes]) -> dict[bytes, int]:
    """Where each digest comes first."""
    found: dict[bytes, int] = {}
    for row, digest in enumerate(digests):
        found.setdefault(digest, row)
    return found


def between(train: Centres, test: Centres, kept: np.ndarray, pairs: bool) -> Duplicates:
    """Of training and test images; `kept` are the rows of the test images that are left."""
    known = firsts(train.digests)
    exact = [(known[digest], row) for row, digest in enumerate(test.digests) if digest in known]
    (own, shown), (hashes, shows) = train.hashes, test.hashes
    bank, queries = np.flatnonzero(shown), kept[shows[kept]]
    at = nearest(own[bank], hashes[queries])
    alike = list(zip(bank[at[at >= 0]].tolist(), queries[at >= 0].tolist(), strict=True))
    names = [title(train, i) for i, _ in (*exact, *alike)], [title(test, j) for _, j in (*exact, *alike)]
    return Duplicates(len(test.digests), len(exact), len(alike), told(len(exact), *names) if pairs else None)


def within(parts: Sequence[Centres], left: np.ndarray, pairs: bool) -> Duplicates:
    """Of all images with each other; `left` are the rows of `single`."""
    digests = [digest for part in parts for digest in part.digests]
    known = firsts(digests)
    exact = [(known[digest], row) for row, digest in enumerate(digests) if known[digest] != row]
    hashes, shows = (np.concatenate(kind) for kind in zip(*(part.hashes for part in parts), strict=True))
    rows = left[shows[left]]
    at = nearest(hashes[rows], hashes[rows])
    earlier = at < np.arange(len(rows))  # at the latest it finds itself
    alike = list(zip(rows[at[earlier]].tolist(), rows[earlier].tolist(), strict=True))
    if not pairs:
        return Duplicates(len(digests), len(exact), len(alike))
    titles = [title(part, row) for part in parts for row in range(len(part.digests))]
    names = [titles[i] for i, _ in (*exact, *alike)], [titles[j] for _, j in (*exact, *alike)]
    return Duplicates(len(digests), len(exact), len(alike), told(len(exact), *names))


def nearest(bank: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """For each hash of `queries` the place of the first in `bank` that differs in at most 3 bits, or -1: int64 [M].

    Of equal hashes one is compared: a camera that does not move gives thousands.
    """
    own, first = np.unique(bank, return_index=True)
    asked, back = np.unique(queries, return_inverse=True)
    found = np.full(len(asked), len(bank))
    pairs = near(own, asked)
    np.minimum.at(found, pairs[:, 1], first[pairs[:, 0]])
    return np.where(found < len(bank), found, -1)[back]


def told(exact: int, ones: list[str], others: list[str]) -> Pairs:
    kinds = ["exact"] * exact + ["near"] * (len(ones) - exact)
    return tuple(zip(kinds, ones, others, strict=True))


def title(part: Centres, row: int) -> str:
    """The name of the image, below that of its folder."""
    source = part.stream.source
    return f"{source.where}/{source.name(int(part.index[row]))}"
