"""Anything may be typed and anything may lie in a file: an answer or one line of error, never a traceback or a hang."""

import importlib.util
import random
import resource
import string
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sslpre import recipe as recipes
from sslpre.cli import run as run_words
from sslpre.errors import SslpreError

QUIET = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
# what a recipe may hold, likely and not
NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 1e308, 1e-308]))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.one_of(NUMBERS, TEXT, st.booleans()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
TABLES = {table: list(keys) for table, keys in recipes.load("simclr").model_dump().items() if table != "views"}
KEYS = [f"{table}.{key}" for table, keys in TABLES.items() for key in keys]
KEYS += [f"views.0.{key}" for key in recipes.load("simclr").views[0].model_dump()]


@pytest.fixture(scope="module")
def fuzz():
    path = Path(__file__).parent / "benchmarks/fuzz.py"
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location("fuzz", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(path.parent))


def test_two_thousand_damaged_images(fuzz, tmp_path, capfd):
    """Each is decoded or refused with a reason; memory stays bounded. `benchmarks/fuzz.py` does 50,000."""
    before, begun, outcomes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic(), {}
    for number, data in enumerate(fuzz.files(2000, seed=1)):
        (tmp_path / "image").write_bytes(data)
        what = fuzz.meets(tmp_path / "image")
        assert what in ("decoded", "refused"), (number, what)
        outcomes[what] = outcomes.get(what, 0) + 1
    assert min(outcomes.values()) > 100, "else nothing is damaged, or everything is beyond repair"
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 1 << 30 and time.monotonic() - begun < 300


def one_line(error):
    assert "\n" not in error.message and "\n" not in error.hint and error.message and error.code in (2, 4, 5)


@QUIET
@given(st.dictionaries(st.sampled_from([*TABLES, "views", "extra"]), VALUES, max_size=3), TEXT)
def test_recipes_of_anything(tables, name):
    try:
        recipes.parse({"method": {"name": "simclr"}} | tables, name)
    except SslpreError as error:
        one_line(error)


@QUIET
@given(st.sampled_from(KEYS), VALUES)
def test_settings_of_anything(key, value):
    for setting in (f"{key}={value!r}", f"{key}={value}", f"{key}.{value}", f"{value}={key}"):
        try:
            recipes.load("simclr", [setting])
        except SslpreError as error:
            one_line(error)


@QUIET
@given(st.binary(max_size=300) | TEXT.map(str.encode))
def test_recipe_files_of_anything(tmp_path, data):
    good = Path(__file__).parents[1].joinpath("recipes/simclr.toml").read_bytes()
    chance = random.Random(data)
    at = chance.randrange(len(good))
    for text in (data, good[:at] + data + good[at:], good[:at]):
        (tmp_path / "r.toml").write_bytes(text)
        try:
            recipes.load(str(tmp_path / "r.toml"))
        except SslpreError as error:
            one_line(error)


VERBS = "pretrain probe export embed near import pack preview replay bench recipes".split()
FLAGS = "--set --backbone --epochs --lr --out --resume --device --workers --json --linear --knn --data --run --stage -o"
# nothing among these is a recipe together with images, so that no run begins
WORDS = [
    *VERBS,
    *FLAGS.split(),
    "--help",
    "--version",
    "--",
    "-",
    "",
    "x",
    "-1",
    "1e9",
    "é",
    "a=b",
    "../..",
    "\x00",
    "~",
]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(string.printable, max_size=8)), max_size=6))
def test_command_lines_of_anything(tmp_path, monkeypatch, capfd, words):
    monkeypatch.chdir(tmp_path)
    if any(word in recipes_known() for word in words):
        return
    capfd.readouterr()
    code = run_words(words)
    out, err = capfd.readouterr()
    assert "Traceback" not in err and "internal" not in err, (words, err)
    assert code in (0, 2, 3, 4, 5), (words, code, err)
    if code:
        assert err.splitlines()[-2].startswith("error: ") and err.splitlines()[-1].startswith("hint: "), (words, err)
    assert not list(tmp_path.iterdir()), (words, out)


def recipes_known():
    from sslpre.shelf import names

    return names()


def test_damaged_checkpoints_with_manifests_that_agree(fuzz, tmp_path, capfd):
    """Each file of a checkpoint, 300 times each: read as it is, or refused as what it is; never anything else."""
    import hashlib
    import json

    import torch

    from sslpre.train import checkpoint

    tensors = {"a": torch.randn(4, 5), "b": torch.arange(3), "c": torch.zeros(0)}
    state = {"step": 3, "seconds": 1.0, "data": "x", "recipe": "y", "images": 4, "classes": 0}
    folder, chance, outcomes = checkpoint.save(tmp_path, tensors, tensors, state), random.Random(0), set()
    for name in (*checkpoint.FILES, "MANIFEST.json"):
        whole, manifest = (folder / name).read_bytes(), (folder / "MANIFEST.json").read_bytes()
        for _ in range(300):
            data = fuzz.damaged({"it": whole}, chance)
            (folder / name).write_bytes(data)
            if name != "MANIFEST.json":
                told = json.loads(manifest)
                told[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                (folder / "MANIFEST.json").write_text(json.dumps(told))
            try:
                saved = checkpoint.load(folder)
                assert isinstance(saved.state, dict)
                checkpoint.complete(tmp_path)
                checkpoint.refuse_incomplete(saved)
                outcomes.add((name, "read"))
            except SslpreError as error:
                assert error.code == 5 and "\n" not in error.message
                outcomes.add((name, "refused"))
        (folder / name).write_bytes(whole)
        (folder / "MANIFEST.json").write_bytes(manifest)
    assert {(name, "refused") for name in (*checkpoint.FILES, "MANIFEST.json")} <= outcomes
    assert ("model.safetensors", "read") in outcomes
