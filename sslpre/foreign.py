"""Weights that other programs wrote, in their files and under their names, as an encoder of ours.

Read are safetensors and what `torch.save` writes, the latter with `weights_only=True` and nothing else: a file that
needs more than tensors and plain containers is refused. Whatever it is wrapped in, a network is found by the name of
one of its tensors; what stands before that name is the prefix. All tensors of an architecture must be there under one
prefix, in the right shapes; what is left over must be no part of its trunk.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import shlex
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sslpre.encoder import SIDES, Encoder
from sslpre.errors import SslpreError, printable
from sslpre.export import FACTS, usage, write
from sslpre.ops.floats import in_float32
from sslpre.timm import architecture_of, small_stem_of, small_stems
from sslpre.weights import check_import

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what nearly all published weights were trained with
COUNTER = "num_batches_tracked"  # of batch normalisation; files from before 2018 do not have it, and nothing needs it

RESNETS: tuple[str, ...] = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
RESNETS += ("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2", "test_resnet")
VITS: tuple[str, ...] = tuple(
    f"vit_{size}_patch{patch}_224" for size in ("tiny", "small", "base", "large") for patch in (8, 14, 16, 32)
)
VITS += ("vit_small_patch14_dinov2", "vit_base_patch14_dinov2", "vit_large_patch14_dinov2", "test_vit")
CONVNEXTS = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large", "test_convnext")

SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
TORCHVISION_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    (r"^heads\.", "head."),
)
PAPER_CONVNEXT = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
TORCHVISION_CONVNEXT = (
    (r"^features\.0\.", "stem."),
    (r"^features\.([1357])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"^features\.([246])\.", lambda m: f"stages.{int(m[1]) // 2}.downsample."),
    (r"\.layer_scale$", ".gamma"),
    (r"\.block\.0\.", ".conv_dw."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".mlp.fc1."),
    (r"\.block\.5\.", ".mlp.fc2."),
    (r"^classifier\.0\.", "head.norm."),
    (r"^classifier\.2\.", "head.fc."),
)


@dataclass(frozen=True)
class Dialect:
    """How one family of programs names a network. anchor: a tensor that every network of it has, in its own words."""

    anchor: str
    architectures: tuple[str, ...]
    words: tuple[tuple[str, Any], ...] = ()

    def renamed(self, name: str) -> str:
        for pattern, word in self.words:
            name = re.sub(pattern, word, name)
        return name


DIALECTS = (
    Dialect("layer1.0.conv1.weight", RESNETS),  # torchvision, timm, MoCo, SimSiam, SwAV, DINO, VISSL
    Dialect(
        "4.0.conv1.weight", RESNETS, ((r"^([014567])\.", lambda m: f"{SEQUENTIAL[m[1]]}."),)
    ),  # a torchvision network cut into nn.Sequential, as lightly does
    Dialect("blocks.0.attn.qkv.weight", VITS),  # timm, DINO, MoCo v3, MAE
    Dialect("encoder.layers.encoder_layer_0.ln_1.weight", VITS, TORCHVISION_VIT),
    Dialect("stages.0.blocks.0.conv_dw.weight", CONVNEXTS),
    Dialect("stages.0.0.dwconv.weight", CONVNEXTS, PAPER_CONVNEXT),
    Dialect("features.1.0.block.0.weight", CONVNEXTS, TORCHVISION_CONVNEXT),
)


@dataclass(frozen=True)
class Match:
    """A network in a file. prefix: what its names begin with there; left: how many tensors of each other part."""

    architecture: str
    model_args: dict[str, Any]
    prefix: str
    tensors: Tensors
    absent: int  # counters of batches that the file does not have
    left: dict[str, str]


def bring(old: Path, new: Path, backbone: str | None = None) -> tuple[list[str], list[str]]:
    """Write the encoder in the foreign file `old` to `new`, as `sslpre export` would.

    Gives back what to say of it, and the Python lines that open it.

    backbone: the network that it is; None: found among the common ones. Raises SslpreError: exit 2 where `old` is not
    there or ours already, `new` exists or does not end in .safetensors; 3 where `new` cannot be written; 5 for a file
    that cannot be read, needs more than `weights_only=True`, or fits no network; 10 for weights that are not finite.
    """
    check_import(old, new)
    known = None if backbone is None else architecture_of(backbone)
    history = told_by(old)
    match = find(flat(read(old)), old, known)
    encoder = rebuilt(match, str(old))
    with old.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    source = old.name.encode("utf-8", "backslashreplace").decode()
    origin = source + (f", from {history['origin']}" if "origin" in history else "")
    facts = {"method": "imported", "step": "0", "source": source, "source_sha256": digest}
    write(encoder, facts | history | {"origin": origin}, new)
    return said(match, encoder), usage(encoder, new)


def told_by(old: Path) -> dict[str, str]:
    """Licence and origin, where a safetensors file's metadata tells them. Raises SslpreError (exit 2) for ours."""
    if old.suffix.lower() != ".safetensors":
        return {}
    try:
        with safe_open(str(old), "pt") as stored:
            metadata = stored.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise unreadable(old, error) from error
    if all(name in metadata for name in FACTS):
        raise SslpreError(f"`{old}` was written by sslpre and needs no import", f"--init {shlex.quote(str(old))}")
    words = {"licence": ("licence", "license"), "origin": ("origin", "origin_url")}
    found = {fact: next((metadata[key] for key in keys if key in metadata), "") for fact, keys in words.items()}
    return {fact: printable(text) for fact, text in found.items() if text}


