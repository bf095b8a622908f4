"""Where does the time of a run go? Each stage of a step timed alone, and whole steps as training takes them.

The run is a real one, in a temporary directory that is removed again: nothing of the user's is read but the images, and
nothing of it is written but the table.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sslpre.bench import stages as timed
from sslpre.bench.table import Report, Setting, Timing, Whole, weighed
from sslpre.data import room
from sslpre.data.find import Found, subset
from sslpre.data.packed import amount, file_of, form_of
from sslpre.data.rows import InRam, OnDevice, Store
from sslpre.data.store import open_store
from sslpre.data.stream import Stream
from sslpre.errors import SslpreError
from sslpre.objective import Objective
from sslpre.recipe import Recipe
from sslpre.start import Start
from sslpre.train import device, loop, memory, step
from sslpre.train.build import build, own_cores
from sslpre.train.progress import duration
from sslpre.train.run import Options, planned
from sslpre.views.build import Views, compiler

Say = Callable[[str], None]
STORED = 256 << 20  # bytes of decoded images to measure with: more than a processor's caches hold
IMAGES = 4096  # at most so many of them, in any case two batches
LONG = 2.5  # seconds of a step above which a smaller batch is measured
TRIAL = 4  # images in a first try
EAGER = "eager"  # how a run calls views that are not compiled


@dataclass(frozen=True)
class Chosen:
    """The store that the run would have: "device", "ram", "disk" or "off"; the line about it; images held already."""

    kind: str
    line: str
    held: int


def bench(options: Options, say: Say = lambda line: None, busy: Say = lambda what: None) -> Report:
    """Measure what `sslpre pretrain` with these options would do: half a minute, more where views are compiled.

    say: prints one line about what was assumed; busy: shows what is being measured. Raises SslpreError as a run would,
    and exit 2 where several processes were started.
    """
    begun = time.monotonic()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SslpreError("bench measures a single process", "type sslpre bench, without torchrun")
    where = device.pick(options.device)
    busy("the images")
    wanted, found, start, recipe = planned(options, where)
    with tempfile.TemporaryDirectory(prefix="sslpre-bench-") as folder:
        busy("what fits into memory")
        run = prepared(Path(folder), options, recipe, found, where, start)
        chosen = choose(options.store, found, recipe, run)
        compiled = compile_views(run, busy)
        step.fit(run)
        announced(run, wanted, recipe, found, chosen, compiled, say)
        with opened(chosen.kind, run, Path(folder)) as kept:
            stages, first, later = measure(run, kept, busy)
        setting = described(options, recipe, found, chosen, run, compiled)
        peak = torch.cuda.max_memory_allocated(where) if where.type == "cuda" else resident()
    return Report(setting, stages, first, later, peak, time.monotonic() - begun)


def choose(store: str, found: Found, recipe: Recipe, run: loop.Run) -> Chosen:
    """What the run would have for a store. Nothing is made on disk: a file that is not there is reckoned with."""
    assert recipe.train.epochs != "auto"
    reuse = recipe.train.epochs > 1 or type(run.objective).epoch_start is not Objective.epoch_start
    side, where = run.stream.side, run.device
    place, needed = file_of(found.train, side), form_of(found.train, side).total
    lacking = "" if place.exists() else too_large(place, needed)
    if store == "disk" and not place.exists():
        if lacking:
            raise SslpreError(f"`--store disk` is not possible: {lacking}", "--store auto, or --store off", 3)
        return on_disk(place, needed)
    kept, line = open_store(store, found.train, side, where, reuse=reuse, write=False)
    if kept is None and store == "auto" and reuse and not place.exists():
        if not lacking:
            return on_disk(place, needed)
        line = f"{line.partition('; not on disk')[0]}; not on disk: {lacking}"
    if kept is None:
        return Chosen("off", line, 0)
    with contextlib.closing(kept):
        behind = kept.behind if isinstance(kept, InRam | OnDevice) else kept
        return Chosen(kept.kind, line, behind.held if behind is not None else 0)


def too_large(place: Path, needed: int) -> str:
    """Why a file of so many bytes would not be made there; "" where it would."""
    free = room.disk(place)
    fits = needed <= free / 2
    return "" if fits else f"{amount(needed)} is more than half of the free disk ({amount(free)} at {place.parent})"


def on_disk(place: Path, needed: int) -> Chosen:
    return Chosen("disk", f"on disk, {amount(needed)}, `{place}`", 0)


def prepared(
    folder: Path, options: Options, recipe: Recipe, found: Found, where: torch.device, start: Start | None
) -> loop.Run:
    """The run, on as many images as can be measured; its batch smaller where a step would take too long."""
    assert recipe.train.batch_size != "auto" and recipe.data.store_size != "auto" and recipe.train.epochs != "auto"
    batch, row, total = recipe.train.batch_size, 3 * recipe.data.store_size**2, len(found.train)
    count = min(total, max(2 * batch, min(max(IMAGES, 16 * batch), STORED // row)))
    rows = np.linspace(0, total - 1, count).round().astype(np.int64)
    few = replace(found, train=subset(found.train, rows))
    # as many steps as the run has: that decides whether its views are compiled
    recipe = recipe.edit(train={"epochs": max(1, round(recipe.train.epochs * (total // batch) / (count // batch)))})
    run = build(folder, recipe, few, where, options.workers, start)
    if not recipe.train.compile:  # else each size of batch would be compiled
        fewer = affordable(run)
        if fewer < batch:
            run = build(folder, recipe.edit(train={"batch_size": fewer}), few, where, options.workers, start)
    run.recipe = run.recipe.edit(train={"epochs": 1_000_000})  # no step is the last one, whatever is measured
    return run


def affordable(run: loop.Run) -> int:
    """The images of a batch for which decoding and a step take no more than `LONG` seconds each, by a few of them."""
    assert run.recipe.encoder.image_size != "auto"
    batch, kept = run.stream.batch_size, run.views
    trial = min(TRIAL, batch)
    run.views = Views(run.recipe.views, run.recipe.encoder.image_size, run.recipe.train.seed)  # not compiled
    begun = time.monotonic()
    with streamed(run, None, batch=trial).peek() as pixels:
        decoded = (time.monotonic() - begun) / max(1, run.stream.workers)  # by one thread
        taken = min(step.rehearse(run, pixels, trial) for _ in range(2))
    run.views = kept
    memory.release()
    return min(batch, max(trial, int(trial * LONG / max(taken, decoded))))


def streamed(run: loop.Run, store: Store | None, where: torch.device | None = None, batch: int = 0) -> Stream:
    """The run's images anew, from `store` where they are there, to `where` in place of the run's device."""
    old = run.stream
    return Stream(
        old.source,
        side=old.side,
        batch_size=batch or old.batch_size,
        seed=old.seed,
        workers=old.workers,
        device=where or old.device,
        bad=old.bad,
        store=store,
    )


@contextlib.contextmanager
def opened(kind: str, run: loop.Run, folder: Path) -> Iterator[Store | None]:
    """An empty store of this kind for the images that are measured; one on disk lies in `folder`."""
    before = os.environ.get("SSLPRE_CACHE")
    os.environ["SSLPRE_CACHE"] = str(folder)
    try:
        kept, _ = open_store(kind, run.stream.source, run.stream.side, run.device, reuse=True)
    finally:
        if before is None:
            del os.environ["SSLPRE_CACHE"]
        else:
            os.environ["SSLPRE_CACHE"] = before
    if kept is None:
        yield None
        return
    with contextlib.closing(kept):
        yield kept


def compile_views(run: loop.Run, busy: Say) -> float:
    """Let the views be compiled, where the run has them so; the seconds that it took."""
    if run.facts["views"] == EAGER:
        return 0.0
    busy("views, which are compiled first")
    with run.stream.peek() as pixels:
        begun = time.monotonic()
        run.views(pixels.pixels, pixels.size, pixels.index, 0)
        return time.monotonic() - begun


def announced(
    run: loop.Run, wanted: Recipe, recipe: Recipe, found: Found, chosen: Chosen, compiled: float, say: Say
) -> None:
    """What was assumed: the run's choices, and what differs from a run."""

    def shown(group: str, key: str) -> str:
        ours = getattr(getattr(wanted, group), key) == "auto"
        return f"{getattr(getattr(recipe, group), key)}{' (auto)' if ours else ''}"

    network, measured = run.objective.encoder, len(run.stream.source)
    weights = sum(p.numel() for p in network.parameters()) / 1e6
    few = f", {measured:,} of them measured" if measured < len(found.train) else ""
    say(
        f"images     {found.train.where}: {len(found.train):,} images{few}" + (f" ({found.note})" if found.note else "")
    )
    say(f"encoder    {shown('encoder', 'backbone')}, {weights:.2f} M weights, at {shown('encoder', 'image_size')} px")
    say(f"batch      {shown('train', 'batch_size')}, {shown('train', 'epochs')} epochs")
    if run.stream.batch_size < int(recipe.train.batch_size):
        say(f"           so many take long here: measured with {run.stream.batch_size} a step")
    say(
        f"device     {device.label(run.device)}, {shown('train', 'precision')}, {run.stream.workers} decoding threads; "
        f"images kept at {shown('data', 'store_size')} px"
    )
    if run.part:
        say(f"memory     {run.part} of {run.stream.batch_size} images at a time")
    say(f"store      {chosen.line}")
    if chosen.held:
        say(f"           {chosen.held:,} images are in it already; the first epoch is measured as if none were")
    what = f"{run.facts['views']}{f' in {duration(compiled)}' if compiled else ''}"
    say(f"views      {len(run.views.sides)} of {', '.join(map(str, sorted(set(run.views.sides))))} px, {what}")


