"""Checkpoints: safetensors and JSON, complete or absent, never pickle.

A checkpoint is a folder `step-<n>` of `model.safetensors`, `optim.safetensors`, `state.json` and, written last,
`MANIFEST.json` with each file's size and sha256. It is written under another name beside its place, synced and renamed,
so that a kill at any moment leaves either the whole of it or nothing.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sslpre.errors import SslpreError
from sslpre.synced import sync_folder, write_synced

FORMAT = 1
KEPT = 2
ROOM = 1.2  # of a checkpoint's size that must be free
STATE: dict[str, Any] = {"step": int, "seconds": int | float, "data": str, "recipe": str, "images": int, "classes": int}
FILES = ("model.safetensors", "optim.safetensors", "state.json")


class Damaged(SslpreError):
    """A checkpoint whose bytes are not those that were written."""

    def __init__(self, message: str):
        super().__init__(message, "sslpre pretrain --resume goes on from an older one", 5)


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    model: dict[str, Tensor]
    optim: dict[str, Tensor]
    state: dict[str, Any]


def save(
    folder: Path,
    model: dict[str, Tensor],
    optim: dict[str, Tensor],
    state: dict[str, Any],
    outdated: Sequence[Path] = (),
) -> Path:
    """Write `folder/step-<state["step"]>` and drop all but the newest complete ones, once it is there also `outdated`.

    Raises SslpreError (exit 10) if a tensor is not finite: nothing non-finite is ever written; OSError where the disk
    does not take it, and then nothing has changed.
    """
    refuse_nonfinite(model, "weights", state["step"])
    refuse_nonfinite(optim, "optimiser state", state["step"])
    folder.mkdir(exist_ok=True)
    final = folder / f"step-{state['step']:08d}"
    if final in complete(folder) and not outdated:
        return final
    temporary = folder / f".tmp-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        contents = {
            "model.safetensors": pack(model),
            "optim.safetensors": pack(optim),
            "state.json": json.dumps({"format": FORMAT, **state}, indent=1).encode(),
        }
        manifest = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()
        }
        refuse_full(folder, sum(map(len, contents.values())))
        for name, data in contents.items():
            write_synced(temporary / name, data)
        write_synced(temporary / "MANIFEST.json", json.dumps(manifest, indent=1).encode())
        sync_folder(temporary)
        if final.exists():  # an incomplete or outdated one of the same step: no other is written twice
            shutil.rmtree(final)
        temporary.rename(final)
        for path in outdated:  # their steps are of another count, and must not pass for newer ones
            if path != final and path.exists():
                path.rename(path.with_name(f".outdated-{path.name}-{uuid.uuid4().hex[:8]}"))
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    prune(folder)
    return final


def refuse_full(folder: Path, size: int) -> None:
    """Raises OSError where there is hardly room for `size` bytes: what else the disk is for needs the rest."""
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < ROOM * size:  # some file systems do not say
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def pack(tensors: dict[str, Tensor]) -> bytes:
    """safetensors bytes; tensors are made contiguous (channels_last is not stored), each shared tensor once."""
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def nonfinite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor that is not finite."""
    floats = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not floats:
        return None
    finite = torch.stack([t.isfinite().all().cpu() for t in floats.values()]).tolist()
    return next((name for name, good in zip(floats, finite, strict=True) if not good), None)


def refuse_nonfinite(tensors: dict[str, Tensor], what: str, step: int) -> None:
    name = nonfinite(tensors)
    if name is not None:
        raise SslpreError(f"{what} `{name}` not finite at step {step}", "lower --lr, or use --precision fp32", 10)


def complete(folder: Path) -> list[Path]:
    """Checkpoints whose manifest names every file at its size, newest first. Contents are checked on loading."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.glob("step-*"):
        try:
            manifest = json.loads((path / "MANIFEST.json").read_text(encoding="utf-8"))
            whole = all((path / name).stat().st_size == manifest[name]["bytes"] for name in FILES)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # not complete: the next older one is
        if whole:
            found.append(path)
    return sorted(found, key=lambda path: path.name, reverse=True)


def prune(folder: Path) -> None:
    for path in complete(folder)[KEPT:]:
        shutil.rmtree(path, ignore_errors=True)  # what cannot be removed now is tried again after the next one


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)


def newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole and unchanged, or None where none was ever completed.

    A damaged one is named on stderr and passed over; where only damaged ones are left: SslpreError (exit 5).
    """
    folder = run / "checkpoints"
    found = sorted(folder.glob("step-*"), key=lambda path: path.name, reverse=True) if folder.is_dir() else []
    for path in found:
        try:
            return load(path)
        except Damaged as error:
            print(f"warning: {error.message}; trying the one before it", file=sys.stderr)
    if found:
        raise SslpreError(
            f"no checkpoint of `{run}` can be read", "start again: sslpre pretrain RECIPE IMAGES --out ANOTHER", 5
        )
    return None


def load(path: Path) -> Checkpoint:
    """Read one checkpoint, checking every byte against its manifest.

    Raises Damaged (exit 5) where they differ, and SslpreError (exit 5) where it is of a newer format or cannot be read.
    """
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text(encoding="utf-8"))
        contents = {name: (path / name).read_bytes() for name in FILES}
        for name, data in contents.items():
            if hashlib.sha256(data).hexdigest() != manifest[name]["sha256"]:
                raise Damaged(f"checkpoint file `{path / name}` is damaged: its sha256 is not the manifest's")
        state = json.loads(contents["state.json"])
        if state["format"] > FORMAT:
            raise SslpreError(
                f"checkpoint `{path}` has format {state['format']}, this sslpre reads {FORMAT}",
                "pip install -U sslpre",
                5,
            )
        model, optim = (safetensors.torch.load(contents[name]) for name in FILES[:2])
        for tensors in (model, optim):
            if (odd := nonfinite(tensors)) is not None:
                raise Damaged(f"checkpoint `{path}` is damaged: `{odd}` is not finite")
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise Damaged(f"checkpoint `{path}` is damaged: {error}") from error
    except OSError as error:
        hint = "check its permissions and the disk: nothing says that it is damaged"
        raise SslpreError(f"checkpoint `{path}` cannot be read: {error.strerror}", hint, 5) from error
    return Checkpoint(path, model, optim, state)


def refuse_incomplete(saved: Checkpoint) -> None:
    """Raises SslpreError (exit 5) where its state, though unchanged, is none that a run can go on from."""
    for key, kind in STATE.items():
        if not isinstance(saved.state.get(key), kind):
            hint = "use the sslpre that wrote it, or start again"
            raise SslpreError(f"checkpoint `{saved.path}` has no `{key}` of a run", hint, 5)


def model_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """`state_dict` with each shared tensor once, under its first name."""
    seen: set[tuple[int, int]] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        key = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = tensor
    return kept


def load_model(module: torch.nn.Module, stored: dict[str, Tensor]) -> None:
    """Copy stored tensors into the module, keeping its memory format. A missing or unknown one: exit 5."""
    own = model_state(module)
    if own.keys() != stored.keys():
        odd = sorted(own.keys() ^ stored.keys())[0]
        raise SslpreError(
            f"checkpoint and network differ: `{odd}` is only in one of them", "use the versions in environment.json", 5
        )
    for name, tensor in own.items():
        if tensor.shape != stored[name].shape:
            raise SslpreError(
                f"checkpoint tensor `{name}` has shape {tuple(stored[name].shape)}, not {tuple(tensor.shape)}", "", 5
            )
        tensor.copy_(stored[name])
