"""Any image file to proper RGB. Every pixel that a method, a probe or an export's reader sees comes through `decode`.

What is done, in this order: the pixel limit is checked on the header; the first frame or page is decoded; the values
become 8-bit RGB; the image is turned upright as its EXIF orientation says. Colour profiles (ICC) are not applied.

Pillow's plugin classes are called directly, chosen by the file's first bytes. `Image.open` would apply Pillow's own
bomb limit, which can be changed only for the whole process; and only these six formats can ever be reached this way.

Pillow reads every header and is the judge of what is a bad image. Where a JPEG is RGB or grey by that header,
simplejpeg makes the pixels, if it is installed: the same ones, sooner, and other threads run meanwhile. It refuses what
is damaged in the least; that goes back to Pillow. (torchvision's decoder is as fast, but deprecated, and prints what it
meets on stderr.)
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from sslpre.data import BadImage

try:
    import simplejpeg
except ImportError:  # it is an extra
    simplejpeg = None

# Pillow warns about odd metadata once per process and without the file's name, across a progress bar. Filtered here and
# not around each call, because `warnings.catch_warnings` is not safe in threads before Python 3.14.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # it logs some faults too, which end in a BadImage anyway

REVISION = 1  # of the pixels that `decode` and `to_canvas` make: raised whenever a change here changes any of them
MAX_PIXELS = 200_000_000
# TIFF and EXIF tags
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, STRIPS, ORIENTATION = 256, 257, 258, 259, 262, 273, 274
STRIP_BYTES, PLANES, SAMPLE_FORMAT = 279, 284, 339
IN_MEMORY = 1 << 28  # bytes; a file up to this size is read in one go
# Only fractions that divide both sides: else the last row and column stand for less than the others, and the picture
# is stretched by up to a pixel. Canvas from a fraction against canvas from the whole, at 2 times the canvas, median of
# photos of 400×533 cropped so that it divides: 1/2 51 dB, 1/4 49, 1/8 47; as they are, 44, 40 and 42.
FRACTIONS, LEAST = (8, 4, 2), 2

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
    * 32-bit integers, signed ones and floats are taken as [0, 1] or [0, 255] if all values lie there, else scaled by
      the image's own minimum and maximum (a constant image becomes black);
    * of animations and multi-page files the first frame counts.

    With `side`, a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size where both its sides divide by that, never below
    2 · side on the shorter one.
    Raises BadImage for anything that is not a whole image within `max_pixels`, NaN and infinite values included.
    """
    with blame_the_file(path), open(path, "rb") as raw:
        file: IO[bytes] = raw
        if os.fstat(raw.fileno()).st_size <= IN_MEMORY:
            # also because libtiff maps files: one that shrinks while it is read would kill the process
            file = io.BytesIO(raw.read())
        image = open_image(file, max_pixels)
        turn = _orientation(image, file)
        planes = _planes(image, file)
        if planes is not None:
            return planes
        width, height = image.size
        if side and (fraction := _fraction(image, side)) > 1:
            width, height = width // fraction, height // fraction
        pixels = _jpeg(image, file, width, height)
        if pixels is None:
            if (width, height) != image.size:
                image.draft(None, (width, height))
            image.load()
            pixels = np.repeat(_narrow(image)[:, :, None], 3, axis=2) if _wide(image) else np.asarray(_rgb(image))
    return _upright(pixels, turn)


def decoder() -> str:
    """One line that names all whose version can change a pixel of what `decode` and `to_canvas` make, us included."""
    turbo = features.version_feature("libjpeg_turbo")
    names = [f"decoding {REVISION}", f"torch {torch.__version__}", f"pillow {PIL.__version__}"]
    names += [f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version_codec('jpg')}"]
    names += [f"simplejpeg {simplejpeg.__version__}"] if simplejpeg is not None else []
    return ", ".join(names)


