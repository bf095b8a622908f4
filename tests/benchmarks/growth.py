"""What grows with the work: finding the images and starting a stream of them, and NT-Xent with the batch.

    python tests/benchmarks/growth.py [--most 1000000] [--largest 16384] [--json FILE]

Files: 1,000, 10,000, … up to `--most` names of one tiny PNG (hard links, a thousand to a folder, ten folders in one
above) in a temporary directory; seconds for the scan, then for opening the store that `auto` takes and for the first
batch through it, and the growth of the resident memory from before the scan to its peak. What the store's rows hold of
it stands apart: a system with huge pages gives 2 MB for each first row, until all of the store is there. NT-Xent:
forward and backward over 2N = 512, 1,024, … up to `--largest` rows of 128 numbers, seconds (median) and growth of the
peak. Every size in a fresh process of one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ledger

FIRST, TARGET_MB = 1000, 200
LINKS = 30_000  # names of one file, below what file systems allow
FILES, ROWS = "files", "rows"


def resident() -> int:
    """Bytes of this process in memory; from here on `peak` is counted anew, where Linux allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most bytes in memory since `resident`, or since the process began."""
    return _status("VmHWM")


def _status(key: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key + ":"))


def measure_files(folder: str) -> dict[str, Any]:
    import torch

    from sslpre.data.find import find
    from sslpre.data.store import open_store
    from sslpre.data.stream import BadList, Stream

    torch.set_num_threads(1)
    before, began = resident(), time.perf_counter()
    source = find(Path(folder)).train
    found = time.perf_counter()
    after_scan = peak() - before
    bad = BadList(None, 0.0, len(source))
    store, _ = open_store("auto", source, 32, "cpu", reuse=True)
    opened = time.perf_counter()
    stream = Stream(source, side=32, batch_size=64, seed=0, workers=1, device="cpu", bad=bad, store=store)
    batches = stream.steps(0, 1)
    next(batches)
    first = time.perf_counter()
    grown = peak() - before
    batches.close()
    held = _status("VmRSS")
    if store is not None:
        store.close()
    held -= _status("VmRSS")
    return {
        "files": len(source),
        "scan_seconds": found - began,
        "store": "off" if store is None else store.kind,
        "store_mb": held / 1e6,
        "store_seconds": opened - found,
        "first_batch_seconds": first - opened,
        "scan_mb": after_scan / 1e6,
        "mb": (grown - held) / 1e6,
    }


def measure_rows(rows: int) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F

    from sslpre.methods.simclr import nt_xent

    torch.set_num_threads(1)
    z = torch.randn(2, rows // 2, 128, generator=torch.Generator().manual_seed(0))
    views = [F.normalize(part, dim=1).requires_grad_() for part in z]
    small = [part[:8].detach().requires_grad_() for part in views]
    nt_xent(*small, 0.5).backward()  # what the first call of every kernel takes is not counted
    before, seconds = resident(), []
    for _ in range(3):
        began = time.perf_counter()
        nt_xent(*views, 0.5).backward()
        seconds.append(time.perf_counter() - began)
    return {"rows": rows, "seconds": sorted(seconds)[1], "mb": (peak() - before) / 1e6}


def put_files(root: Path, count: int, made: int) -> None:
    """Names `made` to `count` - 1 below `root`, each 2 · 8 + 15 bytes long, of a small picture."""
    from PIL import Image

    original = root / "original"  # without an extension, so it is no image
    for number in range(made, count):
        if number % 1000 == 0:
            folder = root / f"{number // 10_000:03}-named" / f"{number // 1000:04}-below"
            folder.mkdir(parents=True, exist_ok=True)
        if number == made or number % LINKS == 0:
            original.unlink(missing_ok=True)
            Image.new("RGB", (40, 40), (number % 251, 90, 30)).save(original, "PNG")
        os.link(original, folder / f"image-{number:09}.png")


def ours(what: str, size: str, cache: str = "") -> dict[str, Any]:
    """Measure in a fresh process; `cache`: a folder for files of decoded images."""
    command = [sys.executable, __file__, "--inside", what, size]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"SSLPRE_CACHE": cache} if cache else {})}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def all_files(most: int) -> list[dict[str, Any]]:
    sizes = itertools.takewhile(lambda size: size <= most, (FIRST * 10**power for power in itertools.count()))
    found, made = [], 0
    with tempfile.TemporaryDirectory(prefix="sslpre-growth-") as folder:
        names, cache = Path(folder, "names"), Path(folder, "cache")
        names.mkdir()
        for size in sizes:
            put_files(names, size, made)
            made = size
            found.append(ours(FILES, str(names), str(cache)))
    return found


def all_rows(largest: int) -> list[dict[str, Any]]:
    sizes = itertools.takewhile(lambda rows: rows <= largest, (512 * 2**power for power in itertools.count()))
    return [ours(ROWS, str(rows)) | {"matrix_mb": rows * rows * 4 / 1e6} for rows in sizes]


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--most", type=int, default=1_000_000, help="files; a million takes as many names on the disk")
    words.add_argument("--largest", type=int, default=16_384, help="2N; 0: leave NT-Xent out")
    words.add_argument("--json", type=Path)
    words.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    asked = words.parse_args()
    if asked.inside is not None:
        what, size = asked.inside
        print(json.dumps(measure_files(size) if what == FILES else measure_rows(int(size))))
        return
    files = all_files(asked.most)
    ledger.show(
        "made-up files",
        (
            "files",
            "scan, s",
            "store, s",
            "",
            "first batch, s",
            "scan, MB",
            "with the batch, MB",
            "promised, MB",
            "",
            "store, MB",
        ),
        (
            (
                *(row[key] for key in ("files", "scan_seconds", "store_seconds", "store", "first_batch_seconds")),
                *(row["scan_mb"], row["mb"], TARGET_MB, "met" if row["mb"] <= TARGET_MB else "missed"),
                row["store_mb"],
            )
            for row in files
        ),
    )
    rows = all_rows(asked.largest)
    ledger.show(
        "NT-Xent, forward and backward",
        ("2N", "s", "MB", "a matrix 2N × 2N, MB"),
        ([row[key] for key in ("rows", "seconds", "mb", "matrix_mb")] for row in rows),
    )
    report = {FILES: files, ROWS: rows, "promised_mb": TARGET_MB}
    ledger.write(asked.json, ledger.record("growth", report, ("sslpre", "torch", "numpy", "pillow")))


if __name__ == "__main__":
    main()
