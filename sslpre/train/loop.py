"""The loop: one straight line from a batch of pixels to a step. It knows the contract and no method."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.optim import Optimizer

from sslpre.data.stream import Pixels, Stream
from sslpre.errors import SslpreError
from sslpre.objective import Batch, Epoch, Objective
from sslpre.recipe import Recipe
from sslpre.train import checkpoint, optim
from sslpre.train.progress import Display, Meter
from sslpre.train.runs import write_text
from sslpre.views.build import Views, centre

LOG_STEPS, LOG_SECONDS = 20, 10.0  # whichever comes first


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
    step: int = 0
    seconds: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    summed: int = 0

    @property
    def steps(self) -> int:
        assert self.recipe.train.epochs != "auto"
        return self.recipe.train.epochs * self.stream.steps_per_epoch


class Interrupted(Exception):
    """Ctrl-C, after the state was saved."""


def reseed(seed: int, name: str, number: int = 0) -> None:
    """Torch's global generator as a function of (seed, what for, number): no generator state is ever stored."""
    digest = hashlib.blake2b(f"{seed}/{name}/{number}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def train(run: Run) -> dict[str, float]:
    """From `run.step` to the end. Returns seconds, images_per_s and waiting of this process.

    Raises Interrupted after Ctrl-C, with the state saved; SslpreError exit 10 on a non-finite loss, before the step.
    """
    meter, saved_at = Meter(), time.monotonic()
    an_epoch, minutes = run.stream.steps_per_epoch, run.recipe.train.checkpoint_minutes
    if run.step == 0 and not checkpoint.complete(run.folder / "checkpoints"):
        save(run, meter)
    with (
        metrics_from(run.folder / "metrics.jsonl", run.step) as log,
        Display(run.steps, run.step) as display,
        interruptible() as stop,
        contextlib.closing(run.stream.steps(run.step, run.steps)) as batches,
    ):
        for pixels in batches:
            epoch, done = divmod(run.step, an_epoch)
            if done == 0:
                start_epoch(run, epoch)
            run.objective.train()
            take_step(run, pixels, epoch)
            meter.add(len(pixels.index), run.stream.waited)
            display.step(run.step)
            if run.step % LOG_STEPS == 0 or run.step == run.steps or time.monotonic() - meter.since > LOG_SECONDS:
                write_metrics(run, log, display, meter, epoch)
            if stop() or run.step % an_epoch == 0 or time.monotonic() - saved_at > 60 * minutes:
                save(run, meter)
                saved_at = time.monotonic()
            if stop() and run.step < run.steps:
                raise Interrupted
    return meter.total()


def start_epoch(run: Run, epoch: int) -> None:
    reseed(run.recipe.train.seed, "epoch", epoch)
    for module in run.objective.epoch_start(Epoch(epoch, lambda f: every_image(run, f))):
        for parameter in module.parameters():  # a fresh weight must not inherit the old one's momentum
            for optimiser in run.optimisers.values():
                optimiser.state.pop(parameter, None)


@torch.no_grad()
def every_image(run: Run, f: Callable[[Tensor], Tensor]) -> Tensor:
    """f of each image's centre view, for all images in index order, in eval mode: [N, …]."""
    was_training = run.objective.training
    run.objective.eval()
    assert run.recipe.encoder.image_size != "auto"
    side = run.recipe.encoder.image_size
    rows = [f(centre(some.pixels, some.size, side)) for some in run.stream.in_order()]
    run.objective.train(was_training)
    return torch.cat(rows)


def take_step(run: Run, pixels: Pixels, epoch: int) -> None:
    """Views, losses, backward, finite?, step: for each player in turn."""
    table = run.recipe.train
    progress = run.step / run.steps
    reseed(table.seed, "step", run.step)
    batches = list(micro_batches(run, pixels, epoch, progress))
    share = optim.rate(run.step, run.steps, run.recipe.optim.warmup)
    assert run.recipe.optim.lr != "auto"
    games = [run.objective.rounds(batch) for batch in batches]
    precision = torch.autocast(run.device.type, torch.bfloat16, enabled=table.precision == "bf16")
    for player, optimiser in run.optimisers.items():
        for group in optimiser.param_groups:
            group["lr"] = share * run.recipe.optim.lr
        run.objective.zero_grad(set_to_none=True)
        for batch, game in zip(batches, games, strict=True):
            with precision:
                loss = next(game, None)
            if loss is None:
                raise TypeError(f"rounds() gave no loss for player {player}")
            part = len(batch.index) / len(pixels.index)
            (part * loss.value).backward()
            prefix = f"{player}." if len(run.optimisers) > 1 else ""
            for name, term in {"loss": loss.value, **loss.terms}.items():
                add(run.sums, prefix + name, part * term.detach().float())
        refuse_nonfinite(run, optimiser)
        optimiser.step()
    for game in games:
        if next(game, None) is not None:
            raise TypeError(f"rounds() gave more losses than there are players ({len(run.optimisers)})")
    run.step += 1
    run.summed += 1
    with torch.no_grad():
        run.objective.after_step(run.step / run.steps)


def micro_batches(run: Run, pixels: Pixels, epoch: int, progress: float) -> Iterator[Batch]:
    """The batch in parts that fit: one part for a loss that couples its images (the encoder then runs in chunks)."""
    size = run.recipe.train.micro_batch
    index, label = sent(pixels.index, run.device), sent(run.labels[pixels.index], run.device)
    views = run.views(pixels.pixels, pixels.size, pixels.index, epoch)
    if not size or run.objective.couples:
        size = len(pixels.index)
    for start in range(0, len(pixels.index), size):
        part = slice(start, start + size)
        shown = [view[part].contiguous(memory_format=torch.channels_last) for view in views]
        yield Batch(shown, index[part], label[part], progress, run.recipe.train.seed, epoch)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it: a copy from memory that is not pinned would."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def add(sums: dict[str, Tensor], name: str, term: Tensor) -> None:
    sums[name] = sums[name] + term if name in sums else term


def refuse_nonfinite(run: Run, optimiser: Optimizer) -> None:
    """Stop before the player's step; nothing of it reaches the disk. The one place where the host waits."""
    loss = torch.stack(list(run.sums.values())).sum()  # each logged term too
    grads = [p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros((), device=loss.device)
    if bool(torch.isfinite(loss + norm)):
        return
    what = "gradient" if bool(torch.isfinite(loss)) else "loss"
    raise SslpreError(
        f"{what} not finite at step {run.step + 1}; nothing of this step was kept",
        "lower --lr, or use --precision fp32",
        10,
    )


def write_metrics(run: Run, log: TextIO, display: Display, meter: Meter, epoch: int) -> None:
    """Mean of each term since the last line: the only time the sums are read from the device."""
    names = list(run.sums)
    means = (torch.stack([run.sums[name] for name in names]) / run.summed).tolist()
    figures: dict[str, Any] = {"step": run.step, "epoch": epoch, **dict(zip(names, means, strict=True))}
    run.sums.clear()
    run.summed = 0
    figures["lr"] = next(iter(run.optimisers.values())).param_groups[0]["lr"]
    figures |= {key: round(number, 4) for key, number in meter.lap().items()}
    log.write(json.dumps(figures, allow_nan=False) + "\n")
    log.flush()
    shown = (
        figures if "loss" in figures else figures | {"loss": next(v for k, v in figures.items() if k.endswith("loss"))}
    )
    display.update(run.step, shown)


def save(run: Run, meter: Meter) -> None:
    state = {"step": run.step, "seconds": run.seconds + meter.total()["seconds"], **run.facts}
    optim_state = optim.state_by_name(run.objective, run.optimisers)
    checkpoint.save(run.folder / "checkpoints", checkpoint.model_state(run.objective), optim_state, state)


@contextlib.contextmanager
def metrics_from(path: Path, step: int) -> Iterator[TextIO]:
    """`metrics.jsonl`, cut back to what the checkpoint of `step` had seen, open for appending."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = itertools.takewhile(lambda line: line.endswith("}") and json.loads(line)["step"] <= step, lines)
    write_text(path, "".join(f"{line}\n" for line in kept))
    with open(path, "a", encoding="utf-8") as stream:
        yield stream


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only sets a flag, read at the step's end; the second one stops at once."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not in the main thread: Ctrl-C goes elsewhere
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
