"""What does each method teach in the same time? Every method on the same images, network and budget of wall-clock time.

    python tests/benchmarks/methods.py --images cifar10k --minutes 2 --choose --try simclr:optim.lr=0.3 --ledger m.jsonl
    python tests/benchmarks/methods.py --images cifar10k --images clothing --minutes 5 --ledger m.jsonl
    python tests/benchmarks/methods.py --table --ledger m.jsonl

Each folder has train/CLASS/* and test/CLASS/*. `--choose` holds a fifth of train/ out and never opens test/: it tries
each method's recipe as it is and with every `--try METHOD:TABLE.KEY=VALUE[,TABLE.KEY=VALUE]`. Later runs on the same
images take the settings that were best there. Each result is a line of the ledger at once: what is interrupted goes on
when the same is typed again.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import ledger
import ours
import torch

from sslpre.data.find import Found, find, subset
from sslpre.encoder import Encoder, build
from sslpre.errors import SslpreError
from sslpre.methods import methods
from sslpre.probe import SEEDS, Asked, Exam, centres, labelled, lent
from sslpre.probe.features import calibration_images, layout, random_twin
from sslpre.probe.judge import Answers, best
from sslpre.probe.knn import K
from sslpre.probe.linear import split
from sslpre.probe.table import Score
from sslpre.recipe import Recipe
from sslpre.shelf import names
from sslpre.train import device, loop, memory
from sslpre.train.build import open_run
from sslpre.train.loop import Run
from sslpre.train.progress import duration, say

HELD_OUT = 0.2
SETTING = re.compile(r",(?=[a-z]\w*\.)")  # a comma before TABLE.KEY, not one within a list
WARM = 2  # steps before time is taken
RANDOM, RAW = "random weights", "raw pixels"
ASKED = Asked(True, True, False, (100.0,), (K,))
HEAD = ("method", "settings", "epochs", "time", "views/s", "loss of chance", "best stage", "linear")
ASKED = Asked(True, True, False, (100.0,), (K,))
HEAD = (*HEAD, "output, linear", "output, kNN", "beats random")


@dataclass(frozen=True)
class Task:
    """One run: of a method with `--set` settings on images, its training or its choosing half."""

    method: str
    settings: tuple[str, ...]
    choosing: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=Path, action="append", default=[], help="DIR with train/ and test/; repeatable"
    )
    parser.add_argument("--ledger", type=Path, required=True, help="a .jsonl file, read and added to")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, for each method")
    parser.add_argument("--only", action="append", default=[], metavar="METHOD", help="not all methods; repeatable")
    parser.add_argument("--backbone", default="test_resnet")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="for every method")
    parser.add_argument("--choose", action="store_true", help="try settings, on a fifth of train/ that is held out")
    parser.add_argument("--try", action="append", default=[], dest="tries", metavar="METHOD:TABLE.KEY=VALUE[,…]")
    parser.add_argument("--measure", type=float, default=10.0, help="seconds of steps by which epochs are reckoned")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--table", action="store_true", help="only print what the ledger holds")
    arguments = parser.parse_args()
    known = methods()
    wrong = [
        name for name in (*arguments.only, *(one.partition(":")[0] for one in arguments.tries)) if name not in known
    ]
    if wrong:
        raise SystemExit(f"no method {wrong[0]}: there are {', '.join(sorted(known))}")
    failed: list[str] = []
    if not arguments.table:
        memory.keep_freed()
        for images in arguments.images:
            failed += on_images(images, arguments)
    for title, rows in tables(read(arguments.ledger)):
        print(f"\n{title}\n")
        for row in (HEAD, ["---"] * len(HEAD), *rows):
            print("| " + " | ".join(row) + " |")
    if failed:
        raise SystemExit("\n".join(["not measured:", *failed]))


def on_images(folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Train and judge all that the ledger does not hold yet; gives what was refused, and why.

    Raises SystemExit where the folder has no test split.
    """
    found, where = find(folder), device.pick(arguments.device)
    if found.test is None and not arguments.choose:
        raise SystemExit(f"{folder} has no test/ beside train/")
    setting = {
        "images": folder.name,
        "fingerprint": found.train.fingerprint,
        "backbone": arguments.backbone,
        "set": arguments.set,
        "minutes": arguments.minutes,
        "choosing": arguments.choose,
    }
    if arguments.choose:
        found = held_out(found)
    room: Room | None = None
    failed: list[str] = []
    for task in tasks(setting, arguments):
        about = {**setting, "method": task.method, "settings": list(task.settings)}
        if any(all(line[key] == item for key, item in about.items()) for line in read(arguments.ledger)):
            continue
        say(f"{folder.name}: {task.method} {' '.join(task.settings)}".rstrip())
        try:
            encoder, side, told = trained(task, found, arguments, where)
        except SslpreError as error:  # the other methods have hours to go
            failed.append(f"{folder.name}: {task.method} {' '.join(task.settings)}: {error.message}; {error.hint}")
            continue
        if room is None:
            room = Room.of(found, encoder, side, where)
        if not arguments.choose:
            room.baselines(fresh(arguments.backbone, encoder.image_size), {**setting, "settings": []}, arguments.ledger)
        if encoder.image_size != room.exam.parts[0].side:
            raise SystemExit(f"{task.method} is at {encoder.image_size} px, others at {room.exam.parts[0].side}")
        add(arguments.ledger, {**about, **told, **room.judged(task.method, [encoder])})
    return failed


