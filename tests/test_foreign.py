"""Foreign checkpoints: each program's file gives that program's features, and no file gets to run anything."""

import argparse
import os
import pickle
import re
import runpy
import subprocess

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from sslpre import foreign, start
from sslpre.encoder import build
from sslpre.errors import SslpreError
from sslpre.export import open_encoder, write_file

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SMALL = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def standardised(images):
    return (images - torch.tensor(foreign.MEAN).view(3, 1, 1)) / torch.tensor(foreign.STD).view(3, 1, 1)


def shaken(network):
    """Other weights and statistics than any initialisation gives, so that a tensor in the wrong place shows."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.2 * torch.rand_like(tensor)).add_(torch.rand_like(tensor) * 0.001)
            elif "tracked" not in name:
                raise AssertionError(name)
    return network.eval()


def prefixed(prefix, network):
    return {prefix + name: tensor for name, tensor in network.state_dict().items()}


def bring(tmp_path, stored, backbone=None, name="old.pth", **how):
    old, new = tmp_path / name, tmp_path / "new.safetensors"
    torch.save(stored, old, **how)
    told, lines = foreign.bring(old, new, backbone)
    encoder, facts = open_encoder(new)
    assert facts["method"] == "imported" and facts["source"] == name and len(facts["source_sha256"]) == 64
    assert lines[0] == "import timm"
    return encoder, told


def same(encoder, network, images=IMAGES):
    with torch.inference_mode():
        ours, theirs = encoder(images), network(standardised(images))
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def resnet(name="resnet18"):
    """torchvision's network with its classifier, and the same without it."""
    full = shaken(getattr(torchvision.models, name)())
    bare = getattr(torchvision.models, name)()
    bare.fc = nn.Identity()
    bare.load_state_dict({n: t for n, t in full.state_dict().items() if not n.startswith("fc.")})
    return full, bare.eval()


def mlp(width=8):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def test_torchvision_resnet18(tmp_path):
    full, bare = resnet()
    encoder, told = bring(tmp_path, full.state_dict())
    same(encoder, bare)
    assert encoder.architecture == "resnet18" and encoder.image_size == 224
    assert told[:2] == ["resnet18: 120 of 120 tensors", "left out: fc (2 tensors)"]


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_either_age(tmp_path, zipped):
    full, bare = resnet()
    encoder, _ = bring(tmp_path, {"state_dict": full.state_dict()}, _use_new_zipfile_serialization=zipped)
    same(encoder, bare)


def test_safetensors_are_taken_too(tmp_path):
    full, bare = resnet()
    safetensors.torch.save_file(prefixed("backbone.", full), tmp_path / "old.safetensors")
    foreign.bring(tmp_path / "old.safetensors", tmp_path / "new.safetensors")
    same(open_encoder(tmp_path / "new.safetensors")[0], bare)


def test_counters_of_batches_may_be_absent(tmp_path):
    full, bare = resnet()
    stored = {name: tensor for name, tensor in full.state_dict().items() if "num_batches" not in name}
    encoder, told = bring(tmp_path, stored)
    same(encoder, bare)
    assert told[0] == "resnet18: 100 of 120 tensors; 20 counters of batches are not in the file, nothing needs them"


@pytest.mark.parametrize("version", [1, 2])
def test_moco(tmp_path, version):
    """The query encoder is what its authors evaluate; the key encoder differs."""
    query, bare = resnet()
    key, _ = resnet()
    if version == 2:
        query.fc, key.fc = mlp(), mlp()
    stored = {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": {
            **prefixed("module.encoder_k.", key),
            **prefixed("module.encoder_q.", query),
            "module.queue": torch.rand(128, 1000),
            "module.queue_ptr": torch.zeros(1, dtype=torch.long),
        },
        "optimizer": {"state": {0: {"momentum_buffer": torch.rand(3)}}, "param_groups": [{"lr": 0.03, "params": [0]}]},
    }
    encoder, told = bring(tmp_path, stored, name="moco.pth.tar")
    same(encoder, bare)
    assert told[0] == "resnet18: 120 of 120 tensors of `state_dict.module.encoder_q`"
    heads = 2 if version == 1 else 4
    assert told[1] == (
        f"left out: encoder_k ({120 + heads} tensors), queue (128×1,000), queue_ptr (1), optimizer (3), "
        f"fc ({heads} tensors)"
    )


def vit(**arguments):
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=12, num_classes=0, **arguments)
    return shaken(network)