def described(
    options: Options, recipe: Recipe, found: Found, chosen: Chosen, run: loop.Run, compiled: float
) -> Setting:
    train = recipe.train
    assert train.batch_size != "auto" and train.epochs != "auto" and recipe.encoder.image_size != "auto"
    return Setting(
        recipe=str(options.recipe),
        images=str(options.images or recipe.data.images),
        where=found.train.where,
        count=len(found.train),
        measured=len(run.stream.source),
        device=device.label(run.device),
        kind=run.device.type,
        bf16=device.facts(run.device).bf16,
        cores=own_cores(),
        workers=run.stream.workers,
        precision=train.precision,
        compile=train.compile,
        backbone=recipe.encoder.backbone,
        image_size=recipe.encoder.image_size,
        store_size=run.stream.side,
        sides=run.views.sides,
        batch_size=train.batch_size,
        batch=run.stream.batch_size,
        part=run.part,
        epochs=train.epochs,
        store=chosen.kind,
        store_line=chosen.line,
        held=chosen.held,
        compiler=compiler(run.device),
        compiled=bool(compiled),
        graphs=run.views.graphs,
        compile_s=compiled,
    )


def measure(run: loop.Run, kept: Store | None, busy: Say) -> tuple[dict[str, Timing | None], Whole, Whole]:
    """Everything, in an order in which nothing is stored before the first epoch was measured."""
    cpu = torch.device("cpu")
    stages: dict[str, Timing | None] = dict.fromkeys(("store", "copy"))
    busy("decoding")
    stages["decode"] = timed.loading(streamed(run, None, cpu))
    busy("the first epoch")
    run.stream = streamed(run, kept)
    loop.start_epoch(run, 0)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    epoch = run.stream.steps_per_epoch
    first = timed.whole(run, 0, epoch)
    later = first
    if kept is not None:
        busy("the store")
        fill(kept)
        stages["store"] = timed.loading(streamed(run, kept, run.device if kept.kind == "device" else cpu))
        busy("later epochs")
        later = timed.whole(run, epoch, epoch + timed.MOST)
    with run.stream.peek() as pixels:
        if run.device.type != "cpu" and (kept is None or kept.kind != "device"):
            busy("copying")
            stages["copy"] = timed.copying(pixels)
        busy("views, forward, backward, optimiser")
        stages |= timed.computing(run, pixels)
    return stages, *judged(stages, first, later, kept)


def judged(stages: dict[str, Timing | None], first: Whole, later: Whole, kept: Store | None) -> tuple[Whole, Whole]:
    """Both kinds of step with what limits them. Without a store all are of the first kind."""
    copied = tuple(name for name in ("copy",) if stages[name] is not None)
    if kept is None:
        computed = sum(one.ms_per_step for name in timed.COMPUTING if (one := stages[name]) is not None)
        first = weighed(first, stages, ("decode", *copied), computed)
        return first, first
    return (
        weighed(first, stages, ("decode", *copied), later.ms_per_step),
        weighed(later, stages, ("store", *copied), None),
    )


def fill(kept: Store) -> None:
    """Make every row ready: those not decoded yet get the pixels of one that is. For speed that is all the same."""
    there = [i for i in range(len(kept)) if kept.ready(np.array([i]))]
    canvas = np.empty((1, kept.side, kept.side, 3), np.uint8)
    size = kept.gather(np.array(there[:1]), canvas)[0]
    for i in sorted(set(range(len(kept))) - set(there)):
        kept.put(i, canvas[0], (int(size[0]), int(size[1])))


def resident() -> int:
    """The most memory that this process has had, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
