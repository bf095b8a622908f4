"""JPEGs by simplejpeg, canvases by torch's kernel: the same as Pillow's, and other threads run meanwhile."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin

from sslpre.data import BadImage
from sslpre.data import decode as room
from sslpre.data.decode import decode, decoder, to_canvas

simplejpeg = pytest.importorskip("simplejpeg")

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")
Outcome = tuple[np.ndarray | None, str]


def by_pillow(*_: object) -> None:
    """In place of `_jpeg`: Pillow decodes."""


def outcomes(path: Path) -> tuple[Outcome, Outcome]:
    """What `decode` makes of a file, and what it makes of it by Pillow alone: pixels or a reason."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for _ in range(2):
            try:
                found.append((decode(path, max_pixels=1_000_000), ""))
            except BadImage as error:
                found.append((None, error.reason))
            patch.setattr(room, "_jpeg", by_pillow)
    return found[0], found[1]


def textured(h: int, w: int, seed: int) -> np.ndarray:
    """Waves, edges and noise in all channels: no block of a JPEG is flat."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:h, 0:w] / rng.uniform(5, 40)
    waves = np.stack([np.sin(2 * x + y), np.cos(3 * y), np.sin(x * y)], 2) * 100 + 127
    waves[np.hypot(y - 1, x - 1) < 1] = rng.uniform(0, 255, 3)
    return (waves + rng.normal(0, rng.choice([0, 8, 50]), (h, w, 3))).clip(0, 255).astype(np.uint8)


@st.composite
def jpegs(draw: st.DrawFn) -> bytes:
    """A JPEG file: any size, quality, subsampling, of one scan or many, with restarts, grey, turned, by Adobe."""
    h, w = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)) | st.sampled_from([(8, 16), (300, 200), (1, 400)]))
    image = Image.fromarray(textured(h, w, draw(st.integers(0, 99))))
    options: dict[str, Any] = {"quality": draw(st.integers(1, 100))}
    options["progressive"] = h < 300 and draw(st.booleans())  # else Pillow's buffer may be too small to write it
    kind = draw(st.sampled_from(["colour", "colour", "colour", "RGB", "grey"]))
    if kind == "grey":
        image = image.convert("L")
    elif kind == "RGB":
        options["keep_rgb"] = True
    else:
        options["subsampling"] = draw(st.integers(0, 2))
    if turn := draw(st.integers(0, 8)):
        options["exif"] = image.getexif()
        options["exif"][274] = turn
    if draw(st.booleans()):
        options["restart_marker_blocks"] = draw(st.integers(1, 9))
    data = io.BytesIO()
    image.save(data, "JPEG", **options)
    whole = data.getvalue()
    if draw(st.integers(0, 4)) == 0:
        transform = draw(st.integers(0, 2))  # RGB, YCbCr, YCCK
        whole = whole[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform]) + whole[2:]
    return whole + draw(st.sampled_from([b"", b"", b"\0", b"more behind the end"]))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=jpegs())
def test_a_whole_jpeg_has_the_pixels_of_pillow(tmp_path, data):
    (tmp_path / "a.jpg").write_bytes(data)
    ours, pillows = outcomes(tmp_path / "a.jpg")
    assert pillows[0] is not None
    assert ours[0] is not None
    assert ours[0].dtype == np.uint8
    assert ours[0].flags.c_contiguous
    assert np.array_equal(ours[0], pillows[0])


@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=jpegs(),
    changes=st.lists(
        st.tuples(
            st.floats(0, 1, exclude_max=True), st.sampled_from(["set", "flip", "drop", "add"]), st.binary(max_size=12)
        ),
        max_size=5,
    ),
    early=st.booleans(),
    cut=st.none() | st.none() | st.floats(0, 1),
)
def test_of_a_damaged_jpeg_pillow_is_the_judge(tmp_path, data, changes, early, cut):
    """What Pillow refuses never comes through, for the same reason; what it takes comes through with its pixels."""
    damaged = bytearray(data)
    for where, how, more in changes:
        at = 3 + int(where * (min(700, len(damaged)) - 3 if early else len(damaged) - 3))
        if how == "add":
            damaged[at:at] = more
        elif how == "drop":
            del damaged[at : at + len(more)]
        elif at < len(damaged) and more:
            damaged[at] = more[0] if how == "set" else damaged[at] ^ (1 << more[0] % 8)
    (tmp_path / "a.jpg").write_bytes(damaged if cut is None else damaged[: int(cut * len(damaged))])
    ours, pillows = outcomes(tmp_path / "a.jpg")
    assert ours[1] == pillows[1]
    assert (ours[0] is None) == (pillows[0] is None)
    assert ours[0] is None or np.array_equal(ours[0], pillows[0])


@pytest.fixture
def photo(tmp_path) -> Callable[..., Path]:
    def save(mode: str = "RGB", shape: tuple[int, int] = (60, 80), **options: object) -> Path:
        path = tmp_path / f"{mode}.jpg"
        Image.fromarray(textured(*shape, 5)).convert(mode).save(path, **options)
        return path

    return save


def test_which_jpegs_are_not_left_to_pillow(photo, monkeypatch):
    wanted = {(mode, side): decode(photo(mode), side) for mode in ("RGB", "L") for side in (None, 31, 9)}
    assert wanted["RGB", 9].shape == (30, 40, 3)
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", None)
    for (mode, side), pixels in wanted.items():
        assert np.array_equal(decode(photo(mode), side), pixels)
    with pytest.raises(TypeError):
        decode(photo("CMYK"))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("shape", [(400, 536), (404, 532), (402, 534), (536, 400)])
@pytest.mark.parametrize("side", [25, 50, 100])
def test_a_fraction_has_the_pixels_of_pillow(photo, monkeypatch, mode, subsampling, shape, side):
    path = photo(mode, shape, subsampling=subsampling)
    ours = decode(path, side)
    monkeypatch.setattr(room, "_jpeg", by_pillow)
    assert np.array_equal(ours, decode(path, side))


def test_without_simplejpeg(photo, monkeypatch):
    expected = decode(photo()), decode(photo(), 9)
    assert f"simplejpeg {simplejpeg.__version__}" in decoder()
    monkeypatch.setattr(room, "simplejpeg", None)
    assert np.array_equal(decode(photo()), expected[0])
    assert np.array_equal(decode(photo(), 9), expected[1])
    assert "simplejpeg" not in decoder()


def test_an_odd_jpeg_prints_nothing(tmp_path, photo, child):
    """One that can be read all the same; libjpeg's own way is a line on stderr, across a progress bar."""
    data = photo().read_bytes()
    (tmp_path / "odd.jpg").write_bytes(data[:-2] + b"\0" * 7 + data[-2:])
    code = "import sys\nfrom sslpre.data.decode import decode\nassert decode(sys.argv[1]).shape == (60, 80, 3)"
    command = [sys.executable, "-c", code, tmp_path / "odd.jpg"]
    done = subprocess.run(command, env=child, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_another_size_than_the_header_s_is_not_taken(photo, monkeypatch):
    """The pixel limit is held to the header, so a decoder that finds another size is not believed."""
    expected = decode(photo())
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: np.zeros((60, 79, 3), np.uint8))
    assert np.array_equal(decode(photo()), expected)


