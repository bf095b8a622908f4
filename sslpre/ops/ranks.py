"""Several processes as one: sums and gathers that carry gradients, and batch normalisation over the whole batch.

The objective of a run is the mean of its processes' losses. So the gradient of a sum over processes is the sum of what
each of them asks for, and the loop averages the gradients of weights in the end. A loss that gathers the whole batch
and is computed alike in every process then has the gradient that one process would have found.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_alone = 0  # > 0: this process plays that many, without asking the others


def world() -> int:
    """How many processes there are; 1 where nobody started more."""
    return _alone or (dist.get_world_size() if dist.is_initialized() else 1)


def rank() -> int:
    """Which of them this one is, from 0; also before they have met and after they have parted."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, sums and gathers have their sizes and their cost in memory, but other processes' parts are our own."""
    global _alone
    _alone = world()
    try:
        yield
    finally:
        _alone = 0


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.contiguous().clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return total(grads[0])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return total(grads[0]).chunk(dist.get_world_size())[dist.get_rank()]


def total(x: Tensor) -> Tensor:
    """The sum of every process's `x`, of one shape everywhere. Gradients flow back to all of them."""
    if world() == 1:
        return x
    return x * _alone if _alone else _Total.apply(x)


def gather(x: Tensor) -> Tensor:
    """Every process's `x` [B, …], of one shape everywhere, in the order of processes: [world · B, …], with gradients.

    What a loss that couples the images of a batch calls on whatever it compares.
    """
    if world() == 1:
        return x
    return torch.cat([x] * _alone) if _alone else _Gather.apply(x)


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with the mean and variance of the whole batch, on any device.

    Ioffe, Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167, algorithm 1. Torch's own class for
    several processes refuses CPU tensors. In evaluation mode, and for one process, it is the class it was made from.
    """

    def forward(self, x: Tensor) -> Tensor:
        if world() == 1 or not (self.training or self.running_mean is None):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            y = self.normalised(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
        for name in ("drop", "act"):  # timm's normalisations carry what follows them
            y = getattr(self, name)(y) if hasattr(self, name) else y
        return y

    def normalised(self, x: Tensor) -> Tensor:
        across = (0, *range(2, x.ndim))
        shape = (1, -1, *(1,) * (x.ndim - 2))
        count = x.new_full((1,), x.numel() / x.shape[1])
        *sums, count = total(torch.cat([x.sum(across), count])).split([x.shape[1], 1])
        mean = sums[0] / count
        centred = x - mean.view(shape)
        var = total(centred.square().sum(across)) / count  # a second sum: E[x²] − mean² would lose half the digits
        self.remember(mean.detach(), (var * count / (count - 1)).detach())
        scale = (var + self.eps).rsqrt()
        if self.affine:
            return centred * (scale * self.weight).view(shape) + self.bias.view(shape)
        return centred * scale.view(shape)

    @torch.no_grad()
    def remember(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean += share * (mean - self.running_mean)
        self.running_var += share * (var - self.running_var)


def synchronise(module: nn.Module) -> None:
    """Make every batch normalisation in `module` that of the whole batch; weights, names and modes stay."""
    for norm in module.modules():
        kind = type(norm)
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(norm, SynchronisedBatchNorm):
            norm.__class__ = type(
                kind.__name__, (SynchronisedBatchNorm, kind), {}
            )  # the same object: nothing to rewire
