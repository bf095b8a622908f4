"""The recipe language: what is read, what is refused and in which words; writing gives the same recipe back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sslpre import recipe as recipes
from sslpre.errors import SslpreError
from sslpre.recipe import Recipe


def refused(*settings, name="simclr"):
    with pytest.raises(SslpreError) as caught:
        recipes.load(name, settings)
    assert caught.value.code == 2 and caught.value.hint and "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    "setting, words",
    [
        ("method.temprature=0.2", "unknown key `method.temprature`, did you mean `temperature`?"),
        ("method.temperature=0", "`method.temperature = 0`: input should be greater than 0"),
        ("method.temperature=warm", "`method.temperature = warm`: input should be a valid number"),
        ("method.name=simclear", "no method `simclear`"),
        ("optim.learning_rate=1", "unknown key `optim.learning_rate`"),
        ("optim.name=adam", "`optim.name = adam`"),
        ("optim.lr=-1", "optim.lr"),
        ("optim.lr=nan", "optim.lr"),
        ("train.epochs=0", "train.epochs"),
        ("train.epochs=1.5", "train.epochs"),
        ("train.epochs='1'", "`train.epochs = 1`: input should be a valid integer or 'auto'"),
        ("train.batch_size=true", "`train.batch_size = True`: input should be a valid integer"),
        ("method.temperature=true", "method.temperature"),
        ('method.name=["simclr"]', "no method"),
        ("encoder.mean=[0.5]", "encoder.mean"),
        ("trains.epochs=1", "unknown key `trains`, did you mean `train`?"),
        ("views.0.croop=1", "unknown key `views.0.croop`"),
        ("views.0.crop_scale=[0.9, 0.1]", "`crop_scale` must rise, not `[0.9, 0.1]`"),
        ("views.9.gray=1", "no table `views.9.gray`: there are 1 [[views]]"),
        ("views.gray=1", "cannot set `views.gray`"),
        ("encoder.image_size.x=1", "cannot set `encoder.image_size.x`"),
        ("temperature=1", "cannot read `--set temperature=1`"),
        ("method.temperature", "cannot read `--set method.temperature`"),
    ],
)
def test_mistakes_are_named(setting, words):
    assert words in refused(setting)


def test_all_mistakes_at_once():
    message = refused("method.temprature=1", "optim.lr=-1", "train.epochs=0")
    assert message.startswith("3 mistakes in recipe `simclr`: ")
    assert all(word in message for word in ("temprature", "optim.lr", "train.epochs"))


def test_unknown_recipe_and_file(tmp_path):
    with pytest.raises(SslpreError, match="no recipe `simclear`") as caught:
        recipes.load("simclear")
    assert caught.value.hint == "sslpre pretrain simclr ./images"
    with pytest.raises(SslpreError, match="no recipe file"):
        recipes.load(str(tmp_path / "x.toml"))
    (tmp_path / "x.toml").write_text("[method\n")
    with pytest.raises(SslpreError, match="is not TOML"):
        recipes.load(str(tmp_path / "x.toml"))
    (tmp_path / "x.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(SslpreError, match="cannot be read"):
        recipes.load(str(tmp_path / "x.toml"))
    (tmp_path / "x.toml").write_text('train = 5\n[method]\nname = "simclr"\n')
    with pytest.raises(SslpreError, match="`train = 5`"):
        recipes.load(str(tmp_path / "x.toml"), (), {"train": {"epochs": 3}})


def test_settings_and_flags():
    r = recipes.load(
        "simclr", ["method.temperature=0.2", "encoder.backbone=resnet18", "views.0.gray=0"], {"train": {"epochs": 3}}
    )
    assert (
        r.method["temperature"] == 0.2
        and r.encoder.backbone == "resnet18"
        and r.views[0].gray == 0
        and r.train.epochs == 3
    )


def test_a_methods_defaults_stand_in_its_signature(tmp_path):
    (tmp_path / "bare.toml").write_text('[method]\nname = "simclr"\n[[views]]\ncopies = 2\n')
    assert recipes.load(str(tmp_path / "bare.toml")).method == {
        "name": "simclr",
        "temperature": 0.5,
        "hidden": 0,
        "output": 128,
    }


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    images=words,
    backbone=words,
    lr=st.floats(1e-12, 1e12),
    scale=st.tuples(st.floats(1e-6, 0.5), st.floats(0.5, 1.0)),
    entry=st.dictionaries(
        words, st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), words), max_size=4
    ),
)
def test_written_and_read_back_is_the_same(tmp_path_factory, images, backbone, lr, scale, entry):
    view = {"copies": 2, "crop_scale": scale, "kornia": [{"name": "RandomSolarize", **entry}]}
    plain = {
        "method": {"name": "simclr"},
        "encoder": {"backbone": backbone},
        "data": {"images": images},
        "views": [view],
        "optim": {"lr": lr},
    }
    recipe = recipes.parse(plain, "made up")
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(recipes.write(recipe, "a header\nof two lines"), encoding="utf-8")
    assert recipes.load(str(path)) == recipe


def test_recipes_are_frozen():
    recipe = recipes.load("simclr")
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.epochs = 3
    assert isinstance(recipe.edit(train={"epochs": 3}), Recipe) and recipe.train.epochs == "auto"
