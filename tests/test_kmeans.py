"""k-means against a naive loop and scikit-learn; memory, determinism, empty clusters, and two processes as one."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch.utils._python_dispatch import TorchDispatchMode

from sslpre.ops import kmeans as room
from sslpre.ops import ranks
from sslpre.ops.kmeans import Points, kmeans, split


def cloud(rows=600, width=8, groups=12, seed=0, dtype=torch.float64):
    """Rows about `groups` centres, not well apart."""
    made = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(groups, width, generator=made, dtype=torch.float64)
    about = torch.randint(groups, (rows,), generator=made)
    return (centres[about] + torch.randn(rows, width, generator=made, dtype=torch.float64)).to(dtype)


def naive(x, centroids, iterations, spherical=False):
    """Lloyd's algorithm a row and a cluster at a time; no cluster may get empty."""
    x, centroids = x.double().numpy(), centroids.double().numpy().copy()
    if spherical:
        x, centroids = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (x, centroids))

    def nearest():
        return [min(range(len(centroids)), key=lambda k: ((row - centroids[k]) ** 2).sum()) for row in x]

    for _ in range(iterations):
        labels = nearest()
        for k in range(len(centroids)):
            centroids[k] = x[[i for i, label in enumerate(labels) if label == k]].mean(0)
            if spherical:
                centroids[k] /= np.linalg.norm(centroids[k])
    labels = nearest()
    return np.array(labels), centroids, sum(((x[i] - centroids[k]) ** 2).sum() for i, k in enumerate(labels))


@pytest.mark.parametrize("budget", [1, 4000, 2**24])
@pytest.mark.parametrize("spherical", [False, True])
def test_it_is_the_naive_loop(spherical, budget):
    x = cloud(150)
    found = kmeans(x, 7, x[:7], 5, spherical, budget)
    labels, centroids, inertia = naive(x, x[:7], 5, spherical)
    assert found.labels.tolist() == labels.tolist() and found.iterations == 5
    assert found.sizes.tolist() == np.bincount(labels, minlength=7).tolist()
    assert np.abs(found.centroids.numpy() - centroids).max() < 1e-12
    assert found.inertia == pytest.approx(inertia, rel=1e-12)


@pytest.mark.parametrize("offset", [0.0, 300.0], ids=["about 0", "far from 0"])
@pytest.mark.parametrize("k", [3, 20, 60])  # no cluster gets empty, which each library fills in its own way
def test_inertia_is_scikit_learns_from_the_same_start(k, offset):
    x = cloud(4000, 32, 30, dtype=torch.float32) + offset
    reference = KMeans(k, init=x[:k].numpy(), n_init=1, max_iter=15, tol=0, algorithm="lloyd").fit(x.double().numpy())
    found = kmeans(x, k, x[:k], 15)
    assert found.inertia == pytest.approx(reference.inertia_, rel=1e-4)
    assert (found.labels.numpy() == reference.labels_).mean() > 0.99
    assert found.centroids.dtype == torch.float32 and found.labels.dtype == torch.int64


