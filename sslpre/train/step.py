"""One step: views, losses, backward, finite?, step, for each player in turn; in parts where memory asks for it."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslpre.data.stream import Pixels
from sslpre.errors import SslpreError
from sslpre.objective import Batch, Loss
from sslpre.ops import ranks
from sslpre.train import distributed, finite, memory, optim

if TYPE_CHECKING:
    from sslpre.train.loop import Run


def reseed(seed: int, name: str, number: int = 0) -> None:
    """Torch's global generator as a function of (seed, what for, number): no generator state is ever stored."""
    digest = hashlib.blake2b(f"{seed}/{name}/{number}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def take_step(run: Run, pixels: Pixels, epoch: int) -> None:
    """One step of training. One that is not finite is passed over. Where memory runs out, the same step again, in parts
    half as large.

    Raises SslpreError: exit 10 where one step too many was not finite; 12 where not even one image fits, or where
    memory ran out too late to take the step again.
    """
    before = memory.Before(run.objective)
    moved: list[str] = []  # players whose weights may have changed
    while True:
        try:
            terms = attempt(run, pixels, epoch, before, moved)
            break
        except Exception as error:
            found = finite.cause(run, error)
            if found is not None:
                late = found.step <= run.step
                finite.pass_over(run, found, None if late or moved else before, together=error is found)
                if not late:
                    run.step += 1
                    return
                before = memory.Before(run.objective)  # and the step under way once more, with the weights put back
                continue
            if not memory.ran_out(error):
                raise
            if moved or ranks.world() > 1:  # others wait for this process, or a step cannot be taken back
                raise too_late(run, len(pixels.index)) from error
        before.put_back()
        memory.release()
        fewer(run, memory.half(run.part or len(pixels.index), max(run.views.sides)))
    run.step += 1
    run.unsettled.append((run.step, terms))
    finite.count(run)
    with torch.no_grad():
        run.objective.after_step(run.step / run.steps)


def fewer(run: Run, part: int) -> None:
    run.part = part
    memory.in_parts(run.objective, part, len(run.views.sides))


def too_late(run: Run, batch: int) -> SslpreError:
    part = max(1, (run.part or batch) // 2)
    hint = f"go on from the last checkpoint with less: --resume {run.folder} --set train.micro_batch={part}"
    return SslpreError(f"out of memory in step `{run.step + 1}`", hint, memory.CODE)


def attempt(run: Run, pixels: Pixels, epoch: int, before: memory.Before, moved: list[str]) -> dict[str, Tensor]:
    """The step itself; the sums of its terms. `moved` tells whose weights have changed, should it fail. `run.undo` gets
    what was before it where that may be asked for: answers come late, or another player's.

    Raises NotFinite, of this step or, where answers are late, of the last.
    """
    seed = run.recipe.train.seed
    reseed(seed, "step" if not ranks.rank() else f"step in process {ranks.rank()}", run.step)
    share = optim.rate(run.step, run.steps, run.recipe.optim)
    assert run.recipe.optim.lr != "auto"
    batches = list(micro_batches(run, pixels, epoch, run.step / run.steps))
    games = [run.objective.rounds(batch) for batch in batches]
    sums: dict[str, Tensor] = {}
    for player, optimiser in run.optimisers.items():
        for group in optimiser.param_groups:
            group["lr"] = share * run.recipe.optim.lr * run.objective.rates.get(player, 1.0)
        run.objective.zero_grad(set_to_none=True)
        for batch, game in zip(batches, games, strict=True):
            loss = next_loss(run, game, player)
            part = len(batch.index) / len(pixels.index)
            (part * loss.value).backward()
            prefix = f"{player}." if len(run.optimisers) > 1 else ""
            for name, term in {"loss": loss.value, **loss.terms}.items():
                name, term = prefix + name, part * term.detach().to(torch.promote_types(term.dtype, torch.float32))
                sums[name] = sums[name] + term if name in sums else term
        own = [p for group in optimiser.param_groups for p in group["params"]]
        distributed.average_gradients(own)
        finite.ask(run, sums, own)
        finite.answers(run)
        if not moved:
            run.undo = None  # the last one's copy goes before there is another
            if finite.behind(run) or len(run.optimisers) > 1:
                run.undo = memory.Undo(before, run.optimisers.values())
        moved.append(player)
        optimiser.step()
    for game in games:
        if next(game, None) is not None:
            raise TypeError(f"rounds() gave more losses than there are players ({len(run.optimisers)})")
    return sums


def half(run: Run) -> torch.autocast:
    """The run's precision, for whatever goes through its networks."""
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.recipe.train.precision == "bf16")


def next_loss(run: Run, game: Iterator[Loss], player: str) -> Loss:
    try:
        with half(run):
            loss = next(game, None)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):  # torch's words
            raise
        message = "one image alone gives batch normalisation one number a channel, of which it can take no deviation"
        raise SslpreError(message, "--batch-size 2 or more, and --set train.micro_batch=2 or 0") from error
    if loss is None:
        raise TypeError(f"rounds() gave no loss for player {player}")
    return loss


