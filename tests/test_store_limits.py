"""Where a store may be and how much it may take: memory that processes share, memory and disks that get full."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from sslpre.data import cache as caches
from sslpre.data import packed, room, rows, shared
from sslpre.data import store as stores
from sslpre.data.cache import file_of, form_of
from sslpre.data.packed import opened
from sslpre.data.rows import InRam, OnDevice, Store
from sslpre.data.store import open_store, pack
from sslpre.data.stream import Stream
from sslpre.errors import SslpreError

sys.path.insert(0, str(Path(__file__).parent))
from test_store import CHILD, ROW, SIDE, Drawn, fill, line_of, quiet, right, same, stream, tell

needs_memfd = pytest.mark.skipif(not shared.POSSIBLE, reason="Linux")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSLPRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def choose(wanted: str, source: Drawn, **more: object) -> tuple[str, str]:
    store, words = open_store(wanted, source, SIDE, more.pop("device", "cpu"), **{"reuse": True, **more})
    kind = "none" if store is None else store.kind
    if store is not None:
        store.close()
    return kind, words


# ---------------------------------------------------------------- one copy for all processes of a machine


def joiner(join: str, environment: dict[str, str], count: int) -> subprocess.Popen[str]:
    """A process that opens its store as the second of two, says how, and then obeys."""
    code = CHILD.replace('"disk", source', '"auto", source').replace(
        "write={write!r}", "share=2, write=False, join={j!r}"
    )
    code = code.format(tests=str(Path(__file__).parent), count=count, j=join)
    code += "print(words, flush=True)\nwhile line := sys.stdin.readline():\n    print(eval(line), flush=True)"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **pipes)


def asked(process: subprocess.Popen[str], line: str) -> str:
    tell(process, line)
    return line_of(process)


def memory_of(kind: str) -> int:
    """Bytes of this process's memory of one kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


@needs_memfd
def test_two_processes_have_one_copy_and_decode_each_image_once(child, cache):
    source, count = Drawn(403), 403
    store, words = open_store("auto", source, SIDE, "cpu", reuse=True, share=2)
    assert isinstance(store, InRam)
    assert (words, store.held) == ("in RAM, 44 kB, once for all processes here", 0)
    assert store.join.startswith(f"/proc/{os.getpid()}/fd/")
    other = joiner(store.join, {**child, "SSLPRE_CACHE": str(cache)}, count)
    assert line_of(other) == words
    fill(store, source, range(100))
    assert asked(other, "store.held, [right(store, source, i) for i in (0, 99, 100)]") == "(100, [True, True, None])"
    assert asked(other, "fill(store, source, range(100, 300))") == "None"
    assert store.held == 300
    assert [right(store, source, i) for i in range(count)] == [True] * 300 + [None] * 103
    assert store.ready(np.arange(300)) and not store.ready(np.arange(301))
    source.asked.clear()
    assert asked(other, "source.asked.clear()") == "None"
    half = "list(Stream(source, side=SIDE, batch_size=26, seed=1, workers=2, device='cpu', bad=quiet(source), rank={}, "
    half += "world=2, store=store).epoch({}))"
    scope = {"Stream": Stream, "source": source, "SIDE": SIDE, "quiet": quiet, "store": store}
    eval(half.format(0, 0), scope)
    assert asked(other, f"len({half.format(1, 0)})") == "15"
    theirs = eval(asked(other, "sorted(source.asked)"))
    assert len(source.asked) + len(theirs) == len({*source.asked, *theirs}) >= 390 - 300
    plain = list(stream(Drawn(count), None, 26, 0).epoch(0))
    assert same(plain, list(stream(source, store, 26, 2).epoch(0)))
    other.kill()
    other.communicate()
    assert right(store, source, 299)  # what it put stays
    store.close()


