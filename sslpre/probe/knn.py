"""The k-nearest-neighbour probe: every test image is classified by a vote of the training images most like it.

Wu, Xiong, Yu, Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018,
https://arxiv.org/abs/1805.01978, section 3.4; k and temperature as in DINO (Caron et al., 2021).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

K = 20
TEMPERATURE = 0.07
CHUNK = 1 << 25  # similarities held at a time: 128 MiB


def predict(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int = K, temperature: float = TEMPERATURE
) -> Tensor:
    """The class [T] of each row of `test` [T, D] by a vote of its k most similar rows of `train` [N, D].

    labels: [N] in 0..classes-1. Similarity is the cosine, a vote weighs exp(similarity / temperature); k is at most N.
    Features are taken as they are, neither centred nor scaled. Equal votes go to the lower class.
    """
    return votes(train, labels, test, classes, [k], temperature)[0]


def votes(
    train: Tensor,
    labels: Tensor,
    test: Tensor | None,
    classes: int,
    ks: Sequence[int],
    temperature: float = TEMPERATURE,
) -> Tensor:
    """As `predict`, for each k: [len(ks), T]. Without `test` every training image is classified by the others
    (leave-one-out): [len(ks), N], k at most N − 1."""
    bank = F.normalize(train, dim=1)
    queries, answers, done = bank if test is None else F.normalize(test, dim=1), [], 0
    most = min(max(ks), len(train) - (test is None))
    for part in queries.split(max(1, CHUNK // len(train))):
        similarity = part @ bank.T
        if test is None:
            rows = torch.arange(len(part), device=part.device)
            similarity[rows, done + rows] = -torch.inf
            done += len(part)
        closest, nearest = similarity.topk(most, dim=1)
        weight = ((closest - 1) / temperature).exp()  # the constant factor keeps small temperatures finite
        answers.append(torch.stack([count(weight[:, :k], labels[nearest[:, :k]], classes) for k in ks]))
    return torch.cat(answers, 1)


def count(weight: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The class with the most votes, [B], of voters' weights and labels, [B, k] each."""
    return weight.new_zeros(len(weight), classes).scatter_add_(1, labels, weight).argmax(1)
