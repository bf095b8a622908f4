"""The recipes that ship with the package, read without importing anything heavy."""

from importlib.resources import files
from importlib.resources.abc import Traversable


def folder() -> Traversable:
    """Where the recipes lie: `sslpre/recipes` in an installed wheel, `recipes` beside the package in a checkout."""
    installed = files("sslpre") / "recipes"
    return installed if installed.is_dir() else files("sslpre") / ".." / "recipes"


def names() -> list[str]:
    return sorted(entry.name.removesuffix(".toml") for entry in folder().iterdir() if entry.name.endswith(".toml"))


def text(name: str) -> str:
    return (folder() / f"{name}.toml").read_text(encoding="utf-8")


def headline(name: str) -> str:
    """The first line of the recipe's header, without the comment sign."""
    return text(name).partition("\n")[0].lstrip("# ").strip()
