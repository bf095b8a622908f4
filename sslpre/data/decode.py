"""Any image file to proper RGB. Every pixel that a method, a probe or an export's reader sees comes through `decode`.

What is done, in this order: the pixel limit is checked on the header; the first frame or page is decoded; the values
become 8-bit RGB; the image is turned upright as its EXIF orientation says. Colour profiles (ICC) are not applied.

Pillow's plugin classes are called directly, chosen by the file's first bytes. `Image.open` would apply Pillow's own
bomb limit, which can be changed only for the whole process; and only these six formats can ever be reached this way.
"""

from __future__ import annotations

import errno
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from sslpre.data import BadImage

# Pillow warns about odd metadata once per process and without the file's name, across a progress bar. Filtered here and
# not around each call, because `warnings.catch_warnings` is not safe in threads before Python 3.14.
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_PIXELS = 200_000_000
ORIENTATION, WIDTH, HEIGHT, BITS, PHOTOMETRIC, SAMPLE_FORMAT = 274, 256, 257, 258, 262, 339  # TIFF and EXIF tags
IN_MEMORY = 1 << 28  # bytes; a file up to this size is read in one go

# What Pillow 11–13 raises on damaged files, found by mutating valid ones (tests/test_data_decode.py does so again).
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# Not the file's fault: out of file handles or memory. These end the run rather than blame every image.
NOT_THE_FILE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def decode(path: str | bytes | Path, side: int | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to uint8 [h, w, 3] RGB, upright.

    * grey is repeated; palettes are looked up; CMYK and YCCK become RGB (Adobe's inverted JPEGs too);
    * alpha, palette transparency and PNG colour keys are composited on white;
    * unsigned integers of 9 to 16 bits are scaled by their range (65535 → 255), never clipped;
    * 32-bit integers, signed 16-bit and floats are taken as [0, 1] or [0, 255] if all values lie there, else scaled by
      the image's own minimum and maximum (a constant image becomes black);
    * of animations and multi-page files the first frame counts.

    With `side`, a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, never below 2 · side on its shorter side.
    Raises BadImage for anything that is not a whole image within `max_pixels`, NaN and infinite values included.
    """
    with _blame_the_file(path), open(path, "rb") as raw:
        file: IO[bytes] = raw
        if os.fstat(raw.fileno()).st_size <= IN_MEMORY:
            # also because libtiff maps files: one that shrinks while it is read would kill the process
            file = io.BytesIO(raw.read())
        image = _open(file, max_pixels)
        turn = _orientation(image, file)
        if side and image.format == "JPEG":
            image.draft(None, (2 * side, 2 * side))
        image.load()
        wide = image.mode.startswith("I") or image.mode == "F"
        pixels = np.repeat(_narrow(image)[:, :, None], 3, axis=2) if wide else np.asarray(_rgb(image))
    return _upright(pixels, turn)


def header_size(path: str | bytes | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of the upright image, from the header alone. Raises BadImage as `decode` would for the header."""
    with _blame_the_file(path), open(path, "rb") as file:
        image = _open(file, max_pixels)
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            width, height = int(image.tag_v2[WIDTH]), int(image.tag_v2[HEIGHT])
            turn = image.tag_v2.get(ORIENTATION, 1)
        else:
            width, height = image.size
            turn = _orientation(image, file)
    return (width, height) if turn in (5, 6, 7, 8) else (height, width)


def to_canvas(image: np.ndarray, side: int) -> np.ndarray:
    """Squash uint8 [h, w, 3] to uint8 [side, side, 3], bilinear and antialiased; the same array if it has that size."""
    if image.shape[:2] == (side, side):
        return image
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))


@contextmanager
def _blame_the_file(path: str | bytes | Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno in NOT_THE_FILE:
            raise
        raise BadImage(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file has vanished"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read: {os.strerror(error.errno).lower()}"
    if isinstance(error, SyntaxError) and isinstance(error.msg, Exception):
        return "damaged: the header makes no sense"  # Pillow wraps a KeyError or struct.error, whose text says nothing
    text = str(error) or type(error).__name__
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return "truncated"
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than Pillow's limit"
    return f"damaged: {text}"


MAGIC: tuple[tuple[bytes, Callable[[IO[bytes]], ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"GIF8", GifImagePlugin.GifImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    *((prefix, TiffImagePlugin.TiffImageFile) for prefix in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
)


def _open(file: IO[bytes], max_pixels: int) -> ImageFile.ImageFile:
    """Read the header, and refuse what has too many pixels before any of them is decoded."""
    start = file.read(16)
    file.seek(0)
    if not start:
        raise BadImage("zero bytes")
    plugin = next((plugin for magic, plugin in MAGIC if start.startswith(magic)), None)
    if plugin is None:
        raise BadImage("not a JPEG, PNG, WebP, BMP, GIF or TIFF file")
    image = plugin(file)
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(
            f"{width} x {height} is {width * height / 1e6:,.0f} megapixels, the limit is {max_pixels / 1e6:,.0f}"
        )
    return image


def _orientation(image: ImageFile.ImageFile, file: IO[bytes]) -> int:
    """EXIF orientation 1..8; 1 for TIFF, which Pillow turns upright itself while loading."""
    if image.format == "TIFF":
        return 1
    if image.format == "PNG" and "exif" not in image.info and (late := _late_exif(file)):
        image.info["exif"] = late
    try:
        # not the PNG class's own getexif: it decodes the whole image in search of EXIF data behind the pixels
        value = Image.Image.getexif(image).get(ORIENTATION, 1)
    except DAMAGE:
        return 1  # the pixels are whole, only their description is damaged: every viewer shows such a file as it lies
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _late_exif(file: IO[bytes]) -> bytes | None:
    """The eXIf chunk of a PNG, wherever it stands; skips from chunk to chunk and leaves the file's position alone."""
    position, exif = file.tell(), None
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            exif = file.read(length)
            break
        file.seek(length + 4, os.SEEK_CUR)
    file.seek(position)
    return exif


def _upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    if turn == 1:
        return pixels
    if turn >= 5:  # 5..8 exchange rows and columns
        pixels = pixels.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit image of any mode to mode RGB, on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in key)  # 16 bits, as the file has and Pillow halved
    rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _narrow(image: Image.Image) -> np.ndarray:
    """Grey image of more than 8 bits to uint8 [h, w] by the rules of `decode`."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        top = 2 ** int(tags.get(BITS, (16,))[0]) - 1
        grey = ((np.minimum(values, top).astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)
        if tags.get(PHOTOMETRIC) == 0:  # WhiteIsZero; Pillow inverts 8 bits but not 16
            grey = 255 - grey
        key = image.info.get("transparency")
        return np.where(values == key, np.uint8(255), grey) if isinstance(key, int) else grey
    if image.mode == "I" and tags.get(SAMPLE_FORMAT, (1,))[0] == 1:
        values = values.view(np.uint32)  # Pillow keeps unsigned numbers in a signed array
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise BadImage("has values that are not finite numbers (NaN or infinity)")
    if low < 0 or high > 255:
        shifted, scale = values.astype(np.float64) - low, 255 / ((high - low) or 1.0)
    else:
        shifted, scale = values.astype(np.float64), 255.0 if high <= 1 else 1.0
    return np.rint(shifted * scale).astype(np.uint8)
