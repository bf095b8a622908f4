"""`sslpre preview`: the sheet shows what training shows, with the weights that it names, and is written whole."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sslpre import preview as module
from sslpre.cli import run as run_words
from sslpre.errors import SslpreError
from sslpre.methods import methods
from sslpre.objective import Objective, Picture
from sslpre.preview import even, of_recipe, of_run, pictures, sentence
from sslpre.preview.sheet import (
    ASIDE,
    GAP,
    LEAST,
    MARGIN,
    NARROWEST,
    TITLE,
    draw,
    font,
    needed,
    resized,
    wrapped,
    write,
)
from sslpre.train import checkpoint, step
from sslpre.train.run import Options

SMALL = "--backbone test_resnet --image-size 32".split()
TRAIN = [*SMALL, *"--batch-size 8 --epochs 1 --precision fp32 --device cpu --workers 1".split()]
TINY = {"encoder": {"backbone": "test_resnet", "image_size": 32}, "train": {"batch_size": 8, "epochs": 2}}


class Groups(Objective):
    """Learns nothing; keeps how bright each image is, and shows the images by that: dark, middling, bright."""

    def __init__(self, setup, groups: int = 3):
        super().__init__()
        if setup.images < groups:
            raise SslpreError(f"`{setup.images}` images cannot be in `{groups}` groups", "fewer")
        self.encoder = setup.encoder()
        self.register_buffer("bright", torch.full((setup.images,), -1.0))
        self.register_buffer("looks", torch.tensor(0))

    def loss(self, batch):
        raise AssertionError("a preview takes no step")

    def epoch_start(self, epoch):
        self.bright.copy_(epoch.every_image(lambda x: x.mean((1, 2, 3))))
        self.looks += 1
        return []

    def pictures(self, batch):
        assert not torch.is_grad_enabled() and not self.training
        rows = {}
        for image, bright in zip(batch.views[0], self.bright[batch.index].tolist(), strict=True):
            rows.setdefault(round(20 * bright), []).append(Picture(f"brightness {round(20 * bright)}", image))
        return list(rows.values())


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """A recipe file of a method that looks at every image and groups them."""
    monkeypatch.setitem(methods().loaded, "groups", Groups)
    path = tmp_path / "groups.toml"
    path.write_text('[method]\nname = "groups"\n')
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos):
    """A directory with one finished run, `runs/rotation-1`. Not to be written to: copy it."""
    place = tmp_path_factory.mktemp("trained")
    before = os.getcwd()
    os.chdir(place)
    try:
        assert run_words(["pretrain", "rotation", str(photos), *TRAIN]) == 0
    finally:
        os.chdir(before)
    return place / "runs"


@pytest.fixture
def here(trained, tmp_path, run_cli):
    """The current directory holds a copy of the run, and nothing else."""
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path


CPU = torch.device("cpu")


def options(recipe, images, **overrides):
    return Options(str(recipe), images, (), {**TINY, **overrides}, device="cpu")


def opened(path):
    with Image.open(path) as image:
        image.load()
        return image


def told(done, code=2):
    assert done.code == code, done.err
    assert done.out == ""
    error, hint = done.err.splitlines()[-2:]
    return error.removeprefix("error: "), hint.removeprefix("hint: ")


def test_a_sheet_of_a_recipe(run_cli, photos, tmp_path):
    done = run_cli("preview", "rotation", photos, "new/sheet.png", *SMALL)
    assert done.code == 0, done.err
    sheet = opened(tmp_path / "new" / "sheet.png")
    size = f"{sheet.width} × {sheet.height} px"
    assert done.err == f"done: `new/sheet.png`: 8 rows, {size}, weights: fresh, nothing is learned yet\n"
    assert done.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["new"], "no run is left behind"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.png"]
    assert sheet.format == "PNG" and sheet.mode == "RGB"


def test_without_images_it_is_the_sample_set(run_cli, tmp_path):
    done = run_cli("preview", "simclr", "a.PNG", *SMALL, "--rows", "1")
    assert done.err.startswith("done: `a.PNG`: 1 row, ")
    two = run_cli("preview", "simclr", "b.png", *SMALL, "--rows", "2", "--set", "train.seed=1")
    assert two.err.startswith("done: `b.png`: 2 rows, ")
    assert opened(tmp_path / "b.png").height > opened(tmp_path / "a.PNG").height


def test_the_views_are_those_of_the_first_epoch(photos, tmp_path):
    subject = of_recipe(tmp_path, options("simclr", photos), CPU)
    shown = pictures(subject, 48)
    run = subject.run
    assert len(shown) == 48 == len(run.stream.source)
    for pixels in run.stream.epoch(0):
        training = next(step.micro_batches(run, pixels, 0, 0.0))
        for at, i in enumerate(pixels.index.tolist()):
            for view, picture in zip(training.views, shown[i], strict=True):
                assert torch.equal(view[at], picture.image)


def test_few_images_are_drawn_from_all_over():
    assert even(100, 3).tolist() == [0, 50, 99] and even(2, 8).tolist() == [0, 1] and even(9, 1).tolist() == [0]
    for total in range(1, 40):
        for count in range(1, 50):
            rows = even(total, count)
            assert len(rows) == len(set(rows.tolist())) == min(total, count) and rows.max() < total


def test_what_the_lines_say(photos, tmp_path):
    subject = of_recipe(tmp_path, options("simclr", photos), CPU)
    assert subject.title == "recipe simclr"
    assert subject.about == (
        f"images: {photos}, 48 of them",
        "network: test_resnet, 0.37 M weights, 2 views of 32 px",
        "weights: fresh, nothing is learned yet",
    )
    assert sentence(subject.run.objective) == (
        "SimCLR: two views of an image are each other's positives, every other view of the batch is a negative."
    )
    local = type("Local", (Objective,), {"__doc__": "One\nsentence.\n\nMore.", "__module__": "builtins_of_none"})
    module.sys.modules["builtins_of_none"] = type(module.sys)("builtins_of_none")
    try:
        assert sentence(local()) == "One sentence."
    finally:
        del module.sys.modules["builtins_of_none"]


def test_weights_of_a_start_are_named(here, photos, tmp_path):
    found = of_recipe(tmp_path, options("rotation", photos, encoder={**TINY["encoder"], "init": "rotation-1"}), CPU)
    stored = checkpoint.newest(here / "runs" / "rotation-1").model
    assert found.about[-1] == f"weights: those of --init {here}/runs/rotation-1"
    own = {name: tensor for name, tensor in found.run.objective.state_dict().items() if name.startswith("encoder.")}
    assert own and all(torch.equal(tensor, stored[name]) for name, tensor in own.items())


@pytest.mark.parametrize("word", ["runs/rotation-1", "rotation-1", "last"])
def test_a_run_is_shown_with_its_own_weights(run_cli, here, word):
    done = run_cli("preview", word, "sheet.png", "--rows", "2")
    assert done.code == 0, done.err
    assert done.err.endswith(" px, weights: step 6 of 6\n")


def test_a_runs_weights_and_place(here, photos, tmp_path):
    run = Path("runs/rotation-1")
    subject = of_run(tmp_path, run, None, CPU)
    stored = checkpoint.newest(run).model
    own = checkpoint.model_state(subject.run.objective)
    assert own.keys() == stored.keys() and all(torch.equal(own[name], stored[name]) for name in own)
    assert subject.title == "run runs/rotation-1" and subject.about[-1] == "weights: step 6 of 6"
    assert (subject.epoch, subject.progress) == (1, 1.0)
    assert subject.about[0] == f"images: {photos}, 48 of them"
    assert of_run(tmp_path, run, photos / "amber", CPU).about[0].endswith("/amber, 16 of them, not those of the run")


def test_a_run_without_a_checkpoint(run_cli, here):
    shutil.rmtree(here / "runs" / "rotation-1" / "checkpoints")
    assert told(run_cli("preview", "rotation-1", "sheet.png"), 5) == (
        "no complete checkpoint in `runs/rotation-1`",
        "sslpre pretrain --resume runs/rotation-1",
    )


def test_a_method_that_looks_at_every_image_has_looked(groups, photos, tmp_path, monkeypatch):
    whole = of_recipe(tmp_path, options(groups, photos), CPU)
    assert whole.run.objective.bright.min() > 0 and len(whole.run.objective.bright) == 48
    assert not [line for line in whole.about if "taken from" in line]
    monkeypatch.setattr(module, "LOOK", 20 * 32**2)
    monkeypatch.setattr(module, "FEWEST", 4)
    part = of_recipe(tmp_path, options(groups, photos), CPU)
    assert part.about[2] == "what the method takes from all images was taken from 20 of them"
    assert torch.equal(part.run.objective.bright, whole.run.objective.bright[torch.from_numpy(even(48, 20))])
    assert len(pictures(part, 8)) <= 8
    with pytest.raises(SslpreError) as error:
        of_recipe(tmp_path, options(groups, photos, method={"name": "groups", "groups": 30}), CPU)
    told = "of 48 images a preview takes 20 to look at: `20` images cannot be in `30` groups"
    assert (error.value.message, error.value.hint) == (told, "fewer")
    monkeypatch.setattr(module, "FEWEST", 64)
    with pytest.raises(SslpreError) as error:
        of_recipe(tmp_path, options(groups, photos, method={"name": "groups", "groups": 49}), CPU)
    assert error.value.message == "`48` images cannot be in `49` groups"


def test_groups_are_made_of_many_images(groups, photos, tmp_path):
    subject = of_recipe(tmp_path, options(groups, photos), CPU)
    shown = pictures(subject, 2)
    assert len(shown) == 2 and sum(map(len, shown)) > 8, "of two images there would be two groups of one"
    assert all(len({picture.title for picture in row}) == 1 for row in shown)
    every = pictures(subject, 8)
    assert sum(map(len, every)) == 48
    plain, mixed = (made(module.batch(subject, 48)) for made in (lambda whole: whole, module.shuffled))
    assert sorted(mixed.index.tolist()) == plain.index.tolist() != mixed.index.tolist()
    assert torch.equal(mixed.views[0], plain.views[0][mixed.index])
    assert torch.equal(every[0][0].image, mixed.views[0][0]), "the first of a group is not that of the first folder"


def keep(run, folder, taken):
    """Make a run directory of `run`, as if `taken` steps had been taken."""
    from sslpre import recipe as recipes

    folder.mkdir()
    (folder / "recipe.toml").write_text(recipes.write(run.recipe))
    state = {"step": taken, "images": len(run.stream.source), "classes": 0, "data": run.facts["data"]}
    checkpoint.save(folder / "checkpoints", checkpoint.model_state(run.objective), {}, state)


def test_what_a_run_keeps_of_its_images_is_shown_for_them_and_found_anew_for_others(groups, photos, tmp_path):
    (tmp_path / "work").mkdir()
    run = of_recipe(tmp_path / "work", options(groups, photos), CPU).run
    run.objective.bright.copy_(torch.arange(48.0))
    keep(run, tmp_path / "run", 6)
    own = of_run(tmp_path / "work", tmp_path / "run", None, CPU)
    assert torch.equal(own.run.objective.bright, torch.arange(48.0)) and own.run.objective.looks == 1
    other = of_run(tmp_path / "work", tmp_path / "run", photos / "amber", CPU)
    assert other.run.objective.bright.shape == (16,) and 0 < other.run.objective.bright.max() < 1
    assert other.run.objective.looks == 2, "what has no row for each image is the run's"
    weights = [subject.run.objective.encoder.state_dict() for subject in (own, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    keep(run, tmp_path / "begun", 0)
    begun = of_run(tmp_path / "work", tmp_path / "begun", None, CPU)
    assert begun.run.objective.bright.max() < 1, "before its first step a run has not looked"


def test_images_that_are_not_the_runs_are_clustered_even_in_an_epoch_that_would_not(photos, tmp_path):
    few = {"name": "deepcluster", "clusters": 4, "reassign": 50}
    words = options("deepcluster", photos / "amber", method=few)
    (tmp_path / "work").mkdir()
    keep(of_recipe(tmp_path / "work", words, CPU).run, tmp_path / "run", 4)
    objective = of_run(tmp_path / "work", tmp_path / "run", photos, CPU).run.objective
    unasked = torch.arange(48) % 4
    assert len(objective.assignments) == 48 and not torch.equal(objective.assignments, unasked)


def test_bad_images_are_named_and_left_out(run_cli, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "some")
    (tmp_path / "some" / "amber" / "00.jpg").write_bytes(b"no image")
    done = run_cli("preview", "simclr", "some", "sheet.png", *SMALL)
    assert done.code == 0, done.err
    assert done.err.splitlines()[0].startswith("skipped `amber/00.jpg`: ")
    assert done.err.splitlines()[-1].startswith("done: `sheet.png`: 7 rows")


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        ("", "RECIPE is missing", "sslpre preview simclr ./images sheet.png"),
        ("simclr", "OUT.png is missing", "sslpre preview simclr sheet.png"),
        ("sheet.png", "RECIPE is missing", "sslpre preview simclr sheet.png"),
        ("simclr photos", "OUT.png is missing", "sslpre preview simclr photos sheet.png"),
        ("simclr sheet.jpg", "`sheet.jpg` does not end in .png", "sslpre preview simclr sheet.png"),
        ("simclr photos sheet", "`sheet` does not end in .png", "sslpre preview simclr photos sheet.png"),
        ("simclr sheet.png photos", "`photos` does not end in .png", "sslpre preview simclr photos sheet.png"),
        ("photos a.png", "`photos` is a folder, and RECIPE comes first", "sslpre preview simclr photos sheet.png"),
        ("simclrr photos a.png", "no recipe or run `simclrr`", "sslpre preview simclr photos sheet.png"),
        ("xyzzy a.png", "no recipe or run `xyzzy`", "sslpre recipes"),
        ("runs/simclr-1 a.png", "no run `runs/simclr-1`", "sslpre pretrain simclr ./images"),
        ("last a.png", "no run in `runs/`", "sslpre pretrain simclr ./images"),
        ("mine.toml a.png", "no recipe file `mine.toml`", "sslpre recipes lists the recipes that are built in"),
        ("simclr a b c.png", "too many words for `sslpre preview`: `c.png`", "sslpre preview --help"),
        ("simclr a.png --rows 0", "`--rows 0` is not a whole number from 1 on", "write --rows 8"),
        ("simclr a.png --rows 65", "`--rows 65` is not from 1 to 64", "write --rows 8"),
        (
            "simclr a.png --device gpu",
            "`--device gpu` is not one of auto, cpu, cuda, mps",
            "did you mean --device cpu?",
        ),
        ("simclr there.png", "`there.png` exists", "name another OUT.png, or remove it first"),
        ("simclr photos there.png", "`there.png` exists", "name another OUT.png, or remove it first"),
        ("simclr link.png", "`link.png` exists", "name another OUT.png, or remove it first"),
        (
            "simclr a.png --set method.tau=1",
            "recipe `simclr`: unknown key `method.tau`",
            "sslpre recipes simclr shows a complete recipe",
        ),
    ],
)
def test_mistakes(run_cli, photos, tmp_path, words, error, hint):
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "there.png").write_text("mine")
    (tmp_path / "link.png").symlink_to("nowhere")
    assert told(run_cli("preview", *words.split())) == (error, hint)
    assert (tmp_path / "there.png").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.png", "photos", "there.png"]


@pytest.mark.parametrize(("words", "name"), [(["", "a.png"], "RECIPE"), (["simclr", "", "a.png"], "IMAGES")])
def test_an_unset_variable_is_not_the_current_folder(run_cli, words, name):
    assert told(run_cli("preview", *words))[0] == f"{name} is an empty word"


def test_images_that_are_not_there(run_cli, here):
    for word in ("simclr", "rotation-1"):
        assert told(run_cli("preview", word, "missing", "a.png"), 4)[0] == "there is no folder `missing`"


def test_a_run_is_not_changed_by_flags(run_cli, here):
    flags = ("--set", "method.x=1", "--backbone", "resnet18", "--image-size", "64")
    assert told(run_cli("preview", "rotation-1", "a.png", *flags)) == (
        "`runs/rotation-1` is shown as it was trained, so `--set`, `--backbone`, `--image-size` cannot be given",
        "sslpre preview runs/rotation-1 sheet.png",
    )


def test_a_recipe_has_the_name_before_a_run(run_cli, here):
    shutil.copytree(here / "runs" / "rotation-1", here / "runs" / "rotation")
    done = run_cli("preview", "rotation", "sheet.png", *SMALL, "--rows", "1")
    assert done.err.endswith("weights: fresh, nothing is learned yet\n"), done.err


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid"), reason="permissions")
def test_a_place_that_cannot_be_written(run_cli, tmp_path):
    (tmp_path / "file").write_text("mine")
    error, hint = told(run_cli("preview", "rotation", "file/sheet.png", *SMALL, "--rows", "1"), 3)
    assert error.startswith("cannot write `file/sheet.png`: ") and "name an OUT.png" in hint


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def full(path, data):
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sslpre.synced.write_synced", full)
    with pytest.raises(SslpreError, match=r"cannot write `.*a\.png`: no space left on device"):
        write(Image.new("RGB", (8, 8)), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def flat(colour, h=8, w=8):
    return torch.tensor(colour).view(-1, 1, 1).expand(-1, h, w)


@pytest.mark.parametrize(
    ("h", "w", "size"),
    [
        (32, 32, (96, 96)),
        (9, 9, (99, 99)),
        (10, 22, (110, 50)),
        (64, 64, (128, 128)),
        (97, 97, (97, 97)),
        (256, 256, (256, 256)),
        (512, 300, (150, 256)),
        (1, 1, (96, 96)),
        (1, 4000, (256, 1)),
    ],
)
def test_a_picture_is_large_enough_to_see_and_small_enough_for_a_sheet(h, w, size):
    assert resized(Picture("x", torch.rand(3, h, w))).size == size


def test_pixels_are_kept():
    image = torch.rand(3, 8, 8)
    large = np.asarray(resized(Picture("x", image)))
    expected = (image * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(large, expected.repeat(12, 0).repeat(12, 1))
    grey = np.asarray(resized(Picture("x", image[:1])))
    assert np.array_equal(grey, large[..., :1].repeat(3, 2))
    beyond = np.asarray(resized(Picture("x", torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1))))
    assert beyond[0, 0].tolist() == [0, 128, 255]


def test_what_is_no_picture():
    for shape in [(8, 8), (2, 8, 8), (1, 3, 8, 8)]:
        with pytest.raises(TypeError, match="a picture is"):
            resized(Picture("x", torch.zeros(shape)))
    with pytest.raises(SslpreError, match="the picture `its answer` is not finite") as error:
        resized(Picture("its answer", torch.full((3, 8, 8), torch.nan)))
    assert error.value.code == 10


def dark(sheet, box):
    """Is there any ink in this part of the sheet?"""
    return np.asarray(sheet.crop(box)).min() < 128


def test_where_pictures_and_titles_stand():
    red, blue = flat([1.0, 0.0, 0.0]), flat([0.0, 0.0, 1.0], 4, 8)
    rows = [[Picture("one", red), Picture("two", blue)], [Picture("one", blue), Picture("three", red)]]
    sheet = draw("title", "sentence", ("about",), rows)
    pixels = np.asarray(sheet)
    reds, blues = ((pixels == colour).all(2) for colour in ([255, 0, 0], [0, 0, 255]))
    assert reds.sum() == 2 * 96 * 96 and blues.sum() == 2 * 96 * 48
    first, second = MARGIN, MARGIN + LEAST + GAP
    ys = {}
    for name, where in (("red", reds), ("blue", blues)):
        y, x = where.nonzero()
        left, right = (y[(x >= at) & (x < at + LEAST)] for at in (first, second))
        assert len(left) + len(right) == len(y), "in two columns"
        ys[name] = (left.min(), right.min())
    assert ys["red"][0] == ys["blue"][1] < ys["blue"][0] == ys["red"][1]
    for x in (first, second):
        for y in ys["blue"]:
            assert dark(sheet, (x, y - 18, x + 40, y - 3)), "a title above each picture, because they differ"
    rows[1] = [Picture("one", blue), Picture("two", red)]
    once = draw("title", "sentence", ("about",), rows)
    assert once.height == sheet.height - 19, "titles that are alike stand once"


def test_a_long_row_says_how_much_more_there_is():
    short, long = ([[Picture(f"{at}", flat([0.5])) for at in range(count)]] for count in (12, 30))
    a, b = (draw("t", "s", (), rows) for rows in (short, long))
    assert a.height == b.height and b.width == a.width + ASIDE
    aside = (a.width - MARGIN + GAP, 0, b.width, b.height)
    assert dark(b, aside)


def test_one_title_is_enough_for_a_row_of_one_name():
    names = [["cluster 1"] * 3, ["cluster 22"] * 2]
    sheet = draw("t", "s", (), [[Picture(name, flat([1.0])) for name in row] for row in names])
    second = MARGIN + LEAST + GAP
    assert not dark(sheet, (second - 4, MARGIN + 80, sheet.width, sheet.height))


@given(st.text(alphabet="abc W°\n", max_size=80), st.integers(20, 200))
def test_lines_fit_and_lose_nothing(text, width):
    found = wrapped(text, 14, width)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(font(14).getlength(line) <= width or len(line) == 1 for line in found)


def test_a_title_may_be_longer_than_its_picture():
    image = resized(Picture("x", flat([1.0])))
    assert needed(image, "short") == image.width == LEAST
    assert LEAST < needed(image, "what the network sees") < TITLE == needed(image, "word " * 20)
    assert len(wrapped("what the network sees", 14, needed(image, "what the network sees"))) == 1


def test_control_characters_in_a_path_are_written_out():
    sheet = draw("run \x1b[31m", "s", ("images: a\nb",), [[Picture("x", flat([1.0]))]])
    assert sheet.width == NARROWEST + 2 * MARGIN
