"""Features of a frozen encoder: extracted once, in evaluation mode, from centre views that are decoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslpre.data import Source
from sslpre.data.stream import BadList, Stream
from sslpre.encoder import CHANNELS, Encoder
from sslpre.errors import SslpreError
from sslpre.views.build import centre

RAW_SIDE = 32
STAGES = ("layer1", "layer2", "layer3", "layer4")
CALIBRATION = 2048  # images that set the batch statistics of random weights


class Centres:
    """The centre views of a source, uint8 [B, 3, s, s] on the device, in index order, as often as they are iterated.

    `keep` holds them in memory after the first pass; else they are decoded again. Images that cannot be read are left
    out, and named by `bad`. After the first pass `index` says which are there, `digests` what each is to the bit.
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
    ):
        self.side, self.keep = side, keep
        self.stream = Stream(source, side=canvas, batch_size=batch, seed=0, workers=workers, device=device, bad=bad)
        self.index = torch.empty(0, dtype=torch.int64)
        self.digests: list[bytes] = []
        self._kept: list[Tensor] = []

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
                if self.keep:
                    self._kept.append(host)
            yield views


def fingerprint(module: nn.Module) -> str:
    """blake2b of every parameter and buffer, names, types and shapes included, to the bit: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for kind in (module.named_parameters(), module.named_buffers()):
        for name, tensor in kind:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def names(encoder: Encoder) -> tuple[str, ...]:
    """What `describe` gives: the four stages of a ResNet, the last of which is its output, or the output alone."""
    return STAGES if isinstance(encoder.model, timm.models.ResNet) else ("output",)


def describe(encoder: Encoder, images: Tensor) -> list[Tensor]:
    """Features of images in [0, 1], [B, 3, s, s]: [B, D] for each of `names`. The last is `encoder(images)`."""
    if not isinstance(encoder.model, timm.models.ResNet):
        return [encoder(images)]
    last, maps = encoder.model.forward_intermediates(encoder.prepare(images), indices=[1, 2, 3])
    return [*(stage.mean((2, 3)) for stage in maps), encoder.model.forward_head(last, pre_logits=True)]


def raw(views: Tensor, encoder: Encoder) -> Tensor:
    """Centre views (uint8 [B, 3, s, s]) as 32×32 pixels, flat: [B, 3072]. Smaller ones stay as they are.

    Standardised with the encoder's mean and std: pixels in [0, 1] all point the same way, so that cosines between them
    say little.
    """
    images = (views.float() / 255 - encoder.mean) / encoder.std
    if images.shape[-1] > RAW_SIDE:
        images = F.interpolate(images, (RAW_SIDE, RAW_SIDE), mode="bilinear", antialias=True, align_corners=False)
    return images.flatten(1)


def extract(
    encoders: Sequence[Encoder], centres: Centres, with_raw: bool = False
) -> tuple[list[list[Tensor]], Tensor | None]:
    """One pass over the images: for each encoder its features by name, [N, D] float32; and raw pixels if asked for.

    The encoders are left in evaluation mode, unchanged. Raises SslpreError: exit 4 where no image is left, 10 where an
    encoder's features are not finite.
    """
    found: list[list[list[Tensor]]] = [[[] for _ in names(encoder)] for encoder in encoders]
    pixels: list[Tensor] = []
    for encoder in encoders:
        encoder.eval()
    with torch.inference_mode():
        for views in centres:
            images = views.float() / 255
            for encoder, lists in zip(encoders, found, strict=True):
                for features, kept in zip(describe(encoder, images), lists, strict=True):
                    kept.append(features.float())
            if with_raw:
                pixels.append(raw(views, encoders[0]))
    if not len(centres.index):
        where = centres.stream.source.where
        raise SslpreError(f"no image of `{where}` can be read", "check the files, or name another --data", 4)
    joined = [[torch.cat(kept) for kept in lists] for lists in found]  # outside inference mode: ordinary tensors
    if not all(bool(features.isfinite().all()) for lists in joined for features in lists):
        hint = "probe an earlier run, or train again with --precision fp32"
        raise SslpreError("the encoder's features are not finite", hint, 10)
    return joined, torch.cat(pixels) if with_raw else None


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
    order = torch.randperm(len(centres.index), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    place = torch.full((len(centres.index),), -1)
    place[order] = torch.arange(len(order))
    images: Tensor | None = None
    begun = 0
    for views in centres:
        here = place[begun : begun + len(views)]
        begun += len(views)
        if images is None:
            images = torch.empty(len(order), *views.shape[1:], dtype=torch.uint8)
        images[here[here >= 0]] = views.cpu()[here >= 0]
    assert images is not None, "the first pass found images"
    return images
