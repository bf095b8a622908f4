"""`sslpre pack`: every image decoded once, in a file that a run finds; killed, full of bad images, typed twice."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslpre.cli import pack as verb
from sslpre.data.find import Folder, find
from sslpre.data.store import file_of, open_store, stored
from sslpre.train.device import pick
from sslpre.train.run import Options, planned


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLPRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows(source, side, wanted="disk"):
    """All rows of the packed file, read by a store that a run would open."""
    store, _ = open_store(wanted, source, side, "cpu", reuse=True, write=False)
    out = np.zeros((len(source), side, side, 3), np.uint8)
    sizes = [store.take(i, row) for i, row in enumerate(out)]
    store.close()
    return out, sizes


def last_words(done, code):
    assert done.code == code, done.err
    assert done.out == ""
    error, hint = done.err.splitlines()[-2:]
    assert error.startswith("error: ") and hint.startswith("hint: ")
    return error.removeprefix("error: "), hint.removeprefix("hint: ")


def test_pack_into_the_cache(run_cli, photos, cache):
    source = find(photos).train
    done = run_cli("pack", photos, "--size", "24", "--workers", "2", "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert summary["path"] == str(file_of(source, 24)) and summary["path"].startswith(str(cache))
    assert (summary["images"], summary["packed"], summary["bad_images"], summary["side"]) == (48, 48, 0, 24)
    assert summary["bytes"] == 48 * 24 * 24 * 3
    assert summary["images_per_s"] == pytest.approx(48 / summary["seconds"])
    pixels, sizes = rows(source, 24)
    for i in range(48):
        canvas, size = stored(source, i, 24)
        assert np.array_equal(pixels[i], canvas) and sizes[i] == size
    lines = done.err.splitlines()
    assert lines[:3] == [f"images     {photos}: 48 images", "size       24 px, 83 kB", f"file       {summary['path']}"]
    assert lines[-1] == f"next: sslpre pretrain simclr {photos} --set data.store_size=24"


def test_the_size_is_that_of_pretrain(run_cli, photos):
    _, found, _, recipe = planned(Options("simclr", photos), pick("auto"))
    done = run_cli("pack", photos)
    assert done.code == 0, done.err
    assert done.out == ""
    assert file_of(found.train, recipe.data.store_size).is_file()
    assert "size       40 px (as `sslpre pretrain simclr` has it here)" in done.err
    assert done.err.splitlines()[-1] == f"next: sslpre pretrain simclr {photos}"


@pytest.mark.skipif(pick("auto").type == "cuda", reason="there is a GPU")
def test_the_size_of_a_run_on_a_gpu_is_told(run_cli, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "large").mkdir()
    for i in range(16):
        pixels = rng.integers(0, 256, (300, 320, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "large" / f"{i}.jpg")
    done = run_cli("pack", "large", "--workers", "1")
    assert done.code == 0, done.err
    lines = done.err.splitlines()
    assert lines[1].startswith("size       128 px (as `sslpre pretrain simclr` has it here)")  # views of 64 px
    assert lines[2] == "           a run on a GPU keeps them at 300 px: sslpre pack large --size 300"  # of 224
    assert "GPU" not in run_cli("pack", "large", "--size", "128").err


def test_without_a_home_a_file_must_be_named(run_cli, photos, monkeypatch, tmp_path):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SSLPRE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    error, hint = last_words(run_cli("pack", photos, "--size", "16"), 3)
    assert (error, hint) == (
        "there is no home folder, and `SSLPRE_CACHE` is not set",
        "name a file: sslpre pack IMAGES OUT",
    )
    assert run_cli("pack", photos, "here.pack", "--size", "16").code == 0
    assert (tmp_path / "here.pack").is_file()


def test_a_second_time_nothing_is_decoded(run_cli, photos, monkeypatch):
    assert run_cli("pack", photos, "--size", "16").code == 0

    def never(self, i, side=None):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(Folder, "read", never)
    done = run_cli("pack", photos, "--size", "16", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["packed"] == 48 and json.loads(done.out)["images_per_s"] == 0
    assert ", 48 images are in it already" in done.err and "all of it was there: 48 images" in done.err


def test_a_file_of_ones_own(run_cli, photos, tmp_path, cache):
    done = run_cli("pack", photos, "my file.pack", "--size", "16")
    assert done.code == 0, done.err
    next_line = done.err.splitlines()[-1].removeprefix("next: ")
    assert shlex.split(next_line)[-4:] == ["--store", "my file.pack", "--set", "data.store_size=16"]
    assert not cache.exists()
    source = find(photos).train
    pixels, _ = rows(source, 16, str(tmp_path / "my file.pack"))
    assert np.array_equal(pixels[7], stored(source, 7, 16)[0])


def test_of_a_split_folder_what_is_trained_on(run_cli, photos, tmp_path):
    shutil.copytree(photos / "amber", tmp_path / "both" / "train" / "amber")
    shutil.copytree(photos / "birch", tmp_path / "both" / "train" / "birch")
    shutil.copytree(photos / "birch", tmp_path / "both" / "test" / "birch")
    done = run_cli("pack", "both", "--size", "16", "--json")
    assert json.loads(done.out)["packed"] == 32
    assert done.err.startswith("images     both/train: 32 images (using train/ only; test/ is left for probe)\n")


def test_bad_images_are_named_and_left_out(run_cli, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "some")
    (tmp_path / "some" / "birch" / "03.jpg").write_bytes(b"no image")
    done = run_cli("pack", "some", "--size", "16", "--max-bad", "0.1", "--json")
    assert done.code == 0, done.err
    assert "skipped `birch/03.jpg`: not a JPEG" in done.err
    assert "1 bad images are not in it" in done.err
    summary = json.loads(done.out)
    assert (summary["images"], summary["packed"], summary["bad_images"]) == (48, 47, 1)
    _, sizes = rows(find(tmp_path / "some").train, 16)
    assert [i for i, size in enumerate(sizes) if size is None] == [16 + 3]
    error, hint = last_words(run_cli("pack", "some", "--size", "16"), 20)
    assert error == "1 of 48 images could not be read so far, above `--max-bad 0.01`"
    assert "--max-bad" in hint


@pytest.mark.parametrize(
    ("words", "error", "hint", "code"),
    [
        ("pack", "IMAGES is missing", "sslpre pack --help shows an example", 2),
        ("pack nowhere", "there is no folder `nowhere`", "", 4),
        ("pack empty", "the folder `empty` is empty", "", 4),
        ("pack photos --size 7", "`--size 7` is not from 8 to 4096", "write --size 256", 2),
        ("pack photos --size x", "`--size x` is not a whole number from 1 on", "write --size 256", 2),
        ("pack photos --workers 0", "`--workers 0` is not a whole number from 1 on", "write --workers 4", 2),
        ("pack photos empty --size 16", "`empty` is a folder", "name a file: empty/images.pack", 2),
        ("pack photos mine.txt --size 16", "`mine.txt` is not a packed file of this version", "name another file", 3),
        ("pack photos a b", "too many words for `sslpre pack`: `b`", "sslpre pack --help", 2),
    ],
)
def test_mistakes(run_cli, photos, tmp_path, words, error, hint, code):
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "mine.txt").write_text("mine")
    told, what = last_words(run_cli(*words.split()), code)
    assert told == error and hint in what
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_file_of_other_images_is_not_overwritten(run_cli, photos, tmp_path):
    assert run_cli("pack", photos / "amber", "one.pack", "--size", "16").code == 0
    before = (tmp_path / "one.pack").read_bytes()
    error, hint = last_words(run_cli("pack", photos / "birch", "one.pack", "--size", "16"), 6)
    assert "holds other images" in error and "name another file" in hint
    assert (tmp_path / "one.pack").read_bytes() == before


def test_without_a_terminal_a_line_now_and_then(run_cli, photos, monkeypatch):
    monkeypatch.setattr(verb, "QUIET", 0.0)
    done = run_cli("pack", photos, "--size", "16", "--workers", "1")
    lines = [line for line in done.err.splitlines() if line.startswith("image ")]
    assert [line.split()[1] for line in lines] == ["16/48", "32/48", "48/48"]
    assert "images/s" in lines[0] and "left" in lines[0]


SLOW = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are deaf to it
    from sslpre.data.find import Folder
    read = Folder.read
    def slow(self, i, side=None):
        if i == 33:
            print("here", flush=True)
            time.sleep(PAUSE)
        return read(self, i, side)
    Folder.read = slow
    from sslpre.cli import main
    main(sys.argv[1:])
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_it_goes_on_after_being_stopped(run_cli, photos, tmp_path, child, how):
    script = textwrap.dedent(SLOW).replace("PAUSE", "1" if how == signal.SIGINT else "60")
    words = ["pack", str(photos), "some.pack", "--size", "16", "--workers", "1"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words],
        cwd=tmp_path,
        env={**os.environ, **child},
        stdout=pipe,
        stderr=pipe,
        text=True,
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    held = 33
    if how == signal.SIGINT:
        assert process.returncode == 130, err
        error, hint = err.splitlines()[-2:]
        held = int(error.removeprefix("error: interrupted: ").split()[0])
        assert error == f"error: interrupted: {held} of 48 images are in `some.pack`" and 33 <= held < 48
        assert hint == f"hint: the same command goes on: sslpre pack {photos} some.pack --size 16"
    done = run_cli(*words, "--json")
    assert done.code == 0, done.err
    assert f", {held} images are in it already" in done.err
    assert json.loads(done.out)["packed"] == 48
    source = find(photos).train
    pixels, _ = rows(source, 16, str(tmp_path / "some.pack"))
    assert all(np.array_equal(pixels[i], stored(source, i, 16)[0]) for i in range(48))
