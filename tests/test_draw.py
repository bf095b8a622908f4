"""Numbers by counter: the right distribution, independent in every argument, and a function of the arguments alone."""

import hashlib
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sslpre.views.draw import Drawn, chosen, normal, uniform

MANY = torch.arange(200_000)
WORD = 2**64


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def slowly(seed: int, epoch: int, index: int, name: str, position: int) -> float:
    """SplitMix64 from its paper, in Python's unbounded integers."""

    def mix(word: int) -> int:
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % WORD
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % WORD
        return word ^ (word >> 31)

    step = 0x9E3779B97F4A7C15
    start = int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{name}".encode(), digest_size=8).digest(), "little")
    return (mix((mix((index * step + start) % WORD) + (position + 1) * step) % WORD) >> 40) / 2**24


def test_golden_values() -> None:
    """A change of these changes every run that anyone resumes or repeats."""
    index = torch.tensor([0, 1, 2, 10**12, -1])
    assert (uniform(0, 0, index, "a").double() * 2**24).tolist() == [15082611, 9235571, 14814760, 6564537, 11447270]
    golden = [[4481269, 1066800], [13704378, 5130303], [14560145, 2554835], [1934677, 16065062], [2941173, 4159253]]
    assert (uniform(7, 3, index, "view0.box", 2).double() * 2**24).tolist() == golden
    expected = [-0.9505105018615723, 0.6990770697593689, 0.274706095457077, 0.3540515601634979, 0.9484087228775024]
    assert normal(7, 3, index, "noise").tolist() == pytest.approx(expected, abs=1e-6)


@given(
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 10**6),
    index=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9),
    name=st.text(max_size=8),
)
@settings(deadline=None, max_examples=100)
def test_equals_unbounded_arithmetic(seed: int, epoch: int, index: list[int], name: str) -> None:
    got = uniform(seed, epoch, torch.tensor(index), name, 2, 3)
    assert got.shape == (len(index), 2, 3) and got.dtype == torch.float32
    expected = [[slowly(seed, epoch, i, name, p) for p in range(6)] for i in index]
    assert got.reshape(-1, 6).tolist() == expected


@given(
    order=st.permutations(range(12)),
    cuts=st.lists(st.integers(0, 12), max_size=4).map(sorted),
    shape=st.sampled_from([(), (1,), (3,), (2, 5)]),
)
@settings(deadline=None, max_examples=50)
def test_batch_split_and_order_do_not_matter(order: list[int], cuts: list[int], shape: tuple[int, ...]) -> None:
    index = torch.tensor(order)
    for draw in (uniform, normal):
        whole = draw(1, 2, torch.arange(12), "x", *shape)[index]
        edges = [0, *cuts, 12]
        parts = [draw(1, 2, index[a:b], "x", *shape) for a, b in itertools.pairwise(edges)]
        assert torch.equal(torch.cat(parts), whole)


def test_shorter_draw_begins_longer() -> None:
    long = uniform(0, 0, MANY[:50], "x", 4)
    assert torch.equal(uniform(0, 0, MANY[:50], "x"), long[:, 0])
    assert torch.equal(uniform(0, 0, MANY[:50], "x", 2), long[:, :2])


@given(
    seed=st.integers(),
    epoch=st.integers(0, 10**6),
    index=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
    shapes=st.dictionaries(st.text(max_size=8), st.lists(st.integers(0, 5), max_size=2).map(tuple), min_size=1),
)
@settings(deadline=None, max_examples=30)
def test_drawn_together_is_drawn_apart(
    seed: int, epoch: int, index: list[int], shapes: dict[str, tuple[int, ...]]
) -> None:
    rows = torch.tensor(index, dtype=torch.int64)
    together = Drawn(seed, epoch, rows, shapes)
    for name, shape in shapes.items():
        assert torch.equal(together(name, *shape), uniform(seed, epoch, rows, name, *shape))