def read(path: Path) -> Any:
    """What the file holds: tensors in containers. Raises SslpreError (exit 5)."""
    if path.suffix.lower() == ".safetensors":
        try:
            return safetensors.torch.load_file(str(path))
        except (OSError, SafetensorError) as error:
            raise unreadable(path, error) from error
    mapped = zipfile.is_zipfile(path)
    try:
        # Training programs keep their command line in the file; a Namespace is a bag of attributes, which runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the age of the file
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged or hostile file can make an unpickler fail in any way
        wanted = re.search(r"GLOBAL ([\w.]+)|global(?: by default)?[: ]+`?([\w.]+\.[\w.]+)", str(error))
        if "eights only load failed" not in str(error):
            raise unreadable(path, error) from error
        needs = f"`{next(filter(None, wanted.groups()))}`" if wanted else "more than tensors and plain containers"
        raise SslpreError(
            f"`{path}` is refused: to read it, {needs} would have to be called, and that can be any code",
            "where you trust it, open it in the program that wrote it, and save network.state_dict() alone",
            5,
        ) from error


def unreadable(path: Path, error: Exception) -> SslpreError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return SslpreError(f"`{path}` cannot be read: {reason}", "copy it anew: it may be cut short, or of another kind", 5)


def flat(stored: Any) -> Tensors:
    """Every dense tensor in nested dictionaries, under their keys joined by dots, in the order of the file."""
    found: Tensors = {}
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("", stored)]
    while todo:
        name, item = todo.pop()
        if isinstance(item, Tensor) and item.layout == torch.strided and not item.is_quantized:
            found[name.removeprefix(".")] = item.detach()
        elif isinstance(item, Mapping) and id(item) not in seen:  # a file may hold a dictionary within itself
            seen.add(id(item))
            todo += [(f"{name}.{key}", value) for key, value in reversed(list(item.items()))]
    return found


@cache
def trunk(architecture: str) -> Shapes:
    """Names and shapes of a network without its classifier."""
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=0)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def dialects(known: str | None) -> Iterator[Dialect]:
    """How the file may be written; `known` alone where the architecture is named, also in timm's plain names."""
    for dialect in DIALECTS:
        if known is None or (small_stem_of(known) or known) in dialect.architectures:
            yield dialect if known is None else Dialect(dialect.anchor, (known,), dialect.words)
    if known is not None:
        yield Dialect(max(trunk(known), key=len), (known,))


def rank(prefix: str) -> int:
    """Which of several networks in a file its authors evaluate: the lowest.

    DINO, iBOT and I-JEPA take the averaged network, MoCo and BYOL the one that is trained.
    """
    words = prefix.lower()
    order = (
        ("online",),
        ("teacher", "target_encoder", "ema"),
        (),
        ("student", "momentum", "encoder_k", "target", "key"),
    )
    found = [i for i, group in enumerate(order) if any(re.search(rf"(^|[._]){one}", words) for one in group)]
    return min(found, default=2)


