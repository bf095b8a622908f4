"""Some images of a run as its encoder sees them: where they lie, what is near what, what stands alone or twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslpre.data import Source
from sslpre.data.find import subset
from sslpre.data.stream import BadList
from sslpre.encoder import Encoder
from sslpre.errors import SslpreError
from sslpre.ops import duplicates
from sslpre.ops.kmeans import kmeans
from sslpre.preview import even
from sslpre.probe import lent
from sslpre.probe.features import Centres
from sslpre.report import sprite

MOST = 1000  # images of a report
CLUSTERS = 10
EXAMPLES, NEAREST = 8, 6  # images whose neighbours are shown, and how many of each
TYPICAL = 8  # members of a cluster that are shown
ALONE, RANK = 12, 5  # outliers that are shown; which neighbour has to be far
PAIRS = 12  # of likely duplicates that are shown
BATCH = 64
SIDE = 96  # pixels of a thumbnail, at most
ALIKE = 1e-3  # of a feature, below which two images of unit length are the same
KEPT = 256 << 20  # bytes of centre views that are kept in memory


@dataclass(frozen=True)
class Picked:
    """The images of a report: N of `total`. folders: of each image the number of its class in `classes`, or −1."""

    names: list[str]
    folders: np.ndarray
    classes: list[str]
    total: int
    bad: int
    where: str
    sheet: str  # of their thumbnails, a data URI
    across: int  # thumbnails in a row of it
    same: list[list[int]]  # of equal pixels
    alike: list[tuple[int, int]]  # of nearly equal ones, by perceptual hash


@dataclass(frozen=True)
class Seen:
    """What the encoder makes of them. features: [N, D] of unit length (0 where they are 0); points: [N, 2] in [0, 1],
    by `axes`; clusters: int64 [N]; typical: of each cluster its members, nearest the centre first; near: of each image
    those most like it, with cosines; alone: those least like any, with the cosine to their 5th neighbour."""

    features: Tensor
    points: np.ndarray
    axes: str
    clusters: np.ndarray
    typical: list[list[int]]
    near: list[list[tuple[int, float]]]
    examples: list[int]
    alone: list[tuple[int, float]]

    @property
    def alike(self) -> bool:
        """Have all images the same features?"""
        return len(self.features) > 1 and float((self.features - self.features[0]).abs().max()) < ALIKE


class Sample:
    """Up to 1,000 images spread evenly over a source, decoded once where memory allows."""

    def __init__(self, source: Source, side: int, canvas: int, device: torch.device, workers: int):
        self.source, self.rows = source, even(len(source), MOST)
        self.bad = BadList(None, 1.0, len(self.rows), say=lambda line: None)
        self.views = Centres(
            subset(source, self.rows),
            side=side,
            canvas=canvas,
            batch=min(BATCH, len(self.rows)),
            workers=workers,
            device=device,
            bad=self.bad,
            keep=3 * side**2 * len(self.rows) <= KEPT,
        )
        self._picked: Picked | None = None

    def encode(self, encoder: Encoder, device: torch.device) -> tuple[Picked, Tensor]:
        """The images, and their features, float32 [N, D] on the CPU. Raises SslpreError (exit 4) for no images."""
        features, thumbnails, hashes, shown = [], [], [], []
        with lent(encoder, device), torch.no_grad():
            for views in self.views:
                features.append(encoder(views.float() / 255).float().cpu())
                if self._picked is None:
                    thumbnails.append(reduced(views))
                    found, tells = duplicates.perceptual(views)
                    hashes.append(found)
                    shown.append(tells)
        if not features:
            raise SslpreError(f"no image of `{self.source.where}` can be read", "check the files", 4)
        if self._picked is None:
            self._picked = self.picked(np.concatenate(thumbnails), np.concatenate(hashes), np.concatenate(shown))
        return self._picked, torch.cat(features)

    def picked(self, thumbnails: np.ndarray, hashes: np.ndarray, tells: np.ndarray) -> Picked:
        here = self.rows[self.views.index.numpy()]
        same = duplicates.groups(self.views.digests)
        sheet, across = sprite.sheet(thumbnails)
        told = {(i, j) for group in same for i in group for j in group}
        rows = np.flatnonzero(tells)
        pairs = [(int(rows[i]), int(rows[j])) for i, j in duplicates.near(hashes[rows])]
        return Picked(
            names=[self.source.name(int(i)) for i in here],
            folders=self.source.labels[here],
            classes=list(self.source.classes),
            total=len(self.source),
            bad=self.bad.count,
            where=self.source.where,
            sheet=sheet,
            across=across,
            same=same,
            alike=[pair for pair in pairs if pair not in told],
        )


def reduced(views: Tensor) -> np.ndarray:
    """uint8 [B, 3, s, s] → [B, t, t, 3] with t at most 96."""
    if views.shape[-1] > SIDE:
        small = F.interpolate(views.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
        views = small.round().clamp(0, 255).to(torch.uint8)
    return views.permute(0, 2, 3, 1).cpu().numpy()


def look(raw: Tensor, spread: bool) -> Seen:
    """raw: [N, D], finite. spread: lay the map out by UMAP where that is installed, else by PCA."""
    x = F.normalize(raw, dim=1)
    cosines = x @ x.T
    points, axes = laid_out(x, spread)
    examples = even(len(x), EXAMPLES + 2)[1:-1].tolist()
    return Seen(x, points, axes, *grouped(x), nearest(cosines), examples, outliers(cosines))


def nearest(cosines: Tensor) -> list[list[tuple[int, float]]]:
    """Of each image those most like it, but for itself, with their cosines."""
    best = cosines.clone().fill_diagonal_(-2).topk(min(NEAREST, len(cosines) - 1), dim=1)
    return [list(zip(*pair, strict=True)) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def grouped(x: Tensor) -> tuple[np.ndarray, list[list[int]]]:
    """Clusters of rows of unit length, the largest first, and the members of each, nearest the centre first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = kmeans(x, min(CLUSTERS, len(x)), start="k-means++", spherical=True)
    order = [int(k) for k in found.sizes.argsort(descending=True, stable=True) if found.sizes[k]]
    place = torch.full((len(found.sizes),), -1)
    place[order] = torch.arange(len(order))
    labels, typical = place[found.labels], []
    for rank, k in enumerate(order):
        members = (labels == rank).nonzero()[:, 0]
        order_within = (x[members] @ found.centroids[k]).argsort(descending=True, stable=True)
        typical.append(members[order_within][:TYPICAL].tolist())
    return labels.numpy(), typical


