"""What a run leaves when too many steps were not finite: all that it takes to take the last of them again, and where in
it the first number that is not finite arises."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import shlex
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import sslpre
from sslpre import recipe as recipes
from sslpre.errors import SslpreError
from sslpre.ops import ranks
from sslpre.synced import write_synced
from sslpre.train import checkpoint, disk, distributed, finite, memory, optim, step
from sslpre.train.facts import HEADER
from sslpre.train.progress import say

if TYPE_CHECKING:
    from sslpre.train.loop import Run

FOLDER = "nonfinite"
NAMED = 10  # gradients that are named at most


@dataclass(frozen=True)
class Trace:
    """A step taken once more on a copy. `what`: what was not finite, "" where all was; `terms`: the logged ones."""

    what: str
    terms: dict[str, float]
    first: str  # the first tensor that was not finite
    gradients: list[str]  # parameters whose gradient was not finite


def ending(run: Run, found: finite.NotFinite) -> SslpreError:
    """Write the bundle; the error that ends the run (exit 10), in every process alike."""
    traced = trace(run, found.step)
    each = distributed.collected([(traced, images(run, found.step))])
    folder = run.folder / FOLDER / f"step-{found.step:08d}"
    told: list[str] = []

    def keep() -> None:
        if why := disk.attempted(lambda: write(run, found, each, folder)):
            told.append(why)

    distributed.from_first(keep)
    many = f", after {run.passed_over - 1} steps that were passed over" if run.passed_over > 1 else ""
    message = f"{found}{many}; nothing of it was kept"
    where = "" if told else f"; to see where it arises: sslpre replay {shlex.quote(str(folder))}"
    if told:
        say(f"warning: `{folder}` could not be written: {told[0]}")
    return distributed.everywhere(SslpreError(message, finite.HINT + where, finite.CODE))


def trace(run: Run, number: int) -> Trace:
    """Take step `number` again on a copy of what is trained, and see what becomes not finite first."""
    twin = copied(run, number - 1)
    with contextlib.closing(run.stream.steps(number - 1, number)) as batches:
        pixels = next(batches)
    epoch = (number - 1) // run.stream.steps_per_epoch
    seen: list[str] = []
    gradients: list[str] = []
    with watched(twin.objective, seen, gradients):
        try:
            terms = step.attempt(twin, pixels, epoch, memory.Before(twin.objective), [])
            twin.step += 1
            finite.answers(twin, written=True)
            what = ""
        except finite.NotFinite as found:
            what, terms = found.what, found.terms
        except RuntimeError as error:  # a library refuses what is not finite
            what, terms = " ".join(str(error).split()), {}
    first = seen[0] if seen else ("the loss itself" if what else "")
    return Trace(what, {name: float(term) for name, term in terms.items()}, first, gradients)


def copied(run: Run, taken: int) -> Run:
    """The run after `taken` steps, with a copy of its objective and its optimisers' state."""
    from sslpre.train.loop import Run as Twin  # it imports this room

    objective = copy.deepcopy(run.objective)
    optimisers = optim.build(objective, run.recipe.optim, run.device)
    state = optim.state_by_name(run.objective, run.optimisers)
    optim.load_state(objective, optimisers, {name: tensor.clone() for name, tensor in state.items()})
    own = {one.name: getattr(run, one.name) for one in dataclasses.fields(run)}
    own |= {"objective": objective.train(), "optimisers": optimisers, "step": taken, "undo": None, "told": []}
    return Twin(**own | {"sums": {}, "asked": deque(), "unsettled": deque()})


