"""Features as a file: the numbers are the encoder's, the file is whole or not there, and nearest means nearest."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sslpre import embed as room
from sslpre.cli import run as run_words
from sslpre.data.decode import to_canvas
from sslpre.data.find import find
from sslpre.embed import Embedding, near, read, write
from sslpre.encoder import build
from sslpre.errors import SslpreError
from sslpre.probe.features import pooled
from sslpre.views.build import centre

CPU = torch.device("cpu")
SMALL = "--backbone test_resnet --image-size 32 --batch-size 16 --epochs 1 --precision fp32 --device cpu --workers 1"


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    network = build("test_resnet", stem="auto", image_size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
    return network.eval()


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run_words(["pretrain", "rotation", str(photos), *SMALL.split(), "--out", str(out)]) == 0
    return out


def embedded(encoder, folder, stage=None, half=False, max_bad=0.1):
    sources = [find(folder).train]
    return room.embed(encoder, sources, side=40, stage=stage, half=half, device=CPU, workers=1, max_bad=max_bad)


@pytest.mark.parametrize("stage", [None, "layer2", "1"])
def test_each_row_is_what_the_encoder_gives_for_that_image(stage, encoder, photos):
    found = embedded(encoder, photos, stage)
    assert found.paths == sorted(str(path) for path in photos.rglob("*.jpg")) and found.features.dtype == np.float32
    source = find(photos).train
    for row in (0, 7, 47):
        canvas = torch.from_numpy(to_canvas(source.read(row, 40), 40))[None]
        view = centre(canvas.permute(0, 3, 1, 2) if canvas.shape[-1] == 3 else canvas, torch.tensor([[40, 40]]), 32)
        image = (view * 255).round() / 255
        with torch.no_grad():
            if stage is None:
                wanted = encoder(image)
            else:
                number = encoder.stage_names.index(stage) if stage in encoder.stage_names else int(stage)
                wanted = pooled(encoder.model.forward_intermediates(encoder.prepare(image))[1][number])
        assert np.abs(found.features[row] - wanted[0].numpy()).max() < 1e-5


def test_half_is_the_same_rounded(encoder, photos):
    whole, half = embedded(encoder, photos), embedded(encoder, photos, half=True)
    assert half.features.dtype == np.float16 and (half.features == whole.features.astype(np.float16)).all()


def test_what_has_no_number_is_refused(encoder, photos):
    import copy

    large = copy.deepcopy(encoder)
    with torch.no_grad():
        large.std.fill_(1e-9)
    with pytest.raises(SslpreError, match="not finite in float16") as end:
        embedded(large, photos, half=True)
    assert end.value.code == 10 and "--float16" in end.value.hint
    next(large.parameters()).data.fill_(torch.nan)
    with pytest.raises(SslpreError, match=r"features are not finite$") as end:
        embedded(large, photos)
    assert end.value.code == 10


def test_bad_images_are_left_out(encoder, photos, tmp_path, capfd):
    shutil.copytree(photos, tmp_path / "some")
    (tmp_path / "some/birch/03.jpg").write_bytes(b"no image")
    found, whole = embedded(encoder, tmp_path / "some"), embedded(encoder, photos)
    assert len(found.paths) == len(found.features) == 47 and "birch/03.jpg" in capfd.readouterr().err
    assert not any(path.endswith("birch/03.jpg") for path in found.paths)
    rows = [i for i, path in enumerate(whole.paths) if not path.endswith("birch/03.jpg")]
    assert np.abs(found.features - whole.features[rows]).max() < 1e-5
    with pytest.raises(SslpreError) as end:
        embedded(encoder, tmp_path / "some", max_bad=0.01)
    assert end.value.code == 20


ABOUT = {"encoder_hash": "0", "stage": "output", "image_size": 32, "store_size": 40, "odd": "é"}
FEATURES = arrays(
    st.sampled_from([np.float16, np.float32]),
    st.tuples(st.integers(1, 6), st.integers(1, 5)),
    elements=st.floats(-100, 100, width=16),
)


@pytest.mark.parametrize("kind", room.KINDS)
@settings(deadline=None)
@given(features=FEATURES, name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8))
def test_a_file_gives_back_what_was_written(kind, tmp_path_factory, features, name):
    out = tmp_path_factory.mktemp("files") / f"deep/out{kind}"
    paths = [f"{name}/{i}.jpg" for i in range(len(features))]
    write(Embedding(paths, features, ABOUT), out)
    again = read(out)
    assert again.paths == paths and again.about == ABOUT and again.features.dtype == features.dtype
    assert (again.features == features).all()
    others = {out.name, "out.json"} if kind == ".npy" else {out.name}
    assert {path.name for path in out.parent.iterdir()} == others, "nothing half made is left"
    with pytest.raises(SslpreError, match="exists"):
        write(again, out)


class Mark:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", room.KINDS)
def test_damaged_and_hostile_files(kind, tmp_path):
    out = tmp_path / f"out{kind}"
    write(Embedding(["a", "b"], np.ones((2, 3), np.float32), ABOUT), out)
    whole = out.read_bytes()
    for data in (b"", b"[" * 100_000, whole[: len(whole) // 2], whole[:-1]):
        out.write_bytes(data)
        with pytest.raises(SslpreError, match=r"cannot be read|not written by") as end:
            read(out)
        assert end.value.code == 4
    for about in ({}, ABOUT | {"store_size": 10**9}, ABOUT | {"store_size": True}, ABOUT | {"stage": 3}):
        out.unlink()
        room.beside(out).unlink(missing_ok=True)
        write(Embedding(["a", "b"], np.ones((2, 3), np.float32), about), out)
        with pytest.raises(SslpreError, match=r"cannot be read|not written by"):
            read(out)
    out.unlink()
    room.beside(out).unlink(missing_ok=True)
    write(Embedding(["a", "b"], np.array([[1, np.nan], [0, 1]], np.float32), ABOUT), out)
    with pytest.raises(SslpreError, match="not written by"):
        read(out)
    objects = np.empty(2, object)
    objects[:] = [Mark(str(tmp_path / "mark"))] * 2
    with open(out, "wb") as file:
        if kind == ".npz":
            np.savez(file, features=objects, paths=objects, about=objects)
        else:
            np.save(file, objects, allow_pickle=True)
    with pytest.raises(SslpreError):
        read(out)
    assert not (tmp_path / "mark").exists()


def test_ctrl_c_leaves_nothing_half_made(tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(room.os, "replace", stopped)
    for kind in room.KINDS:
        with pytest.raises(KeyboardInterrupt):
            write(Embedding(["a"], np.ones((1, 3), np.float32), ABOUT), tmp_path / f"out{kind}")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_half_made(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(SslpreError, match="cannot be written: no space left") as end:
        write(Embedding(["a"], np.ones((1, 3), np.float32), ABOUT), tmp_path / "out.npz")
    assert end.value.code == 13 and not list(tmp_path.iterdir())


def test_without_pyarrow_it_is_told_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(SslpreError, match="parquet files need pyarrow") as end:
        room.check_out(tmp_path / "out.parquet")
    assert end.value.code == 3 and "pip install" in end.value.hint


def test_near_is_the_largest_cosine(encoder, photos, monkeypatch):
    monkeypatch.setattr(room, "CHUNK", 500)  # several parts
    found = embedded(encoder, photos)
    image = sorted(photos.rglob("*.jpg"))[20]
    told = near(found, encoder, image, 5, CPU, 10**6)
    unit = found.features / np.linalg.norm(found.features, axis=1, keepdims=True)
    cosines = unit @ unit[20]
    wanted = np.argsort(-cosines)[:5]
    assert [path for _, path in told] == [found.paths[i] for i in wanted] and told[0][1] == str(image)
    assert np.abs(np.array([cosine for cosine, _ in told]) - cosines[wanted]).max() < 1e-5
    assert len(near(found, encoder, image, 1000, CPU, 10**6)) == 48


def test_near_wants_the_same_encoder_to_the_bit(encoder, photos):
    import copy

    found, other = embedded(encoder, photos), copy.deepcopy(encoder)
    next(other.parameters()).data[0] += 1e-6
    with pytest.raises(SslpreError, match="the encoder is not the one"):
        near(found, other, next(photos.rglob("*.jpg")), 3, CPU, 10**6)


def test_from_the_command_line(trained, photos, run_cli, tmp_path):
    done = run_cli("embed", photos, "-o", "out.npz", "--encoder", trained, "--device", "cpu", "--float16")
    assert done.code == 0 and "done: `out.npz` holds 96 numbers of each of 48 images" in done.err, done.err
    with np.load(tmp_path / "out.npz") as file:
        assert file["features"].shape == (48, 96) and file["features"].dtype == np.float16
        assert file["paths"].tolist() == sorted(str(path) for path in photos.rglob("*.jpg"))
    image = sorted(photos.rglob("*.jpg"))[3]
    done = run_cli("near", image, "--in", "out.npz", "--count", "2", "--json", "--device", "cpu")
    (first, second) = json.loads(done.out)
    assert done.code == 0 and first["path"] == str(image) and 1 >= first["cosine"] > second["cosine"]
    done = run_cli("near", image, "--in", "out.npz", "--count", "2", "--device", "cpu")
    assert done.out.splitlines()[0].split() == [f"{first['cosine']:.4f}", str(image)]


def test_every_image_is_embedded_and_every_path_opens(trained, photos, run_cli, tmp_path):
    for part in ("train", "test", "val"):
        shutil.copytree(photos, tmp_path / "all" / part)
    some = next(photos.rglob("*.jpg"))
    odd = ["narrow\u202fspace.jpg", "two\nlines.jpg", os.fsdecode(b"no\xfftext.jpg")]
    for name in odd:
        shutil.copy(some, tmp_path / "all" / name)
    done = run_cli("embed", "all", "-o", "out.npy", "--encoder", trained, "--device", "cpu")
    assert done.code == 0, done.err
    paths = json.loads((tmp_path / "out.json").read_text())["paths"]
    assert len(paths) == 3 * 48 + 3
    lost = [path for path in paths if not (tmp_path / path).is_file()]
    assert lost == ["all/no\\xfftext.jpg"], "a name that is no UTF-8 has no place in any of the files"


def test_an_image_that_cannot_be_read_and_a_place_that_cannot_be_written(trained, photos, run_cli, tmp_path):
    assert run_cli("embed", photos, "-o", "out.npz", "--encoder", trained, "--device", "cpu").code == 0
    (tmp_path / "cut.jpg").write_bytes(next(photos.rglob("*.jpg")).read_bytes()[:100])
    done = run_cli("near", "cut.jpg", "--in", "out.npz", "--device", "cpu")
    assert done.code == 4 and "error: `cut.jpg` cannot be read: " in done.err
    done = run_cli("embed", photos, "-o", "cut.jpg/out.npz", "--encoder", trained, "--device", "cpu")
    assert done.code == 3 and "encoder    " not in done.err


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (["embed", "nowhere", "-o", "o.npz"], 4, "no folder"),
        (["embed", ".", "-o", "o.csv"], 2, "`o.csv` ends in none of"),
        (["embed", ".", "-o", "o.npz", "--stage", "layer9"], 2, "no stage `layer9`"),
        (["near", "nix.jpg", "--in", "o.npz"], 4, "there is no image `nix.jpg`"),
        (["near", "{image}", "--in", "o.npz"], 2, "there is no file `o.npz`"),
        (["near", "{image}", "--in", "{image}"], 2, "ends in none of"),
    ],
)
def test_wrong_words(words, code, error, trained, photos, run_cli, tmp_path):
    words = [word.format(image=next(photos.rglob("*.jpg"))) for word in words]
    if words[:2] == ["embed", "."]:
        words = ["embed", str(photos), *words[2:], "--encoder", str(trained), "--device", "cpu"]
    elif words[0] == "embed":
        words += ["--encoder", str(trained)]
    done = run_cli(*words)
    assert done.code == code and error in done.err.splitlines()[-2] and done.err.splitlines()[-1].startswith("hint: ")
    assert not list(tmp_path.iterdir())
