"""A run from the command line's wishes to the encoder on disk: start, resume, finish."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import shlex
import shutil
import uuid
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import sslpre
from sslpre import encoder, export
from sslpre import recipe as recipes
from sslpre.data.find import Found, find
from sslpre.data.sample import sample
from sslpre.data.stream import BadList, Stream, short_side
from sslpre.encoder import Encoder
from sslpre.errors import SslpreError
from sslpre.methods import methods
from sslpre.objective import Objective, Setup
from sslpre.recipe import Recipe
from sslpre.train import checkpoint, device, loop, optim, plan
from sslpre.train.announce import announce
from sslpre.train.progress import duration, say
from sslpre.train.runs import discard, find_run, is_run, new_run, write_text
from sslpre.views.build import Views

HEADER = f"""Written by sslpre {sslpre.__version__}; every number is what the run used. It runs again as it is:
sslpre pretrain THIS-FILE"""
# Keys that may differ between the parts of a run: they change what it bears and saves, not what it computes.
FREE = {"data": ("max_bad",), "train": ("checkpoint_minutes",)}


@dataclass(frozen=True)
class Options:
    """What was typed. overrides: {table: {key: value}} from flags, after the `--set` settings."""

    recipe: str | None = None
    images: Path | None = None
    settings: tuple[str, ...] = ()
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    out: Path | None = None
    resume: str | None = None
    device: str = "auto"
    workers: int | None = None


@dataclass(frozen=True)
class Finished:
    run: Path
    recipe: Recipe
    summary: dict[str, Any]


def pretrain(options: Options) -> Finished:
    """Start or resume a run and train it to its end. Raises SslpreError; exit 130 after Ctrl-C."""
    where = device.pick(options.device)
    resumed = to_resume(options)
    return start(options, where) if resumed is None else go_on_with(resumed, options, where)


def go_on_with(folder: Path, options: Options, where: torch.device) -> Finished:
    """An old run as it was begun; only the keys of `FREE` may be said anew."""
    recipe = recipes.load(str(folder / "recipe.toml"))
    if options.recipe is not None:
        refuse_other(recipe, wish(options), folder)
    said = copy.deepcopy(options.overrides)
    for setting in options.settings:
        recipes.apply_setting(said, setting)
    anew = {table: {k: said[table][k] for k in keys if k in said.get(table, {})} for table, keys in FREE.items()}
    if any(anew.values()):
        recipe = recipe.edit(**anew)
        write_text(folder / "recipe.toml", recipes.write(recipe, HEADER))
    run = build(folder, recipe, load_data(recipe), where, options)
    go_on(run)
    return finish(run, resumed=True)


def wish(options: Options) -> Recipe:
    """The recipe as typed: its file, then `--set`, then flags, then IMAGES."""
    assert options.recipe is not None
    recipe = recipes.load(options.recipe, options.settings, options.overrides)
    images = options.images or recipe.data.images
    if not images:
        return recipe
    path = os.path.abspath(images)  # so that the run's recipe.toml finds them from anywhere
    refuse_nameless(path)
    return recipe.edit(data={"images": path})


def refuse_other(recipe: Recipe, wanted: Recipe, folder: Path) -> None:
    """`--resume auto` with a recipe asks for that recipe: a run that was begun with another is not gone on with."""
    ours, theirs = recipe.model_dump(), wanted.model_dump()
    for table, keys in theirs.items():
        if table == "views":
            differ = ["views"] if keys != ours["views"] else []
        else:
            free = FREE.get(table, ())
            differ = [
                f"{table}.{k}" for k, v in keys.items() if v != "auto" and k not in free and v != ours[table].get(k)
            ]
        if differ:
            hint = f"type what it was begun with ({folder / 'recipe.toml'}), or name another --out"
            raise SslpreError(f"`{folder}` was begun with another `{differ[0]}`", hint, 6)


def start(options: Options, where: torch.device) -> Finished:
    """A new run in a directory of its own, which is removed again if not even one step is taken."""
    if options.recipe is None:
        raise SslpreError("no recipe named", "sslpre pretrain simclr ./images")
    wanted = wish(options)
    found = find(options.images, wanted.data.max_pixels) if options.images is not None else load_data(wanted)
    recipe = plan.resolve(wanted, len(found.train), short_side(found.train), device.facts(where))
    stem = Path(options.recipe).stem
    folder, made = new_run(str(recipe.method["name"]) if stem == "recipe" else stem, options.out)
    run: loop.Run | None = None
    try:
        run = build(folder, recipe, found, where, options)
        write_facts(run, found, where)
        announce(run, wanted, found)
        return finish(run)
    except BaseException:
        if run is None or run.step == 0:  # failed before its first step: leave nothing behind
            discard(folder, made)
        raise


def refuse_nameless(path: str) -> None:
    """A recipe is UTF-8 text, so the folder it names must have a name that is."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = path.encode("utf-8", "backslashreplace").decode()
        raise SslpreError(
            f"the name of `{shown}` is not UTF-8", "rename the folder, or make a link to it", 4
        ) from error


