"""Text as HTML. Everything that is not ours goes through `text`: names of files, recipes, messages."""

from __future__ import annotations

import html
import shlex
from collections.abc import Iterable

from sslpre.errors import printable

LONGEST = 160  # letters of a name that are shown


def text(words: str) -> str:
    """Escaped for HTML, in an attribute too; control characters and marks of direction are written out."""
    return html.escape(printable(words), quote=True)


def name(words: str) -> str:
    """The same of a name, without its middle where it is very long. Not yet escaped."""
    shown = printable(words)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST // 3]}…{shown[-(LONGEST - LONGEST // 3) :]}"


def command(*words: str) -> str:
    """A command line, each word quoted as a shell wants it. A click selects it whole."""
    return f"<code class=cmd>{text(shlex.join(words))}</code>"


def section(title: str, anchor: str, *parts: str) -> str:
    inside = "\n".join(part for part in parts if part)
    return f'<section id="{anchor}">\n<h2>{text(title)}</h2>\n{inside}\n</section>'


def paragraph(words: str) -> str:
    return f"<p>{text(words)}</p>"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already; the first of a row is its heading."""
    top = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    body = "\n".join(
        "<tr>"
        + "".join(f"<td>{cell}</td>" if at else f"<th scope=row>{cell}</th>" for at, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    whole = f"<table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table>"
    return f'<div class=scroll tabindex=0 role=region aria-label="table">{whole}</div>'


def count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
