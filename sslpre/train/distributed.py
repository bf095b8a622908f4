"""Several processes, one run: torchrun starts them, they agree before they begin, the first one writes and speaks."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sslpre.errors import SslpreError
from sslpre.ops import ranks

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
LOST = 15
PATIENCE = datetime.timedelta(minutes=30)  # of a collective: the first process may be writing a checkpoint meanwhile


def join(where: torch.device) -> None:
    """Join the processes that torchrun started beside this one; where there are none, nothing.

    Tensors on a CPU go through gloo, those on a GPU through NCCL. Raises SslpreError (exit 15).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    if where.type == "cuda":
        torch.cuda.set_device(where)
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise SslpreError(
            f"cannot join the other processes: {str(error).splitlines()[0]}",
            "start them with torchrun --nproc-per-node=2 -m sslpre pretrain …",
            LOST,
        ) from error


def leave() -> None:
    """Training is over: the first process goes on alone."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first() -> bool:
    """Is this the process that writes and speaks?"""
    return ranks.rank() == 0


def from_first(ask: Callable[[], T]) -> T:
    """What `ask` gives in the first process, in all of them; an SslpreError of its in all of them too."""
    if ranks.world() == 1:
        return ask()
    box: list[Any] = [None, None]
    if first():
        try:
            box[0] = ask()
        except SslpreError as error:
            box[1] = (error.message, error.hint, error.code)
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise everywhere(SslpreError(*box[1]))
    return box[0]


def alike(do: Callable[[], T]) -> T:
    """What `do` gives; an SslpreError in any process is one in all. Told once where all have the same."""
    if ranks.world() == 1:
        return do()
    mine: Exception | None = None
    try:
        result = do()
    except Exception as error:  # whatever it is, the others must learn that this process cannot go on
        mine = error
    told = collected([None if mine is None else in_words(mine)])
    if all(told) and len(set(told)) == 1 and mine is not None:
        raise everywhere(mine)
    for number, theirs in enumerate(told):
        if theirs is not None:
            raise everywhere(SslpreError(f"process {number}: {theirs[0]}", theirs[1], LOST)) from mine
    return result


def in_words(error: Exception) -> tuple[str, str, int]:
    if isinstance(error, SslpreError):
        return error.message, error.hint, error.code
    return f"{type(error).__name__}: {error}", "add --debug to see where it happened", 1


def everywhere(error: E) -> E:
    """Mark an error that every process raises: the first one tells it."""
    error.everywhere = True  # type: ignore[attr-defined]
    return error


def agree(**facts: Any) -> None:
    """Raises SslpreError (exit 15) in every process, naming the first fact that is not the same in all of them."""
    if ranks.world() == 1:
        return
    told: list[Any] = [None] * ranks.world()
    dist.all_gather_object(told, facts)
    for name in facts:
        for number, theirs in enumerate(told):
            if theirs[name] != told[0][name]:
                raise everywhere(
                    SslpreError(
                        f"processes differ in their {name}: `{told[0][name]}` in process 0, `{theirs[name]}` in "
                        f"process {number}",
                        "start all of them with the same command, versions and images, in the same folder",
                        LOST,
                    )
                )


def same_weights(objective: nn.Module) -> None:
    """Give every process the first one's parameters and buffers: fresh weights may differ in the last bit."""
    if ranks.world() > 1:
        for tensor in objective.state_dict().values():
            kept = tensor.contiguous()
            dist.broadcast(kept, 0)
            tensor.copy_(kept)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Mean over the processes, in place, one message a data type. A gradient that no process has stays None."""
    if ranks.world() == 1:
        return
    there = torch.tensor([float(p.grad is not None) for p in parameters])
    dist.all_reduce(there)
    used = [p for p, count in zip(parameters, there.tolist(), strict=True) if count]
    for kind in dict.fromkeys((p.dtype, p.device) for p in used):
        some = [p for p in used if (p.dtype, p.device) == kind]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
        flat = torch.cat([grad.reshape(-1) for grad in grads])  # reshape: weights may lie channels last
        dist.all_reduce(flat)
        flat /= ranks.world()
        for p, grad, mean in zip(some, grads, flat.split([p.numel() for p in some]), strict=True):
            p.grad = grad.copy_(mean.view(grad.shape))


def mean(x: Tensor) -> Tensor:
    """Mean of `x` over the processes, without gradients."""
    return x if ranks.world() == 1 else ranks.total(x.detach()) / ranks.world()


def summed(numbers: list[float]) -> list[float]:
    """Each number summed over the processes: one small message, and no wait for a GPU."""
    if ranks.world() == 1:
        return numbers
    message = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(message)
    return message.tolist()


def collected(things: list[T]) -> list[T]:
    """Every process's things, in the order of processes."""
    if ranks.world() == 1:
        return things
    all_of_them: list[Any] = [None] * ranks.world()
    dist.all_gather_object(all_of_them, things)
    return [thing for some in all_of_them for thing in some]


def joined(rows: Tensor, count: int) -> Tensor:
    """[count, …]: every process's rows, each at its `part` of them. A sum with zeros, which changes no number."""
    if ranks.world() == 1:
        return rows
    whole = rows.new_zeros(count, *rows.shape[1:])
    whole[part(count)] = rows
    dist.all_reduce(whole)
    return whole


def part(count: int) -> slice:
    """This process's share of `count` things in a row."""
    rank, world = ranks.rank(), ranks.world()
    return slice(count * rank // world, count * (rank + 1) // world)


def is_lost(error: BaseException) -> bool:
    """Does the error say that another process has gone?"""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
    )


def lost(error: BaseException) -> SslpreError:
    reason = " ".join(str(error).split())
    return SslpreError(
        f"another process has gone: {reason}",
        "its own error, if it had one, stands above; then: sslpre pretrain --resume …",
        LOST,
    )
