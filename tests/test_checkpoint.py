"""Checkpoints: whole or absent, exact, checked, two kept, never anything that is not finite."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from sslpre.errors import SslpreError
from sslpre.train import checkpoint


def tensors(fill=1.0):
    return {
        "encoder.weight": torch.full((4, 3, 2, 2), fill).to(memory_format=torch.channels_last),
        "count": torch.tensor(7),
    }


def save(run, step, fill=1.0):
    return checkpoint.save(
        run / "checkpoints", tensors(fill), {"all/w/exp_avg": torch.full((3,), fill)}, {"step": step}
    )


def test_round_trip(tmp_path):
    save(tmp_path, 12, 0.5)
    back = checkpoint.newest(tmp_path)
    assert back.state["step"] == 12 and back.path.name == "step-00000012"
    assert torch.equal(back.model["encoder.weight"], tensors(0.5)["encoder.weight"]) and back.model["count"].item() == 7
    assert torch.equal(back.optim["all/w/exp_avg"], torch.full((3,), 0.5))


def test_two_complete_ones_are_kept(tmp_path):
    for step in range(5):
        save(tmp_path, step)
    assert [path.name for path in checkpoint.complete(tmp_path / "checkpoints")] == ["step-00000004", "step-00000003"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000003", "step-00000004"]


def test_files_have_the_umasks_mode(tmp_path):
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {entry.stat().st_mode & 0o777 for entry in path.iterdir()} == {0o640}


@pytest.mark.parametrize("name", checkpoint.FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_one_is_passed_over_loudly_or_refused(tmp_path, capsys, name, damage):
    save(tmp_path, 1, 0.25)
    path = save(tmp_path, 2) / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-3])
    else:
        path.unlink()
    back = checkpoint.newest(tmp_path)
    assert back.state["step"] == 1 and back.model["encoder.weight"].max() == 0.25
    assert "step-00000002" in capsys.readouterr().err
    (tmp_path / "checkpoints" / "step-00000001" / "MANIFEST.json").write_text("{}")
    with pytest.raises(SslpreError, match=r"no checkpoint of .* can be read") as caught:
        checkpoint.newest(tmp_path)
    assert caught.value.code == 5


def test_none_yet(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / "checkpoints" / ".tmp-abc").mkdir(parents=True)
    assert checkpoint.newest(tmp_path) is None
    checkpoint.sweep(tmp_path / "checkpoints")
    assert not os.listdir(tmp_path / "checkpoints")


def test_a_newer_format_is_refused(tmp_path):
    checkpoint.save(tmp_path, {}, {}, {"step": 1, "format": 99})
    with pytest.raises(SslpreError, match="format 99"):
        checkpoint.load(tmp_path / "step-00000001")


def test_one_that_cannot_be_read_here_is_not_called_damaged(tmp_path):
    """A newer format, or a disk that fails: the run stops, and does not go back to an older one."""
    save(tmp_path, 1)
    checkpoint.save(tmp_path / "checkpoints", {}, {}, {"step": 2, "format": 99})
    with pytest.raises(SslpreError, match="format 99"):
        checkpoint.newest(tmp_path)
    path = save(tmp_path, 3)
    (path / "state.json").unlink()
    (path / "state.json").mkdir()  # reading it fails with an OSError, for root too
    with pytest.raises(SslpreError, match="cannot be read"):
        checkpoint.newest(tmp_path)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_non_finite_is_written(tmp_path, bad):
    save(tmp_path, 1)
    with pytest.raises(SslpreError, match=r"`encoder.weight` not finite at step 2") as caught:
        save(tmp_path, 2, bad)
    assert caught.value.code == 10
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def test_a_failing_write_leaves_the_old_one(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_synced", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def test_shared_tensors_are_saved_once_and_come_back_shared(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    torch.manual_seed(0)
    first, second = Tied(), Tied()
    assert list(checkpoint.model_state(first)) == ["a.weight"]
    checkpoint.load_model(second, checkpoint.model_state(first))
    assert second.b.weight is second.a.weight and torch.equal(second.b.weight, first.a.weight)


def test_another_network_is_refused():
    with pytest.raises(SslpreError, match="`bias` is only in one"):
        checkpoint.load_model(nn.Linear(2, 2), {"weight": torch.zeros(2, 2)})
    with pytest.raises(SslpreError, match=r"`weight` has shape \(3, 2\), not \(2, 2\)"):
        checkpoint.load_model(nn.Linear(2, 2, bias=False), {"weight": torch.zeros(3, 2)})


ENDLESS = """
import sys, torch
from pathlib import Path
from sslpre.train import checkpoint
step = 0
while True:
    step += 1
    w = torch.full((200_000,), float(step))
    checkpoint.save(Path(sys.argv[1]), {"w": w}, {"m": -w}, {"step": step})
    print(step, flush=True)
"""


def test_killed_at_any_moment_the_newest_complete_one_loads(tmp_path):
    """SIGKILL while it writes one after the other: what is left is whole, and not behind what was reported."""
    for trial in range(6):
        run = tmp_path / f"run{trial}"
        run.mkdir()
        with subprocess.Popen(
            [sys.executable, "-c", ENDLESS, str(run / "checkpoints")], stdout=subprocess.PIPE, text=True
        ) as child:
            for _ in range(2 + trial):
                reported = int(child.stdout.readline())
            time.sleep(0.0017 * trial)
            child.send_signal(signal.SIGKILL)
            reported = max([reported, *(int(line) for line in child.stdout.read().split("\n") if line)])
        back = checkpoint.newest(run)
        step = back.state["step"]
        assert step in (reported, reported + 1)
        assert back.model["w"].eq(step).all() and back.optim["m"].eq(-step).all()
        json.loads((back.path / "MANIFEST.json").read_text())
