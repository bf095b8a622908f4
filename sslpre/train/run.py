"""A run from the command line's wishes to the encoder on disk: start, resume, finish."""

from __future__ import annotations

import contextlib
import copy
import os
import shlex
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import sslpre
from sslpre import export, signals, weights
from sslpre import recipe as recipes
from sslpre import start as starts
from sslpre.data.find import Found, find
from sslpre.data.headers import short_side
from sslpre.data.store import KINDS
from sslpre.errors import SslpreError
from sslpre.ops import ranks
from sslpre.recipe import Recipe
from sslpre.train import changes, checkpoint, device, disk, distributed, lock, loop, memory, optim, plan, step
from sslpre.train.announce import announce
from sslpre.train.build import build, keep, load_data
from sslpre.train.facts import FREE, HEADER, facts_of, keys_of, write_facts
from sslpre.train.progress import duration, say
from sslpre.train.runs import LOCK, ROOT, clear, discard, find_run, inside, is_run, new_run, write_text
from sslpre.train.step import fewer


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
    store: str | None = None
    data_changed: bool = False
    onlookers: tuple[Callable[[loop.Run], None], ...] = ()  # see `loop.Run`


@dataclass(frozen=True)
class Finished:
    """`summary` is empty in all but the first of several processes; `classes`: how many the images have."""

    run: Path
    recipe: Recipe
    summary: dict[str, Any]
    classes: int


def pretrain(options: Options) -> Finished:
    """Start or resume a run and train it to its end. Raises SslpreError; exit 128 + n after signal n."""
    memory.keep_freed()
    where = device.pick(options.device)
    distributed.join(where)
    try:
        distributed.agree(
            versions=f"sslpre {sslpre.__version__}, torch {torch.__version__}",
            directory=str(options.out or options.resume or ""),
            recipe=" ".join(map(str, (options.recipe, *options.settings, options.overrides))),
        )
        resumed = distributed.from_first(lambda: to_resume(options))
        with contextlib.ExitStack() as hold:
            return start(options, where, hold) if resumed is None else go_on_with(resumed, options, where, hold)
    except RuntimeError as error:
        if distributed.is_lost(error):
            raise distributed.lost(error) from error
        raise


def owned(folder: Path, hold: contextlib.ExitStack, patient: bool = False) -> Callable[[], None]:
    """Let this run alone have the directory until `hold` ends; gives what raises where another has taken it over."""
    mine: list[lock.Lock | None] = []
    distributed.from_first(lambda: mine.append(hold.enter_context(lock.held(folder, patient))))
    return lambda: mine[0].check() if mine and mine[0] is not None else None  # the first process has it


def go_on_with(folder: Path, options: Options, where: torch.device, hold: contextlib.ExitStack) -> Finished:
    """An old run as it was begun; only the keys of `FREE` may be said anew."""
    guard = owned(folder, hold, options.resume == "auto")
    recipe = distributed.alike(lambda: as_it_was(folder, options))
    begun: starts.Start | None = None
    fresh = distributed.from_first(lambda: not checkpoint.complete(folder / "checkpoints"))
    if recipe.encoder.init and fresh:  # else the weights are in a checkpoint
        # rather the run's own copy: what `init` names may have been trained on, or have gone
        source = str(folder / "start") if (folder / "start").is_dir() else recipe.encoder.init
        begun = distributed.alike(lambda: starts.read(source, recipe.encoder.backbone))
    run = distributed.alike(lambda: build(folder, recipe, load_data(recipe), where, options.workers, begun))
    run.guard, run.onlookers = guard, options.onlookers
    distributed.agree(directory=str(folder.absolute()), images=run.facts["data"], **keys_of(recipe))
    if distributed.first() and recipe != recipes.load(str(folder / "recipe.toml")):  # what was said anew can be done
        write_text(folder / "recipe.toml", recipes.write(recipe, HEADER))
    distributed.from_first(lambda: tidy(run))
    parts_anew = said(options).get("train", {}).get("micro_batch") is not None
    distributed.alike(lambda: go_on(run, parts_anew, options.data_changed))
    distributed.agree(step=run.step)
    if distributed.from_first(lambda: run.step == run.steps and (run.folder / "encoder").is_dir()):
        distributed.leave()
        say(f"done       {run.folder} was finished already")
        summary = {"run": str(run.folder), "step": run.step, "finished": True}
        return Finished(run.folder, run.recipe, summary if distributed.first() else {}, run.facts["classes"])
    say(f"resume     views {run.facts['views']}; store {keep_again(run, wanted_store(options))}")
    return finish(run)


