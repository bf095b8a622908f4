"""Colorization: what is asked, what it counts, the loss against the paper's equations, and colour that is not seen."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sslpre import encoder
from sslpre.errors import SslpreError
from sslpre.methods.colorization import Colorization, rebalanced, shrunk
from sslpre.objective import Batch, Epoch, Setup
from sslpre.ops.channels import luma
from sslpre.ops.lab import in_gamut, recoloured, rgb_to_ab

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def colorization(backbone="test_resnet", side=16, **arguments):
    torch.manual_seed(0)
    tensors = torch.tensor(MEAN), torch.tensor(STD)

    def build(colour, size):
        return encoder.build(backbone, image_size=size or side, mean=MEAN, std=STD, colour=colour)

    return Colorization(Setup(16, None, 4, (side,), *tensors, build), **({"width": 8} | arguments)).double().eval()


def batch_of(x):
    return Batch([x], torch.arange(len(x)), torch.full((len(x),), -1), 0.0, 0, 0)


def images(count=4, side=16, seed=0):
    """Colours in squares of 4 × 4 pixels: one answer each."""
    x = torch.rand(count, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.repeat_interleave(4, 2).repeat_interleave(4, 3)


def started(method, x, number=0):
    """The start of an epoch over the images `x`, three at a time."""
    method.epoch_start(Epoch(number, lambda f: torch.cat([f(part) for part in x.split(3)])))
    return method


def nearest(pixel):
    """A pixel's five nearest bins with their shares, all 313 searched."""
    a, b = rgb_to_ab(pixel.view(1, 3, 1, 1)).flatten().tolist()
    found = sorted((math.hypot(a - p, b - q), i) for i, (p, q) in enumerate(in_gamut().tolist()))[:5]
    shares = [math.exp(-(d**2) / (2 * 5**2)) for d, _ in found]
    return [(i, share / sum(shares)) for (_, i), share in zip(found, shares, strict=True)]


def slow_loss(method, x):
    """Equations 2 and 3: −Σ_{h,w} v(Z) Σ_q Z log Ẑ, with v the weight of Z's largest, over pixels and images."""
    logits = method.head(method.encoder.last_map(x)).detach()
    total, pixels = 0.0, 0
    for image, scores in zip(x, logits, strict=True):
        for h in range(4):
            for w in range(4):
                z = nearest(image[:, 4 * h, 4 * w])
                log_z = torch.log(torch.exp(scores[:, h, w]) / torch.exp(scores[:, h, w]).sum()).tolist()
                total -= float(method.weight[z[0][0]]) * sum(share * log_z[i] for i, share in z)
                pixels += 1
    return total / pixels


@pytest.mark.parametrize("prior", [False, True])
def test_the_loss_is_the_papers(prior):
    method, x = colorization(), images()
    if prior:
        started(method, images(9, seed=1))
        assert method.weight.unique().numel() > 5
    assert method.loss(batch_of(x)).value.item() == pytest.approx(slow_loss(method, x), abs=1e-9)


@pytest.mark.parametrize("prior", [False, True])
def test_knowing_nothing_is_the_chance_value(prior):
    """The weights have mean 1 over the pixels that they were counted of, not only over the smoothed distribution."""
    method, x = colorization(), images(9)
    if prior:
        started(method, x)
    nn.init.zeros_(method.head[-1].weight)
    nn.init.zeros_(method.head[-1].bias)
    assert method.loss(batch_of(x)).value.item() == pytest.approx(method.chance)
    assert method.chance == pytest.approx(math.log(313))


