"""Our views against kornia's AugmentationSequential and torchvision's v2 transforms: the same operations on the same
stored pixels, in one process, in turns.

    python tests/benchmarks/views.py                      one CPU core
    python tests/benchmarks/views.py --device cuda

Crop (8 to 100 %), flip, colour jitter 0.8, 0.8, 0.8, 0.2 in 80 %, grey in 20 %, and above 64 px blur in half: from
uint8 canvases [B, 3, S, S] to float views in [0, 1]. Ours and torchvision draw everything for each image; kornia draws
one order of the colour operations for a whole batch. kornia and torchvision are tried in two ways each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ledger
import ours
import torch
import turns
from torch import Tensor
from torchvision.transforms import v2

from sslpre.train import memory
from sslpre.views.build import Views, compiler

Make = Callable[[Tensor], list[Tensor]]
CANVASES = {32: (32,), 96: (192,), 224: (256, 448)}
# (ours, eager or compiled) on this kind of device: at least so many times as fast as the fastest other
PROMISED = {("cpu", "eager"): 1.5, ("cpu", "compiled"): 3.0, ("cuda", "compiled"): 15.0}


def canvases(side: int, batch: int, where: torch.device) -> Tensor:
    """Smooth pictures with some noise, uint8 [B, 3, S, S], channels last, as a batch leaves the stream."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 8, 8, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic") * 220
    noisy = (smooth + 30 * torch.rand(batch, 3, side, side, generator=draw)).clamp(0, 255).to(torch.uint8)
    return noisy.contiguous(memory_format=torch.channels_last).to(where)


def of_sslpre(size: int, canvas: int, batch: int, compiled: str | None) -> tuple[Make, Views]:
    views = Views([ours.paper_view(size, copies=1)], size, seed=0)
    if compiled is not None:
        views.compile(compiled)
    index, sides, epoch = torch.arange(batch), torch.full((batch, 2), canvas), iter(range(2**62))
    return lambda pixels: views(pixels, sides, index, next(epoch)), views


def of_torchvision(size: int, dtype: torch.dtype) -> Make:
    """One image at a time, as v2 must be called for images to differ; colours computed in `dtype`."""
    view = ours.paper_view(size)
    jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    steps: list[Any] = [v2.RandomResizedCrop(size, view.crop_scale, view.crop_ratio, antialias=True)]
    steps += [v2.RandomHorizontalFlip(view.flip), v2.ToDtype(dtype, scale=True)]
    steps += [v2.RandomApply([jitter], view.jitter), v2.RandomGrayscale(view.gray)]
    if view.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(size // 20 * 2 + 1, view.blur_sigma)], view.blur))
    one = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])
    return lambda pixels: [torch.stack([one(image) for image in pixels])]


def of_kornia(size: int, cropping: str) -> Make:
    """cropping: kornia's `slice` (crop and resize one image after the other) or `resample` (all in one warp)."""
    import kornia.augmentation as k

    view = ours.paper_view(size)
    steps: list[Any] = [
        k.RandomResizedCrop((size, size), view.crop_scale, view.crop_ratio, cropping_mode=cropping),
        k.RandomHorizontalFlip(p=view.flip),
        k.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue, p=view.jitter),
        k.RandomGrayscale(p=view.gray),
    ]
    if view.blur:
        side = size // 20 * 2 + 1
        steps.append(k.RandomGaussianBlur((side, side), view.blur_sigma, p=view.blur))
    chain = k.AugmentationSequential(*steps, data_keys=["input"])
    return lambda pixels: [chain(pixels.float().div_(255))]


def others(size: int) -> dict[str, Make]:
    """kornia only where it is installed."""
    found = {
        "torchvision uint8": of_torchvision(size, torch.uint8),
        "torchvision float": of_torchvision(size, torch.float32),
    }
    if "kornia" in ledger.versions(["kornia"]):
        found |= {f"kornia {cropping}": of_kornia(size, cropping) for cropping in ("slice", "resample")}
    return found


