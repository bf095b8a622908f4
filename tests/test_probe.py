"""The probe: held to scikit-learn on the same features, to what is known of its baselines, and to leaving no trace."""

import copy
import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from sslpre.data import BadImage
from sslpre.encoder import Encoder, build
from sslpre.errors import SslpreError
from sslpre.probe import Asked, Question, Report, Row, Score, finetune, interval, knn, linear, probe
from sslpre.probe import exam as probing
from sslpre.probe.duplicates import Duplicates
from sslpre.probe.features import Layout, describe, fingerprint, grid, layout, random_twin, readings
from sslpre.probe.judge import Answers, Judge, best
from sslpre.probe.questions import DRAWS, subset

PLAN = Layout(("a", "b", "c", "d", "output"), (0, 1, 2, 3, None), (1, 1, 1, 1, 1), True, ())
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LINEAR, KNN = Question("linear"), Question("knn", k=20)


def score(row, metric):
    """The row's score of the first question of this metric."""
    return next(one for question, one in row.scores.items() if question.metric == metric)


class Pictures:
    """A Source in memory: noise, with as much of its class' colour in it as `signal` says."""

    def __init__(self, labels, signal=0.0, seed=0, side=16, classes=None, bad=()):
        draw = np.random.default_rng(seed)
        self.labels = np.array(labels, np.int64)
        self.classes = classes if classes is not None else [f"class {i}" for i in range(self.labels.max() + 1)]
        self.where, self.fingerprint, self.bad = "in memory", "00", set(bad)
        colour = {name: np.random.default_rng(sum(map(ord, name))).uniform(0, 255, 3) for name in self.classes}
        noise = draw.uniform(0, 255, (len(self.labels), side, side, 3))
        wanted = np.array([colour[self.classes[label]] if label >= 0 else np.zeros(3) for label in self.labels])
        self.pixels = ((1 - signal) * noise + signal * wanted[:, None, None]).astype(np.uint8)

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        return f"{i}.png"

    def read(self, i, side=None):
        if i in self.bad:
            raise BadImage("a test says so")
        return self.pixels[i]

    def size(self, i):
        return self.pixels[i].shape[:2]


class Shrink(nn.Module):
    """Stands for a timm model in an Encoder: 4×4 means of the image. `moves`: it changes itself when it is used."""

    num_features = 48

    def __init__(self, moves=False):
        super().__init__()
        self.norm, self.moves = nn.BatchNorm2d(3), moves

    def forward(self, x):
        if self.moves:
            self.norm.running_mean += 1e-7
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


class Tiny(nn.Module):
    """Stands for a timm model that can be trained in no time."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.first(x)).relu().mean((2, 3))


@pytest.fixture
def shrunk(monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda name, **arguments: Shrink())
    return Encoder(Shrink(), "shrink", {}, 16, MEAN, STD)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda name, **arguments: Tiny())
    torch.manual_seed(0)
    return Encoder(Tiny(), "tiny", {}, 16, MEAN, STD)


def encoder(name="test_vit2", side=16):
    torch.manual_seed(0)
    return build(name, image_size=side, mean=MEAN, std=STD)


def run(network, train, test=None, **arguments):
    return probe(network, train, test, **{"side": 16, "linear": True, "knn": True, "workers": 0, **arguments})


# ---- the split


@settings(max_examples=200, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=80), share=st.floats(0.05, 0.95), seed=st.integers(0, 99)
)
def test_split_is_stratified_disjoint_and_seeded(labels, share, seed):
    labels = np.array(labels)
    first, second = linear.split(labels, share, seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    assert all(np.diff(first) > 0) and all(np.diff(second) > 0)
    for one in np.unique(labels):
        total, taken = (labels == one).sum(), (labels[second] == one).sum()
        if total == 1:
            assert taken == 0
        else:
            assert 1 <= taken <= total - 1
            assert abs(taken - share * total) <= 1
    again = linear.split(labels, share, seed)
    assert np.array_equal(again[0], first) and np.array_equal(again[1], second)


def test_split_depends_on_the_seed():
    labels = np.arange(100) % 4
    assert not np.array_equal(linear.split(labels, 0.2, 0)[1], linear.split(labels, 0.2, 1)[1])


# ---- scikit-learn is the reference


def feature_set(kind):
    """Training and test features and labels: (x, y, x_test, y_test, classes)."""
    draw = torch.Generator().manual_seed(1)
    count, dim, classes = {"tall": (600, 40, 5), "wide": (150, 400, 4), "two": (300, 30, 2), "relu": (500, 60, 8)}[kind]
    y = torch.randint(classes, (count + 400,), generator=draw)
    x = torch.randn(classes, dim, generator=draw)[y] * 0.5 + torch.randn(len(y), dim, generator=draw)
    x = x @ torch.randn(dim, dim, generator=draw) * torch.logspace(-2, 2, dim)  # correlated, of very different sizes
    if kind == "relu":
        x = torch.cat([x.relu(), torch.full((len(y), 3), 7.0)], 1)  # with dimensions that never vary
    return x[:count], y[:count], x[count:], y[count:], classes


@pytest.mark.parametrize("kind", ["tall", "wide", "two", "relu"])
def test_linear_agrees_with_scikit_learn(kind):
    x, y, x_test, y_test, classes = feature_set(kind)
    mine, _ = linear.search(x, y, classes, seed=0)
    standard, standard_test = (((part.double() - mine.mean) / mine.std).numpy() for part in (x, x_test))
    theirs = LogisticRegression(C=mine.strength, tol=1e-8, max_iter=20_000).fit(standard, y.numpy())
    agree = (mine.predict(x_test).numpy() == theirs.predict(standard_test)).mean()
    ours, reference = (mine.predict(x_test) == y_test).double().mean(), theirs.score(standard_test, y_test.numpy())
    assert abs(ours - reference) <= 0.005, (ours, reference)
    assert agree >= 0.99
    assert ours > 1.5 / classes  # there was something to find


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("kind", ["tall", "wide", "two", "relu"])
def test_the_minimum_is_that_of_scikit_learn(kind, strength):
    x, y, _, _, classes = feature_set(kind)
    standard, _, _, back = linear.standardised(x)
    lower = linear.cholesky(standard.T @ standard / len(x), classes, len(x), strength)
    weight, bias = linear.solve(standard, y, classes, strength, lower, None, linear.FINE)
    plain = ((x.double() - x.double().mean(0)) / x.double().std(0, correction=0).clamp_min(1e-9)).numpy()
    theirs = LogisticRegression(C=strength, tol=1e-9, max_iter=20_000).fit(plain, y.numpy())
    likely = (torch.from_numpy(plain) @ back(weight) + bias).softmax(1).numpy()
    assert np.abs(likely - theirs.predict_proba(plain)).max() < 2e-3


def test_a_wide_problem_is_solved_exactly_as_the_tall_one():
    """Appending zeros makes the features wider than the images are many, and changes nothing."""
    x, y, x_test, _, classes = feature_set("two")
    narrow, _ = linear.search(x, y, classes, 0)
    wide, _ = linear.search(torch.cat([x, torch.zeros(len(x), 400)], 1), y, classes, 0)
    assert wide.strength == narrow.strength
    torch.testing.assert_close(wide.weight[:30], narrow.weight, atol=0.02 * narrow.weight.abs().max().item(), rtol=0)
    torch.testing.assert_close(wide.weight[30:], torch.zeros_like(wide.weight[30:]), atol=1e-9, rtol=0)
    assert torch.equal(wide.predict(torch.cat([x_test, torch.ones(len(x_test), 400)], 1)), narrow.predict(x_test))


def test_the_strength_is_the_one_that_generalises():
    """Hundreds of useless dimensions ask for a strong penalty, a clean problem with many images for a weak one."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 4
    noisy = torch.cat(
        [torch.eye(4)[y] + 0.3 * torch.randn(400, 4, generator=draw), torch.randn(400, 300, generator=draw)], 1
    )
    clean = torch.eye(4)[y] @ torch.randn(4, 6, generator=draw) + 0.2 * torch.randn(400, 6, generator=draw)
    assert linear.search(noisy, y, 4, 0)[0].strength <= 0.1 < linear.search(clean, y, 4, 0)[0].strength


