"""The ab plane: the published bins, and soft encoding, annealed mean and smoothing against slow loops."""

import itertools
import math

import pytest
import torch

from sslpre.ops.lab import Bins, in_gamut, recoloured, rgb_to_ab

BINS = Bins()
ROWS = {  # a: the least and the greatest b of the authors' file of bins, which has all between them
    -90: (50, 90), -80: (20, 90), -70: (0, 90), -60: (-20, 90), -50: (-30, 100), -40: (-40, 100), -30: (-50, 100),
    -20: (-50, 100), -10: (-60, 100), 0: (-70, 100), 10: (-80, 90), 20: (-80, 90), 30: (-90, 90), 40: (-100, 90),
    50: (-100, 80), 60: (-110, 80), 70: (-110, 80), 80: (-110, 70), 90: (-110, 70), 100: (-90, 0),
}  # fmt: skip


def colours(count):
    """Lab's ab of random colours, corners of the cube among them: [1, 2, count, 1]."""
    corners = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)
    rest = torch.rand(count - 8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return rgb_to_ab(torch.cat([corners, rest]).T[None, :, :, None])


def test_the_313_bins_are_the_published_ones_in_their_order():
    published = [(a, b) for a, (low, high) in ROWS.items() for b in range(low, high + 1, 10)]
    assert len(published) == 313
    assert [tuple(map(int, bin)) for bin in in_gamut().tolist()] == published


@pytest.mark.parametrize(
    "rgb, ab",  # CIE Lab of sRGB's corners under D65, as tables have them
    [((1, 0, 0), (80.09, 67.20)), ((0, 1, 0), (-86.18, 83.18)), ((0, 0, 1), (79.19, -107.86)), ((1, 1, 1), (0, 0))],
)
def test_ab_of_the_primaries(rgb, ab):
    found = rgb_to_ab(torch.tensor(rgb, dtype=torch.float64).view(1, 3, 1, 1)).flatten()
    assert found.tolist() == pytest.approx(ab, abs=0.05)


def test_soft_encoding_is_that_of_all_bins_searched():
    """The five nearest of 313, exp(−d² / 2σ²) of each, divided by their sum; for colours all over the gamut."""
    ab = colours(500)
    bins, shares = BINS.encode(ab)
    assert bins.shape == shares.shape == (1, 5, 500, 1)
    for at in range(500):
        a, b = ab[0, :, at, 0].tolist()
        distances = sorted((math.hypot(a - x, b - y), i) for i, (x, y) in enumerate(in_gamut().tolist()))[:5]
        weights = [math.exp(-(d**2) / 50) for d, _ in distances]
        assert shares[0, :, at, 0].tolist() == pytest.approx([w / sum(weights) for w in weights], abs=1e-12)
        assert bins[0, 0, at, 0] == distances[0][1]


def test_no_bin_is_nearer_than_those_found():
    """Anywhere on the plane, also where no colour is: 102,400 points, all 313 bins searched."""
    along = torch.linspace(-112, 112, 320, dtype=torch.float64) + 0.013
    points = torch.cartesian_prod(along, along)
    bins, shares = BINS.encode(points.T.reshape(1, 2, 320, 320))
    bins, shares = bins.flatten(2)[0].T, shares.flatten(2)[0].T
    for part, some, share in zip(points.split(6400), bins.split(6400), shares.split(6400), strict=True):
        d = torch.cdist(part, in_gamut(), compute_mode="donot_use_mm_for_euclid_dist")
        assert torch.allclose(d.gather(1, some), d.topk(5, largest=False).values, atol=1e-9)
        assert torch.allclose(share.sum(1), torch.ones(len(part), dtype=torch.float64))
    assert (bins.sort(1).values.diff(dim=1) > 0).all() and (shares.diff(dim=1) <= 0).all()


def test_a_bins_own_colour_is_shared_with_its_neighbours():
    grey = BINS.encode(torch.zeros(1, 2, 1, 1, dtype=torch.float64))
    assert in_gamut()[grey[0][0, 0]].flatten().tolist() == [0, 0]
    one, four = 1 / (1 + 4 * math.exp(-2)), math.exp(-2) / (1 + 4 * math.exp(-2))
    assert grey[1].flatten().tolist() == pytest.approx([one] + [four] * 4)


def test_encoding_depends_on_neither_batch_nor_layout():
    ab = colours(96).reshape(2, 2, 6, 8)
    whole = BINS.encode(ab)
    for part, expected in zip(BINS.encode(ab[1:].contiguous(memory_format=torch.channels_last)), whole, strict=True):
        assert torch.equal(part, expected[1:])
    assert BINS.encode(ab.float())[1].dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.38, 1.0, 0.01])
def test_annealed_mean_is_equation_5(temperature):
    logits = torch.randn(1, 313, 2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = BINS.annealed(logits, temperature)
    for at in range(2):
        z = torch.softmax(logits[0, :, at, 0], 0).tolist()
        sharp = [math.exp(math.log(p) / temperature - 100) if temperature > 0.1 else 0.0 for p in z]
        if temperature == 0.01:
            sharp[max(range(313), key=z.__getitem__)] = 1.0  # almost the mode
        mean = [sum(s * bin[c] for s, bin in zip(sharp, in_gamut().tolist(), strict=True)) / sum(sharp) for c in (0, 1)]
        assert found[0, :, at, 0].tolist() == pytest.approx(mean, abs=1e-6 if temperature > 0.1 else 2.0)


def test_smoothing_keeps_the_sum_and_spreads_as_a_gaussian():
    ab = in_gamut()
    for place in ([0, 0], [100, -90]):  # the second at the gamut's edge
        p = (ab == torch.tensor(place)).all(1).double()
        smooth = BINS.smoothed(p)
        assert smooth.sum().item() == pytest.approx(1)
        ratio = smooth[(ab == torch.tensor(place) + torch.tensor([-10, 10])).all(1)] / smooth[p.bool()]
        assert ratio.item() == pytest.approx(math.exp(-200 / 50))


def test_an_image_with_its_own_colours_is_itself():
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(recoloured(x, rgb_to_ab(x)), x, atol=1e-3)
    grey = recoloured(x, torch.zeros(2, 2, 2, 2))
    assert grey.shape == x.shape and (grey.amax(1) - grey.amin(1)).max() < 1e-3
