"""One page about a run, a file that needs nothing else: is it healthy, what to do, and what it makes of its images."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslpre import recipe as recipes
from sslpre.data.find import Found, subset
from sslpre.encoder import Encoder
from sslpre.errors import SslpreError, disk_code
from sslpre.methods import methods
from sslpre.preview import even, of_run, pictures
from sslpre.probe import probe
from sslpre.recipe import Recipe
from sslpre.report import curves, history, strips
from sslpre.report.gallery import Sample, look
from sslpre.report.page import Content, page
from sslpre.train import checkpoint, health, verdict
from sslpre.train.build import load_data, open_run
from sslpre.train.runs import write_text

NAME = "report.html"
PROBE = "probe.json"
TRAINING, TEST = 2000, 1000  # images of a report's probe, at most
ROWS = 6  # of the preview
DAY = "%Y-%m-%d %H:%M UTC"


def report(
    folder: Path,
    device: torch.device,
    start: Callable[[], Encoder | None] = lambda: None,
    workers: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write `folder/report.html` about the run there, finished or not; gives its path.

    start: gives the weights it began with, for the probe. Parts that cannot be made, for their images or weights are
    not there, say so in the page and by `say`. The probe is kept in `folder/probe.json` and read from there while the
    weights are the same. Raises SslpreError: exit 2 for a recipe that is none, 3 without matplotlib or where the page
    cannot be written, 13 for a failing disk.
    """
    curves.matplotlib()
    recipe = recipes.load(str(folder / "recipe.toml"))
    content = known(folder, recipe)
    workers = (os.cpu_count() or 1) if workers is None else workers
    try:
        network, _, facts = open_run(folder, device)
        found = load_data(recipe)
    except SslpreError as error:
        content = without(content, error, ("images", "preview", "probe"), say)
    else:
        content = shown(content, recipe, network, found, facts, device, workers, say)
        content = previewed(content, folder, device, say)
        content = probed(content, folder, recipe, network, start, found, facts, device, workers, say)
    try:
        write_text(folder / NAME, page(content))
    except OSError as error:
        why = (error.strerror or "unknown reason").lower()
        raise SslpreError(f"cannot write `{folder / NAME}`: {why}", "make room there", disk_code(error)) from error
    return folder / NAME


