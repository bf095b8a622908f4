"""`sslpre export`: the encoder as a file or folder that timm opens."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sslpre.cli.words import flag, not_empty
from sslpre.errors import SslpreError
from sslpre.train.runs import find_run


def export(
    out: Annotated[str, typer.Argument(metavar="OUT", hidden=True)],
    run: Annotated[str | None, flag("--run", "RUN", "A path, or a name under runs/.  [newest]")] = None,
    stage: Annotated[str | None, flag("--stage", "N|NAME", "A stage in place of the output.")] = None,
) -> None:
    """Write a run's encoder as a file or folder that timm opens.

    OUT ending in .safetensors is one file with timm's own keys; any other OUT is a folder for
    timm.create_model("local-dir:OUT"). It is opened with timm and its features compared before it is called done.
    With --stage, all weights are written and the printed lines compute that stage's map.

    \b
      sslpre export encoder.safetensors
      sslpre export enc/ --run simclr-1
      sslpre export enc/ --stage layer3
    """
    not_empty({"OUT": out, "--run": run, "--stage": stage}, "sslpre export encoder.safetensors")
    target = Path(out)
    if target.exists() or target.is_symlink():
        raise SslpreError(f"`{out}` exists", "name another OUT, or remove it first")
    found = find_run(run)

    import torch

    from sslpre.export import export as write
    from sslpre.train.build import open_run

    encoder, _, facts = open_run(found, torch.device("cpu"))
    lines = write(encoder, facts, target, stage)
    what = "features" if stage is None else f"map of stage {stage}"
    print(
        f"done: `{out}` holds {found} at step {facts['step']}; in a fresh process, timm gave the same {what} with",
        file=sys.stderr,
    )
    for line in lines:
        print(line)
