"""The scripts fidelity.py, growth.py and methods.py of tests/benchmarks/ at a tiny size: what they count is right."""

import itertools
import json
import mmap
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

FOLDER = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
FIDELITY = SimpleNamespace(**runpy.run_path(str(FOLDER / "fidelity.py")))
GROWTH = SimpleNamespace(**runpy.run_path(str(FOLDER / "growth.py")))
METHODS = SimpleNamespace(**runpy.run_path(str(FOLDER / "methods.py")))


def run(script: str, *words: object, child: dict[str, str]) -> str:
    command = [sys.executable, FOLDER / script, *map(str, words)]
    done = subprocess.run(command, env=child, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def picture(h: int, w: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def test_the_table_of_fidelity(photos, tmp_path, monkeypatch, capsys):
    words = (photos, "--view", 16, "--images", 6, "--crops", 3, "--json", tmp_path / "f.json")
    monkeypatch.setattr(sys, "argv", ["fidelity.py", *map(str, words)])
    FIDELITY.main()
    lines = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "f.json").read_text())
    assert report["commit"] is not None and report["machine"]["cpu"] and "torch" in report["versions"]
    assert report["images"] == 6
    assert report["median_size"] == [40, 40]
    rows = {row["form"]: row for row in report["forms"]}
    assert len(lines) == len(rows) + 4, "an empty line, the title, the head and its rule"
    assert rows["squashed 16"]["bytes"] == 16 * 16 * 3
    assert rows["squashed 32, auto"]["bytes"] == 32 * 32 * 3
    assert rows["full size"]["psnr"] == {"0.08-1": [99.0, 99.0], "0.2-1": [99.0, 99.0]}
    for scale in FIDELITY.SCALES:
        rounded, exact = rows["squashed 32, auto"]["psnr"][scale]
        assert rows["squashed 16"]["psnr"][scale][0] < rounded < 99
        assert exact > rounded  # the photos are smooth, so that half a pixel is most of the difference
    assert all(row["gather"] > 0 and row["crop"] > 0 for row in rows.values())


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (33, 47)])
def test_boxes_on_a_form_of_another_aspect(shape):
    """On squares as in training; on the full image, themselves; exact and rounded are one where nothing is rounded."""
    image = picture(*shape)
    numbers = torch.rand(20, FIDELITY.crop.NUMBERS, generator=torch.Generator().manual_seed(0))
    size = torch.tensor([shape]).expand(20, 2)
    boxes = FIDELITY.crop.draw_boxes(numbers, size, (0.08, 1.0), FIDELITY.RATIO)
    assert torch.equal(FIDELITY.boxes_on(boxes, image, image), boxes)
    expected = FIDELITY.crop.to_canvas(boxes, size, 24)
    assert torch.equal(FIDELITY.boxes_on(boxes, image, picture(24, 24)), expected)
    double = picture(2 * shape[0], 2 * shape[1])
    assert torch.equal(FIDELITY.boxes_on(boxes, image, double), 2 * boxes)
    for box in boxes:
        exact = FIDELITY.cut_exactly(double, box, shape, 16).astype(int)
        assert np.abs(exact - FIDELITY.cut(double, 2 * box, 16)).max() <= 1


def test_psnr():
    flat = np.full((4, 4, 3), 100, np.uint8)
    assert FIDELITY.psnr(flat, flat) == 99
    assert FIDELITY.psnr(flat, flat + 1) == pytest.approx(48.1308, abs=1e-3)  # 20 · log10(255)


def test_the_forms_keep_what_they_say():
    forms = FIDELITY.forms(16, 20)
    image = picture(40, 60)
    shapes = {name: form(image).shape[:2] for name, form in forms.items()}
    assert shapes["squashed 20, auto"] == (20, 20)
    assert shapes["short side 18"] == (18, 27)
    assert shapes["full size"] == (40, 60)
    assert FIDELITY.short_side(99)(image) is image


def test_the_table_of_growth(tmp_path, child):
    words = ("--most", 1000, "--largest", 0, "--json", tmp_path / "g.json")
    printed = run("growth.py", *words, child={**child, "TMPDIR": str(tmp_path)})
    report = json.loads((tmp_path / "g.json").read_text())
    assert report["commit"] is not None and report["machine"]["cpu"] and "torch" in report["versions"]
    assert "1,000" in printed and printed.count(" met") == 1
    assert report["files"][0]["store"] == "ram" and report["files"][0]["store_seconds"] > 0
    assert [row["files"] for row in report["files"]] == [1000]
    assert report["rows"] == [] and 0 <= report["files"][0]["mb"] < 500
    assert 0.15 < report["files"][0]["store_mb"] < 10, "at least the rows of a batch, at most all of 3 MB and a little"
    assert not list(tmp_path.glob("sslpre-growth-*"))


