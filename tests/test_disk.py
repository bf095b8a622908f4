"""A disk that is full, limited, read-only or gone, for real: training goes on, tries again, and loses nothing."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import threading
import time

import pytest
import torch

from sslpre.contract.single import assert_equal, start, state
from sslpre.errors import SslpreError
from sslpre.train import checkpoint, disk, loop
from sslpre.train import run as runs

PAUSES = (0.05, 0.1, 0.2)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(disk, "PAUSES", PAUSES)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 16 MB."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("may not mount a file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@contextlib.contextmanager
def at_step(number, do):
    """Calls `do` once, before this step."""
    take = loop.take_step

    def taking(run, *rest):
        if run.step == number - 1:
            do()
        return take(run, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", taking)
        yield


def slow(seconds):
    """Steps take at least so long, so that pauses between tries pass."""
    take = loop.take_step
    return lambda run, *rest: (time.sleep(seconds), take(run, *rest))


def test_training_goes_on_past_a_full_disk_and_saves_when_there_is_room(small_disk, tmp_path, capfd, monkeypatch):
    whole = start("rotation", tmp_path / "whole", train={"epochs": 4})
    loop.train(whole)
    run = start("rotation", small_disk / "run", train={"epochs": 4})
    filler = small_disk / "filler"

    def fill():
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))

    monkeypatch.setattr(loop, "take_step", slow(0.03))
    monkeypatch.setattr(disk, "PAUSES", (0.05, 0.3, 5.0))
    with at_step(4, fill), at_step(7, filler.unlink):
        loop.train(run)
    told = capfd.readouterr().err
    assert "warning: step 5 of" in told and "no space left on device" in told and "training goes on" in told
    assert "can be written to again" in told
    assert_equal(state(whole), state(run))
    assert checkpoint.newest(run.folder).state["step"] == run.step == 20
    steps = [json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]


def test_a_disk_that_stays_full_ends_the_run_and_the_old_checkpoint_is_whole(small_disk, monkeypatch, capfd):
    run = start("rotation", small_disk / "run", train={"epochs": 40})
    before = {}

    def fill():
        before.update(state(run))
        with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))

    monkeypatch.setattr(loop, "take_step", slow(0.03))
    with at_step(6, fill), pytest.raises(SslpreError, match="could not be saved: no space left on device") as end:
        loop.train(run)
    assert end.value.code == 13 and "--resume" in end.value.hint
    assert capfd.readouterr().err.count("warning: step") == len(PAUSES)
    saved = checkpoint.newest(run.folder)
    assert saved.state["step"] == 5 and not list((run.folder / "checkpoints").glob(".tmp-*"))
    assert all(torch.equal(before[name], tensor) for name, tensor in saved.model.items())
    (small_disk / "filler").unlink()
    again = start("rotation", small_disk / "run", train={"epochs": 40})
    runs.go_on(again)
    assert again.step == 5


def test_a_limit_on_the_size_of_files_is_a_full_disk(tmp_path, monkeypatch, capfd):
    """RLIMIT_FSIZE cuts a write off in its middle, as a quota does."""
    run = start("rotation", tmp_path / "run", train={"epochs": 40})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(loop, "take_step", slow(0.02))
    try:
        with (
            at_step(6, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))),
            pytest.raises(SslpreError, match="could not be saved: file too large") as end,
        ):
            loop.train(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert end.value.code == 13 and checkpoint.newest(run.folder).state["step"] == 5
    assert not list((run.folder / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize("back", [True, False])
def test_a_directory_that_vanishes(back, tmp_path, monkeypatch, capfd):
    run = start("rotation", tmp_path / "run", train={"epochs": 4})
    away = tmp_path / "away"
    monkeypatch.setattr(loop, "take_step", slow(0.03))
    monkeypatch.setattr(disk, "PAUSES", (0.05, 0.1, 2.0) if back else PAUSES)  # on a busy machine steps take longer
    with at_step(6, lambda: (tmp_path / "run").rename(away)):
        if back:
            with at_step(14, lambda: away.rename(tmp_path / "run")):
                loop.train(run)
            assert checkpoint.newest(run.folder).state["step"] == 20
        else:
            with pytest.raises(SslpreError, match="no such file or directory") as end:
                loop.train(run)
            assert end.value.code == 13 and checkpoint.newest(away).state["step"] == 5


def test_a_directory_that_becomes_read_only(tmp_path, monkeypatch, capfd):
    """As after an error of the file system, for root too: what is open stays so, nothing new can be opened."""
    run = start("rotation", tmp_path / "run", train={"epochs": 40})
    place = str(tmp_path / "run")

    def mount(*words):
        return subprocess.run(["mount", *words], capture_output=True).returncode == 0

    if not mount("--bind", place, place):
        pytest.skip("may not mount a file system here")
    subprocess.run(["umount", place], check=True)
    monkeypatch.setattr(loop, "take_step", slow(0.03))
    try:
        with (
            at_step(6, lambda: mount("--bind", place, place) and mount("-o", "remount,bind,ro", place)),
            pytest.raises(SslpreError, match="could not be saved: read-only file system") as end,
        ):
            loop.train(run)
    finally:
        subprocess.run(["umount", "-l", place], check=False)
    assert end.value.code == 13 and checkpoint.newest(run.folder).state["step"] == 5
    assert capfd.readouterr().err.count("warning: step") == len(PAUSES)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_that_may_no_more_be_written(tmp_path, monkeypatch):
    run = start("rotation", tmp_path / "run", train={"epochs": 40})
    monkeypatch.setattr(loop, "take_step", slow(0.03))
    with (
        at_step(6, lambda: (tmp_path / "run/checkpoints").chmod(0o500)),
        pytest.raises(SslpreError, match="permission denied") as end,
    ):
        loop.train(run)
    (tmp_path / "run/checkpoints").chmod(0o700)
    assert end.value.code == 13 and checkpoint.newest(run.folder).state["step"] == 5


def test_a_directory_that_vanishes_from_the_command_line(run_cli, photos, tmp_path, monkeypatch):
    """With the lock that a run holds: gone for a while, and the run is saved when it is back."""
    words = "--backbone test_resnet --image-size 32 --batch-size 8 --precision fp32 --device cpu --workers 1".split()
    monkeypatch.setattr(loop, "take_step", slow(0.03))
    monkeypatch.setattr(disk, "PAUSES", (0.05, 0.1, 2.0))
    away = at_step(8, lambda: (tmp_path / "r").rename(tmp_path / "away"))
    with away, at_step(15, lambda: (tmp_path / "away").rename(tmp_path / "r")):
        done = run_cli("pretrain", "rotation", photos, *words, "--epochs", "4", "--out", "r")
    assert done.code == 0 and "could not be saved: no such file or directory" in done.err, done.err
    assert (tmp_path / "r/encoder/model.safetensors").exists() and not (tmp_path / "r/.lock").exists()


def test_the_last_step_waits_for_room(small_disk, monkeypatch, capfd):
    """Its result is only in memory, and nothing else is left to do."""
    run = start("rotation", small_disk / "run", train={"epochs": 2})
    filler = small_disk / "filler"

    def fill():
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))

    with at_step(10, lambda: (fill(), threading.Timer(0.5, filler.unlink).start())):
        monkeypatch.setattr(disk, "PAUSES", (0.1, 2.0, 2.0))
        loop.train(run)
    assert checkpoint.newest(run.folder).state["step"] == 10


def test_nothing_is_removed_before_what_replaces_it_is_complete(tmp_path, monkeypatch):
    """At each moment of a save that fails, wherever it fails, two complete checkpoints are there."""
    run = start("rotation", tmp_path / "run", train={"epochs": 3})
    loop.train(run)
    folder = run.folder / "checkpoints"
    two = checkpoint.complete(folder)
    assert len(two) == 2
    writes = checkpoint.write_synced
    for fails in range(4):
        count = []

        def breaks(path, data, fails=fails, count=count):
            count.append(path)
            if len(count) > fails:
                path.write_bytes(data[: len(data) // 2])
                raise OSError(28, "No space left on device")
            writes(path, data)

        monkeypatch.setattr(checkpoint, "write_synced", breaks)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(folder, *[{"a": torch.ones(3)}] * 2, {"step": 99})
        assert checkpoint.complete(folder) == two and len(list(folder.iterdir())) == 2
    monkeypatch.setattr(checkpoint, "write_synced", writes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 400))
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(folder, *[{"a": torch.ones(300)}] * 2, {"step": 99})
    assert checkpoint.complete(folder) == two and len(list(folder.iterdir())) == 2
