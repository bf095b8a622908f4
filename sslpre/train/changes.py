"""What has changed between the parts of a run: how many images came and went, which keys of the recipe are others."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from sslpre.data import Source
from sslpre.data.find import Folder
from sslpre.synced import write_synced

FILE = "images.safetensors"
NAMED = 3  # of each kind


def write(folder: Path, source: Source) -> None:
    """Keep 8 bytes of each image, by which one that came or went is told later."""
    if isinstance(source, Folder):
        write_synced(folder / FILE, safetensors.numpy.save({"digests": source.digests().view(np.int64)}))


def told(folder: Path, source: Source) -> str:
    """`: 2 came (a.jpg, b.jpg), 1 went`; nothing where it is not known. One whose size is another has done both."""
    if not isinstance(source, Folder) or not (folder / FILE).is_file():
        return ""
    try:
        before = safetensors.numpy.load((folder / FILE).read_bytes())["digests"].view(np.uint64)
    except (OSError, ValueError, KeyError, SafetensorError):  # it only serves to say more
        return ""
    now = source.digests()
    new = np.flatnonzero(~np.isin(now, before))
    went = int((~np.isin(before, now)).sum())
    named = ", ".join(source.name(int(i)) for i in new[:NAMED]) + (", …" if len(new) > NAMED else "")
    return f": {len(new):,} came{f' ({named})' if len(new) else ''}, {went:,} went"


def of_recipes(before: str, now: str) -> str:
    """`: optim.lr was 0.1, is 0.2; …`; nothing where the recipe before is not known."""
    try:
        old, new = (flat(tomllib.loads(text)) for text in (before, now))
    except tomllib.TOMLDecodeError:
        return ""
    if not old:
        return ""
    differ = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
    return ": " + "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in sorted(differ))


def flat(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in tables.items():
        if isinstance(item, dict):
            found |= flat(item, f"{prefix}{key}.")
        elif isinstance(item, list | tuple) and item and isinstance(item[0], dict):
            for number, one in enumerate(item):
                found |= flat(one, f"{prefix}{key}.{number}.")
        else:
            found[f"{prefix}{key}"] = item
    return found
