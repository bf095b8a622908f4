"""The loop's side of the contract, held to toy methods that use every part of it: games, clusters, averages, labels."""

import dataclasses
import functools
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sslpre import methods as room
from sslpre import recipe as recipes
from sslpre.data.decode import to_canvas
from sslpre.data.find import find, subset
from sslpre.data.sample import sample
from sslpre.errors import SslpreError
from sslpre.objective import Batch, Epoch, Loss, Objective, Setup
from sslpre.ops import ranks
from sslpre.recipe import OptimTable
from sslpre.train import checkpoint, loop, optim
from sslpre.train import run as runs
from sslpre.train.build import build
from sslpre.train.step import micro_batches
from sslpre.views import draw
from sslpre.views.build import centre


class Game(Objective):
    """Two players; between the yields it notes where all weights are. `losses`: how many rounds it gives."""

    players: ClassVar = {"maker": ("encoder", "head"), "critic": ("critic",)}

    def __init__(self, setup: Setup, losses: int = 2):
        super().__init__()
        self.encoder = setup.encoder()
        self.head, self.critic = nn.Linear(self.encoder.dim, 4), nn.Linear(4, 1)
        self.losses, self.seen = losses, []

    def note(self) -> None:
        self.seen.append({name: p.detach().clone() for name, p in self.named_parameters()})

    def rounds(self, batch: Batch) -> Iterator[Loss]:
        self.note()
        z = self.head(self.encoder(batch.views[0]))
        yield Loss(F.softplus(-self.critic(z)).mean(), {"size": z.square().mean()})
        for _ in range(self.losses - 1):
            self.note()
            prior = self.critic(batch.normal("prior", 4).to(z.dtype))
            yield Loss((F.softplus(self.critic(z.detach())) + F.softplus(-prior)).mean())

    def after_step(self, progress: float) -> None:
        self.note()


class Rotation(Objective):
    """Which quarter turn? It notes what it drew and which labels it was shown."""

    def __init__(self, setup: Setup, dropout: float = 0.0):
        super().__init__()
        self.encoder, self.dropout = setup.encoder(), nn.Dropout(dropout)
        self.head = nn.Linear(self.encoder.dim, 4)
        self.drawn, self.labels, self.masks = {}, {}, []

    def loss(self, batch: Batch) -> Loss:
        numbers = batch.uniform("turn")
        self.drawn |= {(batch.epoch, i): x for i, x in zip(batch.index.tolist(), numbers.tolist(), strict=True)}
        self.labels |= dict(zip(batch.index.tolist(), batch.label.tolist(), strict=True))
        turn = (4 * numbers).long()
        x = torch.stack([torch.rot90(v, int(k), (1, 2)) for v, k in zip(batch.views[0], turn, strict=True)])
        self.masks.append(self.dropout(torch.ones(len(x), self.encoder.dim)))
        return Loss(F.cross_entropy(self.head(self.encoder(x) * self.masks[-1]), turn))


class Cluster(Objective):
    """DeepCluster's shape: targets from a look at every image, and a classifier that starts anew each epoch."""

    def __init__(self, setup: Setup):
        super().__init__()
        self.encoder = setup.encoder()
        self.classifier = nn.Linear(self.encoder.dim, 2)
        self.register_buffer("target", torch.full((setup.images,), -1))
        self.epochs, self.looks, self.fresh = [], [], []

    def look(self, x: torch.Tensor) -> torch.Tensor:
        self.looks.append((self.training, self.encoder.model.training, torch.is_grad_enabled()))
        return x

    def epoch_start(self, epoch: Epoch) -> list[nn.Module]:
        self.epochs.append(epoch.number)
        self.images = epoch.every_image(self.look)
        bright = epoch.every_image(lambda x: self.encoder(x)[:, :8].sum(1))
        self.target.copy_(bright > bright.median())
        self.classifier.reset_parameters()
        with torch.no_grad():  # as another machine's rounding would have it
            self.classifier.weight += 1e-3 * ranks.rank()
        self.fresh.append(self.classifier.weight.detach().clone())
        return [self.classifier]

    def loss(self, batch: Batch) -> Loss:
        return Loss(F.cross_entropy(self.classifier(self.encoder(batch.views[0])), self.target[batch.index]))


