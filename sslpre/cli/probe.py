"""`sslpre probe`: how good is an encoder, and against what?"""

from __future__ import annotations

import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslpre.cli.words import check_folder, flag, not_empty, number, one_of, whole
from sslpre.errors import SslpreError
from sslpre.train.runs import find_run, is_run

if TYPE_CHECKING:
    import torch

    from sslpre.data.find import Found
    from sslpre.encoder import Encoder
    from sslpre.probe import Report
    from sslpre.probe.plane import Plane
    from sslpre.recipe import DataTable

DEVICES = ("auto", "cpu", "cuda", "mps")
ENCODERS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".pkl", ".tar", ".onnx")  # a word ending so means a file


def probe(
    targets: Annotated[list[str] | None, typer.Argument(metavar="RUN|ENCODER", hidden=True)] = None,
    data: Annotated[str | None, flag("--data", "IMAGES", "Labelled images.  [the run's own]")] = None,
    linear: Annotated[bool, typer.Option("--linear", help="Logistic regression on the features.")] = False,
    knn: Annotated[bool, typer.Option("--knn", help="Nearest neighbours by cosine.")] = False,
    finetune: Annotated[bool, typer.Option("--finetune", help="Training of a copy of the network.")] = False,
    labels: Annotated[str | None, flag("--labels", "1%,10%,100%", "Share of the labels, 5 draws each.  [100%]")] = None,
    k: Annotated[str | None, flag("--k", "1,5,20,200", "Neighbours for --knn.  [20]")] = None,
    pairs: Annotated[bool, typer.Option("--list-duplicates", help="Name images that are there twice.")] = False,
    plane: Annotated[str | None, flag("--plane", "FILE", "Several encoders: .svg .png .csv")] = None,
    max_bad: Annotated[str | None, flag("--max-bad", "X", "Share of bad images allowed.  [the run's]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")] = False,
    device: Annotated[str, flag("--device", "|".join(DEVICES), "Where to run.  [auto]")] = "auto",
    workers: Annotated[str | None, flag("--workers", "N", "Decoding threads.  [one per core]")] = None,
) -> None:
    """Measure how good a frozen encoder is on labelled images.

    Beside it random weights, raw pixels, chance. No metric: --linear --knn.

    RUN is a path or a name under runs/ [the newest]; ENCODER is what `sslpre export` wrote. Labels are folder names:
    IMAGES/cat/1.jpg, or IMAGES/train/cat/1.jpg and IMAGES/test/cat/2.jpg.

    \b
      sslpre probe --linear
      sslpre probe runs/simclr-1 --data ./labelled --linear --json
    """
    one_of("--device", device, DEVICES)
    threads = whole("--workers", workers, 4, least=0)
    share = number("--max-bad", max_bad, 0.01, most=1)
    metrics = {"linear": linear, "knn": knn, "finetune": finetune}
    if not any(metrics.values()):
        metrics |= {"linear": True, "knn": plane is None}
    asked: dict[str, Any] = {**metrics, "shares": shares_of(labels, metrics), "ks": ks_of(k, metrics), "pairs": pairs}
    refuse(targets or [], pairs, as_json, as_csv, plane)
    paths = located(targets, data, plane)

    from sslpre.train.device import pick

    where, kind = pick(device), "json" if as_json else "csv" if as_csv else "table"

    def judge(path: Path) -> Report:
        return measure(path, data, device=where, workers=threads, max_bad=share, **asked)

    if plane is None:
        show(kind, [judge(paths[0])])
        return
    from sslpre.cli.plane import compare
    from sslpre.probe.plane import check_out, write

    check_out(Path(plane))
    drawn, reports = compare(paths, data, judge, where, threads, share)
    show(kind, reports, drawn)
    write(drawn, Path(plane))


def show(kind: str, reports: list[Report], plane: Plane | None = None) -> None:
    """What was found, on stdout; of several encoders their plane, and the reports where a program reads it."""
    import json

    if kind == "csv":
        print("".join(report.csv(head=not at) for at, report in enumerate(reports)), end="")
    elif kind == "table":
        print(reports[0].table() if plane is None else plane.table())
    elif plane is None:
        print(json.dumps(reports[0].json()))
    else:
        print(json.dumps({"schema": 2, "plane": plane.json(), "reports": [report.json() for report in reports]}))


def shares_of(word: str | None, metrics: dict[str, bool]) -> tuple[float, ...]:
    """Percent of the labels. Raises SslpreError (exit 2) for what is none, and where no metric takes them."""
    if word is None:
        return (100.0,)
    if not (metrics["linear"] or metrics["finetune"]):
        raise SslpreError(
            "`--labels` is for --linear and --finetune", f"sslpre probe --linear --labels {shlex.quote(word)}"
        )
    shares = []
    for part in word.split(","):
        percent = part.strip().removesuffix("%")
        try:
            share = float(percent) if part.strip().endswith("%") else math.nan
        except ValueError:
            share = math.nan
        if not 0 < share <= 100:
            message = f"`--labels {word}` is not a list of shares above 0 % and up to 100 %"
            raise SslpreError(message, "write --labels 1%,10%,100%")
        shares.append(share)
    return tuple(shares)


def ks_of(word: str | None, metrics: dict[str, bool]) -> tuple[int, ...]:
    """Numbers of neighbours. Raises SslpreError (exit 2) for what is none, and without kNN."""
    if word is None:
        return (20,)
    if not metrics["knn"]:
        raise SslpreError("`--k` is for --knn", f"sslpre probe --knn --k {shlex.quote(word)}")
    parts = [part.strip() for part in word.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 and int(part) for part in parts):
        raise SslpreError(f"`--k {word}` is not a list of whole numbers from 1 on", "write --k 1,5,20,200")
    return tuple(int(part) for part in parts)