def test_one_image_per_class_leaves_nothing_to_choose_on():
    fit, choice = linear.search(torch.eye(5), torch.arange(5), 5, 0)
    assert fit.strength == 1.0 and choice.held == (0.0, 0.0)
    assert torch.equal(fit.predict(torch.eye(5)), torch.arange(5))


@pytest.mark.parametrize("kind", ["tall", "wide", "relu"])
def test_knn_agrees_with_scikit_learn(kind, monkeypatch):
    x, y, x_test, y_test, classes = feature_set(kind)
    whole = knn.predict(x, y, x_test, classes)
    reference = KNeighborsClassifier(
        knn.K, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / knn.TEMPERATURE)
    ).fit(x.double().numpy(), y.numpy())
    theirs = reference.predict(x_test.double().numpy())
    assert abs((whole == y_test).double().mean() - (theirs == y_test.numpy()).mean()) <= 0.005
    assert (whole.numpy() == theirs).mean() >= 0.99
    monkeypatch.setattr(knn, "CHUNK", 7 * len(x))
    assert torch.equal(knn.predict(x, y, x_test, classes), whole)


def test_a_strength_that_was_chosen_is_not_chosen_again():
    x, y, x_test, _, classes = feature_set("tall")
    fit, choice = linear.search(x, y, classes, 0)
    again, same = linear.search(x, y, classes, 0, choice)
    assert same is choice and again.strength == choice.strength == fit.strength
    assert (again.predict(x_test) == fit.predict(x_test)).double().mean() >= 0.995
    other, _ = linear.search(x, y, classes, 0, linear.Choice(1e-5, (0.0, 0.0), 0.0))
    assert other.strength == 1e-5 and other.weight.norm() < 0.5 * fit.weight.norm()


def test_held_out_accuracy_is_that_of_the_split():
    x, y, _, _, classes = feature_set("tall")
    _, choice = linear.search(x, y, classes, 0)
    first, second = (torch.from_numpy(rows) for rows in linear.split(y.numpy(), linear.HELD_OUT, 0))
    standard = linear.scale(x)[0]
    theirs = LogisticRegression(C=choice.strength, tol=1e-6, max_iter=20_000).fit(standard[first], y[first])
    assert choice.held[0] == pytest.approx(theirs.score(standard[second], y[second]), abs=0.01)


def test_knn_is_a_weighted_vote():
    """One very close neighbour outvotes two that are farther, and only if the temperature is low."""
    angles = torch.tensor([0.1, 0.6, 0.65])
    bank, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 1, 1])
    query = torch.tensor([[5.0, 0.0]])  # its length does not matter
    assert knn.predict(bank, labels, query, 2, temperature=0.07).item() == 0
    assert knn.predict(bank, labels, query, 2, temperature=1.0).item() == 1
    assert knn.predict(bank, labels, query, 2, k=1, temperature=1.0).item() == 0
    assert knn.predict(bank, labels, query, 2, k=50, temperature=1e-4).item() == 0  # neither overflow nor underflow


def test_the_interval_is_that_of_a_proportion():
    right = torch.arange(2000) % 10 < 7
    score = interval(right[None, None], seed=0)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 2000)
    assert score.accuracy == pytest.approx(0.7)
    assert score.low == pytest.approx(0.7 - half, abs=0.004) and score.high == pytest.approx(0.7 + half, abs=0.004)
    three = interval(torch.stack([right, right.roll(1), right.roll(5)])[:, None], seed=0)
    assert three.accuracy == pytest.approx(0.7) and three.high - three.low < score.high - score.low


# ---- features


