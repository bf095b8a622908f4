"""What is seen of a run while it trains: a bar on a terminal, one plain line an interval elsewhere; on stderr."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sslpre.ops import ranks


def say(line: str) -> None:
    """One line on stderr, as it is: no markup, no wrapping. Of several processes only the first one speaks."""
    if ranks.rank():
        return
    Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False)


def duration(seconds: float) -> str:
    """Seconds in words: `48 s`, `12 min`, `3.5 h`, `2.1 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


class Meter:
    """Images a second and the share of time spent waiting for data, over the run and over the last interval."""

    def __init__(self) -> None:
        self.begun = self.since = time.monotonic()
        self.images = self.new = 0
        self.waited = self.waited_before = 0.0

    def add(self, images: int, waited: float) -> None:
        """images: in this step; waited: seconds waited for data since the run began."""
        self.images += images
        self.new += images
        self.waited = waited

    def lap(self) -> dict[str, float]:
        now = time.monotonic()
        span = max(now - self.since, 1e-9)
        figures = {"images_per_s": self.new / span, "waiting": (self.waited - self.waited_before) / span}
        self.since, self.new, self.waited_before = now, 0, self.waited
        return figures

    def total(self) -> dict[str, float]:
        span = max(time.monotonic() - self.begun, 1e-9)
        return {"seconds": span, "images_per_s": self.images / span, "waiting": self.waited / span}


class Display:
    """`with Display(steps, start) as display: display.update(step, figures)`."""

    QUIET = 10.0  # seconds between plain lines

    def __init__(self, steps: int, start: int):
        self.console = Console(stderr=True)
        self.steps, self.start = steps, start
        self.begun = self.spoke = time.monotonic()
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> Display:
        if self.console.is_terminal and not ranks.rank():
            columns = (
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("", total=self.steps, completed=self.start, text="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, step: int) -> None:
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step)

    def update(self, step: int, figures: dict[str, float], verdict: str = "") -> None:
        """figures: loss, images_per_s, waiting, epoch. verdict: on the run's health, where there is one."""
        text = (
            f"loss {figures['loss']:.3f} · {figures['images_per_s']:,.0f} images/s · waiting {figures['waiting']:.0%}"
        )
        text += f" · {verdict}" if verdict else ""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, text=text)
            return
        now = time.monotonic()
        if now - self.spoke >= self.QUIET or step == self.steps:
            self.spoke = now
            left = (now - self.begun) / max(1, step - self.start) * (self.steps - step)
            say(f"step {step}/{self.steps} · epoch {figures['epoch'] + 1:.0f} · {text} · {duration(left)} left")
