"""What of an image's colours a network may be shown in place of them all."""

from typing import Literal

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_lab
from torch import Tensor

Colour = Literal["rgb", "luma", "chroma", "sobel"]
CHANNELS: dict[str, int] = {"rgb": 3, "luma": 1, "chroma": 2, "sobel": 2}
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue


def luma(x: Tensor) -> Tensor:
    """RGB [B, 3, H, W] → [B, 1, H, W]."""
    return (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def chroma(x: Tensor) -> Tensor:
    """RGB [B, 3, H, W] in [0, 1] → a and b of CIE Lab, [B, 2, H, W], in about ±1."""
    return rgb_to_lab(x)[:, 1:] / 110.0


def sobel(grey: Tensor) -> Tensor:
    """[B, 1, H, W] → [B, 2, H, W]: how fast it falls to the right and downwards, by Sobel's 3 × 3 kernels, 0 outside.

    Sums of slices, which autocast leaves in fp32: differences of rounded pixels would be noise.
    """
    x = F.pad(grey, (1, 1, 1, 1))
    down = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
    right = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    return torch.cat([down[..., :-2] - down[..., 2:], right[:, :, :-2] - right[:, :, 2:]], 1)
