"""`sslpre check`: what would a run meet, before hours are spent?"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from sslpre.cli.bench import talking
from sslpre.cli.pretrain import look
from sslpre.cli.probe import DEVICES
from sslpre.cli.words import flag, not_empty, one_of, whole
from sslpre.errors import SslpreError
from sslpre.shelf import names


def check(
    images: Annotated[str, typer.Argument(metavar="IMAGES", hidden=True)],
    recipe: Annotated[str, flag("--recipe", "RECIPE", "The recipe to run.  [simclr]")] = "simclr",
    device: Annotated[str, flag("--device", "|".join(DEVICES), "Where to run.  [auto]")] = "auto",
    workers: Annotated[str | None, flag("--workers", "N", "Threads that read images.  [one per core]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every name.")] = False,
) -> None:
    """Look at images and machine before hours are spent.

    Bad files, sizes, copies, classes, disks; what pretrain would choose and how
    long it would take, by some steps of it; when not to pretrain. Where a run
    would be stopped, the exit code is 4 (images) or 3 (machine).

    \b
      sslpre check ./images
      sslpre check ./images --recipe rotation --json
    """
    one_of("--device", device, DEVICES)
    threads = whole("--workers", workers, 4)
    not_empty({"IMAGES": images, "--recipe": recipe}, "sslpre check ./images")
    if images in names() and not Path(images).exists():
        raise SslpreError(f"`{images}` is a recipe, and IMAGES a folder", f"sslpre check ./images --recipe {images}")
    if Path(recipe).is_dir():
        hint = f"sslpre check {shlex.quote(images)} --recipe simclr"
        raise SslpreError(f"`--recipe {recipe}` is a folder", hint)
    missing = not Path(images).is_dir()
    look({"RECIPE": recipe, "--set": None, "IMAGES": images if missing else None}, {}, None)

    import json

    from sslpre.check.pair import refuse_misfit

    refuse_misfit()
    from sslpre.check.findings import Typed
    from sslpre.check.report import check as report_of
    from sslpre.check.table import table
    from sslpre.train.run import Options

    options = Options(recipe, Path(images), device=device, workers=threads)
    with talking() as (_, busy):
        report = report_of(options, Typed(recipe, images, device, threads), busy)
    print(json.dumps(report.json(), allow_nan=False) if as_json else table(report))
    if report.code:
        raise typer.Exit(report.code)
