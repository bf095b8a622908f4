"""Curves as SVG that takes the page's colours, drawn by matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sslpre.errors import SslpreError
from sslpre.report.history import Curve

POINTS = 400  # of a curve; of more, means
WIDTH, HEIGHT = 4.6, 2.1  # inches of 72 px
# colours that stand for the page's, until the SVG is text
STAND_INS = {"#010203": "var(--c0)", "#010204": "var(--c1)", "#010205": "var(--soft)", "#010206": "var(--rule)"}
LINES = ("#010203", "#010204")
SOFT, RULE = "#010205", "#010206"


@dataclass(frozen=True)
class Plot:
    """One or two curves on the same axes, and a dashed line."""

    title: str
    curves: Sequence[tuple[str, Curve]]
    dashed: Curve | None = None
    log: bool = False
    share: bool = False  # of a whole: from 0 to 1


def matplotlib() -> Any:
    """The package. Raises SslpreError (exit 3) where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise SslpreError("the curves of a report need matplotlib", "pip install 'sslpre[report]'", 3) from error
    return matplotlib


def svg(plot: Plot) -> str:
    """The plot as an <svg> element for a page that sets --c0, --c1, --soft and --rule; steps to the right.

    There are only numbers in it: what a log calls its curves is no text of ours, and stands in the page.
    """
    package = matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    settings = {"svg.fonttype": "none", "svg.hashsalt": ascii(plot.title), "font.size": 9, "axes.unicode_minus": False}
    settings |= {"axes.formatter.use_mathtext": False, "path.simplify": True}
    out = io.StringIO()
    with package.rc_context(settings):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, plot)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        if not plot.log:
            axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y)))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
        dates: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=dates)
    return cleaned(out.getvalue())


def draw(axes: Any, plot: Plot) -> None:
    for (_, curve), colour in zip(plot.curves, LINES, strict=False):
        steps, values = thinned(curve)
        marker = "o" if len(steps) < 3 else ""
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=3)
    if plot.dashed is not None and plot.dashed.values:
        axes.plot(*thinned(plot.dashed), color=SOFT, linewidth=1.2, linestyle=(0, (5, 3)))
    if plot.log:
        axes.set_yscale("log")
    if plot.share:
        axes.set_ylim(-0.02, 1.02)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(RULE)
    axes.tick_params(which="both", colors=SOFT, length=0)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def thinned(curve: Curve) -> tuple[list[float], list[float]]:
    """The curve itself, or of a long one the means of equal parts."""
    total = len(curve.steps)
    if total <= POINTS:
        return [float(step) for step in curve.steps], curve.values
    ends = [total * part // POINTS for part in range(POINTS + 1)]
    spans = [slice(first, last) for first, last in pairwise(ends)]
    steps, values = (
        [sum(numbers[span]) / (span.stop - span.start) for span in spans] for numbers in (curve.steps, curve.values)
    )
    return steps, values


def short(value: float) -> str:
    """A number of an axis: 12,000 is 12k."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def cleaned(drawn: str) -> str:
    """What of a file belongs into a page: the element alone, without metadata, with the page's colours and fonts."""
    inside = drawn[drawn.index("<svg") :]
    inside = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", inside, flags=re.S)
    opening, rest = inside.split(">", 1)
    (box,) = re.findall(r'viewBox="[^"]*"', opening)
    rest = re.sub(r'<g id="[^"]*"', "<g", rest).replace("xlink:href", "href")
    rest = re.sub(r"font: (\S+) [^;\"]*", r"font-size: \1", rest)  # as older ones write it
    rest = re.sub(r" ?font-family: [^;\"]*;?", "", rest)
    for stand_in, colour in STAND_INS.items():
        rest = rest.replace(stand_in, colour)
    return f"<svg class=plot aria-hidden=true {box}>{rest.strip()}"
