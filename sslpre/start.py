"""Weights that a run starts from instead of random ones: timm's, an export's, a run's, or a plain file of timm's keys.

Only weights are taken: a start is a new run, with its own schedule and step 0. Nothing is unpickled here.
"""

from __future__ import annotations

import difflib
import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg
from torch import Tensor

from sslpre.encoder import SIZES, Encoder, build, side, standardisation
from sslpre.errors import SslpreError, printable
from sslpre.export import FACTS, open_encoder
from sslpre.ops.floats import in_float32
from sslpre.timm import architecture_of, small_stem_of
from sslpre.train.runs import is_run, write_text
from sslpre.weights import FOLDER, PRETRAINED, TIMM, locate, of_timm

# The hub's errors are those of the http library under it, which has changed more than once.
UNREACHABLE = cast(tuple[type[Exception], ...], (OSError, *HfHubHTTPError.__bases__))
PATIENCE = 8  # seconds for the hub's first answer; the library itself would try for half a minute and more
RECORD = "start.json"
COUNTER = "num_batches_tracked"  # of batch normalisation
Colours = tuple[float, float, float]


@dataclass(frozen=True)
class Start:
    """Weights, and what must be known of them. `licence` is "" where it is not known.

    init: what stands in a recipe to find the same weights again, `timm:NAME.TAG` or an absolute path; source: the same
    for people to read; origin: where the weights come from, also from whom the source had them; stem: "small" or
    "timm"; image_size: side in pixels that they were trained at; mean, std: what images must be standardised with;
    extra: arguments of the network besides its size; dropped: tensors of a classifier that were left out of `tensors`;
    ours: written by sslpre, which knows of them all that there is to know.
    """

    init: str
    source: str
    architecture: str
    stem: str
    image_size: int
    mean: Colours
    std: Colours
    licence: str
    origin: str
    tensors: dict[str, Tensor]
    dropped: int
    extra: dict[str, Any]
    ours: bool = False

    def facts(self) -> dict[str, str]:
        """What an export of the run says of its beginning."""
        told = {"licence": self.licence, "origin": self.origin}
        return {name: fact for name, fact in told.items() if fact}


def read(init: str, backbone: str, stem: str = "auto") -> Start:
    """The weights that `init` names: "pretrained" or "timm:NAME.TAG", a run, an export, a `.safetensors` file.

    backbone, stem: the recipe's; "pretrained" and a file without metadata need the first, and it may carry a tag of
    timm's; that timm's weights do not have the second is told before they are fetched.
    Raises SslpreError: exit 2 for what is not there, 3 where the network is needed and not reached, 5 for a file that
    cannot be read or is of another kind, 10 for weights that are not finite.
    """
    if of_timm(init):
        start = of_the_hub(init, backbone, stem)
    else:
        path = locate(init)
        start = of_a_run(path) if is_run(path) else of_a_file(path, backbone)
    return replace(start, tensors=in_float32(start.tensors, start.source))


def of_the_hub(init: str, backbone: str, stem: str) -> Start:
    """timm's weights, from the cache or fetched into it."""
    if init == PRETRAINED and backbone == "auto":
        raise SslpreError("`--init pretrained` needs the name of a network", "--init pretrained --backbone resnet18")
    plain = small_stem_of(backbone)
    if plain is not None or stem == "small":
        hint = "--set encoder.stem=timm" + (f" --backbone {plain}" if plain else "")
        raise SslpreError(f"`--init {init}` has timm's own stem, and the recipe asks for a small one", hint)
    cfg = known_weights(backbone if init == PRETRAINED else init.removeprefix(TIMM))
    name = f"{cfg['architecture']}.{cfg['tag']}" if cfg["tag"] else cfg["architecture"]
    file = fetched(name, cfg)
    revision = file.parent.name[:12]  # the cache keeps each version of a repository under its commit
    tensors, dropped = without_classifier(tensors_of(file), cfg)
    return Start(
        init=TIMM + name,
        source=name,
        architecture=cfg["architecture"],
        stem="timm",
        image_size=cfg["input_size"][-1],
        mean=colours(cfg["mean"]),
        std=colours(cfg["std"]),
        licence=cfg["license"] or "",
        origin=f"hf-hub:{cfg['hf_hub_id']}@{revision}",
        tensors=tensors,
        dropped=dropped,
        extra={},
    )


