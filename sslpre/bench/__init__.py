"""Where does the time of a run go? Each stage of a step timed alone, and whole steps as training takes them.

The run is a real one, in a temporary directory that is removed again: nothing of the user's is read but the images, and
nothing of it is written but the table.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sslpre.bench import stages as timed
from sslpre.bench import stores
from sslpre.bench.setting import described
from sslpre.bench.stores import Chosen, Measured
from sslpre.bench.table import Report, Timing, Whole, weighed
from sslpre.data import room
from sslpre.data.find import Found, subset
from sslpre.data.rows import Store
from sslpre.data.stream import Stream
from sslpre.errors import SslpreError
from sslpre.objective import Objective
from sslpre.recipe import Recipe
from sslpre.start import Start
from sslpre.train import device, loop, memory, step
from sslpre.train.build import build
from sslpre.train.progress import duration
from sslpre.train.run import Options, planned
from sslpre.views.build import Views

Say = Callable[[str], None]
STORED = 256 << 20  # bytes of decoded images to measure with: more than a processor's caches hold
IMAGES = 4096  # at most so many of them, in any case two batches
LONG = 2.5  # seconds of a step above which a smaller batch is measured
TRIAL = 4  # images in a first try
EAGER = "eager"  # how a run calls views that are not compiled


@dataclass(frozen=True)
class Figures:
    """What was measured. network_s: seconds to compile the network; stored: bytes of the store measured with."""

    stages: dict[str, Timing | None]
    first: Whole
    later: Whole
    network_s: float
    stored: int
    note: str


def bench(options: Options, say: Say = lambda line: None, busy: Say = lambda what: None) -> Report:
    """Measure what `sslpre pretrain` with these options would do: half a minute, more where something is compiled.

    say: prints one line about what was assumed; busy: shows what is being measured. Raises SslpreError as a run would,
    and exit 2 where several processes were started.
    """
    begun = time.monotonic()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SslpreError("bench measures a single process", "type sslpre bench, without torchrun")
    memory.keep_freed()
    where = device.pick(options.device)
    busy("the images")
    wanted, found, start, recipe = planned(options, where)
    with tempfile.TemporaryDirectory(prefix="sslpre-bench-") as folder:
        busy("what fits into memory")
        run, rows = prepared(Path(folder), options, recipe, found, where, start)
        compiled = compile_views(run, busy)
        step.fit(run)
        again = recipe.train.epochs != 1 or type(run.objective).epoch_start is not Objective.epoch_start
        side, whole = run.stream.side, found.train
        chosen = stores.choose(options.store or "auto", whole, side, where, again, memory.spare(where))
        announced(run, wanted, recipe, found, chosen, compiled, say)
        with stores.opened(chosen, run.stream.source, whole, rows, side, where) as kept:
            figures = measure(run, kept, busy)
        peak = torch.cuda.max_memory_allocated(where) if where.type == "cuda" else resident()
        setting = described(options, recipe, found, chosen, run, compiled, figures.network_s, figures.note)
        more = len(whole) * 3 * side**2 - figures.stored if fills_memory(chosen, where) else 0
    return Report(
        setting, figures.stages, figures.first, figures.later, peak, max(0, peak + more), time.monotonic() - begun
    )


def fills_memory(chosen: Chosen, where: torch.device) -> bool:
    """Is the run's store in the memory whose peak is measured: the GPU's where there is one, else the process's?"""
    return chosen.kind == ("device" if where.type == "cuda" else "ram")


def prepared(
    folder: Path, options: Options, recipe: Recipe, found: Found, where: torch.device, start: Start | None
) -> tuple[loop.Run, np.ndarray]:
    """The run, on as many images as can be measured, and which; its batch smaller where a step would take too long."""
    assert recipe.train.batch_size != "auto" and recipe.data.store_size != "auto" and recipe.train.epochs != "auto"
    batch, row, total = recipe.train.batch_size, 3 * recipe.data.store_size**2, len(found.train)
    count = min(total, max(2 * batch, min(max(IMAGES, 16 * batch), STORED // row)))
    count = max(batch, min(count, (room.memory() or sys.maxsize) // 4 // row))
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
    return run, rows


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


def compile_views(run: loop.Run, busy: Say) -> float:
    """Let the views be compiled, where the run has them so; the seconds that it took."""
    if run.views.made == EAGER:
        return 0.0
    busy("views, which are compiled first")
    with run.stream.peek() as pixels:
        begun = time.monotonic()
        run.views(pixels.pixels, pixels.size, pixels.index, 0)
        timed.wait(run.device)
        return time.monotonic() - begun


def compile_network(run: loop.Run, stream: Stream, busy: Say) -> float:
    """A step of the run itself, by which its network is compiled, where it is; its seconds. Copies of it are not."""
    if not run.recipe.train.compile:
        return 0.0
    busy("a first step, in which the network is compiled")
    with stream.peek() as pixels:
        begun = time.monotonic()
        run.objective.train()
        step.take_step(run, pixels, 0)
        timed.wait(run.device)
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
        say(f"           {chosen.held:,} images are decoded already; the first epoch is measured as if none were")
    what = run.views.made
    if compiled:
        what += ", for compiling them failed" if what == EAGER else f" in {duration(compiled)}"
    say(f"views      {len(run.views.sides)} of {', '.join(map(str, sorted(set(run.views.sides))))} px, {what}")


def measure(run: loop.Run, kept: Measured, busy: Say) -> Figures:
    """Everything, in an order in which nothing is stored before the first epoch was measured."""
    cpu, plain = torch.device("cpu"), run.stream
    stages: dict[str, Timing | None] = dict.fromkeys(("store", "copy"))
    busy("decoding")
    stages["decode"] = timed.loading(streamed(run, None, cpu))
    busy("the first epoch")
    run.stream = streamed(run, kept.store)
    loop.start_epoch(run, 0)
    network_s = compile_network(run, plain, busy)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    epoch = run.stream.steps_per_epoch
    first = timed.whole(run, 0, epoch)
    later = first
    with kept.later() as store:
        if store is not None:
            busy("the store")
            place, most = (
                run.device if store.kind == "device" else cpu,
                min(timed.MOST, epoch) if kept.cold else timed.MOST,
            )
            forget(kept, store)
            stages["store"] = timed.loading(streamed(run, store, place), most)
            busy("later epochs")
            forget(kept, store)
            run.stream = streamed(run, store)
            later = timed.whole(run, epoch, epoch + most)
        with run.stream.peek() as pixels:
            if run.device.type != "cpu" and (store is None or store.kind != "device"):
                busy("copying")
                stages["copy"] = timed.copying(pixels)
            busy("views, forward, backward, optimiser")
            stages |= timed.computing(run, pixels)
    stored = kept.store.bytes if kept.store is not None and kept.store.kind != "disk" else 0
    return Figures(stages, *judged(stages, first, later, store), network_s, stored, kept.note)


def forget(kept: Measured, store: Store) -> None:
    if kept.cold and isinstance(store, stores.Mapped):
        store.forget()


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


def resident() -> int:
    """The most memory that this process has had, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
