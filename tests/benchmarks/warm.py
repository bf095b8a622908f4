"""`python -m sslpre …` without the seconds in which torch is imported: forked from a process that has done so already.

    with Warm() as warm:
        child = warm.start("pretrain", "rotation", folder, cwd=place, stderr=subprocess.PIPE)

What is started is a process of its own, with its own signals, streams, environment and folder, and ends as Python does.
Not for what is about the start itself, or about variables that an interpreter or a library reads when it begins.
"""

from __future__ import annotations

import array
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import IO, Any

LOADED = "sslpre.train.build", "sslpre.train.loop", "sslpre.probe", "sslpre.export"
DEFAULT = "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD"


class Child:
    """A started process; its methods are those of subprocess.Popen."""

    def __init__(self, line: socket.socket, stdout: IO[str] | None, stderr: IO[str] | None):
        self.line, self.stdout, self.stderr = line, stdout, stderr
        self.returncode: int | None = None
        self.pid = int(self._told() or 0)
        assert self.pid, "the process that others are forked from has ended"

    def _told(self) -> str:
        return self.line.recv(64).decode()

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.line], [], [], 0)[0]:
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.line], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self._end()
        assert self.returncode is not None
        return self.returncode

    def _end(self) -> None:
        self.returncode = os.waitstatus_to_exitcode(int(self._told()))
        self.line.close()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to its pipes, once it has ended. Raises TimeoutExpired."""
        told: dict[str, str] = {}
        readers = [
            threading.Thread(target=lambda name=name, pipe=pipe: told.update({name: pipe.read()}), daemon=True)
            for name, pipe in (("out", self.stdout), ("err", self.stderr))
            if pipe is not None
        ]
        begun = time.monotonic()
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(None if timeout is None else max(0.0, timeout - (time.monotonic() - begun)))
        return told.get("out", ""), told.get("err", "")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Warm:
    """The process that others are forked from. It ends with the one that made it."""

    def __init__(self, environment: Mapping[str, str] | None = None):
        self.line, theirs = socket.socketpair()
        command = [sys.executable, os.path.abspath(__file__), str(theirs.fileno())]
        own = {**(environment or os.environ), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=own, start_new_session=True)
        theirs.close()

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        self.line.close()
        self.process.wait()

    def start(
        self,
        *words: object,
        first: str = "",
        cwd: object = ".",
        env: Mapping[str, str] | None = None,
        stdout: Any = None,
        stderr: Any = None,
    ) -> Child:
        """Begin `sslpre` with these words. first: Python that is run before; the streams are as Popen takes them."""
        ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)  # what is told comes one by one
        out, read_out = end(stdout, 1)
        err, read_err = (os.dup(out), None) if stderr == subprocess.STDOUT else end(stderr, 2)
        about = {"words": list(map(str, words)), "first": first, "cwd": os.path.abspath(str(cwd))}
        about["env"] = dict(os.environ if env is None else env)
        message = json.dumps(about).encode()
        handed = [theirs.fileno(), out, err]
        self.line.sendmsg([len(message).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds(handed))])
        self.line.sendall(message)
        theirs.close()
        os.close(out)
        os.close(err)
        return Child(ours, read_out, read_err)


def fds(numbers: list[int]) -> array.array[int]:
    return array.array("i", numbers)


def end(stream: Any, number: int) -> tuple[int, IO[str] | None]:
    """A file descriptor for the child, and what reads from it where it is a pipe."""
    if stream == subprocess.PIPE:
        reader, writer = os.pipe()
        return writer, open(reader, encoding="utf-8", errors="replace")
    if stream == subprocess.DEVNULL:
        return os.open(os.devnull, os.O_RDWR), None
    return os.dup(number if stream is None else stream if isinstance(stream, int) else stream.fileno()), None


def serve(line: socket.socket) -> None:
    """Fork, whenever asked to, until the other end is closed. Comes back in the children alone, as `sslpre`."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that wait for the others
    while True:
        size, handed, _, _ = socket.recv_fds(line, 4, 3)
        if not size:
            os._exit(0)
        message = b""
        while len(message) < int.from_bytes(size, "big"):
            message += line.recv(1 << 16)
        if os.fork() == 0:
            line.close()
            keep(json.loads(message), *handed)
            return
        for fd in handed:
            os.close(fd)


def keep(about: dict[str, Any], told: int, out: int, err: int) -> None:
    """Fork once more, tell the process's number and, in the end, how it ended. Comes back in the process alone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid:
        os.close(out)
        os.close(err)
        os.write(told, str(pid).encode())
        _, status = os.waitpid(pid, 0)
        os.write(told, str(status).encode())
        os._exit(0)
    os.close(told)
    os.setsid()
    for name in DEFAULT:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, number in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    os.environ.clear()
    os.environ.update(about["env"])
    os.chdir(about["cwd"])
    exec(about["first"], {})
    sys.argv = ["sslpre", *about["words"]]


if __name__ == "__main__":
    sys.path[0] = ""
    for module in LOADED:
        __import__(module)
    with socket.socket(fileno=int(sys.argv[1])) as asked:
        serve(asked)
    runpy.run_module("sslpre", run_name="__main__", alter_sys=True)
