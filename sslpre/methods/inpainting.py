"""Inpainting (context encoders): part of each image is hidden, and the network paints what should be there.

Pathak, Krähenbühl, Donahue, Darrell, Efros, "Context Encoders: Feature Learning by Inpainting", 2016,
https://arxiv.org/abs/1604.07379; where the paper leaves a choice, https://github.com/pathak22/context-encoder.
"""

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from sslpre.heads import decoder, discriminator
from sslpre.objective import Batch, Loss, Objective, Picture, Setup

SHARES = (1 / 8, 1 / 4)  # of an image that a random region hides: "up to 1/4 of the image", section 3.3
CELLS = 8  # on a side of the random field whose low parts are the region: 0.06 · 128 px in the authors' code


class Inpainting(Objective):
    """mask: "center" hides a square of half the side, "region" a random shape. overlap: how far the prediction reaches
    over the hole's edge, as a share of the side, and overlap_weight: how much more an error counts there. adversarial:
    λ_adv of equation 3; with 0 the squared error is all, and there is no discriminator.

    Discriminator and decoder normalise by groups of channels where the authors' do so by batch, so that the loss is a
    mean over images (it does not couple them), in parts of a batch as in the whole.
    """

    players: ClassVar = {"encoder": ("",), "discriminator": ("discriminator",)}
    rates: ClassVar = {"discriminator": 0.1}  # section 4: ten times as much for the context encoder
    judged: ClassVar = ("encoder.rec", "encoder.blank")

    def __init__(
        self,
        setup: Setup,
        mask: Literal["center", "region"] = "center",
        overlap: Annotated[float, Field(ge=0, lt=0.25)] = 7 / 128,
        overlap_weight: Annotated[float, Field(gt=0)] = 10.0,
        adversarial: Annotated[float, Field(ge=0, lt=1)] = 0.001,
    ):
        super().__init__()
        self.side = setup.views[0]
        self.painted = self.side // 2 if mask == "center" else self.side  # side of what the decoder paints
        self.mask, self.overlap_weight, self.adversarial = mask, overlap_weight, adversarial
        self.overlap = min(round(overlap * self.side), (self.painted - 1) // 2)
        self.encoder = setup.encoder()
        _, channels, height, width = self.encoder.map_shape(self.side)
        self.bottleneck = nn.Sequential(  # section 3.1
            ChannelWise(channels, height * width), nn.Conv2d(channels, channels, 1), nn.ReLU()
        )
        self.decoder = decoder(channels, height, width, self.painted)
        if adversarial:
            self.discriminator = discriminator(self.painted)
        else:
            self.players, self.rates, self.judged = {"all": ("",)}, {}, ("rec", "blank")  # type: ignore[misc]  # alone

    def rounds(self, batch: Batch) -> Iterator[Loss]:
        x = batch.views[0]
        hole, asked = self.masks(batch)
        truth = 2 * self.middle(x) - 1
        y = self.paint(self.hidden(x, hole))
        weight = asked * torch.where(hole, 1.0, self.overlap_weight).to(y.dtype)
        rec = l2(y, truth, weight, asked)
        terms = {"rec": rec, "blank": l2(2 * self.encoder.mean - 1, truth, weight, asked)}  # the mean colour's own L2
        if not self.adversarial:
            yield Loss(rec, terms)
            return
        fake, real = asked * y, asked * truth  # section 3.2: the discriminator sees no context
        still = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        adv = surprise(functional_call(self.discriminator, still, (fake,)), True)
        terms["adv"] = adv
        fake = fake.detach()
        yield Loss((1 - self.adversarial) * rec + self.adversarial * adv, terms)  # equation 3
        for_real, for_fake = self.discriminator(torch.cat([real, fake])).chunk(2)
        told = {"real": (for_real > 0).float().mean(), "fake": (for_fake < 0).float().mean()}
        yield Loss(surprise(for_real, True) + surprise(for_fake, False), told)  # equation 2

    def paint(self, seen: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1], with a hole → what should be there: [B, 3, P, P] in [−1, 1]."""
        y = self.decoder(self.bottleneck(self.encoder.last_map(seen)))
        return y.to(torch.promote_types(y.dtype, torch.float32)).tanh()

    def masks(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Where the image is hidden (bool), and where the network is asked: there and around it. [B or 1, 1, P, P]."""
        if self.mask == "region":
            hole = region(batch, self.side)
            reach = 2 * self.overlap + 1
            return hole, F.max_pool2d(hole.to(batch.views[0].dtype), reach, 1, self.overlap)
        asked = batch.views[0].new_ones(1, 1, self.painted, self.painted)
        inner = self.painted - 2 * self.overlap  # "a slightly larger patch that overlaps with the context", section 5.1
        return F.pad(asked[..., :inner, :inner], (self.overlap,) * 4) > 0, asked

    def hidden(self, x: Tensor, hole: Tensor) -> Tensor:
        """Images whose hole has the mean colour, which is zero to the network: section 4."""
        return torch.where(self.whole(hole), self.encoder.mean, x)

    def middle(self, x: Tensor) -> Tensor:
        """What the decoder paints of images: [B, 3, S, S] → [B, 3, P, P]."""
        low = (self.side - self.painted) // 2
        return x[..., low : low + self.painted, low : low + self.painted]

    def whole(self, part: Tensor) -> Tensor:
        """[…, P, P] → […, S, S], with zeros around."""
        low = (self.side - self.painted) // 2
        high = self.side - self.painted - low
        return F.pad(part, (low, high, low, high))

    def pictures(self, batch: Batch) -> list[list[Picture]]:
        x = batch.views[0]
        hole, asked = self.masks(batch)
        seen = self.hidden(x, hole)
        filled = torch.where(self.whole(hole), self.whole((self.paint(seen) + 1) / 2).to(x.dtype), x)
        wanted = torch.where(self.whole(asked) > 0, x, torch.ones_like(x))
        titles = ("image", "what the network sees", "its fill-in", "what it is asked for")
        columns = (x, seen, filled, wanted)
        return [[Picture(*cell) for cell in zip(titles, row, strict=True)] for row in zip(*columns, strict=True)]


class ChannelWise(nn.Module):
    """One dense layer a channel, over its positions: [B, C, h, w] → the same shape, n⁴ weights for each of C maps."""

    def __init__(self, channels: int, positions: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, positions, positions).uniform_(-1, 1) / positions**0.5)
        self.bias = nn.Parameter(torch.zeros(channels, positions))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.einsum("bci,cij->bcj", x.flatten(2), self.weight) + self.bias).view(x.shape)


