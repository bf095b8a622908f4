"""Rotation: what is turned, how it is labelled, and the loss against the paper's equations, written out slowly."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from sslpre.methods.rotation import Rotation, rotated
from sslpre.objective import Batch, Setup


class Means(nn.Module):
    """An encoder that tells the four quarters of an image apart, which rotations move about."""

    dim = 12

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def rotation(batch=4):
    mean = torch.zeros(3)
    setup = Setup(16, None, batch, (8,), mean, mean + 1, lambda colour, size: Means())
    return Rotation(setup).double()


def batch_of(x):
    index = torch.arange(len(x))
    return Batch([x], index, torch.full((len(x),), -1), 0.0, 0, 0)


def test_the_four_rotations():
    x = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    turned = rotated(x)
    assert turned.shape == (8, 3, 4, 4)
    for quarter in range(4):
        for image in range(2):
            expected = np.rot90(x[image].numpy(), quarter, (1, 2))  # counter-clockwise, as the paper's figure has it
            assert np.array_equal(turned[2 * quarter + image].numpy(), expected)
    assert torch.equal(turned[:2], x) and torch.equal(turned[4:6], x.flip((2, 3)))
    assert torch.equal(rotated(turned[2:4])[6:], x), "a quarter on, three quarters on: as it was"


def test_loss_is_the_mean_over_images_and_rotations():
    """Equations 2 and 3, a loop a line: −log softmax of the right rotation."""
    method, x = rotation(), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    total = 0.0
    for image in x:
        for quarter in range(4):
            features = method.encoder(image.rot90(quarter, (1, 2))[None])[0]
            scores = [
                float(row @ features + b)
                for row, b in zip(method.head.weight.detach(), method.head.bias.detach(), strict=True)
            ]
            total += -math.log(math.exp(scores[quarter]) / sum(map(math.exp, scores)))
    loss = method.loss(batch_of(x))
    assert loss.value.item() == pytest.approx(total / 16, abs=1e-12)


def test_guessing_is_the_chance_value():
    method = rotation()
    nn.init.zeros_(method.head.weight)
    nn.init.zeros_(method.head.bias)
    assert method.loss(batch_of(torch.rand(4, 3, 8, 8).double())).value.item() == pytest.approx(method.chance)
    assert method.chance == pytest.approx(math.log(4))


def test_a_head_that_knows_is_always_right():
    """Images that are bright in one corner: the corner's place names the rotation."""
    method = rotation()
    x = torch.zeros(4, 3, 8, 8, dtype=torch.float64)
    x[:, :, :4, :4] = 1.0
    corners = (0, 2, 3, 1)  # of a 2 × 2 map, row by row: where the bright quarter goes, turning counter-clockwise
    with torch.no_grad():
        method.head.weight.zero_()
        method.head.bias.zero_()
        for quarter, corner in enumerate(corners):
            method.head.weight[quarter, corner::4] = 50.0
    loss = method.loss(batch_of(x))
    assert loss.terms["accuracy"].item() == 1.0 and loss.value.item() < 1e-6


def test_upright_images_without_an_up_leave_it_at_chance():
    """A picture that looks alike from all sides says nothing, whatever the head."""
    method = rotation()
    x = torch.rand(4, 3, 1, 1, dtype=torch.float64).expand(4, 3, 8, 8)
    assert method.loss(batch_of(x)).value.item() >= method.chance - 1e-12


def test_softmax_is_fp32_under_autocast():
    method, x = rotation().float(), torch.rand(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(dataclasses.replace(batch_of(x))).value
    assert loss.dtype == torch.float32


def test_pictures_are_the_four_orientations():
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    shown = rotation().pictures(batch_of(x))
    assert [[picture.title for picture in row] for row in shown] == [["0°", "90°", "180°", "270°"]] * 2
    for image, row in zip(x, shown, strict=True):
        assert all(torch.equal(picture.image, image.rot90(turn, (1, 2))) for turn, picture in enumerate(row))
