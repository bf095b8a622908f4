"""Two runs and one directory: the second is told who has it; what a dead one left is taken over."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest

from sslpre.errors import SslpreError
from sslpre.train import lock, loop

SMALL = (
    "--backbone test_resnet --image-size 32 --batch-size 8 --precision fp32 --device cpu --workers 1 --epochs"
).split()


@pytest.fixture
def running(tmp_path, child, photos, warm):
    """A run that trains for long, in `r`."""
    words = ["pretrain", "rotation", photos, *SMALL, "5000", "--out", "r"]
    process = warm.start(*words, cwd=tmp_path, env=child, stderr=subprocess.PIPE)
    begun = time.monotonic()
    while not (tmp_path / "r/checkpoints/step-00000006/MANIFEST.json").exists():
        assert process.poll() is None and time.monotonic() - begun < 120, process.communicate()
        time.sleep(0.02)
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_told_who_has_the_directory_and_a_dead_one_is_taken_over(
    running, run_cli, photos, tmp_path, monkeypatch
):
    for words in (["--resume", "r"], ["rotation", photos, *SMALL, "5000", "--out", "r", "--resume", "auto"]):
        done = run_cli("pretrain", *words)
        assert done.code == 6, done.err
        error, hint = done.err.splitlines()[-2:]
        assert error.startswith(f"error: `r` is in use by process {running.pid} on ") and "last sign of life" in error
        assert hint == "hint: wait for it, or stop it; a run of its own needs another --out"
    assert running.poll() is None
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert (tmp_path / "r/.lock").exists()
    recipe = (tmp_path / "r/recipe.toml").read_text()
    state = json.loads(sorted((tmp_path / "r/checkpoints").glob("step-*"))[-1].joinpath("state.json").read_text())
    take = loop.take_step
    monkeypatch.setattr(loop, "take_step", lambda *step: (take(*step), signal.raise_signal(signal.SIGINT)))
    done = run_cli("pretrain", "--resume", "r", "--workers", "1")
    assert done.code == 130 and f"was left by process {running.pid}" in done.err, done.err
    assert f"at step {state['step']} of 30000" in done.err and (tmp_path / "r/recipe.toml").read_text() == recipe
    assert not (tmp_path / "r/.lock").exists(), "who ends tidily leaves no lock"


def test_two_that_begin_at_once_in_one_directory(child, photos, tmp_path, warm):
    """Just one of them trains; the other is told, and has removed nothing."""
    words = ["pretrain", "rotation", photos, *SMALL, "2", "--out", "r"]
    two = [warm.start(*words, cwd=tmp_path, env=child, stderr=subprocess.PIPE) for _ in range(2)]
    ends = sorted((process.communicate(timeout=120)[1], process.returncode) for process in two)
    codes = sorted(code for _, code in ends)
    assert codes in ([0, 2], [0, 6]), ends
    assert (tmp_path / "r/encoder/model.safetensors").exists()


def test_what_was_killed_before_its_first_checkpoint_is_begun_again(run_cli, photos, tmp_path):
    (tmp_path / "r/checkpoints/.tmp-1").mkdir(parents=True)
    (tmp_path / "r/.recipe.toml-ab12").write_text("half of i")
    (tmp_path / "r/.lock").write_text(json.dumps({"pid": 2**22 + 1, "host": "here", "boot": lock.boot()}))
    (tmp_path / "r/data.json").write_text("{")
    words = ["rotation", photos, *SMALL, "1", "--out", "r", "--resume", "auto"]
    done = run_cli("pretrain", *words)
    assert done.code == 0, done.err
    shutil.rmtree(tmp_path / "r")
    (tmp_path / "r").mkdir()
    (tmp_path / "r/.lock").write_text("")
    (tmp_path / "r/mine.txt").write_text("")
    done = run_cli("pretrain", *words)
    assert done.code == 2 and "`r` exists" in done.err and (tmp_path / "r/mine.txt").exists()


@pytest.mark.parametrize(
    ("owner", "quiet", "refused"),
    [
        ({"pid": 1, "host": "gpu07", "boot": "another"}, 8, True),
        ({"pid": 1, "host": "gpu07", "boot": "another"}, 700, False),
        ({"pid": os.getpid(), "host": "here", "boot": "mine"}, 8, False),  # it had no system's lock: it has gone
        ("no owner", 8, False),
    ],
)
def test_a_sign_of_life_decides_where_locks_do_not_reach(owner, quiet, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "boot", lambda: "mine")
    (tmp_path / ".lock").write_text(json.dumps(owner))
    now = time.time()
    os.utime(tmp_path / ".lock", (now - quiet, now - quiet))
    if refused:
        with pytest.raises(SslpreError, match=rf"in use by process 1 on gpu07 \(last sign of life {quiet} s ago\)"):
            lock.take(tmp_path)
    else:
        lock.take(tmp_path).release()


@pytest.mark.parametrize("alive", [True, False])
def test_a_file_system_without_locks(alive, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "locked", lambda fd: False)
    pid = os.getpid() if alive else 2**22 + 1
    (tmp_path / ".lock").write_text(json.dumps({"pid": pid, "host": "here", "boot": lock.boot()}))
    if alive:
        with pytest.raises(SslpreError, match="in use by process"):
            lock.take(tmp_path)
    else:
        lock.take(tmp_path).release()


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    """Ages are differences of times that the disk gives, whatever this machine's clock says."""
    (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": "gpu07", "boot": "another"}))
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with pytest.raises(SslpreError, match="in use by process 1"):
        lock.take(tmp_path)


def test_a_take_over_is_noticed_and_ends_nothing_of_the_other(tmp_path, monkeypatch):
    """The first one gives no sign, the second takes the directory; the first may write no more, the second goes on."""
    monkeypatch.setattr(lock, "locked", lambda fd: False)  # a file system without locks
    monkeypatch.setattr(lock, "alive", lambda pid: False)
    first = lock.take(tmp_path)
    second = lock.take(tmp_path)
    with pytest.raises(SslpreError, match="taken over") as end:
        first.check()
    assert end.value.code == 6
    second.check()
    first.release()
    second.check()
    assert (tmp_path / ".lock").exists()
    second.release()
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("locks", [True, False])
def test_a_lock_that_is_deleted_is_made_again_and_a_directory_that_is_gone_is_the_disks_fault(
    locks, tmp_path, monkeypatch
):
    if not locks:
        monkeypatch.setattr(lock, "locked", lambda fd: False)
    (tmp_path / "r").mkdir()
    mine = lock.take(tmp_path / "r")
    (tmp_path / "r/.lock").unlink()
    mine.check()
    with pytest.raises(SslpreError, match="in use by process"):
        lock.take(tmp_path / "r")
    (tmp_path / "r").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        mine.check()
    (tmp_path / "away").rename(tmp_path / "r")
    mine.check()
    mine.release()


def test_who_waits_gets_what_a_machine_left_that_went_away(tmp_path, monkeypatch):
    """`--resume auto` on another machine, after the first one lost its power: no error, but a wait until it is sure."""
    monkeypatch.setattr(lock, "SILENT", 0.6)
    monkeypatch.setattr(lock, "BEAT", 0.1)
    (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": "gpu07", "boot": "another"}))
    with pytest.raises(SslpreError, match="in use"), lock.held(tmp_path):
        pass
    begun = time.monotonic()
    with lock.held(tmp_path, patient=True) as mine:
        assert mine is not None and time.monotonic() - begun > 0.2
    (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": socket.gethostname(), "boot": "before"}))
    lock.take(tmp_path).release()  # the same machine has started again: the system's lock says enough


def test_it_beats_and_notices_when_it_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    mine = lock.take(tmp_path)
    os.utime(tmp_path / ".lock", (0, 0))
    time.sleep(0.5)
    assert (tmp_path / ".lock").stat().st_mtime > 1e9
    mine.check()
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").write_text("another's")
    with pytest.raises(SslpreError, match="taken over") as end:
        mine.check()
    assert end.value.code == 6
    mine.release()
    assert (tmp_path / ".lock").read_text() == "another's"
