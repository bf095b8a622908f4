"""The methods: one file, one method, one paper. Other people's come through the entry-point group `sslpre.methods`."""

from collections.abc import Mapping
from functools import cache

from sslpre.methods.colorization import Colorization
from sslpre.methods.deepcluster import DeepCluster
from sslpre.methods.inpainting import Inpainting
from sslpre.methods.jigsaw import Jigsaw
from sslpre.methods.relative_location import RelativeLocation
from sslpre.methods.rotation import Rotation
from sslpre.methods.simclr import SimCLR
from sslpre.objective import Objective
from sslpre.plugins import Methods

table: dict[str, type[Objective]] = {
    "colorization": Colorization,
    "deepcluster": DeepCluster,
    "inpainting": Inpainting,
    "jigsaw": Jigsaw,
    "relative-location": RelativeLocation,
    "rotation": Rotation,
    "simclr": SimCLR,
}


@cache
def methods() -> Mapping[str, type[Objective]]:
    """Every method by the name that a recipe calls it: ours, then those of installed packages.

    Taking one of another package imports it: SslpreError (exit 2) where that fails, or where it is no Objective.
    """
    return Methods(table)
