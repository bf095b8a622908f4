"""The first lines of a run: every choice, which of them were ours, and how long it will take."""

from __future__ import annotations

import contextlib
import copy
import os
import time

import torch

from sslpre.data import BadImage
from sslpre.data.decode import to_canvas
from sslpre.data.find import Found
from sslpre.data.stream import Pixels, Stream
from sslpre.recipe import Recipe
from sslpre.train import device
from sslpre.train.loop import Run
from sslpre.train.progress import duration, say

PATIENCE = 2 * 3600  # seconds on a CPU above which a shorter run is proposed


def announce(run: Run, wanted: Recipe, found: Found) -> None:
    """Print what `run` is made of on stderr. wanted: the recipe before its autos were resolved."""
    recipe, table = run.recipe, run.recipe.train

    def shown(group: str, key: str) -> str:
        ours = getattr(getattr(wanted, group), key) == "auto"
        return f"{getattr(getattr(recipe, group), key)}{' (auto)' if ours else ''}"

    network = run.objective.encoder
    weights = sum(p.numel() for p in network.parameters()) / 1e6
    left = len(found.train) - run.stream.steps_per_epoch * int(table.batch_size)
    say(f"images     {found.train.where}: {len(found.train):,} images" + (f" ({found.note})" if found.note else ""))
    if found.train.classes and recipe.data.images:
        say(f"           folder names are {'the labels' if run.objective.needs_labels else 'not used as labels'}")
    built = f" as {network.architecture}" if network.architecture != recipe.encoder.backbone else ""
    say(
        f"encoder    {shown('encoder', 'backbone')}{built}, {weights:.2f} M weights, "
        f"at {shown('encoder', 'image_size')} px"
    )
    say(
        f"batch      {shown('train', 'batch_size')}, {shown('train', 'epochs')} epochs of "
        f"{run.stream.steps_per_epoch} steps"
        + (f"; {left} images sit out each epoch, others each time" if left else "")
    )
    say(
        f"optimiser  {recipe.optim.name}, lr {shown('optim', 'lr')}, weight decay {recipe.optim.weight_decay:g}, "
        f"seed {table.seed}"
    )
    say(
        f"device     {device.label(run.device)}, {shown('train', 'precision')}, {run.stream.workers} decoding threads; "
        f"images kept at {shown('data', 'store_size')} px"
    )
    left_alone = ", ".join(f"{count:,} {kind}" for kind, count in sorted(found.skipped.items()))
    if left_alone:
        say(f"left alone {left_alone}")
    seconds = expected(run)
    say(f"run        {run.folder}, about {duration(seconds)}")
    if run.device.type == "cpu" and seconds > PATIENCE:
        say(f"hint: that is long for a CPU; {shorter(recipe, seconds)}")


def shorter(recipe: Recipe, seconds: float) -> str:
    """What to type for a run of about two hours; where one epoch takes longer, for a lighter network."""
    epochs = int(recipe.train.epochs)
    fewer = int(epochs * PATIENCE / seconds)
    if fewer >= 1:
        return f"for about {duration(seconds * fewer / epochs)} type the same with --epochs {fewer}"
    if (recipe.encoder.backbone, recipe.encoder.image_size) != ("test_resnet", 32):
        return "one epoch alone takes longer; type the same with --backbone test_resnet --image-size 32 --epochs 1"
    return "one epoch alone takes longer; train on a part of the images"


def expected(run: Run) -> float:
    """Seconds the run will take, from a few images decoded, drawn and learned from by a copy of the encoder."""
    stream, table = run.stream, run.recipe.train
    most = min(stream.batch_size, table.micro_batch or stream.batch_size, 256)
    few = Stream(
        stream.source,
        side=stream.side,
        batch_size=most,
        seed=table.seed,
        workers=stream.workers,
        device=run.device,
        bad=stream.bad,
    )
    some = next(few.in_order())
    count, spent = 1, 0.0
    while spent < 1 and (count < len(some.index) or not spent):  # the first rounds warm up memory, kernels, threads
        count = min(4 * count, len(some.index))
        spent = learning(run, some, count)
    spent = min(spent, learning(run, some, count), learning(run, some, count))  # another program may have had the core
    learned, decoded = spent / count, decoding(stream)
    images = (run.steps - run.step) * stream.batch_size
    return images * (learned + decoded if run.device.type == "cpu" else max(learned, decoded))


def learning(run: Run, some: Pixels, count: int) -> float:
    """Seconds for views, forward and backward of the first `count` images of a batch; nothing of the run changes."""
    network = copy.deepcopy(run.objective.encoder)
    network.chunk = 0
    network.train()
    begun = time.monotonic()
    views = run.views(some.pixels[:count], some.size[:count], some.index[:count], 0)
    for side in sorted(set(run.views.sides)):  # views of one size go through together, as methods send them
        part = torch.cat([view for view in views if view.shape[-1] == side])
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.recipe.train.precision == "bf16"):
            loss = network(part.contiguous(memory_format=torch.channels_last)).float().square().mean()
        loss.backward()
        loss.item()  # waits for the device
    return time.monotonic() - begun


def decoding(stream: Stream, count: int = 8) -> float:
    """Seconds to decode one image when all threads are at it; bad images cost nothing."""
    spent = []
    for _ in range(3):  # from the second time on they come from the page cache, as mostly in training
        begun = time.monotonic()
        for i in range(min(count, len(stream.source))):
            with contextlib.suppress(BadImage):
                to_canvas(stream.source.read(i, stream.side), stream.side)
        spent.append(time.monotonic() - begun)
    return min(spent) / count / max(1, min(stream.workers, os.cpu_count() or 1))
