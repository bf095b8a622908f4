"""One piece of memory for all processes of a run on one machine: made by one of them, joined by the others.

It has no name in any folder, so nothing is left behind, however the processes end: the system takes it back with the
last one that has it. The others reach it through the first one's open files.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref

NAME = "sslpre-rows"
POSSIBLE = hasattr(os, "memfd_create")  # Linux
PAGE = 4096  # of what it is, before the memory itself


class Shared:
    """`memory`: `size` bytes that can be written, zero at first. `path`: where others of this machine find it."""

    def __init__(self, fd: int, size: int, path: str):
        """`fd` is this object's from now on."""
        self.path = path
        weakref.finalize(self, os.close, fd)
        self.memory = memoryview(mmap.mmap(fd, PAGE + size))[PAGE:]


def made(size: int, what: str) -> Shared:
    """New memory that holds `what`, at most a page of text. Raises OSError where the system does not give it."""
    assert len(what.encode()) <= PAGE
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, PAGE + size)
        os.pwrite(fd, what.encode(), 0)
    except OSError:
        os.close(fd)
        raise
    return Shared(fd, size, f"/proc/{os.getpid()}/fd/{fd}")


def joined(path: str, size: int, what: str) -> Shared:
    """The memory that another process of this machine made. Raises OSError where it is not there, or another.

    Containers may number their processes each from one, and then the path leads anywhere.
    """
    if not os.readlink(path).startswith(f"/memfd:{NAME}"):  # before it is opened: a pipe would wait
        raise OSError(f"`{path}` is not memory of this run")
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    if os.fstat(fd).st_size != PAGE + size or os.pread(fd, PAGE, 0).rstrip(b"\0") != what.encode():
        os.close(fd)
        raise OSError(f"`{path}` is memory of another run")
    return Shared(fd, size, path)


_FENCE = threading.Lock()


def fence() -> None:
    """What this thread wrote or read before is done before what it writes or reads next, for other processes too.

    A processor may reorder both. To take and give back a lock orders one side of it, to do so twice both.
    """
    for _ in range(2):
        with _FENCE:
            pass
