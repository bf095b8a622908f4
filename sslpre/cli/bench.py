"""`sslpre bench`: where does the time of a run go?"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sslpre.cli.pretrain import PRECISIONS, STORES, look
from sslpre.cli.probe import DEVICES
from sslpre.cli.words import flag, not_empty, one_of, whole
from sslpre.errors import SslpreError, printable


def bench(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", hidden=True)] = None,
    images: Annotated[str | None, typer.Argument(metavar="IMAGES", hidden=True)] = None,
    settings: Annotated[
        list[str] | None, flag("--set", "TABLE.KEY=VALUE", "Change a key of the recipe; repeatable.")
    ] = None,
    backbone: Annotated[str | None, flag("--backbone", "NAME", "Any timm backbone.")] = None,
    image_size: Annotated[str | None, flag("--image-size", "N", "Side of a view, in pixels.")] = None,
    batch_size: Annotated[str | None, flag("--batch-size", "N", "Images per step.")] = None,
    precision: Annotated[
        str | None, flag("--precision", "|".join(PRECISIONS), "auto: bf16 where it is native.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile the network.")] = False,
    store: Annotated[str, flag("--store", "WHERE", STORES)] = "auto",
    device: Annotated[str, flag("--device", "|".join(DEVICES), "Where to run.  [auto]")] = "auto",
    workers: Annotated[str | None, flag("--workers", "N", "Decoding threads.  [one per core]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show where the time of a run would go, stage by stage.

    Decoding, store, copy, views, forward, backward and optimiser are timed
    alone, then whole steps. Half a minute, and nothing is left behind.

    \b
      sslpre bench simclr ./images
      sslpre bench simclr ./images --batch-size 128 --json
    """
    one_of("--device", device, DEVICES)
    threads = whole("--workers", workers, 4, least=0)
    keys: dict[str, Any] = {
        "encoder": {"backbone": backbone, "image_size": whole("--image-size", image_size, 224, auto=True)},
        "train": {
            "batch_size": whole("--batch-size", batch_size, 256, auto=True),
            "precision": precision and one_of("--precision", precision, PRECISIONS),
            "compile": compiled or None,
        },
    }
    words = {"RECIPE": recipe, "IMAGES": images, "--set": settings, "--store": store}
    not_empty(words, "sslpre bench simclr ./images")
    if recipe is None:
        raise SslpreError("RECIPE is missing", "sslpre bench simclr ./images")
    if Path(recipe).is_dir():
        hint = f"sslpre bench simclr {shlex.quote(recipe)}"
        raise SslpreError(f"`{recipe}` is a folder, and RECIPE comes first", hint)
    look(words, {}, None)

    import json

    from sslpre.bench import bench as measure
    from sslpre.train.run import Options

    typed = {table: {key: one for key, one in ones.items() if one is not None} for table, ones in keys.items()}
    folder = None if images is None else Path(images)
    options = Options(recipe, folder, tuple(settings or ()), typed, device=device, workers=threads, store=store)
    with talking() as (say, show):
        report = measure(options, say, show)
    print(json.dumps(report.json()) if as_json else report.table())


@contextlib.contextmanager
def talking() -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Two functions: one prints a line on stderr, one shows on a terminal what is being measured, until the end."""
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True)  # a path stays in one piece

    def say(line: str) -> None:
        console.print(printable(line), markup=False, highlight=False)

    if not console.is_terminal:
        yield say, lambda what: None
        return
    with console.status("starting") as status:
        yield say, lambda what: status.update(f"measuring: {what}")
