"""Colorization: the network sees how light each pixel is, and names its colour among 313, the rare ones counting more.

Zhang, Isola, Efros, "Colorful Image Colorization", 2016, https://arxiv.org/abs/1603.08511.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslpre.errors import SslpreError
from sslpre.objective import Batch, Epoch, Loss, Objective, Picture, Setup
from sslpre.ops import ranks
from sslpre.ops.channels import luma
from sslpre.ops.lab import Bins, recoloured, rgb_to_ab

QUARTER = 4  # pixels of a view that one answer is for, each way
T = 0.38  # of the annealed mean (section 2.3)


class Colorization(Objective):
    """uniform: λ of equation 4, 1 for all colours alike; grey: images none of whose pixels has an a or b of so much are
    left out, 0 for none; width: channels of the layers between the encoder's last map and the answer.
    """

    judged: ClassVar = ("loss", "constant")
    weight: Tensor
    constant: Tensor

    def __init__(
        self,
        setup: Setup,
        uniform: Annotated[float, Field(gt=0, le=1)] = 0.5,
        grey: Annotated[float, Field(ge=0)] = 5.0,
        width: Annotated[int, Field(ge=1)] = 256,
    ):
        super().__init__()
        self.encoder = setup.encoder("luma")
        self.bins = Bins()
        self.uniform, self.grey = uniform, grey
        side = setup.views[0]
        _, channels, h, _ = self.encoder.map_shape(side)
        self.head = head(channels, h, side // QUARTER, width, len(self.bins))
        self.register_buffer("weight", torch.ones(len(self.bins)))  # w of equation 4, until the prior is known
        self.register_buffer("constant", torch.tensor(self.chance))  # loss of the best answer that is one for all
        self.told: dict[str, Any] = {}

    def loss(self, batch: Batch) -> Loss:
        x = batch.views[0]
        logits = self.head(self.encoder.last_map(x))
        with torch.autocast(x.device.type, enabled=False):  # colours and softmax in fp32 (fp64 stays fp64)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            q, z, coloured = self.asked(shrunk(x.to(logits.dtype)))
            v = self.weight[q[:, 0]] * coloured  # equation 3: the weight of the nearest bin
            log_z = (z * logits.gather(1, q)).sum(1) - logits.logsumexp(1)  # Σ_q Z log Ẑ, as the Z of a pixel sum to 1
            right = (logits.argmax(1) == q[:, 0]).float().mean()
            terms = {"accuracy": right, "constant": self.constant}
            return Loss(-(v * log_z).mean(), terms)  # equation 2, over pixels and images

    def asked(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of colours [B, 3, h, w] the bins and their shares Z, both [B, 5, h, w]; 1 where an image has colour, else 0,
        [B, 1, 1].
        """
        ab = rgb_to_ab(x)
        coloured = (ab.abs().amax((1, 2, 3)) >= self.grey).to(ab.dtype)
        return *self.bins.encode(ab), coloured.view(-1, 1, 1)

    def epoch_start(self, epoch: Epoch) -> list[nn.Module]:
        """Before the first epoch: how often each colour is seen, and so what each is to count (section 2.2)."""
        self.told = {}
        if epoch.number:
            return []
        size = len(self.bins)
        pairs = torch.zeros(size, size, dtype=torch.float64, device=self.weight.device)

        def count(x: Tensor) -> Tensor:
            # pixels as they are, as crops show an image larger: means of it would miss their rare colours
            q, z, coloured = self.asked(x[..., QUARTER // 2 :: QUARTER, QUARTER // 2 :: QUARTER].double())
            pairs.view(-1).index_add_(0, (q[:, :1] * size + q).flatten(), (z * coloured.unsqueeze(1)).flatten())
            return coloured.flatten()

        coloured = float(epoch.every_image(count).double().mean())
        if not coloured:
            hint = "take another recipe, see `sslpre recipes`, or --set method.grey=0"
            raise SslpreError(f"no image has an a or b of `{self.grey:g}`: there is no colour to learn", hint, 4)
        pairs = ranks.total(pairs)  # Z summed over all pixels, by their nearest bin (rows) and bin (columns)
        pairs /= pairs.sum()
        p = pairs.sum(1)
        w = rebalanced(self.bins.smoothed(p), self.uniform)
        w /= (w * p).sum()  # so that an answer that is the same for all colours costs ln 313
        constant = w @ pairs  # what the best answer that is the same for each pixel is in proportion to: E[w Z]
        self.constant.copy_(-torch.xlogy(constant, constant / constant.sum()).sum())
        self.weight.copy_(w / coloured)  # grey images count nothing, so that the mean is over the others
        self.told = {
            "colours": int((p > 0).sum()),
            "grey_images": 1 - coloured,
            "loss_of_a_constant": self.constant.item(),
        }
        return []

    def notes(self) -> dict[str, Any]:
        return self.told

    def pictures(self, batch: Batch) -> list[list[Picture]]:
        x = batch.views[0].float()
        q, _, _ = self.asked(shrunk(x))
        annealed = self.bins.annealed(self.head(self.encoder.last_map(x)).float(), T)
        nearest = self.bins.ab[q[:, 0]].movedim(-1, 1)
        cells = {
            "what the network sees": luma(x),
            "its answer, annealed mean": recoloured(x, annealed),
            "asked for: nearest of 313 colours": recoloured(x, nearest, "nearest"),
            "their a and b alone": recoloured(torch.full_like(x, 0.6), nearest, "nearest"),
            "image": x,
        }
        return [[Picture(name, one[row]) for name, one in cells.items()] for row in range(len(x))]

    @property
    def chance(self) -> float:
        return math.log(len(self.bins))  # all colours alike; what a constant answer can reach is in the notes


def shrunk(x: Tensor) -> Tensor:
    """Views [B, 3, S, S] at a quarter of their side: the mean of 4 × 4 pixels, where the authors take one of them."""
    return F.adaptive_avg_pool2d(x, x.shape[-1] // QUARTER)


def rebalanced(p: Tensor, uniform: float) -> Tensor:
    """Equation 4: the weight w of each bin [Q] from the smoothed distribution p; Σ p w = 1."""
    w = 1 / ((1 - uniform) * p + uniform / len(p))
    return w / (p * w).sum()


def head(channels: int, have: int, want: int, width: int, out: int) -> nn.Sequential:
    """[B, channels, have, have] → [B, out, want, want]: the paper's conv8, doubling the side as often as it takes."""
    layers: list[nn.Module] = []
    while have < want:
        double = nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1)
        nn.init.normal_(double.weight, std=math.sqrt(2 / (4 * channels)))  # a quarter of its kernel meets each pixel
        layers += [double, nn.ReLU()]
        have, channels = 2 * have, width
    if have != want:
        layers.append(nn.AdaptiveAvgPool2d(want))
    conv = nn.Conv2d(channels, width, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight)  # torch's own scale would let the signal fade from layer to layer
    return nn.Sequential(*layers, conv, nn.ReLU(), nn.Conv2d(width, out, 1))
