"""The probe: held to scikit-learn on the same features, to what is known of its baselines, and to leaving no trace."""

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
from sslpre.probe import Report, Row, Score, interval, knn, linear, probe
from sslpre.probe.features import describe, fingerprint, names, random_twin

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
    mine = linear.search(x, y, classes, seed=0)
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
    narrow = linear.search(x, y, classes, 0)
    wide = linear.search(torch.cat([x, torch.zeros(len(x), 400)], 1), y, classes, 0)
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
    assert linear.search(noisy, y, 4, 0).strength <= 0.1 < linear.search(clean, y, 4, 0).strength


def test_one_image_per_class_leaves_nothing_to_choose_on():
    fit = linear.search(torch.eye(5), torch.arange(5), 5, 0)
    assert fit.strength == 1.0
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
    score = interval(right[None], seed=0)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 2000)
    assert score.accuracy == pytest.approx(0.7)
    assert score.low == pytest.approx(0.7 - half, abs=0.004) and score.high == pytest.approx(0.7 + half, abs=0.004)
    three = interval(torch.stack([right, right.roll(1), right.roll(5)]), seed=0)
    assert three.accuracy == pytest.approx(0.7) and three.high - three.low < score.high - score.low


# ---- features


@pytest.mark.parametrize("name", ["resnet18_small", "test_resnet", "test_vit2", "test_convnext"])
def test_the_last_features_are_the_encoders_output(name):
    network = encoder(name, 32).eval()
    with torch.inference_mode():
        x = torch.rand(3, 3, 32, 32)
        found = describe(network, x)
        torch.testing.assert_close(found[-1], network(x))
    assert len(found) == len(names(network)) == (4 if "resnet" in name else 1)
    assert found[-1].shape == (3, network.dim)


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
    network = Encoder(Shrink(moves=True), "test_vit2", {"img_size": 16, "dynamic_img_size": True}, 16, MEAN, STD)
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
        for score in (row.linear, row.knn):
            assert score.low - 0.02 <= 1 / 3 <= score.high + 0.02
    assert not any(blind.beats()["linear"].values())
    assert blind.chance == pytest.approx(1 / 3)
    assert "not above chance" in blind.verdict()

    seeing = run(encoder(), Pictures(labels, 0.3), Pictures(test_labels, 0.3, seed=1))
    assert seeing.last("raw pixels").linear.accuracy > 0.95
    assert seeing.beats()["linear"]["chance"] and seeing.beats()["knn"]["chance"]
    assert [row.weights for row in seeing.rows] == ["encoder", "random weights", "raw pixels"]
    assert len(seeing.last("random weights").linear.strengths) == 3


def test_test_labels_choose_nothing_and_kept_views_change_nothing(monkeypatch):
    train, test = Pictures(np.arange(90) % 3, 0.05), Pictures(np.arange(60) % 3, 0.05, seed=1)
    one = run(encoder(), train, test)
    strengths = [row.linear.strengths for row in one.rows]
    assert run(encoder(), train, test).json() == one.json()
    monkeypatch.setattr("sslpre.probe.MEMORY", 0)
    assert run(encoder(), train, test).json() == one.json()
    test.labels = test.labels[::-1].copy()
    other = run(encoder(), train, test)
    assert [row.linear.strengths for row in other.rows] == strengths and other.json() != one.json()


def test_bad_images_are_left_out_with_their_labels():
    labels = np.arange(120) % 2
    train, test = Pictures(labels, 0.6, bad=[0, 1, 63]), Pictures(labels, 0.6, seed=1, bad=[5])
    report = run(encoder(), train, test, max_bad=0.1)
    assert (report.train_images, report.test_images) == (117, 119)
    assert report.last("raw pixels").knn.accuracy == 1.0  # no image has the label of another
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
    assert report.last("raw pixels").knn.accuracy == 1.0
    assert report.classes == ("oak", "elm", "ash")
    assert report.unlabelled == 6 and report.test_images == 56
    assert any(note.startswith("28 test images left out") for note in report.warnings)


