"""Reading the words of a command line: whole numbers, numbers, one of a few names."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from sslpre.errors import SslpreError


def take(parameter: Any, context: Any, value: Any) -> Any:
    """A parameter's value as it was typed, through its callback. Raises SslpreError (exit 2) where one is missing."""
    if parameter.required and value is None:
        raise SslpreError(f"{parameter.metavar} is missing", f"{context.command_path} --help shows an example")
    return value if parameter.callback is None else parameter.callback(context, parameter, value)


def untouched(parameters: list[Any]) -> list[Any]:
    """Make every parameter hand its value on as it was typed.

    Typer would convert it with pydantic, whose import costs 0.1 s that `sslpre recipes` does not have; and numbers are
    better read below, where the message can name the option and the right way to write it.
    """
    for parameter in parameters:
        parameter.process_value = partial(take, parameter)
    return parameters


class Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return untouched(super().get_params(ctx))


class Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return untouched(super().get_params(ctx))


def check_folder(word: str) -> None:
    """Tell a missing folder at once, before torch is imported. Raises SslpreError (exit 4), in the words of `find`."""
    if not Path(word).is_dir():
        from sslpre.data.find import find

        find(Path(word))


def not_empty(words: dict[str, Any], example: str) -> None:
    """Raises SslpreError (exit 2) for an empty word: an unset shell variable, which as a path is the current folder.

    words: what was typed, by the name of its place; example: the hint.
    """
    empty = next((name for name, word in words.items() if word == ""), None)
    if empty is not None:
        raise SslpreError(f"{empty} is an empty word", example)


def flag(name: str, metavar: str, help: str) -> Any:
    """An option that takes a word. Where it has a default, the help says so in its own words."""
    return typer.Option(name, metavar=metavar, help=help, show_default=False)


def whole(option: str, word: str | None, example: int, *, least: int = 1, auto: bool = False) -> Any:
    """`word` as a whole number from `least` on; with `auto`, the word "auto" too. Raises SslpreError (exit 2)."""
    if word is None or (auto and word == "auto"):
        return word
    most = 2**31 - 1
    is_whole = word.isascii() and word.isdigit() and len(word) < 1000  # Python refuses to read some thousands of digits
    if not (is_whole and least <= int(word) <= most):
        hint = f"write {option} {example}" + (f", or {option} auto" if auto else "")
        which = f"from {least} to {most}" if is_whole and int(word) > most else f"from {least} on"
        raise SslpreError(f"`{option} {word}` is not a whole number {which}", hint)
    return int(word)


def number(option: str, word: str | None, example: float, *, most: float = math.inf, auto: bool = False) -> Any:
    """`word` as a number above 0 (or in [0, most]); with `auto`, the word "auto" too. Raises SslpreError (exit 2)."""
    if word is None or (auto and word == "auto"):
        return word
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (0 <= value <= most and math.isfinite(value)) or (value == 0 and most == math.inf):
        kind = f"between 0 and {most:g}" if most < math.inf else "above 0"
        hint = f"write {option} {example:g}" + (f", or {option} auto" if auto else "")
        raise SslpreError(f"`{option} {word}` is not a number {kind}", hint)
    return value


def one_of(option: str, word: str, choices: Sequence[str]) -> str:
    """`word` if it is one of `choices`. Raises SslpreError (exit 2) naming the nearest."""
    if word in choices:
        return word
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.4)
    hint = f"did you mean {option} {near[0]}?" if near else f"write {option} " + " or ".join(choices)
    raise SslpreError(f"`{option} {word}` is not one of {', '.join(choices)}", hint)
