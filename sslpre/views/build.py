"""All views of a batch, made on the device from one copy of its pixels, as the recipe's `[[views]]` tables say.

Everything random is drawn first, on the CPU, from (seed, epoch, index, view) alone, and sent over in one copy. So a
view does not depend on the batch that its image is in, and nothing ever waits for the device.
"""

import importlib.util
import math
import os
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslpre.views import blur, colour, crop, fused, pool
from sslpre.views.draw import Draw, Drawn, chosen, uniform
from sslpre.views.extra import Extra
from sslpre.views.fused import Compiled

if TYPE_CHECKING:
    from sslpre.recipe import View


# What one view draws for each image, and how many numbers.
_DRAWS = {"box": (crop.NUMBERS,), "factors": (4,)} | dict.fromkeys(
    ("flip", "jitter", "order", "gray", "blur", "sigma"), ()
)
# On a CPU images of this side and larger are made one by one. μs per view on one core (Zen 5), all together : one by
# one: 64 px 134 : 185 · 96 px 205 : 211 · 112 px 276 : 243 · 128 px 351 : 291; with half of them blurred 96 px
# 256 : 331, 128 px 498 : 521, 160 px 795 : 688. All together and compiled 128 px takes 253.
# On two idle cores, in threads of ours and one by one : all together, compiled by torch for its own threads: 128 px
# 309 : 230, 224 px 464 : 450; with another process on the machine 409 : 501 and 759 : 1,078.
_ALONE = 120
# Seconds that compiling takes: 6 to 11 on a CPU (one core, Zen 5); on CUDA reckoned, not measured yet.
_COMPILING = {"cpu": 10.0, "cuda": 20.0}
# Seconds that it saves a pixel on a CPU: colour takes 11.5 μs a view at 32 px and 103 at 96 px, compiled 8.0 and 70
# (one core, Zen 5); on two cores whole views take 36, 79 and 165 at 32, 64 and 96 px, compiled 31, 66 and 124.
_SAVED_ON_A_CPU = 3e-9
# On CUDA eager colour is launches (`colour.LAUNCHES`), as many for a small batch as for a large one, which Python gives
# out one by one: 272 a view with all four operations, compiled three. Seconds for each: reckoned, not measured yet.
_LAUNCH = 5e-6


