"""Signals that ask the program to end: outside of training at once and tidily, in training at the end of a step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

# what schedulers, shells and closed terminals send, where the system has them; Ctrl-C has its own rules
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """One of `ENDING` came: whatever puts away what is half made after Ctrl-C does so after this."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def code(number: int) -> int:
    """The exit code after a signal, as shells have it: 130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1."""
    return 128 + number


def number_of(error: KeyboardInterrupt) -> int:
    return error.number if isinstance(error, Stopped) else signal.SIGINT


def words(number: int) -> str:
    """How an error begins: `interrupted` after Ctrl-C, `stopped by SIGTERM` after another."""
    return "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"


@contextlib.contextmanager
def handled(handle: Callable[[int, Any], None], numbers: list[int]) -> Iterator[bool]:
    """Inside, `handle` meets these signals, but for those that the user has switched off (nohup). False, and nothing
    changed, where this is not the main thread, which alone may say so."""
    before: dict[int, Any] = {}
    try:
        for number in numbers:
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handle)
    except ValueError:
        yield False
        return
    try:
        yield True
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


@contextlib.contextmanager
def tidy() -> Iterator[list[int]]:
    """Inside, the first signal of `ENDING` raises Stopped, and the list holds its number; the others change nothing."""
    met: list[int] = []

    def stop(number: int, frame: Any) -> None:
        met.append(number)
        if len(met) == 1:
            raise Stopped(number)

    with handled(stop, ENDING):
        yield met
