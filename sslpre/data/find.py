"""Find the images in a folder, once, into a packed index.

Names are bytes from end to end, so that non-UTF-8 names, newlines and emoji are names like any other; they become text
only to be printed. An index of a million files is two arrays and one bytes object, not a million Python strings.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import stat
import struct
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sslpre.data import Source
from sslpre.data.decode import MAX_PIXELS, decode, header_grey, header_size
from sslpre.errors import SslpreError

EXTENSIONS = frozenset(b".jpg .jpeg .png .webp .bmp .gif .tif .tiff".split())
READS = "sslpre reads " + ", ".join(sorted(extension.decode()[1:] for extension in EXTENSIONS))
TEST_NAMES = (b"test", b"val", b"valid", b"validation")  # in the order in which they are tried as the test split
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, and far from a pattern: 2⁶⁴ by the golden ratio
SIZE_TIME = struct.Struct("<QQ")
HIDDEN, RUN, UNREADABLE, BROKEN, SPECIAL = "hidden", "run folder", "unreadable folder", "broken link", "not a file"


@dataclass(frozen=True)
class Found:
    """What a folder holds; `skipped` counts all that is no image, by extension (`.txt`) or kind (`hidden`).

    note: how the folder was split, for people; passed_over: the end of it, which test splits were not taken and why.
    """

    train: Source
    test: Source | None
    skipped: dict[str, int]
    note: str
    passed_over: str = ""


@dataclass(frozen=True)
class Folder:
    """The images below one folder, sorted by the bytes of their relative names. A Source.

    written: changes also with `max_pixels`, which decides which images are bad.
    """

    root: bytes
    where: str
    names: bytes  # all relative names, end to end
    ends: np.ndarray  # int64 [N + 1]: name i is names[ends[i]:ends[i + 1]]
    sizes: np.ndarray  # int64 [N], bytes on disk
    labels: np.ndarray
    classes: list[str]
    max_pixels: int
    fingerprint: str
    written: str

    def __len__(self) -> int:
        return len(self.sizes)

    def digests(self) -> np.ndarray:
        """uint64 [N]: a number for each image that follows from its relative name and its size on disk."""
        starts, letters = self.ends[:-1], np.frombuffer(self.names, np.uint8).astype(np.uint64) + np.uint64(1)
        place = np.arange(len(letters)) - np.repeat(starts, np.diff(self.ends))
        powers = np.full(int(place.max(initial=0)) + 1, MIX)
        powers[0] = 1
        summed = np.add.reduceat(letters * np.cumprod(powers)[place], starts)
        mixed = (summed ^ (self.sizes.astype(np.uint64) * MIX)) * MIX
        return mixed ^ (mixed >> np.uint64(32))

    def relative(self, i: int) -> bytes:
        """The name below `root`, as the file system has it."""
        return self.names[self.ends[i] : self.ends[i + 1]]

    def name(self, i: int) -> str:
        return printable(self.relative(i))

    def path(self, i: int) -> bytes:
        return self.root + b"/" + self.relative(i)

    def read(self, i: int, side: int | None = None) -> np.ndarray:
        return decode(self.path(i), side, self.max_pixels)

    def size(self, i: int) -> tuple[int, int]:
        return header_size(self.path(i), self.max_pixels)

    def grey(self, i: int) -> bool:
        return header_grey(self.path(i), self.max_pixels)


@dataclass(frozen=True)
class Subset:
    """Some rows of another source, in the order given. A Source."""

    source: Source
    rows: np.ndarray  # int64 [N]
    where: str
    labels: np.ndarray
    classes: list[str]
    fingerprint: str

    @property
    def written(self) -> str:
        return _digest(self.source.written, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return self.source.name(int(self.rows[i]))

    def read(self, i: int, side: int | None = None) -> np.ndarray:
        return self.source.read(int(self.rows[i]), side)

    def size(self, i: int) -> tuple[int, int]:
        return self.source.size(int(self.rows[i]))

    def grey(self, i: int) -> bool:
        return self.source.grey(int(self.rows[i]))


def subset(source: Source, rows: np.ndarray) -> Source:
    """The images `rows` (int [M], 0..N-1) of `source`, with its classes: image i of the result is image `rows[i]`."""
    rows = np.asarray(rows, dtype=np.int64)
    if len(rows) and (rows.min() < 0 or rows.max() >= len(source)):
        raise IndexError(f"rows from {rows.min()} to {rows.max()} of a source of {len(source)} images")
    fingerprint = _digest(source.fingerprint, rows)
    return Subset(source, rows, source.where, source.labels[rows], source.classes, fingerprint)


def _digest(whole: str, rows: np.ndarray) -> str:
    return hashlib.blake2b(whole.encode() + rows.tobytes(), digest_size=16).hexdigest()


def find(root: Path, max_pixels: int = MAX_PIXELS) -> Found:
    """Find the images at and below `root`: for training, for testing if there is a split, and what was passed over.

    Skipped: hidden names, `__MACOSX`, run folders of sslpre, everything without an image's extension. Links are
    followed; every directory is entered once, so loops end. Every name of a file counts, hard and symbolic links too:
    labels come from names, and a copy of the folder that holds files in place of links is the same data set.

    With `train/` and `test|val|valid|validation/` at the top level, only these are read; `train/` alone is the root if
    no image lies beside it. The test split is the first of these names with an image of a class of `train/`, else the
    first with images. The label of an image is the first folder on its way down (below the split folder); fewer than
    two classes, or more than one per five images, count as none. Both sources number the classes of the training
    source, and images of other classes have the label -1.

    Raises SslpreError (exit 4): no such folder, not a folder, not readable, empty, or without images.
    """
    top = os.fsencode(root)
    where = printable(top)
    folders, has_images = _top_level(root, top, where)
    splits = {name.lower(): name for name in reversed(folders)}
    train = splits.get(b"train")
    tests = [splits[name] for name in TEST_NAMES if name in splits]
    skipped: Counter[str] = Counter()
    if train is None or (not tests and (has_images or _images_beside(top, train, folders))):
        index = _scan(top, {_identity(os.stat(top))}, skipped)
        _need_images(index, where, skipped)
        return Found(_folder(top, where, index, max_pixels), None, dict(skipped), "")

    # all are marked as entered beforehand: a link in train/ never leads into test/
    seen = {_identity(os.stat(path)) for path in (top, *(top + b"/" + name for name in (train, *tests)))}
    below = {name: (top + b"/" + name, f"{where.rstrip('/')}/{printable(name)}") for name in (train, *tests)}
    index = _scan(below[train][0], seen, skipped)
    _need_images(index, below[train][1], skipped)
    source = _folder(*below[train], index, max_pixels)
    candidates: list[Folder] = []
    for name in tests:
        candidates.append(_folder(*below[name], _scan(below[name][0], seen, skipped), max_pixels, source))
        if (candidates[-1].labels >= 0).any() or (len(candidates[-1]) and not source.classes):
            break
    chosen = _best_test(candidates)
    note = [f"using {printable(train)}/ only"] if tests else []
    if chosen is not None:
        note.append(f"{printable(tests[chosen])}/ is left for probe")
    passed_over = "; ".join(
        f"{printable(name)}/ holds no {'labels of ' + printable(train) + '/' if len(candidate) else 'images'}"
        for name, candidate in list(zip(tests, candidates, strict=False))[:chosen]
    )
    note += [passed_over] if passed_over else []
    test = None if chosen is None else candidates[chosen]
    return Found(source, test, dict(skipped), "; ".join(note), passed_over)


def every(root: Path, max_pixels: int = MAX_PIXELS) -> Folder:
    """All images at and below `root`, whatever its folders are called; the rest as `find`."""
    top, skipped = os.fsencode(root), Counter[str]()
    _top_level(root, top, printable(top))
    index = _scan(top, {_identity(os.stat(top))}, skipped)
    _need_images(index, printable(top), skipped)
    return _folder(top, printable(top), index, max_pixels)


def _best_test(candidates: list[Folder]) -> int | None:
    """The number of the first test split with labels, else of the first with images, else None."""
    labelled = (i for i, one in enumerate(candidates) if (one.labels >= 0).any())
    filled = (i for i, one in enumerate(candidates) if len(one))
    return next(labelled, next(filled, None))


def printable(name: bytes) -> str:
    """A file name as one line of text: bytes that are not UTF-8 and control characters as backslash escapes."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _top_level(root: Path, top: bytes, where: str) -> tuple[list[bytes], bool]:
    """Sorted names of the visible folders in `top`, and whether it holds visible image files."""
    try:
        if not stat.S_ISDIR(os.stat(top).st_mode):
            raise SslpreError(f"`{where}` is a file, not a folder", "name the folder that holds the images", 4)
        folders, has_images = [], False
        with os.scandir(top) as scan:
            for entry in scan:
                if not _hidden(entry.name):
                    folders += [entry.name] if entry.is_dir() else []
                    has_images = has_images or (_is_image(entry.name) and entry.is_file())
        return sorted(folders), has_images
    except FileNotFoundError as error:
        raise SslpreError(f"there is no folder `{where}`", _nearest(root), 4) from error
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        raise SslpreError(
            f"cannot read the folder `{where}`: {reason}", "check the path and its permissions", 4
        ) from error


