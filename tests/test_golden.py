"""Any image a user has: every row of tests/golden.py, through find and read, in pretrain and in probe."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sslpre.data import BadImage
from sslpre.data.find import Folder, find, printable, subset
from sslpre.data.headers import grey_share, mixed
from sslpre.data.sample import sample

SCRIPT = Path(__file__).with_name("golden.py")
GOLDEN = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
LISTED = [odd for odd in GOLDEN.ODDS if not odd.passed_over]
BAD = {printable(odd.name): odd for odd in LISTED if odd.reason}
MAYBE = {printable(odd.name): odd for odd in LISTED if odd.else_reason}  # as Pillow was built
SMALL = "--backbone test_resnet --image-size 32 --batch-size 8 --precision fp32 --device cpu --workers 1".split()
PROBE = "--knn --device cpu --workers 1 --json".split()
VANISHED = "the file has vanished"


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Path:
    """The golden files alone. Not to be written to."""
    folder = tmp_path_factory.mktemp("golden")
    GOLDEN.make(folder)
    return folder


@pytest.fixture(scope="module")
def source(golden):
    return find(golden).train


@pytest.fixture(scope="module")
def rows(source):
    """The number of each image, by its name in bytes."""
    return {source.relative(i): i for i in range(len(source))}


def outcome(source, i, side=None):
    try:
        return source.read(i, side), ""
    except BadImage as error:
        return None, error.reason


# ---------------------------------------------------------------- the table, row by row


@pytest.mark.parametrize("odd", LISTED, ids=lambda odd: ascii(printable(odd.name)).strip("'"))
def test_an_odd_file_is_read_as_expected(odd, source, rows):
    i = rows[odd.name]
    picture, reason = outcome(source, i)
    assert GOLDEN.met(odd, picture, reason), f"expected {odd.expected}, got {reason or picture.shape}"
    if picture is None:
        with pytest.raises(BadImage, match="^" + re.escape(reason)):
            source.read(i, 8)
    else:
        assert source.size(i) == picture.shape[:2]
        smaller, _ = outcome(source, i, 8)
        assert min(smaller.shape[:2]) >= min(16, *picture.shape[:2])


def test_the_table_is_about_all_that_was_promised():
    """So that a row cannot be lost: every kind of oddness has its rows, and every row one outcome."""
    words = Counter(odd.what.split(",")[0] for odd in GOLDEN.ODDS)
    assert sum(what.startswith("EXIF orientation") for what in words) >= 8
    assert sum(what.startswith("cut ") for what in words) >= 10
    assert len(GOLDEN.ODDS) >= 100
    assert len({odd.name for odd in GOLDEN.ODDS}) == len(GOLDEN.ODDS)
    for odd in GOLDEN.ODDS:
        assert (odd.picture is not None) + bool(odd.reason) + bool(odd.passed_over) == 1, odd.name
        assert odd.picture is not None or not odd.else_reason


def test_a_wrong_outcome_is_noticed():
    odd = next(odd for odd in LISTED if odd.picture is not None and not odd.within)
    other = odd.picture.copy()
    other[0, 0, 0] ^= 1
    assert GOLDEN.met(odd, odd.picture, "")
    assert not GOLDEN.met(odd, other, "")
    assert not GOLDEN.met(odd, odd.picture[:-1], "")
    assert not GOLDEN.met(odd, None, "truncated")
    bad = next(iter(BAD.values()))
    assert not GOLDEN.met(bad, odd.picture, "")
    assert not GOLDEN.met(bad, None, "something else")


def test_what_the_scan_lists_and_counts(golden, source, rows):
    """Symbolic loops end with every file listed once; `x.jpg` is walked; both names of a hard link are images."""
    assert sorted(rows) == sorted(odd.name for odd in LISTED)
    assert len(rows) == len(source)
    counted = Counter(odd.passed_over for odd in GOLDEN.ODDS if odd.passed_over != "nothing")
    assert find(golden).skipped == {kind: n for kind, n in counted.items() if kind}
    assert b"x.jpg/inside.png" in rows and b"x.jpg" not in rows
    assert [name for name in rows if name.endswith(b"once.png")] == [b"loop/once.png"]
    assert (golden / "hard-1.png").samefile(golden / "hard-2.png")
    assert {b"hard-1.png", b"hard-2.png"} <= set(rows)


def test_no_permission_is_a_reason_for_others_than_root(tmp_path, monkeypatch):
    """Run as another user where the tests run as root. From inside the folder: the way to it is closed to others."""
    data = GOLDEN.encoded(GOLDEN.SCENE, "PNG")
    for name in ("closed.png", "open.png"):
        GOLDEN.write(data, os.fsencode(tmp_path / name))
    (tmp_path / "closed.png").chmod(0)
    tmp_path.chmod(0o755)
    (tmp_path / "open.png").chmod(0o644)
    monkeypatch.chdir(tmp_path)
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)
    except PermissionError:
        pytest.skip("this root may not become another user")
    try:
        source = find(Path()).train
        results = [outcome(source, i) for i in range(len(source))]
    finally:
        os.seteuid(user)
    assert results[0] == (None, "cannot be read: permission denied")
    assert np.array_equal(results[1][0], GOLDEN.SCENE)


def test_the_script_prints_the_table(tmp_path, child):
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "odd"], env=child, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(GOLDEN.ODDS) + 2
    assert "WRONG" not in done.stdout


# ---------------------------------------------------------------- pretrain and probe


@pytest.fixture
def labelled(tmp_path, photos) -> Path:
    """About a hundred photos in three classes, all odd files in the first; together they fill batches of 8."""
    folder = tmp_path / "labelled"
    good = sorted(photos.rglob("*.jpg"))
    count = 96 + (-len(LISTED)) % 8
    for n in range(count):
        path = folder / good[n % 48].parent.name / f"photo-{n:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(good[n % 48], path)
    GOLDEN.make(folder / "amber")
    return folder


def named(path: Path) -> dict[str, str]:
    """Name → reason, each name once."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({entry["name"] for entry in entries}) == len(entries)
    return {entry["name"]: entry["reason"] for entry in entries}


