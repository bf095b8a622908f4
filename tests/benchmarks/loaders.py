"""Two views of every photo: our loader against other libraries', on the same photos, the same cores, in turns.

    python tests/benchmarks/loaders.py --images DIR --size 224 --peer lightly=PYTHON --peer torchvision=PYTHON

PYTHON is the interpreter of an environment where that peer is installed; peers: lightly, lightly-train,
stable-pretraining, torchvision. Every row is a median over rounds of A B C … A B C …; CPU is that of all processes.
`uint8 batch` is a batch without views, ready for the device, where ours are made; the peers' loaders give nothing but
finished views, so these are what it is held against. Rows of compiled views are there where compiling changes anything.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import ledger
import turns

HERE = Path(__file__).resolve().parent
PEERS = ("lightly", "lightly-train", "stable-pretraining", "torchvision")
OURS = (
    "first ram pixels",
    "later ram pixels",
    "later disk pixels",
    "first ram eager",
    "first ram compiled",
    "later ram eager",
    "later ram compiled",
    "later disk compiled",
)
# what is promised: ours, the peers of whom the fastest counts, how many times as fast
PROMISES = (
    ("first ram pixels", PEERS, 3.0),
    ("later ram pixels", PEERS, 20.0),
    ("later disk pixels", PEERS, 20.0),
    *(
        (f"{epoch} ram {how}", peers, least)
        for epoch in ("first", "later")
        for how in ("eager", "compiled")
        for peers, least in ((("lightly", "stable-pretraining"), 3.0), (("lightly-train",), 1.5))
    ),
)
WORDS = {"pixels": "uint8 batch", "eager": "float views, eager", "compiled": "float views, compiled"}


def said(what: str) -> str:
    epoch, kind, until = what.split()
    where = {"first": "first epoch", "later": f"later epochs, {kind}"}[epoch]
    return f"sslpre: {where}: {WORDS[until]}"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start everybody, ask in turns, check that all made what was asked for."""
    words = ["loader", "--images", str(arguments.images), "--size", str(arguments.size)]
    words += ["--batch", str(arguments.batch), "--workers", str(arguments.threads)]
    words += ["--least", str(arguments.least)]
    answers: dict[str, list[dict[str, Any]]] = {}
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(turns.Worker([sys.executable, str(HERE / "ours.py"), *words], arguments.threads))
        peers = {
            name: stack.enter_context(
                turns.Worker([python, str(HERE / "peers.py"), words[0], name, *words[1:]], arguments.threads)
            )
            for name, python in arguments.peer
        }
        eager = arguments.eager or ours.ready["compiler"] is None
        asked = [what for what in OURS if not (eager and what.endswith("compiled"))]
        for turn in range(arguments.rounds + 1):  # the first one warms up: imports, files, compiled code, full stores
            for name, worker in peers.items():
                keep(answers, name, worker.ask("views", arguments.count), turn)
            for what in asked:
                keep(answers, what, ours.ask(what, arguments.count), turn)
        told = {name: worker.ready for name, worker in {"sslpre": ours, **peers}.items()}
    refuse_other_work(answers, arguments, told["sslpre"]["side"])
    return {"loaders": told, "rows": {name: row(given) for name, given in answers.items()}}


def keep(answers: dict[str, list[dict[str, Any]]], name: str, answer: dict[str, Any], turn: int) -> None:
    if turn:
        answers.setdefault(name, []).append(answer)


def refuse_other_work(answers: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace, side: int) -> None:
    """Raises RuntimeError where somebody made other batches than the rest."""
    view = [arguments.batch, 3, arguments.size, arguments.size]
    for name, given in answers.items():
        wanted = [[arguments.batch, 3, side, side]] if name.endswith("pixels") else [view, view]
        for answer in given:
            if answer["shapes"] != wanted:
                raise RuntimeError(f"{name} made {answer['shapes']}, not {wanted}")


def row(given: list[dict[str, Any]]) -> dict[str, float]:
    rates = [answer["images"] / answer["seconds"] for answer in given]
    return {
        "images_per_s": turns.median(rates),
        "spread": turns.spread(rates),
        "cpu_ms_per_image": turns.median([1000 * answer["cpu"] / answer["images"] for answer in given]),
    }


def promised(rows: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Every promise whose two sides were measured: the ratio of images/s, that of CPU time, and what was promised."""
    found = []
    for what, peers, least in PROMISES:
        there = {name: rows[name]["images_per_s"] for name in peers if name in rows}
        if what in rows and there:
            best = max(there, key=lambda name: there[name])
            ratio = rows[what]["images_per_s"] / there[best]
            cpu = rows[best]["cpu_ms_per_image"] / max(rows[what]["cpu_ms_per_image"], 1e-9)
            found.append(dict(ours=what, against=best, ratio=ratio, cpu_ratio=cpu, promised=least, met=ratio >= least))
    return found


def named(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if name not in PEERS or not python:
        raise argparse.ArgumentTypeError(f"write NAME=PYTHON with NAME one of {', '.join(PEERS)}")
    return name, python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of classes, DIR/CLASS/*.jpg")
    parser.add_argument("--size", type=int, default=224, help="side of the views")
    parser.add_argument("--peer", type=named, action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--threads", type=int, default=2, help="cores, loading processes or threads, torch threads")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--count", type=int, default=8, help="batches in one window of time")
    parser.add_argument("--least", type=float, default=0.5, help="seconds of a window, but of one in a first epoch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    turns.keep_to(arguments.threads)
    measured = measure(arguments)
    rows = measured["rows"]
    ledger.show(
        f"two views at {arguments.size} px, {arguments.threads} cores, batches of {arguments.batch}",
        ("loader", "images/s", "±", "CPU ms/image"),
        (
            (said(name) if name in OURS else name, one["images_per_s"], one["spread"], one["cpu_ms_per_image"])
            for name, one in rows.items()
        ),
    )
    measured["ratios"] = promised(rows)
    ledger.show(
        "how many times as fast",
        ("ours", "against", "images/s", "per CPU second", "promised", ""),
        (
            (said(one["ours"]), one["against"], one["ratio"], one["cpu_ratio"], one["promised"], verdict(one))
            for one in measured["ratios"]
        ),
    )
    settings = {key: getattr(arguments, key) for key in ("size", "threads", "batch", "count", "least", "rounds")}
    ledger.write(arguments.json, ledger.record("loaders", {"settings": settings, **measured}))


def verdict(one: dict[str, Any]) -> str:
    return "met" if one["met"] else "missed"


if __name__ == "__main__":
    main()