def micro_batches(run: Run, pixels: Pixels, epoch: int, progress: float) -> Iterator[Batch]:
    """The batch in parts that fit: one part for a loss that couples its images (the encoder then runs in chunks)."""
    index, label = sent(pixels.index, run.device), sent(run.labels[pixels.index], run.device)
    views = run.views(pixels.pixels, pixels.size, pixels.index, epoch)
    size = len(pixels.index) if run.objective.couples else run.part or len(pixels.index)
    for rows in torch.arange(len(pixels.index)).tensor_split(-(-len(pixels.index) // size)):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        shown = [view[part].contiguous(memory_format=torch.channels_last) for view in views]
        yield Batch(shown, index[part], label[part], progress, run.recipe.train.seed, epoch)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it: a copy from memory that is not pinned would."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def fit(run: Run) -> float:
    """Find the largest part of the batch that fits, by one real forward and backward of each size tried.

    All of it happens to a copy of the objective, beside as much memory as the optimiser's state will take. Several
    processes try alone, then take the smallest part of all. Returns the seconds that the last try took. Raises
    SslpreError (exit 12) where one image is too large.
    """
    with run.stream.peek() as pixels:
        run.stream.bad.settle(distributed.collected(run.stream.bad.pending))
        batch = len(pixels.index)
        part = run.part or batch
        seconds, failed = 0.0, None
        while failed is None:
            if run.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(run.device)  # a try that fails says nothing of what is needed
            try:
                with ranks.alone():
                    if run.views.made != "eager":  # compile them: that is no part of a step's time
                        run.views(pixels.pixels, pixels.size, pixels.index, 0)
                    seconds = rehearse(run, pixels, part)
                break
            except (RuntimeError, MemoryError) as error:
                if not memory.ran_out(error):
                    raise
            memory.release()
            try:
                part = memory.half(part, max(run.views.sides))
            except SslpreError as error:
                failed = error
    parts = distributed.collected([(part, failed.message, failed.hint) if failed else (part, "", "")])
    for _, message, hint in parts:
        if message:
            raise distributed.everywhere(SslpreError(message, hint, memory.CODE))
    smallest = min(size for size, _, _ in parts)
    fewer(run, 0 if smallest == batch else smallest)
    memory.release()
    return seconds


def rehearse(run: Run, pixels: Pixels, part: int) -> float:
    """A step's views, forward and backward with a copy of the objective, and how many seconds they took; nothing of the
    run changes. Images in `pixels` beyond `part` have their turn after it."""
    kept, run.part = (run.objective, run.part), part
    run.objective = copy.deepcopy(run.objective).train()
    try:
        room = memory.room(run.objective, run.recipe.optim.name, bool(finite.behind(run)) or len(run.optimisers) > 1)
        memory.in_parts(run.objective, part if part < len(pixels.index) else 0, len(run.views.sides))
        reseed(run.recipe.train.seed, "rehearsal")
        begun = time.monotonic()
        batches = list(micro_batches(run, pixels, 0, run.step / run.steps))
        games = [run.objective.rounds(batch) for batch in batches]
        for player in run.optimisers:
            for game in games:
                loss = next_loss(run, game, player).value
                loss.backward()
                loss.item()  # waits for the device
        del room
        return time.monotonic() - begun
    finally:
        run.objective, run.part = kept
