"""What stands on the encoder while it trains, and is thrown away at export."""

import itertools

from torch import nn


def mlp(widths: list[int], *, last_norm: bool = False) -> nn.Sequential:
    """Linear layers of these widths with batch normalisation and ReLU between them: [B, widths[0]] → [B, widths[-1]].

    A layer that is followed by a normalisation has no bias. `last_norm` adds one after the last layer.
    """
    layers: list[nn.Module] = []
    for i, (inward, outward) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        layers.append(nn.Linear(inward, outward, bias=last and not last_norm))
        if not last:
            layers += [nn.BatchNorm1d(outward), nn.ReLU()]
        elif last_norm:
            layers.append(nn.BatchNorm1d(outward))
    return nn.Sequential(*layers)
