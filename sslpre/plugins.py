"""Methods of other packages, as the entry-point group `sslpre.methods` names them.

A package is imported only when one of its methods is asked for, so one that is broken stops nothing else; its recipes
are found without importing it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sslpre.errors import SslpreError

if TYPE_CHECKING:
    from sslpre.objective import Objective


@cache
def entries() -> dict[str, EntryPoint]:
    """The entry points of installed packages by the method's name; of two alike, the first by its value."""
    last_to_first = sorted(entry_points(group="sslpre.methods"), key=lambda entry: entry.value, reverse=True)
    return {entry.name: entry for entry in last_to_first}


@cache
def recipe_files() -> dict[str, Path]:
    """The files `recipes/*.toml` in the packages that have a method, by the recipe's name; of two alike, the first."""
    packages = sorted({entry.value.partition(":")[0].partition(".")[0].strip() for entry in entries().values()})
    files: dict[str, Path] = {}
    for package in packages:
        for folder in package_folders(package):
            for path in sorted(folder.glob("recipes/*.toml")):
                files.setdefault(path.stem, path)
    return files


def package_folders(package: str) -> list[Path]:
    """Where a top-level package lies, found without importing it: one folder, or none if it is gone or a plain file."""
    try:
        spec = find_spec(package)
    except ValueError:  # an empty name, or a module that was made by hand: neither has a folder
        return []
    return [Path(place) for place in (spec and spec.submodule_search_locations) or ()]


def load(entry: EntryPoint) -> type[Objective]:
    """The method that `entry` names. Raises SslpreError (exit 2) where that is not possible."""
    from sslpre.objective import Objective

    package = entry.dist.name if entry.dist else entry.value.partition(".")[0]
    try:
        method = entry.load()
    except Exception as error:  # it is other people's code that runs here: it may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        message = f"method `{entry.name}` of package `{package}` cannot be imported: {reason}"
        raise SslpreError(message, f"pip install --upgrade {package}, or pip uninstall {package}") from error
    if not (isinstance(method, type) and issubclass(method, Objective)):
        message = f"method `{entry.name}` of package `{package}` is `{entry.value}`, which is no subclass of Objective"
        raise SslpreError(message, f"pip install --upgrade {package}, or pip uninstall {package}")
    return method


class Methods(Mapping[str, "type[Objective]"]):
    """Methods by the name that a recipe calls them: ours, then those of other packages, imported where one is taken."""

    def __init__(self, ours: Mapping[str, type[Objective]]):
        self.loaded = dict(ours)

    def __getitem__(self, name: str) -> type[Objective]:
        if name not in self.loaded:
            self.loaded[name] = load(entries()[name])
        return self.loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self.loaded or name in entries()

    def __iter__(self) -> Iterator[str]:
        return iter(self.loaded | entries())

    def __len__(self) -> int:
        return len(self.loaded | entries())
