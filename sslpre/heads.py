"""What stands on the encoder while it trains, and is thrown away at export."""

import itertools
import math

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


def decoder(channels: int, height: int, width: int, side: int, outward: int = 3) -> nn.Sequential:
    """From a feature map to a square picture: [B, channels, height, width] → [B, outward, side, side], of any ratio.

    Up-convolutions, each to about twice the side before it, as upsampling and then a 3×3 convolution (Dosovitskiy,
    Springenberg, Brox 2015, https://arxiv.org/abs/1411.5928; without the chequers of a strided one, Odena, Dumoulin,
    Olah 2016, https://distill.pub/2016/deconv-checkerboard). Widths halve from 512 at most to 32. Between them group
    normalisation, 16 channels a group (Wu, He 2018, https://arxiv.org/abs/1803.08494), so that no image of a batch
    looks at another, and ReLU; the last one gives numbers of any size.
    """
    steps = max(1, math.ceil(math.log2(side / min(height, width))))
    layers: list[nn.Module] = []
    for left in reversed(range(steps)):
        last = left == 0
        wide = outward if last else max(32, min(512, channels // 2) // 16 * 16)
        layers += [
            nn.Upsample((-(-side // 2**left),) * 2),  # counted back from the last one: only the first is no doubling
            nn.Conv2d(channels, wide, 3, padding=1, bias=last),
        ]
        if not last:
            layers += [nn.GroupNorm(wide // 16, wide), nn.ReLU()]
        channels = wide
    return nn.Sequential(*layers)


def discriminator(side: int, channels: int = 3) -> nn.Sequential:
    """Is a square picture real? [B, channels, side, side] → [B], a logit.

    Strided convolutions down to a map of 4 × 4 or less, and one over all of that (DCGAN: Radford, Metz, Chintala 2015,
    https://arxiv.org/abs/1511.06434), with group normalisation in place of batch normalisation, as in `decoder`.
    """
    layers: list[nn.Module] = []
    inward, outward = channels, 64
    while side > 4 or not layers:
        layers.append(nn.Conv2d(inward, outward, 4, 2, 1))
        if layers[:-1]:
            layers.append(nn.GroupNorm(outward // 16, outward))
        layers.append(nn.LeakyReLU(0.2))
        inward, outward, side = outward, min(512, 2 * outward), side // 2
    layers.append(nn.Conv2d(inward, 1, side))
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.02)
    return nn.Sequential(*layers, nn.Flatten(0))
