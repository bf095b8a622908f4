"""An encoder as files that timm opens: one `.safetensors` file, or a folder for `timm.create_model("local-dir:…")`.

An export proves itself: the lines that it prints are run in a fresh process, and the features they give must be those
of the encoder that was trained.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

import sslpre
from sslpre.encoder import SIDES, SIZES, Encoder, check_arguments, side, standardisation
from sslpre.errors import SslpreError, disk_code
from sslpre.ops.floats import in_float32
from sslpre.synced import sync_folder, write_synced
from sslpre.timm import small_stem_of

TOLERANCE = 1e-4  # of the largest feature
PATIENCE = 600  # seconds for the fresh process
PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".pkl", ".tar")
FOREIGN = (*PICKLES, ".onnx", ".npz", ".safetensors")  # `encoder.pth` asks for a file of that kind, not for a folder
FACTS = ("architecture", "model_args", "mean", "std", "image_size")  # without these a file is not ours
NEEDED = "name what `sslpre export` wrote: a .safetensors file or a folder with model.safetensors"


def export(encoder: Encoder, facts: dict[str, str], out: Path, stage: str | None = None) -> list[str]:
    """Write `encoder` to `out` and prove that timm opens it; gives back the Python lines that do.

    An encoder of luma is written as the network of RGB that gives the same features.
    `out` ends in `.safetensors`: one file of timm's own keys. Else a folder of model.safetensors and config.json, also
    for `num_classes=N` and `features_only=True`. facts: metadata, added to what the encoder itself knows.
    stage: a number as in timm's `out_indices`, or a stage's name. The file has all weights all the same; it says which
    stage was meant, and the lines compute that stage's map in place of the output.
    Raises SslpreError: exit 2 if `out` exists or is of another kind, or there is no such stage, 3 if it cannot be
    written, 10 for weights that are not finite, 1 if the proof fails; nothing is left behind then.
    """
    if out.exists() or out.is_symlink():
        raise SslpreError(f"`{out}` exists", "name another OUT, or remove it first")
    if out.suffix.lower() in FOREIGN and out.suffix != ".safetensors":
        plain = shlex.quote(str(out.with_suffix(".safetensors")))
        raise SslpreError(f"cannot write `{out.suffix}` files", f"sslpre export {plain}")
    number = None if stage is None else stage_number(encoder, stage)
    if number is not None:
        facts = facts | {"stage": str(number), "stage_name": encoder.stage_names[number]}
    written = encoder.as_rgb()
    lines = usage(written, out, number)
    missing = [parent for parent in out.parents if not parent.exists()]  # the deepest first
    try:
        write(written, facts, out)
        try:
            prove(encoder, lines, out, number)
        except BaseException:  # Ctrl-C too: what is not proven does not stay
            shutil.rmtree(out) if out.is_dir() else out.unlink()
            raise
    except BaseException:
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    return lines


def write(encoder: Encoder, facts: dict[str, str], out: Path) -> None:
    """Write the encoder to `out` and make the folders above it. Raises SslpreError as `export`."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".safetensors":
            write_file(encoder, facts, out)
        else:
            write_folder(encoder, facts, out)
    except OSError as error:
        hint = "name an OUT in a folder that you can write to, with enough space"
        why = (error.strerror or "unknown reason").lower()
        raise SslpreError(f"cannot write `{out}`: {why}", hint, disk_code(error)) from error


def write_file(encoder: Encoder, facts: dict[str, str], out: Path) -> None:
    """Write the encoder to the file `out`, whole or not at all, without the proof. Raises SslpreError as `export`."""
    data = packed(encoder.as_rgb(), facts)
    temporary = out.with_name(f".{out.name}-{uuid.uuid4().hex[:8]}")
    try:
        write_synced(temporary, data)
        temporary.rename(out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(out.parent)


def write_folder(encoder: Encoder, facts: dict[str, str], folder: Path) -> None:
    """Write model.safetensors and config.json into a new `folder`, whole or not at all, without the proof.

    Raises SslpreError as `export`, and OSError if `folder` exists and is not empty.
    """
    encoder = encoder.as_rgb()
    data = packed(encoder, facts)
    described = json.dumps(config(encoder, facts), indent=1).encode()
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        write_synced(temporary / "model.safetensors", data)
        write_synced(temporary / "config.json", described)
        sync_folder(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def packed(encoder: Encoder, facts: dict[str, str]) -> bytes:
    """The safetensors file as bytes: timm's keys, every tensor a copy of its own, metadata of strings.

    Bytes rather than `save_file`, which since 0.8 makes files that only their owner can read.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in encoder.model.state_dict().items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            hint = "export an earlier run, or train again with --precision fp32"
            raise SslpreError(f"the weights `{name}` are not finite", hint, 10)
    return safetensors.torch.save(tensors, metadata(encoder, facts))


def metadata(encoder: Encoder, facts: dict[str, str]) -> dict[str, str]:
    mean, std = colours(encoder)
    own = {
        "architecture": encoder.architecture,
        "model_args": json.dumps(encoder.model_args),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "image_size": str(encoder.image_size),
        "sslpre": sslpre.__version__,
    }
    return {"format": "pt", **{name: str(fact) for name, fact in facts.items()}, **own}


def colours(encoder: Encoder) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, as they were typed and not as float32 spells them."""
    mean, std = (
        [float(f"{value:.7g}") for value in buffer.flatten().tolist()] for buffer in (encoder.mean, encoder.std)
    )
    return mean, std


def config(encoder: Encoder, facts: dict[str, str]) -> dict[str, Any]:
    """timm's config.json. It has a licence where the starting weights had one; others are their owner's to give."""
    mean, std = colours(encoder)
    theirs: dict[str, Any] = encoder.model.pretrained_cfg
    history = {name: fact for name, fact in facts.items() if name not in (*FACTS, "sslpre")}
    return {
        "architecture": encoder.architecture,
        "num_classes": 0,
        "num_features": encoder.dim,
        "model_args": encoder.model_args,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, encoder.image_size, encoder.image_size],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": mean,
            "std": std,
            "num_classes": 0,
            "first_conv": theirs.get("first_conv"),
            "classifier": theirs.get("classifier"),
            **{key: facts[name] for key, name in (("license", "licence"), ("origin_url", "origin")) if name in facts},
        },
        "sslpre": {"version": sslpre.__version__, **history},
    }


