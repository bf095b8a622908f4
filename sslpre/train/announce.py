"""The first lines of a run: every choice, which of them were ours, and how long it will take."""

from __future__ import annotations

import copy
import time

import torch

from sslpre.data.find import Found
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
    seconds = expected(run)
    say(f"run        {run.folder}, about {duration(seconds)}")
    if run.device.type == "cpu" and seconds > PATIENCE:
        say(f"hint: that is long for a CPU; {shorter(int(table.epochs), seconds)}")


def shorter(epochs: int, seconds: float) -> str:
    """What to type for a run of about two hours, or less where one epoch takes longer."""
    fewer = max(1, int(epochs * PATIENCE / seconds))
    words = f"for about {duration(seconds * fewer / epochs)} type --epochs {fewer}"
    return words + ", or take a smaller network: --backbone test_resnet --image-size 64"


def expected(run: Run) -> float:
    """Seconds the run will take, from a few images decoded, drawn and learned from by a copy of the encoder."""
    network = copy.deepcopy(run.objective.encoder)
    network.chunk = 0
    network.train()
    begun = time.monotonic()
    some = next(run.stream.in_order())
    decoding = (time.monotonic() - begun) / len(some.index)
    sides = run.views.sides
    count, per_image = 4, 0.0
    while True:
        count = min(count, len(some.index))
        begun = time.monotonic()
        views = run.views(some.pixels[:count], some.size[:count], some.index[:count], 0)
        for side in set(sides):  # views of one size go through together, as methods send them
            part = torch.cat([view for view in views if view.shape[-1] == side])
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.recipe.train.precision == "bf16"):
                loss = network(part.contiguous(memory_format=torch.channels_last)).float().square().mean()
            loss.backward()
            loss.item()  # waits for the device
        spent = time.monotonic() - begun
        per_image = spent / count
        if spent > 1 or count == len(some.index):
            break
        count *= 4
    images = (run.steps - run.step) * len(some.index)
    return images * (per_image + decoding if run.device.type == "cpu" else max(per_image, decoding))
