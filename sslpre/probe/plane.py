"""Several encoders as points: how near two views of an image lie, how evenly all images are spread, and how accurate a
probe of the features is.

Wang, Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere",
2020, https://arxiv.org/abs/2005.10242, figures 5 and 6: good encoders are low in both.
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslpre.data import Source
from sslpre.data.find import subset
from sslpre.data.stream import BadList, Stream
from sslpre.encoder import Encoder
from sslpre.errors import SslpreError, disk_code, printable
from sslpre.ops.sphere import alignment, uniformity
from sslpre.probe.questions import Question
from sslpre.probe.table import Report, Score
from sslpre.synced import write_whole
from sslpre.views.build import Views

IMAGES = 4096  # at most, whose views are compared
KINDS = (".svg", ".png", ".csv")
MARKERS = {"encoder": "o", "start": "^", "random weights": "s"}


@dataclass(frozen=True)
class Point:
    """weights: "encoder", "start" or "random weights" (the mean of 3 seeds). The score is of the output."""

    name: str
    weights: str
    alignment: float
    uniformity: float
    score: Score
    encoder_hash: str = ""

    @property
    def title(self) -> str:
        return self.name if self.weights == "encoder" else f"{self.name}, {self.weights}"


@dataclass(frozen=True)
class Plane:
    """report: of the first encoder, for what all of them share; images: whose views were compared; views: of what."""

    points: tuple[Point, ...]
    question: Question
    report: Report
    images: int
    views: str
    notes: tuple[str, ...] = ()  # of each encoder's report

    def json(self) -> dict[str, Any]:
        points = [
            {key: value for key, value in asdict(point).items() if key != "score"} | point.score.json()
            for point in self.points
        ]
        about = {"metric": self.question.metric, "labels_percent": self.question.share, "images": self.images}
        return {**about, "views": self.views, "alpha": 2, "t": 2, "points": points}

    def csv(self) -> str:
        out = io.StringIO()
        heads = "encoder weights alignment uniformity metric labels_percent mean low high images encoder_hash".split()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(heads)
        for one in self.points:
            score = [
                self.question.metric,
                f"{self.question.share:g}",
                one.score.accuracy,
                one.score.low,
                one.score.high,
            ]
            where = [one.name, one.weights, one.alignment, one.uniformity]
            writer.writerow([*where, *score, self.images, one.encoder_hash])
        return out.getvalue()

    def table(self) -> str:
        """Lines of at most 80 characters, the most accurate first, then what they are held against."""
        report, question = self.report, self.question
        head = line("encoder", "alignment", "uniformity", f"{question.words.partition(' with')[0]} %", "hash")
        ranked = sorted(self.points, key=lambda one: (one.weights != "encoder", -one.score.accuracy))
        rows = [
            line(one.title, f"{one.alignment:9.3f}", f"{one.uniformity:10.3f}", cell(one.score), one.encoder_hash[:8])
            for one in ranked
        ]
        rows.append(line("raw pixels", "", "", cell(report.last("raw pixels").scores[question])))
        rows.append(line("chance", "", "", f"{100 * report.chance_of(question):5.1f}"))
        rule = "-" * max(map(len, (head, *rows)))
        notes = [
            f"{len(report.classes)} classes, {report.train_images:,} training and {report.test_images:,} test images:"
            f" {report.split}",
            f"alignment (α = 2) and uniformity (t = 2) of two views of each of {self.images:,} images, outputs on the"
            f" unit sphere, less is better; views: {self.views}",
            f"accuracy: {question.words}, of the output; in brackets 95 % bootstrap intervals; random weights: the mean"
            " of 3 seeds; hash: the first digits of the encoder's",
            *(f"note: {note}" for note in self.notes),
        ]
        below = [part for note in notes for part in textwrap.wrap(note, 80, subsequent_indent="  ")]
        return "\n".join([head, rule, *rows, rule, *below])


def line(name: str, align: str, uniform: str, accuracy: str, code: str = "") -> str:
    return f"{shortened(name):<28}{align:>9} {uniform:>10}  {accuracy:<20}  {code}".rstrip()


def shortened(name: str) -> str:
    """Of a long name the end."""
    plain = printable(name)
    return plain if len(plain) <= 27 else f"..{plain[-25:]}"


def cell(score: Score) -> str:
    return f"{100 * score.accuracy:5.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]"


def sample(source: Source, seed: int = 0) -> Source:
    """Some thousands of its images at random, or all."""
    order = np.random.default_rng(seed).permutation(len(source))[:IMAGES]
    return subset(source, np.sort(order))


def on_the_sphere(
    encoders: Sequence[Encoder],
    source: Source,
    views: Views,
    *,
    side: int,
    device: torch.device,
    workers: int,
    max_bad: float,
) -> tuple[list[tuple[float, float]], int]:
    """Alignment and uniformity of each encoder, and of how many images; two views of each, the same for all.

    The encoders take images of one size, which is that of `views`, and are in evaluation mode. side: of the canvas that
    images are decoded to. Uniformity is the mean of that of the first views and that of the second, as in the paper's
    figure 7. Raises SslpreError: exit 4 with fewer than two images, 10 where features are not finite.
    """
    bad = BadList(None, max_bad, len(source))
    stream = Stream(source, side=side, batch_size=64, seed=0, workers=workers, device=device, bad=bad)
    found: list[list[list[Tensor]]] = [[[], []] for _ in encoders]
    expected = 0
    for batch in stream.in_order():
        here = batch.index == torch.arange(expected, expected + len(batch.index))  # else it stands for a bad image
        expected += len(batch.index)
        made = views(batch.pixels, batch.size, batch.index, 0)[:2]
        with torch.inference_mode():
            for encoder, pair in zip(encoders, found, strict=True):
                for image, one in zip(made, pair, strict=True):
                    one.append(F.normalize(encoder(image.contiguous(memory_format=torch.channels_last)), dim=1)[here])
    count = sum(map(len, found[0][0]))
    if count < 2:
        raise SslpreError(f"`{source.where}` has {count} images that can be read, too few to compare", "name more", 4)
    measured = []
    for pair in found:
        x, y = (torch.cat(one) for one in pair)
        if not (x.isfinite().all() and y.isfinite().all()):
            raise SslpreError("the encoder's features are not finite", "leave it out, or take an earlier run", 10)
        measured.append((alignment(x, y).item(), (uniformity(x) + uniformity(y)).item() / 2))
    return measured, count


def check_out(out: Path) -> None:
    """Raises SslpreError: exit 2 where `out` is of no kind that is known or is there already, 3 without matplotlib."""
    if out.suffix not in KINDS:
        raise SslpreError(f"`{out}` ends in none of {', '.join(KINDS)}", "write --plane plane.svg")
    if out.exists() or out.is_symlink():
        raise SslpreError(f"`{out}` exists", "name another file, or remove it first")
    if out.suffix != ".csv":
        matplotlib()


def matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        hint = "pip install 'sslpre[report]', or --plane plane.csv"
        raise SslpreError("pictures of the plane need matplotlib", hint, 3) from error
    return matplotlib


def write(plane: Plane, out: Path) -> None:
    """As a picture or as `csv`, whole or not at all. Raises SslpreError as `check_out`; 3 or 13 if it cannot be."""
    check_out(out)
    data = plane.csv().encode() if out.suffix == ".csv" else picture(plane, out.suffix[1:])
    try:
        write_whole(out, data)
    except OSError as error:
        message = f"`{out}` cannot be written: {(error.strerror or str(error)).lower()}"
        raise SslpreError(message, "name a place with room that you may write to", disk_code(error)) from error


def picture(plane: Plane, kind: str) -> bytes:
    """The same plane gives the same bytes."""
    library: Any = matplotlib()
    figure = library.figure.Figure(figsize=(8, 5.5), layout="constrained")
    axes, marks = figure.add_subplot(), None
    axes.margins(0.15)
    accuracy = [100 * one.score.accuracy for one in plane.points]
    low, high = min(accuracy), max(accuracy)
    for weights, marker in MARKERS.items():
        some = [one for one in plane.points if one.weights == weights]
        if some:
            x, y, c = zip(*((one.alignment, one.uniformity, 100 * one.score.accuracy) for one in some), strict=True)
            marks = axes.scatter(x, y, c=c, vmin=low, vmax=high, cmap="viridis", marker=marker, s=70, label=weights)
    middle = sum(axes.get_xlim()) / 2
    for one in plane.points:
        text, left = f"{shortened(one.title)}  {100 * one.score.accuracy:.1f}", one.alignment < middle
        where = dict(textcoords="offset points", xytext=(7 if left else -7, 5), ha="left" if left else "right")
        axes.annotate(text, (one.alignment, one.uniformity), fontsize=8, parse_math=False, **where)
    axes.set(xlabel="alignment (α = 2)", ylabel="uniformity (t = 2)")
    axes.set_title(f"two views of {plane.images:,} images: less is better", fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(MARKERS), fontsize=8)
    figure.colorbar(marks, label=f"accuracy in %, {plane.question.words}")
    data = io.BytesIO()
    with library.rc_context({"svg.hashsalt": "sslpre"}):
        figure.savefig(data, format=kind, metadata={"Date": None} if kind == "svg" else None, dpi=150)
    return data.getvalue()