@needs_memfd
def test_nothing_is_left_of_shared_memory_and_it_is_taken_only_as_rows_come():
    count = 40_000
    before = memory_of("RssShmem:")
    store, _ = open_store("ram", Drawn(count), 30, "cpu", reuse=True, share=2)
    assert isinstance(store, InRam)
    assert store.bytes == 108_000_000
    assert memory_of("RssShmem:") - before < 2e6
    canvas = np.ones((30, 30, 3), np.uint8)
    for i in range(10_000):
        store.put(i, canvas, (30, 30))
    assert 26e6 < memory_of("RssShmem:") - before < 29e6
    path = store.join
    store.close()
    assert not Path(path).exists()
    assert memory_of("RssShmem:") - before < 1e6


@needs_memfd
def test_what_cannot_be_joined_is_a_copy_of_its_own(tmp_path, monkeypatch):
    source = Drawn(1000)
    monkeypatch.setattr(room, "memory", lambda: 4 * 1000 * ROW)
    leader, _ = open_store("ram", source, SIDE, "cpu", reuse=True, share=2)
    smaller, _ = open_store("ram", Drawn(999), SIDE, "cpu", reuse=True, share=2)
    changed, _ = open_store("ram", Drawn(1000, written="01"), SIDE, "cpu", reuse=True, share=2)
    os.mkfifo(tmp_path / "pipe")
    gone = "/proc/self/fd/9999"
    places = [smaller.join, changed.join, gone, str(tmp_path / "pipe"), f"/proc/{os.getpid()}/fd/0"]
    with contextlib.closing(leader), contextlib.closing(smaller), contextlib.closing(changed):
        fill(leader, source, [5])
        mine, _ = open_store("ram", source, SIDE, "cpu", reuse=True, share=2, write="with", join=leader.join)
        assert (mine.held, mine.join) == (1, leader.join)
        mine.close()
        assert right(leader, source, 5)
        for place in places:
            mine, words = open_store("auto", source, SIDE, "cpu", reuse=True, share=2, write="with", join=place)
            assert (mine.kind, mine.held, mine.join, words) == ("ram", 0, "", "in RAM, 108 kB")
            mine.close()
        monkeypatch.setattr(room, "memory", lambda: 4 * 1000 * ROW - 1)  # two copies are too much, one would do
        kind, words = choose("auto", source, share=2, write="with", join=gone)
        assert kind == "none"
        assert "not in RAM: 2 x 108 kB is more than half of the free memory (432 kB)" in words
        assert choose("auto", source, share=2, write="with", join=leader.join)[0] == "ram"


def test_without_such_memory_each_process_has_a_copy(monkeypatch):
    monkeypatch.setattr(shared, "POSSIBLE", False)
    monkeypatch.setattr(room, "memory", lambda: 4 * 1000 * ROW)
    store, _ = open_store("auto", Drawn(1000), SIDE, "cpu", reuse=True, share=2)
    assert (store.kind, store.join) == ("ram", "")
    store.close()
    assert choose("auto", Drawn(1000), share=3)[0] == "disk"


# ---------------------------------------------------------------- memory


def test_storing_ends_while_memory_is_left(monkeypatch):
    source, left, lines = Drawn(100), [1 << 40], list[str]()
    monkeypatch.setattr(rows, "LOOK", 10 * ROW)
    monkeypatch.setattr(room, "physical", lambda: 20_000_000)
    monkeypatch.setattr(room, "memory", lambda: left[0])
    store, _ = open_store("ram", source, SIDE, "cpu", reuse=True, say=lines.append)
    fill(store, source, range(35))
    assert (store.held, store.writes, lines) == (35, True, [])
    left[0] = 1_000_000  # a twentieth
    fill(store, source, range(35, 45))
    assert (store.held, store.writes) == (45, True)
    left[0] -= 1
    fill(store, source, range(35, 100))  # those that are there take nothing
    assert (store.held, store.writes) == (45 + 4, False)
    assert lines == ["nothing more is kept in RAM: 1.0 MB of memory are left; the other images are decoded anew"]
    assert [right(store, source, i) for i in (0, 48, 49)] == [True, True, None]
    wanted = list(stream(Drawn(100), None, 20).epoch(0))
    assert same(wanted, list(stream(source, store, 20, 2).epoch(0)))
    assert (store.held, len(lines)) == (49, 1)