def tasks(setting: dict[str, Any], arguments: argparse.Namespace) -> Iterator[Task]:
    """What is to be trained: while choosing every candidate, then for each method the best that was chosen."""
    for name in sorted(methods()):
        if arguments.only and name not in arguments.only:
            continue
        tries = [one.partition(":")[2] for one in arguments.tries if one.partition(":")[0] == name]
        if setting["choosing"]:
            for one in ("", *tries):
                yield Task(name, tuple(filter(None, SETTING.split(one))), True)
        else:
            yield Task(name, chosen(name, setting, read(arguments.ledger)), False)


def chosen(method: str, setting: dict[str, Any], lines: list[dict[str, Any]]) -> tuple[str, ...]:
    """The settings whose best stage had the highest linear accuracy on held-out training images; none if none were
    tried on these images with this network. Of candidates only those of the longest budget up to this one's."""
    same = ("fingerprint", "backbone", "set")
    tried = [one for one in lines if one["choosing"] and all(one[key] == setting[key] for key in same)]
    budgets = [one["minutes"] for one in tried if one["minutes"] <= setting["minutes"]]
    longest = max(budgets, default=0.0)  # of all methods: a candidate that had more time than the others does not count
    tried = [one for one in tried if one["method"] == method and one["minutes"] == longest]
    won = max(tried, key=lambda one: at_best(one)["linear"]["accuracy"], default={"settings": ()})
    return tuple(won["settings"])


def held_out(found: Found) -> Found:
    """A fifth of each class of the training images in place of the test images."""
    if not found.train.classes:
        raise SystemExit(f"{found.train.where} has no classes")
    first, second = split(found.train.labels, HELD_OUT, 0)
    return replace(found, train=subset(found.train, first), test=subset(found.train, second))


def fresh(backbone: str, image_size: int) -> Encoder:
    """The network as any method but those with colours of their own begins with it."""
    table = ours.recipes.load("simclr").encoder
    return build(backbone, stem=table.stem, image_size=image_size, mean=table.mean, std=table.std).eval()


def recipe_of(method: str) -> str:
    """The recipe that is the method's for any folder."""
    return min(name for name in names() if name == method or name.startswith(f"{method}-"))


