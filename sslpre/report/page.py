"""The page: one file without a request, from what is known of a run."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sslpre.report import dots, figures
from sslpre.report.gallery import CLUSTERS, PAIRS, RANK, Picked, Seen, most_common
from sslpre.report.history import History
from sslpre.report.markup import command, count, name, paragraph, section, table, text

TONES = {"healthy": "good", "not yet learning": "warn", "partly collapsed": "warn", "collapsed": "bad"}
ROOM = Path(__file__).parent
LATER = "Not made while it trains until it would take less than a fiftieth of the run's time."
WEIGHTS = {"encoder": "this run", "start": "the weights it began with", "random weights": "random weights"}


@dataclass(frozen=True)
class Content:
    """What there is to show. state: "finished", "training" or "stopped"; absent: why a part is not there, by its name.

    step, steps: of the run; encoder_step: of the weights that saw the images. measured: figures of health and a verdict
    from the images of the page, where the log has none. rows: the preview, HTML. probe: as `sslpre probe --json`.
    """

    run: str
    about: list[str]
    state: str
    step: int
    steps: int
    history: History
    judged: str
    recipe: str
    written: str
    images: str = ""  # the folder, "" for the sample set
    facts: dict[str, str] = field(default_factory=dict)
    encoder_step: int = 0
    picked: Picked | None = None
    seen: Seen | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    rows: str = ""
    probe: dict[str, Any] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def page(content: Content) -> str:
    """The whole file; under 5 MB whatever the images and names are."""
    across = content.picked.across if content.picked is not None else 1
    parts = [
        section_of(content, across)
        for section_of in (head, curves, preview, images, neighbours, clusters, alone, probed, time, recipe)
    ]
    script = (ROOM / "script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta http-equiv=Content-Security-Policy content="{policy}">
<meta name=viewport content="width=device-width, initial-scale=1">
<meta name=referrer content=no-referrer>
<title>{text(name(Path(content.run).name))}: {text(verdict(content)[0])}</title>
<style>{style(content.picked.sheet if content.picked is not None else "", across)}</style>
</head>
<body>
{chr(10).join(part for part in parts if part)}
<footer>Written by sslpre, {text(content.written)}. Everything on this page is in this one file.</footer>
<script>{script}</script>
</body>
</html>
"""


def style(uri: str, across: int) -> str:
    rules = [(ROOM / "style.css").read_text(encoding="utf-8"), f":root{{--n:{across}}}"]
    if uri:
        rules.append(f".t{{background-image:url({uri})}}")
    for rank in range(dots.COLOURS + 1):
        rules.append(
            f".map .f{rank},.legend .f{rank},.legend .k{rank},section:has(#by-k:checked) .map .k{rank}"
            f"{{stroke:var(--c{rank})}}"
        )
    return "\n".join(rules)


def verdict(content: Content) -> tuple[str, str, str]:
    """The verdict in a few words, what it rests on, and what to do about it ("" for nothing)."""
    history, measured = content.history, content.measured
    if history.verdict:
        return history.verdict, f"by the training log at step {history.judged:,}", history.advice
    if measured.get("verdict"):
        told = f"by the images of this page at step {content.encoder_step:,}, for the log has none"
        return measured["verdict"], told, ""
    return "health not recorded", "not in the training log", ""


