"""sslpre's side of the comparisons, asked as the peers are, and parts that the other scripts share.

`python ours.py loader|step --images DIR --size S --batch B --workers W` waits on stdin for requests (see turns.py).
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import turns
from ledger import versions
from torch import Tensor

from sslpre import recipe as recipes
from sslpre.data import Source
from sslpre.data.find import Found, find
from sslpre.data.headers import short_side
from sslpre.data.store import Store, open_store
from sslpre.data.stream import BadList, Pixels, Stream
from sslpre.probe import centres, labelled
from sslpre.probe.features import extract, layout
from sslpre.probe.knn import predict
from sslpre.recipe import Recipe, View
from sslpre.train import device, memory, plan
from sslpre.train.build import build
from sslpre.train.loop import Run
from sslpre.train.step import take_step
from sslpre.views.build import Views, compiler

PACKAGES = ("sslpre", "torch", "torchvision", "timm", "kornia", "pillow", "numpy")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
CPU = torch.device("cpu")


def paper_view(size: int, copies: int = 2) -> View:
    """SimCLR's view for ImageNet; like the peers' without blur up to 64 px."""
    blur = 0.5 if size > 64 else 0.0
    strong: dict[str, Any] = dict(
        jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, gray=0.2, blur=blur
    )
    return View(copies=copies, size=size, **strong)


def workers() -> int:
    """Decoding threads as many as cores that this process may use, at most 16, as `pretrain` takes."""
    return min(16, len(os.sched_getaffinity(0)))


def resolved(name: str, found: Found, where: torch.device, settings: tuple[str, ...]) -> Recipe:
    """The recipe with these `--set` settings and every `auto` replaced, as `pretrain` does it."""
    recipe = recipes.load(name, settings)
    return plan.resolve(recipe, len(found.train), short_side(found.train), device.facts(where))


def run_of(folder: Path, recipe: Recipe, found: Found, where: torch.device, wanted: str, eager: bool = False) -> Run:
    """A run in `folder` with a store of the `wanted` kind, empty yet; its views compiled where `pretrain` would do so.

    eager: compile them in no case.
    """
    run = build(folder, recipe, found, where, workers())
    if eager:
        assert recipe.encoder.image_size != "auto"
        run.views = Views(recipe.views, recipe.encoder.image_size, recipe.train.seed)
    give_store(run, folder, wanted)
    run.objective.train()
    return run


def give_store(run: Run, folder: Path, wanted: str) -> None:
    """Let the run read its images through an empty store from now on."""
    old = run.stream
    store = stored(folder, wanted, old.source, old.side, old.device)
    parts: dict[str, Any] = dict(side=old.side, batch_size=old.batch_size, seed=old.seed, workers=old.workers)
    run.stream = Stream(old.source, **parts, device=old.device, bad=old.bad, store=store)


def touched(size: int) -> None:
    """Take so many bytes from the system, write to every page of them, and give them back; and all else that is free.

    In a virtual machine the first touch of memory that it has not given out before takes far longer than any later one:
    that is the machine's time, not the loader's. What comes next is taken from the system anew, as at a run's start.
    """
    with mmap.mmap(-1, size) as fresh:
        for at in range(0, size, mmap.PAGESIZE):
            fresh[at] = 1
    memory.release()


def stored(folder: Path, wanted: str, source: Source, side: int, where: torch.device) -> Store:
    """An empty store as of `pretrain --store`, its file below `folder`. Raises SystemExit where it has no room."""
    # a folder for each: a store in memory takes what it finds in the cache's file, and would not be empty
    os.environ["SSLPRE_CACHE"] = str(folder / wanted)
    store, told = open_store(wanted, source, side, where, reuse=True)
    if store is None or store.kind != wanted:
        raise SystemExit(f"no store `{wanted}` here: {told}")
    return store


def fill(stream: Stream) -> None:
    """Decode every image into the stream's store."""
    for _ in stream.in_order():
        continue


def epochs(stream: Stream, first: int = 0) -> Generator[Pixels, None, None]:
    """Batches without end, from epoch `first` on."""
    return stream.steps(first * stream.steps_per_epoch, 2**40)