def test_memory_where_the_kernel_does_not_tell(monkeypatch, tmp_path):
    whole = room.physical()
    assert whole is not None and whole > 1 << 28
    monkeypatch.setattr(room, "PROC", tmp_path)
    assert room.memory() == whole // 2
    monkeypatch.delattr(os, "sysconf")
    assert room.physical() is room.memory() is None


def test_the_gpu_is_taken_where_it_has_memory_to_spare(monkeypatch):
    source, needed = Drawn(1000), 1000 * ROW
    free = [needed]
    properties = types.SimpleNamespace(total_memory=4 * needed)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 4 * needed))
    monkeypatch.setattr(
        stores, "OnDevice", lambda n, side, device, behind: OnDevice(n, side, torch.device("cpu"), behind)
    )

    def kind(wanted: str = "auto", **more: object) -> str:
        return choose(wanted, source, device="cuda", **more)[0]

    assert kind() == "device"
    free[0] -= 1
    assert kind() == "ram"
    assert choose("auto", source, device="cuda")[1] == (
        "in RAM, 108 kB; not on the GPU: 108 kB is more than the 108 kB of its 432 kB to spare"
    )
    assert kind("device") == "device"  # as was asked for
    assert [kind(spare=spare) for spare in (needed, needed - 1, 0)] == ["device", "ram", "ram"]
    assert kind("device", spare=0) == "device"
    properties.total_memory -= 1
    assert kind(spare=10 * needed) == "ram"
    assert "more than a quarter" in choose("auto", source, device="cuda")[1]

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(stores, "OnDevice", full)
    properties.total_memory = 100 * needed
    assert kind(spare=needed) == "ram"
    with pytest.raises(SslpreError, match="more than what is free") as caught:
        kind("device")
    assert caught.value.code == 3


# ---------------------------------------------------------------- the file behind, and the one that is only read


def test_what_is_read_once_is_read_from_a_file_that_is_there():
    source = Drawn(40, {7})
    assert choose("auto", source, reuse=False) == ("none", "off: every image is read once")
    pack(source, SIDE, None, 1, quiet(source)).close()
    path = file_of(source, SIDE)
    store, words = open_store("auto", source, SIDE, "cpu", reuse=False)
    assert words == (f"on disk, 4.3 kB, `{path}`: 39 of 40 images are there; it may be deleted when no run uses it")
    assert (store.kind, store.writes) == ("disk", False)
    source.asked.clear()
    list(stream(source, store, 10).in_order())
    assert set(source.asked) == {7}
    store.close()


@pytest.mark.parametrize("kind", [InRam, OnDevice])
def test_near_counts_what_needs_no_decoding_and_the_file_is_let_go(kind):
    source = Drawn(30)
    part = opened(file_of(source, SIDE), form_of(source, SIDE), write=True, make=True)
    fill(part, source, range(10))
    assert (part.held, part.near) == (10, 10)
    part.close()
    behind = opened(file_of(source, SIDE), form_of(source, SIDE), write=False)
    more = (torch.device("cpu"),) if kind is OnDevice else ()
    store: Store = kind(30, SIDE, *more, behind)
    descriptor = Path(f"/proc/self/fd/{behind._fd}")
    fill(store, source, range(5, 15))
    assert (store.held, store.near) == (10, 15)
    run = stream(source, store, 10, 2)
    source.asked.clear()
    list(run.steps(0, 2))
    list(run.epoch(0))
    assert sorted(source.asked) == list(range(15, 30))
    assert (store.held, store.near, store.behind) == (30, 30, None)
    assert behind.held == 10  # whoever still has it reads on
    assert descriptor.exists()
    del behind
    assert not descriptor.exists() or "packed" not in os.readlink(descriptor)