def test_without_a_test_split_a_fifth_is_held_back():
    labels = np.concatenate([np.zeros(50), np.ones(30), -np.ones(7)]).astype(int)
    report = run(encoder(), Pictures(labels, 0.5))
    assert (report.train_images, report.test_images, report.unlabelled) == (64, 16, 7)
    assert report.majority_chance == pytest.approx(10 / 16) and report.chance == report.majority_chance
    unlabelled = Pictures(np.full(9, -1), classes=[])
    assert run(encoder(), Pictures(labels, 0.5), unlabelled).test_images == 16


def test_test_images_that_are_training_images_are_counted():
    train, test = Pictures(np.arange(60) % 2), Pictures(np.arange(12) % 2, seed=1)
    assert not any("pixel for pixel" in note for note in run(encoder(), train, test, linear=False).warnings)
    test.pixels[3:8] = train.pixels[40:45]
    warnings = run(encoder(), train, test, linear=False).warnings
    assert any("5 of 12 test images are also training images" in note for note in warnings)


@pytest.mark.parametrize("labels", [[-1] * 8, [0] * 8, [0, 1]])
def test_no_labels_to_probe_with(labels):
    with pytest.raises(SslpreError) as error:
        run(encoder(), Pictures(labels, classes=["one", "two"]))
    assert error.value.code == 4 and "--data" in error.value.hint


def test_few_images_mean_fewer_neighbours():
    report = run(encoder(), Pictures(np.arange(10) % 2, 0.5), linear=False)
    assert report.k == report.train_images == 8
    assert report.rows[0].linear is None and "linear" not in report.json()["rows"][0]
    assert any("k is 8, not 20" in note for note in report.warnings)


# ---- what is printed


def report_of(*accuracies, metric="both"):
    def score(value, strengths=()):
        return Score(value, value - 0.02, min(1.0, value + 0.02), strengths)

    weights = ("encoder", "encoder", "random weights", "random weights", "raw pixels")
    rows = tuple(
        Row(name, "layer4", 2048, score(value, (1e-05, 0.00316, 100.0)) if metric != "knn" else None, score(value))
        for name, value in zip(weights, accuracies, strict=True)
    )
    where = "./a/rather/long/folder/name/that/goes/on/train and ./a/rather/long/folder/name/that/goes/on/test"
    return Report(rows, ("a",) * 10, 123_456, 50_000, 0, where, 0.1, 0.12, 20, 0.07, "ab", ["a note " * 20])


@pytest.mark.parametrize("metric", ["both", "knn"])
@pytest.mark.parametrize("accuracies", [(1.0, 1.0, 1.0, 1.0, 1.0), (0.3, 0.5, 0.2, 0.2, 0.1)])
def test_the_table_fits_80_columns(accuracies, metric):
    lines = report_of(*accuracies, metric=metric).table().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("random weights") for line in lines) == 2
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


def test_probes_that_disagree_are_told_apart():
    report = report_of(0.5, 0.6, 0.4, 0.4, 0.5)
    worse = replace(report.rows[1], knn=Score(0.41, 0.39, 0.43))
    told = replace(report, rows=(report.rows[0], worse, *report.rows[2:])).verdict()
    assert "beats random weights and raw pixels (linear)" in told
    assert "does not beat random weights or raw pixels (kNN)" in told


def test_json_is_plain():
    plain = run(encoder(), Pictures(np.arange(60) % 3, 0.5)).json()
    assert json.loads(json.dumps(plain))["schema"] == 1
    assert plain["temperature"] == 0.07 and plain["k"] == 20
    assert set(plain["rows"][0]) == {"weights", "features", "dim", "linear", "knn"}
    assert plain["beats"]["linear"].keys() == {"random weights", "raw pixels", "chance"}
