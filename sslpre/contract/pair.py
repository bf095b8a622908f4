"""Two processes that stay for a whole test session, and run on both what a test asks for."""

from __future__ import annotations

import atexit
import datetime
import importlib.util
import inspect
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

PATIENCE = 120  # seconds for one answer
_started: list[Pair] = []


class Pair:
    """`pair.run(function, *arguments)` calls a module-level function in both processes and gives back both results.

    What goes through the pipe is pickled, so results are plain values and NumPy arrays.
    """

    def __init__(self, folder: Path):
        self.folder, self.starts = folder, 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        store = self.folder / f"store{self.starts}"
        context = multiprocessing.get_context("spawn")
        ours, theirs = zip(*(context.Pipe() for _ in range(2)), strict=True)
        self.connections: tuple[Connection, ...] = ours
        self.processes = [
            context.Process(target=serve, args=(rank, 2, str(store), theirs[rank]), daemon=True) for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        where = inspect.getfile(function)
        for connection in self.connections:
            connection.send((where, function.__name__, arguments))
        answers = [answer(connection) for connection in self.connections]
        wrong = [f"process {rank}: {told}" for rank, (good, told) in enumerate(answers) if not good]
        if wrong:  # a collective may be half done, an answer may still come: the next test gets a pair of its own
            self.close()
            self.start()
        assert not wrong, "\n".join(wrong)
        return [told for _, told in answers]

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(1)
            process.kill()


def answer(connection: Connection) -> tuple[bool, Any]:
    """Whether a process has done what it was asked, and its result, or what went wrong."""
    if not connection.poll(PATIENCE):
        return False, "it does not answer"
    try:
        return connection.recv()
    except EOFError:
        return False, "it has died"


def serve(rank: int, world: int, store: str, connection: Connection) -> None:
    """What each of the processes does until the other end of its pipe is closed."""
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=PATIENCE / 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=patience)
    while True:
        try:
            where, name, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, getattr(module_of(where), name)(*arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))


def module_of(path: str) -> Any:
    """The module in the file `path`, imported once; test files are in no package."""
    name = f"_pair_{abs(hash(path))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The one pair that serves every test of several processes, wherever it was imported."""
    if not _started:
        _started.append(Pair(tmp_path_factory.mktemp("pair")))
        atexit.register(_started[0].close)
    return _started[0]
