"""Views as a whole: a function of (seed, epoch, index, view) alone, finite, in range; the centre; kornia entries."""

import itertools
import math
import os
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sslpre.errors import SslpreError
from sslpre.recipe import View
from sslpre.views import colour, crop, pool
from sslpre.views.build import Views, _in_one_copy, centre, compiler, repays
from sslpre.views.draw import chosen, uniform
from sslpre.views.fused import Compiled

STRENGTH = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
SIMCLR: dict[str, Any] = {"jitter": 0.8, **STRENGTH, "gray": 0.2, "blur": 0.5, "copies": 2}
SOLARIZE = {"name": "RandomSolarize", "p": 0.5, "thresholds": [0.4, 0.6]}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def decibels(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and ours.isfinite().all()
    return -10 * math.log10(float((ours.double() - theirs.double()).square().mean()) + 1e-20)


def photos(count: int, side: int, seed: int = 0) -> Tensor:
    """Smooth scenes with some noise, black and white in them: uint8 [count, 3, side, side], channels last."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator) * 1.6 - 0.3
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    noisy = smooth + 0.1 * torch.randn(smooth.shape, generator=generator)
    return (noisy.clamp(0, 1) * 255).round().byte().contiguous(memory_format=torch.channels_last)


def sizes(count: int, height: int, width: int) -> Tensor:
    return torch.tensor([[height, width]]).expand(count, 2)


def run(views: Views, rows: Tensor, pixels: Tensor, size: Tensor, epoch: int = 0) -> list[Tensor]:
    return views(pixels[rows], size[rows], rows, epoch)


@pytest.mark.parametrize(("canvas", "side"), [(32, 32), (64, 48), (110, 96), (35, 33), (140, 123)])
def test_views_do_not_depend_on_the_batch(canvas: int, side: int) -> None:
    views = Views([View(**SIMCLR, kornia=(SOLARIZE, {"name": "RandomGaussianNoise", "std": 0.1}))], side, seed=3)
    pixels, size = photos(8, canvas), torch.randint(20, 300, (8, 2), generator=torch.Generator().manual_seed(0))
    whole = run(views, torch.arange(8), pixels, size)
    assert not torch.equal(*whole)
    for split in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[i] for i in range(8)], [[7, 0, 3], [5, 6, 2, 1, 4]]):
        for rows in map(torch.tensor, split):
            for view, part in zip(whole, run(views, rows, pixels, size), strict=True):
                assert torch.equal(view[rows], part)


def test_views_do_not_depend_on_the_batch_on_two_threads() -> None:
    torch.set_num_threads(2)
    views = Views([View(**SIMCLR | {"copies": 1, "jitter": 1.0, "blur": 1.0})], 184, seed=3)
    pixels, size = photos(2, 184), sizes(2, 184, 184)
    whole = run(views, torch.arange(2), pixels, size)[0]
    for row in range(2):
        assert torch.equal(run(views, torch.tensor([row]), pixels, size)[0][0], whole[row])


def test_views_differ_by_copy_table_epoch_and_seed() -> None:
    table = View(**SIMCLR)
    pixels, size, rows = photos(6, 48), sizes(6, 48, 48), torch.arange(6)
    made = run(Views([table, table], 32, 0), rows, pixels, size)
    made += run(Views([table], 32, 1), rows, pixels, size) + run(Views([table], 32, 0), rows, pixels, size, epoch=1)
    assert len(made) == 8
    for one, two in itertools.combinations(made, 2):
        assert ((one - two).abs().amax((1, 2, 3)) > 0.01).all()
    again = run(Views([table, table], 32, 0), rows, pixels, size)
    assert all(torch.equal(one, two) for one, two in zip(made, again, strict=False))


def test_sides_order_and_range() -> None:
    tables = [View(copies=2, crop_scale=(0.3, 1)), View(copies=3, size=24, crop_scale=(0.05, 0.3)), View(**SIMCLR)]
    tables += [View(**SIMCLR, size=128)]
    views = Views(tables, 40, seed=0)
    assert views.sides == (40, 40, 24, 24, 24, 40, 40, 128, 128)
    made = run(views, torch.arange(5), photos(5, 64), sizes(5, 50, 90))
    for side, view in zip(views.sides, made, strict=True):
        assert view.shape == (5, 3, side, side) and view.dtype == torch.float32 and not view.requires_grad
        assert view.isfinite().all() and view.min() >= 0 and view.max() <= 1


@pytest.mark.parametrize("side", [32, 128])
def test_no_rounding_leaves_the_range(side: int) -> None:
    """Hue and blur of the brightest and the darkest colours come out a last bit above 1 or below 0."""
    corners = torch.tensor(list(itertools.product((0, 255), repeat=3)), dtype=torch.uint8)
    pixels = corners[:, :, None, None].repeat(1, 1, side, side)
    pixels[:4, 1] = photos(4, side)[:, 0]
    view = View(jitter=1.0, hue=0.5, blur=float(side > 32), blur_sigma=(1.0, 2.0))
    for epoch in range(4):
        made = Views([view], side, 0)(pixels, sizes(8, side, side), torch.arange(8), epoch)[0]
        assert made.min() >= 0 and made.max() <= 1


def test_callers_autocast_does_not_reach_the_views() -> None:
    views, rows = Views([View(**SIMCLR)], 32, 0), torch.arange(4)
    pixels, size = photos(4, 32), sizes(4, 32, 32)
    plain = run(views, rows, pixels, size)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(views, rows, pixels, size)
    assert all(torch.equal(one, two) for one, two in zip(plain, cast, strict=True))


@pytest.mark.parametrize(("height", "width"), [(300, 300), (300, 200), (120, 500), (37, 100), (1, 700)])
def test_squashed_images_get_the_right_box(height: int, width: int) -> None:
    """A picture whose pixels are their own coordinates: each view must show the box that was drawn."""
    canvas, count, side = 256, 40, 16
    ramp = torch.linspace(0.5 / canvas, 1 - 0.5 / canvas, canvas)
    image = torch.stack(
        [ramp[:, None].expand(canvas, canvas), ramp[None].expand(canvas, canvas), torch.zeros(canvas, canvas)]
    )
    pixels = (image * 255).round().byte().expand(count, -1, -1, -1)
    view = Views([View(flip=0.0)], side, seed=0)(pixels, sizes(count, height, width), torch.arange(count), 0)[0]
    numbers = uniform(0, 0, torch.arange(count), "view0.box", crop.NUMBERS)
    drawn = crop.draw_boxes(numbers, sizes(count, height, width), (0.08, 1.0), (3 / 4, 4 / 3)).double()
    middle = view.mean((2, 3)).double()[:, :2] * torch.tensor([height, width])
    expected = drawn[:, :2] + drawn[:, 2:] / 2
    slack = torch.tensor([height, width]) * 1.5 / canvas
    assert ((middle - expected).abs() <= slack).all()


@pytest.mark.parametrize("side", [32, 48, 128])
def test_centre_is_torchvisions(side: int) -> None:
    """Of an image that has the canvas' own size; and that of a squashed one is its middle, whole height."""
    pixels = photos(3, 96)
    for ours, image in zip(centre(pixels, sizes(3, 96, 96), side), pixels, strict=True):
        theirs = tv.resize(tv.center_crop(image.float() / 255, [96, 96]), [side, side], antialias=True)
        assert decibels(ours, theirs) >= 50
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BILINEAR)
        assert decibels(ours, tv.to_dtype(tv.pil_to_tensor(picture), torch.float32, scale=True)) >= 50


