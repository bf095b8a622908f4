"""Sums, gathers and batch normalisation over several processes, against one process that has the whole batch."""

import copy
import os

import numpy as np
import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from sslpre.ops import ranks

SHAPES = {"1d": (12, 5), "2d": (12, 5, 3, 4), "with activation": (12, 5, 3, 4)}


def norm_of(kind):
    torch.manual_seed(3)
    norm = {"1d": nn.BatchNorm1d, "2d": nn.BatchNorm2d, "with activation": BatchNormAct2d}[kind](5).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def through(kind, momentum, world, rank):
    """Outputs, gradients and running statistics after two batches; rows `rank` of `world` of a fixed whole."""
    norm = norm_of(kind)
    norm.momentum = momentum
    if world > 1:
        ranks.synchronise(norm)
        assert isinstance(norm, ranks.SynchronisedBatchNorm)
    torch.manual_seed(4)
    told = {}
    for number in range(2):
        whole = 100 + torch.randn(SHAPES[kind], dtype=torch.float64)  # a mean that would eat up E[x²] − mean²
        target = torch.randn(SHAPES[kind], dtype=torch.float64)
        x = whole.chunk(world)[rank].clone().requires_grad_()
        y = norm(x)
        norm.zero_grad()
        (y - target.chunk(world)[rank]).pow(3).mean().backward()
        told[f"y {number}"], told[f"x {number}"] = y.detach().numpy(), x.grad.numpy() / world
        weights = torch.stack([norm.weight.grad, norm.bias.grad])
        told[f"w {number}"] = (ranks.total(weights) / world).numpy()
    told["running"] = torch.stack([norm.running_mean, norm.running_var]).numpy()
    told["count"] = norm.num_batches_tracked.numpy()
    norm.eval()
    told["y eval"] = norm(whole.chunk(world)[rank]).detach().numpy()
    return told


def both(kind, momentum):
    return through(kind, momentum, 2, ranks.rank())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", SHAPES)
def test_batch_normalisation_is_that_of_the_whole_batch(pair, kind, momentum):
    one = through(kind, momentum, 1, 0)
    two = pair.run(both, kind, momentum)
    for name, expected in one.items():
        if name.startswith(("x", "y")):
            assert np.abs(np.concatenate([part[name] for part in two]) - expected).max() < 1e-10, name
        else:
            for part in two:
                assert np.abs(part[name] - expected).max() < 1e-10, name


def mixed_precision():
    norm = norm_of("2d").float()
    ranks.synchronise(norm)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(torch.randn(6, 5, 3, 4).bfloat16())
    return str(y.dtype), str(norm.running_var.dtype), float(y.detach().float().std())


def test_bfloat16_goes_in_and_out_and_is_normalised_in_fp32(pair):
    for kind, kept, std in pair.run(mixed_precision):
        assert (kind, kept) == ("torch.bfloat16", "torch.float32") and std > 0


def similarities(gathered):
    torch.manual_seed(5)
    whole = torch.randn(6, 4, dtype=torch.float64)
    x = whole.chunk(2)[ranks.rank()].clone().requires_grad_() if gathered else whole.clone().requires_grad_()
    z = ranks.gather(x)
    (z @ z.T).exp().mean().log().backward()  # every row with every other: it couples the batch
    return z.detach().numpy(), x.grad.numpy() / ranks.world()


def test_gather_carries_gradients(pair):
    z, grad = similarities(False)
    parts = pair.run(similarities, True)
    assert all(np.array_equal(part[0], z) for part in parts)
    assert np.abs(np.concatenate([part[1] for part in parts]) - grad).max() < 1e-12


def answer_or_fail(rank):
    if rank == ranks.rank():
        raise ValueError("mine")
    return ranks.rank()


def test_a_failure_in_the_pair_is_not_the_next_tests(pair):
    with pytest.raises(AssertionError, match=r"process 1: (.*\n)*.*ValueError: mine"):
        pair.run(answer_or_fail, 1)
    assert pair.run(answer_or_fail, 2) == [0, 1]
    assert pair.run(whole_numbers) == [([0, 1, 2, 3, 4, 5], [2, 1])] * 2


def die(rank):
    if rank == ranks.rank():
        os._exit(3)


def test_a_process_of_the_pair_that_dies_is_told_and_replaced(pair):
    with pytest.raises(AssertionError, match="process 1: it has died"):
        pair.run(die, 1)
    assert pair.run(answer_or_fail, 2) == [0, 1]


def whole_numbers():
    return ranks.gather(torch.arange(3) + 3 * ranks.rank()).tolist(), ranks.total(
        torch.tensor([1, ranks.rank()])
    ).tolist()


def test_indices_are_gathered_too(pair):
    assert pair.run(whole_numbers) == [([0, 1, 2, 3, 4, 5], [2, 1])] * 2


def pretend():
    with ranks.alone():
        x = torch.ones(2, 3, requires_grad=True)
        z = ranks.gather(x)
        (z.sum() + ranks.total(x).sum()).backward()
        return ranks.world(), tuple(z.shape), float(x.grad.sum())


def test_alone_has_the_sizes_of_all_but_asks_nobody(pair):
    assert pair.run(pretend) == [(2, (4, 3), 24.0)] * 2


def test_one_process_is_left_as_it_is():
    norm = norm_of("2d")
    same = copy.deepcopy(norm)
    ranks.synchronise(norm)
    x = torch.randn(12, 5, 3, 4, dtype=torch.float64)
    assert torch.equal(norm(x), same(x)) and norm.state_dict().keys() == same.state_dict().keys()
    assert ranks.world() == 1 and ranks.rank() == 0 and ranks.gather(x) is x and ranks.total(x) is x
    assert isinstance(norm, nn.BatchNorm2d)


def test_synchronising_twice_changes_nothing_more():
    net = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.Flatten(), nn.LazyLinear(2))
    ranks.synchronise(net)
    kind = type(net[1])
    ranks.synchronise(net)
    assert type(net[1]) is kind and type(copy.deepcopy(net)[1]) is kind
