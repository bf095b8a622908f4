"""Exports: timm opens them in another process with equal features, or they are not there."""

import json
import os
import stat
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from safetensors import safe_open

from sslpre import export as module
from sslpre import start
from sslpre.encoder import Encoder, build
from sslpre.errors import SslpreError
from sslpre.export import export, open_encoder, write_file, write_folder

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.26, 0.27)
FACTS = {
    "architecture": "?", "model_args": "?", "mean": "?", "std": "?", "image_size": "?", "store_size": "40",
    "recipe": "simclr", "method": "simclr", "step": "12", "data_fingerprint": "ab12", "sslpre": "?",
}  # fmt: skip


@pytest.fixture(autouse=True)
def found_by_children(monkeypatch, child, tmp_path):
    monkeypatch.setenv("PYTHONPATH", child["PYTHONPATH"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)


def encoder(name="test_resnet", side=32, **arguments):
    """With batch statistics and biases that are not those of a fresh network."""
    network = build(name, image_size=side, mean=MEAN, std=STD, **arguments)
    with torch.no_grad():
        for tensor in network.model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand_like(tensor))
    return network


def features(network, images):
    with torch.no_grad():
        return network.eval()(images)


def reason(code, action, *arguments):
    with pytest.raises(SslpreError) as error:
        action(*arguments)
    assert error.value.code == code, error.value.message
    assert "\n" not in error.value.message and error.value.hint
    return error.value.message


# ---- proven in a fresh process: each of these starts one


@pytest.mark.parametrize(
    ("name", "out"),
    [
        ("resnet18_small", "new/deep/encoder.safetensors"),
        ("resnet18_small", "enc"),
        ("test_resnet", "an odd 'name' #1"),
        ("test_vit", "encoder.safetensors"),
        ("test_vit", "enc"),
        ("test_convnext", "enc"),
    ],
)
def test_the_printed_lines_open_it(name, out, tmp_path):
    network = encoder(name).train()
    lines = export(network, FACTS, tmp_path / out)
    assert network.training
    assert any("import sslpre.timm" in line for line in lines) == name.endswith("_small")
    assert any("dynamic_img_size=True" in line for line in lines) == (name == "test_vit" and "." in out)
    images = torch.rand(2, 3, 32, 32)
    opened, facts = open_encoder(tmp_path / out)
    torch.testing.assert_close(features(opened, images), features(network, images))
    assert not opened.training and opened.image_size == 32 and opened.architecture == name
    assert facts["step"] == "12" and facts["architecture"] == name
    assert [path.name for path in (tmp_path / out).parent.iterdir()] == [(tmp_path / out).name]  # no temporary is left


@pytest.mark.parametrize(
    ("name", "out", "stage"),
    [("resnet18_small", "enc.safetensors", None), ("test_vit", "enc", "blocks.2")],
)
def test_an_encoder_of_luma_is_exported_as_one_of_rgb(name, out, stage, tmp_path):
    """Plain timm gives its features, and so does a run that starts from it; the proof compares with luma itself."""
    network = encoder(name, colour="luma")
    lines = export(network, FACTS, tmp_path / out, stage)
    assert not any("in_chans" in line for line in lines) and network.colour == "luma"
    images = torch.rand(2, 3, 32, 32)
    opened, facts = open_encoder(tmp_path / out)
    assert opened.colour == "rgb" and len(set(json.loads(facts["mean"]))) == len(set(json.loads(facts["std"]))) == 1
    torch.testing.assert_close(features(opened, images), features(network, images), rtol=1e-5, atol=1e-5)
    begun = start.read(str(tmp_path / out), "auto")
    again = start.started(begun, 32, begun.mean, begun.std)
    torch.testing.assert_close(features(again, images), features(network, images), rtol=1e-5, atol=1e-5)


def test_a_run_of_luma_leaves_a_folder_of_rgb(tmp_path):
    network = encoder(colour="luma")
    write_folder(network, FACTS, tmp_path / "enc")
    write_file(network, FACTS, tmp_path / "enc.safetensors")
    model = timm.create_model("local-dir:enc", pretrained=True)
    cfg, images = model.pretrained_cfg, torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert cfg["mean"] == pytest.approx([sum(MEAN) / 3] * 3)
    expected = features(network, images)
    torch.testing.assert_close(features(model, (images - mean) / std), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features(open_encoder(tmp_path / "enc.safetensors")[0], images), expected)