def head(content: Content, across: int) -> str:
    words, basis, advice = verdict(content)
    of = f"{content.step:,} of {content.steps:,}" if content.steps else f"{content.step:,}"
    state = {
        "finished": "finished",
        "training": "training when this was written",
        "stopped": "not finished, and not running",
    }[content.state]
    steps = "".join(f"<li>{one}</li>" for one in next_steps(content))
    if advice:
        steps = f"<li>{text(advice[:1].upper() + advice[1:])}.</li>{steps}"
    worth = f"<p id=worth>Probe: {text(content.probe['verdict'])}</p>" if content.probe else ""
    tone = TONES.get(words, "none")
    if tone == "good" and content.probe and not beats_random(content.probe):
        tone = "warn"  # features that differ are not yet features that are worth something
    links = "".join(f"<a href='#{anchor}'>{title}</a>" for anchor, title in anchors(content))
    return f"""<header>
<h1>{text(name(Path(content.run).name))}</h1>
<p class=soft>{text(" · ".join(content.about))}</p>
<div class="verdict {tone}" id=verdict>
<p>{text(words[:1].upper() + words[1:])}</p>
<p class=soft>Step {of}, {state}. Verdict {text(basis)}.</p>
{worth}
<h2>What to do next</h2>
<ol>{steps}</ol>
</div>
<nav aria-label="parts of this page">{links}</nav>
</header>"""


def anchors(content: Content) -> list[tuple[str, str]]:
    found = [("curves", "loss and health"), ("preview", "what the network sees"), ("images", "map")]
    if content.seen is not None:
        parts = [("neighbours", "neighbours"), ("clusters", "clusters"), ("alone", "outliers and duplicates")]
        found += parts[2:] if content.seen.alike else parts
    return [*found, ("probe", "probe"), ("time", "time"), ("recipe", "recipe")]


def next_steps(content: Content) -> list[str]:
    """What to type, as HTML, the most useful first."""
    words, steps = verdict(content)[0], []
    if content.state == "stopped":
        steps.append(f"Go on where it stopped: {command('sslpre', 'pretrain', '--resume', content.run)}")
    if words == "collapsed":
        look = command("sslpre", "preview", content.run, "sheet.png")
        return [*steps, f"Look at what the task shows the network, then begin again with a lower rate: {look}"]
    if content.history.passed_over:
        steps.append(
            f"{count(content.history.passed_over, 'step')} not finite and passed over: a lower --lr may do better."
        )
    if content.state == "training":
        steps.append("It is still training, and this page is rewritten now and then: load it again.")
    if not content.probe and content.step:
        more = () if content.picked is not None and content.picked.classes else ("--data", "./labelled")
        steps.append(f"Measure how good the encoder is: {command('sslpre', 'probe', content.run, '--linear', *more)}")
    if content.probe and not beats_random(content.probe):
        whole = command("sslpre", "probe", content.run)
        steps.append(f"The output is no better than random weights. Train longer, or see whether a stage is: {whole}")
    elif content.state == "finished":
        export = command("sslpre", "export", "encoder.safetensors", "--run", content.run)
        steps.append(f"Take the encoder into your own code: {export}")
    if content.absent.get("images") == LATER:
        steps.append(
            f"See map, neighbours, clusters and a probe on this page: {command('sslpre', 'report', content.run)}"
        )
    if content.picked is not None and (content.picked.same or content.picked.alike):
        steps.append("<a href='#alone'>Look at the likely duplicates</a> among the images.")
    return steps or ["Wait for the first steps."]


def beats_random(probe: dict[str, Any]) -> bool:
    """By either metric, beyond the intervals."""
    told = probe.get("beats")
    found = (
        [one.get("random weights") for one in told.values() if isinstance(one, dict)] if isinstance(told, dict) else []
    )
    return not found or any(found)


def curves(content: Content, across: int) -> str:
    return figures.learning(content.history, content.judged)


def preview(content: Content, across: int) -> str:
    inside = content.rows or paragraph(content.absent.get("preview", "Not made yet."))
    return section("What the network sees", "preview", inside)


def thumb(content: Content, at: int, across: int) -> str:
    assert content.picked is not None
    label = text(name(content.picked.names[at]))
    place = f"--x:{at % across};--y:{at // across}"
    return f'<span class=t role=img aria-label="{label}" title="{label}" style="{place}"></span>'


def framed(content: Content, at: int, across: int, caption: str) -> str:
    return f"<figure>{thumb(content, at, across)}<figcaption>{text(caption)}</figcaption></figure>"