def test_the_rows_of_growth(monkeypatch):
    monkeypatch.setitem(GROWTH.all_rows.__globals__, "ours", lambda what, size: GROWTH.measure_rows(int(size)))
    found = GROWTH.all_rows(1100)
    assert [row["rows"] for row in found] == [512, 1024]
    assert all(row["seconds"] > 0 and 0 <= row["mb"] < 500 for row in found)
    assert found[1]["matrix_mb"] == pytest.approx(4 * 1024 * 1024 / 1e6)


def test_files_are_named_once_and_read(tmp_path, monkeypatch):
    from sslpre.data.find import find

    monkeypatch.setitem(GROWTH.put_files.__globals__, "LINKS", 1500)
    GROWTH.put_files(tmp_path, 2000, 0)
    GROWTH.put_files(tmp_path, 3200, 2000)
    source = find(tmp_path).train
    assert len(source) == 3200
    assert [source.name(i)[-13:] for i in (0, 2000, 3199)] == ["000000000.png", "000002000.png", "000003199.png"]
    assert source.read(3199).shape == (40, 40, 3)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_the_peak_is_counted_anew():
    def written() -> mmap.mmap:  # not by malloc, which may keep what is freed
        pages = mmap.mmap(-1, 60_000_000)
        for at in range(0, len(pages), mmap.PAGESIZE):
            pages[at] = 1
        return pages

    written().close()
    before = GROWTH.resident()
    assert GROWTH.peak() - before < 20e6
    again = written()
    assert 50e6 < GROWTH.peak() - before < 90e6
    again.close()


@pytest.fixture
def compare(monkeypatch, tmp_path, capsys):
    """Run methods.py with a ledger of its own; its table's cells, row by row, and the ledger's lines."""
    monkeypatch.setenv("SSLPRE_CACHE", str(tmp_path))  # so that what the script puts there is put back
    path = tmp_path / "methods.jsonl"

    def run(*words: object) -> tuple[list[list[str]], list[dict]]:
        more = ("--ledger", path, "--measure", 0, "--device", "cpu", "--set", "train.precision=fp32")
        monkeypatch.setattr(sys, "argv", ["methods.py", *map(str, (*words, *more))])
        capsys.readouterr()
        METHODS.main()
        rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in row] for row in rows], METHODS.read(path)

    return run


def test_every_method_is_measured(compare, photos, tmp_path, monkeypatch):
    from sslpre.methods import methods

    for name in ("train", "test"):
        shutil.copytree(photos, tmp_path / "split" / name)
    for path in (tmp_path / "split" / "test").rglob("*.jpg"):  # others, as training images do not count
        with Image.open(path) as image:
            ImageOps.mirror(image).save(path, quality=95)
    words = ("--images", tmp_path / "split", "--minutes", 1e-6)
    rows, lines = compare(*words)
    assert {line["method"] for line in lines} == {*methods(), "random weights", "raw pixels"}
    assert [row[0] for row in rows[:2]] == ["method", "---"] and len(rows) == 2 + len(lines)
    assert [row[0] for row in rows[-2:]] == ["random weights", "raw pixels"]
    for line in lines:
        assert line["commit"] is not None and line["images"] == "split" and line["minutes"] == 1e-6
        for row in line["rows"]:
            for score in (row["linear"], row["knn"]):
                assert 0 <= score["low"] <= score["accuracy"] <= score["high"] <= 1
        if line["method"] in methods():
            assert line["epochs"] == 1 and line["steps"] == 12 and 'name = "' + line["method"] in line["recipe"]
            assert [row["features"] for row in line["rows"]][-1] == "output" and len(line["rows"]) == 6
            told = [cells[5] for cells in rows if cells[0] == line["method"]]
            if line["method"] == "inpainting":
                assert told == [""] and {"encoder.rec", "encoder.blank", "encoder.loss"} <= set(line["learned"])
            else:
                assert told == [f"{line['learned']['loss']:.2f} of {line['chance']:.2f}"]
                assert 0 < line["learned"]["loss"] < 3 * line["chance"]
    monkeypatch.setitem(METHODS.on_images.__globals__, "trained", None)  # calling it would fail
    assert compare(*words) == (rows, lines), "what is in the ledger is not measured again"
    assert compare("--table") == (rows, lines)