def said(text: str) -> dict[str, str]:
    """Name → reason, from what a command printed; each name is said once."""
    found = re.findall(r"^skipped `(.*)`: (.*)\. [\d,]+ bad of [\d,]+ so far$", text, re.MULTILINE)
    assert len(dict(found)) == len(found)
    return dict(found)


def are_the_expected(reasons: dict[str, str]) -> None:
    below = {name.removeprefix("amber/"): reason for name, reason in reasons.items()}
    assert below.keys() >= BAD.keys()
    assert below.keys() <= BAD.keys() | MAYBE.keys()
    for name, reason in below.items():
        assert GOLDEN.met({**BAD, **MAYBE}[name], None, reason), (name, reason)


def test_pretrain_and_probe_leave_out_the_same_files(run_cli, labelled, tmp_path):
    images = len(find(labelled).train)
    done = run_cli("pretrain", "simclr", labelled, *SMALL, "--epochs", "1", "--max-bad", "0.5", "--json")
    assert done.code == 0, done.err
    met = named(tmp_path / "runs/simclr-1/bad_images.jsonl")
    are_the_expected(met)
    assert said(done.err) == met
    assert json.loads(done.out)["bad_images"] == len(met)
    facts = json.loads((tmp_path / "runs/simclr-1/data.json").read_text())
    assert facts["images"] == images
    assert facts["skipped"] == find(labelled).skipped
    assert sum(facts["skipped"].values()) == sum(odd.passed_over not in ("", "nothing") for odd in GOLDEN.ODDS)

    probed = run_cli("probe", *PROBE)
    assert probed.code == 0, probed.err
    assert said(probed.err) == met
    report = json.loads(probed.out)
    assert report["test_images"] + report["duplicates"]["removed"] == images - len(met)  # each by all others
    assert f"{len(met)} images could not be read and are left out" in report["warnings"]

    words = ("--max-bad", "0.1")
    for done in (
        run_cli("probe", *PROBE, *words),
        run_cli("pretrain", "simclr", labelled, *SMALL, "--epochs", "1", *words),
    ):
        assert done.code == 20, done.err
        assert done.out == ""
        error, hint = done.err.splitlines()[-2:]
        assert re.fullmatch(rf"error: \d+ of {images} images could not be read so far, above `--max-bad 0.1`", error)
        assert hint.startswith("hint: allow more")


