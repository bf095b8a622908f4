"""Each step of a view is torchvision's, in value and in distribution."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torchvision.transforms import ColorJitter, RandomResizedCrop

from sslpre.recipe import View
from sslpre.views import blur, colour, crop, fused
from sslpre.views.build import Views
from sslpre.views.draw import chosen, uniform

STRENGTH = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
SIMCLR: dict[str, Any] = {"jitter": 0.8, **STRENGTH, "gray": 0.2, "blur": 0.5, "copies": 2}
MANY = 4000


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


def boxes(count: int, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Tensor:
    numbers = uniform(0, 0, torch.arange(count), "box", crop.NUMBERS)
    return crop.draw_boxes(numbers, sizes(count, height, width), scale, ratio)


# --- boxes ------------------------------------------------------------------------------------------------------------


def slow_box(numbers: list[float], height: int, width: int, scale: Any, ratio: Any) -> list[int]:
    """torchvision's `RandomResizedCrop.get_params`, line by line, with its random numbers handed in."""
    for attempt in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[attempt])
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * numbers[10 + attempt])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(numbers[20] * (height - h + 1)), int(numbers[21] * (width - w + 1)), h, w]
    w, h = width, height
    if width / height < min(ratio):
        h = max(1, round(w / min(ratio)))
    elif width / height > max(ratio):
        w = max(1, round(h * max(ratio)))
    return [(height - h) // 2, (width - w) // 2, h, w]


SIDE = st.one_of(st.integers(1, 20), st.integers(1, 5000))
SCALE = st.tuples(st.floats(1e-3, 1), st.floats(1e-3, 1)).map(sorted)
RATIO = st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted)


@given(height=SIDE, width=SIDE, scale=SCALE, ratio=RATIO, canvas=st.integers(1, 300))
@settings(deadline=None, max_examples=150)
def test_box_is_the_slow_loops_and_lies_inside(height: int, width: int, scale: Any, ratio: Any, canvas: int) -> None:
    numbers = uniform(0, 0, torch.arange(6), "box", crop.NUMBERS)
    size = sizes(6, height, width)
    drawn = crop.draw_boxes(numbers, size, scale, ratio)
    assert drawn.tolist() == [slow_box(row, height, width, scale, ratio) for row in numbers.double().tolist()]
    for placed, where in ((drawn, size), (crop.to_canvas(drawn, size, canvas), sizes(6, canvas, canvas))):
        assert (placed[:, :2] >= 0).all() and (placed[:, 2:] >= 1).all()
        assert (placed[:, :2] + placed[:, 2:] <= where).all()


def test_thin_and_tiny_images() -> None:
    standard = ((0.08, 1.0), (3 / 4, 4 / 3))
    assert boxes(50, 1, 1, *standard).tolist() == [[0, 0, 1, 1]] * 50
    assert boxes(50, 1, 5000, *standard).tolist() == [[0, 2499, 1, 1]] * 50  # never fits: 1 × round(4 / 3), central
    assert boxes(50, 5000, 1, *standard).tolist() == [[2499, 0, 1, 1]] * 50
    assert boxes(50, 100, 900, *standard)[:, 2:].amax(0).tolist() == [100, 133]


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (224, 224, (0.08, 1.0), (3 / 4, 4 / 3)),
        (375, 500, (0.2, 1.0), (3 / 4, 4 / 3)),
        (150, 400, (0.05, 0.4), (0.5, 2)),
    ],
)
def test_boxes_have_torchvisions_distribution(height: int, width: int, scale: Any, ratio: Any) -> None:
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(MANY)], dtype=float)
    ours = boxes(MANY, height, width, scale, ratio).double().numpy()
    for what in (
        lambda b: b[:, 2] * b[:, 3] / (height * width),
        lambda b: np.log(b[:, 3] / b[:, 2]),
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] / np.maximum(height - b[:, 2], 1),
        lambda b: b[:, 1] / np.maximum(width - b[:, 3], 1),
    ):
        assert stats.ks_2samp(what(ours), what(theirs)).pvalue > 1e-3


