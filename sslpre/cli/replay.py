"""`sslpre replay`: the step that ended a run, once more."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sslpre.cli.probe import DEVICES
from sslpre.cli.words import flag, not_empty, one_of, whole
from sslpre.errors import printable

AGAIN = 10
SHOWN = 8  # images that are named


def replay(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", hidden=True)],
    device: Annotated[str, flag("--device", "|".join(DEVICES), "Where to run.  [auto]")] = "auto",
    workers: Annotated[str | None, flag("--workers", "N", "Decoding threads.  [one per core]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Take the step again that was not finite and ended a run.

    It shows where the first number that is not finite arises. BUNDLE is a
    folder that a run left when it ended with exit code 10. The exit code is 10
    where the step is not finite again, and 0 where it is.

    \b
      sslpre replay runs/simclr-1/nonfinite/step-00000123
    """
    not_empty({"BUNDLE": bundle}, "sslpre replay runs/simclr-1/nonfinite/step-00000123")
    one_of("--device", device, DEVICES)
    threads = whole("--workers", workers, 4, least=0)

    from sslpre.train.bundle import plain
    from sslpre.train.bundle import replay as take
    from sslpre.train.device import pick

    about, traced = take(Path(bundle), pick(device), threads)
    if as_json:
        print(json.dumps({"then": about, "now": dataclasses.asdict(traced) | {"terms": plain(traced.terms)}}))
    else:
        for name, told in lines(about, traced):
            print(f"{name:<10} {printable(told)}")
    if traced.what:
        raise typer.Exit(AGAIN)


def lines(about: dict[str, Any], traced: Any) -> list[tuple[str, str]]:
    names = [f"{one['name']}" for one in about["images"][:SHOWN]]
    more = f" and {len(about['images']) - SHOWN} more" if len(about["images"]) > SHOWN else ""
    told = [
        ("step", f"{about['step']} (epoch {about['epoch'] + 1}) of {about['method']}: {about['what']} not finite then"),
        ("images", ", ".join(names) + more),
        ("then", about["first"] or "not known"),
    ]
    told += [(name, f"{term:.6g}") for name, term in traced.terms.items()]
    if not traced.what:
        return [*told, ("now", "every loss and gradient is finite")]
    gradients = f"; gradients not finite: {', '.join(traced.gradients)}" if traced.gradients else ""
    return [*told, ("now", f"{traced.what} not finite; first: {traced.first}{gradients}")]
