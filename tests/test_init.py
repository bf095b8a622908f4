"""A run from other weights than random ones, as its user starts, resumes, probes and exports it."""

import json
import shutil

import pytest
import safetensors.torch
import timm
import torch

SMALL = "--image-size 32 --epochs 2 --batch-size 16 --precision fp32 --workers 1 --device cpu".split()


@pytest.fixture
def weights(tmp_path):
    """A folder as of a hub: timm's own keys with a classifier, and a config.json that names network and licence."""
    folder = tmp_path / "hub"
    folder.mkdir()
    network = timm.create_model("test_resnet", num_classes=7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "test_resnet",
        "pretrained_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3], "license": "cc-by-4.0"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, network


def test_weights_are_there_before_the_first_step_and_their_licence_after_the_last(weights, photos, run_cli, tmp_path):
    folder, network = weights
    done = run_cli("pretrain", "simclr", photos, "--init", folder, *SMALL, "--out", "r")
    assert done.code == 0, done.err
    line = next(line for line in done.err.splitlines() if line.startswith("start "))
    assert "tensors loaded, 2 of its classifier left out; licence cc-by-4.0" in line
    recipe = (tmp_path / "r/recipe.toml").read_text()
    assert 'backbone = "test_resnet"' in recipe and f'init = "{folder}"' in recipe
    assert "mean = [0.4, 0.5, 0.6]" in recipe and "warmup = 0.2" in recipe and "lr = 0.03\n" in recipe  # 0.075·√16 / 10

    kept = safetensors.torch.load_file(tmp_path / "r/start/model.safetensors")
    for name, tensor in network.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(kept[name], tensor), name
    trained = safetensors.torch.load_file(tmp_path / "r/encoder/model.safetensors")
    assert any(not torch.equal(kept[name], trained[name]) for name in kept)
    config = json.loads((tmp_path / "r/encoder/config.json").read_text())
    assert config["pretrained_cfg"]["license"] == "cc-by-4.0"

    done = run_cli("export", "mine.safetensors", "--run", "r")
    assert done.code == 0, done.err
    with safetensors.safe_open("mine.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts["licence"] == "cc-by-4.0" and "hub" in facts["origin"]


def test_the_start_has_rows_in_the_probe(weights, photos, run_cli):
    assert run_cli("pretrain", "rotation", photos, "--init", weights[0], *SMALL, "--out", "r").code == 0
    done = run_cli("probe", "r", "--linear", "--json", "--device", "cpu")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    kinds = {row["weights"] for row in rows}
    assert {"encoder", "start", "random weights", "raw pixels"} <= kinds
    features = [[row["features"] for row in rows if row["weights"] == kind] for kind in ("encoder", "start")]
    assert features[0] == features[1] and len(features[0]) > 1


@pytest.mark.parametrize("kept", [True, False], ids=["a checkpoint", "no checkpoint"])
def test_it_goes_on_when_its_source_is_gone(kept, weights, photos, run_cli, tmp_path):
    """Interrupted, the source deleted, the same command typed again: the same weights as without all that."""
    words = ["pretrain", "simclr", photos, "--init", weights[0], *SMALL, "--resume", "auto"]
    assert run_cli(*words, "--out", "whole").code == 0
    assert run_cli(*words, "--out", "r").code == 0
    shutil.rmtree(tmp_path / "r/encoder")
    found = sorted((tmp_path / "r/checkpoints").glob("step-*"))
    for path in found[1:] if kept else found:
        shutil.rmtree(path)
    shutil.rmtree(weights[0])
    done = run_cli(*words, "--out", "r")
    assert done.code == 0, done.err
    assert ("no complete checkpoint, starting at step 0" in done.err) == (not kept)
    assert "was finished already" in run_cli(*words, "--out", "r").err
    one, other = (safetensors.torch.load_file(tmp_path / out / "encoder/model.safetensors") for out in ("whole", "r"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_last_run_as_a_start_may_be_typed_again(photos, run_cli):
    assert run_cli("pretrain", "simclr", photos, "--backbone", "test_resnet", *SMALL, "--out", "runs/a").code == 0
    words = ["pretrain", "rotation", photos, "--init", "last", *SMALL, "--out", "runs/b", "--resume", "auto"]
    assert run_cli(*words).code == 0
    done = run_cli(*words)
    assert done.code == 0 and "was finished already" in done.err, done.err
    other = run_cli(*[word if word != "last" else "runs/b/encoder" for word in words])
    assert other.code == 6 and "begun with another `encoder.init`" in other.err


def test_a_damaged_start_is_told_and_can_be_done_without(weights, photos, run_cli, tmp_path):
    assert run_cli("pretrain", "rotation", photos, "--init", weights[0], *SMALL, "--out", "r").code == 0
    (tmp_path / "r/start/model.safetensors").write_bytes(b"")
    done = run_cli("probe", "r", "--knn", "--device", "cpu")
    assert done.code == 5 and "the starting weights that the run keeps" in done.err and "rm -r r/start" in done.err
    shutil.rmtree(tmp_path / "r/start")
    assert run_cli("probe", "r", "--knn", "--device", "cpu").code == 0


def test_from_a_run_and_from_its_export(photos, run_cli, tmp_path):
    assert run_cli("pretrain", "simclr", photos, "--backbone", "test_resnet", *SMALL, "--out", "runs/a").code == 0
    assert run_cli("export", "a.safetensors", "--run", "a").code == 0
    trained = safetensors.torch.load_file(tmp_path / "runs/a/encoder/model.safetensors")
    for number, init in enumerate(("a", "a.safetensors", "runs/a/encoder")):
        done = run_cli("pretrain", "rotation", photos, "--init", init, *SMALL, "--out", f"b{number}")
        assert done.code == 0, done.err
        kept = safetensors.torch.load_file(tmp_path / f"b{number}/start/model.safetensors")
        assert all(torch.equal(kept[name], tensor) for name, tensor in trained.items())


@pytest.mark.parametrize(
    "words, code, told",
    [
        (["--init", "x.pth"], 5, "hint: sslpre import x.pth -o x.safetensors"),
        (["--init", "nothing.safetensors"], 2, "there is no such file or run"),
        (["--init", "hub", "--backbone", "resnet18"], 2, "is a test_resnet, `--backbone resnet18` names another"),
    ],
)
def test_mistakes_leave_nothing(words, code, told, weights, photos, run_cli, tmp_path):
    (tmp_path / "x.pth").write_bytes(b"whatever")
    done = run_cli("pretrain", "simclr", photos, *words, *SMALL)
    assert done.code == code and told in done.err, done.err
    assert not (tmp_path / "runs").exists()
