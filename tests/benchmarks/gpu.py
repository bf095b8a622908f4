"""What a GPU reaches: whole training steps with views, loss and optimiser, and what they cost; one table, and JSON.

    python tests/benchmarks/gpu.py --json gpu.json                    the steps, and the views alone against kornia
    python tests/benchmarks/gpu.py --cifar DIR --only cifar           CIFAR-10: 200 epochs of SimCLR, then kNN

DIR has train/CLASS/* and test/CLASS/*. All else is made up: distinct random images that nobody decodes, so the first
epoch is not measured here. `--toy` runs all of it with tiny networks on a CPU: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import ledger
import numpy as np
import ours
import torch
import turns
import views as alone

from sslpre.data.find import Found, find
from sslpre.probe.knn import TEMPERATURE, K
from sslpre.train import device, loop, memory
from sslpre.train.loop import Run

SHARE = 0.1  # of a step of the last work, that its views may take
VOTES = {K: TEMPERATURE, 200: 0.1}  # ours, and what lightly's published 84.8 % used
CIFAR = ("train.epochs=200", "optim.warmup=0.05")  # of the recipe simclr-cifar, which is made for 1,000 epochs
PARTS = ("steps", "views", "cifar")
COLUMNS = {
    "views": "views",
    "batch": "batch",
    "images_per_s": "images/s",
    "promised": "promised",
    "step_ms": "step ms",
    "views_ms": "views ms",
    "views_share": "share",
    "peak_gib": "peak GiB",
    "loss": "loss",
}


@dataclass(frozen=True)
class Work:
    """One row: a recipe with settings at so many pixels; `images` of `canvas` px lie in the store."""

    name: str
    recipe: str
    backbone: str
    size: int
    canvas: int
    batch: int
    images: int
    promised: float  # images/s on an H200
    settings: tuple[str, ...] = ()
    share: float | None = None  # of a step, that views may take
    both: bool = False  # measured with eager views too

    def typed(self, compiled: bool) -> tuple[str, ...]:
        sizes = (f"encoder.image_size={self.size}", f"data.store_size={self.canvas}", f"train.batch_size={self.batch}")
        network = (f"encoder.backbone={self.backbone}", f"train.compile={str(compiled).lower()}")
        return (*sizes, *network, "train.epochs=1000", *self.settings)


ADAMW = ("optim.name=adamw", "optim.lr=0.001")
WORKS = (
    Work("SimCLR ResNet-18 @32", "simclr-cifar", "resnet18", 32, 32, 1024, 50_000, 25_000, both=True),
    Work("SimCLR ResNet-50 @224", "simclr-imagenet", "resnet50", 224, 448, 512, 4096, 2500, ("optim.lr=0.6",)),
    Work(
        "two views ViT-S/16 @224", "simclr-imagenet", "vit_small_patch16_224", 224, 448, 512, 4096, 3000, ADAMW, SHARE
    ),
)
SMALL = (
    replace(
        WORKS[0], name="toy ResNet @32", backbone="test_resnet", batch=8, images=64, settings=("encoder.stem=auto",)
    ),
    replace(WORKS[2], name="toy ViT @32", backbone="test_vit", size=32, canvas=48, batch=8, images=32),
)


class Noise:
    """A Source of so many random square images, each another one, that take no time to decode."""

    def __init__(self, count: int, side: int):
        self.where = f"{count:,} random images of {side} px"
        self.classes: list[str] = []
        self.labels = np.full(count, -1)
        self.fingerprint = self.written = f"{count:08x}{side:08x}"
        self._side = side
        self._pixels = np.random.default_rng(0).integers(0, 256, (2 * side, 2 * side, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        return f"{i}"

    def read(self, i: int, side: int | None = None) -> np.ndarray:
        top, left = i % self._side, i // self._side % self._side
        return self._pixels[top : top + self._side, left : left + self._side].copy()

    def size(self, i: int) -> tuple[int, int]:
        return self._side, self._side

    def grey(self, i: int) -> bool:
        return False


@contextlib.contextmanager
def begun(work: Work, compiled: bool, where: torch.device, eager: bool) -> Iterator[Run]:
    """A run whose store is full. What the one before it held is given back first, so that each peak is its own."""
    gc.collect()
    torch._dynamo.reset()
    if where.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(where)
    found = Found(Noise(work.images, work.canvas), None, {}, "")
    with tempfile.TemporaryDirectory() as folder:
        recipe = ours.resolved(work.recipe, found, where, work.typed(compiled))
        run = ours.run_of(Path(folder), recipe, found, where, "device" if where.type == "cuda" else "ram", eager)
        ours.fill(run.stream)
        yield run
        run.stream.store.close()


def whole_step(
    work: Work, compiled: bool, where: torch.device, arguments: argparse.Namespace, eager: bool
) -> dict[str, Any]:
    """Windows of training steps and of as many times the views alone, in turns. compiled: the network; eager: views."""
    count, rounds = arguments.count, arguments.rounds
    with begun(work, compiled, where, eager) as run:
        with contextlib.closing(ours.epochs(run.stream)) as batches:
            pixels = next(batches)
            trained = ours.steps(run, batches)
            looked = (run.views(pixels.pixels, pixels.size, pixels.index, epoch) for epoch in range(2**40))
            started = time.perf_counter()
            for _ in islice(zip(looked, trained, strict=False), 3):  # compiles, tunes, fills the allocator
                alone.finish(where)
            started = time.perf_counter() - started
            calls = {"step": partial(seconds, trained, count, where), "views": partial(seconds, looked, count, where)}
            took = {name: turns.median(given) for name, given in turns.in_turn(calls, rounds).items()}
            loss = (run.sums["loss"] / run.summed).item()
        peak = torch.cuda.max_memory_allocated(where) / 2**30 if where.type == "cuda" else None
        return {
            "name": work.name,
            "batch": work.batch,
            "network_compiled": compiled,
            "precision": run.recipe.train.precision,
            "images_per_s": work.batch / took["step"],
            "promised": work.promised,
            "step_ms": 1000 * took["step"],
            "views_ms": 1000 * took["views"],
            "views_share": took["views"] / took["step"],
            "peak_gib": peak,
            "store": f"{run.stream.store.where}, {run.stream.store.bytes / 2**20:,.0f} MiB",
            "warmup_s": started,
            "views": run.views.made,
            "graphs": run.views.graphs,
            "loss": loss,
        }


def seconds(work: Iterator[Any], count: int, where: torch.device) -> float:
    """Seconds for one of `count` items, the device idle before and after."""
    alone.finish(where)
    started = time.perf_counter()
    for _ in islice(work, count):
        continue
    alone.finish(where)
    return (time.perf_counter() - started) / count


def cifar(images: Path, settings: tuple[str, ...], where: torch.device, eager: bool) -> dict[str, Any]:
    """From the folder of images to kNN accuracy, all in between on the clock: scan, decoding, compiling, probe."""
    started = time.monotonic()
    found = find(images)
    if found.test is None:
        raise SystemExit(f"{images} has no test/ beside train/")
    with tempfile.TemporaryDirectory() as folder:
        recipe = ours.resolved("simclr-cifar", found, where, settings)
        run = ours.run_of(Path(folder), recipe, found, where, "device" if where.type == "cuda" else "ram", eager)
        figures = loop.train(run)
        trained = time.monotonic() - started
        known = ours.knn(run, found, VOTES)
    return {
        "images": len(found.train),
        "epochs": recipe.train.epochs,
        "settings": list(settings),
        "minutes": (time.monotonic() - started) / 60,
        "minutes_training": trained / 60,
        "images_per_s": figures["images_per_s"],
        "waiting": figures["waiting"],
        **known,
    }


def targets(measured: dict[str, Any], works: tuple[Work, ...]) -> list[dict[str, Any]]:
    """Every promise of which something was measured, by the fastest way of ours: what was found, is it kept?"""
    found = []

    def held(what: str, number: float, least: float | None = None, most: float | None = None) -> None:
        met = number >= least if least is not None else most is not None and number <= most
        promised = f"≥ {least:,g}" if least is not None else f"≤ {most:,g}"
        found.append(dict(target=what, found=number, promised=promised, met=met))

    for work in works:
        rows = [one for one in measured["steps"] if one["name"] == work.name]
        if rows:
            best = max(rows, key=lambda one: one["images_per_s"])
            held(f"{work.name}, images/s", best["images_per_s"], least=work.promised)
            if work.share is not None:
                held(f"{work.name}, share of its views", best["views_share"], most=work.share)
    for one in measured["views"]:
        for how, least in one["promised"].items():
            if least is not None:
                what = f"views {how} at {one['size']} px, times as fast as {one['fastest_other']}"
                held(what, one["ratios"][how], least=least)
    if "cifar" in measured:
        held("CIFAR-10, kNN accuracy (k = 200)", measured["cifar"]["knn200"], least=0.84)
        held("CIFAR-10, minutes from the folder to kNN", measured["cifar"]["minutes"], most=10)
    return found


def show_targets(found: list[dict[str, Any]]) -> None:
    ledger.show(
        "promised",
        ("", "found", "promised", ""),
        ((one["target"], one["found"], one["promised"], "met" if one["met"] else "missed") for one in found),
    )


def show_steps(rows: list[dict[str, Any]]) -> None:
    ledger.show(
        "whole steps",
        ("", "network", *COLUMNS.values()),
        (
            (one["name"], "compiled" if one["network_compiled"] else "eager", *(one[key] for key in COLUMNS))
            for one in rows
        ),
    )


def show_cifar(one: dict[str, Any]) -> None:
    kinds = [key for key in one if key.startswith("knn")]
    ledger.show(
        f"CIFAR-10 SimCLR, {one['epochs']} epochs of {one['images']:,} images",
        ("", "minutes", "images/s", *kinds),
        [
            (
                "from the folder to kNN",
                one["minutes"],
                one["images_per_s"],
                *(f"{100 * one[key]:.2f} %" for key in kinds),
            )
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be said twice; default: all")
    parser.add_argument("--cifar", type=Path, metavar="DIR", help="without it that part is left out")
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value", help="of the CIFAR-10 run")
    parser.add_argument("--eager", action="store_true", help="compile neither views nor networks")
    parser.add_argument("--count", type=int, default=20, help="steps in one window of time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    memory.keep_freed()
    where = torch.device("cpu") if arguments.toy else device.pick("cuda")
    works, sizes = (SMALL, (32,)) if arguments.toy else (WORKS, (32, 96, 224))
    parts = arguments.only or PARTS
    measured: dict[str, Any] = {"toy": arguments.toy, "count": arguments.count, "rounds": arguments.rounds}
    measured["steps"] = []
    for work in works if "steps" in parts else ():
        kinds = [(False, arguments.eager)]
        if not (arguments.toy or arguments.eager):
            kinds += [(True, False), *([(False, True), (True, True)] if work.both else [])]
        for compiled, eager in kinds:
            measured["steps"].append(whole_step(work, compiled, where, arguments, eager))
            ledger.write(arguments.json, ledger.record("gpu", measured, ours.PACKAGES))
    if measured["steps"]:
        show_steps(measured["steps"])
    measured["views"] = []
    for size in sizes if "views" in parts else ():
        batch = 8 if arguments.toy else 256
        found = alone.measure(size, alone.CANVASES[size][-1], batch, where, arguments.rounds, arguments.eager)
        measured["views"].append(found)
        alone.show(found, where)
        ledger.write(arguments.json, ledger.record("gpu", measured, ours.PACKAGES))
    if "cifar" in parts and arguments.cifar is not None:
        measured["cifar"] = cifar(arguments.cifar, (*CIFAR, *arguments.set), where, arguments.eager)
        show_cifar(measured["cifar"])
    measured["targets"] = targets(measured, works)
    show_targets(measured["targets"])
    ledger.write(arguments.json, ledger.record("gpu", measured, ours.PACKAGES))


if __name__ == "__main__":
    main()
