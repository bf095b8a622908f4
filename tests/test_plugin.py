"""A method in another package, made from what CONTRIBUTING shows and installed by pip; beside it one that is unruly."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from sslpre import contract, plugins
from sslpre.errors import SslpreError
from sslpre.objective import Objective
from sslpre.shelf import shipped, text

CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
SMALL = (
    "--backbone test_resnet --image-size 32 --batch-size 8 --epochs 1 --precision fp32 --device cpu --workers 1".split()
)

RUN_ALL = """
import contextlib, io, json, sys
from sslpre.cli import run

ends = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = run(words)
    ends.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(ends))
"""

# The methods of the unruly package: each breaks one promise and keeps the others.
UNRULY = '''
    """What an image's mean colour is, told from its features."""

    import torch.nn.functional as F
    from torch import nn, zeros
    from sslpre.objective import Loss, Objective


    class WritesBuffer(Objective):
        def __init__(self, setup):
            super().__init__()
            self.encoder = setup.encoder()
            self.head = nn.Linear(self.encoder.dim, 3)
            self.register_buffer("seen", zeros(()))

        def loss(self, batch):
            (x,) = batch.views
            self.seen += len(x)  # in after_step it would be right
            return Loss(F.mse_loss(self.head(self.encoder(x)), x.mean((2, 3))))


    class HidesCoupling(Objective):
        def __init__(self, setup):
            super().__init__()
            self.encoder = setup.encoder()
            self.head = nn.Linear(self.encoder.dim, 3)

        def loss(self, batch):
            (x,) = batch.views
            colour = x.mean((2, 3))
            return Loss(10 * F.mse_loss(self.head(self.encoder(x)), colour - colour.mean(0)))  # the batch's mean


    def plain_function(setup):
        """No Objective."""
