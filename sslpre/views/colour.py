"""Colour jitter and grey, with torchvision's meaning: per image its own factors, its own order, and whether at all."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance import adjust_brightness_accumulative, adjust_hue, adjust_saturation_with_gray_subtraction
from torch import Tensor

from sslpre.views.draw import Draw, chosen

if TYPE_CHECKING:
    from sslpre.recipe import View

_ORDERS = torch.tensor(list(itertools.permutations(range(4))))
# On a CPU so many pixels at a time: enough to pay for the calls, few enough that the temporaries of hue stay small.
_PIXELS_AT_ONCE = 2**18


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """torchvision's `adjust_brightness`, one factor per image: float [B, 3, H, W] in [0, 1], factor [B] ≥ 0."""
    return adjust_brightness_accumulative(images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """torchvision's `adjust_contrast`, one factor per image: float [B, 3, H, W] in [0, 1], factor [B] ≥ 0.

    kornia's `adjust_contrast_with_mean_subtraction`, but for how the mean is summed. There it is one reduction, which
    torch splits over threads when the batch is a single large image, and the last bit would depend on the batch. By
    rows and then over rows, no reduction is ever split.
    """
    factor = factor.view(-1, 1, 1, 1)
    mean = rgb_to_grayscale(images).mean(-1, keepdim=True).mean(-2, keepdim=True)
    return (images * factor + mean * (1 - factor)).clamp(0.0, 1.0)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """torchvision's `adjust_saturation`, one factor per image: float [B, 3, H, W] in [0, 1], factor [B] ≥ 0."""
    return adjust_saturation_with_gray_subtraction(images, factor)


def hue(images: Tensor, factor: Tensor) -> Tensor:
    """torchvision's `adjust_hue`, one factor per image: float [B, 3, H, W] in [0, 1], factor [B] in ±0.5 turns."""
    return adjust_hue(images, factor * (2 * math.pi))


# in the order of torchvision's ColorJitter, whose neutral elements are 1, 1, 1 and 0
OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (brightness, contrast, saturation, hue)


@dataclass
class Jitter:
    """What colour jitter does to a batch: groups of images that get one operation at one step, in this order."""

    groups: list[tuple[int, int]]  # operation (its place in OPERATIONS) and number of images
    rows: Tensor  # int64: the images of all groups, one group after the other
    factors: Tensor  # float32: the factor of each


def draw_jitter(view: "View", draw: Draw, name: str) -> Jitter:
    """Draw ColorJitter's factors and order for the images that get it, all on the CPU.

    Each strength s is uniform in [max(0, 1 - s), 1 + s], hue in [-s, s]; an operation of strength 0 is left out. The
    order of the four is one of 24, uniform. An image is jittered with probability `view.jitter`.
    """
    strength = torch.tensor([view.brightness, view.contrast, view.saturation, view.hue])
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
    low, high = neutral - strength, neutral + strength
    low[:3].clamp_(min=0)
    rows = chosen(draw(f"{name}.jitter"), view.jitter)
    factors = low + (high - low) * draw(f"{name}.factors", 4)[rows]
    order = _ORDERS[(draw(f"{name}.order")[rows].double() * len(_ORDERS)).long()]
    groups, members, values = [], [rows[:0]], [factors[:0, 0]]
    for step, operation in itertools.product(range(4), strength.nonzero().flatten().tolist()):
        group = (order[:, step] == operation).nonzero().squeeze(1)
        if len(group):
            groups.append((operation, len(group)))
            members.append(rows[group])
            values.append(factors[group, operation])
    return Jitter(groups, torch.cat(members), torch.cat(values))


def jitter(images: Tensor, plan: Jitter) -> None:
    """Apply `plan` to float images [B, 3, H, W] in [0, 1], in place; only the drawn images are touched.

    The sizes of the groups are known on the host, so that nothing waits for the device.
    """
    most = len(images)
    if images.device.type == "cpu":
        most = max(1, _PIXELS_AT_ONCE // (images.shape[-1] * images.shape[-2]))
    at = 0
    for operation, count in plan.groups:
        for start in range(at, at + count, most):
            part = slice(start, min(start + most, at + count))
            rows = plan.rows[part]
            images.index_copy_(0, rows, OPERATIONS[operation](images.index_select(0, rows), plan.factors[part]))
        at += count


def gray(images: Tensor, rows: Tensor) -> None:
    """Make images `rows` (int64) of float [B, 3, H, W] grey, in place: torchvision's luma on all three channels."""
    if len(rows):
        images.index_copy_(0, rows, rgb_to_grayscale(images.index_select(0, rows)).expand(-1, 3, -1, -1))
