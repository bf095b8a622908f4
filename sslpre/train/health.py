"""Figures, without labels, of what the encoder gives: in the last steps of training, and in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sslpre.ops import ranks
from sslpre.ops.spectrum import lidar, rankme
from sslpre.ops.sphere import alignment, mean_cosine, uniformity
from sslpre.probe.knn import K, votes
from sslpre.train import distributed
from sslpre.train.memory import ran_out, release
from sslpre.train.progress import say
from sslpre.train.step import half
from sslpre.views.build import centre

if TYPE_CHECKING:
    from sslpre.data.stream import Pixels
    from sslpre.train.loop import Run

RING = 2048  # embeddings that are remembered
SOME = 128  # images of a batch that are looked at in evaluation mode
IMAGES, VIEWS = 1000, 10  # of LiDAR
LABELLED = 5000  # images that are classified by their neighbours
ONCE = 64  # images whose views are made at a time
COARSE = 8  # side of the pictures that tell whether images differ at all


@dataclass
class Ring:
    """The last embeddings that the encoder gave in training, float32 [≤ 2048, D]; and how many pixels it was shown."""

    rows: Tensor | None = None
    count: int = 0
    pixels: int = 0

    def add(self, x: Tensor, z: Tensor) -> None:
        """x: [B, 3, H, W], what was shown; z: [B, D]. No wait for the device."""
        self.pixels += x.numel() // x.shape[1]
        if self.rows is None or self.rows.shape[1] != z.shape[1]:
            self.rows, self.count = z.new_zeros(RING, z.shape[1], dtype=torch.float32), 0
        if len(z) > RING:  # of a large batch some of all its parts: views, rotations, tiles stand one after the other
            z = z[torch.linspace(0, len(z) - 1, RING, device=z.device).long()]
        at = self.count % RING
        first = min(len(z), RING - at)
        self.rows[at : at + first] = z[:first]
        self.rows[: len(z) - first] = z[first:]
        self.count += len(z)

    def finite(self) -> Tensor:
        """[N, D], without what a step left that was not finite."""
        if self.rows is None:
            return torch.empty(0, 0)
        rows = self.rows[: min(self.count, RING)]
        return rows[rows.isfinite().all(1)]


def unit(z: Tensor) -> Tensor:
    """Rows of unit length. Those of length 0 are one point of the sphere, as any constant is."""
    length = z.norm(dim=1, keepdim=True)
    return torch.where(length > 0, F.normalize(z, dim=1, eps=1e-30), z.shape[1] ** -0.5)


def spread(x: Tensor) -> float:
    """Mean deviation of each of the D dimensions of x [N, D], rows of unit length, in units of 1/√D: that is 1 where
    they are spread over the whole sphere, 0 where they are one point."""
    return float(x.std(0, correction=0).mean() * x.shape[1] ** 0.5)


def of_ring(rows: Tensor) -> dict[str, float]:
    """rank: RankMe. directions: the effective rank of features of unit length less their mean. uniformity: of all
    pairs. rows: [N, D], N ≥ 2."""
    x, scale = unit(rows), float(rows.abs().max()) or 1.0
    return {
        "rank": rankme(rows / scale),
        "directions": rankme(x - x.mean(0)),
        "uniformity": float(uniformity(x)),
    }


def of_pairs(x: Tensor, y: Tensor) -> dict[str, float]:
    """Of two views of each of N images, [N, D] each, of unit length: alignment, and the mean cosine of views of one
    image and of different ones."""
    if len(x) < 2 or not (x.isfinite().all() and y.isfinite().all()):
        return {}
    both = x @ y.T
    same = both.diagonal().sum()
    return {
        "alignment": float(alignment(x, y)),
        "positive_cosine": float(same / len(x)),
        "negative_cosine": float((both.sum() - same) / (len(x) * (len(x) - 1))),
    }


def of_quick(rows: Tensor) -> dict[str, float]:
    """What costs next to nothing. std: `spread`; cosine: the mean of all pairs. rows: [N, D], N ≥ 2."""
    x = unit(rows)
    return {"std": spread(x), "cosine": float(mean_cosine(x))}


@torch.no_grad()
def of_batch(run: Run, pixels: Pixels, epoch: int) -> dict[str, float]:
    """The same in evaluation mode, as the encoder will be used, of some images of a batch: eval_std, and where there
    are two views what `of_pairs` tells. images_std: by how much the images differ themselves, in [0, 0.5]."""
    some = slice(min(SOME, run.part or SOME))
    views = run.views(pixels.pixels[some], pixels.size[some], pixels.index[some], epoch)[:2]
    found = [unit(encoded(run, view)) for view in views]
    coarse = F.adaptive_avg_pool2d(views[0], COARSE).flatten(1)
    told = {"images_std": float(coarse.std(0, correction=0).mean())}
    if len(found[0]) > 1 and found[0].isfinite().all():
        told["eval_std"] = spread(found[0])
    return told | (of_pairs(*found) if len(found) > 1 else {})


def guarded(do: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `do` finds; nothing, and a word about it, where memory is short or a matrix cannot be decomposed: no run
    ends because it was looked at."""
    try:
        return do()
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error) and not isinstance(error, torch.linalg.LinAlgError):
            raise
        say(f"warning: some figures of the run's health are left out: {' '.join(str(error).split())[:80]}")
    release()
    return {}