def test_it_stops_where_no_row_moves_any_more():
    x = cloud(200)
    whole = kmeans(x, 5, x[:5], 1000)
    assert 2 < whole.iterations < 100
    assert kmeans(x, 5, whole.centroids, 1000).iterations == 2
    assert kmeans(x, 5, x[:5], whole.iterations).labels.equal(whole.labels)
    means = torch.stack([x[whole.labels == k].mean(0) for k in range(5)])
    assert torch.allclose(whole.centroids, means, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 6),
    st.integers(0, 10**6),
    st.booleans(),
    st.sampled_from(["random", "k-means++"]),
)
@example(rows=11, width=2, seed=0, spherical=True, start="k-means++")  # many equal centroids, none to be mistaken
def test_whatever_the_points(rows, width, seed, spherical, start):
    """Few distinct points, zeros and equal rows among them: each row has its nearest centroid, the sizes are right."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (rows, width), generator=made).double()
    k = int(torch.randint(1, rows + 1, (), generator=made))
    torch.manual_seed(seed)
    found = kmeans(x, k, start, 12, spherical, budget=500)
    seen = F.normalize(x, dim=1) if spherical else x
    apart = torch.cdist(seen, found.centroids, compute_mode="donot_use_mm_for_euclid_dist")
    assert found.centroids.isfinite().all()
    assert (apart[torch.arange(rows), found.labels] <= apart.amin(1) + 1e-7).all()
    assert found.sizes.tolist() == found.labels.bincount(minlength=k).tolist()
    assert found.inertia == pytest.approx(apart[torch.arange(rows), found.labels].square().sum().item(), abs=1e-9)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor) and not one._is_view():
                self.bytes = max(self.bytes, one.numel() * one.element_size())
        return out


@pytest.mark.parametrize("start", ["random", "k-means++"])
def test_no_tensor_is_larger_than_a_block(start):
    """Neither N × K nor, beside x itself, N × D: what grows with N is a number or two a row."""
    x, k, budget = cloud(3000, 16, dtype=torch.float32), 50, 40_000
    with Largest() as seen:
        kmeans(x, k, start, 3, budget=budget)
    assert 0.5 * budget < seen.bytes <= budget
    assert budget < x.numel() * 4 < 3000 * k * 4
    with Largest() as seen:
        kmeans(x, k, start, 3)
    assert seen.bytes == 3000 * k * 4, "the measure sees the matrix where it does fit"


def test_the_same_call_gives_the_same_bits():
    x = cloud(dtype=torch.float32)
    ends = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ends.append(kmeans(x, 20, iterations=4))
    assert ends[0].centroids.equal(ends[1].centroids) and ends[0].labels.equal(ends[1].labels)
    assert not ends[0].labels.equal(ends[2].labels)


def test_rows_in_another_order_are_the_same_clusters():
    x, order = cloud(), torch.randperm(600)
    one, other = kmeans(x, 9, x[:9]), kmeans(x[order], 9, x[:9])
    assert one.labels[order].equal(other.labels) and torch.allclose(one.centroids, other.centroids, atol=1e-12)
    assert one.inertia == pytest.approx(other.inertia, rel=1e-12)


def test_spherical_centroids_have_length_one_and_scale_does_not_matter():
    x = cloud()
    found = kmeans(x, 9, x[:9], spherical=True)
    assert torch.allclose(found.centroids.norm(dim=1), torch.ones(9, dtype=torch.float64), atol=1e-12)
    assert found.labels.equal((F.normalize(x, dim=1) @ found.centroids.T).argmax(1))
    longer = x * torch.logspace(-3, 3, len(x), dtype=torch.float64)[:, None]
    assert kmeans(longer, 9, x[:9], spherical=True).labels.equal(found.labels)


def test_of_equal_distances_the_lowest_cluster_has_it():
    x = torch.tensor([[0.0], [2.0], [-2.0]])
    found = kmeans(x, 3, torch.tensor([[1.0], [-1.0], [1.0]]), iterations=0)
    assert found.labels.tolist() == [0, 0, 1]
    x, spot = cloud(500, 7, dtype=torch.float32), torch.randint(3, (200,))
    found = kmeans(x, 200, x[:3][spot], 0)  # of equal centroids too, wherever they stand in a matrix product
    assert {int(label) for label in found.labels} == {spot.tolist().index(which) for which in range(3)}


def test_an_empty_cluster_takes_half_of_the_largest():
    x = torch.cat([cloud(300, groups=1), cloud(40, groups=1) + 50, cloud(20, groups=1) - 50])
    far = torch.full((1, 8), 1e3, dtype=torch.float64)
    start = torch.stack([x[:300].mean(0), x[300:340].mean(0), x[340:].mean(0)])
    assert kmeans(x, 4, torch.cat([start, far]), 0).sizes.tolist() == [300, 40, 20, 0]
    found = kmeans(x, 4, torch.cat([start, far]), 20)
    assert found.labels[300:].unique().tolist() == [1, 2] and found.labels[:300].unique().tolist() == [0, 3]
    assert found.sizes.min() > 15
    many = kmeans(x, 12, torch.cat([start, far + torch.arange(9)[:, None]]), 20)
    assert (many.sizes > 0).all() and many.inertia < found.inertia


def test_a_cluster_is_split_as_often_as_it_stays_the_largest():
    """Sixteen rows and three empty clusters: of 16, of 8 and 8, and of 8, 4 and 4, always the largest."""
    x = cloud(20, groups=1)
    points = Points.of(x, 5, False, 0)
    labels = torch.tensor([0] * 16 + [1] * 4)
    sizes = torch.tensor([16, 4, 0, 0, 0])
    begun = torch.zeros(5, 8, dtype=x.dtype)
    begun[0], begun[1] = points.seen(x[:16]).mean(0), points.seen(x[16:]).mean(0)
    found = split(points, begun, sizes, labels)
    near = (found - begun[0]).abs().amax(1) < 0.1
    assert near.tolist() == [True, False, True, True, True] and torch.equal(found[1], begun[1])
    assert len(found.unique(dim=0)) == 5


def test_a_cluster_of_equal_rows_is_never_split():
    """However large: which of its halves they went to would be chance."""
    x = torch.cat([torch.ones(30, 8, dtype=torch.float64), cloud(6, groups=1) - 5])
    points = Points.of(x, 3, False, 0)
    labels = torch.tensor([0] * 30 + [1] * 6)
    begun = torch.zeros(3, 8, dtype=x.dtype)
    begun[0], begun[1] = points.seen(x[:30]).mean(0), points.seen(x[30:]).mean(0)
    found = split(points, begun, torch.tensor([30, 6, 0]), labels)
    assert torch.equal(found[0], begun[0]) and (found[2] - begun[1]).abs().max() < 0.1


def test_rows_that_are_not_finite_are_refused():
    for odd in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="not finite"):
            kmeans(torch.tensor([[0.0], [1.0], [odd]]), 2)


def test_where_distinct_points_are_fewer_clusters_stay_empty():
    x = torch.eye(3).repeat_interleave(5, 0)
    for start in ("random", "k-means++"):
        found = kmeans(x, 6, start)
        assert (found.sizes > 0).sum() == 3 and found.inertia == pytest.approx(0, abs=1e-10)
        assert found.centroids.isfinite().all() and found.iterations < 20
    assert kmeans(x[:5], 3).sizes.tolist() == [5, 0, 0]


def test_kmeans_plus_plus_draws_by_squared_distance():
    """Two draws of four points on a line: the second is drawn with D² of what it is from the first."""
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    points = room.Points.of(x, 2, False, 100)
    counts = torch.zeros(4, 4)
    draws = 6000
    for _ in range(draws):
        a, b = (int((x[:, 0] - (c + points.shift)).abs().argmin()) for c in room.far_apart(points, 2))
        counts[a, b] += 1
    squared = (x - x.T).square()
    expected = (squared / squared.sum(1, keepdim=True) / 4).float()
    assert (counts / draws - expected).abs().max() < 4 * (0.25 / draws) ** 0.5
    assert counts.diagonal().sum() == 0


def test_kmeans_plus_plus_finds_groups_that_are_far_apart():
    x = torch.randn(300, 5, dtype=torch.float64) + 1000 * torch.arange(30).repeat_interleave(10)[:, None]
    found = kmeans(x, 30, "k-means++", 0, budget=3000)
    assert sorted(found.sizes.tolist()) == [10] * 30
    assert len({int(label) for label in found.labels}) == 30


@given(st.integers(1, 50), st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_both_ways_of_summing_are_the_same(rows, k, seed):
    made = torch.Generator().manual_seed(seed)
    block, labels = torch.randn(rows, 3, generator=made), torch.randint(k, (rows,), generator=made)
    sums = torch.ones(k, 3)
    expected = torch.stack([1 + block[labels == one].double().sum(0) for one in range(k)])
    for add in (room.add_up, room.add_segments):
        found = sums.clone()
        add(found, block, labels)
        assert torch.allclose(found.double(), expected, atol=1e-5)


def test_half_precision_is_summed_in_fp32():
    x = cloud(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = kmeans(x, 9, x[:9])
    assert found.centroids.dtype == torch.float32
    assert found.labels.equal(kmeans(x.float(), 9, x[:9].float()).labels)


def test_what_cannot_be_clustered_is_refused():
    x = cloud(5)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"{k} clusters of 5 rows"):
            kmeans(x, k)
    with pytest.raises(ValueError, match=r"shape \(2, 8\) for 3 clusters of 8 numbers"):
        kmeans(x, 3, x[:2])
    with pytest.raises(ValueError, match="no start `best`"):
        kmeans(x, 3, "best")


WAYS = list(itertools.product(["random", "k-means++"], [False, True], [(601, 30), (5, 2), (40, 40)]))


def in_share():
    """In each process: the results of every way, and how many rows it had of the first."""
    told = []
    for start, spherical, (rows, k) in WAYS:
        torch.manual_seed(7)
        x = cloud(rows)
        x[: rows // 3] = x[0]  # equal rows, so that clusters get empty and are split
        found = kmeans(x, k, start, 6, spherical, budget=5000)
        told.append((found.labels.numpy(), found.centroids.numpy(), found.sizes.numpy(), found.inertia))
    return told, len(room.Points.of(cloud(601), 30, False, 5000).mine)


def test_two_processes_are_one(pair):
    one, whole = in_share()
    (first, some), (second, others) = pair.run(in_share)
    assert ranks.world() == 1 and whole == some + others == 601 and min(some, others) == 300
    for expected, *parts in zip(one, first, second, strict=True):
        for part in parts:
            assert np.array_equal(part[0], expected[0]) and np.array_equal(part[2], expected[2])
            assert np.abs(part[1] - expected[1]).max() < 1e-12 and part[3] == pytest.approx(expected[3], rel=1e-12)
