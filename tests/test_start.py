"""Starting weights: where they come from, that they are loaded whole and exactly, and what is refused."""

import json
import time
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslpre import encoder, export, start
from sslpre.errors import SslpreError
from sslpre.start import load, read, say_loaded
from sslpre.weights import locate

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(backbone="test_resnet", image_size=32, mean=MEAN, std=STD, **kwargs):
    return encoder.build(backbone, image_size=image_size, mean=mean, std=std, **kwargs)


def plain(path, name, *, classes=10, metadata=None, **kwargs):
    """A file of timm's own keys with a classifier, as the hub has them; and the network."""
    network = timm.create_model(name, num_classes=classes, **kwargs).eval()
    safetensors.torch.save_file(network.state_dict(), path, metadata=metadata)
    return network


def same_weights(one, other):
    ours, theirs = one.model.state_dict(), other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "resnet18"])
def test_a_plain_file_of_timms_keys(tmp_path, name):
    file = tmp_path / "w.safetensors"
    size = {"test_vit": {"img_size": 32}}.get(name, {})
    network = plain(file, name, **size)
    found = read(str(file), name)
    ours = build(name, stem="timm")
    count = load(ours, found)
    assert count == len(ours.model.state_dict()) == len(network.state_dict()) - found.dropped
    assert found.dropped == 2
    assert same_weights(ours, network)
    assert found.init == str(file) and found.licence == "" and found.architecture == name
    assert say_loaded(ours, found) == (
        f"start      {file}: {count} of {count} tensors loaded, 2 of its classifier left out; licence not known"
    )


def test_a_plain_file_needs_the_networks_name(tmp_path):
    file = tmp_path / "w.safetensors"
    plain(file, "test_resnet")
    with pytest.raises(SslpreError, match="does not say which network") as caught:
        read(str(file), "auto")
    assert caught.value.code == 2 and caught.value.hint == f"--init {file} --backbone NAME"
    with pytest.raises(SslpreError, match="no timm backbone `test_resnett`") as caught:
        read(str(file), "test_resnett")
    assert caught.value.hint == "--backbone test_resnet"


def test_a_tag_gives_the_colours_and_the_licence(tmp_path):
    file = tmp_path / "w.safetensors"
    plain(file, "test_vit")
    tagged, untagged = read(str(file), "test_vit.r160_in1k"), read(str(file), "test_vit")
    assert tagged.licence == "apache-2.0" and untagged.licence == ""
    assert tagged.mean == timm.get_pretrained_cfg("test_vit").mean == untagged.mean


