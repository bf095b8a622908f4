"""The images of a probe: which teach and which test it, and how they are read."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch

from sslpre.data import Source
from sslpre.data.find import subset
from sslpre.data.stream import BadList
from sslpre.errors import SslpreError
from sslpre.probe.features import Centres
from sslpre.probe.linear import split

TEST_SHARE = 0.2  # where there is no test split
VIEWS = 2 << 30  # bytes of centre views kept, so that images are decoded once; above it once for each pass
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
    divided: bool  # one folder was: there is no test split


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
            return Labelled(*sources, own, mapped[rows], classes, unlabelled, where, warnings, test.fingerprint, False)
        warnings.append(f"`{test.where}` has no labels to test with; a part of the training images is used")
    first, second = split(own, TEST_SHARE, seed)
    if not len(second):
        raise SslpreError(f"every class in `{train.where}` has one image, none is left to test with", HINT, 4)
    note = f"a fifth of each class of {train.where}, seed {seed}"
    sources = subset(train, known[first]), subset(train, known[second])
    return Labelled(*sources, own[first], own[second], classes, unlabelled, note, warnings, train.fingerprint, True)


def pretrained_too(data: Labelled, fingerprint: str) -> list[str]:
    """What to say where the test images are some of those, with this fingerprint, that the encoder learned from."""
    same = fingerprint and fingerprint == data.test_from
    return ["the encoder was pretrained on the test images too, without their labels"] if same else []


def class_name(source: Source, number: int) -> str:
    return source.classes[number] if number < len(source.classes) else str(number)


def centres(
    data: Labelled,
    size: int,
    side: int,
    device: torch.device,
    workers: int | None,
    max_bad: float,
    hashed: bool = False,
) -> list[Centres]:
    """The centre views of both parts, `size` pixels wide, the training images to be read first; as `Centres` says."""
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
            hashed=hashed,
        )
        for source, bad in ((data.train, first), (data.test, BadList(None, max_bad, total, after=first)))
    ]
