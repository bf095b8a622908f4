"""What `auto` means, as a table; and the bounds that hold for every data set."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sslpre import recipe as recipes
from sslpre.errors import SslpreError
from sslpre.train.device import Facts, cpu_has_bf16
from sslpre.train.plan import resolve

CPU, CPU_BF16 = Facts("cpu", False), Facts("cpu", True)
H200, LAPTOP = Facts("cuda", True, 140), Facts("cuda", False, 8)

TABLE = [
    # images, short side, device → backbone, image size, store, batch, epochs, precision
    (1_000, 400, CPU, ("test_resnet", 64, 128, 64, 100, "fp32")),
    (1_000, 400, CPU_BF16, ("test_resnet", 64, 128, 64, 100, "bf16")),
    (50_000, 32, CPU, ("test_resnet", 32, 32, 64, 8, "fp32")),
    (4_000, 64, CPU_BF16, ("test_resnet", 64, 64, 64, 25, "bf16")),
    (50_000, 32, H200, ("resnet18", 32, 32, 1024, 400, "bf16")),
    (5_000, 96, H200, ("resnet18", 96, 96, 512, 800, "bf16")),
    (1_281_167, 400, H200, ("resnet50", 224, 400, 512, 30, "bf16")),
    (100_000, 300, LAPTOP, ("resnet50", 224, 300, 256, 200, "fp32")),
    (16, 20, CPU, ("test_resnet", 32, 32, 2, 100, "fp32")),
]


@pytest.mark.parametrize("images, short_side, device, expected", TABLE)
def test_auto(images, short_side, device, expected):
    r = resolve(recipes.load("simclr"), images, short_side, device)
    got = (
        r.encoder.backbone,
        r.encoder.image_size,
        r.data.store_size,
        r.train.batch_size,
        r.train.epochs,
        r.train.precision,
    )
    assert got == expected
    assert r.optim.lr == pytest.approx(0.075 * r.train.batch_size**0.5, abs=1e-6)  # the recipe's LARS
    assert r.encoder.stem == ("small" if expected[0] == "resnet18" and expected[1] <= 64 else "timm")


@given(
    images=st.integers(16, 10**7),
    short_side=st.integers(1, 10**4),
    kind=st.sampled_from(["cpu", "cuda", "mps"]),
    bf16=st.booleans(),
    memory=st.integers(0, 200),
)
def test_bounds(images, short_side, kind, bf16, memory):
    r = resolve(recipes.load("simclr"), images, short_side, Facts(kind, bf16, memory))
    assert "auto" not in recipes.write(r)
    assert 1 <= r.train.batch_size <= images / 8
    assert r.train.epochs >= 1 and r.optim.lr > 0
    assert r.encoder.image_size <= r.data.store_size <= 2 * r.encoder.image_size


def test_what_is_set_is_kept():
    overrides = {
        "encoder": {"backbone": "resnet34", "image_size": 48},
        "train": {"batch_size": 10, "epochs": 7, "precision": "fp32"},
        "optim": {"lr": 0.5},
        "data": {"store_size": 50},
    }
    r = resolve(recipes.load("simclr", (), overrides), 1000, 400, H200)
    for table, keys in overrides.items():
        for key, value in keys.items():
            assert getattr(getattr(r, table), key) == value


def test_a_batch_larger_than_the_data_is_refused():
    wanted = recipes.load("simclr", (), {"train": {"batch_size": 128}})
    with pytest.raises(SslpreError, match="batch size `128` is larger than the data set: 100 images") as caught:
        resolve(wanted, 100, 64, CPU)
    assert caught.value.code == 2 and caught.value.hint == "--batch-size 12"


def test_too_few_images():
    with pytest.raises(SslpreError, match="`15` images are too few") as caught:
        resolve(recipes.load("simclr"), 15, 64, CPU)
    assert caught.value.code == 4


def test_native_bf16_is_read_from_the_kernel(tmp_path):
    told = tmp_path / "cpuinfo"
    told.write_text("flags : fpu sse avx512f avx512_bf16 amx_tile\n")
    assert cpu_has_bf16(told)
    told.write_text("flags : fpu sse avx2 avx512f\n")
    assert not cpu_has_bf16(told)
    assert not cpu_has_bf16(tmp_path / "missing")


@pytest.mark.parametrize(
    "optimiser, batch, lr",
    [("lars", 64, 0.6), ("lars", 4096, 4.8), ("sgd", 128, 0.06), ("sgd", 512, 0.24), ("adamw", 256, 1e-3)],
)
def test_learning_rates(optimiser, batch, lr):
    wanted = recipes.load("simclr", (), {"optim": {"name": optimiser}, "train": {"batch_size": batch}})
    assert resolve(wanted, 100_000, 64, H200).optim.lr == pytest.approx(lr)
