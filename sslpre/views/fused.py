"""Colour jitter and grey of a whole batch as one function of a table of numbers, made to be compiled.

Nothing in it depends on what was drawn: an image that gets nothing goes the same way with neutral numbers. So there is
one graph, with two passes over the pixels, and compiled it is two kernels instead of hundreds of calls.

Brightness, contrast, saturation and grey are all x ↦ a·x + b·grey(x) + c, cut off at 0 and 1. Of the three that jitter
has, some come before hue and some after, so that six places and one hue between them hold every order:

    place 0 → place 1 → place 2 → hue → place 3 → place 4 → place 5 → grey

The first pass goes as far as contrast, of which it wants the mean; before contrast stand at most two others.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sslpre.views.colour import LUMA, NOTHING, OPERATIONS, Jitter, brightness, contrast, hue, saturation

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = map(OPERATIONS.index, (brightness, contrast, saturation, hue))
_PLACES, _BEFORE = 6, 3
_EARLY = [0, 1, 3, 4]  # the places that the first pass has
_TINY = 1e-30
Channels = tuple[Tensor, Tensor, Tensor]


def table(plan: Jitter, gray: Tensor) -> Tensor:
    """What `colour` does to each image: float32 [B, 33], on the CPU. `gray` is int64, the images that become grey.

    Six places and then the four of the first pass, (a, b, c) each; the turns of hue in both passes; 1 for grey.
    """
    count = len(plan.steps)
    # where each operation stands in its image's order, and 4 for what is not drawn
    stands = torch.full((count, NOTHING + 1), 4).scatter_(1, plan.steps, torch.arange(4).expand(count, 4))
    factor, at_hue, at_contrast = plan.factors, stands[:, _HUE], stands[:, _CONTRAST]
    turn = factor[:, _HUE] * (at_hue < 4)
    # where there is no hue, two of the others go before its place and two after it
    at_hue = torch.where(at_hue < 4, at_hue, 1)
    # one place more than there are, for what is not drawn
    places = torch.tensor([1.0, 0.0, 0.0]).repeat(count, _PLACES + 1, 1)
    early = places.clone()
    for operation in (_BRIGHTNESS, _CONTRAST, _SATURATION):
        f, at, none = factor[:, operation], stands[:, operation], torch.zeros(count)
        mixed = [f, 1 - f if operation == _SATURATION else none, 1 - f if operation == _CONTRAST else none]
        place = torch.where(at <= at_hue, at, at - at_hue - 1 + _BEFORE).masked_fill(at == 4, _PLACES)
        places[torch.arange(count), place] = torch.stack(mixed, 1)
        place = place.masked_fill(at >= at_contrast, _PLACES)
        early[torch.arange(count), place] = torch.stack(mixed, 1)
    grey = torch.zeros(count).index_fill_(0, gray, 1.0)
    last = torch.stack([turn, turn * (at_hue < at_contrast), grey], 1)
    return torch.cat([places[:, :_PLACES].flatten(1), early[:, _EARLY].flatten(1), last], 1)


def colour(raw: Tensor, numbers: Tensor, has_contrast: bool, has_hue: bool) -> Tensor:
    """Colours of images [B, 3, H, W], 0 to 255 of any type: float32, 0 to 1. `numbers` as `table` gives them.

    `has_contrast` and `has_hue` say whether any image may get it: parts of the graph, not numbers.
    """
    red, green, blue = (raw.float() * (1 / 255)).clamp(0.0, 1.0).unbind(1)
    places, early, last = numbers.split([3 * _PLACES, 3 * len(_EARLY), 3], 1)
    turn, turn_early, grey = (column[:, None, None] for column in last.unbind(1))
    places = places.unflatten(1, (_PLACES, 3))
    if has_contrast:
        start = _chain((red, green, blue), early.unflatten(1, (len(_EARLY), 3)), 2, turn_early if has_hue else None)
        mean = _luma(start).mean((1, 2))
        places = torch.cat([places[:, :, :2], places[:, :, 2:] * mean[:, None, None]], 2)
    channels = _chain((red, green, blue), places, _BEFORE, turn if has_hue else None)
    luma = _luma(channels)
    return torch.stack([channel + (luma - channel) * grey for channel in channels], 1)


def _chain(channels: Channels, places: Tensor, before: int, turn: Tensor | None) -> Channels:
    for place in range(places.shape[1]):
        if place == before and turn is not None:
            channels = _turned(channels, turn)
        a, b, c = places[:, place, :, None, None].unbind(1)
        shared = _luma(channels) * b + c
        red, green, blue = channels
        channels = _cut(red * a + shared), _cut(green * a + shared), _cut(blue * a + shared)
    return channels


def _turned(channels: Channels, turn: Tensor) -> Channels:
    """`colour.hue`, whose docstring has the formula; all of it in registers, so written for clarity."""
    red, green, blue = channels
    low, high = torch.minimum(torch.minimum(red, green), blue), torch.maximum(torch.maximum(red, green), blue)
    chroma = high - low
    away = ((green - red) + (blue - low)) / (chroma + _TINY) + 1
    turn = torch.copysign(away, green - blue) * (1 / 6) + turn
    sixths = (turn - turn.floor()) * 6
    return (
        low + chroma * _cut((sixths - 3).abs() - 1),
        low + chroma * _cut(2 - (sixths - 2).abs()),
        low + chroma * _cut(2 - (sixths - 4).abs()),
    )


def _luma(channels: Channels) -> Tensor:
    red, green, blue = channels
    return red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]


def _cut(values: Tensor) -> Tensor:
    """Into [0, 1]: compiled for a CPU half the instructions of `clamp`, which lets NaN through and so has to look."""
    return 1 - (1 - values.relu()).relu()


class Compiled:
    """`colour`, compiled for the first batch size that it meets.

    `graphs` counts what was compiled; `failed` says that compiling failed, after which nothing is.
    """

    def __init__(self, backend: str):
        self.graphs = 0
        self.failed = False
        self._backend = backend
        self._kinds: set[tuple[Any, ...]] = set()
        self._size: int | None = None
        self._function: Callable[..., Tensor] | None = None

    @property
    def recompiled(self) -> int:
        """Graphs beyond one for each kind of call."""
        return max(0, self.graphs - len(self._kinds))

    def _build(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend(self._backend)(graph, inputs)

    def takes(self, count: int) -> bool:
        """Will a batch of `count` images go through the compiled function?"""
        if self._size is None:
            self._size = count
        return not self.failed and count == self._size

    def __call__(self, raw: Tensor, numbers: Tensor, has_contrast: bool, has_hue: bool) -> Tensor | None:
        """As `colour`; None where compiling failed, which is said on stderr once: do it eagerly from now on."""
        if self.failed:
            return None
        self._kinds.add((raw.shape, raw.dtype, has_contrast, has_hue))
        try:
            # the import itself makes folders, and so fails where it may not
            from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException
            from torch._inductor.exc import CppCompileError

            try:
                if self._function is None:
                    self._function = torch.compile(colour, backend=self._build, fullgraph=True, dynamic=False)
                return self._function(raw, numbers, has_contrast, has_hue)
            except (TorchDynamoException, FailOnRecompileLimitHit, CppCompileError) as problem:
                cause = problem.inner_exception if isinstance(problem, BackendCompilerFailed) else problem
        except OSError as problem:
            cause = problem
        self.failed = True
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        print(f"views are made without a compiler, for it failed: {reason}", file=sys.stderr, flush=True)
        return None
