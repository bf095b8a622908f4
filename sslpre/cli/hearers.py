"""Whoever reads stdout and stderr: a file name need not be text in their encoding, and they may go away at any time."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Unheard(io.TextIOWrapper):
    """stderr. Where its terminal or pipe is closed, what is said from then on goes nowhere: that must end no run."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            give_up(self)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            give_up(self)
            super().flush()  # what its buffer holds


@contextlib.contextmanager
def minded() -> Iterator[None]:
    """Inside, stdout and stderr take any text, and stderr outlives its readers."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    before: Any = sys.stderr
    try:
        file = io.BufferedWriter(io.FileIO(before.fileno(), "wb", closefd=False))
    except (OSError, ValueError, AttributeError):  # none at all, or a stand-in without a file of its own
        yield
        return
    encoding = getattr(before, "encoding", None) or "utf-8"
    with Unheard(file, encoding, "backslashreplace", line_buffering=True, write_through=True) as sys.stderr:
        try:
            yield
        finally:
            sys.stderr = before


def give_up(stream: TextIO) -> None:
    """Send what is left in a stream's buffer nowhere, so that the interpreter's last flush does not fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