def test_a_row_that_the_map_does_not_show_is_read_past_it(monkeypatch):
    """On a network disk a map may lag behind what another machine wrote."""
    source = Drawn(10)
    form, path = form_of(source, SIDE), file_of(source, SIDE)
    writer = opened(path, form, write=True, make=True)
    reader = opened(path, form, write=False)
    reader._table = reader._table.copy()
    fill(writer, source, [3])
    assert right(reader, source, 3)
    assert not reader.ready(np.array([3]))  # what `gather` would read is the map
    reader._pixels = np.zeros_like(reader._pixels)
    assert right(reader, source, 3)
    assert right(reader, source, 4) is None
    with open(path, "r+b") as file:
        file.seek(form.rows_at + 3 * ROW)
        file.write(b"\xff\x00\xff")
    assert right(reader, source, 3) is None
    monkeypatch.setattr(os, "pread", fail)
    fill(writer, source, [3])
    assert right(reader, source, 3) is None  # then the image is decoded
    for store in (writer, reader):
        store.close()


def fail(*_: object) -> None:
    raise OSError(5, "")


def test_closed_while_others_write_the_file_is_whole_and_no_other_is_hit(monkeypatch, tmp_path):
    """A second Ctrl-C closes the store of `pack` under its threads."""
    source = Drawn(200)
    form, path = form_of(source, SIDE), tmp_path / "x.packed"
    at_work, go_on, write = threading.Barrier(5), threading.Event(), packed._write

    def slow(fd: int, data: bytes, at: int) -> None:
        if at >= form.rows_at and not go_on.is_set():
            at_work.wait(10)
            go_on.wait(10)
        write(fd, data, at)

    store = opened(path, form, write=True, make=True)
    number = store._fd
    monkeypatch.setattr(packed, "_write", slow)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(fill, store, source, [i]) for i in range(4)]
        at_work.wait(10)
        store.close()
        bystander = os.open(tmp_path / "thesis", os.O_RDWR | os.O_CREAT)
        assert bystander != number
        go_on.set()
        for job in jobs:
            job.result()
    fill(store, source, range(4, 200))  # nothing happens
    assert os.read(bystander, 1) == b""
    os.close(bystander)
    again = opened(path, form, write=True)
    assert again.writes  # the lock was given back by the last one
    assert [right(again, source, i) for i in range(6)] == [True] * 4 + [None] * 2
    again.close()


# ---------------------------------------------------------------- the disk


def test_no_home_no_cache_but_a_run(monkeypatch):
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SSLPRE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    source = Drawn(50)
    assert choose("auto", source)[0] == "ram"
    assert choose("auto", source, reuse=False)[0] == "none"
    monkeypatch.setattr(room, "memory", lambda: 0)
    kind, words = choose("auto", source)
    assert kind == "none"
    assert words.endswith("; not on disk: there is no home folder, and `SSLPRE_CACHE` is not set")
    with pytest.raises(SslpreError, match="`--store disk` is not possible: there is no home folder"):
        choose("disk", source)
    with pytest.raises(SslpreError, match="there is no home folder") as caught:
        pack(source, SIDE, None, 1, quiet(source))
    assert (caught.value.code, caught.value.hint) == (3, "name a file: sslpre pack IMAGES OUT")


def test_all_packed_files_together_take_half_of_the_disk(monkeypatch, tmp_path, cache):
    first, second = Drawn(1000), Drawn(1000, written="01")
    choose("disk", first)
    took = os.stat(file_of(first, SIDE)).st_blocks * 512
    needs = form_of(second, SIDE).total - caches.PAGE  # less the first page, which is there by then
    free = [2 * needs + took]
    monkeypatch.setattr(room, "disk", lambda path: free[0])
    assert caches.beside(file_of(second, SIDE)) == took
    assert caches.beside(file_of(first, SIDE)) == caches.beside(tmp_path / "x.packed") == 0
    free[0] -= 1
    with pytest.raises(
        SslpreError, match=r"kB and 1\d\d kB of other packed files are more than half of that and the free"
    ):
        choose("disk", second)
    assert os.listdir(cache) == [file_of(first, SIDE).name]
    free[0] = 2 * needs
    pack(second, SIDE, tmp_path / "x.packed", 1, quiet(second)).close()  # a place of one's own is one's own
    assert choose("auto", second)[0] == "ram"
    free[0] = 2 * needs + took
    assert choose("disk", second)[0] == "disk"