def outliers(cosines: Tensor) -> list[tuple[int, float]]:
    """The images whose 5th nearest neighbour is least like them, with that cosine."""
    if len(cosines) <= RANK:
        return []
    others = cosines.clone().fill_diagonal_(-2)
    fifth = others.topk(RANK, dim=1).values[:, -1]
    least = fifth.sort(stable=True)
    return list(zip(least.indices[:ALONE].tolist(), least.values[:ALONE].tolist(), strict=True))


def laid_out(x: Tensor, spread: bool) -> tuple[np.ndarray, str]:
    """Points [N, 2] in [0, 1], and what the axes are."""
    reducer = umap() if spread and len(x) > 15 else None
    if reducer is not None and bool((x - x[0]).abs().max() > 1e-4):
        points = reducer(metric="cosine", random_state=0, n_jobs=1).fit_transform(x.numpy())
        return unit_square(torch.from_numpy(np.asarray(points)).double()), "UMAP of the cosines"
    points, share = principal(x)
    return unit_square(points), f"PCA: the first two directions, which hold {share:.0%} of the variance"


def umap() -> Any:
    try:
        from umap import UMAP
    except ImportError:
        return None
    return UMAP


def principal(x: Tensor) -> tuple[Tensor, float]:
    """The first two principal components [N, 2] of x [N, D], and the share of the variance that they hold."""
    centred = x.double() - x.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    values, vectors = values.clamp(min=0).flip(0), vectors.flip(1)[:, :2]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    points = centred @ (vectors * torch.where(largest < 0, -1.0, 1.0))  # an eigenvector has no sign of its own
    if points.shape[1] < 2:
        points = torch.cat([points, torch.zeros_like(points)], 1)
    total = float(values.sum())
    return points, float(values[:2].sum()) / total if total > 0 else 0.0


def unit_square(points: Tensor) -> np.ndarray:
    """Moved and scaled into [0, 1]², both axes alike; all in the middle where they are one point."""
    low, high = points.min(0).values, points.max(0).values
    widest = float((high - low).max())
    scaled = (points - (low + high) / 2) / (widest if widest > 1e-9 else math.inf) + 0.5
    return scaled.float().numpy()


def most_common(folders: Sequence[int]) -> tuple[int, float]:
    """The class that most of these images have, and the share of them that have it; −1 where none has any."""
    known = [label for label in folders if label >= 0]
    if not known:
        return -1, 0.0
    best = max(sorted(set(known)), key=known.count)
    return best, known.count(best) / len(folders)