def known_weights(name: str) -> dict[str, Any]:
    """timm's description of the weights `NAME` or `NAME.TAG`. Raises SslpreError (exit 2) where there are none."""
    architecture, tag = architecture_of(name), name.partition(".")[2]
    tags = [one.partition(".")[2] for one in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        hint = "weights there are: " + ", ".join(f"{architecture}.{one}" for one in tags if one) or "none"
        raise SslpreError(f"timm has no weights `{name}`", hint)
    cfg = get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)
    if cfg is None or not cfg.hf_hub_id:
        others = sorted({one.partition(".")[0] for one in timm.list_models(pretrained=True)})
        near = difflib.get_close_matches(architecture, others, n=1, cutoff=0.3)
        raise SslpreError(f"timm has no weights for `{architecture}`", f"--backbone {near[0] if near else 'resnet18'}")
    return {**vars(cfg), "architecture": architecture}


def fetched(name: str, cfg: dict[str, Any]) -> Path:
    """The safetensors file of the weights `name`, from the hub's cache, or from the hub."""
    filename = cfg["hf_hub_filename"] or FOLDER
    where = (cfg["hf_hub_id"], filename)
    cached = try_to_load_from_cache(*where)
    if isinstance(cached, str):
        return Path(cached)
    way_round = (
        f"where there is internet: hf download {cfg['hf_hub_id']} --local-dir {name}; copy the folder {name} here, "
        f"and then: --init {name}"
    )
    try:
        get_hf_file_metadata(hf_hub_url(*where), timeout=PATIENCE)
        return Path(hf_hub_download(*where))
    except UNREACHABLE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SslpreError(f"the weights `{name}` cannot be fetched: {reason}", way_round, 3) from error


def of_a_run(folder: Path) -> Start:
    """The encoder of a run's newest checkpoint."""
    from sslpre.train.build import open_run  # the run opens its own start with this module

    encoder, _, facts = open_run(folder, torch.device("cpu"))
    return of_ours(folder, encoder.as_rgb(), facts)


def of_ours(path: Path, encoder: Encoder, facts: dict[str, str]) -> Start:
    """An encoder that sslpre wrote. Its history goes into the origin, and with it the licence of its own start."""
    plain = small_stem_of(encoder.architecture)
    step = facts.get("step", "0")
    history = facts.get("method", "exported") + (f", step {step}" if step != "0" else "")
    earlier = printable(facts.get("origin", ""))
    return Start(
        init=str(path.absolute()),
        source=shown(path),
        architecture=plain or encoder.architecture,
        stem="small" if plain else "timm",
        image_size=encoder.image_size,
        mean=colours(encoder.mean.flatten().tolist()),
        std=colours(encoder.std.flatten().tolist()),
        licence=printable(facts.get("licence", "")),
        origin=f"{path.name} ({printable(history)})" + (f", from {earlier}" if earlier else ""),
        tensors={name: tensor.detach().clone() for name, tensor in encoder.model.state_dict().items()},
        dropped=0,
        extra={name: value for name, value in encoder.model_args.items() if name not in SIZES},
        ours=True,
    )


def of_a_file(path: Path, backbone: str) -> Start:
    """An export of ours, or timm's own keys in a file, beside which a config.json may say what network it is."""
    file = path / FOLDER if path.is_dir() else path
    tensors = tensors_of(file)
    with safe_open(str(file), "pt") as stored:
        facts = stored.metadata() or {}
    if all(name in facts for name in FACTS):
        return of_ours(path, *open_encoder(path))
    cfg = described(path, file, backbone)
    tensors, dropped = without_classifier(tensors, cfg)
    plain = small_stem_of(cfg["architecture"])
    return Start(
        init=str(path.absolute()),
        source=shown(path),
        architecture=plain or cfg["architecture"],
        stem="small" if plain else "timm",
        image_size=cfg["input_size"][-1],
        mean=colours(cfg["mean"]),
        std=colours(cfg["std"]),
        licence=cfg.get("license") or "",
        origin=f"{path.name} ({cfg['architecture']}{'.' + cfg['tag'] if cfg.get('tag') else ''})",
        tensors=tensors,
        dropped=dropped,
        extra=cfg["model_args"],
    )