def test_only_what_was_declared_is_drawn() -> None:
    together = Drawn(0, 0, MANY[:3], {"x": (2,)})
    for wrong in (("y", 2), ("x", 3), ("x",)):
        with pytest.raises(KeyError):
            together(*wrong)


@pytest.mark.parametrize("start", [0, 10**9, -100_000, 2**62])
def test_uniform(start: int) -> None:
    numbers = uniform(0, 0, MANY + start, "x").double().numpy()
    assert numbers.min() >= 0 and numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    for bins in (16, 1000):
        counts = torch.histc(torch.from_numpy(numbers), bins, 0, 1)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    # all 24 bits are used and even, the lowest too
    whole = (torch.from_numpy(numbers) * 2**24).long()
    for bit in range(24):
        ones = int(((whole >> bit) & 1).sum())
        assert stats.binomtest(ones, len(MANY)).pvalue > 1e-4, bit


def test_normal() -> None:
    numbers = normal(0, 0, MANY, "x").double()
    assert numbers.isfinite().all()
    assert stats.kstest(numbers.numpy(), "norm").pvalue > 1e-3
    # the tails, which Kolmogorov and Smirnov hardly see
    beyond = int((numbers.abs() > 3).sum())
    assert stats.binomtest(beyond, len(MANY), 2 * stats.norm.sf(3)).pvalue > 1e-3
    assert 4 < float(numbers.abs().max()) < 7


def test_neighbours_are_independent() -> None:
    """In index, position, epoch, seed and name: no correlation, and pairs fill the square evenly."""
    base = uniform(0, 0, MANY, "view0.box", 2)
    others = {
        "index": uniform(0, 0, MANY + 1, "view0.box"),
        "far index": uniform(0, 0, MANY + 2**32, "view0.box"),
        "position": base[:, 1],
        "epoch": uniform(0, 1, MANY, "view0.box"),
        "seed": uniform(1, 0, MANY, "view0.box"),
        "seed for epoch": uniform(10, 0, MANY, "view0.box"),
        "name": uniform(0, 0, MANY, "view1.box"),
        "longer name": uniform(0, 0, MANY, "view0.boxx"),
    }
    for what, other in others.items():
        first, second = base[:, 0].double(), other.double()
        for one, two in ((first, second), ((first - 0.5).abs(), (second - 0.5).abs())):
            correlation = float(torch.corrcoef(torch.stack([one, two]))[0, 1])
            assert abs(correlation) < 4 / len(MANY) ** 0.5, what
        cells = torch.bincount((first * 16).long() * 16 + (second * 16).long(), minlength=256)
        assert stats.chisquare(cells.numpy()).pvalue > 1e-3, what


def test_few_images_many_positions() -> None:
    """Also along one image's stream: pretext transforms draw thousands of numbers for each."""
    numbers = uniform(0, 0, torch.arange(4), "mask", 50, 1000).double().reshape(4, -1)
    for row in numbers:
        assert stats.kstest(row.numpy(), "uniform").pvalue > 1e-3
    assert float(torch.corrcoef(numbers).fill_diagonal_(0).abs().max()) < 4 / 50_000**0.5
    assert float(torch.corrcoef(torch.stack([numbers[0, 1:], numbers[0, :-1]]))[0, 1]) < 4 / 50_000**0.5


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
def test_chosen(probability: float) -> None:
    rows = chosen(uniform(0, 0, MANY, "p"), probability)
    assert rows.dtype == torch.int64
    assert stats.binomtest(len(rows), len(MANY), probability).pvalue > 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_equal_on_the_gpu() -> None:
    index = torch.randint(-(2**62), 2**62, (10_000,))
    assert torch.equal(uniform(5, 6, index, "x", 7), uniform(5, 6, index.cuda(), "x", 7).cpu())
    torch.testing.assert_close(normal(5, 6, index, "x", 7), normal(5, 6, index.cuda(), "x", 7).cpu())
