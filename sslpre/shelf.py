"""Recipes by name: those that ship with sslpre, then those of plug-ins; read without importing anything heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


def folder() -> Traversable:
    """Where our recipes lie: `sslpre/recipes` in an installed wheel, `recipes` beside the package in a checkout."""
    from importlib.resources import files  # not with help, which comes sooner without it

    installed = files("sslpre") / "recipes"
    return installed if installed.is_dir() else files("sslpre") / ".." / "recipes"


def recipe_files() -> dict[str, Path]:
    """Files of plug-ins' recipes by name. Imported here, because the search for packages costs as much as the rest."""
    from sslpre import plugins

    return plugins.recipe_files()


def shipped() -> list[str]:
    """Names of the recipes that ship with sslpre."""
    return sorted(entry.name.removesuffix(".toml") for entry in folder().iterdir() if entry.name.endswith(".toml"))


def names() -> list[str]:
    """Names of all recipes, ours and those of installed plug-ins."""
    return sorted({*shipped(), *recipe_files()})


def text(name: str) -> str:
    """A recipe's text. Where a plug-in has one of the same name, it is ours."""
    ours = folder() / f"{name}.toml"
    return (ours if ours.is_file() else recipe_files()[name]).read_text(encoding="utf-8")


def headline(name: str) -> str:
    """The first line of the recipe's header, without the comment sign."""
    return text(name).partition("\n")[0].lstrip("# ").strip()
