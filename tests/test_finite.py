"""Steps that are not finite, for real: passed over without a trace, five of them, then a bundle that is replayed."""

import json
import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from sslpre import methods as room
from sslpre import recipe as recipes
from sslpre.contract.single import few
from sslpre.errors import SslpreError
from sslpre.objective import Batch, Loss, Objective, Setup
from sslpre.ops import ranks
from sslpre.train import bundle, checkpoint, finite, loop, optim
from sslpre.train import run as runs
from sslpre.train.build import build

STEPS = 20  # 4 epochs of 5


class Fragile(Objective):
    """`breaks` in the steps `at` (counted from 1): the loss, its gradient, a logged term, a layer's output, or torch's
    own refusal of a NaN. It has batch statistics, an average kept by rule, a list that a loss fills, and momentum."""

    def __init__(self, setup: Setup, breaks: str = "", at: tuple[int, ...] = ()):
        super().__init__()
        self.encoder, self.head = setup.encoder(), nn.Linear(setup.encoder().dim, 4)
        self.register_buffer("average", torch.zeros(4))
        self.breaks, self.at, self.seen = breaks, at, []

    def loss(self, batch: Batch) -> Loss:
        bad = round(batch.progress * STEPS) + 1 in self.at
        z = self.encoder(batch.views[0])
        if bad and self.breaks == "layer":
            z = z * math.nan
        z = self.head(z)
        self.seen.append(z.detach().mean(0))
        value, term = (z - self.average - 1).square().mean(), z.detach().mean()
        if bad and self.breaks == "gradient":
            value = value + (z * 0).square().sum().sqrt()  # 0, without a finite gradient
        if bad and self.breaks == "loss":
            value = value * math.inf
        if bad and self.breaks == "term":
            term = term * math.nan
        return Loss(value, {"mean": term})

    def after_step(self, progress: float) -> None:
        self.average.mul_(0.9).add_(torch.stack(self.seen).mean(0), alpha=0.1)
        self.seen.clear()


class Duel(Objective):
    """Two players; the second one's loss is not finite in step 3."""

    players: ClassVar = {"maker": ("encoder",), "critic": ("critic",)}

    def __init__(self, setup: Setup):
        super().__init__()
        self.encoder = setup.encoder()
        self.critic = nn.Linear(self.encoder.dim, 1)

    def rounds(self, batch: Batch):
        z = self.encoder(batch.views[0])
        yield Loss(self.critic(z).square().mean())
        bad = math.nan if round(batch.progress * STEPS) == 2 else 1.0
        yield Loss((self.critic(z.detach()) * bad).mean())


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setattr("sslpre.train.metrics.LOG_STEPS", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "table", room.table | {"fragile": Fragile, "duel": Duel})
        room.methods.cache_clear()
        yield
    room.methods.cache_clear()


def start(folder, breaks="", at=(), name="fragile", **tables) -> loop.Run:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    plain = {
        "method": {"name": name} | ({"breaks": breaks, "at": list(at)} if name == "fragile" else {}),
        "encoder": {"backbone": "test_resnet", "image_size": 32},
        "data": {"store_size": 64},
        "optim": {"lr": 1e-2, "weight_decay": 0.0, "warmup": 0.0},
        "train": {"epochs": 4, "batch_size": 8, "precision": "fp32"},
    }
    recipe = recipes.parse(plain | {table: plain[table] | keys for table, keys in tables.items()}, "toy")
    return build(folder, recipe, few(40), torch.device("cpu"), 1)


def state(run):
    return run.objective.state_dict() | optim.state_by_name(run.objective, run.optimisers)


def same(one, two):
    torch.testing.assert_close(state(one), state(two), rtol=0, atol=0)


