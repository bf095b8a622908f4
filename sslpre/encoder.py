"""A timm backbone as sslpre sees it: RGB in [0, 1] in, pooled features or stage maps out, standardised inside."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import kornia
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sslpre.errors import SslpreError
from sslpre.timm import small_stem_of, small_stems

Colour = Literal["rgb", "luma", "chroma"]
CHANNELS: dict[str, int] = {"rgb": 3, "luma": 1, "chroma": 2}
SIDES = range(8, 4097)  # pixels of an image's side, as a recipe allows them
SIZES = ("img_size", "dynamic_img_size")  # arguments of a network that follow from the image size
GIVEN = ("self", "num_classes", "in_chans", "device", "dtype")  # what sslpre itself says when it builds a network
LARGEST = 8192  # number among a network's arguments: no published network is wider, and a file must not fill the memory
WHOLE = (torch.int64, torch.int32, torch.bool)  # counters and tables of indices; weights are floating-point numbers


class Encoder(nn.Module):
    """`encoder(x)`: [B, 3, H, W] in [0, 1] → [B, dim]. What is probed and exported.

    `architecture` and `model_args` are what `timm.create_model` needs to build the same network.
    With `chunk` set, inputs larger than it are run in parts that are recomputed in the backward pass: memory is that of
    one part, the result that of the whole; batch normalisation then sees one part at a time.
    """

    model: Any  # a timm network; what timm adds to a module is in no type
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        architecture: str,
        model_args: dict[str, Any],
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        colour: Colour = "rgb",
    ):
        super().__init__()
        self.model, self.architecture, self.model_args = model, architecture, model_args
        self.image_size, self.colour = image_size, colour
        # head_hidden_size: networks that widen their features once more before the classifier
        self.dim = int(getattr(model, "head_hidden_size", None) or self.model.num_features)
        self.chunk = 0
        self.seen: int | None = None  # side of what it is shown in training, where that is not the views'
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def prepare(self, x: Tensor) -> Tensor:
        """[0, 1] RGB → what the network's first layer takes: the channels asked for, standardised."""
        if self.colour == "luma":
            x = (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
            return (x - self.mean.mean()) / self.std.mean()
        if self.colour == "chroma":
            return kornia.color.rgb_to_lab(x)[:, 1:] / 110.0  # ab lies in about ±110
        return (x - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        if not self.chunk or len(x) <= self.chunk:
            return self.model(self.prepare(x))
        parts = x.tensor_split(-(-len(x) // self.chunk))  # of even sizes: a last one of one image has no statistics
        if not (self.training and torch.is_grad_enabled()):
            return torch.cat([self.model(self.prepare(part)) for part in parts])
        return torch.cat([self.recomputed(part) for part in parts])

    def recomputed(self, part: Tensor) -> Tensor:
        def run(part: Tensor) -> Tensor:
            return self.model(self.prepare(part))

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), frozen_statistics(self.model)

        return checkpoint(run, part, use_reentrant=False, context_fn=contexts)

    @torch.no_grad()
    def strides_a_point(self, side: int) -> bool:
        """Does a convolution of stride 2 or more see a 1 × 1 map when images are `side` px wide?"""
        found: list[bool] = []

        def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, nn.Conv2d)
            found.append(max(layer.stride) > 1 and max(layer.kernel_size) > 1 and inputs[0].shape[2:] == (1, 1))

        layers = [layer for layer in self.model.modules() if isinstance(layer, nn.Conv2d)]
        hooks = [layer.register_forward_pre_hook(look) for layer in layers]
        training = self.training
        self.eval()(torch.zeros(1, 3, side, side, device=self.mean.device))
        self.train(training)
        for hook in hooks:
            hook.remove()
        return any(found)

    @property
    def stage_names(self) -> tuple[str, ...]:
        """timm's names of the stages, shallow to deep, as `out_indices` counts them; none where the model has none."""
        if not hasattr(self.model, "forward_intermediates"):
            return ()
        told = [str(info["module"]) for info in getattr(self.model, "feature_info", ())]
        names = tuple(name or f"stage{i}" for i, name in enumerate(told))  # TResNet's first has an empty one
        return names if len(set(names)) == len(names) else tuple(f"stage{i}" for i in range(len(names)))

    def stages(self, x: Tensor) -> list[tuple[str, Tensor]]:
        """Named feature maps [B, C, h, w], shallow to deep; only the last one where the model cannot tell more."""
        names = self.stage_names
        if not names:
            return [("last", self.model.forward_features(self.prepare(x)))]
        maps = self.model.forward_intermediates(self.prepare(x), indices=[*range(len(names))], intermediates_only=True)
        return list(zip(names, maps, strict=True))


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch normalisation normalises with the batch as in training but leaves its running statistics alone."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [
        (norm.momentum, norm.num_batches_tracked.clone() if norm.num_batches_tracked is not None else None)
        for norm in norms
    ]
    for norm in norms:
        norm.momentum = 0.0  # the running statistics move by nothing, and autograd saves the same tensors as before
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)


