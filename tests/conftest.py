"""What tests share: one torch thread, fixed seeds, a folder of images made by code, and ways to run the program."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

pytest.register_assert_rewrite("sslpre.contract")
from warm import Warm  # noqa: E402

from sslpre.contract.pair import pair  # noqa: E402, F401  (a fixture: the two processes that serve every test)

torch.set_num_threads(1)
settings.register_profile("busy", deadline=None)  # a machine with other work takes its time
settings.load_profile("busy")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `data` need real images; without them they are skipped, and say what to set."""
    if not os.environ.get("SSLPRE_TEST_DATA"):
        for item in items:
            if item.get_closest_marker("data"):
                item.add_marker(pytest.mark.skip(reason="SSLPRE_TEST_DATA names no folder of real image sets"))


@pytest.fixture
def real_data() -> Path:
    """The folder of real image sets: <set>/{train,test}/<class>/*.jpg. For tests marked `data`."""
    return Path(os.environ["SSLPRE_TEST_DATA"])


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSLPRE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def draw_photo(rng: np.random.Generator, side: int, hue: int) -> Image.Image:
    """A smooth picture with a bright spot; `hue` 0..2 is the channel that carries it, which a probe can learn."""
    y, x = np.mgrid[0:side, 0:side] / side
    cx, cy = rng.uniform(0.2, 0.8, 2)
    spot = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) * 20)
    pixels = np.stack([x * 90, y * 90, (1 - x) * 90], 2) + rng.uniform(0, 40, 3)
    pixels[..., hue] += 120 * spot
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three classes of 16 small JPEGs: 48 images of 40×40. Not to be written to."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for hue, name in enumerate(("amber", "birch", "cobalt")):
        (root / name).mkdir()
        for i in range(16):
            draw_photo(rng, 40, hue).save(root / name / f"{i:02}.jpg", quality=90)
    return root


@pytest.fixture
def run_cli(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run `sslpre` in this process, in an empty directory: `run_cli("probe", "--linear")`."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str | Path) -> Done:
        from sslpre.cli import main

        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Done(int(end.value.code or 0), out, err)

    return run


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Starts `python -m sslpre` in processes of their own that have torch loaded already, for tests of what follows:
    `warm.start("pretrain", …, cwd=tmp_path, env=child)`."""
    import sslpre

    with Warm({**os.environ, "PYTHONPATH": str(Path(sslpre.__file__).parents[1])}) as started:
        yield started


@pytest.fixture
def child() -> dict[str, str]:
    """The environment of a child process, so that it finds the same sslpre as this one, installed or not."""
    import sslpre

    paths = [str(Path(sslpre.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run_process(tmp_path: Path, child: dict[str, str]) -> Callable[..., Done]:
    """Run `python -m sslpre` in a process of its own, in an empty directory: `run_process("recipes", NO_COLOR="1")`.

    patience: seconds; an empty environment variable is taken out.
    """

    def run(*words: str | Path, patience: float = 300, **environment: str) -> Done:
        command = [sys.executable, "-m", "sslpre", *map(str, words)]
        variables = {name: value for name, value in {**child, **environment}.items() if environment.get(name) != ""}
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=patience)
        return Done(done.returncode, done.stdout, done.stderr)

    return run
