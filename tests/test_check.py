"""`sslpre check`: every odd file told, copies found, what would stop a run said, and nothing left behind."""

import dataclasses
import hashlib
import json
import os
import runpy
import shutil
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sslpre.bench import stages as timed
from sslpre.check import files as looking
from sslpre.check import machine as machines
from sslpre.check import pair as pairs
from sslpre.check import report as reports
from sslpre.check.choice import Choice
from sslpre.check.copies import alike_groups, copies, like_pairs
from sslpre.check.files import Files, in_threads, spread, survey
from sslpre.check.findings import STOPS, Finding, Typed, about_images, bad, deep, mixed, small
from sslpre.check.pair import FITS, MISFIT, UNKNOWN, Pair, judged, remedy
from sslpre.check.table import table
from sslpre.data import BadImage
from sslpre.data.find import find, printable
from sslpre.data.header import Header, header
from sslpre.data.stream import BadList
from sslpre.errors import SslpreError
from sslpre.ops.duplicates import BITS
from sslpre.train.run import Options, planned

GOLDEN = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("golden.py"))))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timed, "STEPS_SECONDS", 0.05)
        yield


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden") / "odd"
    GOLDEN.make(folder)
    return folder


@pytest.fixture(scope="module")
def odd(golden, quick):
    """The report of the folder of odd images, from the folder above it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden.parent)
        return reports.check(Options("simclr", Path("odd"), device="cpu", workers=2), Typed("simclr", "odd"))


def kinds(report):
    return {one["kind"]: one for one in report.json()["findings"]}


def listed():
    """Names and rows of golden.py that find lists, but for those that depend on how Pillow was built."""
    return {f"odd/{printable(one.name)}": one for one in GOLDEN.ODDS if not one.passed_over and not one.else_reason}


def test_every_odd_file_is_told(odd, golden):
    told = kinds(odd)
    rows, reasons = listed(), dict(zip(told["bad images"]["images"], told["bad images"]["reasons"], strict=True))
    assert {name for name in reasons if name in rows} == {name for name, one in rows.items() if one.reason}
    for name, reason in reasons.items():
        assert name not in rows or reason.startswith(rows[name].reason)
    assert not {"odd/float-nan.tif"} & set(told["grey and colour"]["images"] + told["deep"]["images"]), "it is bad"
    turned = {f"odd/exif-{n}.jpg" for n in range(2, 9)} | {"odd/exif-late.png"}
    assert set(told["turned"]["images"]) == turned
    assert set(told["narrow"]["images"]) == {"odd/1x5000.png", "odd/5000x1.jpg"}
    assert {name for name in rows if "16" in name} <= set(told["deep"]["images"])
    equal = defaultdict(set)
    for name in rows:
        path = golden.parent / name
        if path.is_file() and path.stat().st_size:
            equal[hashlib.sha256(path.read_bytes()).digest()].add(name)
    plain = {name for name in rows if "\\" not in name}  # the others cannot be opened by what is printed
    groups = [set(group) & plain for group in told["copies"]["groups"]]
    assert [group for group in groups if len(group) > 1] == [
        group & plain for group in equal.values() if len(group & plain) > 1
    ]
    assert odd.json()["images"]["left_alone"] == dict(
        Counter(one.passed_over for one in GOLDEN.ODDS if one.passed_over not in ("", "nothing"))
    )


def test_what_a_run_would_end_with_is_exit_4(odd):
    assert odd.code == 4 and not odd.json()["ready"]
    (stop,) = [one for one in odd.findings if one.level == STOPS]
    share = float(stop.type[0].rpartition(" ")[2])
    count = len(odd.files.bad)
    assert int(share * len(odd.found.train)) == count, "the share that is named is just enough"
    assert f"{count} of {len(odd.found.train)} images" in stop.text


@pytest.mark.parametrize(("codes", "code"), [((), 0), ((3,), 3), ((3, 4), 4), ((4, 3), 4), ((4, 5), 4), ((2, 3), 3)])
def test_the_images_exit_code_goes_before_the_machines(odd, codes, code):
    stops = [Finding("x", STOPS, "x", code=one) for one in codes]
    assert replace(odd, findings=[*stops, Finding("y", "advice", "y")]).code == code


def test_a_table_of_80_columns_in_which_no_name_speaks_to_the_terminal(odd):
    lines = table(odd).splitlines()
    assert max(len(line) for line in lines if not line.startswith(("  >", "  sslpre"))) <= 80
    assert all(line.isprintable() for line in lines)
    assert lines[-1].startswith("  sslpre pretrain simclr odd --max-bad 0.")
    assert f"not ready: {len(odd.files.bad)} of {len(odd.found.train)} images to train on are bad" in table(odd)
    assert any(line.endswith("--json names all") for line in lines)


def test_the_run_is_the_one_that_pretrain_would_be(odd, golden, monkeypatch):
    monkeypatch.chdir(golden.parent)
    _, found, _, recipe = planned(Options("simclr", Path("odd"), device="cpu"), CPU)
    run = odd.run
    assert (run.backbone, run.image_size) == (recipe.encoder.backbone, recipe.encoder.image_size)
    assert (run.batch_size, run.epochs) == (recipe.train.batch_size, recipe.train.epochs)
    assert (run.lr, run.precision, run.store_size) == (recipe.optim.lr, recipe.train.precision, recipe.data.store_size)
    assert run.steps == recipe.train.epochs * (len(found.train) // recipe.train.batch_size)
    assert set(run.automatic) >= {"encoder.backbone", "train.batch_size", "optim.lr"}
    images = run.epochs * len(found.train)
    fastest = images / max(run.first_images_per_s, run.later_images_per_s)
    assert fastest * 0.999 <= run.lasts <= 1.001 * images / min(run.first_images_per_s, run.later_images_per_s)


def test_headers_are_those_of_the_pictures(golden):
    bits = {"bits.png": 1, "int32.tif": 32, "float.tif": 32, "alpha.png": 8, "grey.jpg": 8, "signed.tif": 8}
    for one in GOLDEN.ODDS:
        if one.picture is None or one.else_reason:
            continue
        told = header(os.fsencode(golden) + b"/" + one.name)
        assert (told.height, told.width) == one.picture.shape[:2]
        wanted = 16 if b"16" in one.name else bits.get(os.fsdecode(one.name))
        assert wanted is None or told.bits == wanted, one.name
        assert told.clear is (b"alpha" in one.name or one.name.startswith((b"palette-clear", b"palette-half")))
    for n in range(1, 9):
        assert header(golden / f"exif-{n}.jpg").turn == n
    assert header(golden / "webp.gif").kind == "WEBP"
    with pytest.raises(BadImage, match="megapixels"):
        header(golden / "bomb.tif")


def test_check_on_plain_photos(run_cli, photos, quick, tmp_path, monkeypatch):
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    done = run_cli("check", photos, "--device", "cpu", "--recipe", "rotation", "--json")
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert told["ready"] and told["code"] == 0
    assert told["verdict"].endswith(f": sslpre pretrain rotation {photos} --device cpu")
    assert told["images"]["classes"] == {"amber": 16, "birch": 16, "cobalt": 16}
    assert told["images"]["sizes"] == 1 and told["images"]["largest"] == [40, 40]
    assert (told["images"]["headers"], told["images"]["decoded"], told["images"]["compared"]) == (48, 48, 48)
    assert told["machine"]["kind"] == "cpu" and told["machine"]["pair"]["verdict"] != MISFIT
    assert [one["kind"] for one in told["findings"] if one["level"] == STOPS] == []
    few = next(one for one in told["findings"] if one["kind"] == "few images")
    assert few["type"][0] == f"sslpre pretrain simclr {photos} --device cpu --init pretrained --backbone resnet18"
    assert sorted(tmp_path.rglob("*")) == [place], "nothing is left, not even runs/"


@pytest.fixture
def unmeasured(monkeypatch):
    """Checks without the measured run."""

    def refuse(*arguments):
        raise AssertionError("measured")

    monkeypatch.setattr(reports, "choice", refuse)


def test_an_empty_folder(run_cli, unmeasured, tmp_path):
    (tmp_path / "none").mkdir()
    done = run_cli("check", "none", "--json", "--device", "cpu")
    told = json.loads(done.out)
    assert (done.code, told["code"], told["images"], told["run"]) == (4, 4, None, None)
    assert told["findings"][0]["text"].startswith("the folder `none` is empty")
    assert told["machine"]["cores"] >= 1
    done = run_cli("check", "none", "--device", "cpu")
    assert done.code == 4
    assert "not ready: the folder `none` is empty: sslpre reads bmp," in done.out


def test_too_few_images(run_cli, unmeasured, tmp_path, photos):
    (tmp_path / "few").mkdir()
    for path in sorted(photos.rglob("*.jpg"))[:3]:
        shutil.copy(path, tmp_path / "few" / path.name)
    done = run_cli("check", "few", "--device", "cpu", "--json")
    told = json.loads(done.out)
    assert done.code == 4 == told["code"]
    assert told["findings"][0]["text"].startswith("`3` images are too few to train on")
    assert told["images"]["decoded"] == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(run_cli, unmeasured, photos, monkeypatch, tmp_path):
    done = run_cli("check", photos, "--device", "cuda", "--json")
    assert done.code == 3
    stop = json.loads(done.out)["findings"][0]
    assert (stop["level"], stop["code"]) == (STOPS, 3)
    assert stop["text"].startswith("no `cuda` device on this machine")
    driver = tmp_path / "version"
    driver.write_text("NVRM")
    monkeypatch.setattr(machines, "DRIVER", driver)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SslpreError, match="it was built without CUDA") as refused:
        machines.needed("cuda")
    assert refused.value.code == 3
    assert machines.machine(CPU).idle


def test_a_place_where_no_run_can_be_made(run_cli, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "choice", lambda *arguments: chosen())
    (tmp_path / "runs").write_text("a file")
    done = run_cli("check", photos, "--device", "cpu", "--json")
    stop = json.loads(done.out)["findings"][0]
    assert (done.code, stop["kind"], stop["code"]) == (3, "runs", 3)
    (tmp_path / "runs").unlink()
    monkeypatch.setattr(reports, "choice", lambda *arguments: chosen(disk=1 << 60))
    done = run_cli("check", photos, "--device", "cpu", "--json")
    stop = json.loads(done.out)["findings"][0]
    assert (done.code, stop["kind"], stop["code"]) == (3, "disk", 3)


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        ("check", 2, "IMAGES is missing"),
        ("check simclr", 2, "`simclr` is a recipe, and IMAGES a folder"),
        ("check nowhere", 4, "there is no folder `nowhere`"),
        ("check . --recipe simclrr", 2, "no recipe `simclrr`"),
        ("check . --recipe .", 2, "`--recipe .` is a folder"),
    ],
)
def test_what_cannot_be_read(run_cli, words, code, error, tmp_path):
    done = run_cli(*words.split())
    assert (done.code, done.out, done.err.splitlines()[0]) == (code, "", f"error: {error}")
    assert list(tmp_path.iterdir()) == []


def chosen(**changed):
    plain = dict.fromkeys(Choice.__dataclass_fields__, 1)
    words = ("backbone", "optimiser", "precision", "views", "store", "store_line")
    return Choice(**{**plain, **dict.fromkeys(words, "x"), "automatic": (), "init": "", "shorter": "", **changed})


@pytest.fixture
def split(tmp_path):
    """24 photos to train on and 8 to test with, in two classes; what test_copies says was done to some of them."""
    root, rng = tmp_path / "split", np.random.default_rng(5)
    for part, count in (("train", 12), ("test", 4)):
        for name in ("amber", "birch"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                side = int(rng.integers(60, 90))
                patches = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
                patches.resize((side, side)).save(root / part / name / f"{i}.png")
    return root


def test_copies(split):
    train, test = split / "train", split / "test"
    shutil.copy(train / "amber" / "0.png", test / "amber" / "0.png")  # the first image to test with
    shutil.copy(train / "amber" / "1.png", train / "birch" / "torn.png")
    with Image.open(train / "birch" / "2.png") as image:
        image.save(test / "birch" / "again.jpg", quality=95)
        image.resize((120, 120)).save(train / "birch" / "larger.png")
    files = survey(find(split), 2)
    twice = copies(files)

    def below(groups):
        return [{str(Path(files.name(n)).relative_to(split)) for n in group} for group in groups]

    assert below(twice.equal) == [
        {"train/amber/0.png", "test/amber/0.png"},
        {"train/amber/1.png", "train/birch/torn.png"},
    ]
    assert below(twice.torn) == [{"train/amber/1.png", "train/birch/torn.png"}]
    assert below(twice.leaked) == [{"train/amber/0.png", "test/amber/0.png"}]
    assert below(twice.alike) == [{"train/birch/2.png", "train/birch/larger.png", "test/birch/again.jpg"}]
    (pair,) = twice.like_leaked
    assert pair[0] >= files.train > pair[1]
    assert below([pair])[0] & {"test/birch/again.jpg"}
    told = {one.kind: one for one in about_images(files, twice, Typed("simclr", "split"), 0.01, None)}
    assert told["leaked"].text.startswith("1 of 9 test images also lie in training")
    assert told["several labels"].groups == [[files.name(n) for n in twice.torn[0]]]


def test_long_files_are_equal_only_if_all_of_them_is(tmp_path, monkeypatch):
    monkeypatch.setattr(looking, "ENDS", 64)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for name in "abc":
        if name == "c":
            pixels[20, 20] ^= 1  # in the middle of the file
        Image.fromarray(pixels).save(tmp_path / f"{name}.bmp")
    twice = copies(survey(find(tmp_path), 2))
    assert twice.equal == [[0, 1]]
    assert twice.alike == [[0, 2]], "of equal files the first stands for both"


some_hashes = st.lists(st.tuples(st.integers(0, 7), st.sets(st.integers(0, 63), max_size=3)), max_size=25)


@given(some_hashes, st.integers(0, 25), st.data())
def test_groups_and_leaks_are_those_of_all_pairs(drawn, train, data):
    centres = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=8, max_size=8))
    hashes = [centres[which] ^ sum(1 << bit for bit in bits) for which, bits in drawn]
    train = min(train, len(hashes))
    sources = [range(train), range(len(hashes) - train)]
    files = Files(sources, hashes=dict(enumerate(hashes)), shown=set(range(len(hashes))))

    def close(i, j):
        return (hashes[i] ^ hashes[j]).bit_count() <= BITS

    over = list(range(len(hashes)))
    for i in range(len(hashes)):
        for j in range(i):
            if close(i, j):
                over = [over[i] if one == over[j] else one for one in over]
    groups = [[i for i, one in enumerate(over) if one == root] for root in dict.fromkeys(over)]
    assert alike_groups(files, {}) == [group for group in groups if len(group) > 1]
    found = like_pairs(files)
    assert [i for i, _ in found] == [i for i in range(train, len(hashes)) if any(close(i, j) for j in range(train))]
    assert all(close(i, j) and j < train for i, j in found)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_every_beginning_is_spread_evenly(count, taken):
    order, taken = spread(count), min(count, taken)
    assert sorted(order.tolist()) == list(range(count))
    at = np.sort(order[:taken])
    gaps = np.diff(np.concatenate([[-1], at, [count]]))
    assert gaps.max() <= 3 * count / taken + 1


def test_all_are_looked_at_or_as_many_as_time_allows():
    seen: list[int] = []
    assert sorted(in_threads(np.arange(1000), seen.extend, 3, 60.0)) == sorted(seen) == list(range(1000))
    seen.clear()
    assert len(in_threads(np.arange(1000), seen.extend, 3, 60.0, most=100)) == 100 == len(set(seen))
    assert len(in_threads(np.arange(1000), lambda rows: None, 3, -1.0)) == looking.PART
    assert in_threads(np.arange(0), seen.extend, 3, 60.0) == []
    with pytest.raises(ZeroDivisionError):
        in_threads(np.arange(1000), lambda rows: 1 / 0, 3, 60.0)


def test_a_sample_says_that_it_is_one(photos, monkeypatch, tmp_path):
    monkeypatch.setattr(looking, "HEADERS", -1.0)
    monkeypatch.setattr(looking, "DECODING", -1.0)
    monkeypatch.setattr(reports, "choice", lambda *arguments: chosen())
    monkeypatch.chdir(tmp_path)
    report = reports.check(Options("simclr", photos, device="cpu", workers=2), Typed("simclr", str(photos)))
    told = report.json()["images"]
    assert (told["headers"], told["decoded"], sum(told["kinds"].values())) == (16, 16, 16)
    text = table(report)
    assert "of 16 of 48, evenly spread: what follows is of these" in text
    assert "16 of 48, evenly spread; 0 bad" in text


class Numbered:
    """A source of so many images called by their numbers."""

    where, classes = "photos", ()

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def name(self, i):
        return f"{i}.png"


def stub(heads, test=0, decoded=None, found_bad=()):
    """Files of which only the headers matter."""
    sources = [Numbered(len(heads)), *([Numbered(test)] if test else [])]
    files = Files(sources, headers=dict(enumerate(heads)))
    files.decoded = list(range(len(heads))) if decoded is None else decoded
    files.bad = dict.fromkeys(found_bad, "truncated")
    return files


def head(width=100, height=100, grey=False, bits=8):
    return Header("PNG", "L" if grey else "RGB", bits, height, width, 1, grey, False)


@given(st.integers(1, 400), st.floats(0, 1), st.data())
def test_bad_images_stop_a_check_where_they_stop_a_run(images, limit, data):
    broken = data.draw(st.integers(0, min(images, 20)))
    files = stub([head()] * images, found_bad=range(broken))
    stops = [one for one in bad(files, Typed("simclr", "photos"), limit) if one.level == STOPS]
    listed, raised = BadList(None, limit, images, say=lambda line: None), False
    for i in range(broken):
        try:
            listed.add(files.sources[0], i, "truncated")
        except SslpreError:
            raised = True
    assert bool(stops) is raised
    if stops:
        share = float(stops[0].type[0].rpartition(" ")[2])
        assert not [one for one in bad(files, Typed("simclr", "photos"), share) if one.level == STOPS]


def test_bad_images_of_a_sample_count_for_those_not_seen():
    typed = Typed("simclr", "photos")
    few = stub([head()] * 1000, decoded=list(range(100)), found_bad=range(8))
    (stop,) = bad(few, typed, 0.01)
    assert stop.level == STOPS and "about 8 % of 1,000" in stop.text and "(8 of 100 tried)" in stop.text
    (fine,) = bad(few, typed, 0.05)  # 8 of 100 may be luck, where 5 are allowed
    assert fine.level == "advice"
    (luck,) = bad(stub([head()] * 1000, decoded=list(range(16)), found_bad=[3]), typed, 0.01)
    assert luck.level == "advice" and "of the 16 tried" in luck.text
    spread = stub([head()] * 100_000, decoded=list(range(0, 100_000, 100)), found_bad=range(0, 100_000, 200))
    some = dataclasses.replace(spread, bad={n + (n % 20_000 != 0): why for n, why in spread.bad.items()})
    (told,) = bad(some, typed, 0.01)  # 0.5 % of all by their headers, and of those that were decoded
    assert told.level == "advice" and "0.5 % of the 1,000 tried" in told.text
    (tests_only,) = bad(stub([head()] * 10, test=5, found_bad=[12]), typed, 0.01)
    assert tests_only.level == "advice", "a run reads no test image"


def test_grey_among_colour():
    typed = Typed("simclr", "my photos")
    (told,) = mixed(stub([head(grey=i < 3) for i in range(10)]), typed, chosen(coloured=False))
    assert told.images == ["photos/0.png", "photos/1.png", "photos/2.png"]
    assert told.type == ("sslpre pretrain simclr 'my photos' --set views.0.gray=1",)
    (told,) = mixed(stub([head(grey=i > 0) for i in range(10)]), typed, chosen(coloured=False, tables=2))
    assert told.images == ["photos/0.png"] and "1 of 10 images are coloured" in told.text
    assert told.type[0].endswith("--set views.0.gray=1 --set views.1.gray=1")
    (told,) = mixed(stub([head(grey=i > 0) for i in range(10)]), typed, chosen(coloured=True))
    assert told.type == (), "a task that asks for colours"
    assert mixed(stub([head(grey=True)] * 4), typed, None) == [] == mixed(stub([head()] * 4), typed, None)


def test_most_of_those_that_were_decoded_are_dark():
    files = stub([head(bits=16)] * 100, decoded=list(range(20)))
    (told,) = deep(dataclasses.replace(files, peaks=dict.fromkeys(range(20), 15)))
    assert (told.kind, len(told.images)) == ("dark", 20) and "20 of 20 images" in told.text


def test_what_to_type_is_the_run_that_was_measured():
    assert Typed("simclr", "-p", "cpu", 2).pretrain() == "sslpre pretrain simclr ./-p --device cpu --workers 2"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError("none is left")])
def test_what_was_found_is_told_though_no_step_could_be_measured(error, photos, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(reports, "choice", fail)
    report = reports.check(Options("simclr", photos, device="cpu", workers=2), Typed("simclr", str(photos)))
    assert report.code == 3 and report.files is not None
    assert any("could not be measured" in one.text for one in report.stops)


def test_images_smaller_than_a_view():
    typed, choice = Typed("simclr", "photos"), chosen(largest_view=96)
    (told,) = small(stub([head(70, 300)] * 5 + [head(200, 200)] * 5), typed, choice)
    assert len(told.images) == 5 and told.type == ("sslpre pretrain simclr photos --image-size 64",)
    (told,) = small(stub([head(9, 9)] + [head(200, 200)] * 50), typed, choice)
    assert (told.level, told.type) == ("note", ())
    assert small(stub([head(90, 90)] * 5), typed, choice) == [], "the size is chosen within a tenth"


def test_blank_and_even_images(tmp_path):
    even = np.full((40, 40, 3), 90, np.uint8)
    even[10:30, 10:30] += 3
    for i, pixels in enumerate([np.full((40, 40, 3), 90, np.uint8), even, np.zeros((9, 70, 3), np.uint8)]):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    files = survey(find(tmp_path), 1)
    told = {one.kind: one for one in about_images(files, copies(files), Typed("simclr", "x"), 0.01, None)}
    assert [Path(name).name for name in told["blank"].images] == ["0.png", "2.png"]
    assert [Path(name).name for name in told["even"].images] == ["1.png"]
    assert "near copies" not in told


def test_twelve_bits_in_sixteen_come_out_dark(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4096, (4, 30, 30)).astype(np.uint16)
    for i, one in enumerate(pixels):
        Image.fromarray(one).save(tmp_path / f"{i}.png")
    files = survey(find(tmp_path), 1)
    told = {one.kind: one for one in about_images(files, copies(files), Typed("simclr", "x"), 0.01, None)}
    assert len(told["dark"].images) == 4 and "deep" not in told
    for i, one in enumerate(pixels):
        Image.fromarray(one * 16).save(tmp_path / f"{i}.png")
    files = survey(find(tmp_path), 1)
    told = {one.kind for one in about_images(files, copies(files), Typed("simclr", "x"), 0.01, None)}
    assert "deep" in told and "dark" not in told


@pytest.mark.parametrize(
    ("torch_", "torchvision", "needs", "verdict"),
    [
        ("2.13.0+cpu", "0.28.0", "==2.13.0", FITS),
        ("2.14.1", "0.28.0", "==2.13.0", MISFIT),
        ("2.15.0", "0.29.2", ">=2.14.0", FITS),
        ("2.13.1", "0.29.1+cu130", ">=2.14.0", MISFIT),
        ("2.11.0", "0.26.0", "", FITS),
        ("2.11.0", "0.27.0", "", MISFIT),
        ("2.13.0", "0.27.1", "", MISFIT),
        ("2.0.1", "0.15.2", "", FITS),
        ("2.16.0", "0.31.0", "", UNKNOWN),
        ("2.13.0", "0.28.0", "~=2.13", FITS),  # not understood: by the table
        ("2.16.0a0+git", "0.31.0", ">=2.15,<2.17", FITS),
        ("3.0.0", "1.0", "", UNKNOWN),
    ],
)
def test_pairs(torch_, torchvision, needs, verdict):
    assert judged(torch_, torchvision, needs) == verdict


@pytest.mark.parametrize(
    ("written", "needs"),
    [
        (["numpy", "torch (>=2.14.0)", "pillow"], ">=2.14.0"),
        (["torch==2.13.0"], "==2.13.0"),
        (["torch (==2.13.0) ; python_version>'3'"], "==2.13.0"),
        (["torchdata>=1", "gdown ; extra == 'gdown'"], ""),
        (None, ""),
    ],
)
def test_what_torchvision_says_that_it_needs(monkeypatch, written, needs):
    monkeypatch.setattr(pairs, "version", {"torch": "2.13.0", "torchvision": "0.28.0"}.__getitem__)
    monkeypatch.setattr(pairs, "requires", lambda name: written)
    found = pairs.pair()
    assert (found.needs, found.verdict) == (needs, MISFIT if ">" in needs else FITS)


def test_a_pair_that_does_not_work(run_cli, monkeypatch, photos):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(pairs, "requires", lambda name: ["torch==2.13.0"])
    monkeypatch.setattr(pairs, "version", {"torch": "2.14.1", "torchvision": "0.28.0"}.__getitem__)
    done = run_cli("check", photos)
    assert (done.code, done.out) == (3, "")
    error, hint = done.err.splitlines()
    assert error.startswith("error: torch 2.14.1 and torchvision 0.28.0 do not work together: ")
    assert hint == "hint: pip install 'torchvision==0.29.*'"
    assert remedy(Pair("2.99.0", "0.28.0", MISFIT)) == "pip install --upgrade torch torchvision"

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(pairs, "version", absent)
    assert pairs.pair() == Pair("", "", MISFIT)
