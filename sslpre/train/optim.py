"""Optimisers by parameter name, warm-up and cosine, and LARS."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from sslpre.objective import Objective
from sslpre.recipe import OptimTable


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling with momentum: You, Gitman, Ginsburg 2017, https://arxiv.org/abs/1708.03888,
    algorithm 1.

    Each tensor of two or more dimensions moves with the local rate trust·‖w‖ / (‖g‖ + weight_decay·‖w‖), which is 1
    where a norm is 0. One-dimensional tensors (biases, norms) take plain momentum SGD without decay.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001
    ):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            for p in weights:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in weights]
            steps = [p.grad for p in weights]
            adapted = [i for i, p in enumerate(weights) if p.ndim > 1]
            if adapted:
                new = adapt(
                    [weights[i] for i in adapted], [steps[i] for i in adapted], group["weight_decay"], group["trust"]
                )
                for i, g in zip(adapted, new, strict=True):
                    steps[i] = g
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, steps)
            torch._foreach_add_(weights, buffers, alpha=-group["lr"])


def adapt(weights: list[Tensor], grads: list[Tensor], decay: float, trust: float) -> list[Tensor]:
    """(g + decay·w) · local rate, for each tensor, in a few launches and without waiting for the device."""
    w = torch.stack(torch._foreach_norm(weights))
    g = torch.stack(torch._foreach_norm(grads))
    rate = torch.where((w > 0) & (g > 0), trust * w / (g + decay * w), torch.ones_like(w))
    moved = list(torch._foreach_add(grads, weights, alpha=decay))
    torch._foreach_mul_(moved, list(rate.unbind()))
    return moved


def by_player(objective: Objective) -> dict[str, dict[str, nn.Parameter]]:
    """Each player's trainable parameters by name. A name belongs to the player with the longest prefix of it."""
    odd = [player for player in objective.rates if player not in objective.players]
    if odd:
        raise TypeError(f"rates name {odd[0]}, who is no player")
    owned: dict[str, dict[str, nn.Parameter]] = {player: {} for player in objective.players}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        fits = [
            (len(prefix), player)
            for player, prefixes in objective.players.items()
            for prefix in prefixes
            if prefix == "" or name == prefix or name.startswith(f"{prefix}.")
        ]
        if not fits:
            raise TypeError(f"no player trains {name}")
        owned[max(fits)[1]][name] = parameter
    return owned


def decays(name: str, parameter: nn.Parameter, spared: set[str]) -> bool:
    """Weight decay falls on weights only: not on norms and biases, nor on what the backbone itself spares."""
    return parameter.ndim > 1 and not name.endswith(".bias") and name not in spared


def build(objective: Objective, table: OptimTable, device: torch.device) -> dict[str, Optimizer]:
    """One optimiser a player: SGD, AdamW or LARS, in foreach or fused form; weights decay, norms and biases do not."""
    assert table.lr != "auto"
    spared = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in objective.named_modules()
        if callable(getattr(module, "no_weight_decay", None))
        for name in module.no_weight_decay()
    }
    optimisers: dict[str, Optimizer] = {}
    for player, parameters in by_player(objective).items():
        decayed = [p for n, p in parameters.items() if decays(n, p, spared)]
        plain = [p for n, p in parameters.items() if not decays(n, p, spared)]
        groups = [
            {"params": decayed, "weight_decay": table.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if table.name == "lars":
            optimisers[player] = LARS(groups, table.lr, table.momentum, trust=table.trust)
        elif table.name == "sgd":
            optimisers[player] = SGD(groups, table.lr, table.momentum, nesterov=table.nesterov, foreach=True)
        else:
            fused = device.type == "cuda"
            optimisers[player] = AdamW(groups, table.lr, table.betas, foreach=not fused, fused=fused)
    return optimisers


def rate(step: int, steps: int, table: OptimTable) -> float:
    """The share of the full learning rate at `step` of `steps`: linear warm-up, then half a cosine down to 0, or, where
    the table has steps, a fall by `factor` after each of these shares of the run."""
    assert table.warmup != "auto"
    warm = round(table.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if table.steps:
        return table.factor ** sum(step >= round(share * steps) for share in table.steps)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def state_by_name(objective: Objective, optimisers: dict[str, Optimizer]) -> dict[str, Tensor]:
    """Optimiser state as flat tensors, `player/parameter/key`, so that order and grouping may change under it."""
    flat: dict[str, Tensor] = {}
    for player, parameters in by_player(objective).items():
        for name, parameter in parameters.items():
            for key, item in optimisers[player].state.get(parameter, {}).items():
                if isinstance(item, Tensor):
                    flat[f"{player}/{name}/{key}"] = item
                elif item is not None:
                    raise TypeError(f"{key} of {name} is a {type(item).__name__}, which a checkpoint cannot hold")
    return flat


def load_state(objective: Objective, optimisers: dict[str, Optimizer], flat: dict[str, Tensor]) -> None:
    """Put the state back, each tensor in its parameter's memory format. Names that fit nothing raise KeyError, and so
    does a parameter that has not all of what others have."""
    left = dict(flat)
    kinds: dict[str, dict[str, set[str]]] = {}
    for one in flat:
        player, name, key = one.split("/")
        kinds.setdefault(player, {}).setdefault(name, set()).add(key)
    for player, names in kinds.items():
        for name, keys in names.items():
            if keys != set().union(*names.values()):
                raise KeyError(f"optimiser state of {player}/{name} is not all there")
    for player, parameters in by_player(objective).items():
        optimiser = optimisers[player]
        optimiser.state.clear()
        for name, parameter in parameters.items():
            prefix = f"{player}/{name}/"
            for key in [k for k in left if k.startswith(prefix)]:
                stored, item = left.pop(key), key.removeprefix(prefix)
                if item == "step":  # Adam's count lives on the host unless the whole step is one fused launch
                    fused = optimiser.param_groups[0].get("fused")
                    optimiser.state[parameter][item] = stored.to(parameter.device if fused else "cpu")
                else:
                    optimiser.state[parameter][item] = torch.empty_like(parameter, dtype=stored.dtype).copy_(stored)
    if left:
        raise KeyError(f"optimiser state without a parameter: {sorted(left)[0]}")