@pytest.mark.parametrize(("height", "width"), [(96, 192), (192, 96), (97, 144), (96, 97)])
def test_centre_of_an_oblong_image(height: int, width: int) -> None:
    boxes_ = crop.centre_boxes(sizes(1, height, width))[0].tolist()
    short = min(height, width)
    marked = torch.zeros(1, height, width)
    marked[:, boxes_[0] : boxes_[0] + boxes_[2], boxes_[1] : boxes_[1] + boxes_[3]] = 1
    assert tv.center_crop(marked, [short, short]).min() == 1 and marked.sum() == short**2
    # the smooth original, cropped by torchvision, against the squashed canvas, cropped by us
    coarse = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    original = tv.resize(coarse, [height, width])
    canvas = (tv.resize(original, [96, 96], antialias=True) * 255).round().byte()[None]
    theirs = tv.resize(tv.center_crop(original, [short, short]), [32, 32], antialias=True)
    assert decibels(centre(canvas, sizes(1, height, width), 32)[0], theirs) >= 40


# --- kornia entries ---------------------------------------------------------------------------------------------------


def extra(**entry: Any) -> View:
    return View(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0.0, kornia=(entry,))


def test_kornia_entry_does_its_work_on_the_drawn_images() -> None:
    pixels, size, rows = photos(64, 24), sizes(64, 24, 24), torch.arange(64)
    plain = run(Views([extra(name="RandomInvert", p=0)], 24, 0), rows, pixels, size)[0]
    torch.testing.assert_close(plain, pixels.float() / 255, atol=1e-6, rtol=0)
    turned = run(Views([extra(name="RandomInvert", p=0.3)], 24, 0), rows, pixels, size)[0]
    drawn = chosen(uniform(0, 0, rows, "view0.kornia0"), 0.3)
    expected = plain.clone()
    expected[drawn] = 1 - plain[drawn]
    assert 5 < len(drawn) < 35
    torch.testing.assert_close(turned, expected, atol=1e-6, rtol=0)


