"""The features of every image of a folder as a file, and the images in such a file that are most like another one."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import uuid
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import sslpre
from sslpre.data import BadImage, Source
from sslpre.data.find import Folder
from sslpre.data.stream import BadList
from sslpre.encoder import SIDES, Encoder
from sslpre.errors import SslpreError, disk_code
from sslpre.export import stage_number
from sslpre.probe import lent
from sslpre.probe.features import Centres, Layout, describe, fingerprint, layout
from sslpre.synced import sync_folder

KINDS = (".npz", ".npy", ".parquet")
# what numpy, zipfile and json raise for a file that is cut, changed or made up
DAMAGE: tuple[type[Exception], ...] = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError)
DAMAGE += (MemoryError, OverflowError, zipfile.BadZipFile, zlib.error)
BATCH = 64  # images that go through the encoder together
CHUNK = 1 << 25  # numbers of a file that are compared at a time: 128 MiB
AGAIN = "sslpre embed ./images -o out.npz writes one"


@dataclass(frozen=True)
class Embedding:
    """paths: [N], where the images were, from the folder of the call; what is no UTF-8 in a name is written out.
    features: [N, D], float16 or float32. about: how they were made: `encoder` and `encoder_hash`, `stage`,
    `image_size`, `store_size`."""

    paths: list[str]
    features: np.ndarray
    about: dict[str, Any]


def embed(
    encoder: Encoder,
    sources: Sequence[Source],
    *,
    side: int,
    stage: str | None,
    half: bool,
    device: torch.device,
    workers: int,
    max_bad: float,
    say: Callable[[str], None] = lambda line: None,
) -> Embedding:
    """The encoder's features of each image's centre view, in the order of the sources; bad images are left out.

    side: of the canvas that images are decoded to, in pixels. stage: number or name, whose map is pooled as `probe`
    pools it; None is the output. half: float16, in which a feature above 65,504 has no place.
    Raises SslpreError: exit 2 for a stage that is not there, 10 where a feature is not finite, 20 with more than the
    share `max_bad` of bad images, or where none can be read.
    """
    total = sum(len(source) for source in sources)
    paths: list[str] = []
    with lent(encoder, device):
        plan = layout(encoder)
        row = row_of(plan, encoder, stage)
        features = np.empty((total, plan.dims[row]), np.float16 if half else np.float32)
        bad = None
        for source in sources:
            bad = BadList(None, max_bad, total, after=bad)
            views = Centres(
                source,
                side=encoder.image_size,
                canvas=side,
                batch=BATCH,
                workers=workers,
                device=device,
                bad=bad,
                keep=False,
            )
            begun = len(paths)
            for some in views:
                with torch.inference_mode():
                    found = describe(encoder, plan, some.float() / 255, [row])[0].float()
                with np.errstate(over="ignore"):  # what is too large is refused in our words
                    told = found.cpu().numpy().astype(features.dtype)
                refuse_odd(told, half)
                paths += [path_of(source, i) for i in views.index[len(paths) - begun :].tolist()]
                features[len(paths) - len(told) : len(paths)] = told
            say(f"embedded   {source.where}: {len(paths) - begun:,} images")
    about = {
        "sslpre": sslpre.__version__,
        "architecture": encoder.architecture,
        "encoder_hash": fingerprint(encoder),
        "stage": plan.names[row],
        "image_size": encoder.image_size,
        "store_size": side,
    }
    return Embedding(paths, features[: len(paths)], about)


def path_of(source: Source, i: int) -> str:
    """Where the image is, from the folder of the call: what opens it, but for a name that is no UTF-8."""
    if isinstance(source, Folder):
        with contextlib.suppress(UnicodeDecodeError):
            return source.path(i).decode()
    return f"{source.where}/{source.name(i)}"


def row_of(plan: Layout, encoder: Encoder, stage: str | None) -> int:
    """Where the features of a stage, or with None the output, stand in the layout."""
    if stage is None:
        return len(plan.names) - 1
    number = stage_number(encoder, stage)
    if number not in plan.stages:
        raise SslpreError(f"stage `{stage}` of {encoder.architecture} cannot be read", "leave --stage out")
    return plan.stages.index(number)


def refuse_odd(features: np.ndarray, half: bool) -> None:
    if np.isfinite(features).all():
        return
    hint = "leave --float16 out" if half else "take an earlier run, or train again with --precision fp32"
    raise SslpreError(f"features are not finite{' in float16' if half else ''}", hint, 10)


def write(embedding: Embedding, out: Path) -> None:
    """Write it whole or not at all, in the kind that the name of `out` says.

    `.npz`: arrays `features`, `paths` and `about`, which is JSON. `.npy`: the features alone, and the rest in a `.json`
    beside it. `.parquet`: columns `path` and `features`, the rest in the metadata. Raises SslpreError: exit 2 for
    another kind or where there is something, 3 without pyarrow, 3 or 13 where it cannot be written.
    """
    check_out(out)
    half_made = out.with_name(f".{out.stem}-{uuid.uuid4().hex[:8]}{out.suffix}")
    about = json.dumps(embedding.about)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".npz":
            arrays = {"features": embedding.features, "paths": np.array(embedding.paths), "about": np.array(about)}
            with open(half_made, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes them for its own options
        elif out.suffix == ".npy":
            with open(half_made, "wb") as file:
                np.save(file, embedding.features)
            told = json.dumps({"about": embedding.about, "paths": embedding.paths}, indent=0)
            beside(out).write_text(told, encoding="utf-8")
        else:
            write_parquet(embedding, about, half_made)
        with open(half_made, "rb") as file:
            os.fsync(file.fileno())
        os.replace(half_made, out)
        sync_folder(out.parent)
    except BaseException as error:  # Ctrl-C too: nothing half made stays
        half_made.unlink(missing_ok=True)
        if out.suffix == ".npy" and not out.exists():
            beside(out).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        message = f"`{out}` cannot be written: {(error.strerror or str(error)).lower()}"
        raise SslpreError(message, "name a place with room that you may write to", disk_code(error)) from error


def check_out(out: Path) -> None:
    """Raises SslpreError: exit 2 where `out` is of no kind that is known or is there already, 3 without pyarrow or
    where nothing can be written."""
    if out.suffix not in KINDS:
        plain = shlex.quote(str(out.with_suffix(".npz")))
        raise SslpreError(f"`{out}` ends in none of {', '.join(KINDS)}", f"write -o {plain}")
    for path in (out, beside(out)) if out.suffix == ".npy" else (out,):
        if path.exists() or path.is_symlink():
            raise SslpreError(f"`{path}` exists", "name another file, or remove it first")
    if out.suffix == ".parquet":
        arrow()
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):  # before an hour is spent
        raise SslpreError(f"`{out}` cannot be written", "name a place with room that you may write to", 3)


def beside(out: Path) -> Path:
    return out.with_suffix(".json")


def arrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise SslpreError("parquet files need pyarrow", "pip install 'sslpre[parquet]', or -o out.npz", 3) from error
    return pyarrow


def write_parquet(embedding: Embedding, about: str, out: Path) -> None:
    pyarrow, (count, dim) = arrow(), embedding.features.shape
    flat = pyarrow.array(embedding.features.reshape(-1))
    columns = {
        "path": pyarrow.array(embedding.paths, pyarrow.string()),
        "features": pyarrow.FixedSizeListArray.from_arrays(flat, dim),
    }
    table = pyarrow.table(columns).replace_schema_metadata({"sslpre": about})
    assert table.num_rows == count
    pyarrow.parquet.write_table(table, out)


def read(path: Path) -> Embedding:
    """What `write` wrote. Raises SslpreError: exit 2 where there is nothing, 3 without pyarrow, 4 if it is damaged."""
    if not path.is_file():
        raise SslpreError(f"there is no file `{path}`", AGAIN)
    if path.suffix not in KINDS:
        raise SslpreError(f"`{path}` ends in none of {', '.join(KINDS)}", AGAIN)
    pyarrow = arrow() if path.suffix == ".parquet" else None
    try:
        paths, features, about = contents(path, pyarrow)
        good = features.ndim == 2 and features.dtype in (np.float16, np.float32) and len(features) == len(paths) > 0
        good = good and isinstance(paths, list) and all(type(one) is str for one in paths)
        needed = {"encoder_hash": str, "stage": str, "image_size": int, "store_size": int}
        good = good and all(type(about[key]) is kind for key, kind in needed.items())
        good = good and about["store_size"] in SIDES and bool(np.isfinite(features).all())
    except DAMAGE as error:
        raise SslpreError(f"`{path}` cannot be read: {' '.join(str(error).split())}", AGAIN, 4) from error
    if not good:
        raise SslpreError(f"`{path}` was not written by sslpre embed", AGAIN, 4)
    return Embedding(paths, features, about)


def contents(path: Path, pyarrow: Any) -> tuple[list[str], np.ndarray, dict[str, Any]]:
    """Paths, features and the rest, as they stand in the file; nothing is unpickled."""
    if pyarrow is not None:
        try:
            table = pyarrow.parquet.read_table(path)
            column = table["features"].combine_chunks()
            if not pyarrow.types.is_fixed_size_list(column.type) or column.null_count or column.flatten().null_count:
                raise ValueError("its features are not lists of one length")
        except pyarrow.ArrowException as error:
            raise ValueError(str(error)) from error
        features = column.flatten().to_numpy().reshape(table.num_rows, -1)
        return table["path"].to_pylist(), features, json.loads((table.schema.metadata or {})[b"sslpre"])
    stored = np.load(path, allow_pickle=False)
    if path.suffix == ".npy":
        told = json.loads(beside(path).read_text(encoding="utf-8"))
        return list(told["paths"]), stored, told["about"]
    with stored:
        return stored["paths"].tolist(), stored["features"], json.loads(str(stored["about"]))


def near(
    embedding: Embedding, encoder: Encoder, image: Path, count: int, device: torch.device, max_pixels: int
) -> list[tuple[float, str]]:
    """The `count` images of the file whose features are most like those of `image`: (cosine, path), the nearest first.

    Raises SslpreError: exit 2 where the encoder is not the file's, 4 where there is no such image or it cannot be read,
    10 as `embed` and where all features are 0.
    """
    about = embedding.about
    if fingerprint(encoder) != about["encoder_hash"]:
        hint = "name the one it was made with: --encoder RUN|PATH; or embed the images anew"
        raise SslpreError("the encoder is not the one that the file was made with", hint)
    stage = None if about["stage"] == "output" else about["stage"]
    source = alone(image, max_pixels)
    try:
        source.read(0, about["store_size"])
    except BadImage as error:
        raise SslpreError(f"`{image}` cannot be read: {error.reason}", "name another image", 4) from error
    one = embed(
        encoder,
        [source],
        side=about["store_size"],
        stage=stage,
        half=False,
        device=device,
        workers=0,
        max_bad=1.0,
    )
    if not one.features.any():
        raise SslpreError(f"all features of `{image}` are 0", "the encoder has collapsed; take another", 10)
    wanted = F.normalize(torch.from_numpy(one.features), dim=1)[0]
    if len(wanted) != embedding.features.shape[1]:
        raise SslpreError("the file has features of another size than the encoder", AGAIN)
    rows = max(1, CHUNK // len(wanted))
    parts = (embedding.features[at : at + rows].astype(np.float32) for at in range(0, len(embedding.features), rows))
    cosines = torch.cat([F.normalize(torch.from_numpy(part), dim=1) @ wanted for part in parts])
    best = cosines.sort(descending=True, stable=True)  # equal ones as they stand in the file
    pairs = zip(best.values[:count].tolist(), best.indices[:count].tolist(), strict=True)
    return [(value, embedding.paths[i]) for value, i in pairs]


def alone(image: Path, max_pixels: int) -> Folder:
    """One file as a source. Raises SslpreError (exit 4) where there is none."""
    if not image.is_file():
        raise SslpreError(f"there is no image `{image}`", "name an image file", 4)
    path = os.fsencode(image)
    root, name = os.path.split(path)
    size = image.stat().st_size
    return Folder(
        root=root or b".",
        where=str(image.parent),
        names=name,
        ends=np.array([0, len(name)]),
        sizes=np.array([size]),
        labels=np.array([-1]),
        classes=[],
        max_pixels=max_pixels,
        fingerprint="",
        written="",
    )
