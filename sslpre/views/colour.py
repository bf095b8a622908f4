"""Colour jitter and grey, with torchvision's meaning: per image its own factors, its own order, and whether at all."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslpre.views.draw import Draw, chosen

if TYPE_CHECKING:
    from sslpre.recipe import View

_ORDERS = torch.tensor(list(itertools.permutations(range(4))))
# On a CPU so many pixels at a time: enough to pay for the calls, few enough that the temporaries stay in the cache.
_PIXELS_AT_ONCE = 2**16
# On a GPU so many bytes of temporaries: the images themselves and at most 13 planes of one number a pixel, with hue.
_ROOM = 2**28
_PLANES = 16
LUMA = (0.2989, 0.587, 0.114)  # torchvision's, which sum to 0.9999
_TINY = 1e-30  # keeps 0 / 0 away: where a pixel has no chroma, its hue is of no account

# One image [3, H, W] with a number, or images [B, 3, H, W] with [B, 1, 1, 1]. Only operations that round once are used
# on tensors of several images, so that a result does not depend on where in the batch an image stands.
Factor = float | Tensor


def _limit(images: Tensor, factor: Factor) -> None:
    """Back into [0, 1]. A factor of at most 1 mixes towards something inside, and cannot leave it."""
    if isinstance(factor, Tensor) or factor > 1:
        images.clamp_(0.0, 1.0)


def luma(images: Tensor) -> Tensor:
    """torchvision's grey of float [..., 3, H, W]: [..., H, W]."""
    red, green, blue = images.unbind(-3)
    grey = red * LUMA[0]
    return grey.add_(green * LUMA[1]).add_(blue * LUMA[2])


def brightness(images: Tensor, factor: Factor) -> None:
    """torchvision's `adjust_brightness`, in place: float in [0, 1], factor ≥ 0."""
    images.mul_(factor)
    _limit(images, factor)


def contrast(images: Tensor, factor: Factor) -> None:
    """torchvision's `adjust_contrast`, in place: float in [0, 1], factor ≥ 0.

    The mean of grey is the grey of the means. It is summed by rows and then over rows, so that torch never splits a sum
    over threads: it would for a single large image, and the last bit would depend on the batch.
    """
    means = images.mean(-1, keepdim=True).mean(-2, keepdim=True)
    if isinstance(factor, Tensor):
        images.mul_(factor).add_(luma(means).unsqueeze(-3).mul_(1 - factor))
    else:  # in numbers of Python's: on an image alone a call costs more than what it does to three means
        mean = sum(part * weight for part, weight in zip(means.flatten().tolist(), LUMA, strict=True))
        images.mul_(factor).add_(mean * (1 - factor))
    _limit(images, factor)


def saturation(images: Tensor, factor: Factor) -> None:
    """torchvision's `adjust_saturation`, in place: float in [0, 1], factor ≥ 0."""
    if isinstance(factor, Tensor):
        grey = luma(images).unsqueeze(-3).mul_(1 - factor)
    else:
        red, green, blue = images.unbind(-3)
        of_red, of_green, of_blue = (weight * (1 - factor) for weight in LUMA)
        grey = (red * of_red).add_(green, alpha=of_green).add_(blue, alpha=of_blue)
    images.mul_(factor).add_(grey)
    _limit(images, factor)


def hue(images: Tensor, factor: Factor) -> None:
    """torchvision's `adjust_hue`, in place: float in [0, 1], factor in ±0.5 turns.

    Without a comparison, a branch or fmod, all of them slow. With low ≤ r, g, b ≤ high and chroma = high - low, the
    distance from red on the circle of hues is 1 + (g + b - r - low) / chroma sixths of a turn, on the side of green
    where g > b; and a channel is low + chroma · clamp(2 - its distance from the hue in sixths).
    """
    factor = factor.squeeze(-3) if isinstance(factor, Tensor) else factor
    red, green, blue = images.unbind(-3)
    low, high = torch.minimum(red, green), torch.maximum(red, green)
    torch.minimum(low, blue, out=low)
    chroma = torch.maximum(high, blue, out=high).sub_(low)
    turn = (green - red).add_(blue - low).div_(chroma.clamp(min=_TINY)).add_(1.0)
    turn = turn.copysign_(green - blue).mul_(1 / 6).add_(factor)
    turn.sub_(turn.floor())
    # red is opposite 1/2; a clamped distance of 1/6 … 1/3 of a turn becomes 0 … 1 with slope 6
    below, above = low - chroma, chroma.add(chroma).add_(low)
    chroma.mul_(6.0)
    torch.sub(turn, 1 / 2, out=red).abs_().clamp_(1 / 6, 1 / 3).mul_(chroma).add_(below)
    torch.sub(turn, 2 / 3, out=blue).abs_().clamp_(1 / 6, 1 / 3).mul_(chroma)
    torch.sub(above, blue, out=blue)
    turn.sub_(1 / 3).abs_().clamp_(1 / 6, 1 / 3).mul_(chroma)
    torch.sub(above, turn, out=green)


