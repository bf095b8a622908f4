"""Asked to stop: a flag that is read between steps, so that a run stops where it can be gone on with."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from sslpre import signals
from sslpre.ops import ranks

ECHO = 2.0  # seconds: torchrun hands on a Ctrl-C that the terminal has sent to each process already


class Interrupted(Exception):
    """A signal came, and the state was saved."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], int]]:
    """Inside, the first Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2 or SIGHUP only sets a flag, read at the step's end: its
    number, 0 before it comes. A second Ctrl-C stops at once, whatever came first."""
    asked: list[tuple[int, float]] = []

    def ask(number: int, frame: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and asked and (ranks.world() == 1 or now - asked[0][1] > ECHO):
            raise KeyboardInterrupt
        asked.append((number, now))

    with signals.handled(ask, [signal.SIGINT, *signals.ENDING]):
        yield lambda: asked[0][0] if asked else 0