def trained(
    task: Task, found: Found, arguments: argparse.Namespace, where: torch.device
) -> tuple[Encoder, int, dict[str, Any]]:
    """A run as long as the budget, as `sslpre pretrain` makes it: its encoder, the side of stored images, figures."""
    typed = (f"encoder.backbone={arguments.backbone}", *arguments.set, *task.settings)
    with tempfile.TemporaryDirectory(prefix="sslpre-methods-") as folder:
        recipe = ours.resolved(recipe_of(task.method), found, where, typed)
        epochs = affordable(recipe, found, where, Path(folder), arguments)
        recipe = recipe.edit(train={"epochs": epochs})
        place = Path(folder) / "run"
        with filled(place, recipe, found, where) as run:
            figures = loop.train(run)
            told = {"chance": run.objective.chance, "learned": learned(place / "metrics.jsonl")}
        (place / "recipe.toml").write_text(ours.recipes.write(run.recipe), encoding="utf-8")
        encoder, _, _ = open_run(place, where)
    views = len(run.views.sides)
    told |= {"epochs": epochs, "steps": run.step, "seconds": figures["seconds"], "image_size": encoder.image_size}
    told |= {"views_per_s": views * figures["images_per_s"], "recipe": ours.recipes.write(run.recipe)}
    return encoder, int(recipe.data.store_size), told


def learned(path: Path) -> dict[str, float]:
    """Means of the loss and of each term over the last epoch: whether the task itself was learned."""
    lines = [one for one in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if "lr" in one]
    lines = [one for one in lines if one["epoch"] == lines[-1]["epoch"]]
    names = list(lines[0])[: list(lines[0]).index("lr")]
    return {name: sum(one[name] for one in lines) / len(lines) for name in names if name not in ("step", "epoch")}


def affordable(recipe: Recipe, found: Found, where: torch.device, folder: Path, arguments: argparse.Namespace) -> int:
    """Epochs that the budget pays for, by steps of a run that is thrown away and by its look at every image."""
    with filled(folder / "measured", recipe, found, where) as run, closing(ours.epochs(run.stream)) as batches:
        begun = time.monotonic()
        loop.start_epoch(run, 0)
        look = time.monotonic() - begun
        steps = ours.steps(run, batches)
        for _ in islice(steps, WARM):
            continue
        wait(where)
        begun, count = time.monotonic(), 0
        while not count or time.monotonic() - begun < arguments.measure:
            next(steps)
            wait(where)
            count += 1
        step = (time.monotonic() - begun) / count
    return max(1, int(60 * arguments.minutes / (look + step * run.stream.steps_per_epoch)))


@contextmanager
def filled(folder: Path, recipe: Recipe, found: Found, where: torch.device) -> Iterator[Run]:
    """A new run whose images are decoded already: how long that takes depends on the files, not on the method."""
    folder.mkdir()
    run = ours.run_of(folder, recipe, found, where, "device" if where.type == "cuda" else "ram")
    with closing(run.stream.store):
        ours.fill(run.stream)
        yield run


