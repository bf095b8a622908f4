"""From a recipe to the parts of a run, weights fresh from the seed; and from a run directory back to its encoder."""

from __future__ import annotations

import os
import shlex
import socket
from pathlib import Path

import torch

import sslpre
from sslpre import encoder
from sslpre import recipe as recipes
from sslpre.data.decode import decoder
from sslpre.data.find import Found, find
from sslpre.data.packed import Packed, Write
from sslpre.data.rows import InRam
from sslpre.data.sample import sample
from sslpre.data.store import open_store
from sslpre.data.stream import BadList, Stream
from sslpre.encoder import Encoder
from sslpre.errors import SslpreError
from sslpre.methods import methods
from sslpre.objective import Objective, Setup
from sslpre.ops import ranks
from sslpre.ops.channels import Colour
from sslpre.recipe import Recipe
from sslpre.start import Start, load, recorded
from sslpre.train import checkpoint, distributed, loop, optim
from sslpre.train.facts import digest, facts_of
from sslpre.train.progress import say
from sslpre.train.step import fewer, reseed
from sslpre.views.build import Views, compiler, repays


def load_data(recipe: Recipe) -> Found:
    return find(Path(recipe.data.images), recipe.data.max_pixels) if recipe.data.images else sample()


def build(
    folder: Path,
    recipe: Recipe,
    found: Found,
    where: torch.device,
    workers: int | None = None,
    start: Start | None = None,
) -> loop.Run:
    """The run's parts, weights fresh from the seed or those of `start`. workers: decoding threads, None for one a core.

    Raises SslpreError: exit 2 for views or a batch that the method or the processes cannot take, 4 for missing labels.
    """
    table = recipe.train
    assert recipe.encoder.image_size != "auto" and table.batch_size != "auto"
    views = Views(recipe.views, recipe.encoder.image_size, table.seed)
    refuse(recipe, found, views)
    by = compiler(where) if repays(where, saved(recipe, views, len(found.train), where)) else None
    if by is not None:
        views.compile(by)
    reseed(table.seed, "init")
    objective = (
        make_objective(recipe, len(found.train), len(found.train.classes), views.sides, start)
        .to(where)
        .to(memory_format=torch.channels_last)
    )
    if table.compile:
        for network in objective.modules():
            if isinstance(network, Encoder):
                network.model.compile()
    if where.type == "cpu" and table.precision == "bf16":
        refuse_points(objective, min(views.sides))
    labels = torch.full((len(found.train),), -1)
    if objective.needs_labels:
        labels = torch.from_numpy(found.train.labels).long()
    facts = {
        "data": found.train.fingerprint,
        "images": len(found.train),
        "classes": len(found.train.classes),
        "recipe": digest(recipe),
        "recipe_toml": recipes.write(recipe),
        "sslpre": sslpre.__version__,
        "torch": torch.__version__,
        "decoder": decoder(),
        "views": views.made,
        "store": "auto",
        "stored": "",
    }
    optimisers = optim.build(objective, recipe.optim, where)
    if ranks.world() > 1:
        ranks.synchronise(objective)
    stream = stream_of(folder, recipe, found, where, workers)
    run = loop.Run(folder, recipe, objective, optimisers, stream, views, labels, where, facts)
    if 0 < table.micro_batch < table.batch_size // ranks.world():
        fewer(run, table.micro_batch)
    return run


def refuse(recipe: Recipe, found: Found, views: Views) -> None:
    """What can be told before a network is built. Raises SslpreError as `build`."""
    name, batch = recipe.method["name"], recipe.train.batch_size
    method = methods()[name]
    assert batch != "auto"
    if method.needs_labels and not found.train.classes:
        raise SslpreError(f"method `{name}` needs labels", "put each class into a folder of its own", 4)
    if recipe.train.monitor == "knn" and len(found.train.classes) < 2:
        raise SslpreError(f"no labels to monitor with in `{found.train.where}`", "--monitor none", 4)
    if len(views.sides) not in method.views:
        wanted = (
            f"{method.views.start} to {method.views.stop - 1}" if len(method.views) > 1 else f"{method.views.start}"
        )
        copies = method.views.start if len(recipe.views) == 1 else 1
        raise SslpreError(
            f"recipe gives `{len(views.sides)}` views, {name} takes {wanted}",
            f"see copies in [[views]]: --set views.0.copies={copies}",
        )
    if batch % ranks.world():
        near = batch // ranks.world() * ranks.world()
        sizes = " or ".join(f"--batch-size {size}" for size in (near, near + ranks.world()) if size)
        counts = ", ".join(str(count) for count in range(1, 17) if batch % count == 0)
        raise SslpreError(
            f"batch size `{batch}` cannot be shared out to {ranks.world()} processes",
            f"{sizes}; a run that goes on takes {counts} processes",
        )
    if method.couples and batch < 2:
        raise SslpreError(
            f"batch size `{batch}` leaves {name} nothing to compare",
            f"--batch-size {max(2, len(found.train) // 8)}",
        )


