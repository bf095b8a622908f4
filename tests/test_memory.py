"""Batches larger than memory: a real lack of it, in processes of their own with a limit on their address space."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from sslpre import encoder
from sslpre.errors import SslpreError
from sslpre.objective import Objective
from sslpre.train import memory

SIZES = ("--backbone", "test_resnet", "--image-size", "128", "--precision", "fp32", "--epochs", "1", "--workers", "0")
# The limit is what the process has at that moment plus some MiB, so the test does not depend on the size of libraries.
LIMIT = """
import ctypes, resource, sys
def spare(mib):
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back, or it would be spare too
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (mib << 20),) * 2)
import torch
torch.set_num_threads(1)
from sslpre.train import loop, run as runs, step
"""


def python(script, folder, child):
    """Run `script` after LIMIT in a fresh process."""
    # what is freed goes back at once, in one arena: else the limit, which is on addresses, is used up by free memory
    child = {**child, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return subprocess.run(
        [sys.executable, "-c", LIMIT + textwrap.dedent(script)], cwd=folder, env=child, capture_output=True, text=True
    )


def test_what_running_out_looks_like(tmp_path, child):
    """A real failure to allocate, of torch, of its convolutions and of NumPy: all of them are known."""
    script = """
        import json, numpy
        from sslpre.train.memory import ran_out
        def tried(f):
            try:
                f()
            except (RuntimeError, MemoryError) as error:
                return [ran_out(error), str(error)[:200]]
        net = torch.nn.Conv2d(3, 64, 7, padding=3).to(memory_format=torch.channels_last)
        x = torch.rand(16, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        spare(64)
        print(json.dumps([
            tried(lambda: torch.empty(1 << 28)), tried(lambda: net(x)), tried(lambda: numpy.zeros(1 << 28) + 1)
        ]))
    """
    done = python(script, tmp_path, child)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert all(one is not None and one[0] for one in told), told


def test_other_errors_are_not_taken_for_it():
    assert not memory.ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"))
    assert memory.ran_out(torch.OutOfMemoryError("CUDA out of memory"))


@pytest.mark.parametrize("method, spared", [("simclr", 200), ("rotation", 400)])
def test_a_batch_that_does_not_fit_is_taken_in_parts(method, spared, photos, tmp_path, child):
    """The whole batch needs more than there is: the run says how much it takes at a time, and ends well."""
    script = f"""
        from sslpre.cli import run
        fit = step.fit
        def limited(run):
            step.rehearse(run, next(iter(run.stream.epoch(0))), 2)  # libraries load and threads start
            spare({spared})
            return fit(run)
        step.fit = limited
        sys.exit(run(["pretrain", {method!r}, {str(photos)!r}, "--batch-size", "48", "--out", "r", *{SIZES!r}]))
    """
    done = python(script, tmp_path, child)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("memory "))
    part = int(line.split()[1])
    assert 1 <= part < 48 and "of 48 images at a time; batch normalisation sees these alone" in line
    state = json.loads(next((tmp_path / "r/checkpoints").glob("step-*1/state.json")).read_text())
    assert state["part"] == part, "a resumed run takes the same parts"


def test_not_even_one_image(photos, tmp_path, child):
    script = f"""
        from sslpre.cli import run
        fit = step.fit
        def limited(run):
            step.rehearse(run, next(iter(run.stream.epoch(0))), 2)
            spare(32)
            return fit(run)
        step.fit = limited
        words = ["--backbone", "test_resnet", "--image-size", "512", "--epochs", "1", "--workers", "0"]
        sys.exit(run(["pretrain", "rotation", {str(photos)!r}, "--batch-size", "4", "--out", "r", *words]))
    """
    done = python(script, tmp_path, child)
    assert done.returncode == 12, done.stderr
    assert "error: one image of `512` px does not fit into memory" in done.stderr.splitlines()
    assert not (tmp_path / "r").exists(), "nothing is left of a run that did not begin"


def test_later_it_halves_and_takes_the_same_step_again(photos, tmp_path, child):
    """Memory gets short in step 2: the run goes on in parts and ends where the undisturbed one does."""
    script = f"""
        import json
        from pathlib import Path
        from sslpre.data.find import find
        from sslpre import recipe as recipes
        from sslpre.train.build import build
        tables = {{
            "encoder": {{"backbone": "test_vit", "image_size": 160}}, "data": {{"store_size": 160}},
            "optim": {{"name": "sgd", "lr": 0.05, "warmup": 0.1}},
            "train": {{"epochs": 4, "batch_size": 48, "precision": "fp32"}},
        }}
        def fresh(folder):
            Path(folder).mkdir()
            recipe, images = recipes.load("rotation", (), tables), find(Path({str(photos)!r}))
            return build(Path(folder), recipe, images, torch.device("cpu"), 0)
        whole, parts = fresh("whole"), fresh("parts")
        calm = loop.train(whole)
        take = loop.take_step
        def short(run, pixels, epoch):
            if run.step == 1:
                spare(120)
            take(run, pixels, epoch)
        loop.take_step = short
        loop.train(parts)
        apart = max(
            (a - b).abs().max().item()
            for a, b in zip(whole.objective.state_dict().values(), parts.objective.state_dict().values())
        )
        moved = max(
            (a - b).abs().max().item()
            for a, b in zip(whole.objective.state_dict().values(), fresh("new").objective.state_dict().values())
        )
        print(json.dumps([whole.part, parts.part, whole.step, parts.step, apart, moved]))
    """
    done = python(script, tmp_path, child)
    assert done.returncode == 0, done.stderr
    whole_part, part, *steps, apart, moved = json.loads(done.stdout.splitlines()[-1])
    assert whole_part == 0 and 1 <= part < 48 and steps == [4, 4]
    assert apart < 1e-5 < 1e-2 < moved


@pytest.mark.parametrize("before, backbone", [("0", "test_vit"), ("2", "test_resnet")])
def test_the_hint_of_a_run_that_ran_out_too_late_can_be_typed(before, backbone, photos, tmp_path, run_cli):
    """Parts may be made smaller, or larger, when a run goes on; it is said, and the checkpoint remembers it."""
    words = ["--backbone", backbone, "--image-size", "32", "--batch-size", "16", "--epochs", "1", "--device", "cpu"]
    words += ["--set", f"train.micro_batch={before}"]
    assert run_cli("pretrain", "rotation", photos, *words, "--out", "r").code == 0
    shutil.rmtree(tmp_path / "r/encoder")
    newest = max((tmp_path / "r/checkpoints").glob("step-*"))
    shutil.rmtree(newest)
    done = run_cli("pretrain", "--resume", "r", "--set", "train.micro_batch=4", "--device", "cpu")
    assert done.code == 0, done.err
    state = json.loads((newest / "state.json").read_text())
    so_far = "all" if before == "0" else before
    assert f"resume     {so_far} images of a batch at a time so far, 4 from now on" in done.err
    assert ("batch normalisation sees these alone" in done.err) == (backbone == "test_resnet")
    assert state["part"] == 4 and "micro_batch = 4" in (tmp_path / "r/recipe.toml").read_text()
    for again in (["--resume", "r"], ["--resume", "auto", "--out", "r"]):
        refused = run_cli("pretrain", *again, "--set", "optim.lr=1", "--device", "cpu")
        assert refused.code == 2 and "`--set`" in refused.err


def test_the_optimisers_state_must_fit_too(photos, run_cli, monkeypatch):
    """As much as Adam's two moments take is held while parts are tried; where there is no room for it, nothing fits."""
    net = Keeps()
    weights = sum(p.numel() for p in net.parameters())
    assert sum(t.numel() for t in memory.room(net, "adamw")) == 2 * weights
    assert sum(t.numel() for t in memory.room(net, "lars")) == weights

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "room", full)
    words = ["--backbone", "test_vit", "--image-size", "32", "--batch-size", "16", "--epochs", "1", "--device", "cpu"]
    done = run_cli("pretrain", "rotation", photos, *words)
    assert done.code == 12 and "one image of `32` px does not fit" in done.err


