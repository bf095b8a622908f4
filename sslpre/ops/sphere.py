"""Points on the unit sphere: how near the pairs are, and how evenly all of them are spread.

Wang, Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere",
2020, https://arxiv.org/abs/2005.10242.
"""

import math

import torch
from torch import Tensor

BLOCK = 1 << 22  # pairs held at a time
T = 2.0  # of the Gaussian potential, section 4.1.2


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """Section 4.1.1 with α = 2: mean of ‖x_i − y_i‖². x, y: [N, D], rows of unit length. In [0, 4], 0 is best."""
    return (x - y).square().sum(1).mean()


def uniformity(x: Tensor) -> Tensor:
    """Section 4.1.2 with t = 2: log of the mean of exp(−t ‖x_i − x_j‖²) over pairs i < j. x: [N, D], N ≥ 2, rows of
    unit length. In [−8, 0]; 0 where all are one point, less is better."""
    count = len(x)
    total = x.new_zeros((), dtype=torch.float64 if x.device.type != "mps" else torch.float32)
    for first in range(0, count, max(1, BLOCK // count)):
        rows = x[first : first + max(1, BLOCK // count)]
        square = 2 - 2 * (rows @ x[first:].T)  # of unit length: ‖x‖² + ‖y‖² − 2 x·y
        potential = square.clamp_(min=0).mul_(-T).exp_()
        total += potential.triu_(1).sum(dtype=total.dtype)  # the pairs of a row with the rows after it
    return (total.log() - math.log(count * (count - 1) / 2)).to(x.dtype)


def mean_cosine(x: Tensor) -> Tensor:
    """Mean of x_i · x_j over pairs i ≠ j. x: [N, D], N ≥ 2, rows of unit length or 0."""
    both = x.sum(0).square().sum() - x.square().sum()
    return both / (len(x) * (len(x) - 1))
