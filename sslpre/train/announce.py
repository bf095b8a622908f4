"""The first lines of a run: every choice, which of them were ours, and how long it will take."""

from __future__ import annotations

import contextlib
import math
import os
import time

from sslpre.data import BadImage
from sslpre.data.decode import to_canvas
from sslpre.data.find import Found
from sslpre.data.headers import jpegs, mixed
from sslpre.data.stream import Stream
from sslpre.ops import ranks
from sslpre.recipe import Recipe
from sslpre.start import Start, say_loaded
from sslpre.train import device
from sslpre.train.loop import Run
from sslpre.train.memory import norms, ran_out, release
from sslpre.train.progress import duration, say
from sslpre.train.step import rehearse

PATIENCE = 2 * 3600  # seconds on a CPU above which a shorter run is proposed
GRACE = 30.0  # seconds that torchrun gives between SIGTERM and SIGKILL


def announce(run: Run, wanted: Recipe, found: Found, tried: float, begun: Start | None, kept: str) -> None:
    """Print what `run` is made of on stderr.

    wanted: the recipe before its autos; tried: seconds of a first step; begun: the weights that it starts from; kept:
    where its decoded images are stored.
    """
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
    if one_more := mixed(found.train):
        say(f"           {one_more}; --set views.0.gray=1 takes the colour away")
    built = f" as {network.architecture}" if network.architecture != recipe.encoder.backbone else ""
    say(
        f"encoder    {shown('encoder', 'backbone')}{built}, {weights:.2f} M weights, "
        f"at {shown('encoder', 'image_size')} px"
    )
    if begun is not None:
        say(say_loaded(network, begun))
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
        f"device     {device.label(run.device)}, {shown('train', 'precision')}, {run.stream.workers} decoding threads, "
        f"views {run.facts['views']}"
    )
    say(f"store      {kept}")
    by = "simplejpeg" if "simplejpeg" in run.facts["decoder"] else "Pillow; pip install 'sslpre[fast]' is faster"
    say(f"           images at {shown('data', 'store_size')} px" + (f", JPEGs by {by}" if jpegs(found.train) else ""))
    if run.part:
        note = "; batch normalisation sees these alone" if norms(network) else ""
        each = f" in each of {run.stream.world} processes" if run.stream.world > 1 else ""
        say(f"memory     {run.part} of {run.stream.batch_size // run.stream.world} images at a time{each}{note}")
    if run.stream.world > 1:
        say(f"processes  {run.stream.world}, {run.stream.batch_size // run.stream.world} images of each batch in each")
    left_alone = ", ".join(f"{count:,} {kind}" for kind, count in sorted(found.skipped.items()))
    if left_alone:
        say(f"left alone {left_alone}")
    spent = a_step(run, tried)
    seconds = expected(run, spent)
    say(f"run        {run.folder}, about {duration(seconds)}")
    if run.device.type == "cpu" and seconds > PATIENCE:
        say(f"hint: that is long for a CPU; {shorter(recipe, seconds)}")
    say_if_slow(spent)


def say_if_slow(step: float) -> None:
    """A step of so many seconds may not be at its end when torchrun kills what it has asked to stop."""
    if "TORCHELASTIC_RUN_ID" in os.environ and step > GRACE / 2:
        say(
            f"warning: a step takes {duration(step)}, and torchrun kills what lives {GRACE:.0f} s after SIGTERM; "
            "being stopped may cost the work since the last checkpoint; --set train.checkpoint_minutes=1 keeps it small"
        )


def shorter(recipe: Recipe, seconds: float) -> str:
    """What to type for a run of about two hours; where one epoch takes longer, for a lighter network."""
    epochs = int(recipe.train.epochs)
    fewer = int(epochs * PATIENCE / seconds)
    if fewer >= 1:
        return f"for about {duration(seconds * fewer / epochs)} type the same with --epochs {fewer}"
    if (recipe.encoder.backbone, recipe.encoder.image_size) != ("test_resnet", 32):
        return "one epoch alone takes longer; type the same with --backbone test_resnet --image-size 32 --epochs 1"
    return "one epoch alone takes longer; train on a part of the images"


def a_step(run: Run, tried: float) -> float:
    """Seconds of a step, rehearsed with a copy of the objective. tried: what the first one took."""
    batch = run.stream.batch_size // run.stream.world
    return min([tried, *again(run, batch)] if tried < 1 else [tried])  # the first one also warms up memory and kernels


def expected(run: Run, learned: float) -> float:
    """Seconds the run will take. learned: those of a step."""
    stream = run.stream
    decoded = stream.batch_size // stream.world * decoding(stream)
    left = anew = run.steps - run.step
    if stream.store is not None:  # each image is decoded once
        anew = min(left, math.ceil((len(stream.source) - stream.store.near) / stream.batch_size))
    return (left - anew) * learned + anew * (learned + decoded if run.device.type == "cpu" else max(learned, decoded))


def again(run: Run, batch: int) -> list[float]:
    """Two more rehearsals, in seconds, because another program may have had the core; fewer where memory is short."""
    times: list[float] = []
    try:
        with run.stream.peek() as pixels, ranks.alone():
            for _ in range(2):
                times.append(rehearse(run, pixels, run.part or batch))
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    release()
    return times


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