@contextlib.contextmanager
def watched(objective: nn.Module, seen: list[str], gradients: list[str]) -> Iterator[None]:
    """Inside, `seen` gets the tensors that are not finite, in the order in which they arise."""
    handles = []
    for name, module in objective.named_modules():

        def forward(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            if not seen and any(not bool(t.isfinite().all()) for t in tensors(output)):
                given = "" if all(bool(t.isfinite().all()) for t in tensors(inputs)) else ", which was given such"
                seen.append(f"output of `{name or 'the objective'}` ({type(module).__name__}){given}")

        handles.append(module.register_forward_hook(forward))
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:

            def backward(parameter: Tensor, name: str = name) -> None:
                if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                    seen.append(f"gradient of `{name}`")
                    if len(gradients) < NAMED:
                        gradients.append(name)

            handles.append(parameter.register_post_accumulate_grad_hook(backward))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        if thing.is_floating_point():
            yield thing
    elif isinstance(thing, list | tuple):
        for one in thing:
            yield from tensors(one)
    elif isinstance(thing, dict):
        yield from tensors(list(thing.values()))


def images(run: Run, number: int) -> list[dict[str, Any]]:
    """This process's images of the step, as they stand in its batch."""
    with contextlib.closing(run.stream.steps(number - 1, number)) as batches:
        index = next(batches).index.tolist()
    return [{"index": i, "name": run.stream.source.name(i)} for i in index]


def write(run: Run, found: finite.NotFinite, each: list[tuple[Trace, list[dict[str, Any]]]], folder: Path) -> None:
    """The folder, whole or not at all, but for a disk that fails (OSError)."""
    traces = [traced for traced, _ in each]
    broken = [one for one in traces if any(not math.isfinite(term) for term in one.terms.values())]
    first = next(iter([*broken, *(one for one in traces if one.first)]), traces[0])
    about = {
        "format": checkpoint.FORMAT,
        "sslpre": sslpre.__version__,
        "torch": torch.__version__,
        "method": run.recipe.method["name"],
        "step": found.step,
        "epoch": (found.step - 1) // run.stream.steps_per_epoch,
        "what": found.what,
        "first": first.first,
        "gradients": first.gradients,
        "terms": plain(first.terms),
        "images": [one for _, some in each for one in some],
        "data": run.facts["data"],
        "part": run.part,
        "processes": ranks.world(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_synced(folder / "recipe.toml", recipes.write(run.recipe, HEADER).encode())
    write_synced(folder / "model.safetensors", checkpoint.pack(checkpoint.model_state(run.objective)))
    write_synced(folder / "optim.safetensors", checkpoint.pack(optim.state_by_name(run.objective, run.optimisers)))
    write_synced(folder / "bundle.json", json.dumps(about, indent=1, allow_nan=False).encode())


def plain(terms: dict[str, float]) -> dict[str, float | str]:
    """Numbers as JSON has them, and the others as words."""
    return {name: term if math.isfinite(term) else str(term) for name, term in terms.items()}


def read(folder: Path) -> dict[str, Any]:
    """What `write` said of a bundle. Raises SslpreError: exit 2 where there is none, 5 where it cannot be read."""
    path = folder / "bundle.json"
    if not path.is_file():
        raise SslpreError(f"`{folder}` is no bundle", "name a folder that a run with exit code 10 has left")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"format": int, "step": int, "part": int, "data": str, "what": str, "first": str, "images": list}
        good = all(isinstance(about[key], kind) for key, kind in kinds.items()) and about["step"] > 0 <= about["part"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SslpreError(f"`{path}` cannot be read: {error}", "copy the bundle anew", 5) from error
    if not good or about["format"] > checkpoint.FORMAT:
        raise SslpreError(f"`{path}` is not of this version", "use the sslpre that wrote it", 5)
    return about


def replay(folder: Path, where: torch.device, workers: int | None) -> tuple[dict[str, Any], Trace]:
    """Take the bundle's step again: what was written of it, and what it is now.

    Raises SslpreError: exit 2 or 5 for what is no bundle, 6 where its images have changed.
    """
    from sslpre.train.build import build, load_data

    about, recipe = read(folder), recipes.load(str(folder / "recipe.toml"))
    found = load_data(recipe)
    if found.train.fingerprint != about["data"]:
        raise SslpreError(
            f"the images of `{folder}` have changed since", "restore them: the step took them as they were", 6
        )
    with tempfile.TemporaryDirectory(prefix="sslpre-replay-") as place:
        run = build(Path(place), recipe, found, where, workers)
        if about["step"] > run.steps:
            raise SslpreError(f"`{folder}` is of step {about['step']} of {run.steps}", "copy the bundle anew", 5)
        checkpoint.load_model(run.objective, stored(folder / "model.safetensors"))
        try:
            optim.load_state(run.objective, run.optimisers, stored(folder / "optim.safetensors"))
        except (KeyError, RuntimeError) as error:
            raise SslpreError(
                f"`{folder}` is of another network: {error}", "use the sslpre that wrote it", 5
            ) from error
        step.fewer(run, about["part"])
        return about, trace(run, about["step"])


def stored(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(path.read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise SslpreError(f"`{path}` cannot be read: {error}", "copy the bundle anew", 5) from error