# in the order of torchvision's ColorJitter, whose neutral elements are 1, 1, 1 and 0
OPERATIONS: tuple[Callable[[Tensor, Factor], None], ...] = (brightness, contrast, saturation, hue)
NOTHING = len(OPERATIONS)
LAUNCHES = (4, 14, 12, 38)  # kernels on a GPU for a group of images that gets one of them, copying there and back too


@dataclass
class Jitter:
    """What colour jitter does to a batch, image by image and as groups that get one operation at one step."""

    steps: Tensor  # int64 [B, 4], on the CPU: which of OPERATIONS comes at each step, NOTHING where none does
    factors: Tensor  # float32 [B, 4], on the CPU: the factor of each of OPERATIONS
    groups: list[tuple[int, int]]  # operation and number of images, in the order in which they are done
    rows: Tensor  # int64: the images of all groups, one group after the other
    values: Tensor  # float32: the factor of each


def draw_jitter(view: "View", draw: Draw, name: str) -> Jitter:
    """Draw ColorJitter's factors and order for the images that get it, all on the CPU.

    Each strength s is uniform in [max(0, 1 - s), 1 + s], hue in [-s, s]; an operation of strength 0 is left out. The
    order of the four is one of 24, uniform. An image is jittered with probability `view.jitter`.
    """
    strength = torch.tensor([view.brightness, view.contrast, view.saturation, view.hue])
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
    low, high = neutral - strength, neutral + strength
    low[:3].clamp_(min=0)
    factors = low + (high - low) * draw(f"{name}.factors", 4)
    steps = _ORDERS[(draw(f"{name}.order").double() * len(_ORDERS)).long()]
    drawn = (draw(f"{name}.jitter") < view.jitter).unsqueeze(1) & (strength > 0)[steps]
    steps = torch.where(drawn, steps, NOTHING)
    # one number for step and operation, so that one stable sort makes all groups
    key = (steps + torch.arange(4) * (NOTHING + 1)).t().reshape(-1)
    kept = chosen((steps == NOTHING).t().reshape(-1).float(), 0.5)
    order = kept[key[kept].argsort(stable=True)]
    counts = torch.bincount(key, minlength=4 * (NOTHING + 1)).tolist()
    groups = [
        (place % (NOTHING + 1), count)
        for place, count in enumerate(counts)
        if count and place % (NOTHING + 1) != NOTHING
    ]
    rows = order % len(steps)
    return Jitter(steps, factors, groups, rows, factors[rows, key[order] % (NOTHING + 1)])


def jitter(images: Tensor, plan: Jitter) -> None:
    """Apply `plan` to float images [B, 3, H, W] in [0, 1], in place, by groups; only the drawn images are touched.

    The sizes of the groups are known on the host, so that nothing waits for the device.
    """
    most, at = _at_once(images), 0
    for operation, count in plan.groups:
        for start in range(at, at + count, most):
            part = slice(start, min(start + most, at + count))
            some = images.index_select(0, plan.rows[part])
            OPERATIONS[operation](some, plan.values[part].view(-1, 1, 1, 1))
            images.index_copy_(0, plan.rows[part], some)
        at += count


def jitter_one(image: Tensor, steps: Sequence[int], factors: Sequence[float]) -> None:
    """Apply one row of a `Jitter` to its float image [3, H, W] in [0, 1], in place."""
    for operation in steps:
        if operation != NOTHING:
            OPERATIONS[operation](image, factors[operation])


def gray(images: Tensor, rows: Tensor) -> None:
    """Make images `rows` (int64) of float [B, 3, H, W] grey, in place: torchvision's luma on all three channels."""
    for part in rows.split(_at_once(images)) if len(rows) else ():
        grey = luma(images.index_select(0, part)).unsqueeze(1)
        images.index_copy_(0, part, grey.expand(-1, 3, -1, -1))


def _at_once(images: Tensor) -> int:
    """How many images of a batch one operation takes."""
    pixels = images.shape[-1] * images.shape[-2]
    most = _PIXELS_AT_ONCE if images.device.type == "cpu" else _ROOM // (4 * _PLANES)
    return max(1, most // pixels)
