"""Rotation (RotNet): each image is shown in its four orientations, and the network tells which is which.

Gidaris, Singh, Komodakis, "Unsupervised Representation Learning by Predicting Image Rotations", 2018,
https://arxiv.org/abs/1803.07728.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslpre.objective import Batch, Loss, Objective, Picture, Setup

ROTATIONS = 4  # by 0, 90, 180 and 270 degrees: K of equation 2


class Rotation(Objective):
    """One linear layer on the encoder's features names the rotation."""

    def __init__(self, setup: Setup):
        super().__init__()
        self.encoder = setup.encoder()
        self.head = nn.Linear(self.encoder.dim, ROTATIONS)

    def loss(self, batch: Batch) -> Loss:
        x = rotated(batch.views[0])  # section 3.2: all four copies of an image stand in the same batch
        y = torch.arange(ROTATIONS, device=x.device).repeat_interleave(len(x) // ROTATIONS)
        logits = self.head(self.encoder(x))
        right = (logits.argmax(1) == y).float().mean()
        with torch.autocast(x.device.type, enabled=False):  # the softmax in fp32 (fp64 stays fp64)
            loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y)
        return Loss(loss, {"accuracy": right})  # equations 2 and 3: the mean over images and rotations

    def pictures(self, batch: Batch) -> list[list[Picture]]:
        turned = rotated(batch.views[0]).unflatten(0, (ROTATIONS, -1)).unbind(1)
        return [[Picture(f"{90 * quarter}°", image) for quarter, image in enumerate(four)] for four in turned]

    @property
    def chance(self) -> float:
        return math.log(ROTATIONS)


def rotated(x: Tensor) -> Tensor:
    """[B, 3, S, S] → [4 B, 3, S, S]: all images as they are, then by 90, 180 and 270 degrees, pixels only moved."""
    return torch.cat([x.rot90(quarter, (2, 3)) for quarter in range(ROTATIONS)])
