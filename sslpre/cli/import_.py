"""`sslpre import`: weights that another program wrote, as a file that `--init`, `sslpre probe` and timm open."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sslpre.cli.words import flag, not_empty
from sslpre.errors import SslpreError, printable
from sslpre.weights import check_import


def import_(
    old: Annotated[str, typer.Argument(metavar="OLD", hidden=True)],
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", metavar="NEW", help="The .safetensors file to write.", show_default=False),
    ] = None,
    backbone: Annotated[str | None, flag("--backbone", "NAME", "timm's name of the network.  [found]")] = None,
) -> None:
    """Turn foreign weights into a file that --init and timm open.

    OLD is what torch.save wrote, or safetensors: torchvision, MoCo, DINO,
    SimSiam, SwAV, MAE, VISSL, lightly or timm. It is read without running
    code from it; a file that needs more is refused. Every tensor of the
    network must be there; heads are left out, and counted.

    \b
      sslpre import old.pth -o new.safetensors
      sslpre pretrain simclr ./images --init new.safetensors
    """
    not_empty({"OLD": old, "-o": out, "--backbone": backbone}, "sslpre import old.pth -o new.safetensors")
    if out is None:
        new = shlex.quote(Path(old).name.split(".")[0] + ".safetensors")
        raise SslpreError("`-o` is missing: the file to write", f"sslpre import {shlex.quote(old)} -o {new}")
    check_import(Path(old), Path(out))

    from sslpre.foreign import bring

    told, lines = bring(Path(old), Path(out), backbone)
    for line in told:
        print(printable(line), file=sys.stderr)
    print(printable(f"done: `{out}`; timm opens it with"), file=sys.stderr)
    for line in lines:
        print(line)
