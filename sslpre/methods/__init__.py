"""The methods: one file, one method, one paper. Other people's come through the entry-point group `sslpre.methods`."""

from functools import cache
from importlib.metadata import entry_points

from sslpre.methods.simclr import SimCLR
from sslpre.objective import Objective

table: dict[str, type[Objective]] = {
    "simclr": SimCLR,
}


@cache
def methods() -> dict[str, type[Objective]]:
    """Every method by the name that a recipe calls it: ours, then those of installed packages."""
    others = {entry.name: entry.load() for entry in entry_points(group="sslpre.methods") if entry.name not in table}
    return table | others
