"""How many directions features use: effective ranks, from singular values to one number."""

import torch
from torch import Tensor

DELTA = 1e-4  # LiDAR's δ: keeps the within-class scatter invertible


def rankme(z: Tensor) -> float:
    """RankMe: exp of the entropy of the singular values' shares. z: [N, D]; from 1 to min(N, D), 0 where all are 0.

    Garrido, Balestriero, Najman, LeCun, "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
    Representations by Their Rank", 2023, https://arxiv.org/abs/2210.02885, equation 1.
    """
    z = exact(z)
    gram = z.T @ z if z.shape[1] <= len(z) else z @ z.T
    return effective(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt())


def lidar(z: Tensor) -> float:
    """LiDAR: the effective rank of the scatter between images, in units of that within them. z: [N, Q, D], Q views of
    each of N images.

    Thilak, Huang, Saremi, Dinh, Goh, Nakkiran, Susskind, Littwin, "LiDAR: Sensing Linear Probing Performance in Joint
    Embedding SSL Architectures", 2023, https://arxiv.org/abs/2312.04000, section 3, with δ = 1e-4.
    """
    z = exact(z)
    means = z.mean(1)
    centred, inner = means - means.mean(0), (z - means[:, None]).flatten(0, 1)
    between = centred.T @ centred / len(means)
    within = inner.T @ inner / len(inner)
    values, axes = torch.linalg.eigh(within)  # not Cholesky: of large features rounding is more than δ
    half = (values.clamp(min=0) + DELTA).rsqrt() * axes  # Σ_w^−½ but for a rotation
    return effective(torch.linalg.eigvalsh(half.T @ between @ half).clamp(min=0))


def effective(values: Tensor) -> float:
    """exp(−Σ p log p) of values ≥ 0, p their shares; 0 where all are 0."""
    total = values.sum()
    if not total:
        return 0.0
    p = values / total
    return torch.exp(-torch.xlogy(p, p).sum()).item()


def exact(z: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (z.cpu() if z.device.type == "mps" else z).double()
