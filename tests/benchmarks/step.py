"""A whole SimCLR step of a ResNet-18 on a CPU, photos to weights: ours against lightly's published example, in turns.

    python tests/benchmarks/step.py --images DIR --peer PYTHON

PYTHON is the interpreter of an environment where lightly is installed. Ours is the recipe `simclr` with all that is
`auto` but the network, the image size and the batch; beside it the same in fp32, which is what the example computes in.
Our recipe crops 20 to 100 % with colours at half the example's strength and no blur; `alike` has the example's views: 8
to 100 %, full strength, and above 64 px blur in half. Like for like is `fp32 alike later`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import ledger
import turns
from loaders import row

HERE = Path(__file__).resolve().parent
PROMISED = 1.5  # of our default precision


def asked_of(auto: str) -> tuple[str, ...]:
    """What our process is asked: precision, views, epoch."""
    return (f"{auto} ours later", f"{auto} ours first", f"{auto} alike later", "fp32 ours later", "fp32 alike later")


def measure(arguments: argparse.Namespace, size: int) -> dict[str, Any]:
    words = ["step", "--images", str(arguments.images), "--size", str(size)]
    words += ["--batch", str(arguments.batch), "--workers", str(arguments.threads)]
    with contextlib.ExitStack() as stack:
        command = [sys.executable, str(HERE / "ours.py"), *words, *(["--eager"] if arguments.eager else [])]
        ours = stack.enter_context(turns.Worker(command, arguments.threads))
        workers = {"ours": ours}
        if arguments.peer:
            command = [arguments.peer, str(HERE / "peers.py"), words[0], "lightly", *words[1:]]
            workers["lightly"] = stack.enter_context(turns.Worker(command, arguments.threads))
        auto = ours.ready["auto"]
        asked = [("lightly", "fp32")] if arguments.peer else []
        asked += [("ours", what) for what in dict.fromkeys(asked_of(auto))]
        given = turns.in_turn(
            {f"{who} {what}": partial(workers[who].ask, what, arguments.count) for who, what in asked}, arguments.rounds
        )
        told = {name: worker.ready for name, worker in workers.items()}
    extra = ("loss", "views")
    rows = {
        name: row(answers) | {key: answers[-1][key] for key in extra if key in answers[-1]}
        for name, answers in given.items()
    }
    return {"size": size, "auto": auto, "trainers": told, "rows": rows, "ratios": ratios(rows, auto)}


def ratios(rows: dict[str, dict[str, float]], auto: str) -> list[dict[str, Any]]:
    if "lightly fp32" not in rows:
        return []
    example = rows["lightly fp32"]["images_per_s"]
    found = []
    for name in (f"ours {what}" for what in dict.fromkeys(asked_of(auto))):
        least = PROMISED if name.startswith(f"ours {auto} ours") else None
        ratio = rows[name]["images_per_s"] / example
        found.append(dict(ours=name, ratio=ratio, promised=least, met=None if least is None else ratio >= least))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of classes, DIR/CLASS/*.jpg")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 224])
    parser.add_argument("--peer", default="", metavar="PYTHON", help="an interpreter with lightly; without: ours alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--count", type=int, default=6, help="steps in one window of time, after those that warm up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    turns.keep_to(arguments.threads)
    settings = {key: getattr(arguments, key) for key in ("sizes", "threads", "batch", "count", "rounds")}
    found: list[dict[str, Any]] = []
    for size in arguments.sizes:
        found.append(measure(arguments, size))
        ratio = {one["ours"]: one for one in found[-1]["ratios"]}
        ledger.show(
            f"SimCLR step, ResNet-18, {size} px, batch {arguments.batch}, {arguments.threads} cores",
            ("", "images/s", "±", "CPU ms/image", "loss", "× lightly", "promised"),
            (
                (
                    *(name, one["images_per_s"], one["spread"], one["cpu_ms_per_image"], one["loss"]),
                    *(ratio.get(name, {}).get(key) for key in ("ratio", "promised")),
                )
                for name, one in found[-1]["rows"].items()
            ),
        )
        ledger.write(arguments.json, ledger.record("step", {"settings": settings, "sizes": found}))


if __name__ == "__main__":
    main()
