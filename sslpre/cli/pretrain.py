"""`sslpre pretrain`: from a recipe and a folder of images to a run directory."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sslpre.cli.probe import DEVICES
from sslpre.cli.words import check_folder, flag, not_empty, number, one_of, whole
from sslpre.errors import SslpreError
from sslpre.train.runs import find_run, is_run
from sslpre.weights import spelled

# keys that may be changed when a run goes on
RESUMABLE = (
    "data.max_bad",
    *(f"train.{key}" for key in ("checkpoint_minutes", "micro_batch", "on_collapse", "monitor")),
)
PRECISIONS = ("auto", "bf16", "fp32")
STORES = "Decoded images: device, ram, disk, off, FILE."
RESUME = "Go on with a run. auto: if any, else start."


def pretrain(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", hidden=True)] = None,
    images: Annotated[str | None, typer.Argument(metavar="IMAGES", hidden=True)] = None,
    settings: Annotated[
        list[str] | None, flag("--set", "TABLE.KEY=VALUE", "Change a key of the recipe; repeatable.")
    ] = None,
    backbone: Annotated[str | None, flag("--backbone", "NAME", "Any timm backbone.")] = None,
    init: Annotated[str | None, flag("--init", "pretrained|PATH", "Weights to start from.  [random]")] = None,
    image_size: Annotated[str | None, flag("--image-size", "N", "Side of a view, in pixels.")] = None,
    epochs: Annotated[str | None, flag("--epochs", "N", "Passes over the images.")] = None,
    batch_size: Annotated[str | None, flag("--batch-size", "N", "Images per step, over all devices.")] = None,
    lr: Annotated[str | None, flag("--lr", "X", "Peak learning rate.")] = None,
    seed: Annotated[str | None, flag("--seed", "N", "Weights, order and views.")] = None,
    precision: Annotated[
        str | None, flag("--precision", "|".join(PRECISIONS), "auto: bf16 where it is native.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile the network.")] = False,
    max_bad: Annotated[str | None, flag("--max-bad", "X", "Stop above this share of bad images.  [0.01]")] = None,
    on_collapse: Annotated[str | None, flag("--on-collapse", "warn|stop", "Features all alike: go on?  [warn]")] = None,
    monitor: Annotated[str | None, flag("--monitor", "knn|none", "kNN after epochs, by folder names.")] = None,
    out: Annotated[str | None, flag("--out", "DIR", "Run directory.  [runs/RECIPE-N]")] = None,
    resume: Annotated[str | None, flag("--resume", "RUN|last|auto", RESUME)] = None,
    data_changed: Annotated[str | None, flag("--data-changed", "accept", "Go on although images have changed.")] = None,
    store: Annotated[str | None, flag("--store", "WHERE", STORES)] = None,
    device: Annotated[str, flag("--device", "|".join(DEVICES), "Where to run.  [auto]")] = "auto",
    workers: Annotated[str | None, flag("--workers", "N", "Decoding threads.  [one per core]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON at the end.")] = False,
) -> None:
    """Pretrain an encoder on a folder of images, no labels needed.

    RECIPE: see `sslpre recipes`, or a .toml. IMAGES: any folder [a sample set].

    \b
      sslpre pretrain simclr ./images --epochs 20 --set method.temperature=0.2
    """
    one_of("--device", device, DEVICES)
    if data_changed is not None:
        one_of("--data-changed", data_changed, ("accept",))
        if resume is None:
            raise SslpreError("`--data-changed` is for a run that goes on", "add --resume last")
    threads = whole("--workers", workers, 4, least=0)
    keys: dict[str, Any] = {
        "encoder.backbone": backbone,
        "encoder.init": init,
        "encoder.image_size": whole("--image-size", image_size, 224, auto=True),
        "train.epochs": whole("--epochs", epochs, 20, auto=True),
        "train.batch_size": whole("--batch-size", batch_size, 256, auto=True),
        "optim.lr": number("--lr", lr, 0.1, auto=True),
        "train.seed": whole("--seed", seed, 0, least=0),
        "train.precision": precision and one_of("--precision", precision, PRECISIONS),
        "train.compile": compiled or None,
        "data.max_bad": number("--max-bad", max_bad, 0.01, most=1),
        "train.on_collapse": on_collapse and one_of("--on-collapse", on_collapse, ("warn", "stop")),
        "train.monitor": monitor and one_of("--monitor", monitor, ("knn", "none")),
    }
    words = {"RECIPE": recipe, "IMAGES": images, "--set": settings, "--out": out}
    machine: dict[str, Any] = {"device": device, "workers": threads, "store": store}
    machine["data_changed"] = data_changed is not None
    start(words, {key: v for key, v in keys.items() if v is not None}, resume, machine, as_json)


def start(
    words: dict[str, Any], keys: dict[str, Any], resume: str | None, machine: dict[str, Any], as_json: bool
) -> None:
    """Train, then print what to type next. words: as typed; keys: recipe keys that flags set, `table.key` to value;
    machine: device, workers and store."""
    refuse(words, keys, resume)
    look(words, keys, resume)

    import json

    from sslpre.report.live import Live
    from sslpre.train.run import Options, pretrain

    overrides: dict[str, dict[str, Any]] = {}
    for path, value in keys.items():
        table, _, key = path.partition(".")
        overrides.setdefault(table, {})[key] = value
    images, out = (None if words[name] is None else Path(words[name]) for name in ("IMAGES", "--out"))
    settings = tuple(words["--set"] or ())
    finished = pretrain(
        Options(words["RECIPE"], images, settings, overrides, out, resume, onlookers=(Live(),), **machine)
    )
    summary = dict(finished.summary)
    if not summary:  # the first of several processes says the rest
        return
    run = shlex.quote(str(finished.run))
    if finished.recipe.data.images:
        more = "" if finished.classes else " --data ./labelled"
        print(f"next: sslpre probe {run} --linear{more}", file=sys.stderr)
    else:
        summary["probe"] = probe_sample(finished.run, machine["device"], machine["workers"], as_json)
    if (finished.run / "encoder").exists():
        print(f"next: sslpre export encoder.safetensors --run {run}", file=sys.stderr)
    if as_json:
        print(json.dumps(summary))


def refuse(words: dict[str, Any], keys: dict[str, Any], resume: str | None) -> None:
    """Raises SslpreError (exit 2) for a run without a recipe, and for a resumed run that would not be the same run."""
    recipe = words["RECIPE"]
    not_empty({**words, "--init": keys.get("encoder.init"), "--resume": resume}, "sslpre pretrain simclr ./images")
    out = words["--out"]
    known = resume == "auto" and recipe is None and out is not None and is_run(Path(out))
    if resume is not None and (resume != "auto" or known):
        flags = ["--" + path.partition(".")[2].replace("_", "-") for path in keys if path not in RESUMABLE]
        settings = [one for one in words["--set"] or () if one.partition("=")[0].strip() not in RESUMABLE]
        typed = {**words, "--set": settings, "--out": None if known else out}
        given = ", ".join(f"`{name}`" for name in [*(name for name, word in typed.items() if word), *flags])
        if given:
            message = f"`--resume {resume}` goes on with a run as it was begun, so {given} cannot be given"
            raise SslpreError(message, f"sslpre pretrain --resume {shlex.quote(resume)}")
    elif recipe is None and resume is None:
        raise SslpreError("RECIPE is missing", "sslpre pretrain simclr ./images")
    elif recipe is not None and Path(recipe).is_dir():
        raise SslpreError(
            f"`{recipe}` is a folder, and RECIPE comes first", f"sslpre pretrain simclr {shlex.quote(recipe)}"
        )


def look(words: dict[str, Any], keys: dict[str, Any], resume: str | None) -> None:
    """Tell the most common mistakes at once, before torch is imported: an unknown recipe or run, a missing folder.

    A path after --init is made absolute in `keys`.
    """
    if resume is not None and resume != "auto":
        find_run(resume)
    if words["RECIPE"] is not None:
        from sslpre.recipe import apply_setting, read

        plain = read(words["RECIPE"])
        for setting in words["--set"] or ():
            apply_setting(plain, setting)
    if words["IMAGES"] is not None:
        check_folder(words["IMAGES"])
    begun = resume == "auto" and words["--out"] is not None and is_run(Path(words["--out"]))
    if "encoder.init" in keys and not begun:
        keys["encoder.init"] = spelled(keys["encoder.init"])


def probe_sample(run: Path, device: str, workers: int | None, as_json: bool) -> Any:
    """Probe a run on the built-in sample set; prints the table unless the summary is to hold it as JSON."""
    from sslpre.cli.probe import measure
    from sslpre.train.device import pick

    report = measure(run, None, linear=True, knn=True, device=pick(device), workers=workers)
    if not as_json:
        print(report.table())
    return report.json()
