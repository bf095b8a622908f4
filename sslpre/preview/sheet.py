"""A sheet of pictures with titles, as one PNG."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sslpre.errors import SslpreError, disk_code, printable
from sslpre.objective import Picture
from sslpre.synced import write_whole

ACROSS = 12  # pictures of a row
LEAST, LARGEST = 96, 256  # pixels of a picture's longer side on the sheet
GAP, MARGIN, NARROWEST = 12, 24, 640  # pixels: between pictures, around the sheet, the sheet without its margins
TITLE = 150  # pixels of a title's line, where the picture is smaller
ASIDE = 60  # pixels beside a row for how many more there are
LARGE, SMALL = 22, 14  # of the font
LINE = 1.35  # of the font's size, from line to line
INK, FAINT, RULE = (20, 20, 20), (90, 90, 90), (190, 190, 190)


def draw(title: str, told: str, about: tuple[str, ...], rows: list[list[Picture]]) -> Image.Image:
    """The sheet. Titles that are the same in each row stand once, above the columns; any other above its picture."""
    cells = [[resized(one) for one in row[:ACROSS]] for row in rows]
    names = [[one.title for one in row[:ACROSS]] for row in rows]
    more = [len(row) - ACROSS for row in rows]
    columns = max(map(len, cells))
    wide = [
        max(needed(row[at], some[at]) for row, some in zip(cells, names, strict=True) if at < len(row))
        for at in range(columns)
    ]
    across = max(NARROWEST, sum(wide) + GAP * (columns - 1) + (ASIDE if max(more) > 0 else 0))
    header = [(title, LARGE, INK), (told, SMALL, INK), *((line, SMALL, FAINT) for line in about)]
    words = [(line, size, ink) for text, size, ink in header for line in wrapped(printable(text), size, across)]
    once = len(names) > 1 and all(row == names[0] for row in names)
    titles = [[] if once else above(row, wide, across) for row in names]
    heads = above(names[0], wide, across) if once else []
    bands = [block(some) + max(image.height for image in row) + GAP for some, row in zip(titles, cells, strict=True)]
    tall = sum(lines(size) for _, size, _ in words) + GAP + block(heads) + sum(bands)
    pen = Pen(Image.new("RGB", (across + 2 * MARGIN, tall + 2 * MARGIN), "white"), MARGIN)
    for line, size, ink in words:
        pen.line(line, size, ink)
    pen.y += GAP
    pen.titles(heads, wide)
    for some, row, rest in zip(titles, cells, more, strict=True):
        pen.titles(some, wide)
        pen.images(row, wide, rest)
    return pen.sheet


def needed(image: Image.Image, name: str) -> int:
    """Width of a column that has this picture: its title is broken only where it is much longer than that."""
    return max(LEAST, image.width, min(TITLE, -int(-font(SMALL).getlength(name) // 1)))


def above(names: list[str], wide: list[int], across: int) -> list[list[str]]:
    """The lines of each picture's title; of titles that are all the same only the first, which has the whole row."""
    if len(names) > 1 and len(set(names)) == 1:
        return [wrapped(names[0], SMALL, across)]
    return [wrapped(name, SMALL, width) for name, width in zip(names, wide, strict=False)]


@dataclass
class Pen:
    """Draws on a sheet from top to bottom; `y` is where it stands."""

    sheet: Image.Image
    y: int

    def line(self, text: str, size: int, ink: tuple[int, int, int], x: int = MARGIN) -> None:
        ImageDraw.Draw(self.sheet).text((x, self.y), text, ink, font(size))
        self.y += lines(size)

    def titles(self, names: list[list[str]], wide: list[int]) -> None:
        """One title a column, the lines of each at the bottom of the space that all have."""
        below = self.y + block(names)
        for at, name in enumerate(names):
            self.y = below - len(name) * lines(SMALL)
            for text in name:
                self.line(text, SMALL, INK, left(wide, at))
        self.y = below

    def images(self, row: list[Image.Image], wide: list[int], more: int) -> None:
        pen = ImageDraw.Draw(self.sheet)
        for at, image in enumerate(row):
            x = left(wide, at)
            self.sheet.paste(image, (x, self.y))
            pen.rectangle((x - 1, self.y - 1, x + image.width, self.y + image.height), outline=RULE)
        if more > 0:
            pen.text((left(wide, len(row)), self.y), f"and {more}\nmore", FAINT, font(SMALL))
        self.y += max(image.height for image in row) + GAP


def left(wide: list[int], at: int) -> int:
    """Where column `at` begins."""
    return MARGIN + sum(wide[:at]) + GAP * at


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def lines(size: int, count: int = 1) -> int:
    return round(LINE * size) * count  # the height of so many


def block(names: list[list[str]]) -> int:
    """Height of a row of titles."""
    return lines(SMALL, max(map(len, names), default=0))


def wrapped(text: str, size: int, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words, and within a word where it is longer than a line."""
    by, found = font(size), [""]
    for word in text.split():
        joined = f"{found[-1]} {word}".strip()
        if by.getlength(joined) <= width:
            found[-1] = joined
            continue
        if found[-1]:
            found.append("")
        for letter in word:
            if found[-1] and by.getlength(found[-1] + letter) > width:
                found.append("")
            found[-1] += letter
    return found


def resized(picture: Picture) -> Image.Image:
    """The picture as RGB at a size to look at: enlarged by a whole number, or made smaller, or as it is.

    Raises SslpreError (exit 10) where it is not finite.
    """
    image = picture.image
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise TypeError(f"a picture is [3, h, w] or [1, h, w], and `{picture.title}` is {list(image.shape)}")
    if not image.isfinite().all():
        raise SslpreError(f"the picture `{picture.title}` is not finite", "preview an earlier run", 10)
    pixels = image.detach().float().clamp(0, 1).mul(255).round().byte().expand(3, -1, -1).permute(1, 2, 0)
    shown = Image.fromarray(np.ascontiguousarray(pixels.cpu().numpy()))
    longer = max(shown.size)
    if longer > LARGEST:
        width, height = (max(1, round(side * LARGEST / longer)) for side in shown.size)
        return shown.resize((width, height), Image.Resampling.LANCZOS)
    factor = -(-LEAST // longer)
    return shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)


def write(sheet: Image.Image, out: Path) -> None:
    """Write the PNG whole or not at all, and make the folders above it. Raises SslpreError (exit 3)."""
    data = io.BytesIO()
    sheet.save(data, "png")
    try:
        write_whole(out, data.getvalue())
    except OSError as error:
        hint = "name an OUT.png in a folder that you can write to, with enough space"
        why = (error.strerror or "unknown reason").lower()
        raise SslpreError(f"cannot write `{out}`: {why}", hint, disk_code(error)) from error
