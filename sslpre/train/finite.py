"""Stop at the first step whose loss or gradient is not finite: nothing of it reaches the disk.

On a CPU the answer is there at once, and the step is not taken. A GPU is asked without being waited for: the answer to
one step is read while the next is under way, and in any case before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslpre.errors import SslpreError
from sslpre.ops import ranks
from sslpre.train import distributed

if TYPE_CHECKING:
    from sslpre.train.loop import Run

BEHIND = {"cuda": 1}  # steps that may be taken before the answer is read


def ask(run: Run, sums: dict[str, Tensor], parameters: list[torch.nn.Parameter]) -> None:
    """Ask the device whether the loss, each logged term of every process and the gradients of this step are finite."""
    loss = distributed.mean(torch.stack(list(sums.values())).sum())
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros((), device=loss.device)
    run.asked.append((run.step + 1, on_its_way(torch.isfinite(torch.stack([loss, loss + norm])))))


def on_its_way(answer: Tensor) -> Callable[[], Tensor]:
    """What reads `answer` on the host: waits for the answer alone, not for what a GPU was given to do after it."""
    if answer.device.type != "cuda":
        return answer.cpu
    told = torch.empty(answer.shape, dtype=answer.dtype, pin_memory=True)
    told.copy_(answer, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> Tensor:
        event.synchronize()
        return told

    return read


def refuse(run: Run, written: bool = False) -> None:
    """Raises SslpreError (exit 10), in every process alike. written: all answers are needed now, to write something."""
    latest = run.step if written else run.step + 1 - BEHIND.get(run.device.type, 0)
    while run.asked and run.asked[0][0] <= latest:
        step, read = run.asked.popleft()
        loss, all_of_it = read().tolist()
        if not all_of_it:
            run.step = step - 1
            message = f"{'gradient' if loss else 'loss'} not finite at step {step}; nothing of this step was kept"
            raise distributed.everywhere(SslpreError(message, "lower --lr, or use --precision fp32", 10))


def explain(run: Run, error: Exception) -> None:
    """Raises SslpreError (exit 10) where `error` came after a step that was not finite, and so perhaps of it."""
    try:
        refuse(run, written=True)
    except SslpreError as cause:
        if ranks.world() > 1:  # the others may not have met it: then the first process does not tell it
            cause.everywhere = False
        raise cause from error
    except RuntimeError:  # a GPU that has failed answers nothing more: then `error` is all that is known
        run.asked.clear()