class Keeps(Objective):
    """A method whose loss leaves things in plain attributes, as `after_step` wants them."""

    couples = True

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.seen: list[int] = []
        self._more: list[int] = []  # such a name is the method's own too
        self.last = torch.zeros(1)


def test_what_a_failed_try_left_is_put_back():
    method = Keeps()
    method.seen.append(1)
    stats = {name: buffer.clone() for name, buffer in method.named_buffers()}
    last, before = method.last, memory.Before(method)
    method.norm(torch.rand(4, 3)).sum().backward()
    method.seen.append(2)
    method._more.append(2)
    method.last, method.new = torch.ones(1), torch.ones(1)
    before.put_back()
    assert method.seen == [1] and method._more == [] and method.last is last and not hasattr(method, "new")
    assert all(torch.equal(buffer, stats[name]) for name, buffer in method.named_buffers())
    assert all(parameter.grad is None for parameter in method.parameters())


def test_parts_halve_down_to_one_image():
    sizes, part = [], 48
    while part > 1:
        part = memory.half(part, 64)
        sizes.append(part)
    assert sizes == [24, 12, 6, 3, 2, 1]
    with pytest.raises(SslpreError) as caught:
        memory.half(1, 64)
    assert caught.value.code == 12


def test_with_batch_normalisation_the_parts_are_the_reference():
    """Chunked, an encoder gives what it gives to each part alone: features, gradients, running statistics."""
    torch.manual_seed(0)
    net = encoder.build("test_resnet", image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3).double()
    x, target = torch.rand(7, 3, 32, 32).double(), torch.rand(7, net.dim).double()
    stats = {name: buffer.clone() for name, buffer in net.named_buffers()}

    def told(features):
        (features * target).square().sum().backward()
        grads = [p.grad.clone() for p in net.parameters()]
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
        net.zero_grad()
        for name, buffer in net.named_buffers():
            buffer.copy_(stats[name])
        return features.detach(), grads, buffers

    expected = told(torch.cat([net(part) for part in (x[:3], x[3:5], x[5:])]))
    net.chunk = 3
    got = told(net(x))
    assert torch.allclose(got[0], expected[0], atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(got[1], expected[1], strict=True))
    assert all(torch.allclose(got[2][name], expected[2][name], atol=1e-12) for name in stats)


