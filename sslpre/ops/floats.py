"""Weights of other programs as numbers that ours computes with."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sslpre.errors import SslpreError

WHOLE = (torch.int64, torch.int32, torch.bool)  # counters and tables of indices; weights are floating-point numbers


def in_float32(
    tensors: Mapping[str, Tensor], source: str, own: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Weights of any floating type as float32; counters and tables of indices as they are.

    own: the network's tensors of the same names, of which one that floats takes no whole numbers. Raises SslpreError:
    exit 5 for numbers of another kind, 10 for weights that are not finite.
    """
    found = {}
    for name, tensor in tensors.items():
        floats = own is not None and name in own and own[name].is_floating_point()
        if not tensor.is_floating_point() and (floats or tensor.dtype not in WHOLE):
            kind = str(tensor.dtype).removeprefix("torch.")
            message = f"`{source}`: the weights `{name}` are {kind} numbers, not floating-point ones"
            raise SslpreError(message, "save them as float32 with the program that wrote them", 5)
        found[name] = tensor.float() if tensor.is_floating_point() else tensor
        if not found[name].isfinite().all():
            raise SslpreError(f"`{source}`: the weights `{name}` are not finite", "take other weights", 10)
    return found
