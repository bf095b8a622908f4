"""Relative location: where patches are cut, what the guards leave of them, the labels, and the loss as a slow loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sslpre.errors import SslpreError
from sslpre.methods.relative_location import (
    CENTRE,
    NEIGHBOURS,
    RelativeLocation,
    coarsening,
    corners,
    dropped,
    geometry,
    projected,
)
from sslpre.objective import Batch, Setup

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])


class Seeing(nn.Module):
    """An encoder that keeps what it was shown, standardised as an encoder does."""

    dim = 12

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        self.saw = (x - MEAN.view(1, 3, 1, 1).to(x.dtype)) / STD.view(1, 3, 1, 1).to(x.dtype)
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def relative(side=32, patch=1, **arguments):
    setup = Setup(16, None, 4, (side,), MEAN, STD, lambda colour, size: Seeing(size), patch)
    return RelativeLocation(setup, **arguments).double()


def batch_of(x, first=0, epoch=0):
    index = torch.arange(first, first + len(x))
    return Batch([x], index, torch.full((len(x),), -1), 0.0, 0, epoch)


def photos(count=4, side=32):
    return torch.rand(count, 3, side, side, dtype=torch.float64)


def saw(method, x):
    """What the first layer sees of a batch: [B, patches, 3, s, s]."""
    method.loss(batch_of(x))
    return method.encoder.saw.unflatten(0, (len(x), -1))


def guarded(method, x):
    """The same before all patches get the same contrast."""
    return method.guarded(batch_of(x))


def dense(layer, x):
    """What a layer is: weights, then mean 0 and variance 1 over its numbers, then nothing below 0."""
    z = layer[0].weight @ x
    z = (z - z.mean()) / (z.var(correction=0) + layer[1].eps).sqrt() * layer[1].weight + layer[1].bias
    return z.clamp(min=0)


def test_loss_is_the_mean_over_images_and_pairs():
    """A pair at a time: −log softmax of where the second lies."""
    method, x = relative(pairs=3).eval(), photos()
    batch = batch_of(x)
    patches, asked = method.patches(batch), method.neighbours(batch)
    total, right = 0.0, 0
    for image in range(4):
        for pair in range(3):
            two = [nn.functional.adaptive_avg_pool2d(patches[image, n], 2).flatten() for n in (0, 1 + pair)]
            first, second = (dense(method.fc6, features) for features in two)
            last, joint = method.head[-1], dense(method.head[1], dense(method.head[0], torch.cat([first, second])))
            scores = (last.weight @ joint + last.bias).tolist()
            wanted = asked[image, pair].item()
            total += math.log(sum(map(math.exp, scores))) - scores[wanted]
            right += max(range(8), key=scores.__getitem__) == wanted
    loss = method.loss(batch)
    assert loss.value.item() == pytest.approx(total / 12, abs=1e-12)
    assert loss.terms["accuracy"].item() == pytest.approx(right / 12)


def test_guessing_is_the_chance_value():
    method = relative()
    nn.init.zeros_(method.head[-1].weight)
    nn.init.zeros_(method.head[-1].bias)
    assert method.loss(batch_of(photos())).value.item() == pytest.approx(method.chance)
    assert method.chance == pytest.approx(math.log(8))


@pytest.mark.parametrize("pairs", [1, 3, 8])
def test_labels_are_uniform(pairs):
    """With all eight exactly, in each image; with fewer as often, and none twice in an image."""
    method = relative(pairs=pairs)
    asked = torch.cat([method.neighbours(batch_of(photos(400, 10), epoch=e)) for e in range(5)])
    assert asked.shape == (2000, pairs)
    assert (asked.diff(dim=1) > 0).all()
    counts, expected = torch.bincount(asked.flatten(), minlength=8), 2000 * pairs / 8
    assert ((counts - expected).square() / expected).sum() < 24.4  # χ² with 7 degrees: one in a thousand
    if pairs == 8:
        assert torch.equal(asked, torch.arange(8).expand(2000, 8))


@given(st.integers(10, 700))
def test_the_patches_fit_and_are_the_largest_that_do(side):
    patch, jitter = geometry(side)
    assert patch % 2 == 0 and jitter == max(1, round(7 * patch / 96))
    assert 4 * patch + 2 * jitter <= side
    larger = patch + 2
    assert 4 * larger + 2 * max(1, round(7 * larger / 96)) > side
    asked = torch.arange(8).expand(30, 8)
    top, left = corners(batch_of(torch.zeros(30, 3, side, 1).expand(-1, -1, -1, side)), asked)
    assert min(top.min(), left.min()) >= 0 and max(top.max(), left.max()) + patch <= side


def test_positions_are_the_papers():
    """Patches of 96 px, gaps of 48, each moved by −7 to 7 px, evenly and apart from the others."""
    assert geometry(398) == (96, 7)
    x, count = torch.zeros(2000, 3, 404, 1).expand(-1, -1, -1, 404), 2000
    assert geometry(404) == (96, 7)
    where = torch.stack(corners(batch_of(x), torch.arange(8).expand(count, 8)), 2)  # [B, 9, 2]
    cells = torch.tensor([CENTRE, *(c for c in range(9) if c != CENTRE)])
    moved = where - 144 * torch.stack([cells // 3, cells % 3], 1)  # less 96 + 48 a cell: the grid's place, and jitter
    low, high = moved.amin(1), moved.amax(1)
    assert (high - low).max() <= 14 and low.min() >= 0 and high.max() <= 404 - 384
    # two patches' jitters differ by −14 to 14, as two dice of 15 sides do
    apart = (moved[:, 0] - moved[:, 1]).flatten()
    counts = torch.bincount(apart + 14, minlength=29)
    expected = 4000 * (15 - (torch.arange(29) - 14).abs()) / 225
    assert ((counts - expected).square() / expected).sum() < 56.9  # χ² with 28 degrees: one in a thousand
    # the mean over a grid tells its place: 0 to 6, beside nine jitters that average 7
    place = moved.double().mean(1) - 7
    assert abs(torch.corrcoef(place.T)[0, 1]) < 0.1, "its row tells nothing of its column"
    place = place.flatten()
    assert abs(place.mean() - 3) < 0.2 and abs(place.var() - (48 / 12 + 224 / 12 / 9)) < 0.4


def test_each_name_is_where_it_says():
    method = relative(pairs=8)
    batch = batch_of(photos(3))
    asked = method.neighbours(batch)
    top, left = corners(batch, asked)
    for image in range(3):
        for pair in range(8):
            name = NEIGHBOURS[asked[image, pair]]
            down, right = top[image, 1 + pair] - top[image, 0], left[image, 1 + pair] - left[image, 0]
            vertical = "upper" if down < -5 else "lower" if down > 5 else ""
            horizontal = "left" if right < -5 else "right" if right > 5 else ""
            told = name.replace("above", "upper").replace("below", "lower")
            assert told == f"{vertical} {horizontal}".strip()


@pytest.mark.parametrize("colour", ["none", "projection", "dropping"])
def test_patches_have_one_contrast(colour):
    """Strong and weak ones alike; in what is flat there is nothing to enlarge."""
    x = photos(6) * torch.tensor([1, 0.5, 0.2, 0.1, 1e-5, 0]).view(-1, 1, 1, 1) + 0.2
    contrast = saw(relative(colour=colour, pixelated=0.0), x).square().mean((2, 3, 4)).sqrt()
    assert (contrast[:4] - 1).abs().max() < 1e-9
    assert contrast[4].max() < 0.01 and contrast[5].max() < 1e-9


def test_contrast_is_all_that_the_last_step_changes():
    method, x = relative(), photos()
    before, after = guarded(method, x).flatten(2), saw(method, x).flatten(2)
    assert torch.nn.functional.cosine_similarity(before, after, dim=2).min() > 1 - 1e-9


def test_patches_lose_their_mean():
    x = photos(6) * 0.2 + torch.rand(6, 3, 1, 1, dtype=torch.float64)
    for colour in ("none", "projection", "dropping"):
        seen = guarded(relative(colour=colour), x)
        means = seen.mean((3, 4)).abs()
        assert means.max() < (1e-2 if colour == "dropping" else 1e-6), colour  # noise has a mean of its own


def test_dropping_leaves_one_channel_and_a_hundredth_of_noise():
    x = photos(200, 66)
    seen, plain = guarded(relative(66, pixelated=0.0), x), guarded(relative(66, pixelated=0.0, colour="none"), x)
    same = (seen - plain).abs().amax((3, 4)) < 1e-12
    assert (same.sum(2) == 1).all(), "just one channel as it was"
    spread = seen.std((3, 4), correction=0)
    stays = spread[same].unflatten(0, (200, 9, 1))
    ratio = (spread / stays)[~same]
    assert abs(ratio.square().mean().sqrt() * 100 - 1) < 0.02
    counts = same.sum((0, 1))
    assert ((counts - 600).square() / 600).sum() < 13.8, "each channel as often: χ² with 2 degrees, one in a thousand"
    assert (same.int().argmax(2).amin(1) != same.int().argmax(2).amax(1)).double().mean() > 0.95, "drawn for each patch"
    noise = (seen / stays[..., None, None])[~same].flatten() * 100
    assert abs((noise**4).mean() - 3) < 0.1, "Gaussian"
    dropped_two = seen[0, 0][~same[0, 0]]
    assert torch.corrcoef(dropped_two.flatten(1))[0, 1].abs() < 0.3, "two noises, not one"


@given(st.integers(0, 99))
def test_dropping_against_a_loop(seed):
    random = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, 3, 4, 4, generator=random, dtype=torch.float64)
    noise = torch.randn(2, 3, 2, 4, 4, generator=random, dtype=torch.float64)
    kept = torch.randint(3, (2, 3), generator=random)
    found = dropped(x, kept, noise)
    for image in range(2):
        for patch in range(3):
            keep, loud = int(kept[image, patch]), x[image, patch, int(kept[image, patch])].std(correction=0)
            assert torch.equal(found[image, patch, keep], x[image, patch, keep])
            for turn in (1, 2):
                expected = noise[image, patch, turn - 1] * loud / 100
                assert torch.allclose(found[image, patch, (keep + turn) % 3], expected)


def test_projection_takes_the_axis_from_green_to_magenta_out():
    """B = I − aᵀa/(aaᵀ): nothing is left along a, what is across it stays, and twice is once."""
    seen = guarded(relative(colour="projection"), photos(3))
    a = torch.tensor([-1.0, 2.0, -1.0], dtype=torch.float64)
    assert torch.einsum("c,bnchw->bnhw", a, seen).abs().max() < 1e-6
    plain = guarded(relative(colour="none"), photos(1))
    across = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)  # grey stays grey
    assert torch.allclose(torch.einsum("c,bnchw->bnhw", across, projected(plain) - plain), torch.zeros(()).double())
    assert torch.allclose(projected(projected(plain)), projected(plain))
    assert (projected(plain) - plain).abs().max() > 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(projected(plain.float()), projected(plain.float()).float())
        assert torch.allclose(projected(plain.float()).double(), projected(plain), atol=1e-6)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.33, 0.30, 0.36), (1.0, 0.99, 1)])
def test_some_patches_are_pixelated(share, low, high):
    x = photos(250, 66)
    plain, seen = (guarded(relative(66, colour="none", pixelated=p), x) for p in (0.0, share))
    changed = (seen - plain).abs().amax((2, 3, 4)) > 1e-3
    assert low <= changed.double().mean() <= high
    if 0 < share < 1:
        assert 0.9 < changed.any(1).double().mean() < 1 and not changed.all(1).any(), "drawn for each patch"
        detail = (seen.diff(dim=4).square().mean((2, 3, 4)) / plain.diff(dim=4).square().mean((2, 3, 4)))[changed]
        assert detail.max() < 0.9 and detail.min() < 0.05, "less detail, in some hardly any"


def test_pixelated_patches_are_resized_ones():
    """Each matrix is torch's antialiased resizing to fewer pixels and back; the last leaves patches as they are."""
    matrices, x = coarsening(14), torch.rand(2, 3, 14, 14)
    assert matrices.shape == (14, 14, 14)
    for r in range(1, 15):
        fewer = nn.functional.interpolate(x, (r, r), mode="bilinear", antialias=True)
        expected = nn.functional.interpolate(fewer, (14, 14), mode="bilinear")
        assert torch.allclose(matrices[r - 1] @ x @ matrices[r - 1].T, expected, atol=1e-6), r
    assert torch.equal(matrices[-1], torch.eye(14))
    assert coarsening(200).shape == (96, 200, 200) and torch.allclose(coarsening(200)[-1], torch.eye(200))


