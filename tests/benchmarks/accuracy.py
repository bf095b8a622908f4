"""Is speed paid for with accuracy? SimCLR trained on torchvision's own transforms and on ours, all else equal.

    python tests/benchmarks/accuracy.py --images CIFAR --epochs 20 --seeds 3

CIFAR has train/CLASS/* and test/CLASS/*. Both sides read the same stored pixels in the same order, start from the same
weights and take as many steps; only who makes the views differs. kNN accuracy of the encoder's output on test/.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ledger
import ours
import torch
from torch import Tensor
from torchvision.transforms import v2

from sslpre.data.find import Found, find
from sslpre.probe.knn import TEMPERATURE, K
from sslpre.recipe import View
from sslpre.train import device, loop, memory
from sslpre.views.blur import kernel_side

VOTES = {K: TEMPERATURE, 200: 0.1}  # ours, and what published CIFAR-10 figures use
SIDES = ("torchvision", "sslpre")


class Reference:
    """Views by torchvision's v2 transforms, called on one image after the other; called as sslpre's Views are."""

    made = "torchvision"  # how, for the run's records

    def __init__(self, tables: Sequence[View], image_size: int):
        tables = [table for table in tables for _ in range(table.copies)]
        self.sides = tuple(table.size or image_size for table in tables)
        self._chains = [chain(table, side) for table, side in zip(tables, self.sides, strict=True)]

    def __call__(self, pixels: Tensor, size: Tensor, index: Tensor, epoch: int) -> list[Tensor]:
        """Float32 [B, 3, s, s] in [0, 1] per view; the numbers come from torch's global generator."""
        if not (size[:, 0] == size[:, 1]).all():
            raise SystemExit("the reference crops the stored squares, so the images must be square themselves")
        return [torch.stack([one(image) for image in pixels.cpu()]).to(pixels.device) for one in self._chains]


def chain(table: View, side: int) -> v2.Compose:
    """One `[[views]]` table in torchvision's words; colours in float, as ours."""
    if table.kornia:
        raise SystemExit("torchvision has no kornia augmentations: take a recipe without them")
    jitter = v2.ColorJitter(table.brightness, table.contrast, table.saturation, table.hue)
    steps: list[Any] = [v2.RandomResizedCrop(side, table.crop_scale, table.crop_ratio, antialias=True)]
    steps += [v2.RandomHorizontalFlip(table.flip), v2.ToDtype(torch.float32, scale=True)]
    steps += [v2.RandomApply([jitter], table.jitter), v2.RandomGrayscale(table.gray)]
    if table.blur and kernel_side(side, table.blur_kernel) > 1:
        blur = v2.GaussianBlur(kernel_side(side, table.blur_kernel), table.blur_sigma)
        steps.append(v2.RandomApply([blur], table.blur))
    return v2.Compose(steps)


def train(side: str, seed: int, found: Found, arguments: argparse.Namespace, where: torch.device) -> dict[str, Any]:
    """One run to its end, and what its encoder knows."""
    typed = (f"train.seed={seed}", f"train.epochs={arguments.epochs}", *arguments.set)
    with tempfile.TemporaryDirectory() as folder:
        recipe = ours.resolved(arguments.recipe, found, where, typed)
        run = ours.run_of(Path(folder), recipe, found, where, "ram")
        if side == "torchvision":
            assert recipe.encoder.image_size != "auto"
            run.views = Reference(recipe.views, recipe.encoder.image_size)
        figures = loop.train(run)
    known = ours.knn(run, found, VOTES)
    return {"views": side, "seed": seed, "steps": run.step, "seconds": figures["seconds"], **known}


def summary(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over seeds, and the difference between the two sides in standard errors of it."""
    found: dict[str, dict[str, Any]] = {}
    for key in [key for key in results[0] if key.startswith("knn")]:
        by = {side: torch.tensor([one[key] for one in results if one["views"] == side]).double() for side in SIDES}
        several = len(by["sslpre"]) > 1
        spread = {side: some.std().item() if several else None for side, some in by.items()}
        apart = (by["sslpre"] - by["torchvision"]).mean().item()
        error = (sum(some.var() / len(some) for some in by.values())) ** 0.5 if several else None
        found[key] = {
            "mean": {side: some.mean().item() for side, some in by.items()},
            "std": spread,
            "difference": apart,
            "standard_error": None if error is None else float(error),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="DIR with train/CLASS/* and test/CLASS/*")
    parser.add_argument("--recipe", default="simclr")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    memory.keep_freed()
    found, where = find(arguments.images), device.pick(arguments.device)
    if found.test is None:
        raise SystemExit(f"{arguments.images} has no test/ beside train/")
    settings = {key: getattr(arguments, key) for key in ("recipe", "epochs", "seeds", "set")}
    results: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for side in SIDES:
            results.append(train(side, seed, found, arguments, where))
            told = {"settings": settings, "images": len(found.train), "device": where.type, "runs": results}
            ledger.write(arguments.json, ledger.record("accuracy", told, ours.PACKAGES))
    whole = summary(results)
    ledger.show(
        f"SimCLR on {len(found.train):,} images, {arguments.epochs} epochs, recipe {arguments.recipe}",
        ("views", "seed", *whole, "seconds"),
        ([one["views"], one["seed"], *(100 * one[key] for key in whole), one["seconds"]] for one in results),
    )
    ledger.show(
        "ours − torchvision's, in points of %",
        ("", "torchvision", "±", "sslpre", "±", "difference", "its standard error"),
        (
            (
                key,
                *(percent(one[of][side]) for side in SIDES for of in ("mean", "std")),
                *(percent(one[of]) for of in ("difference", "standard_error")),
            )
            for key, one in whole.items()
        ),
    )
    ledger.write(arguments.json, ledger.record("accuracy", {**told, "summary": whole}, ours.PACKAGES))


def percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


if __name__ == "__main__":
    main()