def images(content: Content, across: int) -> str:
    picked, seen = content.picked, content.seen
    if picked is None or seen is None:
        return section("Map of the images", "images", paragraph(content.absent.get("images", "Not made yet.")))
    shown = len(picked.names)
    which = (
        f"all {shown:,} images"
        if shown == picked.total
        else f"{shown:,} of {picked.total:,} images, spread evenly over the set"
    )
    bad = f" {count(picked.bad, 'image')} could not be read." if picked.bad else ""
    if seen.alike:
        told = f"{which[:1].upper() + which[1:]} have the same features: there is nothing to tell them apart by."
        return section("Map of the images", "images", paragraph(told))
    told = (
        f"{which[:1].upper() + which[1:]}, as centre views, by the encoder at step {content.encoder_step:,}.{bad} "
        f"Near each other means that the encoder finds them alike. Axes: {seen.axes}."
    )
    how = (
        "Point at a dot to see its image; zoom with the wheel, two fingers or + and −, "
        "and where few are left images take the place of dots."
    )
    return section(
        "Map of the images", "images", paragraph(told), paragraph(how),
        "<noscript><p>Without scripts the map stands still; names come when a dot is pointed at.</p></noscript>",
        dots.drawn(picked, seen, across),
    )  # fmt: skip


def neighbours(content: Content, across: int) -> str:
    picked, seen = content.picked, content.seen
    if picked is None or seen is None or seen.alike:
        return ""
    rows = []
    for at in seen.examples:
        own = framed(content, at, across, folder_of(picked, at) or "example")
        others = "".join(
            framed(content, other, across, f"{cosine:.3f} {folder_of(picked, other)}")
            for other, cosine in seen.near[at]
        )
        rows.append(f"<div class=strip tabindex=0 role=group>{own}{others}</div>")
    told = (
        "Left an image of the set, then those that the encoder finds most like it, with the cosine of their features."
    )
    return section("Nearest neighbours", "neighbours", paragraph(told), f"<div class=rows>{''.join(rows)}</div>")


def folder_of(picked: Picked, at: int) -> str:
    return name(picked.classes[picked.folders[at]]) if picked.folders[at] >= 0 else ""


def clusters(content: Content, across: int) -> str:
    picked, seen = content.picked, content.seen
    if picked is None or seen is None or seen.alike:
        return ""
    parts = []
    for number, members in enumerate(seen.typical, 1):
        rows = (seen.clusters == number - 1).nonzero()[0]
        label, share = most_common(picked.folders[rows].tolist())
        mostly = f", {share:.0%} of them {name(picked.classes[label])}" if label >= 0 else ""
        parts.append(f"<h3>Cluster {number}: {count(len(rows), 'image')}{text(mostly)}</h3>")
        parts.append(f"<div class=strip>{''.join(thumb(content, at, across) for at in members)}</div>")
    told = f"k-means on the features, at most {CLUSTERS} clusters; of each the members nearest its centre."
    return section("Clusters", "clusters", paragraph(told), *parts)


def alone(content: Content, across: int) -> str:
    picked, seen = content.picked, content.seen
    if picked is None or seen is None:
        return ""
    found = "".join(framed(content, at, across, f"{cosine:.3f} {name(picked.names[at])}") for at, cosine in seen.alone)
    told = (
        f"Least like the others: the cosine to the {RANK}th nearest neighbour. A broken scan or another kind of "
        "picture ends up here; so does a rare one."
    )
    inside = [paragraph(told), f"<div class=strip>{found}</div>"]
    if not found or seen.alike:
        inside = [paragraph("All images have the same features." if seen.alike else "Too few images to say.")]
    return section("Outliers and likely duplicates", "alone", "<h3>Outliers</h3>", *inside, *twice(content, across))