def test_sides_are_drawn_evenly_in_pixels():
    """Of patches of 96 px: from 10 × 10 pixels up to below 95 × 95, each number of pixels as likely."""
    method = relative(398, colour="none", pixelated=1.0)
    method.coarsened = torch.arange(1.0, 97.0)[:, None, None].expand(-1, 96, 96)  # tells the side that was drawn
    marks = torch.zeros(300, 9, 1, 96, 96)
    marks[..., 0, 0] = 1
    sides = method.coarser(marks, batch_of(marks[:, 0]))[..., 0, 0, 0].sqrt()
    assert sides.min() >= 10 and sides.max() == 94
    share = (sides.square() - 100) / (95**2 - 100)
    assert abs(share.mean() - 0.5) < 0.02 and abs(share.var() - 1 / 12) < 0.005


@pytest.mark.parametrize("side", [24, 32, 48, 64])
def test_no_patch_becomes_one_colour(side):
    method = relative(side, colour="none", pixelated=1.0)
    seen = saw(method, photos(200, side))
    assert seen.std((3, 4)).min() > 1e-3


def test_patches_of_four_pixels_are_not_made_coarser():
    x = photos(3, 20)
    assert geometry(20)[0] == 4
    assert torch.equal(*(guarded(relative(20, colour="none", pixelated=p), x) for p in (0.0, 1.0)))


