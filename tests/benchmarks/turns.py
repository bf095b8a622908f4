"""Timing in turns: A B C A B C …, so that a busy minute of the machine falls on all alike; the median of each counts.

What must run in an environment of its own is a `Worker`: a process that waits until it is asked, measures one window of
work, answers with what it took, and waits again. Needs the standard library alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

Answer = TypeVar("Answer")
AHEAD = 2  # batches that one of a peer's loading processes makes ahead, torch's default
TICK = os.sysconf("SC_CLK_TCK")


def in_turn(candidates: Mapping[str, Callable[[], Answer]], rounds: int) -> dict[str, list[Answer]]:
    """Call every candidate once a round; what each gave, by name."""
    given: dict[str, list[Answer]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            given[name].append(candidate())
    return given


def median(numbers: Sequence[float]) -> float:
    return float(statistics.median(numbers))


def spread(numbers: Sequence[float]) -> float:
    """Half the range over the median: 0.1 means that all lie within about ±10 %."""
    return (max(numbers) - min(numbers)) / 2 / median(numbers) if median(numbers) else 0.0


def tree_cpu() -> float:
    """Seconds of CPU that this process and its living descendants have used so far, user and system."""
    parents: dict[int, int] = {os.getpid(): 0}
    spent = {os.getpid(): time.process_time()}  # finer than the ticks that the kernel tells of others
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = (
                Path("/proc", entry, "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            )
        except (FileNotFoundError, ProcessLookupError):  # it ended between the two calls
            continue
        if int(entry) != os.getpid():
            parents[int(entry)], spent[int(entry)] = int(words[1]), (int(words[11]) + int(words[12])) / TICK
    return sum(seconds for number, seconds in spent.items() if _descends(number, parents))


def _descends(number: int, parents: Mapping[int, int]) -> bool:
    while number in parents:
        if number == os.getpid():
            return True
        number = parents[number]
    return False


def window(batches: Iterator[Any], warmup: int, count: int, least: float = 0.0) -> tuple[dict[str, float], Any]:
    """Take `warmup` batches, then time `count` more, and more of them until `least` seconds have passed.

    Returns wall and CPU seconds of the process tree and the number of batches; and the last batch. With loading
    processes the warm-up must be longer than what they make ahead.
    """
    for _ in range(warmup):
        last = next(batches)
    taken, seconds = 0, 0.0
    cpu, begun = tree_cpu(), time.perf_counter()
    while taken < count or seconds < least:
        last = next(batches)
        taken += 1
        seconds = time.perf_counter() - begun
    return {"seconds": seconds, "cpu": tree_cpu() - cpu, "batches": taken}, last


def serve(ready: dict[str, Any], answer: Callable[[str, int], dict[str, Any]]) -> None:
    """A worker's side: say what this is, then answer requests `{"what", "count"}` until the asker goes away.

    Libraries print on stdout, so the answers go through a copy of it, and prints go to stderr.
    """

    def asked(line: str) -> dict[str, Any]:
        request = json.loads(line)
        return answer(request["what"], request["count"])

    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for reply in chain([ready], map(asked, sys.stdin)):
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


class Worker:
    """A process that measures when asked, on the cores of this one. `.ready` is what it said of itself.

    Raises RuntimeError with the end of its stderr where it dies.
    """

    def __init__(self, command: Sequence[str], threads: int):
        self.command = [*command]
        self._noise = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (closed by `close`)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            text=True,
            env=environment,
        )
        self.ready = self._reply()

    def ask(self, what: str, count: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"what": what, "count": count}) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._noise.seek(0)
        told = "".join(self._noise.readlines()[-15:])
        raise RuntimeError(f"`{' '.join(self.command)}` ended with code {self._process.returncode}:\n{told}")

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # a loader that does not end by itself
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._noise.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def keep_to(cores: int) -> None:
    """This process and all that it starts stay on the first so many of its cores."""
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < cores:
        raise SystemExit(f"{cores} cores are wanted, {len(mine)} are there: --threads {len(mine)}")
    os.sched_setaffinity(0, mine[:cores])
