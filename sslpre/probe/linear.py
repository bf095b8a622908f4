"""The linear probe: L2-regularised multinomial logistic regression on standardised features.

The strength of the regularisation is chosen on a held-out part of the training split, never on test images. It is
scikit-learn's C: the sum of the losses plus ‖W‖² / (2C), the bias free; so are the numbers. Of large sets of features
the products are float32, which takes a third of the time; losses, L-BFGS and what is returned are float64.
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
SMALL = 1 << 21  # numbers in features up to which all is float64
COLUMNS = 512  # standardised at a time, so that float64 copies stay small
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


@dataclass(frozen=True)
class Choice:
    """A strength C and what it was chosen by: accuracy and minus the loss on the held-out part, (0, 0) without one.

    least: the lowest loss there of any strength, which features are compared by.
    """

    strength: float
    held: tuple[float, float]
    least: float


def search(
    features: Tensor, labels: Tensor, classes: int, seed: int, choice: Choice | None = None
) -> tuple[Linear, Choice]:
    """Fit on `features` [N, D] and `labels` [N] (0..classes-1), with the strength that is best on the held-out part.

    Best is the highest accuracy there, then the lowest loss. Each fit starts from the one before, strong penalties
    first. Where no image can be held out, because every class has one: C = 1. With a `choice` nothing is searched.
    """
    standard, mean, std, back = standardised(features)
    round_at = partial(cholesky, standard.T @ standard / len(standard), classes, len(standard))
    start: tuple[Tensor, Tensor] | None = None
    if choice is None:
        choice, start = choose(standard, labels, classes, seed, round_at)
    lower = round_at(choice.strength)
    weight, bias = solve(standard, labels, classes, choice.strength, lower, start, FINE)
    return Linear(back(weight), bias, mean, std, choice.strength), choice


def choose(
    standard: Tensor, labels: Tensor, classes: int, seed: int, round_at: Callable[[float], Tensor]
) -> tuple[Choice, tuple[Tensor, Tensor] | None]:
    """The strength that is best on the held-out part, and the weight and bias fitted with it on the rest."""
    fit, held = (torch.from_numpy(rows).to(labels.device) for rows in split(labels.cpu().numpy(), HELD_OUT, seed))
    if not len(held):
        return Choice(1.0, (0.0, 0.0), 0.0), None
    learned, held_out, truth = standard[fit], standard[held], labels[held]
    tried: dict[float, tuple[float, float]] = {}  # strength → held-out accuracy, minus held-out loss
    fits: dict[float, tuple[Tensor, Tensor]] = {}

    def attempt(strength: float, lower: Tensor, start: tuple[Tensor, Tensor] | None) -> None:
        weight, bias = solve(learned, labels[fit], classes, strength, lower, start, ROUGH)
        logits = (held_out @ weight.to(held_out.dtype)).to(bias.dtype) + bias
        accuracy = (logits.argmax(1) == truth).float().mean().item()
        tried[strength], fits[strength] = (accuracy, -F.cross_entropy(logits, truth).item()), (weight, bias)

    lower = round_at(STRENGTHS[0])
    for at, strength in enumerate(STRENGTHS):
        if at and at % 2 == 0:
            lower = round_at(strength)  # near enough for the next decade too
        attempt(strength, lower, fits[STRENGTHS[at - 1]] if at else None)
        newest = list(tried.values())[-PATIENCE:]
        older = list(tried.values())[:-PATIENCE]
        if older and all(max(one[i] for one in newest) <= max(one[i] for one in older) for i in (0, 1)):
            break
    best = max(tried, key=tried.__getitem__)
    lower = round_at(best)
    for strength in (best / 10**0.5, best * 10**0.5):
        attempt(strength, lower, fits[best])
    best = max(tried, key=tried.__getitem__)
    return Choice(best, tried[best], -max(loss for _, loss in tried.values())), fits[best]


def exact(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def standardised(features: Tensor) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """As `scale`; and what turns weights back.

    With more dimensions than images the standardised rows are rotated into the space they span, [N, N]: the penalty
    ‖W‖² does not see rotations, so the fit is the same.
    """
    x, mean, std = scale(features)
    if x.shape[1] <= x.shape[0]:
        return x, mean, std, lambda weight: weight
    basis, rotated = torch.linalg.qr(x.T)  # x = rotatedᵀ basisᵀ
    return rotated.T.contiguous(), mean, std, lambda weight: basis.to(weight) @ weight


def scale(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features [N, D] with mean 0 and variance 1, float64 where they are few, else float32; their mean and std [D].

    A dimension that does not vary is only centred.
    """
    few = features.numel() <= SMALL
    x = torch.empty(features.shape, dtype=exact(features.device) if few else torch.float32, device=features.device)
    means, stds = [], []
    for columns, target in zip(features.split(COLUMNS, 1), x.split(COLUMNS, 1), strict=True):
        part = columns.to(exact(features.device))
        mean, std = part.mean(0), part.std(0, correction=0)
        std = torch.where(std > 1e-6 * part.abs().amax(0), std, torch.ones_like(std))
        target.copy_((part - mean) / std)
        means.append(mean)
        stds.append(std)
    return x, torch.cat(means), torch.cat(stds)


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
    decay, rows = penalty(strength, len(x), classes), torch.arange(len(x), device=x.device)
    weight, bias = start or (x.new_zeros(x.shape[1], classes), x.new_zeros(classes))
    v, bias = (lower.T @ weight.to(lower)).to(exact(x.device)), bias.to(exact(x.device), copy=True)
    optimiser = torch.optim.LBFGS(
        [v, bias],
        max_iter=STEPS,
        tolerance_grad=tolerance,
        tolerance_change=1e-12 if x.dtype == torch.float64 else 1e-9,  # below this float32 sees noise
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def plain() -> Tensor:
        return torch.linalg.solve_triangular(lower.T, v.to(lower), upper=True)

    def closure() -> Tensor:
        weight = plain()
        logits = (weight.T.to(x).contiguous() @ x.T).T.to(v) + bias  # this way round it is twice as fast
        likely = logits.log_softmax(1)
        loss = -likely[rows, y].mean() + decay / 2 * weight.to(v).square().sum()
        slope = likely.exp()
        slope[rows, y] -= 1
        slope /= len(x)
        downhill = (slope.T.to(x).contiguous() @ x).T.to(lower) + decay * weight
        v.grad = torch.linalg.solve_triangular(lower, downhill, upper=False).to(v).contiguous()
        bias.grad = slope.sum(0)
        return loss

    optimiser.step(closure)
    return plain().to(v), bias