def steps(run: Run, batches: Iterator[Pixels]) -> Iterator[int]:
    """Train on one batch after the other, as the loop does; the number of images of each."""
    for pixels in batches:
        take_step(run, pixels, run.step // run.stream.steps_per_epoch)
        yield len(pixels.index)


def knn(run: Run, found: Found, votes: dict[int, float]) -> dict[str, float]:
    """Test accuracy of the encoder's output by k nearest neighbours; votes: k → temperature."""
    data = labelled(found.train, found.test, 0)
    encoder = run.objective.encoder
    assert run.recipe.data.store_size != "auto"
    parts = centres(data, encoder.image_size, run.recipe.data.store_size, run.device, workers(), 0.01)
    rows = layout(encoder.eval())
    wanted = [(encoder, (len(rows.names) - 1,))]
    train, test = (extract(wanted, rows, part)[0][0][0] for part in parts)
    labels, truth = (
        torch.from_numpy(own)[part.index].to(run.device)
        for own, part in zip((data.train_labels, data.test_labels), parts, strict=True)
    )
    return {
        f"knn{k}": (predict(train, labels, test, len(data.classes), k, warmth) == truth).double().mean().item()
        for k, warmth in votes.items()
    }


class Loader:
    """Two views of every photo, from files or from a store, as far as a uint8 batch or as far as finished views."""

    def __init__(self, folder: Path, images: Path, size: int, batch: int, threads: int, least: float):
        self.folder = folder
        self.source = find(images).train
        self.size, self.batch, self.threads, self.least = size, batch, threads, least
        self.side = plan.store_side(size, short_side(self.source))
        self.views = {"eager": Views([paper_view(size)], size, seed=0), "compiled": Views([paper_view(size)], size, 0)}
        self.compiler = compiler(CPU) if self.views["eager"].saves(CPU, batch) > 0 else None
        if self.compiler is not None:
            self.views["compiled"].compile(self.compiler)
        self.full = cache(self._full)

    def stream(self, store: Store) -> Stream:
        bad = BadList(None, 0.0, len(self.source))
        parts: dict[str, Any] = dict(
            side=self.side, batch_size=self.batch, seed=0, workers=self.threads, device=CPU, bad=bad
        )
        return Stream(self.source, **parts, store=store)

    def _full(self, kind: str) -> Stream:
        stream = self.stream(stored(self.folder, kind, self.source, self.side, CPU))
        fill(stream)
        return stream

    def answer(self, what: str, count: int) -> dict[str, Any]:
        """what: `first|later` `ram|disk` `pixels|eager|compiled`."""
        epoch, kind, until = what.split()
        with contextlib.ExitStack() as after:
            if epoch == "first":
                if kind == "ram":
                    touched(len(self.source) * 3 * self.side**2)
                empty = stored(self.folder, kind, self.source, self.side, CPU)
                after.callback(empty.close)
                stream = self.stream(empty)
                if stream.steps_per_epoch < count + 2:
                    raise SystemExit(f"{len(self.source)} images are too few for {count + 2} batches of {self.batch}")
            else:
                stream = self.full(kind)
            batches = after.enter_context(contextlib.closing(epochs(stream, int(epoch == "later"))))
            made = (self.finished(some, until) for some in batches)
            took, last = turns.window(made, 2, count, self.least if epoch == "later" else 0.0)
        return {**took, "images": took["batches"] * self.batch, "shapes": [list(one.shape) for one in last]}

    def finished(self, some: Pixels, until: str) -> list[Tensor]:
        """The batch itself, or its views, standardised as the peers' are."""
        if until == "pixels":
            return [some.pixels]
        views = self.views[until](some.pixels, some.size, some.index, 0)
        return [view.sub_(MEAN[:, None, None]).div_(STD[:, None, None]) for view in views]


def serve_loader(folder: Path, arguments: argparse.Namespace) -> None:
    parts = (arguments.size, arguments.batch, arguments.workers, arguments.least)
    loader = Loader(folder, arguments.images, *parts)
    told = {"name": "sslpre", "versions": versions(PACKAGES), "side": loader.side, "compiler": loader.compiler}
    turns.serve(told, loader.answer)


def serve_step(folder: Path, arguments: argparse.Namespace) -> None:
    """Our own `simclr` recipe with a ResNet-18, all else `auto`; or with the views of the peers' example (`alike`)."""
    found = find(arguments.images)
    typed = ("encoder.backbone=resnet18", f"encoder.image_size={arguments.size}", f"train.batch_size={arguments.batch}")

    @cache
    def run(precision: str, recipe_views: str) -> Run:
        recipe = resolved("simclr", found, CPU, (*typed, f"train.precision={precision}"))
        if recipe_views == "alike":
            recipe = recipe.model_copy(update={"views": (paper_view(arguments.size),)})
        return run_of(folder, recipe, found, CPU, "ram", arguments.eager)

    @cache
    def later(precision: str, recipe_views: str) -> Iterator[int]:
        """Steps without end from a full store; the same ones go on in every round, as the peers' do."""
        this = run(precision, recipe_views)
        fill(this.stream)
        return steps(this, epochs(this.stream))

    def answer(what: str, count: int) -> dict[str, Any]:
        """what: `bf16|fp32` `ours|alike` `first|later`, the views and the epoch in which the steps are taken."""
        *kind, epoch = what.split()
        this, warm = run(*kind), warmup(arguments.workers)
        with contextlib.ExitStack() as after:
            if epoch == "first":
                if this.stream.steps_per_epoch < warm + count:
                    raise SystemExit(f"{len(found.train)} images are too few for {warm + count} steps")
                full = this.stream
                after.callback(setattr, this, "stream", full)  # the later epochs' again
                touched(len(found.train) * 3 * full.side**2)
                give_store(this, folder, "ram")
                after.callback(this.stream.store.close)
                made = steps(this, after.enter_context(contextlib.closing(epochs(this.stream))))
            else:
                made = later(*kind)
            took, _ = turns.window(made, warm, count)
        loss = (this.sums["loss"] / this.summed).item()
        return {**took, "images": count * arguments.batch, "loss": loss, "views": this.views.made}

    auto = "bf16" if device.facts(CPU).bf16 else "fp32"
    turns.serve({"name": "sslpre", "versions": versions(PACKAGES), "auto": auto}, answer)


def warmup(workers: int) -> int:
    """Steps before a window of time: the first one, and what loading processes have made ahead in between."""
    return 1 + turns.AHEAD * workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds: dict[str, Callable[[Path, argparse.Namespace], None]] = {"loader": serve_loader, "step": serve_step}
    parser.add_argument("kind", choices=[*kinds])
    parser.add_argument("--images", type=Path, required=True)
    for name in ("--size", "--batch", "--workers"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--least", type=float, default=0.0, help="seconds that a window of later epochs takes at least")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    arguments = parser.parse_args()
    memory.keep_freed()  # as `pretrain` begins
    torch.set_num_threads(arguments.workers)
    with tempfile.TemporaryDirectory() as folder:
        kinds[arguments.kind](Path(folder), arguments)


if __name__ == "__main__":
    main()