def test_the_pixel_limit_comes_first(photo, monkeypatch):
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    with pytest.raises(BadImage, match="the limit is"):
        decode(photo(), max_pixels=4799)


def test_a_large_file_is_not_read_in_one_go(photo, monkeypatch):
    expected = decode(photo())
    monkeypatch.setattr(room, "IN_MEMORY", 100)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    assert np.array_equal(decode(photo()), expected)


# ---------------------------------------------------------------- canvas


@settings(max_examples=300, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)) | st.sampled_from([(1, 5000), (5000, 1), (1, 1)]),
    side=st.integers(1, 300),
    seed=st.integers(0, 99),
    hard=st.booleans(),
)
@example(shape=(192, 96), side=176, seed=0, hard=False)
def test_canvas_is_within_a_level_or_two_of_pillow(shape, side, seed, hard):
    image = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = image // 128 * 255 if hard else image
    canvas = to_canvas(image, side)
    pillows = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
    assert canvas.shape == (side, side, 3)
    assert canvas.dtype == np.uint8
    assert canvas.flags.c_contiguous
    assert canvas.flags.writeable
    apart = np.abs(canvas.astype(int) - pillows)
    assert apart.max() <= 2  # it rounds twice, after rows and after columns, and both may part
    assert (apart > 1).sum() <= 1, "2 of 137 million values were in 1,500 images of noise"


