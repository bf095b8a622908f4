"""Inpainting: what is hidden and what is asked, both losses written out slowly, and who may see what."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sslpre import encoder
from sslpre.errors import SslpreError
from sslpre.methods.inpainting import CELLS, SHARES, ChannelWise, Inpainting, region
from sslpre.objective import Batch, Setup
from sslpre.train import optim

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def inpainting(side=32, backbone="test_vit", **arguments):
    def make(colour, size):
        return encoder.build(backbone, image_size=side, mean=MEAN, std=STD)

    setup = Setup(64, None, 4, (side,), torch.tensor(MEAN), torch.tensor(STD), make)
    return Inpainting(setup, **arguments).double().eval()


def batch_of(count=4, side=32, start=0, epoch=0):
    generator = torch.Generator().manual_seed(count + side)
    x = torch.rand(count, 3, side, side, generator=generator, dtype=torch.float64)
    return rows(Batch([x], torch.arange(count) + start, torch.full((count,), -1), 0.0, 0, epoch), slice(None))


def rows(batch, which):
    return dataclasses.replace(
        batch, views=[v[which] for v in batch.views], index=batch.index[which], label=batch.label[which]
    )


def blobs(count, side=32, epoch=0):
    return region(batch_of(count, 8, epoch=epoch), side)


def test_the_centre_of_the_paper():
    """128 px: 64 are predicted, and 7 of them on each side can be seen."""
    method = inpainting(128, "test_resnet", adversarial=0.0)
    batch = batch_of(2, 128)
    hole, asked = method.masks(batch)
    assert method.painted == 64 and method.overlap == 7
    assert asked.shape == (1, 1, 64, 64) and asked.all()
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[7:57, 7:57] = True
    assert torch.equal(hole[0, 0], expected)
    x, seen = batch.views[0], method.hidden(batch.views[0], hole)
    for row in range(128):
        inside = 39 <= row < 89
        assert torch.equal(seen[:, :, row, 39], torch.tensor(MEAN).double().expand(2, 3)) == inside
        assert torch.equal(seen[:, :, row, 38], x[:, :, row, 38]), "a column beside the hole"
    assert torch.equal(method.middle(x), x[:, :, 32:96, 32:96])
    assert torch.equal(method.whole(method.middle(x))[:, :, 32:96, 32:96], x[:, :, 32:96, 32:96])


def test_the_hole_is_zero_to_the_network():
    method = inpainting()
    hole, _ = method.masks(batch_of())
    shown = method.encoder.prepare(method.hidden(batch_of().views[0], hole))
    inside = shown[:, :, 10:22, 10:22]  # 32 px: 16 predicted from 8 on, 2 of overlap
    assert inside.abs().max() < 1e-7 and shown[:, :, 9].abs().min() > 0


@settings(max_examples=15, deadline=None)
@given(side=st.integers(8, 80), epoch=st.integers(0, 1000))
def test_a_region_has_exactly_the_share_that_was_drawn(side, epoch):
    batch = batch_of(6, 8, epoch=epoch)
    hole = region(batch, side)
    share = SHARES[0] + (SHARES[1] - SHARES[0]) * batch.uniform("share", 1)[:, 0]
    assert hole.shape == (6, 1, side, side) and hole.dtype == torch.bool
    for one, wanted in zip(hole, share.tolist(), strict=True):
        assert abs(int(one.sum()) - wanted * side**2) <= 0.5 + 1e-3
        assert one.sum() <= side**2 / 4 + 1, "up to 1/4 of the image"


def test_regions_are_shapes_and_not_dust():
    """The outline of a shape grows with the side; that of single pixels, scattered, with the area."""
    hole = blobs(64, 64).squeeze(1)
    outline = (hole[:, 1:] != hole[:, :-1]).flatten(1).sum(1) + (hole[:, :, 1:] != hole[:, :, :-1]).flatten(1).sum(1)
    share = hole.double().mean((1, 2))
    dust = 4 * 64**2 * share * (1 - share)  # expected of independent pixels
    assert (outline / dust).max() < 0.35
    assert len({tuple(one.flatten().tolist()) for one in hole}) == 64, "each image has its own"


def test_every_place_is_hidden_equally_often():
    """Marginals over 4,000 draws, of each pixel: no place of the random field is a place of the image."""
    hole = torch.cat([blobs(1000, 24, epoch) for epoch in range(4)]).double().mean((0, 1))
    mean = sum(SHARES) / 2
    assert hole.mean().item() == pytest.approx(mean, abs=0.002)
    assert (hole - mean).abs().max() < 5 * (mean * (1 - mean) / 4000) ** 0.5


def cubic(t):
    """Keys, 1981, with a = −0.75, as torch has it."""
    t = abs(t)
    return 1.25 * t**3 - 2.25 * t**2 + 1 if t <= 1 else -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)


def test_the_lowest_parts_of_a_smooth_field():
    """By loops: a cubic between random numbers at the corners of 8 cells, shifted; the lowest as many as were drawn."""
    batch = batch_of(2, 8)
    cells, share = batch.uniform("shape", 1, CELLS + 4, CELLS + 4), batch.uniform("share", 1)
    shift = batch.uniform("shift", 2, 1)
    for i, hole in enumerate(region(batch, 12)):
        field = {}
        for r in range(12):
            for c in range(12):
                x, y = (1 + shift[i, axis, 0].item() + 8 * (at + 0.5) / 12 for axis, at in ((0, c), (1, r)))
                near = [(m, n) for m in range(int(y) - 1, int(y) + 3) for n in range(int(x) - 1, int(x) + 3)]
                field[r, c] = sum(cubic(y - m) * cubic(x - n) * cells[i, 0, m, n].item() for m, n in near)
        count = round((1 / 8 + share[i].item() / 8) * 144)
        lowest = sorted(field, key=field.__getitem__)[:count]
        assert set(lowest) == {tuple(at) for at in hole[0].nonzero().tolist()}


def test_a_region_is_asked_for_with_its_surroundings():
    method = inpainting(mask="region", overlap=3 / 32, adversarial=0.0)
    hole, asked = method.masks(batch_of())
    for one, wanted in zip(hole[:, 0], asked[:, 0], strict=True):
        for r in range(32):
            for c in range(32):
                near = one[max(0, r - 3) : r + 4, max(0, c - 3) : c + 4]
                assert bool(near.any()) == bool(wanted[r, c])
    bare, alone = inpainting(mask="region", overlap=0.0, adversarial=0.0).masks(batch_of())
    assert torch.equal(bare.double(), alone)


@pytest.mark.parametrize("mask", ["center", "region"])
def test_the_losses_are_the_papers(mask):
    """Equations 1, 2 and 3, pixel by pixel: squared error in [−1, 1], 10 times in the overlap, per pixel asked for."""
    method, batch = inpainting(16, mask=mask, overlap=0.1, adversarial=0.25, overlap_weight=10.0), batch_of(3, 16)
    nn.init.normal_(method.discriminator[-2].weight, std=0.5)  # so that it has opinions
    game = method.rounds(batch)
    first, second = next(game), next(game)
    assert next(game, None) is None
    hole, asked = method.masks(batch)
    hole, asked = hole.expand(3, -1, -1, -1), asked.expand(3, -1, -1, -1)
    x = batch.views[0]
    y = method.paint(method.hidden(x, hole)).detach()
    low, rec, adv, fooled = (16 - method.painted) // 2, 0.0, 0.0, 0.0
    for i in range(3):
        total, count, fake, real = 0.0, 0, torch.zeros_like(y[i]), torch.zeros_like(y[i])
        for r in range(method.painted):
            for c in range(method.painted):
                if not asked[i, 0, r, c]:
                    continue
                for colour in range(3):
                    truth = 2 * x[i, colour, r + low, c + low].item() - 1
                    total += (1 if hole[i, 0, r, c] else 10) * (y[i, colour, r, c].item() - truth) ** 2
                    count += 1
                    fake[colour, r, c], real[colour, r, c] = y[i, colour, r, c], truth
        rec += total / count / 3
        says = {name: torch.sigmoid(method.discriminator(z[None])).item() for name, z in (("x", real), ("f", fake))}
        adv += -math.log(says["f"]) / 3
        fooled += -(math.log(says["x"]) + math.log(1 - says["f"])) / 3
    assert first.terms["rec"].item() == pytest.approx(rec, abs=1e-9)
    assert first.terms["adv"].item() == pytest.approx(adv, abs=1e-9)
    assert first.value.item() == pytest.approx(0.75 * rec + 0.25 * adv, abs=1e-9)
    assert second.value.item() == pytest.approx(fooled, abs=1e-9)


def test_blank_is_the_loss_of_the_mean_colour(monkeypatch):
    method, batch = inpainting(mask="region", adversarial=0.0), batch_of()
    mean = 2 * torch.tensor(MEAN).double().view(1, 3, 1, 1) - 1
    monkeypatch.setattr(method, "paint", lambda seen: mean.expand(4, 3, 32, 32))
    (loss,) = method.rounds(batch)
    assert loss.value.item() == pytest.approx(loss.terms["blank"].item(), abs=1e-7)
    monkeypatch.setattr(method, "paint", lambda seen: 2 * batch.views[0] - 1)
    (loss,) = method.rounds(batch)
    assert loss.value.item() == 0 and loss.terms["blank"] > 0.1


def test_a_discriminator_that_knows_nothing_is_at_chance():
    """2 ln 2 for the sum of equation 2, ln 2 for the one it is to be fooled by."""
    method = inpainting()
    for parameter in method.discriminator[-2].parameters():
        nn.init.zeros_(parameter)
    game = method.rounds(batch_of())
    assert next(game).terms["adv"].item() == pytest.approx(math.log(2))
    assert next(game).value.item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("mask", ["center", "region"])
def test_what_is_hidden_cannot_be_seen(mask):
    """The fill-in does not depend on a hidden pixel, and does on the others; the answer depends on what is asked."""
    method, batch = inpainting(mask=mask, adversarial=0.0), batch_of()
    hole, _ = method.masks(batch)
    full = method.whole(hole).expand(4, 3, -1, -1)
    x = batch.views[0].clone().requires_grad_()
    method.paint(method.hidden(x, hole)).square().sum().backward()
    assert x.grad[full].abs().max() == 0 and (x.grad[~full] != 0).double().mean() > 0.99
    value = next(method.rounds(batch)).value
    other = torch.where(full, 1 - batch.views[0], batch.views[0])
    assert abs(next(method.rounds(dataclasses.replace(batch, views=[other]))).value - value) > 1e-3


@pytest.mark.parametrize("mask", ["center", "region"])
def test_the_discriminator_sees_no_context(mask):
    method, batch = inpainting(mask=mask), batch_of()
    given = []
    method.discriminator.register_forward_pre_hook(lambda _, args: given.append(args[0].detach()))
    list(method.rounds(batch))
    _, asked = method.masks(batch)
    fake, both = given
    assert fake.shape == (4, 3, method.painted, method.painted) and torch.equal(both[4:], fake)
    truth = method.middle(2 * batch.views[0] - 1)
    inside = asked.expand_as(truth) > 0
    assert torch.equal(both[:4][inside], truth[inside])
    assert both[:4][~inside].abs().sum() == 0 and fake[~inside].abs().sum() == 0
    assert inside.all() == (mask == "center")


def test_each_player_moves_only_what_is_its_own():
    method, batch = inpainting().train(), batch_of()
    owned = optim.by_player(method)
    assert list(owned) == ["encoder", "discriminator"] and method.rates == {"discriminator": 0.1}
    assert all(name.startswith("discriminator.") for name in owned["discriminator"])
    for player, loss in zip(owned, method.rounds(batch), strict=True):
        method.zero_grad()
        loss.value.backward()
        for other, parameters in owned.items():
            for name, parameter in parameters.items():
                moved = parameter.grad is not None and parameter.grad.abs().sum() > 0
                assert moved == (other == player), (player, name)


def test_the_first_player_is_told_what_the_discriminator_thinks():
    """λ_adv reaches the encoder: with nothing else to minimise, there is still a gradient, and it fools."""
    method, batch = inpainting(adversarial=0.999).train(), batch_of()
    nn.init.normal_(method.discriminator[-2].weight, std=0.5)
    before = next(method.rounds(batch)).terms["adv"].item()
    step = torch.optim.SGD(optim.by_player(method)["encoder"].values(), 0.01)
    for _ in range(5):
        step.zero_grad()
        next(method.rounds(batch)).terms["adv"].backward()
        step.step()
    assert next(method.rounds(batch)).terms["adv"].item() < before


def test_the_second_round_judges_the_fill_in_of_the_first():
    """As it was made, whatever the encoder has become; by the discriminator as it is now."""
    method, batch = inpainting(), batch_of()
    _, expected = method.rounds(batch)
    game = method.rounds(batch)
    next(game)
    with torch.no_grad():
        for parameter in optim.by_player(method)["encoder"].values():
            parameter.add_(1.0)
    assert next(game).value.item() == pytest.approx(expected.value.item(), abs=1e-12)
    game = method.rounds(batch)
    next(game)
    nn.init.constant_(method.discriminator[-2].bias, 3.0)
    assert abs(next(game).value.item() - expected.value.item()) > 0.1


@pytest.mark.parametrize("mask", ["center", "region"])
def test_both_losses_are_means_over_images(mask):
    """In training mode too: there is no batch normalisation but the encoder's own."""
    method, batch = inpainting(mask=mask).train(), batch_of()
    assert not method.couples
    whole = [loss.value.item() for loss in method.rounds(batch)]
    single = [[loss.value.item() for loss in method.rounds(rows(batch, slice(i, i + 1)))] for i in range(4)]
    for n, value in enumerate(whole):
        assert value == pytest.approx(sum(one[n] for one in single) / 4, abs=1e-12)


