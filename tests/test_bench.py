"""`sslpre bench`: are its figures those of the machine, does it name the stage that is slow, does it leave nothing?"""

import contextlib
import dataclasses
import json
import os
import time
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sslpre import bench as room
from sslpre import encoder
from sslpre import recipe as recipes
from sslpre.bench import advice as advised
from sslpre.bench import setting as described
from sslpre.bench import stages as timed
from sslpre.bench import stores
from sslpre.bench import table as shown
from sslpre.bench.advice import advice
from sslpre.bench.setting import Setting
from sslpre.bench.table import STAGES, Report, Timing, Whole, timing, weighed
from sslpre.data import store as store_room
from sslpre.data.find import Folder, find
from sslpre.data.packed import form_of
from sslpre.data.packed import opened as opened_file
from sslpre.data.stream import BadList, Pixels
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
        store_size=128, sides=(64, 64), smaller=32, batch_size=10, batch=10, part=0, epochs=10, store="ram",
        store_line="in RAM, 49 MB", held=0, fits_ram=True, simplejpeg=True, compiler="g++", compilable=True,
        compiled=True, graphs=1, compile_s=9.0, network_s=0.0, note="",
    )  # fmt: skip
    return Setting(**{**plain, **changed})


def report(first=100.0, later=60.0, ms=None, **changed):
    """A report of stages that take STAGE_MS, in steps of `first` and `later` milliseconds."""
    stages = {name: None if value is None else one(value) for name, value in {**STAGE_MS, **(ms or {})}.items()}
    kept = None if changed.get("store") == "off" else object()
    halves = room.judged(stages, whole(first), whole(later), kept)
    return Report(setting(**changed), stages, *halves, 10**9, 2 * 10**9, 20.0)


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
        (report(smaller=0), "faster: a lighter --backbone, or fewer --epochs"),
        (report(first=300.0, epochs=3, simplejpeg=False), "pip install 'sslpre[fast]'"),
        (report(ms={"views": 55.0}, compiler=None), "install g++ and python3-dev"),
        (report(ms={"views": 55.0}, compiler=None, kind="cuda"), "install triton, gcc and python3-dev"),
        (report(ms={"views": 55.0}, compiler=None, compilable=False), "--image-size 32"),
        (report(ms={"views": 55.0}, smaller=160), "--image-size 160"),
        (report(ms={"views": 55.0}, smaller=0), "fewer operations in the recipe's [[views]]"),
        (report(ms={"optimiser": 55.0}), "--batch-size 20"),
        (report(ms={"optimiser": 55.0}, count=19, measured=19), "a lighter --backbone"),
        (report(ms={"optimiser": 55.0}, part=5), "a lighter --backbone"),
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
    said = {
        "--workers 2": dict(workers=1),
        "nothing is quicker": dict(store="device"),
        "come from memory": dict(),
        ": --store ram": dict(store="disk"),
        "SSLPRE_CACHE may name a folder on a faster disk": dict(store="disk", fits_ram=False),
    }
    for words, changed in said.items():
        assert words in advice(dataclasses.replace(slow, setting=setting(store_size=64, **changed)))


def test_the_image_size_that_is_advised_is_one_that_the_network_takes(monkeypatch):
    cpu = torch.device("cpu")

    def smaller(backbone, size, precision="fp32", side=0):
        table = {"backbone": backbone, "image_size": size}
        recipe = recipes.load(
            "simclr", (f"views.0.size={side}",), {"encoder": table, "train": {"precision": precision}}
        )
        return described.smaller_side(
            encoder.build(backbone, image_size=size, mean=[0.5] * 3, std=[0.5] * 3), recipe, cpu
        )

    assert [smaller("test_resnet", size) for size in (32, 33, 64, 100)] == [0, 32, 32, 96]
    assert smaller("test_vit", 160) == 0, "it has patches"
    assert smaller("test_resnet", 64, side=64) == 0, "no view follows the image size"
    monkeypatch.setattr(encoder.Encoder, "strides_a_point", lambda self, side: side == 32)
    assert [smaller("test_resnet", 64, precision) for precision in ("fp32", "bf16")] == [32, 0]
    assert smaller("test_resnet", 96, "bf16") == 64


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
        time.sleep(0.06)  # a network on a busy machine is faster still
        return read(self, i, side)

    monkeypatch.setattr(Folder, "read", slow)
    done = run_cli("bench", "simclr", photos, *SMALL, "--json", "--set", "train.epochs=2")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert 6 < found["stages"]["decode"]["images_per_s"] < 17, "one thread, at least 60 ms an image"
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
    assert "48 images are decoded already" in done.err
    assert left(tmp_path) == before


