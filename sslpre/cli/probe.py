"""`sslpre probe`: how good is an encoder, and against what?"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sslpre.cli.words import check_folder, flag, not_empty, number, one_of, whole
from sslpre.errors import SslpreError
from sslpre.train.runs import find_run, is_run

if TYPE_CHECKING:
    import torch

    from sslpre.data.find import Found
    from sslpre.encoder import Encoder
    from sslpre.probe import Report
    from sslpre.recipe import DataTable

DEVICES = ("auto", "cpu", "cuda", "mps")
ENCODERS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".pkl", ".tar", ".onnx")  # a word ending so means a file


def probe(
    target: Annotated[str | None, typer.Argument(metavar="RUN|ENCODER", hidden=True)] = None,
    data: Annotated[str | None, flag("--data", "IMAGES", "Labelled images.  [the run's own]")] = None,
    linear: Annotated[bool, typer.Option("--linear", help="Logistic regression on the features.")] = False,
    knn: Annotated[bool, typer.Option("--knn", help="Nearest neighbours by cosine.")] = False,
    max_bad: Annotated[str | None, flag("--max-bad", "X", "Stop above this share of bad images.  [the run's]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    device: Annotated[str, flag("--device", "|".join(DEVICES), "Where to run.  [auto]")] = "auto",
    workers: Annotated[str | None, flag("--workers", "N", "Decoding threads.  [one per core]")] = None,
) -> None:
    """Measure how good a frozen encoder is on labelled images.

    Beside it: random weights, raw pixels and chance. Neither --linear nor --knn means both.

    RUN is a path or a name under runs/ [the newest]; ENCODER is what `sslpre export` wrote. Labels are folder names:
    IMAGES/cat/1.jpg, or IMAGES/train/cat/1.jpg and IMAGES/test/cat/2.jpg.

    \b
      sslpre probe --linear
      sslpre probe runs/simclr-1 --data ./labelled --linear --json
    """
    one_of("--device", device, DEVICES)
    threads = whole("--workers", workers, 4, least=0)
    share = number("--max-bad", max_bad, 0.01, most=1)
    not_empty({"RUN": target, "--data": data}, "sslpre probe runs/simclr-1 --data ./labelled")
    path = locate(target)
    if data is not None:
        check_folder(data)
    if data is None and not is_run(path):
        if path.suffix != ".safetensors" and not path.is_dir():  # no encoder at all: this says what it is
            from sslpre.export import open_encoder

            open_encoder(path)
        hint = f"sslpre probe {shlex.quote(str(path))} --data ./labelled"
        raise SslpreError(f"`{path}` does not say which images to probe with", hint)

    import json

    from sslpre.train.device import pick

    both = linear == knn
    report = measure(
        path, data, linear=linear or both, knn=knn or both, device=pick(device), workers=threads, max_bad=share
    )
    print(json.dumps(report.json()) if as_json else report.table())


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
    data: str | None,
    *,
    linear: bool,
    knn: bool,
    device: torch.device,
    workers: int | None,
    max_bad: float | None = None,
) -> Report:
    """Probe the run or exported encoder at `path` on the folder `data`, or on the images of the run's own recipe.

    max_bad: share of unreadable images, None for the one of the run's recipe.
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
