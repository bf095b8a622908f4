"""The same images put to one set of weights after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from sslpre.encoder import Encoder
from sslpre.errors import SslpreError
from sslpre.probe import duplicates
from sslpre.probe.features import (
    Centres,
    Layout,
    Reading,
    calibration_images,
    extract,
    random_twin,
    readings,
)
from sslpre.probe.finetune import Tuning, steps
from sslpre.probe.images import VIEWS, Labelled
from sslpre.probe.judge import Answers, Judge
from sslpre.probe.questions import Asked, Question
from sslpre.probe.table import Row

SEEDS = 3  # of random weights
FEATURES = 1 << 29  # bytes of features held at a time; what takes more is read in several passes


@dataclass
class Exam:
    """Features are judged and dropped, the answers stay.

    found: weights → row of the layout → answers of each set of weights; `raw` are those of raw pixels.
    """

    data: Labelled
    parts: list[Centres]
    plan: Layout
    asked: Asked
    seed: int
    device: torch.device
    say: Callable[[str], None]
    found: dict[str, list[list[Answers]]] = field(default_factory=dict)
    rates: dict[tuple[Question, str], float] = field(default_factory=dict)  # of finetuning, by weights
    raw: Answers | None = None
    raw_dim: int = 0

    def take_all(self, encoder: Encoder, start: Encoder | None) -> None:
        """Read and judge the encoder, the weights it began with and random weights; then train copies of them."""
        own = [("encoder", encoder), *([("start", start)] if start is not None else [])]
        self.take(own)
        calibration, batch = calibration_images(self.parts[0], self.seed), self.parts[0].stream.batch_size
        twins = [random_twin(encoder, self.seed + 1 + number, calibration, batch) for number in range(SEEDS)]
        if self.asked.linear or self.asked.knn:
            self.take([("random weights", twin) for twin in twins])
        for question in self.asked.tuned:
            for name, one in own:
                self.finetune(question, name, [one])
            self.finetune(question, "random weights", twins)

    def take(self, candidates: list[tuple[str, Encoder]]) -> None:
        """Read and judge all rows of these weights; the first time raw pixels too."""
        images = sum(len(part.stream.source) for part in self.parts)
        only_raw = not (self.asked.linear or self.asked.knn)
        nothing: list[list[Reading]] = [[(one, ())] for _, one in candidates[:1]] if only_raw else []
        for wanted in nothing or readings([one for _, one in candidates], self.plan, images, FEATURES):
            names = [next(name for name, one in candidates if one is encoder) for encoder, _ in wanted]
            which = "" if only_raw else f" with the weights of: {', '.join(dict.fromkeys(names))}"
            self.say(f"{'reading' if only_raw else 'encoding'} {images:,} images{which}")
            first = self.raw is None
            (train, train_raw), (test, test_raw) = (extract(wanted, self.plan, part, first) for part in self.parts)
            if first and train_raw is not None and test_raw is not None:
                self.take_raw(train_raw, test_raw)
            del train_raw, test_raw
            for name, reading, pairs in zip(names, wanted, zip(train, test, strict=True), strict=True):
                self.examine(name, reading, list(zip(*pairs, strict=True)))

    def take_raw(self, train: Tensor, test: Tensor) -> None:
        """Raw pixels: nothing of them can be trained, so that finetuned they are worth what the linear probe finds."""
        self.say("fitting raw pixels")
        judge, self.raw_dim = self.judge(), train.shape[1]
        self.raw = judge.answers(train, test, scaled=False)
        for question in self.asked.tuned:
            same = Question("linear", question.share)
            if same not in self.raw.right:
                judge.linear(train, test, [same], self.raw)
            self.raw.right[question] = self.raw.right[same]

    def examine(self, name: str, reading: Reading, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Judge features (training, test) of one encoder. Random weights share a C: the first seed's."""
        judge = self.judge()
        table = self.found.setdefault(name, [[] for _ in self.plan.names])
        for row, (train, test) in zip(reading[1], pairs, strict=True):
            self.say(f"fitting {name}, {self.plan.names[row]}")
            before = table[row][0] if table[row] else None
            table[row].append(judge.answers(train, test, self.plan.stages[row] is not None, before))

    def finetune(self, question: Question, name: str, encoders: list[Encoder]) -> None:
        """Train copies of these weights in turn on the question's subsets; each once, where there are more of them than
        draws. The rate is chosen with the first of both."""
        judge, count = self.judge(), max(question.draws, len(encoders))
        right, rate = [], 0.0
        for number in range(count):
            rows = judge.rows(question, number % question.draws)
            index = torch.arange(len(judge.train)) if isinstance(rows, slice) else rows.cpu()
            tuning = Tuning(self.views(index), judge.train[index.to(self.device)], judge.classes, self.seed)
            encoder = encoders[number % len(encoders)]
            about = f"{name} on {len(index):,} images, {steps(len(index)):,} steps"
            if not number:
                self.say(f"finetuning {about}: looking for the learning rate")
                rate = self.rates[question, name] = tuning.rate(encoder)
            self.say(f"finetuning {about} at {rate:g}: {number + 1} of {count}")
            tuned = tuning.trained(encoder, rate, number)
            logits = torch.cat([tuned.logits(views) for views in self.parts[1]])
            if not logits.isfinite().all():
                raise SslpreError(f"finetuning {name} was finite at no rate", "probe it with --linear alone", 10)
            guess = logits.argmax(1)
            right.append((guess == judge.test).cpu())
        rows_found = self.found.setdefault(name, [[] for _ in self.plan.names])
        if not rows_found[-1]:
            rows_found[-1].append(Answers())
        rows_found[-1][0].right[question] = torch.stack(right)

    def views(self, index: Tensor) -> Tensor:
        """Centre views of these training images."""
        return self.parts[0].views(index)

    @cached_property
    def kept(self) -> Tensor:
        """Rows of the test images that no training image equals. Raises SslpreError (exit 4) where there are none."""
        rows = duplicates.unseen(self.parts[0], self.parts[1])
        if not len(rows) and not self.alone:
            message = f"every test image of `{self.data.test.where}` is a training image, pixel for pixel"
            raise SslpreError(message, "name a --data whose test images are others, or one folder without test/", 4)
        return rows

    @cached_property
    def single(self) -> Tensor:
        return duplicates.single(self.parts)

    @property
    def alone(self) -> bool:
        """Is nothing asked but nearest neighbours of a folder that has no test split?"""
        return self.data.divided and not (self.asked.linear or self.asked.finetune)

    def duplicates(self, pairs: bool) -> duplicates.Duplicates:
        """Of the test images; where there is no test split for the only question, of all."""
        if self.alone:
            return duplicates.within(self.parts, self.single.numpy(), pairs)
        return duplicates.between(self.parts[0], self.parts[1], self.kept.numpy(), pairs)

    def judge(self) -> Judge:
        """With the labels of the images that could be read, which is known after the first pass."""
        train, test = (
            torch.from_numpy(labels)[part.index].to(self.device)
            for labels, part in zip((self.data.train_labels, self.data.test_labels), self.parts, strict=True)
        )
        kept = None if len(self.kept) == len(test) or self.alone else self.kept
        single = self.single.to(self.device) if self.data.divided else None
        asked = self.asked.at_most(len(train) if single is None else len(single) - 1)
        return Judge(train, test, len(self.data.classes), asked, self.seed, kept, single)

    def rows(self, raw_name: str) -> tuple[Row, ...]:
        """The whole table: the encoder's features, those it began with, those of random weights, raw pixels."""
        assert self.raw is not None, "rows are asked for after the weights were judged"
        judge, rows = self.judge(), []
        plan = self.plan
        for weights in ("encoder", "start", "random weights"):
            for at, found in enumerate(self.found.get(weights, ())):
                if found:
                    rows.append(Row(weights, plan.names[at], plan.dims[at], judge.scores(found), plan.stages[at]))
        return (*rows, Row("raw pixels", raw_name, self.raw_dim, judge.scores([self.raw])))


def refuse_large(images: int, share: float, side: int) -> None:
    """Raises SslpreError (exit 2) where `share` percent of the images, `side` px wide, take too much memory to finetune
    on: before anything is read."""
    count = round(images * share / 100)
    if count * 3 * side**2 > VIEWS:
        most = math.floor(1000 * VIEWS / (images * 3 * side**2)) / 10
        message = f"finetuning on `{count:,}` images of {side} px takes more than {VIEWS >> 30} GiB of memory"
        raise SslpreError(message, f"--labels {most:g}%" if most else "finetune on a part of the images")


@contextmanager
def lent(encoder: Encoder, device: torch.device) -> Iterator[None]:
    """Inside, the encoder is on `device` in evaluation mode; after, where and in the modes it was."""
    modes = [(part, part.training) for part in encoder.modules()]
    home = encoder.mean.device
    encoder.to(device).eval()
    try:
        yield
    finally:
        encoder.to(home)
        for part, mode in modes:
            part.training = mode
