"""Jigsaw: where tiles are cut, what the encoder sees of them, the orders, and the loss against a slow loop."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sslpre import recipe as recipes
from sslpre.errors import SslpreError
from sslpre.methods.jigsaw import TILES, Jigsaw, cells, corners, far_apart, grid
from sslpre.objective import Batch, Setup
from sslpre.views.build import Views

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])


class Seeing(nn.Module):
    """An encoder that keeps what it was shown, as its first layer would get it, and gives the means of quarters."""

    dim = 12

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        self.saw = (x - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def jigsaw(side=32, patch=1, **arguments):
    setup = Setup(16, None, 4, (side,), MEAN, STD, lambda colour, size: Seeing(size), patch)
    return Jigsaw(setup, **{"permutations": 20, "draws": 3, **arguments}).double()


def batch_of(x, first=0, epoch=0):
    index = torch.arange(first, first + len(x))
    return Batch([x], index, torch.full((len(x),), -1), 0.0, 0, epoch)


def photos(count=4, side=32):
    return torch.rand(count, 3, side, side, dtype=torch.float64)


def test_loss_is_the_mean_over_images_and_orders():
    """Each image's tiles in each of its orders, one after the other: −log softmax of the order's number."""
    method, x = jigsaw(), photos()
    batch = batch_of(x)
    tiles, orders = method.tiles(batch), method.orders(batch)
    (linear, norm, _), (weight, bias) = method.column, (p.detach() for p in method.head.parameters())
    total, right = 0.0, 0
    for image in range(4):
        seen = [nn.functional.adaptive_avg_pool2d(tile, 2).flatten() for tile in tiles[image]]
        for number in orders[image].tolist():
            joined = []
            for place in range(TILES):
                z = linear.weight @ seen[far_apart(20)[number][place]]
                z = (z - z.mean()) / (z.var(correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
                joined += z.clamp(min=0).tolist()
            joint = torch.tensor(joined, dtype=torch.float64)
            scores = [float(row @ joint + b) for row, b in zip(weight, bias, strict=True)]
            total += math.log(sum(map(math.exp, scores))) - scores[number]
            right += max(range(20), key=scores.__getitem__) == number
    loss = method.loss(batch)
    assert loss.value.item() == pytest.approx(total / 12, abs=1e-12)
    assert loss.terms["accuracy"].item() == pytest.approx(right / 12)


def test_guessing_is_the_chance_value():
    method = jigsaw()
    nn.init.zeros_(method.head.weight)
    nn.init.zeros_(method.head.bias)
    assert method.loss(batch_of(photos())).value.item() == pytest.approx(method.chance)
    assert method.chance == pytest.approx(math.log(20))


@given(st.integers(12, 400))
def test_tiles_lie_in_their_cells_and_never_fill_them(side):
    cell, tile = cells(side)
    assert 3 * cell <= side < 3 * cell + 3 and 0 < tile < cell
    assert abs(tile / cell - 64 / 75) <= 0.5 / cell
    top, left = corners(batch_of(torch.zeros(50, 3, side, 1).expand(-1, -1, -1, side)))
    start = (side - 3 * cell) // 2
    for place in range(TILES):
        y, x = top[:, place] - start - place // 3 * cell, left[:, place] - start - place % 3 * cell
        assert min(y.min(), x.min()) >= 0 and max(y.max(), x.max()) + tile <= cell


def test_tiles_are_the_papers_and_their_places_uniform():
    assert cells(225) == (75, 64)
    assert cells(32) == (10, 9)
    x = torch.zeros(2000, 3, 225, 1).expand(-1, -1, -1, 225)
    top, left = corners(batch_of(x))
    cell = torch.arange(TILES)
    for moved in (top - cell // 3 * 75, left - cell % 3 * 75):
        counts = torch.bincount(moved.flatten(), minlength=12)
        assert len(counts) == 12
        expected = 2000 * TILES / 12
        assert ((counts - expected).square() / expected).sum() < 31.3  # χ² with 11 degrees: one in a thousand
    both = torch.stack([top.float().flatten(0), left.float().flatten(0)]) - torch.stack(
        [(cell // 3 * 75).repeat(2000), (cell % 3 * 75).repeat(2000)]
    )
    assert torch.corrcoef(both)[0, 1].abs() < 0.03, "drawn apart"
    assert not torch.equal(top, corners(batch_of(x, epoch=1))[0]), "elsewhere in another epoch"


def test_the_encoder_sees_tiles_without_mean_and_deviation():
    """Neighbouring tiles have neighbouring means: what would tell without looking at what is in them."""
    method = jigsaw(gray=0.5)
    ramp = torch.linspace(0, 1, 32, dtype=torch.float64)
    x = (ramp[:, None] + 0.3 * ramp) / 2 + 0.1 * photos(8)
    method.loss(batch_of(x))
    saw = method.encoder.saw
    assert saw.shape == (72, 3, 18, 18)
    assert saw.mean((2, 3)).abs().max() < 1e-6  # the constants above are float32
    assert (saw.var((2, 3), correction=0) - 1).abs().max() < 1e-6


def test_a_flat_tile_is_grey_and_not_noise():
    method = jigsaw()
    flat = torch.full((2, 3, 32, 32), 0.7, dtype=torch.float64) + 1e-9 * photos(2)
    method.loss(batch_of(flat))
    assert method.encoder.saw.abs().max() < 1e-5


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.3, 0.22, 0.38), (1.0, 1, 1)])
def test_whole_images_lose_their_colour(share, low, high):
    method, x = jigsaw(gray=share), photos(400)
    method.loss(batch_of(x))
    saw = method.encoder.saw.unflatten(0, (400, TILES))
    alike = (saw[:, :, 0] - saw[:, :, 1]).abs().amax((2, 3)) < 1e-5
    assert torch.equal(alike.all(1), alike.any(1)), "all tiles of an image or none"
    assert low <= alike.all(1).double().mean() <= high


def test_grey_is_luma():
    x = photos(1)
    tile = jigsaw(gray=1.0).tiles(batch_of(x))
    luma = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    assert torch.allclose(tile, jigsaw(gray=0.0).tiles(batch_of(luma.expand(-1, 3, -1, -1))))


@pytest.mark.parametrize(("count", "mean", "least"), [(10, 8.57, 8), (100, 8.08, 3), (1000, 8.00, 2)])
def test_orders_differ_as_much_as_the_papers(count, mean, least):
    """The paper's sets have these mean distances, and smallest ones of 7, 2 and 2."""
    chosen = far_apart(count)
    assert chosen.shape == (count, TILES) and chosen.sort(1).values.eq(torch.arange(TILES)).all()
    distance = (chosen[:, None] != chosen[None]).sum(2)[~torch.eye(count, dtype=torch.bool)]
    assert distance.min() == least, "those of 10 and 100 are further apart than two that swap two tiles"
    assert distance.double().mean() >= mean - 0.005
    assert torch.equal(chosen[:10], far_apart.__wrapped__(10)), "always the same; more of them begin with the fewer"


