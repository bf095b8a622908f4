"""The scripts in benchmarks/ at toy size: they run, count what they say, and their ratios are those of their rows."""

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sslpre.recipe import View

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a script in this process, which has torch loaded: `script("views", "--sizes", 32)`. Its JSON."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("SSLPRE_CACHE", str(tmp_path))  # so that what the script puts there is put back

    def run(name: str, *words: object) -> dict[str, Any]:
        path = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words), "--json", str(path)])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        return json.loads(path.read_text())

    return run


@pytest.fixture
def process(tmp_path: Path, child: dict[str, str]) -> Callable[..., dict[str, Any]]:
    """Run a script that starts processes of its own, on one core. Its JSON, and its table as `printed`."""

    def run(name: str, *words: object) -> dict[str, Any]:
        path = tmp_path / f"{name}.json"
        command = [sys.executable, BENCHMARKS / f"{name}.py", *words, "--threads", 1, "--eager", "--json", path]
        done = subprocess.run([*map(str, command)], env=child, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(path.read_text()) | {"printed": done.stdout}

    return run


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import turns

    return turns


@pytest.fixture
def ours(turns: Any) -> Any:
    import ours

    return ours


@pytest.fixture
def split(photos: Path, tmp_path: Path) -> Path:
    """The photos as train/, and once more as test/."""
    for name in ("train", "test"):
        shutil.copytree(photos, tmp_path / "split" / name)
    return tmp_path / "split"


def test_loaders(process, photos):
    told = process(
        "loaders",
        *("--images", photos, "--size", 32, "--batch", 4, "--count", 2, "--rounds", 1, "--least", 0),
        *("--peer", f"torchvision={sys.executable}"),
    )
    rows = told["rows"]
    assert set(rows) == {"torchvision"} | {
        f"{epoch} {kind} {until}"
        for epoch, kind in (("first", "ram"), ("later", "ram"), ("later", "disk"))
        for until in ("pixels", "eager")
        if (kind, until) != ("disk", "eager")
    }
    assert all(row["images_per_s"] > 0 and row["cpu_ms_per_image"] >= 0 for row in rows.values())
    for one in told["ratios"]:
        assert one["against"] == "torchvision"
        quotient = rows[one["ours"]]["images_per_s"] / rows["torchvision"]["images_per_s"]
        assert one["ratio"] == pytest.approx(quotient)
        assert one["met"] == (quotient >= one["promised"])
    assert {one["ours"] for one in told["ratios"]} == {
        f"{kind} pixels" for kind in ("first ram", "later ram", "later disk")
    }
    assert told["loaders"]["sslpre"]["side"] == 40  # the photos' own: less than twice the view
    assert told["machine"]["cores"] == 1 and told["machine"]["cpu"]
    assert told["loaders"]["torchvision"]["versions"]["torch"] == version("torch")
    assert "later epochs, disk: uint8 batch" in told["printed"]


def test_loaders_refuse_a_peer_that_makes_something_else(turns, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["loaders.py"])
    refuse = runpy.run_path(str(BENCHMARKS / "loaders.py"))["refuse_other_work"]
    asked = type("Asked", (), {"batch": 4, "size": 8})
    one = {"shapes": [[4, 3, 8, 8]]}
    with pytest.raises(RuntimeError, match="lightly made"):
        refuse({"lightly": [one]}, asked, 16)
    with pytest.raises(RuntimeError, match="pixels made"):
        refuse({"later ram pixels": [one]}, asked, 16)
    refuse({"lightly": [{"shapes": [[4, 3, 8, 8]] * 2}], "first ram pixels": [{"shapes": [[4, 3, 16, 16]]}]}, asked, 16)


def test_step(process, photos):
    told = process("step", "--images", photos, "--sizes", 32, "--batch", 4, "--count", 1, "--rounds", 1)
    (at,) = told["sizes"]
    auto = at["auto"]
    kinds = {f"{auto} ours later", f"{auto} ours first", f"{auto} alike later", "fp32 ours later", "fp32 alike later"}
    assert set(at["rows"]) == {f"ours {what}" for what in kinds}
    for row in at["rows"].values():
        assert row["images_per_s"] > 0 and 0 < row["loss"] < 20 and row["views"] == "eager"
    assert at["ratios"] == []  # nobody to compare with


def test_step_ratios_are_against_the_example(turns, monkeypatch):
    step = runpy.run_path(str(BENCHMARKS / "step.py"))
    rates = dict(
        zip((f"ours {what}" for what in step["asked_of"]("bf16")), (30.0, 14.0, 20.0, 12.0, 11.0), strict=True)
    )
    rates["lightly fp32"] = 10.0
    found = step["ratios"]({name: {"images_per_s": rate} for name, rate in rates.items()}, "bf16")
    assert [(one["ratio"], one["met"]) for one in found] == [
        (3.0, True),
        (1.4, False),
        (2.0, None),
        (1.2, None),
        (1.1, None),
    ]
    assert [one["ours"] for one in found][3:] == ["ours fp32 ours later", "ours fp32 alike later"]


def test_a_window_of_steps_begins_when_what_was_made_ahead_is_used_up(ours):
    assert [ours.warmup(workers) for workers in (0, 1, 2)] == [1, 3, 5]


def test_alike_views_are_those_of_the_example(ours):
    view = ours.paper_view(96)
    assert view.crop_scale == (0.08, 1.0) and (view.brightness, view.hue, view.blur) == (0.8, 0.2, 0.5)
    assert ours.paper_view(64).blur == 0


def test_views(script, capsys):
    threads = torch.get_num_threads()
    told = script("views", "--sizes", 32, "--batch", 4, "--rounds", 2, "--eager")
    assert torch.get_num_threads() == threads == 1
    (found,) = told["views"]
    others = {"torchvision uint8", "torchvision float", "kornia slice", "kornia resample"}
    assert set(found["rows"]) == others | {"sslpre eager"}
    best = min(others, key=lambda name: found["rows"][name]["ms_per_view"])
    assert found["fastest_other"] == best
    quotient = found["rows"][best]["ms_per_view"] / found["rows"]["sslpre eager"]["ms_per_view"]
    assert found["ratios"] == {"eager": pytest.approx(quotient)}
    assert found["graphs"] == {"eager": 0} and found["met"] == {"eager": found["ratios"]["eager"] >= 1.5}
    assert f"× {best}" in capsys.readouterr().out


def test_eager_code_is_not_called_compiled(turns, monkeypatch):
    """Views that a compiler does not change are measured once."""
    import views

    monkeypatch.setattr(views, "others", lambda size: {"other": lambda pixels: [torch.zeros(len(pixels), 3, 8, 8)]})
    monkeypatch.setattr(views, "compiler", lambda where: "a compiler")
    monkeypatch.setattr(views.Views, "compile", lambda self, by: None)
    saved = iter((0.0, 1.0))
    monkeypatch.setattr(views.Views, "saves", lambda self, where, batch: next(saved))
    rows = [set(views.measure(8, 16, 2, torch.device("cpu"), 1)["rows"]) for _ in range(2)]
    assert rows == [{"other", "sslpre eager"}, {"other", "sslpre eager", "sslpre compiled"}]


def test_gpu(script, split, capsys):
    told = script(
        "gpu",
        *("--toy", "--eager", "--count", 1, "--rounds", 1),
        *("--cifar", split, "--set", "encoder.backbone=test_resnet", "--set", "encoder.stem=auto"),
        *("--set", "train.batch_size=16", "--set", "train.epochs=2"),
    )
    assert [one["name"] for one in told["steps"]] == ["toy ResNet @32", "toy ViT @32"]
    for one in told["steps"]:
        assert one["images_per_s"] == pytest.approx(1000 * one["batch"] / one["step_ms"])
        assert one["views_share"] == pytest.approx(one["views_ms"] / one["step_ms"])
        assert one["peak_gib"] is None and one["promised"] > 0 and one["loss"] > 0
    assert told["cifar"]["images"] == 48 and told["cifar"]["epochs"] == 2
    assert 0.5 < told["cifar"]["knn20"] <= 1  # the test images are the training images, and each votes for itself
    assert 48 * told["cifar"]["knn200"] == pytest.approx(round(48 * told["cifar"]["knn200"]))
    assert 0 < told["cifar"]["minutes_training"] <= told["cifar"]["minutes"]
    printed = capsys.readouterr().out
    met = {one["target"]: one["met"] for one in told["targets"]}
    assert set(met) == {
        "toy ResNet @32, images/s", "toy ViT @32, images/s", "toy ViT @32, share of its views",
        "CIFAR-10, kNN accuracy (k = 200)", "CIFAR-10, minutes from the folder to kNN", "views eager at 32 px",
    } - {"views eager at 32 px"} | {name for name in met if name.startswith("views eager at 32 px")}  # fmt: skip
    assert met["CIFAR-10, minutes from the folder to kNN"] is True
    assert met["toy ViT @32, share of its views"] == (told["steps"][1]["views_share"] <= 0.1)
    assert met["CIFAR-10, kNN accuracy (k = 200)"] == (told["cifar"]["knn200"] >= 0.84)
    assert "25,000" in printed and f"{100 * told['cifar']['knn20']:.2f} %" in printed


def test_targets_are_judged_by_the_fastest_way(turns, ours):
    gpu = runpy.run_path(str(BENCHMARKS / "gpu.py"))
    works = gpu["WORKS"]
    assert [work.both for work in works] == [True, False, False], "25,000 images/s: with compiled and eager views"
    row = {"name": works[2].name, "images_per_s": 3100.0, "views_share": 0.12}
    slower = {**row, "images_per_s": 2000.0, "views_share": 0.05}
    views = {"size": 32, "promised": {"eager": None, "compiled": 15.0}, "ratios": {"eager": 2.0, "compiled": 14.0}}
    measured = {"steps": [slower, row], "views": [{**views, "fastest_other": "kornia slice"}]}
    assert [(one["found"], one["met"]) for one in gpu["targets"](measured, works)] == [
        (3100.0, True),
        (0.12, False),
        (14.0, False),
    ]


def test_accuracy(script, split):
    words = ("--set", "train.batch_size=16", "--set", "encoder.image_size=32", "--device", "cpu")
    told = script("accuracy", "--images", split, "--epochs", 1, "--seeds", 2, *words)
    assert [(one["views"], one["seed"]) for one in told["runs"]] == [
        (side, seed) for seed in (0, 1) for side in ("torchvision", "sslpre")
    ]
    assert {one["steps"] for one in told["runs"]} == {3}
    one = told["summary"]["knn200"]
    mine = [run["knn200"] for run in told["runs"] if run["views"] == "sslpre"]
    assert one["mean"]["sslpre"] == pytest.approx(np.mean(mine))
    assert one["std"]["sslpre"] == pytest.approx(np.std(mine, ddof=1))
    assert one["difference"] == pytest.approx(one["mean"]["sslpre"] - one["mean"]["torchvision"])
    squared = sum(one["std"][side] ** 2 / 2 for side in ("torchvision", "sslpre"))
    assert one["standard_error"] == pytest.approx(squared**0.5)


def test_the_reference_makes_the_recipes_views(turns):
    """With nothing left to chance both sides' views are the same pixels; drawn ones have the recipe's shares."""
    from sslpre.views.build import Views

    reference = runpy.run_path(str(BENCHMARKS / "accuracy.py"))["Reference"]
    pixels = torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8)
    size, index = torch.full((200, 2), 16), torch.arange(200)
    whole = [View(copies=2, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=1.0)]
    theirs, mine = reference(whole, 8), Views(whole, 8, seed=0)
    assert theirs.sides == mine.sides == (8, 8)
    for a, b in zip(theirs(pixels, size, index, 0), mine(pixels, size, index, 0), strict=True):
        assert (a - b).abs().max() <= 1.01 / 255
    grey = View(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, gray=0.3)
    (views,) = reference([grey], 16)(pixels, size, index, 0)
    share = (views.amax(1) - views.amin(1)).flatten(1).amax(1).lt(1e-6).double().mean().item()
    assert 0.17 < share < 0.43  # four standard deviations about 0.3
    with pytest.raises(SystemExit, match="square"):
        reference(whole, 8)(pixels, torch.tensor([[16, 17]]).expand(200, 2), index, 0)


