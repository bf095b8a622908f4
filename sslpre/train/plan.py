"""What `auto` means: one pure function of the data and the device, never of timing."""

from __future__ import annotations

import math
from typing import Any

from sslpre.encoder import takes_small
from sslpre.errors import SslpreError
from sslpre.recipe import Recipe
from sslpre.train.device import Facts

FEWEST = 16  # images: the batch is at most an eighth of them, and a batch of one has nothing to compare


def resolve(recipe: Recipe, images: int, short_side: int, device: Facts) -> Recipe:
    """The recipe with every `auto` replaced by a number or a name.

    images: how many there are to train on; short_side: their median, in pixels. Raises SslpreError: exit 4 for fewer
    than 16 images where the batch is to be chosen, exit 2 for a batch larger than the data set.
    """
    encoder, train = recipe.encoder, recipe.train
    image_size = side(short_side, device) if encoder.image_size == "auto" else encoder.image_size
    backbone = network(images, image_size, device) if encoder.backbone == "auto" else encoder.backbone
    small = takes_small(backbone, encoder.stem, image_size)
    stem = encoder.stem if encoder.stem != "auto" else "small" if small else "timm"
    if train.batch_size == "auto" and images < FEWEST:
        raise SslpreError(
            f"`{images}` images are too few to train on", f"sslpre needs {FEWEST}, and learns from 5,000 up", 4
        )
    batch = batch_size(images, image_size, device) if train.batch_size == "auto" else train.batch_size
    if batch > images:
        raise SslpreError(
            f"batch size `{batch}` is larger than the data set: {images} images, no step would run",
            f"--batch-size {max(2, images // 8)}",
        )
    largest = max(view.size or image_size for view in recipe.views)
    chosen: dict[str, dict[str, Any]] = {
        "encoder": {"image_size": image_size, "backbone": backbone, "stem": stem},
        "data": {
            "store_size": store_side(largest, short_side)
            if recipe.data.store_size == "auto"
            else recipe.data.store_size
        },
        "optim": {"lr": learning_rate(recipe.optim.name, batch) if recipe.optim.lr == "auto" else recipe.optim.lr},
        "train": {
            "batch_size": batch,
            "epochs": epochs(images, image_size, device) if train.epochs == "auto" else train.epochs,
            "precision": ("bf16" if device.bf16 else "fp32") if train.precision == "auto" else train.precision,
        },
    }
    return recipe.edit(**chosen)


def side(short_side: int, device: Facts) -> int:
    """Image size: the nearest step below the photos' own size; a CPU stops at 64 px."""
    steps = [32, 64] if device.kind == "cpu" else [32, 64, 96, 128, 224]
    return max([s for s in steps if s <= short_side * 1.1], default=32)


def network(images: int, image_size: int, device: Facts) -> str:
    """A network that the device trains in reasonable time and that the data can feed."""
    if device.kind == "cpu":
        return "test_resnet"
    return "resnet50" if image_size >= 128 and images >= 100_000 else "resnet18"


def batch_size(images: int, image_size: int, device: Facts) -> int:
    """The largest power of two up to an eighth of the images, and up to what the device takes in one piece."""
    most = 64 if device.kind == "cpu" else 256  # on a CPU a step costs by the image, so small steps learn more an hour
    if device.kind == "cuda" and device.memory >= 16:
        most = 1024 if image_size <= 64 else 512 if device.memory >= 40 else 256
    return 2 ** int(math.log2(min(most, images / 8)))


def store_side(largest: int, short_side: int) -> int:
    """Side of the square each decoded image is kept at: its own where that is small, else twice the largest view."""
    return max(largest, min(short_side, 2 * largest))


def learning_rate(optimiser: str, batch: int) -> float:
    """LARS after SimCLR's appendix B.1 (0.075·√B); SGD linear in the batch; AdamW by its square root."""
    if optimiser == "lars":
        return round(0.075 * math.sqrt(batch), 6)
    if optimiser == "sgd":
        return round(0.06 * batch / 128, 6)
    return round(1e-3 * math.sqrt(batch / 256), 8)


def epochs(images: int, image_size: int, device: Facts) -> int:
    """So many that the network sees a fixed number of images (on a CPU: of pixels, minutes of work), within bounds."""
    if device.kind == "cpu":
        return min(100, max(5, round(100_000 * (64 / image_size) ** 2 / images)))
    return min(800, max(30, round(20_000_000 / images)))
