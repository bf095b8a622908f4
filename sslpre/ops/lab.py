"""The ab plane of CIE Lab in 313 bins, and colours on it: soft encoding, annealed mean, another image's lightness.

Zhang, Isola, Efros, "Colorful Image Colorization", 2016, https://arxiv.org/abs/1603.08511.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from kornia.color import lab_to_rgb, rgb_to_lab
from torch import Tensor, nn

GRID = 10  # between neighbouring bins, in units of a and b (section 2.1)
NEAREST = 5  # bins that a colour is shared out to (footnote 2)
SIGMA = 5.0  # of the Gaussian that shares it out, and of the one that smooths a distribution
EDGE = 120  # a and b of sRGB lie within ±108
CELL = 2.5  # side of the squares of the plane that have a list of bins each
CELLS = int(2 * EDGE / CELL)


@cache
def in_gamut() -> Tensor:
    """ab of the published bins, [313, 2] in float64, by a and then by b.

    They are the corners of the squares of the grid in which there is some of the convex hull of all sRGB colours on the
    ab plane. A square and a convex shape meet where in no direction the whole square lies beyond the shape.
    """
    u, v = torch.meshgrid(*[torch.linspace(0, 1, 33, dtype=torch.float64)] * 2, indexing="ij")
    sides = [(torch.zeros_like(u), u, v), (torch.ones_like(u), u, v)]  # of the RGB cube: the hull's corners are on them
    faces = torch.stack([torch.stack([side[(c + turn) % 3] for c in range(3)]) for side in sides for turn in range(3)])
    turns = torch.arange(360, dtype=torch.float64).deg2rad()
    directions = torch.stack([turns.cos(), turns.sin()])
    reach = (rgb_to_ab(faces).movedim(1, -1) @ directions).amax((0, 1, 2))
    points = torch.cartesian_prod(*[torch.arange(-EDGE, EDGE + 1, GRID, dtype=torch.float64)] * 2)
    # the four squares about a point are one of half-width GRID
    return points[(points @ directions - GRID * directions.abs().sum(0) < reach).all(1)]


def rgb_to_ab(x: Tensor) -> Tensor:
    """sRGB in [0, 1], [B, 3, h, w] → a (green to red) and b (blue to yellow), [B, 2, h, w], under D65; 0 is grey."""
    return rgb_to_lab(x.clamp(0, 1))[:, 1:]


def recoloured(x: Tensor, ab: Tensor, mode: str = "bilinear") -> Tensor:
    """RGB images [B, 3, H, W] with their own lightness and the colours ab [B, 2, h, w], enlarged; clipped to [0, 1]."""
    smooth = {} if mode == "nearest" else {"align_corners": False}
    ab = F.interpolate(ab, x.shape[2:], mode=mode, **smooth)
    return lab_to_rgb(torch.cat([rgb_to_lab(x.clamp(0, 1))[:, :1], ab], 1))


class Bins(nn.Module):
    """The 313 bins on a device. `ab`: [313, 2]; `near`: for each square of the plane the bins that may be nearest."""

    ab: Tensor
    near: Tensor

    def __init__(self) -> None:
        super().__init__()
        ab = in_gamut()
        along = (torch.arange(CELLS, dtype=ab.dtype) + 0.5) * CELL - EDGE
        centres = torch.cartesian_prod(along, along)
        d = torch.cdist(centres, ab)
        # a distance differs by half a diagonal at most over a square, so the nearest of any point are all among these
        reach = d.kthvalue(NEAREST, dim=1, keepdim=True).values + math.sqrt(2) * CELL + 1e-6
        most = int((d <= reach).sum(1).max())
        self.register_buffer("ab", ab.float(), persistent=False)
        self.register_buffer("near", d.topk(most, largest=False).indices, persistent=False)

    def __len__(self) -> int:
        return len(self.ab)

    def encode(self, ab: Tensor) -> tuple[Tensor, Tensor]:
        """Soft encoding of colours [B, 2, h, w]: the 5 nearest bins, nearest first, and their shares, which sum to 1.

        Both [B, 5, h, w]. Shares are Gaussian in the distance, σ = 5 (section 2.1); all other bins have none.
        """
        cell = ((ab + EDGE) / CELL).long().clamp(0, CELLS - 1)
        bins = self.near[cell[:, 0] * CELLS + cell[:, 1]]  # [B, h, w, most]
        squared = (self.ab.to(ab.dtype)[bins] - ab.movedim(1, -1).unsqueeze(-2)).square().sum(-1)
        squared, place = squared.topk(NEAREST, largest=False)
        shares = (squared / (-2 * SIGMA**2)).softmax(-1)
        return bins.gather(-1, place).movedim(-1, 1), shares.movedim(-1, 1)

    def annealed(self, logits: Tensor, temperature: float) -> Tensor:
        """Equation 5: the mean colour after sharpening. Logits [B, 313, h, w] → ab [B, 2, h, w]."""
        return torch.einsum("bqhw,qc->bchw", (logits / temperature).softmax(1), self.ab.to(logits.dtype))

    def smoothed(self, p: Tensor) -> Tensor:
        """A distribution over the bins [313], each bin's share spread to those about it by a Gaussian of σ = 5."""
        ab = self.ab.to(p.dtype)
        kernel = (torch.cdist(ab, ab).square() / (-2 * SIGMA**2)).softmax(0)  # nothing is lost at the gamut's edge
        return kernel @ p
