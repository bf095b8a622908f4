"""Relative location: shown two patches of an image, the network tells which of eight neighbours the second is.

Doersch, Gupta, Efros, "Unsupervised Visual Representation Learning by Context Prediction", 2015,
https://arxiv.org/abs/1505.05192.
"""

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslpre.errors import SslpreError
from sslpre.objective import Batch, Loss, Objective, Picture, Setup
from sslpre.ops import patches

NEIGHBOURS = ("upper left", "above", "upper right", "left", "right", "lower left", "below", "lower right")
CENTRE = 4  # of the nine cells of the grid, counted row by row
JITTER = 7 / 96  # section 4: of a patch of 96 px, up to 7 px each way
COARSEST = 10 / 96  # section 4: as few as 100 pixels in all
FEWEST = 3  # pixels in a row at least: patches of a few pixels would otherwise become one colour
RUNGS = 96  # sides that a patch can be reduced to
NOISE = 1 / 100  # section 3.1: of the remaining channel's standard deviation
GREY_LEVEL = 1 / 255  # a patch with less contrast than this is flat: what differs in it is rounding


class RelativeLocation(Objective):
    """pairs: neighbours of each image's central patch that are asked for in a step; colour: what hides chromatic
    aberration; pixelated: share of patches shown more coarsely; tile: side of a patch as the network sees it, 0 for
    what is cut; embedding and hidden: widths of fc6 (of a patch) and of fc7 and fc8 (of a pair), 0 for the encoder's.
    """

    mean: Tensor
    std: Tensor
    coarsened: Tensor

    def __init__(
        self,
        setup: Setup,
        pairs: Annotated[int, Field(ge=1, le=8)] = 8,
        colour: Literal["dropping", "projection", "none"] = "dropping",
        pixelated: Annotated[float, Field(ge=0, le=1)] = 0.33,
        tile: Annotated[int, Field(ge=0, le=4096)] = 0,
        embedding: Annotated[int, Field(ge=0)] = 0,
        hidden: Annotated[int, Field(ge=0)] = 0,
    ):
        super().__init__()
        self.tile = self.sees(setup.views[0], setup.patch, tile=tile)
        self.encoder = setup.encoder(size=self.tile)
        embedding, hidden = embedding or self.encoder.dim, hidden or self.encoder.dim
        # section 3: one network for both patches, joined after fc6. Section 4: without normalisation all answers become
        # alike; here each patch's own, so that no image looks at another
        self.fc6 = layer(self.encoder.dim, embedding)
        self.head = nn.Sequential(
            layer(2 * embedding, hidden), layer(hidden, hidden), nn.Linear(hidden, len(NEIGHBOURS))
        )
        self.pairs, self.colour, self.pixelated = pairs, colour, pixelated
        self.register_buffer("mean", setup.mean.view(3, 1, 1).clone(), persistent=False)
        self.register_buffer("std", setup.std.view(3, 1, 1).clone(), persistent=False)
        self.register_buffer("coarsened", coarsening(geometry(setup.views[0])[0]), persistent=False)

    @classmethod
    def sees(cls, side: int, patch: int = 1, **arguments: Any) -> int:
        return patches.shown(geometry(side)[0], arguments.get("tile", 0), patch)

    def loss(self, batch: Batch) -> Loss:
        x, y = self.patches(batch), self.neighbours(batch)
        features = self.fc6(self.encoder(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        centre, others = features[:, :1].expand(-1, self.pairs, -1), features[:, 1:]
        logits = self.head(torch.cat([centre, others], 2).flatten(0, 1))
        right = (logits.argmax(1) == y.flatten()).float().mean()
        with torch.autocast(x.device.type, enabled=False):  # the softmax in fp32 (fp64 stays fp64)
            loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y.flatten())
        return Loss(loss, {"accuracy": right})

    @property
    def chance(self) -> float:
        return math.log(len(NEIGHBOURS))

    def neighbours(self, batch: Batch) -> Tensor:
        """[B, pairs]: for each image different ones of the eight, by number, rising."""
        drawn = batch.uniform("neighbour", len(NEIGHBOURS)).argsort(dim=1, stable=True)
        return drawn[:, : self.pairs].sort(dim=1).values

    def patches(self, batch: Batch) -> Tensor:
        """[B, 1 + pairs, 3, tile, tile]: central patch and neighbours as the encoder gets them, all of one contrast:
        what its first layer sees of a patch has mean 0 in each channel and mean square 1."""
        x = self.guarded(batch)
        # as in the authors' code, last of all: how much contrast there is, is alike in neighbours
        contrast = x.square().mean((2, 3, 4), keepdim=True).sqrt().clamp(min=GREY_LEVEL)
        return x / contrast * self.std + self.mean  # the encoder takes these off

    def guarded(self, batch: Batch) -> Tensor:
        """The patches without their means, and without what the guards against shortcuts take from them."""
        top, left = corners(batch, self.neighbours(batch))
        x = patches.cut(batch.views[0], top, left, geometry(batch.views[0].shape[-1])[0]).to(self.mean.dtype)
        # as in the authors' code before the colours: what is made coarser later would have less noise
        x = patches.resize(self.coarser(x, batch), self.tile)
        x = x - x.mean((3, 4), keepdim=True)
        if self.colour == "dropping":
            x = dropped(x, patches.whole(batch.uniform("channel", x.shape[1]), 3), self.noise(x, batch))
        elif self.colour == "projection":
            x = projected(x)
        return x

    def noise(self, x: Tensor, batch: Batch) -> Tensor:
        return batch.normal("noise", x.shape[1], 2, *x.shape[3:]).to(x.dtype)

    def coarser(self, x: Tensor, batch: Batch) -> Tensor:
        """Some patches with fewer pixels, drawn evenly from 10 × 10 of 96 × 96 up, and then brought back to size.

        Never fewer than 3 × 3; a patch of 4 pixels or fewer stays as it is.
        """
        side, count = x.shape[-1], x.shape[1]
        if side - 1 <= FEWEST:
            return x
        low, high = max(COARSEST * side, FEWEST) ** 2, (side - 1) ** 2
        sides = (low + (high - low) * batch.uniform("pixels", count)).sqrt()
        rung = (sides * (len(self.coarsened) / side)).long().clamp(min=1) - 1
        happens = batch.uniform("pixelated", count) < self.pixelated
        with torch.autocast(x.device.type, enabled=False):
            resample = self.coarsened[rung][:, :, None]  # linear and separable: rows, then columns
            return torch.where(happens[..., None, None, None], resample @ x @ resample.mT, x)

    def pictures(self, batch: Batch) -> list[list[Picture]]:
        asked = self.neighbours(batch)
        top, left = corners(batch, asked)
        side = geometry(batch.views[0].shape[-1])[0]
        raw, shown = patches.cut(batch.views[0], top, left, side), self.patches(batch).clamp(0, 1)
        rows = []
        for row, view in enumerate(batch.views[0]):
            placed = 0.3 * view + 0.7  # what no patch shows is faded
            for y, x, patch in zip(top[row].tolist(), left[row].tolist(), raw[row], strict=True):
                placed[:, y : y + side, x : x + side] = patch
            centre = F.pad(shown[row, 0], (0, 2), value=1.0)
            pairs = [
                Picture(f"centre, and {NEIGHBOURS[n]}", torch.cat([centre, patch], 2))
                for n, patch in zip(asked[row].tolist(), shown[row, 1:], strict=True)
            ]
            rows.append([Picture("patches in place", placed), *pairs])
        return rows


def layer(inward: int, outward: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inward, outward, bias=False), nn.LayerNorm(outward), nn.ReLU())


