"""What `sslpre pretrain` would choose for these images on this machine, and how long it would take: by real steps.

The run is a real one in a temporary directory, as that of `sslpre bench`; nothing of it stays.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sslpre import bench
from sslpre.bench import stages as timed
from sslpre.bench import stores
from sslpre.bench.table import Whole, lasting
from sslpre.data.cache import form_of
from sslpre.data.find import Found, subset
from sslpre.objective import Objective
from sslpre.recipe import Recipe
from sslpre.start import Start
from sslpre.train import loop, memory, step
from sslpre.train.announce import PATIENCE, shorter
from sslpre.train.run import Options

KEPT = 3  # checkpoints on the disk while one is written


@dataclass(frozen=True)
class Choice:
    """A run, and its cost. Sizes of images in pixels, of memory and disk in bytes, times in seconds.

    tables: of views; coloured: the task asks for colours; automatic: keys that were chosen for these images and this
    machine; part: images in memory at a time, 0 for all; lasts: all epochs; compiling: before them; epoch_start: what
    the method computes before each of them, in all; batch: of the steps that were measured; disk: of the run's
    directory, about; stored: of all decoded images; peak: memory of the GPU, 0 where there is none; shorter: what to
    type for a run that is long for a CPU.
    """

    backbone: str
    weights: int
    image_size: int
    store_size: int
    batch_size: int
    part: int
    epochs: int
    steps: int
    optimiser: str
    lr: float
    precision: str
    init: str
    views: str
    largest_view: int
    tables: int
    coloured: bool
    automatic: tuple[str, ...]
    store: str
    store_line: str
    stored: int
    disk: int
    peak: int
    batch: int
    first_images_per_s: float
    later_images_per_s: float
    compiling: float
    epoch_start: float
    lasts: float
    shorter: str


Planned = tuple[Recipe, Found, Start | None, Recipe]


@dataclass(frozen=True)
class Steps:
    """The run that steps were taken of, the store that it would have, and what was measured; times in seconds."""

    run: loop.Run
    store: stores.Chosen
    first: Whole
    later: Whole
    compiling: float
    epoch_start: float
    peak: int


def choice(
    options: Options, plan: Planned, whole: np.ndarray, where: torch.device, busy: Callable[[str], None]
) -> Choice:
    """Measure the run that `plan` says. whole: int64 [M], the images for training that are not known to be bad.

    Raises SslpreError as a run would before its first step.
    """
    wanted, found, _, recipe = plan
    train, every = recipe.train, len(found.train)
    assert train.batch_size != "auto" and train.epochs != "auto" and recipe.optim.lr != "auto"
    assert recipe.encoder.image_size != "auto"
    steps = measured(options, plan, whole, where, busy)
    run, first, later = steps.run, steps.first, steps.later
    held = None if steps.store.kind == "off" else steps.store.held
    starting = steps.epoch_start * every / len(run.stream.source) * train.epochs
    lasts = lasting(every, train.epochs, held, first, later) + steps.compiling + starting
    return Choice(
        backbone=recipe.encoder.backbone,
        weights=sum(p.numel() for p in run.objective.encoder.parameters()),
        image_size=recipe.encoder.image_size,
        store_size=run.stream.side,
        batch_size=train.batch_size,
        part=run.part,
        epochs=train.epochs,
        steps=train.epochs * (every // train.batch_size),
        optimiser=recipe.optim.name,
        lr=recipe.optim.lr,
        precision=train.precision,
        init=recipe.encoder.init,
        views=run.views.made,
        largest_view=max(run.views.sides),
        tables=len(recipe.views),
        coloured=run.objective.encoder.colour == "luma",
        automatic=automatic(wanted),
        store=steps.store.kind,
        store_line=steps.store.line,
        stored=form_of(found.train, run.stream.side).total,
        disk=directory(run.objective, recipe.optim.name, every),
        peak=steps.peak,
        batch=run.stream.batch_size,
        first_images_per_s=first.images_per_s,
        later_images_per_s=later.images_per_s,
        compiling=steps.compiling,
        epoch_start=starting,
        lasts=lasts,
        shorter=shorter(recipe, lasts) if where.type == "cpu" and lasts > PATIENCE else "",
    )


def measured(
    options: Options, plan: Planned, whole: np.ndarray, where: torch.device, busy: Callable[[str], None]
) -> Steps:
    """A few steps of the first epoch, in which images are decoded, and a few of the later ones."""
    _, found, start, recipe = plan
    few = replace(found, train=subset(found.train, whole))
    with tempfile.TemporaryDirectory(prefix="sslpre-check-") as folder:
        busy("what fits into memory")
        lenient = recipe.edit(data={"max_bad": 1.0})  # bad images are counted elsewhere
        run, rows = bench.prepared(Path(folder), options, lenient, few, where, start)
        compiling = bench.compile_views(run, busy)
        step.fit(run)
        starts, side = type(run.objective).epoch_start is not Objective.epoch_start, run.stream.side
        again, wish = recipe.train.epochs != 1 or starts, options.store or "auto"
        chosen = stores.choose(wish, found.train, side, where, again, memory.spare(where))
        with stores.opened(chosen, run.stream.source, found.train, whole[rows], side, where) as kept:
            busy("a few steps")
            plain = run.stream
            run.stream = bench.streamed(run, kept.store)
            begun = time.monotonic()
            loop.start_epoch(run, 0)
            epoch_start = time.monotonic() - begun if starts else 0.0
            compiling += bench.compile_network(run, plain, busy)
            epoch = run.stream.steps_per_epoch
            if where.type == "cuda":  # what was tried before says nothing of the run
                torch.cuda.reset_peak_memory_stats(where)
            later = first = timed.whole(run, 0, epoch)
            with kept.later() as store:
                if store is not None:
                    busy("a few steps of later epochs")
                    run.stream = bench.streamed(run, store)
                    later = timed.whole(run, epoch, epoch + timed.MOST)
        peak = torch.cuda.max_memory_allocated(where) if where.type == "cuda" else 0
        return Steps(run, chosen, first, later, compiling, epoch_start, peak)


def automatic(wanted: Recipe) -> tuple[str, ...]:
    """Keys of a recipe that leave the choice to us: `encoder.backbone`."""
    tables = wanted.model_dump()
    return tuple(
        f"{table}.{key}"
        for table in ("encoder", "data", "optim", "train")
        for key, value in tables[table].items()
        if value == "auto"
    )


def directory(objective: Objective, optimiser: str, images: int) -> int:
    """Bytes of a run's directory at most: weights and the optimiser's state thrice, the encoder, a digest an image."""
    held = sum(tensor.numel() * tensor.element_size() for tensor in objective.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in objective.parameters() if p.requires_grad)
    state = trained * (2 if optimiser == "adamw" else 1)
    encoder = sum(tensor.numel() * tensor.element_size() for tensor in objective.encoder.state_dict().values())
    return KEPT * (held + state) + encoder + 8 * images
