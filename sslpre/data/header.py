"""Everything that one file's header tells, read once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from PIL import TiffImagePlugin

from sslpre.data.decode import BITS, MAX_PIXELS, blame_the_file, is_grey, open_image, upright

PNG_FIRST, PNG_DEPTH = 12, 24  # where a PNG's first chunk has its name, and how many bits a channel has
ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


class Header(NamedTuple):
    """kind: JPEG, PNG, WEBP, BMP, GIF or TIFF, by the contents; mode: Pillow's; bits: of a channel, or of a palette's
    index; height, width: in pixels, upright; turn: EXIF orientation, 1..8; grey: it has no colour; clear: some of it
    may be transparent."""

    kind: str
    mode: str
    bits: int
    height: int
    width: int
    turn: int
    grey: bool
    clear: bool


def header(path: str | bytes | Path, max_pixels: int = MAX_PIXELS) -> Header:
    """What the header of an image file says. Raises BadImage as `decode` would for the header."""
    with blame_the_file(path), open(path, "rb") as file:
        image = open_image(file, max_pixels)
        height, width, turn = upright(image, file)
        bits = {"1": 1, "I": 32, "F": 32}.get(image.mode, 16 if image.mode.startswith("I;16") else 8)
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            tagged = image.tag_v2.get(BITS, (1,))
            bits = max(tagged) if isinstance(tagged, tuple) else int(tagged)
        elif image.format == "PNG":
            file.seek(PNG_FIRST)
            first = file.read(PNG_DEPTH - PNG_FIRST + 1)
            bits = first[-1] if first[:4] == b"IHDR" else bits
        clear = image.mode in ALPHA or "transparency" in image.info
        turn = turn if turn in range(1, 9) else 1
        return Header(image.format or "", image.mode, bits, height, width, turn, is_grey(image), clear)
