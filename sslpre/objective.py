"""The whole contract between a method and the loop: what a method is told, what it gets, what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from sslpre.encoder import Encoder
from sslpre.ops.channels import Colour
from sslpre.views import draw


@dataclass(frozen=True)
class Setup:
    """What a run tells a method before training. `batch` is global: over all micro-batches and ranks."""

    images: int
    classes: int | None
    batch: int
    views: tuple[int, ...]  # side of each view, in recipe order
    mean: Tensor  # [3], what the encoder standardises with
    std: Tensor
    build: Callable[[Colour, int | None], Encoder] = field(repr=False)
    patch: int = 1  # side of the squares that the backbone cuts images into; 1 where it takes any size

    def encoder(self, colour: Colour = "rgb", size: int | None = None) -> Encoder:
        """A fresh encoder with the recipe's backbone; `size` if the network sees other sides than the views'."""
        return self.build(colour, size)


@dataclass
class Batch:
    """One micro-batch, on the device."""

    views: list[Tensor]  # each [B, 3, H, W], float in [0, 1]; large views first
    index: Tensor  # [B] position in the data set
    label: Tensor  # [B], -1 where unknown; only methods that declare labels may read it
    progress: float  # through the run, 0..1; no method counts steps itself
    seed: int
    epoch: int

    def uniform(self, name: str, *shape: int) -> Tensor:
        """[B, *shape] in [0, 1): a function of (seed, epoch, index, name) alone."""
        return draw.uniform(self.seed, self.epoch, self.index, f"method.{name}", *shape)

    def normal(self, name: str, *shape: int) -> Tensor:
        """[B, *shape], standard normal: a function of (seed, epoch, index, name) alone."""
        return draw.normal(self.seed, self.epoch, self.index, f"method.{name}", *shape)


@dataclass
class Loss:
    """What a method gives back: `value` is minimised; `terms` (scalars) are logged beside it."""

    value: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """One cell of the sheet that `sslpre preview` writes: what the task shows the network, or what it is asked for."""

    title: str  # a few words; the same in each row, or what is true of this cell, such as "180°"
    image: Tensor  # [3, h, w] or [1, h, w], float in [0, 1]


@dataclass(frozen=True)
class Epoch:
    """The start of an epoch. `every_image(f)` runs f on each image's centre view ([B, 3, S, S], eval mode, no gradient,
    in the run's precision) and returns its results for all images, in index order: [N, …], numbers of any kind."""

    number: int
    every_image: Callable[[Callable[[Tensor], Tensor]], Tensor]


class Objective(nn.Module):
    """A method. Subclasses are final; their `__init__(self, setup, ...)` takes the recipe's [method] table as keywords.

    All state that must survive is a parameter, buffer or submodule made in `__init__`. `loss` never writes a buffer: it
    leaves the value in a plain attribute and `after_step` writes it, so a step not taken touches nothing. Where a batch
    comes in parts (`train.micro_batch`), `loss` runs once a part before `after_step` runs once: gather values in
    a list, and let `after_step` reduce and empty it. Such attributes are the objective's own, not a submodule's: where
    memory runs out, the loop puts them back and takes the step again.

    Of several processes each has a part of the batch. A loss that couples its images calls `ops.ranks.gather` on what
    it compares and is computed alike in all of them, for the whole batch; the loop averages the gradients.
    """

    views: ClassVar[range] = range(1, 2)  # how many views a recipe may give
    couples: ClassVar[bool] = False  # does the loss compare images of a batch with each other?
    needs_labels: ClassVar[bool] = False
    players: ClassVar[dict[str, tuple[str, ...]]] = {"all": ("",)}  # who trains which submodules (name prefixes)
    rates: ClassVar[dict[str, float]] = {}  # a player's share of the learning rate; all of it where it is not named
    judged: ClassVar[tuple[str, str]] = ("loss", "chance")  # a term as logged, and the one it falls below by learning
    encoder: Encoder  # what is probed and exported

    @classmethod
    def sees(cls, side: int, patch: int = 1, **arguments: Any) -> int:
        """Side of what the encoder is shown of views of `side` px, with the method's arguments: tiles are smaller.

        Stem and position embeddings follow it: what `__init__` gives to `setup.encoder(size=…)`.
        """
        return side

    def loss(self, batch: Batch) -> Loss:
        """Most methods: this and `__init__`, nothing else. A loss that does not couple is (1/B)·Σ over the images."""
        raise TypeError(f"{type(self).__name__} defines neither loss nor rounds")

    def rounds(self, batch: Batch) -> Iterator[Loss]:
        """Games: one loss a player, in the order of `players`. After a yield only fresh or detached tensors."""
        yield self.loss(batch)

    def epoch_start(self, epoch: Epoch) -> list[nn.Module]:
        """Runs before an epoch's first step, never on a mid-epoch resume; returns the modules it re-initialised."""
        return []

    def after_step(self, progress: float) -> None:
        """EMA teacher, queue, centre, codebook: whatever changes by rule and not by gradient."""

    def notes(self) -> dict[str, Any]:
        """What there is to tell of a new epoch, as numbers and lists of them: a line in metrics.jsonl."""
        return {}

    def pictures(self, batch: Batch) -> list[list[Picture]]:
        """A row for each image (or pair, or group) of the batch; in eval mode, without gradients."""
        return [[Picture(f"view {n}", view) for n, view in enumerate(row, 1)] for row in zip(*batch.views, strict=True)]

    @property
    def chance(self) -> float | None:
        """The loss value that means "nothing learned"."""
        return None