def test_kornia_leaves_the_global_generators_alone() -> None:
    pixels, size, rows = photos(4, 24), sizes(4, 24, 24), torch.arange(4)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    views = Views([extra(name="RandomGaussianNoise", p=1.0, std=0.2)], 24, 0)
    first = run(views, rows, pixels, size)[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(run(views, rows, pixels, size)[0], first)
    assert not torch.equal(run(views, rows, pixels, size, epoch=1)[0], first)
    noise = first - pixels.float() / 255
    assert float(torch.corrcoef(noise[:2].reshape(2, -1))[0, 1]) < 0.15  # each image its own


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "RandomSolarize", "thresholds": 0.1, "additions": [0, 0.1]},
        {"name": "RandomGaussianNoise", "std": 3.0},
        {"name": "RandomAutoContrast"},
        {"name": "RandomEqualize"},
        {"name": "RandomPosterize", "bits": 3},
        {"name": "RandomSharpness"},
        {"name": "RandomErasing"},
        {"name": "RandomRotation", "degrees": 30.0},
        {"name": "RandomAffine", "degrees": 10, "translate": [0.1, 0.1]},
        {"name": "RandomPlasmaContrast"},
        {"name": "RandomChannelShuffle"},
        {"name": "RandomCrop", "size": [24, 24], "padding": 4},
    ],
    ids=lambda entry: entry["name"],
)
def test_kornia_entries_stay_in_range(entry: dict[str, Any]) -> None:
    pixels = torch.cat([photos(2, 24), torch.zeros(1, 3, 24, 24).byte(), torch.full((1, 3, 24, 24), 255).byte()])
    views = Views([extra(**entry | {"p": 1.0})], 24, 0)
    view = run(views, torch.arange(4), pixels, sizes(4, 24, 24))[0]
    assert view.isfinite().all() and view.min() >= 0 and view.max() <= 1
    assert not torch.equal(view, pixels.float() / 255)


