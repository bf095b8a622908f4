"""What is decoded once stays decoded, and no store, however empty, damaged or full, ever changes a pixel."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sslpre.data import BadImage, decode, packed, room, shared
from sslpre.data import store as stores
from sslpre.data.ferry import Ferry
from sslpre.data.find import find, subset
from sslpre.data.packed import PAGE, NotPossible, form_in, form_of, opened
from sslpre.data.rows import InRam, OnDevice, Store
from sslpre.data.store import file_of, open_store, pack, stored
from sslpre.data.stream import BadList, Pixels, Stream
from sslpre.errors import SslpreError

SIDE = 6
ROW = SIDE * SIDE * 3


class Drawn:
    """Image i is noise of its own, of 5 to 9 by 4 to 6 pixels; `bad` ones raise. What is read is noted in `asked`."""

    where, fingerprint = "memory", "00"

    def __init__(self, count: int, bad: object = (), written: str = "00"):
        self.count, self.bad, self.written = count, frozenset(bad), written
        self.labels, self.classes = np.full(count, -1), []
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"{i}.jpg"

    def read(self, i: int, side: int | None = None) -> np.ndarray:
        self.asked.append(i)
        if i in self.bad:
            raise BadImage("truncated")
        return np.random.default_rng(i).integers(0, 256, (*self.size(i), 3), dtype=np.uint8)

    def size(self, i: int) -> tuple[int, int]:
        return 5 + i % 5, 4 + i % 3

    def grey(self, i: int) -> bool:
        return False


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSLPRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def disk(cache: Path) -> Iterator[Callable[..., packed.Packed]]:
    """Opens the cache's file of a source; all are closed at the end."""
    there: list[packed.Packed] = []

    def open_disk(source: Drawn, **more: object) -> packed.Packed:
        store, _ = open_store("disk", source, SIDE, "cpu", reuse=True, **more)
        assert isinstance(store, packed.Packed)
        there.append(store)
        return store

    yield open_disk
    for store in there:
        store.close()


def quiet(source: Drawn) -> BadList:
    return BadList(None, 1.0, len(source), say=lambda line: None)


def stream(source: Drawn, store: Store | None = None, batch: int = 8, workers: int = 0) -> Stream:
    return Stream(
        source, side=SIDE, batch_size=batch, seed=3, workers=workers, device="cpu", bad=quiet(source), store=store
    )


def same(one: list[Pixels], other: list[Pixels]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.pixels, b.pixels) and torch.equal(a.size, b.size) and torch.equal(a.index, b.index)
        and a.pixels.stride() == b.pixels.stride() and a.size.dtype == b.size.dtype
        for a, b in zip(one, other, strict=True)
    )  # fmt: skip


def fill(store: Store, source: Drawn, rows: object) -> None:
    for i in rows:
        store.put(i, *stored(source, i, SIDE))


def right(store: Store, source: Drawn, i: int) -> bool | None:
    """Is row i what it should be? None where it is not there."""
    out = np.full((SIDE, SIDE, 3), 77, np.uint8)
    size = store.take(i, out)
    if size is None:
        return None
    pixels, wanted = stored(source, i, SIDE)
    return bool((out == pixels).all()) and size == wanted


# ---------------------------------------------------------------- no store changes a pixel


def every_kind(source: Drawn, folder: Path) -> list[Store | None]:
    form = form_of(source, SIDE)
    return [
        None,
        InRam(len(source), SIDE),
        OnDevice(len(source), SIDE, torch.device("cpu")),
        opened(folder / f"{form.key}{time.monotonic_ns()}", form, write=True, make=True),
    ]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), count=st.integers(1, 70), workers=st.sampled_from([0, 1, 3]))
