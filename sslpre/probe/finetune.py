"""Finetuning: how good does the whole network become when it is trained on labels, from these weights?

The head begins as the linear probe of the same images (Kumar et al., "Fine-Tuning can Distort Pretrained Features and
Underperform Out-of-Distribution", 2022, https://arxiv.org/abs/2202.10054): a random one would need a rate of its own,
tens or hundreds of times the network's in the protocols for 1 % and 10 % of ImageNet (SwAV, Caron et al., 2020; Chen et
al., 2020). As there: SGD with momentum, no decay, 20 epochs; the rate is one of three, chosen on held-out images.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslpre.encoder import Encoder
from sslpre.probe.linear import HELD_OUT, Linear, search, split
from sslpre.views import crop
from sslpre.views.draw import uniform

EPOCHS = 20
LEAST, MOST = 100, 1000  # steps
BATCH = 64
SGD_RATES = (0.1, 0.01, 0.001)
ADAM_RATES = (1e-3, 3e-4, 1e-4)  # of networks without batch normalisation, which SGD trains badly
ADAM_DECAY = 0.05
CROPS = (0.4, 1.0), (3 / 4, 4 / 3)  # share of an image's area, width by height
ONCE = 256  # images encoded at a time
PROTOCOL = (
    f"finetuned: a copy of the network, its head the linear probe, for {EPOCHS} epochs of crops and mirror images, but"
    f" {LEAST} steps of {BATCH} at least, and at most {MOST:,} or one epoch; rate one of three, chosen on 20 % of the"
    " training images of the first draw; of raw pixels the linear probe"
)


@dataclass(frozen=True)
class Tuning:
    """What is trained on: views uint8 [N, 3, s, s] on the CPU, labels int64 [N] on the device."""

    views: Tensor
    labels: Tensor
    classes: int
    seed: int

    def rate(self, encoder: Encoder) -> float:
        """The rate that is most accurate on a held-out fifth; of equals the lower loss. The middle one where no image
        can be held out."""
        rates = SGD_RATES if normalised(encoder) else ADAM_RATES
        fit, held = (torch.from_numpy(part) for part in split(self.labels.cpu().numpy(), HELD_OUT, self.seed))
        if not len(held):
            return rates[1]
        rest = replace(self, views=self.views[fit], labels=self.labels[fit.to(self.labels.device)])
        truth, tried, head = self.labels[held.to(self.labels.device)], {}, rest.head(encoder)
        for rate in rates:
            logits = rest.trained(encoder, rate, 0, head).logits(self.views[held])
            worth = (logits.argmax(1) == truth).float().mean().item(), -F.cross_entropy(logits, truth).item()
            tried[rate] = worth if logits.isfinite().all() else (-1.0, 0.0)
        return max(tried, key=tried.__getitem__)

    def head(self, encoder: Encoder) -> Linear:
        """The linear probe of what `encoder`, in evaluation mode, makes of these images."""
        return search(encoded(encoder, self.views), self.labels, self.classes, self.seed)[0]

    def trained(self, encoder: Encoder, rate: float, number: int, head: Linear | None = None) -> Tuned:
        """A copy of `encoder`, in evaluation mode as that is. head: its linear probe, fitted if none is given. What is
        random follows from the seed and this number."""
        tuned = Tuned(copy.deepcopy(encoder), Head(head or self.head(encoder)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + number)  # for what the network draws itself, such as dropout
            train(tuned, self.views, self.labels, rate, self.seed + number)
        return tuned


class Head(nn.Module):
    """A linear probe as the last layer of a network."""

    mean: Tensor
    std: Tensor

    def __init__(self, fit: Linear):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(tensor.float().clone()) for tensor in (fit.weight, fit.bias))
        self.register_buffer("mean", fit.mean.float())
        self.register_buffer("std", fit.std.float())

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std @ self.weight + self.bias


@dataclass(frozen=True)
class Tuned:
    network: Encoder
    head: Head

    @torch.no_grad()
    def logits(self, views: Tensor) -> Tensor:
        """[N, classes] of centre views, uint8 [N, 3, s, s]."""
        return self.head(encoded(self.network, views))


def train(tuned: Tuned, views: Tensor, labels: Tensor, rate: float, seed: int) -> None:
    """Mean cross entropy, half a cosine down to 0, the same batches whatever the network."""
    device, side = labels.device, views.shape[-1]
    network = tuned.network.train()
    weights = [w for w in (*network.parameters(), *tuned.head.parameters()) if w.requires_grad]
    optimiser: torch.optim.Optimizer
    if normalised(network):
        optimiser = torch.optim.SGD(weights, rate, momentum=0.9)
    else:
        groups = [
            {"params": [w for w in weights if w.ndim > 1], "weight_decay": ADAM_DECAY},
            {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, rate)
    count = steps(len(views))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, count)
    for step, index in enumerate(batches(len(views), count, seed)):
        size = torch.full((len(index), 2), side)
        boxes = crop.draw_boxes(uniform(seed, step, index, "finetune.box", crop.NUMBERS), size, *CROPS)
        flip = uniform(seed, step, index, "finetune.flip") < 0.5
        images = crop.resample(views[index].to(device), boxes, flip, side)
        logits = tuned.head(network(images.contiguous(memory_format=torch.channels_last)))
        loss = F.cross_entropy(logits, labels[index.to(device)])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    network.eval()


def steps(images: int) -> int:
    """Of a finetuning on so many images."""
    epoch = images / min(BATCH, images)
    return max(LEAST, math.ceil(epoch), min(MOST, round(EPOCHS * epoch)))


def batches(images: int, count: int, seed: int) -> list[Tensor]:
    """`count` batches of equal size, each image as often as any other but for one."""
    size = min(BATCH, images)
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-count * size // images)
    order = torch.cat([torch.randperm(images, generator=generator) for _ in range(epochs)])
    return list(order[: count * size].split(size))


def normalised(network: nn.Module) -> bool:
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules())


@torch.no_grad()
def encoded(network: Encoder, views: Tensor) -> Tensor:
    """Features [N, D] of centre views, uint8 [N, 3, s, s]; the network is in evaluation mode."""
    parts = (part.to(network.mean.device).float() / 255 for part in views.split(ONCE))
    return torch.cat([network(part.contiguous(memory_format=torch.channels_last)) for part in parts])
