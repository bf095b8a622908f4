"""The recipes that ship: complete, readable, honest about what was measured."""

import re
import tomllib

import pytest

from sslpre import recipe as recipes
from sslpre.methods import methods
from sslpre.shelf import headline, shipped, text

TABLES = {
    "encoder": recipes.EncoderTable,
    "data": recipes.DataTable,
    "optim": recipes.OptimTable,
    "train": recipes.TrainTable,
}
AUTO = {
    "encoder.backbone",
    "encoder.stem",
    "encoder.image_size",
    "data.store_size",
    "optim.lr",
    "optim.warmup",
    "train.epochs",
    "train.batch_size",
    "train.precision",
}


def test_the_three_are_there():
    assert set(shipped()) >= {"simclr", "simclr-imagenet", "simclr-cifar"}


@pytest.mark.parametrize("name", shipped())
def test_every_key_is_spelled_out(name):
    plain = tomllib.loads(text(name))
    for table, model in TABLES.items():
        assert set(plain[table]) == set(model.model_fields) - {"images"}, table
    for view in plain["views"]:
        assert set(view) == set(recipes.View.model_fields)
    assert set(plain["method"]) == {"name", *recipes.signature_model(plain["method"]["name"]).model_fields}
    assert set(plain) == {*TABLES, "views", "method"}


@pytest.mark.parametrize("name", shipped())
def test_it_loads_names_its_method_and_gives_it_its_views(name):
    recipe = recipes.load(name)
    method = recipe.method["name"]
    assert name == method or name.startswith(f"{method}-")
    assert sum(view.copies for view in recipe.views) in methods()[method].views


@pytest.mark.parametrize("name", shipped())
def test_the_header_is_a_lab_note(name):
    head = text(name).partition("\n\n")[0]
    lines = head.splitlines()
    assert all(line.startswith("#") for line in lines)
    assert 20 < len(headline(name)) < 110
    assert re.search(r"https://arxiv\.org/abs/\d{4}\.\d{5}", head)
    assert re.search(r"^# Published: ", head, re.M)
    measured = re.search(r"^# Measured: +(.*)", head, re.M)
    assert measured, "say what we measured, or: not measured yet"
    assert measured[1] == "not measured yet." or re.search(r"\d", measured[1])


@pytest.mark.parametrize("name", shipped())
def test_it_writes_and_reads_back_equal(name, tmp_path):
    recipe = recipes.load(name)
    (tmp_path / "again.toml").write_text(recipes.write(recipe), encoding="utf-8")
    assert recipes.load(str(tmp_path / "again.toml")) == recipe


def test_auto_is_for_any_folder_only():
    def autos(name):
        tables = {table: keys for table, keys in tomllib.loads(text(name)).items() if isinstance(keys, dict)}
        return {f"{table}.{key}" for table, keys in tables.items() for key, value in keys.items() if value == "auto"}

    assert autos("simclr") == autos("rotation") == AUTO
    assert autos("simclr-imagenet") == autos("simclr-cifar") == {"train.precision"}


def test_imagenet_is_the_papers():
    r = recipes.load("simclr-imagenet")
    assert (r.encoder.backbone, r.encoder.image_size, r.encoder.stem) == ("resnet50", 224, "timm")
    assert (r.train.batch_size, r.train.epochs) == (4096, 1000)
    assert r.optim.name == "lars"
    assert r.optim.lr == pytest.approx(0.3 * 4096 / 256)
    assert r.optim.weight_decay == 1e-6
    assert r.optim.warmup * r.train.epochs == 10
    assert r.method == {"name": "simclr", "temperature": 0.1, "hidden": 2048, "output": 128}
    (view,) = r.views
    assert view.crop_scale == (0.08, 1.0)
    assert view.crop_ratio == pytest.approx((3 / 4, 4 / 3))
    assert (view.jitter, view.brightness, view.contrast, view.saturation, view.hue) == (0.8, 0.8, 0.8, 0.8, 0.2)
    assert (view.gray, view.blur, view.blur_kernel, view.blur_sigma) == (0.2, 0.5, 0.1, (0.1, 2.0))


def test_cifar_is_the_authors():
    r = recipes.load("simclr-cifar")
    assert (r.encoder.backbone, r.encoder.stem, r.encoder.image_size, r.data.store_size) == (
        "resnet18",
        "small",
        32,
        32,
    )
    assert (r.train.batch_size, r.train.epochs) == (512, 1000)
    assert r.optim.lr == pytest.approx(1.0 * 512 / 256)
    assert (r.optim.name, r.optim.weight_decay, r.method["temperature"]) == ("lars", 1e-4, 0.5)
    (view,) = r.views
    half = [x / 2 for x in (0.8, 0.8, 0.8, 0.2)]
    assert [view.brightness, view.contrast, view.saturation, view.hue] == half
    assert view.blur == 0
