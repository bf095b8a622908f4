"""What a task shows the network, as a sheet of pictures with titles: one PNG that a person understands.

A real run is built for it, in a temporary directory that is removed again. It takes no step.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslpre import recipe as recipes
from sslpre.data.find import Found, find, subset
from sslpre.data.stream import Pixels, Stream
from sslpre.errors import SslpreError
from sslpre.methods import methods
from sslpre.objective import Batch, Objective, Picture
from sslpre.preview.sheet import draw, write
from sslpre.recipe import Recipe
from sslpre.start import Start
from sslpre.train import checkpoint, device, loop, step
from sslpre.train.build import build, load_data
from sslpre.train.run import Options, planned
from sslpre.views.build import Views

LOOK = 4096 * 64**2  # pixels of images at most, where a method looks at all of them before an epoch
GROUPED = 1024 * 64**2  # pixels of views at most, for a method that groups them
FEWEST = 256  # images, where these would be fewer
PART = 64  # images at a time for a look at all of them


@dataclass(frozen=True)
class Subject:
    """What is shown. run: with the weights that are meant; about: lines below the title, the last on the weights."""

    run: loop.Run
    title: str
    about: tuple[str, ...]
    epoch: int = 0
    progress: float = 0.0


def preview(options: Options, trained: Path | None, out: Path, rows: int) -> str:
    """Write the sheet of a recipe, or of the run `trained` where there is one; gives a line about what was written.

    options: recipe, images, settings, overrides and device, as typed; of a run only images and device count. out: a
    .png file, written whole or not at all. rows: at most so many.
    Raises SslpreError as a run would; exit 2 where `out` exists, 3 where it cannot be written, 5 for a run without a
    checkpoint, 10 where a picture is not finite.
    """
    if out.exists() or out.is_symlink():
        raise SslpreError(f"`{out}` exists", "name another OUT.png, or remove it first")
    where = device.pick(options.device)
    with tempfile.TemporaryDirectory(prefix="sslpre-preview-") as folder:
        if trained is None:
            subject = of_recipe(Path(folder), options, where)
        else:
            subject = of_run(Path(folder), trained, options.images, where)
        shown = pictures(subject, rows)
    sheet = draw(subject.title, sentence(subject.run.objective), subject.about, shown)
    write(sheet, out)
    return f"`{out}`: {counted(len(shown), 'row')}, {sheet.width} × {sheet.height} px, {subject.about[-1]}"


def of_recipe(folder: Path, options: Options, where: torch.device) -> Subject:
    """The run that `sslpre pretrain` would begin; of its images a part, where the method looks at all of them."""
    wanted, found, begun, recipe = planned(options, where)
    run = (enough if looks(recipe) else prepared)(folder, recipe, found, where, begun)
    about = [images_of(found), network_of(run)]
    if looks(recipe):
        look(run, 0)
        about += looked_at(run, found)
    stem = Path(str(options.recipe)).stem
    name = str(recipe.method["name"]) if stem == "recipe" else stem
    weights = "fresh, nothing is learned yet" if begun is None else f"those of --init {wanted.encoder.init}"
    return Subject(run, f"recipe {name}", (*about, f"weights: {weights}"))


def of_run(folder: Path, trained: Path, images: Path | None, where: torch.device) -> Subject:
    """A run as its newest checkpoint has it, on its own images or others.

    What it keeps of every image, such as its cluster, is not known of others, and is found for them anew.
    """
    recipe = recipes.load(str(trained / "recipe.toml"))
    saved = checkpoint.newest(trained)
    if saved is None:
        hint = f"sslpre pretrain --resume {shlex.quote(str(trained))}"
        raise SslpreError(f"no complete checkpoint in `{trained}`", hint, 5)
    assert recipe.train.batch_size != "auto" and recipe.train.epochs != "auto"
    taken, an_epoch = int(saved.state["step"]), int(saved.state["images"]) // recipe.train.batch_size
    found = find(images, recipe.data.max_pixels) if images is not None else load_data(recipe)
    own = found.train.fingerprint == saved.state["data"]
    anew = looks(recipe) and not (own and taken)  # before its first step a run has not looked at its images either
    run = (enough if anew else prepared)(folder, recipe, found, where)
    put(run.objective, saved.model, anew)
    about = [images_of(found) + ("" if own else ", not those of the run"), network_of(run)]
    if anew:
        look(run, 0)  # a look that begins everything: a later epoch may rest on what an earlier one found
        about += looked_at(run, found)
    steps = recipe.train.epochs * an_epoch
    weights = f"weights: step {taken:,} of {steps:,}"
    return Subject(run, f"run {trained}", (*about, weights), taken // an_epoch, taken / steps)


def prepared(folder: Path, recipe: Recipe, found: Found, where: torch.device, begun: Start | None = None) -> loop.Run:
    """The run. For a few images nothing is compiled, or computed in bf16; bad ones are named, but never too many."""
    recipe = recipe.edit(data={"max_bad": 1.0}, train={"compile": False, "micro_batch": 0, "precision": "fp32"})
    assert recipe.encoder.image_size != "auto"
    run = build(folder, recipe, found, where, start=begun)
    run.views = Views(recipe.views, recipe.encoder.image_size, recipe.train.seed)
    return run


def enough(folder: Path, recipe: Recipe, found: Found, where: torch.device, begun: Start | None = None) -> loop.Run:
    """The run on a part of its images, evenly drawn, because the method will look at all of them.

    Raises SslpreError also where the method refuses so few, such as fewer than it makes clusters.
    """
    assert recipe.encoder.image_size != "auto"
    count, whole = max(FEWEST, LOOK // recipe.encoder.image_size**2), len(found.train)
    few = replace(found, train=subset(found.train, even(whole, count))) if count < whole else found
    try:
        return prepared(folder, recipe, few, where, begun)
    except SslpreError as error:
        if few is not found:
            error.message = f"of {whole:,} images a preview takes {count:,} to look at: {error.message}"
        raise


def put(objective: Objective, stored: dict[str, Tensor], anew: bool) -> None:
    """Load a run's tensors; not those whose size follows from the number of images, where these are to be made anew.

    Raises SslpreError (exit 5) as `load_model`.
    """
    here = checkpoint.model_state(objective)
    others = {name: t for name, t in here.items() if anew and name in stored and t.shape != stored[name].shape}
    checkpoint.load_model(objective, {**stored, **others})


def looks(recipe: Recipe) -> bool:
    """Does the method look at every image before an epoch?"""
    return methods()[recipe.method["name"]].epoch_start is not Objective.epoch_start


def look(run: loop.Run, epoch: int) -> None:
    run.part = min(PART, run.stream.batch_size)
    loop.start_epoch(run, epoch)
    run.part = 0


def even(total: int, count: int) -> np.ndarray:
    """int64 [count], rising, of 0..total-1, the first and the last among them."""
    return np.linspace(0, total - 1, min(total, count)).round().astype(np.int64)


def pictures(subject: Subject, rows: int) -> list[list[Picture]]:
    """Up to `rows` rows of what the method shows. A method that groups images needs many to have groups of them."""
    run = subject.run
    few = asked(subject, batch(subject, rows))
    if len(few) == min(rows, len(run.stream.source)) and all(len(row) > 1 for row in few):
        return few
    wide = shuffled(batch(subject, max(rows, FEWEST, GROUPED // max(run.views.sides) ** 2)))
    many = asked(subject, wide)
    return few[:rows] if len(many) == len(wide.index) else many[:rows]  # a row for each image: those from all over


def asked(subject: Subject, of: Batch) -> list[list[Picture]]:
    run = subject.run
    step.reseed(run.recipe.train.seed, "preview")
    run.objective.eval()
    with torch.no_grad():
        shown = run.objective.pictures(of)
    if not shown or not all(shown):
        raise TypeError(f"{type(run.objective).__name__}.pictures() gave no row, or an empty one")
    return shown


def batch(subject: Subject, count: int) -> Batch:
    """Up to `count` images from all over the data set, as the run has them in this epoch, without bad ones."""
    run = subject.run
    source, old, rows = run.stream.source, run.stream, even(len(run.stream.source), count)
    stream = Stream(
        subset(source, rows),
        side=old.side,
        batch_size=len(rows),
        seed=old.seed,
        workers=old.workers,
        device=run.device,
        bad=old.bad,
    )
    with contextlib.closing(stream.in_order()) as batches:
        some = next(batches)
    here = some.index == torch.arange(len(rows))  # another stands where a bad image was
    whole = Pixels(some.pixels[here.to(run.device)], some.size[here], torch.from_numpy(rows)[here])
    return next(step.micro_batches(run, whole, subject.epoch, subject.progress))


def shuffled(some: Batch) -> Batch:
    """The same images in another order: the first of a group are not to be those of the first folder."""
    order = torch.randperm(len(some.index), generator=torch.Generator().manual_seed(0)).to(some.index.device)
    views = [view[order] for view in some.views]
    return replace(some, views=views, index=some.index[order], label=some.label[order])


def images_of(found: Found) -> str:
    return f"images: {found.train.where}, {len(found.train):,} of them"


def looked_at(run: loop.Run, found: Found) -> list[str]:
    """What to say where the look at every image was a look at fewer."""
    looked = len(run.stream.source)
    return (
        [f"what the method takes from all images was taken from {looked:,} of them"]
        if looked < len(found.train)
        else []
    )


def network_of(run: loop.Run) -> str:
    network, sides = run.objective.encoder, run.views.sides
    weights = sum(p.numel() for p in network.parameters()) / 1e6
    each = " and ".join(f"{counted(sides.count(side), 'view')} of {side} px" for side in dict.fromkeys(sides))
    tiles = f", of which it sees tiles of {network.seen} px" if network.seen else ""
    return f"network: {network.architecture}, {weights:.2f} M weights, {each}{tiles}"


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def sentence(objective: Objective) -> str:
    """What the method says of itself in one sentence: the first paragraph of its file, or else of its class."""
    told = sys.modules[type(objective).__module__].__doc__ or type(objective).__doc__ or ""
    return " ".join(told.strip().partition("\n\n")[0].split())
