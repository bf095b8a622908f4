"""The linear probe: L2-regularised multinomial logistic regression on standardised features.

The strength of the regularisation is chosen on a held-out part of the training split, never on test images. It is
scikit-learn's C: the sum of the losses plus ‖W‖² / (2C), the bias free; so are the numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = tuple(10.0**power for power in range(-5, 3))  # C by decades; then half a decade either side of the best
HELD_OUT = 0.2
PATIENCE = 2  # decades without a better held-out loss or accuracy before the weaker strengths are left out
STEPS = 1000  # of L-BFGS at most, for one strength
ROUGH, FINE = 1e-3, 1e-5  # largest gradient left over, while searching and in the fit that counts


@dataclass(frozen=True)
class Linear:
    """A fitted probe. weight: [D, K], on features standardised with mean and std ([D] each); bias: [K]."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    strength: float

    def predict(self, features: Tensor) -> Tensor:
        """The class [T] of each row of `features` [T, D]."""
        standard = (features.to(self.mean) - self.mean) / self.std
        return (standard @ self.weight + self.bias).argmax(1)


def split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of two parts of `labels` (int [N]), both rising; the second is `share` of every class, at random.

    A class of at least two images has at least one in either part; a single one stays in the first.
    """
    draw = np.random.default_rng(seed)
    second = np.zeros(len(labels), bool)
    for one in np.unique(labels):
        rows = np.flatnonzero(labels == one)
        if len(rows) > 1:
            count = min(max(1, round(share * len(rows))), len(rows) - 1)
            second[draw.permutation(rows)[:count]] = True
    return np.flatnonzero(~second), np.flatnonzero(second)


def search(features: Tensor, labels: Tensor, classes: int, seed: int) -> Linear:
    """Fit on `features` [N, D] and `labels` [N] (0..classes-1), with the strength that is best on the held-out part.

    Best is the highest accuracy there, then the lowest loss. Each fit starts from the one before, strong penalties
    first. Where no image can be held out, because every class has one: C = 1.
    """
    standard, mean, std, back = standardised(features)
    round_at = partial(cholesky, standard.T @ standard / len(standard), classes, len(standard))
    fit, held = (torch.from_numpy(rows).to(labels.device) for rows in split(labels.cpu().numpy(), HELD_OUT, seed))
    tried: dict[float, tuple[float, float]] = {}  # strength → held-out accuracy, minus held-out loss
    fits: dict[float, tuple[Tensor, Tensor]] = {}

    def attempt(strength: float, lower: Tensor, start: tuple[Tensor, Tensor] | None) -> None:
        weight, bias = solve(standard[fit], labels[fit], classes, strength, lower, start, ROUGH)
        logits = standard[held] @ weight + bias
        accuracy = (logits.argmax(1) == labels[held]).double().mean().item()
        tried[strength], fits[strength] = (accuracy, -F.cross_entropy(logits, labels[held]).item()), (weight, bias)

    lower = round_at(STRENGTHS[0])
    for at, strength in enumerate(STRENGTHS if len(held) else ()):
        if at % 2 == 0:
            lower = round_at(strength)  # near enough for the next decade too
        attempt(strength, lower, fits[STRENGTHS[at - 1]] if at else None)
        newest = list(tried.values())[-PATIENCE:]
        older = list(tried.values())[:-PATIENCE]
        if older and all(max(one[i] for one in newest) <= max(one[i] for one in older) for i in (0, 1)):
            break
    best = max(tried, key=tried.__getitem__, default=1.0)
    lower = round_at(best)
    if tried:
        for strength in (best / 10**0.5, best * 10**0.5):
            attempt(strength, lower, fits[best])
        best = max(tried, key=tried.__getitem__)
    weight, bias = solve(standard, labels, classes, best, lower, fits.get(best), FINE)
    return Linear(back(weight), bias, mean, std, best)


def standardised(features: Tensor) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Features with mean 0 and variance 1, in float64 where the device has it; mean, std; what turns weights back.

    A dimension that does not vary is only centred. With more dimensions than images the standardised rows are rotated
    into the space they span, [N, N]: the penalty ‖W‖² does not see rotations, so the fit is the same.
    """
    x = features.to(torch.float32 if features.device.type == "mps" else torch.float64)
    mean = x.mean(0)
    std = x.std(0, correction=0)
    std = torch.where(std > 1e-6 * x.abs().amax(0), std, torch.ones_like(std))
    x = (x - mean) / std
    if x.shape[1] <= x.shape[0]:
        return x, mean, std, lambda weight: weight
    basis, rotated = torch.linalg.qr(x.T)  # x = rotatedᵀ basisᵀ
    return rotated.T.contiguous(), mean, std, lambda weight: basis @ weight


def penalty(strength: float, count: int, classes: int) -> float:
    """What half of ‖W‖² weighs beside the mean loss.

    scikit-learn fits two classes with one vector w = W₁ − W₀, and the least ‖W‖² with that difference is ‖w‖² / 2:
    hence the two.
    """
    return (2 if classes == 2 else 1) / (strength * count)


def cholesky(gram: Tensor, classes: int, count: int, strength: float) -> Tensor:
    """L with L Lᵀ = gram / K + penalty, about the curvature in W where all classes are equally likely (Böhning 1992).

    It only shapes the way to the minimum, so a little more on the diagonal, which float32 may need, does no harm.
    """
    damping = penalty(strength, count, classes) + torch.finfo(gram.dtype).eps * gram.trace() / classes
    return torch.linalg.cholesky(gram / classes + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def solve(
    x: Tensor,
    y: Tensor,
    classes: int,
    strength: float,
    lower: Tensor,
    start: tuple[Tensor, Tensor] | None,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Weight [D, K] and bias [K] that minimise mean cross entropy + ‖W‖² / (2 C N) over x [N, D] and y [N].

    L-BFGS on V with W = L⁻ᵀV: there the problem is nearly round, and tens of steps do where plain W takes thousands.
    """
    decay = penalty(strength, len(x), classes)
    weight, bias = start or (x.new_zeros(x.shape[1], classes), x.new_zeros(classes))
    v, bias = (lower.T @ weight).requires_grad_(), bias.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [v, bias],
        max_iter=STEPS,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        weight = torch.linalg.solve_triangular(lower.T, v, upper=True)
        loss = F.cross_entropy(x @ weight + bias, y) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return torch.linalg.solve_triangular(lower.T, v.detach(), upper=True), bias.detach()
