"""SimCLR: two views of an image are each other's positives, every other view of the batch is a negative.

Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", 2020,
https://arxiv.org/abs/2002.05709.
"""

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslpre.heads import mlp
from sslpre.objective import Batch, Loss, Objective, Setup
from sslpre.ops import ranks

LARGEST = 2048  # rows of similarities that are held as one matrix: 16 MiB of it, and as much again for each step after


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
        if 2 * n > LARGEST:
            return ByRows.apply(z, temperature)
        s = z @ z.T / temperature  # s[i, k] = sim(z_i, z_k) / τ
        s = s.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -torch.inf)  # 1[k ≠ i]
        positive = torch.arange(2 * n, device=z.device).roll(n)  # the other view of the same image
        return F.cross_entropy(s, positive)  # ℓ(i, j) over 2N rows: one positive, 2N − 2 negatives


class ByRows(torch.autograd.Function):
    """The same loss of z = [z1; z2], normalised, without a 2N × 2N matrix: some rows of it at a time.

    The gradient is known as soon as a block's softmax is, so it is made here and no block is kept or made twice.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float) -> Tensor:
        count, n = len(z), len(z) // 2
        loss, gradient = z.new_zeros(()), torch.zeros_like(z) if ctx.needs_input_grad[0] else None
        for rows in torch.arange(count, device=z.device).split(max(1, LARGEST * LARGEST // count)):
            here = torch.arange(len(rows), device=z.device)
            positive = (rows + n) % count
            s = (z[rows] @ z.T).div_(temperature)
            s[here, rows] = -torch.inf  # 1[k ≠ i]
            log_sum = s.logsumexp(1, keepdim=True)
            loss += (log_sum.squeeze(1) - s[here, positive]).sum()
            if gradient is not None:
                p = s.sub_(log_sum).exp_()  # ∂ℓ/∂s: the softmax, less 1 at the positive
                p[here, positive] -= 1
                gradient[rows] += p @ z
                gradient += p.T @ z[rows]
        if gradient is not None:
            ctx.save_for_backward(gradient.div_(temperature * count))
        return loss / count

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None