def keep_again(run: loop.Run, typed: str | None) -> str:
    """The store that was `typed`, else the one that the run had; where that is not possible any more, another."""
    if typed is not None:
        return keep(run, typed, None)
    # on the GPU only where it was so: the size of the parts was found without it
    spare = None if run.facts["stored"] == "device" else 0
    try:
        return keep(run, run.facts["store"], spare)
    except SslpreError as error:
        say(f"resume     {error.message}")
        return keep(run, "auto", spare)


def as_it_was(folder: Path, options: Options) -> Recipe:
    """The recipe that the run was begun with, and in it what was said anew."""
    recipe = recipes.load(str(folder / "recipe.toml"))
    if options.recipe is not None:
        refuse_other(recipe, wish(options, recipe.encoder.init), folder)
    typed = said(options)
    anew = {table: {k: typed[table][k] for k in keys if k in typed.get(table, {})} for table, keys in FREE.items()}
    return recipe.edit(**anew) if any(anew.values()) else recipe


def wanted_store(options: Options) -> str | None:
    """What was typed for `--store`; the path of a file from the root, because a run may go on from elsewhere."""
    return options.store if options.store in (None, *KINDS) else os.path.abspath(options.store)


def said(options: Options) -> dict[str, dict[str, Any]]:
    """The keys that were typed, by table: flags and `--set` alike."""
    typed = copy.deepcopy(options.overrides)
    for setting in options.settings:
        recipes.apply_setting(typed, setting)
    return typed


def wish(options: Options, begun: str = "") -> Recipe:
    """The recipe as typed: its file, then `--set`, then flags, then IMAGES. begun: `init` of the run that is typed
    again, whose weights need not be there any more."""
    assert options.recipe is not None
    recipe = recipes.load(options.recipe, options.settings, options.overrides)
    init = recipe.encoder.init
    recipe = recipe.edit(encoder={"init": begun if again(init, begun) else weights.spelled(init)})
    images = options.images or recipe.data.images
    if not images:
        return recipe
    path = os.path.abspath(images)  # so that the run's recipe.toml finds them from anywhere
    refuse_nameless(path)
    return recipe.edit(data={"images": path})


def again(typed: str, begun: str) -> bool:
    """Is the path `typed` the one that a run was `begun` with? The word `last` may by now mean that run itself."""
    path = Path(begun)
    if not typed or not begun or weights.of_timm(typed) or weights.of_timm(begun):
        return False
    return typed == "last" or path in (Path(os.path.abspath(typed)), Path(os.path.abspath(ROOT / typed)))


def refuse_other(recipe: Recipe, wanted: Recipe, folder: Path) -> None:
    """`--resume auto` with a recipe asks for that recipe: a run that was begun with another is not gone on with."""
    ours, theirs = recipe.model_dump(), plan.as_begun(wanted, recipe).model_dump()
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


def start(options: Options, where: torch.device, hold: contextlib.ExitStack) -> Finished:
    """A new run in a directory of its own, which is removed again if not even one step is taken."""
    if options.recipe is None:
        raise SslpreError("no recipe named", "sslpre pretrain simclr ./images")
    wanted, found, begun, recipe = distributed.alike(lambda: planned(options, where))
    stem = Path(options.recipe).stem
    name = str(recipe.method["name"]) if stem == "recipe" else stem
    distributed.agree(images=found.train.fingerprint, **keys_of(recipe))
    folder, made = distributed.from_first(lambda: new_run(name, options.out))
    guard = owned(folder, hold)
    if is_run(folder):
        raise SslpreError(f"`{folder}` exists: another run has begun in it", "name another --out")
    run: loop.Run | None = None
    try:
        distributed.from_first(lambda: clear(folder, LOCK))  # what one left that was killed before its first step
        run = distributed.alike(lambda: build(folder, recipe, found, where, options.workers, begun))
        run.guard, run.onlookers = guard, options.onlookers
        tried = step.fit(run)
        run.facts["views"] = run.views.made
        kept = keep(run, wanted_store(options) or "auto", memory.spare(where))
        if distributed.first():
            if begun is not None:
                keep_start(run, begun)
            write_facts(run, found, where)
            announce(run, wanted, found, tried, begun, kept)
        return finish(run)
    except BaseException:
        if distributed.first() and (run is None or run.step == 0):  # failed before its first step: leave nothing behind
            discard(folder, made)
        raise