def test_the_best_answer_to_all_pixels_loses_what_is_told_of_it():
    """On the very pixels that the prior was counted of, found by gradient: no answer that sees nothing costs less."""
    x = images(9)[..., 2::4, 2::4].repeat_interleave(4, 2).repeat_interleave(4, 3)
    method = started(colorization(), x)
    nn.init.zeros_(method.head[-1].weight)
    optimiser = torch.optim.LBFGS([method.head[-1].bias], lr=1, max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = method.loss(batch_of(x)).value
        loss.backward()
        return loss

    optimiser.step(closure)
    told = method.notes()["loss_of_a_constant"]
    assert method.loss(batch_of(x)).value.item() == pytest.approx(told, abs=1e-3) and told < method.chance - 0.5


def test_it_learns_what_no_constant_answer_can():
    """Where lightness tells the colour: dark images are red and light ones blue."""
    red, blue = (torch.tensor(colour).view(1, 3, 1, 1) for colour in ((0.4, 0.1, 0.1), (0.7, 0.8, 1.0)))
    dark = torch.rand(32, 1, 1, 1, generator=torch.Generator().manual_seed(0)) < 0.5
    x = torch.where(dark, red, blue).double().expand(-1, -1, 16, 16)
    method = started(colorization(), x)
    told = method.notes()["loss_of_a_constant"]
    optimiser = torch.optim.Adam(method.parameters(), lr=1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        loss = method.loss(batch_of(x)).value
        loss.backward()
        optimiser.step()
    assert loss.item() < told - 0.1, "a network that sees nothing gives a constant"


def test_an_answer_is_for_the_mean_of_16_pixels():
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    mean = torch.stack([x[..., r : r + 4, c : c + 4].mean((2, 3)) for r in range(0, 16, 4) for c in range(0, 16, 4)], 2)
    assert torch.allclose(shrunk(x), mean.view(2, 3, 4, 4))


@pytest.mark.parametrize("colour", [(0.1, 0.1, 0.9), (0.9, 0.1, 0.1), (0.1, 0.9, 0.1)])
def test_one_coloured_place_makes_an_image_coloured(colour):
    """Whatever the sign of its a and b."""
    x = torch.full((2, 3, 16, 16), 0.5, dtype=torch.float64)
    x[0, :, :4, :4] = torch.tensor(colour, dtype=torch.float64).view(3, 1, 1)
    _, _, coloured = colorization().asked(shrunk(x))
    assert coloured.flatten().tolist() == [1, 0]


def test_colour_is_not_seen_and_is_asked_for():
    """Images of the same luma: the same answer, other questions."""
    method = colorization()
    x, y = (0.4 + 0.2 * one for one in (images(), images().flip(1)))
    y = y - luma(y) + luma(x)
    assert torch.allclose(*(method.head(method.encoder.last_map(one)) for one in (x, y)), atol=1e-9)
    assert (method.asked(shrunk(x))[0] != method.asked(shrunk(y))[0]).any()


def test_a_head_that_knows_is_right():
    """All images of one colour: a head that always says its shares has the entropy of these as its loss."""
    method = colorization(grey=0.0)
    x = torch.tensor([0.9, 0.2, 0.1], dtype=torch.float64).view(1, 3, 1, 1).expand(2, 3, 16, 16)
    z = nearest(x[0, :, 0, 0])
    nn.init.zeros_(method.head[-1].weight)
    nn.init.constant_(method.head[-1].bias, -100.0)
    with torch.no_grad():
        for i, share in z:
            method.head[-1].bias[i] = math.log(share)
    loss = method.loss(batch_of(x))
    assert loss.value.item() == pytest.approx(-sum(share * math.log(share) for _, share in z))
    assert loss.terms["accuracy"].item() == 1.0


def test_the_weights_are_equation_4_of_the_colours_counted():
    """Counted a pixel at a time, smoothed by a loop over pairs of bins."""
    x = images(7)
    method = started(colorization(), x)
    counts = [0] * 313
    for image in x:
        for h in range(2, 16, 4):
            for w in range(2, 16, 4):
                counts[nearest(image[:, h, w])[0][0]] += 1
    smooth, ab = [0.0] * 313, in_gamut().tolist()
    for count, source in zip(counts, ab, strict=True):
        kernel = [math.exp(-(math.dist(source, other) ** 2) / (2 * 5**2)) for other in ab]
        for i, share in enumerate(kernel):
            smooth[i] += count / sum(counts) * share / sum(kernel)
    w = [1 / ((1 - 0.5) * p + 0.5 / 313) for p in smooth]
    scale = sum(count / sum(counts) * one for count, one in zip(counts, w, strict=True))
    assert method.weight.tolist() == pytest.approx([one / scale for one in w], rel=1e-5)
    told = method.notes()
    assert told["colours"] == sum(count > 0 for count in counts) and told["grey_images"] == 0
    best = [0.0] * 313  # E[w Z], to which the best constant answer is in proportion
    for image in x:
        for h in range(2, 16, 4):
            for w_ in range(2, 16, 4):
                z = nearest(image[:, h, w_])
                for i, share in z:
                    best[i] += w[z[0][0]] / scale * share / sum(counts)
    loss = -sum(m * math.log(m / sum(best)) for m in best if m)
    assert told["loss_of_a_constant"] == pytest.approx(loss)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=313).filter(lambda p: sum(p) > 1e-3), st.floats(0.01, 1))