def header_size(path: str | bytes | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of the upright image, from the header alone. Raises BadImage as `decode` would for the header."""
    with blame_the_file(path), open(path, "rb") as file:
        height, width, _ = upright(open_image(file, max_pixels), file)
    return height, width


def upright(image: ImageFile.ImageFile, file: IO[bytes]) -> tuple[int, int, int]:
    """Height and width of an image that is open, when it is turned, and the EXIF orientation 1..8 that says how."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = int(image.tag_v2[WIDTH]), int(image.tag_v2[HEIGHT])
        turn = image.tag_v2.get(ORIENTATION, 1)
    else:
        width, height = image.size
        turn = _orientation(image, file)
    return (width, height, turn) if turn in (5, 6, 7, 8) else (height, width, turn)


def header_grey(path: str | bytes | Path, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether the header says one channel, or a palette of nothing but greys. Raises BadImage as `header_size`.

    Grey pictures in a file of three channels are not met, nor any in WebP, which has no grey.
    """
    with blame_the_file(path), open(path, "rb") as file:
        return is_grey(open_image(file, max_pixels))


def is_grey(image: ImageFile.ImageFile) -> bool:
    """`header_grey` of an image that is open."""
    if image.mode != "P":
        return image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")
    palette = image.palette
    if palette is None:
        return False
    # not `getpalette`, which decodes the whole image
    table, layout = np.frombuffer(bytes(palette.palette), np.uint8), palette.rawmode or palette.mode
    table = table[
        : len(table) // (wide := 3 if layout == "RGB;L" else len(layout)) * wide
    ]  # one may be cut in its last
    colours = table.reshape(3, -1).T if layout == "RGB;L" else table.reshape(-1, wide)[:, :3]
    return bool((colours == colours[:, :1]).all())


def to_canvas(image: np.ndarray, side: int) -> np.ndarray:
    """Squash uint8 [h, w, 3] to uint8 [side, side, 3], bilinear and antialiased; the same array if it has that size.

    By torch's kernel for uint8, on x86 the same with every instruction set. It rounds after rows and after columns, as
    Pillow does: within one level of it, but for one value in a hundred million, where both roundings part, within two.
    """
    if image.shape[:2] == (side, side):
        return image
    writable = np.require(image, requirements=["C", "W"])  # torch warns of arrays that are not; it does not write
    # as channels-last, which the kernel takes as it lies; with AVX2 it runs in the thread that calls it alone
    planes = torch.from_numpy(writable)[None].permute(0, 3, 1, 2)
    return F.interpolate(planes, (side, side), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


@contextmanager
def blame_the_file(path: str | bytes | Path) -> Iterator[None]:
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
    if any(words in text.lower() for words in ("unknown pixel mode", "cannot handle", "unsupported")):
        return f"of a kind that Pillow does not read: {text}"
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return "truncated"
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than Pillow's limit"
    return f"damaged: {text}"


MAGIC: tuple[tuple[re.Pattern[bytes], Callable[[IO[bytes]], ImageFile.ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (re.compile(rb"GIF8"), GifImagePlugin.GifImageFile),
    (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImagePlugin.TiffImageFile),
)


def open_image(file: IO[bytes], max_pixels: int) -> ImageFile.ImageFile:
    """Read the header, and refuse what has too many pixels before any of them is decoded."""
    start = file.read(16)
    file.seek(0)
    if not start:
        raise BadImage("zero bytes")
    plugin = next((plugin for magic, plugin in MAGIC if magic.match(start)), None)
    if plugin is None:
        raise BadImage("not a JPEG, PNG, WebP, BMP, GIF or TIFF file")
    if plugin is WebPImagePlugin.WebPImageFile and int.from_bytes(start[4:8], "little") + 8 > _length(file):
        raise BadImage("truncated")  # libwebp gives no reason
    try:
        image = plugin(file)
    except DAMAGE as error:
        at_the_end = file.tell() >= _length(file) and plugin is not WebPImagePlugin.WebPImageFile  # read in one go
        if at_the_end and _reason(error).startswith("damaged"):
            raise BadImage("truncated") from error
        raise
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(
            f"{width} x {height} is {width * height / 1e6:,.0f} megapixels, the limit is {max_pixels / 1e6:,.0f}"
        )
    return image


def _length(file: IO[bytes]) -> int:
    """Bytes in the file; its position stays."""
    position = file.tell()
    length = file.seek(0, os.SEEK_END)
    file.seek(position)
    return length


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


def _fraction(image: ImageFile.ImageFile, side: int) -> int:
    """Denominator of the fraction at which to decode for a canvas of `side`, which costs it next to nothing."""
    if image.format != "JPEG":
        return 1
    width, height = image.size
    fits = (n for n in FRACTIONS if width % n == height % n == 0 and min(width, height) // n >= LEAST * side)
    return next(fits, 1)


def _jpeg(image: ImageFile.ImageFile, file: IO[bytes], width: int, height: int) -> np.ndarray | None:
    """Pixels [height, width, 3] by simplejpeg, of all or a fraction; None for other images and damaged ones."""
    if simplejpeg is None or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    if not isinstance(file, io.BytesIO):
        return None
    try:
        pixels = simplejpeg.decode_jpeg(file.getbuffer(), "RGB", min_height=height, min_width=width)
    except ValueError:  # of anything that is not as it should be; Pillow decides whether the image is bad
        return None
    return pixels if pixels.shape[:2] == (height, width) else None


def _upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    if turn == 1:
        return pixels
    if turn >= 5:  # 5..8 exchange rows and columns
        pixels = pixels.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    whole = np.empty(pixels.shape, np.uint8)
    for channel in range(3):  # one channel at a time is three to five times faster than all in one go
        whole[..., channel] = pixels[..., channel]
    return whole


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit image of any mode to mode RGB, on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("P", "PA") and image.palette is None:
        raise BadImage("damaged: it has no palette")
    if not image.has_transparency_data:
        return image.convert("RGB")
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in key)  # 16 bits, as the file has and Pillow halved
    rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _wide(image: Image.Image) -> bool:
    """Whether the image is grey and its numbers are other than 0 to 255."""
    signed = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(SAMPLE_FORMAT, (1,))[0] == 2
    return image.mode == "F" or image.mode.startswith("I") or (image.mode == "L" and signed)


def _narrow(image: Image.Image) -> np.ndarray:
    """Grey image of more than 8 bits, or of signed ones, to uint8 [h, w] by the rules of `decode`."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    white_is_zero = tags.get(PHOTOMETRIC) == 0  # Pillow inverts 8 bits, but no other number
    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = _eight(values, 2 ** int(tags.get(BITS, (16,))[0]) - 1)
        key = image.info.get("transparency")
        grey = 255 - grey if white_is_zero else grey
        return np.where(values == key, np.uint8(255), grey) if isinstance(key, int) else grey
    if image.mode == "I" and tags.get(SAMPLE_FORMAT, (1,))[0] == 1:
        values = values.view(np.uint32)  # Pillow keeps unsigned numbers in a signed array
    if image.mode == "L":
        values = (255 - values if white_is_zero else values).view(np.int8)  # as they are in the file
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise BadImage("has values that are not finite numbers (NaN or infinity)")
    if low < 0 or high > 255:
        shifted, scale = values.astype(np.float64) - low, 255 / ((high - low) or 1.0)
    else:
        shifted, scale = values.astype(np.float64), 255.0 if high <= 1 else 1.0
    grey = np.rint(shifted * scale).astype(np.uint8)
    return 255 - grey if white_is_zero else grey


def _eight(values: np.ndarray, top: int) -> np.ndarray:
    """Unsigned integers of 0 to `top` to uint8, rounded."""
    return ((np.minimum(values, top).astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)


def _planes(image: Image.Image, file: IO[bytes]) -> np.ndarray | None:
    """An uncompressed 16-bit TIFF with red, green and blue one after another to uint8 [h, w, 3]; None for other images.

    Pillow 11 to 13 take the planes of such a file for 8 bits and give a wrong picture without a word.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return None
    tags = image.tag_v2
    bits = tags.get(BITS, (1,))
    if tags.get(PLANES) != 2 or tags.get(COMPRESSION, 1) != 1 or max(bits) <= 8 or len(bits) == 1:
        return None
    if bits != (16, 16, 16) or tags.get(PHOTOMETRIC) != 2 or STRIPS not in tags or STRIP_BYTES not in tags:
        raise BadImage("of a kind that Pillow does not read: channels of 16 bits one after another")
    width, height = int(tags[WIDTH]), int(tags[HEIGHT])
    strips = [(int(offset), int(size)) for offset, size in zip(tags[STRIPS], tags[STRIP_BYTES], strict=True)]
    if sum(size for _, size in strips) != 6 * width * height:
        raise BadImage("damaged: its strips hold more or fewer pixels than its header says")
    parts = []
    for offset, size in strips:
        file.seek(offset)
        parts.append(file.read(size))
    data = b"".join(parts)
    if len(data) < 6 * width * height:
        raise BadImage("truncated")
    planes = np.frombuffer(data, "<u2" if tags.prefix == b"II" else ">u2").reshape(3, height, width)
    turn = tags.get(ORIENTATION, 1)
    return _upright(_eight(planes.transpose(1, 2, 0), 65535), turn if turn in range(1, 9) else 1)