class Views:
    """Makes every view of a batch: crop and flip, colour jitter, grey, blur, then the table's kornia augmentations.

    `sides` are the sides of the views in recipe order; a table with `copies = 2` makes two, each with draws of its own.
    Raises SslpreError (exit 2) for a kornia entry that cannot be used.
    """

    def __init__(self, tables: Sequence["View"], image_size: int, seed: int):
        self.seed = seed
        self._tables = [table for table in tables for _ in range(table.copies)]
        self.sides = tuple(table.size or image_size for table in self._tables)
        self._extras = [
            [Extra(entry, side) for entry in table.kornia] for table, side in zip(self._tables, self.sides, strict=True)
        ]
        self._by = ""
        self._compiled: Compiled | None = None

    @property
    def made(self) -> str:
        """How views are made: "eager", or "compiled by g++" (or triton) unless and until compiling has failed."""
        return "eager" if self._compiled is None or self._compiled.failed else f"compiled by {self._by}"

    @property
    def graphs(self) -> int:
        """How many graphs were compiled so far."""
        return 0 if self._compiled is None else self._compiled.graphs

    @property
    def recompiled(self) -> int:
        """Graphs beyond the one that each side and kind of table needs: more than 0 is a fault."""
        return 0 if self._compiled is None else self._compiled.recompiled

    def saves(self, device: torch.device, batch: int) -> float:
        """Seconds that `compile` takes off making the views of `batch` images on `device`; 0: it changes nothing."""
        pairs = zip(self.sides, self._tables, strict=True)
        return sum(_saves(table, side, device, batch) for side, table in pairs if _fuses(side, table, device))

    def compile(self, by: str, backend: str = "inductor") -> None:
        """From now on make colours with torch.compile, which takes seconds at the first batch of each side.

        `by` is what `compiler` says. For batches of the size that comes first; any other, and large views on a CPU,
        which gain nothing, are made as before, and equal to rounding. If compiling fails that is said on stderr, once,
        `made` says so, and nothing else changes.
        """
        self._by, self._compiled = by, Compiled(backend)

    def __call__(self, pixels: Tensor, size: Tensor, index: Tensor, epoch: int) -> list[Tensor]:
        """Views of one batch: one float32 [B, 3, s, s] in [0, 1] per side, on the device of `pixels`.

        `pixels` is uint8 [B, 3, S, S], images squashed to a square; `size` int64 [B, 2], the height and width each
        had before; `index` int64 [B], each image's position in the data set; the last two on the CPU.
        """
        shapes = {f"view{view}.{what}": shape for view in range(len(self.sides)) for what, shape in _DRAWS.items()}
        draw = Drawn(self.seed, epoch, index, shapes)
        plans = [self._plan(view, pixels.shape[-1], size, draw) for view in range(len(self.sides))]
        if self._compiled is not None and self._compiled.takes(len(pixels)):
            for plan, side, table in zip(plans, self.sides, self._tables, strict=True):
                if _fuses(side, table, pixels.device):
                    plan.numbers = fused.table(plan.jitter, plan.gray)
        _send(plans, pixels.device)
        # the products must not fall into the caller's bf16
        with torch.autocast(pixels.device.type, enabled=False), torch.no_grad():
            return [self._make(view, plan, pixels, index, epoch) for view, plan in enumerate(plans)]

    def _plan(self, view: int, canvas: int, size: Tensor, draw: Draw) -> "_Plan":
        table, name = self._tables[view], f"view{view}"
        boxes = crop.draw_boxes(draw(f"{name}.box", crop.NUMBERS), size, table.crop_scale, table.crop_ratio)
        blurred = chosen(draw(f"{name}.blur"), table.blur)
        low, high = table.blur_sigma
        boxes, flip = crop.to_canvas(boxes, size, canvas), draw(f"{name}.flip") < table.flip
        return _Plan(
            boxes=boxes,
            flip=flip,
            placed=crop.placement(boxes, flip),
            jitter=colour.draw_jitter(table, draw, name),
            gray=chosen(draw(f"{name}.gray"), table.gray),
            blurred=blurred,
            sigma=low + (high - low) * draw(f"{name}.sigma")[blurred],
        )

    def _make(self, view: int, plan: "_Plan", pixels: Tensor, index: Tensor, epoch: int) -> Tensor:
        table, side = self._tables[view], self.sides[view]
        kernel = blur.kernel_side(side, table.blur_kernel)
        if _alone(side, pixels.device):
            images = _one_by_one(plan, pixels, side, kernel)
        else:
            raw = crop.raw(pixels, plan.boxes, plan.flip, side, plan.placed)
            images = self._coloured(raw, plan, table)
            blur.blur(images, plan.blurred, plan.sigma, kernel)
            images.clamp_(0.0, 1.0)
        for place, extra in enumerate(self._extras[view]):
            extra(images, partial(uniform, self.seed, epoch, index), f"view{view}.kornia{place}")
        return images.clamp_(0.0, 1.0) if self._extras[view] else images

    def _coloured(self, raw: Tensor, plan: "_Plan", table: "View") -> Tensor:
        if self._compiled is not None and plan.numbers is not None:
            jitter = table.jitter > 0
            images = self._compiled(raw, plan.numbers, jitter and table.contrast > 0, jitter and table.hue > 0)
            if images is not None:
                return images
        images = crop.scaled(raw)
        colour.jitter(images, plan.jitter)
        colour.gray(images, plan.gray)
        return images


def _alone(side: int, device: torch.device) -> bool:
    return device.type == "cpu" and side >= _ALONE


def _fuses(side: int, table: "View", device: torch.device) -> bool:
    return _has_colour(table) and not _alone(side, device)


def _has_colour(table: "View") -> bool:
    return table.gray > 0 or (
        table.jitter > 0 and max(table.brightness, table.contrast, table.saturation, table.hue) > 0
    )


