"""How good is an encoder? What a linear classifier and nearest neighbours make of its features, and what training makes
of it, beside what an untrained network, raw pixels and guessing reach on the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sslpre.data import Source
from sslpre.encoder import Encoder
from sslpre.errors import SslpreError
from sslpre.probe.duplicates import Duplicates
from sslpre.probe.exam import SEEDS, Exam, lent, refuse_large
from sslpre.probe.features import RAW_SIDE, fingerprint, layout
from sslpre.probe.finetune import ADAM_RATES, SGD_RATES
from sslpre.probe.images import centres, labelled, pretrained_too
from sslpre.probe.judge import Answers, best, interval
from sslpre.probe.knn import TEMPERATURE, K
from sslpre.probe.questions import Asked, Question
from sslpre.probe.table import Alone, Report, Row, Score, listed

__all__ = [
    "SEEDS",
    "Asked",
    "Exam",
    "Question",
    "Report",
    "Row",
    "Score",
    "centres",
    "interval",
    "labelled",
    "lent",
    "probe",
]


def probe(
    encoder: Encoder,
    train: Source,
    test: Source | None,
    *,
    side: int,
    linear: bool,
    knn: bool,
    finetune: bool = False,
    shares: Sequence[float] = (100.0,),
    ks: Sequence[int] = (K,),
    pairs: bool = False,
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
    of `train`, by nearest neighbours on all of it (leave-one-out).

    Test images that equal a training image are not counted. side: of the canvas that images are decoded to, in pixels.
    finetune: train copies of the encoder on labels too. shares: percent of the training labels, in (0, 100], for linear
    probe and finetuning; below 100 the mean of five draws. ks: numbers of neighbours. pairs: name the duplicates.
    start: the weights that training began with, where those were not random; they get rows of their own.
    workers: decoding threads, None for one per core. seed: of the splits, draws, random weights (seed + 1 to seed + 3),
    the finetuning and the bootstrap. pretrained_on: fingerprint of the images that the encoder learned from; where test
    images were among them the report says so. stages: else the output alone is probed. say: gets one line of progress
    at a time. The encoders come back where and as they were; `encoder`'s weights are hashed before and after.
    Raises SslpreError: exit 2 where the images to finetune on do not fit into memory, 4 without labels or where every
    test image is a training image, 10 if features are not finite, 20 with more than the share `max_bad` of unreadable
    images, training and test images together; RuntimeError if the encoder changed while it was probed; ValueError if
    `start` is of another architecture.
    """
    if not (linear or knn or finetune):
        raise SslpreError("nothing to probe with", "sslpre probe --linear, --knn or --finetune, or several of them")
    if start is not None and start.architecture != encoder.architecture:
        raise ValueError(f"the weights before training are of {start.architecture}, not {encoder.architecture}")
    device = torch.device(device)
    asked = Asked(linear, knn, finetune, tuple(sorted(set(shares))), tuple(sorted(set(ks))))
    data = labelled(train, test, seed)
    if finetune:
        refuse_large(len(data.train), asked.shares[-1], encoder.image_size)
    parts = centres(data, encoder.image_size, side, device, workers, max_bad, hashed=True)
    with lent(encoder, device), lent(start or encoder, device):
        before = fingerprint(encoder)
        plan = layout(encoder) if stages else layout(encoder).output()
        exam = Exam(data, parts, plan, asked, seed, device, say)
        exam.take_all(encoder, start)
        if fingerprint(encoder) != before:
            raise RuntimeError("the encoder's weights or buffers changed while it was probed")
    return reported(exam, encoder.image_size, before, pretrained_too(data, pretrained_on), pairs)