def test_each_next_order_is_the_farthest():
    """Algorithm 1 by brute force over all 9!: the sum of distances to those before, then the nearest of them."""
    chosen, every = far_apart(25), torch.tensor(list(itertools.permutations(range(TILES))))
    assert chosen[0].tolist() != list(range(TILES)), "the first is drawn"
    for n in (1, 2, 24):
        distances = torch.stack([(every != order).sum(1) for order in chosen[:n]])
        distances[:, (distances == 0).any(0)] = -1  # those that are chosen already
        here = (every == chosen[n]).all(1).nonzero().item()
        total, nearest = distances.sum(0), distances.amin(0)
        assert total[here] == total.max()
        assert nearest[here] == nearest[total == total.max()].max()


def test_orders_are_drawn_without_putting_back_and_evenly():
    method = jigsaw()
    drawn = torch.cat([method.orders(batch_of(photos(500), epoch=e)) for e in range(4)])
    assert drawn.shape == (2000, 3)
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()
    counts = torch.bincount(drawn.flatten(), minlength=20)
    assert ((counts - 300).square() / 300).sum() < 43.8  # χ² with 19 degrees: one in a thousand
    batch = batch_of(photos(8))
    half = batch_of(batch.views[0][4:], first=4)
    assert torch.equal(method.orders(batch)[4:], method.orders(half)), "an image's own, whatever batch it is in"


