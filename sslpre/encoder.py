"""A timm backbone as sslpre sees it: RGB in [0, 1] in, pooled features or stage maps out, standardised inside."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sslpre.errors import SslpreError
from sslpre.ops.channels import CHANNELS, LUMA, Colour, chroma, luma, sobel
from sslpre.ops.norms import frozen_statistics
from sslpre.timm import small_stem_of, small_stems

SIDES = range(8, 4097)  # pixels of an image's side, as a recipe allows them
SIZES = ("img_size", "dynamic_img_size")  # arguments of a network that follow from the image size
GIVEN = ("self", "num_classes", "in_chans", "device", "dtype")  # what sslpre itself says when it builds a network
LARGEST = 8192  # number among a network's arguments: no published network is wider, and a file must not fill the memory


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
        self.listener: Callable[[Tensor, Tensor], None] | None = None  # gets images and features of training, [B, dim]
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def prepare(self, x: Tensor) -> Tensor:
        """[0, 1] RGB → what the network's first layer takes: the channels asked for, standardised."""
        if self.colour == "luma":
            return (luma(x) - self.mean.mean(1, keepdim=True)) / self.std.mean(1, keepdim=True)
        if self.colour == "chroma":
            return chroma(x)
        x = (x - self.mean) / self.std
        return sobel(x.mean(1, keepdim=True)) if self.colour == "sobel" else x  # as DeepCluster's authors have it

    def forward(self, x: Tensor) -> Tensor:
        return self.heard(x, self.features(x))

    def features(self, x: Tensor) -> Tensor:
        if not self.chunk or len(x) <= self.chunk:
            return self.model(self.prepare(x))
        parts = x.tensor_split(-(-len(x) // self.chunk))  # of even sizes: a last one of one image has no statistics
        if not (self.training and torch.is_grad_enabled()):
            return torch.cat([self.model(self.prepare(part)) for part in parts])
        return torch.cat([self.recomputed(part) for part in parts])

    def heard(self, x: Tensor, z: Tensor) -> Tensor:
        """z, after whoever listens to training was told of it; a map [B, C, h, w] by its mean."""
        if self.listener is not None and self.training and torch.is_grad_enabled():
            self.listener(x, z.detach() if z.ndim == 2 else z.detach().mean((2, 3)))
        return z

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

    def last_map(self, x: Tensor) -> Tensor:
        """[B, C, h, w], what is pooled: unlike the last of `stages` past the final norm or convolution. Tokens stand on
        their grid, without the class token. Raises SslpreError (exit 2) where there is no such map."""
        z = self.model.forward_features(self.prepare(x))
        if z.ndim == 4:
            return self.heard(x, z.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "") == "NHWC" else z)
        z = z[:, getattr(self.model, "num_prefix_tokens", 0) :].transpose(1, -1)
        h = round(math.sqrt(z.shape[-1] * x.shape[2] / x.shape[3]))
        if z.ndim != 3 or z.shape[2] % h:
            raise SslpreError(f"`{self.architecture}` gives no map of an image", "--backbone resnet18")
        return self.heard(x, z.unflatten(2, (h, -1)))

    def map_shape(self, side: int) -> torch.Size:
        """Of `last_map` for an image of `side` px, [1, C, h, w].

        Raises SslpreError (exit 2) as that, and where over 1 % of the weights come after the map: nothing that reads
        the map alone would train them, and the output, which is what is exported, would stay partly random.
        """
        training, own = self.training, list(self.model.parameters())
        with torch.enable_grad():
            z = self.eval().last_map(torch.zeros(1, 3, side, side, device=self.mean.device, dtype=self.mean.dtype))
            gradients = torch.autograd.grad(z.sum(), own, allow_unused=True)
        self.train(training)
        past = sum(p.numel() for p, g in zip(own, gradients, strict=True) if g is None) / sum(p.numel() for p in own)
        if past > 0.01:
            message = (
                f"`{self.architecture}` has {past:.0%} of its weights past its last map, and they would stay random"
            )
            raise SslpreError(message, "--backbone resnet18")
        return z.shape

    @property
    def ordinary(self) -> bool:
        """Can it be a network of RGB, as timm has them?"""
        return self.colour in ("rgb", "luma")

    def as_rgb(self) -> Encoder:
        """Of a luma encoder the ordinary network of RGB with equal features, and of one of RGB itself.

        Kernels are multiplied by the three weights; mean and deviation are one for all channels. Raises SslpreError
        (exit 2) where it is not `ordinary`, and where timm's network of three channels is made otherwise."""
        if self.colour == "rgb":
            return self
        if not self.ordinary:
            message = f"a network of `{self.colour}` is none of RGB: timm could not open it, nor a run begin with it"
            raise SslpreError(message, "`sslpre probe` judges it in its run; take another recipe to export one")
        with torch.random.fork_rng(devices=[]):
            model: Any = timm.create_model(self.architecture, num_classes=0, **self.model_args)
        tensors = dict(self.model.state_dict())
        for name, tensor in model.state_dict().items():
            own = tensors[name]
            if own.shape == tensor.shape:
                continue
            if own.ndim != 4 or tensor.shape != (len(own), 3, *own.shape[2:]):
                raise only_rgb(self.architecture, self.colour)
            tensors[name] = own * own.new_tensor(LUMA).view(1, 3, 1, 1)
        model.load_state_dict(tensors)
        mean, std = ([buffer.mean().item()] * 3 for buffer in (self.mean, self.std))
        twin = Encoder(model, self.architecture, self.model_args, self.image_size, mean, std)
        return twin.to(self.mean.device).train(self.training)


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
    architecture = f"{backbone}_small" if takes_small(backbone, stem, image_size, seen) else backbone
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
        raise cannot_take(architecture, shown, seen is not None, more, error) from error
    if features.shape != (1, network.dim):
        raise SslpreError(
            f"`{architecture}` gives no pooled features, but {tuple(features.shape)}", "--backbone resnet18"
        )
    if colour == "luma":
        refuse_luma_alone(network, shown)
    return network.train()


def cannot_take(architecture: str, shown: int, tiles: bool, more: dict[str, Any], error: Exception) -> SslpreError:
    """What to say of a network that timm cannot build, or run, for what it is shown."""
    own = timm.get_pretrained_cfg(architecture)
    usual = own.input_size[-1] if own is not None else 224
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if more:
        told = ", ".join(f"{name}={value!r}" for name, value in more.items())
        message = f"`{architecture}` cannot be built for {shown} px with `{told}`: {reason}"
        return SslpreError(message, "--set encoder.model_args={}, or another --image-size")
    if tiles:
        hint = "--set method.tile=32, or larger, or --backbone resnet18"
        return SslpreError(f"`{architecture}` cannot take tiles of {shown} px: {reason}", hint)
    return SslpreError(f"`{architecture}` cannot take {shown} px: {reason}", f"--image-size {usual}")


def refuse_luma_alone(luma: Encoder, side: int) -> None:
    """Raises SslpreError (exit 2) where `as_rgb` gives other features: some networks scale their kernels themselves."""
    x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if not torch.allclose(luma.as_rgb()(x), luma(x), rtol=1e-3, atol=1e-4):
            raise only_rgb(luma.architecture, luma.colour)


def only_rgb(architecture: str, colour: Colour) -> SslpreError:
    message = f"`{architecture}` cannot be trained on `{colour}` and then be a network of RGB"
    return SslpreError(message, "--backbone resnet18")


def takes_small(backbone: str, stem: str, image_size: int, seen: int | None = None) -> bool:
    """Does this recipe's network get the small stem? Raises SslpreError (exit 2) where it is asked for in vain.

    Of larger images only tiles up to 32 px do: a map of theirs is not yet a point, and the images cost 15 times less.
    """
    shown = seen or image_size
    if stem == "small" and backbone not in small_stems and small_stem_of(backbone) is None:
        fitting = ", ".join(sorted(small_stems)[:4])
        raise SslpreError(
            f"`{backbone}` cannot have a small stem", f"--set encoder.stem=timm; small stems fit {fitting}"
        )
    if stem == "small" and shown > 64:
        raise SslpreError(f"a small stem is for images up to 64 px, not `{shown}`", "--set encoder.stem=auto")
    fits = shown <= (64 if shown >= image_size else 32)
    return backbone in small_stems and (stem == "small" or (stem == "auto" and fits))


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