@pytest.mark.parametrize(
    ("name", "side", "stage", "number", "out"),
    [
        ("resnet18_small", 32, "layer2", 2, "encoder.safetensors"),
        ("test_resnet", 32, "3", 3, "enc"),
        ("test_vit", 32, "blocks.2", 2, "encoder.safetensors"),
        ("test_vit", 32, "0", 0, "enc"),
        ("test_convnext", 32, "stages.1", 1, "encoder.safetensors"),
        ("test_efficientnet", 32, "4", 4, "enc"),
    ],
)
def test_a_stage_is_opened_by_the_printed_lines(name, side, stage, number, out, tmp_path):
    network = encoder(name, side).train()
    lines = export(network, FACTS, tmp_path / out, stage)  # the proof compares the map with the encoder's own
    assert network.training
    assert sum(f"features_only=True, out_indices=({number},)" in line for line in lines) == 1
    opened, facts = open_encoder(tmp_path / out)
    assert (facts["stage"], facts["stage_name"]) == (str(number), network.stage_names[number])
    if out == "enc":
        written = json.loads((tmp_path / "enc" / "config.json").read_text())["sslpre"]
        assert (written["stage"], written["stage_name"]) == (str(number), network.stage_names[number])
    images = torch.rand(2, 3, side, side)
    torch.testing.assert_close(features(opened, images), features(network, images))  # the weights are all there
    torch.testing.assert_close(opened.stages(images)[number][1], network.stages(images)[number][1])


@pytest.mark.parametrize(
    ("name", "warns"),
    [("mobilenetv3_small_050", True), ("test_efficientnet", None), ("test_resnet", False), ("test_vit", False)],
)
def test_timms_warning_is_explained_where_it_comes(name, warns, tmp_path, caplog):
    network = encoder(name, 64)
    write_folder(network, FACTS, tmp_path / "enc")
    lines = module.usage(network, tmp_path / "enc", 1)
    scope = {"images": torch.rand(1, 3, 64, 64)}
    exec("\n".join(lines), scope)
    warned = any("nexpected keys" in record.getMessage() for record in caplog.records)
    assert any("unexpected keys" in line for line in lines) == warned
    assert warns is None or warned == warns


def test_a_name_that_ends_like_ours_is_timms_own(tmp_path):
    for name, ours in {"convnext_small": False, "resnet18_small": True}.items():
        with torch.device("meta"):
            network = Encoder(timm.create_model(name, num_classes=0), name, {}, 32, MEAN, STD)
        network.mean, network.std = torch.tensor(MEAN), torch.tensor(STD)
        assert any("sslpre.timm" in line for line in module.usage(network, tmp_path / "e.safetensors")) == ours


def test_a_map_with_channels_last_is_turned(tmp_path):
    network = build("swin_tiny_patch4_window7_224", image_size=32, mean=MEAN, std=STD)
    (line,) = (line for line in module.usage(network, tmp_path / "enc", 1) if "features =" in line)
    assert "[0].permute(0, 3, 1, 2)" in line
    for name in ("test_vit", "test_resnet"):
        assert not module.channels_last(module.dense(encoder(name), 1))


@pytest.mark.parametrize("stage", ["5", "-1", "layer9", "1.0", "²"])
def test_a_stage_that_is_not_there(stage, tmp_path):
    with pytest.raises(SslpreError) as error:
        export(encoder(), FACTS, tmp_path / "enc", stage)
    assert error.value.code == 2 and f"no stage `{stage}`" in error.value.message
    assert error.value.hint == "--stage N or NAME, of 0 act1, 1 layer1, 2 layer2, 3 layer3, 4 layer4"
    assert not list(tmp_path.iterdir())


def test_a_wrong_map_is_not_called_proven(tmp_path, monkeypatch):
    """The lines of another stage, of the same shape."""
    real = module.usage
    monkeypatch.setattr(module, "usage", lambda encoder, out, stage: real(encoder, out, stage + 1))
    assert "differ from the encoder's by" in reason(1, export, encoder("test_vit"), FACTS, tmp_path / "enc", "2")
    assert not list(tmp_path.iterdir())


