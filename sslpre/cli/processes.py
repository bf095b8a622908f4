"""What one of several processes says when it fails: the one at fault speaks, once, and the others keep quiet."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from sslpre.errors import SslpreError

FAILED = 15
GRACE = 3.0  # seconds in which a process that failed like the first, or because of another, is ended by torchrun


def number() -> int:
    """This process's number among those that torchrun started, from 0."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def met() -> bool:
    """Has this process joined others, and not left them yet?"""
    there = sys.modules.get("torch.distributed")
    return there is not None and there.is_available() and there.is_initialized()


def in_turn(told: SslpreError, print_it: Callable[[SslpreError], None]) -> int:
    """Print an error if this process is the one to do it, and give back its exit code; alone, that is always so.

    What every process raises is told by the first one. What only one raises is told by that one, and is exit code 15;
    the others learn of it when they miss it, and wait for the end that torchrun gives them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        print_it(told)
        return told.code
    own, together = number(), met()
    if told.everywhere or (own == 0 and not together):
        if own == 0:
            print_it(told)
            for_torchrun(told)
        else:
            time.sleep(GRACE)
        return told.code
    if (own != 0 and not together) or told.code == FAILED:
        time.sleep(GRACE)
    own_error = SslpreError(f"process {own}: {told.message}", told.hint, FAILED)
    print_it(own_error)
    for_torchrun(own_error)
    return FAILED


def for_torchrun(told: SslpreError) -> None:
    """Leave the message where torchrun looks for the reason of a failure, which it prints last."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        import json

        text = f"error: {told.message}; hint: {told.hint}"
        more = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": text, "extraInfo": more}}, file)


def end(code: int) -> None:
    """Leave at once where other processes are joined: their library's threads may wait for them for ever."""
    if met() and code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
