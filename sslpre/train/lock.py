"""One directory, one run: a file that says who has it, locked while its process lives, touched as a sign of life."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sslpre.errors import SslpreError
from sslpre.train.progress import duration, say
from sslpre.train.runs import LOCK as NAME

try:
    import fcntl
except ImportError:  # Windows: the sign of life alone has to do
    fcntl = None  # type: ignore[assignment]

BEAT = 10.0  # seconds between signs of life
SILENT = 600.0  # seconds without one, after which a process on another machine counts as gone


class Lock:
    """A held lock. `check` raises SslpreError (exit 6) where another process has taken the directory over."""

    def __init__(self, path: Path, fd: int):
        self.path, self.fd = path, fd
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="sslpre-lock", daemon=True)
        self._beats.start()

    def check(self) -> None:
        if not same(self.fd, self.path):
            message = f"another run has taken over `{self.path.parent}`, for this one gave no sign of life"
            raise SslpreError(message, "two runs cannot share a directory; look which of them is to stay", 6)

    def release(self) -> None:
        self._over.set()
        self._beats.join()
        if same(self.fd, self.path):
            self.path.unlink(missing_ok=True)
        os.close(self.fd)

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(OSError):  # a disk that fails is told of where something is to be written
                os.utime(self.fd if os.utime in os.supports_fd else self.path)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Lock]:
    """The directory for this process alone. Raises SslpreError: exit 6 where another run has it."""
    lock = take(folder)
    try:
        yield lock
    finally:
        lock.release()


def take(folder: Path) -> Lock:
    path = folder / NAME
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            locks = locked(fd)
            if not same(fd, path):  # the one that had it has just removed it
                os.close(fd)
                continue
            owner = told(fd)
            if owner is not None:
                refuse(folder, owner, silence(fd, folder), locks)
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(me()).encode(), 0)
            return Lock(path, fd)
        except BlockingIOError:
            owner, quiet = told(fd) or {}, silence(fd, folder)
            os.close(fd)
            raise in_use(folder, owner, quiet) from None
        except BaseException:
            os.close(fd)
            raise


def locked(fd: int) -> bool:
    """Take the system's lock, which goes with its process. False where the file system has none.

    Raises BlockingIOError where another process has it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # some network file systems have no locks
        return False
    return True


def same(fd: int, path: Path) -> bool:
    """Is the open file the one that has this name now?"""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def me() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": boot()}


def boot() -> str:
    """The kernel that runs: process numbers mean something only to the same one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def told(fd: int) -> dict[str, Any] | None:
    """Who wrote the file; None where nobody did, or it cannot be read."""
    try:
        owner = json.loads(os.pread(fd, 4096, 0))
        return owner if isinstance(owner, dict) and isinstance(owner.get("pid"), int) else None
    except (ValueError, RecursionError):
        return None


def silence(fd: int, folder: Path) -> float:
    """Seconds since the last sign of life, both by the clock of the disk: machines need not agree on the time."""
    probe = folder / f"{NAME}-{uuid.uuid4().hex[:8]}"
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        return max(0.0, probe.stat().st_mtime - os.fstat(fd).st_mtime)
    finally:
        probe.unlink()


def refuse(folder: Path, owner: dict[str, Any], quiet: float, locks: bool) -> None:
    """Raises SslpreError where the owner of a lock that could be taken lives all the same, else says it has gone."""
    here = owner.get("boot") == boot()
    gone = here and (locks or not alive(owner["pid"]))  # the system's lock goes with its process
    if not gone and quiet <= SILENT:
        raise in_use(folder, owner, quiet)
    say(f"resume     `{folder}` was left by process {owner['pid']} on {owner.get('host', '?')}, which has gone")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def in_use(folder: Path, owner: dict[str, Any], quiet: float) -> SslpreError:
    who = f"process {owner['pid']} on {owner.get('host', '?')}" if "pid" in owner else "another process"
    message = f"`{folder}` is in use by {who} (last sign of life {duration(quiet)} ago)"
    return SslpreError(message, "wait for it, or stop it; a run of its own needs another --out", 6)
