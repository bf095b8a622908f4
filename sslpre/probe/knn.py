"""The k-nearest-neighbour probe: every test image is classified by a vote of the training images most like it.

Wu, Xiong, Yu, Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018,
https://arxiv.org/abs/1805.01978, section 3.4; k and temperature as in DINO (Caron et al., 2021).
"""

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
    k = min(k, len(train))
    bank = F.normalize(train, dim=1).T
    answers = []
    for part in F.normalize(test, dim=1).split(max(1, CHUNK // len(train))):
        similarity, nearest = (part @ bank).topk(k, dim=1)
        weight = ((similarity - 1) / temperature).exp()  # the constant factor keeps small temperatures finite
        votes = weight.new_zeros(len(part), classes).scatter_add_(1, labels[nearest], weight)
        answers.append(votes.argmax(1))
    return torch.cat(answers)
