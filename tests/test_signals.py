"""Asked to stop, by a person, a scheduler or a terminal that closes: what is saved, what is said, and the exit code."""

import os
import pty
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from sslpre.train.interrupt import interruptible

SMALL = (
    "--backbone test_resnet --image-size 32 --batch-size 8 --precision fp32 --device cpu --workers 1 --epochs 12"
).split()


@pytest.fixture
def sslpre(tmp_path, child, warm):
    """Start `sslpre` in an empty folder, cold where there is something `before` it; what runs at the end is killed."""
    started = []

    def start(*words, before=None, **streams):
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
        if before is None:
            started.append(warm.start(*words, cwd=tmp_path, env=child, **streams))
            return started[-1]
        command = [*before, sys.executable, "-m", "sslpre", *map(str, words)]
        heard = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
        whole = {"start_new_session": True, "preexec_fn": heard, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=child, **whole, **streams))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for(path, process, patience=120):
    begun = time.monotonic()
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begun < patience
        time.sleep(0.01)


def weights(run):
    return load_file(run / "encoder/model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory):
    from sslpre.cli import run as run_words

    out = tmp_path_factory.mktemp("whole") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run_words(["pretrain", "rotation", str(photos), *SMALL, "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    return out


@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGUSR2", 140), ("SIGHUP", 129), ("SIGINT", 130)]
)
def test_a_signal_costs_one_step(name, code, sslpre, photos, undisturbed, tmp_path):
    process = sslpre("pretrain", "rotation", photos, *SMALL, "--out", "r")
    wait_for(tmp_path / "r/checkpoints/step-00000012/MANIFEST.json", process)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    error, hint = err.splitlines()[-2:]
    said = "interrupted" if name == "SIGINT" else f"stopped by {name}"
    assert error.startswith(f"error: {said}: `r` is saved at step ") and hint == "hint: sslpre pretrain --resume r"
    step = int(error.split("at step ")[1].split()[0])
    assert not (tmp_path / "r/encoder").exists() and "Traceback" not in err
    if name not in ("SIGTERM", "SIGINT"):  # the others are saved by the same lines
        return
    assert (tmp_path / f"r/checkpoints/step-{step:08d}/MANIFEST.json").exists() and 12 <= step < 72
    again = sslpre("pretrain", "--resume", "r", "--device", "cpu", "--workers", "1")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0 and f"at step {step} of 72" in err, err
    a, b = weights(undisturbed), weights(tmp_path / "r")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_before_the_first_step_a_signal_leaves_nothing(sslpre, tmp_path, photos):
    """While torch is imported, images are looked at and the batch is tried: no directory, no traceback, exit 143."""
    for pause in (0.3, 1.5, 2.5):
        process = sslpre("pretrain", "rotation", photos, *SMALL, "--out", "r", before=[])
        time.sleep(pause)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        if "step" in err:  # a fast machine: it was training already
            break
        if err:  # before the program looks after signals, the system's own way: at once, without a word
            assert process.returncode == 143, err
            assert err.splitlines()[-2].startswith("error: stopped by SIGTERM") and "Traceback" not in err
        else:
            assert process.returncode in (143, -signal.SIGTERM)
        assert not (tmp_path / "r").exists()


def test_a_second_ctrl_c_leaves_at_once():
    with interruptible() as stop:
        assert stop() == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop() == signal.SIGTERM, "a scheduler may say it twice"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_nohup_is_obeyed(sslpre, photos, tmp_path):
    process = sslpre("pretrain", "rotation", photos, *SMALL, "--out", "r", before=["nohup"])
    wait_for(tmp_path / "r/checkpoints/step-00000006/MANIFEST.json", process)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "done       r: 72 steps" in err


def test_a_terminal_that_closes_saves_the_run(sslpre, photos, tmp_path):
    """The bar's terminal goes away, and with it a SIGHUP comes, as when a connection is lost."""
    ours, theirs = pty.openpty()
    process = sslpre("pretrain", "rotation", photos, *SMALL, "--epochs", "5000", "--out", "r", stderr=theirs)
    os.close(theirs)
    wait_for(tmp_path / "r/checkpoints/step-00000006/MANIFEST.json", process)
    os.close(ours)
    time.sleep(0.5)  # it goes on training with nobody to tell
    assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    process.wait(timeout=60)
    assert process.returncode == 129
    steps = sorted(path.name for path in (tmp_path / "r/checkpoints").glob("step-*"))
    assert steps and steps[-1] > "step-00000006"


def test_a_pipe_that_nobody_reads_ends_no_run(sslpre, photos, tmp_path, undisturbed):
    """`sslpre pretrain … 2>&1 | head -1`: training does not die of its own words."""
    process = sslpre("pretrain", "rotation", photos, *SMALL, "--out", "r", stderr=subprocess.STDOUT)
    assert process.stdout.readline().startswith("images")
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    a, b = weights(undisturbed), weights(tmp_path / "r")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_data_for_a_closed_pipe_ends_quietly(sslpre):
    """`sslpre recipes simclr | head -0`, as cat would: 141."""
    reader, writer = os.pipe()
    os.close(reader)
    process = sslpre("recipes", "simclr", stdout=writer, before=[])
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 141 and err == ""