def test_the_network_is_built_for_patches():
    assert relative().encoder.size == RelativeLocation.sees(32) == 18, "6 px, enlarged"
    assert relative(patch=16).encoder.size == RelativeLocation.sees(32, 16) == 32
    assert relative(398, patch=16).encoder.size == RelativeLocation.sees(398, 16) == 96
    assert relative(tile=12).encoder.size == RelativeLocation.sees(32, tile=12, pairs=8) == 12
    seen = guarded(relative(tile=12, colour="none"), photos())
    assert seen.shape == (4, 9, 3, 12, 12) and seen.mean((3, 4)).abs().max() < 1e-6
    assert guarded(relative(pairs=2), photos()).shape == (4, 3, 3, 18, 18), "no patch is encoded that no pair asks for"


@pytest.mark.parametrize(
    ("arguments", "found", "hint"),
    [
        ({"side": 9}, "`9`", "--image-size 10 or more, or a larger size in [[views]]"),
        ({"patch": 16, "tile": 60}, "`60`", "--set method.tile=48 or 64"),
    ],
)
def test_what_cannot_be_is_refused(arguments, found, hint):
    with pytest.raises(SslpreError) as error:
        relative(**arguments)
    assert found in error.value.message and error.value.hint == hint
    assert geometry(10) == (2, 1)


