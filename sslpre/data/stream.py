"""Batches of decoded images, in a fixed order, on the device, decoded ahead in threads.

Threads suffice because Pillow releases the interpreter's lock while it decodes and resizes; nothing is forked or
pickled. What a batch holds depends on (source, side, seed, epoch) alone, never on the number of workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslpre.data import BadImage, Source
from sslpre.data.decode import to_canvas
from sslpre.errors import SslpreError

PART = 16  # images per task of a worker: small enough to share a batch out, large enough to hide the cost of a task


@dataclass
class Pixels:
    """One batch: `pixels` uint8 [B, 3, S, S] on the device, channels last in memory; on the CPU, `size` int64 [B, 2],
    the (height, width) before the images were squashed to S × S, and `index` int64 [B], which images these are."""

    pixels: Tensor
    size: Tensor
    index: Tensor


class BadList:
    """The images that could not be used: named once each, listed in a file, at most a share `limit` of `total`."""

    def __init__(
        self,
        path: Path | None,
        limit: float,
        total: int,
        say: Callable[[str], None] | None = None,
        after: BadList | None = None,
        shared: bool = False,
        first: bool = True,
    ):
        """`path` is a JSON-lines file, read if it exists (images in it are not named again) and appended to, or None.

        `say` prints one line, by default on stderr. `after` is the list of another source that was read before and
        shares the allowance: its images count in this list too, and `total` is that of both. `shared` between several
        processes, it only collects in `pending` what `settle` is to be given from all of them, and just the `first`
        process writes and speaks. Raises SslpreError (exit 5) if the file is not what was written.
        """
        self.path, self.limit, self.total, self.after = path, limit, total, after
        self.allowed = math.floor(limit * total + 1e-9)  # 0.29 * 100 is 28.999999999999996
        self.pending: list[dict[str, Any]] = []
        self.shared, self._first = shared, first
        self._say = say or _to_stderr
        self._lock = threading.Lock()
        self._known: set[str] = set()  # by name: the folder may be written another way when the run is resumed
        if path is not None and path.exists():
            self._reload(path)

    @property
    def count(self) -> int:
        """How many images are bad so far, those of the list before this one included."""
        return len(self._known) + (self.after.count if self.after is not None else 0)

    def add(self, source: Source, i: int, reason: str) -> None:
        """Note that image `i` of `source` is bad. Raises SslpreError (exit 20) while there are more than allowed."""
        entry = {"where": source.where, "name": source.name(i), "index": i, "reason": reason}
        if self.shared:
            self.pending.append(entry)
        else:
            self._note(entry)

    def settle(self, entries: list[dict[str, Any]]) -> None:
        """Note what all processes have met; raises as `add`, in every process alike."""
        self.pending.clear()
        for entry in entries:
            try:
                self._note(entry)
            except SslpreError as error:
                error.everywhere = True
                raise

    def _note(self, entry: dict[str, Any]) -> None:
        with self._lock:
            if entry["name"] not in self._known:
                self._known.add(entry["name"])
                if self._first:
                    if self.path is not None:
                        with open(self.path, "a", encoding="utf-8") as file:
                            file.write(json.dumps(entry) + "\n")
                    self._say(
                        f"skipped `{entry['name']}`: {entry['reason']}. {self.count:,} bad of {self.total:,} so far"
                    )
            if self.count > self.allowed:
                raise self._too_many()

    def _too_many(self) -> SslpreError:
        share = self.count / max(self.total, 1)
        enough = min(1.0, math.ceil(share * 200) / 100)  # twice what was met so far, which may not be the last
        return SslpreError(
            f"{self.count:,} of {self.total:,} images could not be read so far, above `--max-bad {self.limit:g}`",
            f"allow more, or start again without those named above: `--max-bad {enough:g}`",
            20,
        )

    def _reload(self, path: Path) -> None:
        whole, newline, rest = path.read_bytes().rpartition(b"\n")
        if rest:  # a line cut off by a kill: drop it, its image will be met again
            path.write_bytes(whole + newline)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self._known.add(entry["name"])
            except (ValueError, KeyError, TypeError) as error:
                hint = "delete that line, or the file: bad images are found again"
                raise SslpreError(f"line {number} of `{path}` is not a record of a bad image", hint, 5) from error


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of 0..count-1 (int64 [count]), a function of (count, seed, epoch) alone."""
    digest = hashlib.blake2b(f"order {seed} {epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randperm(count, generator=generator)


def short_side(source: Source, at_most: int = 500) -> int:
    """Median of the shorter side in pixels, over up to `at_most` evenly spaced images, from their headers.

    Images with a damaged header do not count; if none is left, raises SslpreError (exit 4).
    """
    sides = []
    for i in _spread(len(source), at_most):
        try:
            sides.append(min(source.size(i)))
        except BadImage as error:
            last = error.reason  # named and counted when the image is decoded; here it only has no size
    if not sides:
        reason = f"the last one tried: {last}" if len(source) else "there are none"
        raise SslpreError(f"none of the images of `{source.where}` could be read; {reason}", "check the files", 4)
    return int(np.median(sides))


def grey_share(source: Source, at_most: int = 500) -> float | None:
    """Share of grey images in [0, 1], over up to `at_most` evenly spaced ones, by their headers.

    Images with a damaged header do not count; None if no other is left.
    """
    grey = []
    for i in _spread(len(source), at_most):
        with contextlib.suppress(BadImage):  # named and counted when the image is decoded; here it has no colour
            grey.append(source.grey(i))
    return sum(grey) / len(grey) if grey else None


def mixed(source: Source) -> str:
    """One line of warning where some images are grey and others in colour, by `grey_share`; else ""."""
    share = grey_share(source)
    if share is None or share in (0, 1):
        return ""
    percent = "under 1" if share < 0.01 else "over 99" if share > 0.99 else f"{share * 100:.0f}"
    return f"{percent} % of the images are grey files, the others in colour: that alone tells them apart"


def _spread(count: int, at_most: int) -> list[int]:
    """Up to `at_most` of 0..count-1, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(np.int64)).tolist()


@dataclass
class _Batch:
    """A batch being filled: arrays shared with the tensors that will leave, and the calls that wait for its parts."""

    pixels: Tensor  # uint8 [B, S, S, 3], pinned if it goes to a GPU
    size: np.ndarray
    index: np.ndarray
    canvas: np.ndarray  # the same memory as pixels
    parts: list[Callable[[], _Outcome]] = field(default_factory=list)


@dataclass
class _Outcome:
    bad: list[tuple[int, str]]
    gave_up: bool = False


class Stream:
    """Batches of `source` as square canvases of `side` pixels.

    A bad image is replaced by the next good one (i + 1, i + 2, …, modulo N), which keeps its own index. Bad images
    reach `bad` in the order of the batches, when theirs is handed out. `.waited` sums the seconds spent waiting.
    """

    def __init__(
        self,
        source: Source,
        *,
        side: int,
        batch_size: int,
        seed: int,
        workers: int,
        device: torch.device | str,
        bad: BadList,
        rank: int = 0,
        world: int = 1,
    ):
        """`workers` threads decode ahead; 0: decode when asked. `batch_size` is that of all `world` processes, of which
        this one gets the `rank`-th equal part of every batch."""
        assert batch_size % world == 0 or world == 1
        self.rank, self.world = rank, world
        self.source, self.side, self.batch_size, self.seed = source, side, batch_size, seed
        self.workers, self.device, self.bad = workers, torch.device(device), bad
        self.steps_per_epoch = len(source) // batch_size
        self.waited = 0.0

    def epoch(self, epoch: int, start: int = 0) -> Generator[Pixels, None, None]:
        """Shuffled batches `start`, `start` + 1, … of one epoch, as `steps` gives them."""
        return self.steps(epoch * self.steps_per_epoch + start, (epoch + 1) * self.steps_per_epoch)

    def steps(self, first: int, last: int) -> Generator[Pixels, None, None]:
        """Batches of the steps `first` to `last` - 1, counted from the start of the run; decoding runs on over epochs.

        Each epoch has an order of its own; images that do not fill its last batch are dropped. Raises SslpreError:
        exit 2 if the batch is larger than the source, 20 above the limit of bad images.
        """
        if self.steps_per_epoch == 0:
            message = f"a batch of {self.batch_size:,} is larger than the data set of {len(self.source):,} images"
            raise SslpreError(message, f"`--batch-size {max(2, len(self.source) // 8)}`", 2)
        return self._run(self._rows(first, last))

    def _rows(self, first: int, last: int) -> Iterator[Tensor]:
        for epoch in range(first // self.steps_per_epoch, -(-last // self.steps_per_epoch)):
            rows = order(len(self.source), self.seed, epoch).split(self.batch_size)
            begin = epoch * self.steps_per_epoch
            for batch in rows[max(0, first - begin) : min(self.steps_per_epoch, last - begin)]:
                yield batch.chunk(self.world)[self.rank]

    def in_order(self, part: slice = slice(None), batch: int = 0) -> Generator[Pixels, None, None]:
        """Every index, or those of `part`, once, ascending, the last batch shorter. Bad images as in `epoch`.

        batch: images at a time, if not as many as in training.
        """
        rows = torch.arange(len(self.source))[part]
        return self._run(iter(rows.split(batch or self.batch_size)) if len(rows) else iter(()))

    @contextlib.contextmanager
    def peek(self) -> Iterator[Pixels]:
        """The run's first batch, for a look at what it takes; the time does not count as waited for."""
        waited = self.waited
        with contextlib.closing(self.steps(0, 1)) as batches:
            yield next(batches)
        self.waited = waited

    def _run(self, batches: Iterator[Tensor]) -> Generator[Pixels, None, None]:
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.workers, "sslpre-decode") if self.workers else None
        # one batch beyond the current, more where a batch is too small to occupy every worker
        ahead = 2 + self.workers * PART // self.batch_size if pool else 1
        waiting: deque[_Batch] = deque()
        try:
            for rows in batches:
                waiting.append(self._begin(rows, pool, stop))
                if len(waiting) > ahead - 1:
                    yield self._finish(waiting.popleft())
            while waiting:
                yield self._finish(waiting.popleft())
        finally:
            stop.set()
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, rows: Tensor, pool: ThreadPoolExecutor | None, stop: threading.Event) -> _Batch:
        count, on_gpu = len(rows), self.device.type == "cuda"
        pixels = torch.empty((count, self.side, self.side, 3), dtype=torch.uint8, pin_memory=on_gpu)
        batch = _Batch(pixels, np.zeros((count, 2), np.int64), rows.numpy().copy(), pixels.numpy())
        for first in range(0, count, PART):
            fill = partial(self._fill, batch, range(first, min(first + PART, count)), stop)
            batch.parts.append(pool.submit(fill).result if pool else fill)
        return batch

    def _finish(self, batch: _Batch) -> Pixels:
        for part in batch.parts:
            began = time.perf_counter()
            outcome = part()
            self.waited += time.perf_counter() - began
            for i, reason in outcome.bad:
                self.bad.add(self.source, i, reason)
            if outcome.gave_up:
                message = f"none of the {len(self.source):,} images of `{self.source.where}` could be read"
                raise SslpreError(message, f"the last one tried: {outcome.bad[-1][1]}", 20)
        # the caching allocator keeps a pinned block until the copy that reads it is done
        pixels = batch.pixels.to(self.device, non_blocking=True) if self.device.type != "cpu" else batch.pixels
        return Pixels(pixels.permute(0, 3, 1, 2), torch.from_numpy(batch.size), torch.from_numpy(batch.index))

    def _fill(self, batch: _Batch, slots: Iterable[int], stop: threading.Event) -> _Outcome:
        """Decode the images of `slots` into the batch. Gives up after more bad ones in a row than may be bad in all."""
        outcome = _Outcome([])
        for slot in slots:
            first = int(batch.index[slot])
            # a list that several processes share is only counted when they meet
            patience = len(self.source) if self.bad.shared else min(len(self.source), self.bad.allowed + 1)
            for i in ((first + k) % len(self.source) for k in range(patience)):
                if stop.is_set():
                    return outcome
                try:
                    batch.canvas[slot], batch.size[slot] = self._read(i)
                    batch.index[slot] = i
                    break
                except BadImage as error:
                    outcome.bad.append((i, error.reason))
            else:
                outcome.gave_up = True
                return outcome
        return outcome

    def _read(self, i: int) -> tuple[np.ndarray, tuple[int, int]]:
        image = self.source.read(i, self.side)
        height, width = image.shape[:2]
        if min(height, width) >= 2 * self.side:  # it may have been decoded at a fraction of its size
            height, width = self.source.size(i)
        return to_canvas(image, self.side), (height, width)
