"""When a batch is larger than memory: what running out looks like, and what must be put back before another try."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sslpre.encoder import Encoder
from sslpre.errors import SslpreError
from sslpre.objective import Objective
from sslpre.ops import ranks

CODE = 12
OWN = frozenset(vars(nn.Module()))  # what torch keeps in every module
# What torch and its libraries say on a CPU, where running out of memory has no exception of its own.
CPU_SAYS = ("can't allocate memory", "not enough memory", "std::bad_alloc", "could not create a primitive")


def ran_out(error: BaseException) -> bool:
    """Is this a real lack of memory, on the device or on the host?"""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_SAYS)


def keep_freed() -> None:
    """Let glibc's malloc keep what one step frees for the next one.

    It maps every tensor above 32 MB anew, and the system fills it with zeros page by page, at each step. Where the user
    has told malloc anything, through its environment variables, that stands.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    told = "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in os.environ)
    if told or (libc := glibc()) is None:
        return
    # What is larger, such as decoded images, is mapped and given back. An old glibc takes 32 MB at most, and would be
    # slower than before if it were told the second alone.
    if any(libc.mallopt(M_MMAP_THRESHOLD, size) for size in (1 << 30, 1 << 25)):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None  # musl has neither mallopt nor malloc_trim


def release() -> None:
    """Give back what a failed try held. Call it when the error, whose traceback holds tensors, is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if (libc := glibc()) is not None:
        libc.malloc_trim(0)


def spare(device: torch.device) -> int | None:
    """Bytes of a GPU's memory that the run does not need: free ones, less what its last rehearsed step took at most.

    None for another device.
    """
    if device.type != "cuda":
        return None
    free, whole = torch.cuda.mem_get_info(device)
    needed = torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)
    return max(0, free - needed - whole // 20)


def half(part: int, side: int) -> int:
    """The next smaller part of a batch, in images. Raises SslpreError (exit 12) where one image was too large."""
    if part == 1:
        raise SslpreError(
            f"one image of `{side}` px does not fit into memory",
            "a smaller --image-size or --backbone, or --device cpu",
            CODE,
        )
    return (part + 1) // 2


def room(objective: Objective, optimiser: str, undone: bool = False) -> list[torch.Tensor]:
    """As much memory as the optimiser's state and a message of gradients to other processes will take, and a copy of
    weights and state where a step may have to be `undone`."""
    state = 2 if optimiser == "adamw" else 1
    times = state + (ranks.world() > 1) + (undone and 1 + state)
    return [torch.empty_like(p) for p in objective.parameters() if p.requires_grad for _ in range(times)]


def in_parts(objective: Objective, part: int, views: int) -> None:
    """Let a loss that couples its images see the whole batch: its encoders run `part` images (all views) at a time."""
    for network in objective.modules():
        if isinstance(network, Encoder):
            network.chunk = part * views if objective.couples else 0


def norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class Before:
    """What a try of a step changes before any weight moves: batch statistics, and what losses leave in attributes."""

    def __init__(self, objective: Objective):
        self.objective = objective
        self.buffers = [b for norm in norms(objective) for b in norm.buffers(recurse=False)]
        self.copies = (
            torch._foreach_add(self.buffers, 0) if self.buffers else ()
        )  # few launches, however many there are
        self.plain = attributes(objective)

    @torch.no_grad()
    def put_back(self) -> None:
        for buffer, kept in zip(self.buffers, self.copies, strict=True):
            buffer.copy_(kept)
        for name in attributes(self.objective).keys() - self.plain.keys():
            delattr(self.objective, name)
        for name, value in self.plain.items():
            setattr(self.objective, name, value)
        self.objective.zero_grad(set_to_none=True)


class Undo:
    """All that a step changes, as a copy: for a device that says only when the step is taken that it was not finite."""

    def __init__(self, before: Before, optimisers: Iterable[Optimizer]):
        """before: of the same step, whose forward pass has changed batch statistics and attributes already."""
        self.before = before
        self.states = {optimiser: {p: dict(own) for p, own in optimiser.state.items()} for optimiser in optimisers}
        own = [t for state in self.states.values() for some in state.values() for t in some.values()]
        self.tensors = [*before.objective.state_dict().values(), *(t for t in own if isinstance(t, Tensor))]
        # few launches, however many there are
        floats = [t for t in self.tensors if t.is_floating_point()]
        copies = iter(torch._foreach_mul(floats, 1) if floats else ())
        self.copies = [next(copies) if t.is_floating_point() else t.clone() for t in self.tensors]

    @torch.no_grad()
    def put_back(self) -> None:
        for tensor, kept in zip(self.tensors, self.copies, strict=True):
            tensor.copy_(kept)
        self.before.put_back()
        for optimiser, state in self.states.items():
            optimiser.state.clear()
            optimiser.state.update({p: dict(own) for p, own in state.items()})


def attributes(objective: Objective) -> dict[str, Any]:
    """The objective's plain attributes; containers as copies, because a loss may fill them."""
    return {
        name: copy.copy(value) if isinstance(value, list | dict | set) else value
        for name, value in vars(objective).items()
        if name not in OWN
    }