def test_pictures_show_the_patches_and_name_the_answer():
    method, x = relative(pairs=3, pixelated=0.0, colour="none", tile=6), photos(2)
    batch = batch_of(x)
    asked, shown = method.neighbours(batch), method.patches(batch).clamp(0, 1)
    for row, (whole, *pairs) in enumerate(method.pictures(batch)):
        assert [pair.title for pair in pairs] == [f"centre, and {NEIGHBOURS[n]}" for n in asked[row]]
        assert ((whole.image - x[row]).abs().amax(0) < 1e-12).sum() >= 4 * 36, "four patches as they are"
        for pair, neighbour in zip(pairs, shown[row, 1:], strict=True):
            assert torch.equal(pair.image[:, :, :6], shown[row, 0]) and torch.equal(pair.image[:, :, -6:], neighbour)


def test_softmax_is_fp32_under_autocast():
    method = relative().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert method.loss(batch_of(photos().float())).value.dtype == torch.float32


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.sampled_from(["dropping", "projection", "none"]))
def test_a_batch_is_the_mean_of_its_images(first, count, colour):
    method = relative(colour=colour).eval()
    x = photos(count)
    whole = method.loss(batch_of(x, first)).value
    alone = [method.loss(batch_of(x[n : n + 1], first + n)).value for n in range(count)]
    assert whole.item() == pytest.approx(torch.stack(alone).mean().item(), abs=1e-12)
