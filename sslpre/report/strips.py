"""What the task shows the network, row by row, as HTML."""

from __future__ import annotations

from sslpre.objective import Picture
from sslpre.preview import Subject, sentence
from sslpre.preview.sheet import ACROSS, resized
from sslpre.report.markup import paragraph, text
from sslpre.report.sprite import single

BUDGET = 500_000  # bytes of all pictures together


def drawn(rows: list[list[Picture]], subject: Subject) -> str:
    """A strip for each row. Raises SslpreError (exit 10) where a picture is not finite."""
    rows = [row[:ACROSS] for row in rows]
    each = BUDGET // sum(map(len, rows))
    told = f"{sentence(subject.run.objective)} Below what it is shown in training, {subject.about[-1]}."
    strips = [
        f"<div class=sheet tabindex=0 role=group aria-label='row {number}'>{cells}</div>"
        for number, cells in enumerate(("".join(cell(one, each) for one in row) for row in rows), 1)
    ]
    return f"{paragraph(told)}<div class=sheets>{''.join(strips)}</div>"


def cell(picture: Picture, budget: int) -> str:
    title = text(picture.title)
    return (
        f'<figure><img alt="{title}" src="{single(resized(picture), budget)}"><figcaption>{title}</figcaption></figure>'
    )
