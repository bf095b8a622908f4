"""Batch normalisation that leaves its running statistics alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch normalisation normalises with the batch as in training but leaves its running statistics alone."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [
        (norm.momentum, norm.num_batches_tracked.clone() if norm.num_batches_tracked is not None else None)
        for norm in norms
    ]
    for norm in norms:
        norm.momentum = 0.0  # the running statistics move by nothing, and autograd saves the same tensors as before
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)