def stage_number(encoder: Encoder, stage: str) -> int:
    """Where a stage, named or numbered, stands in timm's `out_indices`. Raises SslpreError (exit 2)."""
    names = encoder.stage_names
    if not names:
        raise SslpreError(f"`{encoder.architecture}` does not give its stages", "sslpre export OUT, without --stage")
    if stage in names:
        return names.index(stage)
    if stage.isdecimal() and int(stage) < len(names):
        return int(stage)
    known = ", ".join(f"{number} {name}" for number, name in enumerate(names))
    raise SslpreError(f"`{encoder.architecture}` has no stage `{stage}`", f"--stage N or NAME, of {known}")


def usage(encoder: Encoder, out: Path, stage: int | None = None) -> list[str]:
    """Python lines that open `out` with timm and compute `features` of `images`: the output, or the map of a stage."""
    mean, std = colours(encoder)
    size = encoder.image_size
    lines = ["import timm", "import torch"]
    if small_stem_of(encoder.architecture) is not None:
        lines.append(f"import sslpre.timm  # registers {encoder.architecture}, which plain timm does not have")
    if out.suffix == ".safetensors":
        arguments = "".join(f", {name}={value!r}" for name, value in encoder.model_args.items())
        if stage is None:
            arguments += f", checkpoint_path={str(out)!r}"
        else:  # checkpoint_path is read after `features_only` has renamed and cut off layers, this before
            arguments += f", pretrained=True, pretrained_cfg_overlay=dict(file={str(out)!r}, num_classes=0"
            arguments += f", custom_load=False), features_only=True, out_indices=({stage},)"
        lines.append(f"model = timm.create_model({encoder.architecture!r}, num_classes=0{arguments})")
    else:
        what = "" if stage is None else f", features_only=True, out_indices=({stage},)"
        note = "  # num_classes=10 for a new head" if stage is None else ""
        lines.append(f"model = timm.create_model({f'local-dir:{out}'!r}, pretrained=True{what}){note}")
    of_stage = ""
    if stage is not None:
        network = dense(encoder, stage)
        of_stage = "[0].permute(0, 3, 1, 2)" if channels_last(network) else "[0]"
        if is_pruned(network, encoder):
            lines.append("# timm warns of unexpected keys here: of layers after the stages, which no map needs")
    features = f"model.eval()((images - mean) / std){of_stage}"
    return [
        *lines,
        f"mean = torch.tensor({mean}).view(3, 1, 1)",
        f"std = torch.tensor({std}).view(3, 1, 1)",
        "with torch.inference_mode():",
        f"    features = {features}  # images: float RGB [N, 3, {size}, {size}] in [0, 1]",
    ]


def dense(encoder: Encoder, stage: int) -> Any:
    """timm's `features_only` network of the same kind, without weights."""
    with torch.device("meta"):
        return timm.create_model(
            encoder.architecture, num_classes=0, features_only=True, out_indices=(stage,), **encoder.model_args
        )


def channels_last(network: Any) -> bool:
    """Does a `features_only` network give maps as [N, H, W, C]? Swin's does."""
    return getattr(network, "output_fmt", None) == "NHWC"


def is_pruned(network: Any, encoder: Encoder) -> bool:
    """Is it a `features_only` network of its own class, which lacks layers before the weights are read into it?

    Others are whole while they are read, and then wrapped in one of timm's dictionaries of modules.
    """
    return not isinstance(network, nn.ModuleDict) and bool(
        encoder.model.state_dict().keys() - network.state_dict().keys()
    )


