"""Health: the figures are those of the formulas, the verdicts follow, and what collapses is called so in time."""

import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sslpre.contract.single import start
from sslpre.errors import SslpreError
from sslpre.methods import methods
from sslpre.ops import sphere
from sslpre.ops.spectrum import DELTA, effective, lidar, rankme
from sslpre.ops.sphere import alignment, mean_cosine, uniformity
from sslpre.train import health, loop, verdict
from sslpre.train import run as runs
from sslpre.train.health import Ring, of_pairs, of_quick, of_ring, unit
from sslpre.train.verdict import COLLAPSED, HEALTHY, NOT_YET, PARTLY, Watch, verdict_of
from sslpre.views.build import centre


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_alignment_and_uniformity_are_the_papers(monkeypatch):
    x, y = F.normalize(drawn(70, 8), dim=1), F.normalize(drawn(70, 8, seed=1), dim=1)
    assert alignment(x, y).item() == pytest.approx((x - y).norm(p=2, dim=1).pow(2).mean().item())
    slow = math.log(np.mean([math.exp(-2 * float((x[i] - x[j]).norm()) ** 2) for i in range(70) for j in range(i)]))
    assert uniformity(x).item() == pytest.approx(slow)
    monkeypatch.setattr(sphere, "BLOCK", 150)  # two rows at a time
    assert uniformity(x).item() == pytest.approx(slow)
    assert mean_cosine(x).item() == pytest.approx(
        np.mean([float(x[i] @ x[j]) for i in range(70) for j in range(70) if i != j])
    )


def test_uniformity_of_one_point_and_of_the_whole_sphere():
    assert uniformity(torch.ones(50, 4) / 2).item() == pytest.approx(0, abs=1e-6)
    spread = uniformity(F.normalize(drawn(3000, 512).float(), dim=1)).item()
    assert spread == pytest.approx(-4, abs=0.05)  # in many dimensions all are at right angles: exp(−2 · 2)


def test_rankme_is_the_entropy_of_singular_values():
    for shape in ((40, 7), (7, 40)):
        z = drawn(*shape)
        p = np.linalg.svd(z.numpy(), compute_uv=False)
        p /= p.sum()
        assert rankme(z) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    basis = torch.linalg.qr(drawn(30, 5))[0]
    assert rankme(basis) == pytest.approx(5)
    assert rankme(drawn(30, 1) * drawn(1, 9)) == pytest.approx(1, abs=1e-5)
    assert rankme(torch.zeros(5, 3)) == 0


def test_lidar_is_the_rank_of_scatter_between_in_units_of_within():
    z = drawn(20, 6, 5) + 3 * drawn(20, 1, 5, seed=1)
    means = z.mean(1).numpy()
    between = np.cov(means.T, bias=True)
    inner = (z - z.mean(1, keepdim=True)).flatten(0, 1).numpy()
    within = inner.T @ inner / len(inner) + DELTA * np.eye(5)
    root = np.linalg.inv(scipy.linalg.sqrtm(within))
    values = np.linalg.eigvalsh(root @ between @ root)
    p = values / values.sum()
    assert lidar(z) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert lidar(torch.ones(4, 3, 5)) == 0


@settings(max_examples=30)
@given(st.floats(-8, 12), st.integers(1, 6), st.integers(2, 5))
def test_lidar_of_any_scale_and_rank(power, rank, views):
    z = drawn(12, views, rank) @ drawn(rank, 6, seed=1) * 10.0**power
    assert 1 - 1e-6 <= lidar(z) <= 6 + 1e-6


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_an_effective_rank_is_between_one_and_all(values):
    rank = effective(torch.tensor(values, dtype=torch.float64))
    assert rank == 0 if not any(values) else 1 - 1e-9 <= rank <= len(values) + 1e-9


@settings(max_examples=50)
@given(st.lists(st.integers(1, health.RING), min_size=1, max_size=8))
def test_the_ring_holds_the_last_ones(sizes):
    ring, numbers = Ring(), []
    for size in sizes:
        z = torch.arange(len(numbers), len(numbers) + size, dtype=torch.float32)[:, None].expand(-1, 2)
        numbers += range(len(numbers), len(numbers) + size)
        ring.add(torch.zeros(size, 3, 4, 4), z)
    assert sorted(ring.finite()[:, 0].tolist()) == numbers[-health.RING :]
    assert ring.pixels == 16 * len(numbers)


def test_what_is_not_finite_is_left_out():
    ring = Ring()
    assert len(ring.finite()) == 0
    ring.add(torch.zeros(3, 3, 4, 4), torch.tensor([[1.0, 2], [math.nan, 1], [math.inf, 0]]))
    assert ring.finite().tolist() == [[1, 2]]


