"""`sslpre preview`: what does the task show the network?"""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sslpre.cli.pretrain import look
from sslpre.cli.probe import DEVICES
from sslpre.cli.words import check_folder, flag, not_empty, one_of, whole
from sslpre.errors import SslpreError, printable
from sslpre.shelf import names
from sslpre.train.runs import ROOT, find_run, is_run

EXAMPLE = "sslpre preview simclr ./images sheet.png"
MOST = 64  # rows of a sheet


def preview(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE|RUN", hidden=True)] = None,
    images: Annotated[str | None, typer.Argument(metavar="IMAGES", hidden=True)] = None,
    out: Annotated[str | None, typer.Argument(metavar="OUT.png", hidden=True)] = None,
    rows: Annotated[str | None, flag("--rows", "N", "Rows of the sheet, at most.  [8]")] = None,
    settings: Annotated[
        list[str] | None, flag("--set", "TABLE.KEY=VALUE", "Change a key of the recipe; repeatable.")
    ] = None,
    backbone: Annotated[str | None, flag("--backbone", "NAME", "Any timm backbone.")] = None,
    image_size: Annotated[str | None, flag("--image-size", "N", "Side of a view, in pixels.")] = None,
    device: Annotated[str, flag("--device", "|".join(DEVICES), "Where to run.  [auto]")] = "auto",
) -> None:
    """Show what the task shows the network, as a sheet of pictures.

    Of a recipe the weights are fresh. Of a run, a path or a name under runs/,
    they are its newest, so that fill-ins, colours and clusters mean something.
    Without IMAGES: those of the recipe or run, or the built-in sample set.

    \b
      sslpre preview simclr ./images sheet.png
      sslpre preview last sheet.png
    """
    one_of("--device", device, DEVICES)
    count = whole("--rows", rows, 8) or 8
    if count > MOST:
        raise SslpreError(f"`--rows {count}` is not from 1 to {MOST}", "write --rows 8")
    keys = {"backbone": backbone, "image_size": whole("--image-size", image_size, 224, auto=True)}
    words: dict[str, Any] = {"RECIPE": recipe, "IMAGES": images, "OUT.png": out, "--set": settings}
    not_empty({**words, "--backbone": backbone}, EXAMPLE)
    recipe, images, out = told(recipe, images, out)
    run = run_of(recipe, images)
    if run is None:
        look({**words, "IMAGES": images}, {}, None)
    else:
        refuse(str(run), settings, keys)
        if images is not None:
            check_folder(images)
    if os.path.lexists(out):
        raise SslpreError(f"`{out}` exists", "name another OUT.png, or remove it first")

    from sslpre.preview import preview as show
    from sslpre.train.run import Options

    typed = {"encoder": {key: one for key, one in keys.items() if one is not None}}
    folder = None if images is None else Path(images)
    options = Options(recipe, folder, tuple(settings or ()), typed, device=device)
    print(printable(f"done: {show(options, run, Path(out), count)}"), file=sys.stderr)


def told(recipe: str | None, images: str | None, out: str | None) -> tuple[str, str | None, str]:
    """The three words, where that in the middle may be left out. Raises SslpreError (exit 2) for a wrong order."""
    if recipe is None:
        raise SslpreError("RECIPE is missing", EXAMPLE)
    given = [word for word in (recipe, images, out) if word is not None]
    if len(given) < 3 and not is_png(given[-1]) and (len(given) == 1 or Path(given[-1]).is_dir()):
        raise SslpreError("OUT.png is missing", shlex.join(["sslpre", "preview", *given, "sheet.png"]))
    if is_png(recipe) and len(given) == 1:
        raise SslpreError("RECIPE is missing", shlex.join(["sslpre", "preview", "simclr", recipe]))
    last = given[-1]
    if not is_png(last):
        better = [recipe, last, given[1]] if is_png(given[1]) else [*given[:-1], str(Path(last).with_suffix(".png"))]
        raise SslpreError(f"`{last}` does not end in .png", shlex.join(["sslpre", "preview", *better]))
    return recipe, given[1] if len(given) == 3 else None, last


def is_png(word: str) -> bool:
    return Path(word).suffix.lower() == ".png"


def run_of(word: str, images: str | None) -> Path | None:
    """The run that `word` names, None where it names a recipe. Raises SslpreError (exit 2) where it names neither."""
    if word in names() or word.endswith(".toml"):
        return None
    if word == "last" or is_run(Path(word)) or is_run(ROOT / word):
        return find_run(word)
    if Path(word).is_dir():
        hint = shlex.join(["sslpre", "preview", "simclr", word, "sheet.png"])
        raise SslpreError(f"`{word}` is a folder, and RECIPE comes first", hint)
    if os.sep in word:
        return find_run(word)
    near = difflib.get_close_matches(word, names(), n=1, cutoff=0.4)
    more = [images] if images is not None else []
    hint = shlex.join(["sslpre", "preview", near[0], *more, "sheet.png"]) if near else "sslpre recipes"
    raise SslpreError(f"no recipe or run `{word}`", hint)


def refuse(run: str, settings: list[str] | None, keys: dict[str, Any]) -> None:
    """Raises SslpreError (exit 2) where a run would not be shown as it is."""
    flags = [f"--{key.replace('_', '-')}" for key, one in keys.items() if one is not None]
    given = ", ".join(f"`{name}`" for name in [*(["--set"] if settings else []), *flags])
    if given:
        hint = shlex.join(["sslpre", "preview", run, "sheet.png"])
        raise SslpreError(f"`{run}` is shown as it was trained, so {given} cannot be given", hint)
