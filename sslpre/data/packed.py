"""Decoded images in a file that is mapped into memory, filled by one process at a time and kept for the next run.

The file: one page that says what it holds (JSON), a table of one entry an image (height, width, CRC-32 of the row,
whether it is there), the rows. All of it is reserved on the disk before the first row. A row is written first and its
entry after it, and a row that was there when the file was opened is checked before it is used: so a process may be
killed at any time, and a power cut costs rows, never right pixels.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import sys
import threading
import time
import uuid
import weakref
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sslpre.data import Source, decode, room
from sslpre.data.rows import Size, Store

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows: nothing keeps a second writer out, so there is none at all
    flock = None  # type: ignore[assignment]

PAGE = 4096
MAGIC, FORMAT = "sslpre packed images", 1
ENTRY = np.dtype([("height", "<u4"), ("width", "<u4"), ("crc", "<u4"), ("state", "<u4")])
STORED = 1  # a state; 0 is what a reserved file is full of

Write = bool | Literal["with"]  # "with": beside the process that has the lock, of the same run


class NotPossible(Exception):
    """There is no such store here; the text says why. `other`: the file holds something else."""

    def __init__(self, reason: str, other: bool = False):
        super().__init__(reason)
        self.other = other


@dataclass(frozen=True)
class Form:
    """What a packed file holds. written: of the source; decoder: all whose version can change a pixel."""

    images: int
    side: int
    written: str
    decoder: str
    shape: str = "squashed to a square"

    @property
    def key(self) -> str:
        text = json.dumps([self.written, self.shape, self.side, self.decoder])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def rows_at(self) -> int:
        """Where the rows begin, in bytes: at a page."""
        return PAGE + -(-self.images * ENTRY.itemsize // PAGE) * PAGE

    @property
    def row(self) -> int:
        return self.side * self.side * 3

    @property
    def total(self) -> int:
        return self.rows_at + self.images * self.row

    def page(self) -> bytes:
        text = json.dumps({"what": MAGIC, "format": FORMAT, **vars(self), "key": self.key})
        return text.encode().ljust(PAGE - 1) + b"\n"


def form_of(source: Source, side: int) -> Form:
    return Form(len(source), side, source.written, decode.decoder())


def form_in(page: bytes) -> Form | None:
    """What the first page of a file says, None where it is not that of a packed file."""
    try:
        told = json.loads(page)
        if told.pop("what") != MAGIC or told.pop("format") != FORMAT:
            return None
        key, form = told.pop("key"), Form(**told)
        return form if form.key == key else None
    except (ValueError, TypeError, KeyError, AttributeError):  # whatever else a file may begin with
        return None


def file_of(source: Source, side: int) -> Path:
    """Where images of this source in this form are kept: in the folder `SSLPRE_CACHE`, else the user's cache."""
    return cache() / f"{form_of(source, side).key}.packed"


def cache() -> Path:
    """SSLPRE_CACHE, else XDG_CACHE_HOME/sslpre, else ~/.cache/sslpre."""
    if own := os.environ.get("SSLPRE_CACHE"):
        return Path(os.path.abspath(own))
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "sslpre"  # a relative one counts as none


class Packed(Store):
    """A packed file. Rows that other processes write meanwhile are seen, and checked like those that were there."""

    kind = "disk"

    def __init__(self, path: Path, form: Form, fd: int, writes: bool, say: Callable[[str], None] | None = None):
        """`fd`, open and with the lock where it `writes`, is this object's from now on; the file is long enough."""
        super().__init__(form.images, form.side)
        self.path, self.where, self.form, self.writes = path, str(path), form, writes
        self.why_not = ""  # why nothing more is written
        self._shut = weakref.finalize(self, os.close, fd)  # and the lock is given back with it
        self._fd, self._lock, self._say = fd, threading.Lock(), say or _to_stderr
        view = mmap.mmap(fd, form.total, prot=mmap.PROT_READ)
        self._table = np.frombuffer(view, ENTRY, form.images, PAGE)
        pixels = np.frombuffer(view, np.uint8, form.images * form.row, form.rows_at)
        self._pixels = pixels.reshape(form.images, form.side, form.side, 3)

    @property
    def held(self) -> int:
        return int((self._table["state"] == STORED).sum())

    def take(self, i: int, out: np.ndarray) -> Size | None:
        if not self._there[i]:
            height, width, crc, state = self._table[i].item()
            if state != STORED or _crc(self._pixels[i], (height, width)) != crc:
                return None
            self._enter(i, (height, width))
        out[...] = self._pixels[i]
        return int(self._size[i, 0]), int(self._size[i, 1])

    def put(self, i: int, canvas: np.ndarray, size: Size) -> None:
        if not self.writes:
            return
        canvas = np.ascontiguousarray(canvas)
        entry = np.array([(*size, _crc(canvas, size), STORED)], ENTRY)
        try:
            _write(self._fd, canvas.data, self.form.rows_at + i * self.form.row)
            _write(self._fd, entry.tobytes(), PAGE + i * ENTRY.itemsize)
        except OSError as error:
            self._give_up(error)
        else:
            self._enter(i, size)

    def gather(self, index: np.ndarray, out: np.ndarray) -> np.ndarray:
        np.take(self._pixels, index, axis=0, out=out, mode="clip")  # the lock is released, also while the disk is read
        return self.sizes(index)

    def close(self) -> None:
        super().close()
        self.writes = False
        self._table, self._pixels = self._table[:0].copy(), self._pixels[:0].copy()  # the map goes with its last view
        self._shut()

    def _give_up(self, error: OSError) -> None:
        with self._lock:
            if self.writes:
                self.writes, self.why_not = False, _reason(error)
                self._say(f"nothing more is stored in `{self.path}`: {self.why_not}; the other images are decoded anew")


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
    writes without the lock. make: a missing file is made. replace: so is one that holds something else.
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
                _reserve(fd, path, form, made)
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


def _reserve(fd: int, path: Path, form: Form, made: bool) -> None:
    """Take the whole file's space on the disk; a file that was just `made` for nothing goes again."""
    try:
        lacking, free = form.total - os.fstat(fd).st_blocks * 512, room.disk(path)
        if lacking > free / 2:
            raise NotPossible(f"{amount(lacking)} is more than half of the free disk ({amount(free)} at {path.parent})")
        if not hasattr(os, "posix_fallocate"):
            raise NotPossible("this system cannot reserve space on a disk")
        os.posix_fallocate(fd, 0, form.total)
    except OSError as error:
        _forget(path, made)
        raise NotPossible(f"no space can be reserved for `{path}`: {_reason(error)}") from error
    except NotPossible:
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


def amount(count: float) -> str:
    """Bytes in words: 196 MB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:,.1f} {unit}" if count < 9.95 and unit != "bytes" else f"{count:,.0f} {unit}"


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


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