def test_canvas_of_an_array_that_lies_oddly():
    image = textured(50, 70, 0)
    expected = to_canvas(image, 20)
    read_only = image.copy()
    read_only.flags.writeable = False
    apart = np.repeat(image, 2, axis=1)[:, ::2]
    backwards = np.ascontiguousarray(image[::-1])[::-1]
    for same in (read_only, apart, backwards):
        assert np.array_equal(to_canvas(same, 20), expected)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio in dB."""
    return float(10 * np.log10(255**2 / max(1e-9, ((a.astype(float) - b) ** 2).mean())))


def scenery(h: int, w: int, seed: int) -> np.ndarray:
    """Noise with the 1/f spectrum of natural photos (Field 1987), its channels alike, behind discs with hard edges."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w))
    frequency[0, 0] = 1
    spectra = np.fft.rfft2(rng.normal(size=(4, h, w))) / frequency**1.2
    common, *own = (field / field.std() for field in np.fft.irfft2(spectra, (h, w)))
    pixels = 127 + 45 * np.stack([common + 0.4 * field for field in own], 2)
    y, x = np.mgrid[0:h, 0:w]
    for _ in range(12):
        disc = np.hypot(y - rng.uniform(0, h), x - rng.uniform(0, w)) < rng.uniform(0.05, 0.25) * h
        pixels[disc] = 0.3 * pixels[disc] + 0.7 * rng.uniform(0, 255, 3)
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("fraction", [2, 4, 8])
def test_a_fraction_keeps_45_db(tmp_path, fraction, subsampling):
    """At the smallest fraction that is ever taken, the canvas from it against the canvas from the whole."""
    path, found = tmp_path / "a.jpg", []
    for seed in range(5):
        Image.fromarray(scenery(480, 640, seed)).save(path, quality=90, subsampling=subsampling)
        side = 480 // fraction // 2
        part = decode(path, side)
        assert part.shape == (480 // fraction, 640 // fraction, 3)
        found.append(psnr(to_canvas(part, side), to_canvas(decode(path), side)))
    assert np.median(found) >= 45, found


@pytest.mark.data
@pytest.mark.parametrize("fraction", [2, 4, 8])
def test_a_fraction_keeps_45_db_of_photos(real_data, tmp_path, fraction):
    found = []
    for photo in sorted((real_data / "clothing_small" / "train").rglob("*.jpg"))[::30]:
        whole = decode(photo)
        h, w = (length // 8 * 8 for length in whole.shape[:2])
        Image.fromarray(whole[:h, :w]).save(tmp_path / "a.jpg", quality=92)
        side = min(h, w) // fraction // 2
        part = decode(tmp_path / "a.jpg", side)
        assert part.shape[:2] == (h // fraction, w // fraction)
        found.append(psnr(to_canvas(part, side), to_canvas(decode(tmp_path / "a.jpg"), side)))
    assert len(found) > 20
    assert np.median(found) >= 45


# ---------------------------------------------------------------- threads, versions


def test_other_threads_run_meanwhile(photo):
    """Both halves of the work release the interpreter's lock; found by a thread that can run only then."""
    path = photo(shape=(2500, 2500))
    file = io.BytesIO(path.read_bytes())
    header = JpegImagePlugin.JpegImageFile(file)
    whole = decode(path)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # seconds: the lock changes hands only where it is given away
    try:
        for work in (lambda: room._jpeg(header, file, 2500, 2500), lambda: to_canvas(whole, 1000)):
            ready, go, ran = threading.Event(), threading.Event(), threading.Event()

            def wait(ready=ready, go=go, ran=ran) -> None:
                ready.set()
                go.wait()
                ran.set()

            thread = threading.Thread(target=wait)
            thread.start()
            ready.wait()
            go.set()
            tries = 0
            while not ran.is_set() and tries < 20:  # on a busy machine no core may be free for it at first
                assert work() is not None
                tries += 1
            ran_meanwhile = ran.is_set()
            thread.join()
            assert ran_meanwhile
    finally:
        sys.setswitchinterval(before)


@pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="torch's kernel is another one there")
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_a_worker_starts_no_threads(photo, child):
    """Torch's own threads, one team for each worker, would only take the cores from each other."""
    code = (
        "import os, sys, threading, torch\nfrom sslpre.data.decode import decode, to_canvas\n"
        "torch.set_num_threads(4)\nnow = lambda: len(os.listdir('/proc/self/task'))\ncounts = []\n"
        "def work():\n    counts.append(now())\n    for side in (300, 700):\n"
        "        to_canvas(decode(sys.argv[1]), side)\n    counts.append(now())\n"
        "thread = threading.Thread(target=work)\nthread.start()\nthread.join()\nprint(counts[1] - counts[0])"
    )
    path = photo(shape=(1000, 1500))
    environment = {**child, "OMP_NUM_THREADS": "4"}
    done = subprocess.run([sys.executable, "-c", code, path], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr


def test_decoder_names_every_version():
    line = decoder()
    assert len(line.splitlines()) == 1
    for maker, name in ((PIL, "pillow"), (torch, "torch"), (simplejpeg, "simplejpeg")):
        assert f"{name} {maker.__version__}" in line
    assert line.startswith(f"decoding {room.REVISION}, ")  # not our version: most of those change no pixel
    assert "libjpeg" in line
