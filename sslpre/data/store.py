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

from sslpre.data import BadImage, Source, room, shared
from sslpre.data.cache import Form, NotPossible, file_of, form_of, in_cache, path_of
from sslpre.data.decode import to_canvas
from sslpre.data.packed import Packed, Write, opened
from sslpre.data.room import amount
from sslpre.data.rows import InMemory, InRam, OnDevice, Size, Store
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
    spare: int | None = None,
    join: str = "",
    say: Callable[[str], None] | None = None,
) -> tuple[Store | None, str]:
    """The store for a run on `source`, and one line for people: where, how large, why not a better place.

    wanted: one of KINDS, or the path of a packed file. "auto" takes the GPU where the images fill at most a quarter of
    its memory and what is to `spare` of it, else RAM up to half of what is free, else a file in the cache up to half of
    the free disk, else none. reuse: will images be read more than once? If not, "auto" stores nothing, and only reads a
    file that is there.

    share: processes of this run on this machine. One of them opens its store first, with write=True; where that store
    has a `.join`, the others hand it in and get the same memory, else each holds its own copy in RAM. write: may the
    file be written? "with": beside the first process, whose store `.writes`. A store in memory takes what it can from
    the file, and writes nothing there. spare: bytes of the GPU's memory that "auto" may take; None: what is free there.

    Raises SslpreError: exit 3 where the store that was asked for is not possible here, 6 where the file that was named
    holds something else. `say` prints a line when storing ends early, by default on stderr.
    """
    device, form, why_not = torch.device(device), form_of(source, side), ""
    if wanted == "off":
        return None, "off"
    if wanted not in KINDS:
        return _named(Path(wanted), form, write, say, source.where)
    auto = wanted == "auto"
    if auto and not reuse:
        return _read_once(form)
    if wanted == "device" and device.type != "cuda":
        raise SslpreError("`--store device` is for CUDA, which is not used here", "--store ram", 3)
    kinds = [kind for kind in KINDS[1:4] if kind != "device" or device.type == "cuda"] if auto else [wanted]
    if join:
        kinds = ["ram", *(kind for kind in kinds if kind != "ram")]  # what the first process of this machine took
    for kind in kinds:
        try:
            if kind == "disk":
                packed = opened(path_of(form), form, write=write, make=True, replace=True, say=say)
                return packed, _line(packed, packed, write) + RID + _siblings(form, packed) + why_not
            with _let_go(_behind(form)) as behind:
                if kind == "device":
                    store: InMemory = _on_device(form, device, auto, spare, behind)
                else:
                    store = _in_ram(form, share, auto, behind, write is True, join, say)
            return store, _line(store, behind, write) + _siblings(form, behind) + why_not
        except NotPossible as error:
            if not auto:
                hint = "--store auto, which takes what is possible, or --store off"
                raise SslpreError(f"`--store {wanted}` is not possible: {error}", hint, 3) from error
            why_not += f"; not {PLACES[kind]}: {error}"
    return None, "off" + _siblings(form, None) + why_not


PLACES = {"device": "on the GPU", "ram": "in RAM", "disk": "on disk"}
RID = "; it may be deleted when no run uses it"


def _read_once(form: Form) -> tuple[Packed | None, str]:
    found = _behind(form)
    return (None, "off: every image is read once") if found is None else (found, _line(found, found, False) + RID)


def _named(path: Path, form: Form, write: Write, say: Callable[[str], None] | None, images: str) -> tuple[Store, str]:
    try:
        packed = opened(path, form, write=write, say=say)
    except NotPossible as error:
        if error.other:
            hint = f"--store auto, or pack `{images}` again into another file"
            raise SslpreError(str(error), hint, 6) from error
        hint = f"--store {', '.join(KINDS)}, or the name of a file that `sslpre pack` made"
        raise SslpreError(str(error), hint, 3) from error
    return packed, _line(packed, packed, write)


def _behind(form: Form) -> Packed | None:
    """The cache's file of these images, to read what is in it; None where there is none that can be used."""
    try:
        packed = opened(path_of(form), form, write=False)
    except NotPossible:  # then everything is decoded: nothing was asked of the file
        return None
    if packed.held:
        return packed
    packed.close()
    return None


