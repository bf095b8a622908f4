"""What a probe found: numbers for programs, a table of 80 columns and a verdict for people."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

METRICS = {"linear": "linear", "knn": "kNN"}
LABELS = {"random weights": "random"}  # in the table, where space is short
WORDS = {"start": "the weights it began with", "random weights": "random weights", "raw pixels": "raw pixels"}
EVERY = {  # what the best of several stages is held against
    "start": "every stage of the weights it began with",
    "random weights": "every stage of random weights",
    "raw pixels": "raw pixels",
}


@dataclass(frozen=True)
class Score:
    """A share of test images that were classified right, in [0, 1], and its 95 % bootstrap interval."""

    accuracy: float
    low: float
    high: float
    strengths: tuple[float, ...] = ()  # of the linear probe, chosen for each set of weights

    def beats(self, other: Score) -> bool:
        """Better by more than both intervals."""
        return self.low > other.high


@dataclass(frozen=True)
class Row:
    """weights: "encoder", "start" (those it began with), "random weights" (the mean of 3 seeds) or "raw pixels".

    features: which, of `dim` numbers; stage: their number in timm's `out_indices`, None for the output and raw pixels.
    """

    weights: str
    features: str
    dim: int
    linear: Score | None = None
    knn: Score | None = None
    stage: int | None = None


@dataclass(frozen=True)
class Report:
    """Rows stand in the order of the table. Of rows with the same weights the last is what the verdict is about: for an
    encoder its output."""

    rows: tuple[Row, ...]
    classes: tuple[str, ...]
    train_images: int
    test_images: int
    unlabelled: int  # left out, of both splits
    split: str
    uniform_chance: float  # 1 / classes
    majority_chance: float  # share of test images that have the most frequent class of the training split
    k: int
    temperature: float
    encoder_hash: str
    best: dict[str, str]  # metric → features of the encoder that are best on held-out training images
    warnings: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)  # what was probed, for `json`

    @property
    def chance(self) -> float:
        """The better of two ways to guess."""
        return max(self.uniform_chance, self.majority_chance)

    def last(self, weights: str) -> Row:
        return next(row for row in reversed(self.rows) if row.weights == weights)

    @property
    def baselines(self) -> tuple[str, ...]:
        """Weights that the encoder is held against, in the order of the table."""
        return tuple(dict.fromkeys(row.weights for row in self.rows if row.weights != "encoder"))

    def beats(self) -> dict[str, dict[str, bool]]:
        """Metric → baseline → whether the encoder's output is better by more than the bootstrap intervals."""
        return {
            metric: {name: mine.beats(getattr(self.last(name), metric)) for name in self.baselines}
            | {"chance": mine.low > self.chance}
            for metric in METRICS
            if (mine := getattr(self.last("encoder"), metric)) is not None
        }

    def best_beats(self) -> dict[str, dict[str, bool]]:
        """Metric → baseline → whether the encoder's best features are better than every row of that baseline."""
        found: dict[str, dict[str, bool]] = {}
        for metric, features in self.best.items():
            row = next(row for row in self.rows if row.weights == "encoder" and row.features == features)
            mine: Score = getattr(row, metric)
            found[metric] = {
                name: all(mine.beats(getattr(row, metric)) for row in self.rows if row.weights == name)
                for name in self.baselines
            } | {"chance": mine.low > self.chance}
        return found

    def verdict(self) -> str:
        """A sentence about the output, and one about the best stage where that is another."""
        output, best = self.last("encoder").features, self.best_beats()
        others = [metric for metric, features in self.best.items() if features != output]
        subject = "The encoder's output" if others else "The encoder"
        text = f"{subject} {spoken({metric: sentence(beats, WORDS) for metric, beats in self.beats().items()})}."
        if not others:
            return text
        parts = {metric: f"its best stage, {self.best[metric]}, {sentence(best[metric], EVERY)}" for metric in others}
        return f"{text} I{spoken(parts)[1:]}."

    def json(self) -> dict[str, Any]:
        """Plain values. Accuracies are shares in [0, 1]."""
        plain = asdict(self)
        rows = [{key: value for key, value in row.items() if value is not None} for row in plain.pop("rows")]
        for row in rows:
            row.get("knn", {}).pop("strengths", None)
            row.setdefault("stage", None)
        about = plain.pop("about")
        found = {"chance": self.chance, "beats": self.beats(), "best_beats": self.best_beats()}
        found["verdict"] = self.verdict()
        return {"schema": 1, **about, "rows": rows, **found, **plain}

    def table(self) -> str:
        """Lines of at most 80 characters, without colour."""
        return table(self)


