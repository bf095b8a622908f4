"""k-means: ours against scikit-learn and, where it is installed, faiss, from the same start.

    python tests/benchmarks/kmeans.py [--rows 50000 1000000] [--clusters 100 1000 10000] [--json FILE]

Made-up rows of length 1 about as many centres as there are clusters, in fp32, as the features are that DeepCluster
clusters. All begin with the same rows as centroids and take as many iterations, or fewer where no row moves any more;
seconds are those of the whole call over the iterations that it took, which stand beside them, and so hold the last look
at all rows that gives labels or inertia. Inertia is that of each
one's centroids, found by the same code. In turns, medians, on the first `--threads` cores; `--device cuda` puts ours
on a GPU, while the others stay where they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ledger
import numpy as np
import torch
import torch.nn.functional as F
import turns
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from sslpre.ops.kmeans import kmeans

OURS = "sslpre"
Way = Callable[[], tuple[np.ndarray, int]]
BLOCK = 100_000  # rows made at a time


def made_up(rows: int, width: int, centres: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    middle = F.normalize(torch.randn(centres, width, generator=draw), dim=1)
    x = torch.empty(rows, width)
    for part in x.split(BLOCK):
        about = middle[torch.randint(centres, (len(part),), generator=draw)]
        part.copy_(F.normalize(about + torch.randn(part.shape, generator=draw) / width**0.5, dim=1))
    return x


def ways(x: torch.Tensor, start: torch.Tensor, iterations: int, where: torch.device, threads: int) -> dict[str, Way]:
    """Name → what gives the centroids [K, D] after `iterations` from `start`, or fewer, and how many they were."""
    k, points, first = len(start), x.numpy(), start.numpy()
    here = x.to(where)

    def ours() -> tuple[np.ndarray, int]:
        found = kmeans(here, k, start, iterations)
        return found.centroids.cpu().numpy(), found.iterations

    def sklearn() -> tuple[np.ndarray, int]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fit = KMeans(k, init=first, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(points)
        return fit.cluster_centers_, int(fit.n_iter_)

    def faiss() -> tuple[np.ndarray, int]:
        import faiss

        faiss.omp_set_num_threads(threads)
        wanted = dict(niter=iterations, min_points_per_centroid=1, max_points_per_centroid=len(points))
        fit = faiss.Kmeans(points.shape[1], k, **wanted)
        fit.train(points, init_centroids=first)
        fit.index.search(points, 1)  # the others give labels too
        return fit.centroids, iterations

    found: dict[str, Way] = {OURS: ours, "scikit-learn": sklearn}
    return found | ({"faiss": faiss} if importlib.util.find_spec("faiss") else {})


def timed(way: Way, where: torch.device) -> tuple[float, tuple[np.ndarray, int]]:
    if where.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = way()  # on the CPU, so a GPU has done its work
    return time.perf_counter() - began, found


def measure(rows: int, k: int, asked: argparse.Namespace) -> dict[str, Any]:
    where = torch.device(asked.device)
    x = made_up(rows, asked.width, k)
    start = x[torch.randperm(rows, generator=torch.Generator().manual_seed(1))[:k]]
    given = ways(x, start, asked.iterations, where, asked.threads)
    warm = x[: max(k, 1000)]
    for way in ways(warm, start, 1, where, asked.threads).values():
        way()
    taken = turns.in_turn({name: lambda way=way: timed(way, where) for name, way in given.items()}, asked.rounds)
    found: dict[str, Any] = {}
    for name, answers in taken.items():
        seconds = [one / count for one, (_, count) in answers]
        inertia = kmeans(x, k, torch.from_numpy(answers[-1][1][0]), 0).inertia
        found[name] = {"seconds": turns.median(seconds), "spread": turns.spread(seconds), "inertia": inertia}
        found[name]["iterations"] = answers[-1][1][1]
    mine = found[OURS]
    others = {name: row for name, row in found.items() if name != OURS}
    return {
        "rows": rows,
        "width": asked.width,
        "clusters": k,
        "found": found,
        "ratios": {name: row["seconds"] / mine["seconds"] for name, row in others.items()},
        "inertia_ratios": {name: mine["inertia"] / row["inertia"] for name, row in others.items()},
    }


def show(measured: list[dict[str, Any]], iterations: int) -> None:
    ledger.show(
        f"k-means, up to {iterations} iterations from the same start",
        (
            "",
            "rows",
            "width",
            "clusters",
            "iterations",
            "s an iteration",
            "±",
            "times as fast",
            "inertia",
            "ours is times that",
        ),
        (
            (
                *(name, at["rows"], at["width"], at["clusters"], row["iterations"], row["seconds"], row["spread"]),
                *(at["ratios"].get(name), row["inertia"]),
                f"{at['inertia_ratios'][name]:.5f}" if name in at["inertia_ratios"] else None,
            )
            for at in measured
            for name, row in at["found"].items()
        ),
    )


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rows", type=int, nargs="+", default=[50_000, 1_000_000])
    words.add_argument("--clusters", type=int, nargs="+", default=[100, 1000, 10_000])
    words.add_argument("--width", type=int, default=256)
    words.add_argument("--iterations", type=int, default=10)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--device", default="cpu")
    words.add_argument("--json", type=Path)
    asked = words.parse_args()
    turns.keep_to(asked.threads)
    torch.set_num_threads(asked.threads)
    measured: list[dict[str, Any]] = []
    with threadpool_limits(asked.threads):
        for rows in asked.rows:
            for k in asked.clusters:
                measured.append(measure(rows, k, asked))
                report = {"kmeans": measured, "iterations": asked.iterations, "threads": asked.threads}
                report["device"] = asked.device
                packages = ("sslpre", "torch", "numpy", "scikit-learn", "faiss-cpu")
                ledger.write(asked.json, ledger.record("kmeans", report, packages))
    show(measured, asked.iterations)


if __name__ == "__main__":
    main()