def build(
    backbone: str,
    *,
    stem: str = "auto",
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    colour: Colour = "rgb",
    model_args: Mapping[str, Any] | None = None,
    seen: int | None = None,
) -> Encoder:
    """An encoder with fresh weights from torch's global generator.

    image_size: side of the images that it is for. seen: side of what it is shown in training, where that is less, such
    as tiles of images: stem and position embeddings follow it, and a network laid out for one size is for this one.

    stem: "small" swaps a ResNet's 7×7 stride-2 convolution and max-pool for a 3×3 stride-1 convolution; "auto" does
    so up to 64 px; "timm" never. model_args: arguments of timm's network besides its size, such as {"num_heads": 12}.
    Raises SslpreError (exit 2) for an unknown backbone, a stem it cannot have, a size that the patch does not divide,
    and arguments that the network does not have.
    """
    name, dot, _ = backbone.partition(".")
    if dot and timm.is_model(name):  # timm's `name.tag` means pretrained weights, which would not be loaded
        raise SslpreError(
            f"`{backbone}` names pretrained weights, and training starts from scratch without `--init pretrained`",
            f"--backbone {name}",
        )
    shown = seen or image_size
    architecture = f"{backbone}_small" if takes_small(backbone, stem, shown) else backbone
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(backbone, timm.list_models(), n=3, cutoff=0.3)
        hint = "did you mean " + " or ".join(f"--backbone {n}" for n in near) if near else "--backbone resnet18"
        raise SslpreError(f"no timm backbone `{backbone}`", hint)
    channels: dict[str, Any] = {} if colour == "rgb" else {"in_chans": CHANNELS[colour]}
    more = dict(model_args or {})
    laid_out = size_arguments(architecture, shown, more)
    arguments = more | laid_out
    try:
        model = timm.create_model(architecture, num_classes=0, **arguments, **channels)
        network = Encoder(model, architecture, arguments, shown if laid_out else image_size, mean, std, colour)
        network.seen = seen
        with torch.no_grad():  # one image through it, before anything is trained
            features = network.eval()(torch.zeros(1, 3, shown, shown))
    except Exception as error:  # timm's networks refuse sizes each in its own way, all of them when built or tried
        own = timm.get_pretrained_cfg(architecture)
        usual = own.input_size[-1] if own is not None else 224
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if more:
            told = ", ".join(f"{name}={value!r}" for name, value in more.items())
            message = f"`{architecture}` cannot be built for {shown} px with `{told}`: {reason}"
            raise SslpreError(message, "--set encoder.model_args={}, or another --image-size") from error
        raise SslpreError(f"`{architecture}` cannot take {shown} px: {reason}", f"--image-size {usual}") from error
    if features.shape != (1, network.dim):
        raise SslpreError(
            f"`{architecture}` gives no pooled features, but {tuple(features.shape)}", "--backbone resnet18"
        )
    return network.train()


def takes_small(backbone: str, stem: str, image_size: int) -> bool:
    """Does this recipe's network get the small stem? Raises SslpreError (exit 2) where it is asked for in vain."""
    if stem == "small" and backbone not in small_stems and small_stem_of(backbone) is None:
        fitting = ", ".join(sorted(small_stems)[:4])
        raise SslpreError(
            f"`{backbone}` cannot have a small stem", f"--set encoder.stem=timm; small stems fit {fitting}"
        )
    if stem == "small" and image_size > 64:
        raise SslpreError(f"a small stem is for images up to 64 px, not `{image_size}`", "--set encoder.stem=auto")
    return backbone in small_stems and (stem == "small" or (stem == "auto" and image_size <= 64))


