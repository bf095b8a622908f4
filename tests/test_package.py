"""The package as pip installs it: recipes inside, command there, typed, dependencies declared."""

import ast
import os
import re
import shutil
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from sslpre import __version__
from sslpre.shelf import shipped

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a checkout holds: building writes beside the sources."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("sslpre", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def pip(*words, python=None):
    command = [sys.executable, "-m", "pip", *(["--python", str(python)] if python else []), *map(str, words)]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, checkout)
    (built,) = out.glob("*.whl")
    return built


def environment(place):
    """A virtual environment with everything that is installed here, save sslpre itself; returns its bin directory."""
    venv.create(place, with_pip=False, symlinks=True)
    (inside,) = place.glob("lib/python*/site-packages")
    for parent in site.getsitepackages():
        for entry in os.scandir(parent):
            ours = entry.name.startswith(("sslpre", "__editable__", "_virtualenv", "distutils-precedence"))
            if not ours and not (inside / entry.name).exists():
                (inside / entry.name).symlink_to(entry.path)
    return place / "bin"


def works_elsewhere(programs, elsewhere):
    """The installed program finds its recipes from another directory; returns where its package lies."""
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def say(*words):
        done = subprocess.run(words, cwd=elsewhere, env=plain, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert say(programs / "sslpre", "--version") == f"sslpre {__version__}\n"
    listed = say(programs / "sslpre", "recipes").splitlines()
    assert [line.split()[0] for line in listed] == RECIPES
    assert say(programs / "sslpre", "recipes", "simclr") == (ROOT / "recipes" / "simclr.toml").read_text(
        encoding="utf-8"
    )
    return Path(say(programs / "python", "-c", "import sslpre; print(sslpre.__file__)").strip())


def test_an_installed_wheel(wheel, tmp_path):
    programs = environment(tmp_path / "venv")
    pip("install", "--no-deps", "--no-index", wheel, python=programs / "python")
    (tmp_path / "elsewhere").mkdir()
    where = works_elsewhere(programs, tmp_path / "elsewhere")
    assert where.is_relative_to(tmp_path / "venv")
    assert (where.parent / "py.typed").is_file()


def test_an_editable_install(checkout, tmp_path):
    programs = environment(tmp_path / "venv")
    pip("install", "--no-deps", "--no-index", "--no-build-isolation", "-e", checkout, python=programs / "python")
    (tmp_path / "elsewhere").mkdir()
    assert works_elsewhere(programs, tmp_path / "elsewhere").is_relative_to(checkout)
    (checkout / "recipes" / "simclr-mine.toml").write_text("# Mine\n")
    try:
        plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        listed = subprocess.check_output([programs / "sslpre", "recipes"], cwd=tmp_path, env=plain, text=True)
        assert "simclr-mine" in listed, "an edit is seen at once"
    finally:
        (checkout / "recipes" / "simclr-mine.toml").unlink()


def test_what_the_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (metadata,) = (name for name in held if name.endswith(".dist-info/METADATA"))
        (entries,) = (name for name in held if name.endswith("entry_points.txt"))
        about = Parser().parsestr(archive.read(metadata).decode())
        assert "sslpre = sslpre.cli:main" in archive.read(entries).decode()
    inside = {name for name in held if ".dist-info/" not in name}
    sources = {
        str(path.relative_to(ROOT)) for kind in ("py", "js", "css") for path in (ROOT / "sslpre").rglob(f"*.{kind}")
    }
    assert inside == sources | {"sslpre/py.typed"} | {f"sslpre/recipes/{name}.toml" for name in RECIPES}
    assert about["Version"] == __version__
    assert about["Requires-Python"] == ">=3.11"
    assert about["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("/LICENSE") for name in held)
    assert about.get_payload().startswith("# sslpre")


def test_every_folder_is_packed():
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "sslpre").rglob("*.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders | {"sslpre.recipes"}


def test_what_is_imported_is_declared_and_the_other_way_round():
    called = {"PIL": "pillow", "umap": "umap-learn"}
    found = set()
    tests = {re.split(r"[<>=!~ ]", line)[0] for line in PROJECT["project"]["optional-dependencies"]["test"]}
    for path in (ROOT / "sslpre").rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").partition(".")[0])
        for_tests = tests if path.parent.name == "contract" else set()  # tests to import, for those who have [test]
        found |= names - for_tests
    found = {called.get(name, name) for name in found - set(sys.stdlib_module_names) - {"sslpre"}}
    extras = PROJECT["project"]["optional-dependencies"]
    without = {"test", "dev"}  # the other extras are imported by sslpre where they are installed
    optional = [line for name, lines in extras.items() if name not in without for line in lines]
    declared = {re.split(r"[<>=!~ ]", line)[0] for line in PROJECT["project"]["dependencies"] + optional}
    assert found <= declared
    assert declared - found <= {"torchvision"}


def test_the_licence_is_whole():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "9. Accepting Warranty or Additional Liability" in text
    assert len(text) > 10_000


def test_the_shelf_is_the_folder():
    assert shipped() == RECIPES