def test_without_a_stage_none_is_recorded(tmp_path):
    write_file(encoder(), FACTS, tmp_path / "encoder.safetensors")
    assert "stage" not in open_encoder(tmp_path / "encoder.safetensors")[1]


def test_plain_timm_refuses_a_small_stem(tmp_path):
    write_folder(encoder("resnet18_small"), FACTS, tmp_path / "enc")
    write_file(encoder("resnet18_small"), FACTS, tmp_path / "enc.safetensors")
    script = """
import timm
for arguments in (dict(model_name="local-dir:enc", pretrained=True),
                  dict(model_name="resnet18", num_classes=0, checkpoint_path="enc.safetensors")):
    try:
        timm.create_model(**arguments)
    except RuntimeError as error:
        print("refused", str(error).splitlines()[0])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first == "refused Unknown model (resnet18_small)"
    assert second.startswith("refused Error(s) in loading state_dict")


@pytest.mark.parametrize(
    ("out", "lines", "why"),
    [
        ("enc", ["raise RuntimeError('timm says no')"], "RuntimeError: timm says no"),
        ("encoder.safetensors", ["features = images.mean((2, 3))"], "shape (8, 3), not (8, 96)"),
        ("enc", ["import torch", "features = torch.full((8, 96), torch.nan)"], "differ from the encoder's by nan"),
        ("e.safetensors", ["features = images[:, :2, :6, :8].flatten(1)"], "differ from the encoder's by "),
    ],
)
def test_what_does_not_prove_itself_is_removed(out, lines, why, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "usage", lambda encoder, out, stage: lines)
    assert why in reason(1, export, encoder(), FACTS, tmp_path / out)
    assert not list(tmp_path.iterdir())


# ---- what is written


@pytest.mark.parametrize("name", ["resnet18_small", "test_resnet", "test_vit", "test_convnext"])
def test_a_folder_serves_every_use_of_timm(name, tmp_path):
    network = encoder(name)
    write_folder(network, FACTS, tmp_path / "enc")
    opened = timm.create_model("local-dir:enc", pretrained=True)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(features(opened, network.prepare(images)), features(network, images))
    assert opened.pretrained_cfg["mean"] == list(MEAN) and opened.pretrained_cfg["input_size"] == [3, 32, 32]
    headed = timm.create_model("local-dir:enc", pretrained=True, num_classes=10)
    assert features(headed, images).shape == (2, 10)
    torch.testing.assert_close(
        features(headed, network.prepare(images)), headed.get_classifier()(features(network, images))
    )
    dense = timm.create_model("local-dir:enc", pretrained=True, features_only=True)
    own = dict(network.model.named_parameters())
    assert all(any(torch.equal(part, value) for value in own.values()) for part in list(dense.parameters())[:4])
    assert len(features(dense, images)) >= 3
    written = json.loads((tmp_path / "enc" / "config.json").read_text())
    assert "license" not in json.dumps(written) and written["num_features"] == network.dim
    assert written["sslpre"]["method"] == "simclr"


def test_the_keys_are_timms_and_the_metadata_strings(tmp_path):
    network = encoder("test_vit")
    write_file(network, {**FACTS, "step": 12}, tmp_path / "encoder.safetensors")
    with safe_open(tmp_path / "encoder.safetensors", "pt") as stored:
        facts, keys = stored.metadata(), set(stored.keys())
    assert keys == set(timm.create_model("test_vit", num_classes=0).state_dict())
    assert facts.keys() >= FACTS.keys() and all(isinstance(fact, str) for fact in facts.values())
    assert "?" not in facts.values()  # the encoder knows better
    assert json.loads(facts["mean"]) == list(MEAN) and json.loads(facts["std"]) == list(STD)
    assert json.loads(facts["model_args"]) == network.model_args == {"img_size": 32, "dynamic_img_size": True}


def test_memory_formats_and_shared_tensors_are_written_plainly(tmp_path):
    network = encoder().to(memory_format=torch.channels_last)
    network.model.layer1[0].bn2.weight = network.model.layer1[0].bn1.weight
    write_file(network, FACTS, tmp_path / "encoder.safetensors")
    images = torch.rand(2, 3, 32, 32)
    opened, _ = open_encoder(tmp_path / "encoder.safetensors")
    torch.testing.assert_close(features(opened, images), features(network, images))


@pytest.mark.parametrize("mask", [0o002, 0o077, 0o022])
def test_files_get_the_umasks_mode(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_file(encoder(), FACTS, tmp_path / "encoder.safetensors")
        write_folder(encoder(), FACTS, tmp_path / "enc")
    finally:
        os.umask(before)
    for path, full in [
        ("encoder.safetensors", 0o666),
        ("enc", 0o777),
        ("enc/model.safetensors", 0o666),
        ("enc/config.json", 0o666),
    ]:
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == full & ~mask, path


# ---- what is refused


def test_an_output_that_exists_is_left_alone(tmp_path):
    (tmp_path / "file.safetensors").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    for name in ("file.safetensors", "folder", "link.safetensors"):
        assert "exists" in reason(2, export, encoder(), FACTS, tmp_path / name)
    assert (tmp_path / "file.safetensors").read_text() == "mine"


@pytest.mark.parametrize("name", ["encoder.pth", "encoder.onnx", "encoder.SAFETENSORS"])
def test_other_kinds_of_files_are_not_written(name, tmp_path):
    assert "cannot write" in reason(2, export, encoder(), FACTS, tmp_path / name)


def test_a_file_in_the_way_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "cannot write" in reason(3, export, encoder(), FACTS, tmp_path / "file" / "encoder.safetensors")


def test_folders_made_for_nothing_are_removed(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(module, "usage", lambda encoder, out, stage: ["raise RuntimeError('timm says no')"])
    for name in ("new/deep/e.safetensors", "new/deep/enc", "mine/new/enc"):
        reason(1, export, encoder(), FACTS, tmp_path / name)

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_synced", full)
    assert "no space left" in reason(13, export, encoder(), FACTS, tmp_path / "new/deep/e.safetensors")
    chroma = build("test_resnet", image_size=32, mean=MEAN, std=STD, colour="chroma")
    reason(2, export, chroma, FACTS, tmp_path / "new/e.safetensors")
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    network = encoder()
    with torch.no_grad():
        network.model.layer2[0].bn1.running_var[3] = value
    assert "layer2.0.bn1.running_var" in reason(10, export, network, FACTS, tmp_path / "encoder.safetensors")
    assert not list(tmp_path.iterdir())


def test_chroma_is_not_exported(tmp_path):
    chroma = build("test_resnet", image_size=32, mean=MEAN, std=STD, colour="chroma")
    for action in (export, write_file, write_folder):
        assert "chroma" in reason(2, action, chroma, FACTS, tmp_path / "encoder.safetensors")
    assert not list(tmp_path.iterdir())


def stored(path, tensors=None, **facts):
    """An export with some of its metadata or tensors changed."""
    network = encoder()
    metadata = {**module.metadata(network, FACTS), **facts}
    tensors = tensors or {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    path.write_bytes(safetensors.torch.save(tensors, {name: fact for name, fact in metadata.items() if fact}))
    return path


def test_what_is_not_an_export_is_not_opened(tmp_path):
    path = tmp_path / "encoder.safetensors"
    assert "cannot be read" in reason(5, open_encoder, path)
    assert "cannot be read" in reason(5, open_encoder, tmp_path)  # a folder without model.safetensors
    whole = stored(path).read_bytes()
    for damaged in (b"", b"not safetensors at all", whole[:-7], whole[: len(whole) // 2], b"\xff" * 64):
        path.write_bytes(damaged)
        assert "cannot be read" in reason(5, open_encoder, path)
    assert "pickle" in reason(5, open_encoder, tmp_path / "checkpoint.pth")
    assert "no `architecture`" in reason(5, open_encoder, stored(path, architecture=""))


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"architecture": "hf-hub:timm/resnet18.a1_in1k"}, "does not have"),
        ({"architecture": "no_such_network"}, "does not have"),
        ({"architecture": "test_vit"}, "of test_vit, not"),
        *(
            ({"model_args": f'{{"{name}": true}}'}, f"no argument `{name}`")
            for name in (
                *("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
                *("features_only", "scriptable", "exportable", "no_jit", "kwargs_filter", "pruned"),
                *("num_classes", "in_chans", "device"),
            )
        ),
        ({"model_args": '{"channels": [1000000000]}'}, "no number of -8192 to 8192"),
        ({"model_args": '{"stem_width": NaN}'}, "no number of -8192 to 8192"),
        ({"model_args": '{"layers": "deep"}'}, "cannot be used"),
        ({"model_args": '{"img_size": 99999999}'}, "no image size"),
        ({"model_args": '{"img_size": [32, 0]}'}, "no image size"),
        ({"model_args": "[" * 100_000}, "cannot be used"),
        ({"architecture": "test_resnet.r160_in1k"}, "does not have"),
        ({"model_args": "[1"}, "cannot be used"),
        ({"model_args": "[1]"}, "cannot be used"),
        ({"mean": "[1, 2]"}, "cannot be used"),
        ({"mean": "[1, 2, NaN]"}, "cannot be used"),
        ({"mean": "[0, 0, 3]"}, "not three numbers of 0 to 1"),
        ({"std": "[0, 0, 0]"}, "not three numbers above 0"),
        ({"std": "[1, 1, Infinity]"}, "not three numbers above 0"),
        ({"std": '{"r": 1}'}, "cannot be used"),
        ({"image_size": "big"}, "cannot be used"),
        *(({"image_size": size}, "no image size") for size in ("-3", "0", "7", "4097", "99999999")),
    ],
)
def test_metadata_is_not_trusted(facts, why, tmp_path):
    assert why in reason(5, open_encoder, stored(tmp_path / "encoder.safetensors", **facts))


def test_a_networks_own_arguments_are_kept(tmp_path):
    network = build("test_vit", image_size=32, mean=MEAN, std=STD, model_args={"num_heads": 4})
    lines = export(network, FACTS, tmp_path / "encoder.safetensors")
    assert any("num_heads=4" in line for line in lines)
    opened, facts = open_encoder(tmp_path / "encoder.safetensors")
    assert json.loads(facts["model_args"]) == {"img_size": 32, "dynamic_img_size": True, "num_heads": 4}
    images = torch.rand(2, 3, 32, 32)
    assert opened.model.blocks[0].attn.num_heads == 4
    assert torch.equal(features(opened, images), features(network, images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_floating_types_become_float32(dtype, tmp_path):
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in encoder().model.state_dict().items()}
    opened, _ = open_encoder(stored(tmp_path / "encoder.safetensors", tensors))
    for name, tensor in opened.model.state_dict().items():
        assert tensor.dtype == (torch.float32 if tensors[name].is_floating_point() else torch.int64)
        assert torch.equal(tensor, tensors[name].to(tensor.dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.complex64, torch.bool])
def test_numbers_that_are_no_weights(dtype, tmp_path):
    tensors = dict(encoder().model.state_dict())
    tensors["layer1.0.conv1.weight"] = tensors["layer1.0.conv1.weight"].to(dtype)
    path = stored(tmp_path / "encoder.safetensors", tensors)
    assert "`layer1.0.conv1.weight` are " in reason(5, open_encoder, path)
    tensors["layer1.0.conv1.weight"] = torch.full_like(encoder().model.layer1[0].conv1.weight, torch.nan)
    assert "are not finite" in reason(10, open_encoder, stored(path, tensors))


def test_every_tensor_must_be_there_and_none_besides(tmp_path):
    path = tmp_path / "encoder.safetensors"
    tensors = {name: tensor.clone() for name, tensor in encoder().model.state_dict().items()}
    total = len(tensors)
    lacking = {name: tensor for name, tensor in tensors.items() if name != "conv1.0.weight"}
    assert f"{total - 1} of {total} tensors of test_resnet, not `conv1.0.weight`" in reason(
        5, open_encoder, stored(path, lacking)
    )
    assert "not `fc.weight`" in reason(5, open_encoder, stored(path, {**tensors, "fc.weight": torch.ones(3)}))
    odd = {**tensors, "conv1.0.weight": torch.ones(3)}
    assert "not `conv1.0.weight`" in reason(5, open_encoder, stored(path, odd))


def test_the_lines_hold_for_sizes_other_than_the_training_size(tmp_path):
    """A ViT is built with dynamic_img_size: a folder opened elsewhere takes other sizes too."""
    network = encoder("test_vit")
    write_folder(network, FACTS, tmp_path / "enc")
    opened = timm.create_model("local-dir:enc", pretrained=True)
    images = torch.rand(1, 3, 48, 64)
    torch.testing.assert_close(features(opened, network.prepare(images)), features(network, images))