class Average(Objective):
    """An average kept by rule."""

    def __init__(self, setup: Setup):
        super().__init__()
        self.encoder = setup.encoder()
        self.register_buffer("average", torch.zeros(self.encoder.dim))
        self.progress, self.calls = [], []

    def loss(self, batch: Batch) -> Loss:
        self.before = {name: p.detach().clone() for name, p in self.encoder.named_parameters()}
        self.progress.append(batch.progress)
        z = self.encoder(batch.views[0])
        self.last = z.detach().mean(0)
        return Loss((z - self.average - 1).square().mean(), {"mean": z.detach().mean()})

    def after_step(self, progress: float) -> None:
        assert not torch.is_grad_enabled()
        moved = any(not torch.equal(p, self.before[name]) for name, p in self.encoder.named_parameters())
        self.calls.append((progress, moved))
        self.average.mul_(0.9).add_(self.last, alpha=0.1)


class Pair(Objective):
    """Two encoders, and a loss that compares images."""

    couples = True

    def __init__(self, setup: Setup):
        super().__init__()
        self.encoder, self.other = setup.encoder("luma"), setup.encoder("chroma")

    def loss(self, batch: Batch) -> Loss:
        a, b = (F.normalize(network(batch.views[0])) for network in (self.encoder, self.other))
        return Loss(F.cross_entropy(a @ b.T / 0.1, torch.arange(len(a))))


TOYS = {toy.__name__.lower(): toy for toy in (Game, Rotation, Cluster, Average, Pair)}
assert_close = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # dicts of tensors, too
FEW = dataclasses.replace(sample(), train=subset(sample().train, np.arange(20)))


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """The toys stand in the table of methods while a test runs; every step writes its metrics."""
    monkeypatch.setattr("sslpre.train.metrics.LOG_STEPS", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "table", room.table | TOYS)
        room.methods.cache_clear()
        yield
    room.methods.cache_clear()