def test_box_on_the_canvas() -> None:
    drawn = boxes(100, 60, 90, (0.08, 1.0), (3 / 4, 4 / 3))
    whole = torch.tensor([[0, 0, 60, 90]])
    assert crop.to_canvas(whole, sizes(1, 60, 90), 32).tolist() == [[0, 0, 32, 32]]
    assert crop.to_canvas(torch.tensor([[59, 89, 1, 1]]), sizes(1, 60, 90), 32).tolist() == [[31, 31, 1, 1]]
    square = boxes(100, 77, 77, (0.08, 1.0), (3 / 4, 4 / 3))
    assert torch.equal(crop.to_canvas(square, sizes(100, 77, 77), 77), square)
    placed = crop.to_canvas(drawn, sizes(100, 60, 90), 900)  # no rounding: 15 and 10 canvas pixels to one
    assert torch.equal(placed, drawn * torch.tensor([15, 10, 15, 10]))


# --- crop, resize, flip -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("canvas", "side"), [(32, 32), (64, 96), (96, 64), (256, 224), (50, 7), (224, 32)])
def test_resample_is_torchvisions_resized_crop(canvas: int, side: int) -> None:
    pixels = photos(12, canvas)
    where = boxes(12, canvas, canvas, (0.02, 1.0), (0.5, 2))
    where[0] = torch.tensor([0, 0, canvas, canvas])
    where[1] = torch.tensor([canvas - 1, canvas - 1, 1, 1])
    where[2] = torch.tensor([3, 0, 1, canvas])
    flip = torch.arange(12) % 2 == 1
    expected = []
    for image, box, turn in zip(pixels.float() / 255, where.tolist(), flip.tolist(), strict=True):
        view = tv.resized_crop(image, *box, size=[side, side], antialias=True)
        expected.append(tv.horizontal_flip(view) if turn else view)
    products = crop.scaled(crop.products(pixels, crop.placement(where, flip), side))
    halves = crop.scaled(crop.products(pixels, crop.placement(where, flip), side, torch.float16))
    slices = crop.scaled(crop.slices(pixels, where, flip, side))
    for ours, half, theirs, other in zip(products, halves, expected, slices, strict=True):
        assert decibels(ours, theirs) >= 100
        assert decibels(half, theirs) >= 60
        assert decibels(other, theirs) >= 50
        assert float((ours - other).abs().max()) <= 1.6 / 255  # two roundings, one per axis
    assert products.is_contiguous() and products.min() >= 0 and products.max() <= 1


