"""Features of a frozen encoder, of every stage: read in evaluation mode from centre views that are decoded once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslpre.data import Source
from sslpre.data.stream import BadList, Stream
from sslpre.encoder import Encoder
from sslpre.errors import SslpreError
from sslpre.ops.channels import CHANNELS
from sslpre.ops.duplicates import perceptual
from sslpre.views.build import centre

RAW_SIDE = 32
LARGEST = 4096  # numbers that a stage's map is pooled to, at most
CALIBRATION = 2048  # images that set the batch statistics of random weights


class Centres:
    """The centre views of a source, uint8 [B, 3, s, s] on the device, in index order, as often as they are iterated.

    `keep` holds them in memory after the first pass; else they are decoded again. Images that cannot be read are left
    out, and named by `bad`. After the first pass `index` says which are there, `digests` what each is to the bit and,
    with `hashed`, `hashes` what each looks like and whether that can be compared (of `perceptual`, [N] each).
    """

    def __init__(
        self,
        source: Source,
        *,
        side: int,
        canvas: int,
        batch: int,
        workers: int,
        device: torch.device,
        bad: BadList,
        keep: bool,
        hashed: bool = False,
    ):
        self.side, self.keep, self.hashed = side, keep, hashed
        self.stream = Stream(source, side=canvas, batch_size=batch, seed=0, workers=workers, device=device, bad=bad)
        self.index = torch.empty(0, dtype=torch.int64)
        self.digests: list[bytes] = []
        self._hashes: list[tuple[np.ndarray, np.ndarray]] = []
        self._kept: list[Tensor] = []

    @property
    def hashes(self) -> tuple[np.ndarray, np.ndarray]:
        codes, shows = zip(*self._hashes, strict=True)
        return np.concatenate(codes), np.concatenate(shows)

    def __iter__(self) -> Iterator[Tensor]:
        if self._kept:
            device = self.stream.device
            yield from (views.to(device, non_blocking=True) for views in self._kept)
            return
        first, expected = not len(self.index), 0
        for batch in self.stream.in_order():
            # a replacement stands where its index is not due: the image it repeats has its own turn
            here = batch.index == torch.arange(expected, expected + len(batch.index))
            expected += len(batch.index)
            views = centre(batch.pixels, batch.size, self.side).mul(255).round().to(torch.uint8)
            if not here.all():
                views = views[here.to(views.device)]
            if not len(views):
                continue
            if first:
                self.index = torch.cat([self.index, batch.index[here]])
                host = views.cpu().contiguous()
                self.digests += [hashlib.blake2b(view.numpy().data, digest_size=16).digest() for view in host]
                if self.hashed:
                    self._hashes.append(perceptual(views))
                if self.keep:
                    self._kept.append(host)
            yield views

    def views(self, rows: Tensor) -> Tensor:
        """These images in this order, uint8 [M, 3, s, s] on the CPU, by one more pass; rows: int64 [M], each once."""
        place, begun = torch.full((len(self.index),), -1), 0
        place[rows] = torch.arange(len(rows))
        images = torch.empty(len(rows), 3, self.side, self.side, dtype=torch.uint8)
        for views in self:
            here = place[begun : begun + len(views)]
            begun += len(views)
            images[here[here >= 0]] = views.cpu()[here >= 0]
        return images


def fingerprint(module: nn.Module) -> str:
    """blake2b of every parameter and buffer, names, types and shapes included, to the bit: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for kind in (module.named_parameters(), module.named_buffers()):
        for name, tensor in kind:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Layout:
    """The features that are read from an encoder, shallow to deep; the last is its output, what is exported.

    stages: index of each in timm's `out_indices`, None for the output. dims: numbers of each. at_once: the output comes
    with the stages in one pass. notes: what a reader of the table should know.
    """

    names: tuple[str, ...]
    stages: tuple[int | None, ...]
    dims: tuple[int, ...]
    at_once: bool
    notes: tuple[str, ...]

    def output(self) -> Layout:
        """The last row alone."""
        return Layout(self.names[-1:], (None,), self.dims[-1:], False, self.notes)