def _images_beside(top: bytes, train: bytes, folders: list[bytes]) -> bool:
    """Whether a folder beside `train` holds an image. What a run or an export leaves there must not change the data."""
    seen = {_identity(os.stat(path)) for path in (top, top + b"/" + train)}
    others = iter([_Entry(name, 0, 0, _identity(os.stat(top + b"/" + name))) for name in folders])
    return any(True for _ in _walk(top, others, seen, Counter()))


def _nearest(root: Path) -> str:
    parent = root.parent
    names = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(root.name, names, n=1)
    if near:
        return f"did you mean `{printable(os.fsencode(parent / near[0]))}`?"
    return f"the path is taken from `{printable(os.fsencode(Path.cwd()))}`"


class _Index(NamedTuple):
    names: bytearray
    ends: array[int]
    sizes: array[int]
    times: hashlib.blake2b  # of modification in ns: hashed at once, so that they take no memory


def _scan(root: bytes, seen: set[tuple[int, int]], skipped: Counter[str]) -> _Index:
    """Index `root` in the byte order of whole relative names, so that nothing needs sorting at the end."""
    index = _Index(bytearray(), array("q", [0]), array("q"), hashlib.blake2b(digest_size=16))
    for entry in _walk(root, _list(root, b"", skipped), seen, skipped):
        index.names.extend(entry.name)
        index.ends.append(len(index.names))
        index.sizes.append(entry.size)
        index.times.update(entry.time.to_bytes(8, "little"))
    return index