def twice(content: Content, across: int) -> list[str]:
    """Duplicates among the images of the page, equal ones first."""
    picked = content.picked
    assert picked is not None
    shown = [("equal to the pixel", group[:6]) for group in picked.same] + [
        ("alike", list(pair)) for pair in picked.alike
    ]
    parts = ["<h3>Likely duplicates</h3>"]
    whole = len(picked.names) == picked.total
    of = "" if whole else f" of these {len(picked.names):,} images"
    if not shown:
        parts.append(
            paragraph(f"None{of}, by centre views equal to the pixel or by perceptual hashes within 3 of 64 bits.")
        )
    else:
        told = (
            f"{count(len(picked.same), 'group')} equal to the pixel and {count(len(picked.alike), 'pair')} alike by "
            f"perceptual hash (within 3 of 64 bits){of}" + (f"; {PAIRS} are shown." if len(shown) > PAIRS else ".")
        )
        strips = []
        for kind, members in shown[:PAIRS]:
            thumbs = "".join(thumb(content, at, across) for at in members)
            names = text(f"{kind}: {', '.join(name(picked.names[at]) for at in members)}")
            strips.append(f"<figure><div class=strip>{thumbs}</div><figcaption>{names}</figcaption></figure>")
        parts += [paragraph(told), f"<div class=plots>{''.join(strips)}</div>"]
    if not whole and content.images:
        parts.append(f"<p>Of all {picked.total:,} images: {command('sslpre', 'check', content.images)}</p>")
    return parts


def probed(content: Content, across: int) -> str:
    report = content.probe
    if not report:
        why = content.absent.get("probe", "Not measured.")
        ask = command("sslpre", "probe", content.run, "--data", "./labelled")
        return section("How good it is", "probe", paragraph(why), f"<p>With labels as folder names: {ask}</p>")
    metrics = [metric for metric in ("linear", "knn") if any(metric in row for row in report["rows"])]
    heads = {"linear": "linear %", "knn": "kNN %"}
    rows = [
        [
            text(WEIGHTS.get(row["weights"], row["weights"])),
            text(f"{row['features']} ({row['dim']})"),
            *(cell(row.get(metric)) for metric in metrics),
        ]
        for row in report["rows"]
    ]
    rows.append(["chance", "", *(f"{100 * report['chance']:.1f}" for _ in metrics)])
    classes, counts = len(report["classes"]), [report["train_images"], report["test_images"]]
    told = (
        f"{report['verdict']} {counts[0]:,} training and {counts[1]:,} test images of {classes:,} classes, "
        f"{report['split']}; in brackets 95 % bootstrap intervals."
    )
    notes = "".join(f"<p class=soft>{text(note)}</p>" for note in report.get("warnings", ()))
    at = paragraph(f"At step {report['step']:,}.") if report.get("step") != content.step else ""
    whole = command("sslpre", "probe", content.run)
    head = ("weights", "features", *(heads[metric] for metric in metrics))
    return section(
        "How good it is",
        "probe",
        paragraph(told),
        table(head, rows),
        at,
        notes,
        f"<p>Every stage, on every image: {whole}</p>",
    )


def cell(score: dict[str, Any] | None) -> str:
    if not score:
        return ""
    return f"{100 * score['accuracy']:.1f} <small>[{100 * score['low']:.1f}, {100 * score['high']:.1f}]</small>"


def time(content: Content, across: int) -> str:
    return figures.spent(content.history)


def recipe(content: Content, across: int) -> str:
    again = command("sslpre", "pretrain", str(Path(content.run) / "recipe.toml"))
    lines = "\n".join(text(line) for line in content.recipe.splitlines())
    facts = "".join(f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in content.facts.items())
    whole = f"<details open><summary>recipe.toml</summary><pre tabindex=0>{lines}</pre></details>"
    machine = f"<details><summary>versions and machine</summary><dl>{facts}</dl></details>"
    return section("Recipe", "recipe", f"<p>The same run again: {again}</p>", whole, machine)
