"""Chaos: runs are killed while they train and save, lose a process, their disk, their images and their numbers.

    python tests/benchmarks/chaos.py [--kills 6] [--pair-kills 2] [--only METHOD] [--json FILE]

Every method, in one process and in two, is killed with SIGKILL again and again, half of the times as soon as a
checkpoint is being written, and gone on with by the same command until it is done; its encoder is held against that of
a run which nothing happened to. Then one run each is stopped by SIGTERM, has a full disk (where a file system can be
mounted), gets broken images, and a learning rate that makes it not finite. All on images that are drawn here. Exit
code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import ledger
import numpy as np
from PIL import Image
from safetensors.numpy import load_file
from warm import Child, Warm

from sslpre.methods import methods

IMAGES, EPOCHS, PATIENCE = 48, 12, 180.0
SMALL = "--backbone test_resnet --image-size 32 --batch-size 8 --precision fp32 --device cpu --workers 1".split()
# every step is logged, so that what a kill costs is known; a disk that fails is tried again sooner than in life
FIRST = "from sslpre.train import disk, metrics; metrics.LOG_STEPS = 1; disk.PAUSES = (1.0, 2.0, 4.0)"


@dataclass
class Row:
    """What was done to one run, and what became of it. lost: steps, at most and in all; apart: largest difference."""

    fault: str
    method: str
    processes: int
    made: int = 0
    survived: int = 0
    saving: int = 0
    most_lost: int = 0
    lost: int = 0
    apart: float | None = None
    note: str = ""

    @property
    def good(self) -> bool:
        return self.made == self.survived and not self.apart and not self.note.startswith("wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6, help="of each method in one process")
    parser.add_argument("--pair-kills", type=int, default=2, help="of each method in two")
    parser.add_argument("--only", action="append", default=[], metavar="METHOD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-others", action="store_true", help="kills alone")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chance, rows, begun = random.Random(arguments.seed), list[Row](), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sslpre-chaos-") as folder:
        place = Path(folder)
        draw(place / "images")
        for name in sorted(arguments.only or methods()):
            for processes, kills in ((1, arguments.kills), (2, arguments.pair_kills)):
                if kills:
                    told(rows, killed(place / f"{name}-{processes}", name, processes, kills, chance))
        if not arguments.no_others:
            for fault in (terminated, full, broken, not_finite):
                told(rows, fault(place / fault.__name__))
    head = ("fault", "method", "processes", "made", "survived", "saving", "most lost", "lost in all", "apart", "note")
    ledger.show("faults", head, [tuple(asdict(row).values()) for row in rows])
    made, survived = sum(row.made for row in rows), sum(row.survived for row in rows)
    apart = max((row.apart or 0.0 for row in rows), default=0.0)
    print(f"\n{made} faults, {survived} survived, weights apart by at most {apart:g}, {time.monotonic() - begun:.0f} s")
    told_all = {"rows": [asdict(row) for row in rows], "made": made, "survived": survived, "apart": apart}
    ledger.write(arguments.json, ledger.record("chaos", told_all, ("torch", "timm", "numpy")))
    if not all(row.good for row in rows):
        raise SystemExit(1)


def told(rows: list[Row], row: Row) -> None:
    rows.append(row)
    print(row, file=sys.stderr, flush=True)


def draw(folder: Path) -> None:
    """Smooth pictures of four kinds of colour."""
    folder.mkdir(parents=True)
    made, (y, x) = np.random.default_rng(0), np.mgrid[0:40, 0:40] / 40
    for i in range(IMAGES):
        spot = np.exp(-((x - made.uniform()) ** 2 + (y - made.uniform()) ** 2) * 20)
        pixels = np.stack([x * 90, y * 90, (1 - x) * 90], 2) + made.uniform(0, 40, 3)
        pixels[..., i % 3] += 120 * spot
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:02}.jpg", quality=90)


def words(method: str, place: Path, *more: str) -> list[str]:
    images = place.parent / "images" if (place.parent / "images").is_dir() else place / "images"
    out = ["--out", str(place / "run"), "--resume", "auto", "--epochs", str(EPOCHS)]
    return ["pretrain", method, str(images), *SMALL, *out, *more]


@functools.cache
def warm() -> Warm:
    return Warm()


def begin(command: list[str], processes: int, log: Path) -> list[Child]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        if processes > 1:
            own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            own |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with open(log, "ab") as file:
            started.append(warm().start(*command, first=FIRST, env=own, stdout=file, stderr=file))
    return started


def ended(started: list[Child]) -> list[int]:
    return [process.wait(timeout=PATIENCE) for process in started]


def newest(run: Path) -> int:
    """The step of the newest checkpoint; -1 where there is none."""
    return max((int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*/MANIFEST.json")), default=-1)


def logged(run: Path) -> int:
    """The last step that was taken, by the log."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines() if (run / "metrics.jsonl").exists() else []
    numbers = [
        line.split(b'"step": ')[1].split(b",")[0] for line in lines if line.endswith(b"}") and b'"step": ' in line
    ]
    return max(map(int, numbers), default=0)


def wait(started: list[Child], until: object) -> bool:
    """Until it is so; False where a process ended first."""
    begun = time.monotonic()
    while not until():  # type: ignore[operator]
        if any(process.poll() is not None for process in started) or time.monotonic() - begun > PATIENCE:
            return False
        time.sleep(0.002)
    return True


def undisturbed(place: Path, method: str, processes: int) -> Path:
    place.mkdir()
    codes = ended(begin(words(method, place), processes, place / "log"))
    assert not any(codes), (place / "log").read_text()
    return place / "run"