def lines(run):
    text = (run.folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def without(folder, steps, **tables):
    """A run that leaves out these steps by hand."""
    run, take = start(folder, **tables), loop.take_step

    def taking(run, *rest):
        if run.step + 1 in steps:
            run.step += 1
        else:
            take(run, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", taking)
        loop.train(run)
    return run


@pytest.mark.parametrize("behind", [0, 1], ids=["at once", "a step late"])
@pytest.mark.parametrize("breaks", ["loss", "gradient", "term", "layer"])
def test_a_step_that_is_not_finite_leaves_no_trace(breaks, behind, tmp_path, monkeypatch, capfd):
    """Weights, momentum, batch statistics, the average and lists: to the bit those of a run that leaves the steps out.
    Late, as on a GPU, such a step is taken first, and its answer comes when the next one is under way."""
    monkeypatch.setattr(finite, "BEHIND", {"cpu": behind})
    monkeypatch.setattr("sslpre.train.metrics.LOG_STEPS", 4)
    bad = [1, 3, 4, 10, 17]
    run, twin = start(tmp_path / "run", breaks, bad), without(tmp_path / "twin", bad)
    loop.train(run)
    same(run, twin)
    assert run.passed_over == 5 and run.step == STEPS and run.objective.seen == []
    assert sum(t.isfinite().all() for t in state(run).values()) == len(state(run))
    told = [line for line in lines(run) if "passed_over" in line]
    what = {"layer": "loss", "term": "loss"}.get(breaks, breaks)
    assert [(line["step"], line["epoch"], line["passed_over"]) for line in told] == [
        (step, (step - 1) // 5, what) for step in bad
    ]
    err = capfd.readouterr().err
    assert f"warning: {what} not finite at step 17: passed over; a run may pass over 5, this was number 5" in err
    figures = [{key: line[key] for key in ("step", "loss", "mean")} for line in lines(run) if "lr" in line]
    assert figures == [{key: line[key] for key in ("step", "loss", "mean")} for line in lines(twin) if "lr" in line]


@pytest.mark.parametrize("behind", [0, 1], ids=["at once", "a step late"])
def test_the_sixth_ends_the_run_with_a_bundle(behind, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(finite, "BEHIND", {"cpu": behind})
    run = start(tmp_path / "run", "layer", [2, 4, 6, 8, 10, 13])
    with pytest.raises(SslpreError) as end:
        loop.train(run)
    folder = tmp_path / "run/nonfinite/step-00000013"
    assert end.value.code == 10
    assert end.value.message.startswith("loss not finite at step 13, after 5 steps that were passed over")
    assert end.value.hint.endswith(f"sslpre replay {folder}")
    saved = checkpoint.newest(run.folder)
    assert saved.state["step"] == 10 and all(bool(t.isfinite().all()) for t in saved.model.values())
    about = json.loads((folder / "bundle.json").read_text(), parse_constant=pytest.fail)
    assert (about["step"], about["epoch"], about["what"]) == (13, 2, "loss")
    assert about["first"] == "output of `head` (Linear), which was given such"
    assert about["terms"] == {"loss": "nan", "mean": "nan"} and about["gradients"]
    wanted = next(iter(run.stream.steps(12, 13))).index.tolist()
    assert [one["index"] for one in about["images"]] == wanted
    twin = without(tmp_path / "twin", [2, 4, 6, 8, 10], train={"epochs": 4})
    assert twin.step == STEPS
    same(run, stopped(tmp_path / "stopped", 12, [2, 4, 6, 8, 10]))


def stopped(folder, taken, steps):
    """A run after `taken` steps, of which it left some out."""
    run = start(folder)
    for pixels in run.stream.steps(0, taken):
        if run.step + 1 in steps:
            run.step += 1
        else:
            loop.take_step(run, pixels, run.step // 5)
    return run


def test_a_bundle_is_replayed_to_the_same_numbers(tmp_path, run_cli, monkeypatch):
    run = start(tmp_path / "run", "gradient", range(7, 20))
    with pytest.raises(SslpreError):
        loop.train(run)
    (folder,) = (tmp_path / "run/nonfinite").iterdir()
    monkeypatch.setattr(bundle, "load_data", lambda recipe: few(40), raising=False)
    monkeypatch.setattr("sslpre.train.build.load_data", lambda recipe: few(40))
    done = run_cli("replay", folder, "--device", "cpu", "--workers", "1", "--json")
    assert done.code == 10, done.err
    found = json.loads(done.out)
    assert found["now"]["what"] == "gradient" == found["then"]["what"]
    assert found["now"]["terms"] == found["then"]["terms"] and math.isfinite(found["now"]["terms"]["loss"])
    assert found["now"]["first"] == found["then"]["first"] == "gradient of `head.bias`"
    plain = run_cli("replay", folder, "--device", "cpu", "--workers", "1")
    assert plain.code == 10 and "step       12 (epoch 3) of fragile: gradient not finite then" in plain.out
    text = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(text.replace('breaks = "gradient"', 'breaks = ""'))
    mended = run_cli("replay", folder, "--device", "cpu", "--workers", "1")
    assert mended.code == 0 and "every loss and gradient is finite" in mended.out


@pytest.mark.parametrize("behind", [0, 1], ids=["at once", "a step late"])
def test_a_game_ends_at_once(behind, tmp_path, monkeypatch):
    monkeypatch.setattr(finite, "BEHIND", {"cpu": behind})
    run = start(tmp_path, name="duel")
    with pytest.raises(SslpreError, match="loss not finite at step 3; nothing of it was kept") as end:
        loop.train(run)
    assert end.value.code == 10 and checkpoint.newest(tmp_path).state["step"] == 0
    about = json.loads((tmp_path / "nonfinite/step-00000003/bundle.json").read_text())
    assert about["what"] == "loss" and about["terms"]["critic.loss"] == "nan"


def test_what_a_step_that_was_not_finite_breaks_later_is_not_taken_for_the_cause(tmp_path, monkeypatch):
    """A step late, NaN weights make the next step raise: that is taken back too, and the run goes on."""
    monkeypatch.setattr("sslpre.train.metrics.LOG_STEPS", 1000)
    monkeypatch.setattr(finite, "BEHIND", {"cpu": 1})
    run = start(tmp_path / "run", "layer", [7])
    loss, raised = run.objective.loss, []

    def draws(batch):
        if not all(bool(p.isfinite().all()) for p in run.objective.parameters()):
            raised.append(batch.progress)  # as torch.multinomial does with weights that are NaN
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        return loss(batch)

    monkeypatch.setattr(run.objective, "loss", draws)
    loop.train(run)
    assert len(raised) == 1 and run.passed_over == 1
    same(run, without(tmp_path / "twin", [7]))


def lame(folder):
    """On two processes, of which the second has a step that is not finite."""
    room.table = room.table | {"fragile": Fragile}
    room.methods.cache_clear()
    run = start(Path(folder), "loss", [3] if ranks.rank() else [])
    loop.train(run)
    return run.passed_over, {name: tensor.numpy().copy() for name, tensor in run.objective.state_dict().items()}


def test_a_step_happens_in_all_processes_or_in_none(tmp_path, pair):
    (first, one), (second, two) = pair.run(lame, str(tmp_path))
    assert first == second == 1 and checkpoint.newest(tmp_path).state["passed_over"] == 1
    del one["average"]  # this toy keeps it of its own images
    assert all(np.array_equal(one[name], two[name]) and np.isfinite(one[name]).all() for name in one)


def test_what_was_passed_over_is_remembered(tmp_path):
    """Interrupted after four of them, a run may pass over one more; and ends in the weights of an unbroken one."""
    bad = [2, 3, 4, 6, 12]
    whole = start(tmp_path / "whole", "loss", bad)
    loop.train(whole)
    part, take = start(tmp_path / "part", "loss", bad), loop.take_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", lambda run, *rest: take(run, *rest) if run.step < 11 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.train(part)
    again = start(tmp_path / "part", "loss", bad)
    runs.go_on(again)
    assert again.step == 10 and again.passed_over == 4
    loop.train(again)
    same(whole, again)
    sixth = start(tmp_path / "sixth", "loss", [*bad, 13])
    with pytest.raises(SslpreError, match="at step 13, after 5 steps"):
        loop.train(sixth)


def test_what_is_no_bundle(tmp_path, run_cli, photos):
    def told(*words, code):
        done = run_cli("replay", *words, "--device", "cpu")
        assert done.code == code and "Traceback" not in done.err, done.err
        return done.err

    assert "`nothing` is no bundle" in told("nothing", code=2)
    run = start(tmp_path / "run", "loss", range(1, 20))
    with pytest.raises(SslpreError):
        loop.train(run)
    (folder,) = (tmp_path / "run/nonfinite").iterdir()
    assert "the images of" in told(folder, code=6)  # `few` are not the whole sample set
    good = (folder / "bundle.json").read_text()
    for bad in (
        "",
        "[" * 100_000,
        "{}",
        good.replace('"step": 6', '"step": -1'),
        good.replace('"step": 6', '"step": "6"'),
    ):
        (folder / "bundle.json").write_text(bad)
        told(folder, code=5)