def timed(make: Make, pixels: Tensor, size: int) -> Callable[[], float]:
    """One call of it: milliseconds per view. The device has finished before and after."""

    def call() -> float:
        finish(pixels.device)
        begun = time.perf_counter()
        made = make(pixels)
        finish(pixels.device)
        spent = time.perf_counter() - begun
        if [tuple(view.shape) for view in made] != [(len(pixels), 3, size, size)] or made[0].dtype != torch.float32:
            raise RuntimeError(f"not one float32 view of {size} px an image: {[tuple(view.shape) for view in made]}")
        return 1000 * spent / len(pixels)

    return call


def finish(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def measure(
    size: int, canvas: int, batch: int, where: torch.device, rounds: int, eager: bool = False
) -> dict[str, Any]:
    """Milliseconds per view of everybody, and how many times as fast as the fastest other ours are.

    Ours eager, and compiled where there is a compiler and it changes anything; eager: only so.
    """
    pixels = canvases(canvas, batch, where)
    makes, mine = others(size), {}
    makes["sslpre eager"], mine["eager"] = of_sslpre(size, canvas, batch, None)
    by = None if eager or mine["eager"].saves(where, batch) == 0 else compiler(where)
    if by is not None:
        makes["sslpre compiled"], mine["compiled"] = of_sslpre(size, canvas, batch, by)
    calls = {name: timed(make, pixels, size) for name, make in makes.items()}
    for call in calls.values():  # compiles, and lets cuDNN and the allocator settle
        call()
        call()
    given = turns.in_turn(calls, rounds)
    rows = {name: {"ms_per_view": turns.median(ms), "spread": turns.spread(ms)} for name, ms in given.items()}
    best = min((name for name in rows if not name.startswith("sslpre")), key=lambda name: rows[name]["ms_per_view"])
    found: dict[str, Any] = {"size": size, "canvas": canvas, "batch": batch, "rows": rows, "fastest_other": best}
    found["ratios"] = {how: rows[best]["ms_per_view"] / rows[f"sslpre {how}"]["ms_per_view"] for how in mine}
    found["kornia_ratios"] = {
        how: min(rows[f"kornia {cropping}"]["ms_per_view"] for cropping in ("slice", "resample"))
        / rows[f"sslpre {how}"]["ms_per_view"]
        for how in mine
        if "kornia slice" in rows
    }
    found["promised"] = {how: PROMISED.get((where.type, how)) for how in mine}
    found["met"] = {how: found["ratios"][how] >= least for how, least in found["promised"].items() if least is not None}
    found["graphs"] = {how: views.graphs for how, views in mine.items()}
    return found


def show(found: dict[str, Any], where: torch.device) -> None:
    def line(name: str, one: dict[str, float]) -> tuple[Any, ...]:
        how = name.removeprefix("sslpre ")
        figures = (found[key].get(how) for key in ("ratios", "promised"))
        met = {True: "met", False: "missed", None: None}[found["met"].get(how)]
        return (name, one["ms_per_view"], one["spread"], *figures, met, found["graphs"].get(how))

    ledger.show(
        f"views at {found['size']} px from {found['canvas']} px, batch {found['batch']}, {where}",
        ("", "ms/view", "±", f"× {found['fastest_other']}", "promised", "", "graphs"),
        (line(name, one) for name, one in found["rows"].items()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[*CANVASES])
    parser.add_argument(
        "--batch", type=int, default=0, help="default: 256 at 32 px, 128 at 96 px, else 64; 256 on a GPU"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads, and cores that this may use")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    memory.keep_freed()  # as `pretrain` begins; it is one process, so the others have it too
    where = torch.device(arguments.device)
    if where.type == "cpu":
        turns.keep_to(arguments.threads)
        torch.set_num_threads(arguments.threads)
    measured: dict[str, Any] = {"device": arguments.device, "threads": arguments.threads, "rounds": arguments.rounds}
    measured["compiler"], measured["views"] = compiler(where), []
    if measured["compiler"] is None:
        print("no compiler here: ours are measured eager alone")
    for size in arguments.sizes:
        usual = 256 if where.type == "cuda" or size <= 32 else 128 if size <= 96 else 64
        for canvas in CANVASES.get(size, (2 * size,)):
            found = measure(size, canvas, arguments.batch or usual, where, arguments.rounds, arguments.eager)
            measured["views"].append(found)
            show(found, where)
            ledger.write(arguments.json, ledger.record("views", measured, ours.PACKAGES))


if __name__ == "__main__":
    main()