def apart(one: Path, two: Path) -> float:
    a, b = (load_file(run / "encoder/model.safetensors") for run in (one, two))
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name].astype(np.float64) - b[name]).max(initial=0)) for name in a)


def killed(place: Path, method: str, processes: int, kills: int, chance: random.Random) -> Row:
    """SIGKILL, half of the times amid a checkpoint; of two processes in turn both, or one that the other misses."""
    whole = undisturbed(place.with_name(place.name + "-whole"), method, processes)
    place.mkdir()
    row, run, command = Row("SIGKILL", method, processes), place / "run", words(method, place)

    def again() -> tuple[int, list[Child]]:
        """Begin once more; what survived a kill is told by the checkpoint that is gone on from."""
        (place / "log").unlink(missing_ok=True)
        return newest(run), begin(command, processes, place / "log")

    def went_on(before: int) -> bool:
        log = (place / "log").read_text()
        if before >= 0 and f"at step {before} of" not in log:  # who is alone before the first step leaves nothing
            row.note = f"wrong: not gone on with from step {before}: {log[-300:]}"
        return not row.note

    while row.made < kills:
        before, started = again()
        saving = row.made % 2 == 1
        if not wait(started, lambda before=before: newest(run) > before):
            row.note = f"wrong: {row.made} of {kills} kills, then it was at its end"
            break
        row.survived += row.made > 0 and went_on(before)
        time.sleep(chance.uniform(0, 0.3))
        if saving:
            wait(started, lambda: any(run.glob("checkpoints/.tmp-*")))
        lost_one = processes > 1 and row.made % 2 == 0
        for process in started[1:] if lost_one else started:
            process.send_signal(signal.SIGKILL)
        row.saving += any(run.glob("checkpoints/.tmp-*"))
        codes = ended(started)
        if 0 in codes:
            row.note = f"wrong: {row.made} of {kills} kills, then it was at its end"
            break
        if lost_one and codes[0] != 15:
            row.note = f"wrong code {codes[0]} of the process that was left"
        row.made += 1
        lost = logged(run) - max(newest(run), 0)
        row.lost, row.most_lost = row.lost + lost, max(row.most_lost, lost)
    before, started = again()
    codes = ended(started)
    row.survived += went_on(before)
    if any(codes):
        row.note = f"wrong: ended with {codes}: {(place / 'log').read_text()[-300:]}"
    else:
        row.apart = apart(whole, run)
    return row


def terminated(place: Path) -> Row:
    row, run = Row("SIGTERM", "rotation", 1), place / "run"
    whole = undisturbed(place.with_name("terminated-whole"), "rotation", 1)
    place.mkdir()
    for _ in range(3):
        before, started = newest(run), begin(words("rotation", place), 1, place / "log")
        wait(started, lambda before=before: newest(run) > before)
        started[0].send_signal(signal.SIGTERM)
        row.made += 1
        row.survived += ended(started) == [143]
        row.most_lost = max(row.most_lost, logged(run) - newest(run))
    ended(begin(words("rotation", place), 1, place / "log"))
    row.apart = apart(whole, run)
    return row


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True)
    yield made.returncode == 0
    if made.returncode == 0:
        subprocess.run(["umount", "-l", str(place)], check=False)


def full(place: Path) -> Row:
    row, run = Row("disk full", "rotation", 1), place / "run"
    whole = undisturbed(place.with_name("full-whole"), "rotation", 1)
    with small_disk(place) as mounted:
        if not mounted:
            row.note = "no file system can be mounted here"
            return row
        started = begin(words("rotation", place), 1, place.with_name("full.log"))
        wait(started, lambda: newest(run) > 0)
        with contextlib.suppress(OSError), open(place / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        row.made = 1
        if wait(started, lambda: b"could not be saved" in place.with_name("full.log").read_bytes()):
            (place / "filler").unlink()
        row.survived = int(ended(started) == [0])
        row.apart = apart(whole, run) if row.survived else None
    return row


def broken(place: Path) -> Row:
    """Images that are cut, emptied and deleted while a run decodes them anew in each epoch."""
    row = Row("broken images", "simclr", 1, made=3)
    draw(place / "images")
    command = words("simclr", place, "--store", "off", "--max-bad", "0.1")
    command[2] = str(place / "images")
    started = begin(command, 1, place / "log")
    wait(started, lambda: newest(place / "run") > 0)
    files = sorted((place / "images").iterdir())
    files[3].write_bytes(files[3].read_bytes()[:100])
    files[11].write_bytes(b"")
    files[17].unlink()
    done, listed = ended(started) == [0], place / "run/bad_images.jsonl"
    row.survived = listed.read_text().count("\n") if done and listed.exists() else 0
    row.note = "each named once"
    return row


def not_finite(place: Path) -> Row:
    """A real one: a learning rate at which weights leave the numbers that there are."""
    row = Row("not finite", "rotation", 1, made=1)
    place.mkdir()
    codes = ended(begin(words("rotation", place, "--lr", "1e30"), 1, place / "log"))
    bundles = list((place / "run/nonfinite").glob("step-*"))
    again = ended(begin(["replay", str(bundles[0]), "--device", "cpu"], 1, place / "log")) if bundles else [-1]
    stored = load_file(max((place / "run/checkpoints").glob("step-*")) / "model.safetensors")
    row.survived = int(
        codes == again == [10] and all(np.isfinite(t).all() for t in stored.values() if t.dtype.kind == "f")
    )
    row.note = "exit 10, nothing of it written, replayed to the same"
    return row


if __name__ == "__main__":
    main()
