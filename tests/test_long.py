"""A long run through the real loop, with made-up losses. Nothing grows but the log, by short lines."""

import gc
import json
import os
from pathlib import Path

import pytest
import torch

from sslpre.contract.single import start
from sslpre.train import loop


@pytest.mark.parametrize("steps", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_many_steps(steps, tmp_path, monkeypatch, capfd):
    run = start("rotation", tmp_path, count=2001, train={"epochs": steps // 1000, "batch_size": 2})
    run.stream.workers = 0
    seen = {}

    def made_up(run, pixels, epoch):
        assert len(pixels.index) == 2
        run.step += 1
        run.unsettled.append((run.step, {"loss": torch.tensor(1.0 / run.step), "accuracy": torch.tensor(0.25)}))
        loop.finite.count(run)
        if run.step % (steps // 5) == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen[run.step] = (pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")))

    monkeypatch.setattr(loop, "take_step", made_up)
    monkeypatch.setattr(run.stream, "_place", lambda batch, canvas, slot, i: batch.index.__setitem__(slot, i))
    loop.train(run)
    assert run.step == steps and len(seen) == 5
    memory, handles = zip(*seen.values(), strict=True)
    assert max(memory) - memory[0] < 8 << 20, "bytes that stay, after the first fifth"
    assert len(set(handles)) == 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == steps // 20 and max(map(len, lines)) < 200
    assert [json.loads(line)["step"] for line in lines] == [*range(20, steps + 1, 20)]
    told = capfd.readouterr().err.splitlines()
    assert max(map(len, told)) < 200 and len(told) < 100, "a plain line each ten seconds"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