def to_resume(options: Options) -> Path | None:
    """The run directory to go on with, or None for a new run."""
    if options.resume is None:
        return None
    if options.resume != "auto":
        return find_run(options.resume)
    if options.out is not None:
        return options.out if is_run(options.out) else None
    if options.recipe is not None:
        raise SslpreError(
            "`--resume auto` needs to know which run", "add --out runs/NAME: it starts there, goes on there, or is done"
        )
    return find_run("last")


def load_data(recipe: Recipe) -> Found:
    return find(Path(recipe.data.images), recipe.data.max_pixels) if recipe.data.images else sample()


def build(folder: Path, recipe: Recipe, found: Found, where: torch.device, options: Options) -> loop.Run:
    """The run's parts, weights fresh from the seed."""
    data, table = recipe.data, recipe.train
    assert data.store_size != "auto" and table.batch_size != "auto" and recipe.encoder.image_size != "auto"
    method = methods()[recipe.method["name"]]
    if method.needs_labels and not found.train.classes:
        raise SslpreError(
            f"method `{recipe.method['name']}` needs labels", "put each class into a folder of its own", 4
        )
    views = Views(recipe.views, recipe.encoder.image_size, table.seed)
    if len(views.sides) not in method.views:
        wanted = (
            f"{method.views.start} to {method.views.stop - 1}" if len(method.views) > 1 else f"{method.views.start}"
        )
        raise SslpreError(
            f"recipe gives `{len(views.sides)}` views, {recipe.method['name']} takes {wanted}",
            "see copies in [[views]]: --set views.0.copies=2",
        )
    if method.couples and table.batch_size < 2:
        raise SslpreError(
            f"batch size `{table.batch_size}` leaves {recipe.method['name']} nothing to compare",
            f"--batch-size {max(2, len(found.train) // 8)}",
        )
    loop.reseed(table.seed, "init")
    objective = (
        make_objective(recipe, len(found.train), len(found.train.classes), views.sides)
        .to(where)
        .to(memory_format=torch.channels_last)
    )
    for network in objective.modules():
        if isinstance(network, Encoder):
            network.chunk = table.micro_batch * len(views.sides) if objective.couples else 0
            if table.compile:
                network.model.compile()
    bad = BadList(folder / "bad_images.jsonl", data.max_bad, len(found.train))
    workers = options.workers if options.workers is not None else min(16, os.cpu_count() or 1)
    stream = Stream(
        found.train,
        side=data.store_size,
        batch_size=table.batch_size,
        seed=table.seed,
        workers=workers,
        device=where,
        bad=bad,
    )
    labels = torch.from_numpy(found.train.labels).long() if method.needs_labels else torch.full((len(found.train),), -1)
    facts = {
        "data": found.train.fingerprint,
        "images": len(found.train),
        "classes": len(found.train.classes),
        "recipe": digest(recipe),
        "sslpre": sslpre.__version__,
        "torch": torch.__version__,
    }
    optimisers = optim.build(objective, recipe.optim, where)
    return loop.Run(folder, recipe, objective, optimisers, stream, views, labels, where, facts)


def make_objective(recipe: Recipe, images: int, classes: int, sides: tuple[int, ...]) -> Objective:
    """The recipe's method, with everything a method is told."""
    table = recipe.encoder
    assert recipe.train.batch_size != "auto" and table.image_size != "auto"
    image_size = table.image_size

    def make(colour: encoder.Colour, size: int | None) -> Encoder:
        return encoder.build(
            table.backbone,
            stem=table.stem,
            image_size=size or image_size,
            mean=table.mean,
            std=table.std,
            colour=colour,
        )

    mean, std = torch.tensor(table.mean), torch.tensor(table.std)
    setup = Setup(images, classes or None, recipe.train.batch_size, sides, mean, std, make)
    arguments = {key: item for key, item in recipe.method.items() if key != "name"}
    return methods()[recipe.method["name"]](setup, **arguments)


