"""SimCLR: two views of an image are each other's positives, every other view of the batch is a negative.

Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", 2020,
https://arxiv.org/abs/2002.05709.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslpre.heads import mlp
from sslpre.objective import Batch, Loss, Objective, Setup
from sslpre.ops import ranks


class SimCLR(Objective):
    """temperature: τ of equation 1; hidden and output: widths of the projection head g(·), 0 for the encoder's own."""

    views = range(2, 3)
    couples = True

    def __init__(
        self,
        setup: Setup,
        temperature: Annotated[float, Field(gt=0)] = 0.5,
        hidden: Annotated[int, Field(ge=0)] = 0,
        output: Annotated[int, Field(ge=1)] = 128,
    ):
        super().__init__()
        self.encoder = setup.encoder()
        self.head = mlp([self.encoder.dim, hidden or self.encoder.dim, output])
        self.temperature = temperature
        self.batch = setup.batch

    def loss(self, batch: Batch) -> Loss:
        x = torch.cat(batch.views)  # Algorithm 1: both views in one joint batch, 2N images
        z = self.head(self.encoder(x))
        z1, z2 = (ranks.gather(part) for part in z.chunk(2))
        return Loss(nt_xent(z1, z2, self.temperature))

    @property
    def chance(self) -> float:
        return math.log(2 * self.batch - 1)  # 2N − 1 candidates, all alike


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """The normalised temperature-scaled cross entropy of equation 1, averaged over both directions. z1, z2: [N, D]."""
    with torch.autocast(z1.device.type, enabled=False):  # similarities and softmax in fp32 (fp64 stays fp64)
        z = torch.cat([z1, z2])
        z = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
        n = len(z1)
        s = z @ z.T / temperature  # s[i, k] = sim(z_i, z_k) / τ
        s = s.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -torch.inf)  # 1[k ≠ i]
        positive = torch.arange(2 * n, device=z.device).roll(n)  # the other view of the same image
        return F.cross_entropy(s, positive)  # ℓ(i, j) over 2N rows: one positive, 2N − 2 negatives
