"""How good is a frozen encoder? Linear and nearest-neighbour accuracy, beside what an untrained network, raw pixels and
guessing reach on the same images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sslpre.data import Source
from sslpre.data.find import subset
from sslpre.data.stream import BadList
from sslpre.encoder import Encoder
from sslpre.errors import SslpreError
from sslpre.probe import knn as nearest
from sslpre.probe.features import (
    RAW_SIDE,
    Centres,
    Layout,
    Reading,
    calibration_images,
    extract,
    fingerprint,
    layout,
    random_twin,
    readings,
)
from sslpre.probe.judge import Answers, Judge, best, interval
from sslpre.probe.linear import split
from sslpre.probe.table import METRICS, Report, Row, Score

__all__ = ["Report", "Row", "Score", "interval", "probe"]

SEEDS = 3  # of random weights
TEST_SHARE = 0.2  # where there is no test split
VIEWS = 2 << 30  # bytes of centre views kept, so that images are decoded once; above it once for each pass
FEATURES = 1 << 29  # bytes of features held at a time; what takes more is read in several passes
HINT = "labels are folder names: sslpre probe --data DIR with DIR/cat/1.jpg and DIR/dog/2.jpg"


@dataclass(frozen=True)
class Labelled:
    """Two disjoint sets of labelled images whose labels count through the same `classes`."""

    train: Source
    test: Source
    train_labels: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    unlabelled: int
    split: str
    warnings: list[str]
    test_from: str  # fingerprint of the source that the test images are part of


def probe(
    encoder: Encoder,
    train: Source,
    test: Source | None,
    *,
    side: int,
    linear: bool,
    knn: bool,
    start: Encoder | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    max_bad: float = 0.01,
    pretrained_on: str = "",
    stages: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Probe every stage of `encoder` and its output on `train` and `test`; without `test`, on a seeded stratified fifth
    of `train`.

    side: of the canvas that images are decoded to, in pixels; the encoder sees centre views at its own image size.
    start: the weights that training began with, where those were not random; they get rows of their own.
    workers: decoding threads, None for one per core. seed: of the splits, the random weights (seed + 1 to seed + 3) and
    the bootstrap. pretrained_on: fingerprint of the images that the encoder learned from; where test images were among
    them the report says so. stages: else the output alone is probed. say: gets one line of progress at a time. The
    encoders come back where and as they were; `encoder`'s weights are hashed before and after.
    Raises SslpreError: exit 4 without labels, 10 if features are not finite, 20 with more than the share `max_bad` of
    unreadable images, training and test images together; RuntimeError if the encoder changed while it was probed;
    ValueError if `start` is of another architecture.
    """
    if not (linear or knn):
        raise SslpreError("nothing to probe with", "sslpre probe --linear, or --knn, or both")
    if start is not None and start.architecture != encoder.architecture:
        raise ValueError(f"the weights before training are of {start.architecture}, not {encoder.architecture}")
    device = torch.device(device)
    data = labelled(train, test, seed)
    parts = centres(data, encoder.image_size, side, device, workers, max_bad)
    with lent(encoder, device), lent(start or encoder, device):
        before = fingerprint(encoder)
        plan = layout(encoder) if stages else layout(encoder).output()
        exam = Exam(data, parts, plan, linear, knn, seed, device, say)
        exam.take_all(encoder, start)
        if fingerprint(encoder) != before:
            raise RuntimeError("the encoder's weights or buffers changed while it was probed")
    return reported(exam, encoder.image_size, before, pretrained_too(data, pretrained_on))


def reported(exam: Exam, size: int, before: str, warnings: list[str]) -> Report:
    """What everybody answered. size: of the encoder's images; before: its hash."""
    data = exam.data
    wide = min(RAW_SIDE, size)
    rows, judge = exam.rows(f"{wide}x{wide}"), exam.judge()
    majority = torch.bincount(judge.train, minlength=len(data.classes)).argmax()
    notes = [*exam.plan.notes, *data.warnings, *warnings, *doubts(exam.parts, rows, exam.knn)]
    return Report(
        rows=rows,
        classes=data.classes,
        train_images=len(judge.train),
        test_images=len(judge.test),
        unlabelled=data.unlabelled,
        split=data.split,
        uniform_chance=1 / len(data.classes),
        majority_chance=(judge.test == majority).double().mean().item(),
        k=min(nearest.K, len(judge.train)),
        temperature=nearest.TEMPERATURE,
        encoder_hash=before,
        best=best(exam.plan.names, [found[0] for found in exam.found["encoder"]], exam.linear, exam.knn),
        warnings=notes,
    )


