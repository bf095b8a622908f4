"""`metrics.jsonl`: a line of figures every few steps, read from the device only then."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sslpre.train import distributed, health, verdict
from sslpre.train.disk import reason
from sslpre.train.progress import Display, Meter, say
from sslpre.train.runs import write_text

if TYPE_CHECKING:
    from sslpre.data.stream import Pixels
    from sslpre.train.loop import Run

LOG_STEPS, LOG_SECONDS = 20, 10.0  # whichever comes first


class Log:
    """The file, line by line. What a failing disk does not take is kept, and written when it does: no line is lost."""

    def __init__(self, path: Path):
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115  # for as long as the run trains
        self.rest, self.told = b"", False

    def write(self, figures: dict[str, Any]) -> None:
        self.rest += json.dumps(figures, allow_nan=False).encode() + b"\n"
        try:
            while self.rest:
                self.rest = self.rest[self.file.write(self.rest) :]
            self.told = False
        except OSError as error:
            if not self.told:
                say(f"warning: `{self.file.name!s}` cannot be written: {reason(error)}; lines are kept until it can")
            self.told = True


def due(run: Run, meter: Meter) -> bool:
    return run.step % LOG_STEPS == 0 or run.step == run.steps or time.monotonic() - meter.since > LOG_SECONDS


def write_metrics(
    run: Run, log: Log, display: Display, meter: Meter, watch: verdict.Watch, pixels: Pixels, epoch: int
) -> None:
    """Mean of each term since the last line, over all processes: the only time the sums are read from the device."""
    names = list(run.sums)
    means = distributed.mean(torch.stack([run.sums[name] for name in names]) / run.summed).tolist()
    figures: dict[str, Any] = {"step": run.step, "epoch": epoch, **dict(zip(names, means, strict=True))}
    run.sums.clear()
    run.summed = 0
    looked = watch.look(run, pixels, epoch, figures) if distributed.first() else {}
    figures["lr"] = next(iter(run.optimisers.values())).param_groups[0]["lr"]
    figures |= {key: round(number, 4) for key, number in meter.lap().items()}
    log.write(figures | looked)
    shown = (
        figures if "loss" in figures else figures | {"loss": next(v for k, v in figures.items() if k.endswith("loss"))}
    )
    display.update(run.step, shown, watch.verdict)


def write_survey(run: Run, log: Log, watch: verdict.Watch, meter: Meter, epoch: int) -> None:
    """What is looked at after an epoch; its time is not counted among that of training."""
    began = time.monotonic()
    figures = watch.survey(run) | health.neighbours(run)
    if figures:
        log.write({"step": run.step, "epoch": epoch, "health": health.rounded(figures)})
    meter.since += time.monotonic() - began


def write_told(run: Run, log: Log) -> None:
    """What happened between two lines: steps that were passed over."""
    for line in run.told:
        log.write(line)
    run.told.clear()


def write_notes(run: Run, log: Log, watch: verdict.Watch, epoch: int) -> None:
    """What the method tells of its new epoch. As of the epoch's first step: a run that goes on writes it once."""
    notes = run.objective.notes()
    watch.clusters |= {key: notes[key] for key in ("clusters", "nmi") if key in notes}
    if notes:
        log.write({"step": run.step + 1, "epoch": epoch, **notes})


@contextlib.contextmanager
def metrics_from(path: Path, step: int) -> Iterator[Log]:
    """`metrics.jsonl`, cut back to what the checkpoint of `step` had seen, open for appending by the first process."""
    if not distributed.first():
        path = Path(os.devnull)
    else:
        cut_back(path, step)
    log = Log(path)
    with log.file:
        yield log


def step_of(line: str) -> float:
    """The step of a line, beyond all steps where it is none of ours or cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def cut_back(path: Path, step: int) -> None:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    kept = itertools.takewhile(lambda line: step_of(line) <= step, lines)
    write_text(path, "".join(f"{line}\n" for line in kept))
