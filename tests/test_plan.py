"""What `auto` means, as a table; and the bounds that hold for every data set."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sslpre import recipe as recipes
from sslpre.errors import SslpreError
from sslpre.start import Start
from sslpre.train.device import Facts, cpu_has_bf16
from sslpre.train.plan import as_begun, learning_rate, resolve

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


def begin(architecture="resnet50", stem="timm", image_size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), **extra):
    name = f"{architecture}.a1_in1k"
    return Start(f"timm:{name}", name, architecture, stem, image_size, mean, std, "mit", "here", {}, 0, extra)


def started(start, short_side=400, device=H200, **encoder):
    return resolve(recipes.load("simclr", (), {"encoder": encoder}), 50_000, short_side, device, start)


def test_a_start_brings_its_network_colours_and_name():
    table = started(begin(), init="pretrained", backbone="resnet50.a1_in1k").encoder
    assert (table.backbone, table.stem, table.image_size) == ("resnet50", "timm", 224)
    assert table.mean == table.std == (0.5, 0.5, 0.5)
    assert table.init == "timm:resnet50.a1_in1k"
    assert started(begin(), device=CPU).encoder.backbone == "resnet50"
    assert started(begin(), short_side=32).encoder.stem == "timm", "though 32 px would get a small stem"


def test_colours_that_a_recipe_names_are_kept():
    table = started(begin(), mean=[0.1, 0.2, 0.3]).encoder
    assert table.mean == (0.1, 0.2, 0.3) and table.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "start, named, message, hint",
    [
        (begin(), {"backbone": "resnet18"}, "is a resnet50, `--backbone resnet18`", "--backbone resnet50"),
        (begin("vit_tiny_patch16_224"), {"backbone": "test_vit"}, "is a vit_tiny", "--backbone vit_tiny_patch16_224"),
        (begin(), {"stem": "small"}, "has timm's own stem", "--set encoder.stem=timm"),
        (begin(), {"backbone": "resnet50_small"}, "has timm's own stem", "--set encoder.stem=timm"),
        (begin(stem="small"), {"stem": "timm"}, "has a small stem", "--set encoder.stem=small"),
        (begin(stem="small"), {"image_size": 96}, "up to 64 px, not `96`", "--image-size 64"),
    ],
)
def test_a_recipe_that_asks_for_another_network_than_the_start(start, named, message, hint):
    with pytest.raises(SslpreError) as caught:
        started(start, **named)
    assert caught.value.code == 2 and message in caught.value.message and caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    "start, short_side, image_size",
    [
        (begin("resnet18", "small", 32), 400, 64),
        (begin("resnet18", "small", 64), 32, 32),
        (begin("vit_tiny_patch16_224"), 100, 96),
        (begin("vit_small_patch14_dinov2", image_size=518), 64, 518),  # 64 px are no whole number of its patches
        (begin("vit_small_patch14_dinov2", image_size=518), 400, 224),
        (begin("mixer_s32_224"), 64, 224),  # laid out for one size
        (begin("test_convnext", image_size=160), 64, 64),
    ],
)
def test_the_image_size_is_one_that_the_start_can_take(start, short_side, image_size):
    assert started(start, short_side).encoder.image_size == image_size


def test_a_start_is_trained_gently():
    fresh, gentle = resolve(recipes.load("simclr"), 50_000, 400, H200), started(begin())
    assert (fresh.optim.warmup, gentle.optim.warmup) == (0.1, 0.2)
    for optimiser in ("lars", "sgd", "adamw"):
        assert learning_rate(optimiser, 256, begin()) == pytest.approx(learning_rate(optimiser, 256) / 10)
    kept = recipes.load("simclr", (), {"optim": {"lr": 0.5, "warmup": 0.03}})
    optim = resolve(kept, 50_000, 400, H200, begin()).optim
    assert (optim.lr, optim.warmup) == (0.5, 0.03)


def test_a_resolved_recipe_resolves_to_itself():
    once = started(begin(stem="small", architecture="resnet18"), backbone="resnet18", init="pretrained")
    assert resolve(once, 50_000, 400, H200, begin(stem="small", architecture="resnet18")) == once


def test_the_same_wish_is_recognised_when_it_is_typed_again():
    begun = started(begin(), init="pretrained", backbone="resnet50")
    for named, same in {"resnet50": True, "resnet50.a1_in1k": True, "resnet50.other": False, "resnet18": False}.items():
        again = as_begun(recipes.load("simclr", (), {"encoder": {"init": "pretrained", "backbone": named}}), begun)
        assert (again.encoder.backbone == "resnet50") == same
        assert (again.encoder.init, again.encoder.mean) == (begun.encoder.init, begun.encoder.mean)
    fresh = recipes.load("simclr")
    assert as_begun(fresh, begun) is fresh and as_begun(fresh, fresh) is fresh


def test_a_start_brings_the_arguments_of_its_network():
    moco = begin("vit_small_patch16_224", num_heads=12)
    table = started(moco, init="x").encoder
    assert table.model_args == {"num_heads": 12}
    told = started(begin("vit_small_patch16_224"), model_args={"num_heads": 12}).encoder
    assert told.model_args == {"num_heads": 12}, "a file of bare tensors does not tell, a recipe may"
    assert started(moco, model_args={"qkv_bias": True}).encoder.model_args == {"num_heads": 12, "qkv_bias": True}
    with pytest.raises(SslpreError, match="has num_heads=12, and the recipe asks for `6`") as caught:
        started(moco, model_args={"num_heads": 6})
    assert caught.value.code == 2
    assert resolve(recipes.load("simclr"), 50_000, 400, H200).encoder.model_args == {}


@pytest.mark.parametrize("value", [None, {"a": 1}, [[1]], float("nan")])
def test_arguments_that_no_recipe_can_hold(value):
    with pytest.raises(SslpreError, match="which no recipe can hold") as caught:
        started(begin("test_vit", act_layer=value))
    assert caught.value.code == 5
    with pytest.raises(SslpreError, match="model_args"):
        recipes.load("simclr", (), {"encoder": {"model_args": {"act_layer": value}}})


def test_arguments_are_written_and_read_back(tmp_path):
    arguments = {"num_heads": 12, "qkv_bias": False, "mlp_ratio": 3.5, "act_layer": "gelu", "depths": [1, 2]}
    wanted = recipes.load("simclr", (), {"encoder": {"model_args": arguments}})
    (tmp_path / "again.toml").write_text(recipes.write(wanted))
    assert recipes.load(str(tmp_path / "again.toml")).encoder.model_args == arguments
    assert recipes.load("simclr", ("encoder.model_args.num_heads=4",)).encoder.model_args == {"num_heads": 4}


def test_the_image_size_fits_the_patches_that_the_start_has():
    assert started(begin("test_vit", image_size=160, patch_size=10), short_side=64).encoder.image_size == 160


def test_the_same_wish_with_a_networks_arguments_or_a_name_that_ends_like_ours():
    begun = started(begin("vit_small_patch16_224", num_heads=12), init="pretrained")
    for typed, same in [({}, True), ({"num_heads": 12}, True), ({"num_heads": 6}, False)]:
        wanted = recipes.load("simclr", (), {"encoder": {"init": "pretrained", "model_args": typed}})
        assert (as_begun(wanted, begun).encoder.model_args == begun.encoder.model_args) == same
    begun = started(begin("convnext_small"), init="pretrained")
    table = {"init": "pretrained", "backbone": "convnext_small.a1_in1k"}
    assert started(begin("convnext_small"), **table).encoder.stem == "timm"
    again = as_begun(recipes.load("simclr", (), {"encoder": table}), begun)
    assert again.encoder.backbone == "convnext_small"


@pytest.mark.parametrize(
    "name, side, stem",
    [
        ("jigsaw", 224, "timm"),  # tiles of 63 px: small ones, but the images that the encoder is for are not
        ("jigsaw", 96, "small"),  # of 27
        ("jigsaw", 64, "small"),
        ("relative-location", 128, "small"),  # of 30
        ("relative-location", 160, "timm"),  # of 38
        ("rotation", 96, "timm"),
        ("rotation", 64, "small"),
    ],
)
def test_the_stem_follows_the_tiles(name, side, stem):
    recipe = recipes.load(name).edit(encoder={"backbone": "resnet18", "image_size": side})
    assert resolve(recipe, 4000, 400, CPU).encoder.stem == stem


@pytest.mark.parametrize("world, batch", [(1, 64), (2, 64), (3, 63), (6, 60), (100, 100)])
def test_the_chosen_batch_can_be_shared_out(world, batch):
    recipe = resolve(recipes.load("simclr"), 4000, 64, CPU_BF16, None, world)
    assert recipe.train.batch_size == batch
    assert recipe.optim.lr == pytest.approx(0.075 * batch**0.5, abs=1e-6)