@settings(max_examples=300, deadline=None)
@given(channels=st.integers(1, 9000), side=st.integers(1, 300))
def test_the_grid_is_the_largest_of_at_most_4096_numbers(channels, side):
    found = grid(channels, side)
    assert 1 <= found <= side
    assert found == 1 or channels * found**2 <= 4096
    assert found == side or channels * (found + 1) ** 2 > 4096


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet18_small", ["act1", "layer1", "layer2", "layer3", "layer4"]),
        ("test_resnet", ["act1", "layer1", "layer2", "layer3", "layer4"]),
        ("test_vit", [f"blocks.{at}" for at in range(6)]),
        ("vit_tiny_patch16_224", [f"blocks.{at}" for at in range(12)]),
        ("test_convnext", ["stages.0", "stages.1", "stages.2", "stages.3"]),
        ("test_efficientnet", ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4"]),
        ("mobilenetv3_small_050", ["bn1", "blocks.0", "blocks.1", "blocks.3", "blocks.5"]),
    ],
)
def test_stages_are_named_as_timm_names_them_and_the_output_is_the_encoders(name, stages):
    network = encoder(name, 32).eval()
    plan = layout(network)
    assert plan.names == (*stages, "output") and plan.at_once
    assert [network.stage_names[at] for at in plan.stages[:-1]] == stages and plan.stages[-1] is None
    assert plan.stages[:-1] == tuple(range(len(network.stage_names))), "every stage"
    x = torch.rand(3, 3, 32, 32)
    with torch.inference_mode():
        found = describe(network, plan, x, range(len(plan.names)))
        torch.testing.assert_close(found[-1], network(x), atol=1e-5, rtol=1e-4)
        maps = dict(network.stages(x))
        only = describe(network, plan, x, [1])
    assert [tuple(one.shape) for one in found] == [(3, dim) for dim in plan.dims] and max(plan.dims) <= 4096
    torch.testing.assert_close(only[0], found[1])
    for stage, features in zip(stages, found, strict=False):  # a mean of means over equal cells is the mean
        side = round((features.shape[1] / maps[stage].shape[1]) ** 0.5)
        if maps[stage].shape[-1] % side == 0:
            mean = features.view(3, -1, side * side).mean(2)
            torch.testing.assert_close(mean, maps[stage].mean((2, 3)), atol=1e-4, rtol=1e-3)


def test_an_encoder_without_stages_has_its_output_alone():
    network = Encoder(Shrink(), "test_vit2", {}, 16, MEAN, STD).eval()
    plan = layout(network)
    assert plan.names == ("output",) and plan.dims == (48,) and "its output alone" in plan.notes[0]
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(describe(network, plan, x, [0])[0], network(x))
    network.model.feature_info = [{"module": "norm"}]
    network.model.forward_intermediates = lambda x, indices: torch.ones(2) @ torch.ones(3)
    assert "cannot be read" in layout(network).notes[0] and layout(network).names == ("output",)


@settings(max_examples=50, deadline=None)
@given(images=st.integers(1, 10**6), most=st.integers(1, 2**33), count=st.integers(1, 4))
def test_features_are_read_in_parts_that_fit(images, most, count):
    plan = replace(PLAN, dims=(3872, 3872, 3072, 384, 96))
    encoders = [nn.Identity() for _ in range(count)]
    parts = list(readings(encoders, plan, images, most))
    read = [(encoders.index(one), row) for part in parts for one, rows in part for row in rows]
    assert read == [(at, row) for at in range(count) for row in range(5)]
    for part in parts:
        held = [4 * images * plan.dims[row] for _, rows in part for row in rows]
        assert sum(held) <= most or len(held) == 1
    if 4 * images * sum(plan.dims) <= most:
        assert all(len(rows) == 5 for part in parts for _, rows in part), "no encoder is run twice without need"


