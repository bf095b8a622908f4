"""What a set of features is asked: by which metric, with how many of the labels, with how many neighbours."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

DRAWS = 5  # subsets of the training images, where not all of them are taken
METRICS = {"linear": "linear", "knn": "kNN", "finetune": "finetuned"}


@dataclass(frozen=True)
class Question:
    """metric: "linear", "knn" or "finetune"; share: percent of the training labels, in (0, 100]; k: neighbours."""

    metric: str
    share: float = 100.0
    k: int = 0

    @property
    def draws(self) -> int:
        """How many subsets are drawn."""
        return 1 if self.share == 100 else DRAWS

    @property
    def key(self) -> str:
        """For programs: `linear`, `linear 10%`, `knn`."""
        return self.metric + ("" if self.share == 100 else f" {self.share:g}%")

    @property
    def words(self) -> str:
        """For people: `linear`, `linear with 10 % of the labels`, `kNN`."""
        return METRICS[self.metric] + ("" if self.share == 100 else f" with {self.share:g} % of the labels")


@dataclass(frozen=True)
class Asked:
    """shares: rising, in percent; ks: rising. At least one of `linear`, `knn` and `finetune` is true."""

    linear: bool
    knn: bool
    finetune: bool
    shares: tuple[float, ...]
    ks: tuple[int, ...]

    def at_most(self, images: int) -> Asked:
        """The same of so many images that can be neighbours: all of them where k is more."""
        return replace(self, ks=tuple(sorted({min(k, images) for k in self.ks})))

    @property
    def learned(self) -> tuple[Question, ...]:
        return tuple(Question("linear", share) for share in self.shares) if self.linear else ()

    @property
    def voted(self) -> tuple[Question, ...]:
        return tuple(Question("knn", k=k) for k in self.ks) if self.knn else ()

    @property
    def tuned(self) -> tuple[Question, ...]:
        return tuple(Question("finetune", share) for share in self.shares) if self.finetune else ()

    @property
    def all(self) -> tuple[Question, ...]:
        """In the order of the table."""
        return (*self.learned, *self.voted, *self.tuned)


def subset(labels: np.ndarray, share: float, draw: int, seed: int) -> np.ndarray:
    """Row numbers, rising, of `share` percent of `labels` (int [N]): of every class as much, and at least one image.

    draw: 0 to 4. Of one seed the draws have no image in common where a class has enough of them for that. A class of n
    images has the nearest whole number to share · n / 100, as the 1 % and 10 % of SimCLR (Chen et al., 2020,
    https://arxiv.org/abs/2002.05709, section 4.2), which ImageNet's classes of one size make equal.
    """
    shuffle, rows = np.random.default_rng(seed), []
    for one in np.unique(labels):
        own = shuffle.permutation(np.flatnonzero(labels == one))
        count = max(1, round(share * len(own) / 100))
        rows.append(np.roll(own, -(draw * len(own) // DRAWS))[:count])
    return np.sort(np.concatenate(rows))
