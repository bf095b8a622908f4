"""What features are worth: which test images they answer right, and how many of the training images held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sslpre.probe import knn as nearest
from sslpre.probe.linear import HELD_OUT, Choice, scale, search, split
from sslpre.probe.questions import Asked, Question, subset
from sslpre.probe.table import Score

RESAMPLES = 1000
MANY = 100_000  # test images


@dataclass
class Answers:
    """What one set of features answered, by question.

    right: bool [draws, T], which images were right, copies of training images among them; choices: the linear probe's
    strength for each draw; held: how good the features are on held-out training images, in a number that rises.
    """

    right: dict[Question, Tensor] = field(default_factory=dict)
    choices: dict[Question, tuple[Choice, ...]] = field(default_factory=dict)
    held: dict[Question, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Judge:
    """Puts the same questions to every set of features. Labels are [N] and [T] on the features' device.

    kept: rows of the test images that count, all by default. single: rows of training and test images, one after the
    other, of which each is classified by the others (kNN, leave-one-out); None where there is a test split.
    """

    train: Tensor
    test: Tensor
    classes: int
    asked: Asked
    seed: int
    kept: Tensor | None = None
    single: Tensor | None = None

    def answers(self, train: Tensor, test: Tensor, scaled: bool, before: Answers | None = None) -> Answers:
        """train: features [N, D]; test: [T, D]. scaled: kNN too sees them standardised. before: answers whose choices
        of the linear probe's strength are taken over."""
        found = Answers()
        self.linear(train, test, self.asked.learned, found, before)
        if self.asked.knn:
            if self.single is not None:
                self.leave_one_out(torch.cat([train, test]), scaled, found)
            else:
                self.neighbours(train, test, scaled, found)
        return found

    def linear(
        self, train: Tensor, test: Tensor, questions: Sequence[Question], found: Answers, before: Answers | None = None
    ) -> None:
        """Answer these questions with a linear probe of every draw."""
        for question in questions:
            right, choices = [], []
            for draw in range(question.draws):
                rows = self.rows(question, draw)
                given = before.choices[question][draw] if before is not None else None
                fit, choice = search(train[rows], self.train[rows], self.classes, self.seed, given)
                right.append((fit.predict(test) == self.test).cpu())
                choices.append(choice)
            found.right[question], found.choices[question] = torch.stack(right), tuple(choices)
            # accuracy on so few images does not tell features apart, the least loss of any strength does
            found.held[question] = -sum(choice.least for choice in choices)

    def rows(self, question: Question, draw: int) -> Tensor | slice:
        """Which training images a draw has."""
        if question.share == 100:
            return slice(None)
        return torch.from_numpy(subset(self.labels, question.share, draw, self.seed)).to(self.train.device)

    def neighbours(self, train: Tensor, test: Tensor, scaled: bool, found: Answers) -> None:
        if scaled:
            train, mean, std = scale(train)
            test = ((test - mean) / std).to(train)
        answers = nearest.votes(train, self.train, test, self.classes, self.asked.ks)
        held = self.held(train)
        for question, answer, one in zip(self.asked.voted, answers, held, strict=True):
            found.right[question] = (answer == self.test).cpu()[None]
            found.held[question] = one

    def leave_one_out(self, every: Tensor, scaled: bool, found: Answers) -> None:
        """Each image by the others, its copies left out; no image is left to hold out."""
        assert self.single is not None
        labels = torch.cat([self.train, self.test])[self.single]
        features = scale(every[self.single])[0] if scaled else every[self.single]
        answers = nearest.votes(features, labels, None, self.classes, self.asked.ks)
        for question, answer in zip(self.asked.voted, answers, strict=True):
            found.right[question] = (answer == labels).cpu()[None]

    def held(self, train: Tensor) -> list[float]:
        """kNN accuracy, for each k, on the training images that the linear probe too holds out; 0 without any."""
        first, second = (torch.from_numpy(rows).to(train.device) for rows in split(self.labels, HELD_OUT, self.seed))
        if not len(second):
            return [0.0] * len(self.asked.ks)
        guesses = nearest.votes(train[first], self.train[first], train[second], self.classes, self.asked.ks)
        return (guesses == self.train[second]).float().mean(1).tolist()

    @property
    def labels(self) -> np.ndarray:
        return self.train.cpu().numpy()

    def scores(self, found: Sequence[Answers]) -> dict[Question, Score]:
        """For each question the mean over sets of weights that gave the same features; of finetuning, whose draws each
        have weights of their own, the first one's."""
        scores = {}
        for question in (question for question in self.asked.all if question in found[0].right):
            right = torch.stack([one.right[question] for one in found if question in one.right])
            strengths = tuple(choice.strength for one in found for choice in one.choices.get(question, ()))
            counted = question.metric != "knn" or self.single is None
            whole = right.double().mean().item()
            if counted and self.kept is not None:
                right = right[..., self.kept]
            score = interval(right, self.seed, strengths)
            scores[question] = score if right.shape[-1] == len(self.test) or not counted else score.without(whole)
        return scores


def interval(right: Tensor, seed: int, strengths: tuple[float, ...] = ()) -> Score:
    """Mean and 95 % bootstrap interval. right: bool [encoders, draws, T], averaged over encoders first.

    The percentile interval of Efron 1979 over 1,000 resamples of the test images and, where there are several, of the
    draws; the same ones for every call with the same shape and seed. std: of the draws' accuracies.
    """
    share = right.double().mean(0).cpu().numpy()
    draws, count = share.shape
    chance = np.random.default_rng(seed)
    means, whole = [], share.mean(0)
    if draws == 1 and count > MANY:  # the same distribution, without a million draws: few values are different
        values, often = np.unique(whole, return_counts=True)
        means = list(chance.multinomial(count, often / count, size=RESAMPLES) @ values / count)
    for _ in range(0 if means else RESAMPLES):
        one = whole if draws == 1 else share[chance.integers(draws, size=draws)].mean(0)
        means.append(one[chance.integers(count, size=count)].mean())
    low, high = np.quantile(means, (0.025, 0.975))
    std = float(share.mean(1).std(ddof=1)) if draws > 1 else None
    return Score(float(share.mean()), float(low), float(high), strengths, std, draws)


def best(names: Sequence[str], found: Sequence[Answers]) -> dict[Question, str]:
    """Question → the features that do best on held-out training images; of equals the deepest.

    linear: the least loss there of any strength, summed over draws; kNN: the highest accuracy. Questions that held
    nothing out, or that not all features were asked, have no best.
    """
    held: list[Mapping[Question, float]] = [one.held for one in found]
    asked = [question for question in held[0] if all(question in one for one in held)]
    return {question: names[max(range(len(names)), key=lambda at: (held[at][question], at))] for question in asked}
