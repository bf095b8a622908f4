"""Near duplicates: what the hash is blind to and what it sees, and that pairs are those of comparing all with all."""

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given
from hypothesis import strategies as st

from sslpre.data.sample import sample
from sslpre.ops.duplicates import BITS, cosines, groups, near, perceptual


@pytest.fixture(scope="module")
def images():
    source = sample(seed=0).train
    return torch.stack([torch.from_numpy(source.read(i).copy()).permute(2, 0, 1) for i in range(200)])


def distance(one, other):
    return np.bitwise_count(one ^ other)


def test_the_transform_is_that_of_scipy():
    x = np.random.default_rng(0).normal(size=(32, 32))
    ours = cosines(32, 8).numpy()
    assert np.allclose(4 * ours @ x @ ours.T, scipy.fft.dctn(x, type=2)[:8, :8])


def test_blind_to_size_brightness_and_a_little_noise(images):
    hashes, told = perceptual(images)
    assert told.mean() > 0.9
    larger = torch.nn.functional.interpolate(images.float(), scale_factor=2, mode="bilinear").round().byte()
    brighter = (images.float() * 0.8 + 20).round().byte()
    noisy = (images.float() + torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    for changed, share in ((larger, 0.95), (brighter, 0.95), (noisy.round().byte(), 0.9)):
        assert (distance(perceptual(changed)[0], hashes)[told] <= BITS).mean() >= share


def test_turned_images_and_other_images_are_others(images):
    hashes, told = perceptual(images)
    assert (distance(perceptual(images.rot90(1, (2, 3)))[0], hashes)[told] > BITS).mean() > 0.95
    pairs = near(hashes[told])
    assert len(pairs) < 0.002 * told.sum() ** 2 / 2


def test_a_flat_image_is_not_compared():
    flat = torch.full((1, 3, 40, 40), 77, dtype=torch.uint8)
    half = flat.clone()
    half[..., :20] = 200
    assert perceptual(torch.cat([flat, half]))[1].tolist() == [False, True]


hashes = st.lists(st.integers(0, 2**64 - 1), max_size=40)


@given(hashes, hashes, st.lists(st.tuples(st.integers(0, 39), st.lists(st.integers(0, 63), max_size=5))))
def test_pairs_are_those_of_all_with_all(one, other, changes):
    other += [one[i % len(one)] ^ sum(1 << bit for bit in set(bits)) for i, bits in changes if one]
    one_, other_ = np.array(one, np.uint64), np.array(other, np.uint64)
    every = [[i, j] for i, a in enumerate(one) for j, b in enumerate(other) if (a ^ b).bit_count() <= BITS]
    assert near(one_, other_).tolist() == every
    within = [[i, j] for i, a in enumerate(other) for j, b in enumerate(other) if i < j and (a ^ b).bit_count() <= BITS]
    assert near(other_).tolist() == within


def test_pairs_in_several_chunks(monkeypatch):
    drawn = np.random.default_rng(0).integers(0, 64, 300).astype(np.uint64)  # few different ones: many pairs
    whole = near(drawn)
    monkeypatch.setattr("sslpre.ops.duplicates.CHUNK", 500)
    assert np.array_equal(near(drawn), whole)
    assert len(whole) > 5000


def test_groups():
    assert groups(["a", "b", "a", "c", "b", "a"]) == [[0, 2, 5], [1, 4]]