def test_random_weights_get_the_statistics_of_the_images():
    network = encoder("test_resnet", 32)
    images = torch.randint(256, (96, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    twin, other = (random_twin(network, seed, images, 32) for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(twin.model.conv1[0].weight, other.model.conv1[0].weight)
    assert not any(part.training for part in twin.modules())
    with torch.no_grad():
        first = twin.model.conv1[0](twin.prepare(images / 255))  # what the first normalisation saw
    norm = twin.model.conv1[1]
    torch.testing.assert_close(norm.running_mean, first.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, first.var((0, 2, 3)), atol=1e-3, rtol=1e-2)


def test_the_encoder_is_left_as_it_was():
    network = encoder("test_resnet", 16).train()
    network.model.layer1.eval()
    modes, before = [part.training for part in network.modules()], fingerprint(network)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = run(network, Pictures(np.arange(40) % 2))
    assert report.encoder_hash == before == fingerprint(network)
    assert [part.training for part in network.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_the_hash_sees_parameters_and_buffers():
    network = encoder("test_resnet", 16)
    seen = {fingerprint(network)}
    for change in (network.model.layer1[0].bn1.running_var, network.mean, network.model.conv1[0].weight):
        with torch.no_grad():
            change.view(-1)[0] += 1e-5
        seen.add(fingerprint(network))
    assert len(seen) == 4


def test_an_encoder_that_changes_itself_is_caught(monkeypatch):
    network = Encoder(Shrink(moves=True), "shrink", {}, 16, MEAN, STD)
    monkeypatch.setattr("timm.create_model", lambda name, **arguments: Shrink())
    with pytest.raises(RuntimeError, match="changed while it was probed"):
        run(network, Pictures(np.arange(40) % 2))


def test_features_that_are_not_finite_are_refused():
    network = encoder()
    with torch.no_grad():
        network.model.fc_norm.weight.fill_(torch.nan)
    with pytest.raises(SslpreError, match="not finite") as error:
        run(network, Pictures(np.arange(40) % 2))
    assert error.value.code == 10


# ---- the whole probe


def test_noise_is_worth_chance_and_colour_is_found():
    labels, test_labels = np.arange(300) % 3, np.arange(240) % 3
    blind = run(encoder(), Pictures(labels), Pictures(test_labels, seed=1))
    for row in blind.rows:
        for one in row.scores.values():
            assert one.low - 0.02 <= 1 / 3 <= one.high + 0.02
    assert not any(blind.beats()[LINEAR].values())
    assert blind.chance == pytest.approx(1 / 3)
    assert "not above chance" in blind.verdict()

    seeing = run(encoder(), Pictures(labels, 0.3), Pictures(test_labels, 0.3, seed=1))
    assert score(seeing.last("raw pixels"), "linear").accuracy > 0.95
    assert seeing.beats()[LINEAR]["chance"] and seeing.beats()[KNN]["chance"]
    stages = [f"blocks.{at}" for at in range(8)]
    assert [row.features for row in seeing.rows] == [*stages, "output"] * 2 + ["16x16"]
    assert [row.weights for row in seeing.rows] == ["encoder"] * 9 + ["random weights"] * 9 + ["raw pixels"]
    assert [row.stage for row in seeing.rows] == [*range(8), None] * 2 + [None]
    assert len(set(score(seeing.last("random weights"), "linear").strengths)) == 1, "the first seed's, for all three"
    assert len(score(seeing.last("random weights"), "linear").strengths) == 3


def test_test_labels_choose_nothing_and_kept_views_change_nothing(monkeypatch):
    train, test = Pictures(np.arange(90) % 3, 0.05), Pictures(np.arange(60) % 3, 0.05, seed=1)
    one = run(encoder(), train, test)
    strengths = [score(row, "linear").strengths for row in one.rows]
    assert run(encoder(), train, test).json() == one.json()
    monkeypatch.setattr("sslpre.probe.images.VIEWS", 0)
    monkeypatch.setattr("sslpre.probe.exam.FEATURES", 0)  # one set of features at a time
    assert run(encoder(), train, test).json() == one.json()
    test.labels = test.labels[::-1].copy()
    other = run(encoder(), train, test)
    assert [score(row, "linear").strengths for row in other.rows] == strengths and other.json() != one.json()
    assert other.best == one.best, "the best stage is chosen without them too"


def test_bad_images_are_left_out_with_their_labels():
    labels = np.arange(120) % 2
    train, test = Pictures(labels, 0.6, bad=[0, 1, 63]), Pictures(labels, 0.6, seed=1, bad=[5])
    report = run(encoder(), train, test, max_bad=0.1)
    assert (report.train_images, report.test_images) == (117, 119)
    assert score(report.last("raw pixels"), "knn").accuracy == 1.0  # no image has the label of another
    assert any("4 images could not be read" in note for note in report.warnings)
    with pytest.raises(SslpreError) as error:
        run(encoder(), train, test)
    assert error.value.code == 20


def test_labels_are_matched_by_name():
    names_, counted = ["oak", "elm", "ash"], np.arange(90) % 3
    train = Pictures(counted, 0.6, classes=names_)
    test = Pictures(counted, 0.6, seed=1, classes=["ash", "elm", "yew"])
    test.labels[:6] = -1
    report = run(encoder(), train, test)
    assert score(report.last("raw pixels"), "knn").accuracy == 1.0
    assert report.classes == ("oak", "elm", "ash")
    assert report.unlabelled == 6 and report.test_images == 56
    assert any(note.startswith("28 test images left out") for note in report.warnings)


def test_without_a_test_split_a_fifth_is_held_back(shrunk):
    labels = np.concatenate([np.zeros(50), np.ones(30), -np.ones(7)]).astype(int)
    report = run(shrunk, Pictures(labels, 0.5))
    assert (report.train_images, report.test_images, report.unlabelled) == (64, 16, 7)
    assert report.majority_chance == pytest.approx(10 / 16) and report.chance == report.majority_chance
    assert report.alone.images == 80 and report.chance_of(KNN) == 50 / 80
    unlabelled = Pictures(np.full(9, -1), classes=[])
    assert run(shrunk, Pictures(labels, 0.5), unlabelled).test_images == 16


@pytest.mark.parametrize("labels", [[-1] * 8, [0] * 8, [0, 1]])
def test_no_labels_to_probe_with(labels):
    with pytest.raises(SslpreError) as error:
        run(encoder(), Pictures(labels, classes=["one", "two"]))
    assert error.value.code == 4 and "--data" in error.value.hint


def test_few_images_mean_fewer_neighbours(shrunk):
    report = run(shrunk, Pictures(np.arange(10) % 2, 0.5), linear=False, ks=(5, 20, 200))
    assert report.k == report.train_images == 9 and report.test_images == 10
    assert [question.k for question in report.questions] == [5, 9]
    assert "linear" not in report.json()["rows"][0]
    assert any("k is 9, not 20 or 200" in note for note in report.warnings)


# ---- copies


def test_test_images_that_are_training_images_are_left_out(shrunk):
    train, test = Pictures(np.arange(60) % 2, 0.2), Pictures(np.arange(40) % 2, 0.2, seed=1)
    clean = run(shrunk, train, test, ks=(1,))
    assert clean.duplicates == Duplicates(40, 0, 0) and not any("pixel for pixel" in note for note in clean.warnings)
    with_them = Pictures(np.arange(45) % 2, 0.2, seed=2)
    with_them.pixels[:40] = test.pixels
    with_them.pixels[40:] = train.pixels[40:45]  # with the right labels: they would all be answered right at k = 1
    report = run(shrunk, train, with_them, ks=(1,))
    assert report.duplicates.json() == {"images": 45, "removed": 5, "nearly": 0, "left": 40}
    assert report.test_images == 40
    for mine, theirs in zip(report.rows, clean.rows, strict=True):
        one, other = score(mine, "linear"), score(theirs, "linear")
        assert (one.accuracy, one.low, one.high) == (other.accuracy, other.low, other.high), "as if they were not there"
        near = score(mine, "knn")
        assert near.with_duplicates == pytest.approx((40 * near.accuracy + 5) / 45)
    note = next(note for note in report.warnings if "pixel for pixel" in note)
    assert note.startswith(
        "5 of 45 test images are also training images, pixel for pixel: 40 are left; with them linear"
    )
    assert report.json()["rows"][0]["linear"]["with_duplicates"] >= 0


def test_a_test_split_of_copies_alone_is_refused(shrunk):
    train = Pictures(np.arange(20) % 2)
    with pytest.raises(SslpreError, match="every test image of `in memory` is a training image") as error:
        run(shrunk, train, Pictures(np.arange(20) % 2))
    assert error.value.code == 4


def smooth(labels, seed):
    """Pictures whose perceptual hashes are far apart, and stay when a pixel changes a little."""
    found = Pictures(labels, 0.0, seed, side=32)
    draw = np.random.default_rng(seed)
    for image in found.pixels:
        waves = sum(
            draw.normal() * np.cos(np.pi * (a * np.arange(32)[:, None] + b * np.arange(32)) / 32 + draw.uniform(0, 6))
            for a in range(5)
            for b in range(5)
        )
        image[:] = (127 + 12 * waves[..., None]).clip(0, 255).astype(np.uint8)
    return found


def test_near_duplicates_are_counted_and_named_but_stay(shrunk):
    shrunk.image_size = 32
    train, test = smooth(np.arange(30) % 2, 0), smooth(np.arange(20) % 2, 1)
    test.pixels[4] = train.pixels[7]
    test.pixels[5] = np.clip(train.pixels[8].astype(int) + 2, 0, 255)
    test.pixels[9] = train.pixels[7].astype(int).clip(3, 250)
    test.pixels[9, 0, 0] += 1
    report = run(shrunk, train, test, side=32, linear=False, pairs=True)
    assert report.duplicates == Duplicates(
        20,
        1,
        2,
        (
            ("exact", "in memory/7.png", "in memory/4.png"),
            ("near", "in memory/8.png", "in memory/5.png"),
            ("near", "in memory/7.png", "in memory/9.png"),
        ),
    )
    assert report.test_images == 19 and any("2 of 19 test images nearly equal" in note for note in report.warnings)
    assert "exact  in memory/7.png  in memory/4.png" in report.table().splitlines()
    assert run(shrunk, train, test, side=32, linear=False).duplicates.json()["nearly"] == 2, "not named"


def test_leave_one_out_leaves_copies_out_too(shrunk):
    shrunk.image_size = 32
    whole = smooth(np.arange(40) % 2, 0)
    whole.pixels[30], whole.pixels[31] = whole.pixels[2], whole.pixels[2]
    report = run(shrunk, whole, side=32, linear=False, ks=(1,), pairs=True)
    assert (report.duplicates.images, report.duplicates.removed) == (40, 2)
    assert (report.train_images, report.test_images, report.alone.images) == (37, 38, 38)
    assert len([pair for pair in report.duplicates.pairs if pair[0] == "exact"]) == 2
    assert any("2 of 40 images repeat an earlier one" in note for note in report.warnings)
    assert report.best == {}, "no image is left to choose a stage on"


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_leave_one_out_equals_a_slow_loop(chunk, monkeypatch):
    x, y, _, _, classes = feature_set("tall")
    x, y = x[:80], y[:80]
    monkeypatch.setattr(knn, "CHUNK", chunk * len(x))
    found = knn.votes(x, y, None, classes, (1, 5, 79, 500))
    assert found.shape == (4, 80)
    for row, k in enumerate((1, 5, 79, 79)):
        for i in range(80):
            others = torch.arange(80) != i
            assert found[row, i] == knn.predict(x[others], y[others], x[i : i + 1], classes, k)[0]
    assert torch.equal(found[2], found[3])
    several = knn.votes(x[:60], y[:60], x[60:], classes, (1, 5, 20))
    assert torch.equal(several, torch.stack([knn.predict(x[:60], y[:60], x[60:], classes, k) for k in (1, 5, 20)]))


# ---- shares of the labels


@settings(max_examples=200, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=2, max_size=120),
    share=st.floats(0.1, 100, exclude_min=True),
    seed=st.integers(0, 99),
)
def test_subsets_are_balanced_and_their_draws_disjoint_where_they_can_be(labels, share, seed):
    labels = np.array(labels)
    draws = [subset(labels, share, draw, seed) for draw in range(DRAWS)]
    for one in np.unique(labels):
        own = np.flatnonzero(labels == one)
        taken = [set(rows) & set(own) for rows in draws]
        wanted = max(1, round(share * len(own) / 100))
        assert [len(some) for some in taken] == [wanted] * DRAWS
        if DRAWS * wanted <= len(own):
            assert len(set.union(*taken)) == DRAWS * wanted
    for rows in draws:
        assert all(np.diff(rows) > 0)
    assert np.array_equal(subset(labels, share, 3, seed), draws[3])


def test_subsets_depend_on_the_seed():
    labels = np.arange(400) % 4
    assert not np.array_equal(subset(labels, 10, 0, 0), subset(labels, 10, 0, 1))


def test_a_tenth_of_the_labels_agrees_with_scikit_learn(shrunk):
    labels, test_labels = np.arange(400) % 4, np.arange(200) % 4
    train, test = Pictures(labels, 0.08), Pictures(test_labels, 0.08, seed=1)
    report = run(shrunk, train, test, knn=False, shares=(10, 100))
    tenth, whole = report.last("raw pixels").scores.values()
    x, x_test = ((one.pixels.transpose(0, 3, 1, 2).reshape(len(one), -1) / 255 - 0.45) / 0.226 for one in (train, test))
    theirs = []
    for draw, strength in enumerate(tenth.strengths):
        rows = subset(labels, 10, draw, 0)
        assert np.bincount(labels[rows]).tolist() == [10] * 4
        mean, std = x[rows].mean(0), x[rows].std(0)
        fit = LogisticRegression(C=strength, tol=1e-8, max_iter=20_000).fit((x[rows] - mean) / std, labels[rows])
        theirs.append(fit.score((x_test - mean) / std, test_labels))
    assert tenth.accuracy == pytest.approx(np.mean(theirs), abs=0.01) and tenth.draws == 5
    assert tenth.std == pytest.approx(np.std(theirs, ddof=1), abs=0.01)
    assert 0.3 < tenth.accuracy < whole.accuracy and whole.std is None
    assert report.counts == {10: 40, 100: 400}
    assert [question.key for question in report.questions] == ["linear 10%", "linear"]
    told = report.table()
    assert "linear %, 10 % labels" in told and "10 % 40 images" in told and max(map(len, told.splitlines())) <= 80
    assert "(linear with 10 % of the labels" in report.verdict()


@pytest.mark.parametrize("single", [None, torch.arange(900)])
def test_random_features_are_at_chance(single):
    """Every question, with and without a test split."""
    draw = torch.Generator().manual_seed(3)
    y, y_test = torch.arange(300) % 3, torch.arange(600) % 3
    asked = Asked(True, True, False, (2.0, 10.0, 100.0), (1, 5, 20))
    judge = Judge(y, y_test, 3, asked, seed=0, single=single)
    features = torch.randn(900, 12, generator=draw)
    scores = judge.scores([judge.answers(features[:300], features[300:], scaled=False)])
    assert list(scores) == list(asked.all)
    for question, one in scores.items():
        assert one.low <= 1 / 3 <= one.high, question
        assert one.high - one.low < 0.12


def test_intervals_are_of_draws_too():
    """Draws that are all right or all wrong: the test images say nothing, and still the interval is wide."""
    right = torch.zeros(1, 5, 300, dtype=torch.bool)
    right[0, :2] = True
    found = interval(right, seed=0)
    assert found.accuracy == pytest.approx(0.4) and found.std == pytest.approx(math.sqrt(0.3))
    assert found.low <= 0.01 and found.high >= 0.79


def test_csv_has_a_line_for_every_number(shrunk):
    report = run(shrunk, Pictures(np.arange(60) % 3, 0.3), shares=(10, 100), ks=(1, 5))
    lines = list(csv.DictReader(io.StringIO(report.csv())))
    assert len(lines) == 4 * (len(report.rows) + 1)
    keys = [(line["weights"], line["features"], line["metric"], line["labels_percent"], line["k"]) for line in lines]
    assert len(set(keys)) == len(keys)
    for line in lines:
        assert line["encoder_hash"] == report.encoder_hash and line["classes"] == "3"
        if line["weights"] == "chance":
            assert float(line["mean"]) == pytest.approx(1 / 3, abs=0.03) and line["low"] == ""
            continue
        row = next(r for r in report.rows if (r.weights, r.features) == (line["weights"], line["features"]))
        one = row.scores[Question(line["metric"], float(line["labels_percent"]), int(line["k"] or 0))]
        assert [float(line[key]) for key in ("mean", "low", "high")] == [one.accuracy, one.low, one.high]
        assert line["std"] == ("" if one.std is None else str(one.std))
    trained = {(line["metric"], line["labels_percent"]): line["train_images"] for line in lines}
    assert trained == {("linear", "10"): "6", ("linear", "100"): "48", ("knn", "100"): "59"}
    assert report.csv(head=False) == report.csv().partition("\n")[2]


# ---- finetuning


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(finetune, "LEAST", 4)
    monkeypatch.setattr(finetune, "EPOCHS", 2)
    monkeypatch.setattr(linear, "STRENGTHS", (1.0,))


def test_finetuning_leaves_the_encoder_as_it_was(short, tiny, monkeypatch):
    network = tiny
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    before, grads = torch.get_rng_state(), [p.requires_grad for p in network.parameters()]
    train, test = Pictures(np.arange(40) % 2, 0.4), Pictures(np.arange(20) % 2, 0.4, seed=1)
    trained_on, views = [], probing.Exam.views
    monkeypatch.setattr(
        probing.Exam, "views", lambda exam, index: trained_on.append(tuple(index.tolist())) or views(exam, index)
    )
    arguments = dict(linear=False, knn=False, finetune=True, start=copy.deepcopy(tiny), shares=(50, 100))
    report = run(network, train, test, **arguments)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items()), "BatchNorm's too"
    assert not network.training or all(p.grad is None for p in network.parameters())
    assert [p.requires_grad for p in network.parameters()] == grads
    assert torch.equal(torch.get_rng_state(), before)
    assert [(row.weights, row.features) for row in report.rows] == [
        ("encoder", "output"),
        ("start", "output"),
        ("random weights", "output"),
        ("raw pixels", "16x16"),
    ]
    assert trained_on[:5] == trained_on[5:10] == trained_on[10:15] and len(set(trained_on[:5])) == 5, "one draw each"
    assert [len(rows) for rows in trained_on] == [20] * 15 + [40] * 5
    draws = [[one.draws for one in row.scores.values()] for row in report.rows]
    assert draws == [[5, 1], [5, 1], [5, 3], [5, 1]], "random weights: of every seed one at least"
    assert report.rows[0].scores == report.rows[1].scores, "the same weights, the same batches"
    again = run(network, train, test, **arguments | {"shares": (100,), "start": None})
    assert [row.scores[Question("finetune", 100)] for row in again.rows] == [
        row.scores[Question("finetune", 100)] for row in report.rows if row.weights != "start"
    ], "deterministic"
    assert max(map(len, report.table().splitlines())) <= 80
    assert "finetuned" in report.verdict() and set(report.json()["rows"][0]) >= {"finetune", "finetune 50%"}


def test_finetuning_finds_what_frozen_features_do_not_have(short, monkeypatch, tiny):
    """The network is blind to the one thing that tells the classes apart until its first layer is trained."""
    monkeypatch.setattr(finetune, "LEAST", 60)
    with torch.no_grad():
        tiny.model.first.weight[:, 1:] = 0  # red alone
    train, test = Pictures(np.arange(120) % 2), Pictures(np.arange(80) % 2, seed=1)
    for part in (train, test):
        part.pixels[part.labels == 1, ..., 2] //= 4
    views, others = (torch.from_numpy(part.pixels).permute(0, 3, 1, 2) for part in (train, test))
    tuning = finetune.Tuning(views, torch.from_numpy(train.labels), 2, seed=0)
    tiny.eval()
    frozen = tuning.head(tiny).predict(finetune.encoded(tiny, others))
    tuned = tuning.trained(tiny, tuning.rate(tiny), 0).logits(others).argmax(1)
    assert (frozen.numpy() == test.labels).mean() < 0.7
    assert (tuned.numpy() == test.labels).mean() > 0.9


def test_noise_is_worth_chance_finetuned_too(short, tiny, monkeypatch):
    monkeypatch.setattr(finetune.Tuning, "rate", lambda tuning, encoder: 0.001 if encoder is tiny else 0.01)
    train, test = Pictures(np.arange(90) % 3), Pictures(np.arange(150) % 3, seed=1)
    report = run(tiny, train, test, linear=True, knn=False, finetune=True)
    assert "encoder, finetuned: 0.001 is the last of the rates tried; another may do better" in report.warnings
    assert not any("random weights, finetuned" in note for note in report.warnings)
    raw = report.last("raw pixels").scores
    assert raw[Question("finetune")].accuracy == raw[LINEAR].accuracy, "there is nothing below the classifier"
    for row in report.rows:
        for one in row.scores.values():
            assert one.low - 0.02 <= 1 / 3 <= one.high + 0.02


@settings(max_examples=100, deadline=None)
@given(images=st.integers(2, 300), count=st.integers(1, 40), seed=st.integers(0, 9))
def test_batches_take_every_image_alike(images, count, seed):
    found = finetune.batches(images, count, seed)
    assert len(found) == count and {len(one) for one in found} == {min(finetune.BATCH, images)}
    times = torch.bincount(torch.cat(found), minlength=images)
    assert times.max() - times.min() <= 1
    assert finetune.LEAST <= finetune.steps(images) <= finetune.MOST
    assert finetune.steps(1000 * images * finetune.BATCH) == max(finetune.MOST, 1000 * images)  # an epoch at least


def test_more_images_than_memory_are_refused(monkeypatch, shrunk):
    monkeypatch.setattr(probing, "VIEWS", 10 * 3 * 16 * 16)
    with pytest.raises(SslpreError, match="finetuning on `48` images of 16 px takes more than") as error:
        run(shrunk, Pictures(np.arange(60) % 3), linear=True, knn=False, finetune=True, say=pytest.fail)
    assert error.value.code == 2 and error.value.hint == "--labels 20.8%"


def test_a_share_that_knn_is_not_asked_is_in_the_csv_too(shrunk):
    labels = np.arange(60) % 3
    told = run(shrunk, Pictures(labels), Pictures(labels[:30], seed=9), shares=(10.0,)).csv()
    found = {(row["metric"], row["labels_percent"]) for row in csv.DictReader(io.StringIO(told))}
    assert found == {("linear", "10"), ("knn", "100")}


def test_names_of_copies_are_one_line_whatever_they_are(shrunk):
    labels = np.arange(60) % 3
    report = run(shrunk, Pictures(labels), Pictures(labels[:30], seed=9), linear=False)
    pairs = (("exact", "a\x1b[31m\nb\udcff.png", "c.png"),)
    told = replace(report, duplicates=replace(report.duplicates, pairs=pairs)).table()
    told.encode()
    assert "\x1b" not in told and [line for line in told.splitlines() if line.startswith("exact")] != []


def test_the_quick_interval_of_many_images_is_that_of_drawing_them(monkeypatch):
    right = torch.rand(1, 1, 3000, generator=torch.Generator().manual_seed(0)) < 0.7
    slow = interval(right, 0)
    monkeypatch.setattr("sslpre.probe.judge.MANY", 100)
    quick = interval(right, 0)
    assert (quick.low, quick.high) == pytest.approx((slow.low, slow.high), abs=0.003)


# ---- every stage


class Layers(nn.Module):
    """Stands for a timm model of two stages: the image in 8×8 means, then nothing but its brightness."""

    num_features = 3
    feature_info = ({"module": "early"}, {"module": "late"})

    def forward_intermediates(self, x, indices):
        early = nn.functional.adaptive_avg_pool2d(x, 8)
        late = early.mean((1, 2, 3), keepdim=True).expand(-1, 3, 2, 2)
        return late, [(early, late)[index] for index in indices]

    def forward_head(self, x):
        return x.mean((2, 3))

    def forward(self, x):
        return self.forward_head(self.forward_intermediates(x, [])[0])


class Corners(Pictures):
    """Noise; the label is which corner has a little less of it. Every image is equally bright."""

    def __init__(self, labels, seed=0):
        super().__init__(labels, 0.0, seed)
        for image, label in zip(self.pixels, self.labels, strict=True):
            row, column = 8 * (label // 2), 8 * (label % 2)
            image[row : row + 8, column : column + 8] //= 2
            image[:] = np.clip(image * (110 / image.mean()), 0, 255)


@pytest.fixture
def layers(monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda name, **arguments: Layers())
    return Encoder(Layers(), "layers", {}, 16, MEAN, STD)


def test_a_label_that_an_early_stage_carries_and_the_last_loses(layers):
    labels = np.arange(240) % 4
    report = run(layers, Corners(labels), Corners(labels, seed=1))
    rows = {row.features: row for row in report.rows if row.weights == "encoder"}
    for metric in ("linear", "knn"):
        assert score(rows["early"], metric).accuracy > 0.95
        assert score(rows["late"], metric).high < 0.5 and score(rows["output"], metric).high < 0.5
    assert report.best == {LINEAR: "early", KNN: "early"}
    told = report.verdict()
    assert told.startswith("The encoder's output is not above chance (") or "does not beat" in told
    # what stands for random weights is the same network here: nothing is better than itself
    assert " Its best stage, early, does not beat every stage of random weights or raw pixels (linear and kNN)." in told
    marked = [line for line in report.table().splitlines() if "*[" in line]
    assert len(marked) == 1 and marked[0].startswith("encoder    early (192)") and marked[0].count("*[") == 2
    plain = report.json()
    assert plain["best"] == {"linear": "early", "knn": "early"} and [row["stage"] for row in plain["rows"][:3]] == [
        0,
        1,
        None,
    ]


def test_the_weights_that_training_began_with_have_rows(layers):
    labels = np.arange(80) % 4
    report = run(encoder("test_vit"), Pictures(labels, 0.3), start=encoder("test_vit"))
    groups = list(dict.fromkeys(row.weights for row in report.rows))
    assert groups == ["encoder", "start", "random weights", "raw pixels"]
    mine, began = ([row for row in report.rows if row.weights == name] for name in ("encoder", "start"))
    assert [replace(row, weights="encoder") for row in began] == mine, "the same weights"
    assert (
        report.beats()[Question("knn", k=report.k)]["start"] is False
        and "the weights it began with" in report.verdict()
    )
    with pytest.raises(ValueError, match="of test_vit, not layers"):
        run(layers, Pictures(labels, 0.3), start=encoder("test_vit"))


def test_knn_sees_stages_standardised_and_the_output_as_it_is():
    """One dimension is a thousand times as large as the one that carries the label."""
    draw = torch.Generator().manual_seed(0)
    y, y_test = torch.arange(200) % 2, torch.arange(100) % 2

    def features(labels):
        signal = torch.nn.functional.one_hot(labels, 2) + 0.1 * torch.randn(len(labels), 2, generator=draw)
        return torch.cat([signal, 1000 + 1000 * torch.randn(len(labels), 2, generator=draw)], 1)

    judge = Judge(y, y_test, 2, Asked(False, True, False, (100.0,), (20,)), seed=0)
    train, test = features(y), features(y_test)
    scaled, plain = (judge.answers(train, test, scaled) for scaled in (True, False))
    assert scaled.right[KNN].float().mean() > 0.9 and scaled.held[KNN] > 0.9
    assert plain.right[KNN].float().mean() < 0.7 and plain.held[KNN] < 0.75
    standard = (train - train.mean(0)) / train.std(0, correction=0)
    by_hand = knn.predict(standard, y, (test - train.mean(0)) / train.std(0, correction=0), 2)
    assert ((by_hand == y_test) == scaled.right[KNN][0]).float().mean() >= 0.99
    assert torch.equal(knn.predict(train, y, test, 2) == y_test, plain.right[KNN][0])


def test_the_best_is_chosen_by_what_was_held_out_and_equals_go_to_the_deepest():
    def answers(held, knn_held):
        return Answers(held={LINEAR: held, KNN: knn_held})

    found = [answers(-1.0, 0.7), answers(-0.1, 0.6), answers(-0.9, 0.7)]
    assert best("abc", found) == {LINEAR: "b", KNN: "c"}
    assert best("abc", [answers(0.0, 0.0)] * 3) == {LINEAR: "c", KNN: "c"}
    del found[0].held[LINEAR]
    assert best("abc", found) == {KNN: "c"}, "what not all were asked"


def test_one_image_after_another_is_not_held_twice(monkeypatch):
    """With little memory allowed, no pass has more than one set of features."""
    seen = []
    real = probing.extract
    monkeypatch.setattr(probing, "FEATURES", 1)
    monkeypatch.setattr(
        probing, "extract", lambda wanted, *rest: seen.append([rows for _, rows in wanted]) or real(wanted, *rest)
    )
    run(encoder("test_resnet"), Pictures(np.arange(40) % 2, 0.5), linear=False)
    assert len(seen) == 2 * 6 * 4 and all(len(one) == 1 and len(one[0]) == 1 for one in seen)


# ---- what is printed


NO_COPIES = Duplicates(50_000, 0, 0)


def report_of(*accuracies, metric="both", mark="output"):
    def told(value):
        asked = {LINEAR: (1e-05, 0.00316, 100.0), KNN: ()}
        return {
            question: Score(value, value - 0.02, min(1.0, value + 0.02), strengths)
            for question, strengths in asked.items()
            if metric in (question.metric, "both")
        }

    weights = ("encoder", "encoder", "random weights", "random weights", "raw pixels")
    features = ("features.denseblock3", "output", "features.denseblock3", "output", "32x32")
    rows = tuple(
        Row(name, which, 4096, told(value), stage)
        for name, which, value, stage in zip(weights, features, accuracies, (3, None, 3, None, None), strict=True)
    )
    best = dict.fromkeys(rows[0].scores, mark)
    where = "./a/rather/long/folder/name/that/goes/on/train and ./a/rather/long/folder/name/that/goes/on/test"
    return Report(
        rows, ("a",) * 10, 123_456, 50_000, 0, where, 0.1, 0.12, 20, 0.07, "ab", best, NO_COPIES, {}, ["a note " * 20]
    )


@pytest.mark.parametrize("metric", ["both", "knn"])
@pytest.mark.parametrize("accuracies", [(1.0, 1.0, 1.0, 1.0, 1.0), (0.3, 0.5, 0.2, 0.2, 0.1)])
def test_the_table_fits_80_columns(accuracies, metric):
    lines = report_of(*accuracies, metric=metric, mark="features.denseblock3").table().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("random     ") for line in lines) == 2
    assert [line.count("*[") for line in lines if "*[" in line] == [2 if metric == "both" else 1]
    assert "..nseblock3 (4096)" in lines[2] and "*[" in lines[2]
    assert "12.0" in next(line for line in lines if line.startswith("chance"))
    assert any("k = 20, temperature 0.07" in line for line in lines)


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [
        ((0.1, 0.6, 0.7, 0.4, 0.5), "The encoder beats random weights and raw pixels (linear and kNN)."),
        ((0.9, 0.6, 0.1, 0.57, 0.5), "The encoder beats raw pixels but not random weights (linear and kNN)."),
        ((0.9, 0.4, 0.1, 0.57, 0.5), "The encoder does not beat random weights or raw pixels (linear and kNN)."),
        ((0.9, 0.13, 0.1, 0.07, 0.05), "The encoder is not above chance (linear and kNN)."),
    ],
)
def test_the_verdict_is_about_the_output(accuracies, verdict):
    report = report_of(*accuracies)
    assert report.verdict() == verdict
    assert report.table().endswith(verdict)


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [
        (
            (0.8, 0.3, 0.5, 0.4, 0.5),
            "The encoder's output does not beat random weights or raw pixels (linear and kNN). Its best stage,"
            " features.denseblock3, beats every stage of random weights and raw pixels (linear and kNN).",
        ),
        (
            (0.6, 0.5, 0.58, 0.4, 0.5),  # the same stage of random weights is not enough to beat: 0.58 is every stage's
            "The encoder's output beats random weights but not raw pixels (linear and kNN). Its best stage,"
            " features.denseblock3, beats raw pixels but not every stage of random weights (linear and kNN).",
        ),
        (
            (0.6, 0.5, 0.2, 0.59, 0.5),  # nor another of its stages
            "The encoder's output does not beat random weights or raw pixels (linear and kNN). Its best stage,"
            " features.denseblock3, beats raw pixels but not every stage of random weights (linear and kNN).",
        ),
    ],
)
def test_the_verdict_is_about_the_best_stage_too(accuracies, verdict):
    assert report_of(*accuracies, mark="features.denseblock3").verdict() == verdict


