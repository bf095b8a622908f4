"""Run directories: where they lie and what they are called. Imports nothing heavy."""

import os
import shlex
import shutil
import tempfile
from pathlib import Path

from sslpre.errors import SslpreError, disk_code

ROOT = Path("runs")
LOCK = ".lock"
OWN = {"checkpoints", "start.json", "start", "data.json", "environment.json", "images.safetensors", "bad_images.jsonl"}


def is_run(path: Path) -> bool:
    return (path / "recipe.toml").is_file()


def find_run(name: str | None) -> Path:
    """The run called `name`: a path, or a name under `runs/`. None there: SslpreError (exit 2).

    "last" is the newest run; None is the newest that has something to probe or export, if there is one.
    """
    if name is not None and name != "last":
        for path in (Path(name), ROOT / name):
            if is_run(path):
                return inside(path)
        raise SslpreError(f"no run `{name}`", known_runs())
    runs = [path for path in ROOT.iterdir() if is_run(path)] if ROOT.is_dir() else []
    if not runs:
        raise SslpreError(f"no run in `{ROOT}/`", "sslpre pretrain simclr ./images")
    if name is None:
        runs = [path for path in runs if any(path.glob("checkpoints/step-*/MANIFEST.json"))] or runs
    return inside(max(runs, key=lambda path: ((path / "recipe.toml").stat().st_mtime_ns, path.name)))


def inside(run: Path) -> Path:
    """The same run. Raises SslpreError (exit 6) where a link in it leads out of it: what a run writes and removes is
    its own."""
    home = run.resolve()
    for path in (*run.iterdir(), *run.glob("checkpoints/*"), *run.glob("checkpoints/*/*")):
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            hint = "make a link to the whole run instead, or put the files in place of the link"
            raise SslpreError(f"`{path}` leads out of the run", hint, 6)
    return run


def known_runs() -> str:
    runs = sorted(path.name for path in ROOT.iterdir() if is_run(path)) if ROOT.is_dir() else []
    return "runs here: " + ", ".join(runs[-5:]) if runs else "sslpre pretrain simclr ./images"


def new_run(recipe_name: str, out: Path | None) -> tuple[Path, list[Path]]:
    """The run's directory, `out` or the next free `runs/<recipe>-<n>`, and the folders made for it, deepest first.

    An `out` that holds anything: SslpreError (exit 2); one that cannot be made: exit 3.
    """
    if out is not None and out.exists() and not left_over(out) and (not out.is_dir() or any(out.iterdir())):
        again = f", or go on with it: sslpre pretrain --resume {shlex.quote(str(out))}" if is_run(out) else ""
        raise SslpreError(f"`{out}` exists", f"name another --out{again}")
    place = out if out is not None else ROOT
    made = [path for path in (place, *place.parents) if not path.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        if out is not None:
            return out, made
        number = 1 + max((numbered(path.name, recipe_name) for path in ROOT.iterdir()), default=0)
        while True:
            path = ROOT / f"{recipe_name}-{number}"
            try:
                path.mkdir()  # two runs started together get two numbers
                return path, [path, *made]
            except FileExistsError:
                number += 1
    except OSError as error:
        raise SslpreError(
            f"cannot make a run in `{place}`: {error.strerror}", "name a writable --out", disk_code(error)
        ) from error


def left_over(out: Path) -> bool:
    """Is it what a run left that was killed before its first checkpoint? It may be running yet."""
    if not out.is_dir() or is_run(out) or not (out / LOCK).is_file():
        return False
    names = {path.name for path in out.iterdir()}
    ours = all(name in OWN or name.startswith(".") for name in names)  # hidden ones were to become such
    return ours and all(path.name.startswith(".tmp-") for path in out.glob("checkpoints/*"))


def clear(folder: Path, keep: str = "") -> None:
    """Remove what is in a run's directory, but for one file; its lock last."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == LOCK):
        if path.name == keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def discard(folder: Path, made: list[Path]) -> None:
    """Take back a run's directory: what is in it, and the folders made for it that hold nothing else."""
    clear(folder)
    for path in made:
        if any(path.iterdir()):
            return
        path.rmdir()


def numbered(name: str, recipe_name: str) -> int:
    stem, _, number = name.rpartition("-")
    return int(number) if stem == recipe_name and number.isdecimal() else 0


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old one or the whole new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.chmod(temporary, 0o666 & ~umask())
    os.replace(temporary, path)


def umask() -> int:
    """The process's umask: it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
