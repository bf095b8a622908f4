"""Golden files of every kind, made here: their pixels, and what is said of files that are not whole images."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from sslpre.data import BadImage
from sslpre.data.decode import decode, header_grey, header_size, to_canvas

# Pillow's remarks on damaged metadata; outside pytest, which resets the filters, sslpre.data.decode silences them
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")


@pytest.fixture
def write(tmp_path: Path):
    def save(image: Image.Image | np.ndarray, name: str, **options: object) -> Path:
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return save


def noise(h: int, w: int, *more: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, *more), dtype=np.uint8)


def smooth(h: int, w: int) -> np.ndarray:
    y, x = np.mgrid[0 : 1 : h * 1j, 0 : 1 : w * 1j]
    return np.stack([255 * x, 255 * y, 127 * (1 + x - y)], 2).astype(np.uint8)


def png(width: int, height: int, depth: int, kind: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG file from its parts; `rows` with their filter bytes."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)), *extra]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def bad(path: Path, **options: object) -> str:
    with pytest.raises(BadImage) as caught:
        decode(path, **options)
    assert "\n" not in caught.value.reason and caught.value.reason
    return caught.value.reason


# ---------------------------------------------------------------- colour


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp", "a.TIFF", "a.gif", "a.jpg"])
def test_rgb_survives_every_format(write, name):
    image = noise(21, 34, 3) if "jpg" not in name else smooth(21, 34)
    options = {"webp": {"lossless": True}, "jpg": {"quality": 95, "subsampling": 0}}.get(name[2:], {})
    if name == "a.gif":
        image = image // 128 * 255  # eight colours, which a palette holds exactly
    pixels = decode(write(image, name, **options))
    assert pixels.dtype == np.uint8 and pixels.shape == (21, 34, 3)
    assert np.abs(pixels.astype(int) - image).max() <= (6 if name == "a.jpg" else 0)


@pytest.mark.parametrize("name", ["g.png", "g.jpg", "g.tif", "g.bmp", "g.webp", "g.gif"])
def test_grey_is_repeated(write, name):
    grey = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (40, 1))
    pixels = decode(write(grey, name, **({"lossless": True} if "webp" in name else {"quality": 95})))
    assert np.abs(pixels - grey[:, :, None].astype(int)).max() <= (2 if "jpg" in name else 0)


def test_one_bit(write):
    mask = noise(9, 13) > 127
    for name in ("m.png", "m.tif", "m.bmp"):
        assert np.array_equal(decode(write(Image.fromarray(mask), name)), np.repeat(mask[:, :, None] * 255, 3, 2))


RAMP = np.array([[0, 1, 128, 129, 257, 32767, 32768, 65278, 65535, 65535]], np.uint16)
RAMP8 = np.rint(RAMP[0] / 65535 * 255)


@pytest.mark.parametrize("name", ["r.png", "r.tif"])
def test_16_bit_grey_is_scaled_by_its_range(write, name):
    pixels = decode(write(RAMP, name))
    assert np.array_equal(pixels, np.repeat(RAMP8[None, :, None], 3, 2))


def test_16_bit_ramp_is_not_clipped(write):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = decode(write(ramp, "ramp.png"))[..., 0]
    assert np.array_equal(np.bincount(pixels.ravel(), minlength=256)[1:-1], np.full(254, 257))
    assert (pixels == 255).sum() < 200  # `convert("RGB")` makes 99.6 % of it white


def test_16_bit_big_endian_tiff(write, tmp_path):
    image = Image.frombytes("I;16B", (10, 1), RAMP.astype(">u2").tobytes())
    assert np.array_equal(decode(write(image, "be.tif"))[0, :, 0], RAMP8)


def test_16_bit_white_is_zero_tiff(write):
    path = write(RAMP, "wz.tif", tiffinfo={262: 0})
    stored = Image.open(path).tag_v2[262]
    assert np.array_equal(decode(path)[0, :, 0], 255 - RAMP8 if stored == 0 else RAMP8)


def test_16_bit_grey_with_a_transparent_value(write):
    path = write(RAMP, "key.png", transparency=257)
    assert decode(path)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 127, 128, 254, 255, 255]


@pytest.mark.parametrize("kind, channels", [(2, 3), (6, 4), (4, 2)])
def test_16_bit_colour_png_is_scaled(tmp_path, kind, channels):
    values = np.array([0, 256, 32768, 65535], np.uint16)
    row = np.repeat(values[:, None], channels, 1)
    if channels in (2, 4):
        row[:, -1] = 65535
    (tmp_path / "c.png").write_bytes(png(4, 1, 16, kind, b"\0" + row.astype(">u2").tobytes()))
    assert np.abs(decode(tmp_path / "c.png")[0].astype(int) - np.array([[0], [1], [128], [255]])).max() <= 1


def test_16_bit_colour_key_png(tmp_path):
    rows = b"\0" + np.array([[65535, 512, 256], [7, 7, 7]], ">u2").tobytes()
    (tmp_path / "k.png").write_bytes(png(2, 1, 16, 2, rows, (b"tRNS", struct.pack(">3H", 65535, 512, 256))))
    assert decode(tmp_path / "k.png").tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("dtype, values, expected", [
    (np.float32, [0, 0.25, 1], [0, 64, 255]),  # already [0, 1]
    (np.float32, [0, 100.4, 255], [0, 100, 255]),  # already [0, 255]
    (np.float32, [-10, 0, 90], [0, 26, 255]),
    (np.float32, [1000, 1000, 1000], [0, 0, 0]),
    (np.int32, [-2000000000, 0, 2000000000], [0, 128, 255]),
    (np.int32, [0, 3, 200], [0, 3, 200]),
    (np.int32, [70000, 71000, 72000], [0, 128, 255]),
])  # fmt: skip
def test_32_bit_values(write, dtype, values, expected):
    assert decode(write(np.array([values], dtype), "v.tif"))[0, :, 0].tolist() == expected


def tiff(pixels: np.ndarray, order: str = "<", **tags: list[int]) -> bytes:
    """An uncompressed TIFF of 16-bit planes [c, h, w], in strips of two rows; `tags` such as `t262=[0]` replace."""
    channels, h, w = pixels.shape
    strips = [plane[y : y + 2].astype(order + "u2").tobytes() for plane in pixels for y in range(0, h, 2)]
    starts = np.cumsum([8, *map(len, strips)]).tolist()
    entries = {
        256: [w],
        257: [h],
        258: [16] * channels,
        259: [1],
        262: [2],
        273: starts[:-1],
        277: [channels],
        278: [2],
    }
    entries |= {279: [len(strip) for strip in strips], 284: [2], **{int(key[1:]): tags[key] for key in tags}}
    behind, fields, more = starts[-1] + 6 + 12 * len(entries), b"", b""
    for tag, values in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}{'I' if tag in (273, 279) else 'H'}", *values)
        if len(packed) > 4:
            packed, more = struct.pack(order + "I", behind + len(more)), more + packed
        fields += struct.pack(order + "HHI", tag, 4 if tag in (273, 279) else 3, len(values)) + packed.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, starts[-1])
    return head + b"".join(strips) + struct.pack(order + "H", len(entries)) + fields + bytes(4) + more


@pytest.mark.parametrize("order", "<>")
def test_16_bit_planes_one_after_another(tmp_path, order):
    """Pillow takes them for 8 bits and says nothing."""
    path, pixels = tmp_path / "p.tif", np.random.default_rng(0).integers(0, 65536, (3, 7, 5), dtype=np.uint16)
    expected = np.rint(pixels.transpose(1, 2, 0) / 65535 * 255)
    path.write_bytes(tiff(pixels, order))
    assert np.array_equal(decode(path), expected)
    path.write_bytes(tiff(pixels, order, t274=[6]))
    assert np.array_equal(decode(path), np.rot90(expected, -1))
    assert header_size(path) == (5, 7)
    path.write_bytes(tiff(pixels, order, t274=[9]))
    assert np.array_equal(decode(path), expected)
    for size in (17, 20):
        path.write_bytes(tiff(pixels, order, t279=[size] * 12))
        assert bad(path) == "damaged: its strips hold more or fewer pixels than its header says"
    path.write_bytes(tiff(pixels, order, t273=[*range(8, 228, 20), 10_000]))
    assert bad(path) == "truncated"
    for tags in ({"t262": [5]}, {"t258": [16, 16, 12]}):
        path.write_bytes(tiff(pixels, order, **tags))
        assert bad(path).startswith("of a kind that Pillow does not read"), tags


def test_signed_8_bit_tiff(tmp_path, write):
    values = np.array([[-128, -1, 0, 127]], np.int8)
    path = write(values.view(np.uint8), "s.tif", tiffinfo={339: 2})
    assert decode(path)[0, :, 0].tolist() == [0, 127, 128, 255]
    path = write(np.array([[0, 1, 127]], np.uint8), "s.tif", tiffinfo={339: 2})
    assert decode(path)[0, :, 0].tolist() == [0, 1, 127]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_float_that_is_no_number(write, value):
    assert "finite" in bad(write(np.array([[0.5, value, 1.0]], np.float32), "nan.tif"))


def test_palette(write):
    indices = noise(8, 8) % 4
    palette = np.array([[255, 0, 0], [0, 200, 0], [10, 20, 250], [9, 9, 9]], np.uint8)
    image = Image.fromarray(indices).convert("L")
    image = Image.frombytes("P", (8, 8), indices.tobytes())
    image.putpalette(palette.tobytes())
    for name in ("p.png", "p.gif", "p.bmp", "p.tif"):
        assert np.array_equal(decode(write(image, name)), palette[indices]), name
    clear = palette[indices].copy()
    clear[indices == 2] = 255
    for name in ("t.png", "t.gif"):
        assert np.array_equal(decode(write(image, name, transparency=2)), clear), name
    half = decode(write(image, "h.png", transparency=bytes([255, 255, 128, 255])))
    expected = palette[2] * (128 / 255) + 127
    assert np.abs(half[indices == 2].astype(int) - expected).max() <= 1
    assert np.array_equal(half[indices != 2], palette[indices[indices != 2]])


@pytest.mark.parametrize(
    "mode, name", [("RGBA", "a.png"), ("RGBA", "a.webp"), ("RGBA", "a.tif"), ("LA", "l.png"), ("LA", "l.tif")]
)
def test_alpha_is_composited_on_white(write, mode, name):
    values = noise(16, 16, len(mode))
    values[0, 0, -1], values[0, 1, -1] = 0, 255
    pixels = decode(
        write(Image.fromarray(values, mode), name, **({"lossless": True, "exact": True} if "webp" in name else {}))
    )
    alpha = values[..., -1:] / 255
    colour = values[..., :-1] * np.ones((1, 1, 3))
    assert np.abs(pixels - (colour * alpha + 255 * (1 - alpha))).max() <= 1.01
    assert pixels[0, 0].tolist() == [255] * 3


def test_colour_keys(write):
    rgb = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    assert decode(write(rgb, "k.png", transparency=(1, 2, 3))).tolist() == [[[255] * 3, [4, 5, 6]]]
    grey = np.array([[7, 8]], np.uint8)
    assert decode(write(grey, "k1.png", transparency=7))[..., 0].tolist() == [[255, 8]]


COLOURS = np.array([[200, 50, 100], [255, 255, 255], [0, 0, 0], [20, 180, 240]], np.uint8)


@pytest.mark.parametrize("name", ["c.jpg", "c.tif"])
def test_cmyk(write, name):
    image = np.repeat(np.repeat(COLOURS[None], 16, 0), 16, 1)
    pixels = decode(write(Image.fromarray(image).convert("CMYK"), name, quality=100))
    assert np.abs(pixels.astype(int) - image).max() <= (4 if name == "c.jpg" else 0)


def test_ycck_jpeg(tmp_path):
    """Adobe's own: CMY as YCbCr, all inverted. Made from a CMYK JPEG by saying so in its Adobe marker (transform 2)."""
    ink = Image.fromarray(255 - np.repeat(np.repeat(COLOURS[None], 16, 0), 16, 1)).convert("YCbCr")
    planes = [*ink.split(), Image.new("L", ink.size, 255)]
    data = io.BytesIO()
    Image.merge("CMYK", [plane.point(lambda v: 255 - v) for plane in planes]).save(data, "JPEG", quality=100)
    raw = bytearray(data.getvalue())
    raw[raw.index(b"Adobe") + 11] = 2
    (tmp_path / "y.jpg").write_bytes(raw)
    assert np.abs(decode(tmp_path / "y.jpg")[8, 8::16].astype(int) - COLOURS).max() <= 4