def test_of_a_large_batch_all_parts_are_remembered():
    ring = Ring()
    ring.add(torch.zeros(6000, 3, 4, 4), torch.arange(4).repeat_interleave(1500)[:, None].float())  # as four rotations
    counts = ring.finite()[:, 0].long().bincount()
    assert len(ring.finite()) == health.RING and (counts - 512).abs().max() <= 1


def test_figures_of_a_ring_and_of_pairs():
    told = of_ring(drawn(2048, 64).float()) | of_quick(drawn(2048, 64).float())
    assert told["std"] == pytest.approx(1, abs=0.02)
    assert told["rank"] > 60 and told["directions"] > 60
    assert told["cosine"] == pytest.approx(0, abs=0.01)
    dead = of_ring(torch.zeros(30, 8)) | of_quick(torch.zeros(30, 8))
    assert (dead["std"], dead["rank"], dead["uniformity"], dead["cosine"]) == pytest.approx((0, 0, 0, 1), abs=1e-6)
    x, y = unit(drawn(30, 8)), unit(drawn(30, 8, seed=1))
    told, cosines = of_pairs(x, y), (x @ y.T).numpy()
    assert told["positive_cosine"] == pytest.approx(np.diag(cosines).mean())
    assert told["negative_cosine"] == pytest.approx(cosines[~np.eye(30, dtype=bool)].mean())
    assert told["alignment"] == pytest.approx(2 - 2 * told["positive_cosine"])


def judged(rows, ratio=None, first=None, count=300):
    watch = Watch()
    watch.told = of_quick(rows.float()) | of_ring(rows.float())
    watch.first = {"std": watch.told["std"] if first is None else first}
    watch.ratios.extend([] if ratio is None else [ratio])
    return verdict_of(watch, count, rows.shape[1])


@pytest.mark.parametrize("ratio", [None, 0.5, 1.0])
def test_verdicts_of_features(ratio):
    spread, direction = drawn(300, 64), drawn(1, 64, seed=1)
    well = HEALTHY if ratio != 1 else NOT_YET
    assert judged(direction + 1e-5 * spread, ratio) == COLLAPSED  # one point, whatever it was before
    assert judged(spread, ratio) == well
    near = direction + 0.01 * spread  # as of untrained networks without normalisation, or fallen so low
    assert judged(near, ratio) == well
    assert judged(near, ratio, first=0.04) == PARTLY
    assert judged(near, ratio, first=0.8) == COLLAPSED
    line = drawn(300, 1) * direction + 2 * drawn(1, 64, seed=2)
    assert judged(line, ratio) == PARTLY
    assert judged(line[:16], ratio, count=16) == well  # too few to tell


def test_directions_that_were_lost():
    """As SimCLR's at a hundred times its rate: 11.6 of 68.4 are left after 216 steps; at its own, 41.2 of 64.4."""
    for first, now, expected in ((68.4, 11.6, PARTLY), (64.4, 41.2, HEALTHY)):
        watch = Watch(told={"std": 0.3, "directions": now}, first={"std": 0.7, "directions": first})
        assert verdict_of(watch, 2048, 96) == expected
        assert verdict_of(watch, 16, 96) == HEALTHY  # too few to tell


def test_verdicts_of_losses_and_clusters():
    spread = drawn(300, 64)
    assert [judged(spread, ratio) for ratio in (None, 0.97, 0.99, 1.5)] == [HEALTHY, HEALTHY, NOT_YET, NOT_YET]
    watch = Watch(told={"std": 1.0}, first={"std": 1.0}, clusters={"clusters": 1})
    assert verdict_of(watch, 300, 64) == COLLAPSED


