"""Decode once: which store keeps the decoded images of a run, and the file that is filled ahead of one.

The stored form of an image is a square of side × side pixels, whatever its own shape, so that one gather makes a batch.
Every view of every epoch is cut from it, whether it was stored or has just been decoded: no store changes a pixel.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sslpre.data import BadImage, Source, room
from sslpre.data.decode import to_canvas
from sslpre.data.packed import Form, NotPossible, Packed, Write, amount, file_of, form_of, opened
from sslpre.data.rows import InRam, OnDevice, Size, Store
from sslpre.errors import SslpreError

if TYPE_CHECKING:
    from sslpre.data.stream import BadList

__all__ = ["KINDS", "InRam", "OnDevice", "Packed", "Store", "file_of", "open_store", "pack", "stored"]

KINDS = ("auto", "device", "ram", "disk", "off")
PART = 16  # images per task of a packing thread


def stored(source: Source, i: int, side: int) -> tuple[np.ndarray, Size]:
    """The stored form of image `i`, uint8 [side, side, 3], and its own (height, width). Raises BadImage."""
    image = source.read(i, side)
    height, width = image.shape[:2]
    if min(height, width) >= 2 * side:  # it may have been decoded at a fraction of its size
        height, width = source.size(i)
    return to_canvas(image, side), (height, width)


def open_store(
    wanted: str,
    source: Source,
    side: int,
    device: torch.device | str,
    *,
    reuse: bool,
    share: int = 1,
    write: Write = True,
    say: Callable[[str], None] | None = None,
) -> tuple[Store | None, str]:
    """The store for a run on `source`, and one line for people: where, how large, why not a better place.

    wanted: one of KINDS, or the path of a packed file. "auto" takes the GPU where the images fill at most a quarter of
    its memory, else RAM up to half of what is free, else a file in the cache up to half of the free disk, else none.
    reuse: will images be read more than once? If not, "auto" stores nothing. share: processes of this run on this
    machine, each of which holds its own copy in RAM. write: may the file be written? "with": beside the first process
    of this run, whose store `.writes`. A store in memory takes what it can from the file, and writes nothing there.

    Raises SslpreError: exit 3 where the store that was asked for is not possible here, 6 where the file that was named
    holds something else. `say` prints a line when writing ends early, by default on stderr.
    """
    if wanted == "off" or (wanted == "auto" and not reuse):
        return None, "off" if wanted == "off" else "off: every image is read once"
    device, form, why_not = torch.device(device), form_of(source, side), ""
    if wanted not in KINDS:
        return _named(Path(wanted), source, form, write, say)
    kinds = [kind for kind in KINDS[1:4] if kind != "device" or device.type == "cuda"] if wanted == "auto" else [wanted]
    for kind in kinds:
        try:
            if kind == "disk":
                packed = opened(file_of(source, side), form, write=write, make=True, replace=True, say=say)
                return packed, _line(packed, packed, write) + why_not
            behind, auto = _behind(source, side, form), wanted == "auto"
            store: InRam | OnDevice
            if kind == "device" and device.type == "cuda":
                store = _on_device(form, device, auto, behind)
            else:
                store = _in_ram(form, share, auto, behind)
                why_not += "; `device` is for CUDA" if kind == "device" else ""
            return store, _line(store, behind, write) + why_not
        except NotPossible as error:
            if wanted != "auto":
                hint = "--store auto, which takes what is possible, or --store off"
                raise SslpreError(f"`--store {wanted}` is not possible: {error}", hint, 3) from error
            why_not += f"; not {PLACES[kind]}: {error}"
    return None, "off" + why_not


PLACES = {"device": "on the GPU", "ram": "in RAM", "disk": "on disk"}


def _named(
    path: Path, source: Source, form: Form, write: Write, say: Callable[[str], None] | None
) -> tuple[Store, str]:
    try:
        packed = opened(path, form, write=write, say=say)
    except NotPossible as error:
        if error.other:
            hint = f"--store auto, or pack `{source.where}` again into another file"
            raise SslpreError(str(error), hint, 6) from error
        hint = f"--store {', '.join(KINDS)}, or the name of a file that `sslpre pack` made"
        raise SslpreError(str(error), hint, 3) from error
    return packed, _line(packed, packed, write)


def _behind(source: Source, side: int, form: Form) -> Packed | None:
    """The cache's file of these images, to read what is in it; None where there is none that can be used."""
    try:
        packed = opened(file_of(source, side), form, write=False)
    except NotPossible:  # then everything is decoded: nothing was asked of the file
        return None
    if packed.held:
        return packed
    packed.close()
    return None


