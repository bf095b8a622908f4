"""Decoded images in a file that is mapped into memory, filled by one process at a time and kept for the next run.

The file: one page that says what it holds (JSON), a table of one entry an image (height, width, CRC-32 of the row,
whether it is there), the rows. All of it is reserved on the disk before the first row. A row is written first and its
entry after it, and a row that was there when the file was opened is checked before it is used: so a process may be
killed at any time, and a power cut costs rows, never right pixels. But a disk that fails under the map, or a file that
somebody makes shorter, ends the processes that read it (SIGBUS): a run goes on from its last checkpoint, `--store off`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
import time
import uuid
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from sslpre.data import room
from sslpre.data.cache import ENTRY, PAGE, Form, NotPossible, beside, file_of, form_in, form_of
from sslpre.data.room import amount
from sslpre.data.rows import Size, Store, to_stderr

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows: nothing keeps a second writer out, so there is none at all
    flock = None  # type: ignore[assignment]

__all__ = ["PAGE", "Form", "NotPossible", "Packed", "Write", "amount", "file_of", "form_in", "form_of", "opened"]

LONG = 4 << 30  # bytes that some disks take a while to reserve
STORED = 1  # a state; 0 is what a reserved file is full of

Write = bool | Literal["with"]  # "with": beside the process that has the lock, of the same run


class Packed(Store):
    """A packed file. Rows that other processes write meanwhile are seen, and checked like those that were there."""

    kind = "disk"

    def __init__(self, path: Path, form: Form, fd: int, writes: bool, say: Callable[[str], None] | None = None):
        """`fd`, open and with the lock where it `writes`, is this object's from now on; the file is long enough."""
        super().__init__(form.images, form.side)
        self.path, self.where, self.form, self.writes = path, str(path), form, writes
        self.why_not = ""  # why nothing more is written
        self.say = say or to_stderr
        self._shut = weakref.finalize(self, os.close, fd)  # and the lock is given back with it
        self._fd, self._lock, self._users, self._closed = fd, threading.Lock(), 0, False
        view = mmap.mmap(fd, form.total, prot=mmap.PROT_READ)
        self._table = np.frombuffer(view, ENTRY, form.images, PAGE)
        pixels = np.frombuffer(view, np.uint8, form.images * form.row, form.rows_at)
        self._pixels = pixels.reshape(form.images, form.side, form.side, 3)

    def rows(self) -> np.ndarray:
        return self._table["state"] == STORED

    def take(self, i: int, out: np.ndarray) -> Size | None:
        if not self._there[i]:
            height, width, crc, state = self._table[i].item()
            if state != STORED or _crc(self._pixels[i], (height, width)) != crc:
                return None if self.writes else self._read(i, out)
            self._enter(i, (height, width))
        out[...] = self._pixels[i]
        return int(self._size[i, 0]), int(self._size[i, 1])

    def _read(self, i: int, out: np.ndarray) -> Size | None:
        """Row `i` past the map, which on a network disk lags behind writers elsewhere; None where it is not there."""
        with self._open() as fd:
            if fd is None:
                return None
            try:
                entry = os.pread(fd, ENTRY.itemsize, PAGE + i * ENTRY.itemsize)
                if len(entry) < ENTRY.itemsize or np.frombuffer(entry, ENTRY)["state"][0] != STORED:
                    return None
                row = os.pread(fd, self.form.row, self.form.rows_at + i * self.form.row)
            except OSError:  # the disk fails: the image itself may still be read
                return None
        height, width, crc, _ = np.frombuffer(entry, ENTRY)[0].item()
        pixels = np.frombuffer(row, np.uint8)
        if len(row) < self.form.row or _crc(pixels, (height, width)) != crc:
            return None
        out[...] = pixels.reshape(out.shape)  # not entered: `gather` reads the map
        return height, width

    def put(self, i: int, canvas: np.ndarray, size: Size) -> None:
        canvas = np.ascontiguousarray(canvas)
        with self._open() as fd:
            if fd is None or not self.writes:
                return
            entry = np.array([(*size, _crc(canvas, size), STORED)], ENTRY)
            try:
                _write(fd, canvas.data, self.form.rows_at + i * self.form.row)
                _write(fd, entry.tobytes(), PAGE + i * ENTRY.itemsize)
            except OSError as error:
                self._give_up(error)
                return
        with self._lock:
            if not self._closed:
                self._enter(i, size)

    @contextlib.contextmanager
    def _open(self) -> Iterator[int | None]:
        """The file's descriptor, which stays open meanwhile; None once the store is closed."""
        with self._lock:
            open_ = not self._closed
            self._users += open_
        try:
            yield self._fd if open_ else None
        finally:
            with self._lock:
                self._users -= open_
                last = self._closed and not self._users
            if last:
                self._shut()

    def gather(self, index: np.ndarray, out: np.ndarray) -> np.ndarray:
        np.take(self._pixels, index, axis=0, out=out, mode="clip")  # the lock is released, also while the disk is read
        return self.sizes(index)

    def close(self) -> None:
        """As of every store; threads that are in `put` meanwhile end well, the last one closes the file."""
        with self._lock:
            super().close()
            self.writes, self._closed, users = False, True, self._users
            self._table, self._pixels = (
                self._table[:0].copy(),
                self._pixels[:0].copy(),
            )  # the map goes with the last view
        if not users:
            self._shut()

    def _give_up(self, error: OSError) -> None:
        with self._lock:
            if self.writes:
                self.writes, self.why_not = False, _reason(error)
                self.say(f"nothing more is stored in `{self.path}`: {self.why_not}; the other images are decoded anew")


