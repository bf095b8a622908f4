"""The run that was measured, in plain values, and what is known of it that advice may depend on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sslpre.bench.stores import Chosen
from sslpre.data import decode, room
from sslpre.data.find import Found
from sslpre.data.headers import jpegs
from sslpre.encoder import Encoder
from sslpre.recipe import Recipe
from sslpre.train import device, loop
from sslpre.train.build import own_cores
from sslpre.train.run import Options
from sslpre.views.build import compiler, repays

SIDES = (32, 64, 96, 128, 160, 224)  # image sizes that may be advised


@dataclass(frozen=True)
class Setting:
    """What was measured: the run that `sslpre pretrain` with the same words would be. Sizes in pixels and bytes."""

    recipe: str
    images: str  # as typed, "" for the sample set
    where: str
    count: int  # images
    measured: int  # on so many of them
    device: str
    kind: str  # "cpu", "cuda" or "mps"
    bf16: bool  # does the device compute in bfloat16?
    cores: int
    workers: int
    precision: str
    compile: bool
    backbone: str
    image_size: int
    store_size: int
    sides: tuple[int, ...]  # of the views
    smaller: int  # an image size below this one that the network takes, 0: none
    batch_size: int  # as the run would have it
    batch: int  # that was measured: smaller where a whole one would take too long
    part: int  # images in memory at a time, 0 for all
    epochs: int
    store: str  # "device", "ram", "disk" or "off"
    store_line: str
    held: int  # images that are stored already, before the run begins
    fits_ram: bool  # is so much memory free that `--store ram` is possible?
    simplejpeg: bool  # is it installed, or are there no JPEG files that it would decode faster?
    compiler: str | None  # what could compile the views
    compilable: bool  # would compiling the views repay in this run, were there a compiler?
    compiled: bool  # are they?
    graphs: int
    compile_s: float  # seconds, of the views
    network_s: float  # seconds of a first step in which the network is compiled; 0 without
    note: str  # what was not measured as the run has it


def described(
    options: Options,
    recipe: Recipe,
    found: Found,
    chosen: Chosen,
    run: loop.Run,
    compile_s: float,
    network_s: float,
    note: str,
) -> Setting:
    train = recipe.train
    assert train.batch_size != "auto" and train.epochs != "auto" and recipe.encoder.image_size != "auto"
    free, steps = room.memory(), train.epochs * (len(found.train) // train.batch_size)
    return Setting(
        recipe=str(options.recipe),
        images=str(options.images or recipe.data.images),
        where=found.train.where,
        count=len(found.train),
        measured=len(run.stream.source),
        device=device.label(run.device),
        kind=run.device.type,
        bf16=device.facts(run.device).bf16,
        cores=own_cores(),
        workers=run.stream.workers,
        precision=train.precision,
        compile=train.compile,
        backbone=recipe.encoder.backbone,
        image_size=recipe.encoder.image_size,
        store_size=run.stream.side,
        sides=run.views.sides,
        smaller=smaller_side(run.objective.encoder, recipe, run.device),
        batch_size=train.batch_size,
        batch=run.stream.batch_size,
        part=run.part,
        epochs=train.epochs,
        store=chosen.kind,
        store_line=chosen.line,
        held=chosen.held,
        fits_ram=free is not None and len(found.train) * 3 * run.stream.side**2 < free,
        simplejpeg=decode.simplejpeg is not None or not jpegs(found.train),
        compiler=compiler(run.device),
        compilable=repays(run.device, steps * run.views.saves(run.device, train.batch_size)),
        compiled=run.views.made != "eager",
        graphs=run.views.graphs,
        compile_s=compile_s,
        network_s=network_s,
        note=note,
    )


def smaller_side(network: Encoder, recipe: Recipe, where: torch.device) -> int:
    """The next smaller image size that can be advised; 0 where no view follows the image size, or none is possible.

    A network with patches gets none: its weights, and often its shape, belong to its size.
    """
    size = recipe.encoder.image_size
    assert size != "auto"
    if hasattr(network.model, "patch_embed") or all(table.size for table in recipe.views):
        return 0
    side = max((side for side in SIDES if side < size), default=0)
    if side and where.type == "cpu" and recipe.train.precision == "bf16" and network.strides_a_point(side):
        return 0
    return side