@given(data=st.data(), canvas=st.integers(1, 40), side=st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_two_ways_are_one_function(data: Any, canvas: int, side: int) -> None:
    edge = st.tuples(st.integers(0, canvas - 1), st.integers(1, canvas)).map(lambda p: (p[0], min(p[1], canvas - p[0])))
    (top, height), (left, width) = data.draw(edge), data.draw(edge)
    where, flip = torch.tensor([[top, left, height, width]]), torch.tensor([data.draw(st.booleans())])
    pixels = photos(1, canvas)
    products = crop.scaled(crop.products(pixels, crop.placement(where, flip), side))
    assert float((products - crop.scaled(crop.slices(pixels, where, flip, side))).abs().max()) <= 1.6 / 255
    # crop, then resize: nothing outside the box is seen
    outside = torch.full_like(pixels, 255)
    outside[:, :, top : top + height, left : left + width] = pixels[:, :, top : top + height, left : left + width]
    assert torch.equal(products, crop.scaled(crop.products(outside, crop.placement(where, flip), side)))


def test_products_in_slices_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, where = photos(7, 24), boxes(7, 24, 24, (0.1, 1.0), (0.5, 2))
    placed, product, counts = crop.placement(where, torch.arange(7) % 2 == 1), crop._product, []

    def counted(some: Tensor, *rest: Any) -> Tensor:
        counts.append(len(some))
        return product(some, *rest)

    whole = crop.products(pixels, placed, 16)
    monkeypatch.setattr(crop, "_product", counted)
    for each, expected in ((1, [1] * 7), (3, [3, 3, 1])):
        counts.clear()
        one = 4 * (3 * (24 * 24 + 2 * 24 * 16 + 16 * 16) + 3 * 24 * 16)
        monkeypatch.setattr(crop, "_ROOM_ON_A_CPU", each * one)
        torch.testing.assert_close(crop.products(pixels, placed, 16), whole, atol=1e-4, rtol=0)
        assert counts == expected


@pytest.mark.parametrize("side", [32, 96])
def test_whole_image_is_untouched(side: int) -> None:
    pixels = photos(3, side)
    whole = torch.tensor([[0, 0, side, side]]).expand(3, 4)
    view = crop.resample(pixels, whole, torch.zeros(3, dtype=torch.bool), side)
    torch.testing.assert_close(view, pixels.float() / 255, atol=1e-7, rtol=0)
    flipped = crop.resample(pixels, whole, torch.ones(3, dtype=torch.bool), side)
    torch.testing.assert_close(flipped, view.flip(-1), atol=1e-7, rtol=0)


# --- colour -----------------------------------------------------------------------------------------------------------

EXTREME = [(0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)]
EXTREME += [(1e-8, 0, 0), (1, 1, 1 - 6e-8), (0.2, 0.2, 0.2 + 1e-7), (0.3, 0.7, 0.7), (1 / 3, 2 / 3, 1)]
THEIRS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
FACTORS = [0, 1e-6, 0.2, 1, 1.8, 3]
TURNS = [-0.5, -0.2, -1e-7, 0, 1e-7, 1 / 6, 1 / 3, 0.5]
CASES = [(0, FACTORS), (1, FACTORS), (2, FACTORS), (3, TURNS)]


def scenes() -> Tensor:
    """One photo and one image of the colours where the formulas could divide by zero or pick a wrong sextant."""
    odd = torch.tensor(EXTREME).T[:, :, None].expand(3, len(EXTREME), 14)
    flat = torch.stack([torch.zeros(3, 14, 14), torch.ones(3, 14, 14), torch.full((3, 14, 14), 0.5)])
    return torch.cat([photos(2, 14).float() / 255, odd[None], flat])


def coloured(operation: int, images: Tensor, factors: Tensor) -> Tensor:
    ours = images.clone()
    colour.OPERATIONS[operation](ours, factors.view(-1, 1, 1, 1))
    return ours


@pytest.mark.parametrize(("operation", "factors"), CASES)
def test_colour_is_torchvisions(operation: int, factors: list[float]) -> None:
    images = scenes()
    for factor in factors:
        ours = coloured(operation, images, torch.full((len(images),), float(factor)))
        assert ours.min() >= -1e-6 and ours.max() <= 1 + 1e-6
        for one, image in zip(ours, images, strict=True):
            theirs = THEIRS[operation](image, factor)
            assert decibels(one, theirs) >= 100
            alone = image.clone()  # one image and a plain number, as large images are made
            colour.OPERATIONS[operation](alone, float(factor))
            assert decibels(alone, theirs) >= 100
    # one factor per image, not one per batch
    spread = torch.linspace(min(factors), max(factors), len(images))
    ours = coloured(operation, images, spread)
    for one, image, factor in zip(ours, images, spread.tolist(), strict=True):
        assert decibels(one, THEIRS[operation](image, factor)) >= 100


@given(
    pixel=st.tuples(*[st.sampled_from([0, 1e-8, 0.25, 0.5, 0.5 + 6e-8, 1 - 6e-8, 1]) | st.floats(0, 1, width=32)] * 3),
    turn=st.floats(-0.5, 0.5, width=32),
)
@settings(deadline=None, max_examples=150)
def test_hue_is_torchvisions_of_any_colour(pixel: tuple[float, ...], turn: float) -> None:
    image = torch.tensor(pixel, dtype=torch.float32).view(3, 1, 1).expand(3, 2, 2)
    ours, theirs = coloured(3, image[None], torch.tensor([turn]))[0], tv.adjust_hue(image, turn)
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0)


def test_contrast_does_not_depend_on_the_batch_on_two_threads() -> None:
    """One large image alone is where torch splits a reduction over threads; kornia's operation then differs."""
    torch.set_num_threads(2)
    index = torch.arange(24)  # about one in four shows it
    images, factor = uniform(0, 0, index, "image", 3, 200, 200), uniform(0, 0, index, "factor")
    whole = coloured(1, images, factor)
    alone = [coloured(1, *one) for one in zip(images.split(1), factor.split(1), strict=True)]
    assert torch.equal(torch.cat(alone), whole)