def planned(
    options: Options, where: torch.device, found: Found | None = None
) -> tuple[Recipe, Found, starts.Start | None, Recipe]:
    """The recipe as typed, its images, the weights that it starts from, and the recipe with every `auto` replaced.

    found: the images, where they were looked for already.
    """
    wanted = wish(options)
    if found is None:
        found = find(options.images, wanted.data.max_pixels) if options.images is not None else load_data(wanted)
    begun = (
        starts.read(wanted.encoder.init, wanted.encoder.backbone, wanted.encoder.stem) if wanted.encoder.init else None
    )
    recipe = plan.resolve(wanted, len(found.train), short_side(found.train), device.facts(where), begun, ranks.world())
    return wanted, found, begun, recipe


def keep_start(run: loop.Run, begun: starts.Start) -> None:
    """Keep the weights that a run starts from, for the probe to hold the run against; and what is known of them."""
    starts.record(run.folder, begun)
    facts = facts_of(run.recipe, run.objective.encoder, 0, run.facts["data"]) | begun.facts() | {"method": "start"}
    export.write_folder(run.objective.encoder, facts, run.folder / "start")


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
        return inside(options.out) if is_run(options.out) else None
    if options.recipe is not None:
        raise SslpreError(
            "`--resume auto` needs to know which run", "add --out runs/NAME: it starts there, goes on there, or is done"
        )
    return find_run("last")


def go_on(run: loop.Run, parts_anew: bool = False, accept: bool = False) -> None:
    """Load the newest complete checkpoint into the run, or leave it at step 0 where there is none.

    parts_anew: the run's own size of parts is to be used from now on, not the checkpoint's. accept: images that have
    changed are taken as they are, and the epoch under way is begun again.
    """
    saved = checkpoint.newest(run.folder)
    if saved is None:
        say(f"resume     {run.folder}: no complete checkpoint, starting at step 0")
        return
    checkpoint.refuse_incomplete(saved)
    refuse_changes(run, saved, accept)
    for key in ("sslpre", "torch", "decoder", "views"):
        was = saved.state.get(key, "not recorded")  # the last two are newer than some checkpoints
        if was != run.facts[key]:
            say(f"resume     {key} was {was}, is {run.facts[key]}: the run goes on, not bit for bit")
    load_model(run, saved)
    try:
        optim.load_state(run.objective, run.optimisers, saved.optim)
    except (KeyError, ValueError, RuntimeError) as error:
        raise SslpreError(f"checkpoint `{saved.path}`: {error}", "use the versions in environment.json", 5) from error
    part, processes = saved.state.get("part", 0), saved.state.get("processes", 1)
    if parts_anew and run.part != part:
        say(f"resume     {part or 'all'} images of a batch at a time so far, {run.part or 'all'} from now on")
        if memory.norms(run.objective):
            say("           batch normalisation sees these alone: the run goes on, not bit for bit")
    fewer(run, run.part if parts_anew else part)
    run.facts |= {key: saved.state[key] for key in ("store", "stored") if key in saved.state}
    if processes != ranks.world():
        say(f"resume     {processes} processes so far, {ranks.world()} from now on: the run goes on, not bit for bit")
    run.step, run.seconds = saved.state["step"], saved.state["seconds"]
    if saved.state["data"] != run.facts["data"]:
        an_epoch = saved.state["images"] // run.stream.batch_size
        run.step = run.step // an_epoch * run.stream.steps_per_epoch
        run.outdated = list((run.folder / "checkpoints").glob("step-*"))
        say(f"resume     with other images, from the beginning of epoch {saved.state['step'] // an_epoch + 1}")
    run.passed_over = saved.state.get("passed_over", 0)
    say(f"resume     {run.folder} at step {run.step} of {run.steps}")