@pytest.mark.parametrize(
    ("entry", "message", "hint"),
    [
        ({"name": "RandomSolarise"}, "kornia has no augmentation `RandomSolarise`", "did you mean `RandomSolarize`?"),
        ({"p": 0.5}, "a `kornia` entry of `[[views]]` names no class", "RandomSolarize"),
        ({"name": "RandomSolarize", "treshold": 1}, "`RandomSolarize` has no argument `treshold`", "`thresholds`?"),
        ({"name": "RandomSolarize", "p": 2}, "`RandomSolarize` cannot have p = `2`", "0 to 1"),
        ({"name": "RandomSolarize", "p": "often"}, "`RandomSolarize` cannot have p = `often`", "0 to 1"),
        ({"name": "RandomSolarize", "thresholds": "low"}, "kornia's `RandomSolarize` refuses its arguments", "manual"),
        ({"name": "RandomGaussianBlur"}, "kornia's `RandomGaussianBlur` refuses its arguments", "manual"),
        ({"name": "RandomMixUpV2"}, "kornia's `RandomMixUpV2` cannot make a view", "one image"),
        ({"name": "RandomAffine3D"}, "kornia's `RandomAffine3D` cannot make a view", "2-D"),
        ({"name": "Normalize", "mean": 0.5, "std": 0.5}, "kornia's `Normalize` cannot make a view", "[0, 1]"),
        ({"name": "AugmentationBase2D"}, "kornia's `AugmentationBase2D` cannot make a view", "image"),
        ({"name": "CenterCrop", "size": [16, 20]}, "`CenterCrop` makes 16×20 of a 24×24 view", "`size` of the table"),
        ({"name": "Resize", "size": 12}, "`Resize` makes 12×12 of a 24×24 view", "`size` of the table"),
    ],
)
def test_unusable_kornia_entries(entry: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(SslpreError) as caught:
        Views([extra(**entry)], 24, 0)
    assert caught.value.code == 2
    assert message in caught.value.message and "\n" not in caught.value.message
    assert hint in caught.value.hint


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh() -> Iterator[None]:
    """dynamo counts the graphs of a function, not those of one `Views`."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(views: Views, backend: str = "eager") -> Views:
    views.compile("g++", backend)
    return views


def test_compiled_views_are_the_same_from_one_graph_a_side(fresh: None) -> None:
    """Sides 96, 64 and 32; none for what has no colour, nor for what is too large to gain on a CPU."""
    colourful = SIMCLR | {"copies": 1}
    tables = [View(**SIMCLR, kornia=(SOLARIZE,)), View(), View(**colourful, size=144)]
    tables += [View(**colourful, size=64), View(**colourful, size=32)]
    ours, plain = compiled(Views(tables, 96, 3)), Views(tables, 96, 3)
    pixels, size = photos(6, 100), torch.randint(20, 300, (6, 2), generator=torch.Generator().manual_seed(0))
    assert ours.graphs == 0
    for epoch, rows in itertools.product(range(2), (torch.arange(4), torch.arange(2, 6))):
        for one, two in zip(run(ours, rows, pixels, size, epoch), run(plain, rows, pixels, size, epoch), strict=True):
            assert one.dtype == torch.float32 and one.min() >= 0 and one.max() <= 1
            torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    assert ours.graphs == 3
    # another place in the batch, and a batch of another size: no graph more
    whole = run(ours, torch.arange(4), pixels, size)
    back = run(ours, torch.arange(4).flip(0), pixels, size)
    few = run(ours, torch.arange(3), pixels, size)
    for first, turned, part in zip(whole, back, few, strict=True):
        torch.testing.assert_close(first, turned.flip(0), atol=1e-6, rtol=0)
        torch.testing.assert_close(first[:3], part, atol=1e-5, rtol=0)
    assert ours.graphs == 3 and plain.graphs == 0
    assert ours.recompiled == 0 and ours.made == "compiled by g++" and plain.made == "eager"


def test_a_graph_that_is_made_anew_is_counted(fresh: None) -> None:
    ours, numbers = Compiled("eager"), torch.rand(4, 33)
    raw = torch.rand(4, 3, 24, 24) * 255
    assert (ours.graphs, ours.recompiled) == (0, 0)
    for some, has_hue, counts in (
        (raw, True, (1, 0)),
        (raw + 1, True, (1, 0)),
        (raw, False, (2, 0)),  # another kind of table
        (raw.byte(), True, (3, 0)),
        (raw.contiguous(memory_format=torch.channels_last), True, (4, 1)),  # the same, lying otherwise in memory
    ):
        ours(some, numbers, True, has_hue)
        assert (ours.graphs, ours.recompiled) == counts


def test_callers_modes_do_not_reach_the_graph(fresh: None) -> None:
    views, rows = compiled(Views([View(**SIMCLR)], 32, 0)), torch.arange(4)
    pixels, size = photos(4, 32), sizes(4, 32, 32)
    plain = run(views, rows, pixels, size)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(views, rows, pixels, size)
    with torch.no_grad():
        without = run(views, rows, pixels, size)
    for one, two, three in zip(plain, cast, without, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    assert views.graphs == 1
    for one, two in zip(plain, run(Views([View(**SIMCLR)], 32, 0), rows, pixels, size), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_a_compiler_that_fails_is_said_once(
    fresh: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such header\nand much more")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: broken)
    views, rows = compiled(Views([View(**SIMCLR), View(**SIMCLR, size=24)], 32, 0)), torch.arange(4)
    pixels, size = photos(4, 32), sizes(4, 32, 32)
    expected = run(Views([View(**SIMCLR), View(**SIMCLR, size=24)], 32, 0), rows, pixels, size)
    assert views.made == "compiled by g++"
    for _ in range(2):
        assert all(map(torch.equal, run(views, rows, pixels, size), expected))
        assert views.made == "eager"
    said = capsys.readouterr().err
    assert said.count("views are made without a compiler") == 1 and "no such header" in said
    assert "much more" not in said


@pytest.mark.parametrize("threads", [1, 2])
def test_a_compiler_without_a_folder_ends_nothing(
    threads: int, fresh: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch.compile imports what makes a cache folder; where that may not be made it raises OSError by itself."""

    def closed(*args: Any, **kwargs: Any) -> Any:
        raise OSError(30, "Read-only file system", "/cache")

    torch.set_num_threads(threads)
    monkeypatch.setattr(torch, "compile", closed)
    tables = [View(**SIMCLR), View(**SIMCLR, size=128)]
    views, rows = compiled(Views(tables, 32, 0)), torch.arange(4)
    pixels, size = photos(4, 32), sizes(4, 32, 32)
    expected = run(Views(tables, 32, 0), rows, pixels, size)
    for _ in range(2):
        assert all(map(torch.equal, run(views, rows, pixels, size), expected))
    assert (views.made, views.graphs, views.recompiled) == ("eager", 0, 0)
    said = capsys.readouterr().err
    assert said.count("views are made without a compiler") == 1 and "Read-only file system" in said


def test_a_cache_folder_that_cannot_be_made_ends_nothing() -> None:
    """In a process of its own, whose first import of the compiler fails."""
    script = """if True:
        import torch
        from sslpre.recipe import View
        from sslpre.views.build import Views
        torch.set_num_threads(1)
        views = Views([View(jitter=1.0, hue=0.2)], 32, 0)
        views.compile("g++")
        for _ in range(2):
            views(torch.zeros(2, 3, 32, 32).byte(), torch.full((2, 2), 32), torch.arange(2), 0)
        print(views.made)
    """
    closed = os.environ | {"TORCHINDUCTOR_CACHE_DIR": "/proc/nowhere", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=closed, capture_output=True, text=True)
    assert done.stdout == "eager\n", done.stderr
    assert done.stderr.count("views are made without a compiler") == 1


@pytest.mark.slow
def test_inductor_makes_the_same_views(fresh: None) -> None:
    if compiler(torch.device("cpu")) is None:
        pytest.skip("needs a C++ compiler and Python's header files")
    for canvas, side in ((32, 32), (64, 64), (100, 96)):
        views, plain = compiled(Views([View(**SIMCLR)], side, 3), "inductor"), Views([View(**SIMCLR)], side, 3)
        pixels, size, rows = photos(8, canvas), sizes(8, 200, 100), torch.arange(8)
        for epoch in range(2):
            for one, two in zip(
                run(views, rows, pixels, size, epoch), run(plain, rows, pixels, size, epoch), strict=True
            ):
                torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
        assert views.graphs == 1


def test_what_would_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    program = tmp_path / "my-c++"
    program.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(program))
    assert compiler(cpu) == (str(program) if header.is_file() else None)
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    assert compiler(cpu) is None
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert compiler(cpu) is None
    (tmp_path / "Python.h").touch()
    assert compiler(cpu) == str(program)
    assert compiler(torch.device("mps")) is None


