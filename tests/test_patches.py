"""Cutting patches: every pixel from where it should be, and the side at which they are shown."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sslpre.errors import SslpreError
from sslpre.ops import patches


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(0, 6),
    st.integers(0, 6),
    st.booleans(),
    st.integers(0, 99),
)
def test_windows_are_slices(count, places, side, more_rows, more_columns, last, seed):
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, side + more_rows, side + more_columns, generator=random)
    if last:
        images = images.contiguous(memory_format=torch.channels_last)
    top = torch.randint(more_rows + 1, (count, places), generator=random)
    left = torch.randint(more_columns + 1, (count, places), generator=random)
    windows = patches.cut(images, top, left, side)
    assert windows.shape == (count, places, 3, side, side)
    for image in range(count):
        for place in range(places):
            y, x = top[image, place], left[image, place]
            assert torch.equal(windows[image, place], images[image, :, y : y + side, x : x + side])


def test_a_batch_of_patches_lies_channels_last():
    images = torch.rand(2, 3, 8, 8)
    corner = torch.zeros(2, 5, dtype=torch.int64)
    windows = patches.cut(images, corner, corner, 4).flatten(0, 1)
    assert windows.is_contiguous(memory_format=torch.channels_last)


def test_resizing_averages_and_keeps_what_fits():
    x = torch.rand(2, 3, 3, 8, 8, dtype=torch.float64)
    assert patches.resize(x, 8) is x
    stripes = torch.arange(8.0).remainder(2).expand(1, 1, 3, 8, 8)
    assert (patches.resize(stripes, 2) - 0.5).abs().max() < 0.13, "without antialiasing it would be 0, 0.5 or 1"
    larger = patches.resize(x, 16)
    assert larger.shape == (2, 3, 3, 16, 16)
    for image in range(2):
        alone = torch.nn.functional.interpolate(x[image], (16, 16), mode="bilinear")
        assert torch.allclose(larger[image], alone)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8, 21, 96, 363])
def test_whole_numbers_are_all_there_and_never_too_large(count):
    u = torch.arange(2**24, dtype=torch.float32)[:: 2**24 // 4096 - 1] / 2**24
    edge = torch.tensor([0.0, 1 - 2**-24])
    found = patches.whole(torch.cat([u, edge]), count)
    assert found.min() == 0 and found.max() == count - 1
    assert torch.bincount(found).min() > 0.8 * len(u) / count - 2


def test_the_side_that_is_shown():
    assert patches.shown(19, 0, 1) == 19
    assert patches.shown(9, 0, 1) == 18, "a deep network would see a point"
    assert patches.shown(9, 0, 16) == 32, "at least two squares"
    assert patches.shown(20, 0, 32) == 64
    assert patches.shown(63, 0, 16) == 64 and patches.shown(54, 0, 16) == 48, "the nearest"
    assert patches.shown(22, 16, 16) == 16, "one square, where it is asked for"
    assert patches.shown(64, 0, 16) == 64
    assert patches.shown(9, 32, 16) == 32
    assert patches.shown(20, 9, 1) == 9


@pytest.mark.parametrize(("asked", "hint"), [(60, "48 or 64"), (10, "16"), (17, "16 or 32")])
def test_a_side_that_squares_do_not_fill_is_refused_with_the_nearest(asked, hint):
    with pytest.raises(SslpreError) as error:
        patches.shown(21, asked, 16)
    assert f"`{asked}`" in error.value.message and error.value.hint == f"--set method.tile={hint}"
    assert error.value.code == 2
