"""Ctrl-C: a flag that is read between steps, so that a run stops where it can be gone on with."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from sslpre.ops import ranks


class Interrupted(Exception):
    """Ctrl-C, after the state was saved."""


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only sets a flag, read at the step's end; the second one stops at once.

    Of several processes none stops at once: torchrun hands on a Ctrl-C that the terminal has sent to each of them.
    """
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked and ranks.world() == 1:
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
