"""How good is a frozen encoder? Linear and nearest-neighbour accuracy, beside what an untrained network, raw pixels and
guessing reach on the same images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
    calibration_images,
    extract,
    fingerprint,
    names,
    random_twin,
)
from sslpre.probe.linear import search, split
from sslpre.probe.table import METRICS, Report, Row, Score

__all__ = ["Report", "Row", "Score", "probe"]

SEEDS = 3  # of random weights
TEST_SHARE = 0.2  # where there is no test split
RESAMPLES = 1000
MEMORY = 2 << 30  # bytes of centre views kept, so that images are decoded once; above it they are decoded three times
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
    seed: int = 0,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    max_bad: float = 0.01,
    pretrained_on: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Probe `encoder` on `train` and `test`; without `test`, on a seeded stratified fifth of `train`.

    side: of the canvas that images are decoded to, in pixels; the encoder sees centre views at its own image size.
    workers: decoding threads, None for one per core. seed: of the splits, the random weights (seed + 1 to seed + 3) and
    the bootstrap. pretrained_on: fingerprint of the images that the encoder learned from; where test images were among
    them the report says so. say: gets one line of progress at a time. The encoder comes back where and as it was; its
    weights are hashed before and after.
    Raises SslpreError: exit 4 without labels, 10 if features are not finite, 20 with more than the share `max_bad` of
    unreadable images, training and test images together; RuntimeError if the encoder changed while it was probed.
    """
    if not (linear or knn):
        raise SslpreError("nothing to probe with", "sslpre probe --linear, or --knn, or both")
    device = torch.device(device)
    data = labelled(train, test, seed)
    parts = centres(data, encoder.image_size, side, device, workers, max_bad)
    with lent(encoder, device):
        before = fingerprint(encoder)
        say(f"encoding {len(data.train):,} training and {len(data.test):,} test images")
        (mine,), raw = paired([encoder], parts, with_raw=True)
        say(f"encoding them with random weights, {SEEDS} seeds")
        calibration, batch = calibration_images(parts[0], seed), parts[0].stream.batch_size
        twins = [random_twin(encoder, seed + 1 + number, calibration, batch) for number in range(SEEDS)]
        theirs, _ = paired(twins, parts)
        if fingerprint(encoder) != before:
            raise RuntimeError("the encoder's weights or buffers changed while it was probed")
    train_labels = torch.from_numpy(data.train_labels)[parts[0].index].to(device)
    test_labels = torch.from_numpy(data.test_labels)[parts[1].index].to(device)
    judge = Judge(train_labels, test_labels, len(data.classes), linear, knn, seed, say)
    rows = judge.rows(names(encoder), mine, theirs, raw, min(RAW_SIDE, encoder.image_size))
    majority = torch.bincount(train_labels, minlength=len(data.classes)).argmax()
    return Report(
        rows=rows,
        classes=data.classes,
        train_images=len(train_labels),
        test_images=len(test_labels),
        unlabelled=data.unlabelled,
        split=data.split,
        uniform_chance=1 / len(data.classes),
        majority_chance=(test_labels == majority).double().mean().item(),
        k=min(nearest.K, len(train_labels)),
        temperature=nearest.TEMPERATURE,
        encoder_hash=before,
        warnings=[*data.warnings, *pretrained_too(data, pretrained_on), *doubts(parts, rows, knn)],
    )


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
            keep=total * 3 * size**2 <= MEMORY,
        )
        for source, bad in ((data.train, first), (data.test, BadList(None, max_bad, total, after=first)))
    ]


Pair = tuple[Tensor, Tensor]  # the same features of the training and of the test images


def paired(encoders: list[Encoder], parts: list[Centres], with_raw: bool = False) -> tuple[list[list[Pair]], Pair]:
    """Encoder → name of features → features of both parts; and the raw pixels of both parts."""
    (train, train_raw), (test, test_raw) = (extract(encoders, part, with_raw) for part in parts)
    features = [list(zip(a, b, strict=True)) for a, b in zip(train, test, strict=True)]
    nothing = torch.empty(0)
    return features, (nothing if train_raw is None else train_raw, nothing if test_raw is None else test_raw)


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


@dataclass(frozen=True)
class Judge:
    """Scores features by what the probes make of them. Labels are [N] and [T] on the features' device."""

    train: Tensor
    test: Tensor
    classes: int
    linear: bool
    knn: bool
    seed: int
    say: Callable[[str], None]

    def rows(
        self, features: tuple[str, ...], mine: list[Pair], theirs: list[list[Pair]], raw: Pair, side: int
    ) -> tuple[Row, ...]:
        """The whole table: the encoder's features, those of random weights, raw pixels."""
        return (
            *(self.row("encoder", name, [mine[at]]) for at, name in enumerate(features)),
            *(self.row("random weights", name, [one[at] for one in theirs]) for at, name in enumerate(features)),
            self.row("raw pixels", f"{side}x{side}", [raw]),
        )

    def row(self, weights: str, features: str, pairs: list[Pair]) -> Row:
        """One row from the same features of one or more encoders: the mean of their scores."""
        self.say(f"fitting {weights}, {features}")
        linear: Score | None = None
        if self.linear:
            fits = [search(train, self.train, self.classes, self.seed) for train, _ in pairs]
            right = [fit.predict(test) == self.test for fit, (_, test) in zip(fits, pairs, strict=True)]
            linear = interval(torch.stack(right), self.seed, tuple(fit.strength for fit in fits))
        knn: Score | None = None
        if self.knn:
            right = [nearest.predict(train, self.train, test, self.classes) == self.test for train, test in pairs]
            knn = interval(torch.stack(right), self.seed)
        return Row(weights, features, pairs[0][0].shape[1], linear, knn)


def interval(right: Tensor, seed: int, strengths: tuple[float, ...] = ()) -> Score:
    """Mean and 95 % bootstrap interval over test images. right: bool [encoders, T], averaged over encoders first.

    The percentile interval of Efron 1979 over 1,000 resamples, the same ones for every call with the same T and seed.
    """
    share = right.double().mean(0).cpu().numpy()
    draw = np.random.default_rng(seed)
    means = [share[draw.integers(len(share), size=len(share))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Score(float(share.mean()), float(low), float(high), strengths)


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