def test_features_alike_in_evaluation_alone_have_collapsed():
    """Batch normalisation spreads in training what is a point where its running statistics are used."""
    watch = Watch(told={"std": 0.8, "eval_std": 1e-4}, first={"std": 0.8, "eval_std": 0.7})
    assert verdict_of(watch, 300, 64) == COLLAPSED


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext", "test_resnet"])
def test_untrained_networks_are_not_ill_on_dark_images_that_differ_little(backbone, tmp_path, always, monkeypatch):
    dim = loop.take_step

    def dark(run, pixels, epoch):
        pixels.pixels = (pixels.pixels // 8).contiguous()  # as of cells under a microscope
        dim(run, pixels, epoch)

    monkeypatch.setattr(loop, "take_step", dark)
    run = start(
        "rotation",
        tmp_path,
        count=40,
        encoder={"backbone": backbone},
        optim={"lr": 1e-5},
        train={"epochs": 2, "batch_size": 20},
    )
    monkeypatch.setattr("sslpre.train.metrics.LOG_STEPS", 1)
    loop.train(run)
    assert len(verdicts(run)) == 4
    assert not {told for _, told in verdicts(run)} & {PARTLY, COLLAPSED}


def black(run):
    """An encoder whose features are those of a black image, whatever it is shown."""
    encoder = run.objective.encoder
    encoder.prepare = types.MethodType(lambda self, x: torch.zeros_like(type(self).prepare(self, x)), encoder)


def lines(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def verdicts(run):
    return [(line["step"], line["health"]["verdict"]) for line in lines(run) if "verdict" in line.get("health", {})]


@pytest.fixture
def always(monkeypatch):
    """Every line of the log has its figures, however long that takes; ends of epochs have none."""
    monkeypatch.setattr(verdict, "SHARE", math.inf)
    monkeypatch.setattr(Watch, "survey", lambda self, run: {})


def short(method: str, folder: Path, **train) -> loop.Run:
    return start(method, folder, count=40, train={"epochs": 4, "batch_size": 4, **train})


@pytest.mark.parametrize("method", sorted(methods()))
def test_a_constant_encoder_has_collapsed_within_50_steps(method, tmp_path, always, capsys):
    run = short(method, tmp_path, on_collapse="stop")
    black(run)
    with pytest.raises(SslpreError) as failed:
        loop.train(run)
    assert failed.value.code == 11
    assert run.step <= 50
    assert verdicts(run)[-1] == (run.step, COLLAPSED)
    assert f"--lr {run.recipe.optim.lr / 10:.1g}" in failed.value.hint and "--on-collapse warn" in failed.value.hint
    assert "warning: collapsed: " in capsys.readouterr().err
    again = short(method, tmp_path, on_collapse="warn")  # it was saved where it stopped
    runs.go_on(again)
    assert again.step == run.step


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", sorted(methods()))
def test_a_healthy_run_is_never_said_to_collapse(method, seed, tmp_path, always, capsys):
    run = short(method, tmp_path, on_collapse="stop", seed=seed)
    loop.train(run)
    assert run.step == run.steps == 40
    found = verdicts(run)
    assert len(found) >= 2
    assert not {verdict for _, verdict in found} & {COLLAPSED, PARTLY}
    assert "collapsed" not in capsys.readouterr().err


def test_lines_of_a_run_of_two_views(tmp_path, monkeypatch):
    monkeypatch.setattr(verdict, "SHARE", math.inf)
    monkeypatch.setattr(health, "IMAGES", 16)
    run = short("simclr", tmp_path)
    loop.train(run)
    written = lines(run)
    looked = [line for line in written if "verdict" in line.get("health", {})]
    for line in looked:
        assert line["chance"] == pytest.approx(math.log(7))
        told = line["health"]
        assert told["alignment"] == pytest.approx(2 - 2 * told["positive_cosine"], rel=1e-3)
        names = "std eval_std rank directions uniformity cosine negative_cosine advice"
        assert set(names.split()) <= told.keys()
    surveys = [line for line in written if "lidar" in line.get("health", {})]
    assert [line["step"] for line in surveys] == [10, 20, 30, 40]
    assert all(1 <= line["health"]["lidar"] <= run.objective.encoder.dim for line in surveys)
    assert all(line["health"]["images"] == 14 for line in surveys)  # every third of 40


def test_a_short_run_is_surveyed_at_its_end_with_fewer_images(tmp_path, monkeypatch):
    monkeypatch.setattr(verdict, "FEWEST", 8)
    monkeypatch.setattr(verdict, "SHARE", 10 * 10 * 32**2 / (3 * 40 * 4 * 4 * 32**2))  # time for ten images in all
    run = short("rotation", tmp_path)
    loop.train(run)
    (told,) = [line for line in lines(run) if "lidar" in line.get("health", {})]
    assert told["step"] == 40 and told["health"]["images"] == 10 and "alignment" in told["health"]


def test_clusters_are_told(tmp_path, always):
    run = start("deepcluster", tmp_path, count=80, method={"reassign": 1}, train={"epochs": 2, "batch_size": 4})
    loop.train(run)
    told = [line["health"] for line in lines(run) if "verdict" in line.get("health", {})]
    assert all(line["clusters"] == 2 for line in told) and "nmi" not in told[0] and 0 <= told[-1]["nmi"] <= 1


@pytest.mark.parametrize("error", [MemoryError("no memory"), torch.linalg.LinAlgError("not definite")])
def test_no_run_ends_because_it_was_looked_at(error, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(verdict, "SHARE", math.inf)
    for name in ("encoded", "rankme", "lidar"):
        monkeypatch.setattr(health, name, fail)
    run = short("simclr", tmp_path, epochs=2, monitor="knn")
    loop.train(run)
    assert [told for _, told in verdicts(run)] == [HEALTHY]
    assert f"left out: {error}" in capsys.readouterr().err
    monkeypatch.setattr(health, "rankme", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is one
        loop.train(short("simclr", tmp_path / "wrong"))


def test_what_was_said_is_not_said_again_after_a_resume(tmp_path, always, capsys):
    run = short("rotation", tmp_path)
    black(run)
    loop.train(run)
    assert capsys.readouterr().err.count("warning: collapsed") == 1
    with verdict.watching(run) as watch:
        assert (watch.verdict, watch.said, watch.since) == (COLLAPSED, COLLAPSED, 20)
        assert watch.first["std"] < 1e-3


def test_a_resume_that_is_refused_changes_no_recipe(tmp_path, run_cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    drawn_colours = np.random.default_rng(0).integers(0, 255, (40, 3))
    for number, colour in enumerate(drawn_colours.tolist()):
        Image.new("RGB", (40, 40), tuple(colour)).save(tmp_path / "images" / f"{number}.png")
    words = ["--backbone", "test_resnet", "--image-size", "32", "--batch-size", "8", "--epochs", "1", "--device", "cpu"]
    assert run_cli("pretrain", "rotation", "images", "--out", "run", *words).code == 0
    before = (tmp_path / "run" / "recipe.toml").read_bytes()
    done = run_cli("pretrain", "--resume", "run", "--monitor", "knn", "--device", "cpu")
    assert done.code == 4 and "hint: --monitor none" in done.err
    assert (tmp_path / "run" / "recipe.toml").read_bytes() == before
    assert run_cli("pretrain", "--resume", "run", "--on-collapse", "stop", "--device", "cpu").code == 0
    assert 'on_collapse = "stop"' in (tmp_path / "run" / "recipe.toml").read_text()


def test_a_map_and_chunks_are_heard_once(tmp_path):
    heard = []
    for method, backbone, rows in (("colorization", "test_vit", 8), ("simclr", "test_resnet", 16)):
        parts = {"batch_size": 8, "micro_batch": 4}
        run = start(method, tmp_path / method, encoder={"backbone": backbone}, train=parts)
        run.objective.encoder.listener = lambda x, z: heard.append(tuple(z.shape))
        for pixels in run.stream.steps(0, 1):
            loop.take_step(run, pixels, 0)
        assert sum(n for n, _ in heard) == rows and {d for _, d in heard} == {run.objective.encoder.dim}
        heard.clear()


def test_a_survey_is_the_same_however_the_images_come(tmp_path):
    run = short("simclr", tmp_path)
    whole = health.many_views(run, range(0, 40, 3))
    assert whole is not None
    assert whole.shape == (14, health.VIEWS, run.objective.encoder.dim)
    assert not torch.equal(whole[:, 0], whole[:, 1])
    run.part = 3
    assert torch.allclose(health.many_views(run, range(0, 40, 3)), whole, atol=1e-5)


def test_looking_changes_no_weight(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "IMAGES", 16)
    ends = []
    for share in (math.inf, None):
        run = short("simclr", tmp_path / str(share))
        if share is None:
            monkeypatch.setattr(Watch, "look", lambda *_: {})
            monkeypatch.setattr(Watch, "survey", lambda *_: {})
        monkeypatch.setattr(verdict, "SHARE", share or 1)
        loop.train(run)
        ends.append({name: tensor.clone() for name, tensor in run.objective.state_dict().items()})
        assert len(verdicts(run)) == (2 if share else 0)
        assert run.objective.encoder.listener is None
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_knn_of_an_encoder_that_knows_the_classes_and_of_one_that_does_not(tmp_path, monkeypatch):
    run = start("rotation", tmp_path, count=60, train={"epochs": 1, "batch_size": 20, "monitor": "knn"})
    labels = torch.from_numpy(run.stream.source.labels)
    loop.train(run)
    (told,) = [line["health"]["knn"] for line in lines(run) if "knn" in line.get("health", {})]
    z, index = health.of_images(run, range(60), 1, lambda some: iter([centre(some.pixels, some.size, 32)]))
    assert index.tolist() == list(range(60))
    x = F.normalize(z[:, 0], dim=1)
    cosines = (x @ x.T).fill_diagonal_(-2)
    closest, nearest = cosines.topk(20)
    votes = torch.zeros(60, 10).scatter_add_(1, labels[nearest], (closest / 0.07).exp())
    assert told == pytest.approx((votes.argmax(1) == labels).float().mean().item(), abs=1e-4)
    monkeypatch.setattr(health, "encoded", lambda run, view: F.one_hot(labels[: len(view)], 96).float())
    assert health.neighbours(run) == {"knn": 1.0}  # as every batch of 20 has two images of each class
    monkeypatch.setattr(health, "encoded", lambda run, view: torch.randn(len(view), 96))
    assert health.neighbours(run)["knn"] < 0.5


def test_knn_needs_labels(tmp_path, run_cli):
    for number in range(40):
        Image.new("RGB", (40, 40), (number * 6, 0, 0)).save(tmp_path / f"{number}.png")
    done = run_cli("pretrain", "simclr", str(tmp_path), "--monitor", "knn", "--out", str(tmp_path / "run"))
    assert done.code == 4
    assert done.err.splitlines()[-2:] == [
        f"error: no labels to monitor with in `{tmp_path}`",
        "hint: --monitor none",
    ]


def test_what_was_dear_is_not_repeated_at_once_the_rest_is(tmp_path, monkeypatch):
    run = short("rotation", tmp_path)
    watch = Watch()
    watch.ring.add(torch.zeros(64, 3, 8, 8), drawn(64, 16).float())
    clock = [100.0]
    monkeypatch.setattr(verdict.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(health, "of_ring", lambda rows: clock.__setitem__(0, clock[0] + 1) or of_ring(rows))
    monkeypatch.setattr(health, "of_batch", lambda *_: {})

    def look():
        told = watch.look(run, None, 0, {"loss": 1.0})
        assert told["health"]["verdict"] == HEALTHY and told["chance"] == pytest.approx(math.log(4))
        return "rank" in told["health"]

    assert [look(), look(), look()] == [True, True, False]  # the first may compile: its time says nothing
    clock[0] += 49
    assert not look()
    clock[0] += 2
    assert look()


def test_not_yet_learning_is_said_once_and_late(tmp_path, capsys):
    run = short("rotation", tmp_path)
    watch = Watch()
    watch.verdict, watch.times, watch.since = NOT_YET, 5, 2
    run.step = 3
    assert not watch.ends(run)
    assert capsys.readouterr().err == ""
    run.step = 30
    watch.ends(run)
    watch.ends(run)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith("warning: not yet learning: the loss is that of guessing") and "--lr 0.0003" in told[0]
    watch.ratios.append(1.5)
    assert "above that of guessing" in watch.advice(run) and "--lr 0.003" not in watch.advice(run)
    watch.told["images_std"] = 0.001
    assert "hardly differs from image to image" in watch.advice(run)


def test_what_a_method_is_judged_by(tmp_path):
    assert verdict.chance_of(short("rotation", tmp_path / "r"), {"loss": 2.0}) == (2.0, pytest.approx(math.log(4)))
    paint = short("inpainting", tmp_path / "i")
    assert verdict.chance_of(paint, {"encoder.rec": 0.1, "encoder.blank": 0.4}) == (0.1, 0.4)
    colour = short("colorization", tmp_path / "c")
    assert verdict.chance_of(colour, {"loss": 3.0, "constant": 4.5}) == (3.0, 4.5)
    assert verdict.chance_of(colour, {"loss": 3.0}) is None


def in_a_pair(folder, dead):
    """How a run of two processes ends, with every figure it can have; SHARE is put back for the tests after it."""
    share, verdict.SHARE = verdict.SHARE, math.inf
    try:
        run = start(
            "simclr",
            Path(folder),
            count=40,
            train={"epochs": 3, "batch_size": 4, "on_collapse": "stop", "monitor": "knn"},
        )
        if dead:
            black(run)
        loop.train(run)
        return run.step, 0
    except SslpreError as error:
        return run.step, error.code
    finally:
        verdict.SHARE = share


def test_two_processes_survey_together_and_stop_together(tmp_path, pair):
    assert pair.run(in_a_pair, str(tmp_path / "well"), False) == [(30, 0), (30, 0)]
    told = [json.loads(line) for line in (tmp_path / "well" / "metrics.jsonl").read_text().splitlines()]
    surveys = [line["health"] for line in told if "lidar" in line.get("health", {})]
    assert len(surveys) == 3 and all(1 < one["lidar"] <= 96 and 0 <= one["knn"] <= 1 for one in surveys)
    ended = pair.run(in_a_pair, str(tmp_path / "ill"), True)
    assert ended[0] == ended[1] and ended[0][1] == 11