# ---------------------------------------------------------------- geometry


def lying(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The stored array, by the EXIF standard's table: which side of the scene row 0 and column 0 are."""
    h, w = upright.shape[:2]
    rows, columns = (h, w) if orientation < 5 else (w, h)
    r, c = np.mgrid[0:rows, 0:columns]
    top, bottom, left, right = (lambda k: k), (lambda k: h - 1 - k), (lambda k: k), (lambda k: w - 1 - k)
    sides = {1: (top, left), 2: (top, right), 3: (bottom, right), 4: (bottom, left)}
    turned = {5: (left, top), 6: (right, top), 7: (right, bottom), 8: (left, bottom)}
    if orientation < 5:
        row, column = sides[orientation]
        return upright[row(r), column(c)]
    row, column = turned[orientation]
    return upright[column(c), row(r)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["o.png", "o.webp", "o.tif", "o.jpg"])
def test_exif_orientation(write, name, orientation):
    upright = smooth(32, 48)
    exif = Image.Exif()
    exif[274] = orientation
    options = {"o.webp": {"lossless": True}, "o.jpg": {"quality": 95, "subsampling": 0}}.get(name, {})
    path = write(np.ascontiguousarray(lying(upright, orientation)), name, exif=exif, **options)
    pixels = decode(path)
    assert pixels.shape == (32, 48, 3) and header_size(path) == (32, 48)
    assert np.abs(pixels.astype(int) - upright).max() <= (8 if name == "o.jpg" else 0)


def test_exif_behind_the_pixels_of_a_png(tmp_path):
    """Some writers put the eXIf chunk last; the header's size and the pixels must still agree."""
    exif = Image.Exif()
    exif[274] = 6
    body = exif.tobytes()[6:]
    whole = png(2, 1, 8, 2, bytes([0, 1, 2, 3, 4, 5, 6]))
    late = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    (tmp_path / "late.png").write_bytes(whole[:-12] + late + whole[-12:])
    assert decode(tmp_path / "late.png").tolist() == [[[1, 2, 3]], [[4, 5, 6]]]
    assert header_size(tmp_path / "late.png") == (2, 1)


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0"])
def test_damaged_exif_does_not_cost_the_image(write, exif):
    assert decode(write(smooth(8, 8), "e.jpg", exif=exif)).shape == (8, 8, 3)


def test_first_frame(write):
    frames = [np.full((6, 5, 3), value, np.uint8) for value in (255, 0, 128)]
    rest = [Image.fromarray(frame) for frame in frames[1:]]
    for name in ("f.gif", "f.tif", "f.webp", "f.png"):
        pixels = decode(
            write(frames[0], name, save_all=True, append_images=rest, **({"lossless": True} if "webp" in name else {}))
        )
        assert pixels.shape == (6, 5, 3) and (pixels == 255).all(), name


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_shapes(write, shape):
    path = write(np.full((*shape, 3), 77, np.uint8), "x.png")
    assert decode(path).shape == (*shape, 3) and header_size(path) == shape
    canvas = to_canvas(decode(path), 24)
    assert canvas.shape == (24, 24, 3) and (canvas == 77).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    ("shape", "side", "fraction"),
    [
        ((400, 536), 25, 8),
        ((400, 536), 26, 4),
        ((400, 536), 50, 4),
        ((400, 536), 51, 2),
        ((400, 536), 100, 2),
        ((400, 536), 101, 1),
        ((404, 532), 8, 4),  # 8 does not divide it
        ((402, 532), 8, 2),
        ((400, 533), 8, 1),
        ((533, 400), 8, 1),
    ],
)
def test_a_fraction_of_a_jpeg(write, mode, shape, side, fraction):
    path = write(Image.fromarray(smooth(*shape)).convert(mode), "d.jpg", quality=95)
    full, part = decode(path), decode(path, side)
    assert header_size(path) == full.shape[:2] == shape
    assert part.shape[:2] == (shape[0] // fraction, shape[1] // fraction)
    assert min(part.shape[:2]) >= min(2 * side, *shape)
    assert np.abs(to_canvas(part, side).astype(int) - to_canvas(full, side)).max() <= 3


def test_canvas_is_antialiased_and_leaves_its_own_size_alone():
    image = noise(32, 32, 3)
    assert to_canvas(image, 32) is image
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = to_canvas(stripes, 16)[:, 1:-1]
    assert np.abs(small.astype(int) - 127.5).max() < 20  # without antialiasing it would be all black or all white
    assert to_canvas(smooth(40, 80), 20).shape == (20, 20, 3)


# ---------------------------------------------------------------- files that are no images


def samples() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[274], exif[271] = 6, "camera"
    rgb, files = Image.fromarray(noise(23, 31, 3)), {}
    frames = {"save_all": True, "append_images": [Image.fromarray(noise(23, 31, 3, seed=1))]}
    for kind, mode, options in [
        ("JPEG", "RGB", {"exif": exif}), ("JPEG", "L", {"progressive": True}), ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {"exif": exif}), ("PNG", "P", {"transparency": 3}), ("PNG", "LA", {}), ("PNG", "RGBA", frames),
        ("WEBP", "RGB", {"exif": exif}), ("WEBP", "RGBA", {"lossless": True}), ("BMP", "RGB", {}), ("BMP", "P", {}),
        ("GIF", "P", {"transparency": 3}), ("GIF", "RGB", frames), ("TIFF", "RGB", {"exif": exif}),
        ("TIFF", "CMYK", {"compression": "tiff_lzw"}), ("TIFF", "1", {}), ("TIFF", "F", {}), ("TIFF", "I", {}),
    ]:  # fmt: skip
        data = io.BytesIO()
        rgb.convert(mode).save(data, kind, **options)
        files[f"{kind} {mode} {sorted(options)}"] = data.getvalue()
    return files


