"""A folder of odd files, each with what must become of it written beside it.

    python tests/golden.py DIR

makes the folder and prints the table: file, what is odd, what is expected, what happened. tests/test_golden.py holds
every row of it, in pretrain and in probe.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = "not a JPEG, PNG, WebP, BMP, GIF or TIFF file"
UNREAD = "of a kind that Pillow does not read"
ROOT = os.geteuid() == 0  # who may read everything


@dataclass(frozen=True)
class Odd:
    """One odd file. Exactly one of the three outcomes is set; `else_reason` goes with a picture.

    picture: uint8 [h, w, 3], to be met within `within` levels. reason: how the reason begins for which it is skipped.
    passed_over: what the scan counts it as, `nothing` where it is not even counted. else_reason: the picture depends on
    how Pillow was built, and without it this is the reason.
    """

    name: bytes  # below the folder
    what: str
    put: Callable[[bytes], object]  # makes the file at this path
    picture: np.ndarray | None = None
    within: int = 0
    reason: str = ""
    passed_over: str = ""
    else_reason: str = ""

    @property
    def expected(self) -> str:
        if self.picture is None:
            return f"skipped: {self.reason}" if self.reason else f"not listed, counted as: {self.passed_over}"
        exactly = f"within {self.within} of 255" if self.within else "exactly"
        return f"the picture {exactly}" + (f", or skipped: {self.else_reason}" if self.else_reason else "")


def write(data: bytes, path: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    jpeg, webp = {"quality": 95, "subsampling": 0}, {"lossless": True, "exact": True}
    best = {"JPEG": jpeg, "MPO": jpeg, "WEBP": webp}.get(kind, {})
    data = io.BytesIO()
    image.save(data, kind, **{**best, **options})
    return data.getvalue()


def several(pixels: np.ndarray, kind: str) -> bytes:
    """Two frames or pages, the second one blue."""
    return encoded(pixels, kind, save_all=True, append_images=[Image.fromarray(BLUE)])


def scene() -> np.ndarray:
    """uint8 [32, 48, 3]: no turn and no mirror leaves it as it is, and no channel equals another."""
    y, x = np.mgrid[0:1:32j, 0:1:48j]
    return np.stack([255 * x, 255 * y, 127 * (1 + x - y)], 2).astype(np.uint8)


def grey(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[:, :, None], 3, 2)


def stretch(values: np.ndarray) -> np.ndarray:
    """Any numbers to uint8 by their own minimum and maximum."""
    low, high = float(values.min()), float(values.max())
    return np.rint((values.astype(np.float64) - low) / (high - low) * 255).astype(np.uint8)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[:, :, None] / 255
    return np.rint(colour * share + 255 * (1 - share)).astype(np.uint8)


def png(width: int, height: int, depth: int, kind: int, rows: bytes, late: tuple[bytes, bytes] | None = None) -> bytes:
    """A PNG from its parts; `rows` with their filter bytes, `late` a chunk behind the pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    chunks += [late] if late else []
    body = (
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in [*chunks, (b"IEND", b"")]
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff(pixels: np.ndarray, claims: tuple[int, int] | None = None, white: int = 1, planes: bool = False) -> bytes:
    """An uncompressed little-endian TIFF of [h, w] or [h, w, c] of any number type.

    claims: (h, w) in its header; white: 0 if grey has 0 for white; planes: the channels stand one after another.
    """
    (h, w), channels = claims or pixels.shape[:2], pixels[0, 0].size
    bits, form = 8 * pixels.itemsize, {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    strips = [plane.tobytes() for plane in pixels.transpose(2, 0, 1)] if planes else [pixels.tobytes()]
    starts = [8 + n * len(strips[0]) for n in range(len(strips) + 1)]  # behind the first 8 bytes, then the header
    entries = [(256, [w]), (257, [h]), (258, [bits] * channels), (259, [1]), (262, [2 if channels == 3 else white])]
    entries += [(273, starts[:-1]), (277, [channels]), (278, [h]), (279, [len(strip) for strip in strips])]
    entries += [(284, [1 + planes]), (339, [form] * channels)]
    fields, more, behind = b"", b"", starts[-1] + 2 + 12 * len(entries) + 4
    for tag, values in entries:
        number, code = ("I", 4) if tag in (256, 257, 273, 278, 279) else ("H", 3)
        packed = struct.pack(f"<{len(values)}{number}", *values)
        if len(packed) > 4:
            packed, more = struct.pack("<I", behind + len(more)), more + packed
        fields += struct.pack("<HHI", tag, code, len(values)) + packed.ljust(4, b"\0")
    head = struct.pack("<2sHI", b"II", 42, starts[-1])
    return head + b"".join(strips) + struct.pack("<H", len(entries)) + fields + bytes(4) + more


def claiming(data: bytes, at: int, layout: str) -> bytes:
    """The file with width and height, which stand `at` a place in a `layout` of struct's, overwritten by 30,000."""
    number = struct.pack(layout, 30_000, 30_000)
    return data[:at] + number + data[at + len(number) :]


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


SCENE, JPG, TALL = scene(), 6, (5000, 1)
GREY = SCENE[:, :, 2].copy()
WIDE16 = (np.arange(32 * 48, dtype=np.uint32) * 42).astype(np.uint16).reshape(32, 48)  # 0 to 64,470
GREY16 = grey(np.rint(WIDE16 / 65535 * 255).astype(np.uint8))
ALPHA = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (32, 1))
BLUE = np.full((32, 48, 3), (10, 20, 250), np.uint8)
# the stored array for each EXIF orientation, by the standard's table of where row 0 and column 0 are
LYING = {
    1: SCENE,
    2: SCENE[:, ::-1],
    3: SCENE[::-1, ::-1],
    4: SCENE[::-1],
    5: SCENE.swapaxes(0, 1),
    6: np.rot90(SCENE),
    7: SCENE[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90(SCENE, -1),
}
# SCENE by libjpeg-turbo's `cjpeg -arithmetic`, sequential and progressive: Pillow reads such files but writes none
ARITHMETIC = """
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGBYU
GBIUFRT/2wBDAQMEBAUEBQkFBQkUDQsNFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBT/yQARCAAgADAD
AREAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AOSX+HYbRV8EpN3+v+3E07K4dRVw3PlnMTRcqJ0E9QaUqhJtubrpMLb/AEDKpXFs
GQrxrb7crrwNz7IDiV98HR6mZEJqwBbhmmjWQNHNenhN/NVEyh/a7eBr4F7oOAZAUP698K1WG7AUzudTMgIGOZgi99IhILlChtMVbbA9yZDs0OOo
7EB+wqg7u/aBcr1Jn8TnLv8AUkY4UuGK0Unm5AtDmldZAnFPofea1TB30ooG5ykp9msVzGpLOmpL3+jMBFiAWydH7wl6gpjQ7bpKLqKgs8J2Vq+O
PdOOrvq3Pufe6cmOyt5O5R1pgP/Z"""
PROGRESSIVE = """
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGBYU
GBIUFRT/2wBDAQMEBAUEBQkFBQkUDQsNFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBT/ygARCAAgADAD
AREAAhEBAxEB/8wABgAQARD/2gAMAwEAAhADEAAAAf8AyR+FiJD5KbnlXOfzO8U9UAVQAi/MrwkSWz80Q0oTX2bmEsdBTR964Rj1x3Sm77MUXJLj
VhVs+dM+31hGwP/MAAQQBf/aAAgBAQABBQIa5bNXE2U0TxWXOmhs0fcS0c3G43GZRty8Xi8X/8wABBEF/9oACAEDAQE/ARQpx58ljQ8zuaz+PL5N
1szUbmccccj/zAAEEQX/2gAIAQIBAT8BD4E4K6dfby8Gq2CMNqpCR3Oc54D/zAAEEAX/2gAIAQEABj8CsP/MAAQQBf/aAAgBAQABPyGmPJcCXUsK
DNRJqkUbUoD/2gAMAwEAAgADAAAAEOwIxQuQgHMfkYD/zAAEEQX/2gAIAQMBAT8Qph091WtGoxY0sZgivsj/zAAEEQX/2gAIAQIBAT8QTDdH2qMO
N4D/zAAEEAX/2gAIAQEAAT8QVOmaevK3ZSPGU8N7gUKa/T+aURcLx7IQ/9k="""


def seen(name: str, what: str, data: bytes, picture: np.ndarray, within: int = 0, else_reason: str = "") -> Odd:
    return Odd(os.fsencode(name), what, partial(write, data), picture, within, else_reason=else_reason)


def skipped(name: str, what: str, data: bytes, reason: str) -> Odd:
    return Odd(os.fsencode(name), what, partial(write, data), reason=reason)


def depths() -> list[Odd]:
    """More or fewer than 8 bits, and numbers that are no integers."""
    high = (SCENE.astype(np.uint16) << 8) + 100
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in high)
    unit = (WIDE16 / np.float32(65535)).astype(np.float32)
    hot = unit * 300 - 50
    signed = np.linspace(-100, 120, 32 * 48).astype(np.int8).reshape(32, 48)
    holed = unit.copy()
    holed[3, 4] = np.nan
    big_endian = Image.frombytes("I;16B", (48, 32), WIDE16.astype(">u2").tobytes())
    return [
        seen("grey.jpg", "8-bit grey JPEG", encoded(GREY, "JPEG"), grey(GREY), 2),
        seen("grey16.png", "16-bit grey PNG", encoded(WIDE16, "PNG"), GREY16),
        seen("grey16.tif", "16-bit grey TIFF", encoded(WIDE16, "TIFF"), GREY16),
        seen("grey16-big-endian.tif", "16-bit grey TIFF, big-endian", encoded(big_endian, "TIFF"), GREY16),
        seen("grey16-lzw.tif", "16-bit grey TIFF, LZW", encoded(WIDE16, "TIFF", compression="tiff_lzw"), GREY16),
        seen("grey16-white-is-zero.tif", "16-bit grey TIFF, 0 is white", tiff(WIDE16, white=0), 255 - GREY16),
        seen("rgb16.png", "16-bit RGB PNG", png(48, 32, 16, 2, rows), SCENE, 1),
        seen("rgb16.tif", "16-bit RGB TIFF", tiff(high), SCENE, 1),
        seen("rgb16-planes.tif", "16-bit RGB TIFF, channels one after another", tiff(high, planes=True), SCENE, 1),
        seen("signed.tif", "signed 8-bit TIFF, -100 to 120", tiff(signed), grey(stretch(signed)), 1),
        seen("float.tif", "float TIFF, 0 to 1", encoded(unit, "TIFF"), GREY16, 1),
        seen("float-wide.tif", "float TIFF, -50 to 245", encoded(hot, "TIFF"), grey(stretch(hot)), 1),
        seen("float-white-is-zero.tif", "float TIFF, 0 is white", tiff(unit, white=0), 255 - GREY16, 1),
        skipped("float-nan.tif", "float TIFF with a NaN", encoded(holed, "TIFF"), "has values that are not finite"),
        skipped("double.tif", "64-bit float TIFF", tiff(unit.astype(np.float64)), UNREAD),
        skipped("float-rgb.tif", "float RGB TIFF", tiff((SCENE / 255).astype(np.float32)), UNREAD),
        seen("int32.tif", "32-bit integer TIFF", encoded(GREY.astype(np.int32), "TIFF"), grey(GREY)),
        seen("bits.png", "1-bit PNG", encoded(GREY > 99, "PNG"), grey((GREY > 99) * np.uint8(255))),
    ]


def colours() -> list[Odd]:
    """Palettes, transparency, inks."""
    flat = Image.fromarray(SCENE).quantize(16)
    looked_up = np.asarray(flat.convert("RGB"))
    clear = np.where((np.asarray(flat) == 5)[:, :, None], np.uint8(255), looked_up)
    faint = bytes([128] * 16)
    half = on_white(looked_up, np.full((32, 48), 128))
    rgba = np.dstack([SCENE, ALPHA])
    la = Image.fromarray(np.dstack([GREY, ALPHA]), "LA")
    inks = np.repeat(
        np.repeat(np.array([[[200, 50, 100], [255, 255, 255], [0, 0, 0], [20, 180, 240]]], np.uint8), 16, 0), 16, 1
    )
    cmyk = Image.fromarray(inks).convert("CMYK")
    return [
        seen("palette.png", "palette", encoded(flat, "PNG"), looked_up),
        skipped("palette-none.png", "a palette PNG without its palette", png(48, 32, 8, 3, bytes(32 * 49)), "damaged"),
        seen("palette.gif", "palette, GIF", encoded(flat, "GIF"), looked_up),
        seen("palette.bmp", "palette, BMP", encoded(flat, "BMP"), looked_up),
        seen("palette-clear.png", "palette, one entry transparent", encoded(flat, "PNG", transparency=5), clear),
        seen("palette-clear.gif", "palette, one entry transparent, GIF", encoded(flat, "GIF", transparency=5), clear),
        seen("palette-half.png", "palette, half transparent", encoded(flat, "PNG", transparency=faint), half, 1),
        seen("alpha.png", "alpha", encoded(rgba, "PNG"), on_white(SCENE, ALPHA), 1),
        seen("alpha.webp", "alpha, WebP", encoded(rgba, "WEBP"), on_white(SCENE, ALPHA), 1),
        seen("alpha.tif", "alpha, TIFF", encoded(rgba, "TIFF"), on_white(SCENE, ALPHA), 1),
        seen("grey-alpha.png", "grey with alpha", encoded(la, "PNG"), on_white(grey(GREY), ALPHA), 1),
        seen("cmyk.jpg", "CMYK JPEG", encoded(cmyk, "JPEG", quality=100), inks, 4),
        seen("cmyk.tif", "CMYK TIFF", encoded(cmyk, "TIFF"), inks),
        seen("ycck.jpg", "YCCK JPEG", ycck(inks), inks, 4),
    ]


def ycck(picture: np.ndarray) -> bytes:
    """Adobe's own: CMY as YCbCr, all inverted. A CMYK JPEG whose Adobe marker says so (transform 2)."""
    ink = Image.fromarray(255 - picture).convert("YCbCr")
    planes = [*ink.split(), Image.new("L", ink.size, 255)]
    data = bytearray(encoded(Image.merge("CMYK", [p.point(lambda v: 255 - v) for p in planes]), "JPEG", quality=100))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def shapes() -> list[Odd]:
    """Turned, coded in an unusual way, several pictures in one file, sizes at the edge."""
    turned = [
        seen(
            f"exif-{o}.jpg",
            f"EXIF orientation {o}",
            encoded(np.ascontiguousarray(lying), "JPEG", exif=exif(o)),
            SCENE,
            JPG,
        )
        for o, lying in LYING.items()
    ]
    rows = b"".join(b"\0" + row.tobytes() for row in np.rot90(SCENE))
    late = png(32, 48, 8, 2, rows, (b"eXIf", exif(6).tobytes()[6:]))
    tiles = (SCENE // 128 * 255).astype(np.uint8)  # eight colours, which a GIF holds exactly
    plain = encoded(SCENE, "JPEG")
    return [
        *turned,
        seen("exif-late.png", "EXIF orientation 6 behind the pixels of a PNG", late, SCENE),
        seen("progressive.jpg", "progressive", encoded(SCENE, "JPEG", progressive=True), SCENE, JPG),
        seen("arithmetic.jpg", "arithmetic-coded", b64decode(ARITHMETIC), SCENE, JPG, "damaged"),
        seen("arithmetic-progressive.jpg", "the same, progressive", b64decode(PROGRESSIVE), SCENE, JPG, "damaged"),
        seen("trailer.jpg", "other data behind the picture", plain + b"SEFT" * 99, SCENE, JPG),
        seen(
            "phone.jpg",
            "two pictures in a JPEG (MPO)",
            several(SCENE, "MPO"),
            SCENE,
            JPG,
        ),
        seen("animated.gif", "animated", several(tiles, "GIF"), tiles),
        seen("animated.png", "animated PNG", several(SCENE, "PNG"), SCENE),
        seen("animated.webp", "animated WebP", several(SCENE, "WEBP"), SCENE),
        seen("pages.tif", "two pages", several(SCENE, "TIFF"), SCENE),
        seen("1x1.png", "1 x 1", encoded(BLUE[:1, :1], "PNG"), BLUE[:1, :1]),
        seen("1x1.jpg", "1 x 1, JPEG", encoded(BLUE[:1, :1], "JPEG"), BLUE[:1, :1], JPG),
        seen(
            "1x5000.png",
            "1 x 5000",
            encoded(np.full((*TALL, 3), 77, np.uint8), "PNG"),
            np.full((*TALL, 3), 77, np.uint8),
        ),
        seen(
            "5000x1.jpg",
            "5000 x 1",
            encoded(np.full((1, 5000, 3), 77, np.uint8), "JPEG"),
            np.full((1, 5000, 3), 77, np.uint8),
            1,
        ),
    ]


def no_pictures() -> list[Odd]:
    """Cut, empty, lying about their size, or of another kind than their name says."""
    jpeg, page = encoded(SCENE, "JPEG"), Image.fromarray(SCENE)
    scan = jpeg.index(b"\xff\xda") + 14
    places = {
        1: "in the first marker",
        3: "behind the first marker",
        20: "behind the JFIF header",
        100: "in a quantisation table",
        180: "in a Huffman table",
        scan - 8: "in the last header",
        scan: "before the first pixel",
        (scan + len(jpeg)) // 2: "in the middle of the pixels",
        len(jpeg) - 20: "in the last pixels",
        len(jpeg) - 1: "in the last marker",
    }
    cut = [
        skipped(f"cut-{n:02}.jpg", f"cut {what}", jpeg[:at], FORMATS if at < 3 else "truncated")
        for n, (at, what) in enumerate(places.items())
    ]
    for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = encoded(SCENE, kind)
        cut.append(skipped(f"cut.{kind.lower()}", f"cut in the middle, {kind}", data[: len(data) // 2], "truncated"))
    large = "30000 x 30000 is 900 megapixels, the limit is 200"
    bombs = {
        "png": png(30_000, 30_000, 8, 2, b""),
        "jpg": claiming(jpeg, jpeg.index(b"\xff\xc0") + 5, ">HH"),
        "gif": claiming(encoded(SCENE, "GIF"), 6, "<HH"),
        "bmp": claiming(encoded(SCENE, "BMP"), 18, "<ii"),
        "tif": tiff(SCENE, claims=(30_000, 30_000)),
    }
    others = {
        "eps": encoded(page, "EPS"),
        "pdf": encoded(page, "PDF"),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "html": b"<html>404</html>",
        "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "avi": b"RIFF\x40\0\0\0AVI LIST",
    }
    return [
        *cut,
        *(skipped(f"bomb.{kind}", f"its header claims 30000 x 30000, {kind}", bombs[kind], large) for kind in bombs),
        *(skipped(f"{kind}.jpg", f"{kind} renamed .jpg", others[kind], FORMATS) for kind in others),
        skipped("empty.jpg", "zero bytes", b"", "zero bytes"),
        seen("png.jpg", "PNG renamed .jpg", encoded(SCENE, "PNG"), SCENE),
        seen("webp.gif", "WebP renamed .gif", encoded(SCENE, "WEBP"), SCENE),
        seen("jpg.tif", "JPEG renamed .tif", jpeg, SCENE, JPG),
        Odd(b"png", "PNG without an extension", partial(write, encoded(SCENE, "PNG")), passed_over="no extension"),
    ]


def places() -> list[Odd]:
    """Odd names, links, permissions, folders. Links and folders stand behind the files that they need."""
    data = encoded(SCENE, "PNG")
    file = partial(write, data)
    names = {
        b"new\nline.png": "a newline in its name",
        "\U0001f600.png".encode(): "an emoji as its name",
        b"latin-\xe9.png": "a name that is not UTF-8",
        b" .PNG": "a blank as its name, the extension in capitals",
        b"\x1b[31m'\".png": "a colour code and quotes in its name",
    }
    return [
        *(Odd(name, what, file, SCENE) for name, what in names.items()),
        Odd(b"x.jpg/inside.png", "a folder called x.jpg: walked", file, SCENE),
        Odd(b"y.jpg", "an empty folder called y.jpg", os.mkdir, passed_over="nothing"),
        Odd(b"loop/once.png", "in a folder with links to itself and upwards", file, SCENE),
        Odd(b"loop/self", "a link to its own folder", partial(os.symlink, b"."), passed_over="nothing"),
        Odd(b"loop/up", "a link to the folder above", partial(os.symlink, b".."), passed_over="nothing"),
        Odd(b"loop/round.png", "a link to itself", partial(os.symlink, b"round.png"), passed_over="broken link"),
        Odd(b"gone.jpg", "a link to nothing", partial(os.symlink, b"missing.jpg"), passed_over="broken link"),
        Odd(b"link.png", "a link to an image", partial(os.symlink, b"loop/once.png"), SCENE),
        Odd(b"hard-1.png", "hard links: every name counts, as labels come from names", file, SCENE),
        Odd(b"hard-2.png", "the same file again", second_name, SCENE),
        Odd(b".hidden.png", "a hidden name", file, passed_over="hidden"),
        Odd(b"pipe.jpg", "a pipe", os.mkfifo, passed_over="not a file"),
        unreadable("closed.png", data),
    ]


def second_name(path: bytes) -> None:
    os.link(path.replace(b"hard-2", b"hard-1"), path)


def unreadable(name: str, data: bytes) -> Odd:
    """A file that nobody may read; root does, and sees the picture."""

    def put(path: bytes) -> None:
        write(data, path)
        os.chmod(path, 0)

    outcome = {"picture": SCENE} if ROOT else {"reason": "cannot be read: permission denied"}
    return Odd(os.fsencode(name), "no permission to read it, for any but root", put, **outcome)


ODDS = [*depths(), *colours(), *shapes(), *no_pictures(), *places()]


def make(folder: Path) -> list[Odd]:
    """Make all of `ODDS` in `folder`, which is made if it is not there, and return them."""
    for odd in ODDS:
        path = os.fsencode(folder) + b"/" + odd.name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        odd.put(path)
    return ODDS


def met(odd: Odd, picture: np.ndarray | None, reason: str) -> bool:
    """Whether an outcome, a picture or the reason for which there is none, is the expected one."""
    if picture is None:
        return any(bool(wanted) and reason.startswith(wanted) for wanted in (odd.reason, odd.else_reason))
    if odd.picture is None or picture.shape != odd.picture.shape or picture.dtype != np.uint8:
        return False
    return int(np.abs(picture.astype(int) - odd.picture).max()) <= odd.within


def main(folder: Path) -> None:
    from sslpre.data import BadImage
    from sslpre.data.find import find, printable

    make(folder)
    source = find(folder).train
    rows = {source.name(i): i for i in range(len(source))}
    print("| file | what is odd | expected | what happened |\n|---|---|---|---|")
    for odd in ODDS:
        i = rows.get(printable(odd.name))
        happened, right = "not listed", bool(odd.passed_over)
        if i is not None:
            picture, reason = None, ""
            try:
                picture = source.read(i)
            except BadImage as error:
                reason = error.reason
            height, width = (0, 0) if picture is None else picture.shape[:2]
            right = met(odd, picture, reason)
            happened = f"skipped: {reason}" if picture is None else f"a picture, {height} x {width}"
        happened += "" if right else " **WRONG**"
        print(f"| `{printable(odd.name)}` | {odd.what} | {odd.expected} | {happened} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
