"""Where starting weights lie: the word after `--init`, or in a recipe's `init`, to a path. Imports nothing heavy."""

import difflib
import shlex
from pathlib import Path

from sslpre.errors import SslpreError
from sslpre.train.runs import ROOT, find_run, is_run

PRETRAINED = "pretrained"  # timm's weights for the backbone that is named
TIMM = "timm:"  # what that becomes in a run's recipe: `timm:NAME.TAG`, whatever a later timm prefers
# Files that hold, or may hold, a pickle or another library's layout.
FOREIGN = (".pth", ".pt", ".ckpt", ".bin", ".pkl", ".pickle", ".tar", ".npz", ".npy", ".h5", ".onnx", ".msgpack")
FOLDER = "model.safetensors"  # in what `sslpre export` and a hub's repository write


def of_timm(init: str) -> bool:
    return init == PRETRAINED or init.startswith(TIMM)


def locate(init: str) -> Path:
    """The run, `.safetensors` file or folder with model.safetensors that `init` names; of a run also its bare name.

    Raises SslpreError: exit 2 where there is nothing, with the nearest name; exit 5 for a file of another kind.
    """
    path = Path(init)
    if init == "last" or is_run(path) or (not path.exists() and is_run(ROOT / init)):
        return find_run(init)
    if (path / FOLDER).is_file():
        return path
    if not path.exists():
        raise SslpreError(f"`--init {init}`: there is no such file or run", nearest(path))
    if path.suffix.lower() in FOREIGN:
        new = path.with_name(path.name.split(".")[0] + ".safetensors").name
        hint = f"sslpre import {shlex.quote(init)} -o {shlex.quote(new)}"
        raise SslpreError(f"`--init {init}` is not opened as it is: such files can run any code", hint, 5)
    if path.suffix.lower() != ".safetensors" or path.is_dir():
        hint = "name a run, a .safetensors file, or a folder with model.safetensors in it"
        raise SslpreError(f"`--init {init}` holds no weights that sslpre knows", hint, 5)
    return path


def nearest(path: Path) -> str:
    """A hint: the name next to a missing `path`, among its neighbours and the runs."""
    folder = path.parent
    beside = {one.name: str(one) for one in folder.iterdir()} if folder.is_dir() else {}
    runs = {one.name: str(one) for one in ROOT.iterdir() if is_run(one)} if ROOT.is_dir() else {}
    known = {**runs, **beside, PRETRAINED: PRETRAINED}
    near = difflib.get_close_matches(path.name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean --init {shlex.quote(known[near[0]])}?"
    return "write --init pretrained, or --init PATH of a run, an export or a .safetensors file"


def spelled(init: str) -> str:
    """`init` as a recipe keeps it: a path made absolute, so that the recipe finds it from anywhere."""
    return init if not init or of_timm(init) else str(locate(init).absolute())


def check_import(old: Path, new: Path) -> None:
    """What can be told before anything is read. Raises SslpreError (exit 2)."""
    if old.is_dir():
        kinds = (".safetensors", *FOREIGN)
        inside = sorted(one for one in old.iterdir() if one.suffix.lower() in kinds and one.is_file())
        hint = f"sslpre import {shlex.quote(str(inside[0]))} -o {shlex.quote(str(new))}" if inside else "name a file"
        if (old / FOLDER).is_file() and (old / "config.json").is_file():
            hint = f"it needs no import: --init {shlex.quote(str(old))}"
        raise SslpreError(f"`{old}` is a folder", hint)
    if not old.is_file():
        beside = [one.name for one in old.parent.iterdir()] if old.parent.is_dir() else []
        near = difflib.get_close_matches(old.name, beside, n=1, cutoff=0.5)
        hint = f"did you mean {shlex.quote(str(old.parent / near[0]))}?" if near else "name the file to import"
        raise SslpreError(f"there is no file `{old}`", hint)
    if new.suffix != ".safetensors":
        better = shlex.quote(str(new.with_suffix(".safetensors")))
        raise SslpreError(f"`{new}` does not end in .safetensors", f"sslpre import {shlex.quote(str(old))} -o {better}")
    if new.exists() or new.is_symlink():
        raise SslpreError(f"`{new}` exists", "name another file after -o, or remove it first")