def _walk(
    root: bytes, entries: Iterator[_Entry], seen: set[tuple[int, int]], skipped: Counter[str]
) -> Iterator[_Entry]:
    """The images among and below `entries` of `root`, depth first; every folder is entered once, none of `seen`."""
    stack = [entries]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
        elif entry.folder is None:
            yield entry
        elif entry.folder not in seen:
            seen.add(entry.folder)
            stack.append(_list(root, entry.name + b"/", skipped))


class _Entry(NamedTuple):
    name: bytes
    size: int
    time: int  # of its last modification, in ns, modulo 2**64: a damaged disk may say anything
    folder: tuple[int, int] | None  # (device, inode) of a folder, None for a file


class _Listing:
    """What is of use in one folder: one bytes object for each, because a folder may hold a million files."""

    def __init__(self) -> None:
        # Name, zero byte, size and time: that sorts like the name, which has no zero byte. A folder's name ends in `/`:
        # then siblings in order give whole paths in order.
        self.records: list[bytes] = []
        self.folders: dict[bytes, tuple[int, int]] = {}  # by name
        self.skipped: Counter[str] = Counter()
        self.marks: set[bytes] = set()  # names that a run folder has

    def add(self, entry: os.DirEntry[bytes], path: bytes) -> None:
        name = entry.name
        if name in (b"recipe.toml", b"checkpoints", b"metrics.jsonl"):
            self.marks.add(name)
        if _hidden(name):
            self.skipped[HIDDEN] += 1
            return
        try:
            info = entry.stat()
        except OSError:
            self.skipped[BROKEN] += 1  # a link to nothing or to itself, or a file deleted since the folder was listed
            return
        if stat.S_ISDIR(info.st_mode):
            # not the entry's own stat on Windows, where it holds no inode
            self.folders[name + b"/"] = _identity(info if info.st_ino else os.stat(path))
            name += b"/"
        elif not stat.S_ISREG(info.st_mode):
            self.skipped[SPECIAL] += 1  # opening a pipe would wait for ever
            return
        elif not _is_image(name):
            self.skipped[printable(os.path.splitext(name)[1].lower()) or "no extension"] += 1
            return
        self.records.append(name + b"\0" + SIZE_TIME.pack(info.st_size, info.st_mtime_ns & (1 << 64) - 1))

    def entries(self, prefix: bytes) -> Iterator[_Entry]:
        self.records.sort()
        for record in self.records:
            name, (size, time) = record[: -SIZE_TIME.size - 1], SIZE_TIME.unpack(record[-SIZE_TIME.size :])
            folder = self.folders.get(name)
            yield _Entry(prefix + (name if folder is None else name[:-1]), size, time, folder)


