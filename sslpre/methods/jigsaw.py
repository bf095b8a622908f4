"""Jigsaw: nine tiles of an image are shown out of order, and the network tells which order it was.

Noroozi, Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles", 2016,
https://arxiv.org/abs/1603.09246.
"""

import itertools
import math
from functools import cache
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslpre.errors import SslpreError
from sslpre.objective import Batch, Loss, Objective, Picture, Setup
from sslpre.ops import patches
from sslpre.ops.channels import luma

TILES = 9  # of a 3 × 3 grid
GREY_LEVEL = 1 / 255  # a tile with less contrast than this is flat: what differs in it is rounding


class Jigsaw(Objective):
    """permutations: orders to tell apart; draws: orders in which each image's tiles are shown in a step; gray: share of
    images shown without colour; tile: side of a tile as the network sees it, 0 for what is cut; hidden: numbers kept of
    each tile, 0 for as many as the encoder has.
    """

    permutations: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        setup: Setup,
        permutations: Annotated[int, Field(ge=2, le=10_000)] = 100,
        draws: Annotated[int, Field(ge=1)] = 8,
        gray: Annotated[float, Field(ge=0, le=1)] = 0.3,
        tile: Annotated[int, Field(ge=0, le=4096)] = 0,
        hidden: Annotated[int, Field(ge=0)] = 0,
    ):
        super().__init__()
        if draws > permutations:
            raise SslpreError(
                f"`{draws}` different orders cannot be drawn from {permutations}", f"--set method.draws={permutations}"
            )
        self.tile = self.sees(setup.views[0], setup.patch, tile=tile)
        self.encoder = setup.encoder(size=self.tile)
        hidden = hidden or self.encoder.dim
        # section 3.2: nine columns of one network, fc6 the last of each; normalised so that no image looks at another
        self.column = nn.Sequential(nn.Linear(self.encoder.dim, hidden, bias=False), nn.LayerNorm(hidden), nn.ReLU())
        self.head = nn.Linear(TILES * hidden, permutations)
        self.draws, self.gray = draws, gray
        self.register_buffer("permutations", far_apart(permutations).clone())
        self.register_buffer("mean", setup.mean.view(3, 1, 1).clone(), persistent=False)
        self.register_buffer("std", setup.std.view(3, 1, 1).clone(), persistent=False)

    @classmethod
    def sees(cls, side: int, patch: int = 1, **arguments: Any) -> int:
        return patches.shown(cells(side)[1], arguments.get("tile", 0), patch)

    def loss(self, batch: Batch) -> Loss:
        x = self.tiles(batch)
        orders = self.orders(batch)
        features = self.column(self.encoder(x.flatten(0, 1))).unflatten(0, x.shape[:2])  # each tile is encoded once
        places = self.permutations[orders].flatten(1)  # [B, draws · 9]: which tile stands at each place
        shuffled = features.gather(1, places[..., None].expand(-1, -1, features.shape[2]))
        logits = self.head(shuffled.unflatten(1, (self.draws, TILES)).flatten(2)).flatten(0, 1)
        right = (logits.argmax(1) == orders.flatten()).float().mean()
        with torch.autocast(x.device.type, enabled=False):  # the softmax in fp32 (fp64 stays fp64)
            loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), orders.flatten())
        return Loss(loss, {"accuracy": right})

    @property
    def chance(self) -> float:
        return math.log(len(self.permutations))

    def orders(self, batch: Batch) -> Tensor:
        """[B, draws]: for each image different permutations, by number."""
        return batch.uniform("order", len(self.permutations)).argsort(dim=1, stable=True)[:, : self.draws]

    def tiles(self, batch: Batch) -> Tensor:
        """[B, 9, 3, tile, tile] in their places, row by row, each channel of each with the mean and deviation that the
        encoder takes off: what its first layer sees has mean 0 and variance 1."""
        view = batch.views[0].to(self.mean.dtype)
        grey = batch.uniform("gray")[:, None, None, None] < self.gray  # section 4.3: chromatic aberration tells places
        top, left = corners(batch)
        x = patches.cut(torch.where(grey, luma(view), view), top, left, cells(view.shape[-1])[1])
        x = patches.resize(x, self.tile)
        # section 4.3: the mean and deviation of neighbours are alike, and would tell who they are
        centred = x - x.mean((3, 4), keepdim=True)
        spread = centred.square().mean((3, 4), keepdim=True).sqrt().clamp(min=GREY_LEVEL)
        return centred / spread * self.std + self.mean

    def pictures(self, batch: Batch) -> list[list[Picture]]:
        top, left = corners(batch)
        side = cells(batch.views[0].shape[-1])[1]
        raw, shown = patches.cut(batch.views[0], top, left, side), self.tiles(batch).clamp(0, 1)
        rows = []
        for row, (view, order) in enumerate(zip(batch.views[0], self.orders(batch)[:, 0].tolist(), strict=True)):
            placed = 0.3 * view + 0.7  # what no tile shows is faded
            for y, x, tile in zip(top[row].tolist(), left[row].tolist(), raw[row], strict=True):
                placed[:, y : y + side, x : x + side] = tile
            titles = (
                "tiles in place",
                "each standardised, in place",
                f"as shown: order {order + 1} of {len(self.permutations)}",
            )
            grids = (placed, grid(shown[row]), grid(shown[row][self.permutations[order]]))
            rows.append([Picture(title, image) for title, image in zip(titles, grids, strict=True)])
        return rows