def test_without_an_adversary_one_plays_alone():
    method = inpainting(adversarial=0.0)
    assert method.players == {"all": ("",)} and Inpainting.players.keys() == {"encoder", "discriminator"}
    assert not hasattr(method, "discriminator")
    (loss,) = method.rounds(batch_of())
    assert loss.value is loss.terms["rec"]
    assert list(optim.by_player(method)["all"]) == [name for name, _ in method.named_parameters()]


def test_each_channel_has_a_dense_layer_of_its_own():
    layer = ChannelWise(3, 6).double()
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64)
    y = layer(x)
    for i in range(2):
        for c in range(3):
            for at in range(6):
                expected = sum(x[i, c].flatten()[k] * layer.weight[c, k, at] for k in range(6)) + layer.bias[c, at]
                assert y[i, c].flatten()[at].item() == pytest.approx(expected.item(), abs=1e-12)
    assert sum(p.numel() for p in layer.parameters()) == 3 * 6**2 + 3 * 6, "m n⁴ weights for m maps of n × n"


@pytest.mark.parametrize("mask", ["center", "region"])
@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_every_weight_has_a_gradient(backbone, mask):
    method = inpainting(32, backbone, mask=mask).train()
    for module in method.encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # residual branches that start at zero wake up
    for loss in method.rounds(batch_of()):
        loss.value.backward()
    reached = {name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    unreached = {name for name, _ in method.named_parameters()} - reached
    assert all("head.norm" in name for name in unreached), "a ConvNeXt's norm after pooling is no part of a map"


@pytest.mark.parametrize("arguments", [{}, {"mask": "region"}, {"mask": "region", "adversarial": 0.0}])
def test_losses_are_fp32_under_autocast_and_alike_in_any_memory_format(arguments):
    method = inpainting(**arguments)
    batch = batch_of()
    plain = [loss.value.item() for loss in method.rounds(batch)]
    last = dataclasses.replace(batch, views=[batch.views[0].contiguous(memory_format=torch.channels_last)])
    assert [loss.value.item() for loss in method.rounds(last)] == pytest.approx(plain, abs=1e-12)
    method, batch = method.float(), dataclasses.replace(batch, views=[batch.views[0].float()])
    with torch.autocast("cpu", torch.bfloat16):
        half = [loss.value for loss in method.rounds(batch)]
    assert all(value.dtype == torch.float32 for value in half)
    assert [value.item() for value in half] == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("mask", ["center", "region"])
def test_pictures_are_the_image_its_hole_the_fill_in_and_the_answer(mask):
    method, batch = inpainting(mask=mask), batch_of()
    hole, asked = (method.whole(part).expand(4, 3, -1, -1) > 0 for part in method.masks(batch))
    with torch.no_grad():
        painted = method.whole((method.paint(method.hidden(batch.views[0], method.masks(batch)[0])) + 1) / 2)
        table = method.pictures(batch)
    assert len(table) == 4 and len({tuple(p.title for p in row) for row in table}) == 1
    for i, row in enumerate(table):
        image, seen, filled, wanted = (picture.image for picture in row)
        assert all(p.image.shape == (3, 32, 32) and p.image.min() >= 0 and p.image.max() <= 1 for p in row)
        assert torch.equal(image, batch.views[0][i])
        assert torch.equal(seen[~hole[i]], image[~hole[i]]) and torch.equal(filled[~hole[i]], image[~hole[i]])
        assert torch.equal(filled[hole[i]], painted[i][hole[i]]) and not torch.equal(seen, filled)
        assert torch.equal(wanted[asked[i]], image[asked[i]]) and not torch.equal(wanted, image)


def test_a_network_with_more_than_maps_is_refused():
    """Half of this one's weights come after what is pooled: no painting would train them."""
    with pytest.raises(SslpreError, match="`mobilenetv3_small_050` has 52% of its weights past") as refused:
        inpainting(64, "mobilenetv3_small_050")
    assert refused.value.code == 2 and "resnet18" in refused.value.hint
