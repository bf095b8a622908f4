"""k-means, block by block: the N × K matrix of distances is never there as a whole.

Lloyd, "Least Squares Quantization in PCM", 1982, https://doi.org/10.1109/TIT.1982.1056489; the careful start is
Arthur, Vassilvitskii, "k-means++: The Advantages of Careful Seeding", 2007, https://doi.org/10.5555/1283383.1283494;
the spherical kind Dhillon, Modha, "Concept Decompositions for Large Sparse Text Data Using Clustering", 2001,
https://doi.org/10.1023/A:1007612920971.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sslpre.ops import ranks

CACHED, LARGE = 8 * 2**20, 256 * 2**20  # bytes of a block: of a CPU it should stay near, a GPU wants few large ones
NUDGE = 1 / 1024  # of the points' spread, by which the halves of a split cluster are moved apart; faiss has the same


@dataclass(frozen=True)
class Clusters:
    """What `kmeans` found: K centroids [K, D]; of each of N rows its nearest, int64 [N]; how many rows each has [K]."""

    centroids: Tensor
    labels: Tensor
    sizes: Tensor
    inertia: float  # the sum of squared distances between rows and their centroids
    iterations: int  # that were taken


@torch.no_grad()
def kmeans(
    x: Tensor,
    clusters: int,
    start: Literal["random", "k-means++"] | Tensor = "random",
    iterations: int = 20,
    spherical: bool = False,
    budget: int = 0,
) -> Clusters:
    """K = `clusters` clusters of the rows of x [N, D], on its device, in fp32 (fp64 stays fp64).

    start: K different rows, drawn alike or, slower by as much as an iteration, far from each other; or centroids
    [K, D]. It and whatever splits a cluster draw from torch's global generator. iterations: at most; fewer where no
    row moves any more. spherical: rows and centroids have length 1, and the largest cosine is the nearest. budget:
    bytes that a block of rows may take with its distances, and at least one row; 0: what suits the device.

    Of several processes each has all rows of x, and the same generator; they share the work, and all have the result,
    which is that of one process but for rounding. The same call gives the same bits on the same device: sums are made
    in the order of rows (see `add_up`), and of equal distances or centroids the lowest has the row. An empty cluster
    takes half of the largest one; where different rows are fewer than K, clusters are left empty.
    Raises ValueError for more clusters than rows, for rows that are not finite, and for a start of another shape.
    """
    if not 1 <= clusters <= len(x):
        raise ValueError(f"{clusters} clusters of {len(x)} rows")
    if not x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite():
        raise ValueError("rows that are not finite")
    with torch.autocast(x.device.type, enabled=False):
        points = Points.of(x, clusters, spherical, budget)
        centroids = begin(points, clusters, start)
        labels = torch.full((len(points.mine),), -1, device=x.device)
        taken, moved = 0, True
        while moved and taken < iterations:
            sums, sizes, moved = lloyd(points, centroids, labels)
            centroids = means(centroids, sums, sizes, spherical)
            if moved:
                centroids = split(points, centroids, sizes, labels)
            taken += 1
        inertia = x.new_zeros((), dtype=torch.float32 if x.device.type == "mps" else torch.float64)
        half = halves(centroids)
        for rows, block in points.blocks():
            labels[rows] = nearest(block, centroids, half)
            inertia += (block - centroids[labels[rows]]).square().sum()
    whole = torch.zeros(len(x), dtype=labels.dtype, device=x.device)
    whole[points.mine.start : points.mine.stop] = labels
    whole = ranks.total(whole)
    sizes = whole.bincount(minlength=clusters)
    return Clusters(centroids + points.shift, whole, sizes, ranks.total(inertia).item(), taken)


@dataclass(frozen=True)
class Points:
    """The rows of x as the algorithm sees them: about their mean, or of length 1; this process's, a block at a time."""

    x: Tensor
    shift: Tensor  # [D], taken off: far from the origin |x|² − 2 x·c + |c|² would lose its digits; 0 where spherical
    spherical: bool
    mine: range  # this process's
    rows: int  # in a block

    @classmethod
    def of(cls, x: Tensor, clusters: int, spherical: bool, budget: int) -> Points:
        kind = torch.promote_types(x.dtype, torch.float32)
        shift = torch.zeros_like(x[0], dtype=kind) if spherical else x.mean(0, dtype=kind)
        mine = range(len(x) * ranks.rank() // ranks.world(), len(x) * (ranks.rank() + 1) // ranks.world())
        budget = budget or (CACHED if x.device.type == "cpu" else LARGE)
        rows = budget // (kind.itemsize * (clusters + 3 * x.shape[1]))  # distances; a block, its centroids, differences
        return cls(x, shift, spherical, mine, max(1, rows))

    def seen(self, x: Tensor) -> Tensor:
        x = x.to(self.shift.dtype)
        return F.normalize(x, dim=1) if self.spherical else x - self.shift

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Which of this process's rows, and these rows."""
        for at in range(0, len(self.mine), self.rows):
            some = self.mine[at : at + self.rows]
            yield slice(at, at + len(some)), self.seen(self.x[some.start : some.stop])


def halves(centroids: Tensor) -> Tensor:
    """[K], |c|²/2, but ∞ where c equals one before it: which of the two is nearer would be a matter of rounding."""
    which = centroids.unique(dim=0, return_inverse=True)[1]
    place = torch.arange(len(which), device=which.device)
    before = torch.zeros_like(which).scatter_reduce(0, which, place, "amin", include_self=False)[which]
    return (centroids.square().sum(1) / 2).masked_fill(before < place, torch.inf)


def nearest(block: Tensor, centroids: Tensor, half: Tensor) -> Tensor:
    """int64 [B]: argmin |x − c|² is that of |c|²/2 − x·c; of equals the first. Of unit vectors it is the cosine's."""
    return torch.addmm(half, block, centroids.T, alpha=-1).argmin(1)


def lloyd(points: Points, centroids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Give each row its nearest centroid, in `labels`. Sums [K, D] and sizes [K] of the clusters; did any row move?"""
    sums, moved = torch.zeros_like(centroids), torch.zeros((), dtype=torch.int64, device=labels.device)
    sizes = torch.zeros(len(centroids), dtype=torch.int64, device=labels.device)
    half = halves(centroids)
    for rows, block in points.blocks():
        new = nearest(block, centroids, half)
        moved += (new != labels[rows]).sum()
        labels[rows] = new
        add_up(sums, block, new)
        sizes += new.bincount(minlength=len(sizes))
    return ranks.total(sums), ranks.total(sizes), bool(ranks.total(moved))


def add_up(sums: Tensor, block: Tensor, labels: Tensor) -> None:
    """Add each row of the block [B, D] to its cluster's sum, always in the same order.

    On a CPU that is the order of rows. A GPU's `index_add_` has no order: there the rows are sorted by cluster first,
    equals in their order, each cluster's are summed by themselves, and then no two are added to the same sum.
    """
    if sums.device.type == "cpu":
        sums.index_add_(0, labels, block)
    else:
        add_segments(sums, block, labels)


def add_segments(sums: Tensor, block: Tensor, labels: Tensor) -> None:
    ordered, order = labels.sort(stable=True)
    there, lengths = ordered.unique_consecutive(return_counts=True)
    sums[there] += torch.segment_reduce(block[order], "sum", lengths=lengths)


def means(centroids: Tensor, sums: Tensor, sizes: Tensor, spherical: bool) -> Tensor:
    """The clusters' new centroids; the old one of a cluster that is empty or whose rows cancel out."""
    if spherical:
        length = sums.norm(dim=1, keepdim=True)
        return torch.where(length > 0, sums / length, centroids)
    return torch.where(sizes[:, None] > 0, sums / sizes[:, None], centroids)


def split(points: Points, centroids: Tensor, sizes: Tensor, labels: Tensor) -> Tensor:
    """Each empty cluster takes half of the cluster that is the largest by then: c ± ε in a direction drawn for it.

    Not of one that is narrower than ε itself: equal rows cannot be told apart, and which way they went would be chance.
    """
    empty = (sizes == 0).nonzero().squeeze(1).tolist()
    if not empty:
        return centroids
    within, whole = centroids.new_zeros(len(sizes), 1), centroids.new_zeros(())
    for rows, block in points.blocks():
        whole += block.square().sum()
        add_up(within, (block - centroids[labels[rows]]).square().sum(1, keepdim=True), labels[rows])
    spread = ranks.total(whole) / points.x.numel()
    wide = ranks.total(within).squeeze(1) > sizes * centroids.shape[1] * NUDGE**2 * spread
    away = NUDGE * spread.sqrt() * torch.randn(len(empty), centroids.shape[1]).to(centroids)
    largest = [(-size, cluster) for cluster, size in enumerate((sizes * wide).tolist()) if size > 1]
    heapq.heapify(largest)
    centroids = centroids.clone()
    for by, cluster in zip(away, empty, strict=True):
        if not largest:
            break
        negative, donor = heapq.heappop(largest)
        centroids[cluster] = centroids[donor] + by
        centroids[donor] -= by
        half = -negative // 2
        for rest, which in ((half, cluster), (-negative - half, donor)):
            if rest > 1:
                heapq.heappush(largest, (-rest, which))
    return F.normalize(centroids, dim=1) if points.spherical else centroids


def begin(points: Points, clusters: int, start: str | Tensor) -> Tensor:
    """The centroids to begin with [K, D], as the algorithm sees points."""
    x = points.x
    if isinstance(start, Tensor):
        if start.shape != (clusters, x.shape[1]):
            raise ValueError(f"a start of shape {tuple(start.shape)} for {clusters} clusters of {x.shape[1]} numbers")
        return points.seen(start.to(x.device))
    if start == "random":
        return points.seen(x[torch.randperm(len(x))[:clusters].to(x.device)])
    if start == "k-means++":
        return far_apart(points, clusters)
    raise ValueError(f"no start `{start}`")


def far_apart(points: Points, clusters: int) -> Tensor:
    """k-means++: each next centroid is a row drawn by its squared distance to the nearest one so far (their D²)."""
    x, mine = points.x, points.mine
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    far = torch.full((len(mine),), torch.inf, dtype=exact, device=x.device)
    chosen = [int(torch.randint(len(x), ()))]
    for _ in range(1, clusters):
        last = points.seen(x[chosen[-1]][None])
        for rows, block in points.blocks():
            far[rows] = far[rows].minimum((block - last).square().sum(1))
        chosen.append(drawn(far, mine, len(x)))
    return points.seen(x[torch.tensor(chosen, device=x.device)])


def drawn(weight: Tensor, mine: range, rows: int) -> int:
    """One of all rows, drawn by weight, of which each process has that of its own; of all alike where none weighs."""
    share = weight.new_zeros(ranks.world())
    share[ranks.rank()] = weight.sum()
    ends = ranks.total(share).cumsum(0)
    place = torch.rand((), dtype=torch.float64).to(weight) * ends[-1]
    if not ends[-1] > 0:
        return int(torch.randint(rows, ()))
    owner = min(int((ends <= place).sum()), len(ends) - 1)
    row = torch.zeros((), dtype=torch.int64, device=weight.device)
    if owner == ranks.rank():
        before = ends[owner - 1] if owner else 0.0
        row += mine.start + (weight.cumsum(0) <= place - before).sum().clamp(max=len(mine) - 1)
    return int(ranks.total(row))
