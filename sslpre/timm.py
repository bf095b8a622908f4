"""ResNets for small images, registered with timm: `import sslpre.timm`, then `timm.create_model("resnet18_small")`.

The stem of He et al. 2016 for CIFAR (https://arxiv.org/abs/1512.03385, section 4.2): one 3×3 convolution of stride 1,
no max-pool. The names are new so that plain timm refuses a file trained this way rather than load it into another
network.
"""

import difflib
import sys
from typing import Any

import timm
from timm.models import register_model
from timm.models._builder import build_model_with_cfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from sslpre.errors import SslpreError

# Only networks whose `conv1` is one 7×7 convolution: a deep stem of three convolutions would take the weights silently.
small_stems: dict[str, dict[str, Any]] = {
    "resnet18": dict(block=BasicBlock, layers=(2, 2, 2, 2)),
    "resnet34": dict(block=BasicBlock, layers=(3, 4, 6, 3)),
    "resnet50": dict(block=Bottleneck, layers=(3, 4, 6, 3)),
    "resnet101": dict(block=Bottleneck, layers=(3, 4, 23, 3)),
    "resnet152": dict(block=Bottleneck, layers=(3, 8, 36, 3)),
    "resnext50_32x4d": dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4),
    "wide_resnet50_2": dict(block=Bottleneck, layers=(3, 4, 6, 3), base_width=128),
    "wide_resnet101_2": dict(block=Bottleneck, layers=(3, 4, 23, 3), base_width=128),
}
__all__ = [
    "SmallStemResNet",
    "architecture_of",
    "small_stem_of",
    "small_stems",
    *(f"{name}_small" for name in small_stems),
]


def small_stem_of(name: str) -> str | None:
    """Of `resnet18_small` `resnet18`; None for every name but ours, such as timm's own `convnext_small`."""
    plain = name.removesuffix("_small")
    return plain if plain != name and plain in small_stems else None


def architecture_of(backbone: str) -> str:
    """The name without timm's tag. Raises SslpreError (exit 2) where there is none such, with the nearest."""
    name = backbone.partition(".")[0]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.3)
        raise SslpreError(f"no timm backbone `{name}`", f"--backbone {near[0] if near else 'resnet18'}")
    return name


class SmallStemResNet(ResNet):
    """timm's ResNet with a 3×3 stride-1 first convolution and no max-pool: [B, in_chans, H, W] keeps its H and W."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        conv = nn.Conv2d(kwargs.get("in_chans", 3), 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.conv1, self.maxpool = conv, nn.Identity()  # type: ignore[assignment]
        for info in self.feature_info:  # the stem no longer shrinks the image four times
            info["reduction"] = max(1, int(info["reduction"]) // 4)  # type: ignore[call-overload]


def register(name: str, arguments: dict[str, Any]) -> None:
    def entry(pretrained: bool = False, **kwargs: Any) -> ResNet:
        return build_model_with_cfg(SmallStemResNet, f"{name}_small", pretrained, **(arguments | kwargs))

    entry.__name__ = entry.__qualname__ = f"{name}_small"
    entry.__module__ = __name__
    setattr(sys.modules[__name__], entry.__name__, register_model(entry))


default_cfgs = {
    f"{name}_small": {
        "url": "",
        "num_classes": 0,
        "input_size": (3, 32, 32),
        "pool_size": (4, 4),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "conv1",
        "classifier": "fc",
    }
    for name in small_stems
}
for _name, _arguments in small_stems.items():
    register(_name, _arguments)