def _on_device(form: Form, device: torch.device, auto: bool, behind: Packed | None) -> OnDevice:
    needed, whole = form.images * form.row, torch.cuda.get_device_properties(device).total_memory
    try:
        if auto and needed > whole / 4:
            raise NotPossible(f"{amount(needed)} is more than a quarter of its {amount(whole)}")
        return OnDevice(form.images, form.side, device, behind)
    except torch.OutOfMemoryError as error:
        _close(behind)
        raise NotPossible(f"{amount(needed)} is more than what is free of its {amount(whole)}") from error
    except NotPossible:
        _close(behind)
        raise


def _in_ram(form: Form, share: int, auto: bool, behind: Packed | None) -> InRam:
    needed, free = form.images * form.row * share, room.memory()
    times = f"{share} x {amount(form.images * form.row)}" if share > 1 else amount(needed)
    try:
        if free is None and auto:
            raise NotPossible("this system does not say how much memory is free")
        if free is not None and needed > (free / 2 if auto else free):
            raise NotPossible(f"{times} is more than {'half of ' if auto else ''}the free memory ({amount(free)})")
        return InRam(form.images, form.side, behind)
    except MemoryError as error:
        _close(behind)
        raise NotPossible(f"the system does not give {amount(form.images * form.row)} to one process") from error
    except NotPossible:
        _close(behind)
        raise


def _close(store: Store | None) -> None:
    if store is not None:
        store.close()


def _line(store: Store, file: Packed | None, write: Write) -> str:
    line = f"{PLACES[store.kind]}, {amount(store.bytes)}"
    if file is None:
        return line
    line += f", `{file.path}`" if file is store else f", read from `{file.path}`"
    held = file.held
    line += f": {held:,} of {len(file):,} images are there" if held < len(file) else ": every image is there"
    if file is store and write and not file.writes and held < len(file):
        line += "; it is only read, another process writes it or it may not be written"
    return line


def pack(
    source: Source,
    side: int,
    path: Path | None,
    workers: int,
    bad: BadList,
    progress: Callable[[int], None] = lambda done: None,
) -> Packed:
    """Fill a file with every image of `source`, squashed to `side`, and leave it open; None: the cache's own file.

    Goes on with a file that is half filled. `workers` threads decode; `bad` is told of bad images, in their order;
    `progress` gets the number of images dealt with, bad ones included.

    Raises SslpreError: exit 3 where the file cannot be made, is being written by another process, or the disk fails;
    6 where it holds something else; 20 from `bad`.
    """
    form, place = form_of(source, side), path or file_of(source, side)
    hint = "name another file, or a disk with room" if path else "name a file: sslpre pack IMAGES OUT"
    failure: list[str] = []
    try:
        packed = opened(place, form, write=True, make=True, replace=path is None, say=failure.append)
    except NotPossible as error:
        raise SslpreError(str(error), hint, 6 if error.other else 3) from error
    try:
        if not packed.writes and packed.held < len(packed):
            message = f"`{place}` is being written by another process, or may not be written"
            raise SslpreError(message, f"wait until it is done, or {hint}", 3)
        done = 0
        for count, found in _filled(packed, source, max(1, workers)):
            for i, reason in found:
                bad.add(source, i, reason)
            done += count
            progress(done)
            if failure:
                message = f"writing `{place}` failed: {packed.why_not}"
                raise SslpreError(message, f"make room, and the same command goes on; or {hint}", 3)
    except BaseException:
        packed.close()
        raise
    return packed


def _filled(packed: Packed, source: Source, workers: int) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Fill the file in parts, in order: how many images each has, and the bad ones among them."""
    stop = threading.Event()

    def fill(part: range) -> tuple[int, list[tuple[int, str]]]:
        found, canvas = [], np.empty((packed.side, packed.side, 3), np.uint8)
        for i in part:
            if stop.is_set():
                break
            if packed.take(i, canvas) is None:
                try:
                    packed.put(i, *stored(source, i, packed.side))
                except BadImage as error:
                    found.append((i, error.reason))
        return len(part), found

    pool = ThreadPoolExecutor(workers, "sslpre-pack")
    waiting: deque[Future[tuple[int, list[tuple[int, str]]]]] = deque()
    with contextlib.ExitStack() as last:
        last.callback(pool.shutdown, wait=True, cancel_futures=True)
        last.callback(stop.set)  # before it
        for first in range(0, len(packed), PART):
            waiting.append(pool.submit(fill, range(first, min(first + PART, len(packed)))))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