'''
ENTRIES = """
    [build-system]
    requires = ["setuptools>=77"]
    build-backend = "setuptools.build_meta"

    [project]
    name = "unruly"
    version = "2.0"

    [project.entry-points."sslpre.methods"]
    writes-buffer = "unruly.methods:WritesBuffer"
    hides-coupling = "unruly.methods:HidesCoupling"
    function = "unruly.methods:plain_function"
    missing = "unruly.methods:Missing"
    broken = "broken_package.methods:Broken"
    simclr = "broken_package.methods:SimCLR"
    gone = "no_such_package.methods:Gone"

    [tool.setuptools]
    packages = ["unruly", "broken_package"]
    package-data = { "*" = ["recipes/*.toml"] }
"""


def block(first_line: str) -> str:
    """The code block in CONTRIBUTING that begins with this line."""
    (found,) = re.findall(rf"^```\w+\n({re.escape(first_line)}\n.*?)^```", CONTRIBUTING, re.M | re.S)
    return found


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(content).lstrip("\n"), encoding="utf-8")


def recipe(headline, method):
    """SimCLR's recipe with another first line and another [method] table, as CONTRIBUTING says."""
    _, _, below = text("simclr").partition("\n")
    changed, count = re.subn(r"^\[method\]\n.*?\n\n", f"[method]\n{method}\n\n", below, flags=re.M | re.S)
    assert count == 1
    return f"# {headline}\n{changed}"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The two packages as their authors have them."""
    place = tmp_path_factory.mktemp("sources")
    files = {
        "pyproject.toml": block("# pyproject.toml"),
        "your_package/__init__.py": "",
        "your_package/align_uniform.py": block("# sslpre/methods/align_uniform.py"),
        "your_package/recipes/align-uniform.toml": recipe("Align-uniform, mine", 'name = "align-uniform"\noutput = 64'),
        "tests/test_contract.py": block("# tests/test_contract.py"),
    }
    assert [name for name in files if f"      {name}\n" not in CONTRIBUTING] == []
    write(place / "your-package", files)
    named = {name: f'# {name}\n[method]\nname = "{name}"\n' for name in ("broken", "function", "missing", "gone")}
    write(
        place / "unruly",
        {
            "pyproject.toml": ENTRIES,
            "unruly/__init__.py": "",
            "unruly/methods.py": UNRULY,
            "unruly/recipes/writes-buffer-small.toml": '[method]\nname = "writes-buffer"\n',
            "unruly/recipes/hides-coupling.toml": '[method]\nname = "hides-coupling"\n',
            "broken_package/__init__.py": "raise RuntimeError('half\\nof it is missing')",
            "broken_package/methods.py": "",
            "broken_package/recipes/simclr.toml": '# Not ours\n[method]\nname = "simclr"\n',
            **{f"unruly/recipes/{name}.toml": content for name, content in named.items()},
            "tests/test_contract.py": block("# tests/test_contract.py").replace(
                '"align-uniform"', '"writes-buffer", "hides-coupling"'
            ),
        },
    )
    return place


@pytest.fixture(scope="module")
def installed(sources, tmp_path_factory):
    """The folder that pip installed both packages into."""
    site = tmp_path_factory.mktemp("site")
    words = "install --quiet --no-deps --no-index --no-build-isolation --target".split()
    command = [sys.executable, "-m", "pip", *words, site, sources / "your-package", sources / "unruly"]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(sources / "your-package" / "your_package")  # what is found from now on is what was installed
    shutil.rmtree(sources / "unruly" / "unruly")
    shutil.rmtree(sources / "unruly" / "broken_package")
    return site


@pytest.fixture
def environment(installed, child):
    """The environment of a child process that has the two packages."""
    return {**child, "PYTHONPATH": os.pathsep.join([str(installed), child["PYTHONPATH"]])}


@pytest.fixture
def sslpre(environment, tmp_path):
    """Run commands one after another in one process that has the two packages: `sslpre(["recipes"], ["probe"])`.

    Returns how each ended. One process: what takes longest is to import torch.
    """

    def run(*commands):
        told = [[str(word) for word in words] for words in commands]
        command = [sys.executable, "-c", RUN_ALL, json.dumps(told)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [SimpleNamespace(code=code, out=out, err=err) for code, out, err in json.loads(done.stdout)]

    return run


@pytest.fixture
def contract_of(environment, sources):
    """Run a package's contract tests with pytest; returns exit code, test to methods that passed, and that failed."""

    def run(package, *words):
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=line", *words, "tests"]
        plain = {name: value for name, value in environment.items() if name != "PYTEST_ADDOPTS"}
        done = subprocess.run(command, cwd=sources / package, env=plain, capture_output=True, text=True)
        told = re.findall(
            r"::(test_\w+)\[(align-uniform|writes-buffer|hides-coupling)\b.*\] (PASSED|FAILED|ERROR)", done.stdout
        )
        assert told, done.stdout + done.stderr
        ends = {end: {(test, method) for test, method, is_ in told if is_ == end} for end in ("PASSED", "FAILED")}
        assert len(ends["PASSED"] | ends["FAILED"]) == len({(test, method) for test, method, _ in told}), done.stdout
        return done.returncode, ends["PASSED"], ends["FAILED"]

    return run


def test_its_recipe_is_on_the_shelf(sslpre):
    shelf, its, ours = sslpre(["recipes"], ["recipes", "align-uniform"], ["recipes", "simclr"])
    assert shelf.code == its.code == ours.code == 0
    listed = dict(line.split(maxsplit=1) for line in shelf.out.splitlines())
    theirs = {"align-uniform", "writes-buffer-small", "hides-coupling", "broken", "function", "missing", "gone"}
    assert list(listed) == sorted({*shipped(), *theirs})
    assert listed["align-uniform"] == "Align-uniform, mine"
    assert its.out == recipe("Align-uniform, mine", 'name = "align-uniform"\noutput = 64')
    assert ours.out == text("simclr"), "one of the same name does not replace it"


def test_it_trains_is_probed_and_exported_and_ours_works_beside_a_broken_one(sslpre, photos, tmp_path):
    ends = sslpre(
        ["pretrain", "align-uniform", photos, *SMALL, "--set", "method.weight=2"],
        ["probe", "--knn", "--device", "cpu"],
        ["export", "mine.safetensors"],
        ["pretrain", "simclr", photos, *SMALL],
    )
    assert [done.code for done in ends] == [0] * 4, ends
    saved = (tmp_path / "runs" / "align-uniform-1" / "recipe.toml").read_text(encoding="utf-8")
    assert '[method]\nname = "align-uniform"\nweight = 2.0\noutput = 64\n' in saved
    assert "random" in ends[1].out
    assert (tmp_path / "mine.safetensors").stat().st_size > 100_000
    assert (tmp_path / "runs" / "simclr-1" / "encoder").is_dir()


def test_mistakes_are_told_when_a_method_is_asked_for(sslpre):
    """What is wrong with a method and whose it is; and arguments are checked like ours."""
    reasons = {
        "broken": "cannot be imported: RuntimeError: half of it is missing",
        "gone": "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'",
        "missing": "cannot be imported: AttributeError: module 'unruly.methods' has no attribute 'Missing'",
        "function": "is `unruly.methods:plain_function`, which is no subclass of Objective",
    }
    *ends, unknown = sslpre(
        *(["pretrain", name] for name in reasons), ["pretrain", "align-uniform", "--set", "method.wieght=2"]
    )
    for (name, reason), done in zip(reasons.items(), ends, strict=True):
        assert done.code == 2
        assert done.err.splitlines() == [
            f"error: method `{name}` of package `unruly` {reason}",
            "hint: pip install --upgrade unruly, or pip uninstall unruly",
        ]
    assert unknown.code == 2
    assert "unknown key `method.wieght`, did you mean `weight`?" in unknown.err


def test_it_keeps_the_contract(contract_of):
    code, passed, failed = contract_of("your-package", "--import-mode=importlib")
    assert failed == set()
    assert passed == {(test, "align-uniform") for test in contract.tests}
    assert len(passed) >= 9
    assert code == 0


def test_a_method_that_breaks_the_contract_is_told(contract_of):
    """With pytest's default way to import, and of the tests only quick ones, some of which they pass."""
    code, passed, failed = contract_of(
        "unruly", "-k", "(buffer or couples or micro_batches or player or views) and not processes"
    )
    assert failed == {
        ("test_loss_writes_no_buffer", "writes-buffer"),
        ("test_couples_is_true_to_its_word", "hides-coupling"),
        ("test_micro_batches_are_the_batch", "hides-coupling"),
    }
    assert passed >= {
        ("test_loss_writes_no_buffer", "hides-coupling"),
        ("test_couples_is_true_to_its_word", "writes-buffer"),
        ("test_micro_batches_are_the_batch", "writes-buffer"),
        ("test_losses_are_finite_one_a_player_and_reach_the_encoder", "writes-buffer"),
        ("test_losses_are_finite_one_a_player_and_reach_the_encoder", "hides-coupling"),
    }
    assert code == 1


@pytest.mark.parametrize("values", [["a.x:X", "b.x:X"], ["b.x:X", "a.x:X"]])
def test_of_two_packages_with_one_name_the_first_has_it(monkeypatch, values):
    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint("mine", value, group) for value in values])
    assert plugins.entries.__wrapped__()["mine"].value == "a.x:X"


def test_the_table_of_methods_imports_only_what_is_taken(monkeypatch):
    entry = EntryPoint("mine", "no_such_package.x:X", "sslpre.methods")
    monkeypatch.setattr(plugins, "entries", lambda: {"mine": entry, "ours": entry})
    known = plugins.Methods({"ours": Objective})
    assert sorted(known) == ["mine", "ours"]
    assert len(known) == 2
    assert "mine" in known
    assert "other" not in known
    assert known["ours"] is Objective
    assert known.get("other") is None
    with pytest.raises(SslpreError, match="method `mine` of package `no_such_package` cannot be imported"):
        known["mine"]


def test_only_a_package_has_a_folder():
    assert plugins.package_folders("sslpre") == [Path(plugins.__file__).parent]
    for name in ("string", "no_such_package", ""):  # a plain file, nothing, and what a broken entry point may name
        assert plugins.package_folders(name) == []