def geometry(side: int) -> tuple[int, int]:
    """Side and jitter, in pixels, of the largest patches that fit into views of `side` px: 3 of them, 2 gaps of half a
    patch, and jitter on both sides. Even, so that the gap is whole.

    Raises SslpreError (exit 2) where not even patches of two pixels do.
    """
    for patch in range(side // 4 // 2 * 2, 0, -2):
        jitter = max(1, round(JITTER * patch))
        if 4 * patch + 2 * jitter <= side:
            return patch, jitter
    hint = "--image-size 10 or more, or a larger size in [[views]]"
    raise SslpreError(f"views of `{side}` px are too small for nine patches with gaps", hint)


def corners(batch: Batch, neighbours: Tensor) -> tuple[Tensor, Tensor]:
    """Top and left of the central patch and of `neighbours` [B, n], int64 [B, 1 + n] each.

    Section 4: a grid at a drawn place of the view, a gap of half a patch, and each patch moved by the jitter.
    """
    side = batch.views[0].shape[-1]
    patch, jitter = geometry(side)
    cell = F.pad(neighbours + (neighbours >= CENTRE), (1, 0), value=CENTRE)
    place = patches.whole(batch.uniform("place", 2), side - 4 * patch - 2 * jitter + 1)[:, None]
    moved = patches.whole(batch.uniform("jitter", cell.shape[1], 2), 2 * jitter + 1)
    step = patch + patch // 2
    return place[..., 0] + cell // 3 * step + moved[..., 0], place[..., 1] + cell % 3 * step + moved[..., 1]


def coarsening(side: int) -> Tensor:
    """[rungs, side, side]: matrices that bring `side` pixels in a row to fewer, and back: to 1, to 2, … to `side`.

    Of sides above 96 every 96th part, so that the matrices stay smaller than the patches.
    """
    pixels = torch.eye(side)[None, None]

    def along(x: Tensor, height: int) -> Tensor:
        return F.interpolate(x, (height, side), mode="bilinear", antialias=True)

    rungs = min(side, RUNGS)
    return torch.cat([along(along(pixels, round(rung * side / rungs)), side)[0] for rung in range(1, rungs + 1)])


def dropped(x: Tensor, kept: Tensor, noise: Tensor) -> Tensor:
    """Section 3.1, colour dropping: of x [B, n, 3, s, s] channel `kept` [B, n] stays, the others become noise.

    noise: [B, n, 2, s, s], standard normal; it gets 1/100 of the standard deviation of what stays.
    """
    stays = x.gather(2, kept[..., None, None, None].expand(-1, -1, 1, *x.shape[3:]))
    channels = torch.cat([stays, noise * NOISE * stays.std((3, 4), correction=0, keepdim=True)], 2)
    turned = (torch.arange(3, device=x.device) - kept[..., None]) % 3  # 0, what stays, at its own place
    return channels.gather(2, turned[..., None, None].expand_as(x))


def projected(x: Tensor) -> Tensor:
    """Section 3.1, colour projection: x [B, n, 3, s, s] without what lies along the axis from green to magenta."""
    with torch.autocast(x.device.type, enabled=False):
        a = x.new_tensor([[-1.0, 2.0, -1.0]])
        b = torch.eye(3, dtype=x.dtype, device=x.device) - a.T @ a / (a @ a.T)
        return torch.einsum("ij,bnjhw->bnihw", b, x)
