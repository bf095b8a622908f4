"""What features are worth: which test images they answer right, and how many of the training images held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sslpre.probe import knn as nearest
from sslpre.probe.linear import HELD_OUT, Choice, scale, search, split
from sslpre.probe.table import Score

RESAMPLES = 1000


@dataclass(frozen=True)
class Answers:
    """What one set of features answered. linear, knn: bool [T], which test images were right; None if not asked.

    choice: the linear probe's strength, with its accuracy on the held-out training images; knn_held: the same of kNN.
    """

    linear: Tensor | None
    choice: Choice | None
    knn: Tensor | None
    knn_held: float


@dataclass(frozen=True)
class Judge:
    """Puts the same questions to every set of features. Labels are [N] and [T] on the features' device."""

    train: Tensor
    test: Tensor
    classes: int
    linear: bool
    knn: bool
    seed: int

    def answers(self, train: Tensor, test: Tensor, scaled: bool, choice: Choice | None = None) -> Answers:
        """train: features [N, D]; test: [T, D]. scaled: kNN too sees them standardised. choice: of the linear probe's
        strength, where it was made before."""
        right: Tensor | None = None
        if self.linear:
            fit, choice = search(train, self.train, self.classes, self.seed, choice)
            right = (fit.predict(test) == self.test).cpu()
        if not self.knn:
            return Answers(right, choice, None, 0.0)
        if scaled:
            train, mean, std = scale(train)
            test = ((test - mean) / std).to(train)
        near = (nearest.predict(train, self.train, test, self.classes) == self.test).cpu()
        return Answers(right, choice, near, self.held(train))

    def held(self, train: Tensor) -> float:
        """kNN accuracy on the training images that the linear probe too holds out; 0 where there are none."""
        first, second = (torch.from_numpy(rows).to(train.device) for rows in split(self.labels, HELD_OUT, self.seed))
        if not len(second):
            return 0.0
        guess = nearest.predict(train[first], self.train[first], train[second], self.classes)
        return (guess == self.train[second]).float().mean().item()

    @property
    def labels(self) -> np.ndarray:
        return self.train.cpu().numpy()

    def scores(self, found: Sequence[Answers]) -> tuple[Score | None, Score | None]:
        """Linear and kNN, each the mean over sets of weights that gave the same features."""
        linear = [one.linear for one in found if one.linear is not None]
        knn = [one.knn for one in found if one.knn is not None]
        strengths = tuple(one.choice.strength for one in found if one.choice is not None)
        return (
            interval(torch.stack(linear), self.seed, strengths) if linear else None,
            interval(torch.stack(knn), self.seed) if knn else None,
        )


def interval(right: Tensor, seed: int, strengths: tuple[float, ...] = ()) -> Score:
    """Mean and 95 % bootstrap interval over test images. right: bool [encoders, T], averaged over encoders first.

    The percentile interval of Efron 1979 over 1,000 resamples, the same ones for every call with the same T and seed.
    """
    share = right.double().mean(0).cpu().numpy()
    draw = np.random.default_rng(seed)
    means = [share[draw.integers(len(share), size=len(share))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Score(float(share.mean()), float(low), float(high), strengths)


def best(names: Sequence[str], found: Sequence[Answers], linear: bool, knn: bool) -> dict[str, str]:
    """Metric → the features that do best on held-out training images; of equals the deepest.

    linear: the least loss there of any strength, which on so few images tells features apart that accuracy does not;
    kNN: the highest accuracy.
    """
    places = range(len(names))
    nothing = Choice(1.0, (0.0, 0.0), 0.0)
    best: dict[str, str] = {}
    if linear:
        best["linear"] = names[max(places, key=lambda at: (-(found[at].choice or nothing).least, at))]
    if knn:
        best["knn"] = names[max(places, key=lambda at: (found[at].knn_held, at))]
    return best
