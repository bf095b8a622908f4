"""`sslpre pack`: decode a folder of images once, ahead of training."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslpre import signals
from sslpre.cli.words import check_folder, flag, not_empty, number, whole
from sslpre.errors import SslpreError, printable

if TYPE_CHECKING:
    from sslpre.data import Source
    from sslpre.data.find import Found

QUIET = 10.0  # seconds between plain lines


def pack(
    images: Annotated[str, typer.Argument(metavar="IMAGES", hidden=True)],
    out: Annotated[str | None, typer.Argument(metavar="OUT", hidden=True)] = None,
    size: Annotated[str | None, flag("--size", "S", "Side they are kept at.  [as pretrain simclr]")] = None,
    workers: Annotated[str | None, flag("--workers", "N", "Decoding threads.  [one per core]")] = None,
    max_bad: Annotated[str | None, flag("--max-bad", "X", "Stop above this share of bad images.  [0.01]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON at the end.")] = False,
) -> None:
    """Decode a folder of images once, ahead of training.

    Without OUT the file lies in the cache, where `sslpre pretrain` finds it
    by itself; another place is named to it with --store OUT. What was
    interrupted goes on when the same is typed again.

    \b
      sslpre pack ./images
      sslpre pack ./images big.pack --size 448
    """
    side = whole("--size", size, 256)
    threads = whole("--workers", workers, 4)
    share = number("--max-bad", max_bad, 0.01, most=1)
    not_empty({"IMAGES": images, "OUT": out}, "sslpre pack ./images")
    if side is not None and not 8 <= side <= 4096:
        raise SslpreError(f"`--size {side}` is not from 8 to 4096", "write --size 256")
    check_folder(images)
    if out is not None and Path(out).is_dir():
        raise SslpreError(f"`{out}` is a folder", f"name a file: {shlex.quote(str(Path(out) / 'images.pack'))}")

    import json

    summary = write(images, out, side, threads or min(16, os.cpu_count() or 1), 0.01 if share is None else share)
    more = f" --set data.store_size={summary['side']}" if side is not None else ""
    kept = f" --store {shlex.quote(summary['path'])}" if out is not None else ""
    print(printable(f"next: sslpre pretrain simclr {shlex.quote(images)}{kept}{more}"), file=sys.stderr)
    if as_json:
        print(json.dumps(summary))


def write(images: str, out: str | None, side: int | None, workers: int, limit: float) -> dict[str, Any]:
    """Fill the file, and say so; gives the summary. Raises SslpreError: 3 no space, 4 no images, 20 bad, 128 + n."""
    from sslpre.data.room import amount
    from sslpre.data.store import pack as fill
    from sslpre.data.stream import BadList
    from sslpre.train.progress import Display, duration, say

    found, side, note, other = looked_at(images, side)
    source, total = found.train, len(found.train)
    place = None if out is None else Path(out)
    path = place or in_cache(source, side)
    before = already(source, side, path)
    say(f"images     {source.where}: {total:,} images" + (f" ({found.note})" if found.note else ""))
    say(f"size       {side} px{note}, {amount(total * side * side * 3)}")
    if other:
        beside = [] if place is None else [str(place.with_stem(f"{place.stem}-{other}"))]
        words = ["sslpre", "pack", images, *beside, "--size", str(other)]
        say(f"           a run on a GPU keeps them at {other} px: {printable(shlex.join(words))}")
    say(f"file       {printable(str(path))}" + (f", {before:,} images are in it already" if before else ""))
    bad, clock = BadList(None, limit, total), Clock(total, before)
    with Display(total, 0) as display:

        def progress(done: int) -> None:
            display.step(done)
            if (line := clock.seen(done)) and display.bar is None:
                say(line)

        try:
            with contextlib.closing(fill(source, side, place, workers, bad, progress)) as store:
                held, taken = store.held, store.bytes
        except KeyboardInterrupt as error:
            which = signals.number_of(error)
            command = ["sslpre", "pack", images, *([out] if out else []), *(["--size", str(side)] if not note else [])]
            message = f"{signals.words(which)}: {already(source, side, path):,} of {total:,} images are in `{path}`"
            hint = f"the same command goes on: {shlex.join(command)}"
            raise SslpreError(message, hint, signals.code(which)) from None
    seconds = clock.seconds()
    rate = (held - before) / seconds
    if held == before:
        say(f"done       all of it was there: {held:,} images, {amount(taken)}")
    else:
        say(f"done       {held:,} images, {amount(taken)}, in {duration(seconds)}: {rate:,.0f} images/s")
    if bad.count:
        say(f"           {bad.count:,} bad images are not in it; a run puts others in their place")
    return {
        "schema": 1,
        "path": str(path),
        "images": total,
        "packed": held,
        "bad_images": bad.count,
        "side": side,
        "bytes": taken,
        "seconds": seconds,
        "images_per_s": rate,
    }


class Clock:
    """How fast it goes, said every `QUIET` seconds. before: images that were there, which take next to no time."""

    def __init__(self, total: int, before: int):
        self.total, self.before = total, before
        self.begun = self.spoke = time.monotonic()

    def seconds(self) -> float:
        return max(time.monotonic() - self.begun, 1e-9)

    def seen(self, done: int) -> str:
        """A line about it, "" where one was given a short while ago."""
        from sslpre.train.progress import duration

        now = time.monotonic()
        if now - self.spoke < QUIET:
            return ""
        self.spoke = now
        rate = max(1e-9, done - self.before) / self.seconds()
        return f"image {done:,}/{self.total:,} · {rate:,.0f} images/s · {duration((self.total - done) / rate)} left"


def already(source: Source, side: int, path: Path) -> int:
    """How many of the images are in the file."""
    from sslpre.data.cache import NotPossible, form_of
    from sslpre.data.packed import opened

    try:
        with contextlib.closing(opened(path, form_of(source, side), write=False)) as packed:
            return packed.held
    except NotPossible:  # what is wrong with it is told when it is to be written
        return 0


def in_cache(source: Source, side: int) -> Path:
    """Where the file of these images is kept. Raises SslpreError (exit 3) where there is no such place."""
    from sslpre.data.cache import NotPossible, file_of

    try:
        return file_of(source, side)
    except NotPossible as error:
        raise SslpreError(str(error), "name a file: sslpre pack IMAGES OUT", 3) from error


def looked_at(images: str, side: int | None) -> tuple[Found, int, str, int | None]:
    """The images that a run would train on, the side that they are kept at, who chose it, and what a GPU would have
    chosen where there is none and that differs."""
    if side is not None:
        from sslpre.data.find import find

        return find(Path(images)), side, "", None
    from sslpre.data.headers import short_side
    from sslpre.train import device, plan
    from sslpre.train.run import Options, planned

    where = device.pick("auto")
    wanted, found, _, recipe = planned(Options("simclr", Path(images)), where)
    chosen, other = int(recipe.data.store_size), None
    if where.type != "cuda":
        gpu = device.Facts("cuda", True, 16)  # the size depends on the kind alone
        there = plan.resolve(wanted, len(found.train), short_side(found.train), gpu)
        other = int(there.data.store_size) if there.data.store_size != chosen else None
    return found, chosen, " (as `sslpre pretrain simclr` has it here)", other