@torch.no_grad()
def survey(run: Run, count: int) -> dict[str, float]:
    """lidar, alignment and cosines from ten views each of about `count` images spread over the data, always the same.

    Every process calls it.
    """
    source = run.stream.source
    found = many_views(run, range(0, len(source), -(-len(source) // count)))
    if found is None or len(found) < 2 or not found.isfinite().all():
        return {}
    first = unit(found.flatten(0, 1)).unflatten(0, found.shape[:2])
    told = guarded(lambda: {"lidar": lidar(found), **of_pairs(first[:, 0], first[:, 1])})
    return {"images": len(found), **told}


def many_views(run: Run, every: range) -> Tensor | None:
    """Features [N, 10, D] of ten views, made as those of the recipe's first table, of the images `every`."""
    assert run.recipe.train.epochs != "auto"
    epochs, copies = run.recipe.train.epochs, run.recipe.views[0].copies  # epochs that training has not: other views

    def make(some: Pixels) -> Iterator[Tensor]:
        for number in range(VIEWS):
            if number % copies == 0:
                made = run.views(some.pixels, some.size, some.index, epochs + number)
            yield made[number % copies]

    found = of_images(run, every, VIEWS, make)
    return None if found is None else found[0]


def of_images(
    run: Run, every: range, views: int, make: Callable[[Pixels], Iterator[Tensor]]
) -> tuple[Tensor, Tensor] | None:
    """Features [N, views, D] of what `make` shows of the images `every`, and which images they are, int64 [N]: another
    stands in for one that cannot be read. Processes share the work. None where one of them had not the memory."""
    own, waited = every[distributed.part(len(every))], run.stream.waited
    rows = torch.zeros(len(own), views, run.objective.encoder.dim, device=run.device)
    index = torch.zeros(len(own), dtype=torch.int64)

    def fill() -> dict[str, float]:
        at, batch = 0, min(ONCE, run.part or run.stream.batch_size // ranks.world())
        for some in run.stream.in_order(slice(own.start, own.stop, own.step), batch) if len(own) else ():
            part = slice(at, at + len(some.index))
            for number, view in enumerate(make(some)):
                rows[part, number] = encoded(run, view)
            index[part] = some.index
            at = part.stop
        return {"done": 1.0}

    whole = distributed.summed([float(not guarded(fill))])[0] == 0
    run.stream.waited = waited  # nothing that training waited for
    run.stream.bad.settle(distributed.collected(run.stream.bad.pending))
    return (distributed.joined(rows, len(every)), distributed.joined(index, len(every))) if whole else None


@torch.no_grad()
def neighbours(run: Run) -> dict[str, float]:
    """knn: the share of up to 5,000 labelled training images that are of the class of their 20 nearest neighbours among
    the others, by the output for their centre views. Nothing unless the recipe asks. Every process calls it.
    """
    if run.recipe.train.monitor != "knn":
        return {}
    side, source = run.recipe.encoder.image_size, run.stream.source
    assert side != "auto"
    every = range(0, len(source), -(-len(source) // LABELLED))
    found = of_images(run, every, 1, lambda some: iter([centre(some.pixels, some.size, side)]))
    if found is None:
        return {}
    z, index = found
    right = (index == torch.tensor(every)) & (torch.from_numpy(source.labels)[index] >= 0)
    labels, z = torch.from_numpy(source.labels)[index[right]].to(z.device), z[right.to(z.device), 0]
    if len(z) < 2 or not z.isfinite().all():
        return {}

    def accuracy() -> dict[str, float]:
        answers = votes(z, labels, None, len(source.classes), [min(K, len(z) - 1)])[0]
        return {"knn": float((answers == labels).float().mean())}

    return guarded(accuracy)


def encoded(run: Run, view: Tensor) -> Tensor:
    """Features [B, D] of a view, float32, in evaluation mode and the run's precision."""
    encoder = run.objective.encoder
    training = encoder.training
    encoder.eval()
    try:
        with half(run):
            return encoder(fitting(encoder.image_size, view)).float()
    finally:
        encoder.train(training)


def fitting(side: int, view: Tensor) -> Tensor:
    """The view at a size that the encoder takes: one of tiles may be laid out for their side alone."""
    if view.shape[-1] == side:
        return view
    return F.interpolate(view, (side, side), mode="bilinear", antialias=True)


def rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in figures.items()}
