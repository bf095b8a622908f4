"""What every method must keep when it is trained by several processes, or in parts: it is the same training."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sslpre.contract.pair import Pair
from sslpre.contract.single import start
from sslpre.train import loop
from sslpre.train.memory import in_parts
from sslpre.train.step import micro_batches, take_step

EXACT = 1e-9
PLAIN = {"name": "sgd", "lr": 0.05}  # no division by small numbers, which would enlarge the last bit
STEPS = 3


def first_steps(method: str, folder: str, backbone: str = "test_resnet", part: int = 0) -> dict[str, np.ndarray]:
    """A run's first steps in float64 without autocast, on as many processes as there are: all that it is made of."""
    train = {"batch_size": 8, "micro_batch": part}
    run = start(method, Path(folder), 32, encoder={"backbone": backbone}, optim=PLAIN, train=train)
    run.objective.double()
    told: dict[str, torch.Tensor] = {}

    def gradients(*_: Any) -> None:
        for name, parameter in run.objective.named_parameters():
            if parameter.grad is not None:
                told[f"gradient {run.step} {name}"] = parameter.grad.clone()

    for optimiser in run.optimisers.values():
        optimiser.register_step_pre_hook(gradients)
    loop.start_epoch(run, 0)
    run.objective.train()
    parts = list(micro_batches(run, next(iter(run.stream.steps(0, 1))), 0, 0.0))
    told |= {
        f"view {number}": torch.cat(views) for number, views in enumerate(zip(*(b.views for b in parts), strict=True))
    }
    told["index"] = torch.cat([batch.index for batch in parts])
    for pixels in itertools.islice(run.stream.steps(0, run.steps), STEPS):
        take_step(run, pixels, 0)
        told |= {f"sum {run.step} {name}": term for name, term in run.sums.items()}
        run.sums.clear()
    told |= {f"weight {name}": tensor for name, tensor in run.objective.state_dict().items()}
    return {name: tensor.detach().numpy().copy() for name, tensor in told.items()}


def test_two_processes_equal_one(method: str, pair: Pair, tmp_path: Path) -> None:
    """2 processes × B/2 = 1 process × B: views, losses, gradients, weights and buffers after steps, in float64."""
    compare(first_steps(method, str(tmp_path / "one")), pair.run(first_steps, method, str(tmp_path / "two")))


def test_two_processes_in_parts_equal_one(method: str, pair: Pair, tmp_path: Path) -> None:
    """The same where each process takes its 4 images 3 at a time; in a network without batch statistics."""
    one = first_steps(method, str(tmp_path / "one"), "test_vit")
    told = pair.run(first_steps, method, str(tmp_path / "two"), "test_vit", 3)
    compare(one, told)


def compare(one: dict[str, np.ndarray], two: list[dict[str, np.ndarray]]) -> None:
    assert one.keys() == two[0].keys() == two[1].keys()
    assert any(name.startswith("gradient") for name in one)
    for name, expected in one.items():
        parts = [process[name] for process in two]
        kind = name.partition(" ")[0]
        if kind in ("view", "index"):
            assert np.array_equal(np.concatenate(parts), expected), name
        elif kind == "sum":
            assert np.abs(np.mean(parts, axis=0) - expected).max() < EXACT, name
        else:
            assert all(np.abs(part - expected).max(initial=0) < EXACT for part in parts), name


def whole_and_parts(method: str, folder: Path, part: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Loss and gradients of a step of 8 images, at once and `part` at a time, in float64, without batch statistics."""
    found = []
    for size in (0, part):
        run = start(
            method,
            folder / str(size),
            count=16,
            encoder={"backbone": "test_vit"},
            optim=PLAIN,
        )
        run.objective.double()
        for module in run.objective.modules():  # heads: their statistics are the whole batch's or the part's
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and not run.objective.couples:
                module.eval()
        run.part = size
        in_parts(run.objective, size, len(run.views.sides))
        kept: dict[str, torch.Tensor] = {}
        for optimiser in run.optimisers.values():
            optimiser.register_step_pre_hook(
                lambda *_, run=run, kept=kept: kept.update(
                    {n: p.grad.clone() for n, p in run.objective.named_parameters() if p.grad is not None}
                )
            )
        take_step(run, next(iter(run.stream.epoch(0))), 0)
        found.append(kept | {f"sum {name}": term for name, term in run.sums.items()})
    return found[0], found[1]


def test_parts_of_a_batch_equal_the_whole(method: str, tmp_path: Path) -> None:
    """A batch larger than memory: loss and gradients are those of the whole batch, whatever the size of the parts."""
    for part in (1, 3, 4):
        whole, parts = whole_and_parts(method, tmp_path / f"parts of {part}", part)
        assert whole.keys() == parts.keys()
        for name, expected in whole.items():
            assert (parts[name] - expected).abs().max() < EXACT, name
