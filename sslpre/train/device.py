"""The device a run uses, and what the choice of settings needs to know of it."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from sslpre.errors import SslpreError


@dataclass(frozen=True)
class Facts:
    """kind: "cpu", "cuda" or "mps"; bf16: native bfloat16 arithmetic; memory: GiB of the device, 0 where not known."""

    kind: str
    bf16: bool
    memory: int = 0


def pick(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU; of several processes each takes a GPU of its own.

    A device that is not there: SslpreError (exit 3).
    """
    if name not in ("auto", "cpu", "cuda", "mps"):
        raise SslpreError(f"no device `{name}`", "--device auto, cpu, cuda or mps")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in there.items() if present)
    if not there[name]:
        raise SslpreError(f"no `{name}` device on this machine", "--device auto", 3)
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        number, there_are = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= there_are:
            hint = f"torchrun --nproc-per-node={there_are} -m sslpre pretrain …, or --device cpu"
            raise SslpreError(f"process {number} has no GPU of its own: there are {there_are}", hint, 3)
        return torch.device("cuda", number)
    return torch.device(name)


def facts(device: torch.device) -> Facts:
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory // 2**30
        return Facts("cuda", torch.cuda.is_bf16_supported(including_emulation=False), int(memory))
    return Facts(device.type, device.type == "cpu" and cpu_has_bf16())


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Native bfloat16 products, as the kernel names them; without them bf16 autocast is slower than fp32."""
    try:
        words = set(cpuinfo.read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return False  # not Linux: not known, so not assumed
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def label(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