def region(batch: Batch, side: int) -> Tensor:
    """A random shape, or several, in each image: [B, 1, side, side], true for exactly the share that was drawn.

    The lowest parts of a smooth random field, as in the authors' code; the paper takes shapes that people have cut out.
    """
    cells = batch.uniform("shape", 1, CELLS + 4, CELLS + 4)
    shift = batch.uniform("shift", 2, 1)  # no place of the image lies on the field's corners more often than others
    at = 1 + shift + CELLS * (torch.arange(side, device=shift.device) + 0.5) / side  # [B, 2, side], in cells
    x, y = (2 * at / (CELLS + 3) - 1).unbind(1)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
    field = F.grid_sample(cells, grid, "bicubic", "border", align_corners=True).flatten(1)
    share = SHARES[0] + (SHARES[1] - SHARES[0]) * batch.uniform("share", 1)
    count = (share * side**2).round().long()
    lowest = field.topk(math.ceil(SHARES[1] * side**2), largest=False).values  # rising; cheaper than sorting all of it
    return (field <= lowest.gather(1, count - 1)).view(-1, 1, side, side)


def l2(y: Tensor, truth: Tensor, weight: Tensor, asked: Tensor) -> Tensor:
    """Equation 1: the squared error where it is asked for, per pixel of that and colour, then the mean over images."""
    error = (weight * (y - truth).square()).flatten(1).sum(1)
    return (error / (truth.shape[1] * asked.flatten(1).sum(1))).mean()


def surprise(logits: Tensor, real: bool) -> Tensor:
    """−log of the probability that the discriminator gives to `real`, mean over images, in fp32 (fp64 stays fp64).

    The context encoder maximises log D(F(x)), as in the authors' code, in place of minimising log(1 − D(F(x))).
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.softplus(-logits if real else logits).mean()