def test_a_compiler_that_fails_is_said(run_cli, photos, quick, monkeypatch):
    made = []
    monkeypatch.setattr("sslpre.train.build.compiler", lambda where: "a compiler")
    monkeypatch.setattr("sslpre.train.build.repays", lambda where, saved: True)
    monkeypatch.setattr(Views, "compile", lambda self, by: made.append([self, "compiled by X"]))
    monkeypatch.setattr(
        Views, "made", property(lambda self: {id(one): how for one, how in made}.get(id(self), "eager"))
    )
    make = Views.__call__

    def call(self, *given):
        for one in made:
            one[1] = "eager" if one[0] is self else one[1]  # it has failed at the first call
        return make(self, *given)

    monkeypatch.setattr(Views, "__call__", call)
    done = run_cli("bench", "simclr", photos, *SMALL, "--json")
    assert done.code == 0, done.err
    assert "views      2 of 32 px, eager, for compiling them failed" in done.err
    found = json.loads(done.out)["setting"]
    assert not found["compiled"] and found["graphs"] == 0


def test_compiling_the_network_is_in_no_step(run_cli, photos, quick, monkeypatch):
    compiled = []

    def slow(graph, inputs):
        compiled.append(graph)
        time.sleep(3)
        return graph.forward

    def compile(self):
        self._compiled_call_impl = torch.compile(self._call_impl, backend=slow)

    monkeypatch.setattr(nn.Module, "compile", compile)
    done = run_cli("bench", "simclr", photos, *SMALL, "--json", "--compile")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert compiled and found["setting"]["network_s"] > 3
    assert found["first_epoch"]["ms_per_step"] < 1000 and found["later_epochs"]["ms_per_step"] < 1000
    assert "decoding takes" not in found["advice"]
    text = shown.notes(report(network_s=42.0))
    assert any("and 9 s to compile the views and 42 s to compile the network" in line for line in text)


def test_the_clock_of_whole_steps_starts_when_the_device_is_idle(monkeypatch):
    """Six steps that take 20 ms each, which a device does after it was told to: none of them is counted twice."""
    queued = [0]

    def wait(device):
        time.sleep(0.02 * queued[0])
        queued[0] = 0

    def take(run, pixels, epoch):
        queued[0] += 1

    monkeypatch.setattr(timed, "wait", wait)
    monkeypatch.setattr(timed.step, "take_step", take)
    stream = SimpleNamespace(waited=0.0, steps_per_epoch=6, batch_size=1, steps=lambda a, b: (i for i in range(a, b)))
    run = SimpleNamespace(stream=stream, device=torch.device("cpu"), objective=nn.Linear(1, 1))
    found = timed.whole(run, 0, 6)
    assert found.steps == 4 and found.ms_per_step == pytest.approx(20, rel=0.2)


def test_memory_of_a_larger_store_is_reckoned_with(run_cli, photos, quick, monkeypatch):
    monkeypatch.setattr(room, "STORED", 20 * 3 * 40 * 40)
    done = run_cli("bench", "simclr", photos, *SMALL, "--json")
    found = json.loads(done.out)
    assert found["setting"]["measured"] == 20
    assert found["run_memory"] - found["peak_memory"] == 28 * 3 * 40 * 40
    done = run_cli("bench", "simclr", photos, *SMALL, "--json", "--store", "disk")
    found = json.loads(done.out)
    assert found["run_memory"] == found["peak_memory"], "a file is not in the process"
    assert "of which 1.0 GB for images that were not stored here" in " ".join(shown.notes(report()))


def test_a_packed_file_is_measured_by_reading_it(run_cli, photos, tmp_path, quick, monkeypatch):
    assert run_cli("pack", photos, tmp_path / "mine.packed", "--size", "40", "--workers", "1").code == 0
    before, content, read = left(tmp_path), (tmp_path / "mine.packed").read_bytes(), []
    gather = stores.Mapped.gather

    def noted(self, index, out):
        sizes = gather(self, index, out)
        read.append((self.where, out.mean()))
        return sizes

    monkeypatch.setattr(stores.Mapped, "gather", noted)
    monkeypatch.setattr(room, "STORED", 20 * 3 * 40 * 40)
    file = tmp_path / "mine.packed"
    done = run_cli("bench", "simclr", photos, *SMALL, "--json", "--set", "data.store_size=40", "--store", file)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["setting"]["store"] == "disk" and found["setting"]["held"] == 48
    assert {where for where, _ in read} == {str(file)} and min(mean for _, mean in read) > 20
    assert found["setting"]["note"] == "" and left(tmp_path) == before and file.read_bytes() == content