def _on_device(form: Form, device: torch.device, auto: bool, spare: int | None, behind: Packed | None) -> OnDevice:
    needed, whole = form.images * form.row, torch.cuda.get_device_properties(device).total_memory
    if auto:
        least = torch.cuda.mem_get_info(device)[0] if spare is None else spare
        if needed > whole / 4:
            raise NotPossible(f"{amount(needed)} is more than a quarter of its {amount(whole)}")
        if spare == 0:
            raise NotPossible("it was not there when the size of the parts was chosen")
        if needed > least:
            raise NotPossible(f"{amount(needed)} is more than the {amount(least)} of its {amount(whole)} to spare")
    try:
        return OnDevice(form.images, form.side, device, behind)
    except torch.OutOfMemoryError as error:
        raise NotPossible(f"{amount(needed)} is more than what is free of its {amount(whole)}") from error


def _in_ram(
    form: Form,
    share: int,
    auto: bool,
    behind: Packed | None,
    leads: bool,
    join: str,
    say: Callable[[str], None] | None,
) -> InRam:
    """Memory of this process alone; of several on a machine the first makes it for all, and the others `join` it."""
    size, told = InRam.extent(form.images, form.side), "the system does not give"
    if join:
        try:
            return InRam(form.images, form.side, behind, shared.joined(join, size, form.key), say)
        except OSError as error:
            told = f"the memory of the first process is out of reach ({error}), and the system does not give"
    together = share > 1 and leads and shared.POSSIBLE
    copies = 1 if together else share
    needed, free = form.images * form.row * copies, room.memory()
    times = f"{copies} x {amount(form.images * form.row)}" if copies > 1 else amount(needed)
    if free is None and auto:
        raise NotPossible("this system does not say how much memory is free")
    if free is not None and needed > (free / 2 if auto else free):
        raise NotPossible(f"{times} is more than {'half of ' if auto else ''}the free memory ({amount(free)})")
    try:
        memory = shared.made(size, form.key) if together else None
        return InRam(form.images, form.side, behind, memory, say)
    except (MemoryError, OSError) as error:
        raise NotPossible(f"{told} {amount(form.images * form.row)} to one process") from error


@contextlib.contextmanager
def _let_go(file: Packed | None) -> Iterator[Packed | None]:
    """The file, closed where nothing comes of the store before it."""
    try:
        yield file
    except BaseException:
        if file is not None:
            file.close()
        raise


def _line(store: Store, file: Packed | None, write: Write) -> str:
    line = f"{PLACES[store.kind]}, {amount(store.bytes)}" + (", once for all processes here" if store.join else "")
    if file is None:
        return line
    line += f", `{file.path}`" if file is store else f", read from `{file.path}`"
    held = file.held
    line += f": {held:,} of {len(file):,} images are there" if held < len(file) else ": every image is there"
    if file is store and write and not file.writes and held < len(file):
        line += "; it is only read, another process writes it or it may not be written"
    return line


def _siblings(form: Form, file: Packed | None) -> str:
    """Whether the cache has these images in another form, where nothing is there in this one."""
    if file is not None and file.held:
        return ""
    for other in in_cache():
        if other.written != form.written or other == form or (there := _behind(other)) is None:
            continue
        there.close()
        if other.side != form.side:
            return f"; a file of these images at {other.side} px is there, this run wants {form.side}"
        return f"; a file of these images decoded by {other.decoder} is there, here it is {form.decoder}"
    return ""


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
    form, hint = form_of(source, side), "name a file: sslpre pack IMAGES OUT"
    if path is not None:
        hint = "name another file, or a disk with room"
    try:
        place = path or path_of(form)
        packed = opened(place, form, write=True, make=True, replace=path is None)
    except NotPossible as error:
        raise SslpreError(str(error), hint, 6 if error.other else 3) from error
    packed.say = lambda line: None  # what ends the writing is the error below
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
            if packed.why_not:
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
