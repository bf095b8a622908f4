"""The loop: one straight line from a batch of pixels to a step. It knows the contract and no method."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sslpre.data.stream import Stream
from sslpre.objective import Epoch, Objective
from sslpre.ops import ranks
from sslpre.recipe import Recipe
from sslpre.train import changes, checkpoint, distributed, finite, memory, metrics, optim, verdict
from sslpre.train.disk import Disk
from sslpre.train.interrupt import Interrupted, interruptible
from sslpre.train.progress import Display, Meter
from sslpre.train.step import half, reseed, take_step
from sslpre.views.build import Views, centre


@dataclass
class Run:
    """Everything a run is made of. `step` counts the steps taken; the place in the data follows from it."""

    folder: Path
    recipe: Recipe
    objective: Objective
    optimisers: dict[str, Optimizer]
    stream: Stream
    views: Views
    labels: Tensor  # [N], all -1 unless the method declares labels
    device: torch.device
    facts: dict[str, Any]  # goes into every checkpoint: data fingerprint, versions
    part: int = 0  # images of this process's batch that are in memory at a time; 0: all
    step: int = 0
    seconds: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    summed: int = 0
    asked: deque[finite.Asked] = field(default_factory=deque)  # whether steps were finite
    unsettled: deque[tuple[int, dict[str, Tensor]]] = field(default_factory=deque)  # terms of those that may not be
    undo: memory.Undo | None = None  # what was before the last step, where its answer is late
    passed_over: int = 0  # steps that were not finite
    ending: str = ""  # "stopped" where it will not go on to its last step
    verdict: str = ""  # on its health, with what to do, as of the last look
    told: list[dict[str, Any]] = field(default_factory=list)  # lines for metrics.jsonl
    outdated: list[Path] = field(default_factory=list)  # checkpoints on other images, to go when there is a new one
    onlookers: Sequence[Callable[[Run], None]] = ()  # called in every process after a line of the log; change nothing
    guard: Callable[[], None] = lambda: None  # raises where another run has taken the directory over

    @property
    def steps(self) -> int:
        assert self.recipe.train.epochs != "auto"
        return self.recipe.train.epochs * self.stream.steps_per_epoch


def train(run: Run) -> dict[str, float]:
    """From `run.step` to the end. Returns seconds, images_per_s and waiting of this process.

    Raises Interrupted after a signal to any process, with the state saved; SslpreError as `take_step`, exit 20 with too
    many bad images, and 11 where the run has collapsed and is to stop then, with the state saved. Of several processes
    each calls it, and the first one writes.
    """
    meter, saved_at, disk = Meter(), time.monotonic(), Disk(run.folder)
    an_epoch, minutes = run.stream.steps_per_epoch, run.recipe.train.checkpoint_minutes
    # the first process looks for all: a later one might already see what it has written
    if run.step == 0 and not distributed.from_first(lambda: bool(checkpoint.complete(run.folder / "checkpoints"))):
        save(run, meter, disk, patient=False)
    with (
        metrics.metrics_from(run.folder / "metrics.jsonl", run.step) as log,
        Display(run.steps, run.step) as display,
        verdict.watching(run) as watch,
        interruptible() as stop,
        contextlib.closing(run.stream.steps(run.step, run.steps)) as batches,
    ):
        for pixels in batches:
            epoch, done = divmod(run.step, an_epoch)
            if done == 0:
                finite.settle(run)
                start_epoch(run, epoch)
                metrics.write_notes(run, log, watch, epoch)
            run.objective.train()
            take_step(run, pixels, epoch)
            meter.add(len(pixels.index) * ranks.world(), run.stream.waited)
            display.step(run.step)
            late = run.step % an_epoch == 0 or time.monotonic() - saved_at > 60 * minutes
            wishes = [metrics.due(run, meter), disk.due() if disk.failures else late, stop(), run.stream.bad.pending]
            log_now, save_now, stop_now, bad = map(bool, distributed.summed([float(bool(wish)) for wish in wishes]))
            if bad:
                tell_bad(run)
            if log_now or save_now or stop_now:
                finite.settle(run)
                metrics.write_told(run, log)
            if log_now and run.summed:
                metrics.write_metrics(run, log, display, meter, watch, pixels, epoch)
            collapsed = bool(log_now) and watch.ends(run)
            if save_now or stop_now or collapsed:
                save(run, meter, disk, patient=not (stop_now or collapsed))
                saved_at = time.monotonic()
            if done + 1 == an_epoch and not (stop_now or collapsed):
                metrics.write_survey(run, log, watch, meter, epoch)
            run.ending = "stopped" if stop_now or collapsed else ""
            for look_on in run.onlookers if log_now or run.ending else ():
                look_on(run)
            if collapsed:
                raise watch.stopped(run)
            if stop_now and run.step < run.steps:
                raise Interrupted(max(distributed.collected([stop()])))
        see_it_saved(run, meter, disk, stop)
    return meter.total()


def start_epoch(run: Run, epoch: int) -> None:
    reseed(run.recipe.train.seed, "epoch", epoch)
    for module in run.objective.epoch_start(Epoch(epoch, lambda f: every_image(run, f))):
        for parameter in module.parameters():  # a fresh weight must not inherit the old one's momentum
            for optimiser in run.optimisers.values():
                optimiser.state.pop(parameter, None)
    if type(run.objective).epoch_start is not Objective.epoch_start:
        distributed.same_weights(run.objective)  # what was computed in each may differ in the last bit


@torch.no_grad()
def every_image(run: Run, f: Callable[[Tensor], Tensor]) -> Tensor:
    """f of each image's centre view, for all images in index order, in eval mode: [N, …], numbers of any kind.

    Processes share the work. Networks run in the run's precision, and are half as long about it in bf16.
    """
    was_training = run.objective.training
    run.objective.eval()
    assert run.recipe.encoder.image_size != "auto"
    side = run.recipe.encoder.image_size
    batch = run.part or run.stream.batch_size // ranks.world()  # in evaluation it takes less memory than in training
    mine = run.stream.in_order(distributed.part(len(run.stream.source)), batch)
    rows: Tensor | None = None  # filled in place: a list that is joined at the end would take twice the memory
    own = distributed.part(len(run.stream.source))
    at = 0
    for some in mine:
        with half(run):
            found = f(centre(some.pixels, some.size, side))
        if rows is None:
            rows = found.new_empty(own.stop - own.start, *found.shape[1:])
        rows[at : at + len(found)] = found
        at += len(found)
    assert rows is not None and at == len(rows)
    run.objective.train(was_training)
    tell_bad(run)
    return distributed.joined(rows, len(run.stream.source))


def tell_bad(run: Run) -> None:
    """Every process learns which images any of them could not read. Raises SslpreError (exit 20) in all of them."""
    run.stream.bad.settle(distributed.collected(run.stream.bad.pending))


def save(run: Run, meter: Meter, disk: Disk, patient: bool) -> None:
    """A checkpoint. Where the disk fails, a warning if there is reason to be `patient`, else SslpreError (exit 13)."""
    disk.write(lambda: write(run, meter), f"step {run.step} of `{run.folder}`", patient)


def see_it_saved(run: Run, meter: Meter, disk: Disk, stop: Callable[[], int]) -> None:
    """After the last step there is nothing to do but to wait for a disk that fails."""
    while disk.failures:
        time.sleep(0.2)
        asked, due = distributed.summed([float(stop() > 0), float(disk.due())])
        if asked or due:
            save(run, meter, disk, patient=not asked)


def write(run: Run, meter: Meter) -> None:
    run.guard()
    state = {
        "step": run.step,
        "seconds": run.seconds + meter.total()["seconds"],
        "part": run.part,
        "processes": ranks.world(),
        "passed_over": run.passed_over,
        **run.facts,
        "views": run.views.made,
    }
    optim_state = optim.state_by_name(run.objective, run.optimisers)
    model_state = checkpoint.model_state(run.objective)
    checkpoint.save(run.folder / "checkpoints", model_state, optim_state, state, run.outdated)
    if run.outdated:
        changes.write(run.folder, run.stream.source)
        run.outdated = []