def test_kmeans(script, capsys):
    threads = torch.get_num_threads()
    words = ("--rows", 400, "--clusters", 5, 20, "--width", 8, "--iterations", 3, "--rounds", 2)
    told = script("kmeans", *words)
    assert torch.get_num_threads() == threads == 1
    assert [(one["rows"], one["clusters"]) for one in told["kmeans"]] == [(400, 5), (400, 20)]
    for one in told["kmeans"]:
        assert set(one["found"]) >= {"sslpre", "scikit-learn"}
        mine, theirs = one["found"]["sslpre"], one["found"]["scikit-learn"]
        assert one["ratios"]["scikit-learn"] == pytest.approx(theirs["seconds"] / mine["seconds"])
        assert one["inertia_ratios"]["scikit-learn"] == pytest.approx(1, rel=1e-4)  # no cluster gets empty here
        assert mine["inertia"] < 400 and mine["seconds"] > 0
    printed = capsys.readouterr().out
    assert "scikit-learn" in printed and "s an iteration" in printed


def test_turns(turns):
    order: list[str] = []
    given = turns.in_turn({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, 3)
    assert order == ["a", "b"] * 3
    assert given == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert turns.spread([9.0, 10.0, 12.0]) == pytest.approx(0.15)


def test_a_window_counts_no_warm_up(turns, monkeypatch):
    clock = iter(range(100, 1000, 7))
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(clock))
    batches = iter("abcdefghij")
    took, last = turns.window(batches, 2, 5)
    assert last == "g" and next(batches) == "h"
    assert took["seconds"] == 5 * 7 and took["batches"] == 5
    took, _ = turns.window(batches, 0, 1, 10.0)  # until ten seconds have passed
    assert took["seconds"] == 14 and took["batches"] == 2


