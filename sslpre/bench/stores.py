"""Which store the run would have, and a small one of the same kind to measure with, that leaves nothing behind."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sslpre.data import Source, cache, room
from sslpre.data.packed import Form, NotPossible, Packed, amount, file_of, form_of
from sslpre.data.rows import Size, Store
from sslpre.data.store import open_store
from sslpre.errors import SslpreError


@dataclass(frozen=True)
class Chosen:
    """The store that the run would have.

    kind: "device", "ram", "disk" or "off"; line: about it, for people; held: images that need no decoding already;
    file: the packed file on the disk, there or not, of a run that reads one.
    """

    kind: str
    line: str
    held: int
    file: Path | None = None


def choose(store: str, source: Source, side: int, where: torch.device, again: bool, spare: int | None) -> Chosen:
    """What a run would have with `--store STORE`. Nothing is made on disk: a file that is not there is reckoned with.

    again: are images read more than once? spare: as of `open_store`. Raises SslpreError as that.
    """
    place, lacking = cached(source, side)
    there = place is not None and place.exists()
    if store == "disk" and not there:
        if lacking:
            raise SslpreError(f"`--store disk` is not possible: {lacking}", "--store auto, or --store off", 3)
        return on_disk(place, form_of(source, side).total)
    kept, line = open_store(store, source, side, where, reuse=again, write=False, spare=spare)
    if kept is None and store == "auto" and again and not there:
        if not lacking:
            return on_disk(place, form_of(source, side).total)
        line = f"{line.partition('; not on disk')[0]}; not on disk: {lacking}"
    if kept is None:
        return Chosen("off", line, 0)
    with contextlib.closing(kept):
        return Chosen(kept.kind, line, kept.near, kept.path if isinstance(kept, Packed) else None)


def cached(source: Source, side: int) -> tuple[Path | None, str]:
    """The cache's file for these images, and why it would not be made; "" where it would."""
    try:
        place = file_of(source, side)
    except NotPossible as error:
        return None, str(error)
    needed, free, folder = form_of(source, side).total, room.disk(place), existing(place.parent)
    others = cache.beside(place)
    if needed + others > (free + others) / 2:
        return place, f"{amount(needed)} is more than half of the free disk ({amount(free)} at {place.parent})"
    return place, "" if os.access(folder, os.W_OK) else f"`{folder}` cannot be written"


def on_disk(place: Path | None, needed: int) -> Chosen:
    return Chosen("disk", f"on disk, {amount(needed)}, `{place}`", 0, place)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


