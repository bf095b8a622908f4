"""What is known of a run: its recipe in a hash, its data and machine in files, its encoder's metadata."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import version

import torch

import sslpre
from sslpre import recipe as recipes
from sslpre.data.find import Found
from sslpre.encoder import Encoder
from sslpre.recipe import Recipe
from sslpre.train import changes, device, loop
from sslpre.train.runs import write_text

HEADER = f"""Written by sslpre {sslpre.__version__}; every number is what the run used. It runs again as it is:
sslpre pretrain THIS-FILE"""
# Keys that may differ between the parts of a run: what it bears, how often it saves, how much it holds in memory, what
# is looked at.
FREE = {"data": ("max_bad",), "train": ("checkpoint_minutes", "micro_batch", "on_collapse", "monitor")}
TOGETHER = ("on_collapse", "monitor")  # of these what processes must have alike: they do it together

OWN_DISK = {"data": ("images",), "encoder": ("init",)}


def digest(recipe: Recipe) -> str:
    """A hash of all that a run computes with; not of where the images lie, which their fingerprint tells."""
    plain = recipe.model_dump(exclude_defaults=True)  # a key that is new, and as it always was, changes no old run
    for table, keys in (FREE | {"data": ("max_bad", "images")}).items():
        for key in keys:
            plain.get(table, {}).pop(key, None)
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=16).hexdigest()


def keys_of(recipe: Recipe) -> dict[str, str]:
    """Every key of the recipe that a run computes with and its value as text, for processes to compare.

    Not where images and starting weights lie, which may be a disk of each machine's own.
    """
    tables = recipe.model_dump()
    found = {"recipe (views)": str(tables.pop("views"))}
    for table, keys in tables.items():
        free = (*FREE.get(table, ()), *OWN_DISK.get(table, ()))
        found |= {
            f"recipe ({table}.{key})": str(item) for key, item in keys.items() if key in TOGETHER or key not in free
        }
    return found


def facts_of(recipe: Recipe, network: Encoder, step: int, fingerprint: str) -> dict[str, str]:
    """An encoder's metadata, all strings: what is needed to open it, and where it comes from."""
    return {
        "architecture": network.architecture,
        "model_args": json.dumps(network.model_args),
        "mean": json.dumps(list(recipe.encoder.mean)),
        "std": json.dumps(list(recipe.encoder.std)),
        "image_size": str(recipe.encoder.image_size),
        "store_size": str(recipe.data.store_size),
        "recipe": recipes.write(recipe),
        "method": str(recipe.method["name"]),
        "step": str(step),
        "data_fingerprint": fingerprint,
        "sslpre": sslpre.__version__,
    }


def write_facts(run: loop.Run, found: Found, where: torch.device) -> None:
    data = {
        "where": found.train.where,
        "images": len(found.train),
        "classes": found.train.classes,
        "fingerprint": found.train.fingerprint,
        "note": found.note,
        "skipped": found.skipped,
    }
    write_text(run.folder / "data.json", json.dumps(data, indent=1) + "\n")
    packages = ("torch", "torchvision", "timm", "kornia", "safetensors", "numpy", "pillow")
    environment = {
        "sslpre": sslpre.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": device.label(where),
        "threads": torch.get_num_threads(),
        "workers": run.stream.workers,
        "decoder": run.facts["decoder"],
        "processes": run.stream.world,
        **{name: version(name) for name in packages},
    }
    changes.write(run.folder, found.train)
    write_text(run.folder / "environment.json", json.dumps(environment, indent=1) + "\n")
    write_text(run.folder / "recipe.toml", recipes.write(run.recipe, HEADER))  # last: it makes the directory a run