def test_cpu_time_is_that_of_all_processes(turns):
    burn = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.3: pass\nprint(flush=True); input()"
    before = turns.tree_cpu()
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        worker.stdout.readline()
        assert turns.tree_cpu() - before > 0.25
        worker.stdin.close()


def test_a_worker_answers_until_it_is_let_go_and_tells_why_it_died(turns, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\nimport turns\nprint('noise')\n"
        "turns.serve({'name': 'x'}, lambda what, count: {'twice': 2 * count} if what == 'ok' else 1 / 0)\n"
    )
    program.write_text(program.read_text().replace("print('noise')", ""))
    with turns.Worker([sys.executable, str(program)], 1) as worker:
        assert worker.ready == {"name": "x"}
        assert [worker.ask("ok", count) for count in (1, 5)] == [{"twice": 2}, {"twice": 10}]
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            worker.ask("no", 1)


def test_the_ledger_says_where_it_was_measured(turns, tmp_path, capsys):
    import ledger

    whole = ledger.record("views", {"rows": [1.5]}, ["torch", "no-such-package"])
    ledger.write(tmp_path / "a.json", whole)
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["rows"] == [1.5] and told["benchmark"] == "views"
    assert set(told["versions"]) == {"python", "torch"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    ledger.show("title", ("name", "n"), [("a", 12345.6), ("b", None), ("c", 0.12345)])
    assert capsys.readouterr().out == "\ntitle\nname       n\n----  ------\na     12,346\nb          -\nc      0.123\n"


def test_peers_find_views_in_whatever_a_batch_is(turns):
    shapes = runpy.run_path(str(BENCHMARKS / "peers.py"))["shapes"]
    view = torch.zeros(2, 3, 8, 8)
    shape = [2, 3, 8, 8]
    assert shapes([[view, view], torch.zeros(2), ("a", "b")], 8) == [shape, shape]
    assert shapes({"views": [{"image": view, "label": torch.zeros(2)}, {"image": view}]}, 8) == [shape, shape]
    assert shapes(view, 16) == []
