"""Optimisers against timm's and torch's, the schedule, and state by name."""

import itertools
import math
from typing import ClassVar

import pytest
import torch
from timm.optim import Lars
from torch import nn

from sslpre.recipe import OptimTable
from sslpre.train import optim


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def backward(model, step):
    torch.manual_seed(100 + step)
    model.zero_grad()
    model(torch.randn(16, 3, 8, 8)).square().mean().backward()


@pytest.mark.parametrize("decay", [1e-4, 0.1])
def test_lars_is_timms(decay):
    ours, theirs = network().double(), network().double()
    split = lambda m: ([p for p in m.parameters() if p.ndim > 1], [p for p in m.parameters() if p.ndim <= 1])  # noqa: E731
    groups = [
        [{"params": a, "weight_decay": decay}, {"params": b, "weight_decay": 0.0}]
        for a, b in map(split, (ours, theirs))
    ]
    a = optim.LARS(groups[0], lr=0.7, momentum=0.9, trust=0.001)
    b = Lars(groups[1], lr=0.7, momentum=0.9, trust_coeff=0.001, eps=0.0)
    torch.set_default_dtype(torch.float64)
    try:
        for step in range(5):
            for model, optimiser in ((ours, a), (theirs, b)):
                backward(model, step)
                optimiser.step()
    finally:
        torch.set_default_dtype(torch.float32)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-14)
    assert not torch.equal(next(ours.parameters()), next(network().double().parameters()))


def test_lars_local_rate_by_hand():
    w = nn.Parameter(torch.tensor([[3.0, 4.0]]))  # norm 5
    w.grad = torch.tensor([[0.0, 2.0]])  # norm 2
    optim.LARS([w], lr=1.0, momentum=0.0, weight_decay=0.1, trust=0.001).step()
    rate = 0.001 * 5 / (2 + 0.1 * 5)
    assert torch.allclose(w.data, torch.tensor([[3.0 - rate * 0.3, 4.0 - rate * 2.4]]), atol=1e-7)


@pytest.mark.parametrize("weight, grad", [(0.0, 1.0), (1.0, 0.0)])
def test_lars_rate_is_one_where_a_norm_is_zero(weight, grad):
    w = nn.Parameter(torch.full((2, 2), weight))
    w.grad = torch.full((2, 2), grad)
    optim.LARS([w], lr=0.5, momentum=0.0, weight_decay=0.1).step()
    assert torch.allclose(w.data, torch.full((2, 2), weight - 0.5 * (grad + 0.1 * weight)))


def test_lars_moves_vectors_by_plain_sgd():
    w = nn.Parameter(torch.ones(4))
    sgd = nn.Parameter(torch.ones(4))
    a, b = optim.LARS([w], lr=0.3, momentum=0.9), torch.optim.SGD([sgd], lr=0.3, momentum=0.9)
    for step in range(3):
        w.grad = sgd.grad = torch.full((4,), float(step + 1))
        a.step()
        b.step()
    assert torch.allclose(w, sgd)


def test_rate_warms_up_and_falls_to_zero():
    rates = [optim.rate(step, 100, OptimTable(warmup=0.1)) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert all(a <= b for a, b in itertools.pairwise(rates[:10]))
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert optim.rate(0, 1, OptimTable(warmup=0.1)) == 1.0  # a run of one step takes it


def test_the_rate_falls_in_steps():
    """RotNet on CIFAR-10: ×0.2 after 60, 120 and 160 of 200 epochs, here of 10 steps each."""
    table = OptimTable(warmup=0.0, steps=(0.3, 0.6, 0.8), factor=0.2)
    rates = [optim.rate(step, 2000, table) for step in range(2000)]
    for first, last, expected in ((0, 599, 1.0), (600, 1199, 0.2), (1200, 1599, 0.04), (1600, 1999, 0.008)):
        assert rates[first] == rates[last] == pytest.approx(expected)


class TwoPlayers(nn.Module):
    players: ClassVar = {"all": ("",), "critic": ("critic",)}
    rates: ClassVar = {}

    def __init__(self):
        super().__init__()
        self.encoder = network()
        self.critic = nn.Linear(5, 1)
        self.critics = nn.Linear(5, 1)  # a like name is not a part of it


def test_each_weight_has_the_player_with_the_longest_prefix():
    owned = optim.by_player(TwoPlayers())
    assert set(owned["critic"]) == {"critic.weight", "critic.bias"}
    assert "critics.weight" in owned["all"] and len(owned["all"]) == 8


def test_no_decay_on_norms_and_biases():
    table = OptimTable(lr=0.1, weight_decay=0.5)
    groups = optim.build(TwoPlayers(), table, torch.device("cpu"))["all"].param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert {p.ndim for p in groups[0]["params"]} == {2, 4} and {p.ndim for p in groups[1]["params"]} == {1}


def test_what_the_backbone_spares_is_spared():
    import timm

    vit = TwoPlayers()
    vit.encoder = timm.create_model("test_vit", num_classes=0, img_size=32)
    groups = optim.build(vit, OptimTable(lr=0.1, weight_decay=0.5), torch.device("cpu"))["all"].param_groups
    assert any(p is vit.encoder.pos_embed for p in groups[1]["params"])
    assert any(p is vit.encoder.blocks[0].mlp.fc1.weight for p in groups[0]["params"])


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_state_round_trip_is_exact_and_keeps_the_memory_format(name):
    def start():
        players = TwoPlayers().to(memory_format=torch.channels_last)
        torch.manual_seed(5)
        players.critic.reset_parameters(), players.critics.reset_parameters()
        return players, optim.build(players, OptimTable(name=name, lr=0.01), torch.device("cpu"))

    def take(players, optimisers, step):
        torch.manual_seed(step)
        players.zero_grad()
        y = players.encoder(torch.randn(8, 3, 8, 8))
        (players.critic(y).sum() + players.critics(y).square().sum()).backward()
        for optimiser in optimisers.values():
            optimiser.step()

    a = start()
    take(*a, 0)
    b = start()
    b[0].load_state_dict(a[0].state_dict())
    stored = {k: v.clone(memory_format=torch.contiguous_format) for k, v in optim.state_by_name(*a).items()}
    optim.load_state(*b, stored)
    for step in (1, 2):
        take(*a, step)
        take(*b, step)
    for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True):
        assert torch.equal(p, q)
    conv = b[0].encoder[0].weight
    buffers = [item for item in b[1]["all"].state[conv].values() if item.ndim == 4]
    assert buffers and all(item.is_contiguous(memory_format=torch.channels_last) for item in buffers)


def test_state_of_an_unknown_parameter_is_refused():
    players = TwoPlayers()
    with pytest.raises(KeyError, match="all/nothing/exp_avg"):
        optim.load_state(
            players,
            optim.build(players, OptimTable(lr=0.1), torch.device("cpu")),
            {"all/nothing/exp_avg": torch.zeros(1)},
        )