def _list(root: bytes, prefix: bytes, skipped: Counter[str]) -> Iterator[_Entry]:
    """Images and folders in one folder, sorted; everything else is counted."""
    listing = _Listing()
    try:
        with os.scandir(root + b"/" + prefix) as scan:
            for entry in scan:
                listing.add(entry, root + b"/" + prefix + entry.name)
    except OSError:
        skipped[UNREADABLE] += 1  # counted, and printed by the caller: a disk's lost+found must not end a run
        return iter(())
    if prefix and b"recipe.toml" in listing.marks and len(listing.marks) > 1:
        skipped[RUN] += 1
        return iter(())
    skipped.update(listing.skipped)
    return listing.entries(prefix)


def _hidden(name: bytes) -> bool:
    return name.startswith(b".") or name == b"__MACOSX"


def _is_image(name: bytes) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino


def _need_images(index: _Index, where: str, skipped: Counter[str]) -> None:
    if index.sizes:
        return
    if not skipped:
        raise SslpreError(f"the folder `{where}` is empty", READS, 4)
    kinds = [f"{count:,} {kind}" for kind, count in sorted(skipped.items(), key=lambda pair: (-pair[1], pair[0]))]
    if len(kinds) > 4:
        kinds = [*kinds[:3], f"{sum(skipped.values()) - sum(count for _, count in skipped.most_common(3)):,} others"]
    listed = ", ".join(kinds[:-1]) + (" and " if len(kinds) > 1 else "") + kinds[-1]
    raise SslpreError(f"no images in `{where}`: found {listed}", READS, 4)


def _folder(root: bytes, where: str, index: _Index, max_pixels: int, like: Folder | None = None) -> Folder:
    """Pack an index; classes are numbered as in `like`, or by sorted name."""
    names, ends, sizes = bytes(index.names), np.array(index.ends, np.int64), np.array(index.sizes, np.int64)
    seen = {b"": -1}  # b"": directly in the root
    firsts = (names[a:b].rpartition(b"/")[0].partition(b"/")[0] for a, b in pairwise(index.ends))
    group = np.fromiter((seen.setdefault(first, len(seen) - 1) for first in firsts), np.int64, len(sizes))
    classes = [printable(folder) for folder in sorted(seen) if folder]
    if len(classes) < 2 or len(classes) > len(sizes) / 5:
        classes = []
    if like is not None:
        classes = like.classes
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number.get(printable(folder), -1) for folder in seen], np.int64)[group + 1]
    digest = hashlib.blake2b(digest_size=16)
    for part in (names, ends.astype("<i8").tobytes(), sizes.astype("<i8").tobytes()):
        digest.update(part)
    fingerprint = digest.hexdigest()
    digest.update(index.times.digest() + str(max_pixels).encode())
    return Folder(root, where, names, ends, sizes, labels, classes, max_pixels, fingerprint, digest.hexdigest())
