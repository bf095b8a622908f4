"""Batches of decoded images, in a fixed order, on the device, decoded or gathered from a store ahead in threads.

Threads suffice because decoders release the interpreter's lock while they work; nothing is forked or pickled. What a
batch holds depends on (source, side, seed, epoch) alone, never on the number of workers, nor on what is stored.
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
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslpre.data import BadImage, Source
from sslpre.data.ferry import Ferry, Sent
from sslpre.data.rows import OnDevice, Store
from sslpre.data.store import stored
from sslpre.errors import SslpreError

PART = 16  # images per task of a worker: small enough to share a batch out, large enough to hide the cost of a task
GATHER = 4 << 20  # bytes per task where all is stored


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
                    more, so_far = self._list(entry), f"{self.count:,} bad of {self.total:,} so far"
                    self._say(f"skipped `{entry['name']}`: {entry['reason']}. {so_far}{more}")
            if self.count > self.allowed:
                raise self._too_many()

    def _list(self, entry: dict[str, Any]) -> str:
        """Add it to the file; what to say of it where that cannot be: it is no reason to end a run."""
        if self.path is None:
            return ""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            return f"; `{self.path}` cannot be written: {(error.strerror or 'unknown reason').lower()}"
        return ""

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
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                hint = "delete that line, or the file: bad images are found again"
                raise SslpreError(f"line {number} of `{path}` is not a record of a bad image", hint, 5) from error


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of 0..count-1 (int64 [count]), a function of (count, seed, epoch) alone."""
    digest = hashlib.blake2b(f"order {seed} {epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randperm(count, generator=generator)


@dataclass
class _Outcome:
    bad: list[tuple[int, str]]
    gave_up: bool = False


@dataclass
class _Batch:
    """A batch being filled: which images, their sizes, and the calls that wait for its parts.

    buffer: uint8 [≥ B, S, S, 3], None where the device has all rows already; fresh: which rows it has not.
    """

    index: np.ndarray
    size: np.ndarray
    buffer: Tensor | None = None
    fresh: np.ndarray | None = None
    parts: list[Future[_Outcome] | Callable[[], _Outcome]] = field(default_factory=list)
    sent: Sent | None = None

    @property
    def canvas(self) -> np.ndarray:
        assert self.buffer is not None
        return self.buffer.numpy()

    def filled(self) -> bool:
        """Are all parts done, and done well?"""
        return all(
            isinstance(part, Future) and part.done() and part.exception() is None and not part.result().gave_up
            for part in self.parts
        )


class Stream:
    """Batches of `source` as square canvases of `side` pixels.

    A bad image is replaced by the next good one (i + 1, i + 2, …, modulo N), which keeps its own index. Bad images
    reach `bad` in the order of the batches, when theirs is handed out. `.waited` sums the seconds spent waiting.
    Images that `store` has are taken from there, without a look at their files, and all others are put there.
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
        store: Store | None = None,
    ):
        """`workers` threads decode ahead; 0: decode when asked. `batch_size` is that of all `world` processes, of which
        this one gets the `rank`-th equal part of every batch."""
        assert batch_size % world == 0 or world == 1
        self.rank, self.world = rank, world
        self.source, self.side, self.batch_size, self.seed = source, side, batch_size, seed
        self.workers, self.device, self.bad = workers, torch.device(device), bad
        self.steps_per_epoch = len(source) // batch_size
        self.waited = 0.0
        self._reasons: dict[int, str] = {}  # of bad images, which are decoded once
        self.keep(store)

    def keep(self, store: Store | None) -> None:
        """Take images from `store` from the next call of `steps` on, or from none. It is the caller's to close."""
        assert store is None or (len(store), store.side) == (len(self.source), self.side)
        self.store, self._ferry = store, Ferry(self.side, self.device, store)

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
        # One batch beyond the current, more where a batch is too small to occupy every worker; with a GPU another, so
        # that the next one is whole, and its copy queued, when the current is handed out.
        ahead = 2 + self.workers * PART // (self.batch_size // self.world) + (self.device.type == "cuda") if pool else 1
        waiting: deque[_Batch] = deque()
        try:
            for rows in batches:
                waiting.append(self._begin(rows, pool, stop))
                if len(waiting) > ahead - 1:
                    yield self._finish(waiting)
            while waiting:
                yield self._finish(waiting)
        finally:
            stop.set()
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, rows: Tensor, pool: ThreadPoolExecutor | None, stop: threading.Event) -> _Batch:
        count, index = len(rows), rows.numpy().copy()
        full, on_device = self.store is not None and self.store.ready(index), isinstance(self.store, OnDevice)
        if full and on_device:
            assert self.store is not None
            return _Batch(index, self.store.sizes(index))
        fresh = np.ones(count, bool) if on_device else None
        batch = _Batch(index, np.zeros((count, 2), np.int64), self._ferry.buffer(count), fresh)
        step = max(1, GATHER // (self.side * self.side * 3)) if full else PART
        for first in range(0, count, step):
            fill = partial(self._fill, batch, slice(first, min(first + step, count)), stop)
            batch.parts.append(pool.submit(fill) if pool else fill)
        return batch

    def _finish(self, waiting: deque[_Batch]) -> Pixels:
        """The first batch, as soon as it is whole. The copy of the one behind it is queued before, if that can be."""
        batch = waiting.popleft()
        for part in batch.parts:
            began = time.perf_counter()
            outcome = part.result() if isinstance(part, Future) else part()
            self.waited += time.perf_counter() - began
            for i, reason in outcome.bad:
                self.bad.add(self.source, i, reason)
            if outcome.gave_up:
                message = f"none of the {len(self.source):,} images of `{self.source.where}` could be read"
                raise SslpreError(message, f"the last one tried: {outcome.bad[-1][1]}", 20)
        batch.parts.clear()  # they know the batch, which would live until the garbage is collected
        sent = self._send(batch)
        if waiting and waiting[0].filled():
            self._send(waiting[0])
        pixels = self._ferry.deliver(sent).permute(0, 3, 1, 2)
        return Pixels(pixels, torch.from_numpy(batch.size), torch.from_numpy(batch.index))

    def _send(self, batch: _Batch) -> Sent:
        if batch.sent is None:
            batch.sent = self._ferry.send(batch.buffer, batch.index, batch.size, batch.fresh)
            batch.buffer = None  # the ferry's again
        return batch.sent

    def _fill(self, batch: _Batch, part: slice, stop: threading.Event) -> _Outcome:
        """Put the images of `part` into the batch. Gives up after more bad ones in a row than may be bad in all."""
        outcome, canvas = _Outcome([]), batch.canvas
        if self.store is not None and batch.fresh is None and self.store.ready(batch.index[part]):
            batch.size[part] = self.store.gather(batch.index[part], canvas[part])
            return outcome
        for slot in range(part.start, part.stop):
            first = int(batch.index[slot])
            # a list that several processes share is only counted when they meet
            patience = len(self.source) if self.bad.shared else min(len(self.source), self.bad.allowed + 1)
            for i in ((first + k) % len(self.source) for k in range(patience)):
                if stop.is_set():
                    return outcome
                if i not in self._reasons:
                    try:
                        self._place(batch, canvas, slot, i)
                        break
                    except BadImage as error:
                        outcome.bad.append((i, error.reason))
                        if getattr(error.__cause__, "errno", None) is None:  # else the disk's fault: it may pass
                            self._reasons[i] = error.reason
                        continue
                outcome.bad.append((i, self._reasons[i]))
            else:
                outcome.gave_up = True
                return outcome
        return outcome

    def _place(self, batch: _Batch, canvas: np.ndarray, slot: int, i: int) -> None:
        """Image `i` into `slot`: from the store, else decoded, and then also into the store. Raises BadImage."""
        if batch.fresh is not None and isinstance(self.store, OnDevice) and self.store.has(i):
            batch.size[slot], batch.fresh[slot] = self.store.sizes(np.array([i]))[0], False
        else:
            size = None if self.store is None else self.store.take(i, canvas[slot])
            if size is None:
                pixels, size = stored(self.source, i, self.side)
                canvas[slot] = pixels
                if self.store is not None and batch.fresh is None:  # else the ferry stores it, on the device
                    self.store.put(i, pixels, size)
            batch.size[slot] = size
        batch.index[slot] = i