def test_weights_have_mean_1_and_are_larger_for_rarer_colours(p, uniform):
    p = torch.tensor(p, dtype=torch.float64)
    p = p / p.sum()
    w = rebalanced(p, uniform)
    assert (p * w).sum().item() == pytest.approx(1)
    order = p.argsort()
    assert (w[order].diff() <= 1e-9 * w.max()).all()
    assert uniform < 1 or torch.allclose(w, torch.ones_like(w))


def test_grey_images_count_nothing_and_the_others_more():
    x = images(4)
    grey = x.mean(1, keepdim=True).expand(4, 3, 16, 16)
    alone, mixed = (started(colorization(), some) for some in (x, torch.cat([x, grey])))
    assert torch.allclose(mixed.weight, 2 * alone.weight) and mixed.notes()["grey_images"] == 0.5
    assert mixed.loss(batch_of(grey)).value == 0
    both, first = (mixed.loss(batch_of(some)).value.item() for some in (torch.cat([x, grey]), x))
    assert both == pytest.approx(first / 2)
    assert started(colorization(grey=0.0), grey).loss(batch_of(grey)).value > 0
    with pytest.raises(SslpreError, match="no image has an a or b of `5`") as caught:
        started(colorization(), grey)
    assert caught.value.code == 4 and "method.grey=0" in caught.value.hint


def test_colours_are_counted_before_the_first_epoch_only():
    method = started(colorization(), images())
    before = method.weight.clone()
    assert started(method, images(seed=5), number=1).notes() == {}
    assert torch.equal(method.weight, before) and "weight" in method.state_dict()


@pytest.mark.parametrize(
    "backbone, side, have", [("test_resnet", 32, 1), ("test_vit", 48, 3), ("test_convnext", 40, 1), ("resnet18", 32, 4)]
)
def test_there_is_an_answer_for_each_4_by_4_pixels(backbone, side, have):
    """Whatever the network's last map."""
    method = colorization(backbone, side)
    x = torch.rand(2, 3, side, side, dtype=torch.float64)
    assert method.encoder.last_map(x).shape[2:] == (have, have)
    assert method.head(method.encoder.last_map(x)).shape == (2, 313, side // 4, side // 4)
    method.loss(batch_of(x)).value.backward()
    assert all(p.grad is not None for p in method.head.parameters())
    assert next(method.encoder.parameters()).grad.abs().sum() > 0


def test_the_softmax_is_fp32_under_autocast():
    method, x = colorization().float(), images().float()
    plain = method.loss(batch_of(x)).value
    with torch.autocast("cpu", torch.bfloat16):
        half = method.loss(batch_of(x.contiguous(memory_format=torch.channels_last))).value
    assert half.dtype == torch.float32 and half.item() == pytest.approx(plain.item(), rel=0.02)


def test_pictures_are_the_luma_its_colours_and_those_asked_for():
    method, x = colorization().float(), images().float()
    rows = method.pictures(batch_of(x))
    assert len(rows) == 4 and all([cell.title for cell in row] == [cell.title for cell in rows[0]] for row in rows)
    sees, answers, should, alone, image = (torch.stack([row[i].image for row in rows]) for i in range(5))
    assert torch.equal(sees, luma(x)) and torch.equal(image, x)
    for cell in (answers, should, alone):
        assert cell.shape == x.shape and cell.min() >= 0 and cell.max() <= 1
    ab = torch.tensor([[in_gamut()[nearest(pixel)[0][0]].tolist() for pixel in one[:, ::4, ::4].flatten(1).T.double()]
                       for one in x]).movedim(2, 1).view(4, 2, 4, 4)  # fmt: skip
    logits = method.head(method.encoder.last_map(x)).double()
    p = torch.exp(torch.log_softmax(logits, 1) / 0.38)  # equation 5, T = 0.38
    mean = torch.einsum("bqhw,qc->bchw", p / p.sum(1, keepdim=True), in_gamut())
    assert torch.allclose(answers.double(), recoloured(x.double(), mean), atol=1e-3)
    assert torch.allclose(should, recoloured(x, ab, "nearest"), atol=1e-5)
    assert torch.allclose(alone, recoloured(torch.full_like(x, 0.6), ab, "nearest"), atol=1e-5)
