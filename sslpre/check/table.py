"""The report in lines of at most 80 characters; only what is to be typed stays on one line, however long."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from sslpre.check.choice import Choice
from sslpre.check.findings import ADVICE, NOTE, STOPS, Finding, count
from sslpre.check.machine import Disk, Machine
from sslpre.check.report import Report, images
from sslpre.data.room import amount
from sslpre.errors import printable
from sslpre.train.progress import duration

WIDTH, INDENT, SHOWN = 80, 12, 3
HEADS = {STOPS: "would stop a run", ADVICE: "to think about", NOTE: "good to know"}


def table(report: Report) -> str:
    lines: list[str] = []
    below = f"{printable(str(Path(report.typed.images))).rstrip('/')}/"
    if report.files is not None and report.found is not None:
        lines += about_images(images(report.found, report.files))
    lines += about_machine(report.machine)
    if report.run is not None:
        lines += about_run(report.run, report.typed.recipe)
    for level, head in HEADS.items():
        some = [one for one in report.findings if one.level == level]
        if some:
            lines += ["", head, *(line for one in some for line in finding(one, below))]
    if report.stops:
        lines += ["", *textwrap.wrap(report.verdict, WIDTH, break_on_hyphens=False)]
        lines += [f"  {line}" for line in report.stops[0].type]
    else:
        verdict, _, command = report.verdict.partition(": ")
        lines += ["", f"{verdict}:", f"  {command}"]
    return "\n".join(map(printable, lines)).removeprefix("\n")  # the folder, too, may be called anything


def row(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{label:<{INDENT}}", subsequent_indent=" " * INDENT, break_on_hyphens=False
    )


def about_images(told: dict[str, Any]) -> list[str]:
    test = told["test"]
    lines = row("images", f"{told['where']}: {told['count']:,} to train on, {amount(told['bytes'])} in all")
    if test is not None:
        lines += row("", f"{test['where']}: {test['count']:,}, left for probe")
        lines += row("", told["passed_over"])
    elif told["note"]:
        lines += row("", told["note"])
    if told["left_alone"]:
        lines += row("left alone", ", ".join(f"{n:,} {kind}" for kind, n in told["left_alone"].items()))
    every = told["count"] + (test["count"] if test is not None else 0)
    if told["headers"] < every:
        lines += row("headers", f"of {told['headers']:,} of {every:,}, evenly spread: what follows is of these")
    lines += row("files", counts(told["kinds"]) or "none that can be read")
    if told["modes"]:
        lines += row("pixels", f"{counts(told['modes'])}; bits: {counts(told['bits'], 'with ')}")
    if told["short_side"]:
        (w, h), (wide, high) = told["smallest"], told["largest"]
        middle = told["short_side"]["0.5"]
        apart = f"{w} x {h} to {wide} x {high}, shorter side {middle:.0f} px (median)"
        lines += row("sizes", f"all {w} x {h}" if told["sizes"] == 1 else apart)
    turned = sum(n for turn, n in told["turns"].items() if turn != "1")
    lines += row("EXIF", f"{turned:,} turned") if turned else []
    decoded = f"all {every:,}" if told["decoded"] == every else f"{told['decoded']:,} of {every:,}, evenly spread"
    lines += row("decoded", f"{decoded}; {told['bad']:,} bad")
    if told["compared"] < every:
        lines += row("compared", f"the bytes of {told['compared']:,} of {every:,} files")
    sizes = list(told["classes"].values())
    if sizes:
        spread = (
            f"{count(min(sizes), 'image')} each"
            if min(sizes) == max(sizes)
            else f"{min(sizes):,} to {max(sizes):,} images"
        )
        rest = f"; {count(told['unlabelled'], 'image')} in none" if told["unlabelled"] else ""
        lines += row("classes", f"{count(len(sizes), 'folder')} of {spread}: {listed(list(told['classes']))}{rest}")
    return lines


def counts(tallied: dict[str, int], before: str = "") -> str:
    """`80 JPEG, 3 PNG`; alone, only the word."""
    if len(tallied) == 1:
        return ", ".join(tallied)
    return ", ".join(f"{n:,} {before}{word}" for word, n in tallied.items())


def listed(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(short(name, 24) for name in names[:most]) + more


def about_machine(here: Machine) -> list[str]:
    pair = here.pair
    lines = ["", *row("versions", f"torch {pair.torch}, torchvision {pair.torchvision}: the pair {pair.verdict}")]
    native = "native" if here.bf16 else "not native"
    if here.kind == "cuda":
        gpu = f"{here.device}, {amount(here.gpu_memory or 0)}, {amount(here.gpu_free or 0)} free; bf16 {native}"
        lines += row("device", gpu + (f"; {len(here.gpus)} GPUs" if len(here.gpus) > 1 else ""))
    else:
        lines += row("device", f"{here.device}, no GPU; bf16 {native}" if here.kind == "cpu" else here.device)
    lines += row("cores", f"{here.cores:,}")
    memory = [f"{amount(here.free)} of {amount(here.memory)} RAM free"] if here.free and here.memory else []
    memory += [f"/dev/shm {amount(here.shared)} free (one process needs none)"] if here.shared is not None else []
    lines += row("memory", "; ".join(memory))
    lines += row(
        "decoder", f"simplejpeg {here.simplejpeg}" if here.simplejpeg else "Pillow alone, simplejpeg is not there"
    )
    return [*lines, *disk("runs", here.runs), *disk("cache", here.cache)]


def disk(label: str, place: Disk) -> list[str]:
    free = "free space not known" if place.free is None else f"{amount(place.free)} free"
    lacking = f"; {place.lacking}" if place.lacking else ""
    return row(label, f"{short(place.at, 50)}: {free}{lacking}" if place.at else place.lacking)


def about_run(run: Choice, recipe: str) -> list[str]:
    def auto(key: str) -> str:
        return " (auto)" if key in run.automatic else ""

    lines = ["", *row("recipe", recipe)]
    network = f"{run.backbone}{auto('encoder.backbone')}, {run.weights / 1e6:.2f} M weights"
    lines += row("encoder", f"{network}, at {run.image_size} px{auto('encoder.image_size')}")
    batch = f"{run.batch_size:,}{auto('train.batch_size')}, {run.epochs:,} epochs{auto('train.epochs')}"
    lines += row("batch", f"{batch}, {run.steps:,} steps")
    lines += row(
        "optimiser",
        f"{run.optimiser}, lr {run.lr:g}{auto('optim.lr')}; {run.precision}{auto('train.precision')}",
    )
    lines += row("store", f"{run.store_line}; images at {run.store_size} px{auto('data.store_size')}")
    lines += row(
        "disk", f"up to {amount(run.disk)} in runs/" + (f"; GPU memory {amount(run.peak)}" if run.peak else "")
    )
    speed = f"{run.first_images_per_s:,.0f} images/s in the first epoch, {run.later_images_per_s:,.0f} later"
    few = f" with {run.batch} a step" if run.batch < run.batch_size else ""
    return [*lines, *row("time", f"about {duration(run.lasts)}: {speed}, measured here{few}")]


def finding(one: Finding, below: str) -> list[str]:
    """A paragraph, some names, and what to type. below: the folder that names are shown from."""
    lines = textwrap.wrap(one.text, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    reasons = one.reasons or [""] * len(one.images)
    examples = [
        short(f"`{name.removeprefix(below)}`" + (f": {why}" if why else ""), WIDTH - 4)
        for name, why in zip(one.images, reasons, strict=True)
    ]
    examples += [
        " = ".join(f"`{short(name.removeprefix(below), 32)}`" for name in group[:2]) + more(group, 2)
        for group in one.groups
    ]
    lines += [f"    {example}" for example in examples[:SHOWN]]
    if len(examples) > SHOWN:
        lines += [f"    and {len(examples) - SHOWN:,} more: --json names all"]
    return [*lines, *(f"  > {line}" for line in one.type)]


def more(group: list[str], shown: int) -> str:
    return f" +{len(group) - shown}" if len(group) > shown else ""


def short(text: str, most: int) -> str:
    """`text` with its middle left out where it is longer than `most`."""
    keep = most - 1
    return text if len(text) <= most else f"{text[: keep // 3]}…{text[len(text) - (keep - keep // 3) :]}"