def test_moco_v3_vit(tmp_path):
    base, momentum = vit(), vit()
    stored = {
        "state_dict": {
            **prefixed("module.base_encoder.", base),
            **prefixed("module.base_encoder.head.", mlp()),
            **prefixed("module.momentum_encoder.", momentum),
            **prefixed("module.predictor.", mlp()),
        }
    }
    encoder, told = bring(tmp_path, stored)
    same(encoder, base, SMALL)
    assert encoder.model_args == {"img_size": 32, "dynamic_img_size": True}
    assert told[0].endswith("of `state_dict.module.base_encoder`") and "head (4 tensors)" in told[1]
    assert told[2] == "taken to be: 32 px, 3 heads, images standardised with ImageNet's mean and deviation"


def test_moco_v3_small_has_twelve_heads(tmp_path):
    network = shaken(timm.create_model("vit_small_patch16_224", img_size=32, num_heads=12, num_classes=0))
    encoder, _ = bring(tmp_path, {"state_dict": prefixed("module.base_encoder.", network)})
    assert encoder.model_args["num_heads"] == 12
    same(encoder, network, SMALL)


def test_moco_v3_small_starts_a_run(tmp_path):
    network = shaken(timm.create_model("vit_small_patch16_224", img_size=32, num_heads=12, depth=12, num_classes=0))
    bring(tmp_path, {"state_dict": prefixed("module.base_encoder.", network)})
    found = start.read(str(tmp_path / "new.safetensors"), "auto")
    assert found.extra == {"num_heads": 12}
    same(start.started(found, 32, found.mean, found.std), network, SMALL)


def test_heads_that_nothing_tells_are_called_a_guess(tmp_path):
    network = shaken(timm.create_model("vit_small_patch16_224", img_size=32, num_heads=12, num_classes=0))
    _, told = bring(tmp_path, {"state_dict": prefixed("module.", network)})
    assert "6 heads (a guess: no tensor tells)" in told[-1]


def test_convnext_small_is_not_of_a_small_stem(tmp_path):
    network = shaken(timm.create_model("convnext_small", num_classes=0))
    encoder, told = bring(tmp_path, network.state_dict())
    assert encoder.architecture == "convnext_small" and "max-pool" not in told[-1]
    same(encoder, network, SMALL)
    (tmp_path / "new.safetensors").unlink()
    encoder, told = bring(tmp_path, network.state_dict(), backbone="convnext_small")
    assert encoder.architecture == "convnext_small"


def test_our_own_export_is_not_imported(tmp_path):
    """It would lose its licence, its origin and its colours."""
    network = build("test_resnet", image_size=32, mean=(0.1, 0.2, 0.3), std=(0.3, 0.2, 0.1))
    old = tmp_path / "old.safetensors"
    write_file(network, {"licence": "mit", "origin": "elsewhere"}, old)
    with pytest.raises(SslpreError, match="was written by sslpre") as caught:
        foreign.bring(old, tmp_path / "new.safetensors")
    assert caught.value.code == 2 and caught.value.hint == f"--init {old}"
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize("names", [("licence", "origin"), ("license", "origin_url")])
def test_licence_and_origin_are_carried(tmp_path, names):
    network = shaken(timm.create_model("test_resnet", num_classes=0))
    metadata = {names[0]: "cc-by-4.0\n", names[1]: "https://example.org"}
    safetensors.torch.save_file(network.state_dict(), tmp_path / "old.safetensors", metadata=metadata)
    foreign.bring(tmp_path / "old.safetensors", tmp_path / "new.safetensors")
    facts = open_encoder(tmp_path / "new.safetensors")[1]
    assert facts["licence"] == "cc-by-4.0\\n" and facts["origin"] == "old.safetensors, from https://example.org"
    found = start.read(str(tmp_path / "new.safetensors"), "auto")
    assert found.licence == facts["licence"] and found.origin.endswith("https://example.org")


def test_dino_takes_the_teacher(tmp_path):
    teacher, student = vit(), vit()
    stored = {
        "student": {**prefixed("module.backbone.", student), **prefixed("module.head.mlp.", mlp())},
        "teacher": {**prefixed("backbone.", teacher), **prefixed("head.mlp.", mlp())},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_tiny", lr=5e-4),
        "dino_loss": {"center": torch.zeros(1, 65536)},
    }
    encoder, told = bring(tmp_path, stored)
    same(encoder, teacher, SMALL)
    assert encoder.architecture == "vit_tiny_patch16_224"
    assert told[0] == "vit_tiny_patch16_224: 150 of 150 tensors of `teacher.backbone`"
    assert told[1] == "left out: student (154 tensors), head (4 tensors), dino_loss (1×65,536)"