def opened(
    path: Path,
    form: Form,
    *,
    write: Write,
    make: bool = False,
    replace: bool = False,
    say: Callable[[str], None] | None = None,
) -> Packed:
    """The packed file `path`. Raises NotPossible, where something else is there or the disk has no room for it.

    write: True takes the lock, or only reads where another process has it or the file may not be written; "with"
    writes without the lock. make: a missing file is made. replace: so is one that holds something else. say: prints a
    line where it takes long to reserve the space, or when writing ends early; by default on stderr.
    """
    if flock is None:
        raise NotPossible("this system has no file locks")
    made, patience = False, 50
    for _ in range(100):  # until nobody changes the file under the name between two looks at it
        try:
            fd, writable = _descriptor(path, bool(write))
        except FileNotFoundError:
            if not make or write is not True:
                raise NotPossible(f"there is no file `{path}`") from None
            _create(path, form, over=False)
            made = True
            continue
        except OSError as error:
            raise NotPossible(f"`{path}` cannot be opened: {_reason(error)}") from error
        keep = False
        try:
            locked = write is True and writable and _locked(fd, path)
            if locked and not _still(fd, path):
                continue
            found = form_in(os.pread(fd, PAGE, 0))
            if found != form:
                if not (replace and locked):
                    raise NotPossible(_difference(path, found, form), other=found is not None)
                _create(path, form, over=True)
                made = True
                continue
            if os.fstat(fd).st_size < form.total:
                if write is True and writable and not locked and patience:
                    patience -= 1
                    time.sleep(0.02)  # another process has just made it
                    continue
                if not locked:
                    raise NotPossible(f"`{path}` is shorter than it should be")
                _reserve(fd, path, form, made, say or to_stderr)
            keep = True
            return Packed(path, form, fd, locked or (write == "with" and writable), say)
        except OSError as error:
            raise NotPossible(f"`{path}` cannot be used: {_reason(error)}") from error
        finally:
            if not keep:
                os.close(fd)
    raise NotPossible(f"`{path}` is replaced all the time by another process")


def _descriptor(path: Path, write: bool) -> tuple[int, bool]:
    """An open file and whether it can be written. A pipe or a device is not opened for longer than to see that."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    if write:
        try:
            return os.open(path, os.O_RDWR | flags), True
        except OSError as error:
            if isinstance(error, FileNotFoundError | IsADirectoryError):
                raise
    return os.open(path, os.O_RDONLY | flags), False  # not ours, or on a disk that is read only


def _locked(fd: int, path: Path) -> bool:
    """Take the lock; False where another process has it."""
    try:
        flock(fd, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise NotPossible(f"`{path}` cannot be locked: {_reason(error)}") from error
    return True


def _still(fd: int, path: Path) -> bool:
    """Is the open file the one that has this name now?"""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _create(path: Path, form: Form, over: bool) -> None:
    """Give a file of the first page and an empty table its name, at once; `over` the one that is there, or not."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _write(fd, form.page(), 0)
            os.ftruncate(fd, form.rows_at)
            if over:
                os.replace(draft, path)
            else:
                os.link(draft, path)
        finally:
            os.close(fd)
    except FileExistsError:
        if not path.is_file():  # else another process was faster, and its file will do
            raise NotPossible(f"`{path.parent}` is not a folder") from None
    except OSError as error:
        raise NotPossible(f"`{path}` cannot be made: {_reason(error)}") from error
    finally:
        if draft.parent.is_dir():  # else it was not even made
            draft.unlink(missing_ok=True)


def _reserve(fd: int, path: Path, form: Form, made: bool, say: Callable[[str], None]) -> None:
    """Take the whole file's space on the disk; a file that was just `made` for nothing goes again."""
    try:
        lacking, free = form.total - os.fstat(fd).st_blocks * 512, room.disk(path)
        others = beside(path)
        if lacking + others > (free + others) / 2:
            more = f" and {amount(others)} of other packed files" if others else ""
            are = "are more than half of that and" if others else "is more than half of"
            raise NotPossible(f"{amount(lacking)}{more} {are} the free disk ({amount(free)} at {path.parent})")
        if lacking > LONG:
            say(f"reserving {amount(lacking)} for `{path}`")
        room.reserve(fd, form.total)
    except OSError as error:
        _forget(path, made)
        raise NotPossible(f"no space can be reserved for `{path}`: {_reason(error)}") from error
    except (NotPossible, KeyboardInterrupt):
        _forget(path, made)
        raise


def _forget(path: Path, made: bool) -> None:
    if made:
        path.unlink(missing_ok=True)


def _difference(path: Path, found: Form | None, form: Form) -> str:
    if found is None:
        return f"`{path}` is not a packed file of this version"
    if found.written != form.written:
        return f"`{path}` holds other images, or these as they were before a file was changed"
    if found.side != form.side:
        return f"`{path}` holds images of {found.side} px, not of {form.side}"
    return f"`{path}` was decoded by {found.decoder}, here it is {form.decoder}"


def _crc(row: np.ndarray, size: Size) -> int:
    return zlib.crc32(struct.pack("<2I", *size), zlib.crc32(row.data))


def _write(fd: int, data: bytes | memoryview, at: int) -> None:
    """All of `data`: a disk that is nearly full takes a part of it without an error."""
    rest = memoryview(data).cast("B")
    while len(rest):
        done = os.pwrite(fd, rest, at)
        rest, at = rest[done:], at + done


def _reason(error: OSError) -> str:
    return os.strerror(error.errno).lower() if error.errno else str(error)
