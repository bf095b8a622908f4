"""A disk that fails while a run trains: full, read-only or gone. Training goes on in memory, writing is tried again.

Nothing that was written is removed before what replaces it is complete, so the last checkpoint stays whatever happens.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sslpre.errors import SslpreError
from sslpre.train import distributed
from sslpre.train.progress import duration, say

T = TypeVar("T")
CODE = 13
PAUSES = (60.0, 180.0, 360.0)  # seconds before each new try: ten minutes in all


class Disk:
    """How writing to the run's directory goes. Every process of a run has one, and all know the same."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.failures, self.next = 0, 0.0

    def due(self) -> bool:
        """Is it time to try again what failed?"""
        return self.failures > 0 and time.monotonic() >= self.next

    def write(self, do: Callable[[], T], what: str, patient: bool) -> bool:
        """Let the first process do it; whether it could. Where not `patient`, or for the last time: SslpreError (13).

        what: names what is not on the disk now.
        """
        told = distributed.from_first(lambda: attempted(do))
        if told is None:
            if self.failures:
                say(f"disk       `{self.folder}` can be written to again")
            self.failures = 0
            return True
        if not patient or self.failures == len(PAUSES):
            hint = f"make room there, then: sslpre pretrain --resume {shlex.quote(str(self.folder))}"
            raise distributed.everywhere(SslpreError(f"{what} could not be saved: {told}", hint, CODE))
        pause = PAUSES[self.failures]
        self.failures, self.next = self.failures + 1, time.monotonic() + pause
        say(f"warning: {what} could not be saved: {told}; trying again in {duration(pause)}, training goes on")
        return False


def attempted(do: Callable[[], object]) -> str | None:
    """Why it could not be done, or None."""
    try:
        do()
    except OSError as error:
        return reason(error)
    return None


def reason(error: OSError) -> str:
    why = (error.strerror or str(error) or "unknown reason").lower()
    name = error.filename if isinstance(error.filename, str) else None
    return f"{why}: `{name}`" if name else why