def reported(exam: Exam, size: int, before: str, warnings: list[str], pairs: bool) -> Report:
    """What everybody answered. size: of the encoder's images; before: its hash."""
    data, judge = exam.data, exam.judge()
    asked = judge.asked
    wide = min(RAW_SIDE, size)
    rows = exam.rows(f"{wide}x{wide}")
    counted = judge.test if judge.kept is None else judge.test[judge.kept]
    majority = torch.bincount(judge.train, minlength=len(data.classes)).argmax()
    majority_chance = (counted == majority).cpu().double().mean().item()
    train_images, test_images, split = len(judge.train), len(counted), data.split
    alone = None
    if judge.single is not None:
        labels = torch.cat([judge.train, judge.test])[judge.single]
        alone = Alone(
            len(labels), len(judge.train) + len(judge.test), torch.bincount(labels).max().item() / len(labels)
        )
        if exam.alone:
            train_images, test_images = len(labels) - 1, len(labels)
            split = f"each image of {data.train.where} by the others (leave-one-out)"
    found = exam.duplicates(pairs)
    shown = min(K if K in exam.asked.ks else exam.asked.ks[0], asked.ks[-1])
    counts = {share: len(judge.labels[judge.rows(Question("linear", share), 0)]) for share in asked.shares}
    return Report(
        rows=rows,
        classes=data.classes,
        train_images=train_images,
        test_images=test_images,
        unlabelled=data.unlabelled,
        split=split,
        uniform_chance=1 / len(data.classes),
        majority_chance=alone.majority_chance if alone is not None and exam.alone else majority_chance,
        k=shown,
        temperature=TEMPERATURE,
        encoder_hash=before,
        best=best(exam.plan.names, [found[0] if found else Answers() for found in exam.found["encoder"]]),
        duplicates=found,
        counts=counts,
        warnings=[*exam.plan.notes, *data.warnings, *warnings, *doubts(exam, rows, found, shown)],
        alone=alone,
    )


def doubts(exam: Exam, rows: tuple[Row, ...], duplicates: Duplicates, k: int) -> list[str]:
    """What a reader should know before believing the table. k: of several, the one of the verdict."""
    found = []
    missing = exam.parts[-1].stream.bad.count  # of both parts
    if missing:
        found.append(f"{missing:,} images could not be read and are left out")
    output = next(row for row in reversed(rows) if row.weights == "encoder")
    asked = exam.judge().asked
    found += copied(exam, {q: score for q, score in output.scores.items() if q.k in (0, k)}, duplicates)
    fewer = [str(k) for k in exam.asked.ks if exam.asked.knn and k > asked.ks[-1]]
    if fewer:
        found.append(f"k is {asked.ks[-1]}, not {listed(fewer, 'or')}: there are no more training images")
    edges = (min(SGD_RATES), min(ADAM_RATES), max(SGD_RATES), max(ADAM_RATES))
    for (question, name), rate in exam.rates.items():
        if rate in edges:
            found.append(f"{name}, {question.words}: {rate:g} is the last of the rates tried; another may do better")
    random = [row for row in rows if row.weights == "random weights"]
    for question, mine in output.scores.items():
        if question.metric != "finetune" and mine.beats(random[-1].scores[question]):  # else the verdict says it
            equals = [row.features for row in random if not mine.beats(row.scores[question])]
            if equals:
                text = f"{output.features} does not beat {', '.join(equals)} of random weights"
                found.append(
                    f"{text} ({question.words}{f', k = {question.k}' if len(asked.ks) > 1 and question.k else ''})"
                )
    return found


def copied(exam: Exam, output: dict[Question, Score], duplicates: Duplicates) -> list[str]:
    """What was left out because it was there twice, and what it would have changed."""
    found, left = [], f"{duplicates.left:,} are left"
    if exam.alone:
        if duplicates.removed:
            found.append(
                f"{duplicates.removed:,} of {duplicates.images:,} images repeat an earlier one, pixel for pixel: {left}"
            )
        if duplicates.nearly:
            found.append(f"{duplicates.nearly:,} of {duplicates.left:,} images nearly equal an earlier one; they count")
        return found
    if duplicates.removed:
        removed = f"{duplicates.removed:,} of {duplicates.images:,} test images"
        text = f"{removed} are also training images, pixel for pixel: {left}"
        with_them = [
            f"{question.words} {100 * score.with_duplicates:.1f} %, now {100 * score.accuracy:.1f} %"
            for question, score in output.items()
            if score.with_duplicates is not None and question.share == 100
        ]
        found.append("; with them ".join([text, ", ".join(with_them)]) if with_them else text)
    if duplicates.nearly:
        found.append(
            f"{duplicates.nearly:,} of {duplicates.left:,} test images nearly equal a training image; they count"
        )
    return found