def find(tensors: Tensors, old: Path, known: str | None) -> Match:
    """The network in the file. Raises SslpreError (exit 5) where none fits fully, or two do."""
    candidates = [
        (name[: len(name) - len(dialect.anchor)], dialect)
        for dialect in dialects(known)
        for name in tensors
        if name == dialect.anchor or name.endswith("." + dialect.anchor)
    ]
    best: tuple[float, int, int, str, str] | None = None  # share that is odd, and what is said of the nearest
    for prefix, dialect in sorted(candidates, key=lambda candidate: rank(candidate[0])):
        parts = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
        inside = {dialect.renamed(name): tensor for name, tensor in parts.items()}
        fits = []
        for architecture in with_small(dialect.architectures):
            odd, count, total = compare(architecture, inside)
            if not odd:
                fits.append(architecture)
            elif best is None or len(odd) / total < best[0]:
                best = (len(odd) / total, count, total, architecture, odd[0])
        if len(fits) > 1:
            told = " and ".join(fits)
            raise SslpreError(f"`{old}` fits {told} alike", f"add --backbone {fits[0]}", 5)
        if fits:
            return matched(fits[0], prefix, inside, tensors)
    hint = "add --backbone NAME, any of timm's" if known is None else "name another --backbone, or none"
    if best is None:
        what = f"no tensor of a {known}" if known else "no ResNet, ViT or ConvNeXt that sslpre knows"
        raise SslpreError(f"`{old}` holds {len(tensors)} tensors and {what}", hint, 5)
    _, count, total, architecture, name = best
    raise SslpreError(f"`{old}` fits {count} of {total} tensors of {architecture}, not `{name}`", hint, 5)


def with_small(architectures: tuple[str, ...]) -> list[str]:
    known = [one for one in architectures if timm.is_model(one)]
    return [name for one in known for name in ([one, f"{one}_small"] if one in small_stems else [one])]


def compare(architecture: str, inside: Tensors) -> tuple[list[str], int, int]:
    """Names that keep `inside` from being this network, how many of its tensors fit, and of how many."""
    own = sized(architecture, inside)
    odd = [
        name
        for name, shape in own.items()
        if not (same_shape(shape, inside[name]) if name in inside else name.endswith(COUNTER))
    ]
    fitting = len(own) - len(odd)
    classifier = classifiers(architecture)
    roots = {first(name) for name in own}
    odd += [n for n in inside if n not in own and first(n) in roots and not n.startswith(classifier)]
    return odd, fitting, len(own)


def sized(architecture: str, inside: Tensors) -> Shapes:
    """The network's shapes, a ViT's position embedding as long as the file's."""
    own = dict(trunk(architecture))
    here = inside.get("pos_embed")
    if "pos_embed" in own and here is not None and grid(own, here) is not None:
        own["pos_embed"] = tuple(here.shape) if here.ndim == 3 and here.shape[-1] == own["pos_embed"][-1] else (0,)
    return own


def grid(own: Shapes, positions: Tensor) -> int | None:
    """Patches along a side of the images that a square position embedding was made for; None where it is not."""
    if positions.ndim != 3 or "patch_embed.proj.weight" not in own:
        return None
    extra = 1 if "cls_token" in own else 0
    side = math.isqrt(max(0, positions.shape[1] - extra))
    return side if side and side * side + extra == positions.shape[1] else None


def same_shape(shape: tuple[int, ...], tensor: Tensor) -> bool:
    """Equal, but for axes of length one: torchvision keeps a layer's scale as [C, 1, 1]."""
    return shape == tuple(tensor.shape) or (
        tensor.ndim > len(shape) and shape == tuple(side for side in tensor.shape if side != 1)
    )


@cache
def classifiers(architecture: str) -> tuple[str, ...]:
    cfg = timm.get_pretrained_cfg(architecture)
    named = (cfg.classifier if cfg is not None else None) or ()
    return tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))


