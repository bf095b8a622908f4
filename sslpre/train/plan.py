"""What `auto` means: one pure function of the data, the device and the starting weights, never of timing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import timm
from pydantic import ValidationError

from sslpre.encoder import size_arguments, takes_small
from sslpre.errors import SslpreError
from sslpre.methods import methods
from sslpre.recipe import EncoderTable, Recipe
from sslpre.timm import small_stem_of
from sslpre.train.device import Facts
from sslpre.weights import PRETRAINED, TIMM

if TYPE_CHECKING:
    from sslpre.start import Start

FEWEST = 16  # images: the batch is at most an eighth of them, and a batch of one has nothing to compare


def resolve(
    recipe: Recipe, images: int, short_side: int, device: Facts, start: Start | None = None, world: int = 1
) -> Recipe:
    """The recipe with every `auto` replaced by a number or a name.

    images: how many there are to train on; short_side: their median, in pixels; start: the weights that `init` names,
    whose network, stem and colours the run gets; world: processes that share each batch. Raises SslpreError: exit 4 for
    fewer than 16 images where the batch is to be chosen, exit 2 for a batch larger than the data set and for a recipe
    that names another network than `init`.
    """
    encoder, train = recipe.encoder, recipe.train
    if start is None:
        image_size = side(short_side, device) if encoder.image_size == "auto" else encoder.image_size
        backbone = network(images, image_size, device) if encoder.backbone == "auto" else encoder.backbone
        small = takes_small(backbone, encoder.stem, image_size, shown(recipe, image_size))
        stem = encoder.stem if encoder.stem != "auto" else "small" if small else "timm"
        table: dict[str, Any] = {"image_size": image_size, "backbone": backbone, "stem": stem}
    else:
        table = begun_with(start, encoder, side(short_side, device))
        image_size = table["image_size"]
    if train.batch_size == "auto" and images < FEWEST:
        raise SslpreError(
            f"`{images}` images are too few to train on", f"sslpre needs {FEWEST}, and learns from 5,000 up", 4
        )
    shared_out = max(1, batch_size(images, image_size, device) // world) * world
    batch = shared_out if train.batch_size == "auto" else train.batch_size
    if batch > images:
        raise SslpreError(
            f"batch size `{batch}` is larger than the data set: {images} images, no step would run",
            f"--batch-size {max(2, images // 8)}",
        )
    largest = max(view.size or image_size for view in recipe.views)
    chosen: dict[str, dict[str, Any]] = {
        "encoder": table,
        "data": {
            "store_size": store_side(largest, short_side)
            if recipe.data.store_size == "auto"
            else recipe.data.store_size
        },
        "optim": {
            "lr": learning_rate(recipe.optim.name, batch, start) if recipe.optim.lr == "auto" else recipe.optim.lr,
            "warmup": (0.1 if start is None else 0.2) if recipe.optim.warmup == "auto" else recipe.optim.warmup,
        },
        "train": {
            "batch_size": batch,
            "epochs": epochs(images, image_size, device) if train.epochs == "auto" else train.epochs,
            "precision": ("bf16" if device.bf16 else "fp32") if train.precision == "auto" else train.precision,
        },
    }
    return recipe.edit(**chosen)


def shown(recipe: Recipe, image_size: int) -> int:
    """Side of what the encoder sees in training: the stem follows it. Networks with a choice of stem have no patch."""
    arguments = {key: item for key, item in recipe.method.items() if key != "name"}
    side = min(view.size or image_size for view in recipe.views)
    return methods()[recipe.method["name"]].sees(side, **arguments) if len(recipe.views) == 1 else image_size


def begun_with(start: Start, encoder: EncoderTable, usual: int) -> dict[str, Any]:
    """The [encoder] keys of a run from `start`. usual: the image size that the data and the device ask for.

    The weights belong to their mean and standard deviation, so these are taken unless the recipe names others than the
    default. Raises SslpreError (exit 2) where the recipe names another network, or a size that the stem is not for.
    """
    named = (
        encoder.backbone.partition(".")[0] if timm.is_model(encoder.backbone.partition(".")[0]) else encoder.backbone
    )
    if named not in ("auto", start.architecture, f"{start.architecture}_small"):
        message = f"`--init {start.source}` is a {start.architecture}, `--backbone {encoder.backbone}` names another"
        raise SslpreError(message, f"--backbone {start.architecture}, or other weights")
    stem = "small" if small_stem_of(named) is not None else encoder.stem
    if stem not in ("auto", start.stem):
        told = {"small": "a small stem", "timm": "timm's own stem"}
        message = f"`--init {start.source}` has {told[start.stem]}, and the recipe asks for `{stem}`"
        raise SslpreError(message, f"--set encoder.stem={start.stem}")
    refuse_unwritable(start)
    arguments = {**start.extra, **encoder.model_args}
    for name, item in arguments.items():
        if name in start.extra and item != start.extra[name]:
            message = f"`--init {start.source}` has {name}={start.extra[name]}, and the recipe asks for `{item}`"
            raise SslpreError(message, f"leave {name} out of [encoder] model_args")
    image_size = encoder.image_size
    if image_size == "auto":
        image_size = fitting(start, usual, arguments)
    elif start.stem == "small" and image_size > 64:
        message = f"`--init {start.source}` has a small stem, for images up to 64 px, not `{image_size}`"
        raise SslpreError(message, "--image-size 64")
    default = EncoderTable()
    return {
        "image_size": image_size,
        "backbone": start.architecture,
        "stem": start.stem,
        "init": start.init,
        "mean": start.mean if encoder.mean == default.mean else encoder.mean,
        "std": start.std if encoder.std == default.std else encoder.std,
        "model_args": arguments,
    }


def refuse_unwritable(start: Start) -> None:
    """Raises SslpreError (exit 5) where the network of `start` has arguments that a recipe cannot hold."""
    try:
        EncoderTable(model_args=start.extra)
    except ValidationError as error:
        told = ", ".join(f"{name}={item}" for name, item in start.extra.items())
        message = f"`--init {start.source}` is a {start.architecture} with `{told}`, which no recipe can hold"
        raise SslpreError(message, "start from other weights", 5) from error


def fitting(start: Start, usual: int, model_args: dict[str, Any]) -> int:
    """The usual image size where the starting network can take it, else the one that it was trained at."""
    if start.stem == "small":
        return min(usual, 64)
    try:
        arguments = size_arguments(start.architecture, usual, model_args)
    except SslpreError:  # its patches do not divide it
        return start.image_size
    cfg = timm.get_pretrained_cfg(start.architecture)
    laid_out = "dynamic_img_size" not in arguments and (arguments or (cfg is not None and cfg.fixed_input_size))
    return start.image_size if laid_out else usual


def as_begun(wanted: Recipe, begun: Recipe) -> Recipe:
    """`wanted` with what `resolve` made of its `init`, taken from the run that was begun: the same wish, spelled out.

    So that a command that is typed again with `--resume auto` is recognised; another start stays another start.
    """
    ours, theirs = wanted.encoder, begun.encoder
    timms = ours.init == PRETRAINED and theirs.init.startswith(TIMM)
    if not theirs.init or not (timms or ours.init == theirs.init):
        return wanted
    default = EncoderTable()
    name, _, tag = ours.backbone.partition(".")
    same = (small_stem_of(name) or name) == theirs.backbone and (
        not tag or theirs.init in (f"{TIMM}{ours.backbone}", ours.init)
    )
    keys: dict[str, Any] = {"init": theirs.init}
    keys |= {"backbone": theirs.backbone} if same else {}
    keys |= {"mean": theirs.mean} if ours.mean == default.mean else {}
    keys |= {"std": theirs.std} if ours.std == default.std else {}
    keys |= {"model_args": theirs.model_args} if ours.model_args.items() <= theirs.model_args.items() else {}
    return wanted.edit(encoder=keys)


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


def learning_rate(optimiser: str, batch: int, start: Start | None = None) -> float:
    """LARS after SimCLR's appendix B.1 (0.075·√B); SGD linear in the batch; AdamW by its square root.

    A tenth of it from starting weights: the rate for random ones makes a network forget what it has learned, and with
    a new head on top its first gradients are the head's noise, hence twice the warm-up too. A rule of thumb, not
    measured yet.
    """
    if optimiser == "lars":
        rate = round(0.075 * math.sqrt(batch), 6)
    elif optimiser == "sgd":
        rate = round(0.06 * batch / 128, 6)
    else:
        rate = round(1e-3 * math.sqrt(batch / 256), 8)
    return rate if start is None else round(rate / 10, 9)


def epochs(images: int, image_size: int, device: Facts) -> int:
    """So many that the network sees a fixed number of images (on a CPU: of pixels, minutes of work), within bounds."""
    if device.kind == "cpu":
        return min(100, max(5, round(100_000 * (64 / image_size) ** 2 / images)))
    return min(800, max(30, round(20_000_000 / images)))