def test_gray_is_torchvisions() -> None:
    images = scenes()
    grey = images.clone()
    colour.gray(grey, torch.tensor([0, 2, 3]))
    for row in (0, 2, 3):
        assert decibels(grey[row], tv.rgb_to_grayscale(images[row], 3)) >= 100
    assert torch.equal(grey[[1, 4, 5]], images[[1, 4, 5]])


def draws(count: int, epoch: int = 0) -> Any:
    return partial(uniform, 0, epoch, torch.arange(count))


def by_image(plan: colour.Jitter) -> dict[int, list[tuple[int, float]]]:
    """What each jittered image gets, in order."""
    steps: dict[int, list[tuple[int, float]]] = {}
    operations = itertools.chain.from_iterable([operation] * count for operation, count in plan.groups)
    for row, operation, factor in zip(plan.rows.tolist(), operations, plan.values.tolist(), strict=True):
        steps.setdefault(row, []).append((operation, factor))
    # and the same, written down by image
    for row, (order, factors) in enumerate(zip(plan.steps.tolist(), plan.factors.tolist(), strict=True)):
        drawn = [(operation, factors[operation]) for operation in order if operation != colour.NOTHING]
        assert drawn == steps.get(row, [])
    return steps


def test_jitter_is_torchvisions_steps_in_the_drawn_order() -> None:
    images = photos(40, 24).float() / 255
    plan = colour.draw_jitter(View(**SIMCLR), draws(40), "view0")
    ours, alone = images.clone(), images.clone()
    colour.jitter(ours, plan)
    for image, order, factors in zip(alone, plan.steps.tolist(), plan.factors.tolist(), strict=True):
        colour.jitter_one(image, order, factors)
    steps = by_image(plan)
    assert 20 < len(steps) < 40
    for row, image in enumerate(images):
        for operation, factor in steps.get(row, []):
            image = THEIRS[operation](image, factor)
        for one in (ours[row], alone[row]):
            assert decibels(one, image) >= 90 if row in steps else torch.equal(one, image)


