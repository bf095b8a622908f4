"""Files that somebody else has made: whatever stands in them, nothing of it runs, and one line says what is wrong."""

import json
import os
import pickle
import shutil
import struct

import numpy as np
import pytest
import safetensors.torch
import torch

from sslpre.cli import run as run_words

SMALL = "--backbone test_resnet --image-size 32 --batch-size 16 --epochs 1 --precision fp32 --device cpu --workers 1"
DEEP = b"[" * 200_000


class Mark:
    """Unpickled, it leaves a mark."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickles(mark) -> dict[str, bytes]:
    """The same payload as a bare pickle, a torch file and an array of objects."""
    import io

    zipped, array = io.BytesIO(), io.BytesIO()
    torch.save({"model": Mark(mark)}, zipped)
    objects = np.empty(1, object)
    objects[0] = Mark(mark)
    np.save(array, objects, allow_pickle=True)
    return {"pickle": pickle.dumps(Mark(mark)), "torch": zipped.getvalue(), "npy": array.getvalue()}


def lying(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


LIES = {
    "a header of 2^63 bytes": lying(b"{}", length=2**63),
    "a header of 90 MB that is not there": lying(b"{}", length=90_000_000),
    "overlapping tensors": lying({"a": tensor(0, 4), "b": tensor(2, 6)}, bytes(8)),
    "a tensor beyond the end": lying({"a": tensor(0, 4000, (1000,))}, bytes(4)),
    "a shape of 2^62": lying({"a": tensor(0, 4, (2**31, 2**31))}, bytes(4)),
    "a negative size": lying(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', bytes(4)),
    "a deep header": lying(DEEP),
    "no text": lying(b"\xff\xfe\x00"),
    "empty": b"",
    "noise": bytes(range(256)) * 8,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos):
    place = tmp_path_factory.mktemp("trained")
    before = os.getcwd()
    os.chdir(place)
    try:
        assert run_words(["pretrain", "rotation", str(photos), *SMALL.split(), "--epochs", "2", "--out", "r"]) == 0
        assert run_words(["export", "e.safetensors", "--run", "r"]) == 0
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def here(trained, tmp_path, run_cli):
    shutil.copytree(trained / "r", tmp_path / "r")
    shutil.rmtree(tmp_path / "r/encoder")  # so that a resume has something to do
    shutil.copy(trained / "e.safetensors", tmp_path)
    return tmp_path


def calm(done, mark=None, codes=(2, 3, 4, 5, 6, 10)):
    """It ended with one of these codes, two lines and no mark."""
    assert done.code in codes, (done.code, done.err)
    assert "Traceback" not in done.err and "internal" not in done.err, done.err
    if done.code:
        error, hint = done.err.splitlines()[-2:]
        assert error.startswith("error: ") and hint.startswith("hint: ")
    assert mark is None or not mark.exists()


COMMANDS = (
    ["pretrain", "--resume", "r", "--device", "cpu", "--workers", "1"],
    ["export", "out.safetensors", "--run", "r"],
)


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json"])
def test_checkpoints(name, here, run_cli):
    """With a manifest that agrees with the lie, so that no checksum stands before the reader."""
    import hashlib

    mark = here / "mark"
    payloads = {**pickles(mark), **LIES, "deep": DEEP, "null": b"null", "list": b"[1]", "nan": b'{"step": NaN}'}
    for what, data in payloads.items():
        for folder in (here / "r/checkpoints").glob("step-*"):
            (folder / name).write_bytes(data)
            if name != "MANIFEST.json":
                manifest = json.loads((folder / "MANIFEST.json").read_text())
                manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                (folder / "MANIFEST.json").write_text(json.dumps(manifest))
        for words in COMMANDS[: 1 if what in LIES else 2]:
            calm(run_cli(*words), mark, (5, 6))


@pytest.mark.parametrize(
    "name", ["recipe.toml", "data.json", "metrics.jsonl", "bad_images.jsonl", "images.safetensors"]
)
def test_other_files_of_a_run(name, here, run_cli):
    mark = here / "mark"
    good = (here / "r" / name).read_bytes() if (here / "r" / name).exists() else None
    for data in (
        *pickles(mark).values(),
        LIES["a header of 2^63 bytes"],
        DEEP,
        b"null\n",
        b'{"step": "x"}\n',
        b"[1]\n",
    ):
        (here / "r" / name).write_bytes(data)
        calm(run_cli(*COMMANDS[0]), mark, (0, 2, 4, 5, 6))
        if (here / "r/encoder").exists():
            shutil.rmtree(here / "r/encoder")
    if good is not None:
        (here / "r" / name).write_bytes(good)


def test_weights_to_start_from(here, run_cli, photos):
    mark = here / "mark"
    words = ["pretrain", "rotation", photos, *SMALL.split(), "--out", "new", "--init"]
    for data in (*pickles(mark).values(), *LIES.values()):
        (here / "w.safetensors").write_bytes(data)
        calm(run_cli(*words, "w.safetensors"), mark, (5,))
        calm(run_cli("probe", "w.safetensors", "--data", photos, "--knn", "--device", "cpu"), mark, (5,))
        assert not (here / "new").exists()
    for name, data in pickles(mark).items():
        (here / f"w.{name}.pth").write_bytes(data)
        calm(run_cli(*words, f"w.{name}.pth"), mark, (5,))
        calm(run_cli("import", f"w.{name}.pth", "-o", "i.safetensors"), mark, (2, 5))
        assert not (here / "i.safetensors").exists()


def test_weights_that_are_not_finite(here, run_cli, photos):
    with safetensors.safe_open(here / "e.safetensors", "pt") as file:
        facts = file.metadata()
    tensors = safetensors.torch.load_file(here / "e.safetensors")
    name = next(name for name, t in tensors.items() if t.ndim == 4)
    tensors[name].view(-1)[7] = float("nan")
    safetensors.torch.save_file(tensors, here / "n.safetensors", facts)
    calm(run_cli("pretrain", "rotation", photos, *SMALL.split(), "--init", "n.safetensors"), codes=(10,))
    calm(run_cli("probe", "n.safetensors", "--data", photos, "--knn", "--device", "cpu"), codes=(10,))


def test_a_checkpoint_of_nan_with_a_manifest_that_agrees(here, run_cli):
    import hashlib

    for folder in (here / "r/checkpoints").glob("step-*"):
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        next(t for t in tensors.values() if t.ndim == 4).view(-1)[0] = float("nan")
        data = safetensors.torch.save(tensors)
        (folder / "model.safetensors").write_bytes(data)
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        manifest["model.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    for words in COMMANDS:
        done = run_cli(*words)
        calm(done, codes=(5,))
        assert "is not finite" in done.err


@pytest.mark.parametrize("what", ["checkpoints", "encoder", "metrics.jsonl", "bad_images.jsonl", "checkpoints/step-9"])
def test_a_run_directory_with_links_out_of_it(what, here, run_cli):
    outside = here / "outside"
    (outside / "step-00000001").mkdir(parents=True)
    (outside / ".tmp-1").mkdir()
    (outside / "precious").write_text("kept")
    link = here / "r" / what
    if link.is_dir():
        shutil.rmtree(link)
    elif link.exists():
        link.unlink()
    link.symlink_to(outside if "." not in what else outside / "precious")
    done = run_cli(*COMMANDS[0])
    calm(done, codes=(6,))
    assert f"`{link.relative_to(here)}` leads out of the run" in done.err
    assert (outside / "precious").read_text() == "kept" and len(list(outside.iterdir())) == 3


@pytest.mark.parametrize(
    "setting",
    [
        "train.epochs=100000000000000000000", "train.batch_size=9223372036854775807", "encoder.image_size=2147483647",
        "data.store_size=2147483647", "optim.lr=1e400", "optim.lr=-1", "train.seed=-1", "views.0.copies=1000000",
        "views.0.size=1000000000", "views.0.blur_kernel=1e9", "optim.steps=[nan]", "data.max_bad=nan",
        "train.seed=1e30",
        'encoder.backbone="../../etc/passwd"', 'encoder.backbone="hf_hub:evil/x"', 'method.name="os.system"',
        'views.0.kornia=[{name="__import__"}]', "encoder.model_args={pretrained_cfg={url=1}}",
        "encoder.mean=[1e300,0,0]", "encoder.std=[0,0,0]",
    ],
)  # fmt: skip
def test_absurd_settings(setting, run_cli, photos, tmp_path):
    begin = "encoder.backbone=test_resnet encoder.image_size=32 train.batch_size=16 train.epochs=1 train.precision=fp32"
    words = [word for one in (*begin.split(), setting) for word in ("--set", one)]
    done = run_cli("pretrain", "rotation", photos, *words, "--device", "cpu", "--workers", "1")
    calm(done, codes=(0, 2, 3, 12) if "seed" in setting else (2, 3, 12))
