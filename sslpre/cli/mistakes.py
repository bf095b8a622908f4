"""What Typer says about a command line that it cannot read, in our words: what is wrong, and what to type."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import typer

from sslpre import signals
from sslpre.errors import SslpreError, disk_code
from sslpre.shelf import names

# click's exceptions, or those of the copy that newer Typers carry: whichever this Typer raises.
exceptions: Any = sys.modules[typer.BadParameter.__module__]
UsageError: type[Exception] = exceptions.UsageError


def in_our_words(error: Any, words: Sequence[str], group: Any) -> SslpreError:
    """A usage error as an SslpreError (exit 2), its hint the nearest command or option. `group`: the whole program."""
    context = getattr(error, "ctx", None)
    verb = context.info_name if context is not None and context.parent is not None else first_plain(words)
    command = group.commands.get(verb, group)
    program = f"sslpre {verb}" if verb in group.commands else "sslpre"
    options = [name for one in command.get_params(typer.Context(command)) for name in one.opts if name.startswith("-")]
    if isinstance(error, exceptions.NoSuchOption):
        typed = next((word for word in words if word.startswith(error.option_name)), error.option_name)
        typed = typed.partition("=")[0]
        return SslpreError(f"no option `{typed}` in `{program}`", nearest(typed, options, "", f"{program} --help"))
    if isinstance(error, exceptions.BadOptionUsage):
        option = error.option_name
        if "not take a value" in error.message:
            return SslpreError(f"`{option}` takes no value", f"write {option} alone")
        return SslpreError(f"`{option}` needs a value", f"{program} --help shows what it takes")
    if verb is not None and verb not in group.commands:
        return no_command(verb, words, list(group.commands))
    extra = re.search(r"unexpected extra argument(?:s|\(s\))? \((.*)\)", error.message)
    if extra and verb == "import":
        plain = [word for word in words if not word.startswith("-")]
        hint = shlex.join(["sslpre", "import", plain[1], "-o", extra[1].split(",")[0]])
        return SslpreError("`sslpre import` takes one word, and the file to write after -o", hint)
    if extra:
        return SslpreError(f"too many words for `{program}`: `{extra[1]}`", f"{program} --help")
    message = re.sub(r"'([^']*)'", r"`\1`", error.format_message()).rstrip(".")
    return SslpreError(message[:1].lower() + message[1:], f"{program} --help")


def no_command(verb: str, words: Sequence[str], commands: list[str]) -> SslpreError:
    if verb in names():  # `sslpre simclr ./images`
        return SslpreError(f"no command `{verb}`", shlex.join(["sslpre", "pretrain", *words]))
    return SslpreError(f"no command `{verb}`", nearest(verb, commands, "sslpre ", "sslpre --help"))


def nearest(typed: str, known: Iterable[str], prefix: str, otherwise: str) -> str:
    near = difflib.get_close_matches(typed, list(known), n=1, cutoff=0.5)
    return f"did you mean {prefix}{near[0]}?" if near else otherwise


def first_plain(words: Sequence[str]) -> str | None:
    """The word that stands where a command should."""
    return next((word for word in words if not word.startswith("-")), None)


def interrupted(verb: str | None, number: int) -> SslpreError:
    """A signal where nothing was said about it yet."""
    again = "before its first step a new run leaves nothing; one that was resumed is as it was: type it again"
    hint = again if verb == "pretrain" else "nothing was written; type it again"
    return SslpreError(signals.words(number), hint, signals.code(number))


def surprise(error: Exception, verb: str | None) -> SslpreError:
    """An error that nobody foresaw: no memory (exit 12), the machine's in another way (exit 3), else ours (exit 1)."""
    name = type(error).__name__  # torch's is told by its name: it need not be imported
    if name == "OutOfMemoryError" or isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        smaller = "write a smaller --batch-size, or --set train.micro_batch=16"
        return SslpreError("out of memory", smaller if verb == "pretrain" else "free some memory, or --device cpu", 12)
    if isinstance(error, OSError) and error.errno is not None:
        reason = (error.strerror or os.strerror(error.errno)).lower()
        path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        full = disk_code(error) == 13
        hint = "free some space there, or write to another disk" if full else "check the path and its permissions"
        return SslpreError(f"{reason}: `{path}`" if path else reason, hint, disk_code(error))
    what = f"internal: {name}: {error}"
    return SslpreError(what, "this is a mistake in sslpre: add --debug and report what it prints", 1)
