"""What packed files hold, by their first page, and where they are kept for the next run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sslpre.data import Source, decode

PAGE = 4096
MAGIC, FORMAT = "sslpre packed images", 1
ENTRY = np.dtype([("height", "<u4"), ("width", "<u4"), ("crc", "<u4"), ("state", "<u4")])


class NotPossible(Exception):
    """There is no such store here; the text says why. `other`: the file holds something else."""

    def __init__(self, reason: str, other: bool = False):
        super().__init__(reason)
        self.other = other


@dataclass(frozen=True)
class Form:
    """What a packed file holds. written: of the source; decoder: all whose version can change a pixel."""

    images: int
    side: int
    written: str
    decoder: str
    shape: str = "squashed to a square"

    @property
    def key(self) -> str:
        text = json.dumps([self.written, self.shape, self.side, self.decoder])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def rows_at(self) -> int:
        """Where the rows begin, in bytes: at a page."""
        return PAGE + -(-self.images * ENTRY.itemsize // PAGE) * PAGE

    @property
    def row(self) -> int:
        return self.side * self.side * 3

    @property
    def total(self) -> int:
        return self.rows_at + self.images * self.row

    def page(self) -> bytes:
        text = json.dumps({"what": MAGIC, "format": FORMAT, **vars(self), "key": self.key})
        return text.encode().ljust(PAGE - 1) + b"\n"


def form_of(source: Source, side: int) -> Form:
    return Form(len(source), side, source.written, decode.decoder())


def form_in(page: bytes) -> Form | None:
    """What the first page of a file says, None where it is not that of a packed file."""
    try:
        told = json.loads(page)
        if told.pop("what") != MAGIC or told.pop("format") != FORMAT:
            return None
        key, form = told.pop("key"), Form(**told)
        return form if form.key == key else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # whatever else a file may begin with
        return None


def file_of(source: Source, side: int) -> Path:
    """Where images of this source in this form are kept: in the folder `SSLPRE_CACHE`, else the user's cache.

    Raises NotPossible, as `cache`.
    """
    return path_of(form_of(source, side))


def path_of(form: Form) -> Path:
    """`file_of` for a form."""
    return cache() / f"{form.key}.packed"


def cache() -> Path:
    """SSLPRE_CACHE, else XDG_CACHE_HOME/sslpre, else ~/.cache/sslpre. Raises NotPossible where there is no home."""
    if own := os.environ.get("SSLPRE_CACHE"):
        return Path(os.path.abspath(own))
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():  # a relative one counts as none
        return base / "sslpre"
    try:
        return Path.home() / ".cache" / "sslpre"
    except RuntimeError as error:
        raise NotPossible("there is no home folder, and `SSLPRE_CACHE` is not set") from error


def in_cache() -> list[Form]:
    """What each packed file in the cache holds; without those of another version, or that cannot be read."""
    found = []
    for path in _files():
        try:
            page = _first_page(path)
        except OSError:  # gone since, or somebody else's
            continue
        if form := form_in(page):
            found.append(form)
    return found


def beside(path: Path) -> int:
    """Bytes on the disk of the cache's packed files but this one; none where it does not lie in the cache."""
    files = _files()
    if path.absolute().parent not in {other.parent for other in files}:
        return 0
    total = 0
    for other in files:
        with contextlib.suppress(OSError):  # deleted meanwhile, or on a network disk that is not there
            total += other.stat().st_blocks * 512 if other.name != path.name else 0
    return total


def _files() -> list[Path]:
    try:
        return sorted(path for path in cache().glob("*.packed") if path.is_file())
    except (NotPossible, OSError):  # there is no cache, or none that can be read
        return []


def _first_page(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(PAGE)