@given(seed=st.integers(0, 2**31), strength=st.tuples(*[st.sampled_from([0, 0.3, 0.8])] * 3), hue=st.floats(0, 0.5))
@settings(deadline=None, max_examples=20)
def test_the_fused_colours_are_the_same(seed: int, strength: tuple[float, ...], hue: float) -> None:
    """One function of a table, which is what is compiled: every order, every factor, and images that get nothing."""
    brightness, contrast, saturation = strength
    view = View(jitter=0.8, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    plan = colour.draw_jitter(view, partial(uniform, seed, 0, torch.arange(60)), "view0")
    grey = torch.tensor([0, 7, 30])
    raw = torch.cat([photos(54, 14, seed), (scenes() * 255).round().byte()])
    expected = crop.scaled(raw)
    colour.jitter(expected, plan)
    colour.gray(expected, grey)
    numbers = fused.table(plan, grey)
    ours = fused.colour(raw, numbers, contrast > 0, hue > 0)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert torch.equal(ours, fused.colour(raw.float(), numbers, contrast > 0, hue > 0))


@pytest.mark.parametrize("strength", [(0.8, 0.8, 0.8, 0.2), (0.4, 1.5, 0.1, 0.5)])
def test_jitter_has_torchvisions_distribution(strength: tuple[float, ...]) -> None:
    names = ("brightness", "contrast", "saturation", "hue")
    strengths: dict[str, Any] = dict(zip(names, strength, strict=True))
    view = View(jitter=1.0, **strengths)
    steps = by_image(colour.draw_jitter(view, draws(MANY), "view0"))
    theirs = ColorJitter(*strength)
    torch.manual_seed(0)
    drawn = [theirs.get_params(theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue) for _ in range(MANY)]
    for operation in range(4):
        ours = [dict(row)[operation] for row in steps.values()]
        assert stats.ks_2samp(ours, [row[1 + operation] for row in drawn]).pvalue > 1e-3
    orders = list(itertools.permutations(range(4)))
    counts = np.bincount([orders.index(tuple(step[0] for step in row)) for row in steps.values()], minlength=24)
    assert stats.chisquare(counts).pvalue > 1e-3
    # the four factors and the order are drawn apart
    table = np.array([[dict(row)[operation] for operation in range(4)] for row in steps.values()])
    assert np.abs(np.corrcoef(table.T) - np.eye(4)).max() < 4 / MANY**0.5


def test_strength_zero_is_left_out() -> None:
    plan = colour.draw_jitter(View(jitter=1.0, brightness=0.5, hue=0.1), draws(50), "view0")
    assert {operation for operation, _ in plan.groups} == {0, 3}
    assert len(plan.rows) == 100
    assert colour.draw_jitter(View(jitter=1.0), draws(50), "view0").groups == []
    assert colour.draw_jitter(View(jitter=0.0, hue=0.5), draws(50), "view0").groups == []


@pytest.mark.parametrize("probability", [0.2, 0.8])
def test_probabilities_are_binomial_and_apart(probability: float) -> None:
    draw = draws(MANY)
    view = View(jitter=probability, hue=0.1)
    events = {name: torch.zeros(MANY) for name in ("jitter", "gray", "blur", "flip")}
    events["jitter"][colour.draw_jitter(view, draw, "view0").rows] = 1
    for name in ("gray", "blur", "flip"):
        events[name][chosen(draw(f"view0.{name}"), probability)] = 1
    for name, event in events.items():
        assert stats.binomtest(int(event.sum()), MANY, probability).pvalue > 1e-3, name
    table = torch.corrcoef(torch.stack(list(events.values()))) - torch.eye(4)
    assert float(table.abs().max()) < 4 / MANY**0.5


# --- blur -------------------------------------------------------------------------------------------------------------


def test_kernel_side() -> None:
    assert [blur.kernel_side(side, 0.1) for side in (224, 96, 64, 32, 20, 16, 8)] == [23, 9, 7, 3, 3, 1, 1]
    assert [blur.kernel_side(100, fraction) for fraction in (0.01, 0.02, 0.29, 1.0)] == [1, 3, 29, 101]


@given(side=st.integers(2, 5000), fraction=st.floats(0.001, 1.0))
def test_kernel_is_odd_and_fits(side: int, fraction: float) -> None:
    kernel = blur.kernel_side(side, fraction)
    assert kernel % 2 == 1 and abs(kernel - side * fraction) <= 1 + 1e-6
    assert kernel // 2 < side  # what reflection needs


@pytest.mark.parametrize(("side", "kernel"), [(32, 3), (64, 7), (96, 9), (224, 23), (8, 9)])
def test_blur_is_torchvisions(side: int, kernel: int) -> None:
    images = photos(6, side).float().contiguous() / 255
    rows, sigma = torch.tensor([5, 0, 2, 3]), torch.tensor([0.1, 0.5, 1.3, 2.0])
    ours = images.clone()
    blur.blur(ours, rows, sigma, kernel)
    for row, width in zip(rows.tolist(), sigma.tolist(), strict=True):
        theirs = tv.gaussian_blur(images[row], [kernel, kernel], [width, width])
        alone = images[row].clone()
        blur.blur_one(alone, blur.kernels(torch.tensor([width]), kernel)[0])
        product = blur.by_products(images[row : row + 1], torch.tensor([width]), kernel)[0]
        for one in (ours[row], alone, product):
            torch.testing.assert_close(one, theirs, atol=1e-5, rtol=0)
            assert decibels(one, theirs) >= 100
    assert torch.equal(ours[[1, 4]], images[[1, 4]])


@given(side=st.integers(2, 40), half=st.integers(1, 12), sigma=st.floats(0.05, 9))
@settings(deadline=None, max_examples=25)
def test_three_ways_to_blur_are_one_function(side: int, half: int, sigma: float) -> None:
    """Of any size: also where both mirrors are in reach of one pixel."""
    kernel = 2 * min(half, side - 1) + 1
    images, width = photos(2, side).float().contiguous() / 255, torch.tensor([sigma, 1.0])
    theirs = [
        tv.gaussian_blur(image, [kernel, kernel], [w, w]) for image, w in zip(images, width.tolist(), strict=True)
    ]
    torch.testing.assert_close(blur.by_taps(images, blur.taps(width, kernel)), torch.stack(theirs), atol=1e-5, rtol=0)
    torch.testing.assert_close(blur.by_products(images, width, kernel), torch.stack(theirs), atol=1e-5, rtol=0)
    blur.blur_one(images[0], blur.kernels(width, kernel)[0])
    torch.testing.assert_close(images[0], theirs[0], atol=1e-5, rtol=0)


def test_a_gpu_takes_some_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours and blur by products, whose temporaries must not grow with the batch."""
    taken = []

    def counted(images: Tensor, *rest: Any) -> Tensor:
        taken.append(len(images))
        return by_products(images, *rest)

    by_products, plan = blur.by_products, colour.draw_jitter(View(**SIMCLR), draws(40), "view0")
    images, rows, sigma = photos(40, 24).float() / 255, torch.arange(0, 40, 2), torch.linspace(0.1, 2.0, 20)
    monkeypatch.setattr(blur, "by_products", counted)
    monkeypatch.setattr(colour, "_at_once", lambda images: len(images))
    whole, parts = images.clone(), images.clone()
    colour.jitter(whole, plan)
    colour.gray(whole, rows)
    monkeypatch.setattr(colour, "_at_once", lambda images: 3)
    colour.jitter(parts, plan)
    colour.gray(parts, rows)
    assert torch.equal(parts, whole)
    expected = images.clone()
    blur.blur(expected, rows, sigma, 3)
    monkeypatch.setattr(blur, "_ROOM", 7 * 4 * 24 * 24 * 15)
    blur.blur_by_products(images, rows, sigma, 3)
    assert taken == [7, 7, 6]
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_a_gpu_takes_many_images_at_a_time() -> None:
    """Few enough for 256 MB, enough that a group of a common batch is one launch for each operation."""
    meta = torch.empty(512, 3, 32, 32, device="meta")
    assert colour._at_once(meta) >= 512
    large = torch.empty(512, 3, 224, 224, device="meta")
    assert colour._at_once(large) >= 64 and colour._at_once(large) * 224 * 224 * 4 * colour._PLANES <= 2**28


def test_kernel_of_one_pixel_changes_nothing() -> None:
    images = photos(2, 8).float() / 255
    ours = images.clone()
    blur.blur(ours, torch.tensor([0, 1]), torch.tensor([2.0, 2.0]), 1)
    blur.blur_one(ours[0], blur.kernels(torch.tensor([2.0]), 1)[0])
    assert torch.equal(ours, images)


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("canvas", "side"), [(32, 32), (80, 64), (140, 128)])
def test_whole_chain_is_torchvisions(canvas: int, side: int) -> None:
    """Everything that was drawn, done again with torchvision, image by image."""
    table, kernel = View(**SIMCLR), [blur.kernel_side(side, 0.1)] * 2
    pixels, size, index = photos(24, canvas), sizes(24, canvas, canvas), torch.arange(24)
    draw, name = partial(uniform, 9, 2, index), "view1"
    where = crop.draw_boxes(draw(f"{name}.box", crop.NUMBERS), size, table.crop_scale, table.crop_ratio).tolist()
    flip, grey, blurred = (draw(f"{name}.{what}") for what in ("flip", "gray", "blur"))
    sigma = 0.1 + 1.9 * draw(f"{name}.sigma")
    steps = by_image(colour.draw_jitter(table, draw, name))
    ours = Views([table], side, seed=9)(pixels, size, index, 2)[1]
    for row in range(24):
        image = tv.resized_crop(pixels[row].float() / 255, *where[row], size=[side, side], antialias=True)
        image = tv.horizontal_flip(image) if flip[row] < 0.5 else image
        for operation, factor in steps.get(row, []):
            image = THEIRS[operation](image, factor)
        image = tv.rgb_to_grayscale(image, 3) if grey[row] < 0.2 else image
        image = tv.gaussian_blur(image, kernel, [float(sigma[row])] * 2) if blurred[row] < 0.5 else image
        assert decibels(ours[row], image) >= 45  # two steps of the uint8 crop, amplified by contrast and saturation
