"""What every benchmark here writes beside its figures: the machine, the versions, the commit; and how it is printed.

Needs the standard library alone, so that it runs in any peer's environment too.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def machine() -> dict[str, Any]:
    """The processor, the cores this process may use, memory in GiB, and the GPU where torch is loaded and sees one."""
    facts: dict[str, Any] = {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(terse=True),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of the packages of these names that are installed, and Python's own."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of this working tree, with `+` where files differ from it; empty outside a repository."""
    told = _git("rev-parse", "--short", "HEAD")
    return told + "+" if told and _git("status", "--porcelain", "--untracked-files=no") else told


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def record(name: str, measured: dict[str, Any], packages: Iterable[str] = ()) -> dict[str, Any]:
    """`measured` with where and when it was measured."""
    return {
        "benchmark": name,
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(packages),
        **measured,
    }


def write(path: Path | None, whole: dict[str, Any]) -> None:
    """As JSON to `path`, or nowhere. Written whole or not at all, since a long benchmark writes again and again."""
    if path is not None:
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(path)


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print one table: the first column to the left, numbers to the right, `-` for None."""
    cells = [[*header], *([_cell(item) for item in row] for row in rows)]
    wide = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}")
    for number, row in enumerate(cells):
        first, *rest = (cell.rjust(width) for cell, width in zip(row, wide, strict=True))
        print("  ".join([row[0].ljust(wide[0]), *rest]).rstrip() if first else "")
        if not number:
            print("  ".join("-" * width for width in wide))
    sys.stdout.flush()


def _cell(item: Any) -> str:
    if item is None:
        return "-"
    if isinstance(item, float):
        return f"{item:,.0f}" if abs(item) >= 1000 else f"{item:.3g}"
    return f"{item:,}" if isinstance(item, int) else str(item)