def test_batches_are_the_same_with_every_store(tmp_path_factory, data, count, workers):
    bad = data.draw(st.sets(st.integers(0, count - 1), max_size=min(count - 1, 5)))
    source, size = Drawn(count, bad), data.draw(st.integers(1, count))
    before = data.draw(st.sets(st.integers(0, count - 1))) - bad
    first = data.draw(st.integers(0, count // size))
    last = first + data.draw(st.integers(0, 2 * (count // size)))
    wanted = None
    for store in every_kind(source, tmp_path_factory.mktemp("stores")):
        if store is not None:
            fill(store, source, before)
        run = stream(source, None, size, workers)
        run.keep(store)
        got = [list(run.steps(first, last)), list(run.in_order()), list(run.in_order()), list(run.epoch(7))]
        wanted = wanted or got
        assert all(same(a, b) for a, b in zip(wanted, got, strict=True)), store
        assert len(got[0]) == last - first
        if store is not None:
            assert store.held == count - len(bad)
            assert {i for i in range(count) if right(store, source, i) is None} == bad
            assert all(right(store, source, i) for i in range(count) if i not in bad)
            source.asked.clear()
            list(stream(source, store, size, workers).epoch(1))
            assert set(source.asked) <= bad  # nothing that is stored is read again
            store.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_stored_needs_no_file(tmp_path, workers):
    rng = np.random.default_rng(0)
    for i in range(30):
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(tmp_path / f"{i:02}.png")
    source = find(tmp_path).train
    plain = list(stream(source, None, 10, workers).epoch(1))
    ram, words = open_store("ram", source, SIDE, "cpu", reuse=True)
    assert words == "in RAM, 3.2 kB"
    run = stream(source, ram, 10, workers)
    list(run.epoch(0))
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert same(plain, list(run.epoch(1)))


def test_bad_images_are_told_alike_with_a_store():
    source, told = Drawn(50, {3, 4, 20, 49}), []
    for store in (None, InRam(50, SIDE), OnDevice(50, SIDE, torch.device("cpu"))):
        lines: list[str] = []
        bad = BadList(None, 1.0, 50, say=lines.append)
        run = Stream(source, side=SIDE, batch_size=10, seed=0, workers=2, device="cpu", bad=bad, store=store)
        list(run.epoch(0))
        told.append(list(lines))
        list(run.epoch(1))
        assert lines == told[-1]
        assert len(lines) == 4
        limited = BadList(None, 0.02, 50, say=lambda line: None)
        with pytest.raises(SslpreError, match="2 of 50"):
            list(Stream(
                source, side=SIDE, batch_size=10, seed=0, workers=2, device="cpu", bad=limited, store=store
            ).epoch(2))  # fmt: skip
    assert told[0] == told[1] == told[2]


def test_many_threads_fill_and_read_at_once(disk):
    source = Drawn(64)
    for store in (InRam(64, SIDE), disk(source)):

        def work(k: int, store: Store = store) -> list[bool | None]:
            seen = []
            for i in np.random.default_rng(k).permutation(64).tolist():
                seen.append(right(store, source, i))
                fill(store, source, [i])
                out = np.empty((1, SIDE, SIDE, 3), np.uint8)
                assert store.ready(np.array([i]))
                store.gather(np.array([i]), out)
                seen.append(bool((out[0] == stored(source, i, SIDE)[0]).all()))
            return seen

        with ThreadPoolExecutor(4) as pool:
            assert {one for seen in pool.map(work, range(4)) for one in seen} <= {True, None}
        assert store.held == 64


def test_the_device_keeps_rows_that_come_one_by_one():
    source, store = Drawn(9), OnDevice(9, SIDE, torch.device("cpu"))
    fill(store, source, [2, 5])
    assert [right(store, source, i) for i in (2, 5, 4)] == [True, True, None]
    assert [store.has(i) for i in (2, 4)] == [True, False]
    assert store.ready(np.array([5, 2, 2]))
    assert not store.ready(np.array([2, 4]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["device", "ram", "disk", "off"])
@pytest.mark.parametrize("workers", [0, 3])
def test_cuda_batches_are_the_same_with_every_store(kind, workers):
    source = Drawn(300, {5})
    wanted = list(stream(source, None, 32).steps(0, 40))
    store, _ = open_store(kind, source, SIDE, "cuda", reuse=True)
    run = Stream(
        source, side=SIDE, batch_size=32, seed=3, workers=workers, device="cuda", bad=quiet(source), store=store
    )
    work = torch.randn(2000, 2000, device="cuda")
    for one, other in zip(wanted, run.steps(0, 40), strict=True):
        work = (work @ work).clamp(-1, 1)  # the batches arrive beside a computation
        assert other.pixels.is_contiguous(memory_format=torch.channels_last)
        doubled = other.pixels.int() * 2
        assert torch.equal(one.pixels.int() * 2, doubled.cpu())
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.size, other.size)
    if store is not None:
        store.close()


def test_a_bad_image_is_decoded_once():
    told = []
    for workers in (0, 2):
        source, lines = Drawn(30, {3, 4, 29}), list[str]()
        bad = BadList(None, 1.0, 30, say=lines.append)
        run = Stream(source, side=SIDE, batch_size=10, seed=0, workers=workers, device="cpu", bad=bad)
        first, again = list(run.epoch(4)), list(run.epoch(4))
        assert same(first, again)
        assert [source.asked.count(i) for i in (3, 4, 29)] == [1, 1, 1] or workers
        before = len(source.asked)
        list(run.epoch(5))
        assert not {3, 4, 29} & set(source.asked[before:])
        assert len(lines) == 3
        told.append([line.split(" bad")[0] for line in lines])
        limited = BadList(None, 0.04, 30, say=lambda line: None)
        run.bad = limited
        with pytest.raises(SslpreError, match="2 of 30"):
            list(run.epoch(4))
    assert told[0] == told[1]


def test_only_fresh_rows_go_to_the_device(monkeypatch):
    source, store, copied = Drawn(40, {7}), OnDevice(40, SIDE, torch.device("cpu")), []
    copy = Ferry._copy
    monkeypatch.setattr(Ferry, "_copy", lambda self, rows: (copied.append(rows.clone()), copy(self, rows))[1])
    wanted = list(stream(Drawn(40, {7}), None, 20).epoch(0))
    copied.clear()
    fill(store, source, range(0, 40, 2))
    assert same(wanted, list(stream(source, store, 20).epoch(0)))
    odd = {tuple(stored(source, i, SIDE)[0].ravel().tolist()) for i in range(1, 40, 2) if i != 7}
    assert sum(map(len, copied)) == 19
    assert {tuple(row.ravel().tolist()) for rows in copied for row in rows} == odd
    copied.clear()
    assert same(wanted, list(stream(source, store, 20).epoch(0)))  # with a bad one: its place is looked for again
    assert copied == []


def test_small_parts_of_a_batch_are_read_further_ahead(monkeypatch):
    begun = []
    begin = Stream._begin
    monkeypatch.setattr(Stream, "_begin", lambda self, *more: (begun.append(1), begin(self, *more))[1])
    for world, wanted in ((1, 2 + 2 * 16 // 16), (8, 2 + 2 * 16 // 2)):
        source = Drawn(800)
        run = Stream(
            source, side=SIDE, batch_size=16, seed=0, workers=2, device="cpu", bad=quiet(source), world=world
        )  # fmt: skip
        batches = run.epoch(0)
        next(batches)
        assert len(begun) == wanted
        batches.close()
        begun.clear()


# ---------------------------------------------------------------- what the stored pixels are


def pictures(folder: Path) -> Path:
    """One file of each kind that is brought to 8-bit RGB in a way of its own, of pixels by arithmetic."""
    y, x = np.mgrid[0:48, 0:64]
    waves = np.stack([4 * x, 5 * y, 127 + 80 * np.sin(x / 6) * np.cos(y / 9)], 2).astype(np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = Image.fromarray((x // 4).astype(np.uint8), "P")
    palette.putpalette([i * 37 % 256 for i in range(48)])
    Image.fromarray(waves).save(folder / "a.png")
    Image.fromarray(waves).save(folder / "b.jpg", quality=95, exif=turned)
    Image.fromarray(np.dstack([waves, (3 * x + y).astype(np.uint8)])).save(folder / "c.png")
    Image.fromarray((1000 * x + y).astype(np.uint16)).save(folder / "d.png")
    Image.fromarray((np.sin(x / 9) * 300 + y).astype(np.float32)).save(folder / "e.tif")
    palette.save(folder / "f.png", transparency=5)
    Image.fromarray(np.dstack([waves, waves[..., 0] // 2]), "CMYK").save(folder / "g.tif")
    return folder


PINNED = {  # by revision: the canvases of 3 px, one line a picture
    1: """
    312d8e7e2d75cb2d8a3176687e768ccb766d31be717ebe86cbbe74
    31bd7331766b312e8c7ebd867e768a7e2e77cbbd76cb766fcb2e89
    dddae9ceaac8e17bb4d1e0ddc7c0c9dea19cc5ecd7c0debfdbcf99
    3030307b7b7bc6c6c63030307b7b7bc6c6c63030307b7b7bc6c6c6
    cccccc6060604a4a4ad1d1d16666664f4f4fd7d7d76c6c6c555555
    8b78768987887388898b78768987887388898b7876898788738889
    bcbe66639e69217e46bc7c8a636855215359bc3b8163315a212754
    """
}
EXACT = {  # by all versions: the digest of those of 3, 16 and 100 px
    "decoding 1, torch 2.15.0, pillow 13.0.0, libjpeg-turbo 3.2.0, simplejpeg 1.9.0": "dee82d670863324f",
}


def test_another_pixel_needs_another_revision(tmp_path):
    """If this fails, images are stored otherwise than before: raise `decode.REVISION`, and pin what is then stored."""
    source = find(pictures(tmp_path)).train
    canvases = np.stack([stored(source, i, 3)[0] for i in range(len(source))])
    large = np.concatenate([stored(source, i, side)[0].ravel() for i in range(len(source)) for side in (3, 16, 100)])
    line = re.sub(r"\+\w+", "", decode.decoder())
    pinned = np.frombuffer(bytes.fromhex(PINNED[decode.REVISION]), np.uint8).reshape(canvases.shape)
    assert np.abs(canvases.astype(int) - pinned).max() <= 3  # other libraries round otherwise
    assert EXACT.get(line) in (None, hashlib.blake2b(large, digest_size=8).hexdigest())


# ---------------------------------------------------------------- the file: kept, damaged, foreign


def test_a_file_is_found_again_and_read_only_once(disk, cache):
    source = Drawn(20)
    store = disk(source)
    assert (store.kind, store.where, store.writes) == ("disk", str(file_of(source, SIDE)), True)
    assert (len(store), store.bytes, store.side, store.held) == (20, 20 * ROW, SIDE, 0)
    fill(store, source, range(5, 15))
    store.close()
    again = disk(source)
    assert again.held == 10
    assert not again.ready(np.array([6]))  # not looked at yet
    assert [right(again, source, i) for i in (4, 5, 14, 15)] == [None, True, True, None]
    assert again.ready(np.array([5, 14]))
    assert os.listdir(cache) == [file_of(source, SIDE).name]
    line = open_store("disk", source, SIDE, "cpu", reuse=True)[1]
    assert line == (
        f"on disk, 2.2 kB, `{file_of(source, SIDE)}`: 10 of 20 images are there; "
        "it is only read, another process writes it or it may not be written; it may be deleted when no run uses it"
    )


def test_the_whole_file_is_on_the_disk_from_the_start(disk):
    source = Drawn(5000)
    store = disk(source)
    info = os.stat(store.path)
    assert info.st_size == store.form.total == PAGE + 20 * PAGE + 5000 * ROW
    assert info.st_blocks * 512 >= info.st_size


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_costs_rows_and_no_pixels(tmp_path_factory, data):
    """Flipped, zeroed or foreign bytes anywhere behind the first page."""
    source, path = Drawn(12), tmp_path_factory.mktemp("damage") / "x.packed"
    form = form_of(source, SIDE)
    store = opened(path, form, write=True, make=True)
    fill(store, source, range(12))
    store.close()
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(PAGE, len(whole) - 1) | st.integers(PAGE, PAGE + 12 * 16))
        foreign = data.draw(st.binary(min_size=1, max_size=40))[: len(whole) - begin]
        whole[begin : begin + len(foreign)] = foreign
    path.write_bytes(whole)
    again = opened(path, form, write=True)
    found = [right(again, source, i) for i in range(12)]
    assert False not in found
    assert found.count(True) >= 12 - 4 * 4
    assert same(list(stream(source, None, 4).epoch(0)), list(stream(source, again, 4).epoch(0)))
    assert [right(again, source, i) for i in range(12)] == [True] * 12
    again.close()
    last = opened(path, form, write=False)
    assert [right(last, source, i) for i in range(12)] == [True] * 12  # mended on the disk too
    last.close()


@pytest.mark.parametrize("keep", [0, 10, PAGE - 1, PAGE, PAGE + 100, 2 * PAGE, 2 * PAGE + 5 * ROW + 7])
def test_a_truncated_file_is_mended(disk, tmp_path, keep):
    source = Drawn(20)
    full = pack(source, SIDE, None, 1, quiet(source))
    path = full.path
    full.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    (tmp_path / "own.packed").write_bytes(whole[:keep])
    if keep < PAGE - 1:  # all that is lacking there is a space
        with pytest.raises(SslpreError, match="is not a packed file") as caught:
            open_store(str(tmp_path / "own.packed"), source, SIDE, "cpu", reuse=True)
        assert caught.value.code == 3
        assert (tmp_path / "own.packed").read_bytes() == whole[:keep]
    with pytest.raises(NotPossible):
        opened(path, form_of(source, SIDE), write=False)
    store = disk(source)
    assert store.writes
    assert False not in [right(store, source, i) for i in range(20)]
    assert same(list(stream(source).epoch(0)), list(stream(source, store).epoch(0)))


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]" * 2000, b"\xff" * 9000, b'{"what": "sslpre packed images"}'])
def test_garbage_in_the_cache_is_replaced_only_by_who_has_the_lock(disk, content):
    source = Drawn(8)
    path = file_of(source, SIDE)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    script = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"1\n"
    with pytest.raises(SslpreError, match="is not a packed file"):
        disk(source)
    assert path.read_bytes() == content
    other.communicate(b"\n")
    store = disk(source)
    fill(store, source, range(8))
    assert [right(store, source, i) for i in range(8)] == [True] * 8


def test_places_where_no_file_can_be(tmp_path, disk, monkeypatch):
    source = Drawn(8)
    file_of(source, SIDE).mkdir(parents=True)
    with pytest.raises(SslpreError, match="is a directory") as caught:
        disk(source)
    assert caught.value.code == 3
    assert "--store auto" in caught.value.hint
    (tmp_path / "file").write_bytes(b"")
    for place in ("file", "file/below"):
        monkeypatch.setenv("SSLPRE_CACHE", str(tmp_path / place))
        with pytest.raises(SslpreError, match=r"not a (folder|directory)|file exists"):
            disk(source)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SslpreError, match="illegal seek"):
        open_store(str(tmp_path / "pipe"), source, SIDE, "cpu", reuse=True)


def test_another_key_another_file(monkeypatch):
    source = Drawn(8)
    files = {file_of(source, SIDE), file_of(source, 7), file_of(Drawn(8, written="01"), SIDE)}
    monkeypatch.setattr("sslpre.data.decode.decoder", lambda: "another decoder 1.0")
    files.add(file_of(source, SIDE))
    assert len(files) == 4
    assert {path.suffix for path in files} == {".packed"}


def test_a_named_file_must_hold_these_images(tmp_path, monkeypatch):
    source, path = Drawn(8), tmp_path / "x.packed"
    pack(source, SIDE, path, 1, quiet(source)).close()
    store, words = open_store(str(path), source, SIDE, "cpu", reuse=False)
    assert words == f"on disk, 864 bytes, `{path}`: every image is there"
    assert isinstance(store, packed.Packed)
    assert [right(store, source, i) for i in range(8)] == [True] * 8
    store.close()

    def refused(name: Path, source: Drawn, side: int = SIDE) -> tuple[str, int]:
        with pytest.raises(SslpreError) as caught:
            open_store(str(name), source, side, "cpu", reuse=True)
        return caught.value.message, caught.value.code

    assert refused(path, source, 7) == (f"`{path}` holds images of 6 px, not of 7", 6)
    message, code = refused(path, Drawn(8, written="01"))
    assert (message.startswith(f"`{path}` holds other images"), code) == (True, 6)
    assert refused(tmp_path / "ram.packed", source) == (f"there is no file `{tmp_path / 'ram.packed'}`", 3)
    assert refused(tmp_path, source)[1] == 3
    monkeypatch.setattr("sslpre.data.decode.decoder", lambda: "another decoder 1.0")
    message, code = refused(path, source)
    assert (message.endswith("here it is another decoder 1.0"), code) == (True, 6)


def test_the_first_page_says_what_is_in_it(disk):
    source = Drawn(3)
    store = disk(source)
    page = store.path.read_bytes()[:PAGE]
    assert form_in(page) == store.form
    assert form_in(page.replace(b'"side": 6', b'"side": 9')) is None  # the key tells
    assert form_in(page.replace(b'"format": 1', b'"format": 2')) is None
    assert b'"images": 3' in page


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_follows_the_umask(disk, mask):
    before = os.umask(mask)
    try:
        path = disk(Drawn(3)).path
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert file_of(Drawn(3), SIDE).parent == tmp_path / "cache"
    monkeypatch.delenv("SSLPRE_CACHE")
    assert file_of(Drawn(3), SIDE).parent == tmp_path / "xdg" / "sslpre"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert file_of(Drawn(3), SIDE).parent == tmp_path / "home" / ".cache" / "sslpre"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert file_of(Drawn(3), SIDE).parent == tmp_path / "home" / ".cache" / "sslpre"


# ---------------------------------------------------------------- several at once, and sudden ends

CHILD = """
import resource, sys, time
sys.path.insert(0, {tests!r})
from test_store import *
source = Drawn({count})
store, words = open_store("disk", source, SIDE, "cpu", reuse=True, write={write!r})
"""


def child_of(script: str, environment: dict[str, str], count: int = 400, write: object = True) -> subprocess.Popen[str]:
    code = CHILD.format(tests=str(Path(__file__).parent), count=count, write=write) + script
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **pipes)


@pytest.fixture
def env(child, cache) -> dict[str, str]:
    return {**child, "SSLPRE_CACHE": str(cache)}


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip() or process.communicate()[1]


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def test_one_writer_at_a_time_and_helpers_of_its_own_run(disk, env):
    obey = "while line := sys.stdin.readline():\n    print(eval(line), flush=True)"
    writer = child_of("print(words, flush=True)\n" + obey, env)
    source = Drawn(400)
    assert "0 of 400 images are there" in line_of(writer)
    tell(writer, "fill(store, source, range(10))")
    line_of(writer)
    second, friend = disk(source), disk(source, write="with")
    assert (second.writes, friend.writes) == (False, True)
    assert [right(second, source, i) for i in (0, 9, 10)] == [True, True, None]
    fill(second, source, [30])  # nothing happens
    fill(friend, source, [31])
    tell(writer, "fill(store, source, [10])")
    line_of(writer)
    assert [right(second, source, i) for i in (10, 30, 31)] == [True, None, True]  # seen while it is written
    tell(writer, "right(store, source, 30), right(store, source, 31)")
    assert line_of(writer) == "(None, True)"
    assert same(list(stream(source).epoch(0)), list(stream(source, second).epoch(0)))
    assert second.held == 12
    with pytest.raises(SslpreError, match="being written by another process") as caught:
        pack(source, SIDE, None, 1, quiet(source))
    assert caught.value.code == 3
    writer.communicate()
    assert disk(source).writes  # the lock went with the process


def test_many_that_start_at_once_share_one_file(env):
    """Threads that open the file by themselves are to the lock like processes."""
    source, barrier = Drawn(400), threading.Barrier(6)

    def start(_: int) -> packed.Packed:
        barrier.wait()
        return opened(file_of(source, SIDE), form_of(source, SIDE), write=True, make=True, replace=True)

    for _ in range(5):
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(start, range(6)))
        assert sum(store.writes for store in found) == 1
        fill(next(store for store in found if store.writes), source, range(50))
        assert all(store.held == 50 for store in found)
        for store in found:
            store.close()
        file_of(source, SIDE).unlink()
        assert os.listdir(file_of(source, SIDE).parent) == []


def test_killed_at_any_time_the_file_is_usable(disk, env):
    source, held = Drawn(3000), 0
    script = """
def end():
    while store.held < {rows}:
        pass
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=end).start()
list(stream(source, store, 100, 3).steps(0, 10**6))
"""
    for rows in (1, 700, 1500):
        process = child_of(script.format(rows=rows), env, len(source))
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        store = disk(source)
        assert store.writes
        assert max(rows, held) <= store.held < 3000
        held = store.held
        found = [right(store, source, i) for i in range(3000)]
        assert (found.count(True), found.count(False)) == (held, 0)
        store.close()
    assert os.listdir(file_of(source, SIDE).parent) == [file_of(source, SIDE).name]
    pack(source, SIDE, None, 2, quiet(source)).close()
    assert disk(source).held == 3000


def test_a_disk_that_is_full_is_told_once_and_the_run_goes_on(env):
    process = child_of(
        "middle = store.form.rows_at + 200 * store.form.row + 50\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (middle, middle))\n"
        "for _ in (0, 1):\n"
        "    assert same(list(stream(source, None, 25).in_order()), list(stream(source, store, 25, 2).in_order()))\n"
        "rows = [right(store, source, i) for i in range(400)]\n"
        "print(store.writes, store.held, rows.count(True), rows.count(False), flush=True)",
        env,
    )  # fmt: skip
    out, err = process.communicate(timeout=60)
    writes, held, whole, wrong = out.split()
    assert (writes, wrong) == ("False", "0")  # it stopped at the first row that did not fit
    assert 150 < int(held) == int(whole) <= 200
    assert err == (
        f"nothing more is stored in `{file_of(Drawn(400), SIDE)}`: file too large; the other images are decoded anew\n"
    )


# ---------------------------------------------------------------- which store


def choose(wanted: str, source: Drawn, **more: object) -> tuple[str, str]:
    store, words = open_store(wanted, source, SIDE, "cpu", **{"reuse": True, **more})
    kind = "none" if store is None else store.kind
    if store is not None:
        store.close()
    return kind, words


def test_auto_takes_ram_then_disk_then_nothing(monkeypatch, cache):
    source, memory, free = Drawn(1000), {"": 2 * 1000 * ROW}, {"": 10**9}
    monkeypatch.setattr(room, "memory", lambda: memory[""])
    monkeypatch.setattr(room, "disk", lambda path: free[""])
    assert choose("auto", source) == ("ram", "in RAM, 108 kB")
    path = file_of(source, SIDE)
    assert not path.exists()
    with monkeypatch.context() as patch:
        patch.setattr(shared, "POSSIBLE", False)
        kind, words = choose("auto", source, share=2)
    assert kind == "disk"
    assert words == (
        f"on disk, 108 kB, `{path}`: 0 of 1,000 images are there; it may be deleted when no run uses it; "
        "not in RAM: 2 x 108 kB is more than half of the free memory (216 kB)"
    )
    path.unlink()
    assert choose("auto", source, share=2) == ("ram", "in RAM, 108 kB, once for all processes here")
    memory[""] -= 1
    assert choose("auto", source)[0] == "disk"
    needs = path.stat().st_size
    path.unlink()
    free[""] = 2 * needs - 2 * 20 * 4096  # what the first page and the table take counts as there already
    kind, words = choose("auto", source)
    assert (kind, words.split(": ")[0]) == ("none", "off; not in RAM")
    assert "is more than half of the free disk (" in words
    assert os.listdir(cache) == []  # nothing is left of it
    with pytest.raises(SslpreError, match=r"`--store disk` .*possible: .* half of the free disk") as caught:
        choose("disk", source)
    assert caught.value.code == 3
    monkeypatch.setattr(room, "memory", lambda: None)
    assert choose("auto", source)[0] == "none"
    assert choose("ram", source)[0] == "ram"


def test_what_is_asked_for_is_taken_or_refused(monkeypatch):
    source = Drawn(1000)
    monkeypatch.setattr(room, "memory", lambda: 1000 * ROW)
    assert choose("off", source) == ("none", "off")
    assert choose("auto", source, reuse=False) == ("none", "off: every image is read once")
    assert choose("ram", source, reuse=False)[0] == "ram"
    with pytest.raises(SslpreError, match="`--store device` is for CUDA") as caught:
        choose("device", source)
    assert (caught.value.code, caught.value.hint) == (3, "--store ram")
    with pytest.raises(SslpreError, match=r"2 x 108 kB is more than the free memory \(108 kB\)") as caught:
        choose("ram", source, share=2, write=False)
    assert caught.value.code == 3
    with pytest.raises(SslpreError, match="there is no file"):  # only the first process of a run makes it
        choose("disk", source, write="with")
    with pytest.raises(SslpreError, match="there is no file"):
        choose("disk", source, write=False)


@pytest.mark.parametrize("error", [OSError(28, ""), OSError(95, "")])
def test_a_disk_that_cannot_reserve_is_not_used(monkeypatch, cache, error):
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    monkeypatch.setattr(room, "memory", lambda: 0)
    kind, words = choose("auto", Drawn(50))
    assert kind == "none"
    assert f"no space can be reserved for `{file_of(Drawn(50), SIDE)}`: {os.strerror(error.errno).lower()}" in words
    assert os.listdir(cache) == []
    with pytest.raises(SslpreError) as caught:
        pack(Drawn(50), SIDE, None, 1, quiet(Drawn(50)))
    assert (caught.value.code, caught.value.hint) == (3, "name a file: sslpre pack IMAGES OUT")


def test_too_much_for_the_system_is_not_ram(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "empty", refuse)
    with pytest.raises(NotPossible, match=r"does not give 11 kB to one process"):
        stores._in_ram(form_of(Drawn(100), SIDE), 1, True, None, True, "", None)


def test_ram_is_filled_from_a_packed_file(monkeypatch):
    source = Drawn(40, {7})
    pack(source, SIDE, None, 2, quiet(source)).close()
    source.asked.clear()
    store, words = open_store("auto", source, SIDE, "cpu", reuse=True)
    path = file_of(source, SIDE)
    assert words == f"in RAM, 4.3 kB, read from `{path}`: 39 of 40 images are there"
    run = stream(source, store, 10, 2)
    assert same(list(stream(Drawn(40, {7}), None, 10).epoch(0)), list(run.epoch(0)))
    assert set(source.asked) == {7}
    assert store is not None
    assert store.held == 39
    on_device = OnDevice(40, SIDE, torch.device("cpu"), opened(path, form_of(source, SIDE), write=False))
    again = stream(source, on_device, 10, 2)
    assert same(list(stream(Drawn(40, {7}), None, 10).epoch(0)), list(again.epoch(0)))
    assert set(source.asked) == {7}
    for one in (store, on_device):
        one.close()


# ---------------------------------------------------------------- filling a file ahead


def test_pack_fills_every_row_and_goes_on_with_a_half_filled_one(tmp_path):
    source, path, done = Drawn(100, {3, 50}), tmp_path / "deep" / "x.packed", []
    lines: list[str] = []
    store = pack(source, SIDE, path, 3, BadList(None, 0.02, 100, say=lines.append), done.append)
    assert store.held == 98
    assert [line.split("`")[1] for line in lines] == ["3.jpg", "50.jpg"]
    assert done == sorted(done)
    assert done[-1] == 100
    store.close()
    source.asked.clear()
    pack(source, SIDE, path, 3, quiet(source)).close()
    assert sorted(source.asked) == [3, 50]  # all else is there, and checked
    whole = bytearray(path.read_bytes())
    whole[store.form.rows_at + 20 * ROW] ^= 1
    path.write_bytes(whole)
    pack(source, SIDE, path, 3, quiet(source)).close()
    store = opened(path, store.form, write=False)
    assert [right(store, Drawn(100), i) for i in range(100)].count(True) == 98
    store.close()


def test_pack_stops_at_too_many_bad_images_and_keeps_the_others(tmp_path):
    source, path = Drawn(100, range(40, 60)), tmp_path / "x.packed"
    with pytest.raises(SslpreError, match="3 of 100") as caught:
        pack(source, SIDE, path, 2, BadList(None, 0.02, 100, say=lambda line: None))
    assert caught.value.code == 20
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sslpre-pack")]
    store = opened(path, form_of(source, SIDE), write=True)
    assert store.writes  # the lock was given back
    assert store.held >= 40
    store.close()


def test_pack_writes_over_no_file_that_is_not_its_own(tmp_path):
    source, path = Drawn(10), tmp_path / "thesis.txt"
    path.write_text("years of work")
    with pytest.raises(SslpreError, match="is not a packed file") as caught:
        pack(source, SIDE, path, 1, quiet(source))
    assert (caught.value.code, path.read_text()) == (3, "years of work")
    pack(source, SIDE, tmp_path / "x.packed", 1, quiet(source)).close()
    with pytest.raises(SslpreError, match="holds images of 6 px, not of 8") as caught:
        pack(source, 8, tmp_path / "x.packed", 1, quiet(source))
    assert caught.value.code == 6


def test_pack_ends_when_the_disk_fails(env):
    script = """
store.close()
whole = store.form.rows_at + 100 * store.form.row
resource.setrlimit(resource.RLIMIT_FSIZE, (whole, whole))
try:
    pack(source, SIDE, None, 2, quiet(source))
except SslpreError as error:
    print(error.code, error.message, len(source.asked), sep="|")
"""
    out, err = child_of(script, env).communicate(timeout=60)
    code, message, asked = out.strip().split("|")
    assert (code, err) == ("3", "")
    assert message == f"writing `{file_of(Drawn(400), SIDE)}` failed: file too large"
    assert int(asked) < 400


# ---------------------------------------------------------------- how much is free

MEMINFO = "MemTotal:       24577936 kB\nMemFree:          398408 kB\nMemAvailable:   23130376 kB\nBuffers: 1 kB\n"


def test_free_memory_from_the_kernels_words():
    assert room.available(MEMINFO) == 23130376 * 1024
    assert room.available("") is room.available("MemTotal: 5 kB") is None
    assert room.cgroup_room("max\n", "5\n", "") is None
    assert room.cgroup_room("", "", "") is None
    assert room.cgroup_room("9223372036854771712\n", "5", "") is None
    assert room.cgroup_room("1000\n", "400\n", "anon 300\ninactive_file 60\nactive_file 40\n") == 700
    assert room.cgroup_room("1000\n", "400\n", "inactive_file 60\ntotal_inactive_file 10\n", "total_") == 610
    assert room.cgroup_room("1000", "1500", "") == -500
    assert room.memory() is None or room.memory() >= 0


def test_free_memory_of_groups(tmp_path):
    def group(name: str, **files: str) -> None:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (tmp_path / name / file.replace("_", ".", 1)).write_text(text)

    group("a", memory_max="5000", memory_current="1000")
    group("a/b", memory_max="max", memory_current="900")
    assert room.cgroup_rooms("0::/a/b\n", tmp_path) == [4000]
    assert room.cgroup_rooms("0::/not/here\n", tmp_path) == []
    group(".", memory_max="300", memory_current="100")  # a container that sees its own group as the root
    assert room.cgroup_rooms("0::/not/here\n", tmp_path) == [200]
    group("memory/x/y", memory_limit_in_bytes="700", memory_usage_in_bytes="100", memory_stat="total_active_file 50")
    group("memory/x", memory_limit_in_bytes="9223372036854771712", memory_usage_in_bytes="100")
    assert room.cgroup_rooms("5:cpu:/x/y\n4:hugetlb,memory:/x/y\n1:name=memory:/x\n", tmp_path) == [650]
    assert room.cgroup_rooms("", tmp_path) == []


def test_a_limit_on_address_space_counts(child):
    script = (
        "import resource; from sslpre.data import room; print(room.address_space())\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)); print(room.address_space(), room.memory())"
    )
    done = subprocess.run([sys.executable, "-c", script], env=child, capture_output=True, text=True, check=True)
    none, left, memory = done.stdout.split()
    assert none == "None"
    assert (1 << 40) - (1 << 36) < int(left) < 1 << 40
    assert int(memory) <= int(left)


def test_free_disk_is_that_of_the_nearest_folder(tmp_path):
    free = os.statvfs(tmp_path)
    assert room.disk(tmp_path / "not" / "yet") == pytest.approx(free.f_bavail * free.f_frsize, rel=0.2)


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (9949, "9.9 kB"), (196e6, "196 MB"), (999.6e6, "1.0 GB"),
     (3.2e12, "3.2 TB"), (5e15, "5,000 TB")],
)  # fmt: skip
def test_amounts(count, words):
    assert packed.amount(count) == words


def test_rows_of_a_subset_have_a_file_of_their_own():
    source = Drawn(10)
    parts = [subset(source, np.array(rows)) for rows in ([1, 2], [2, 1])]
    assert len({file_of(one, SIDE) for one in (source, *parts)}) == 3
    store = pack(parts[1], SIDE, None, 1, quiet(source))
    out = np.empty((SIDE, SIDE, 3), np.uint8)
    assert store.take(0, out) == source.size(2)
    assert (out == stored(source, 2, SIDE)[0]).all()
    store.close()