def _one_by_one(plan: "_Plan", pixels: Tensor, side: int, kernel: int) -> Tensor:
    """Large views on a CPU, in [0, 1]: each image goes all the way from crop to blur while it is in a core's cache."""
    images = torch.empty(len(pixels), pixels.shape[1], side, side)
    boxes, flip = plan.boxes.tolist(), plan.flip.tolist()
    steps, factors, gray = plan.jitter.steps.tolist(), plan.jitter.factors.tolist(), set(plan.gray.tolist())
    kernels = dict(zip(plan.blurred.tolist(), blur.kernels(plan.sigma, kernel), strict=True))

    def make(rows: slice) -> None:
        for row in range(rows.start, rows.stop):
            image = images[row]
            image.copy_(crop.sliced(pixels[row : row + 1], boxes[row], flip[row], side)[0]).mul_(1 / 255)
            colour.jitter_one(image, steps[row], factors[row])
            if row in gray:
                image.copy_(colour.luma(image))
            if row in kernels:
                blur.blur_one(image, kernels[row])
            image.clamp_(0.0, 1.0)

    pool.share(make, len(pixels))
    return images


def compiler(device: torch.device) -> str | None:
    """What `Views.compile` would compile with on `device`: None where nothing can, else "triton" or the name of g++.

    Both make modules for Python and need its header files; triton builds its launchers with a C compiler.
    """
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return None
    if device.type == "cpu":
        name = os.environ.get("CXX", "g++")
        return name if shutil.which(name) else None
    if (
        device.type == "cuda"
        and importlib.util.find_spec("triton")
        and torch.cuda.get_device_capability(device) >= (7,)
    ):
        return "triton" if any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang"))) else None
    return None


def repays(device: torch.device, saved: float) -> bool:
    """Does compiling take less time than the `saved` seconds (`Views.saves`, for each batch of the run)?"""
    return saved > _COMPILING.get(device.type, math.inf)


def _saves(table: "View", side: int, device: torch.device, batch: int) -> float:
    if device.type == "cpu":
        return batch * side * side * _SAVED_ON_A_CPU
    steps = [table.brightness, table.contrast, table.saturation, table.hue] if table.jitter > 0 else []
    # each operation stands at each of four places in the order of some images
    launches = sum(4 * count for strength, count in zip(steps, colour.LAUNCHES, strict=False) if strength > 0)
    return launches * _LAUNCH


def centre(pixels: Tensor, size: Tensor, side: int) -> Tensor:
    """The largest centred square of each image, resized (antialiased): float32 [B, 3, side, side] in [0, 1].

    What probes, exports and a method's look at every image see. Arguments as of `Views.__call__`.
    """
    boxes = crop.to_canvas(crop.centre_boxes(size), size, pixels.shape[-1])
    with torch.autocast(pixels.device.type, enabled=False):
        return crop.resample(pixels, boxes, torch.zeros(len(pixels), dtype=torch.bool), side)


@dataclass
class _Plan:
    """Everything random about one view of a batch. `boxes`, `flip` and what `_send` does not name stay on the CPU."""

    boxes: Tensor
    flip: Tensor
    placed: Tensor
    jitter: colour.Jitter
    gray: Tensor
    blurred: Tensor
    sigma: Tensor
    numbers: Tensor | None = None  # for the compiled colours


def _send(plans: list[_Plan], device: torch.device) -> None:
    """Move what the device needs of all plans there, so that nothing waits for it later."""
    if device.type == "cpu":
        return
    here = [tensor for plan in plans for tensor in (plan.jitter.rows, plan.gray, plan.blurred)]  # the wider ones
    here += [tensor for plan in plans for tensor in (plan.jitter.values, plan.placed, plan.sigma)]
    here += [plan.numbers for plan in plans if plan.numbers is not None]
    there = iter(_in_one_copy(here, device))
    for plan in plans:
        plan.jitter.rows, plan.gray, plan.blurred = next(there), next(there), next(there)
    for plan in plans:
        plan.jitter.values, plan.placed, plan.sigma = next(there), next(there), next(there)
    for plan in plans:
        plan.numbers = None if plan.numbers is None else next(there)


def _in_one_copy(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """The same tensors on the device. Wider types come first, so that each begins where its type may begin."""
    flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
    if device.type == "cuda":
        flat = flat.pin_memory()  # a copy from ordinary memory would wait for the work queued before it
    flat = flat.to(device, non_blocking=device.type == "cuda")
    pieces = flat.split([tensor.numel() * tensor.element_size() for tensor in tensors])
    return [piece.view(tensor.dtype).view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