class Mapped(Store):
    """Rows of a packed file as later epochs read them: nothing is checked any more, and nothing written.

    rows: int64 [N], which rows of the file stand for the images. For those that the file has not yet, others do, which
    for speed is all the same. Raises OSError where the file cannot be read, ValueError where no row is in it.
    """

    kind, writes = "disk", False

    def __init__(self, packed: Packed, rows: np.ndarray):
        super().__init__(len(rows), packed.side)
        there = np.flatnonzero(packed.rows())
        if not len(there):
            raise ValueError(f"no image is in `{packed.path}`")
        self._rows = np.where(np.isin(rows, there), rows, there[np.arange(len(rows)) % len(there)])
        self.where, form = str(packed.path), packed.form
        self._fd = os.open(packed.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(self._fd, form.total, prot=mmap.PROT_READ)
        except (OSError, ValueError):  # the system gives no map, or the file is shorter than its first page says
            os.close(self._fd)
            raise
        pixels = np.frombuffer(self._map, np.uint8, form.images * form.row, form.rows_at)
        self._pixels = pixels.reshape(form.images, form.side, form.side, 3)
        self._there[:], self._size[:] = True, form.side

    def take(self, i: int, out: np.ndarray) -> Size | None:
        out[...] = self._pixels[self._rows[i]]
        return self.side, self.side

    def put(self, i: int, canvas: np.ndarray, size: Size) -> None:
        """Every row is there."""

    def gather(self, index: np.ndarray, out: np.ndarray) -> np.ndarray:
        np.take(self._pixels, self._rows[index], axis=0, out=out, mode="clip")
        return self.sizes(index)

    def forget(self) -> None:
        """Let the system drop what it keeps of the file in memory: the next reading is one of the disk."""
        self._map.madvise(mmap.MADV_DONTNEED)  # pages that a process has mapped are not dropped
        os.fsync(self._fd)  # nor those that are not written yet
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        super().close()
        self._pixels = self._pixels[:0].copy()  # the map goes with its last view
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


@dataclass
class Measured:
    """What is measured in the place of the run's store. `store` is filled by the first epoch; None: nothing is."""

    store: Store | None
    note: str = ""  # what differs from the run's
    file: Packed | None = None  # that later epochs read, by these
    rows: np.ndarray | None = None  # of its rows
    cold: bool = False  # is it so large that the run reads it from the disk, not from memory?

    @contextlib.contextmanager
    def later(self) -> Iterator[Store | None]:
        """The store that later epochs read, full; None where there is none."""
        if self.store is not None and not filled(self.store):
            self.note = f"later epochs were not measured: the store could not be filled ({self.store.where})"
            yield None
        elif self.file is None or self.rows is None:
            yield self.store
        else:
            with contextlib.closing(Mapped(self.file, self.rows)) as mapped:
                yield mapped


@contextlib.contextmanager
def opened(
    chosen: Chosen, source: Source, whole: Source, rows: np.ndarray, side: int, where: torch.device
) -> Iterator[Measured]:
    """What to measure with: an empty store of the chosen kind for `source`, the images `rows` of the `whole`.

    A file that the run would read, and that has rows, is read itself; an empty one is made beside where the run's would
    be. Where there is no room for so much, RAM takes its place, or nothing does, and `note` says so.
    """
    if chosen.kind == "off":
        yield Measured(None)
        return
    with contextlib.ExitStack() as after:
        form = form_of(whole, side)
        if chosen.kind != "disk":
            yield small(chosen.kind, source, side, where, after)
        elif chosen.held and chosen.file is not None:
            yield cold(Measured(None, "", named(chosen.file, whole, side, where, after), rows), form)
        else:
            folder = after.enter_context(beside(chosen.file))
            found = small("disk", source, side, where, after, folder)
            if isinstance(found.store, Packed):
                found.file, found.rows = found.store, np.arange(len(source))
                if folder is None:
                    found.note = "the cache's disk was not measured, for nothing can be written there: another was"
                found = cold(found, form)
            yield found


def small(
    kind: str,
    source: Source,
    side: int,
    where: torch.device,
    after: contextlib.ExitStack,
    folder: Path | None = None,
) -> Measured:
    """An empty store of this kind, with its file in `folder`; else one in RAM, else none."""
    if kind == "disk" and folder is None:
        folder = Path(after.enter_context(tempfile.TemporaryDirectory(prefix="sslpre-bench-")))
    note = ""
    for one in dict.fromkeys((kind, "ram")):
        try:
            with cache_in(folder):
                store, _ = open_store(one, source, side, where, reuse=True)
        except SslpreError as error:  # no room, which the run has or does not need
            note = note or f"the store was not measured as the run has it: {error.message.partition(': ')[2]}"
            continue
        assert store is not None
        after.callback(store.close)
        return Measured(store, note)
    return Measured(None, note)


def named(file: Path, source: Source, side: int, where: torch.device, after: contextlib.ExitStack) -> Packed:
    """The packed file of the run, for reading."""
    store, _ = open_store(str(file), source, side, where, reuse=True, write=False)
    assert isinstance(store, Packed)
    after.callback(store.close)
    return store


def cold(found: Measured, form: Form) -> Measured:
    """Say of a store on disk whether the run's file can stay in memory."""
    free = room.memory()
    if free is not None and form.total > free:
        size = f"the store's file ({amount(form.total)}) is larger than the free memory ({amount(free)})"
        found.cold = hasattr(os, "posix_fadvise")
        told = "it was read from the disk itself" if found.cold else "the disk was not measured"
        found.note = found.note or f"{size}: {told}"
    return found


@contextlib.contextmanager
def beside(file: Path | None) -> Iterator[Path | None]:
    """A folder for a while on the disk where `file` would be; None where nothing can be written there."""
    folder = None if file is None else existing(file.parent)
    with contextlib.ExitStack() as after:
        made = None
        if folder is not None and os.access(folder, os.W_OK):
            with contextlib.suppress(OSError):  # a disk that has not even room for a folder
                made = Path(after.enter_context(tempfile.TemporaryDirectory(prefix=".sslpre-bench-", dir=folder)))
        yield made


@contextlib.contextmanager
def cache_in(folder: Path | None) -> Iterator[None]:
    """Stores made meanwhile have their files in `folder`, and find none of the user's."""
    before = os.environ.get("SSLPRE_CACHE")
    os.environ["SSLPRE_CACHE"] = str(folder or Path(tempfile.gettempdir(), "sslpre-none"))
    try:
        yield
    finally:
        if before is None:
            del os.environ["SSLPRE_CACHE"]
        else:
            os.environ["SSLPRE_CACHE"] = before


def filled(kept: Store) -> bool:
    """Make every row ready: those not decoded yet get the pixels of one that is. For speed that is all the same.

    False where the store takes no more.
    """
    there = kept.rows()
    canvas = np.zeros((1, kept.side, kept.side, 3), np.uint8)
    height = width = kept.side
    for i in np.flatnonzero(there)[:1].tolist():
        height, width = kept.take(i, canvas[0]) or (height, width)
    for i in np.flatnonzero(~there).tolist():
        kept.put(i, canvas[0], (height, width))
    return kept.ready(np.arange(len(kept)))