FREED = """
    import numpy, resource
    from sslpre.train.memory import keep_freed
    keep_freed()
    def faults(count):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(count):
            torch.zeros(10 << 20)  # 40 MB, above what malloc would ever keep by itself
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    faults(2)
    print(faults(20))
"""


@pytest.mark.skipif(memory.glibc() is None, reason="for glibc's malloc")
def test_freed_memory_is_kept_for_the_next_step(tmp_path, child):
    """Twenty times 40 MB touch hardly a new page; but where the user says so, each of them is new each time."""
    counts = []
    for told in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"}):
        done = subprocess.run(
            [sys.executable, "-c", "import torch\n" + textwrap.dedent(FREED)],
            cwd=tmp_path,
            env={**child, **told},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        counts.append(int(done.stdout))
    assert 20 * counts[0] < counts[1], counts


@pytest.mark.parametrize(
    ("most", "set_to"),
    [(1 << 40, [(-3, 1 << 30), (-1, 2**31 - 1)]), (1 << 25, [(-3, 1 << 25), (-1, 2**31 - 1)]), (0, [])],
)
def test_a_malloc_that_takes_no_large_threshold_is_not_made_slower(most, set_to, monkeypatch):
    """Trimming less often alone would fix the threshold of mapping where it is, at 128 kB."""
    taken = []

    class Libc:
        def mallopt(self, what, size):
            if what == -3 and size > most:
                return 0
            taken.append((what, size))
            return 1

    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(memory, "glibc", Libc)
    memory.keep_freed()
    assert taken == set_to
    taken.clear()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    memory.keep_freed()
    assert taken == []
