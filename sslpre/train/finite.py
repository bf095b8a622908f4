"""A step whose loss or gradient is not finite is passed over: it touches nothing. After the fifth a run ends.

On a CPU the answer is there at once, and the step is not taken. A GPU is asked without being waited for: the answer to
one step is read while the next is under way, and in any case before anything is written; such a step is taken back,
from a copy. Going back further would repeat it: what a step computes depends on its number alone. A game ends at once,
for one of its players may have moved already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslpre.errors import SslpreError
from sslpre.ops import ranks
from sslpre.train import distributed, memory
from sslpre.train.progress import say

if TYPE_CHECKING:
    from sslpre.train.loop import Run

CODE = 10
HINT = "lower --lr, or use --precision fp32"
ALLOWED = 5  # steps that a run may pass over
BEHIND = {"cuda": 1}  # steps that may be taken before the answer is read


@dataclass(frozen=True)
class Asked:
    """A question that is on its way: `read` waits for the answer, which is (loss, loss and gradient) finite."""

    step: int
    read: Callable[[], Tensor]
    terms: dict[str, Tensor]


class NotFinite(Exception):
    """Of step `step`, counted from 1; `what`: the loss or a gradient; `terms`: what was logged of it."""

    def __init__(self, step: int, what: str, terms: dict[str, Tensor]):
        super().__init__(f"{what} not finite at step {step}")
        self.step, self.what, self.terms = step, what, terms


def ask(run: Run, terms: dict[str, Tensor], parameters: list[torch.nn.Parameter]) -> None:
    """Ask the device whether the loss, each logged term of every process and the gradients of this step are finite."""
    loss = distributed.mean(torch.stack(list(terms.values())).sum())
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros((), device=loss.device)
    answer = torch.isfinite(torch.stack([loss, loss + norm]))
    run.asked.append(Asked(run.step + 1, on_its_way(answer), dict(terms)))


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


def behind(run: Run) -> int:
    """How many steps an answer may be late."""
    return BEHIND.get(run.device.type, 0)


def answers(run: Run, written: bool = False) -> None:
    """Read the answers that are due. written: all of them, for something is to be written.

    Raises NotFinite, in every process alike.
    """
    latest = run.step if written else run.step + 1 - behind(run)
    while run.asked and run.asked[0].step <= latest:
        asked = run.asked.popleft()
        loss, all_of_it = asked.read().tolist()
        if not all_of_it:
            run.asked.clear()
            raise NotFinite(asked.step, "gradient" if loss else "loss", asked.terms)


def cause(run: Run, error: Exception) -> NotFinite | None:
    """The step that was not finite of which `error` came, or may have come, if there was one."""
    if isinstance(error, NotFinite):
        return error
    try:
        answers(run, written=True)
    except NotFinite as found:
        found.__cause__ = error
        return found
    except RuntimeError:  # a GPU that has failed answers nothing more: then `error` is all that is known
        run.asked.clear()
    return None


def pass_over(run: Run, found: NotFinite, before: memory.Before | None, together: bool = True) -> None:
    """Put back what the step has changed, say so and count it.

    before: of a step under way; None takes the run's copy of what was before the last one. together: every process has
    found it, else the others are elsewhere in the step. Raises SslpreError (exit 10) where it was one too many, or the
    step of a game.
    """
    from sslpre.train import bundle

    if not together and ranks.world() > 1:
        raise SslpreError(str(found), HINT, CODE) from found
    if before is None:
        assert run.undo is not None
        run.undo.put_back()
        run.unsettled.clear()
    else:
        before.put_back()
    run.passed_over += 1
    if len(run.optimisers) > 1 or run.passed_over > ALLOWED:
        raise bundle.ending(run, found) from found.__cause__
    say(f"warning: {found}: passed over; a run may pass over {ALLOWED}, this was number {run.passed_over}")
    epoch = (found.step - 1) // run.stream.steps_per_epoch
    run.told.append({"step": found.step, "epoch": epoch, "passed_over": found.what})


def settle(run: Run) -> None:
    """All answers, before anything is written; a step that was not finite is taken back. Raises as `pass_over`."""
    try:
        answers(run, written=True)
    except NotFinite as found:
        pass_over(run, found, None)
    count(run)


def count(run: Run) -> None:
    """Add to the sums what was logged of steps that are known to be finite."""
    while run.unsettled and not (run.asked and run.asked[0].step <= run.unsettled[0][0]):
        _, terms = run.unsettled.popleft()
        for name, term in terms.items():
            run.sums[name] = run.sums[name] + term if name in run.sums else term
        run.summed += 1
