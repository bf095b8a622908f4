"""`sslpre bench`: are its figures those of the machine, does it name the stage that is slow, does it leave nothing?"""

import dataclasses
import json
import os
import time
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sslpre import bench as room
from sslpre.bench import stages as timed
from sslpre.bench import table as shown
from sslpre.bench.table import STAGES, Report, Setting, Timing, Whole, advice, timing, weighed
from sslpre.data.find import Folder
from sslpre.data.stream import Pixels
from sslpre.errors import SslpreError
from sslpre.objective import Loss
from sslpre.train import step
from sslpre.train.build import build
from sslpre.train.run import Options, planned
from sslpre.views.build import Views

SMALL = "--backbone test_resnet --image-size 32 --batch-size 8 --precision fp32 --device cpu --workers 1".split()


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Short timings, and a cache, a temporary folder and a current folder that should stay as they are: empty."""
    monkeypatch.setattr(timed, "SECONDS", 0.1)
    monkeypatch.setattr(timed, "STEPS_SECONDS", 0.4)
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr("tempfile.tempdir", None)  # it is kept once it was looked up
    monkeypatch.setenv("SSLPRE_CACHE", str(tmp_path / "cache"))
    return place


def left(tmp_path) -> list[str]:
    """What lies around that the fixture did not make."""
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.name != "temporary")


def one(ms, batch=10, spread=0.0):
    return Timing(1000 * batch / ms, ms, spread, 5)


def whole(ms, waiting=0.0, batch=10):
    return Whole(1000 * batch / ms, ms, 0.0, 5, waiting)


STAGE_MS = {
    "decode": 80.0,
    "store": 2.0,
    "copy": None,
    "views": 10.0,
    "forward": 15.0,
    "backward": 30.0,
    "optimiser": 5.0,
}


def setting(**changed):
    plain = dict(
        recipe="simclr", images="my photos", where="my photos", count=1000, measured=1000, device="cpu", kind="cpu",
        bf16=True, cores=2, workers=2, precision="bf16", compile=False, backbone="test_resnet", image_size=64,
        store_size=128, sides=(64, 64), batch_size=10, batch=10, part=0, epochs=10, store="ram",
        store_line="in RAM, 49 MB", held=0, compiler="g++", compiled=True, graphs=1, compile_s=9.0,
    )  # fmt: skip
    return Setting(**{**plain, **changed})


def report(first=100.0, later=60.0, ms=None, **changed):
    """A report of stages that take STAGE_MS, in steps of `first` and `later` milliseconds."""
    stages = {name: None if value is None else one(value) for name, value in {**STAGE_MS, **(ms or {})}.items()}
    kept = None if changed.get("store") == "off" else object()
    halves = room.judged(stages, whole(first), whole(later), kept)
    return Report(setting(**changed), stages, *halves, 10**9, 20.0)


def test_what_shows_of_decoding_is_what_a_later_step_does_without():
    found = report()
    assert found.first.loading == pytest.approx(0.4)
    assert found.first.hidden == pytest.approx(0.5), "40 of the 80 ms of decoding show"
    assert found.first.limit == "network", "45 ms against 40 ms"
    assert found.later.loading == 0 and found.later.hidden == 1
    assert found.first.shares == pytest.approx(
        {"decode": 0.8, "views": 0.1, "forward": 0.15, "backward": 0.3, "optimiser": 0.05}
    )
    assert "decode" not in found.later.shares and found.later.shares["store"] == pytest.approx(2 / 60)
    assert report(first=140.0).first.limit == "decode"
    assert report(first=140.0).first.hidden == 0


def test_waiting_counts_as_loading():
    stages = {name: None if value is None else one(value) for name, value in STAGE_MS.items()}
    found = weighed(whole(100.0, waiting=0.6), stages, ("store",), None)
    assert found.loading == 0.6 and found.limit == "store"


def test_without_a_store_every_epoch_is_a_first_one():
    found = report(first=100.0, store="off", store_line="off: no room")
    assert found.later == found.first
    assert found.first.loading == pytest.approx(0.4), "the stages that compute take 60 of the 100 ms"


def test_the_whole_run_is_one_epoch_that_decodes_and_others_that_do_not():
    found = report()  # 1,000 images in steps of 10
    assert found.run_seconds == pytest.approx(100 * 0.1 + 900 * 0.06)
    assert found.decoding_seconds == pytest.approx(100 * 0.04)
    stored = report(held=1000)
    assert stored.run_seconds == pytest.approx(1000 * 0.06) and stored.decoding_seconds == 0
    none = report(store="off", store_line="off: no room")
    assert none.run_seconds == pytest.approx(1000 * 0.1) and none.decoding_seconds == pytest.approx(1000 * 0.04)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (report(first=300.0, epochs=3), "sslpre pack 'my photos' --size 128"),
        (report(first=300.0, epochs=3, images=""), "the sample set is drawn anew"),
        (report(first=300.0, epochs=3, kind="cuda", cores=8), "--workers 8"),
        (report(store="off", store_line="off: 3.2 TB is more than half of the free disk"), "SSLPRE_CACHE"),
        (report(store="off", store_line="off"), "leave out --store off"),
        (report(), "--image-size 32"),
        (report(precision="fp32"), "--precision bf16"),
        (report(precision="fp32", bf16=False), "--image-size 32"),
        (report(part=5), "--batch-size 5"),
        (report(kind="cuda"), "--compile"),
        (report(image_size=32), "a lighter --backbone"),
        (report(ms={"views": 55.0}, compiler=None), "install g++ and python3-dev"),
        (report(ms={"views": 55.0}, compiler=None, kind="cuda"), "install triton, gcc and python3-dev"),
        (report(ms={"views": 55.0}, image_size=224), "--image-size 160"),
        (report(ms={"optimiser": 55.0}), "--batch-size 20"),
    ],
)
def test_advice(found, says):
    text = advice(found)
    assert says in text
    assert "\n" not in text
    assert found.json()["advice"] == text


def test_loading_that_waits_for_the_store():
    slow = dataclasses.replace(report(), later=dataclasses.replace(report().later, limit="store"))
    assert "--set data.store_size=96" in advice(slow)
    smaller = dataclasses.replace(slow, setting=setting(store_size=64, workers=1))
    assert "--workers 2" in advice(smaller)


def test_the_table_fits_and_says_what_is_missing():
    lines = report().table().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split("  ")[0] == "stage"
    assert next(line for line in lines if line.startswith("copy")).split() == ["copy", "-", "-", "-", "-"]
    assert next(line for line in lines if line.startswith("decode")).split() == ["decode", "125", "80.0", "80%", "-"]
    assert next(line for line in lines if line.startswith("later epochs  ")).split() == [
        "later",
        "epochs",
        "167",
        "60.0",
        "100%",
    ]
    small = report(batch=4).table()
    assert "a step of 4 images; the run's have 10" in small and "unsteady" not in small


def test_a_wide_spread_is_said_where_it_matters():
    found = report()
    for name, expected in (("views", True), ("store", False)):  # 10 and 2 of 60 ms
        stages = {**found.stages, name: one(STAGE_MS[name], spread=0.5)}
        assert ("unsteady" in dataclasses.replace(found, stages=stages).table()) is expected


def test_timing_is_the_median_and_the_quartiles():
    found = timing([0.1, 0.1, 0.1, 0.1, 9.0], 10)
    assert found.ms_per_step == pytest.approx(100) and found.images_per_s == pytest.approx(100)
    assert timing([0.1, 0.2, 0.3, 0.4, 0.5], 1).spread == pytest.approx((0.45 - 0.15) / 0.3)
    assert timing([0.1, 0.3], 1).spread == pytest.approx(1.0)


class Game(nn.Module):
    """Two players, whose rounds take 20 and 10 ms forward."""

    couples = False

    def __init__(self):
        super().__init__()
        self.maker, self.critic = nn.Linear(3, 1), nn.Linear(3, 1)
        self.after = 0

    def rounds(self, batch):
        x = batch.views[0].mean((2, 3))
        time.sleep(0.02)
        yield Loss(self.maker(x).mean())
        time.sleep(0.01)
        yield Loss(self.critic(x).mean())

    def after_step(self, progress):
        self.after += 1


def test_players_are_summed_and_no_weight_moves():
    game = Game()
    optimisers = {name: torch.optim.SGD(getattr(game, name).parameters(), 1.0) for name in ("maker", "critic")}
    table = SimpleNamespace(precision="fp32", seed=0)
    run = SimpleNamespace(
        objective=game, optimisers=optimisers, device=torch.device("cpu"), part=2, step=0, asked=deque(),
        labels=torch.full((4,), -1), recipe=SimpleNamespace(train=table),
        views=lambda pixels, size, index, epoch: [pixels.float() / 255],
    )  # fmt: skip
    pixels = Pixels(torch.full((4, 3, 8, 8), 7, dtype=torch.uint8), torch.full((4, 2), 8), torch.arange(4))
    before = [p.detach().clone() for p in game.parameters()]
    spent = timed.rounds(run, pixels)
    assert 0.06 <= spent["forward"] < 0.2, "two players, two parts of the batch"
    assert spent["backward"] > 0 and spent["optimiser"] > 0
    assert game.after == 1 and not run.asked
    assert all(torch.equal(a, b) for a, b in zip(before, game.parameters(), strict=True))
    assert game.critic.weight.grad.sub(7 / 255).abs().max() < 1e-6 and game.maker.weight.grad is None, (
        "the last player's alone"
    )


def test_bench(run_cli, photos, tmp_path, quick):
    done = run_cli("bench", "simclr", photos, *SMALL, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert left(tmp_path) == []
    assert found["setting"]["images"] == str(photos)
    assert (found["setting"]["batch"], found["setting"]["batch_size"]) == (8, 8)
    assert found["setting"]["store"] == "ram" and found["setting"]["measured"] == 48
    assert found["stages"].keys() == set(STAGES)
    assert found["stages"]["copy"] is None, "there is nothing to copy to a CPU"
    for name in set(STAGES) - {"copy"}:
        stage = found["stages"][name]
        assert stage["images_per_s"] == pytest.approx(8000 / stage["ms_per_step"])
        assert stage["repeats"] >= 1
    network = sum(found["stages"][name]["ms_per_step"] for name in ("forward", "backward"))
    assert found["later_epochs"]["ms_per_step"] > network / 2, "a whole step holds its parts"
    assert found["first_epoch"]["shares"].keys() == {"decode", "views", "forward", "backward", "optimiser"}
    assert found["later_epochs"]["shares"].keys() == {"store", "views", "forward", "backward", "optimiser"}
    assert found["peak_memory"] > 50e6 and found["run_seconds"] > 0
    lines = done.err.splitlines()
    assert lines[0] == f"images     {photos}: 48 images"
    assert [line for line in lines if line.startswith("store ")] == ["store      in RAM, 230 kB"]


def test_a_slow_decoder_is_the_limit_and_is_worth_packing(run_cli, photos, tmp_path, quick, monkeypatch):
    read = Folder.read

    def slow(self, i, side=None):
        time.sleep(0.02)
        return read(self, i, side)

    monkeypatch.setattr(Folder, "read", slow)
    done = run_cli("bench", "simclr", photos, *SMALL, "--json", "--set", "train.epochs=2")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert 20 < found["stages"]["decode"]["images_per_s"] < 50, "one thread, at least 20 ms an image"
    assert found["first_epoch"]["limit"] == "decode"
    assert found["first_epoch"]["loading"] > 0.4
    assert found["later_epochs"]["loading"] < 0.2 and found["later_epochs"]["limit"] != "decode"
    assert f"sslpre pack {photos} --size 40" in found["advice"]


def test_slow_views_are_the_limit(run_cli, photos, quick, monkeypatch):
    make = Views.__call__

    def slow(self, *given):
        time.sleep(0.3)
        return make(self, *given)

    monkeypatch.setattr(Views, "__call__", slow)
    found = json.loads(run_cli("bench", "rotation", photos, *SMALL, "--json", "--store", "off").out)
    assert found["stages"]["views"]["ms_per_step"] > 300
    assert found["stages"]["forward"]["ms_per_step"] < 300
    assert found["first_epoch"]["limit"] == "views"
    assert found["stages"]["store"] is None and found["later_epochs"] == found["first_epoch"]


def test_a_store_on_disk_is_not_made_where_the_run_would_make_it(run_cli, photos, tmp_path, quick):
    done = run_cli("bench", "simclr", photos, *SMALL, "--store", "disk")
    assert done.code == 0, done.err
    assert f"`{tmp_path / 'cache'}/" in done.err and "store      on disk, 2" in done.err
    assert left(tmp_path) == []
    assert done.out.startswith("stage ")


def test_packed_images_are_reckoned_with(run_cli, photos, tmp_path, quick):
    assert run_cli("pack", photos, "--size", "40", "--workers", "1").code == 0
    before = left(tmp_path)
    done = run_cli("bench", "simclr", photos, *SMALL, "--json", "--set", "data.store_size=40")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["setting"]["held"] == 48 and found["decoding_seconds"] == 0
    assert "48 images are in it already" in done.err
    assert left(tmp_path) == before


def test_ctrl_c_leaves_nothing(run_cli, photos, tmp_path, quick, monkeypatch):
    def stop(*given):
        assert len(os.listdir(quick)) == 1, "the run's directory is there"
        raise KeyboardInterrupt

    monkeypatch.setattr(timed, "whole", stop)
    done = run_cli("bench", "simclr", photos, *SMALL, "--store", "disk")
    assert done.code == 130
    assert done.err.splitlines()[-2:] == ["error: interrupted", "hint: nothing was written; type it again"]
    assert left(tmp_path) == []
    assert os.environ["SSLPRE_CACHE"] == str(tmp_path / "cache")


def test_a_step_that_takes_too_long_is_measured_with_fewer_images(run_cli, photos, quick, monkeypatch):
    rehearse = step.rehearse

    def slow(run, pixels, part):
        rehearse(run, pixels, part)
        return 2.0 * len(pixels.index)

    monkeypatch.setattr(step, "rehearse", slow)
    done = run_cli("bench", "simclr", photos, *SMALL, "--json")
    found = json.loads(done.out)
    assert (found["setting"]["batch"], found["setting"]["batch_size"]) == (4, 8)
    assert "measured with 4 a step" in done.err


def test_few_of_many_images_are_measured(run_cli, photos, quick, monkeypatch):
    monkeypatch.setattr(room, "STORED", 20 * 3 * 40 * 40)
    done = run_cli("bench", "simclr", photos, *SMALL, "--json")
    found = json.loads(done.out)
    assert (found["setting"]["count"], found["setting"]["measured"]) == (48, 20)
    assert "48 images, 20 of them measured" in done.err


def test_views_are_compiled_as_in_the_run_and_for_its_batch_alone(run_cli, photos, tmp_path, quick, monkeypatch):
    asked, made = [], []
    make = Views.__call__

    def call(self, pixels, size, index, epoch):
        if self in made:
            self.batches.append(len(index))
        return make(self, pixels, size, index, epoch)

    def start(self):
        made.append(self)
        self.batches = []

    monkeypatch.setattr(room, "STORED", 20 * 3 * 40 * 40)
    monkeypatch.setattr("sslpre.train.build.compiler", lambda where: "a compiler")
    monkeypatch.setattr("sslpre.train.build.repays", lambda where, pixels: not asked.append(pixels))
    monkeypatch.setattr(Views, "compile", start)
    monkeypatch.setattr(Views, "__call__", call)
    done = run_cli("bench", "simclr", photos, *SMALL, "--json", "--set", "train.epochs=7")
    assert done.code == 0, done.err
    found = json.loads(done.out)["setting"]
    assert found["measured"] == 20 and found["compiled"] and found["compile_s"] > 0
    assert "views      2 of 32 px, compiled by a compiler in " in done.err
    assert [set(views.batches) for views in made] == [{8}], "never the few images of the first try"
    tables = {"encoder": {"backbone": "test_resnet", "image_size": 32}, "train": {"batch_size": 8, "epochs": 7}}
    _, images, _, recipe = planned(Options("simclr", photos, (), tables), torch.device("cpu"))
    build(tmp_path, recipe, images, torch.device("cpu"), 1)
    assert len(asked) == 2 and asked[0] == asked[1] > 0, "the run's own question: is it long enough?"


@pytest.mark.parametrize(
    ("words", "error", "hint", "code"),
    [
        ("bench", "RECIPE is missing", "sslpre bench simclr ./images", 2),
        ("bench .", "`.` is a folder, and RECIPE comes first", "sslpre bench simclr .", 2),
        ("bench simclrr", "no recipe `simclrr`", "sslpre pretrain simclr ./images", 2),
        ("bench simclr --device gpu", "`--device gpu` is not one of auto, cpu, cuda, mps", "--device cpu?", 2),
        ("bench simclr --epochs 3", "no option `--epochs` in `sslpre bench`", "did you mean --", 2),
        ("bench simclr nowhere", "there is no folder `nowhere`", "", 4),
        ("bench simclr --store here.packed", "there is no file `here.packed`", "--store auto, device, ram", 3),
    ],
)
def test_mistakes(run_cli, quick, words, error, hint, code, tmp_path):
    done = run_cli(*words.split())
    assert done.code == code, done.err
    assert done.out == ""
    told, what = done.err.splitlines()[-2:]
    assert told == f"error: {error}" and hint in what
    assert left(tmp_path) == []


def test_several_processes_are_refused(run_cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SslpreError, match="a single process"):
        room.bench(Options("simclr"))


def test_every_stage_loads_or_computes():
    assert (*shown.LOADING, *timed.COMPUTING) == STAGES
