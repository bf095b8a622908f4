"""Several encoders on one plane, as typed; alignment and uniformity against slow loops; what the picture holds."""

import csv
import json
import math
import os
import shutil
import sys

import pytest
import torch

from sslpre.cli import run as run_words
from sslpre.ops.sphere import alignment, uniformity
from sslpre.probe import Question, Score
from sslpre.probe.plane import Plane, Point, picture

SMALL = "--backbone test_resnet --image-size 32 --batch-size 8 --epochs 1 --precision fp32 --device cpu --workers 1"
TAIL = ("--knn", "--device", "cpu", "--workers", "1")


def test_alignment_and_uniformity_are_the_papers():
    x, y = (torch.nn.functional.normalize(torch.randn(9, 5), dim=1) for _ in range(2))
    assert alignment(x, y).item() == pytest.approx(
        sum(((a - b) ** 2).sum().item() for a, b in zip(x, y, strict=True)) / 9
    )
    pairs = [(i, j) for i in range(9) for j in range(i)]
    potential = sum(math.exp(-2 * ((x[i] - x[j]) ** 2).sum().item()) for i, j in pairs) / len(pairs)
    assert uniformity(x).item() == pytest.approx(math.log(potential), abs=1e-5)


@pytest.fixture(scope="module")
def two(tmp_path_factory, photos):
    """A directory with runs of two methods on the same images. Not to be written to."""
    place = tmp_path_factory.mktemp("two")
    before = os.getcwd()
    os.chdir(place)
    try:
        for method in ("simclr", "rotation"):
            assert run_words(["pretrain", method, str(photos), *SMALL.split()]) == 0
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def here(two, tmp_path, run_cli):
    shutil.copytree(two / "runs", tmp_path / "runs")
    return tmp_path


def test_two_runs_and_an_export(run_cli, here, photos):
    names = ("runs/simclr-1", "runs/rotation-1", "runs/simclr-1/encoder")
    done = run_cli("probe", *names, "--plane", "plane.csv", "--data", photos, *TAIL, "--json")
    assert done.code == 0, done.err
    plain = json.loads(done.out)
    points = plain["plane"]["points"]
    assert [(one["name"], one["weights"]) for one in points] == [
        ("runs/simclr-1", "encoder"),
        ("test_resnet", "random weights"),
        ("runs/rotation-1", "encoder"),
        ("runs/simclr-1/encoder", "encoder"),
    ]
    assert plain["plane"]["views"] == "of the recipe `simclr`" and plain["plane"]["images"] == 48
    for key in ("alignment", "uniformity", "accuracy"):
        assert points[0][key] == pytest.approx(points[3][key], abs=1e-5), "the same weights see the same views"
    assert points[0]["alignment"] != points[2]["alignment"]
    for one in points:
        assert 0 <= one["alignment"] <= 4 and -8 <= one["uniformity"] <= 0
    reports = {one["path"]: one for one in plain["reports"]}
    output = next(row for row in reversed(reports["runs/rotation-1"]["rows"]) if row["weights"] == "encoder")
    assert output["knn"]["accuracy"] == points[2]["accuracy"]
    assert points[2]["encoder_hash"] == reports["runs/rotation-1"]["encoder_hash"]
    lines = list(csv.DictReader((here / "plane.csv").open()))
    assert [float(line["uniformity"]) for line in lines] == [one["uniformity"] for one in points]


def test_runs_of_one_recipe_are_compared_by_its_views(run_cli, here, photos):
    shutil.copytree("runs/simclr-1", "runs/simclr-2")
    done = run_cli("probe", "simclr-1", "simclr-2", "--plane", "plane.csv", *TAIL)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80 and "views: of the runs' recipe" in " ".join(lines)
    starts = [
        "encoder",
        "-----",
        "runs/simclr-1",
        "runs/simclr-2",
        "test_resnet, random weights",
        "raw pixels",
        "chance",
    ]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=False))


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (
            "simclr-1 rotation-1",
            "`sslpre probe` takes one encoder, and several with --plane",
            "sslpre probe simclr-1 rotation-1 --plane plane.svg",
        ),
        ("simclr-1 --plane p.jpg", "`p.jpg` ends in none of .svg, .png, .csv", "write --plane plane.svg"),
        ("simclr-1 --plane runs.csv", "`runs.csv` exists", "name another file, or remove it first"),
        ("--json --csv", "`--json` and `--csv` are two formats of one output", "leave one of them out"),
        (
            "--csv --list-duplicates",
            "`--csv` has no place for the names of `--list-duplicates`",
            "leave --csv out, or take --json",
        ),
        (
            "--labels 1,10",
            "`--labels 1,10` is not a list of shares above 0 % and up to 100 %",
            "write --labels 1%,10%,100%",
        ),
        (
            "--labels 0%",
            "`--labels 0%` is not a list of shares above 0 % and up to 100 %",
            "write --labels 1%,10%,100%",
        ),
        (
            "--labels 1%,nan%",
            "`--labels 1%,nan%` is not a list of shares above 0 % and up to 100 %",
            "write --labels 1%,10%,100%",
        ),
        ("--knn --labels 1%", "`--labels` is for --linear and --finetune", "sslpre probe --linear --labels 1%"),
        ("--k 0", "`--k 0` is not a list of whole numbers from 1 on", "write --k 1,5,20,200"),
        ("--k 1,,5", "`--k 1,,5` is not a list of whole numbers from 1 on", "write --k 1,5,20,200"),
        ("--linear --k 5", "`--k` is for --knn", "sslpre probe --knn --k 5"),
    ],
)
def test_what_does_not_go_together(run_cli, here, words, error, hint):
    (here / "runs.csv").touch()
    done = run_cli("probe", *words.split())
    assert done.code == 2 and done.out == ""
    assert done.err.splitlines()[-2:] == [f"error: {error}", f"hint: {hint}"]


def test_runs_of_different_images_need_a_folder(run_cli, here):
    text = (here / "runs/rotation-1/recipe.toml").read_text().splitlines()
    other = [f'images = "{here}"' if line.startswith("images = ") else line for line in text]
    (here / "runs/rotation-1/recipe.toml").write_text("\n".join(other))
    done = run_cli("probe", "simclr-1", "rotation-1", "--plane", "plane.csv", *TAIL)
    assert done.err.splitlines()[-2] == "error: the runs are of different images"


def test_a_picture_without_matplotlib(run_cli, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run_cli("probe", "simclr-1", "--plane", "plane.svg")
    assert done.code == 3 and done.err.splitlines()[-2:] == [
        "error: pictures of the plane need matplotlib",
        "hint: pip install 'sslpre[report]', or --plane plane.csv",
    ]


def test_the_picture_has_a_name_for_every_point_and_is_the_same_again():
    pytest.importorskip("matplotlib")
    names = ["plain", "$\\frac{", "<b>&amp;", "two\nlines", "x" * 90]
    points = tuple(
        Point(name, weights, 0.1 * at, -0.3 * at, Score(0.1 * at, 0.0, 1.0))
        for at, (name, weights) in enumerate(zip(names, ["encoder"] * 3 + ["start", "random weights"], strict=True))
    )
    plane = Plane(points, Question("linear"), None, 48, "of a test")
    drawn = picture(plane, "svg")
    assert drawn == picture(plane, "svg")
    assert picture(plane, "png").startswith(b"\x89PNG")
    assert b"<svg" in drawn