def described(path: Path, file: Path, backbone: str) -> dict[str, Any]:
    """What is known of a file of timm's keys: from the config.json beside it, else from the backbone's name.

    A licence is only taken from timm where the weights are named by their tag.
    """
    beside = file.parent / "config.json"
    told: dict[str, Any] = {}
    if path.is_dir() and beside.is_file():
        try:
            told = checked(json.loads(beside.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise SslpreError(f"`{beside}` cannot be read: {reason}", f"--init {shlex.quote(str(file))}", 5) from error
    elif backbone == "auto":
        hint = f"--init {shlex.quote(str(path))} --backbone NAME"
        raise SslpreError(f"`{path}` does not say which network it is of", hint)
    name = f"{told['architecture']}.{told.get('tag') or ''}".rstrip(".") if told else backbone
    architecture, tag = architecture_of(name), name.partition(".")[2]
    tagged = f"{architecture}.{tag}"
    known = tagged if tagged in get_arch_pretrained_cfgs(architecture) else architecture
    cfg = get_pretrained_cfg(known)
    licence = cfg.license if cfg is not None and tag and known == name else ""
    use = ("mean", "std", "input_size", "classifier")
    return {
        **(vars(cfg) if cfg is not None else vars(PretrainedCfg())),
        **{key: told[key] for key in use if told.get(key)},
        "architecture": architecture,
        "tag": tag,
        "license": told.get("license") or licence,
        "model_args": told.get("model_args", {}),
    }


def checked(config: Any) -> dict[str, Any]:
    """What a config.json says of its weights. Raises one of Python's errors for what it cannot mean."""
    told = {**config.get("pretrained_cfg", config), "architecture": config["architecture"]}
    for key in ("architecture", "tag", "license"):
        if not isinstance(told.get(key) or "", str):
            raise ValueError(f"`{key}` is no text")
        told[key] = printable(told.get(key) or "")
    named = told.get("classifier") or ()
    if not all(isinstance(one, str) for one in named):
        raise ValueError("`classifier` is no name")
    arguments = {**(config.get("model_args") or {})}
    if arguments.get("in_chans", 3) != 3:
        raise ValueError(f"its images have {arguments['in_chans']} channels, not 3")
    size = arguments.get("img_size")
    if size and not told.get("input_size"):
        told["input_size"] = size if isinstance(size, list) else [size]
    if told.get("input_size"):
        side(told["input_size"][-1])
    standardisation(told.get("mean") or (0.5, 0.5, 0.5), told.get("std") or (0.5, 0.5, 0.5))
    # timm builds with all of them; the size and the head are for the run to say
    told["model_args"] = {k: v for k, v in arguments.items() if k not in (*SIZES, "num_classes", "in_chans")}
    return told


def shown(path: Path) -> str:
    """A path for people: from the current folder where it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def tensors_of(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise SslpreError(
            f"`{file}` cannot be read: {' '.join(str(error).split())}", "copy it anew: it may be cut short", 5
        ) from error


def without_classifier(tensors: dict[str, Tensor], cfg: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """The tensors but for those of the classifier that `cfg` names, and how many those were."""
    named = cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))
    kept = {name: tensor for name, tensor in tensors.items() if not (prefixes and name.startswith(prefixes))}
    return kept, len(tensors) - len(kept)


def colours(numbers: Any) -> Colours:
    """Three numbers, as they were typed and not as float32 spells them."""
    red, green, blue = (float(f"{float(number):.7g}") for number in numbers)
    return red, green, blue


def load(encoder: Encoder, start: Start) -> int:
    """Put the weights into `encoder`, every tensor of its network and none besides; gives back how many.

    Position embeddings of another size are resampled as timm does, and counters of batches may be absent. Raises
    SslpreError: exit 5 where a tensor is missing, left over or of another shape, or the network has arguments that
    `encoder` has not.
    """
    other = {name: value for name, value in start.extra.items() if encoder.model_args.get(name) != value}
    if other:
        told = ", ".join(f"{name}={value}" for name, value in other.items())
        hint = "name these in [encoder] model_args, or in none of it"
        raise SslpreError(f"`{start.source}` is a {start.architecture} with `{told}`, the run's is not", hint, 5)
    own = encoder.model.state_dict()
    in_float32(start.tensors, start.source, own)
    tensors = start.tensors if shapes(own) == shapes(start.tensors) else fitted(encoder, start)
    encoder.model.load_state_dict(tensors, strict=True)
    return len(own) - len(absent(encoder, start))


def absent(encoder: Encoder, start: Start) -> list[str]:
    """Counters of batches, which files from before 2018 do not have."""
    return [name for name in encoder.model.state_dict() if name.endswith(COUNTER) and name not in start.tensors]


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def fitted(encoder: Encoder, start: Start) -> dict[str, Tensor]:
    """The tensors under the names and in the sizes of the network, as timm's own loading makes them."""
    own = encoder.model.state_dict()
    odd = [
        name
        for name in own.keys() & start.tensors.keys()
        if own[name].numel() != start.tensors[name].numel() and not of_positions(name)
    ]
    overlay = {
        "state_dict": dict(start.tensors),
        "num_classes": 0,
        "label_offset": 0,
        "source": "",
        "custom_load": False,
    }
    reason = None
    if not odd and encoder.colour == "rgb":
        try:
            with torch.random.fork_rng(devices=[]):  # the run's own draws do not depend on where it started
                twin = timm.create_model(
                    encoder.architecture,
                    pretrained=True,
                    pretrained_cfg_overlay=overlay,
                    num_classes=0,
                    **encoder.model_args,
                )
            return dict(twin.state_dict())
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, AssertionError) as error:
            reason = error  # each of timm's networks refuses in its own way
    theirs = shapes(start.tensors)
    matching = sum(theirs.get(name) == shape for name, shape in shapes(own).items())
    wrong = sorted(name for name in own.keys() | theirs.keys() if shapes(own).get(name) != theirs.get(name))[0]
    message = f"`{start.source}` fits {matching} of {len(own)} tensors of {encoder.architecture}, not `{wrong}`"
    hint = f"name its network with --backbone, or: sslpre import {shlex.quote(start.source)} -o new.safetensors"
    if start.ours or not Path(start.init).is_file():  # nothing that `sslpre import` could know better
        hint = f"--image-size {start.image_size}, or other weights"
    raise SslpreError(message, hint, 5) from reason


def of_positions(name: str) -> bool:
    return "pos" in name or "relative" in name


def say_loaded(encoder: Encoder, start: Start) -> str:
    """The line that tells what `load` has loaded."""
    own = encoder.model.state_dict()
    counters = len(absent(encoder, start))
    text = f"start      {start.source}: {len(own) - counters} of {len(own)} tensors loaded"
    text += ", the others are counters of batches that nothing needs" if counters else ""
    text += f", {start.dropped} of its classifier left out" if start.dropped else ""
    resampled = [name for name in own if of_positions(name) and name in start.tensors]
    if any(own[name].shape != start.tensors[name].shape for name in resampled):
        text += f", positions resampled from {start.image_size} to {encoder.image_size} px"
    return printable(text + f"; licence {start.licence or 'not known'}")


def started(start: Start, image_size: int, mean: Colours, std: Colours) -> Encoder:
    """The start itself as an encoder in evaluation mode: what a run has to beat."""
    with torch.random.fork_rng(devices=[]):
        encoder = build(
            start.architecture, stem=start.stem, image_size=image_size, mean=mean, std=std, model_args=start.extra
        )
    load(encoder, start)
    return encoder.eval()


def record(folder: Path, start: Start) -> None:
    write_text(folder / RECORD, json.dumps(start.facts(), indent=1) + "\n")


def recorded(folder: Path) -> dict[str, str]:
    """The facts of the start of the run in `folder`; none where it began from random weights."""
    if not (path := folder / RECORD).is_file():
        return {}
    try:
        return {str(name): str(fact) for name, fact in json.loads(path.read_bytes()).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise SslpreError(f"`{path}` cannot be read", "copy the run anew", 5) from error