def matched(architecture: str, prefix: str, inside: Tensors, tensors: Tensors) -> Match:
    own = sized(architecture, inside)
    for name in own:
        if name in inside and inside[name].nbytes > inside[name].untyped_storage().nbytes():
            message = f"the weights `{prefix}{name}` claim {inside[name].numel():,} numbers, and the file has fewer"
            raise SslpreError(message, "save network.state_dict() with the program that wrote it", 5)
    taken = {name: inside[name].reshape(shape) for name, shape in own.items() if name in inside}
    arguments: dict[str, Any] = {}
    side = grid(own, taken["pos_embed"]) if "pos_embed" in taken else None
    if side is not None:
        size = side * own["patch_embed.proj.weight"][-1]
        if size not in SIDES:
            raise SslpreError(f"`{prefix}pos_embed` is for images of {size:,} px, which no run has", "other weights", 5)
        arguments = {"img_size": size, "dynamic_img_size": True}
        if moco_v3(prefix) and own["cls_token"][-1] == 384:
            arguments["num_heads"] = 12  # MoCo v3's ViT-S, appendix of https://arxiv.org/abs/2104.02057; timm's has 6
    rest = [(group(name, prefix), tensor) for name, tensor in tensors.items() if not name.startswith(prefix)]
    rest += [(first(name), tensor) for name, tensor in inside.items() if name not in own]
    return Match(architecture, arguments, prefix, taken, len(own) - len(taken), left_out(rest))


def moco_v3(prefix: str) -> bool:
    """Do a network's names begin as in MoCo v3's files? Nothing else tells whose ViT it is, and thus its heads."""
    return re.search(r"(base|momentum)_encoder\.$", prefix) is not None


def first(name: str) -> str:
    return name.partition(".")[0]


def group(name: str, prefix: str) -> str:
    """The part of the file that a tensor outside the network belongs to: its first word that is not the network's."""
    words, beginning = name.split("."), prefix.split(".")
    common = next((i for i, (ours, theirs) in enumerate(zip(words, beginning, strict=False)) if ours != theirs), 0)
    return words[common]


def left_out(parts: list[tuple[str, Tensor]]) -> dict[str, str]:
    """What was not taken, by group: how many tensors, of a single one its shape."""
    counts = Counter(name for name, _ in parts)
    single = {name: "×".join(f"{side:,}" for side in tensor.shape) or "a number" for name, tensor in parts}
    return {name: f"{count} tensors" if count > 1 else single[name] for name, count in counts.items()}


def rebuilt(match: Match, source: str) -> Encoder:
    """The encoder, every tensor of it from the file `source`. Raises SslpreError: exit 5 for other numbers, 10."""
    model = timm.create_model(match.architecture, num_classes=0, **match.model_args)
    cfg = timm.get_pretrained_cfg(match.architecture)
    usual = cfg.input_size[-1] if cfg is not None else 224
    own = model.state_dict()
    counters = {name: tensor for name, tensor in own.items() if COUNTER in name}
    model.load_state_dict({**counters, **in_float32(match.tensors, source, own)}, strict=True)
    size = match.model_args.get("img_size", usual)
    return Encoder(model, match.architecture, match.model_args, size, MEAN, STD).eval()


def said(match: Match, encoder: Encoder) -> list[str]:
    """What was taken from where, what was left, and what was assumed."""
    total = len(match.tensors) + match.absent
    where = f" of `{match.prefix.removesuffix('.')}`" if match.prefix else ""
    text = f"{match.architecture}: {len(match.tensors)} of {total} tensors{where}"
    if match.absent:
        text += f"; {match.absent} counters of batches are not in the file, nothing needs them"
    lines = [text]
    if match.left:
        lines.append("left out: " + ", ".join(f"{name} ({count})" for name, count in match.left.items()))
    heads = {block.attn.num_heads for block in getattr(encoder.model, "blocks", []) if hasattr(block, "attn")}
    guess = "" if moco_v3(match.prefix) else " (a guess: no tensor tells)"
    told = f", {heads.pop()} heads{guess}" if len(heads) == 1 else ""
    told += ", no max-pool after its stem" if small_stem_of(match.architecture) else ""
    lines.append(f"taken to be: {encoder.image_size} px{told}, images standardised with ImageNet's mean and deviation")
    return lines
