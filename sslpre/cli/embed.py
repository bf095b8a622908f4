"""`sslpre embed`: the features of a folder of images as a file."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sslpre.cli.probe import DEVICES, locate, opened
from sslpre.cli.words import check_folder, flag, not_empty, number, one_of, whole
from sslpre.errors import printable

EXAMPLE = "sslpre embed ./images -o out.npz"


def embed(
    images: Annotated[str, typer.Argument(metavar="IMAGES", hidden=True)],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="A .npz, .npy or .parquet file.")],
    encoder: Annotated[str | None, flag("--encoder", "RUN|PATH", "A run, or an export.  [newest run]")] = None,
    stage: Annotated[str | None, flag("--stage", "N|NAME", "A stage in place of the output.")] = None,
    float16: Annotated[bool, typer.Option("--float16", help="Half the bytes, three digits.")] = False,
    max_bad: Annotated[str | None, flag("--max-bad", "X", "Stop above this share of bad images.  [the run's]")] = None,
    device: Annotated[str, flag("--device", "|".join(DEVICES), "Where to run.  [auto]")] = "auto",
    workers: Annotated[str | None, flag("--workers", "N", "Decoding threads.  [one per core]")] = None,
) -> None:
    """Write the features of every image of a folder, with its path.

    FILE holds `features` [N, D] and `paths` [N]; a .npy file the features
    alone, with the paths in a .json beside it.

    \b
      sslpre embed ./images -o out.npz
      sslpre embed ./images -o out.parquet --encoder runs/simclr-1 --float16
    """
    words = {"IMAGES": images, "--out": out, "--encoder": encoder, "--stage": stage}
    not_empty(words, EXAMPLE)
    one_of("--device", device, DEVICES)
    threads = whole("--workers", workers, 4, least=0)
    share = number("--max-bad", max_bad, 0.01, most=1)
    path = locate(encoder)
    check_folder(images)

    from sslpre.data.find import every
    from sslpre.embed import check_out, write
    from sslpre.embed import embed as features_of
    from sslpre.train.device import pick
    from sslpre.train.progress import say

    check_out(Path(out))
    where = pick(device)
    network, _, table, facts = opened(path, where)
    say(f"encoder    {path} at step {facts.get('step', '0')}: {network.architecture}, {network.image_size} px")
    source = every(Path(images), table.max_pixels)
    say(f"images     {source.where}: {len(source):,} images")
    embedding = features_of(
        network,
        [source],
        side=int(table.store_size),
        stage=stage,
        half=float16,
        device=where,
        workers=(os.cpu_count() or 1) if threads is None else threads,
        max_bad=table.max_bad if share is None else share,
        say=say,
    )
    embedding.about["encoder"] = str(path.absolute())
    write(embedding, Path(out))
    rows, dim = embedding.features.shape
    print(printable(f"done: `{out}` holds {dim} numbers of each of {rows:,} images"), file=sys.stderr)
    image = shlex.quote(embedding.paths[0])
    print(printable(f"next: sslpre near {image} --in {shlex.quote(out)}"), file=sys.stderr)
