"""DeepCluster: what the features become before they are clustered, the pseudo-labels, their weights, and the loss."""

import dataclasses
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.metrics import homogeneity_score, normalized_mutual_info_score
from torch import nn

from sslpre.contract import single
from sslpre.contract.single import start as begin
from sslpre.errors import SslpreError
from sslpre.methods.deepcluster import DeepCluster, balanced, mutual_information, whitened
from sslpre.objective import Batch, Epoch, Setup
from sslpre.ops.kmeans import kmeans
from sslpre.train import loop


class Corners(nn.Module):
    """An encoder whose features are the means of the four quarters of each channel."""

    dim = 12

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def method_of(images=24, encoder=None, **arguments):
    mean = torch.zeros(3)
    asked = []
    setup = Setup(images, None, 8, (8,), mean, mean + 1, lambda *how: asked.append(how) or encoder or Corners())
    method = DeepCluster(setup, **arguments).double()
    method.asked = asked
    return method


def batch_of(x, index=None):
    index = torch.arange(len(x)) if index is None else index
    return Batch([x], index, torch.full((len(x),), -1), 0.0, 0, 0)


def groups(images=24, kinds=4, seed=0):
    """Images of `kinds` kinds, which the quarters tell apart, in turns."""
    made = torch.Generator().manual_seed(seed)
    kind = torch.rand(kinds, 3, 2, 2, generator=made, dtype=torch.float64)[torch.arange(images) % kinds]
    large = kind.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return (large + 0.01 * torch.randn(large.shape, generator=made, dtype=torch.float64)).clamp(0, 1)


def start(method, images, number=0):
    return method.epoch_start(Epoch(number, lambda f: f(images)))


def test_loss_is_the_weighted_mean_over_images():
    """Equation 1, a loop a line: −log softmax of its cluster, times N / (clusters used · size of its cluster)."""
    method, x = method_of(clusters=5), torch.rand(6, 3, 8, 8, dtype=torch.float64)
    assigned = [0, 1, 1, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0]  # nobody in 2 and 4
    method.assignments.copy_(torch.tensor(assigned))
    method.weights.copy_(balanced(method.sizes.double()))
    index = torch.tensor([20, 3, 1, 0, 2, 9])
    total = 0.0
    for image, place in zip(x, index.tolist(), strict=True):
        features = method.encoder(image[None])[0]
        scores = [
            float(row @ features + b)
            for row, b in zip(method.head.weight.detach(), method.head.bias.detach(), strict=True)
        ]
        cluster = assigned[place]
        weight = 24 / (3 * assigned.count(cluster))
        total += weight * -math.log(math.exp(scores[cluster]) / sum(map(math.exp, scores)))
    assert method.loss(batch_of(x, index)).value.item() == pytest.approx(total / 6, abs=1e-12)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60))
@settings(deadline=None)
def test_weights_have_mean_one_and_every_used_cluster_the_same_sum(assigned):
    """As if images were drawn by first drawing a cluster, all clusters alike (section 3.3)."""
    labels = torch.tensor(assigned)
    weights = balanced(labels.bincount(minlength=10).double())
    assert weights[labels].mean().item() == pytest.approx(1)
    sums = torch.zeros(10, dtype=torch.float64).index_add_(0, labels, weights[labels])
    used = labels.unique()
    assert torch.allclose(sums[used], torch.tensor(len(assigned) / len(used), dtype=torch.float64))
    assert weights.isfinite().all() and weights.count_nonzero() == len(used)


def test_no_answer_that_is_the_same_for_all_loses_less_than_chance():
    """Over all images: ln of the clusters that are used, whatever their sizes; ln K where all are."""
    method = method_of(clusters=6)
    assert method.chance == pytest.approx(math.log(6))
    method.assignments.copy_(torch.tensor([0] * 15 + [2] * 6 + [3] * 2 + [5]))
    method.weights.copy_(balanced(method.sizes.double()))
    assert method.chance == pytest.approx(math.log(4))
    x = torch.rand(24, 3, 8, 8, dtype=torch.float64)
    nn.init.zeros_(method.head.weight)
    nn.init.zeros_(method.head.bias)
    assert method.loss(batch_of(x)).value.item() == pytest.approx(math.log(6)), "a head that knows nothing yet"
    with torch.no_grad():
        method.head.bias[[1, 4]] = -50.0
    assert method.loss(batch_of(x)).value.item() == pytest.approx(method.chance)
    with torch.no_grad():
        method.head.bias += torch.randn(6, dtype=torch.float64)
    assert method.loss(batch_of(x)).value.item() > method.chance


