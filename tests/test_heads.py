"""Heads: shapes of any ratio, normalisation where it belongs, every weight and every place of the input in use."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sslpre.heads import decoder, discriminator, mlp


def test_mlp_has_norms_between_and_a_bias_where_none_follows():
    kinds = [type(layer) for layer in mlp([8, 6, 5, 4])]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [layer.bias is not None for layer in mlp([8, 6, 4]) if isinstance(layer, nn.Linear)] == [False, True]
    normed = mlp([8, 6, 4], last_norm=True)
    assert isinstance(normed[-1], nn.BatchNorm1d) and normed[3].bias is None
    assert normed(torch.rand(3, 8)).shape == (3, 4)


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 70),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    side=st.integers(1, 70),
    outward=st.integers(1, 4),
)
def test_decoder_reaches_any_side_from_any_map(channels, height, width, side, outward):
    layers = decoder(channels, height, width, side, outward)
    x = torch.rand(2, channels, height, width)
    assert layers(x).shape == (2, outward, side, side)
    sides = [layer.size[0] for layer in layers if isinstance(layer, nn.Upsample)]
    assert sides[-1] == side and all(2 * a - 1 <= b <= 2 * a for a, b in itertools.pairwise(sides))
    assert sides[0] <= max(side, 2 * min(height, width)), "the first is at most a doubling too"


def test_decoder_is_the_papers_from_4_to_64():
    """512 → 256 → 128 → 64 → 3 at 4, 8, 16, 32, 64 px, as the authors of context encoders have it."""
    layers = decoder(512, 4, 4, 64)
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(512, 256), (256, 128), (128, 64), (64, 3)]
    assert [layer.size for layer in layers if isinstance(layer, nn.Upsample)] == [(s, s) for s in (8, 16, 32, 64)]
    assert [c.bias is not None for c in convolutions] == [False, False, False, True]
    assert not isinstance(layers[-1], nn.GroupNorm | nn.ReLU), "numbers of any size"


@pytest.mark.parametrize("channels, widths", [(2048, [512, 256, 128]), (96, [48, 32, 32]), (5, [32, 32, 32])])
def test_widths_halve_between_512_and_32(channels, widths):
    layers = decoder(channels, 2, 2, 32)
    assert [layer.num_channels for layer in layers if isinstance(layer, nn.GroupNorm)] == widths
    assert all(layer.num_channels // layer.num_groups == 16 for layer in layers if isinstance(layer, nn.GroupNorm))


def test_no_image_looks_at_another_and_every_place_counts():
    layers = decoder(8, 3, 5, 23).double()
    x = torch.randn(4, 8, 3, 5, dtype=torch.float64, requires_grad=True)
    y = layers(x)
    for i in range(4):
        assert torch.allclose(layers(x[i : i + 1]), y[i : i + 1], atol=1e-12)
    y.square().sum().backward()
    assert (x.grad.abs().sum(1) > 0).all()
    assert all(p.grad.abs().sum() > 0 for p in layers.parameters())


@settings(max_examples=20, deadline=None)
@given(side=st.integers(4, 150))
def test_the_discriminator_fits_every_hole(side):
    layers = discriminator(side)
    assert layers(torch.rand(1, 3, side, side)).shape == (1,)
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert [c.stride[0] for c in convolutions] == [2] * (len(convolutions) - 1) + [1]
    assert convolutions[-1].kernel_size[0] <= 4


def test_the_discriminator_of_the_authors_for_64_px():
    convolutions = [layer for layer in discriminator(64) if isinstance(layer, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [64, 128, 256, 512, 1]
    assert all(c.kernel_size == (4, 4) for c in convolutions)
    assert sum(isinstance(layer, nn.GroupNorm) for layer in discriminator(64)) == 3, "none after the first"


def test_the_discriminator_judges_each_picture_alone_and_reads_all_of_it():
    layers = discriminator(20, 2).double()
    x = torch.randn(3, 2, 20, 20, dtype=torch.float64, requires_grad=True)
    whole = layers(x)
    assert torch.allclose(torch.cat([layers(x[i : i + 1]) for i in range(3)]), whole, atol=1e-12)
    whole.sum().backward()
    assert (x.grad.abs() > 0).double().mean() > 0.99