def test_mae(tmp_path):
    network = vit()
    decoder = {"mask_token": torch.rand(1, 1, 8), "decoder_pos_embed": torch.rand(1, 5, 8)}
    stored = {"model": {**network.state_dict(), **decoder, **prefixed("decoder_blocks.0.", mlp())}}
    encoder, told = bring(tmp_path, stored)
    same(encoder, network, SMALL)
    assert told[1] == "left out: mask_token (1×1×8), decoder_pos_embed (1×5×8), decoder_blocks (4 tensors)"


def test_vissl(tmp_path):
    full, bare = resnet()
    trunk = {name: tensor for name, tensor in prefixed("_feature_blocks.", full).items() if ".fc." not in name}
    model = {"trunk": trunk, "heads": prefixed("0.clf.", mlp())}
    encoder, told = bring(tmp_path, {"phase": 99, "classy_state_dict": {"base_model": {"model": model}}})
    same(encoder, bare)
    assert told[1] == "left out: heads (4 tensors)"


def test_lightly_and_its_momentum_twin(tmp_path):
    full, bare = resnet()
    other, _ = resnet()
    sequential, twin = (nn.Sequential(*list(network.children())[:-1]) for network in (full, other))
    stored = {
        "state_dict": {
            **prefixed("backbone_momentum.", twin),
            **prefixed("projection_head.layers.", mlp()),
            **prefixed("backbone.", sequential),
        }
    }
    encoder, told = bring(tmp_path, stored, name="epoch=9.ckpt")
    same(encoder, bare)
    assert told[0] == "resnet18: 120 of 120 tensors of `state_dict.backbone`"
    assert told[1] == "left out: backbone_momentum (120 tensors), projection_head (4 tensors)"


def test_simsiam_resnet50(tmp_path):
    full, bare = resnet("resnet50")
    full.fc = mlp()
    stored = {"state_dict": {**prefixed("module.encoder.", full), **prefixed("module.predictor.", mlp())}}
    encoder, told = bring(tmp_path, stored)
    same(encoder, bare)
    assert encoder.architecture == "resnet50" and "predictor (4 tensors), fc (4 tensors)" in told[1]


def test_byol_takes_the_online_network(tmp_path):
    online, target = resnet(), resnet()
    stored = {**prefixed("target_encoder.net.", target[0]), **prefixed("online_encoder.net.", online[0])}
    encoder, _ = bring(tmp_path, stored)
    same(encoder, online[1])


def test_the_average_of_timms_own_training(tmp_path):
    averaged, plain = resnet(), resnet()
    encoder, _ = bring(tmp_path, {"state_dict": plain[0].state_dict(), "state_dict_ema": averaged[0].state_dict()})
    same(encoder, averaged[1])


def test_torchvision_vit(tmp_path):
    network = torchvision.models.VisionTransformer(32, 16, 12, 3, 192, 768)
    encoder, told = bring(tmp_path, shaken(network).state_dict())
    network.heads = nn.Identity()
    same(encoder, network, SMALL)
    assert told[:2] == ["vit_tiny_patch16_224: 150 of 150 tensors", "left out: head (2 tensors)"]


def test_torchvision_convnext(tmp_path):
    network = shaken(torchvision.models.convnext_tiny())
    encoder, _ = bring(tmp_path, network.state_dict())
    network.classifier[2] = nn.Identity()
    same(encoder, network)
    assert encoder.architecture == "convnext_tiny"


def test_the_papers_convnext(tmp_path):
    """Its names are timm's after timm's own filter, so that filter is what ours is held to."""
    from timm.models.convnext import checkpoint_filter_fn

    network = shaken(timm.create_model("convnext_tiny", num_classes=10))
    stored = {}
    for name, tensor in network.state_dict().items():
        name = name.replace("head.norm", "norm").replace("head.fc", "head").replace(".blocks.", ".")
        name = name.replace("stem.", "downsample_layers.0.").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        parts = name.split(".")
        if "downsample" in parts:
            name = ".".join(["downsample_layers", parts[1], *parts[3:]])
        stored[name] = tensor
    assert checkpoint_filter_fn(dict(stored), network).keys() == network.state_dict().keys()
    encoder, told = bring(tmp_path, {"model": stored})
    network.head.fc = nn.Identity()
    same(encoder, network)
    assert told[1] == "left out: head (2 tensors)"


def test_it_can_be_started_from(tmp_path):
    full, bare = resnet()
    bring(tmp_path, full.state_dict())
    found = start.read(str(tmp_path / "new.safetensors"), "auto")
    assert (found.architecture, found.stem, found.mean) == ("resnet18", "timm", foreign.MEAN)
    assert found.origin == "new.safetensors (imported), from old.pth" and found.licence == ""
    same(start.started(found, 64, found.mean, found.std), bare)


