"""`sslpre recipes`: what can be pretrained, and with which settings."""

import difflib
from typing import Annotated

import typer

from sslpre.errors import SslpreError
from sslpre.shelf import headline, names, text


def recipes(name: Annotated[str | None, typer.Argument(metavar="NAME", hidden=True)] = None) -> None:
    """List the built-in recipes, or print one of them whole.

    \b
      sslpre recipes
      sslpre recipes simclr
      sslpre recipes simclr > mine.toml && sslpre pretrain mine.toml ./images
    """
    known = names()
    if name is None:
        width = max(map(len, known))
        for one in known:
            print(f"{one:{width}}  {headline(one)}")
    elif name in known:
        print(text(name), end="")
    else:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean sslpre recipes {near[0]}?" if near else "sslpre recipes"
        raise SslpreError(f"no recipe `{name}`", hint)
