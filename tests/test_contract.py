"""What every method must keep, run over the table of methods: a new method costs no new test here."""

import copy
import dataclasses
import itertools
import signal

import numpy as np
import pytest
import torch

from sslpre import recipe as recipes
from sslpre.data.find import Found, subset
from sslpre.data.sample import sample
from sslpre.methods import methods
from sslpre.objective import Loss, Objective
from sslpre.train import loop, optim
from sslpre.train import run as runs
from sslpre.views.build import Views

CPU = torch.device("cpu")
NAMES = sorted(methods())


def few(count: int) -> Found:
    found = sample()
    return dataclasses.replace(found, train=subset(found.train, np.arange(count)))


def recipe_of(name, **tables):
    base = {
        "encoder": {"backbone": "test_resnet", "image_size": 32},
        "data": {"store_size": 64},
        "optim": {"name": "adamw", "lr": 1e-3},
        "train": {"epochs": 2, "batch_size": 8, "precision": "fp32"},
    }
    merged = {table: base.get(table, {}) | tables.get(table, {}) for table in base | tables}
    return recipes.load(name, (), merged)


def start(name, folder, count=40, **tables) -> loop.Run:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return runs.build(folder, recipe_of(name, **tables), few(count), CPU, runs.Options(workers=1))


def batch_of(run, epoch=0):
    return next(loop.micro_batches(run, next(iter(run.stream.epoch(epoch))), epoch, 0.5))


