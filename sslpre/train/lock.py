"""One directory, one run: a file that says who has it, locked while its process lives, touched as a sign of life."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
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


class InUse(SslpreError):
    """sure: the system says that its process lives; else it may have gone without a sign."""

    def __init__(self, folder: Path, owner: dict[str, Any], quiet: float, sure: bool):
        who = f"process {owner['pid']} on {owner.get('host', '?')}" if "pid" in owner else "another process"
        message = f"`{folder}` is in use by {who} (last sign of life {duration(quiet)} ago)"
        super().__init__(message, "wait for it, or stop it; a run of its own needs another --out", 6)
        self.sure = sure


class Lock:
    """A held lock. What it wrote into the file tells it from any other that takes the directory over."""

    def __init__(self, path: Path, fd: int):
        self.path, self.fd, self.token = path, fd, uuid.uuid4().hex
        self.write()
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="sslpre-lock", daemon=True)
        self._beats.start()

    def write(self) -> None:
        os.ftruncate(self.fd, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)
        os.write(self.fd, json.dumps(me() | {"token": self.token}).encode())

    def check(self) -> None:
        """Raises SslpreError (exit 6) where another run has taken the directory over, OSError where it is not there.

        A file that somebody has deleted is made again.
        """
        if not self.path.exists() and self.path.parent.is_dir():
            fd = opened(self.path)
            try:
                locked(fd)
            except BlockingIOError:  # another one was faster
                os.close(fd)
            else:
                os.close(self.fd)
                self.fd = fd
                self.write()
        if not self.mine():
            message = f"another run has taken over `{self.path.parent}`, for this one gave no sign of life"
            raise SslpreError(message, "two runs cannot share a directory; look which of them is to stay", 6)

    def mine(self) -> bool:
        """Is it this one's name that stands in the file? Raises OSError where it cannot be read."""
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return False
        return isinstance(owner, dict) and owner.get("token") == self.token

    def release(self) -> None:
        self._over.set()
        self._beats.join()
        with contextlib.suppress(OSError):  # the directory is gone, or its disk fails
            if self.mine():
                self.path.unlink()
        os.close(self.fd)

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(OSError):  # a disk that fails is told of where something is to be written
                if self.mine():
                    os.utime(self.path)


@contextlib.contextmanager
def held(folder: Path, patient: bool = False) -> Iterator[Lock | None]:
    """The directory for this process alone; None where nothing can be written to it anyway.

    patient: where a process on another machine has it that may have gone, wait until that is sure. Raises SslpreError:
    exit 6 where another run has it.
    """
    begun = time.monotonic()
    while True:
        try:
            lock = take(folder)
            break
        except InUse as error:
            late = time.monotonic() - begun > SILENT + BEAT
            if error.sure or not patient or late or not may_have_gone(folder / NAME):
                raise
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            yield None
            return
    try:
        yield lock
    finally:
        lock.release()


def may_have_gone(path: Path) -> bool:
    """Does the file give no sign of life for three beats?"""
    try:
        before = path.stat().st_mtime_ns
        for _ in range(3):
            time.sleep(BEAT)
            if path.stat().st_mtime_ns != before:
                return False
    except OSError:
        return True
    return True


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)


def take(folder: Path) -> Lock:
    path = folder / NAME
    while True:
        fd = opened(path)
        try:
            locks = locked(fd)
            if not same(fd, path):  # the one that had it has just removed it
                os.close(fd)
                continue
            owner = told(fd)
            if owner is not None:
                refuse(folder, owner, silence(fd, folder), locks)
            return Lock(path, fd)
        except BlockingIOError:
            owner, quiet = told(fd) or {}, silence(fd, folder)
            os.close(fd)
            raise InUse(folder, owner, quiet, True) from None
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
        os.lseek(fd, 0, os.SEEK_SET)
        owner = json.loads(os.read(fd, 4096))
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
    # the system's lock goes with its process, and a machine's processes with the machine
    gone = locks and owner.get("host") == socket.gethostname()
    gone = gone or (owner.get("boot") == boot() and (locks or not alive(owner["pid"])))
    if not gone and quiet <= SILENT:
        raise InUse(folder, owner, quiet, False)
    say(f"resume     `{folder}` was left by process {owner['pid']} on {owner.get('host', '?')}, which has gone")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