def test_a_small_stem(tmp_path):
    import sslpre.timm  # noqa: F401  registers the name

    network = shaken(timm.create_model("resnet18_small", num_classes=0))
    encoder, told = bring(tmp_path, prefixed("module.", network))
    same(encoder, network, SMALL)
    assert encoder.architecture == "resnet18_small" and encoder.image_size == 32
    assert "no max-pool after its stem" in told[-1]


def test_a_named_backbone_of_any_kind(tmp_path):
    network = shaken(timm.create_model("test_efficientnet", num_classes=0))
    stored = {"model": prefixed("net.", network)}
    encoder, told = bring(tmp_path, stored, backbone="test_efficientnet.r160_in1k")
    same(encoder, network)
    count = len(network.state_dict())
    assert told[0] == f"test_efficientnet: {count} of {count} tensors of `model.net`"
    with pytest.raises(SslpreError, match=r"no ResNet, ViT or ConvNeXt") as caught:
        foreign.bring(tmp_path / "old.pth", tmp_path / "other.safetensors")
    assert caught.value.code == 5 and "--backbone" in caught.value.hint


def refused(tmp_path, stored, backbone=None, **how):
    old, new = tmp_path / "old.pth", tmp_path / "new.safetensors"
    torch.save(stored, old, **how)
    with pytest.raises(SslpreError) as caught:
        foreign.bring(old, new, backbone)
    assert not new.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["old.pth"]
    return caught.value


def test_a_missing_tensor_is_told_by_name(tmp_path):
    stored = resnet()[0].state_dict()
    del stored["layer3.1.bn2.running_var"]
    error = refused(tmp_path, stored)
    assert error.message == (
        f"`{tmp_path / 'old.pth'}` fits 119 of 120 tensors of resnet18, not `layer3.1.bn2.running_var`"
    )
    assert error.code == 5


def test_a_deeper_network_is_not_taken_for_a_shallower_one(tmp_path):
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=13, num_classes=0)
    error = refused(tmp_path, network.state_dict())
    assert "not `blocks.12." in error.message


def test_the_wrong_backbone(tmp_path):
    error = refused(tmp_path, resnet()[0].state_dict(), "resnet34")
    assert "tensors of resnet34" in error.message and error.code == 5
    assert refused(tmp_path, {}, "resnet3").hint.startswith("--backbone resnet")


def test_weights_that_are_not_finite(tmp_path):
    stored = resnet()[0].state_dict()
    stored["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    assert refused(tmp_path, stored).code == 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_floating_types_become_float32(tmp_path, dtype):
    stored = timm.create_model("test_resnet", num_classes=0).state_dict()
    stored = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    encoder, _ = bring(tmp_path, stored)
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, stored[name].to(tensor.dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.complex64, torch.bool])
def test_numbers_that_are_no_weights(tmp_path, dtype):
    stored = timm.create_model("test_resnet", num_classes=0).state_dict()
    stored["layer1.0.conv1.weight"] = stored["layer1.0.conv1.weight"].to(dtype)
    error = refused(tmp_path, stored)
    assert error.code == 5 and "`layer1.0.conv1.weight` are " in error.message


def test_more_numbers_than_the_file_has(tmp_path):
    """A stride of 0 makes any size of a few bytes."""
    stored = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    stored["pos_embed"] = torch.zeros(1, 1, 192).expand(1, 40_000**2 + 1, 192)
    error = refused(tmp_path, stored)
    assert error.code == 5 and "`pos_embed` claim" in error.message
    stored = timm.create_model("test_vit", num_classes=0).state_dict()
    stored["blocks.0.attn.qkv.weight"] = torch.zeros(1).expand_as(stored["blocks.0.attn.qkv.weight"])
    assert "`blocks.0.attn.qkv.weight` claim" in refused(tmp_path, stored).message


def test_positions_of_larger_images_than_any(tmp_path):
    stored = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    stored["pos_embed"] = torch.zeros(1, 257**2 + 1, 192)
    error = refused(tmp_path, stored)
    assert error.code == 5 and "is for images of 4,112 px" in error.message


def test_names_with_control_characters_are_written_out(tmp_path, monkeypatch, capsys):
    from sslpre.cli import run

    stored = {**timm.create_model("test_resnet", num_classes=0).state_dict(), "\x1b[31mred\nhead": torch.zeros(3)}
    torch.save({"net": stored}, tmp_path / "old.pth")
    monkeypatch.chdir(tmp_path)
    assert run(["import", "old.pth", "-o", "new.safetensors"]) == 0
    told = capsys.readouterr().err
    assert "\\x1b[31mred\\nhead (3)" in told and "\x1b" not in told


