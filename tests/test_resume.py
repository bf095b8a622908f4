"""A run that goes on: amid a batch taken in parts, with each piece of its state, under any umask, home and locale."""

import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sslpre.contract.single import assert_equal, start, state
from sslpre.errors import SslpreError
from sslpre.methods import methods
from sslpre.train import checkpoint, loop, step
from sslpre.train import run as runs

PARTS = {"train": {"epochs": 2, "batch_size": 8, "micro_batch": 3}}
SMALL = (
    "--backbone test_resnet --image-size 32 --batch-size 16 --epochs 1 --precision fp32 --device cpu --workers 1"
).split()


class Crash(Exception):
    pass


@pytest.mark.parametrize("method", sorted(methods()))
def test_a_crash_amid_a_batch_in_parts(method, tmp_path, monkeypatch):
    """Some parts have had their backward pass, and the step is not taken: it is taken anew from the checkpoint."""
    whole = start(method, tmp_path / "whole", **PARTS)
    loop.train(whole)
    run, giving, calls = start(method, tmp_path / "part", **PARTS), step.next_loss, []

    def crashing(run, game, player):
        if run.step == 7:
            calls.append(player)
            if len(calls) == (1 if run.objective.couples else 2):
                raise Crash
        return giving(run, game, player)

    with monkeypatch.context() as patch:
        patch.setattr(step, "next_loss", crashing)
        with pytest.raises(Crash):
            loop.train(run)
    again = start(method, tmp_path / "part", **PARTS)
    torch.manual_seed(12345)
    runs.go_on(again)
    assert again.step == 5
    loop.train(again)
    assert_equal(state(whole), state(again))


def test_each_piece_of_state_is_needed(tmp_path):
    """Of each kind of thing that a checkpoint holds, one taken out: refused, or the run ends in other weights."""
    whole = start("deepcluster", tmp_path / "whole", optim={"name": "adamw"}, method={"clusters": 4})
    loop.train(whole)
    folder = tmp_path / "whole/checkpoints/step-00000005"
    model, optim = (load_file(folder / f"{name}.safetensors") for name in ("model", "optim"))
    told = json.loads((folder / "state.json").read_text())

    def ends(model, optim, told):
        place = tmp_path / "part"
        shutil.rmtree(place, ignore_errors=True)
        (place / "checkpoints").mkdir(parents=True)
        checkpoint.save(place / "checkpoints", model, optim, told)
        run = start("deepcluster", place, optim={"name": "adamw"}, method={"clusters": 4})
        try:
            runs.go_on(run)
        except (SslpreError, KeyError):
            return "refused"
        loop.train(run)
        same = all(torch.equal(a, state(run)[name]) for name, a in state(whole).items())
        return "same" if same else "other"

    assert ends(model, optim, told) == "same"
    kinds = {re.sub(r"\d+", "N", name): name for name in model}
    assert {"assignments", "weights", "agreement", "head.weight"} <= set(kinds)
    for name in kinds.values():
        assert ends({key: t for key, t in model.items() if key != name}, optim, told) == "refused", name
    for key in ("exp_avg", "exp_avg_sq", "step"):
        less = {name: t for name, t in optim.items() if not (name.endswith(f"/{key}") and "encoder" in name)}
        assert len(less) < len(optim) and ends(model, less, told) != "same", key
    for key in ("data", "recipe", "seconds"):
        assert ends(model, optim, {name: one for name, one in told.items() if name != key}) == "refused", key
    assert ends(model, optim, told | {"step": 4}) == "other"


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_all_that_a_run_writes_has_the_umasks_mode(mask, run_cli, photos, tmp_path):
    before = os.umask(mask)
    try:
        assert run_cli("pretrain", "rotation", photos, *SMALL, "--out", "r").code == 0
    finally:
        os.umask(before)
    for path in (tmp_path / "r").rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


@pytest.mark.parametrize(
    "environment",
    [
        {"HOME": "", "USER": "", "LOGNAME": "", "SSLPRE_CACHE": "", "XDG_CACHE_HOME": ""},
        {"HOME": "/proc/nobody", "SSLPRE_CACHE": "", "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "TERM": "dumb"},
    ],
    ids=["no home", "Turkish, and a home that is not there"],
)
def test_home_and_locale_do_not_matter(environment, run_process, photos, tmp_path):
    odd = tmp_path / "bİrds ñ"
    shutil.copytree(photos, odd)
    done = run_process("pretrain", "rotation", odd, *SMALL, "--out", "r", "--store", "auto", **environment)
    assert done.code == 0 and "Traceback" not in done.err, done.err
    assert (tmp_path / "r/encoder/model.safetensors").exists()


def test_durations_do_not_follow_the_clock_on_the_wall():
    """It may jump; `time.time` stands only in the message for torchrun, which wants one, and where a report asks how
    old a run's last sign of life is, a file's time."""
    room = Path(loop.__file__).parents[1]
    where = [
        path.relative_to(room).as_posix()
        for path in room.rglob("*.py")
        if re.search(r"time\.time\(|datetime\.now", path.read_text())
    ]
    assert sorted(where) == ["cli/processes.py", "report/__init__.py"]
