"""A batch's images shared out over threads of Python's own, on a CPU, each of which does one image's work alone.

torch splits one operation over its threads, which all wait for the slowest after every operation. Here threads meet
once a batch: a view of 224 px on two idle cores takes 0.57 instead of 0.62 ms, and beside another process 0.8
to 1.9 instead of 2.2 to 5.7. It is no more because the threads hand the interpreter's lock to and fro, for which reason
views below 120 px gain nothing but by their crops.
"""

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

# Parts for each thread: they do not take equally long, for not every image is blurred.
_PARTS = 4
_lock = threading.Lock()
# of the process whose number this is, so that a fork does not wait for threads that it has not got
_made: tuple[int, int, ThreadPoolExecutor] | None = None


def share(work: Callable[[slice], None], count: int) -> None:
    """Call `work` with slices that together are range(count), at once in as many threads as torch has here.

    `work` runs without gradients and autocast, and writes its result where no other slice does. With one thread it is
    called once, by the caller. What `work` raises is raised here, after all have ended.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        work(slice(0, count))
        return
    parts = max(1, min(_PARTS * threads, count))
    edges = [count * part // parts for part in range(parts + 1)]
    inference = torch.is_inference_mode_enabled()  # which, too, holds for a thread
    with _lock:
        try:
            pool = _pool(threads)
        except RuntimeError:  # the system gives no more threads: this is only faster with them
            work(slice(0, count))
            return
        begun = [pool.submit(_one, work, slice(*pair), inference) for pair in itertools.pairwise(edges)]
    _ended(begun)


def _one(work: Callable[[slice], None], rows: slice, inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():  # which holds for a thread, as autocast does
        work(rows)


def _ended(begun: list[Future[None]]) -> None:
    try:
        for future in begun:
            future.result()
    finally:
        for future in begun:
            if not future.cancel():
                future.exception()


def _pool(threads: int) -> ThreadPoolExecutor:
    """The process' pool, made anew where torch has another number of threads than it had."""
    global _made
    if _made is not None and _made[:2] == (os.getpid(), threads):
        return _made[2]
    if _made is not None and _made[0] == os.getpid():
        _made[2].shutdown()
    pool = ThreadPoolExecutor(threads, "sslpre-views", _single)
    here = threading.Barrier(threads)
    try:
        for waiting in [pool.submit(here.wait) for _ in range(threads)]:  # so that every thread is made now
            waiting.result()
    except BaseException:
        here.abort()  # else those that were made would wait for ever, and the process for them
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(threads)
    _made = (os.getpid(), threads, pool)
    return pool


def _single() -> None:
    torch.set_num_threads(1)  # which is of this thread, but also what threads yet to come begin with
    torch.get_num_threads()  # a thread takes that number at its first look, and this is it
