"""`sslpre report`: one page about a run."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sslpre.cli.probe import DEVICES, kept_start
from sslpre.cli.words import flag, not_empty, one_of, whole
from sslpre.errors import printable
from sslpre.train.runs import find_run


def report(
    run: Annotated[str | None, typer.Argument(metavar="RUN", hidden=True)] = None,
    device: Annotated[str, flag("--device", "|".join(DEVICES), "Where to run.  [auto]")] = "auto",
    workers: Annotated[str | None, flag("--workers", "N", "Decoding threads.  [one per core]")] = None,
) -> None:
    """Write one page about a run: is it healthy, and what to do next.

    RUN/report.html is one file that opens in any browser, without a network:
    curves, what the task shows, a map of the images, neighbours, clusters,
    outliers, duplicates, a probe, where the time went, and the recipe. RUN is a
    path or a name under runs/ [the newest], finished or not.

    \b
      sslpre report
      sslpre report runs/simclr-1
    """
    one_of("--device", device, DEVICES)
    threads = whole("--workers", workers, 4, least=0)
    not_empty({"RUN": run}, "sslpre report runs/simclr-1")
    folder = find_run(run)

    from sslpre.report import report as write
    from sslpre.train.device import pick
    from sslpre.train.progress import say

    where = pick(device)
    page = write(folder, where, lambda: kept_start(folder / "start", where), threads, say)
    print(printable(f"done: open {page} in a browser"), file=sys.stderr)
    print(page)