class Marks(nn.Module):
    """Tells each tile's place in the image, whatever is in it."""

    def forward(self, x):
        return torch.eye(TILES, dtype=x.dtype).repeat(len(x) // TILES, 1)


def test_the_label_is_the_order_that_was_shown():
    """A head that knows each tile's place finds the order: tiles are told apart by a mark."""
    method = jigsaw(permutations=20, draws=20, gray=0.0)
    method.column = nn.Identity()
    method.encoder = Marks()
    method.head = nn.Linear(TILES * TILES, 20, bias=False, dtype=torch.float64)
    with torch.no_grad():
        method.head.weight.copy_(10 * nn.functional.one_hot(far_apart(20), TILES).flatten(1))
    loss = method.loss(batch_of(photos(2)))
    assert loss.terms["accuracy"] == 1 and loss.value < 1e-3


def test_pictures_put_the_tiles_back():
    """Standardised apart, tiles in the drawn order are the tiles in place, moved."""
    method, x = jigsaw(tile=9), photos(2)
    batch = batch_of(x)
    for row, pictures in enumerate(method.pictures(batch)):
        placed, inside, shuffled = pictures
        order = method.orders(batch)[row, 0]
        assert shuffled.title == f"as shown: order {order + 1} of 20"
        top, left = (corner[row] for corner in corners(batch))
        for place in range(TILES):
            y, z = int(top[place]), int(left[place])
            assert torch.equal(placed.image[:, y : y + 9, z : z + 9], x[row, :, y : y + 9, z : z + 9])
        cut = [
            [p.image[:, y + 1 : y + 10, z + 1 : z + 10] for y in (0, 11, 22) for z in (0, 11, 22)] for p in pictures[1:]
        ]
        for place, tile in enumerate(far_apart(20)[order]):
            assert torch.equal(cut[1][place], cut[0][tile])
        assert all(p.image.min() >= 0 and p.image.max() <= 1 for p in (placed, inside, shuffled))


def test_a_grid_reads_row_by_row():
    tiles = torch.arange(9.0).view(9, 1, 1, 1)
    assert grid(tiles)[0, 1::3, 1::3].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_the_network_is_built_for_tiles():
    assert jigsaw().encoder.size == Jigsaw.sees(32) == 18, "9 px, enlarged"
    assert jigsaw(patch=16).encoder.size == Jigsaw.sees(32, 16) == 32
    assert jigsaw(side=225, patch=16).encoder.size == Jigsaw.sees(225, 16) == 64
    assert jigsaw(tile=24).encoder.size == Jigsaw.sees(32, tile=24, draws=3) == 24
    method = jigsaw(tile=12)
    method.loss(batch_of(photos()))
    assert method.encoder.saw.shape[2:] == (12, 12)
    assert (method.encoder.saw.var((2, 3), correction=0) - 1).abs().max() < 1e-6, "standardised at the side it is shown"


@pytest.mark.parametrize(
    ("arguments", "found", "hint"),
    [
        ({"side": 11}, "`11`", "--image-size 12 or more, or a larger size in [[views]]"),
        ({"patch": 16, "tile": 60}, "`60`", "--set method.tile=48 or 64"),
        ({"draws": 21}, "`21`", "--set method.draws=20"),
    ],
)
def test_what_cannot_be_is_refused(arguments, found, hint):
    with pytest.raises(SslpreError) as error:
        jigsaw(**arguments)
    assert found in error.value.message and error.value.hint == hint


def test_softmax_is_fp32_under_autocast():
    method = jigsaw().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert method.loss(batch_of(photos().float())).value.dtype == torch.float32


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_a_batch_is_the_mean_of_its_images(first, count):
    method = jigsaw().eval()
    x = photos(count)
    whole = method.loss(batch_of(x, first)).value
    alone = [method.loss(batch_of(x[n : n + 1], first + n)).value for n in range(count)]
    assert whole.item() == pytest.approx(torch.stack(alone).mean().item(), abs=1e-12)


def test_crops_of_small_images_are_their_own_pixels():
    """How a crop mixes pixels where it is enlarged tells their places."""
    recipe = recipes.load("jigsaw-cifar")
    x = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = Views(recipe.views, 32, 0)(x, torch.full((64, 2), 32), torch.arange(64), 0)[0]
    assert views.shape == (64, 3, 24, 24)
    places = []
    for image, view in zip(x / 255, views, strict=True):
        windows = image.unfold(1, 24, 1).unfold(2, 24, 1).permute(1, 2, 0, 3, 4)
        same = [(windows - turned).abs().amax((2, 3, 4)) < 1e-6 for turned in (view, view.flip(2))]
        (place,) = [at for found in same for at in found.nonzero().tolist()]
        places.append(tuple(place))
    assert len({y % 8 for y, _ in places}) == len({x % 8 for _, x in places}) == 8, "JPEG blocks lie in any way"
