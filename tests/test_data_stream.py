"""The order of images, what replaces a bad one, and that threads change nothing but the speed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sslpre.data import BadImage
from sslpre.data.find import find
from sslpre.data.headers import jpegs, short_side
from sslpre.data.stream import BadList, Pixels, Stream, order
from sslpre.errors import SslpreError

SIDE = 4


class Memory:
    """Image i is the constant (i, i // 256, 0); `bad` ones raise. Sizes cycle, so that they can be told apart."""

    where, fingerprint = "memory", "00"

    def __init__(self, count: int, bad: object = (), before: Callable[[int], None] = lambda i: None):
        self.count, self.bad, self.before = count, frozenset(bad), before
        self.labels, self.classes = np.full(count, -1), []

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"{i}.jpg"

    def read(self, i: int, side: int | None = None) -> np.ndarray:
        self.before(i)
        if i in self.bad:
            raise BadImage("truncated")
        return np.tile(np.array([i % 256, i // 256, 0], np.uint8), (*self.size(i), 1))

    def size(self, i: int) -> tuple[int, int]:
        if i in self.bad:
            raise BadImage("truncated")
        return 3 + i % 5, 4 + i % 3


def stream(
    source: Memory, batch: int = 8, workers: int = 0, limit: float = 1.0, seed: int = 0, **more: object
) -> Stream:
    bad = more.pop("bad", None) or BadList(None, limit, len(source), say=lambda line: None)
    return Stream(source, side=SIDE, batch_size=batch, seed=seed, workers=workers, device="cpu", bad=bad, **more)


def indices(batches: object) -> list[list[int]]:
    return [batch.index.tolist() for batch in batches]


def decoding_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("sslpre-decode")]


# ---------------------------------------------------------------- order


@given(count=st.integers(0, 300), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_order_is_a_permutation_and_a_function_of_its_arguments(count, seed, epoch):
    torch.manual_seed(count)
    rows = order(count, seed, epoch)
    assert rows.dtype == torch.int64
    assert sorted(rows.tolist()) == list(range(count))
    state = torch.get_rng_state()
    assert torch.equal(rows, order(count, seed, epoch))
    assert torch.equal(state, torch.get_rng_state())


def test_orders_differ_and_are_uniform():
    orders = torch.stack([order(20, seed, epoch) for seed in range(30) for epoch in range(30)])
    assert len({tuple(row.tolist()) for row in orders}) == 900
    first = torch.bincount(orders[:, 0], minlength=20)
    assert ((first - 45) ** 2 / 45).sum() < 43.8  # chi-square with 19 degrees of freedom, 0.1 %


# ---------------------------------------------------------------- batches


def check(batch: Pixels, source: Memory) -> None:
    b = len(batch.index)
    assert batch.pixels.dtype == torch.uint8
    assert batch.pixels.shape == (b, 3, SIDE, SIDE)
    assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
    assert (batch.size.dtype, batch.index.dtype) == (torch.int64, torch.int64)
    for row, i in enumerate(batch.index.tolist()):
        assert batch.size[row].tolist() == list(source.size(i))
        assert batch.pixels[row].flatten(1).unique(dim=1).flatten().tolist() == [i % 256, i // 256, 0]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 90), workers=st.sampled_from([0, 1, 3]))
def test_batches_equal_the_slow_obvious_loop(data, count, workers):
    bad = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    size = data.draw(st.integers(1, count))
    start = data.draw(st.integers(0, count // size))
    source = Memory(count, bad)

    def good(i: int) -> int:
        while i in bad:
            i = (i + 1) % count
        return i

    rows = [good(i) for i in order(count, 5, 2).tolist()]
    whole = [rows[k * size : (k + 1) * size] for k in range(count // size)]
    batches = list(stream(source, size, workers, seed=5).epoch(2, start))
    assert indices(batches) == whole[start:]
    for batch in batches:
        check(batch, source)
    straight = stream(source, size, workers)
    assert straight.steps_per_epoch == count // size
    everything = [i for batch in indices(straight.in_order()) for i in batch]
    assert everything == [good(i) for i in range(count)]


def test_a_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(SslpreError, match="batch of 9 is larger than the data set of 8 images") as caught:
        stream(Memory(8), 9).epoch(0)
    assert caught.value.code == 2
    assert [len(batch) for batch in indices(stream(Memory(8), 9).in_order())] == [8]
    assert list(stream(Memory(0), 9).in_order()) == []


def test_slow_images_do_not_change_the_order():
    waits = np.random.default_rng(0).random(64) * 0.004
    sources = [Memory(64, {7, 8, 40}, lambda i: time.sleep(waits[i])) for _ in range(3)]
    runs = [stream(source, 6, workers) for source, workers in zip(sources, (0, 1, 4), strict=True)]
    first, *others = [indices(run.epoch(0)) for run in runs]
    assert all(other == first for other in others)
    assert runs[0].waited >= waits[[i for batch in first for i in batch]].sum()
    assert runs[2].waited < runs[0].waited


def test_decoding_runs_ahead_but_not_far():
    seen: list[int] = []
    batches = stream(Memory(1000, (), seen.append), 20, workers=2).in_order()
    next(batches)
    deadline = time.monotonic() + 10
    while len(seen) < 40 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert 40 <= len(seen) <= 100
    batches.close()


def test_steps_run_on_over_epochs():
    """Steps 2 to 7 of epochs of 3: the same batches as epoch by epoch."""
    one = stream(Memory(21), 7)
    expected = [p.index for e, start in ((0, 2), (1, 0), (2, 0)) for p in one.epoch(e, start)][:5]
    got = [p.index for p in stream(Memory(21), 7, workers=2).steps(2, 7)]
    assert len(got) == 5 and all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_its_owners_until_the_last_view_of_it_is_gone(workers):
    """Memory is used again, but never under somebody's hands."""
    run, kept, places = stream(Memory(400), 8, workers), {}, []
    for step, batch in enumerate(run.steps(0, 150)):
        places.append(batch.pixels.data_ptr())
        if step % 10 == 0:
            kept[step] = (batch.pixels[3:, 1].reshape(-1)[2:], batch.pixels.clone())
        if step % 10 == 5:
            kept[step] = (batch.pixels.numpy(), batch.pixels.clone())
    for step, (view, copy) in kept.items():
        wanted = copy.numpy() if step % 10 else copy[3:, 1].reshape(-1)[2:].numpy()
        assert (np.asarray(view) == wanted).all()
    assert len(set(places)) < 60  # of 150


def test_large_jpegs_keep_their_original_size(tmp_path):
    Image.new("RGB", (304, 208), (9, 99, 199)).save(tmp_path / "a.jpg", quality=95)
    source = find(tmp_path).train
    assert source.read(0, 16).shape == (52, 76, 3)  # decoded at a quarter
    run = Stream(source, side=16, batch_size=1, seed=0, workers=1, device="cpu", bad=BadList(None, 0, 1))
    (batch,) = run.in_order()
    assert batch.size.tolist() == [[208, 304]]
    assert (batch.pixels.float().mean((0, 2, 3)) - torch.tensor([9.0, 99, 199])).abs().max() < 3


# ---------------------------------------------------------------- errors and the end of threads


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_reaches_the_consumer(workers):
    def fail(i: int) -> None:
        if i == 37:
            raise RuntimeError("disk on fire")

    batches, seen = stream(Memory(60, (), fail), 10, workers).in_order(), []
    with pytest.raises(RuntimeError, match="disk on fire"):
        seen.extend(indices(batches))
        seen.extend(batch.index.tolist() for batch in batches)
    assert decoding_threads() == []


@pytest.mark.parametrize("workers", [0, 3])
def test_closing_early_stops_the_threads(workers):
    batches = stream(Memory(10_000, (), lambda i: time.sleep(0.002)), 500, workers).in_order()
    next(batches)
    began = time.perf_counter()
    batches.close()
    assert time.perf_counter() - began < 0.5  # what had been asked for ahead would take longer
    assert decoding_threads() == []


def test_a_program_that_stops_in_mid_epoch_exits(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code = f"""
from pathlib import Path
from sslpre.data.find import find, subset
from sslpre.data.stream import BadList, Stream
source = subset(find(Path({str(tmp_path)!r})).train, [0] * 400)
batches = Stream(source, side=8, batch_size=4, seed=0, workers=2, device="cpu", bad=BadList(None, 0, 1)).epoch(0)
print(len(next(batches).index))
raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (7, "4\n", "")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [0.0, 0.01, 1.0])
def test_all_bad_ends_with_an_error(workers, limit):
    reads: list[int] = []
    run = stream(Memory(200, range(200), reads.append), 20, workers, limit)
    with pytest.raises(SslpreError) as caught:
        list(run.epoch(0))
    assert caught.value.code == 20
    assert len(reads) <= 6 * (1 + 200 * limit)  # a worker gives up once there are more bad images than may be
    if limit == 1.0:
        assert caught.value.message == "none of the 200 images of `memory` could be read"


# ---------------------------------------------------------------- the list of bad images


def test_bad_images_are_named_once_listed_and_limited(tmp_path, capsys):
    path = tmp_path / "bad_images.jsonl"
    source = Memory(48_213, {3})
    bad = BadList(path, 0.0001, len(source))
    assert not path.exists()
    for i in (812, 3, 812, 3, 7):
        bad.add(source, i, "truncated" if i != 7 else "zero bytes")
    assert capsys.readouterr().err.splitlines() == [
        "skipped `812.jpg`: truncated. 1 bad of 48,213 so far",
        "skipped `3.jpg`: truncated. 2 bad of 48,213 so far",
        "skipped `7.jpg`: zero bytes. 3 bad of 48,213 so far",
    ]
    assert [json.loads(line) for line in path.read_text().splitlines()][2] == {
        "where": "memory", "name": "7.jpg", "index": 7, "reason": "zero bytes",
    }  # fmt: skip
    bad.add(source, 8, "x")
    with pytest.raises(SslpreError) as caught:
        bad.add(source, 9, "x")
    assert caught.value.code == 20
    assert caught.value.message == "5 of 48,213 images could not be read so far, above `--max-bad 0.0001`"
    assert caught.value.hint == "allow more, or start again without those named above: `--max-bad 0.01`"


def test_reloading_does_not_count_twice(tmp_path, capsys):
    path, source = tmp_path / "bad_images.jsonl", Memory(100)
    first = BadList(path, 0.02, 100)
    first.add(source, 1, "truncated")
    first.add(source, 2, "truncated")
    path.write_bytes(path.read_bytes() + b'{"where": "mem')  # killed while writing
    capsys.readouterr()
    again = BadList(path, 0.02, 100)
    assert again.count == 2
    again.add(source, 2, "truncated")
    assert capsys.readouterr().err == ""
    with pytest.raises(SslpreError, match="3 of 100"):
        again.add(source, 3, "truncated")
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [1, 2, 3]
    with pytest.raises(SslpreError, match="3 of 100"):  # resuming under the same limit stops at the first it meets
        BadList(path, 0.02, 100).add(source, 1, "truncated")
    path.write_text("[]\n")
    with pytest.raises(SslpreError, match="line 1") as caught:
        BadList(path, 0.02, 100)
    assert caught.value.code == 5


@pytest.mark.parametrize(
    ("limit", "total", "allowed"), [(0.29, 100, 29), (0.07, 100, 7), (0.01, 99, 0), (0, 5, 0), (1, 5, 5)]
)
def test_the_limit_is_a_share(limit, total, allowed):
    assert BadList(None, limit, total).allowed == allowed


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_bad_images_are_reported_in_the_order_of_batches(workers, tmp_path):
    source = Memory(400, range(0, 400, 9), lambda i: time.sleep(0.0005 * (i % 3)))
    lines: list[str] = []
    bad = BadList(tmp_path / "bad.jsonl", 0.05, 400, say=lines.append)
    got = []
    with pytest.raises(SslpreError, match="21 of 400"):
        for batch in stream(source, 40, workers, bad=bad).epoch(0):
            got.append(batch.index.tolist())
    wanted = [i for i in order(400, 0, 0).tolist() if i % 9 == 0][:21]
    assert [line.split("`")[1] for line in lines] == [f"{i}.jpg" for i in wanted]
    assert len(got) == order(400, 0, 0).tolist().index(wanted[20]) // 40


def test_two_sources_share_one_allowance():
    first = BadList(None, 0.02, 150, say=lambda line: None)
    second = BadList(None, 0.02, 150, say=lambda line: None, after=first)
    one, two = Memory(100), Memory(50)  # their images have the same names
    for i in (1, 2):
        first.add(one, i, "truncated")
    second.add(two, 1, "truncated")
    assert (first.count, second.count) == (2, 3)
    with pytest.raises(SslpreError, match="4 of 150"):
        second.add(two, 2, "truncated")


def test_adding_from_many_threads_counts_once(tmp_path):
    source, path = Memory(50), tmp_path / "bad.jsonl"
    bad = BadList(path, 1, 50, say=lambda line: None)
    threads = [threading.Thread(target=lambda: [bad.add(source, i, "x") for i in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bad.count == len(path.read_text().splitlines()) == 50


# ---------------------------------------------------------------- short side


def test_short_side():
    assert short_side(Memory(1)) == 3
    sides = [min(3 + i % 5, 4 + i % 3) for i in range(101)]
    assert short_side(Memory(101)) == int(np.median(sides))
    asked: list[int] = []

    class Counting(Memory):
        def size(self, i: int) -> tuple[int, int]:
            asked.append(i)
            return super().size(i)

    short_side(Counting(10_000, range(0, 10_000, 2)), at_most=50)
    assert len(asked) == 50
    assert (asked[0], asked[-1]) == (0, 9999)
    assert np.ptp(np.diff(asked)) <= 1
    for source in (Memory(20, range(20)), Memory(0)):
        with pytest.raises(SslpreError) as caught:
            short_side(source)
        assert caught.value.code == 4


def test_real_files_with_bad_ones_among_them(tmp_path: Path):
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "03.png").write_bytes(b"")
    (tmp_path / "04.png").write_bytes((tmp_path / "04.png").read_bytes()[:500])
    (tmp_path / "11.png").write_text("no image")
    source = find(tmp_path).train
    (tmp_path / "07.png").unlink()  # deleted after the scan
    lines: list[str] = []
    bad = BadList(None, 0.5, 12, say=lines.append)
    run = Stream(source, side=8, batch_size=5, seed=0, workers=2, device="cpu", bad=bad)
    assert [i for batch in indices(run.in_order()) for i in batch] == [0, 1, 2, 5, 5, 5, 6, 8, 8, 9, 10, 0]
    assert lines == [
        "skipped `03.png`: zero bytes. 1 bad of 12 so far",
        "skipped `04.png`: truncated. 2 bad of 12 so far",
        "skipped `07.png`: the file has vanished. 3 bad of 12 so far",
        "skipped `11.png`: not a JPEG, PNG, WebP, BMP, GIF or TIFF file. 4 bad of 12 so far",
    ]
    assert short_side(source) == 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_batches_equal_those_on_the_cpu():
    source = Memory(300, {5})
    here = list(stream(source, 32, 2).epoch(0))
    bad = BadList(None, 1, 300, say=lambda line: None)
    there = Stream(source, side=SIDE, batch_size=32, seed=0, workers=2, device="cuda", bad=bad)
    for a, b in zip(here, there.epoch(0), strict=True):
        assert b.pixels.device.type == "cuda"
        assert b.pixels.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a.pixels, b.pixels.cpu())
        assert torch.equal(a.index, b.index)


def test_jpegs_are_told_by_their_names():
    class Names(list):
        name = list.__getitem__

    assert jpegs(Names(["a.JPG", "b.jpeg", "c.png"]))
    assert not jpegs(Names(["a.jpg", "b.png"]))
    assert jpegs(Names([f"{i}.jpg" for i in range(1000)]))