def state(run):
    tensors = {name: tensor.clone() for name, tensor in run.objective.state_dict().items()}
    return tensors | {f"optim/{k}": v.clone() for k, v in optim.state_by_name(run.objective, run.optimisers).items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_finite_one_a_player_and_reach_the_encoder(name, tmp_path):
    run = start(name, tmp_path)
    for pixels in itertools.islice(run.stream.epoch(0), 2):  # residual branches that start at zero wake up
        loop.take_step(run, pixels, 0)
    batch = batch_of(run)
    reached = set()
    for player, loss in zip(run.objective.players, run.objective.rounds(batch), strict=True):
        assert isinstance(loss, Loss) and loss.value.shape == () and loss.value.isfinite()
        assert all(term.shape == () and term.isfinite() for term in loss.terms.values())
        run.objective.zero_grad()
        loss.value.backward()
        for parameter_name, parameter in optim.by_player(run.objective)[player].items():
            if parameter.grad is not None and parameter.grad.abs().sum() > 0:
                reached.add(parameter_name)
    trainable = {n for n, p in run.objective.named_parameters() if p.requires_grad}
    assert trainable - reached == set(), "weights without a gradient"


@pytest.mark.parametrize("name", NAMES)
def test_every_trainable_weight_has_one_player(name, tmp_path):
    objective = start(name, tmp_path).objective
    owned = [n for parameters in optim.by_player(objective).values() for n in parameters]
    assert sorted(owned) == sorted(n for n, p in objective.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", NAMES)
def test_couples_is_true_to_its_word(name, tmp_path):
    """Without batch statistics, a batch's loss is the mean over its halves just where the method does not couple."""
    run = start(name, tmp_path, encoder={"backbone": "test_vit"})
    run.objective.double()
    for module in run.objective.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    batch = batch_of(run)
    batch.views = [view.double() for view in batch.views]

    def value(rows):
        part = dataclasses.replace(
            batch, views=[v[rows] for v in batch.views], index=batch.index[rows], label=batch.label[rows]
        )
        torch.manual_seed(0)
        return next(iter(run.objective.rounds(part))).value.item()

    halves = (value(slice(0, 4)) + value(slice(4, 8))) / 2
    same = abs(value(slice(0, 8)) - halves) < 1e-9
    assert same != run.objective.couples


@pytest.mark.parametrize("name", NAMES)
def test_loss_writes_no_buffer(name, tmp_path):
    """A step that is not taken touches nothing: only batch normalisation counts what it has seen."""
    run = start(name, tmp_path)
    norms = {
        f"{prefix}.{buffer}"
        for prefix, module in run.objective.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        for buffer, _ in module.named_buffers(recurse=False)
    }
    before = {n: b.clone() for n, b in run.objective.named_buffers()}
    for _ in run.objective.rounds(batch_of(run)):
        pass
    for buffer_name, buffer in run.objective.named_buffers():
        assert buffer_name in norms or torch.equal(buffer, before[buffer_name]), buffer_name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stops", [[4], [1, 4, 9]], ids=["once", "three times"])
def test_resume_mid_epoch_is_exact(name, stops, tmp_path, monkeypatch):
    """5 steps an epoch, 2 epochs; Ctrl-C after some steps, resumed: weights, buffers and optimiser to the bit."""
    whole = start(name, tmp_path / "whole")
    loop.train(whole)
    take = loop.take_step

    def interrupted(run, pixels, epoch):
        take(run, pixels, epoch)
        if run.step in stops:
            signal.raise_signal(signal.SIGINT)

    run = start(name, tmp_path / "parts")
    monkeypatch.setattr(loop, "take_step", interrupted)
    for stop in stops:
        with pytest.raises(loop.Interrupted):
            loop.train(run)
        assert run.step == stop
        run = start(name, tmp_path / "parts")
        torch.manual_seed(12345)  # what the global generator holds must not matter
        runs.go_on(run)
        assert run.step == stop
    loop.train(run)
    assert whole.step == run.step == 10
    assert_equal(state(whole), state(run))


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_run_other_seed_another(name, tmp_path):
    ends = []
    for i, seed in enumerate((0, 0, 1)):
        run = start(name, tmp_path / str(i), count=16, train={"epochs": 1, "seed": seed})
        loop.train(run)
        ends.append(state(run))
    assert_equal(ends[0], ends[1])
    assert any(not torch.equal(ends[0][k], ends[2][k]) for k in ends[0])


@pytest.mark.parametrize("name", NAMES)
def test_views_do_not_depend_on_the_batch_they_come_in(name, tmp_path):
    run = start(name, tmp_path)
    pixels = next(iter(run.stream.epoch(3)))
    views = Views(run.recipe.views, 32, 0)
    whole = views(pixels.pixels, pixels.size, pixels.index, 3)
    for part in (slice(0, 3), slice(3, 8), slice(5, 6)):
        for a, b in zip(views(pixels.pixels[part], pixels.size[part], pixels.index[part], 3), whole, strict=True):
            assert torch.equal(a, b[part])


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_are_the_batch(name, tmp_path):
    """Steps in parts end where steps in one piece end: with a network without batch statistics, exactly comparable."""
    plain = {"encoder": {"backbone": "test_vit"}, "optim": {"name": "sgd", "lr": 0.1}}
    new = start(name, tmp_path / "new", count=16, **plain).objective.encoder.state_dict()
    ends = []
    for size in (0, 4):
        run = start(name, tmp_path / str(size), count=16, train={"epochs": 1, "micro_batch": size}, **plain)
        if size and run.objective.couples:
            assert run.objective.encoder.chunk == size * len(run.views.sides)
        loop.train(run)
        ends.append(run.objective.encoder.state_dict())
    assert (
        max((ends[0][key] - new[key]).abs().max() for key in new) > 1e-3
    )  # it moved, by far more than the parts differ
    for key in ends[0]:
        assert torch.allclose(ends[0][key], ends[1][key], atol=1e-5), key


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_on_the_sample_set(name, tmp_path):
    run = start(name, tmp_path, count=512, optim={"lr": 3e-3}, train={"epochs": 10, "batch_size": 32})
    first = copy.deepcopy(run.objective)
    loop.train(run)
    batches = [batch_of(run, epoch=100 + i) for i in range(2)]  # epochs it has not seen: other crops, other colours

    @torch.no_grad()
    def mean(objective: Objective) -> float:
        objective.train()
        return float(np.mean([float(next(iter(objective.rounds(b))).value) for b in batches]))

    before, after = mean(first), mean(run.objective)
    assert after < 0.9 * before
    if run.objective.chance is not None:
        assert after < 0.9 * run.objective.chance
