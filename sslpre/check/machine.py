"""What the machine has: versions, device, cores, memory, disks. All of it is looked up, none of it is tried, but for a
folder that is made and removed where runs would be."""

from __future__ import annotations

import errno
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from sslpre.check.pair import Pair, pair
from sslpre.data import cache, decode, room
from sslpre.errors import SslpreError
from sslpre.train import device
from sslpre.train.build import own_cores
from sslpre.train.runs import ROOT

SHARED = Path("/dev/shm")
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Disk:
    """Where, how much is free there in bytes (None: not known), and why nothing can be written, "" where it can."""

    at: str
    free: int | None
    lacking: str


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes, None where the system does not say. device: its name; kind: cpu, cuda or mps; gpus: their names;
    idle: there is an NVIDIA driver and torch does not see a GPU; bf16: native; shared: free in /dev/shm."""

    python: str
    pair: Pair
    device: str
    kind: str
    bf16: bool
    gpu_memory: int | None
    gpu_free: int | None
    gpus: tuple[str, ...]
    idle: bool
    cores: int
    memory: int | None
    free: int | None
    shared: int | None
    runs: Disk
    cache: Disk
    simplejpeg: str


def machine(where: torch.device) -> Machine:
    """The machine, of which a run would use the device `where`."""
    facts = device.facts(where)
    gpu_free, gpu_memory = gpu_room(where)
    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Machine(
        python=platform.python_version(),
        pair=pair(),
        device=device.label(where),
        kind=where.type,
        bf16=facts.bf16,
        gpu_memory=gpu_memory,
        gpu_free=gpu_free,
        gpus=gpus,
        idle=not gpus and DRIVER.exists() and "CUDA_VISIBLE_DEVICES" not in os.environ,  # else it was hidden on purpose
        cores=own_cores(),
        memory=room.physical(),
        free=room.memory(),
        shared=free_at(SHARED) if SHARED.is_dir() else None,
        runs=runs_disk(),
        cache=cache_disk(),
        simplejpeg=decode.simplejpeg.__version__ if decode.simplejpeg is not None else "",
    )


def gpu_room(where: torch.device) -> tuple[int | None, int | None]:
    """Bytes free and in all; None where there is no GPU, or it does not say: it may be another program's alone."""
    try:
        return torch.cuda.mem_get_info(where) if where.type == "cuda" else (None, None)
    except RuntimeError:
        return None, None


def free_at(path: Path) -> int | None:
    try:
        return room.disk(path)
    except OSError:
        return None


def runs_disk() -> Disk:
    """Where runs would be made; tried by a folder that is removed again."""
    place = ROOT if ROOT.is_dir() else Path()
    lacking = ""
    try:
        if ROOT.exists() and not ROOT.is_dir():
            raise FileExistsError(errno.EEXIST, "a file stands there")
        with tempfile.TemporaryDirectory(prefix=".sslpre-check-", dir=place):
            pass
    except OSError as error:
        lacking = (error.strerror or str(error)).lower()
    return Disk(str(ROOT.absolute()), free_at(place), lacking)


def cache_disk() -> Disk:
    """Where files of decoded images would be kept. Nothing is made there."""
    try:
        place = cache.cache()
    except cache.NotPossible as error:
        return Disk("", None, str(error))
    above = next((path for path in (place, *place.parents) if path.exists()), place)
    lacking = "" if above.is_dir() and os.access(above, os.W_OK) else "it cannot be written"
    return Disk(str(place), free_at(place), lacking)


def needed(wanted: str) -> torch.device:
    """The device that was typed. Raises SslpreError (exit 3) where it is not there, if known with the reason."""
    try:
        return device.pick(wanted)
    except SslpreError as error:
        if wanted == "cuda" and DRIVER.exists() and torch.version.cuda is None:
            hint = "pip install --force-reinstall torch torchvision"
            message = f"{error.message} that torch {torch.__version__} can use: it was built without CUDA"
            raise SslpreError(message, hint, 3) from error
        raise
