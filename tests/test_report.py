"""The page about a run: what it says is what the log and the features say, and nothing in a name becomes markup."""

import base64
import hashlib
import json
import math
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sslpre import report as room
from sslpre.cli import run as run_words
from sslpre.data.find import find
from sslpre.encoder import build
from sslpre.report import curves, gallery, history, markup, sprite
from sslpre.report.history import Curve, History
from sslpre.report.live import Live
from sslpre.report.page import Content

CPU = torch.device("cpu")
SMALL = "--backbone test_resnet --image-size 32 --batch-size 16 --epochs 4 --precision fp32 --device cpu --workers 1"
NASTY = {
    "00.jpg": "<img src=x onerror=alert(1)>.jpg",
    "01.jpg": "\"quotes' and `ticks`&amp;.jpg",
    "02.jpg": "new\nline.jpg",
    "03.jpg": "gnp\u202egpj.jpg",
    "04.jpg": "<script>alert(2)<!--.jpg",
}


@pytest.fixture(scope="module")
def images(photos, tmp_path_factory):
    """The photos, some with names that want to be markup, two equal and one nearly so."""
    root = tmp_path_factory.mktemp("nasty") / "images"
    shutil.copytree(photos, root)
    (root / "amber").rename(root / "a<b>&\"'")
    for old, new in NASTY.items():
        (root / "a<b>&\"'" / old).rename(root / "a<b>&\"'" / new)
    shutil.copy(root / "birch/07.jpg", root / "birch/again.jpg")
    return root


