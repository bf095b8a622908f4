"""The table of a probe: at most 80 columns, two questions side by side, and below it what they were measured with."""

from __future__ import annotations

import textwrap

from sslpre.errors import printable
from sslpre.probe.questions import DRAWS, METRICS, Question
from sslpre.probe.table import Report, Row

LABELS = {"random weights": "random"}  # in the table, where space is short
WIDTH, FIRST = 80, 30  # of a line, and of its weights and features


def table(report: Report) -> str:
    parts = [part(report, questions) for questions in side_by_side(report)]
    rule = "-" * max(len(line) for lines in parts for line in lines)
    framed = [line for head, *rows in parts for line in (head, rule, *rows, rule)]
    warnings = [f"note: {warning}" for warning in report.warnings]
    below = [line for text in [*notes(report), *warnings] for line in wrapped(text)]
    return "\n".join([*framed, *below, *copies(report), "", *wrapped(report.verdict())])


def side_by_side(report: Report) -> list[list[Question]]:
    """The questions in groups that fit one line."""
    groups: list[list[Question]] = []
    used = WIDTH
    for question in report.questions:
        if used + len(cell(question)) > WIDTH:
            groups.append([])
            used = FIRST
        groups[-1].append(question)
        used += width(question)
    return groups


def cell(question: Question) -> str:
    """The widest that a cell can be."""
    if question.metric == "linear" and question.share == 100:
        return f"{'100.0*[100.0, 100.0]':<22}3e-05"
    return "100.0*[100.0, 100.0]" if question.metric == "knn" else "100.0±0.0*[100.0, 100.0]"


def width(question: Question) -> int:
    """Of a cell that another one follows."""
    return 29 if question.metric == "linear" and question.share == 100 else len(cell(question)) + 1


def part(report: Report, questions: list[Question]) -> list[str]:
    """A head and rows: those that answered one of these questions, and chance."""
    rows = [row for row in report.rows if any(question in row.scores for question in questions)]
    guess = "most frequent" if report.chance > report.uniform_chance else f"1 in {len(report.classes)}"
    by_chance = [f"{100 * report.chance_of(question):5.1f}" for question in questions]
    lines = [("weights", "features", [title(report, question) for question in questions])]
    for row in rows:
        told = [answer(report, row, question) for question in questions]
        lines.append((LABELS.get(row.weights, row.weights), features(row), told))
    lines.append(("chance", guess, by_chance))
    widths = [width(question) for question in questions]
    return [
        f"{weights:<11}{which:<19}{''.join(map(str.ljust, told, widths))}".rstrip() for weights, which, told in lines
    ]


def title(report: Report, question: Question) -> str:
    name = METRICS[question.metric]
    if question.share < 100:
        return f"{name} %, {question.share:g} % labels"
    if question.metric == "linear":
        return f"{'linear %':<22}C"
    several = question.metric == "knn" and sum(one.metric == "knn" for one in report.questions) > 1
    return f"{name} %, k = {question.k}" if several else f"{name} %"


def features(row: Row) -> str:
    """The features and how many numbers they are; of a long name the end, which tells stages apart."""
    short = row.features if len(row.features) <= 11 else f"..{row.features[-9:]}"
    return f"{short} ({row.dim})"


def answer(report: Report, row: Row, question: Question) -> str:
    if question not in row.scores:
        return ""
    score = row.scores[question]
    mark = "*" if row.weights == "encoder" and row.features == report.best.get(question) else " "
    spread = "" if score.std is None else f"±{100 * score.std:.1f}"
    text = f"{100 * score.accuracy:5.1f}{spread}{mark}[{100 * score.low:.1f}, {100 * score.high:.1f}]"
    if question.metric == "linear" and question.share == 100:
        return f"{text:<22}{float(f'{score.strength or 0.0:.1g}'):<7g}"
    return text


def notes(report: Report) -> list[str]:
    """What the numbers were measured on and with."""
    counts = f"{report.train_images:,} training and {report.test_images:,} test images"
    metrics = {question.metric for question in report.questions}
    shares = [question for question in report.questions if question.share < 100]
    found = [f"{len(report.classes)} classes, {counts}: {report.split}"]
    if report.alone is not None and metrics != {"knn"}:
        text = f"kNN: each of {report.alone.images:,} images, by the others (leave-one-out)"
        if report.alone.before > report.alone.images:
            text += f"; {report.alone.before - report.alone.images:,} more repeat an earlier one, and are left out"
        found.append(text)
    found.append(f"encoder: {report.encoder_hash}, before and after")
    found.append("in brackets: 95 % bootstrap intervals; random weights: the mean of 3 seeds")
    if shares:
        sizes = ", ".join(f"{share:g} % {report.counts[share]:,}" for share in dict.fromkeys(q.share for q in shares))
        found.append(
            f"labels: {sizes} images, of every class as much and at least one; the mean of {DRAWS} draws, ± their"
            " standard deviation; intervals are of draws and test images"
        )
    if report.best:
        found.append("* best of the encoder on held-out training images, without a look at test images")
    if any(row.stage is not None for row in report.rows):
        found.append("stages: maps averaged to a grid of at most 4,096 numbers; output: what is exported")
    return found + protocols(report, metrics)


def protocols(report: Report, metrics: set[str]) -> list[str]:
    found = []
    if "linear" in metrics:
        found.append(
            "linear: logistic regression on standardised features, strength C chosen on 20 % of the training images,"
            " for random weights with the first seed"
        )
    if "knn" in metrics:
        ks = [question.k for question in report.questions if question.metric == "knn"]
        several = f"k = {report.k}" if len(ks) == 1 else f"several k, the verdict is of k = {report.k}"
        found.append(
            f"kNN: cosine, {several}, temperature {report.temperature:g}; stages are standardised, output and raw"
            " pixels are taken as they are"
        )
    if "finetune" in metrics:
        from sslpre.probe.finetune import PROTOCOL

        found.append(PROTOCOL)
    return found


def copies(report: Report) -> list[str]:
    """The pairs, where they were asked for: as long as the names are."""
    return [printable(f"{kind:<6} {one}  {other}") for kind, one, other in report.duplicates.pairs or ()]


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(printable(text), 80, subsequent_indent="  ")