def test_a_file_of_the_same_images_in_another_form_is_told(monkeypatch):
    source = Drawn(20)
    choose("disk", Drawn(20, written="01"))
    assert choose("disk", source, write=True)[0] == "disk"  # one that is empty is nothing to tell of
    assert "px is there" not in open_store("ram", source, 9, "cpu", reuse=True)[1]
    assert choose("ram", source)[1] == "in RAM, 2.2 kB"
    pack(source, 8, None, 1, quiet(source)).close()
    told = "; a file of these images at 8 px is there, this run wants 6"
    assert choose("ram", source)[1] == "in RAM, 2.2 kB" + told
    assert choose("disk", source)[1].endswith("0 of 20 images are there; it may be deleted when no run uses it" + told)
    (file_of(source, SIDE).parent / "x.packed").write_bytes(b"nothing of ours")
    file_of(source, 8).unlink()
    monkeypatch.setattr("sslpre.data.decode.decoder", lambda: "old decoder")
    pack(source, SIDE, None, 1, quiet(source)).close()
    assert choose("ram", source)[1].endswith(": every image is there")
    monkeypatch.setattr("sslpre.data.decode.decoder", lambda: "new decoder")
    assert choose("ram", Drawn(20, written="02"))[1] == "in RAM, 2.2 kB"
    told = "; a file of these images decoded by old decoder is there, here it is new decoder"
    assert choose("ram", source)[1] == "in RAM, 2.2 kB" + told


def test_space_is_reserved_in_pieces(monkeypatch, tmp_path):
    calls, real = [], os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, at, size: (calls.append((at, size)), real(fd, at, size))[1])
    monkeypatch.setattr(room, "PIECE", 40_000)
    with open(tmp_path / "x", "w+b") as file:
        file.write(b"abc")
        file.flush()
        room.reserve(file.fileno(), 100_000)
        assert calls == [(0, 40_000), (40_000, 40_000), (80_000, 20_000)]
        assert os.fstat(file.fileno()).st_size == 100_000
    assert (tmp_path / "x").read_bytes() == b"abc" + bytes(99_997)


def test_a_system_that_cannot_reserve_writes_zeros(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    source = Drawn(20_000)
    store, _ = open_store("disk", source, SIDE, "cpu", reuse=True)
    fill(store, source, [0, 19_999])
    info = os.stat(store.path)
    assert info.st_size == store.form.total
    assert info.st_blocks * 512 >= 20_000 * ROW
    store.close()
    with open(store.path, "r+b") as file:
        file.truncate(store.form.rows_at + 5 * ROW + 7)  # as after an end in the middle of it
    again, _ = open_store("disk", source, SIDE, "cpu", reuse=True)
    assert (again.path.stat().st_size, again.writes) == (store.form.total, True)
    assert [right(again, source, i) for i in (0, 19_999)] == [True, None]
    again.close()


def test_reserving_much_is_said_and_can_be_interrupted(monkeypatch, cache):
    source, lines = Drawn(1000), list[str]()
    monkeypatch.setattr(packed, "LONG", form_of(source, SIDE).total - caches.PAGE)
    store, _ = open_store("disk", source, SIDE, "cpu", reuse=True, say=lines.append)
    assert lines == []
    store.close()
    store.path.unlink()
    monkeypatch.setattr(packed, "LONG", form_of(source, SIDE).total - caches.PAGE - 1)
    store, _ = open_store("disk", source, SIDE, "cpu", reuse=True, say=lines.append)
    assert lines == [f"reserving 124 kB for `{store.path}`"]
    store.close()
    store.path.unlink()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "posix_fallocate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_store("disk", source, SIDE, "cpu", reuse=True, say=lines.append)
    assert os.listdir(cache) == []


def test_a_kernel_that_gives_only_what_it_can_keep(monkeypatch):
    text = "MemAvailable: 900 kB\nCommitLimit: 1000 kB\nCommitted_AS: 400 kB\n"
    assert room.promisable(text) == 600 * 1024
    assert room.promisable("CommitLimit: 1 kB\nCommitted_AS: 3 kB\n") == 0
    assert room.promisable("MemAvailable: 900 kB\n") is None
