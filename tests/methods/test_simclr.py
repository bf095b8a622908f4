"""SimCLR's loss against the paper's equation, written out slowly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslpre.methods import simclr
from sslpre.methods.simclr import nt_xent
from sslpre.objective import Batch, Setup


def slow(z1, z2, temperature):
    """Equation 1 and the last line of Algorithm 1, a loop a line, in float64."""
    n = len(z1)
    z = [row / row.norm() for pair in zip(z1, z2, strict=True) for row in pair]  # 2k−1 and 2k are a pair
    s = [[float(a @ b) for b in z] for a in z]

    def ell(i, j):
        return -math.log(
            math.exp(s[i][j] / temperature) / sum(math.exp(s[i][k] / temperature) for k in range(2 * n) if k != i)
        )

    return sum(ell(2 * k, 2 * k + 1) + ell(2 * k + 1, 2 * k) for k in range(n)) / (2 * n)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), d=st.integers(2, 17), temperature=st.floats(0.05, 2.0), seed=st.integers(0, 2**31 - 1))
def test_loss_is_equation_one(n, d, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    z1, z2 = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    assert nt_xent(z1, z2, temperature).item() == pytest.approx(slow(z1, z2, temperature), abs=1e-10)


def test_gradient_is_the_numeric_one():
    z1, z2 = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z1.requires_grad_()
    z2.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3), (z1, z2))


def test_both_directions_count_alike():
    z1, z2 = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    assert nt_xent(z1, z2, 0.5).item() == pytest.approx(nt_xent(z2, z1, 0.5).item(), rel=1e-6)


def test_scale_of_the_embedding_does_not_matter():
    z1, z2 = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(2))
    assert nt_xent(7 * z1, 0.1 * z2, 0.5).item() == pytest.approx(nt_xent(z1, z2, 0.5).item(), rel=1e-5)


def test_equal_embeddings_give_the_chance_value():
    z = torch.ones(16, 8)
    assert nt_xent(z, z, 0.1).item() == pytest.approx(math.log(31), rel=1e-6)


def test_perfect_alignment_of_orthogonal_images_gives_the_closed_form():
    z = torch.eye(8)
    expected = math.log(1 + 14 * math.exp(-1 / 0.5))  # one positive at 1, 2N − 2 = 14 negatives at 0
    assert nt_xent(z, z, 0.5).item() == pytest.approx(expected, rel=1e-5)


def test_similarities_are_fp32_under_autocast():
    z1, z2 = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(3))
    plain = nt_xent(z1, z2, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        cast = nt_xent(z1, z2, 0.1)
    assert cast.dtype == torch.float32 and torch.equal(cast, plain)


def test_zero_embeddings_stay_finite():
    z1 = torch.zeros(4, 8, dtype=torch.bfloat16, requires_grad=True)
    loss = nt_xent(z1, torch.zeros(4, 8, dtype=torch.bfloat16), 0.1)
    loss.backward()
    assert loss.isfinite() and z1.grad is not None and z1.grad.isfinite().all()


def with_gradients(z1, z2, temperature):
    inputs = [z.detach().clone().requires_grad_() for z in (z1, z2)]
    loss = nt_xent(*inputs, temperature)
    (3 * loss).backward()  # what comes from above counts
    return loss.detach(), *(z.grad for z in inputs)


@pytest.mark.parametrize("largest", [2, 3, 7, 11, 16])  # blocks of one row, of several, the last one shorter
def test_some_rows_at_a_time_give_the_same_loss_and_gradient(monkeypatch, largest):
    z1, z2 = torch.randn(2, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    whole = with_gradients(z1, z2, 0.2)
    monkeypatch.setattr(simclr, "LARGEST", largest)
    calls = []
    monkeypatch.setattr(
        simclr.ByRows, "apply", lambda *inputs, apply=simclr.ByRows.apply: calls.append(1) or apply(*inputs)
    )
    for ours, theirs in zip(with_gradients(z1, z2, 0.2), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    assert calls
    with torch.no_grad():
        assert nt_xent(z1, z2, 0.2).item() == pytest.approx(whole[0].item(), abs=1e-14)


def test_rows_keep_no_matrix(monkeypatch):
    monkeypatch.setattr(simclr, "LARGEST", 32)
    z1, z2 = torch.randn(2, 128, 4, requires_grad=True, generator=torch.Generator().manual_seed(5)).unbind()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        nt_xent(z1, z2, 0.2).backward()
    assert max(kept) <= 256 * 4  # nothing larger than z itself, where the matrix has 256 × 256


def test_pictures_are_the_two_views():
    mean, x = torch.zeros(3), torch.rand(2, 4, 3, 8, 8)
    encoder = torch.nn.Flatten()
    encoder.dim = 192
    method = simclr.SimCLR(Setup(4, None, 4, (8, 8), mean, mean + 1, lambda colour, size: encoder))
    index = torch.arange(4)
    shown = method.pictures(Batch([*x], index, torch.full_like(index, -1), 0.0, 0, 0))
    assert [[picture.title for picture in row] for row in shown] == [["view 1", "view 2"]] * 4
    assert all(torch.equal(shown[i][view].image, x[view, i]) for i in range(4) for view in range(2))