def known(folder: Path, recipe: Recipe) -> Content:
    """What the run's own small files tell."""
    batch, epochs, size = recipe.train.batch_size, recipe.train.epochs, recipe.encoder.image_size
    assert batch != "auto" and epochs != "auto"
    data, environment = (history.facts(folder / name) for name in ("data.json", "environment.json"))
    log = history.read(folder / "metrics.jsonl", batch)
    saved = checkpoint.complete(folder / "checkpoints")
    state = history.facts(max(saved, key=lambda path: path.name) / "state.json") if saved else {}
    count = data.get("images", state.get("images"))
    steps = epochs * (count // batch) if type(count) is int else 0
    step = max(log.step, int(history.number(state.get("step")) or 0))
    running = "training" if history.alive(folder, time.time()) else "stopped"
    method = str(recipe.method["name"])
    about = [str(folder), method, f"{recipe.encoder.backbone}, {size} px"]
    if type(count) is int:
        about.append(f"{count:,} images of {data.get('where') or recipe.data.images or 'the built-in sample set'}")
    known_methods = methods()
    return Content(
        run=str(folder),
        about=[*about, f"{epochs} epochs of batch {batch}"],
        state="finished" if steps and step >= steps else running,
        step=step,
        steps=steps,
        history=log,
        judged=known_methods[method].judged[0] if method in known_methods else "loss",
        recipe=(folder / "recipe.toml").read_text(encoding="utf-8"),
        written=time.strftime(DAY, time.gmtime()),
        images=recipe.data.images,
        facts={key: str(value) for key, value in environment.items()},
    )


def without(content: Content, error: SslpreError, parts: tuple[str, ...], say: Callable[[str], None]) -> Content:
    """The page without some parts, and why. Of a folder that is gone the page is still worth reading."""
    say(f"report     no {', '.join(parts)}: {error.message}")
    told = f"Not made: {error.message}."
    return replace(content, absent=content.absent | dict.fromkeys(parts, told))


def shown(
    content: Content,
    recipe: Recipe,
    network: Encoder,
    found: Found,
    facts: dict[str, str],
    device: torch.device,
    workers: int,
    say: Callable[[str], None],
) -> Content:
    """With the images, as the encoder sees them."""
    say(f"report     up to 1,000 of {len(found.train):,} images of {found.train.where}")
    sample = Sample(found.train, network.image_size, int(recipe.data.store_size), device, workers)
    try:
        content = pictured(content, sample, network, int(facts["step"]), device, spread=True)
    except SslpreError as error:
        return without(content, error, ("images",), say)
    if found.train.fingerprint == facts["data_fingerprint"]:
        return content
    return replace(content, facts={"images": "not those of the run: they have changed since"} | content.facts)


def pictured(
    content: Content, sample: Sample, network: Encoder, step: int, device: torch.device, spread: bool
) -> Content:
    """Raises SslpreError: exit 4 where no image can be read, 10 where features are not finite."""
    picked, raw = sample.encode(network, device)
    refuse_odd(raw)
    measured: dict[str, Any] = {}
    if not content.history.verdict and len(raw) > 1:
        figures = health.of_quick(raw) | health.of_ring(raw)
        measured = health.rounded(figures) | {"verdict": verdict.of_features(figures, *raw.shape)}
    return replace(content, picked=picked, seen=look(raw, spread), encoder_step=step, measured=measured)


def refuse_odd(raw: Tensor) -> None:
    if not raw.isfinite().all():
        raise SslpreError("the encoder's features are not finite", "take an earlier run", 10)


def previewed(content: Content, folder: Path, device: torch.device, say: Callable[[str], None]) -> Content:
    """With what the task shows the network."""
    say("report     what the task shows")
    try:
        with tempfile.TemporaryDirectory(prefix="sslpre-report-") as place:
            subject = of_run(Path(place), folder, None, device)
            rows = pictures(subject, ROWS)
    except SslpreError as error:
        return without(content, error, ("preview",), say)
    return replace(content, rows=strips.drawn(rows, subject))


def probed(
    content: Content,
    folder: Path,
    recipe: Recipe,
    network: Encoder,
    start: Callable[[], Encoder | None],
    found: Found,
    facts: dict[str, str],
    device: torch.device,
    workers: int,
    say: Callable[[str], None],
) -> Content:
    """With a probe of the output on some of the run's own images, where folder names are classes; the last one while it
    is the same."""
    step, own = int(facts["step"]), found.train.fingerprint
    kept = kept_probe(folder)
    if kept and kept["step"] == step and kept["data_fingerprint"] == own:
        return replace(content, probe=kept)
    train, test = found.train, found.test
    if len(set(train.labels.tolist()) - {-1}) < 2:
        return replace(content, absent=content.absent | {"probe": "The images have no labels to measure it by."})
    if len(train) > TRAINING:
        train = subset(train, even(len(train), TRAINING))
    if test is not None and len(test) > TEST:
        test = subset(test, even(len(test), TEST))
    seen = facts["data_fingerprint"]
    try:
        made = probe(
            network,
            train,
            test,
            side=int(recipe.data.store_size),
            linear=True,
            knn=True,
            start=start(),
            device=device,
            workers=workers,
            max_bad=1.0,
            pretrained_on=train.fingerprint if seen == own else seen,
            stages=False,
            say=lambda line: say(f"probe      {line}"),
        )
    except SslpreError as error:
        return without(content, error, ("probe",), say)
    told = {"step": step, "data_fingerprint": own}
    result = json.loads(json.dumps(made.json() | told))
    try:
        write_text(folder / PROBE, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        say(f"probe      not kept: {(error.strerror or 'unknown reason').lower()}")
    return replace(content, probe=result)


def kept_probe(folder: Path) -> dict[str, Any]:
    """What an earlier report measured; {} where there is none, or it is not what was written."""
    kept = history.facts(folder / PROBE)
    needed = {"step": int, "data_fingerprint": str, "rows": list, "chance": float, "verdict": str, "classes": list}
    needed |= {"train_images": int, "test_images": int, "split": str}
    if not all(type(kept.get(key)) is kind for key, kind in needed.items()):
        return {}
    scores = [row.get(metric) for row in kept["rows"] if isinstance(row, dict) for metric in ("linear", "knn")]
    whole = all(
        isinstance(row, dict)
        and {"weights", "features", "dim"} <= set(row)
        and type(row["dim"]) is int
        and isinstance(row["weights"], str)
        and isinstance(row["features"], str)
        for row in kept["rows"]
    )
    warnings = kept.get("warnings", [])
    whole = whole and isinstance(warnings, list) and all(isinstance(one, str) for one in warnings)
    fine = all(
        score is None
        or (
            isinstance(score, dict)
            and all(history.number(score.get(key)) is not None for key in ("accuracy", "low", "high"))
        )
        for score in scores
    )
    return kept if whole and fine else {}
