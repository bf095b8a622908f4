"""What a run has written about itself: its curves, its health, its time. Read as it stands, whatever is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sslpre.train.runs import LOCK

TOLD = {"step", "epoch", "chance", "health", "passed_over"}  # keys of a line that are no curves
LIVE = 60.0  # seconds since the last sign of life, after which a run counts as interrupted


@dataclass
class Curve:
    """Finite numbers and the steps they belong to."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)


@dataclass
class History:
    """curves: by the name in the log, those of `health` as `health.std`. chance: the loss that means nothing learned.

    verdict, advice: the last ones, "" where none was recorded; judged: their step. seconds: that lines account for, of
    which `waited` for data; images: that were trained on in them. passed_over: steps that were not finite.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    chance: Curve = field(default_factory=Curve)
    verdict: str = ""
    advice: str = ""
    judged: int = 0
    step: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    images: float = 0.0
    passed_over: int = 0

    def first(self, *names: str) -> str | None:
        """The first of these curves that is there."""
        return next((name for name in names if name in self.curves), None)


def read(path: Path, batch: int) -> History:
    """The history in a `metrics.jsonl`; an empty one where there is none. batch: images of a step.

    Lines that are not whole or not ours are passed over, so a file that is being written can be read. Raises OSError.
    """
    history = History()
    if not path.is_file():
        return history
    last = 0
    for line in lines(path):
        step = line["step"]
        history.step = max(history.step, step)
        history.passed_over += "passed_over" in line
        for name, value in line.items():
            if name not in TOLD and (figure := number(value)) is not None:
                history.curves.setdefault(name, Curve()).add(step, figure)
        if (figure := number(line.get("chance"))) is not None:
            history.chance.add(step, figure)
        if isinstance(line.get("health"), dict):
            take_health(history, step, line["health"])
        rate, waiting = number(line.get("images_per_s")), number(line.get("waiting"))
        if rate and rate > 0 and step > last:
            seconds = (step - last) * batch / rate
            history.images += (step - last) * batch
            history.seconds += seconds
            history.waited += seconds * min(max(waiting or 0.0, 0.0), 1.0)
            last = step
    return history


def take_health(history: History, step: int, health: dict[str, Any]) -> None:
    for name, value in health.items():
        if name != "dim" and (figure := number(value)) is not None:
            history.curves.setdefault(f"health.{name}", Curve()).add(step, figure)
    if isinstance(health.get("verdict"), str) and health["verdict"]:
        advice = health.get("advice")
        history.verdict, history.judged = health["verdict"], step
        history.advice = advice if isinstance(advice, str) else ""


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are objects with a step."""
    with open(path, encoding="utf-8", errors="replace") as stream:
        for text in stream:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < 2**63:
                yield line


def number(value: Any) -> float | None:
    """A finite number, below what can be drawn, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if abs(found) < 1e300 else None  # what is larger cannot be drawn; NaN is not less than anything


def facts(path: Path) -> dict[str, Any]:
    """A small JSON object that the run has written, or {} where it is not there or not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def alive(run: Path, now: float) -> bool:
    """Has a process that trains here given a sign of life in the last minute? now: seconds since 1970."""
    try:
        return now - (run / LOCK).stat().st_mtime < LIVE
    except OSError:
        return False
