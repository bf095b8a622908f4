"""Decoded images as rows of one array, in RAM or on the GPU: what every kind of store can do. On disk: `packed`."""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sslpre.data import room
from sslpre.data.shared import PAGE, Shared, fence

LOOK = 256 << 20  # bytes that are put between two looks at how much memory is left
LEAST = 1 << 30  # bytes that are left to others, or a twentieth of the machine where that is less
Size = tuple[int, int]  # (height, width) of an image before it was squashed


class Store(ABC):
    """Images of one source, squashed to side × side: uint8 [N, S, S, 3], each there or not yet.

    A row never changes: two threads or processes that store the same one write the same bytes. Everything but `close`
    may be called from many threads at once.
    """

    kind: str  # "device", "ram" or "disk"
    where: str  # for people: `in RAM`, `on the GPU`, or the path
    writes: bool = True  # are rows that are put kept?
    join: str = ""  # where other processes of this machine find the same memory, for `open_store`

    def __init__(self, count: int, side: int):
        self.side = side
        self._there = np.zeros(count, bool)  # rows that are here and checked
        self._size = np.zeros((count, 2), np.int32)

    def __len__(self) -> int:
        return len(self._there)

    @property
    def bytes(self) -> int:
        """What all rows together take, there or not."""
        return len(self) * self.side * self.side * 3

    @property
    def held(self) -> int:
        """How many rows are there now."""
        return int(self.rows().sum())

    @property
    def near(self) -> int:
        """How many images need no decoding now: their rows are there, or in the file that is read behind it."""
        return self.held

    def rows(self) -> np.ndarray:
        """bool [N]: which rows are there now. Not all need be right: those in a file are checked when taken."""
        return self._there.copy()

    def ready(self, index: np.ndarray) -> bool:
        """Are all rows of `index`, int64 [B], there and checked, so that `gather` may be called?"""
        return bool(self._there[index].all())

    def sizes(self, index: np.ndarray) -> np.ndarray:
        """int64 [B, 2]: the (height, width) of images whose rows are ready."""
        return self._size[index].astype(np.int64)

    @abstractmethod
    def take(self, i: int, out: np.ndarray) -> Size | None:
        """Copy row `i` into `out`, uint8 [S, S, 3]; None where it is not there."""

    @abstractmethod
    def put(self, i: int, canvas: np.ndarray, size: Size) -> None:
        """Keep `canvas`, uint8 [S, S, 3], as row `i`."""

    @abstractmethod
    def gather(self, index: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copy the rows `index`, all of them ready, into `out`, uint8 [B, S, S, 3]; gives `sizes(index)`."""

    def close(self) -> None:
        """Give the memory or the file back. Nothing else may be called afterwards."""
        self._there = self._there[:0]

    def _enter(self, i: int, size: Size) -> None:
        self._size[i] = size
        self._there[i] = True  # last: who sees it may read the row


class InMemory(Store):
    """A store that is empty at the start of a run. `behind`: rows that are not here yet may be there."""

    def __init__(self, count: int, side: int, behind: Store | None):
        super().__init__(count, side)
        self.behind = behind

    @property
    def near(self) -> int:
        behind = self.behind
        return self.held if behind is None else int((self.rows() | behind.rows()).sum())

    def close(self) -> None:
        super().close()
        if self.behind is not None:
            self.behind.close()

    def _done_with_behind(self) -> None:
        """Let go of what is behind once every row is here; who is reading there has it a little longer."""
        if self.behind is not None and self._there.all():
            self.behind = None


class InRam(InMemory):
    """Memory is taken from the system as rows come, not at once, and no more of it where little is left."""

    kind, where = "ram", "in RAM"

    def __init__(
        self,
        count: int,
        side: int,
        behind: Store | None = None,
        shared: Shared | None = None,
        say: Callable[[str], None] | None = None,
    ):
        """shared: memory of `extent(count, side)` bytes that other processes have too, who see every row that is put.

        Raises MemoryError where the system does not even promise so much memory.
        """
        super().__init__(count, side, behind)
        self._lock, self._unseen, self._say = threading.Lock(), 0, say or to_stderr
        self._shared, shape = shared, (count, side, side, 3)
        if shared is None:
            self._pixels = np.empty(shape, np.uint8)
            return
        self.join = shared.path
        self._there = np.frombuffer(shared.memory, bool, count)
        self._size = np.frombuffer(shared.memory, np.int32, 2 * count, _sizes_at(count)).reshape(count, 2)
        rows = np.frombuffer(shared.memory, np.uint8, count * side * side * 3, _rows_at(count))
        self._pixels = rows.reshape(shape)

    @staticmethod
    def extent(count: int, side: int) -> int:
        """Bytes of shared memory for so many images: marks, sizes, rows."""
        return _rows_at(count) + count * side * side * 3

    def ready(self, index: np.ndarray) -> bool:
        there = super().ready(index)
        if self.join:
            fence()  # between the marks and the rows
        return there

    def take(self, i: int, out: np.ndarray) -> Size | None:
        if self._there[i]:
            if self.join:
                fence()
            out[...] = self._pixels[i]
            return int(self._size[i, 0]), int(self._size[i, 1])
        behind = self.behind
        size = None if behind is None else behind.take(i, out)
        if size is not None:
            self.put(i, out, size)
        return size

    def put(self, i: int, canvas: np.ndarray, size: Size) -> None:
        if not self.writes or self._there[i] or not self._has_room(canvas.nbytes):
            return
        self._pixels[i] = canvas
        self._size[i] = size
        if self.join:
            fence()
        self._enter(i, size)
        self._done_with_behind()

    def gather(self, index: np.ndarray, out: np.ndarray) -> np.ndarray:
        # one call, and the interpreter's lock is released; without `mode` numpy would go through a buffer
        np.take(self._pixels, index, axis=0, out=out, mode="clip")
        return self.sizes(index)

    def close(self) -> None:
        super().close()
        self.writes = False
        self._there, self._size, self._pixels = self._there[:0].copy(), self._size[:0].copy(), self._pixels[:0].copy()
        self._shared = None  # the memory goes with the last view of it, of the last process

    def _has_room(self, more: int) -> bool:
        """May `more` bytes be taken? Half of what was free was promised, maybe to several runs at once."""
        with self._lock:
            self._unseen += more
            if self._unseen >= LOOK and self.writes:
                self._unseen = 0
                left, whole = room.memory(), room.physical()
                least = LEAST if whole is None else min(LEAST, whole // 20)
                if left is not None and left < least:
                    self.writes = False
                    line = f"nothing more is kept in RAM: {room.amount(left)} of memory are left"
                    self._say(f"{line}; the other images are decoded anew")
            return self.writes


class OnDevice(InMemory):
    """Rows in the GPU's memory. A stream sends each once, by `scatter`, and then makes batches there, by `pick`.

    `lane` is the CUDA stream in which both are queued, one after the other; None on a CPU.
    """

    kind, where = "device", "on the GPU"

    def __init__(self, count: int, side: int, device: torch.device, behind: Store | None = None):
        """Raises torch.OutOfMemoryError where the device has less free."""
        super().__init__(count, side, behind)
        self._pixels = torch.empty((count, side, side, 3), dtype=torch.uint8, device=device)
        self.lane = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.lane is not None:
            # the memory may be some that a kernel queued before still uses
            self.lane.wait_stream(torch.cuda.current_stream(device))

    def scatter(self, index: np.ndarray, rows: Tensor, sizes: np.ndarray) -> None:
        """Queue the keeping of `rows`, uint8 [B, S, S, 3] on the device, as `index`, int64 [B]."""
        self._pixels.index_copy_(0, self.sent(index), rows)
        self._size[index] = sizes
        self._there[index] = True
        self._done_with_behind()

    def pick(self, index: np.ndarray) -> Tensor:
        """Queue the making of a batch of rows that are ready: uint8 [B, S, S, 3] on the device."""
        return self._pixels.index_select(0, self.sent(index))

    def sent(self, index: np.ndarray) -> Tensor:
        """Queue the sending of row numbers, int64 [B]."""
        rows = torch.from_numpy(index)
        return rows.pin_memory().to(self._pixels.device, non_blocking=True) if self.lane is not None else rows

    def has(self, i: int) -> bool:
        """Is the row on the device?"""
        return bool(self._there[i])

    def take(self, i: int, out: np.ndarray) -> Size | None:
        """From the device it waits for all that is queued there, so a stream asks `has` first."""
        if not self._there[i]:
            behind = self.behind
            return None if behind is None else behind.take(i, out)
        self.gather(np.array([i]), out[None])
        return int(self._size[i, 0]), int(self._size[i, 1])

    def put(self, i: int, canvas: np.ndarray, size: Size) -> None:
        with torch.cuda.stream(self.lane):
            self._pixels[i].copy_(torch.from_numpy(np.ascontiguousarray(canvas)))
        self._enter(i, size)
        self._done_with_behind()

    def gather(self, index: np.ndarray, out: np.ndarray) -> np.ndarray:
        with torch.cuda.stream(self.lane):
            out[...] = self.pick(index).cpu().numpy()
        return self.sizes(index)

    def close(self) -> None:
        super().close()
        self._pixels = self._pixels[:0].clone()


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _sizes_at(count: int) -> int:
    """Where the sizes begin in shared memory, behind the marks; and the rows, behind the sizes."""
    return -(-count // 64) * 64


def _rows_at(count: int) -> int:
    return _sizes_at(count) + -(-count * 8 // PAGE) * PAGE
