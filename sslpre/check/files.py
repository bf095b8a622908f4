"""What is in the files: every header, every image decoded once, in threads, of many as many as time allows."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from sslpre.data import BadImage
from sslpre.data.decode import to_canvas
from sslpre.data.find import Folder, Found
from sslpre.data.header import Header, header
from sslpre.ops.duplicates import perceptual

HEADERS, DECODING, COMPARING = 15.0, 30.0, 15.0  # seconds at most for each pass over the images
MOST = 20_000  # images decoded at most: enough to know what is usual
EVERY = 1 << 19  # files looked at at most: more than the time is enough for
PART = 16  # images of a task: between two the clock is looked at
SIDE = 64  # of the canvas that images are compared on
BLANK = 2  # levels of 255 by which a single colour may vary
ENDS = 1 << 16  # bytes at each end of a file that tell it from another of the same length, mostly
GOLDEN = (5**0.5 - 1) / 2


@dataclass
class Files:
    """Images by number: those for training first, then those for testing.

    headers: of those looked at that are whole; bad: why; hashes: perceptual; shown: the hashed that show enough to be
    compared; blank: those of one colour; peaks: the brightest value of those with more than 8 bits, as decoded;
    digests: of the bytes of files as long as another one; looked, compared: how many headers were read, and files told
    apart by their bytes; decoded: those tried.
    """

    sources: list[Folder]
    headers: dict[int, Header] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)
    hashes: dict[int, int] = field(default_factory=dict)
    shown: set[int] = field(default_factory=set)
    blank: set[int] = field(default_factory=set)
    peaks: dict[int, int] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)
    looked: int = 0
    decoded: list[int] = field(default_factory=list)
    compared: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    @property
    def train(self) -> int:
        """How many are for training."""
        return len(self.sources[0])

    def at(self, number: int) -> tuple[Folder, int]:
        return (self.sources[0], number) if number < self.train else (self.sources[1], number - self.train)

    def name(self, number: int) -> str:
        source, i = self.at(number)
        return f"{source.where}/{source.name(i)}"

    def path(self, number: int) -> bytes:
        source, i = self.at(number)
        return source.path(i)

    def label(self, number: int) -> int:
        source, i = self.at(number)
        return int(source.labels[i])


def survey(found: Found, workers: int, busy: Callable[[str], None] = lambda what: None) -> Files:
    """Look at all of them, or at as many as time allows, evenly spread. workers: threads."""
    sources = [one for one in (found.train, found.test) if isinstance(one, Folder)]
    files = Files(sources)
    every = np.arange(len(files))
    busy("the headers")
    files.looked = len(in_threads(every, lambda rows: read_headers(files, rows), workers, HEADERS))
    busy("every image, which is decoded once")
    files.decoded = in_threads(every, lambda rows: decode_some(files, rows), workers, DECODING, MOST)
    for number in files.bad:
        files.headers.pop(number, None)
    busy("files that are alike")
    sizes = np.concatenate([source.sizes for source in sources])
    alike = every[np.isin(sizes, repeated(sizes))]
    files.compared = len(files) - len(alike)
    files.compared += len(in_threads(alike, lambda rows: digest_some(files, rows), workers, COMPARING))
    whole_digests(files, workers)
    return files


def repeated(values: np.ndarray) -> np.ndarray:
    found, counts = np.unique(values, return_counts=True)
    return found[counts > 1]


def spread(count: int) -> np.ndarray:
    """0..count-1 in an order of which every beginning is spread evenly: by the fractions of multiples of the golden
    ratio."""
    return np.argsort(np.arange(count) * GOLDEN % 1, kind="stable")


def in_threads(
    rows: np.ndarray, do: Callable[[Sequence[int]], None], workers: int, seconds: float, most: int = EVERY
) -> list[int]:
    """`do` with some rows at a time, spread evenly, until all were done, or `most`, or the time is over; the rows done.

    An error of `do` ends it. The first part is always done.
    """
    order = rows[spread(len(rows))][:most]
    parts = [order[at : at + PART].tolist() for at in range(0, len(order), PART)]
    over, begun, done = threading.Event(), time.monotonic(), list[int]()

    def one(number: int) -> list[int]:
        if over.is_set() or (number and time.monotonic() - begun > seconds):
            return []
        do(parts[number])
        return parts[number]

    with contextlib.ExitStack() as last:
        pool = ThreadPoolExecutor(max(1, workers), "sslpre-check")
        last.callback(pool.shutdown, wait=True, cancel_futures=True)
        last.callback(over.set)  # before it
        for part in pool.map(one, range(len(parts))):
            done += part
    return done


def read_headers(files: Files, rows: Sequence[int]) -> None:
    for number in rows:
        try:
            files.headers[number] = header(files.path(number), files.sources[0].max_pixels)
        except BadImage as error:
            files.bad[number] = error.reason


def decode_some(files: Files, rows: Sequence[int]) -> None:
    """Decode as a run does, and compare by what is left on a small canvas."""
    canvases, kept = [], []
    for number in rows:
        if number in files.bad:  # its header said so
            continue
        source, i = files.at(number)
        try:
            image = source.read(i, SIDE)
        except BadImage as error:
            files.bad[number] = error.reason
            continue
        about = files.headers.get(number)
        if about is not None and about.bits > 8:
            files.peaks[number] = int(image.max())
        canvas = to_canvas(image, SIDE)
        if int(np.ptp(canvas, axis=(0, 1)).max()) <= BLANK:
            files.blank.add(number)
        canvases.append(canvas)
        kept.append(number)
    if kept:
        hashes, shown = perceptual(torch.from_numpy(np.stack(canvases)).permute(0, 3, 1, 2))
        files.hashes.update(zip(kept, hashes.tolist(), strict=True))
        files.shown.update(number for number, shows in zip(kept, shown.tolist(), strict=True) if shows)


def digest_some(files: Files, rows: Sequence[int]) -> None:
    """Of the two ends of each file; of a short one that is all of it."""
    for number in rows:
        with contextlib.suppress(OSError), open(files.path(number), "rb") as file:  # as a bad image it is named already
            ends = file.read(ENDS)
            if size_of(files, number) > 2 * ENDS:
                file.seek(-ENDS, 2)
            files.digests[number] = hashlib.blake2b(ends + file.read(ENDS), digest_size=16).digest()


def whole_digests(files: Files, workers: int) -> None:
    """Read to the end those long files whose ends are those of another; where time is over, they are not compared."""
    places: dict[tuple[int, bytes], list[int]] = {}
    for number, digest in files.digests.items():
        if size_of(files, number) > 2 * ENDS:
            places.setdefault((size_of(files, number), digest), []).append(number)
    alike = [number for rows in places.values() if len(rows) > 1 for number in rows]

    def whole(rows: Sequence[int]) -> None:
        for number in rows:
            with contextlib.suppress(OSError), open(files.path(number), "rb") as file:
                files.digests[number] = hashlib.file_digest(file, "blake2b").digest()

    done = set(in_threads(np.array(sorted(alike), np.int64), whole, workers, COMPARING))
    for number in set(alike) - done:
        del files.digests[number]
        files.compared -= 1


def size_of(files: Files, number: int) -> int:
    source, i = files.at(number)
    return int(source.sizes[i])