SAMPLES = samples()


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_truncated_files(tmp_path, name, share):
    if "append_images" in name and share > 0.3:
        share = 0.3  # further on the first frame, which is all that counts, is whole
    whole = SAMPLES[name]
    path = tmp_path / "cut"
    path.write_bytes(whole)
    assert decode(path).shape[2] == 3
    path.write_bytes(whole[: int(len(whole) * share)])
    bad(path)


def test_truncated_jpeg_says_so(write):
    path = write(noise(200, 200, 3), "t.jpg")
    path.write_bytes(path.read_bytes()[:-3000])
    assert bad(path) == "truncated"


def test_a_palette_that_is_missing(tmp_path):
    (tmp_path / "p.png").write_bytes(png(2, 1, 8, 3, b"\0\1\2"))
    assert bad(tmp_path / "p.png").startswith("damaged")


@pytest.mark.parametrize("at", [20, 30, 100, 180])
def test_a_header_that_ends_early_is_truncated_and_not_nonsense(write, at):
    path = write(smooth(32, 48), "h.jpg", quality=95)
    path.write_bytes(path.read_bytes()[:at])
    assert bad(path) == "truncated"
    with pytest.raises(BadImage, match="truncated"):
        header_size(path)


def test_a_webp_is_held_to_the_length_that_it_gives(write):
    path = write(smooth(32, 48), "w.webp", lossless=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    assert bad(path) == "truncated"
    path.write_bytes(whole + b"more")
    assert np.array_equal(decode(path), smooth(32, 48))
    path.write_bytes(whole[:12] + bytes(len(whole) - 12))
    assert bad(path).startswith("damaged")


def test_what_pillow_logs_of_a_file_is_not_printed(tmp_path, run_python):
    """It is said as the reason; logging's last resort would print it a second time, across a progress bar."""
    data = tiff(np.zeros((3, 2, 2), np.uint16), t277=[99])
    (tmp_path / "many.tif").write_bytes(data)
    assert run_python(tmp_path / "many.tif") == ""


@pytest.fixture
def run_python(child):
    def run(path: Path) -> str:
        code = (
            "import sys\nfrom sslpre.data import BadImage\nfrom sslpre.data.decode import decode\n"
            "try:\n    decode(sys.argv[1])\nexcept BadImage as error:\n    assert error.reason\nelse:\n    sys.exit(1)"
        )
        done = subprocess.run([sys.executable, "-c", code, path], env=child, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run


GREYS, REDS = np.repeat(np.arange(64)[::-1, None] * 3, 3, 1).astype(np.uint8), np.array([[9, 0, 0]] * 64, np.uint8)


@pytest.mark.parametrize("name", ["p.png", "p.gif", "p.bmp", "p.tif"])
def test_grey_palettes_by_the_header(write, name, monkeypatch):
    image = Image.frombytes("P", (8, 8), np.arange(64, dtype=np.uint8).tobytes())
    for palette, grey in ((GREYS, True), (REDS, False)):
        image.putpalette(palette.tobytes())
        path = write(image, name)
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "load", None)  # the pixels stay where they are
            assert header_grey(path) is grey


@pytest.mark.parametrize("name", "1.png 1.tif 1.bmp L.png L.jpg L.tif L.bmp LA.png LA.tif I;16.png I.tif F.tif".split())
def test_grey_by_the_header(write, name):
    mode = name.split(".")[0]
    image = Image.fromarray(noise(8, 8))
    assert header_grey(write(image.convert("I").convert(mode) if mode[0] in "IF" else image.convert(mode), name))


@pytest.mark.parametrize("name", "RGB.png RGB.jpg RGB.webp RGB.gif CMYK.jpg CMYK.tif RGBA.png YCbCr.tif".split())
def test_colour_by_the_header(write, name):
    assert not header_grey(write(Image.fromarray(noise(8, 8, 3)).convert(name.split(".")[0]), name))


def test_grey_of_a_damaged_header(tmp_path):
    (tmp_path / "z.jpg").touch()
    with pytest.raises(BadImage, match="zero bytes"):
        header_grey(tmp_path / "z.jpg")


def test_what_is_said_of_other_files(tmp_path, write):
    (tmp_path / "zero.jpg").touch()
    assert bad(tmp_path / "zero.jpg") == "zero bytes"
    (tmp_path / "sound.webp").write_bytes(b"RIFF\x24\0\0\0WAVEfmt ")
    assert bad(tmp_path / "sound.webp").startswith("not a JPEG, PNG")
    (tmp_path / "text.png").write_text("<html>404</html>")
    assert bad(tmp_path / "text.png").startswith("not a JPEG, PNG")
    assert bad(tmp_path / "gone.jpg") == "the file has vanished"
    (tmp_path / "folder.jpg").mkdir()
    assert "is a directory" in bad(tmp_path / "folder.jpg")
    good = write(smooth(10, 10), "right.png")
    good.rename(tmp_path / "wrong.jpg")  # the contents count, not the extension
    assert np.array_equal(decode(tmp_path / "wrong.jpg"), smooth(10, 10))
    for name in ("e.eps", "e.pdf", "e.ppm", "e.tga", "e.ico", "e.jp2"):
        write(smooth(16, 16), name).rename(tmp_path / "other.jpg")
        assert bad(tmp_path / "other.jpg").startswith("not a JPEG"), name


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(write):
    path = write(smooth(4, 4), "p.png")
    path.chmod(0)
    assert bad(path) == "cannot be read: permission denied"


def test_no_permission_as_any_user(write, monkeypatch):
    path = write(smooth(4, 4), "p.png")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert bad(path) == "cannot be read: permission denied"


def test_out_of_file_handles_is_not_the_files_fault(write, monkeypatch):
    path = write(smooth(4, 4), "p.png")

    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        decode(path)


def test_pixel_limit_is_ours_and_checked_on_the_header(tmp_path, write):
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    (tmp_path / "bomb.png").write_bytes(png(30000, 30000, 8, 2, b""))
    assert bad(tmp_path / "bomb.png") == "30000 x 30000 is 900 megapixels, the limit is 200"
    with pytest.raises(BadImage, match="900 megapixels"):
        header_size(tmp_path / "bomb.png")
    (tmp_path / "large.png").write_bytes(png(30000, 30000, 8, 2, b""))
    assert header_size(tmp_path / "large.png", max_pixels=900_000_000) == (30000, 30000)  # above Pillow's own limit
    # 184 megapixels: above what Pillow refuses, below what we do; one bit each, so the test stays small
    (tmp_path / "wide.png").write_bytes(png(18_400, 10_000, 1, 0, (b"\0" + b"\xff" * 2300) * 10_000))
    assert header_size(tmp_path / "wide.png") == (10_000, 18_400)
    assert bad(write(smooth(10, 10), "s.png"), max_pixels=99)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(SAMPLES)),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12),
    early=st.booleans(),
    cut=st.none() | st.floats(0, 1),
    side=st.sampled_from([None, 3]),
)
def test_damaged_files_raise_only_bad_image(tmp_path, name, changes, early, cut, side):
    data = bytearray(SAMPLES[name])
    for where, value in changes:
        data[int(where * (min(200, len(data)) if early else len(data)))] = value
    path = tmp_path / "fuzz"
    path.write_bytes(data if cut is None else data[: int(cut * len(data))])
    try:
        pixels = decode(path, side, max_pixels=1_000_000)
    except BadImage as error:
        reason = error.reason
        assert len(reason.splitlines()) == 1
        return
    assert pixels.dtype == np.uint8
    assert pixels.shape[2:] == (3,)
    if side is None:
        assert header_size(path) == pixels.shape[:2]
    try:
        grey = header_grey(path, max_pixels=1_000_000)
    except BadImage:
        return  # a palette that is cut
    assert not grey or (pixels == pixels[:, :, :1]).all()


def test_threads_agree_with_one(tmp_path):
    paths = []
    for i, data in enumerate(SAMPLES.values()):
        (tmp_path / str(i)).write_bytes(data)
        paths.append(tmp_path / str(i))
    alone = [decode(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(decode, paths * 10))
    assert all(np.array_equal(a, b) for a, b in zip(together, alone * 10, strict=True))
