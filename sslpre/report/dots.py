"""The map of the images: dots that show without a script, and what the script needs to zoom into them."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from sslpre.report.gallery import Picked, Seen
from sslpre.report.markup import count, name, text

COLOURS = 10  # of the page's palette; what is beyond them is grey
SPAN, EDGE = 92.0, 4.0  # of a square of 100: where dots lie, and what is free around them
BUTTONS = (("in", "+", "zoom in"), ("out", "−", "zoom out"), ("all", "all", "show all"))


def ranked(picked: Picked) -> tuple[np.ndarray, list[str]]:
    """Of each image the rank of its folder, by the number of images, COLOURS for the rest; and the names by rank."""
    sizes = np.bincount(picked.folders[picked.folders >= 0], minlength=len(picked.classes))
    order = [int(label) for label in np.argsort(-sizes, kind="stable") if sizes[label]]
    ranks = np.full(len(picked.classes) + 1, COLOURS)  # the last is that of images without one
    ranks[order[:COLOURS]] = np.arange(len(order[:COLOURS]))
    names = [name(picked.classes[label]) for label in order[:COLOURS]]
    others = len(order) - len(names)
    if (ranks[picked.folders] == COLOURS).any():
        names.append(count(others, "other folder") if others else "in no folder")
    return ranks[picked.folders], names


def drawn(picked: Picked, seen: Seen, across: int) -> str:
    """The map, its legends and its data."""
    folders, titles = ranked(picked)
    kinds = [("cluster", "k", seen.clusters, [f"cluster {number}" for number in range(1, len(seen.typical) + 1)])]
    if len(titles) > 1:
        kinds.insert(0, ("folder", "f", folders, titles))
    places = [(EDGE + SPAN * x, EDGE + SPAN * (1 - y)) for x, y in seen.points.tolist()]
    shown = [name(one) for one in picked.names]
    dots = "".join(
        f'<path class="{" ".join(f"{letter}{groups[at]}" for _, letter, groups, _ in kinds)}" d="M{x:.2f} {y:.2f}h0">'
        f"<title>{text(shown[at])}</title></path>"
        for at, (x, y) in enumerate(places)
    )
    choices = "".join(
        f"<label><input type=radio name=by id=by-{letter}{' checked' if not at else ''}> {kind}</label>"
        for at, (kind, letter, _, _) in enumerate(kinds)
    )
    legends = "".join(legend(letter, groups, titles) for _, letter, groups, titles in kinds)
    data = {"names": shown, "xy": [[round(x, 3), round(y, 3)] for x, y in places], "across": across}
    data |= {"groups": [[kind, letter, groups.tolist(), titles] for kind, letter, groups, titles in kinds]}
    tools = "".join(
        f"<button type=button data-do={do} aria-label='{told}'>{sign}</button>" for do, sign, told in BUTTONS
    )
    keys = "arrow keys go from image to image, + and − zoom, 0 shows all, Escape closes"
    return f"""<fieldset class=by><legend>Coloured by</legend>{choices}</fieldset>
<div class=map id=map>
<svg viewBox="0 0 100 100" role=application tabindex=0 aria-label="map of {len(shown):,} images; {keys}">{dots}</svg>
<div class=layer aria-hidden=true></div>
<div class=tools hidden>{tools}</div>
<div class=tip hidden><span class="t big"></span><span class=words></span></div>
</div>
<p class=sr aria-live=polite id=said></p>
{legends}
<script type="application/json" id=points>{as_json(data)}</script>"""


def legend(letter: str, groups: np.ndarray, titles: Sequence[str]) -> str:
    sizes = np.bincount(groups, minlength=COLOURS + 1)
    ranks = [*range(len(titles))] if not sizes[COLOURS] else [*range(len(titles) - 1), COLOURS]
    items = "".join(
        f"<li><button type=button class={letter}{rank} data-only={letter}{rank} aria-pressed=false>"
        f"<svg viewBox='0 0 10 10' aria-hidden=true><path class={letter}{rank} d='M5 5h0'/></svg>"
        f"{text(title)} <small>{sizes[rank]:,}</small></button></li>"
        for rank, title in zip(ranks, titles, strict=True)
    )
    return f"<ul class='legend by-{letter}'>{items}</ul>"


def as_json(value: object) -> str:
    """JSON that ends no <script>, whatever it holds."""
    plain = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)  # names are half as long so
    plain = plain.encode("utf-8", "backslashreplace").decode()  # half a pair is an escape of JSON's, too
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