def start(name, folder, found=FEW, **tables) -> loop.Run:
    """A run of a toy: 20 images in batches of 8, so 2 steps an epoch; 4 epochs."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    plain = {
        "method": {"name": name},
        "encoder": {"backbone": "test_resnet", "image_size": 32},
        "data": {"store_size": 64},
        "optim": {"lr": 1e-2, "weight_decay": 0.0, "warmup": 0.0},
        "train": {"epochs": 4, "batch_size": 8, "precision": "fp32"},
    }
    recipe = recipes.parse(plain | {table: plain[table] | keys for table, keys in tables.items()}, "toy")
    return build(folder, recipe, found, torch.device("cpu"), 1)


def train(*arguments, **tables) -> loop.Run:
    run = start(*arguments, **tables)
    loop.train(run)
    return run


def state(run):
    return run.objective.state_dict() | optim.state_by_name(run.objective, run.optimisers)


def metrics(run):
    """The lines of metrics.jsonl, read as strictly as a browser would: NaN and Infinity are no JSON."""
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (run.folder / "metrics.jsonl").read_text().splitlines()
    ]


def in_parts(stops, begin):
    """The runs of one training that is interrupted after each of `stops` and resumed in a fresh run."""
    take, parts = loop.take_step, [begin()]

    def interrupted(run, pixels, epoch):
        take(run, pixels, epoch)
        if run.step in stops:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", interrupted)
        for stop in stops:
            with pytest.raises(loop.Interrupted):
                loop.train(parts[-1])
            parts.append(begin())
            torch.manual_seed(12345)  # what the global generator holds must not matter
            runs.go_on(parts[-1])
            assert parts[-1].step == stop
        loop.train(parts[-1])
    return parts


@pytest.mark.parametrize("name", ["game", "cluster", "average", "rotation"])
def test_resume_is_exact(name, tmp_path):
    """Weights, buffers and optimisers to the bit: two players, a fresh classifier an epoch, an average, dropout."""
    method = {"dropout": 0.5} if name == "rotation" else {}
    whole = train(name, tmp_path / "whole", method=method)
    last = in_parts([1, 2, 5], lambda: start(name, tmp_path / "parts", method=method))[-1]
    assert whole.step == last.step == 8
    assert_close(state(whole), state(last))


def test_a_game_is_a_loop_with_two_optimisers(tmp_path):
    tables = {"optim": {"name": "sgd", "lr": 0.1}}
    run, twin = train("game", tmp_path / "run", **tables), start("game", tmp_path / "twin", **tables)
    assert list(run.optimisers) == ["maker", "critic"]
    own = twin.objective.train()
    weights = [*own.encoder.parameters(), *own.head.parameters()], [*own.critic.parameters()]
    optimisers = [torch.optim.SGD(some, 0.1, momentum=0.9) for some in weights]
    logged = []

    def move(player, loss, step):
        for p, g in zip(weights[player], torch.autograd.grad(loss, weights[player]), strict=True):
            p.grad = g
        optimisers[player].param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 8))
        optimisers[player].step()
        return loss.item()

    for step, pixels in enumerate(twin.stream.steps(0, 8)):
        view = twin.views(pixels.pixels, pixels.size, pixels.index, step // 2)[0]
        z = own.head(own.encoder(view.contiguous(memory_format=torch.channels_last)))
        first = move(0, F.softplus(-own.critic(z)).mean(), step)
        prior = own.critic(draw.normal(0, step // 2, pixels.index, "method.prior", 4))
        second = move(1, (F.softplus(own.critic(z.detach())) + F.softplus(-prior)).mean(), step)
        logged.append((first, second, z.square().mean().item()))
    assert_close(run.objective.state_dict(), own.state_dict())
    assert "loss" not in metrics(run)[0]
    assert [(line["maker.loss"], line["critic.loss"], line["maker.size"]) for line in metrics(run)] == logged


def test_a_player_has_its_share_of_the_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(Game, "rates", {"critic": 0.1})
    run = train("game", tmp_path / "run", optim={"name": "sgd", "lr": 0.1})
    rates = [run.optimisers[player].param_groups[0]["lr"] for player in ("maker", "critic")]
    assert rates[0] > 0 and rates[1] == pytest.approx(0.1 * rates[0])
    monkeypatch.setattr(Game, "rates", {"critik": 0.1})
    with pytest.raises(TypeError, match="rates name critik, who is no player"):
        start("game", tmp_path / "odd")


def test_each_player_moves_its_own_weights_in_turn(tmp_path):
    run = train("game", tmp_path)
    moved = [set(), set(), set()]
    for i, (a, b) in enumerate(zip(run.objective.seen[:-1], run.objective.seen[1:], strict=True)):
        moved[i % 3] |= {name for name in a if not torch.equal(a[name], b[name])}
    makers = {name for name in run.objective.seen[0] if not name.startswith("critic.")}
    # before the second loss is asked for, after it, and from a step's end to the next one's beginning
    assert moved == [makers, {"critic.weight", "critic.bias"}, set()]


@pytest.mark.parametrize(("losses", "words"), [(1, "no loss for player critic"), (3, "more losses than")])
def test_rounds_gives_one_loss_a_player(losses, words, tmp_path):
    run = start("game", tmp_path, method={"losses": losses})
    with pytest.raises(TypeError, match=rf"rounds\(\) gave {words}"):
        loop.train(run)
    assert run.step == 0


def test_epoch_start_runs_at_the_start_of_an_epoch_only(tmp_path):
    whole, *parts = in_parts([2, 3, 6, 7], lambda: start("cluster", tmp_path))
    assert whole.objective.epochs == [0]
    assert [run.objective.epochs for run in parts] == [[1], [2], [3], []]  # 2, 6 begin an epoch; 3, 7 lie within


def test_every_image_is_each_centre_view_in_index_order(tmp_path):
    run = start("cluster", tmp_path)
    run.objective.train()
    loop.start_epoch(run, 0)
    assert run.objective.images.shape == (20, 3, 32, 32)
    source = FEW.train
    for i, image in enumerate(run.objective.images):
        pixels = torch.from_numpy(to_canvas(source.read(i), 64)).permute(2, 0, 1)[None]
        by_hand = centre(pixels, torch.tensor([source.size(i)]), 32)[0]
        assert_close(image, by_hand, atol=1e-6)
        plain = F.interpolate(pixels / 255, (32, 32), mode="bilinear", antialias=True)[0]  # the whole, as it is square
        assert_close(image, plain, atol=1.01 / 255)  # a CPU resizes in uint8
    assert set(run.objective.looks) == {(False, False, False)}  # eval mode, no gradient
    assert run.objective.training and run.objective.encoder.model.training


def test_what_epoch_start_made_anew_has_no_momentum_and_a_seed_of_its_own(tmp_path):
    run = train("cluster", tmp_path)
    counts = {name: int(t) for name, t in state(run).items() if name.endswith("/step")}
    fresh = {"all/classifier.weight/step", "all/classifier.bias/step"}
    assert len(counts) > 2 and counts == {name: 2 if name in fresh else 8 for name in counts}
    for epoch, weight in enumerate(run.objective.fresh):
        loop.reseed(0, "epoch", epoch)
        assert torch.equal(weight, nn.Linear(run.objective.encoder.dim, 2).weight)


def test_after_step_is_called_once_a_step_with_the_new_progress(tmp_path):
    run = train("average", tmp_path)
    assert run.objective.progress == [i / 8 for i in range(8)] and run.objective.average.abs().sum() > 0
    assert run.objective.calls == [((i + 1) / 8, True) for i in range(8)]


@pytest.mark.parametrize("name", ["rotation", "game"])
def test_a_loss_that_does_not_couple_takes_any_micro_batch(name, tmp_path):
    """8 images as 3 + 3 + 2 or at once, in a network without batch statistics: weights, losses, draws."""
    plain = {"encoder": {"backbone": "test_vit"}, "optim": {"name": "sgd", "lr": 0.05}}
    new = start(name, tmp_path / "new", **plain).objective.state_dict()
    whole, parts = (train(name, tmp_path / str(m), train={"epochs": 2, "micro_batch": m}, **plain) for m in (0, 3))
    sizes = [len(batch.index) for batch in micro_batches(parts, next(iter(parts.stream.epoch(0))), 0, 0.0)]
    assert sizes == [3, 3, 2] and parts.objective.encoder.chunk == 0
    end = whole.objective.state_dict()
    assert max((end[key] - new[key]).abs().max() for key in new) > 1e-3
    assert_close(end, parts.objective.state_dict(), atol=1e-6)
    for a, b in zip(metrics(whole), metrics(parts), strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], abs=1e-6) for key in a if "loss" in key or "size" in key)


def test_draws_are_a_function_of_epoch_and_image_dropout_of_the_step(tmp_path):
    tables = {"method": {"dropout": 0.5}}
    whole, parts = (train("rotation", tmp_path / str(m), train={"micro_batch": m}, **tables) for m in (0, 3))
    assert whole.objective.drawn == parts.objective.drawn
    assert len(whole.objective.drawn) == 4 * 16  # 16 of the 20 images an epoch: the last batch is dropped
    by_hand = [draw.uniform(0, epoch, torch.arange(20), "method.turn") for epoch in range(4)]
    assert all(by_hand[epoch][i] == x for (epoch, i), x in whole.objective.drawn.items())
    masks = torch.stack(whole.objective.masks)
    assert set(masks.unique().tolist()) == {0.0, 2.0} and 0.9 < masks.mean() < 1.1
    assert len(masks.flatten(1).unique(dim=0)) == 8


def test_labels_are_shown_to_methods_that_declare_them(photos, tmp_path, monkeypatch):
    found = find(photos)
    numbers = ["abc".index(found.train.name(i)[0]) for i in range(48)]  # amber, birch, cobalt
    for declared, wanted in ((False, [-1] * 48), (True, numbers)):
        monkeypatch.setattr(Rotation, "needs_labels", declared)
        run = train("rotation", tmp_path / str(declared), found, train={"micro_batch": 3})
        assert run.objective.labels == dict(enumerate(wanted))  # 6 batches of 8: every image was seen
    with pytest.raises(SslpreError, match="`rotation` needs labels") as refused:
        start("rotation", tmp_path / "refused", find(photos / "amber"))
    assert refused.value.code == 4


def test_metrics_after_a_kill_are_those_of_an_unbroken_run(tmp_path, monkeypatch):
    """Valid JSON, every step once, lr by the schedule; a torn last line and steps after the checkpoint are dropped."""
    warm = {"optim": {"warmup": 0.25, "lr": 1e-2}}
    whole, killed = train("average", tmp_path / "whole", **warm), start("average", tmp_path / "killed", **warm)
    take, keys = loop.take_step, ("step", "epoch", "loss", "mean", "lr")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", lambda run, *rest: take(run, *rest) if run.step < 5 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.train(killed)
    with open(killed.folder / "metrics.jsonl", "a") as log:
        log.write('{"step": 6, "lo')
    resumed = start("average", killed.folder, **warm)
    runs.go_on(resumed)
    assert resumed.step == 4
    loop.train(resumed)
    assert metrics(resumed)[0].keys() - {"health", "chance"} == {*keys, "images_per_s", "waiting"}
    first, second = ([[line[key] for key in keys] for line in metrics(run)] for run in (whole, resumed))
    rates = [optim.rate(i, 8, OptimTable(warmup=0.25)) * 1e-2 for i in range(8)]
    assert first == second
    assert [(line[0], line[1], line[4]) for line in first] == [(i + 1, i // 2, rates[i]) for i in range(8)]
    assert first[0][4] == pytest.approx(5e-3) and first[4][4] == pytest.approx(7.5e-3)  # warm-up; a third of the cosine


def test_a_line_is_the_mean_since_the_line_before(tmp_path, monkeypatch):
    losses = [line["loss"] for line in metrics(train("average", tmp_path / "1"))]
    monkeypatch.setattr("sslpre.train.metrics.LOG_STEPS", 3)
    found = [(line["step"], line["loss"]) for line in metrics(train("average", tmp_path / "3"))]
    means = [np.mean(losses[:3]), np.mean(losses[3:6]), np.mean(losses[6:])]
    assert found == [(step, pytest.approx(mean)) for step, mean in zip((3, 6, 8), means, strict=True)]


def test_every_encoder_of_a_coupling_method_runs_in_chunks_and_compiled(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    plain = {"encoder": {"backbone": "test_vit"}, "optim": {"name": "sgd", "lr": 0.1}}
    whole, parts = (train("pair", tmp_path / str(m), train={"epochs": 1, "micro_batch": m}, **plain) for m in (0, 3))
    chunks = [(run.objective.encoder.chunk, run.objective.other.chunk) for run in (whole, parts)]
    assert chunks == [(0, 0), (3, 3)]
    assert_close(whole.objective.state_dict(), parts.objective.state_dict(), atol=1e-5)
    network = start("pair", tmp_path / "compiled", train={"compile": True}, **plain).objective
    assert compiled == [network.encoder.model, network.other.model]


def trained(name, folder):
    """All weights and buffers after 8 steps in float64, on as many processes as there are."""
    room.table = room.table | TOYS  # in a process of the pair nobody else has done it
    room.methods.cache_clear()
    run = start(name, Path(folder), optim={"name": "sgd"})
    run.objective.double()
    loop.train(run)
    return {name: tensor.detach().numpy().copy() for name, tensor in run.objective.state_dict().items()}


@pytest.mark.parametrize("name", ["game", "cluster", "rotation"])
def test_two_processes_end_where_one_does(name, tmp_path, pair):
    """Players in turn, targets from a look at every image, fresh classifiers: 4 epochs, shared out to two."""
    one = trained(name, str(tmp_path / "one"))
    for two in pair.run(trained, name, str(tmp_path / "two")):
        assert one.keys() == two.keys()
        for key, expected in one.items():
            assert np.abs(two[key] - expected).max(initial=0) < 1e-9, key
    assert (tmp_path / "two" / "metrics.jsonl").read_text().count("\n") == 1, "one of them writes"


def late(name, folder):
    """Weights of a run whose second process comes late to everything that looks at the disk."""
    complete = checkpoint.complete
    checkpoint.complete = lambda path: (time.sleep(0.7 * ranks.rank()), complete(path))[1]
    try:
        return trained(name, folder)
    finally:
        checkpoint.complete = complete


def test_a_process_that_is_late_does_not_part_from_the_others(tmp_path, pair):
    """What the first has written to the disk meanwhile must not lead the second another way."""
    one, two = pair.run(late, "rotation", str(tmp_path))
    assert all(np.array_equal(one[key], two[key]) for key in one)
