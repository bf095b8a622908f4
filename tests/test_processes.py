"""Two processes as a user starts them: torchrun, what they agree on, what happens when one of them fails."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch

from sslpre.errors import SslpreError
from sslpre.train import announce, distributed

SMALL = (
    "--backbone",
    "test_resnet",
    "--image-size",
    "32",
    "--batch-size",
    "16",
    "--precision",
    "fp32",
    "--workers",
    "1",
)


@pytest.fixture
def processes(tmp_path, child, warm):
    """Start `sslpre` in processes that know each other, without torchrun: `processes(words0, words1)`."""
    started = []

    def start(*words, environment=None, count=2, first=""):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        for rank in range(count):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            own = words[rank] if len(words) > 1 else words[0]
            env = {**child, **{name: str(number) for name, number in ranks.items()}, **meeting}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            if environment is None:
                started.append(warm.start(*own, first=first, cwd=tmp_path, env=env, **pipes))
                continue
            command = [sys.executable, "-m", "sslpre", *map(str, own)]
            started.append(subprocess.Popen(command, cwd=tmp_path, env={**env, **environment}, text=True, **pipes))
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


def ended(running, patience=90):
    """(exit code, stderr) of both, which must end in time."""
    told = [process.communicate(timeout=patience) for process in running]
    return [(process.returncode, err) for process, (_, err) in zip(running, told, strict=True)]


def test_torchrun_trains_like_one_process(photos, tmp_path, child):
    """The same run from the command line, by one process and by two: sums in another order, nearly the same weights."""
    words = ["pretrain", "rotation", str(photos), *SMALL, "--epochs", "2", "--set", "optim.name=sgd", "--lr", "0.002"]
    for launcher, out in (
        ([sys.executable, "-m", "sslpre"], "one"),
        ([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sslpre"], "two"),
    ):
        done = subprocess.run(
            [*launcher, *words, "--out", out], cwd=tmp_path, env=child, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        told = [line.split()[0] for line in done.stderr.splitlines() if line]
        assert told.count("encoder") == told.count("run") == told.count("done") == 1, "only the first process speaks"
    assert "processes  2, 8 images of each batch in each" in done.stderr
    one, two = (safetensors.torch.load_file(tmp_path / out / "encoder/model.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (two[name].float() - tensor.float()).abs().max() < 5e-3, name
    lines = [(tmp_path / out / "metrics.jsonl").read_text().splitlines() for out in ("one", "two")]
    assert len(lines[0]) == len(lines[1]) == 1
    losses = [json.loads(line[-1])["loss"] for line in lines]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    done = subprocess.run(
        [sys.executable, "-m", "sslpre", "probe", "two", "--knn"],
        cwd=tmp_path,
        env=child,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_other_images_in_one_process(photos, tmp_path, processes):
    other = tmp_path / "other"
    other.mkdir()
    for path in sorted(photos.rglob("*.jpg"))[:40]:
        (other / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    both = [["pretrain", "simclr", images, *SMALL, "--epochs", "1", "--out", "r"] for images in (photos, other)]
    first, second = ended(processes(*both))
    assert first[0] == second[0] == 15
    line = next(line for line in first[1].splitlines() if line.startswith("error:"))
    assert line.startswith("error: processes differ in their images: `") and "in process 1" in line
    assert "error" not in second[1], "it is told once"
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "words, what", [(["--epochs", "2"], "recipe"), (["--epochs", "1", "--out", "elsewhere"], "directory")]
)
def test_other_words_in_one_process(words, what, photos, processes):
    plain = ["pretrain", "simclr", photos, *SMALL]
    first, second = ended(
        processes([*plain, "--epochs", "1", "--out", "r"], [*plain, *words] + ["--out", "r"] * (what == "recipe"))
    )
    assert first[0] == second[0] == 15 and f"error: processes differ in their {what}" in first[1]


def test_a_mistake_of_all_is_told_once(photos, processes):
    first, second = ended(processes(["pretrain", "simclr", photos, *SMALL, "--batch-size", "15"]))
    assert first[0] == second[0] == 2
    assert "error: batch size `15` cannot be shared out to 2 processes" in first[1]
    assert "hint: --batch-size 14 or --batch-size 16" in first[1] and "error" not in second[1]


@pytest.mark.parametrize("allowed, code", [("0.01", 20), ("0.1", 0)])
def test_bad_images_are_counted_and_told_once(allowed, code, photos, tmp_path, processes):
    """As one process would: whichever of them met the image, all know of it, and the first writes it down."""
    folder = tmp_path / "mine"
    shutil.copytree(photos, folder)
    for name in ("amber/03.jpg", "birch/05.jpg"):
        (folder / name).write_bytes(b"no picture")
    words = ["pretrain", "simclr", folder, *SMALL, "--epochs", "1", "--max-bad", allowed, "--out", "r"]
    first, second = ended(processes(words))
    assert first[0] == second[0] == code, first[1]
    assert "images could not be read" not in second[1] and "skipped" not in second[1]
    if code:
        assert "of 48 images could not be read so far, above `--max-bad 0.01`" in first[1]
        assert not (tmp_path / "r").exists()
    else:
        lines = (tmp_path / "r/bad_images.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["name"] for line in lines) == ["amber/03.jpg", "birch/05.jpg"]
        assert first[1].count("skipped `") == 2


def test_a_finished_run_is_told_by_one(photos, tmp_path, processes):
    words = ["pretrain", "simclr", photos, *SMALL, "--epochs", "1", "--out", "r"]
    first, second = ended(processes(words))
    assert first[0] == second[0] == 0 and "next:" in first[1] and "next:" not in second[1]
    state = json.loads((tmp_path / "r/checkpoints/step-00000003/state.json").read_text())
    assert state["processes"] == 2
    first, second = ended(processes(["pretrain", "--resume", "r", "--device", "cpu"])[2:])
    assert first[0] == second[0] == 0 and "was finished already" in first[1] and second[1].strip() == ""


def test_a_killed_process_ends_the_others(photos, tmp_path, processes):
    """kill -9: nobody can say why, but the others are gone within a minute and the run can be gone on with."""
    words, count = ["pretrain", "simclr", photos, *SMALL, "--batch-size", "12", "--epochs", "500", "--out", "r"], 3
    running = processes(words, count=count)
    wait_for(tmp_path / "r/checkpoints/step-00000004/MANIFEST.json", running)
    running[1].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    others = ended([running[0], *running[2:]])
    assert time.monotonic() - begun < 60
    assert [code for code, _ in others] == [15] * (count - 1)
    assert "error: process 0: another process has gone" in others[0][1]
    words = ["pretrain", "--resume", "r", "--device", "cpu", "--workers", "1"]
    again = processes(words, count=count)[count:]
    wait_for(tmp_path / "r/checkpoints/step-00000040/MANIFEST.json", again)
    for process in again:
        process.send_signal(signal.SIGINT)
    told = ended(again)
    assert [code for code, _ in told] == [130] * count
    assert "resume     r at step" in told[0][1] and "interrupted: `r` is saved" in told[0][1]


def test_a_disk_that_fails_is_known_to_both(photos, tmp_path, processes):
    """A limit on the size of files, set from outside on the process that writes: past it once, then for good."""
    patience = "from sslpre.train import disk; disk.PAUSES = (0.2, 0.2, 20)"
    running = processes(["pretrain", "rotation", photos, *SMALL, "--epochs", "500", "--out", "r"], first=patience)
    saved = tmp_path / "r/checkpoints"
    wait_for(saved / "step-00000003/MANIFEST.json", running)
    resource.prlimit(running[0].pid, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    for line in running[0].stderr:
        if "could not be saved: file too large" in line:
            break
    resource.prlimit(running[0].pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for line in running[0].stderr:
        if "can be written to again" in line:
            break
    resource.prlimit(running[0].pid, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    running[1].send_signal(signal.SIGTERM)
    first, second = ended(running)
    assert first[0] == second[0] == 13, (first, second)
    assert "could not be saved: file too large" in first[1] and "hint: make room there" in first[1]
    assert "could not be saved" not in second[1] and not list(saved.glob(".tmp-*"))
    assert len(list(saved.glob("step-*/MANIFEST.json"))) >= 1


def test_a_signal_to_one_process_stops_both_at_the_same_step(photos, tmp_path, processes):
    running = processes(["pretrain", "rotation", photos, *SMALL, "--epochs", "500", "--out", "r"])
    wait_for(tmp_path / "r/checkpoints/step-00000003/MANIFEST.json", running)
    running[1].send_signal(signal.SIGTERM)
    first, second = ended(running)
    assert first[0] == second[0] == 143, first[1]
    assert "error: stopped by SIGTERM: `r` is saved at step" in first[1] and "stopped" not in second[1]


def test_under_torchrun_sigterm_is_saved_within_its_30_seconds(photos, tmp_path, child):
    words = ["pretrain", "rotation", str(photos), *SMALL, "--epochs", "500", "--out", "r"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sslpre"]
    launcher = subprocess.Popen([*torchrun, *words], cwd=tmp_path, env=child, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "r/checkpoints/step-00000003/MANIFEST.json", [launcher])
    begun = time.monotonic()
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=60)
    assert time.monotonic() - begun < 30 and launcher.returncode != 0
    step = int(err.split("error: stopped by SIGTERM: `r` is saved at step ")[1].split()[0])
    assert (tmp_path / f"r/checkpoints/step-{step:08d}/MANIFEST.json").exists()


@pytest.mark.slow
def test_torchrun_starts_a_lost_process_again(photos, tmp_path, child):
    """`--max-restarts`: one is killed, torchrun begins all of them anew, and the same words go on with the run."""
    words = ["pretrain", "rotation", str(photos), *SMALL, "--epochs", "40", "--out", "r", "--resume", "auto"]
    elastic = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2", "-m", "sslpre"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", *elastic, *words], cwd=tmp_path, env=child, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "r/checkpoints/step-00000009/MANIFEST.json", [launcher])
    os.kill(json.loads((tmp_path / "r/.lock").read_text())["pid"], signal.SIGKILL)
    _, err = launcher.communicate(timeout=300)
    assert launcher.returncode == 0 and err.count("resume     r at step") == 1, err
    assert (tmp_path / "r/encoder/model.safetensors").exists()


@pytest.fixture
def fuse(tmp_path):
    """Environment in which process 1 meets a mistake of the code in its third step."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from torch.optim import SGD\n"
        "    take = SGD.step\n"
        "    def step(self, closure=None, count=[]):\n"
        "        count.append(1)\n"
        "        if len(count) == 3:\n"
        "            raise RuntimeError('a fuse has blown')\n"
        "        return take(self, closure)\n"
        "    SGD.step = step\n"
    )
    paths = [str(tmp_path), str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


BLOWN = "error: process 1: internal: RuntimeError: a fuse has blown"


def test_a_process_that_fails_speaks_and_the_other_does_not(photos, processes, fuse):
    words = ["pretrain", "rotation", photos, *SMALL, "--epochs", "500", "--out", "r"]
    begun = time.monotonic()
    running = processes(words, environment=fuse)
    second = ended(running[1:])[0]
    assert second[0] == 15 and BLOWN in second[1]
    code, err = ended(running[:1])[0]
    assert code == 15 and time.monotonic() - begun < 60
    assert "a fuse has blown" not in err


def test_under_torchrun_the_error_comes_last(photos, tmp_path, child, fuse):
    words = ["pretrain", "rotation", str(photos), *SMALL, "--epochs", "500", "--out", "r"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sslpre"]
    begun = time.monotonic()
    done = subprocess.run([*torchrun, *words], cwd=tmp_path, env={**child, **fuse}, capture_output=True, text=True)
    assert time.monotonic() - begun < 60 and done.returncode == 1
    *_, root_cause, rule = done.stderr.strip().splitlines()
    assert BLOWN in root_cause and set(rule) == {"="}
    assert "exitcode  : 15" in done.stderr


def wait_for(path, running, patience=120):
    begun = time.monotonic()
    while not path.exists():
        assert all(process.poll() is None for process in running), running[0].communicate()
        assert time.monotonic() - begun < patience
        time.sleep(0.05)


def test_alone_nothing_is_asked():
    """One process: no group, no message; the functions are what they would be anyway."""
    distributed.agree(images="a")
    assert distributed.from_first(lambda: 3) == 3 and distributed.collected([1]) == [1]
    assert distributed.part(10) == slice(0, 10) and distributed.summed([1.0]) == [1.0] and distributed.first()
    with pytest.raises(SslpreError):
        distributed.from_first(lambda: (_ for _ in ()).throw(SslpreError("x")))


@pytest.mark.parametrize(("seconds", "warned"), [(40.0, True), (2.0, False)])
def test_steps_too_long_for_the_launcher_are_told(seconds, warned, photos, run_cli, monkeypatch):
    """It kills 30 s after it has asked; what a step takes is measured before the first."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(announce, "a_step", lambda *_: seconds)
    done = run_cli("pretrain", "rotation", photos, *SMALL, "--epochs", "1")
    assert done.code == 0 and ("warning: a step takes 40 s, and torchrun kills" in done.err) is warned, done.err
