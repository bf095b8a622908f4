"""What a probe found: numbers for programs, a table of 80 columns and a verdict for people."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

METRICS = {"linear": "linear", "knn": "kNN"}
BASELINES = ("random weights", "raw pixels")


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
    """weights: "encoder", "random weights" (the mean of 3 seeds) or "raw pixels"; features: which, of `dim` numbers."""

    weights: str
    features: str
    dim: int
    linear: Score | None = None
    knn: Score | None = None


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
    warnings: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)  # what was probed, for `json`

    @property
    def chance(self) -> float:
        """The better of two ways to guess."""
        return max(self.uniform_chance, self.majority_chance)

    def last(self, weights: str) -> Row:
        return next(row for row in reversed(self.rows) if row.weights == weights)

    def beats(self) -> dict[str, dict[str, bool]]:
        """Metric → baseline → whether the encoder's output is better by more than the bootstrap intervals."""
        found: dict[str, dict[str, bool]] = {}
        for metric in METRICS:
            mine = getattr(self.last("encoder"), metric)
            if mine is not None:
                found[metric] = {name: mine.beats(getattr(self.last(name), metric)) for name in BASELINES}
                found[metric]["chance"] = mine.low > self.chance
        return found

    def verdict(self) -> str:
        """One sentence."""
        parts = {metric: sentence(self.beats()[metric]) for metric in self.beats()}
        words = list(dict.fromkeys(parts.values()))
        if len(words) == 1:
            return f"The encoder {words[0]} ({' and '.join(METRICS[metric] for metric in parts)})."
        return "The encoder " + " and ".join(f"{part} ({METRICS[metric]})" for metric, part in parts.items()) + "."

    def json(self) -> dict[str, Any]:
        """Plain values. Accuracies are shares in [0, 1]."""
        plain = asdict(self)
        rows = [{key: value for key, value in row.items() if value is not None} for row in plain.pop("rows")]
        for row in rows:
            row.get("knn", {}).pop("strengths", None)
        about = plain.pop("about")
        found = {"chance": self.chance, "beats": self.beats(), "verdict": self.verdict()}
        return {"schema": 1, **about, "rows": rows, **found, **plain}

    def table(self) -> str:
        """Lines of at most 80 characters, without colour."""
        return table(self)


def sentence(beats: dict[str, bool]) -> str:
    if not beats["chance"]:
        return "is not above chance"
    won = [name for name in BASELINES if beats[name]]
    lost = [name for name in BASELINES if not beats[name]]
    if not lost:
        return "beats random weights and raw pixels"
    return f"beats {won[0]} but not {lost[0]}" if won else "does not beat random weights or raw pixels"


def table(report: Report) -> str:
    metrics = [metric for metric in METRICS if getattr(report.rows[0], metric) is not None]
    heads = {"linear": f"{'linear %':<21}{'C':<9}", "knn": "kNN %"}
    head = line("weights", "features", [heads[metric] for metric in metrics])
    rows = [
        line(row.weights, f"{row.features} ({row.dim})", [cell(row, metric) for metric in metrics])
        for row in report.rows
    ]
    guess = "most frequent" if report.majority_chance > report.uniform_chance else f"1 in {len(report.classes)}"
    widths = {"linear": 30, "knn": 0}
    rows.append(line("chance", guess, [f"{100 * report.chance:5.1f}".ljust(widths[metric]) for metric in metrics]))
    rule = "-" * max(map(len, [head, *rows]))
    below = [wrapped(text) for text in [*notes(report, metrics), *(f"note: {warning}" for warning in report.warnings)]]
    flat = [part for parts in below for part in parts]
    return "\n".join([head, rule, *rows, rule, *flat, "", *wrapped(report.verdict())])


def line(weights: str, features: str, cells: list[str]) -> str:
    return f"{weights:<15}{features:<14}{''.join(cells)}".rstrip()


def cell(row: Row, metric: str) -> str:
    score: Score = getattr(row, metric)
    text = f"{100 * score.accuracy:5.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]"
    middle = sorted(score.strengths)[len(score.strengths) // 2] if score.strengths else 0.0
    return f"{text:<21}{float(f'{middle:.1g}'):<9g}" if metric == "linear" else text


def notes(report: Report, metrics: list[str]) -> list[str]:
    """What the numbers were measured on and with."""
    counts = f"{report.train_images:,} training and {report.test_images:,} test images"
    found = [
        f"{len(report.classes)} classes, {counts}: {report.split}",
        "in brackets: 95 % bootstrap intervals; random weights: the mean of 3 seeds",
    ]
    if "linear" in metrics:
        found.append("linear: logistic regression, strength C chosen on 20 % of the training images")
    if "knn" in metrics:
        found.append(f"kNN: cosine, k = {report.k}, temperature {report.temperature:g}")
    return found


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 80, subsequent_indent="  ")
