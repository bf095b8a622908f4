"""A run as a user lives it: its directory, killing and resuming it, what it refuses. Real processes and signals."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sslpre import recipe as recipes
from sslpre.data.find import find
from sslpre.errors import SslpreError
from sslpre.train import checkpoint, loop
from sslpre.train import run as runs
from sslpre.train.announce import shorter
from sslpre.train.build import build
from sslpre.train.disk import Disk
from sslpre.train.progress import Meter
from sslpre.train.runs import find_run

SMALL = [
    "--backbone",
    "test_resnet",
    "--image-size",
    "32",
    "--batch-size",
    "8",
    "--precision",
    "fp32",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """48 small JPEGs drawn by the sample set."""
    from PIL import Image

    from sslpre.data.sample import sample

    folder = tmp_path_factory.mktemp("pictures")
    train = sample().train
    for i in range(48):
        Image.fromarray(train.read(i)).save(folder / f"{i:02d}.jpg", quality=95)
    return folder


def options(pictures, **kwargs):
    tables = {
        "encoder": {"backbone": "test_resnet", "image_size": 32},
        "train": {"batch_size": 8, "epochs": 2, "precision": "fp32"},
    }
    return runs.Options("simclr", pictures, (), tables, device="cpu", workers=1, **kwargs)


def weights(run):
    return safetensors.torch.load_file(run / "encoder" / "model.safetensors")


def wait_for_step(run, step, child):
    """Until a checkpoint past `step` is there."""
    for _ in range(1200):
        found = checkpoint.complete(run / "checkpoints")
        if found and int(found[0].name.removeprefix("step-")) >= step:
            return
        if child.poll() is not None:
            raise AssertionError(child.stderr.read())
        time.sleep(0.05)
    raise AssertionError("no checkpoint came")


def test_what_a_run_leaves(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = runs.pretrain(options(pictures))
    assert done.run.as_posix() == "runs/simclr-1"
    names = sorted(path.name for path in done.run.iterdir())
    files = ["data.json", "encoder", "environment.json", "images.safetensors", "metrics.jsonl", "recipe.toml"]
    assert names == ["checkpoints", *files]
    text = (done.run / "recipe.toml").read_text()
    assert '"auto"' not in text
    lines = [json.loads(line) for line in (done.run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 12 and {"loss", "lr", "images_per_s", "waiting", "epoch"} <= lines[-1].keys()
    assert json.loads((done.run / "data.json").read_text())["images"] == 48
    assert [path.name for path in checkpoint.complete(done.run / "checkpoints")] == ["step-00000012", "step-00000006"]
    told = capsys.readouterr().err
    for words in ("48 images", "test_resnet", "12 steps", "runs/simclr-1", "about"):
        assert words in told
    assert len(told.splitlines()[0]) < 160
    assert runs.pretrain(options(pictures)).run.as_posix() == "runs/simclr-2"
    assert find_run(None).name == "simclr-2"


def test_the_runs_recipe_gives_the_same_run_again(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = runs.pretrain(options(pictures)).run
    again = runs.pretrain(runs.Options(str(first / "recipe.toml"), device="cpu", workers=2)).run
    assert again.name == "simclr-2"
    assert recipes.load(str(again / "recipe.toml")) == recipes.load(str(first / "recipe.toml"))
    a, b = weights(first), weights(again)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory, warm):
    folder = tmp_path_factory.mktemp("undisturbed")
    command = ["pretrain", "simclr", pictures, *SMALL, "--epochs", "12", "--out", folder / "run"]
    child = warm.start(*command, cwd=folder, stderr=subprocess.PIPE)
    _, told = child.communicate(timeout=300)
    assert child.returncode == 0, told
    return folder / "run"


def test_kill_9_and_resume_ends_in_the_same_weights(pictures, undisturbed, tmp_path, warm):
    run = tmp_path / "run"
    words = ["pretrain", "simclr", pictures, *SMALL, "--epochs", "12", "--out", run]
    child = warm.start(*words, cwd=tmp_path)
    wait_for_step(run, 12, child)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    resumed = warm.start("pretrain", "--resume", run, "--device", "cpu", cwd=tmp_path, stderr=subprocess.PIPE)
    _, told = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, told
    assert "at step" in told and not list((run / "checkpoints").glob(".tmp-*"))
    a, b = weights(undisturbed), weights(run)
    assert all(torch.equal(a[k], b[k]) for k in a)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 72


def test_resume_auto_starts_goes_on_and_is_done(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wanted = options(pictures, resume="auto", out=tmp_path / "x")
    assert runs.pretrain(wanted).summary["step"] == 12
    before = os.stat(tmp_path / "x" / "encoder" / "model.safetensors").st_mtime_ns
    assert runs.pretrain(wanted).summary["step"] == 12
    assert "finished already" in capsys.readouterr().err
    assert os.stat(tmp_path / "x" / "encoder" / "model.safetensors").st_mtime_ns == before


def test_resume_without_a_complete_checkpoint_starts_at_step_0(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = runs.pretrain(options(pictures)).run
    expected = weights(run)
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "encoder")
    (run / "checkpoints" / ".tmp-1").mkdir(parents=True)
    runs.pretrain(runs.Options(resume="last", device="cpu", workers=1))
    assert "starting at step 0" in capsys.readouterr().err
    assert all(torch.equal(expected[k], v) for k, v in weights(run).items())


def test_a_complete_checkpoint_of_step_0_is_not_written_again(pictures, tmp_path, monkeypatch):
    """Writing it again would take the only one away for a moment."""
    wanted = options(pictures)
    chosen = {"data": {"store_size": 64}, "optim": {"lr": 0.1, "warmup": 0.1}}
    recipe = recipes.load("simclr", (), wanted.overrides | chosen)
    seen, save = [], loop.save
    monkeypatch.setattr(loop, "save", lambda run, *rest, **more: (seen.append(run.step), save(run, *rest, **more)))
    for before in (False, True):
        run = build(tmp_path, recipe, find(pictures), torch.device("cpu"), wanted.workers)
        if before:
            shutil.rmtree(tmp_path / "checkpoints")
            save(run, Meter(), Disk(tmp_path), patient=False)
        loop.train(run)
    assert seen == [0, 6, 12, 6, 12]


def test_resume_on_changed_images_is_refused(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, tmp_path / "own")
    run = runs.pretrain(options(tmp_path / "own")).run
    shutil.rmtree(run / "encoder")
    (tmp_path / "own" / "00.jpg").unlink()
    with pytest.raises(SslpreError, match="have changed") as caught:
        runs.pretrain(runs.Options(resume=str(run), device="cpu"))
    assert caught.value.code == 6


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_not_taken_and_nothing_of_them_is_written(pictures, tmp_path, monkeypatch, where):
    """NaN from step 7 on: at the sixth exit 10, the weights on disk are those of the last checkpoint, all finite."""
    from sslpre.methods.simclr import SimCLR
    from sslpre.objective import Loss

    monkeypatch.chdir(tmp_path)
    take, good, seen = loop.take_step, SimCLR.loss, {}

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    def bad(self, batch):
        value = good(self, batch).value
        return Loss(value * float("nan") if where == "loss" else Poison.apply(value))

    def step(run, pixels, epoch):
        if run.step == 6:
            monkeypatch.setattr(SimCLR, "loss", bad)
            seen["before"] = [p.clone() for p in run.objective.parameters()]
            seen["run"] = run
        take(run, pixels, epoch)

    monkeypatch.setattr(loop, "take_step", step)
    with pytest.raises(SslpreError, match=f"{where} not finite at step 12, after 5 steps") as caught:
        runs.pretrain(options(pictures))
    assert caught.value.code == 10
    assert all(torch.equal(a, b) for a, b in zip(seen["before"], seen["run"].objective.parameters(), strict=True))
    kept = checkpoint.newest(tmp_path / "runs" / "simclr-1")
    assert kept.state["step"] == 6 and all(t.isfinite().all() for t in kept.model.values())
    assert not (tmp_path / "runs" / "simclr-1" / "encoder").exists()


def test_a_run_that_fails_before_its_first_step_leaves_no_directory(pictures, tmp_path, monkeypatch):
    from sslpre.methods.simclr import SimCLR

    monkeypatch.chdir(tmp_path)

    def fail(self, batch):
        raise RuntimeError("no")

    monkeypatch.setattr(SimCLR, "loss", fail)
    with pytest.raises(RuntimeError):
        runs.pretrain(options(pictures))
    assert os.listdir(tmp_path) == []  # not even `runs/`


def test_a_bad_image_is_listed_and_too_many_stop_the_run(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, tmp_path / "own")
    for name in ("03.jpg", "17.jpg"):
        (tmp_path / "own" / name).write_bytes(b"not a jpeg")
    run = runs.pretrain(
        runs.Options(
            "simclr",
            tmp_path / "own",
            (),
            options(pictures).overrides | {"data": {"max_bad": 0.05}},
            device="cpu",
            workers=2,
        )
    ).run
    told = capsys.readouterr().err
    assert told.count("03.jpg") == 1 and told.count("17.jpg") == 1
    listed = [json.loads(line) for line in (run / "bad_images.jsonl").read_text().splitlines()]
    assert len(listed) == 2
    with pytest.raises(SslpreError) as caught:
        runs.pretrain(options(tmp_path / "own"))
    assert caught.value.code == 20


def test_a_directory_that_holds_something_is_refused(pictures, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(SslpreError, match="mine` exists") as caught:
        runs.pretrain(options(pictures, out=tmp_path / "mine"))
    assert caught.value.code == 2 and (tmp_path / "mine" / "thesis.tex").exists()


def test_an_own_empty_directory_and_a_link_to_one_stay_after_a_failed_start(pictures, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    tables = options(pictures).overrides | {"encoder": {"backbone": "test_resnet", "stem": "small", "image_size": 32}}
    for out in ("mine", "link", "new", "a/b/c"):
        with pytest.raises(SslpreError, match="small stem"):
            runs.pretrain(runs.Options("simclr", pictures, (), tables, out=tmp_path / out, device="cpu"))
    assert sorted(os.listdir(tmp_path)) == ["link", "mine"] and not os.listdir(tmp_path / "mine")


def test_what_is_probed_is_the_newest_run_that_has_something_to_probe(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.pretrain(options(pictures))
    (tmp_path / "runs" / "simclr-2").mkdir()
    shutil.copy("runs/simclr-1/recipe.toml", "runs/simclr-2")  # begun, and killed before its first checkpoint
    os.utime("runs/simclr-2/recipe.toml", (2e9, 2e9))
    assert find_run(None).name == "simclr-1" and find_run("last").name == "simclr-2"


def test_images_named_in_a_setting_are_found_from_anywhere(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(pictures.parent)
    tables = options(pictures).overrides
    setting = f"data.images={pictures.name}"
    run = runs.pretrain(runs.Options("simclr", None, (setting,), tables, out=tmp_path / "x", device="cpu")).run
    assert recipes.load(str(run / "recipe.toml")).data.images == str(pictures)


def test_what_may_change_on_resume_auto_is_taken_over(pictures, tmp_path):
    wanted = options(pictures, resume="auto", out=tmp_path / "x")
    runs.pretrain(wanted)
    runs.pretrain(dataclasses.replace(wanted, settings=("data.max_bad=0.5", "train.checkpoint_minutes=3")))
    kept = recipes.load(str(tmp_path / "x" / "recipe.toml"))
    assert (kept.data.max_bad, kept.train.checkpoint_minutes) == (0.5, 3.0)


def test_resume_auto_with_another_wish_is_refused(pictures, tmp_path):
    wanted = options(pictures, resume="auto", out=tmp_path / "x")
    runs.pretrain(wanted)
    others = [
        dataclasses.replace(wanted, overrides=wanted.overrides | {"train": {"epochs": 50}}),
        dataclasses.replace(wanted, settings=("method.temperature=0.7",)),
        dataclasses.replace(wanted, images=tmp_path),
        dataclasses.replace(wanted, recipe="simclr-cifar"),
    ]
    for other, key in zip(others, ("train.epochs", "method.temperature", "data.images", "method."), strict=True):
        with pytest.raises(SslpreError, match=f"begun with another `{key}") as caught:
            runs.pretrain(other)
        assert caught.value.code == 6


def test_an_edited_recipe_is_refused_and_max_bad_may_be_said_anew(pictures, tmp_path, monkeypatch):
    shutil.copytree(pictures, tmp_path / "own")
    run = runs.pretrain(options(tmp_path / "own", out=tmp_path / "x")).run
    shutil.rmtree(run / "encoder")
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace("batch_size = 8", "batch_size = 16"))
    with pytest.raises(SslpreError, match="has changed since the checkpoint") as caught:
        runs.pretrain(runs.Options(resume=str(run), device="cpu"))
    assert caught.value.code == 6
    (run / "recipe.toml").write_text(text)
    again = runs.pretrain(runs.Options(resume=str(run), overrides={"data": {"max_bad": 0.5}}, device="cpu"))
    assert again.summary["finished"] and recipes.load(str(run / "recipe.toml")).data.max_bad == 0.5


def test_after_falling_back_the_damaged_one_is_not_one_of_the_two_kept(pictures, tmp_path, capsys):
    run = runs.pretrain(options(pictures, out=tmp_path / "x")).run
    newest = checkpoint.complete(run / "checkpoints")[0]
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    expected = weights(run)
    shutil.rmtree(run / "encoder")
    runs.pretrain(runs.Options(resume=str(run), device="cpu", workers=1))
    assert "is damaged" in capsys.readouterr().err
    assert all(torch.equal(expected[k], v) for k, v in weights(run).items())
    for path in checkpoint.complete(run / "checkpoints"):
        checkpoint.load(path)


def test_a_batch_of_one_is_refused_where_images_are_compared(pictures, tmp_path):
    tables = options(pictures).overrides | {"train": {"batch_size": 1, "epochs": 1}}
    with pytest.raises(SslpreError, match="`1` leaves simclr nothing to compare") as caught:
        runs.pretrain(runs.Options("simclr", pictures, (), tables, out=tmp_path / "x", device="cpu"))
    assert caught.value.hint == "--batch-size 6" and not (tmp_path / "x").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow the name")
def test_a_folder_whose_name_is_not_utf8_is_told(pictures, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/w\xff")
    shutil.copytree(pictures, odd)
    with pytest.raises(SslpreError, match="is not UTF-8") as caught:
        runs.pretrain(options(Path(odd), out=tmp_path / "x"))
    assert caught.value.code == 4


def test_a_long_run_on_a_cpu_is_told_what_to_type_instead():
    recipe = recipes.load(
        "simclr", (), {"encoder": {"backbone": "resnet50", "image_size": 224}, "train": {"epochs": 100}}
    )
    assert shorter(recipe, 20 * 3600) == "for about 2.0 h type the same with --epochs 10"
    assert "--backbone test_resnet --image-size 32 --epochs 1" in shorter(recipe, 900 * 3600)
    light = recipe.edit(encoder={"backbone": "test_resnet", "image_size": 32})
    assert "a part of the images" in shorter(light, 900 * 3600)


@pytest.mark.slow
def test_a_compiled_run_saves_plain_names_and_resumes(pictures, tmp_path):
    tables = options(pictures).overrides
    tables = tables | {"train": tables["train"] | {"compile": True}}
    run = runs.pretrain(runs.Options("simclr", pictures, (), tables, out=tmp_path / "x", device="cpu")).run
    assert not any("_orig_mod" in name for name in checkpoint.newest(run).model)
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    shutil.rmtree(run / "encoder")
    assert runs.pretrain(runs.Options(resume=str(run), device="cpu")).summary["step"] == 12


def cut(run, photos, count):
    """A run of 2 epochs on `photos`, stopped after 1 as if it had been killed then."""
    done = runs.pretrain(options(photos, out=run)).run
    shutil.rmtree(done / "encoder")
    for path in checkpoint.complete(done / "checkpoints"):
        if int(path.name[5:]) > count:
            shutil.rmtree(path)
    return done


def test_images_that_came_and_went_are_counted_and_can_be_accepted(pictures, tmp_path, monkeypatch, capsys):
    own = tmp_path / "own"
    shutil.copytree(pictures, own)
    run = cut(tmp_path / "x", own, 6)
    for i in range(8):
        shutil.copy(own / "00.jpg", own / f"new{i}.jpg")
    (own / "03.jpg").unlink()
    (own / "04.jpg").write_bytes((own / "04.jpg").read_bytes() + b"\0")
    resume = runs.Options(resume=str(run), device="cpu", workers=1)
    with pytest.raises(SslpreError, match=r"have changed since its checkpoint: 9 came \(.*, …\), 2 went") as caught:
        runs.pretrain(resume)
    assert caught.value.code == 6 and "--data-changed accept" in caught.value.hint
    done = runs.pretrain(dataclasses.replace(resume, data_changed=True))
    images = len(list(own.glob("*.jpg")))
    assert "with other images, from the beginning of epoch 2" in capsys.readouterr().err
    assert done.summary["finished"] and done.summary["step"] == 2 * (images // 8)
    assert runs.pretrain(resume).summary["finished"], "they are the run's images now"


def test_fewer_images_count_their_steps_from_there(pictures, tmp_path):
    """Checkpoints on more images have more steps, and must not pass for newer ones; what was stopped goes on."""
    own = tmp_path / "own"
    shutil.copytree(pictures, own)
    run = cut(tmp_path / "x", own, 12)
    for path in sorted(own.glob("*.jpg"))[:28]:
        path.unlink()
    resume = runs.Options(resume=str(run), device="cpu", workers=1)
    take, stopped = loop.take_step, []

    def stopping(run, pixels, epoch):
        take(run, pixels, epoch)
        stopped.append(run.step) or signal.raise_signal(signal.SIGTERM)

    longer = dataclasses.replace(resume, data_changed=True)
    state = checkpoint.newest(run).state
    assert state["step"] == 12 and state["images"] == 48
    shutil.rmtree(run / "checkpoints/step-00000012")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", stopping)
        with pytest.raises(SslpreError, match="saved at step 3 of 4"):
            runs.pretrain(longer)
    assert checkpoint.newest(run).state["step"] == 3 and checkpoint.newest(run).state["images"] == 20
    done = runs.pretrain(resume)
    assert done.summary["step"] == 4 and checkpoint.newest(run).state["step"] == 4


def test_a_method_that_keeps_something_of_each_image_takes_no_others(pictures, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(pictures, own)
    wanted = options(own, out=tmp_path / "x")
    done = runs.pretrain(dataclasses.replace(wanted, recipe="deepcluster", settings=("method.clusters=4",))).run
    shutil.copy(own / "00.jpg", own / "new.jpg")
    with pytest.raises(SslpreError, match="deepcluster keeps something of each image") as caught:
        runs.pretrain(runs.Options(resume=str(done), device="cpu", workers=1, data_changed=True))
    assert caught.value.code == 6 and "--init" in caught.value.hint


def test_what_has_changed_in_a_recipe_is_told(pictures, tmp_path):
    run = cut(tmp_path / "x", pictures, 6)
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace("seed = 0", "seed = 1").replace("flip = 0.5", "flip = 0.25"))
    with pytest.raises(SslpreError, match=r"checkpoint: train\.seed was 0, is 1; views\.0\.flip was 0\.5, is 0\.25"):
        runs.pretrain(runs.Options(resume=str(run), device="cpu", workers=1))


def test_digests_follow_from_name_and_size_alone(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "a")
    one, two = find(pictures).train, find(tmp_path / "a").train
    assert (one.digests() == two.digests()).all() and len(set(one.digests().tolist())) == len(one)
    (tmp_path / "a" / "00.jpg").rename(tmp_path / "a" / "0a.jpg")
    (tmp_path / "a" / "01.jpg").write_bytes(b"other")
    other = find(tmp_path / "a").train
    assert len(set(other.digests().tolist()) & set(one.digests().tolist())) == len(one) - 2