def test_a_dictionary_within_itself_ends(tmp_path):
    stored = {"a": torch.rand(2)}
    stored["self"] = stored
    assert "1 tensors" in refused(tmp_path, stored).message


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


PAYLOADS = {
    "os.system": lambda mark: Calls(os.system, f"touch {mark}"),
    "eval": lambda mark: Calls(eval, f"open({mark!r}, 'w').close()"),
    "exec": lambda mark: Calls(exec, f"open({mark!r}, 'w').close()"),
    "subprocess": lambda mark: Calls(subprocess.check_call, ["touch", mark]),
    "open": lambda mark: Calls(open, mark, "w"),
    "getattr": lambda mark: Calls(getattr, Calls(open, mark, "w"), "close"),
    "runpy": lambda mark: Calls(runpy.run_path, mark + ".py"),
    "torch.load": lambda mark: Calls(torch.load, mark + ".pth", None, None),
}


@pytest.mark.parametrize("kind", PAYLOADS)
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_a_file_that_wants_to_run_something_is_refused(tmp_path, kind, form):
    mark = tmp_path / "marks" / "ran"
    mark.parent.mkdir()
    stored = {"state_dict": {"conv1.weight": torch.rand(8, 3, 7, 7)}, "args": PAYLOADS[kind](str(mark))}
    old, new = tmp_path / "old.pth", tmp_path / "new.safetensors"
    if form == "bare":
        old.write_bytes(pickle.dumps(stored))
    else:
        torch.save(stored, old, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(SslpreError) as caught:
        foreign.bring(old, new)
    assert list(mark.parent.iterdir()) == [] and not new.exists()
    assert caught.value.code == 5
    assert "is refused: to read it, `" in caught.value.message or form == "bare"


def test_what_would_have_to_be_called_is_named(tmp_path):
    error = refused(tmp_path, {"state_dict": {"w": torch.rand(1)}, "best": np.float64(3.0)})
    assert re.search(r"to read it, `numpy\.\w+\.multiarray\.scalar` would have to be called", error.message)
    assert error.code == 5


def test_the_payloads_do_run_where_nothing_is_refused(tmp_path):
    """So that the test above tests something."""
    for kind in ("os.system", "eval", "exec", "subprocess", "open", "getattr"):
        pickle.loads(pickle.dumps(PAYLOADS[kind](str(tmp_path / kind))))
        assert (tmp_path / kind).exists(), kind


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a checkpoint", b"PK\x03\x04" + bytes(60), b"\x80\x02}q\x00."])
def test_what_is_no_checkpoint(tmp_path, content):
    (tmp_path / "old.pth").write_bytes(content)
    with pytest.raises(SslpreError) as caught:
        foreign.bring(tmp_path / "old.pth", tmp_path / "new.safetensors")
    assert caught.value.code == 5 and "\n" not in caught.value.message


def test_the_new_file_is_as_readable_as_any(tmp_path):
    before = os.umask(0o022)
    try:
        bring(tmp_path, timm.create_model("test_resnet", num_classes=0).state_dict())
    finally:
        os.umask(before)
    assert (tmp_path / "new.safetensors").stat().st_mode & 0o777 == 0o644


def test_names_that_cannot_be_written(tmp_path):
    old, new = tmp_path / "weights.pth", tmp_path / "new.safetensors"
    torch.save({}, old)
    (tmp_path / "empty").mkdir()
    (tmp_path / "hub").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "hub" / name).write_text("")
    cases = [
        (tmp_path / "weight.pth", new, "there is no file", f"did you mean {old}?"),
        (tmp_path, new, "is a folder", f"sslpre import {old} -o {new}"),
        (tmp_path / "empty", new, "is a folder", "name a file"),
        (tmp_path / "hub", new, "is a folder", f"it needs no import: --init {tmp_path / 'hub'}"),
        (old, tmp_path / "new.pth", "does not end in .safetensors", f"sslpre import {old} -o {new}"),
    ]
    for one, other, message, hint in cases:
        with pytest.raises(SslpreError, match=message) as caught:
            foreign.bring(one, other)
        assert caught.value.code == 2 and hint in caught.value.hint
    new.write_text("mine")
    with pytest.raises(SslpreError, match="exists"):
        foreign.bring(old, new)
    assert new.read_text() == "mine"