def deleting(monkeypatch, after: int, paths: list[Path]) -> None:
    """Let the images `paths` vanish once `after` images have been read."""
    real, reads = Folder.read, []

    def read(self, i, side=None):
        reads.append(i)
        if len(reads) == after:
            for path in paths:
                path.unlink()
        return real(self, i, side)

    monkeypatch.setattr(Folder, "read", read)


def test_images_that_are_deleted_during_a_run(run_cli, photos, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    shutil.copytree(photos, folder)
    names = ["amber/03.jpg", "birch/15.jpg"]
    with monkeypatch.context() as during:
        # 48 are read for the estimate of time, 24 more to time the decoding, and some of the first epoch
        deleting(during, 90, [folder / name for name in names])
        known = ("--max-bad", "0.05", "--store", "off")  # stored, they would not be read again
        done = run_cli("pretrain", "simclr", folder, *SMALL, "--epochs", "3", *known, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["step"] == 18
    assert named(tmp_path / "runs/simclr-1/bad_images.jsonl") == dict.fromkeys(names, VANISHED)

    gone = ["amber/10.jpg", "cobalt/15.jpg"]
    with monkeypatch.context() as during:
        deleting(during, 1, [folder / name for name in gone])
        probed = run_cli("probe", *PROBE, "--max-bad", "0.05")
    assert probed.code == 0, probed.err
    assert said(probed.err) == dict.fromkeys(gone, VANISHED)
    report = json.loads(probed.out)
    assert report["test_images"] == 44


# ---------------------------------------------------------------- grey and colour in one set


def files(folder: Path, kinds: str) -> Folder:
    """One small image for each letter: g grey, c colour, b broken."""
    for n, kind in enumerate(kinds):
        pixels = GOLDEN.GREY if kind == "g" else GOLDEN.SCENE
        Image.fromarray(pixels).save(folder / f"{n:04}.png")
        if kind == "b":
            (folder / f"{n:04}.png").write_bytes(b"")
    return find(folder).train


@pytest.mark.parametrize(
    ("kinds", "share", "start"),
    [
        ("cccc", 0.0, ""),
        ("gggg", 1.0, ""),
        ("gccc", 0.25, "25 % of the images are grey files, the others in colour: that alone tells them apart"),
        ("cgbbg", 2 / 3, "67 % of the images"),
        ("bb", None, ""),
        ("g" + 199 * "c", 0.005, "under 1 % of the images"),
        ("c" + 199 * "g", 0.995, "over 99 % of the images"),
    ],
)
def test_grey_among_colour_is_one_line(tmp_path, kinds, share, start):
    source = files(tmp_path, kinds)
    assert grey_share(source) == share
    line = mixed(source)
    assert line.startswith(start) and bool(line) == bool(start)
    if line:
        assert line.endswith("that alone tells them apart")
        assert "\n" not in line


def test_grey_is_counted_over_evenly_spaced_headers(tmp_path, monkeypatch):
    source = files(tmp_path, 10 * "ggggc")
    asked = []
    real = Folder.grey
    monkeypatch.setattr(Folder, "grey", lambda self, i: asked.append(i) or real(self, i))
    monkeypatch.setattr(Folder, "read", None)  # headers alone
    assert grey_share(source, at_most=8) == np.mean([i % 5 != 4 for i in asked])
    assert asked == [0, 7, 14, 21, 28, 35, 42, 49]
    assert grey_share(subset(source, np.array([4, 9, 0, 14]))) == 0.25
    assert grey_share(subset(source, np.empty(0))) is None


def test_the_sample_set_is_in_colour():
    found = sample(40)
    assert grey_share(found.train) == 0
    assert mixed(found.train) == ""
    with pytest.raises(IndexError):
        found.train.grey(40)


def test_which_odd_files_are_grey(source, rows):
    """By the pictures themselves: a header may call grey only what is grey; and the wide ones are met."""
    grey = {name for name, i in rows.items() if outcome(source, i)[0] is not None and source.grey(i)}
    for name in grey:
        picture = source.read(rows[name])
        assert (picture == picture[:, :, :1]).all(), name
    wanted = "grey.jpg grey16.png grey16.tif grey16-lzw.tif float.tif int32.tif bits.png grey-alpha.png signed.tif"
    assert {os.fsencode(name) for name in wanted.split()} <= grey
    assert not {b"palette.png", b"alpha.png", b"cmyk.jpg", b"rgb16.tif"} & grey
