"""Damaged image files by the thousand: each must decode, or be refused with a reason, in bounded memory and time.

    python tests/benchmarks/fuzz.py [--files 50000] [--seed 0] [--keep DIR] [--json FILE]

Whole files of every kind that is read (JPEG, PNG, WebP, BMP, GIF, TIFF; grey, palette, transparent, 16 bits, floats,
several pages) are changed: bytes flipped, cut, doubled, numbers in headers made huge, another's beginning put on.
Anything but an array or BadImage is a finding, and so is a file that takes ten seconds, or 2 GiB in all; findings are
kept in DIR.
"""

from __future__ import annotations

import argparse
import collections
import io
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import ledger
import numpy as np
from PIL import Image

from sslpre.data import BadImage
from sslpre.data.decode import decode, header_grey, header_size

SLOW, LARGE = 10.0, 2 << 30  # seconds, bytes
MAX_PIXELS = 4_000_000
HUGE = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def seeds() -> dict[str, bytes]:
    """One whole file of each kind."""
    made = np.random.default_rng(0)
    colour = Image.fromarray(made.integers(0, 255, (37, 53, 3), dtype=np.uint8))
    grey, alpha = colour.convert("L"), colour.convert("RGBA")
    wide = Image.fromarray(made.integers(0, 65535, (37, 53), dtype=np.uint16))
    floats = Image.fromarray(made.random((37, 53), dtype=np.float32))
    kinds = {
        "jpeg": (colour, "jpeg", {}), "progressive": (colour, "jpeg", {"progressive": True}),
        "cmyk": (colour.convert("CMYK"), "jpeg", {}), "grey": (grey, "jpeg", {}), "png": (colour, "png", {}),
        "palette": (colour.quantize(16), "png", {}), "alpha": (alpha, "png", {}), "png16": (wide, "png", {}),
        "webp": (colour, "webp", {}), "webp-alpha": (alpha, "webp", {"lossless": True}), "bmp": (colour, "bmp", {}),
        "gif": (colour.quantize(16), "gif", {}), "tiff": (colour, "tiff", {}), "tiff16": (wide, "tiff", {}),
        "float": (floats, "tiff", {}), "lzw": (colour, "tiff", {"compression": "tiff_lzw"}),
        "jpeg-in-tiff": (colour, "tiff", {"compression": "jpeg"}),
        "bits": (grey.convert("1"), "tiff", {"compression": "group4"}),
    }  # fmt: skip
    found = {}
    for name, (image, kind, more) in kinds.items():
        file = io.BytesIO()
        image.save(file, kind, **more)
        found[name] = file.getvalue()
    pages = io.BytesIO()
    first, second = colour.copy(), Image.fromarray(np.asarray(grey))  # saving leaves an encoder's settings in an image
    first.save(pages, "tiff", save_all=True, append_images=[second, first.copy()])
    return found | {"pages": pages.getvalue()}


def damaged(whole: dict[str, bytes], chance: random.Random) -> bytes:
    """One of them with one to eight mishaps."""
    data = bytearray(whole[chance.choice(sorted(whole))])
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(data)) if data else 0
        early = min(len(data), chance.choice((16, 64, 256, 1024)))
        kind = chance.randrange(8)
        if kind == 0 and data:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2 and early > 4:
            size = chance.choice((1, 2, 4))
            place = chance.randrange(early - size)
            number = chance.choice(HUGE) & ((1 << 8 * size) - 1)
            data[place : place + size] = number.to_bytes(size, chance.choice(("big", "little")))
        elif kind == 3:
            data[at:at] = data[at : at + chance.randrange(1, 64)]
        elif kind == 4:
            data[at:at] = chance.randbytes(chance.randrange(1, 64))
        elif kind == 5:
            del data[at : at + chance.randrange(1, 64)]
        elif kind == 6:
            other = whole[chance.choice(sorted(whole))]
            data[: chance.choice((2, 8, 32))] = other[: chance.choice((2, 8, 32))]
        else:
            data[at : at + 4] = struct.pack(chance.choice(("<I", ">I")), chance.getrandbits(32))
    return bytes(data)


def files(count: int, seed: int) -> Iterator[bytes]:
    whole, chance = seeds(), random.Random(seed)
    for _ in range(count):
        yield damaged(whole, chance)


def meets(path: Path) -> str:
    """What comes of one file: `decoded`, `refused`, or what was wrong about it."""
    begun = time.monotonic()
    outcome = "decoded"
    for read in (decode, header_size, header_grey):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = read(path, max_pixels=MAX_PIXELS)
            if read is decode and not (found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3):
                return f"decoded to {found.dtype} {found.shape}"
        except BadImage as error:
            outcome = "refused" if read is decode else outcome
            if not error.reason:
                return f"refused without a reason by {read.__name__}"
        except Exception as error:
            return f"{type(error).__name__} from {read.__name__}: {error}"
    spent = time.monotonic() - begun
    return outcome if spent < SLOW else f"took {spent:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="sslpre-fuzz-") as folder:
        path = Path(folder) / "image"
        for number, data in enumerate(files(arguments.files, arguments.seed)):
            path.write_bytes(data)
            what = meets(path)
            counts[what] += 1
            if what not in ("decoded", "refused"):
                print(f"{number}: {what}", file=sys.stderr)
                if arguments.keep:
                    arguments.keep.mkdir(parents=True, exist_ok=True)
                    (arguments.keep / f"{arguments.seed}-{number}").write_bytes(data)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    ledger.show("damaged files", ("outcome", "files"), counts.most_common())
    print(f"\n{time.monotonic() - begun:.0f} s, memory grew by {grown / 2**20:.0f} MiB")
    measured = {"outcomes": dict(counts), "grown_bytes": grown, "seconds": time.monotonic() - begun}
    ledger.write(arguments.json, ledger.record("fuzz", measured, ("pillow", "simplejpeg", "numpy")))
    if set(counts) - {"decoded", "refused"} or grown > LARGE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
