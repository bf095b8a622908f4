"""`sslpre near`: the images of a file of features that are most like another one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sslpre.cli.probe import DEVICES, locate, opened
from sslpre.cli.words import flag, not_empty, one_of, whole
from sslpre.errors import SslpreError, printable

EXAMPLE = "sslpre near leaf.jpg --in out.npz"


def near(
    image: Annotated[str, typer.Argument(metavar="IMAGE", hidden=True)],
    file: Annotated[str, typer.Option("--in", metavar="FILE", help="What `sslpre embed` wrote.")],
    count: Annotated[str | None, flag("--count", "N", "How many images.  [10]")] = None,
    encoder: Annotated[str | None, flag("--encoder", "RUN|PATH", "Where the file's encoder is now.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
    device: Annotated[str, flag("--device", "|".join(DEVICES), "Where to run.  [auto]")] = "auto",
) -> None:
    """Find the images of a file of features that are most like IMAGE.

    A line each, the nearest first: the cosine of the features, and the path. The
    encoder must be the one that `sslpre embed` took, to the bit.

    \b
      sslpre near leaf.jpg --in out.npz
      sslpre near leaf.jpg --in out.npz --count 50 --json
    """
    not_empty({"IMAGE": image, "--in": file, "--encoder": encoder}, EXAMPLE)
    one_of("--device", device, DEVICES)
    most = whole("--count", count, 10) or 10
    if not Path(image).is_file():
        raise SslpreError(f"there is no image `{image}`", EXAMPLE, 4)

    import json

    from sslpre.embed import near as nearest
    from sslpre.embed import read
    from sslpre.train.device import pick

    embedding = read(Path(file))
    named = encoder or str(embedding.about.get("encoder", ""))
    if encoder is None and not Path(named).exists():
        raise SslpreError(f"the encoder of `{file}` was at `{named}`, and is not", "say where: --encoder RUN|PATH")
    where = pick(device)
    network, _, table, _ = opened(locate(named), where)
    found = nearest(embedding, network, Path(image), most, where, table.max_pixels)
    if as_json:
        print(json.dumps([{"cosine": round(cosine, 6), "path": path} for cosine, path in found]))
        return
    for cosine, path in found:
        print(f"{cosine:7.4f}  {printable(path)}")
