"""The curves of a page, with what each of them says; and where the time went."""

from __future__ import annotations

import math

from sslpre.report.curves import Plot, svg
from sslpre.report.history import Curve, History
from sslpre.report.markup import paragraph, section, text
from sslpre.train.progress import duration

MOST = 24  # plots of a page
MUCH = 0.2  # of the time, waiting for images
HEALTH = {  # curve → what it is
    "std": "spread of the features: 1 where they lie all over the sphere, 0 where all images get the same",
    "rank": "RankMe, the effective number of directions that features use",
    "directions": "effective number of directions in which images differ",
    "uniformity": "log mean potential between features; lower is more evenly spread, 0 is one point",
    "cosine": "mean cosine of two images; 1 where all are alike",
    "alignment": "mean squared distance of two views of an image; lower is nearer",
    "lidar": "LiDAR, effective number of directions that tell images apart",
    "knn": "share of labelled images that are of the class of their nearest neighbours",
}
TWO = ("positive_cosine", "negative_cosine")
SPEED = {"images_per_s": "images a second", "waiting": "share of the time waiting for images"}


def learning(history: History, judged: str) -> str:
    """Loss, terms and health. judged: what the chance value belongs to, as the log calls it."""
    names = [name for name in history.curves if not name.startswith("health.") and name not in SPEED and name != "lr"]
    likely = [judged, judged.rpartition(".")[2], "loss", *(name for name in names if name.endswith(".loss")), *names]
    main = next((name for name in likely if name in history.curves), None)
    if main is None:
        return section("Loss and health", "curves", paragraph("No step has been logged yet."))
    others = [name for name in (*names, *(("lr",) if "lr" in history.curves else ())) if name != main]
    left = 1 + len(others) - MOST
    shown = [losses(history, main)]
    for name in others[: MOST - 1]:
        shown.append(plain(history.curves[name], "learning rate" if name == "lr" else name))
    more = paragraph(f"{left} more curves are in metrics.jsonl.") if left > 0 else ""
    return section("Loss and health", "curves", grid(shown), more, "<h3>Health of the features</h3>", health(history))


def losses(history: History, main: str) -> str:
    curve, chance = history.curves[main], history.chance
    told = figure(curve.values[-1])
    if chance.values:
        told += f"; dashed: {figure(chance.values[-1])}, nothing learned"
    return framed(Plot(main, [(main, curve)], chance), main, told)


def health(history: History) -> str:
    found = {
        name.removeprefix("health."): curve for name, curve in history.curves.items() if name.startswith("health.")
    }
    if not found:
        return paragraph("Not recorded: the run is older than these figures, or too short for one look.")
    plots = []
    if all(name in found for name in TWO):
        pair = [("views of one image", found[TWO[0]]), ("different images", found[TWO[1]])]
        keys = " ".join(key(at, f"{name} {figure(curve.values[-1])}") for at, (name, curve) in enumerate(pair))
        plots.append(framed(Plot("cosines", pair), "cosine of two views", "", keys))
    for name in (*HEALTH, *sorted(set(found) - set(HEALTH) - set(TWO))):
        if name in found and len(plots) < MOST:
            plots.append(plain(found[name], name, HEALTH.get(name, "")))
    return grid(plots)


def key(at: int, words: str) -> str:
    """The colour of a line and what it is."""
    return f"<span class=nowrap><span class=key style='background:var(--c{at})'></span> {text(words)}</span>"


def plain(curve: Curve, name: str, told: str = "") -> str:
    told = figure(curve.values[-1]) + (f"; {told}" if told else "")
    return framed(Plot(name, [(name, curve)]), name, told)


def framed(plot: Plot, title: str, told: str, keys: str = "") -> str:
    """A plot below its caption. keys: HTML."""
    words = " · ".join(part for part in (text(told), keys) if part)
    label = "; ".join(f"{name}: {spoken(curve)}" for name, curve in plot.curves)
    return (
        f"<figure><figcaption><b>{text(title)}</b> {words}</figcaption>"
        f'<div role=img aria-label="{text(label)}">{svg(plot)}</div></figure>'
    )


def spoken(curve: Curve) -> str:
    first, last = figure(curve.values[0]), figure(curve.values[-1])
    return f"from {first} at step {curve.steps[0]:,} to {last} at step {curve.steps[-1]:,}"


def figure(value: float) -> str:
    """Four digits, which is what a person compares."""
    return f"{value:,.0f}" if abs(value) >= 1e4 and math.isfinite(value) else f"{value:.4g}"


def grid(plots: list[str]) -> str:
    return f"<div class=plots>{''.join(plots)}</div>"


def spent(history: History) -> str:
    """Where the time went."""
    if not history.seconds:
        return section("Where the time went", "time", paragraph("No step has been logged yet."))
    share = history.waited / history.seconds
    told = (
        f"{duration(history.seconds)}, of which {duration(history.waited)} ({share:.0%}) waiting for images; "
        f"{history.images / history.seconds:,.0f} images a second."
    )
    parts = "".join(f'<span style="width:{part:.2%}"></span>' for part in (1 - share, share))
    bar = f'<div class=bar role=img aria-label="{share:.0%} waiting for images">{parts}</div>'
    advice = ""
    if share > MUCH:
        advice = paragraph("That is much: sslpre bench shows which stage is the slow one, and what to do about it.")
    plots = grid([plain(history.curves[name], told, "") for name, told in SPEED.items() if name in history.curves])
    return section("Where the time went", "time", paragraph(told), bar, advice, plots)
