"""The contract with the loop, in one process: losses, players, buffers, resume, views, parts, and that it learns."""

import copy
import dataclasses
import itertools
import signal
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sslpre import recipe as recipes
from sslpre.data.find import Found, subset
from sslpre.data.sample import sample
from sslpre.data.stream import Pixels
from sslpre.methods import methods
from sslpre.objective import Batch, Loss, Objective
from sslpre.recipe import Recipe
from sslpre.shelf import names, text
from sslpre.train import loop, optim, step, verdict
from sslpre.train import run as runs
from sslpre.train.build import build
from sslpre.views.build import Views

CPU = torch.device("cpu")
TINY: dict[str, dict[str, Any]] = {
    "encoder": {"backbone": "test_resnet", "stem": "auto", "image_size": 32, "init": ""},
    "data": {"store_size": 64},
    "optim": {"name": "adamw", "lr": 1e-3, "warmup": 0.1},
    "train": {"epochs": 2, "batch_size": 8, "micro_batch": 0, "precision": "fp32", "compile": False},
}


@pytest.fixture(params=sorted(methods()))
def method(request: pytest.FixtureRequest) -> str:
    """The name of the method that a test is about. A package that imports these tests defines its own."""
    return request.param


def few(count: int) -> Found:
    """The first `count` images of the sample set."""
    found = sample()
    return dataclasses.replace(found, train=subset(found.train, np.arange(count)))


def recipe_name(method: str) -> str:
    """The first recipe that is the method's and is named after it: `simclr`, or else `simclr-cifar`."""
    own = [name for name in names() if name == method or name.startswith(f"{method}-")]
    for name in own:
        if tomllib.loads(text(name))["method"]["name"] == method:
            return name
    raise LookupError(f"no recipe of method `{method}`: put one into the package, as recipes/{method}.toml")


def recipe_of(method: str, /, **tables: Mapping[str, Any]) -> Recipe:
    """The method's recipe, made small; `tables` come last: `recipe_of("simclr", train={"epochs": 1})`."""
    merged = {table: {**TINY.get(table, {}), **tables.get(table, {})} for table in TINY | tables}
    return recipes.load(recipe_name(method), (), merged)


def start(method: str, /, folder: Path, count: int = 40, **tables: Mapping[str, Any]) -> loop.Run:
    """A run of the method in `folder`, on `count` images of the sample set, not yet trained."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return build(folder, recipe_of(method, **tables), few(count), CPU, 1)


def batch_of(run: loop.Run, epoch: int = 0) -> Batch:
    """The first batch of an epoch, half-way through the run."""
    return next(step.micro_batches(run, next(iter(run.stream.epoch(epoch))), epoch, 0.5))


def state(run: loop.Run) -> dict[str, Tensor]:
    """A copy of all that training changes: weights, buffers and the optimisers' tensors, by name."""
    tensors = {name: tensor.clone() for name, tensor in run.objective.state_dict().items()}
    return tensors | {f"optim/{k}": v.clone() for k, v in optim.state_by_name(run.objective, run.optimisers).items()}


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Same names, and every tensor the same to the bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_losses_are_finite_one_a_player_and_reach_the_encoder(method: str, tmp_path: Path) -> None:
    run = start(method, tmp_path)
    for pixels in itertools.islice(run.stream.epoch(0), 2):  # residual branches that start at zero wake up
        step.take_step(run, pixels, 0)
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


def test_health_hears_the_encoder_and_knows_what_to_judge_by(method: str, tmp_path: Path) -> None:
    """One step tells it features of the encoder's width; the terms that the method is judged by are logged."""
    run = start(method, tmp_path)
    with verdict.watching(run) as watch:
        loop.start_epoch(run, 0)
        step.take_step(run, next(iter(run.stream.epoch(0))), 0)
    features = watch.ring.finite()
    assert len(features) >= 8 and features.shape[1] == run.objective.encoder.dim
    if run.objective.chance is not None or run.objective.judged[1] != "chance":
        assert verdict.chance_of(run, {name: value.item() for name, value in run.sums.items()}) is not None


def test_every_trainable_weight_has_one_player(method: str, tmp_path: Path) -> None:
    objective = start(method, tmp_path).objective
    owned = [n for parameters in optim.by_player(objective).values() for n in parameters]
    assert sorted(owned) == sorted(n for n, p in objective.named_parameters() if p.requires_grad)


