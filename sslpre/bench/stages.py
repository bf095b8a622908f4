"""The stages of a step, timed alone on an otherwise idle machine, and whole steps one after another."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from sslpre.bench.table import Timing, Whole, spread, timing
from sslpre.data.stream import Pixels, Stream
from sslpre.errors import SslpreError
from sslpre.train import finite, loop, step

COMPUTING = ("views", "forward", "backward", "optimiser")
SECONDS = 2.0  # for a stage
STEPS_SECONDS = 4.0  # for whole steps
LEAST, MOST = 3, 50  # repeats, however short or long they are
SKIPPED = 2  # whole steps at most that do not count: they begin with nothing loaded ahead


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def repeated(do: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of each call, after one to warm up; fewer calls where one takes long."""
    times: list[float] = []
    begun = time.perf_counter()
    do()
    wait(device)
    first = time.perf_counter() - begun
    least = LEAST if first < SECONDS else 1
    while len(times) < least or (sum(times) < SECONDS and len(times) < MOST):
        begun = time.perf_counter()
        do()
        wait(device)
        times.append(time.perf_counter() - begun)
    return times


def loading(stream: Stream, most: int = MOST) -> Timing:
    """Up to `most` batches as the stream brings them, one after another, with nothing else to do; its threads all work.

    One more is taken before, which does not count.
    """
    times: list[float] = []
    with contextlib.closing(stream.steps(0, most + 1)) as batches:
        begun = time.perf_counter()
        for _ in batches:
            wait(stream.device)
            now = time.perf_counter()
            times.append(now - begun)
            begun = now
            if sum(times) > SECONDS:
                break
    times = times[1:] if len(times) > LEAST else times  # the first one comes late: nothing was begun before it
    mean = sum(times) / len(times)
    return Timing(stream.batch_size / mean, 1000 * mean, spread(times), len(times))


def copying(pixels: Pixels) -> Timing:
    """One batch from pinned memory to the device that it is on."""
    device = pixels.pixels.device
    host = pixels.pixels.cpu()
    host = host.pin_memory() if device.type == "cuda" else host
    return timing(repeated(lambda: host.to(device, non_blocking=True), device), len(pixels.index))


def computing(run: loop.Run, pixels: Pixels) -> dict[str, Timing]:
    """Views, forward, backward and optimiser, each by itself, in the parts that fit into memory; all players' together.

    No weight moves: the rate is 0.
    """
    batch = len(pixels.index)
    found = {"views": timing(repeated(lambda: list(step.micro_batches(run, pixels, 0, 0.0)), run.device), batch)}
    spent: list[dict[str, float]] = []
    repeated(lambda: spent.append(rounds(run, pixels)), run.device)
    later = spent[1:]  # the first one warms up
    return found | {name: timing([one[name] for one in later], batch) for name in COMPUTING[1:]}


def rounds(run: loop.Run, pixels: Pixels) -> dict[str, float]:
    """Seconds of forward, backward and optimiser in one step."""
    spent = dict.fromkeys(COMPUTING[1:], 0.0)

    @contextlib.contextmanager
    def clock(name: str) -> Iterator[None]:
        wait(run.device)
        begun = time.perf_counter()
        yield
        wait(run.device)
        spent[name] += time.perf_counter() - begun

    run.objective.train()
    batches = list(step.micro_batches(run, pixels, 0, 0.0))
    games = [run.objective.rounds(batch) for batch in batches]
    for player, optimiser in run.optimisers.items():
        for group in optimiser.param_groups:
            group["lr"] = 0.0
        run.objective.zero_grad(set_to_none=True)
        for batch, game in zip(batches, games, strict=True):
            with clock("forward"):
                loss = step.next_loss(run, game, player)
            with clock("backward"):
                (len(batch.index) / len(pixels.index) * loss.value).backward()
        own = [p for group in optimiser.param_groups for p in group["params"]]
        with clock("optimiser"):
            finite.ask(run, {"loss": loss.value.detach()}, own)
            try:
                finite.answers(run)
            except finite.NotFinite as found:
                raise SslpreError(str(found), finite.HINT, finite.CODE) from found
            optimiser.step()
    with clock("optimiser"), torch.no_grad():
        run.objective.after_step(0.0)
    run.asked.clear()  # a GPU's answer is read a step later, and there is none
    return spent


def whole(run: loop.Run, first: int, last: int) -> Whole:
    """The steps `first` to `last` - 1 of training, or as many of them as there is time for; at least one."""
    wait(run.device)
    marks, waited = [time.perf_counter()], [run.stream.waited]
    with contextlib.closing(run.stream.steps(first, last)) as batches:
        for number, pixels in enumerate(batches, first):
            run.objective.train()
            step.take_step(run, pixels, number // run.stream.steps_per_epoch)
            if len(marks) <= SKIPPED:  # the clock may start here: a GPU has done by then what was queued before
                wait(run.device)
            marks.append(time.perf_counter())
            waited.append(run.stream.waited)
            spent = marks[-1] - marks[0]
            if spent > (STEPS_SECONDS if len(marks) > LEAST else 2 * STEPS_SECONDS):
                break
        wait(run.device)
        marks[-1] = time.perf_counter()
    skipped = max(0, min(SKIPPED, len(marks) - LEAST))
    times = [after - before for before, after in zip(marks[skipped:], marks[skipped + 1 :], strict=False)]
    mean = sum(times) / len(times)
    share = (waited[-1] - waited[skipped]) / sum(times)
    return Whole(run.stream.batch_size / mean, 1000 * mean, spread(times), len(times), share)