def test_a_folder_as_the_hub_keeps_it(tmp_path):
    """The way round where the hub is not reached: config.json says all, --backbone is not needed."""
    network = plain(tmp_path / "model.safetensors", "test_resnet")
    cfg = {"tag": "r160_in1k", "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "classifier": "fc"}
    config = {"architecture": "test_resnet", "pretrained_cfg": {**cfg, "input_size": [3, 160, 160]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read(str(tmp_path), "auto")
    assert (found.architecture, found.mean, found.image_size) == ("test_resnet", (0.1, 0.2, 0.3), 160)
    assert found.licence == "apache-2.0" and found.origin.endswith("(test_resnet.r160_in1k)")
    ours = build()
    load(ours, found)
    assert same_weights(ours, network)


@pytest.mark.parametrize(
    "config",
    [
        "[",
        "[" * 100_000,
        "[]",
        "{}",
        {"pretrained_cfg": 5},
        {"model_args": [1]},
        {"model_args": {"in_chans": 1}},
        {"model_args": {"img_size": 10**9}},
        {"architecture": 5},
        {"tag": {"a": 1}},
        *({"mean": mean} for mean in ("red", [float("nan"), 0, 0], [0, 0], [0, 0, 2], 5)),
        *({"std": std} for std in ([0, 0, 0], [1, 1, -1], [1, 1, float("inf")], {"r": 1})),
        *({"classifier": named} for named in (5, [5])),
        *({"license": licence} for licence in ({"name": "mit"}, ["mit"], 5)),
        *({"input_size": size} for size in ([3, 0, 0], [3, 8, 5000], [3, -3, -3], 32, "big")),
    ],
)
def test_a_config_that_cannot_be_meant(tmp_path, config):
    plain(tmp_path / "model.safetensors", "test_resnet")
    text = config if isinstance(config, str) else json.dumps({"architecture": "test_resnet", **config})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SslpreError, match=r"config.json` cannot be read: \S") as caught:
        read(str(tmp_path), "auto")
    assert caught.value.code == 5 and "\n" not in caught.value.message


def test_a_folders_model_args_are_its_networks(tmp_path):
    """As timm opens the folder itself: the shapes of its tensors do not tell the number of heads."""
    plain(tmp_path / "model.safetensors", "test_vit", img_size=32, num_heads=4)
    arguments = {"num_heads": 4, "img_size": 32, "num_classes": 10, "qkv_bias": True}
    config = {"architecture": "test_vit", "model_args": arguments, "pretrained_cfg": {"classifier": "head"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    found = read(str(tmp_path), "auto")
    assert found.extra == {"num_heads": 4, "qkv_bias": True} and found.image_size == 32
    ours = start.started(found, 32, found.mean, found.std)
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(ours(x), theirs(ours.prepare(x)), atol=1e-6)
        other = build("test_vit").eval()
        other.model.load_state_dict(found.tensors)
        assert not torch.allclose(other(x), ours(x), atol=1e-3), "the heads make no difference"
    with pytest.raises(SslpreError, match="num_heads=4"):
        load(build("test_vit"), found)
    config["model_args"] = {"features_only": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read(str(tmp_path), "auto")
    with pytest.raises(SslpreError, match="no argument `features_only`") as caught:
        start.started(found, 32, found.mean, found.std)
    assert caught.value.code == 2


def test_what_a_file_says_is_printed_on_one_line(tmp_path):
    plain(tmp_path / "model.safetensors", "test_resnet")
    bad = "mit\n\x1b[31m"
    config = {"architecture": "test_resnet", "pretrained_cfg": {"license": bad, "tag": bad}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read(str(tmp_path), "auto")
    ours = build(stem="timm")
    load(ours, found)
    assert found.licence == "mit\\n\\x1b[31m"
    assert say_loaded(ours, found).isprintable() and all(fact.isprintable() for fact in found.facts().values())
    export.write_file(build(), {"licence": bad, "origin": bad, "method": bad}, tmp_path / "e.safetensors")
    assert all(fact.isprintable() for fact in read(str(tmp_path / "e.safetensors"), "auto").facts().values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_floating_types_become_float32(tmp_path, dtype):
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in SHARED.model.state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    ours = build()
    load(ours, read(str(tmp_path / "w.safetensors"), "test_resnet"))
    for name, tensor in ours.model.state_dict().items():
        assert tensor.dtype in (torch.float32, torch.int64) and torch.equal(tensor, tensors[name].to(tensor.dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.complex64])
def test_numbers_that_are_no_weights(tmp_path, dtype):
    tensors = dict(SHARED.model.state_dict())
    tensors["layer1.0.conv1.weight"] = tensors["layer1.0.conv1.weight"].to(dtype)
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(SslpreError, match=r"`layer1.0.conv1.weight` are \w+ numbers") as caught:
        load(build(), read(str(tmp_path / "w.safetensors"), "test_resnet"))
    assert caught.value.code == 5


def test_an_export_is_not_sent_to_import(tmp_path):
    """What sslpre wrote it knows in full; another program's file may be named in another way."""
    export.write_file(build("mixer_s32_224", 224), {}, tmp_path / "e.safetensors")
    plain(tmp_path / "w.safetensors", "resnet18")
    other = build("mixer_s32_224", 64)
    with pytest.raises(SslpreError, match="not `") as caught:
        load(other, read(str(tmp_path / "e.safetensors"), "auto"))
    assert caught.value.code == 5 and "import" not in caught.value.hint
    with pytest.raises(SslpreError, match="not `") as caught:
        load(other, read(str(tmp_path / "w.safetensors"), "mixer_s32_224"))
    assert "sslpre import" in caught.value.hint


@pytest.mark.parametrize("backbone, stem", [("resnet18_small", "auto"), ("resnet18", "small")])
def test_a_small_stem_that_timms_weights_do_not_have_is_told_before_they_are_fetched(monkeypatch, backbone, stem):
    asked = hub(monkeypatch, error=OSError("offline"))
    with pytest.raises(SslpreError, match="has timm's own stem, and the recipe asks for a small one") as caught:
        read("pretrained", backbone, stem)
    assert caught.value.code == 2 and not asked and "--set encoder.stem=timm" in caught.value.hint


def test_a_name_that_ends_like_ours_is_timms_own(tmp_path):
    assert start.known_weights("convnext_small.fb_in1k")["architecture"] == "convnext_small"
    plain(tmp_path / "c.safetensors", "convnext_small", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    found = read(str(tmp_path / "c.safetensors"), "convnext_small")
    assert (found.architecture, found.stem) == ("convnext_small", "timm")


@pytest.mark.parametrize("form", ["e.safetensors", "enc"])
@pytest.mark.parametrize("backbone, stem", [("test_vit", "timm"), ("resnet18", "small")])
def test_an_export(tmp_path, form, backbone, stem):
    before = build(backbone, mean=(0.1, 0.2, 0.3), std=(0.3, 0.2, 0.1))
    facts = {"method": "simclr", "step": "7", "licence": "mit", "origin": "elsewhere"}
    export.write(before, facts, tmp_path / form)
    found = read(str(tmp_path / form), "auto")
    assert (found.architecture, found.stem, found.image_size) == (backbone, stem, 32)
    assert found.mean == (0.1, 0.2, 0.3) and found.std == (0.3, 0.2, 0.1)
    assert found.licence == "mit" and found.origin == f"{form} (simclr, step 7), from elsewhere"
    after = start.started(found, 32, found.mean, found.std)
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(after(x), before.eval()(x))


def test_a_run(tmp_path, monkeypatch):
    before = build()
    (tmp_path / "runs" / "simclr-1").mkdir(parents=True)
    (tmp_path / "runs" / "simclr-1" / "recipe.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    opened = []

    def open_run(folder, device):
        opened.append(folder)
        return before, None, {"method": "simclr", "step": "12"}

    monkeypatch.setattr("sslpre.train.build.open_run", open_run)
    found = read("simclr-1", "auto")
    assert opened == [Path("runs/simclr-1")]
    assert found.init == str(tmp_path / "runs" / "simclr-1") and found.source == "runs/simclr-1"
    assert found.origin == "simclr-1 (simclr, step 12)"
    after = build()
    load(after, found)
    assert same_weights(after, before.model)


def test_positions_are_resampled_as_timm_does(tmp_path):
    file = tmp_path / "w.safetensors"
    plain(file, "test_vit", img_size=160)
    found = read(str(file), "test_vit")
    ours = build("test_vit", image_size=64)
    overlay = {"file": str(file), "num_classes": 10, "url": "", "hf_hub_id": None}
    theirs = timm.create_model(
        "test_vit", pretrained=True, num_classes=0, img_size=64, dynamic_img_size=True, pretrained_cfg_overlay=overlay
    )
    load(ours, found)
    assert same_weights(ours, theirs)
    assert "positions resampled from 160 to 64 px" in say_loaded(ours, found)


def test_loading_draws_no_random_numbers(tmp_path):
    plain(tmp_path / "w.safetensors", "test_vit", img_size=160)
    ours, found = build("test_vit"), read(str(tmp_path / "w.safetensors"), "test_vit")
    before = torch.get_rng_state()
    load(ours, found)
    assert torch.equal(torch.get_rng_state(), before)


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_every_tensor_counts(data):
    """One missing, one too many, or one of another shape: refused, and told by its name."""
    network = SHARED
    tensors = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    name = data.draw(st.sampled_from(sorted(name for name in tensors if "num_batches" not in name)))
    kind = data.draw(st.sampled_from(["missing", "extra", "shape"]))
    if kind == "missing":
        del tensors[name]
    elif kind == "extra":
        name = f"{name}.more"
        tensors[name] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(*tensors[name].shape, 2)
    found = begin(tensors)
    own = len(network.model.state_dict())
    before = {n: t.clone() for n, t in network.model.state_dict().items()}
    with pytest.raises(SslpreError) as caught:
        load(network, found)
    assert caught.value.code == 5
    fits = own if kind == "extra" else own - 1
    assert caught.value.message == f"`w` fits {fits} of {own} tensors of test_resnet, not `{name}`"
    assert all(torch.equal(t, before[n]) for n, t in network.model.state_dict().items()), "half-loaded"


def test_counters_of_batches_may_be_absent():
    """Files from before 2018 have none, and nothing needs them."""
    tensors = {name: tensor for name, tensor in SHARED.model.state_dict().items() if "num_batches" not in name}
    ours = build()
    assert load(ours, begin(tensors)) == len(tensors)
    assert same_weights(ours, SHARED.model)
    own = len(SHARED.model.state_dict())
    told = f"{len(tensors)} of {own} tensors loaded, the others are counters of batches that nothing needs"
    assert told in say_loaded(ours, begin(tensors))


SHARED = build()


def begin(tensors, architecture="test_resnet", extra=None):
    return start.Start("w", "w", architecture, "timm", 32, MEAN, STD, "", "w", tensors, 0, extra or {})


def test_another_patch_size_is_another_network(tmp_path):
    """timm would resample the patch embedding; the weights are not this network's."""
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0)
    with pytest.raises(SslpreError, match=r"not `patch_embed\.proj\.weight`"):
        load(build("vit_tiny_patch16_224"), begin(dict(network.state_dict()), "vit_tiny_patch16_224"))


def test_other_arguments_are_another_network():
    with pytest.raises(SslpreError, match="with `num_heads=12`, the run's is not") as caught:
        load(SHARED, begin(dict(SHARED.model.state_dict()), extra={"num_heads": 12}))
    assert caught.value.code == 5


def test_an_encoder_of_luma_takes_no_weights_of_rgb():
    luma = encoder.build("test_resnet", image_size=32, mean=MEAN, std=STD, colour="luma")
    with pytest.raises(SslpreError, match=r"not `conv1\.") as caught:
        load(luma, begin(dict(SHARED.model.state_dict())))
    assert caught.value.code == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    tensors = dict(SHARED.model.state_dict())
    tensors["layer1.0.conv1.weight"] = torch.full_like(tensors["layer1.0.conv1.weight"], value)
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(SslpreError, match=r"weights `layer1.0.conv1.weight` are not finite") as caught:
        read(str(tmp_path / "w.safetensors"), "test_resnet")
    assert caught.value.code == 10


def test_what_is_not_there_or_of_another_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder.safetensors").write_bytes(b"")
    (tmp_path / "old.ckpt").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"")
    (tmp_path / "photos").mkdir()
    cases = {
        "encodr.safetensors": (2, "no such file or run", "did you mean --init encoder.safetensors?"),
        "pretraned": (2, "no such file or run", "did you mean --init pretrained?"),
        "old.ckpt": (5, "can run any code", "sslpre import old.ckpt -o old.safetensors"),
        "notes.txt": (5, "no weights that sslpre knows", "name a run"),
        "photos": (5, "no weights that sslpre knows", "name a run"),
    }
    for word, (code, message, hint) in cases.items():
        with pytest.raises(SslpreError, match=message) as caught:
            locate(word)
        assert caught.value.code == code and caught.value.hint.startswith(hint)
    with pytest.raises(SslpreError, match="cannot be read") as caught:
        read("encoder.safetensors", "test_resnet")
    assert caught.value.code == 5


def hub(monkeypatch, file=None, error=None):
    """A hub that has `file` in its cache, or answers with `error`; gives back what was asked of it."""
    asked = []

    def answer(url, timeout):
        asked.append((url, timeout))
        raise error

    monkeypatch.setattr(start, "try_to_load_from_cache", lambda repo, name: file and str(file))
    monkeypatch.setattr(start, "get_hf_file_metadata", answer)
    return asked


def test_timms_weights(tmp_path, monkeypatch):
    folder = tmp_path / "snapshots" / "0123456789abcdef"
    folder.mkdir(parents=True)
    network = plain(folder / "model.safetensors", "test_resnet", classes=1000)
    asked = hub(monkeypatch, folder / "model.safetensors")
    found = [
        read("pretrained", "test_resnet"),
        read("pretrained", "test_resnet.r160_in1k"),
        read("timm:test_resnet.r160_in1k", "auto"),
    ]
    assert not asked
    for one in found:
        assert one.init == "timm:test_resnet.r160_in1k" and one.source == "test_resnet.r160_in1k"
        assert one.licence == "apache-2.0" and one.origin == "hf-hub:timm/test_resnet.r160_in1k@0123456789ab"
        assert one.facts() == {"licence": one.licence, "origin": one.origin}
    ours = build()
    load(ours, found[0])
    assert same_weights(ours, network)
    assert say_loaded(ours, found[0]).endswith("2 of its classifier left out; licence apache-2.0")


@pytest.mark.parametrize("kind", [OSError, start.UNREACHABLE[-2], start.UNREACHABLE[-1]])
def test_no_network(monkeypatch, kind):
    asked = hub(monkeypatch, error=kind("name or service\nnot known"))
    with pytest.raises(SslpreError, match="cannot be fetched: name or service not known") as caught:
        read("pretrained", "resnet18")
    assert caught.value.code == 3
    assert caught.value.hint == (
        "where there is internet: hf download timm/resnet18.a1_in1k --local-dir resnet18.a1_in1k; copy the folder "
        "resnet18.a1_in1k here, and then: --init resnet18.a1_in1k"
    )
    assert len(asked) == 1 and asked[0][1] <= 10


def test_a_host_that_is_not_there_is_told_soon(monkeypatch, tmp_path):
    """With the hub's real client, at an address where nothing listens."""
    url = "http://127.0.0.1:9/model.safetensors"
    monkeypatch.setattr(start, "try_to_load_from_cache", lambda repo, name: None)
    monkeypatch.setattr(start, "hf_hub_url", lambda repo, name: url)
    begun = time.monotonic()
    with pytest.raises(SslpreError, match="cannot be fetched") as caught:
        read("pretrained", "test_resnet")
    assert caught.value.code == 3 and time.monotonic() - begun < 30


@pytest.mark.parametrize(
    "backbone, message, hint",
    [
        ("auto", "needs the name of a network", "--init pretrained --backbone resnet18"),
        ("resnet51", "no timm backbone `resnet51`", "--backbone resnet5"),
        ("resnet18.a9", "timm has no weights `resnet18.a9`", "weights there are: resnet18."),
        ("lcnet_035", "timm has no weights for `lcnet_035`", "--backbone lcnet_0"),
    ],
)
def test_weights_that_timm_does_not_have(backbone, message, hint):
    with pytest.raises(SslpreError) as caught:
        read("pretrained", backbone)
    assert caught.value.code == 2 and message in caught.value.message and caught.value.hint.startswith(hint)


def test_what_a_run_keeps_of_its_start(tmp_path):
    assert start.recorded(tmp_path) == {}
    found = begin({})
    start.record(tmp_path, found)
    assert start.recorded(tmp_path) == found.facts() == {"origin": "w"}