def test_couples_is_true_to_its_word(method: str, tmp_path: Path) -> None:
    """Without batch statistics, a batch's loss is the mean over its halves just where the method does not couple."""
    run = start(method, tmp_path, encoder={"backbone": "test_vit"})
    run.objective.double()
    for module in run.objective.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    batch = batch_of(run)
    batch.views = [view.double() for view in batch.views]

    def value(rows: slice) -> float:
        part = dataclasses.replace(
            batch, views=[v[rows] for v in batch.views], index=batch.index[rows], label=batch.label[rows]
        )
        torch.manual_seed(0)
        return next(iter(run.objective.rounds(part))).value.item()

    halves = (value(slice(0, 4)) + value(slice(4, 8))) / 2
    same = abs(value(slice(0, 8)) - halves) < 1e-9
    assert same != run.objective.couples


def test_loss_writes_no_buffer(method: str, tmp_path: Path) -> None:
    """A step that is not taken touches nothing: only batch normalisation counts what it has seen."""
    run = start(method, tmp_path)
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


@pytest.mark.parametrize("stops", [[4], [1, 4, 9]], ids=["once", "three times"])
def test_resume_mid_epoch_is_exact(
    method: str, stops: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 steps an epoch, 2 epochs; Ctrl-C after some steps, resumed: weights, buffers and optimiser to the bit."""
    whole = start(method, tmp_path / "whole")
    loop.train(whole)
    take = loop.take_step

    def interrupted(run: loop.Run, pixels: Pixels, epoch: int) -> None:
        take(run, pixels, epoch)
        if run.step in stops:
            signal.raise_signal(signal.SIGINT)

    run = start(method, tmp_path / "parts")
    monkeypatch.setattr(loop, "take_step", interrupted)
    for stop in stops:
        with pytest.raises(loop.Interrupted):
            loop.train(run)
        assert run.step == stop
        run = start(method, tmp_path / "parts")
        torch.manual_seed(12345)  # what the global generator holds must not matter
        runs.go_on(run)
        assert run.step == stop
    loop.train(run)
    assert whole.step == run.step == 10
    assert_equal(state(whole), state(run))


def test_same_seed_same_run_other_seed_another(method: str, tmp_path: Path) -> None:
    ends = []
    for i, seed in enumerate((0, 0, 1)):
        run = start(method, tmp_path / str(i), count=16, train={"epochs": 1, "seed": seed})
        loop.train(run)
        ends.append(state(run))
    assert_equal(ends[0], ends[1])
    assert any(not torch.equal(ends[0][k], ends[2][k]) for k in ends[0])


def test_views_do_not_depend_on_the_batch_they_come_in(method: str, tmp_path: Path) -> None:
    run = start(method, tmp_path)
    pixels = next(iter(run.stream.epoch(3)))
    views = Views(run.recipe.views, 32, 0)
    whole = views(pixels.pixels, pixels.size, pixels.index, 3)
    for part in (slice(0, 3), slice(3, 8), slice(5, 6)):
        for a, b in zip(views(pixels.pixels[part], pixels.size[part], pixels.index[part], 3), whole, strict=True):
            assert torch.equal(a, b[part])


def test_micro_batches_are_the_batch(method: str, tmp_path: Path) -> None:
    """Steps in parts end where steps in one piece end: with a network without batch statistics, exactly comparable."""
    plain: dict[str, dict[str, Any]] = {"encoder": {"backbone": "test_vit"}, "optim": {"name": "sgd", "lr": 0.1}}
    new = start(method, tmp_path / "new", count=16, **plain).objective.encoder.state_dict()
    ends = []
    for size in (0, 4):
        run = start(method, tmp_path / str(size), count=16, train={"epochs": 1, "micro_batch": size}, **plain)
        if size and run.objective.couples:
            assert run.objective.encoder.chunk == size * len(run.views.sides)
        loop.train(run)
        ends.append(run.objective.encoder.state_dict())
    assert (
        max((ends[0][key] - new[key]).abs().max() for key in new) > 1e-3
    )  # it moved, by far more than the parts differ
    for key in ends[0]:
        assert torch.allclose(ends[0][key], ends[1][key], atol=1e-5), key


def test_it_learns_on_the_sample_set(method: str, tmp_path: Path) -> None:
    run = start(method, tmp_path, count=512, optim={"lr": 3e-3}, train={"epochs": 10, "batch_size": 32})
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
