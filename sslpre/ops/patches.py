"""Square patches cut out of images, each image at its own places, and the side at which a network is shown them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslpre.errors import SslpreError

SMALLEST = 18  # px: below 17 a network that halves its maps five times has nothing but points in its last two stages


def cut(images: Tensor, top: Tensor, left: Tensor, side: int) -> Tensor:
    """Windows of side × side pixels: images [B, C, H, W], corners int64 [B, n] → [B, n, C, side, side].

    One gather of whole pixels, so that the patches of a batch lie in memory as convolutions like them, channels last.
    A corner must leave room for the window: an index is not checked against its own row of pixels.
    """
    count, channels, height, width = images.shape
    pixels = images.permute(0, 2, 3, 1).reshape(-1, channels)
    step = torch.arange(side, device=images.device)
    first = torch.arange(count, device=images.device)[:, None] * height  # an image's first row among those of all
    rows = (first + top)[..., None] + step
    places = rows[..., :, None] * width + (left[..., None] + step)[..., None, :]  # [B, n, side, side]
    windows = pixels.index_select(0, places.flatten()).view(*places.shape, channels)
    return windows.permute(0, 1, 4, 2, 3)


def resize(patches: Tensor, side: int) -> Tensor:
    """[B, n, C, s, s] → [B, n, C, side, side], bilinear, antialiased where it makes them smaller."""
    if patches.shape[-1] == side:
        return patches
    flat = F.interpolate(patches.flatten(0, 1), (side, side), mode="bilinear", antialias=True)
    return flat.unflatten(0, patches.shape[:2])


def whole(numbers: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1) → int64, uniform among 0 … count − 1."""
    return (numbers * count).long()


def shown(side: int, asked: int, patch: int) -> int:
    """Side at which patches cut at `side` px are shown to a network that cuts its images into squares of `patch` px.

    asked: what the user wants, 0 for the cut itself, enlarged to 18 px where it is smaller, and brought to the nearest
    number of whole squares, at least two: one has nothing beside it. Raises SslpreError (exit 2) where squares do not
    fill the side that is asked for.
    """
    if asked % patch:
        near = (asked // patch * patch, (asked // patch + 1) * patch)
        hint = " or ".join(str(size) for size in near if size)
        message = f"tiles of `{asked}` px are not divisible by the network's {patch}"
        raise SslpreError(message, f"--set method.tile={hint}")
    if asked or patch == 1:
        return asked or max(side, SMALLEST)
    return max(round(max(side, SMALLEST) / patch), 2) * patch