def wait(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


@dataclass
class Room:
    """Where encoders of one network are examined on the same images, decoded once."""

    exam: Exam

    @classmethod
    def of(cls, found: Found, encoder: Encoder, side: int, where: torch.device) -> Room:
        data = labelled(found.train, found.test, 0)
        parts = centres(data, encoder.image_size, side, where, ours.workers(), 0.01)
        return cls(Exam(data, parts, layout(encoder.eval()), ASKED, 0, where, say))

    def judged(self, name: str, encoders: list[Encoder]) -> dict[str, Any]:
        """Every stage and the output, means over the encoders, and which stage held-out training images choose."""
        self.exam.found.pop(name, None)
        for encoder in encoders:
            with lent(encoder, self.exam.device):
                self.exam.take([(name, encoder)])
        plan, found = self.exam.plan, self.exam.found[name]
        rows = [self.row(features, dim, some) for features, dim, some in zip(plan.names, plan.dims, found, strict=True)]
        return {
            "rows": rows,
            "best": {question.key: name for question, name in best(plan.names, [some[0] for some in found]).items()},
        }

    def baselines(self, encoder: Encoder, about: dict[str, Any], path: Path) -> None:
        """Random weights, the mean of three seeds, and raw pixels: a line each, unless they are there."""
        if any(line["method"] == RAW and all(line[key] == about[key] for key in about) for line in read(path)):
            return
        for _ in self.exam.parts[0]:  # the first pass, which says which images there are
            continue
        images = calibration_images(self.exam.parts[0], self.exam.seed)
        twins = [random_twin(encoder, seed + 1, images, 256) for seed in range(SEEDS)]
        add(path, {**about, "method": RANDOM, **self.judged(RANDOM, twins)})
        assert self.exam.raw is not None, "random weights were judged"
        add(path, {**about, "method": RAW, "rows": [self.row("pixels", self.exam.raw_dim, [self.exam.raw])]})

    def row(self, features: str, dim: int, found: list[Answers]) -> dict[str, Any]:
        scores = self.exam.judge().scores(found)
        return {"features": features, "dim": dim, **{question.key: plain(one) for question, one in scores.items()}}


def plain(score: Score) -> dict[str, Any]:
    return {key: asdict(score)[key] for key in ("accuracy", "low", "high", "strengths")}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of the ledger; one that was cut off by a kill does not count."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def add(path: Path, measured: dict[str, Any]) -> None:
    whole = ledger.record("methods", measured, ours.PACKAGES)
    if path.exists():
        kept = path.read_bytes()
        if not kept.endswith(b"\n"):  # half a line, of a run that was killed while it wrote
            path.write_bytes(kept[: kept.rfind(b"\n") + 1])
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(whole, allow_nan=False) + "\n")


def at_best(line: dict[str, Any]) -> dict[str, Any]:
    """The row of the stage that held-out training images choose for the linear probe."""
    return next(row for row in line["rows"] if row["features"] == line["best"]["linear"])


def tables(lines: list[dict[str, Any]]) -> Iterator[tuple[str, list[list[str]]]]:
    """A title and rows for each set of images and budget. Best first, then the baselines."""
    keys = ("images", "fingerprint", "backbone", "set", "minutes", "choosing")
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(json.dumps([line[key] for key in keys]), []).append(line)
    for same in groups.values():
        one = same[0]
        more = f", {' '.join(one['set'])}" if one["set"] else ""
        kind = "a fifth of train/ held out, test/ unseen" if one["choosing"] else "test/"
        title = f"{one['images']}, {one['backbone']}{more}, {one['minutes']:g} minutes each: accuracy in % on {kind}"
        random = next((line for line in same if line["method"] == RANDOM), None)
        own = [line for line in same if line["method"] not in (RANDOM, RAW)]
        own.sort(key=lambda line: -at_best(line)["linear"]["accuracy"])
        others = [line for line in same if line["method"] in (RANDOM, RAW)]
        yield title, [cells(line, random) for line in (*own, *others)]


def cells(line: dict[str, Any], random: dict[str, Any] | None) -> list[str]:
    """One row. A method beats random weights where its best stage is better than each of theirs by the intervals."""
    top, last = at_best(line) if "best" in line else line["rows"][-1], line["rows"][-1]
    beats = ""
    if random is not None and "epochs" in line:
        theirs = max(row["linear"]["high"] for row in random["rows"])
        beats = "yes" if top["linear"]["low"] > theirs else "no"
    trained = ["", "", "", ""]
    if "epochs" in line:
        trained = [str(line["epochs"]), duration(line["seconds"]), f"{line['views_per_s']:,.0f}", ""]
        if line.get("chance"):  # the inpainter's loss has no such value, nor had lines of old a place for it
            trained[3] = f"{line['learned']['loss']:.2f} of {line['chance']:.2f}"
    scores = [top["linear"], last["linear"], last["knn"]]
    return [line["method"], " ".join(line["settings"]), *trained, top["features"], *map(percent, scores), beats]


def percent(score: dict[str, Any]) -> str:
    return f"{100 * score['accuracy']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"


if __name__ == "__main__":
    main()