def test_a_short_run_is_not_worth_compiling_for() -> None:
    cpu, cuda, mps = map(torch.device, ("cpu", "cuda", "mps"))
    views = Views([View(**SIMCLR)], 32, 0)
    epoch = 2000 // 256 * views.saves(cpu, 256)
    assert not repays(cpu, 10 * epoch) and repays(cpu, 1000 * epoch)
    assert not repays(cpu, 0.0) and not repays(mps, 1e15)
    for batch in (512, 1024):  # CIFAR-10 on a GPU
        epoch = 50_000 // batch * views.saves(cuda, batch)
        assert not repays(cuda, 5 * epoch) and repays(cuda, 200 * epoch)


def test_what_compiling_saves() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    one = Views([View(**SIMCLR | {"copies": 1})], 32, 0)
    more = Views([View(**SIMCLR | {"copies": 1}), View(**SIMCLR, size=64), View(flip=1.0, size=48)], 32, 0)
    assert more.saves(cpu, 8) == pytest.approx(9 * one.saves(cpu, 8)) == pytest.approx(4.5 * one.saves(cpu, 16))
    # launches are as many for a large batch or view
    assert more.saves(cuda, 8) == pytest.approx(3 * one.saves(cuda, 1024))
    assert Views([View()], 32, 0).saves(cuda, 8) == 0 == Views([View()], 32, 0).saves(cpu, 8)
    large = Views([View(**SIMCLR)], 224, 0)
    assert large.saves(cpu, 8) == 0 < large.saves(cuda, 8)


