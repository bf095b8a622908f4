"""The scripts tests/benchmarks/fidelity.py and growth.py at a tiny size: what they count is right, and they finish."""

import json
import mmap
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
FIDELITY = SimpleNamespace(**runpy.run_path(str(FOLDER / "fidelity.py")))
GROWTH = SimpleNamespace(**runpy.run_path(str(FOLDER / "growth.py")))


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
