"""`sslpre probe`: how good is an encoder, and against what?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sslpre.cli.words import check_folder, flag, one_of, whole
from sslpre.errors import SslpreError
from sslpre.train.runs import find_run, is_run

if TYPE_CHECKING:
    import torch

    from sslpre.data.find import Found
    from sslpre.encoder import Encoder
    from sslpre.probe import Report
    from sslpre.recipe import DataTable

DEVICES = ("auto", "cpu", "cuda", "mps")


def probe(
    target: Annotated[str | None, typer.Argument(metavar="RUN|ENCODER", hidden=True)] = None,
    data: Annotated[str | None, flag("--data", "IMAGES", "Labelled images.  [the run's own]")] = None,
    linear: Annotated[bool, typer.Option("--linear", help="Logistic regression on the features.")] = False,
    knn: Annotated[bool, typer.Option("--knn", help="Nearest neighbours by cosine.")] = False,
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
    if data == "":  # an unset shell variable; as a path it would mean the current folder
        raise SslpreError("--data is an empty word", "sslpre probe --data ./labelled")
    path = locate(target)
    if data is not None:
        check_folder(data)
    if data is None and not is_run(path):
        raise SslpreError(f"`{path}` does not say which images to probe with", f"sslpre probe {path} --data ./labelled")

    import json

    from sslpre.train.device import pick

    both = linear == knn
    report = measure(path, data, linear=linear or both, knn=knn or both, device=pick(device), workers=threads)
    print(json.dumps(report.json()) if as_json else report.table())


def locate(target: str | None) -> Path:
    """The run or the exported encoder that `target` names. Raises SslpreError (exit 2) where there is none."""
    if target is not None and not is_run(Path(target)):
        path = Path(target)
        if (path.suffix == ".safetensors" and path.is_file()) or (path / "config.json").is_file():
            return path
    return find_run(target)


def measure(
    path: Path, data: str | None, *, linear: bool, knn: bool, device: torch.device, workers: int | None
) -> Report:
    """Probe the run or exported encoder at `path` on the folder `data`, or on the images of the run's own recipe."""
    from sslpre.probe import probe as judge
    from sslpre.train.progress import say

    encoder, table = opened(path, device)
    found = images_of(table if data is None else table.model_copy(update={"images": data}))
    side = int(table.store_size)
    return judge(
        encoder,
        found.train,
        found.test,
        side=side,
        linear=linear,
        knn=knn,
        device=device,
        workers=workers,
        max_bad=table.max_bad,
        say=say,
    )


def opened(path: Path, device: torch.device) -> tuple[Encoder, DataTable]:
    """The encoder of the run or export at `path`, and how its images are found and kept."""
    if is_run(path):
        from sslpre.train.run import open_run

        encoder, recipe, _ = open_run(path, device)
        return encoder, recipe.data
    from sslpre.export import open_encoder
    from sslpre.recipe import DataTable

    encoder, facts = open_encoder(path)
    return encoder.to(device), DataTable(store_size=int(facts.get("store_size", facts["image_size"])))


def images_of(table: DataTable) -> Found:
    """The images that a recipe's [data] names; "" is the built-in sample set. Raises SslpreError (exit 4)."""
    if table.images == "":
        from sslpre.data.sample import sample

        return sample()
    from sslpre.data.find import find

    return find(Path(table.images), table.max_pixels)