@dataclass
class Exam:
    """The same images put to one set of weights after another. Features are judged and dropped, the answers stay.

    found: weights → row of the layout → answers of each set of weights; `raw` are those of raw pixels.
    """

    data: Labelled
    parts: list[Centres]
    plan: Layout
    linear: bool
    knn: bool
    seed: int
    device: torch.device
    say: Callable[[str], None]
    found: dict[str, list[list[Answers]]] = field(default_factory=dict)
    raw: Answers | None = None
    raw_dim: int = 0

    def take_all(self, encoder: Encoder, start: Encoder | None) -> None:
        """Read and judge the encoder, the weights it began with and random weights."""
        self.take([("encoder", encoder), *([("start", start)] if start is not None else [])])
        calibration, batch = calibration_images(self.parts[0], self.seed), self.parts[0].stream.batch_size
        twins = (random_twin(encoder, self.seed + 1 + number, calibration, batch) for number in range(SEEDS))
        self.take([("random weights", twin) for twin in twins])

    def take(self, candidates: list[tuple[str, Encoder]]) -> None:
        """Read and judge all rows of these weights; the first time raw pixels too."""
        images = sum(len(part.stream.source) for part in self.parts)
        for wanted in readings([one for _, one in candidates], self.plan, images, FEATURES):
            names = [next(name for name, one in candidates if one is encoder) for encoder, _ in wanted]
            self.say(f"encoding {images:,} images with the weights of: {', '.join(dict.fromkeys(names))}")
            first = self.raw is None
            (train, train_raw), (test, test_raw) = (extract(wanted, self.plan, part, first) for part in self.parts)
            if first and train_raw is not None and test_raw is not None:
                self.say("fitting raw pixels")
                self.raw_dim = train_raw.shape[1]
                self.raw = self.judge().answers(train_raw, test_raw, scaled=False)
            del train_raw, test_raw
            for name, reading, pairs in zip(names, wanted, zip(train, test, strict=True), strict=True):
                self.examine(name, reading, list(zip(*pairs, strict=True)))

    def examine(self, name: str, reading: Reading, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Judge features (training, test) of one encoder. Random weights share a C: the first seed's."""
        judge = self.judge()
        table = self.found.setdefault(name, [[] for _ in self.plan.names])
        for row, (train, test) in zip(reading[1], pairs, strict=True):
            self.say(f"fitting {name}, {self.plan.names[row]}")
            choice = table[row][0].choice if table[row] else None
            table[row].append(judge.answers(train, test, self.plan.stages[row] is not None, choice))

    def judge(self) -> Judge:
        """With the labels of the images that could be read, which is known after the first pass."""
        train, test = (
            torch.from_numpy(labels)[part.index].to(self.device)
            for labels, part in zip((self.data.train_labels, self.data.test_labels), self.parts, strict=True)
        )
        return Judge(train, test, len(self.data.classes), self.linear, self.knn, self.seed)

    def rows(self, raw_name: str) -> tuple[Row, ...]:
        """The whole table: the encoder's features, those it began with, those of random weights, raw pixels."""
        assert self.raw is not None, "rows are asked for after the weights were judged"
        judge, rows = self.judge(), []
        for weights in ("encoder", "start", "random weights"):
            for at, found in enumerate(self.found.get(weights, ())):
                plan = self.plan
                rows.append(Row(weights, plan.names[at], plan.dims[at], *judge.scores(found), stage=plan.stages[at]))
        return (*rows, Row("raw pixels", raw_name, self.raw_dim, *judge.scores([self.raw])))


def centres(
    data: Labelled, size: int, side: int, device: torch.device, workers: int | None, max_bad: float
) -> list[Centres]:
    """The centre views of both parts, `size` pixels wide, the training images to be read first."""
    total = len(data.train) + len(data.test)
    first = BadList(None, max_bad, total)
    return [
        Centres(
            source,
            side=size,
            canvas=side,
            batch=64 if size > 64 else 256,
            workers=(os.cpu_count() or 1) if workers is None else workers,
            device=device,
            bad=bad,
            keep=total * 3 * size**2 <= VIEWS,
        )
        for source, bad in ((data.train, first), (data.test, BadList(None, max_bad, total, after=first)))
    ]


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


def labelled(train: Source, test: Source | None, seed: int) -> Labelled:
    """The two splits, without unlabelled images and classes that only the test split has. Raises SslpreError (4)."""
    known = np.flatnonzero(train.labels >= 0)
    if len(np.unique(train.labels[known])) < 2:
        raise SslpreError(f"no labels to probe with in `{train.where}`", HINT, 4)
    present, own = np.unique(train.labels[known], return_inverse=True)
    classes = tuple(class_name(train, i) for i in present)
    unlabelled, warnings = len(train) - len(known), []
    if test is not None:
        number = {name: i for i, name in enumerate(classes)}  # the test split may count its classes otherwise
        known_names = (class_name(test, i) for i in range(int(test.labels.max(initial=-1)) + 1))
        mapped = np.array([*(number.get(name, -1) for name in known_names), -1])[test.labels]  # -1 finds the last
        rows = np.flatnonzero(mapped >= 0)
        foreign = int((test.labels >= 0).sum()) - len(rows)
        if foreign:
            warnings.append(f"{foreign:,} test images left out: their class has no training image")
        if len(rows):
            unlabelled += int((test.labels < 0).sum())
            where = f"{train.where} and {test.where}" if train.where != test.where else f"both of {train.where}"
            sources = subset(train, known), subset(test, rows)
            return Labelled(*sources, own, mapped[rows], classes, unlabelled, where, warnings, test.fingerprint)
        warnings.append(f"`{test.where}` has no labels to test with; a part of the training images is used")
    first, second = split(own, TEST_SHARE, seed)
    if not len(second):
        raise SslpreError(f"every class in `{train.where}` has one image, none is left to test with", HINT, 4)
    note = f"a fifth of each class of {train.where}, seed {seed}"
    sources = subset(train, known[first]), subset(train, known[second])
    return Labelled(*sources, own[first], own[second], classes, unlabelled, note, warnings, train.fingerprint)


def pretrained_too(data: Labelled, fingerprint: str) -> list[str]:
    """What to say where the test images are some of those, with this fingerprint, that the encoder learned from."""
    same = fingerprint and fingerprint == data.test_from
    return ["the encoder was pretrained on the test images too, without their labels"] if same else []


def class_name(source: Source, number: int) -> str:
    return source.classes[number] if number < len(source.classes) else str(number)


def doubts(parts: list[Centres], rows: tuple[Row, ...], knn: bool) -> list[str]:
    """What a reader should know before believing the table."""
    found = []
    missing = parts[-1].stream.bad.count  # of both parts
    if missing:
        found.append(f"{missing:,} images could not be read and are left out")
    shared = sum(digest in set(parts[0].digests) for digest in parts[1].digests)
    if shared:
        found.append(f"{shared:,} of {len(parts[1].digests):,} test images are also training images, pixel for pixel")
    if knn and len(parts[0].index) < nearest.K:
        found.append(f"k is {len(parts[0].index)}, not {nearest.K}: there are no more training images")
    output = next(row for row in reversed(rows) if row.weights == "encoder")
    random = [row for row in rows if row.weights == "random weights"]
    for metric, name in METRICS.items():
        mine: Score | None = getattr(output, metric)
        if mine and mine.beats(getattr(random[-1], metric)):  # else the verdict says it
            equals = [row.features for row in random if not mine.beats(getattr(row, metric))]
            if equals:
                found.append(f"{output.features} does not beat {', '.join(equals)} of random weights ({name})")
    return found
