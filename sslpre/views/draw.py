"""Random numbers by counter: a number is a function of (seed, epoch, index, name, position) and of nothing else.

There is no generator and so no state: the numbers of an image do not depend on which batch, worker or rank it is in,
nor on what was drawn before, and a run that is resumed draws what it would have drawn.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014): the odd increment is
# 2^64 / golden ratio, the finaliser's multipliers are Stafford's variant 13. As int64: torch has no shifts for uint64.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLY = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def uniform(seed: int, epoch: int, index: Tensor, name: str, *shape: int) -> Tensor:
    """Uniform numbers in [0, 1): float32 [B, *shape] on the device of `index`, bit-equal on CPU and CUDA.

    Multiples of 2^-24. `index` is int64 [B], the position of each image in the data set; any integer will do. Of two
    draws with one name and different shapes the shorter is the beginning of the longer, so two things that must be
    independent need two names.
    """
    return _fraction(_hash(seed, epoch, index, name, shape))


def normal(seed: int, epoch: int, index: Tensor, name: str, *shape: int) -> Tensor:
    """Standard normal numbers, float32 [B, *shape] on the device of `index` (Box and Muller, 1958).

    The uniform numbers behind them are equal on every device; logarithm and cosine are so to rounding only.
    """
    bits = _hash(seed, epoch, index, name, (*shape, 2))
    # mps has no float64; elsewhere it keeps the rounding of the logarithm near 1 out of the tail
    precision = torch.float32 if index.device.type == "mps" else torch.float64
    first, second = _fraction(bits).to(precision).unbind(-1)
    # first + 2^-25 lies in (0, 1), so that the logarithm is finite and the radius is never exactly 0
    radius = (-2.0 * (first + 2.0**-25).log()).sqrt()
    return (radius * (2.0 * math.pi * second).cos()).float()


class Draw(Protocol):
    """`uniform` with seed, epoch and index filled in (`functools.partial`, or `Drawn`)."""

    def __call__(self, name: str, *shape: int) -> Tensor: ...


class Drawn:
    """The draws that `shapes` names, all made by one hash; each is bit-equal to `uniform`'s of that name and shape.

    Called with a name and its shape. KeyError for a draw that `shapes` does not have.
    """

    def __init__(self, seed: int, epoch: int, index: Tensor, shapes: Mapping[str, tuple[int, ...]]):
        counts = [math.prod(shape) for shape in shapes.values()]
        starts = torch.tensor([_start(seed, epoch, name) for name in shapes], device=index.device)
        owners = [place for place, count in enumerate(counts) for _ in range(count)]
        positions = [at for count in counts for at in range(1, count + 1)]
        owner, position = torch.tensor([owners, positions], dtype=torch.int64).to(index.device)
        streams = _mix(index.long().unsqueeze(-1) * _STEP + starts)
        numbers = _fraction(_mix(streams.index_select(1, owner).add_(position * _STEP)))
        self._numbers = {
            (name, shape): part.reshape(*index.shape, *shape)
            for (name, shape), part in zip(shapes.items(), numbers.split(counts, 1), strict=True)
        }

    def __call__(self, name: str, *shape: int) -> Tensor:
        return self._numbers[name, shape]


def chosen(numbers: Tensor, probability: float) -> Tensor:
    """Which rows happen, each with `probability`: int64, from uniform `numbers` [B] on the CPU."""
    return (numbers < probability).nonzero().squeeze(1)


def _hash(seed: int, epoch: int, index: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """64 random bits each, int64 [B, *shape]: a SplitMix64 stream per image, begun at a hash of all else."""
    stream = _mix(index.long() * _STEP + _start(seed, epoch, name))
    position = torch.arange(1, math.prod(shape) + 1, device=index.device)
    return _mix(stream.unsqueeze(-1) + position * _STEP).reshape(*index.shape, *shape)


def _start(seed: int, epoch: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{epoch}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser, a permutation of 64-bit integers. Products wrap around in int64 as they do in uint64."""
    bits = (bits ^ _shift(bits, 30)) * _MULTIPLY[0]
    bits = (bits ^ _shift(bits, 27)) * _MULTIPLY[1]
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, by: int) -> Tensor:
    """Logical shift right: `>>` on int64 copies the sign into the top bits, which the mask takes out again."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _fraction(bits: Tensor) -> Tensor:
    # 24 bits are what float32 holds exactly: with more, rounding would give 1.0 now and then
    return _shift(bits, 40).float() * 2.0**-24