def size_arguments(architecture: str, image_size: int, model_args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `create_model` must be told about the image size: nothing for convolutions, the size for ViTs.

    model_args: what else it is told. Raises SslpreError (exit 2) where the network's patches do not divide the size, or
    it cannot be built with those arguments.
    """
    model = structure(architecture, model_args)
    side = patch_of(model)
    if image_size % side:
        down, up = image_size // side * side, (image_size // side + 1) * side
        nearest = " or ".join(f"--image-size {s}" for s in (down, up) if s)
        raise SslpreError(f"`{architecture}` needs sizes divisible by {side}, `{image_size}` is not", nearest)
    if hasattr(model, "dynamic_img_size"):
        return {"img_size": image_size, "dynamic_img_size": True}
    if "img_size" in inspect.signature(type(model).__init__).parameters:  # laid out for one size
        return {"img_size": image_size}
    return {}


def structure(architecture: str, model_args: Mapping[str, Any] | None = None) -> Any:
    """timm's network without weights: no memory, no random numbers. Raises SslpreError (exit 2) for odd arguments."""
    more = dict(model_args or {})
    try:
        check_arguments(architecture, more)
    except ValueError as error:
        raise SslpreError(f"`model_args`: {error}", "--set encoder.model_args={}") from error
    try:
        with torch.device("meta"):
            return timm.create_model(architecture, num_classes=0, **more)
    except Exception as error:  # each of timm's networks refuses in its own way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        told = ", ".join(f"{name}={value!r}" for name, value in more.items())
        message = f"`{architecture}` cannot be built with `{told}`: {reason}"
        raise SslpreError(message, "--set encoder.model_args={}") from error


def patch_side(backbone: str, model_args: Mapping[str, Any] | None = None) -> int:
    """Side of the squares that this backbone cuts images into, and that must divide theirs; 1 where any size will do.

    Raises SslpreError (exit 2) for arguments that it does not have; an unknown name is for `build` to refuse.
    """
    return patch_of(structure(backbone, model_args)) if timm.is_model(backbone) else 1


def patch_of(model: nn.Module) -> int:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None:
        return 1
    return max(patch) if isinstance(patch, (tuple, list)) else int(patch)


def check_arguments(architecture: str, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments that are none of the network itself, or are too large to be meant.

    `create_model` takes many more, which would fetch weights or give another kind of object.
    """
    known = arguments_of(architecture)
    odd = [name for name in arguments if name not in known]
    if odd:
        near = difflib.get_close_matches(str(odd[0]), known, n=1, cutoff=0.5)
        told = f", did you mean `{near[0]}`?" if near else ""
        raise ValueError(f"a network `{architecture}` has no argument `{odd[0]}`{told}")
    todo: list[Any] = list(arguments.values())
    while todo:
        item = todo.pop()
        if isinstance(item, Mapping | list | tuple):
            todo += item.values() if isinstance(item, Mapping) else item
        elif isinstance(item, int | float) and not abs(item) <= LARGEST:  # NaN is not
            raise ValueError(f"`{item}` is no number of -{LARGEST} to {LARGEST}")
    if len(json.dumps(dict(arguments), default=str)) > LARGEST:
        raise ValueError("the arguments are longer than any network needs")


@cache
def arguments_of(architecture: str) -> frozenset[str]:
    """Names of the arguments that timm's network takes, besides those that sslpre itself gives; never its size."""
    with torch.device("meta"):
        kind = type(timm.create_model(architecture, num_classes=0))
    found: set[str] = set()
    for one in kind.__mro__:  # where a class hands on what it does not know, its parents' too
        parameters = inspect.signature(one.__init__).parameters.values()  # type: ignore[misc]
        found |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return frozenset(found - {*GIVEN, *SIZES})


def standardisation(mean: Any, std: Any) -> tuple[list[float], list[float]]:
    """Mean and deviation of the three channels, as they were typed and not as float32 spells them.

    Raises ValueError or TypeError for what is not three numbers each, means in [0, 1] and deviations above 0.
    """
    centres, spreads = ([float(f"{float(number):.7g}") for number in numbers] for numbers in (mean, std))
    if len(centres) != 3 or not all(0 <= centre <= 1 for centre in centres):
        raise ValueError(f"the means {centres} are not three numbers of 0 to 1")
    if len(spreads) != 3 or not all(1e-6 <= spread <= 1e6 and math.isfinite(spread) for spread in spreads):
        raise ValueError(f"the deviations {spreads} are not three numbers above 0")
    return centres, spreads


def side(number: Any) -> int:
    """An image's side in pixels. Raises ValueError or TypeError for what is no whole number of 8 to 4096."""
    found = int(number)
    if found not in SIDES:
        raise ValueError(f"{found} px is no image size, which is {SIDES.start} to {SIDES.stop - 1}")
    return found


def in_float32(
    tensors: Mapping[str, Tensor], source: str, own: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Weights of any floating type as float32; counters and tables of indices as they are.

    own: the network's tensors of the same names, of which one that floats takes no whole numbers. Raises SslpreError:
    exit 5 for numbers of another kind, 10 for weights that are not finite.
    """
    found = {}
    for name, tensor in tensors.items():
        floats = own is not None and name in own and own[name].is_floating_point()
        if not tensor.is_floating_point() and (floats or tensor.dtype not in WHOLE):
            kind = str(tensor.dtype).removeprefix("torch.")
            message = f"`{source}`: the weights `{name}` are {kind} numbers, not floating-point ones"
            raise SslpreError(message, "save them as float32 with the program that wrote them", 5)
        found[name] = tensor.float() if tensor.is_floating_point() else tensor
        if not found[name].isfinite().all():
            raise SslpreError(f"`{source}`: the weights `{name}` are not finite", "take other weights", 10)
    return found