def test_a_best_stage_of_one_metric_is_said_of_that_one():
    report = report_of(0.8, 0.7, 0.5, 0.4, 0.5)
    told = replace(report, best={LINEAR: "output", KNN: "features.denseblock3"}).verdict()
    best = "Its best stage, features.denseblock3, beats every stage of random weights and raw pixels (kNN)."
    assert told.endswith(f"(linear and kNN). {best}")


def test_probes_that_disagree_are_told_apart():
    report = report_of(0.5, 0.6, 0.4, 0.4, 0.5)
    worse = replace(report.rows[1], scores=report.rows[1].scores | {KNN: Score(0.41, 0.39, 0.43)})
    told = replace(report, rows=(report.rows[0], worse, *report.rows[2:])).verdict()
    assert "The encoder beats random weights and raw pixels (linear)" in told
    assert "does not beat random weights or raw pixels (kNN)" in told


def test_json_is_plain(shrunk):
    plain = run(shrunk, Pictures(np.arange(60) % 3, 0.5), Pictures(np.arange(30) % 3, 0.5, seed=1)).json()
    assert json.loads(json.dumps(plain))["schema"] == 2
    assert plain["temperature"] == 0.07 and plain["k"] == 20
    assert set(plain["rows"][0]) == {"weights", "features", "dim", "stage", "linear", "knn", "results"}
    assert plain["best"].keys() == plain["best_beats"].keys() == {"linear", "knn"}
    assert plain["beats"]["linear"].keys() == {"random weights", "raw pixels", "chance"}
