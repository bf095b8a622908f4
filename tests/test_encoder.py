"""Backbones: stems, sizes, standardisation, stages, and running in chunks."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F

from sslpre import encoder
from sslpre.errors import SslpreError
from sslpre.timm import small_stem_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(backbone="test_resnet", **kwargs):
    return encoder.build(backbone, **({"image_size": 32, "mean": MEAN, "std": STD} | kwargs))


def test_it_standardises_and_pools():
    torch.manual_seed(0)
    network = build("test_convnext", image_size=64).eval()
    x = torch.rand(2, 3, 64, 64)
    z = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    assert torch.allclose(network(x), network.model(z), atol=1e-5)
    assert network(x).shape == (2, network.dim)


@pytest.mark.parametrize(
    "backbone",
    ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "resnet18", "mobilenetv3_small_050", "lcnet_050"],
)
def test_dim_is_the_width_of_the_features(backbone):
    network = build(backbone, image_size=64).eval()
    assert network(torch.rand(1, 3, 64, 64)).shape == (1, network.dim)
    assert network.model.num_classes == 0


@pytest.mark.parametrize(
    "backbone, stem, image_size, architecture",
    [
        ("resnet18", "auto", 32, "resnet18_small"),
        ("resnet18", "auto", 64, "resnet18_small"),
        ("resnet18", "auto", 65, "resnet18"),
        ("resnet18", "timm", 32, "resnet18"),
        ("resnet50", "small", 48, "resnet50_small"),
        ("resnet18d", "auto", 32, "resnet18d"),  # a deep stem: three convolutions, never swapped
        ("test_resnet", "auto", 32, "test_resnet"),
    ],
)
def test_stem(backbone, stem, image_size, architecture):
    network = build(backbone, stem=stem, image_size=image_size)
    assert network.architecture == architecture
    if architecture.endswith("_small"):
        conv = network.model.conv1
        assert (
            conv.kernel_size == (3, 3)
            and conv.stride == (1, 1)
            and isinstance(network.model.maxpool, torch.nn.Identity)
        )
        sides = [stage.shape[-1] for _, stage in network.stages(torch.rand(1, 3, 32, 32))]
        assert sides == [32, 32, 16, 8, 4]
        assert [info["reduction"] for info in network.model.feature_info] == [1, 1, 2, 4, 8]


@pytest.mark.parametrize(
    "backbone, names",
    [
        ("test_resnet", ["act1", "layer1", "layer2", "layer3", "layer4"]),
        ("test_vit", [f"blocks.{at}" for at in range(6)]),
        ("test_convnext", ["stages.0", "stages.1", "stages.2", "stages.3"]),
        ("efficientnet_b0", ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6"]),
    ],
)
def test_stages_have_timms_names_in_the_order_of_out_indices(backbone, names):
    network = build(backbone, image_size=32).eval()
    x = torch.rand(2, 3, 32, 32)
    stages = network.stages(x)
    assert [name for name, _ in stages] == list(network.stage_names) == names
    for number, (_, one) in enumerate(stages):
        (alone,) = network.model.forward_intermediates(network.prepare(x), indices=[number], intermediates_only=True)
        assert torch.equal(one, alone) and one.ndim == 4


def test_the_small_names_are_the_backbones_with_one_7x7_convolution():
    for name in encoder.small_stems:
        with torch.device("meta"):
            usual, small = timm.create_model(name, num_classes=0), timm.create_model(f"{name}_small", num_classes=0)
        assert usual.conv1.kernel_size == (7, 7)
        other = {k: v.shape for k, v in usual.state_dict().items()}
        assert [k for k, v in small.state_dict().items() if other.pop(k) != v.shape] == ["conv1.weight"] and not other


def test_plain_timm_does_not_know_the_small_names():
    code = (
        "import timm\ntry: timm.create_model('resnet18_small')\nexcept RuntimeError as e: print(e)\n"
        "import sslpre.timm\ntimm.create_model('resnet18_small')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Unknown model (resnet18_small)" in done.stdout


def test_only_our_names_are_of_small_stems():
    small = {name: small_stem_of(name) for name in timm.list_models() if name.endswith("_small")}
    assert small["resnet18_small"] == "resnet18" and small["convnext_small"] is None
    assert {plain for plain in small.values() if plain is not None} == set(encoder.small_stems)
    assert small_stem_of("resnet18") is None and small_stem_of("_small") is None


def test_other_arguments_of_the_network():
    network = build("test_vit", model_args={"num_heads": 4, "patch_size": 8})
    assert network.model.blocks[0].attn.num_heads == 4 and network.model.patch_embed.patch_size == (8, 8)
    assert network.model_args == {"num_heads": 4, "patch_size": 8, "img_size": 32, "dynamic_img_size": True}
    assert build("test_vit", model_args={"patch_size": 10}, image_size=30).model_args["img_size"] == 30


def test_an_empty_name_of_a_stage_gets_its_number():
    network = build("tresnet_m", image_size=64)
    assert network.stage_names == ("stage0", "body.layer1", "body.layer2", "body.layer3", "body.layer4")


@pytest.mark.parametrize(
    "kwargs, message, hint",
    [
        ({"backbone": "convnext_small", "stem": "small"}, "`convnext_small` cannot have a small stem", "stem=timm"),
        *(
            ({"backbone": "test_vit", "model_args": {name: 1}}, f"no argument `{name}`", "encoder.model_args={}")
            for name in (
                "img_size",
                "dynamic_img_size",
                "num_classes",
                "in_chans",
                "features_only",
                "pretrained",
                "cache_dir",
            )
        ),
        ({"backbone": "test_vit", "model_args": {"num_head": 4}}, "did you mean `num_heads`?", "model_args={}"),
        ({"backbone": "test_vit", "model_args": {"depth": 10**9}}, "no number of -8192 to 8192", "model_args={}"),
        (
            {"backbone": "test_vit", "model_args": {"num_heads": "x"}},
            "cannot be built with `num_heads='x'`",
            "model_args",
        ),
        ({"backbone": "test_vit", "model_args": {"num_heads": 5}}, "cannot be built with `num_heads=5`", "model_args"),
        ({"backbone": "test_vit", "model_args": {"global_pool": "odd"}}, "`test_vit` cannot be built", "model_args"),
        ({"backbone": "resnet81"}, "no timm backbone `resnet81`", "--backbone resnet"),
        ({"backbone": "resnet18", "stem": "small", "image_size": 96}, "up to 64 px, not `96`", "encoder.stem=auto"),
        ({"backbone": "resnet18d", "stem": "small"}, "`resnet18d` cannot have a small stem", "encoder.stem=timm"),
        (
            {"backbone": "vit_tiny_patch16_224", "image_size": 200},
            "sizes divisible by 16, `200` is not",
            "--image-size 192 or --image-size 208",
        ),
        ({"backbone": "vit_tiny_patch16_224", "image_size": 8}, "sizes divisible by 16, `8` is not", "--image-size 16"),
    ],
)
def test_refusals(kwargs, message, hint):
    with pytest.raises(SslpreError) as caught:
        build(**kwargs)
    assert message in caught.value.message and hint in caught.value.hint and caught.value.code == 2


@pytest.mark.parametrize("backbone, image_size", [("inception_v3", 32), ("levit_128", 64)])
def test_a_size_that_the_network_cannot_take_is_told_before_training(backbone, image_size):
    with pytest.raises(SslpreError, match=f"`{backbone}` cannot take {image_size} px: ") as caught:
        build(backbone, image_size=image_size)
    assert caught.value.hint.startswith("--image-size ") and caught.value.code == 2


def test_a_pretrained_tag_is_not_swallowed():
    with pytest.raises(SslpreError, match=r"`resnet18.a1_in1k` names pretrained weights") as caught:
        build("resnet18.a1_in1k")
    assert caught.value.hint == "--backbone resnet18"


def test_networks_laid_out_for_one_size_are_laid_out_for_ours():
    assert build("mixer_s32_224", image_size=64).model_args == {"img_size": 64}


def test_vits_take_other_sizes_too():
    network = build("test_vit", image_size=32)
    assert network.model_args == {"img_size": 32, "dynamic_img_size": True}
    assert network(torch.rand(1, 3, 64, 64)).shape == (1, network.dim)


def test_colours():
    torch.manual_seed(0)
    luma = build(colour="luma").eval()
    x = torch.rand(2, 3, 32, 32)
    grey = (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    assert luma.prepare(x).shape == (2, 1, 32, 32)
    assert torch.allclose(luma(x), luma(grey), atol=1e-5)  # colour cannot be seen
    assert build(colour="chroma").prepare(grey).abs().max() < 1e-3  # and grey has no chroma


def lived_in(network):
    """With batch statistics and biases that are not those of a fresh network."""
    with torch.no_grad():
        for tensor in network.model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.rand_like(tensor))
    return network.eval()


@pytest.mark.parametrize(
    "backbone, side",
    [("resnet18", 96), ("resnet18", 32), ("test_vit", 32), ("test_convnext", 64), ("test_efficientnet", 40)],
)
def test_a_network_of_luma_is_one_of_rgb_with_equal_features(backbone, side):
    torch.manual_seed(0)
    luma = lived_in(build(backbone, image_size=side, colour="luma"))
    before = torch.get_rng_state()
    rgb = luma.as_rgb()
    assert torch.equal(torch.get_rng_state(), before), "a run's own draws do not depend on it"
    assert (rgb.colour, rgb.architecture, rgb.training) == ("rgb", luma.architecture, False)
    assert rgb.mean.flatten().tolist() == pytest.approx([sum(MEAN) / 3] * 3)
    assert rgb.std.flatten().tolist() == pytest.approx([sum(STD) / 3] * 3)
    plain = timm.create_model(luma.architecture, num_classes=0, **luma.model_args)
    plain.load_state_dict(rgb.model.state_dict())  # nothing in it that timm does not have
    x = torch.rand(4, 3, side, side)
    with torch.no_grad():
        expected = luma(x)
        assert (plain.eval()((x - rgb.mean) / rgb.std) - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
        for (name, a), (_, b) in zip(luma.stages(x), rgb.stages(x), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), name
    assert rgb.as_rgb() is rgb and luma.train().as_rgb().training


@pytest.mark.parametrize("backbone", ["test_nfnet", "tresnet_m"])
def test_networks_that_cannot_be_both_are_told_before_training(backbone):
    """One scales its kernels itself, the other has squares of pixels as channels."""
    with pytest.raises(SslpreError, match=f"`{backbone}` cannot be trained on `luma`") as caught:
        build(backbone, image_size=64, colour="luma")
    assert caught.value.code == 2 and "--backbone" in caught.value.hint
    assert build(backbone, image_size=64).colour == "rgb"


@pytest.mark.parametrize("colour", ["chroma", "sobel"])
def test_some_colours_are_no_rgb(colour):
    assert not build(colour=colour).ordinary
    with pytest.raises(SslpreError, match=f"`{colour}`"):
        build(colour=colour).as_rgb()


def test_sobel_is_the_authors_two_convolutions():
    """https://github.com/facebookresearch/deepcluster: a mean over standardised channels, then two fixed kernels."""
    network = encoder.build("test_resnet", image_size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), colour="sobel")
    x = torch.rand(4, 3, 32, 32)
    grey = ((x - network.mean) / network.std).mean(1, keepdim=True)
    across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    kernels = torch.stack([across, across.T])[:, None]
    assert torch.allclose(network.prepare(x), F.conv2d(grey, kernels, padding=1), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert network.prepare(x).dtype == torch.float32
    assert network(x).shape == (4, network.dim)


@pytest.mark.parametrize("backbone, side", [("test_resnet", 64), ("test_efficientnet", 64), ("test_convnext", 64)])
def test_the_last_map_is_what_is_pooled(backbone, side):
    network = lived_in(build(backbone, image_size=side))
    x = torch.rand(2, 3, side, side)
    with torch.no_grad():
        pooled = network.model.forward_head(network.last_map(x), pre_logits=True)
        assert torch.allclose(pooled, network(x), atol=1e-5)


@pytest.mark.parametrize("colour", ["rgb", "luma"])
def test_the_last_map_of_tokens_stands_on_their_grid(colour):
    network = lived_in(build("test_vit", image_size=64, colour=colour))
    x = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        z = network.last_map(x)
        tokens = network.model.forward_features(network.prepare(x))
    assert z.shape == (2, 64, 4, 3) and tokens.shape == (2, 13, 64)  # one of them the class token
    for row in range(4):
        for column in range(3):
            assert torch.equal(z[:, :, row, column], tokens[:, 1 + 3 * row + column])


def test_a_last_map_with_channels_last_is_turned():
    network = build("swin_tiny_patch4_window7_224", image_size=64).eval()
    with torch.no_grad():
        assert network.last_map(torch.rand(1, 3, 64, 64)).shape == (1, 768, 2, 2)


def gradients(network, x):
    network.zero_grad()
    (network(x) * torch.arange(network.dim)).square().mean().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_chunks_give_the_same_gradients_and_see_the_batch_once(backbone):
    torch.manual_seed(0)
    whole = build(backbone).double()
    if backbone == "test_resnet":  # compare like with like: batch statistics are the chunk's
        for module in whole.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    chunked = copy.deepcopy(whole)
    chunked.chunk = 3
    x = torch.rand(8, 3, 32, 32, dtype=torch.float64)
    expected, got = gradients(whole, x), gradients(chunked, x)
    for name in expected:
        assert torch.allclose(expected[name], got[name], rtol=1e-9, atol=1e-12), name


def test_recomputing_leaves_running_statistics_alone():
    torch.manual_seed(0)
    network = build("test_resnet").train()
    twin = copy.deepcopy(network)
    network.chunk = 4
    x = torch.rand(8, 3, 32, 32)
    network(x).sum().backward()
    with torch.no_grad():
        for part in x.split(4):
            twin(part)
    for (name, a), b in zip(network.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "name, side, expected", [("test_resnet", 16, True), ("test_resnet", 32, False), ("test_vit", 16, False)]
)
def test_a_strided_convolution_of_one_pixel_is_seen(name, side, expected):
    """In bf16 on a CPU such a gradient is garbage."""
    network = encoder.build(name, image_size=side, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert network.strides_a_point(side) == expected
    assert network.training and not network.model._forward_pre_hooks
