"""The way of a batch from the host to the device. On a CPU there is none, and everything here is a function call."""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sslpre.data.rows import OnDevice, Store

RING = 4  # buffers that are kept to be used again; of pinned ones, so many may be on their way before one is waited for


@dataclass
class Sent:
    """A batch that is queued: uint8 [B, S, S, 3] on the device, and the event after which it is there."""

    rows: Tensor
    arrived: torch.cuda.Event | None


class Ferry:
    """Copies batches to `device` in a CUDA stream of its own, beside the computation, from pinned memory that is used
    again. With a store on the device each row is sent once, and batches are made there."""

    def __init__(self, side: int, device: torch.device, store: Store | None):
        self.side, self.device = side, device
        self._store = store if isinstance(store, OnDevice) else None
        self._lane: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._lane = self._store.lane if self._store is not None else torch.cuda.Stream(device)
        self._used: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._free: deque[np.ndarray] = deque(maxlen=RING)

    def buffer(self, count: int) -> Tensor:
        """Host memory for at least `count` images, uint8 [≥ count, S, S, 3], until it is sent; pinned for CUDA."""
        shape = (count, self.side, self.side, 3)
        if self._lane is None:
            return self._lend(shape)
        while self._used:
            buffer, copied = self._used[0]
            if len(self._used) < RING and not copied.query():
                break
            copied.synchronize()
            self._used.popleft()
            if len(buffer) >= count:
                return buffer
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)

    def _lend(self, shape: tuple[int, ...]) -> Tensor:
        """Memory that is used again when the last tensor on it is gone: new memory costs as much as filling it."""
        memory = self._free.popleft() if self._free else None
        if memory is None or len(memory) < shape[0]:
            memory = torch.empty(shape, dtype=torch.uint8).numpy()
        lent = memory[:]
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)

    def send(self, buffer: Tensor | None, index: np.ndarray, size: np.ndarray, fresh: np.ndarray | None) -> Sent:
        """Queue the images `index`, int64 [B], of these sizes, int64 [B, 2], whose pixels are in `buffer`.

        With a store on the device, `fresh`, bool [B], says which rows of the buffer it has not: only these are sent; no
        buffer: none. What the buffer holds afterwards is undefined.
        """
        new = np.arange(len(index)) if fresh is None else np.flatnonzero(fresh)
        with torch.cuda.stream(self._lane):
            rows = None if buffer is None or not len(new) else self._copy(_first(buffer, new))
            if buffer is not None and self._lane is not None:
                self._used.append((buffer, self._lane.record_event()))
            if self._store is not None:
                if rows is not None:
                    self._store.scatter(index[new], rows, size[new])
                if rows is None or len(new) < len(index):
                    rows = self._store.pick(index)
            assert rows is not None
            return Sent(rows, self._lane.record_event() if self._lane is not None else None)

    def _copy(self, rows: Tensor) -> Tensor:
        return rows.to(self.device, non_blocking=self._lane is not None)

    def deliver(self, sent: Sent) -> Tensor:
        """The batch, [B, S, S, 3] on the device, for whatever the current stream computes from now on."""
        if sent.arrived is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(sent.arrived)
            sent.rows.record_stream(now)  # it was allocated for another stream
        return sent.rows


def _first(buffer: Tensor, new: np.ndarray) -> Tensor:
    """The rows `new`, ascending, of a buffer, moved to its beginning."""
    for at, row in enumerate(new.tolist()):
        if at != row:
            buffer[at].copy_(buffer[row])
    return buffer[: len(new)]