def spoken(parts: dict[str, str]) -> str:
    """What each metric says, those that say the same together: `… (linear and kNN)`."""
    saying = [(words, [METRICS[metric] for metric in parts if parts[metric] == words]) for words in parts.values()]
    return " and ".join(dict.fromkeys(f"{words} ({' and '.join(metrics)})" for words, metrics in saying))


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


def table(report: Report) -> str:
    metrics = [metric for metric in METRICS if getattr(report.rows[0], metric) is not None]
    heads = {"linear": f"{'linear %':<22}{'C':<7}", "knn": "kNN %"}
    head = line("weights", "features", [heads[metric] for metric in metrics])
    rows = [line(LABELS.get(row.weights, row.weights), title(row), cells(report, row, metrics)) for row in report.rows]
    guess = "most frequent" if report.majority_chance > report.uniform_chance else f"1 in {len(report.classes)}"
    widths = {"linear": 29, "knn": 0}
    rows.append(line("chance", guess, [f"{100 * report.chance:5.1f}".ljust(widths[metric]) for metric in metrics]))
    rule = "-" * max(map(len, [head, *rows]))
    below = [wrapped(text) for text in [*notes(report, metrics), *(f"note: {warning}" for warning in report.warnings)]]
    flat = [part for parts in below for part in parts]
    return "\n".join([head, rule, *rows, rule, *flat, "", *wrapped(report.verdict())])


def line(weights: str, features: str, cells: list[str]) -> str:
    return f"{weights:<11}{features:<19}{''.join(cells)}".rstrip()


def title(row: Row) -> str:
    """The features and how many numbers they are; of a long name the end, which tells stages apart."""
    short = row.features if len(row.features) <= 11 else f"..{row.features[-9:]}"
    return f"{short} ({row.dim})"


def cells(report: Report, row: Row, metrics: list[str]) -> list[str]:
    best = [row.weights == "encoder" and row.features == report.best.get(metric) for metric in metrics]
    return [cell(row, metric, "*" if mark else " ") for metric, mark in zip(metrics, best, strict=True)]


def cell(row: Row, metric: str, mark: str) -> str:
    score: Score = getattr(row, metric)
    text = f"{100 * score.accuracy:5.1f}{mark}[{100 * score.low:.1f}, {100 * score.high:.1f}]"
    middle = sorted(score.strengths)[len(score.strengths) // 2] if score.strengths else 0.0
    return f"{text:<22}{float(f'{middle:.1g}'):<7g}" if metric == "linear" else text


def notes(report: Report, metrics: list[str]) -> list[str]:
    """What the numbers were measured on and with."""
    counts = f"{report.train_images:,} training and {report.test_images:,} test images"
    found = [
        f"{len(report.classes)} classes, {counts}: {report.split}",
        "in brackets: 95 % bootstrap intervals; random weights: the mean of 3 seeds",
        "* best of the encoder on held-out training images, without a look at test images",
    ]
    if any(row.stage is not None for row in report.rows):
        found.append("stages: maps averaged to a grid of at most 4,096 numbers; output: what is exported")
    if "linear" in metrics:
        found.append(
            "linear: logistic regression on standardised features, strength C chosen on 20 % of the training images,"
            " for random weights with the first seed"
        )
    if "knn" in metrics:
        found.append(
            f"kNN: cosine, k = {report.k}, temperature {report.temperature:g}; stages are standardised, output and raw"
            " pixels are taken as they are"
        )
    return found


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 80, subsequent_indent="  ")
