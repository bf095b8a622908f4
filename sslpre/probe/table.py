"""What a probe found: numbers for programs, a table of 80 columns and a verdict for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from sslpre.probe.duplicates import Duplicates
from sslpre.probe.questions import Question

WORDS = {"start": "the weights it began with", "random weights": "random weights", "raw pixels": "raw pixels"}
EVERY = {  # what the best of several stages is held against
    "start": "every stage of the weights it began with",
    "random weights": "every stage of random weights",
    "raw pixels": "raw pixels",
}
COLUMNS = (
    "encoder weights features dim stage metric labels_percent k mean low high std draws strength mean_with_duplicates "
    "chance classes train_images test_images encoder_hash"
).split()


@dataclass(frozen=True)
class Score:
    """A share of test images that were classified right, in [0, 1], and its 95 % bootstrap interval."""

    accuracy: float
    low: float
    high: float
    strengths: tuple[float, ...] = ()  # of the linear probe, chosen for each set of weights and draw
    std: float | None = None  # of the draws, where there are several
    draws: int = 1
    with_duplicates: float | None = None  # the accuracy had test images stayed that are training images

    def beats(self, other: Score) -> bool:
        """Better by more than both intervals."""
        return self.low > other.high

    def without(self, accuracy: float) -> Score:
        """The same, with the accuracy that copies of training images would have given."""
        return replace(self, with_duplicates=accuracy)

    @property
    def strength(self) -> float | None:
        """The median of the strengths."""
        return sorted(self.strengths)[len(self.strengths) // 2] if self.strengths else None

    def json(self) -> dict[str, Any]:
        plain = {"accuracy": self.accuracy, "low": self.low, "high": self.high}
        more = {"strengths": self.strengths, "std": self.std, "with_duplicates": self.with_duplicates}
        return plain | {key: value for key, value in more.items() if value not in (None, ())} | {"draws": self.draws}


@dataclass(frozen=True)
class Row:
    """weights: "encoder", "start" (those it began with), "random weights" (the mean of 3 seeds) or "raw pixels".

    features: which, of `dim` numbers; stage: their number in timm's `out_indices`, None for the output and raw pixels.
    """

    weights: str
    features: str
    dim: int
    scores: dict[Question, Score]
    stage: int | None = None


@dataclass(frozen=True)
class Alone:
    """Of nearest neighbours where each of `images` is classified by the others; there were `before`, with those that
    repeat an earlier one. majority_chance: the share of the most frequent class."""

    images: int
    before: int
    majority_chance: float


@dataclass(frozen=True)
class Report:
    """Rows stand in the order of the table. Of rows with the same weights the last is what the verdict is about: for an
    encoder its output."""

    rows: tuple[Row, ...]
    classes: tuple[str, ...]
    train_images: int
    test_images: int  # that are counted: without copies of training images
    unlabelled: int  # left out, of both splits
    split: str
    uniform_chance: float  # 1 / classes
    majority_chance: float  # share of test images that have the most frequent class of the training split
    k: int  # of the metric "knn", the first of the questions where there are several
    temperature: float
    encoder_hash: str
    best: dict[Question, str]  # question → features of the encoder that are best on held-out training images
    duplicates: Duplicates
    counts: dict[float, int]  # percent of the labels → training images
    warnings: list[str] = field(default_factory=list)
    alone: Alone | None = None  # of kNN, where there is no test split
    about: dict[str, Any] = field(default_factory=dict)  # what was probed, for `json`

    @property
    def chance(self) -> float:
        """The better of two ways to guess."""
        return max(self.uniform_chance, self.majority_chance)

    def chance_of(self, question: Question) -> float:
        """The same, of the images that this question is about."""
        if question.metric == "knn" and self.alone is not None:
            return max(self.uniform_chance, self.alone.majority_chance)
        return self.chance

    @property
    def questions(self) -> tuple[Question, ...]:
        """In the order of the table. Each is answered by the output of all weights, and by raw pixels."""
        return tuple(self.last("encoder").scores)

    @property
    def heads(self) -> tuple[Question, ...]:
        """Those of the verdict, and under their own names in `json`: of several k only one."""
        return tuple(q for q in self.questions if q.metric != "knn" or q.k == self.k)

    def last(self, weights: str) -> Row:
        return next(row for row in reversed(self.rows) if row.weights == weights)

    @property
    def baselines(self) -> tuple[str, ...]:
        """Weights that the encoder is held against, in the order of the table."""
        return tuple(dict.fromkeys(row.weights for row in self.rows if row.weights != "encoder"))

    def beats(self) -> dict[Question, dict[str, bool]]:
        """Question → baseline → whether the encoder's output is better by more than the bootstrap intervals."""
        found = {}
        for question in self.heads:
            mine = self.last("encoder").scores[question]
            won = {name: mine.beats(self.last(name).scores[question]) for name in self.baselines}
            found[question] = won | {"chance": mine.low > self.chance_of(question)}
        return found

    def best_beats(self) -> dict[Question, dict[str, bool]]:
        """Question → baseline → whether the encoder's best features are better than every row of that baseline."""
        found = {}
        for question in (question for question in self.heads if question in self.best):
            features = self.best[question]
            row = next(row for row in self.rows if row.weights == "encoder" and row.features == features)
            mine = row.scores[question]
            won = {
                name: all(mine.beats(row.scores[question]) for row in self.rows if row.weights == name)
                for name in self.baselines
            }
            found[question] = won | {"chance": mine.low > self.chance_of(question)}
        return found

    def verdict(self) -> str:
        """A sentence about the output, and one about the best stage where that is another."""
        output, best = self.last("encoder").features, self.best_beats()
        others = [question for question in best if self.best[question] != output]
        subject = "The encoder's output" if others else "The encoder"
        text = f"{subject} {spoken({question: sentence(beats, WORDS) for question, beats in self.beats().items()})}."
        if not others:
            return text
        parts = {one: f"its best stage, {self.best[one]}, {sentence(best[one], EVERY)}" for one in others}
        return f"{text} I{spoken(parts)[1:]}."

    def json(self) -> dict[str, Any]:
        """Plain values. Accuracies are shares in [0, 1]."""
        kept = ("rows", "best", "duplicates", "counts", "about", "alone")
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in kept}
        plain["leave_one_out"] = asdict(self.alone) if self.alone is not None else None
        keyed: dict[str, dict[Question, Any]] = {
            "best": self.best,
            "beats": self.beats(),
            "best_beats": self.best_beats(),
        }
        for name, found in keyed.items():
            plain[name] = {question.key: value for question, value in found.items() if question in self.heads}
        plain |= {"chance": self.chance, "verdict": self.verdict(), "duplicates": self.duplicates.json()}
        return {"schema": 2, **self.about, "rows": [self.plain(row) for row in self.rows], **plain}

    def plain(self, row: Row) -> dict[str, Any]:
        """A row for `json`: its scores of one metric each, and all of them as `results`."""
        heads = {question.key: row.scores[question].json() for question in self.heads if question in row.scores}
        results = [
            {"metric": q.metric, "labels_percent": q.share, "k": q.k or None, **score.json()}
            for q, score in row.scores.items()
        ]
        same = {"weights": row.weights, "features": row.features, "dim": row.dim, "stage": row.stage}
        return {**same, **heads, "results": results}

    def lines(self) -> Iterable[dict[str, Any]]:
        """Of every row and question a line of `csv`, its keys `COLUMNS`; chance has lines of its own."""
        for row in (*self.rows, None):
            for question in self.questions if row is None else row.scores:
                lone = self.alone if question.metric == "knn" else None
                line: dict[str, Any] = {
                    "encoder": self.about.get("path", ""),
                    "weights": "chance" if row is None else row.weights,
                    "metric": question.metric,
                    "labels_percent": f"{question.share:g}",
                    "k": question.k or "",
                    "chance": self.chance_of(question),
                    "classes": len(self.classes),
                    "train_images": lone.images - 1 if lone else self.counts.get(question.share, self.train_images),
                    "test_images": lone.images if lone else self.test_images,
                    "encoder_hash": self.encoder_hash,
                }
                if row is None:
                    yield line | {"mean": self.chance_of(question)}
                    continue
                score = row.scores[question]
                numbers = {"mean": score.accuracy, "low": score.low, "high": score.high, "std": score.std}
                more = {"strength": score.strength, "mean_with_duplicates": score.with_duplicates}
                same = {"features": row.features, "dim": row.dim, "stage": row.stage, "draws": score.draws}
                yield line | same | numbers | more

    def csv(self, head: bool = True) -> str:
        """One line for each features × metric × share × k; accuracies are shares in [0, 1]."""
        out = io.StringIO()
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        if head:
            writer.writeheader()
        writer.writerows(self.lines())
        return out.getvalue()

    def table(self) -> str:
        """Lines of at most 80 characters, without colour."""
        from sslpre.probe.printed import table

        return table(self)


def spoken(parts: dict[Question, str]) -> str:
    """What each question says, those that say the same together: `… (linear and kNN)`."""
    saying = [(words, [one.words for one in parts if parts[one] == words]) for words in parts.values()]
    return " and ".join(dict.fromkeys(f"{words} ({listed(names, 'and')})" for words, names in saying))


def sentence(beats: dict[str, bool], words: dict[str, str]) -> str:
    if not beats["chance"]:
        return "is not above chance"
    won = [words[name] for name in beats if name in words and beats[name]]
    lost = [words[name] for name in beats if name in words and not beats[name]]
    if not won:
        return f"does not beat {listed(lost, 'or')}"
    return f"beats {listed(won, 'and')}" + (f" but not {listed(lost, 'or')}" if lost else "")


def listed(names: list[str], word: str) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