def test_rows_of_a_file_are_those_of_the_images(photos, tmp_path):
    source = find(photos).train
    packed = store_room.pack(source, 16, tmp_path / "p.packed", 1, BadList(None, 0.0, 48))
    with contextlib.closing(packed), contextlib.closing(stores.Mapped(packed, np.array([40, 3]))) as mapped:
        out, theirs = np.zeros((2, 16, 16, 3), np.uint8), np.zeros((16, 16, 3), np.uint8)
        assert mapped.ready(np.array([0, 1])) and len(mapped) == 2
        mapped.forget()
        mapped.gather(np.array([1, 0]), out)
        for row, i in zip(out, (3, 40), strict=True):
            assert packed.take(i, theirs) and np.array_equal(row, theirs)


def test_a_half_filled_file_lends_its_rows(photos, tmp_path):
    source = find(photos).train
    form = form_of(source, 16)
    packed = opened_file(tmp_path / "p.packed", form, write=True, make=True)
    with contextlib.closing(packed):
        with pytest.raises(ValueError, match="no image"):
            stores.Mapped(packed, np.arange(4))
        packed.put(7, np.full((16, 16, 3), 9, np.uint8), (5, 5))
        with contextlib.closing(stores.Mapped(packed, np.arange(4))) as mapped:
            out = np.zeros((4, 16, 16, 3), np.uint8)
            mapped.gather(np.arange(4), out)
            assert (out == 9).all()


def test_a_file_larger_than_memory_is_read_from_the_disk(run_cli, photos, tmp_path, quick, monkeypatch):
    dropped = []
    forget = stores.Mapped.forget
    monkeypatch.setattr(stores.Mapped, "forget", lambda self: dropped.append(self.where) or forget(self))
    memory = stores.room.memory
    monkeypatch.setattr("sslpre.bench.stores.room", SimpleNamespace(memory=lambda: 1000, disk=stores.room.disk))
    done = run_cli("bench", "simclr", photos, *SMALL, "--json", "--store", "disk")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert len(dropped) == 2 and all(where.startswith(f"{tmp_path}/.sslpre-bench-") for where in dropped)
    assert "larger than the free memory (1.0 kB): it was read from the disk itself" in found["setting"]["note"]
    assert left(tmp_path) == [] and memory() > 1000


def test_without_room_for_a_store_bench_goes_on(run_cli, photos, tmp_path, quick, monkeypatch):
    def none(*given, **named):
        raise SslpreError("`--store ram` is not possible: 5 GB is more than the free memory", "", 3)

    choose = stores.choose
    monkeypatch.setattr(
        stores, "choose", lambda *given: (choose(*given), monkeypatch.setattr(stores, "open_store", none))[0]
    )
    done = run_cli("bench", "simclr", photos, *SMALL, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["setting"]["note"].endswith("as the run has it: 5 GB is more than the free memory")
    assert found["stages"]["store"] is None and found["later_epochs"] == found["first_epoch"]


def test_a_cache_that_takes_nothing_is_not_measured(run_cli, photos, tmp_path, quick, monkeypatch):
    beside = stores.beside
    monkeypatch.setattr(stores, "beside", lambda file: beside(None))
    done = run_cli("bench", "simclr", photos, *SMALL, "--json", "--store", "disk")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert "the cache's disk was not measured" in found["setting"]["note"] and found["stages"]["store"] is not None
    assert left(tmp_path) == []


def test_no_more_is_measured_than_memory_has_room_for(run_cli, photos, quick, monkeypatch):
    free = 4 * 3 * 40 * 40 * 10  # a quarter of it takes ten images
    monkeypatch.setattr("sslpre.bench.room", SimpleNamespace(memory=lambda: free))
    found = json.loads(run_cli("bench", "simclr", photos, *SMALL, "--json").out)
    assert found["setting"]["measured"] == 10


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

    def start(self, by):
        made.append(self)
        self.batches = []

    monkeypatch.setattr(room, "STORED", 20 * 3 * 40 * 40)
    monkeypatch.setattr("sslpre.train.build.compiler", lambda where: "a compiler")
    monkeypatch.setattr("sslpre.train.build.repays", lambda where, saved: not asked.append(saved))
    monkeypatch.setattr(Views, "compile", start)
    monkeypatch.setattr(Views, "made", property(lambda self: "compiled by X" if self in made else "eager"))
    monkeypatch.setattr(Views, "__call__", call)
    done = run_cli("bench", "simclr", photos, *SMALL, "--json", "--set", "train.epochs=7")
    assert done.code == 0, done.err
    found = json.loads(done.out)["setting"]
    assert found["measured"] == 20 and found["compiled"] and found["compile_s"] > 0
    assert "views      2 of 32 px, compiled by X in " in done.err
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
    assert (*advised.LOADING, *timed.COMPUTING) == STAGES