def refuse_points(objective: Objective, smallest: int) -> None:
    """Raises SslpreError (exit 2) where an encoder has a strided convolution of a 1 × 1 map at what it is shown.

    smallest: side of the smallest view.

    In bf16 on a CPU, torch 2.15 computes its gradient from memory that nobody wrote.
    """
    for network in objective.modules():
        side = getattr(network, "seen", None) or smallest
        if isinstance(network, Encoder) and network.strides_a_point(side):
            raise SslpreError(
                f"`{network.architecture}` at {side} px has strided convolutions of one pixel, wrong in bf16 on a CPU",
                "--precision fp32, or a larger --image-size",
            )


def saved(recipe: Recipe, views: Views, images: int, where: torch.device) -> float:
    """Seconds that compiling the views takes off this process's part of the whole run."""
    table = recipe.train
    assert table.batch_size != "auto" and table.epochs != "auto"
    steps = table.epochs * (images // table.batch_size)
    return steps * views.saves(where, table.batch_size // ranks.world())


def stream_of(folder: Path, recipe: Recipe, found: Found, where: torch.device, workers: int | None) -> Stream:
    """The run's images; of several processes each gets its part of every batch."""
    data, table = recipe.data, recipe.train
    assert data.store_size != "auto" and table.batch_size != "auto"
    bad = BadList(
        folder / "bad_images.jsonl",
        data.max_bad,
        len(found.train),
        shared=ranks.world() > 1,
        first=distributed.first(),
    )
    return Stream(
        found.train,
        side=data.store_size,
        batch_size=table.batch_size,
        seed=table.seed,
        workers=min(16, own_cores()) if workers is None else workers,
        device=where,
        bad=bad,
        rank=ranks.rank(),
        world=ranks.world(),
    )


def own_cores() -> int:
    """Cores for this process, where several share a machine."""
    return max(1, (os.cpu_count() or 1) // sharers())


def sharers() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def keep(run: loop.Run, wanted: str, spare: int | None) -> str:
    """Give the run a store for its decoded images, as `open_store` has it; one line about it.

    Of the processes on one machine the first opens it, and the others share what it has: its memory, or the right to
    write its file. Raises as `open_store`; exit 15 where not every process has the same error.
    """
    stream, told = run.stream, list[str]()
    leads = ranks.world() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
    again = run.recipe.train.epochs != 1 or type(run.objective).epoch_start is not Objective.epoch_start

    def take(write: Write, join: str) -> None:
        if not told:
            opened = open_store(
                wanted,
                stream.source,
                stream.side,
                run.device,
                reuse=again,
                share=sharers(),
                write=write,
                spare=spare,
                join=join,
                say=say,
            )
            stream.keep(opened[0])
            told.append(opened[1])

    distributed.alike(lambda: take(True, "") if leads else None)
    store, machine = stream.store, os.environ.get("GROUP_RANK") or socket.gethostname()
    mine = (machine, isinstance(store, Packed) and store.writes, store.join if isinstance(store, InRam) else "")
    leaders = {name: (writes, join) for name, writes, join in distributed.collected([mine] if leads else [])}
    writes, join = leaders.get(machine, (False, ""))
    distributed.alike(lambda: take("with" if writes else False, join))
    run.facts |= {"store": wanted, "stored": "" if stream.store is None else stream.store.kind}
    return told[0]


def make_objective(
    recipe: Recipe, images: int, classes: int, sides: tuple[int, ...], start: Start | None = None
) -> Objective:
    """The recipe's method, with everything a method is told."""
    table = recipe.encoder
    assert recipe.train.batch_size != "auto" and table.image_size != "auto"
    image_size = table.image_size

    def make(colour: Colour, size: int | None) -> Encoder:
        network = encoder.build(
            table.backbone,
            stem=table.stem,
            image_size=image_size,
            seen=size,
            mean=table.mean,
            std=table.std,
            colour=colour,
            model_args=table.model_args,
        )
        if start is not None:  # here, before a method makes copies of it
            if colour != "rgb":
                raise SslpreError(
                    f"{recipe.method['name']} sees `{colour}` only, and starting weights see RGB", "no --init"
                )
            load(network, start)
        return network

    mean, std = torch.tensor(table.mean), torch.tensor(table.std)
    patch = encoder.patch_side(table.backbone, table.model_args)
    setup = Setup(images, classes or None, recipe.train.batch_size, sides, mean, std, make, patch)
    arguments = {key: item for key, item in recipe.method.items() if key != "name"}
    return methods()[recipe.method["name"]](setup, **arguments)


def open_run(folder: Path, where: torch.device) -> tuple[Encoder, Recipe, dict[str, str]]:
    """The encoder of a run's newest complete checkpoint, its recipe and its facts. None: SslpreError (exit 5)."""
    recipe = recipes.load(str(folder / "recipe.toml"))
    saved = checkpoint.newest(folder)
    if saved is None:
        raise SslpreError(
            f"no complete checkpoint in `{folder}`", f"sslpre pretrain --resume {shlex.quote(str(folder))}", 5
        )
    assert recipe.encoder.image_size != "auto"
    sides = Views(recipe.views, recipe.encoder.image_size, recipe.train.seed).sides
    objective = make_objective(recipe, saved.state["images"], saved.state["classes"], sides)
    checkpoint.load_model(objective, saved.model)
    network = objective.encoder.to(where)
    network = network.as_rgb() if network.ordinary else network
    return network, recipe, facts_of(recipe, network, saved.state["step"], saved.state["data"]) | recorded(folder)
