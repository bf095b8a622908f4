"""The verbs end to end, as typed: what comes out on which stream, and what bad input gets, word for word."""

import json
import os
import shutil
from functools import partial

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from sslpre.cli import run as run_words

SMALL = (
    "--backbone test_resnet --image-size 32 --batch-size 8 --epochs 1 --precision fp32 --device cpu --workers 1".split()
)
NEXT = "next: sslpre export encoder.safetensors --run "


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos):
    """A directory with one finished run, `runs/simclr-1`. Not to be written to: copy it."""
    place = tmp_path_factory.mktemp("trained")
    before = os.getcwd()
    os.chdir(place)
    try:
        assert run_words(["pretrain", "simclr", str(photos), *SMALL]) == 0
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def here(trained, tmp_path, run_cli):
    """The current directory holds a copy of the finished run."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path


def last_words(done, code):
    """The two lines that an error ends with."""
    assert done.code == code, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    error, hint = done.err.splitlines()[-2:]
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    return error.removeprefix("error: "), hint.removeprefix("hint: ")


def test_pretrain_on_a_folder(run_cli, photos, tmp_path):
    done = run_cli("pretrain", "simclr", photos, *SMALL, "--json", "--seed", "3", "--set", "method.temperature=0.4")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert summary["run"] == "runs/simclr-1"
    assert summary["step"] == 6
    assert "probe" not in summary
    lines = done.err.splitlines()
    assert lines[0].startswith(f"images     {photos}: 48 images")
    assert any(line.startswith("           images at ") and "JPEGs by simplejpeg" in line for line in lines)
    assert lines[-2:] == ["next: sslpre probe runs/simclr-1 --linear", f"{NEXT}runs/simclr-1"]
    again = run_cli("pretrain", "runs/simclr-1/recipe.toml", "--device", "cpu", "--workers", "1")
    assert again.code == 0, again.err
    assert again.out == ""
    one, two = ((tmp_path / "runs" / f"simclr-{n}" / "recipe.toml").read_text() for n in (1, 2))
    assert one == two
    assert "seed = 3" in one
    assert "temperature = 0.4" in one
    first, second = (load_file(tmp_path / f"runs/simclr-{n}/encoder/model.safetensors") for n in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


def test_without_labels_the_next_command_asks_for_some(run_cli, photos, tmp_path):
    flat = tmp_path / "flat"
    shutil.copytree(photos / "amber", flat)
    done = run_cli("pretrain", "simclr", "flat", *SMALL, "--out", "mine")
    assert done.err.splitlines()[-2:] == ["next: sslpre probe mine --linear --data ./labelled", f"{NEXT}mine"]
    assert (
        last_words(run_cli("probe", "mine", "--knn", "--device", "cpu"), 4)[0] == f"no labels to probe with in `{flat}`"
    )


def test_on_the_sample_set_it_ends_by_probing_itself(run_cli, monkeypatch):
    from sslpre.data import sample

    few = partial(sample.sample, count=200)
    monkeypatch.setattr("sslpre.train.build.sample", few)
    monkeypatch.setattr("sslpre.data.sample.sample", few)
    done = run_cli("pretrain", "simclr", *SMALL)
    assert done.code == 0, done.err
    assert "the built-in sample set" in done.err.splitlines()[0]
    assert "JPEG" not in done.err, "it is drawn"
    for word in ("linear %", "kNN %", "encoder", "random weights", "raw pixels", "chance"):
        assert word in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert done.err.splitlines()[-1] == f"{NEXT}runs/simclr-1"
    report = json.loads(run_cli("pretrain", "simclr", *SMALL, "--json").out)["probe"]
    assert {row["weights"] for row in report["rows"]} == {"encoder", "random weights", "raw pixels"}


def test_a_name_with_a_blank_can_be_pasted(run_cli, photos):
    done = run_cli("pretrain", "simclr", photos, *SMALL, "--out", "my run")
    assert done.err.splitlines()[-2:] == ["next: sslpre probe 'my run' --linear", f"{NEXT}'my run'"]


def test_probe_the_newest_run(run_cli, here):
    done = run_cli("probe", "--device", "cpu", "--workers", "1", "--json")
    assert done.code == 0, done.err
    assert all({"linear", "knn"} <= set(row) for row in json.loads(done.out)["rows"]), "neither flag means both"
    one = run_cli("probe", "simclr-1", "--knn", "--device", "cpu", "--workers", "1", "--json")
    assert not any("linear" in row for row in json.loads(one.out)["rows"])
    table = run_cli("probe", "runs/simclr-1", "--linear", "--device", "cpu", "--workers", "1")
    assert "linear %" in table.out
    assert "kNN %" not in table.out
    assert "\x1b" not in table.out + table.err


def test_probe_says_first_what_it_probes(run_cli, here, photos):
    words = ("--knn", "--device", "cpu", "--workers", "1")
    done = run_cli("probe", *words, "--json")
    assert done.err.splitlines()[:2] == [
        "encoder    runs/simclr-1 at step 6: test_resnet, 32 px",
        f"images     {photos}: 48 images",
    ]
    plain = json.loads(done.out)
    facts = json.loads((here / "runs/simclr-1/data.json").read_text())
    about = {"path": "runs/simclr-1", "step": 6, "architecture": "test_resnet", "image_size": 32}
    assert plain.items() >= {**about, "data_fingerprint": facts["fingerprint"]}.items()
    for split, which in (("train", "*[0-7].jpg"), ("val", "*[89].jpg")):
        for path in photos.rglob(which):
            (here / "split" / split / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, here / "split" / split / path.parent.name)
    (here / "split" / "test").mkdir()
    done = run_cli("probe", "runs/simclr-1/encoder", "--data", "split", *words, "--json")
    assert done.err.splitlines()[:2] == [
        "encoder    runs/simclr-1/encoder at step 6: test_resnet, 32 px",
        "images     split/train: 42 images to train the probe with; split/val: 6 to test it with "
        "(test/ holds no images)",
    ]
    assert json.loads(done.out).items() >= {**about, "path": "runs/simclr-1/encoder"}.items()


SEEN = "the encoder was pretrained on the test images too, without their labels"


def test_probe_says_where_the_test_images_were_pretrained_on(run_cli, here, photos):
    words = ("--knn", "--device", "cpu", "--workers", "1")
    assert f"\nnote: {SEEN}\n" in run_cli("probe", *words).out
    same = here / "moved"
    shutil.copytree(photos, same)
    assert SEEN in json.loads(run_cli("probe", "--data", same, *words, "--json").out)["warnings"]
    (same / "amber" / "00.jpg").unlink()
    assert SEEN not in json.loads(run_cli("probe", "--data", same, *words, "--json").out)["warnings"]
    shutil.copytree(photos, here / "split" / "test")
    shutil.copytree(same, here / "split" / "train")
    assert SEEN in json.loads(run_cli("probe", "--data", "split", *words, "--json").out)["warnings"]


def test_the_allowance_of_bad_images_is_shared_by_both_parts(run_cli, here, photos):
    for split in ("train", "test"):
        shutil.copytree(photos, here / "split" / split)
        for path in (here / "split" / "test").rglob("*.jpg"):
            ImageOps.mirror(Image.open(path)).save(path)  # copies of training images would not be counted
        (here / "split" / split / "amber" / "00.jpg").write_bytes(b"")
        (here / "split" / split / "birch" / "01.jpg").write_bytes(b"")
    words = ("probe", "--data", "split", "--knn", "--device", "cpu", "--workers", "1", "--max-bad")
    error, hint = last_words(run_cli(*words, "0.04"), 20)  # of 96 images 3 may be bad
    assert error == "4 of 96 images could not be read so far, above `--max-bad 0.04`"
    assert hint == "allow more, or start again without those named above: `--max-bad 0.09`"
    done = run_cli(*words, "0.042")
    assert done.code == 0, done.err
    assert "note: 4 images could not be read and are left out" in done.out


def test_probe_what_was_exported(run_cli, here, photos):
    tail = ("--data", photos, "--knn", "--json", "--device", "cpu", "--workers", "1")
    reports = {}
    for out in ("encoder.safetensors", "enc/"):
        done = run_cli("export", out)
        assert done.code == 0, done.err
        assert done.out.startswith("import timm\n")
        images, names = torch.rand(2, 3, 32, 32), {}
        names["images"] = images
        exec(done.out, names)  # what it prints is what a user pastes
        assert names["features"].shape == (2, 96)
        reports[out] = json.loads(run_cli("probe", out, *tail).out)["rows"]
    reports["run"] = json.loads(run_cli("probe", "simclr-1", *tail).out)["rows"]
    assert reports["encoder.safetensors"] == reports["enc/"] == reports["run"]


def test_an_encoder_of_edges_is_probed_but_is_none_to_export(run_cli, photos, tmp_path):
    """Its first layer takes two channels, and no network of RGB has equal features at the border."""
    edges = ["--set", "method.sobel=true", "--set", "method.clusters=4"]
    done = run_cli("pretrain", "deepcluster", photos, *SMALL, *edges)
    assert done.code == 0, done.err
    assert "hint: no `runs/deepcluster-1/encoder`: a network of `sobel`" in done.err
    assert NEXT not in done.err and "next: sslpre probe runs/deepcluster-1" in done.err
    assert not (tmp_path / "runs/deepcluster-1/encoder").exists()
    done = run_cli("probe", "last", "--linear", "--data", photos, "--device", "cpu")
    assert done.code == 0 and "random weights" in done.out, done.err
    told = "a network of `sobel` is none of RGB: timm could not open it, nor a run begin with it"
    assert last_words(run_cli("export", "a.safetensors"), 2)[0] == told
    words = ["pretrain", "simclr", photos, "--init", "runs/deepcluster-1", "--epochs", "1", "--device", "cpu"]
    assert last_words(run_cli(*words), 2)[0] == told


def test_a_finished_run_is_not_run_again(run_cli, here):
    done = run_cli("pretrain", "--resume", "last", "--device", "cpu", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["finished"] is True
    assert "was finished already" in done.err


@pytest.mark.parametrize(
    ("words", "code", "error", "hint"),
    [
        ("simclr ./missing", 4, "there is no folder `missing`", "the path is taken from `{here}`"),
        ("simclr ./emty", 4, "there is no folder `emty`", "did you mean `empty`?"),
        ("simclr ./empty", 4, "the folder `empty` is empty", "sslpre reads bmp, gif, jpeg, jpg, png, tif, tiff, webp"),
        (
            "simclr ./papers",
            4,
            "no images in `papers`: found 2 .txt and 1 .dcm",
            "sslpre reads bmp, gif, jpeg, jpg, png, tif, tiff, webp",
        ),
        ("simclr papers/a.txt", 4, "`papers/a.txt` is a file, not a folder", "name the folder that holds the images"),
        (
            "simclr {photos} --backbone resnet5000 --image-size 32",
            2,
            "no timm backbone `resnet5000`",
            "did you mean --backbone resnet50 or --backbone resnet50t or --backbone resnet50s",
        ),
        (
            "simclr {photos} --backbone vit_tiny_patch16_224 --image-size 50",
            2,
            "`vit_tiny_patch16_224` needs sizes divisible by 16, `50` is not",
            "--image-size 48 or --image-size 64",
        ),
        (
            "simclr {photos} --backbone resnet18d --set encoder.stem=small",
            2,
            "`resnet18d` cannot have a small stem",
            "--set encoder.stem=timm; small stems fit resnet101, resnet152, resnet18, resnet34",
        ),
        (
            "simclr {photos} --batch-size 64",
            2,
            "batch size `64` is larger than the data set: 48 images, no step would run",
            "--batch-size 6",
        ),
        (
            "simclr {photos} --set method.temprature=1",
            2,
            "recipe `simclr`: unknown key `method.temprature`, did you mean `temperature`?",
            "sslpre recipes simclr shows a complete recipe",
        ),
        (
            "simclr {photos} --set views.0.copies=3 --backbone test_resnet --batch-size 8",
            2,
            "recipe gives `3` views, simclr takes 2",
            "see copies in [[views]]: --set views.0.copies=2",
        ),
        (
            "simclr {photos} --out papers --backbone test_resnet --batch-size 8",
            2,
            "`papers` exists",
            "name another --out",
        ),
    ],
)
def test_what_bad_input_gets(run_cli, photos, tmp_path, words, code, error, hint):
    (tmp_path / "empty").mkdir()
    (tmp_path / "papers" / "deep").mkdir(parents=True)
    for name in ("a.txt", "b.dcm", "deep/c.txt"):
        (tmp_path / "papers" / name).write_text("no image")
    before = sorted(tmp_path.rglob("*"))
    words = words.format(photos=photos).split()
    done = run_cli("pretrain", *words, "--device", "cpu")
    assert last_words(done, code) == (error, hint.format(here=tmp_path))
    assert len(done.err.splitlines()) == 2
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "runs"] == before, "something is left behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(run_cli, photos):
    done = run_cli("pretrain", "simclr", photos, "--device", "cuda")
    assert last_words(done, 3) == ("no `cuda` device on this machine", "--device auto")


def test_images_that_cannot_be_read(run_cli, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "some")
    (tmp_path / "some" / "amber" / "zero.jpg").write_bytes(b"")
    (tmp_path / "some" / "amber" / "text.png").write_text("not an image")
    whole = (photos / "amber" / "00.jpg").read_bytes()
    (tmp_path / "some" / "birch" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    words = ("pretrain", "simclr", "some", *SMALL, "--set", "train.batch_size=17")  # 51 files, every one is used
    words = (*[word for word in words if word not in ("--batch-size", "8")], "--out")
    done = run_cli(*words, "all", "--max-bad", "0.1", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["bad_images"] == 3
    for name in ("amber/zero.jpg", "amber/text.png", "birch/cut.jpg"):
        assert done.err.count(f"`{name}`") == 1, done.err
    listed = [json.loads(line) for line in (tmp_path / "all" / "bad_images.jsonl").read_text().splitlines()]
    assert len(listed) == 3
    error, _ = last_words(run_cli(*words, "none"), 20)
    assert error.endswith("of 51 images could not be read so far, above `--max-bad 0.01`")
    report = run_cli("probe", "all", "--knn", "--device", "cpu", "--workers", "1")
    assert report.code == 0, "what pretraining passed over, the probe passes over"


def test_checkpoints_that_cannot_be_read(run_cli, here):
    for file in (here / "runs/simclr-1/checkpoints").rglob("*.safetensors"):
        file.write_bytes(b"not a checkpoint")
    for words in (["probe", "--knn"], ["export", "encoder.safetensors"]):
        error, _ = last_words(run_cli(*words), 5)
        assert "no checkpoint of `runs/simclr-1` can be read" in error
    assert not (here / "encoder.safetensors").exists()


def test_an_encoder_that_cannot_be_read(run_cli, photos, tmp_path):
    (tmp_path / "e.safetensors").write_bytes(b"nonsense")
    (tmp_path / "model.pth").write_bytes(b"nonsense")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"nonsense")
    for name, why in (("e.safetensors", "cannot be read"), ("model.pth", "may hold a pickle"), ("bare", "cannot be")):
        error, _ = last_words(run_cli("probe", name, "--data", photos, "--knn"), 5)
        assert why in error
    assert "may hold a pickle" in last_words(run_cli("probe", "model.pth"), 5)[0]
    assert "does not say which images" in last_words(run_cli("probe", "bare"), 2)[0]


def test_probe_without_a_folder(run_cli, here):
    assert last_words(run_cli("probe", "--data", "missing"), 4)[0] == "there is no folder `missing`"


def test_an_export_of_the_wrong_kind(run_cli, here):
    assert last_words(run_cli("export", "encoder.pth"), 2) == (
        "cannot write `.pth` files",
        "sslpre export encoder.safetensors",
    )


def test_what_a_cpu_computes_wrongly_is_refused(run_cli, photos):
    words = [
        "--backbone",
        "test_resnet",
        "--image-size",
        "16",
        "--batch-size",
        "16",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    done = run_cli("pretrain", "rotation", photos, *words, "--precision", "bf16")
    assert done.code == 2 and "strided convolutions of one pixel" in done.err and "--precision fp32" in done.err
    assert run_cli("pretrain", "rotation", photos, *words, "--precision", "fp32").code == 0


def test_points_are_those_of_the_tiles(run_cli, photos):
    """At 64 px this network has none, of tiles of 9 px it has."""
    words = ["--backbone", "resnet18", "--image-size", "64", "--set", "encoder.stem=timm", "--precision", "bf16"]
    done = run_cli(
        "pretrain", "jigsaw", photos, *words, "--set", "method.tile=9", "--batch-size", "8", "--device", "cpu"
    )
    error, hint = last_words(done, 2)
    assert "at 9 px has strided convolutions of one pixel" in error and "--precision fp32" in hint


@pytest.mark.parametrize("more", [["--batch-size", "1"], ["--batch-size", "8", "--set", "train.micro_batch=1"]])
def test_one_image_alone_has_no_deviation(run_cli, photos, more):
    words = "--backbone test_resnet --image-size 32 --epochs 1 --precision fp32 --device cpu --workers 1".split()
    error, hint = last_words(run_cli("pretrain", "inpainting", photos, *words, *more), 2)
    assert error.startswith("one image alone gives batch normalisation") and "--batch-size 2" in hint


def test_a_run_goes_on_with_the_store_that_was_typed(run_cli, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("SSLPRE_CACHE", str(tmp_path / "cache"))
    done = run_cli("pretrain", "simclr", photos, *SMALL, "--epochs", "2", "--store", "disk")
    assert done.code == 0, done.err
    (file,) = (tmp_path / "cache").iterdir()
    assert f"store      on disk, 230 kB, `{file}`" in done.err
    assert "done       runs/simclr-1 was finished already" in run_cli("pretrain", "--resume", "last").err

    run = tmp_path / "runs/simclr-1"
    weights = load_file(run / "encoder/model.safetensors")
    for typed, told in (((), f"on disk, 230 kB, `{file}`: every image is there"), (("--store", "off"), "off")):
        shutil.rmtree(run / "checkpoints/step-00000012")
        done = run_cli("pretrain", "--resume", "last", *typed)
        assert done.code == 0, done.err
        assert f"resume     views eager; store {told}" in done.err
        for name, tensor in load_file(run / "encoder/model.safetensors").items():
            assert torch.equal(tensor, weights[name]), "no store changes a bit"


def test_a_store_that_is_gone_ends_no_run_that_goes_on(run_cli, photos, tmp_path):
    assert run_cli("pack", photos, "here.pack", "--size", "40").code == 0
    assert run_cli("pretrain", "simclr", photos, *SMALL, "--store", "here.pack").code == 0
    (tmp_path / "here.pack").unlink()
    shutil.rmtree(tmp_path / "runs/simclr-1/checkpoints/step-00000006")
    message, _ = last_words(run_cli("pretrain", "--resume", "last", "--store", "here.pack"), 3)
    assert message == f"there is no file `{tmp_path}/here.pack`"
    done = run_cli("pretrain", "--resume", "last")
    assert done.code == 0, done.err
    assert f"resume     {message}\nresume     views eager; store off: every image is read once" in done.err


def test_a_packed_file_is_found_from_anywhere(run_cli, photos, tmp_path, monkeypatch):
    packed = run_cli("pack", photos, "here.pack", "--size", "32", "--json")
    assert packed.code == 0, packed.err
    words = ("pretrain", "simclr", photos, *SMALL, "--set", "data.store_size=32", "--store")
    assert run_cli(*words, "here.pack").code == 0
    state = json.loads((tmp_path / "runs/simclr-1/checkpoints/step-00000006/state.json").read_text())
    assert (state["store"], state["stored"]) == (str(tmp_path / "here.pack"), "disk")
    message, hint = last_words(run_cli("pretrain", "simclr", photos, *SMALL, "--store", "here.pack"), 6)
    assert "holds images of 32 px, not of 40" in message
    assert hint.startswith("--store auto")
    assert last_words(run_cli(*words, "none.pack"), 3)[0].startswith(f"there is no file `{tmp_path}")