def grid(channels: int, side: int) -> int:
    """Side of the largest square grid, at most `side`, with channels · grid² ≤ 4,096; at least 1."""
    return max(1, min(side, math.isqrt(LARGEST // channels)))


def layout(encoder: Encoder) -> Layout:
    """What can be read from `encoder`, found by reading two random images. It must be in evaluation mode."""
    side, names = encoder.image_size, encoder.stage_names
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(encoder.mean.device)
    output, indices = "output", [*range(len(names))]
    if not indices:
        note = f"{encoder.architecture} does not give its stages: the table has its output alone"
        return Layout((output,), (None,), (encoder.dim,), False, (note,))
    with torch.inference_mode():
        whole = encoder(images)
        try:
            last, maps = encoder.model.forward_intermediates(encoder.prepare(images), indices=indices)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # timm's networks refuse each in its way
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            note = f"the stages of {encoder.architecture} cannot be read, the table has its output alone: {reason}"
            return Layout((output,), (None,), (encoder.dim,), False, (note,))
        headed = encoder.model.forward_head(last) if hasattr(encoder.model, "forward_head") else last
    at_once = headed.shape == whole.shape and torch.allclose(headed, whole, rtol=1e-4, atol=1e-5)
    found = [(names[index], index, pooled(one).shape[1]) for index, one in zip(indices, maps, strict=True)]
    titles, places, dims = zip(*found, strict=True)
    return Layout((*titles, output), (*places, None), (*dims, encoder.dim), at_once, ())


def pooled(stage: Tensor) -> Tensor:
    """A stage's map [B, C, h, w], averaged over the largest square grid that gives at most 4,096 numbers, flat."""
    side = grid(stage.shape[1], min(stage.shape[2:]))
    return F.adaptive_avg_pool2d(stage, side).flatten(1)


def describe(encoder: Encoder, plan: Layout, images: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Features of images in [0, 1], [B, 3, s, s]: [B, D] for each of these rows of `plan`, in one pass.

    "output" is `encoder(images)`.
    """
    images = images.contiguous(memory_format=torch.channels_last)  # convolutions on a CPU are twice as fast
    indices = [stage for row in rows if (stage := plan.stages[row]) is not None]
    if not indices:
        return [encoder(images) for _ in rows]
    last, maps = encoder.model.forward_intermediates(encoder.prepare(images), indices=indices)
    found = dict(zip(indices, maps, strict=True))
    features = [pooled(found[stage]) for stage in indices]
    if len(indices) < len(rows):  # the output is the last row
        features.append(encoder.model.forward_head(last) if plan.at_once else encoder(images))
    return features


def raw(views: Tensor, encoder: Encoder) -> Tensor:
    """Centre views (uint8 [B, 3, s, s]) as 32×32 pixels, flat: [B, 3072]. Smaller ones stay as they are.

    Standardised with the encoder's mean and std: pixels in [0, 1] all point the same way, so that cosines between them
    say little.
    """
    images = (views.float() / 255 - encoder.mean) / encoder.std
    if images.shape[-1] > RAW_SIDE:
        images = F.interpolate(images, (RAW_SIDE, RAW_SIDE), mode="bilinear", antialias=True, align_corners=False)
    return images.flatten(1)


Reading = tuple[Encoder, tuple[int, ...]]  # an encoder and the rows of its layout that are wanted


def readings(encoders: Sequence[Encoder], plan: Layout, images: int, most: int) -> Iterator[list[Reading]]:
    """All rows of all encoders in order, in parts whose features of so many images take at most `most` bytes.

    An encoder is divided, and so run more than once, only where it does not fit alone. A row that alone takes more than
    `most` is a part of its own.
    """
    sizes = [4 * images * dim for dim in plan.dims]
    part: dict[int, list[int]] = {}
    used = 0
    for at in range(len(encoders)):
        for row, size in enumerate(sizes):
            if part and used + (size if row else sum(sizes)) > most:
                yield [(encoders[which], tuple(rows)) for which, rows in part.items()]
                part, used = {}, 0
            part.setdefault(at, []).append(row)
            used += size
    yield [(encoders[which], tuple(rows)) for which, rows in part.items()]


def extract(
    wanted: Sequence[Reading], plan: Layout, centres: Centres, with_raw: bool = False
) -> tuple[list[list[Tensor]], Tensor | None]:
    """One pass over the images: for each reading its features, [N, D] float32; and raw pixels if asked for.

    The encoders are left in evaluation mode, unchanged. Raises SslpreError: exit 4 where no image is left, 10 where an
    encoder's features are not finite.
    """
    total, device, done = len(centres.stream.source), centres.stream.device, 0
    # filled in place: a list of batches joined at the end would take twice the memory
    found = [[torch.empty(total, plan.dims[row], device=device) for row in rows] for _, rows in wanted]
    pixels: list[Tensor] = []
    for encoder, _ in wanted:
        encoder.eval()
    for views in centres:
        with torch.inference_mode():
            images = views.float() / 255
            for (encoder, rows), whole in zip(wanted, found, strict=True):
                for features, target in zip(describe(encoder, plan, images, rows), whole, strict=True):
                    target[done : done + len(views)] = features
            if with_raw:
                pixels.append(raw(views, wanted[0][0]))
        done += len(views)
    if not done:
        where = centres.stream.source.where
        raise SslpreError(f"no image of `{where}` can be read", "check the files, or name another --data", 4)
    found = [[whole[:done] for whole in parts] for parts in found]
    if not all(bool(features.isfinite().all()) for parts in found for features in parts):
        hint = "probe an earlier run, or train again with --precision fp32"
        raise SslpreError("the encoder's features are not finite", hint, 10)
    return found, torch.cat(pixels) if with_raw else None


def random_twin(encoder: Encoder, seed: int, calibration: Tensor, batch: int) -> Encoder:
    """The same architecture with fresh weights from `seed`, its batch statistics set by one pass over `calibration`.

    calibration: uint8 [M, 3, s, s] training images in random order, so that every batch is a fair sample; their batches
    count alike (momentum None). Only batch normalisation runs in training mode: dropout would be noise.
    """
    channels: dict[str, Any] = {} if encoder.colour == "rgb" else {"in_chans": CHANNELS[encoder.colour]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(encoder.architecture, num_classes=0, **encoder.model_args, **channels)
    twin = Encoder(model, encoder.architecture, encoder.model_args, encoder.image_size, (0.0,), (1.0,), encoder.colour)
    twin.mean, twin.std = encoder.mean.detach().cpu().clone(), encoder.std.detach().cpu().clone()
    twin.to(encoder.mean.device).eval()
    kinds = nn.modules.batchnorm._BatchNorm
    norms = [part for part in twin.modules() if isinstance(part, kinds) and part.track_running_stats]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for views in calibration.split(batch) if norms else ():
            if len(views) > 1:  # one image alone may have no variance
                twin(views.to(encoder.mean.device).float() / 255)
    return twin.eval()


def calibration_images(centres: Centres, seed: int) -> Tensor:
    """Up to 2,048 centre views in random order, uint8 [M, 3, s, s] on the CPU. Needs a first pass over the images."""
    return centres.views(
        torch.randperm(len(centres.index), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    )