def trained_by(images, out, monkeypatch, share):
    from sslpre.report import live

    monkeypatch.setattr(live, "SHARE", share)
    monkeypatch.setattr(live, "CURVES", 0.0)
    monkeypatch.setattr(live, "IMAGES", -1.0)
    assert run_words(["pretrain", "rotation", str(images), *SMALL.split(), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """Two runs alike, of which the second had its page rewritten whenever a line was logged."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        return [trained_by(images, place / name, patch, share) for name, share in (("plain", 0.0), ("looked", 1e9))]


@pytest.fixture(scope="module")
def written(runs):
    """The page that `sslpre report` writes of the first run."""
    assert run_words(["report", str(runs[0]), "--workers", "1", "--device", "cpu"]) == 0
    return runs[0] / "report.html"


class Tags(HTMLParser):
    """Every element with its attributes, and the text of those named."""

    def __init__(self, page):
        super().__init__()
        self.found, self.texts, self.inside = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, data):
        self.texts.append((self.inside, data))

    def handle_endtag(self, tag):
        self.inside = None


def test_the_page_is_one_file_that_asks_for_nothing(written):
    page = written.read_text(encoding="utf-8")
    assert len(page) < 5_000_000
    tags = Tags(page)
    kinds = {tag for tag, _ in tags.found}
    assert not kinds & {"link", "iframe", "object", "embed", "base", "form", "audio", "video"}
    for _, attributes in tags.found:
        assert not [key for key in attributes if key.startswith("on")]
        assert attributes.get("src", "data:").startswith("data:") and attributes.get("href", "#").startswith("#")
    assert set(re.findall(r"url\((.{5})", page)) <= {"data:", "#p"} | {
        f"#{c}" for c in re.findall(r"url\(#(.{4})", page)
    }
    assert not re.search(r"https?:", page)
    scripts = [text for tag, text in tags.texts if tag == "script"]
    assert len(scripts) == 2 and sum(tag == "script" for tag, _ in tags.found) == 2
    (policy,) = [attributes["content"] for tag, attributes in tags.found if "http-equiv" in attributes]
    digest = base64.b64encode(hashlib.sha256(scripts[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"script-src 'sha256-{digest}'" in policy


def test_the_script_is_small():
    assert (Path(room.__file__).parent / "script.js").stat().st_size < 15_000


def test_names_are_shown_and_are_no_markup(written):
    page = written.read_text(encoding="utf-8")
    tags = Tags(page)
    (data,) = [text for tag, text in tags.texts if tag == "script" and text.startswith('{"names"')]
    names = json.loads(data)["names"]
    shown = {name.partition("/")[2] for name in names}
    assert "<img src=x onerror=alert(1)>.jpg" in shown and "<script>alert(2)<!--.jpg" in shown
    assert "new\\nline.jpg" in shown and "gnp\\u202egpj.jpg" in shown and "\u202e" not in page
    titles = {text for tag, text in tags.texts if tag == "title"}
    assert set(names) <= titles
    assert not [tag for tag, attributes in tags.found if attributes.get("src") == "x"]


def test_what_is_seen_first_is_the_verdict_and_what_to_do(written, runs):
    page = written.read_text(encoding="utf-8")
    head = page[page.index("<body>") : page.index("<section")]
    words = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    verdict = [line["health"]["verdict"] for line in words if "verdict" in line.get("health", {})][-1]
    assert f"<p>{verdict.capitalize()}</p>" in head and "What to do next" in head
    assert "Step 12 of 12, finished" in head
    assert f"sslpre pretrain {runs[0]}/recipe.toml" in page


def test_every_part_is_there(written):
    page = written.read_text(encoding="utf-8")
    for anchor in "curves preview images neighbours clusters alone probe time recipe".split():
        assert page.count(f'<section id="{anchor}">') == 1
    assert page.count("<svg class=plot") >= 8 and "0°" in page
    assert "equal to the pixel: birch/07.jpg, birch/again.jpg" in page
    assert "PCA: the first two directions" in page or "UMAP" in page
    assert "random weights" in page and "chance" in page and f"sslpre probe {written.parent}<" in page
    recipe = (written.parent / "recipe.toml").read_text()
    assert all(markup.text(line) in page for line in recipe.splitlines())


def test_a_run_is_the_same_to_the_bit_whether_it_is_looked_at_or_not(runs):
    plain, looked = (load_file(max(run.glob("checkpoints/step-*")) / "model.safetensors") for run in runs)
    assert plain.keys() == looked.keys() and all(torch.equal(plain[name], looked[name]) for name in plain)
    logs = [(run / "metrics.jsonl").read_text().splitlines() for run in runs]
    losses = [[json.loads(line).get("loss") for line in log] for log in logs]
    assert losses[0] == losses[1]
    page = (runs[1] / "report.html").read_text(encoding="utf-8")
    assert "Step 12 of 12, finished" in page and page.count("<path class=") > 40 and "view 1" not in page


def test_the_probe_is_kept_while_the_weights_are_the_same(written, monkeypatch, run_cli):
    kept = json.loads((written.parent / "probe.json").read_text())
    assert {row["weights"] for row in kept["rows"]} == {"encoder", "random weights", "raw pixels"}
    assert {row["features"] for row in kept["rows"] if row["weights"] == "encoder"} == {"output"}

    def never(*words, **more):
        raise AssertionError("measured again")

    monkeypatch.setattr(room, "probe", never)
    assert room.kept_probe(written.parent) == kept
    done = run_cli("report", written.parent, "--workers", "1", "--device", "cpu")
    assert done.code == 0 and done.out == f"{written}\n"
    assert f"{100 * kept['rows'][0]['linear']['accuracy']:.1f}" in written.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [1]},
        {"rows": [{"weights": "x"}]},
        {"chance": "much"},
        {"step": True},
        {"warnings": [[]]},
        {"warnings": 1},
    ],
)
def test_a_probe_that_is_not_what_was_written_is_measured_again(tmp_path, change):
    row = {"weights": "encoder", "features": "output", "dim": 3, "knn": {"accuracy": 0.5, "low": 0.4, "high": 0.6}}
    whole = {
        "step": 1,
        "data_fingerprint": "a",
        "rows": [row],
        "chance": 0.1,
        "verdict": "",
        "classes": [],
        "split": "",
    }
    whole |= {"train_images": 3, "test_images": 3, "warnings": []}
    (tmp_path / "probe.json").write_text(json.dumps(whole))
    assert room.kept_probe(tmp_path) == whole
    (tmp_path / "probe.json").write_text(json.dumps(whole | change))
    assert room.kept_probe(tmp_path) == {}


def test_a_run_whose_images_are_gone(runs, tmp_path, run_cli):
    shutil.copytree(runs[0], tmp_path / "run")
    recipe = tmp_path / "run/recipe.toml"
    recipe.write_text(re.sub(r'^images = ".*"', 'images = "/nowhere/at all"', recipe.read_text(), flags=re.M))
    (tmp_path / "run/probe.json").unlink(missing_ok=True)
    done = run_cli("report", "run")
    assert done.code == 0 and "no images, preview, probe" in done.err
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert page.count("Not made: ") == 3 and "/nowhere/at all" in page and "<svg class=plot" in page


def test_a_run_without_a_whole_checkpoint_and_without_health(runs, tmp_path, run_cli):
    shutil.copytree(runs[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    old = [{key: value for key, value in line.items() if key not in ("health", "chance")} for line in lines[:1]]
    old[0]["step"] = 5
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old) + '{"step": 9')
    assert run_cli("report", "run").code == 0
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "Health not recorded" in page and "not finished, and not running" in page
    assert "sslpre pretrain --resume run" in page and "no complete checkpoint" in page


def test_errors(runs, tmp_path, run_cli, monkeypatch):
    assert run_cli("report").code == 2
    (tmp_path / "run").mkdir()
    shutil.copy(runs[0] / "recipe.toml", tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run_cli("report", "run")
    assert done.code == 3 and "hint: pip install 'sslpre[report]'" in done.err


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=30),
            st.dictionaries(
                st.sampled_from(["step", "epoch", "loss", "chance", "health", "images_per_s", "waiting", "a\ud800b"]),
                st.recursive(
                    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
                    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                    max_leaves=4,
                ),
            ).map(json.dumps),
        ),
        max_size=8,
    )
)
def test_any_log_is_read(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    found = history.read(path, 16)
    for curve in (*found.curves.values(), found.chance):
        assert len(curve.steps) == len(curve.values) and all(map(math.isfinite, curve.values))
    assert math.isfinite(found.seconds) and 0 <= found.waited <= found.seconds


def test_the_time_is_that_of_the_lines(tmp_path):
    lines = [
        {"step": 10, "loss": 2.0, "images_per_s": 80, "waiting": 0.5},
        {"step": 11, "nmi": 0.3, "sizes": [1, 2]},
        {"step": 30, "loss": 1.0, "images_per_s": 160, "waiting": 0.25, "chance": 3.0},
        {"step": 30, "epoch": 1, "health": {"knn": 0.5, "dim": 7}},
    ]
    (tmp_path / "log").write_text("\n".join(map(json.dumps, lines)))
    found = history.read(tmp_path / "log", 8)
    assert (found.seconds, found.waited, found.images) == (1.0 + 1.0, 0.5 + 0.25, 240)
    assert found.curves["loss"] == Curve([10, 30], [2.0, 1.0]) and found.chance == Curve([30], [3.0])
    assert found.curves["health.knn"].values == [0.5] and "health.dim" not in found.curves and found.verdict == ""


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=2000))
@settings(max_examples=30, deadline=None)
def test_a_long_curve_keeps_its_mean(values):
    steps, thin = curves.thinned(Curve(list(range(len(values))), values))
    assert len(steps) == len(thin) <= curves.POINTS and steps == sorted(steps)
    if len(values) % curves.POINTS == 0 or len(values) <= curves.POINTS:
        assert np.mean(thin) == pytest.approx(np.mean(values), abs=1e-6)
    assert min(values) - 1e-6 <= min(thin) and max(thin) <= max(values) + 1e-6


def test_neighbours_outliers_and_clusters_are_those_of_a_slow_loop():
    x = torch.randn(60, 16)
    x[:30] += 6 * torch.eye(16)[0]
    x[30:] += 6 * torch.eye(16)[1]
    x[7] = -20 * torch.eye(16)[2]
    seen = gallery.look(x, spread=False)
    unit = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    fifth = []
    for i in range(60):
        order = sorted((j for j in range(60) if j != i), key=lambda j: -(unit[i] @ unit[j]))
        assert [j for j, _ in seen.near[i]] == order[: gallery.NEAREST]
        assert [cosine for _, cosine in seen.near[i]] == pytest.approx([unit[i] @ unit[j] for j in order[:6]], abs=1e-5)
        fifth.append(unit[i] @ unit[order[gallery.RANK - 1]])
    assert [i for i, _ in seen.alone] == np.argsort(fifth)[: gallery.ALONE].tolist() and seen.alone[0][0] == 7
    for number, members in enumerate(seen.typical):
        own = np.flatnonzero(seen.clusters == number)
        centre = unit[own].mean(0) / np.linalg.norm(unit[own].mean(0))
        cosines = unit[own] @ centre
        assert set(members) <= set(own.tolist())
        assert unit[members] @ centre == pytest.approx(np.sort(cosines)[::-1][: gallery.TYPICAL], abs=1e-5)
    assert sum((seen.clusters == number).sum() for number in range(len(seen.typical))) == 60


def test_principal_components_are_those_of_the_singular_values():
    x = torch.randn(40, 5) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1])
    points, share = gallery.principal(x)
    centred = x.double().numpy() - x.double().numpy().mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    for axis in range(2):
        assert abs(points[:, axis].numpy() @ u[:, axis]) == pytest.approx(s[axis], rel=1e-6)
    assert share == pytest.approx((s[:2] ** 2).sum() / (s**2).sum())
    square = gallery.unit_square(points)
    assert square.min() >= -1e-6 and square.max() <= 1 + 1e-6 and np.ptp(square, axis=0).max() == pytest.approx(1)


@pytest.mark.parametrize("x", [torch.zeros(20, 8), torch.ones(20, 8), torch.ones(1, 8), torch.ones(3, 1)])
def test_features_that_are_all_alike(x):
    seen = gallery.look(x, spread=True)
    assert (seen.points == 0.5).all() and len(seen.near) == len(x) and seen.alike is (len(x) > 1)
    assert sorted(i for members in seen.typical for i in members)[0] == 0


def test_copies_are_found_and_bad_files_left_out(images, tmp_path):
    shutil.copytree(images, tmp_path / "some")
    (tmp_path / "some/cobalt/05.jpg").write_bytes(b"no image")
    torch.manual_seed(0)
    encoder = build("test_resnet", stem="auto", image_size=32, mean=(0.5,) * 3, std=(0.2,) * 3).eval()
    source = find(tmp_path / "some").train
    picked, raw = gallery.Sample(source, 32, 40, CPU, 1).encode(encoder, CPU)
    assert len(picked.names) == len(raw) == len(source) - 1 and picked.bad == 1 and "cobalt/05.jpg" not in picked.names
    (same,) = picked.same
    assert [picked.names[i] for i in same] == ["birch/07.jpg", "birch/again.jpg"]
    with torch.no_grad():
        again = gallery.Sample(source, 32, 40, CPU, 0)
        assert torch.equal(again.encode(encoder, CPU)[1], raw) and torch.equal(again.encode(encoder, CPU)[1], raw)


def test_a_sheet_of_noise_stays_small():
    noise = np.random.default_rng(0).integers(0, 256, (gallery.MOST, 96, 96, 3), np.uint8)
    uri, across = sprite.sheet(noise)
    assert len(uri) < 3_600_000 and across == 32
    few, across = sprite.sheet(noise[:3, :8, :8])
    assert few.startswith("data:image/webp;base64,") and across == 2


@given(st.text())
def test_text_is_never_markup(words):
    told = markup.text(words)
    assert not set(told) & set("<>\"'\n\r\u202e\u2028") and len(markup.name(words * 50)) <= markup.LONGEST + 1
    assert Tags(f'<p title="{told}">{told}</p>').found == [("p", {"title": markup.printable(words)})]


class Clock:
    """Time that passes as it is told."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class Part:
    """What `Live` asks of a run."""

    folder, steps = Path("nowhere"), 10**9
    step, ending = 0, ""


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 300), st.floats(0, 20)), min_size=1, max_size=60))
def test_a_run_is_looked_at_in_a_fiftieth_of_its_time(laps):
    """laps: seconds to the next line of the log, and how long a rewriting would take then. What is over the share is
    what one rewriting took longer than the one before it."""
    clock, spent = Clock(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sslpre.report.live.time", clock)
        live = Live()
        for seconds, cost in laps:
            clock.now += seconds

            def rewrite(run, earned, there, cost=cost):
                clock.now += cost
                live.curves = cost
                spent.append(cost)

            patch.setattr(live, "rewrite", rewrite)
            live(Part())
            assert sum(spent[:-1]) <= 0.02 * clock.now + 1e-6
    assert spent or sum(seconds for seconds, _ in laps) < 301 + max(seconds for seconds, _ in laps)


@pytest.mark.parametrize("every", [2.0, 10.0, 60.0])
def test_map_and_preview_get_their_share_too(every, monkeypatch, tmp_path):
    """Ten hours of a run with a line every so often; curves take 0.8 s, all that needs images 6 s."""
    clock, live, made = Clock(), Live(), []
    run = Part()
    run.folder = tmp_path
    live.begun = 0.0
    monkeypatch.setattr("sslpre.report.live.time", clock)
    monkeypatch.setattr("sslpre.report.live.known", lambda *_: Content("", [], "", 0, 0, History(), "", "", ""))
    monkeypatch.setattr(run, "recipe", None, raising=False)
    monkeypatch.setattr(live, "passing", lambda *_: 1.0)
    monkeypatch.setattr(live, "joined", lambda content: content)
    monkeypatch.setattr("sslpre.report.live.page", lambda content: clock.__setattr__("now", clock.now + 0.8) or "")

    def seen(run, content):
        clock.now += 6
        made.append(clock.now)
        return content

    monkeypatch.setattr(live, "seen", seen)
    while clock.now < 36_000:
        clock.now += every
        live(run)
    assert 20 <= len(made) <= 0.02 * 0.75 * 36_000 / 6
    assert live.spent + live.spent_images <= 0.02 * clock.now


def test_a_page_that_was_made_by_hand_is_left_until_there_is_a_better_one(monkeypatch, tmp_path):
    clock, live, run = Clock(), Live(), Part()
    run.folder = tmp_path
    live.begun, clock.now = 0.0, 1000.0
    monkeypatch.setattr("sslpre.report.live.time", clock)
    monkeypatch.setattr("sslpre.report.live.known", lambda *_: Content("", [], "", 0, 0, History(), "", "", ""))
    monkeypatch.setattr(run, "recipe", None, raising=False)
    monkeypatch.setattr(live, "passing", lambda *_: 1e9)
    monkeypatch.setattr(live, "joined", lambda content: content)
    monkeypatch.setattr("sslpre.report.live.page", lambda content: content.state)
    live(run)
    page = tmp_path / "report.html"
    assert page.read_text() == "training"
    run.ending = "stopped"
    live(run)
    assert page.read_text() == "stopped", "a run that stops does not say that it trains"
    page.write_text("by hand")
    os.utime(page, ns=(1, 1))
    clock.now += 1000
    live(run)
    assert page.read_text() == "by hand"


@pytest.mark.parametrize(
    ("error", "said", "calls"),
    [
        (OSError(28, "No space left on device"), "is not rewritten", 3),
        (room.SslpreError("the curves of a report need matplotlib", "pip"), "no report.html while training", 1),
        (RuntimeError("odd"), "please report it", 1),
    ],
)
def test_what_fails_is_said_once_and_stops_no_run(monkeypatch, capfd, error, said, calls):
    clock, live, called = Clock(), Live(), []
    monkeypatch.setattr("sslpre.report.live.time", clock)
    live.begun = 0.0

    def rewrite(run, earned, there):
        called.append(1)
        raise error

    monkeypatch.setattr(live, "rewrite", rewrite)
    for _ in range(3):
        clock.now += 1000
        live(Part())
    assert capfd.readouterr().err.count(said) == 1 and len(called) == calls