def refuse_changes(run: loop.Run, saved: checkpoint.Checkpoint, accept: bool) -> None:
    """Raises SslpreError (exit 6) where images or recipe are not those of the checkpoint; `accept` takes the images."""
    again = "sslpre pretrain " + shlex.quote(str(run.folder / "recipe.toml"))
    if saved.state["data"] != run.facts["data"] and not accept:
        how = changes.told(run.folder, run.stream.source)
        message = f"the images of `{run.folder}` have changed since its checkpoint{how}"
        raise SslpreError(message, f"restore them, add --data-changed accept, or start a new run: {again}", 6)
    if saved.state["recipe"] != run.facts["recipe"]:
        how = changes.of_recipes(saved.state.get("recipe_toml", ""), run.facts["recipe_toml"])
        message = f"`{run.folder / 'recipe.toml'}` has changed since the checkpoint{how}"
        raise SslpreError(message, f"put it back, or start a new run with it: {again}", 6)


def load_model(run: loop.Run, saved: checkpoint.Checkpoint) -> None:
    try:
        checkpoint.load_model(run.objective, saved.model)
    except SslpreError as error:
        if saved.state["data"] == run.facts["data"] or saved.state["images"] == run.facts["images"]:
            raise
        message = (
            f"{run.recipe.method['name']} keeps something of each image, and there are other images: {error.message}"
        )
        hint = f"start a new run from its weights: --init {shlex.quote(str(run.folder))}"
        raise SslpreError(message, hint, 6) from error


def tidy(run: loop.Run) -> None:
    """Put away what a killed process left half-written, and checkpoints that turned out to be damaged."""
    folder = run.folder / "checkpoints"
    checkpoint.sweep(folder)
    saved = checkpoint.newest(run.folder)
    for path in folder.glob("step-*"):
        if saved is not None and path.name > saved.path.name:  # it must not pass for one of the two that are kept
            path.rename(path.with_name(f".damaged-{path.name}-{uuid.uuid4().hex[:8]}"))


def write_encoder(run: loop.Run) -> None:
    """Write the run's `encoder/`, unless timm could not open it."""
    network, folder = run.objective.encoder, run.folder / "encoder"
    shutil.rmtree(folder, ignore_errors=True)
    if network.ordinary:
        facts = facts_of(run.recipe, network, run.step, run.facts["data"]) | starts.recorded(run.folder)
        if why := disk.attempted(lambda: export.write_folder(network, facts, folder)):
            hint = f"the run itself is saved; make room, then: sslpre pretrain --resume {shlex.quote(str(run.folder))}"
            raise SslpreError(f"the finished encoder could not be saved: {why}", hint, disk.CODE)
    else:
        say(f"hint: no `{folder}`: a network of `{network.colour}` is none that timm opens; `sslpre probe` judges it")


def finish(run: loop.Run) -> Finished:
    """Train to the end, write the run's `encoder/`, and sum up."""
    distributed.same_weights(run.objective)
    try:
        figures = loop.train(run)
    except loop.Interrupted as signal:
        hint = f"sslpre pretrain --resume {shlex.quote(str(run.folder))}"
        message = f"{signals.words(signal.number)}: `{run.folder}` is saved at step {run.step} of {run.steps}"
        raise distributed.everywhere(SslpreError(message, hint, signals.code(signal.number))) from None
    distributed.leave()
    if not distributed.first():
        return Finished(run.folder, run.recipe, {}, run.facts["classes"])
    write_encoder(run)
    if run.views.recompiled:
        say(f"hint: views were compiled {run.views.recompiled} times too often; please report it with the recipe")
    spent = run.seconds + figures["seconds"]
    say(
        f"done       {run.folder}: {run.step} steps in {duration(spent)}, {figures['images_per_s']:,.0f} images/s, "
        f"{figures['waiting']:.0%} of the time waiting for data"
    )
    if run.verdict:
        say(f"health     {run.verdict}")
    if run.passed_over:
        say(f"hint: {run.passed_over} steps were not finite and passed over; a lower --lr may do better")
    summary = {
        "run": str(run.folder),
        "step": run.step,
        "finished": True,
        "passed_over": run.passed_over,
        "verdict": run.verdict,
        **figures,
        "seconds": spent,
        "bad_images": run.stream.bad.count,
    }
    return Finished(run.folder, run.recipe, summary, run.facts["classes"])