def test_settings_are_chosen_without_a_look_at_test_images(compare, photos, tmp_path):
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "train").symlink_to(photos)
    words = ("--images", tmp_path / "only", "--minutes", 1e-6, "--only", "rotation")
    tries = ("--try", "rotation:optim.lr=0.3,optim.betas=[0.5,0.9],optim.momentum=0.5", "--try", "simclr:optim.lr=1")
    rows, lines = compare(*words, "--choose", *tries)
    assert [line["settings"] for line in lines] == [[], ["optim.lr=0.3", "optim.betas=[0.5,0.9]", "optim.momentum=0.5"]]
    assert all(line["choosing"] and line["method"] == "rotation" and line["steps"] == 9 for line in lines), "36 images"
    assert "lr = 0.3\n" in lines[1]["recipe"] and "momentum = 0.5\n" in lines[1]["recipe"]
    assert len(rows) == 4
    with pytest.raises(SystemExit, match="no test/"):
        compare(*words)
    with pytest.raises(SystemExit, match="no method rotatoin"):
        compare(*words, "--only", "rotatoin")


def test_a_method_that_is_refused_does_not_stop_the_others(compare, photos, tmp_path):
    for name in ("train", "test"):
        shutil.copytree(photos, tmp_path / "split" / name)
    words = ("--images", tmp_path / "split", "--minutes", 1e-6, "--only", "rotation", "--choose")
    with pytest.raises(SystemExit, match=r"not measured:\nsplit: rotation train\.batch_size=1000: batch size `1000`"):
        compare(*words, "--try", "rotation:train.batch_size=1000")
    assert len(METHODS.read(tmp_path / "methods.jsonl")) == 1


def line_of(method: str, low: float, high: float, settings: tuple[str, ...] = (), choosing: bool = False) -> dict:
    middle = {"accuracy": (low + high) / 2, "low": low, "high": high}
    rows = [{"features": name, "linear": middle, "knn": middle} for name in ("layer1", "output")]
    about = {"images": "x", "fingerprint": "f", "backbone": "b", "set": [], "minutes": 1.0, "choosing": choosing}
    return {**about, "method": method, "settings": [*settings], "rows": rows, "best": {"linear": "layer1"}}


def test_what_was_best_on_held_out_images_is_taken():
    lines = [line_of("a", 0.1 * at, 0.1 * at + 0.2, (f"s={at}",), True) for at in (1, 5, 3)]
    asked = lines[0]
    assert METHODS.chosen("a", asked, lines) == ("s=5",)
    assert METHODS.chosen("b", asked, lines) == METHODS.chosen("a", {**asked, "fingerprint": "g"}, lines) == ()
    assert METHODS.chosen("a", asked, [line_of("a", 0.9, 1.0, ("s=9",)), *lines]) == ("s=5",), "not by test images"
    more = line_of("b", 0.8, 0.9, ("s=7",), True) | {"minutes": 30.0}
    assert METHODS.chosen("b", asked, [*lines, more]) == (), "more time than there is"
    lines += [more, more | {"method": "a", "minutes": 0.5}]
    assert METHODS.chosen("a", asked, lines) == ("s=5",), "less time than others had"
    assert METHODS.chosen("b", asked | {"minutes": 40.0}, lines) == ("s=7",)


def test_better_than_random_weights_by_both_intervals():
    random = line_of("random weights", 0.3, 0.4)
    random["rows"][1]["linear"] = {"accuracy": 0.45, "low": 0.4, "high": 0.5}
    trained = {"epochs": 3, "seconds": 300.0, "views_per_s": 1234.5, "chance": 2.079, "learned": {"loss": 1.5}}
    (_, rows), *_ = METHODS.tables([line_of("a", 0.5, 0.6) | trained, line_of("b", 0.51, 0.6) | trained, random])
    assert [(row[0], row[-1]) for row in rows] == [("b", "yes"), ("a", "no"), ("random weights", "")]
    assert rows[0][1:8] == ["", "3", "5 min", "1,234", "1.50 of 2.08", "layer1", "55.5 [51.0, 60.0]"]


def test_a_budget_becomes_epochs(photos, tmp_path, monkeypatch):
    """By a clock that is a second on at each look: a second for the look at every image, two steps of 1.5 s."""
    from sslpre.data.find import find

    monkeypatch.setenv("SSLPRE_CACHE", str(tmp_path))
    monkeypatch.setitem(
        METHODS.affordable.__globals__, "time", SimpleNamespace(monotonic=itertools.count(1.0).__next__)
    )
    found, where = find(photos), torch.device("cpu")
    recipe = METHODS.ours.resolved("rotation", found, where, ("encoder.backbone=test_resnet", "train.precision=fp32"))
    arguments = SimpleNamespace(minutes=10.0, measure=2.0)
    assert METHODS.affordable(recipe, found, where, tmp_path, arguments) == 600 // (1 + 12 * 1.5)


def test_half_a_line_of_a_ledger_does_not_count(tmp_path):
    path = tmp_path / "m.jsonl"
    assert METHODS.read(path) == []
    path.write_text('{"a": 1}\n{"a": ')
    assert METHODS.read(path) == [{"a": 1}]
    METHODS.add(path, {"b": 2})
    assert [line.get("b") for line in METHODS.read(path)] == [None, 2]