def go_on(run: loop.Run) -> None:
    """Load the newest complete checkpoint into the run, or leave it at step 0 where there is none."""
    checkpoint.sweep(run.folder / "checkpoints")
    saved = checkpoint.newest(run.folder)
    if saved is None:
        say(f"resume     {run.folder}: no complete checkpoint, starting at step 0")
        return
    if saved.state["data"] != run.facts["data"]:
        raise SslpreError(
            f"the images of `{run.folder}` have changed since its checkpoint",
            "restore them, or start a new run: sslpre pretrain " + shlex.quote(str(run.folder / "recipe.toml")),
            6,
        )
    if saved.state["recipe"] != run.facts["recipe"]:
        raise SslpreError(
            f"`{run.folder / 'recipe.toml'}` has changed since the checkpoint",
            "put it back, or start a new run with it: sslpre pretrain " + shlex.quote(str(run.folder / "recipe.toml")),
            6,
        )
    for key in ("sslpre", "torch"):
        if saved.state[key] != run.facts[key]:
            say(f"resume     {key} was {saved.state[key]}, is {run.facts[key]}: the run goes on, not bit for bit")
    checkpoint.load_model(run.objective, saved.model)
    optim.load_state(run.objective, run.optimisers, saved.optim)
    for path in (run.folder / "checkpoints").glob("step-*"):
        if path.name > saved.path.name:  # damaged, and said so: it must not pass for one of the two that are kept
            path.rename(path.with_name(f".damaged-{path.name}-{uuid.uuid4().hex[:8]}"))
    run.step, run.seconds = saved.state["step"], saved.state["seconds"]
    say(f"resume     {run.folder} at step {run.step} of {run.steps}")


def finish(run: loop.Run, resumed: bool = False) -> Finished:
    """Train to the end, write the run's `encoder/`, and sum up."""
    if resumed and run.step == run.steps and (run.folder / "encoder").is_dir():
        say(f"done       {run.folder} was finished already")
        return Finished(run.folder, run.recipe, {"run": str(run.folder), "step": run.step, "finished": True})
    try:
        figures = loop.train(run)
    except loop.Interrupted:
        hint = f"sslpre pretrain --resume {shlex.quote(str(run.folder))}"
        raise SslpreError(
            f"interrupted: `{run.folder}` is saved at step {run.step} of {run.steps}", hint, 130
        ) from None
    shutil.rmtree(run.folder / "encoder", ignore_errors=True)
    export.write_folder(
        run.objective.encoder,
        facts_of(run.recipe, run.objective.encoder, run.step, run.facts["data"]),
        run.folder / "encoder",
    )
    spent = run.seconds + figures["seconds"]
    say(
        f"done       {run.folder}: {run.step} steps in {duration(spent)}, {figures['images_per_s']:,.0f} images/s, "
        f"{figures['waiting']:.0%} of the time waiting for data"
    )
    summary = {
        "run": str(run.folder),
        "step": run.step,
        "finished": True,
        **figures,
        "seconds": spent,
        "bad_images": run.stream.bad.count,
    }
    return Finished(run.folder, run.recipe, summary)


def digest(recipe: Recipe) -> str:
    """A hash of all that a run computes with; not of where the images lie, which their fingerprint tells."""
    plain = recipe.model_dump()
    for table, keys in (FREE | {"data": ("max_bad", "images")}).items():
        for key in keys:
            plain[table].pop(key)
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=16).hexdigest()


def facts_of(recipe: Recipe, network: Encoder, step: int, fingerprint: str) -> dict[str, str]:
    """An encoder's metadata, all strings: what is needed to open it, and where it comes from."""
    return {
        "architecture": network.architecture,
        "model_args": json.dumps(network.model_args),
        "mean": json.dumps(list(recipe.encoder.mean)),
        "std": json.dumps(list(recipe.encoder.std)),
        "image_size": str(recipe.encoder.image_size),
        "store_size": str(recipe.data.store_size),
        "recipe": recipes.write(recipe),
        "method": str(recipe.method["name"]),
        "step": str(step),
        "data_fingerprint": fingerprint,
        "sslpre": sslpre.__version__,
    }


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
    return network, recipe, facts_of(recipe, network, saved.state["step"], saved.state["data"])


def write_facts(run: loop.Run, found: Found, where: torch.device) -> None:
    data = {
        "where": found.train.where,
        "images": len(found.train),
        "classes": found.train.classes,
        "fingerprint": found.train.fingerprint,
        "note": found.note,
        "skipped": found.skipped,
    }
    write_text(run.folder / "data.json", json.dumps(data, indent=1) + "\n")
    packages = ("torch", "torchvision", "timm", "kornia", "safetensors", "numpy", "pillow")
    environment = {
        "sslpre": sslpre.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": device.label(where),
        "threads": torch.get_num_threads(),
        "workers": run.stream.workers,
        **{name: version(name) for name in packages},
    }
    write_text(run.folder / "environment.json", json.dumps(environment, indent=1) + "\n")
    write_text(run.folder / "recipe.toml", recipes.write(run.recipe, HEADER))  # last: it makes the directory a run
