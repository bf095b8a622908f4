"""What a stored form costs in fidelity and gains in speed: crops from it against crops of the full image.

    python tests/benchmarks/fidelity.py IMAGES [--view 224] [--images 100] [--crops 10] [--json FILE]

For each form: the median PSNR over random crops (the same boxes, drawn as in training, in scale 0.08 to 1 and 0.2 to 1,
both resized to the view with the same kernel), once with the boxes rounded to the stored pixels, as in training, once
with fractions of pixels, which leaves out that the rounded box is another one by up to half a pixel; bytes per image,
and images per second of one thread: gathered from memory into a batch, and cropped, resized and flipped as uint8.
`squashed` is a square, `short side` keeps the aspect.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ledger
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sslpre.data.decode import to_canvas
from sslpre.data.find import find
from sslpre.views import crop

SCALES = {"0.08-1": (0.08, 1.0), "0.2-1": (0.2, 1.0)}
RATIO = (3 / 4, 4 / 3)
FACTORS = (1.0, 1.25, 1.5, 2.0)
REPEATS = 5


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, 3] to [height, width, 3], as `to_canvas` does for squares."""
    if image.shape[:2] == (height, width):
        return image
    planes = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    return F.interpolate(planes, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def squashed(side: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda image: to_canvas(image, side)


def short_side(side: int) -> Callable[[np.ndarray], np.ndarray]:
    """Its aspect kept; never enlarged."""

    def form(image: np.ndarray) -> np.ndarray:
        factor = min(1.0, side / min(image.shape[:2]))
        return resized(image, *(max(1, round(factor * length)) for length in image.shape[:2]))

    return form


def forms(view: int, short: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Name → form. short: the median shorter side of the images; `auto` is what the recipes choose."""
    sides = {f"squashed {round(view * factor)}": round(view * factor) for factor in FACTORS}
    chosen = max(view, min(short, 2 * view))  # store_side in sslpre/train/plan.py
    sides[f"squashed {chosen}, auto"] = sides.pop(f"squashed {chosen}", chosen)
    kept = {f"short side {round(view * factor)}": short_side(round(view * factor)) for factor in (256 / 224, 1.5, 2.0)}
    return {name: squashed(side) for name, side in sides.items()} | kept | {"full size": lambda image: image}


def boxes_on(boxes: Tensor, image: np.ndarray, stored: np.ndarray) -> Tensor:
    """Boxes of the image, int64 [B, 4], on its stored form: each axis by the rule of `sslpre.views.crop.to_canvas`."""
    size = torch.tensor([image.shape[:2]]).expand(len(boxes), 2)
    placed = [crop.to_canvas(boxes, size, length)[:, axis::2] for axis, length in enumerate(stored.shape[:2])]
    return torch.stack([placed[0][:, 0], placed[1][:, 0], placed[0][:, 1], placed[1][:, 1]], 1)


def cut(image: np.ndarray, box: Tensor, view: int) -> np.ndarray:
    top, left, height, width = box.tolist()
    return resized(np.ascontiguousarray(image[top : top + height, left : left + width]), view, view)


def cut_exactly(stored: np.ndarray, box: Tensor, size: tuple[int, int], view: int) -> np.ndarray:
    """The box of an image of `size` (height, width) from its stored form, not rounded, which only Pillow can."""
    top, left, height, width = box.tolist()
    (rows, columns), (down, across) = stored.shape[:2], np.divide(stored.shape[:2], size).tolist()
    x, y = (left * across, min((left + width) * across, columns)), (top * down, min((top + height) * down, rows))
    x0, y0 = int(x[0]), int(y[0])  # pixels outside of the box have no part in it, as in a crop
    part = Image.fromarray(stored[y0 : math.ceil(y[1]), x0 : math.ceil(x[1])])
    edges = (x[0] - x0, y[0] - y0, x[1] - x0, y[1] - y0)
    return np.asarray(part.resize((view, view), Image.Resampling.BILINEAR, box=edges))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB; at most 99, which stands for equal images."""
    error = ((a.astype(np.float32) - b) ** 2).mean()
    return 99.0 if error == 0 else min(99.0, float(10 * np.log10(255**2 / error)))


def fidelity(
    images: list[np.ndarray], stored: list[np.ndarray], view: int, scale: tuple[float, float], crops: int
) -> tuple[float, float]:
    """Median PSNR in dB over `crops` boxes of each image: boxes rounded to stored pixels, and boxes as they are."""
    rounded, exact = [], []
    numbers = torch.rand(len(images), crops, crop.NUMBERS, generator=torch.Generator().manual_seed(0))
    for image, form, drawn in zip(images, stored, numbers, strict=True):
        size = image.shape[:2]
        boxes = crop.draw_boxes(drawn, torch.tensor([size]).expand(crops, 2), scale, RATIO)
        for there, here in zip(boxes, boxes_on(boxes, image, form), strict=True):
            wanted = cut(image, there, view)
            rounded.append(psnr(wanted, cut(form, here, view)))
            same = form.shape == image.shape
            exact.append(rounded[-1] if same else psnr(wanted, cut_exactly(form, there, size, view)))
    return float(np.median(rounded)), float(np.median(exact))


def rate(work: Callable[[], object], count: int) -> float:
    """Images per second: `count` over the shortest of some repeats."""
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return count / min(seconds)


def gathering(stored: list[np.ndarray]) -> Callable[[], object]:
    """All rows in a shuffled order into memory that is used again: one `take` where they have one shape."""
    order = np.random.default_rng(0).permutation(len(stored))
    if len({image.shape for image in stored}) == 1:
        rows = np.stack(stored)
        out = np.empty_like(rows)
        return lambda: np.take(rows, order, axis=0, out=out, mode="clip")
    outs = [np.empty_like(image) for image in stored]

    def copy_each() -> None:
        for i in order:
            np.copyto(outs[i], stored[i])

    return copy_each


def cropping(images: list[np.ndarray], stored: list[np.ndarray], view: int) -> Callable[[], object]:
    """One crop of each image, resized, every second one flipped."""
    numbers = torch.rand(len(images), 1, crop.NUMBERS, generator=torch.Generator().manual_seed(1))
    places = []
    for image, form, drawn in zip(images, stored, numbers, strict=True):
        boxes = crop.draw_boxes(drawn, torch.tensor([image.shape[:2]]), SCALES["0.2-1"], RATIO)
        places.append(boxes_on(boxes, image, form)[0].tolist())

    def crop_all() -> None:
        for i, (form, (top, left, height, width)) in enumerate(zip(stored, places, strict=True)):
            planes = torch.from_numpy(form)[None].permute(0, 3, 1, 2)[..., top : top + height, left : left + width]
            view_of = F.interpolate(planes, (view, view), mode="bilinear", antialias=True)
            if i % 2:
                view_of.flip(3)

    return crop_all


def measure(images: list[np.ndarray], view: int, crops: int) -> list[dict[str, Any]]:
    short = int(np.median([min(image.shape[:2]) for image in images]))
    rows = []
    for name, form in forms(view, short).items():
        stored = [np.ascontiguousarray(form(image)) for image in images]
        rows.append(
            {
                "form": name,
                "psnr": {told: fidelity(images, stored, view, scale, crops) for told, scale in SCALES.items()},  # dB
                "bytes": round(np.mean([image.nbytes for image in stored])),
                "gather": rate(gathering(stored), len(stored)),
                "crop": rate(cropping(images, stored, view), len(stored)),
            }
        )
    return sorted(rows, key=lambda row: row["bytes"])


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("images", type=Path)
    words.add_argument("--view", type=int, default=224, help="side of a view in pixels")
    words.add_argument("--images", dest="count", type=int, default=100, help="how many, evenly spaced")
    words.add_argument("--crops", type=int, default=10, help="boxes for each image")
    words.add_argument("--json", type=Path)
    asked = words.parse_args()
    torch.set_num_threads(1)
    source = find(asked.images).train
    chosen = np.unique(np.linspace(0, len(source) - 1, min(asked.count, len(source))).round().astype(int))
    images = [np.array(source.read(int(i))) for i in chosen]
    rows = measure(images, asked.view, asked.crops)
    sizes = np.median([image.shape[:2] for image in images], axis=0).astype(int).tolist()
    heads = [f"crops {told}, dB" for told in SCALES] + [f"{told}, exact boxes" for told in SCALES]

    def cells(row: dict[str, Any]) -> tuple[Any, ...]:
        levels = [level for kind in zip(*row["psnr"].values(), strict=True) for level in kind]
        told = [f"{level:.1f}" if level < 99 else "equal" for level in levels]
        return (row["form"], *told, row["bytes"] / 1000, row["gather"], row["crop"])

    ledger.show(
        f"{len(images)} images of {sizes[1]} x {sizes[0]} (median), {asked.crops} crops of each to {asked.view} px",
        ("stored as", *heads, "kB", "gathered/s", "crop + flip/s"),
        map(cells, rows),
    )
    report = {"images": len(images), "median_size": sizes, "view": asked.view, "crops": asked.crops, "forms": rows}
    ledger.write(asked.json, ledger.record("fidelity", report, ("sslpre", "torch", "pillow", "numpy", "simplejpeg")))


if __name__ == "__main__":
    main()