def prove(encoder: Encoder, lines: list[str], out: Path, stage: int | None = None) -> None:
    """Run `lines` in a fresh process on 8 random images and compare with the encoder. Raises SslpreError (exit 1)."""
    side = encoder.image_size
    images = torch.rand(8, 3, side, side, generator=torch.Generator().manual_seed(0))
    mine = own_features(encoder, images, stage)
    with tempfile.TemporaryDirectory() as folder:
        there, back = (os.path.join(folder, name) for name in ("images.safetensors", "features.safetensors"))
        safetensors.torch.save_file({"images": images}, there)
        script = [
            "from safetensors.torch import load_file, save_file",
            f"images = load_file({there!r})['images']",
            *lines,
            f"save_file({{'features': features.contiguous().clone()}}, {back!r})",
        ]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                [sys.executable, "-c", "\n".join(script)],
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired as error:
            raise unproven(out, f"timm took more than {PATIENCE} s to open it") from error
        if done.returncode:
            raise unproven(out, (done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1])
        theirs = safetensors.torch.load_file(back)["features"]
    if theirs.shape != mine.shape:
        raise unproven(out, f"timm gives features of shape {tuple(theirs.shape)}, not {tuple(mine.shape)}")
    apart = ((theirs - mine).abs().max() / mine.abs().max().clamp_min(1e-12)).item()
    if not apart <= TOLERANCE:  # NaN is not
        raise unproven(out, f"timm's features differ from the encoder's by {apart:.1e}")


def own_features(encoder: Encoder, images: torch.Tensor, stage: int | None) -> torch.Tensor:
    """The output or the map of a stage in evaluation mode, on the CPU; the encoder's modes are as before afterwards."""
    modes = [(part, part.training) for part in encoder.modules()]
    try:
        with torch.inference_mode():
            encoder.eval()
            images = images.to(encoder.mean.device)
            return (encoder(images) if stage is None else encoder.stages(images)[stage][1]).float().cpu()
    finally:
        for part, mode in modes:
            part.training = mode


def unproven(out: Path, reason: str) -> SslpreError:
    hint = "nothing is lost: the run still holds the encoder; another version of timm may open it"
    return SslpreError(f"`{out}` was removed, it did not pass its check: {reason}", hint, 1)


def open_encoder(path: Path) -> tuple[Encoder, dict[str, str]]:
    """The encoder in a `.safetensors` export or an exported folder, in evaluation mode on the CPU, and its metadata.

    Every tensor must be there and none besides; nothing is unpickled. Raises SslpreError (exit 5).
    """
    file = path / "model.safetensors" if path.is_dir() else path
    if file.suffix.lower() in PICKLES:
        raise SslpreError(f"`{path}` may hold a pickle, which can run any code; it is not opened", NEEDED, 5)
    try:
        with safe_open(str(file), "pt") as stored:
            facts = dict(stored.metadata() or {})
        tensors = safetensors.torch.load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise SslpreError(f"`{file}` cannot be read: {' '.join(str(error).split())}", NEEDED, 5) from error
    missing = [name for name in FACTS if name not in facts]
    if missing:
        raise SslpreError(f"`{file}` was not written by sslpre: its metadata has no `{missing[0]}`", NEEDED, 5)
    with torch.device("meta"):  # the file's own tensors tell what memory the network may take
        plan = rebuilt(file, facts)
    own = {name: tuple(tensor.shape) for name, tensor in plan.model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if own != theirs:
        odd = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
        matching = len(own.keys() | theirs.keys()) - len(odd)
        message = f"`{file}` fits {matching} of {len(own)} tensors of {plan.architecture}, not `{odd[0]}`"
        raise SslpreError(message, "export it again, with the timm that is installed", 5)
    tensors = in_float32(tensors, str(file), plan.model.state_dict())
    encoder = rebuilt(file, facts)
    encoder.model.load_state_dict(tensors, strict=True)
    return encoder.eval(), facts


def rebuilt(file: Path, facts: dict[str, str]) -> Encoder:
    """The network that the metadata describes, with weights yet to be loaded. The metadata is not trusted."""
    architecture = facts["architecture"]
    if "." in architecture or not timm.is_model(architecture):  # names like hf-hub:… would reach for the network
        message = f"`{file}` is of the architecture `{architecture}`, which timm {timm.__version__} does not have"
        raise SslpreError(message, "pip install -U timm", 5)
    try:
        arguments = {**json.loads(facts["model_args"])}
        check_arguments(architecture, {name: item for name, item in arguments.items() if name not in SIZES})
        size = arguments.get("img_size", SIDES.start)
        for number in size if isinstance(size, list) else [size]:
            side(number)
        image_size = side(facts["image_size"])
        mean, std = standardisation(json.loads(facts["mean"]), json.loads(facts["std"]))
        model = timm.create_model(architecture, num_classes=0, pretrained=False, **arguments)
        return Encoder(model, architecture, arguments, image_size, mean, std)
    except Exception as error:  # each of timm's networks refuses in its own way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SslpreError(f"the metadata of `{file}` cannot be used: {reason}", NEEDED, 5) from error