def refuse(targets: list[str], pairs: bool, as_json: bool, as_csv: bool, plane: str | None) -> None:
    """Raises SslpreError (exit 2) for words that do not go together."""
    if len(targets) > 1 and plane is None:
        hint = f"sslpre probe {shlex.join(targets)} --plane plane.svg"
        raise SslpreError("`sslpre probe` takes one encoder, and several with --plane", hint)
    if as_json and as_csv:
        raise SslpreError("`--json` and `--csv` are two formats of one output", "leave one of them out")
    if pairs and (as_csv or plane is not None):
        other = "--csv" if as_csv else "--plane"
        message = f"`{other}` has no place for the names of `--list-duplicates`"
        raise SslpreError(message, f"leave {other} out, or take --json")


def needs_images(path: Path) -> None:
    """Raises SslpreError: exit 2 for an encoder that does not say which images to probe with, 5 for none at all."""
    if is_run(path):
        return
    if path.suffix != ".safetensors" and not path.is_dir():  # no encoder at all: this says what it is
        from sslpre.export import open_encoder

        open_encoder(path)
    hint = f"sslpre probe {shlex.quote(str(path))} --data ./labelled"
    raise SslpreError(f"`{path}` does not say which images to probe with", hint)


def located(targets: list[str] | None, data: str | None, plane: str | None) -> list[Path]:
    """Runs and encoders, all there and with images to probe with. Raises SslpreError as `locate` and `needs_images`."""
    words = {"RUN": "" if "" in (targets or ()) else targets, "--data": data, "--plane": plane}
    not_empty(words, "sslpre probe runs/simclr-1 --data ./labelled")
    paths = [locate(target) for target in targets or (None,)]
    if data is not None:
        check_folder(data)
    for path in paths if data is None else ():
        needs_images(path)
    return paths


def locate(target: str | None) -> Path:
    """The run, or the file or folder of an encoder, that `target` names. Raises SslpreError (exit 2) for neither."""
    if target is None or is_run(Path(target)):
        return find_run(target)
    path = Path(target)
    if path.is_file() or any((path / name).is_file() for name in ("config.json", "model.safetensors")):
        return path
    if path.suffix in ENCODERS and not path.is_dir():
        raise SslpreError(f"there is no file `{target}`", "sslpre export encoder.safetensors writes one")
    return find_run(target)


def measure(
    path: Path,
    data: str | None = None,
    *,
    linear: bool,
    knn: bool,
    device: torch.device,
    workers: int | None,
    max_bad: float | None = None,
    **asked: Any,
) -> Report:
    """Probe the run or exported encoder at `path` on the folder `data`, or on the images of the run's own recipe.

    max_bad: share of unreadable images, None for the one of the run's recipe. asked: the rest of what `probe` is asked.
    """
    from sslpre.data.headers import mixed
    from sslpre.probe import probe as judge
    from sslpre.train.progress import say

    encoder, start, table, facts = opened(path, device)
    step = facts.get("step", "0")
    say(f"encoder    {path} at step {step}: {encoder.architecture}, {encoder.image_size} px")
    found = images_of(table if data is None else table.model_copy(update={"images": data}))
    say(f"images     {counted(found)}")
    text = mixed(found.train)
    if text:
        say(text)
    about = {
        "path": str(path),
        "step": int(step) if step.isdecimal() else step,
        "architecture": encoder.architecture,
        "image_size": encoder.image_size,
        "data_fingerprint": facts.get("data_fingerprint", ""),
    }
    side = int(table.store_size)
    report = judge(
        encoder,
        found.train,
        found.test,
        side=side,
        linear=linear,
        knn=knn,
        start=start,
        device=device,
        workers=workers,
        max_bad=table.max_bad if max_bad is None else max_bad,
        pretrained_on=facts.get("data_fingerprint", ""),
        say=say,
        **asked,
    )
    return replace(report, about=about)


def counted(found: Found) -> str:
    """Where the images are and how many: one line."""
    text = f"{found.train.where}: {len(found.train):,} images"
    if found.test is not None:
        other = "" if found.test.where == found.train.where else f"{found.test.where}: "
        text += f" to train the probe with; {other}{len(found.test):,} to test it with"
    return text + (f" ({found.passed_over})" if found.passed_over else "")


def opened(path: Path, device: torch.device) -> tuple[Encoder, Encoder | None, DataTable, dict[str, str]]:
    """The encoder of the run or export at `path`, and the one that training began with where the run keeps it; how its
    images are found and kept; its metadata."""
    from sslpre.export import open_encoder

    if is_run(path):
        from sslpre.train.build import open_run

        encoder, recipe, facts = open_run(path, device)
        return encoder, kept_start(path / "start", device), recipe.data, facts
    from sslpre.recipe import DataTable

    encoder, facts = open_encoder(path)
    return encoder.to(device), None, DataTable(store_size=int(facts.get("store_size", facts["image_size"]))), facts


def kept_start(folder: Path, device: torch.device) -> Encoder | None:
    """The weights that a run began with, where it keeps any. Raises SslpreError (exit 5) where they are damaged."""
    from sslpre.export import open_encoder

    if not folder.is_dir():
        return None
    try:
        return open_encoder(folder)[0].to(device)
    except SslpreError as error:
        message = f"the starting weights that the run keeps cannot be read: {error.message}"
        raise SslpreError(
            message, f"without them the run can be probed: rm -r {shlex.quote(str(folder))}", 5
        ) from error


def images_of(table: DataTable) -> Found:
    """The images that a recipe's [data] names; "" is the built-in sample set. Raises SslpreError (exit 4)."""
    if table.images == "":
        from sslpre.data.sample import sample

        return sample()
    from sslpre.data.find import find

    return find(Path(table.images), table.max_pixels)