class Launches(TorchDispatchMode):
    """Counts operations that make numbers: on a GPU each is a kernel or two."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.count += not function.is_view and function is not torch.ops.aten._unsafe_view.default
        return made


def test_launches_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colour, "_PIXELS_AT_ONCE", 2**30)
    images, rows = torch.rand(96, 3, 4, 4), torch.arange(96)
    for operation in range(4):
        strength = {name: value for place, (name, value) in enumerate(STRENGTH.items()) if place == operation}
        plan = colour.draw_jitter(View(jitter=1.0, **strength), partial(uniform, 0, 0, rows), "view0")
        assert len(plan.groups) == 4
        with Launches() as launches:
            colour.jitter(images, plan)
        assert launches.count == 4 * colour.LAUNCHES[operation]


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("count", [1, 5, 29])
def test_threads_change_no_bit(threads: int, count: int) -> None:
    """Large views, the crops of middling ones, and the centre."""
    tables = [View(**SIMCLR, size=130), View(size=100, crop_scale=(0.05, 1.0))]
    pixels, size, rows = photos(count, 144), sizes(count, 144, 144), torch.arange(count)
    alone = [*run(Views(tables, 144, 3), rows, pixels, size), centre(pixels, size, 96)]
    torch.set_num_threads(threads)
    for _ in range(2):
        ours = [*run(Views(tables, 144, 3), rows, pixels, size), centre(pixels, size, 96)]
        assert all(map(torch.equal, ours, alone))
    assert torch.get_num_threads() == threads


@given(count=st.integers(0, 200), threads=st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_every_row_has_one_turn(count: int, threads: int) -> None:
    torch.set_num_threads(threads)
    turns, where = torch.zeros(count, dtype=torch.int64), set()

    def work(rows: slice) -> None:
        turns[rows] += 1
        where.add((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        assert threads == 1 or not torch.is_grad_enabled()

    pool.share(work, count)
    assert (turns == 1).all()
    assert where == {(True, 1) if threads == 1 else (False, 1)}
    assert torch.get_num_threads() == threads


def test_one_pool_as_long_as_torch_has_as_many_threads() -> None:
    def threads_after(count: int) -> set[threading.Thread]:
        torch.set_num_threads(count)
        pool.share(lambda rows: None, 64)
        return {thread for thread in threading.enumerate() if thread.name.startswith("sslpre-views")}

    three = threads_after(3)
    assert len(three) == 3 and threads_after(3) == three
    two = threads_after(2)
    assert len(two) == 2 and not two & three and not any(thread.is_alive() for thread in three)
    assert threads_after(1) == two  # one thread has no use for a pool


def test_what_a_thread_raises_is_raised_after_all_have_ended() -> None:
    torch.set_num_threads(2)
    running, turns = [0], []

    def work(rows: slice) -> None:
        running[0] += 1
        turns.append(rows.start)
        try:
            if rows.start == 0:
                raise MemoryError("no room for a view")
            time.sleep(0.02)
        finally:
            running[0] -= 1

    with pytest.raises(MemoryError, match="no room"):
        pool.share(work, 8)
    assert running == [0] and 0 in turns
    pool.share(lambda rows: turns.append(rows.stop), 8)
    assert max(turns) == 8


# --- the way to the device -------------------------------------------------------------------------------------------


def test_one_copy_carries_everything() -> None:
    rows = [torch.tensor([5, -1, 2**40]), torch.tensor([], dtype=torch.int64), torch.tensor([7])]
    numbers = [torch.rand(3), torch.rand(0), torch.rand(4, 5)]
    for there, here in zip(_in_one_copy(rows + numbers, torch.device("cpu")), rows + numbers, strict=True):
        assert there.dtype == here.dtype and torch.equal(there, here)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_makes_the_same_views_and_never_waits() -> None:
    views, rows = Views([View(**SIMCLR)], 96, 0), torch.arange(16)
    pixels, size = photos(16, 128), sizes(16, 200, 100)
    on_gpu = pixels.cuda()
    views(on_gpu, size, rows, 0)  # first calls allocate and load kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = views(on_gpu, size, rows, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, cpu in zip(made, views(pixels, size, rows, 0), strict=True):
        assert decibels(ours.cpu(), cpu) >= 45


def test_a_system_that_gives_no_more_threads_ends_nothing(monkeypatch):
    """The work is done by the caller; the threads that were made do not wait for those that were not."""
    start, made, done = threading.Thread.start, [], []

    def refused(thread):
        if thread.name.startswith("sslpre-views"):
            made.append(thread)
            if len(made) > 1:
                raise RuntimeError("can't start new thread")
        start(thread)

    threads = torch.get_num_threads()
    monkeypatch.setattr(pool, "_made", None)
    monkeypatch.setattr(threading.Thread, "start", refused)
    torch.set_num_threads(3)
    try:
        pool.share(done.append, 7)
    finally:
        torch.set_num_threads(threads)
    assert done == [slice(0, 7)] and len(made) == 2
    made[0].join(10)
    assert not made[0].is_alive()


def test_shared_work_is_in_the_callers_inference_mode():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            found = torch.zeros(9)
            pool.share(lambda rows: found[rows].add_(1), len(found))
    finally:
        torch.set_num_threads(threads)
    assert found.tolist() == [1] * 9
