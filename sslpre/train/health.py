"""Is it learning? What the encoder gave in the last steps, in figures without labels, and a verdict in words."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslpre.errors import SslpreError
from sslpre.ops import ranks
from sslpre.ops.spectrum import lidar, rankme
from sslpre.ops.sphere import alignment, mean_cosine, uniformity
from sslpre.probe.knn import K, votes
from sslpre.train import distributed
from sslpre.train.progress import say
from sslpre.train.step import half
from sslpre.views.build import centre

if TYPE_CHECKING:
    from sslpre.data.stream import Pixels
    from sslpre.train.loop import Run

CODE = 11
RING = 2048  # embeddings that are remembered
PAIRS = 128  # images of a batch whose two views are compared
IMAGES, VIEWS = 1000, 10  # of LiDAR
LABELLED = 5000  # images that are classified by their neighbours
SHARE = 0.02  # of a run's time that looking at it may take
CERTAIN = 2  # looks in a row with the same verdict, before it is said and acted on
LOOKS = 3  # the loss of so many is held against chance: that of one may be a little below it by luck

HEALTHY, NOT_YET, PARTLY, COLLAPSED = "healthy", "not yet learning", "partly collapsed", "collapsed"
LEARNED = 0.98  # of the loss of chance: below it something is learned
SPREAD = (0.01, 0.05)  # deviation of features on the sphere, 1 where they are all over it: collapsed, partly
DIRECTIONS = 2.0  # effective number of directions in which features differ, or a hundredth of all: partly, below it


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
        z = z[-RING:]
        at = self.count % RING
        first = min(len(z), RING - at)
        self.rows[at : at + first] = z[:first]
        self.rows[: len(z) - first] = z[first:]
        self.count += len(z)

    def finite(self) -> Tensor:
        """[N, D], without what a step left that was not finite."""
        assert self.rows is not None
        rows = self.rows[: min(self.count, RING)]
        return rows[rows.isfinite().all(1)]


@dataclass
class Watch:
    """What is known of a run's health since this process began."""

    ring: Ring = field(default_factory=Ring)
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=LOOKS))  # of the last losses to those of chance
    verdict: str = ""
    times: int = 0  # how often in a row the verdict was the same
    since: int = 0  # the step at which it first was
    looked: float = 0.0  # when, by a clock that only rises
    said: str = HEALTHY  # the last verdict that was certain
    spent: float = 0.0  # seconds that the last look took
    surveyed: int = 0  # pixels that the encoder had been shown at the last survey

    def look(self, run: Run, pixels: Pixels, epoch: int, figures: Mapping[str, float]) -> dict[str, Any]:
        """Figures and verdict for a line of the log; nothing where the last look was too dear to look again so soon.

        figures: of the line, the mean loss since the last one among them.
        """
        if self.ring.rows is None or time.monotonic() - self.looked < self.spent / SHARE:
            return {}
        began = time.monotonic()
        told: dict[str, Any] = {}
        if (chance := chance_of(run, figures)) is not None:
            self.ratios.append(chance[0] / chance[1])
            told["chance"] = chance[1]
        measured = of_ring(self.ring.finite())
        if measured:
            if len(run.views.sides) > 1:
                measured |= of_pairs(*two_views(run, pixels, epoch))
            self.judge(run, measured)
            told["health"] = {"verdict": self.verdict, "advice": self.advice(run), **rounded(measured)}
        self.looked, self.spent = time.monotonic(), time.monotonic() - began
        return told

    def judge(self, run: Run, measured: Mapping[str, float]) -> None:
        verdict = verdict_of(measured, min(self.ratios, default=None))
        if verdict == self.verdict:
            self.times += 1
        else:
            self.verdict, self.times, self.since = verdict, 1, run.step

    def advice(self, run: Run) -> str:
        """The likely cause and what to type; empty where there is nothing to do."""
        if self.verdict in ("", HEALTHY):
            return ""
        rate = run.recipe.optim.lr
        assert rate != "auto"
        if self.verdict == NOT_YET:
            if run.step <= patience(run):
                return "the loss is that of guessing; early in a run that is usual"
            return (
                "the loss is that of guessing: the rate is too low or too high, or views do not show what is asked; "
                f"try --lr {rate / 3:.1g} or --lr {rate * 3:.1g}, and look: sslpre preview {run.folder} sheet.png"
            )
        alike = "all images get the same features" if self.verdict == COLLAPSED else "features of all images are alike"
        if run.passed_over:
            return f"{alike}, after steps that were not finite: the rate is too high; try --lr {rate / 10:.1g}"
        if self.ratios and min(self.ratios) < LEARNED:
            return (
                f"{alike}, and the loss is below guessing: it has a way round the images; "
                f"look: sslpre preview {run.folder} sheet.png; try --lr {rate / 10:.1g}"
            )
        return f"{alike}: mostly the rate is too high, or the images are alike; try --lr {rate / 10:.1g}"

    def ends(self, run: Run) -> bool:
        """Say once what looks ill twice in a row. Has it collapsed, and is to stop then? Every process calls it."""
        run.verdict = f"{self.verdict}: {advice}" if (advice := self.advice(run)) else self.verdict
        early = self.verdict == NOT_YET and run.step <= patience(run)
        if self.times >= CERTAIN and self.verdict != self.said and not early:
            self.said = self.verdict
            if self.verdict != HEALTHY:
                say(f"warning: {run.verdict}, since step {self.since}")
        if run.recipe.train.on_collapse == "warn":
            return False
        return distributed.from_first(lambda: self.verdict == COLLAPSED and self.times >= CERTAIN)

    def stopped(self, run: Run) -> SslpreError:
        message = f"collapsed: all images get the same features since step {self.since}; saved at step {run.step}"
        rate = run.recipe.optim.lr
        assert rate != "auto"
        hint = (
            f"begin again with --lr {rate / 10:.1g}; or go on: sslpre pretrain --resume {shlex.quote(str(run.folder))}"
        )
        return distributed.everywhere(SslpreError(message, f"{hint} --on-collapse warn", CODE))

    @torch.no_grad()
    def survey(self, run: Run) -> dict[str, float]:
        """LiDAR, alignment and cosines from ten views each of up to 1,000 images, always the same; at the end of those
        epochs where it takes at most a fiftieth of the time trained since the last one.

        Every process calls it.
        """
        assert run.recipe.encoder.image_size != "auto"
        every = range(0, len(run.stream.source), -(-len(run.stream.source) // IMAGES))
        cost = len(every) * VIEWS * run.recipe.encoder.image_size**2
        shown = distributed.summed([float(self.ring.pixels - self.surveyed)])[0]
        if 3 * SHARE * shown < cost or len(every) < 2:  # a backward pass takes about twice the time of one forward
            return {}
        z = many_views(run, every)
        self.surveyed = self.ring.pixels
        if not z.isfinite().all():
            return {}
        first = unit(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        return rounded({"lidar": lidar(z), **of_pairs(first[:, 0], first[:, 1])})


@contextlib.contextmanager
def watching(run: Run) -> Iterator[Watch]:
    """Inside, the encoder tells the watch what it gives in training."""
    watch = Watch()
    run.objective.encoder.listener = watch.ring.add
    try:
        yield watch
    finally:
        run.objective.encoder.listener = None


def patience(run: Run) -> int:
    """The step until which a loss of chance means nothing: a tenth of the run, and while the rate rises."""
    warmup = run.recipe.optim.warmup
    assert warmup != "auto"
    return int(max(warmup, 0.1) * run.steps)


def chance_of(run: Run, figures: Mapping[str, float]) -> tuple[float, float] | None:
    """What the method is judged by, and what that would be if nothing were learned; None where nobody knows."""
    name, bar = run.objective.judged
    chance = run.objective.chance if bar == "chance" else figures.get(bar)
    return (figures[name], chance) if chance and name in figures else None


@torch.no_grad()
def of_ring(rows: Tensor) -> dict[str, float]:
    """std: mean deviation of each of the D dimensions of features of unit length, in units of 1/√D, which it is where
    they are spread over the whole sphere. rank: RankMe. directions: the effective rank of features less their mean,
    an image as far from it as it is. uniformity and cosine: of all pairs. Nothing for fewer than two rows."""
    if len(rows) < 2:
        return {}
    x = unit(rows)
    scale = float(rows.abs().max()) or 1.0
    return {
        "dim": x.shape[1],
        "std": float(x.std(0, correction=0).mean() * x.shape[1] ** 0.5),
        "rank": rankme(rows / scale),
        "directions": rankme(x - x.mean(0)),
        "uniformity": float(uniformity(x)),
        "cosine": float(mean_cosine(x)),
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


@torch.no_grad()
def two_views(run: Run, pixels: Pixels, epoch: int) -> tuple[Tensor, Tensor]:
    """The first two views of some images of the batch, as features of unit length, in evaluation mode."""
    some = slice(PAIRS)
    views = run.views(pixels.pixels[some], pixels.size[some], pixels.index[some], epoch)
    first, second = (unit(z) for z in encoded(run, views[:2]))
    return first, second


def many_views(run: Run, every: range) -> Tensor:
    """Features [N, 10, D] of ten views, made as the recipe's first, of the images `every`."""
    assert run.recipe.train.epochs != "auto"
    epochs = run.recipe.train.epochs  # beyond those of training: none of its views is shown again

    def make(some: Pixels) -> list[Tensor]:
        views: list[Tensor] = []
        while len(views) < VIEWS:
            made = run.views(some.pixels, some.size, some.index, epochs + len(views))
            views += [view for view in made if view.shape == made[0].shape]
        return views[:VIEWS]

    return of_images(run, every, VIEWS, make)[0]


def of_images(run: Run, every: range, views: int, make: Callable[[Pixels], list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Features [N, views, D] of what `make` shows of the images `every`, and which images they are, int64 [N]: another
    stands in for one that cannot be read. Processes share the work."""
    own = every[distributed.part(len(every))]
    rows = torch.zeros(len(own), views, run.objective.encoder.dim, device=run.device)
    index = torch.zeros(len(own), dtype=torch.int64)
    batch, at = run.part or run.stream.batch_size // ranks.world(), 0
    for some in run.stream.in_order(slice(own.start, own.stop, own.step), batch) if len(own) else ():
        part = slice(at, at + len(some.index))
        rows[part], index[part] = torch.stack(encoded(run, make(some)), 1), some.index
        at = part.stop
    return distributed.joined(rows, len(every)), distributed.joined(index, len(every))


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
    z, index = of_images(run, every, 1, lambda some: [centre(some.pixels, some.size, side)])
    right = (index == torch.tensor(every)) & (torch.from_numpy(source.labels)[index] >= 0)
    labels, z = torch.from_numpy(source.labels)[index[right]].to(z.device), z[right.to(z.device), 0]
    if len(z) < 2 or not z.isfinite().all():
        return {}
    found = votes(z, labels, None, len(source.classes), [min(K, len(z) - 1)])[0]
    return rounded({"knn": float((found == labels).float().mean())})


def encoded(run: Run, views: list[Tensor]) -> list[Tensor]:
    """Features [B, D] of each view, float32, in evaluation mode and the run's precision."""
    encoder = run.objective.encoder
    training = encoder.training
    encoder.eval()
    with half(run):
        found = [encoder(fitting(run, view)).float() for view in views]
    encoder.train(training)
    return found


def fitting(run: Run, view: Tensor) -> Tensor:
    """The view at a size that the encoder takes: one of tiles may be laid out for their side alone."""
    side = run.objective.encoder.image_size
    if view.shape[-1] == side:
        return view
    return F.interpolate(view, (side, side), mode="bilinear", antialias=True)


def unit(z: Tensor) -> Tensor:
    """Rows of unit length. Those of length 0 are one point of the sphere, as any constant is."""
    length = z.norm(dim=1, keepdim=True)
    return torch.where(length > 0, F.normalize(z, dim=1, eps=1e-30), z.shape[1] ** -0.5)


def verdict_of(measured: Mapping[str, float], ratio: float | None) -> str:
    """measured: as `of_ring`. ratio: of the loss to that of guessing, None where that is not known."""
    if measured["std"] < SPREAD[0]:
        return COLLAPSED
    if measured["std"] < SPREAD[1] or measured["directions"] < max(DIRECTIONS, measured["dim"] / 100):
        return PARTLY
    return HEALTHY if ratio is None or ratio < LEARNED else NOT_YET


def rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in figures.items()}