def cells(side: int) -> tuple[int, int]:
    """Sides of a cell and of the tile that is cut from it (section 4: 75 and 64 px), in views of `side` px.

    Raises SslpreError (exit 2) where a tile would fill its cell: at its edges neighbours would fit together.
    """
    cell = side // 3
    if cell < 4:
        hint = "--image-size 12 or more, or a larger size in [[views]]"
        raise SslpreError(f"views of `{side}` px are too small for nine tiles", hint)
    return cell, round(cell * 64 / 75)


def corners(batch: Batch) -> tuple[Tensor, Tensor]:
    """Top and left of each tile, int64 [B, 9] each: at a drawn place within its cell, so that no edge continues."""
    side = batch.views[0].shape[-1]
    cell, tile = cells(side)
    drawn = patches.whole(batch.uniform("place", TILES, 2), cell - tile + 1)
    place = torch.arange(TILES, device=drawn.device)
    start = (side - 3 * cell) // 2
    return start + place // 3 * cell + drawn[..., 0], start + place % 3 * cell + drawn[..., 1]


def grid(tiles: Tensor) -> Tensor:
    """[9, C, s, s] → one picture of them, three to a row, with white lines between."""
    return F.pad(tiles, (1, 1, 1, 1), value=1.0).unflatten(0, (3, 3)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


@cache
def far_apart(count: int) -> Tensor:
    """Permutations of nine that differ in many places, int64 [count, 9]; always the same ones.

    Algorithm 1 of the paper, greedily over all 9!: from a drawn one, each next has the largest sum of Hamming distances
    to those chosen, and among equals the largest distance to the nearest, and then the first by the alphabet.
    """
    every = torch.tensor(list(itertools.permutations(range(TILES))), dtype=torch.uint8).T.contiguous()  # [9, 9!]
    total = torch.zeros(every.shape[1], dtype=torch.int32)
    nearest = torch.full((every.shape[1],), TILES, dtype=torch.uint8)
    chosen: list[int] = []
    number = int(torch.randint(every.shape[1], (), generator=torch.Generator().manual_seed(0)))
    for _ in range(count):
        chosen.append(number)
        distance = (every != every[:, number, None]).sum(0, dtype=torch.uint8)
        total += distance
        torch.minimum(nearest, distance, out=nearest)
        # one chosen is nearest to itself by 0; it must not come again
        number = int((total * (TILES + 1) + nearest).masked_fill_(nearest == 0, -1).argmax())
    return every[:, chosen].T.long()
