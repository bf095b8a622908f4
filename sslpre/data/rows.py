"""Decoded images as rows of one array, in RAM or on the GPU: what every kind of store can do. On disk: `packed`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, int]  # (height, width) of an image before it was squashed


class Store(ABC):
    """Images of one source, squashed to side × side: uint8 [N, S, S, 3], each there or not yet.

    A row never changes: two threads or processes that store the same one write the same bytes. Everything but `close`
    may be called from many threads at once.
    """

    kind: str  # "device", "ram" or "disk"
    where: str  # for people: `in RAM`, `on the GPU`, or the path
    writes: bool = True  # are rows that are put kept?

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
        return int(self._there.sum())

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


class InRam(Store):
    """Memory is taken from the system as rows come, not at once. `behind`: rows that are not here yet may be there."""

    kind, where = "ram", "in RAM"

    def __init__(self, count: int, side: int, behind: Store | None = None):
        """Raises MemoryError where the system does not even promise so much memory."""
        super().__init__(count, side)
        self.behind = behind
        self._pixels = np.empty((count, side, side, 3), np.uint8)

    def take(self, i: int, out: np.ndarray) -> Size | None:
        if self._there[i]:
            out[...] = self._pixels[i]
            return int(self._size[i, 0]), int(self._size[i, 1])
        size = None if self.behind is None else self.behind.take(i, out)
        if size is not None:
            self.put(i, out, size)
        return size

    def put(self, i: int, canvas: np.ndarray, size: Size) -> None:
        self._pixels[i] = canvas
        self._enter(i, size)

    def gather(self, index: np.ndarray, out: np.ndarray) -> np.ndarray:
        # one call, and the interpreter's lock is released; without `mode` numpy would go through a buffer
        np.take(self._pixels, index, axis=0, out=out, mode="clip")
        return self.sizes(index)

    def close(self) -> None:
        super().close()
        self._pixels = self._pixels[:0].copy()
        if self.behind is not None:
            self.behind.close()


class OnDevice(Store):
    """Rows in the GPU's memory. A stream sends each once, by `scatter`, and then makes batches there, by `pick`.

    `lane` is the CUDA stream in which both are queued, one after the other; None on a CPU.
    """

    kind, where = "device", "on the GPU"

    def __init__(self, count: int, side: int, device: torch.device, behind: Store | None = None):
        """Raises torch.OutOfMemoryError where the device has less free."""
        super().__init__(count, side)
        self.behind = behind
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
            return None if self.behind is None else self.behind.take(i, out)
        self.gather(np.array([i]), out[None])
        return int(self._size[i, 0]), int(self._size[i, 1])

    def put(self, i: int, canvas: np.ndarray, size: Size) -> None:
        with torch.cuda.stream(self.lane):
            self._pixels[i].copy_(torch.from_numpy(np.ascontiguousarray(canvas)))
        self._enter(i, size)

    def gather(self, index: np.ndarray, out: np.ndarray) -> np.ndarray:
        with torch.cuda.stream(self.lane):
            out[...] = self.pick(index).cpu().numpy()
        return self.sizes(index)

    def close(self) -> None:
        super().close()
        self._pixels = self._pixels[:0].clone()
        if self.behind is not None:
            self.behind.close()