def test_an_epoch_begins_with_clusters_of_what_looks_alike_and_a_new_classifier():
    method, images = method_of(48, clusters=12, components=3), groups(48)
    nn.init.constant_(method.head.weight, 7.0)
    assert start(method, images) == [method.head]
    assert homogeneity_score(torch.arange(48) % 4, method.assignments) == pytest.approx(1)
    assert method.assignments.unique(return_counts=True)[1].tolist() == method.sizes.tolist()
    assert torch.allclose(method.weights, 48 / 12 / method.sizes.double())
    assert method.head.bias.abs().sum() == 0 and 0.005 < method.head.weight.std() < 0.02
    before, weight = method.assignments.clone(), method.head.weight.clone()
    torch.manual_seed(5)
    start(method, images, 1)
    assert not method.assignments.equal(before), "the numbers of clusters mean nothing"
    assert not method.head.weight.equal(weight)
    same = normalized_mutual_info_score(before, method.assignments, average_method="geometric")
    assert method.notes()["nmi"] == pytest.approx(same) and 0.5 < same < 1


@pytest.mark.parametrize(("asked", "images", "every"), [(1, 24, 1), (3, 24, 3), (0, 3000, 3), (0, 20_000, 1)])
def test_clusters_last_for_as_many_epochs_as_asked(asked, images, every):
    method = method_of(images, clusters=4, reassign=asked)
    looks = []

    def look(f):
        looks.append(f)
        return torch.rand(images, 12, dtype=torch.float64)

    for number in range(7):
        before = method.assignments.clone()
        method.head.weight.data.fill_(2.0)
        again = method.epoch_start(Epoch(number, look))
        if number % every:
            assert again == [] and method.notes() == {} and method.assignments.equal(before)
            assert (method.head.weight == 2).all(), "the classifier goes on"
        else:
            assert again == [method.head] and (method.head.weight != 2).all()
            assert ("nmi" in method.notes()) == (number > 0)
    assert len(looks) == -(-7 // every)


def test_notes_leave_out_what_is_not_known_and_count_clusters_by_size():
    method = method_of(clusters=9)
    assert method.notes() == {"clusters": 9, "sizes": [0, 0, 9]}  # 24 images: 2 or 3 each
    method.assignments.copy_(torch.tensor([0] * 16 + [1] * 4 + [2, 2, 3, 4]))
    assert method.notes() == {"clusters": 5, "sizes": [4, 2, 1, 1, 0, 1]}
    start(method, groups())
    assert "nmi" not in method.notes()  # no epoch before the first
    start(method, groups(seed=1), 1)
    assert 0 < method.notes()["nmi"] < 1


def test_before_the_first_epoch_there_are_assignments_and_they_are_balanced():
    method = method_of(images=10, clusters=4)
    assert method.assignments.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert method.weights[method.assignments].mean().item() == pytest.approx(1)
    assert method.loss(batch_of(torch.rand(10, 3, 8, 8, dtype=torch.float64))).value.isfinite()


def test_what_survives_is_in_buffers():
    method, images = method_of(clusters=4), groups()
    start(method, images)
    start(method, images, 1)
    other = method_of(clusters=4)
    other.load_state_dict(method.state_dict())
    assert other.notes() == method.notes() and other.chance == method.chance
    assert other.loss(batch_of(images)).value.equal(method.loss(batch_of(images)).value)


def test_whitening_is_scikit_learns_then_rows_have_length_one():
    x = torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + 5
    found = whitened(x, 7)
    expected = PCA(7, whiten=True, svd_solver="full").fit_transform(x.numpy())
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    cosines = found @ found.T  # the axes may point either way, and in another order
    assert np.abs(cosines.numpy() - expected @ expected.T).max() < 1e-10
    assert torch.allclose(found.norm(dim=1), torch.ones(500, dtype=torch.float64))


def test_directions_of_rounding_are_not_blown_up():
    """A dimension that is always the same, and one that another holds already, say nothing."""
    x = torch.randn(400, 3)
    wide = torch.cat([x, x[:, :1] + x[:, 1:2], torch.full((400, 1), 0.3)], 1)
    cosines = whitened(wide, 5) @ whitened(wide, 5).T
    again = whitened(wide + 1e-7 * torch.randn(400, 5), 5)
    assert (again @ again.T - cosines).abs().max() < 1e-3
    nothing = whitened(torch.full((20, 4), 0.5), 3)
    assert nothing.shape == (20, 3) and nothing.abs().max() == 0


def test_features_that_are_all_the_same_are_one_cluster():
    method = method_of(clusters=4)
    start(method, torch.full((24, 3, 8, 8), 0.5, dtype=torch.float64))
    assert method.notes()["clusters"] == 1 and method.chance == 0
    assert method.weights[method.assignments].mean().item() == pytest.approx(1)


def test_components_leave_several_images_to_each_direction():
    assert [method_of(images).components for images in (8, 24, 80, 96, 1000)] == [1, 3, 10, 12, 12]
    assert method_of(1000, components=5).components == 5


def test_clusters_follow_the_number_of_images_where_they_are_left_open():
    assert [method_of(images).clusters for images in (1, 2, 40, 400, 4000)] == [1, 2, 2, 10, 100]
    assert method_of(24, clusters=24).clusters == 24
    with pytest.raises(SslpreError, match="`24` images cannot be in `25` clusters") as refused:
        method_of(24, clusters=25)
    assert refused.value.code == 2 and "method.clusters" in refused.value.hint


def test_features_that_are_not_finite_end_the_run():
    method = method_of()
    with pytest.raises(SslpreError, match="not finite at the start of epoch 3") as refused:
        method.epoch_start(Epoch(2, lambda f: torch.full((24, 12), torch.nan)))
    assert refused.value.code == 10


@given(st.integers(1, 80), st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
@settings(deadline=None)
def test_mutual_information_is_scikit_learns(count, a, b, seed):
    made = torch.Generator().manual_seed(seed)
    one, two = torch.randint(a, (count,), generator=made), torch.randint(b, (count,), generator=made)
    if seed % 3 == 0:
        two = (one + two.clamp(max=1)) % b
    expected = normalized_mutual_info_score(one, two, average_method="geometric")
    if len(one.unique()) > 1 and len(two.unique()) > 1:
        assert mutual_information(one, two) == pytest.approx(expected, abs=1e-9)
    assert mutual_information(one, one) == pytest.approx(1)


def test_clusters_are_those_of_20_iterations():
    method, x = method_of(images=200, clusters=12), torch.rand(200, 3, 8, 8, dtype=torch.float64)
    z = whitened(Corners()(x), method.components)
    found = {}
    for iterations in (1, 20):
        torch.manual_seed(5)
        found[iterations] = kmeans(z, 12, iterations=iterations).labels
    assert not torch.equal(found[1], found[20])
    torch.manual_seed(5)
    start(method, x)
    assert torch.equal(method.assignments, found[20])


def test_sobel_asks_for_edges():
    assert method_of().asked == [("rgb", None)] and method_of(sobel=True).asked == [("sobel", None)]


def test_pictures_are_rows_of_one_cluster_each():
    method, x = method_of(clusters=3), torch.rand(20, 3, 8, 8, dtype=torch.float64)
    method.assignments[:20] = torch.tensor([2] * 3 + [0] * 12 + [1] * 5)
    rows = method.pictures(batch_of(x))
    assert [(len(row), {one.title for one in row}) for row in rows] == [
        (8, {"cluster 0"}),
        (5, {"cluster 1"}),
        (3, {"cluster 2"}),
    ]
    assert rows[2][1].image.equal(x[1]) and rows[0][0].image.equal(x[3])


def test_softmax_is_fp32_under_autocast():
    method, x = method_of().float(), torch.rand(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(dataclasses.replace(batch_of(x))).value
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("reassign", [1, 2])
@pytest.mark.parametrize("stops", [[4], [1, 4, 6, 9]], ids=["once", "four times"])
def test_resume_is_exact_where_clusters_are_made_again(stops, reassign, tmp_path, monkeypatch):
    """At each epoch, and at every second, whose clusters the epoch after it goes on with. The recipe would cluster so
    few images only once."""
    monkeypatch.setattr(single, "recipe_of", partial(single.recipe_of, method={"reassign": reassign}))
    single.test_resume_mid_epoch_is_exact("deepcluster", stops, tmp_path, monkeypatch)


def test_metrics_tell_of_each_epochs_clusters(tmp_path):
    """Through a whole run: NMI from the second epoch on."""
    run = begin("deepcluster", tmp_path, 80, train={"epochs": 3}, method={"reassign": 1})
    loop.train(run)
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    notes = [line for line in told if "sizes" in line]
    assert [(line["epoch"], line["step"], "nmi" in line) for line in notes] == [
        (0, 1, False),
        (1, 11, True),
        (2, 21, True),
    ]
    assert all(0 <= line["nmi"] <= 1 for line in notes[1:])
