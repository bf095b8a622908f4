"""`sslpre probe A B C --plane FILE`: several encoders on the same images, side by side."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from sslpre.cli.probe import images_of, opened
from sslpre.errors import SslpreError
from sslpre.train.runs import is_run

if TYPE_CHECKING:
    import torch

    from sslpre.data.find import Found
    from sslpre.encoder import Encoder
    from sslpre.probe import Report
    from sslpre.probe.plane import Plane
    from sslpre.recipe import DataTable, View


@dataclass(frozen=True)
class Candidate:
    path: Path
    encoder: Encoder
    start: Encoder | None
    table: DataTable


def compare(
    paths: Sequence[Path],
    data: str | None,
    judge: Callable[[Path], Report],
    device: torch.device,
    workers: int | None,
    max_bad: float | None,
) -> tuple[Plane, list[Report]]:
    """judge: probes one of them on those images. Raises SslpreError as `measure`, and exit 2 where they say different
    images."""
    from sslpre.probe.plane import Plane, Point

    candidates = [Candidate(path, *opened(path, device)[:3]) for path in paths]
    places = {one.table.images for one in candidates}
    if data is None and len(places) > 1:
        words = " ".join(shlex.quote(str(path)) for path in paths)
        raise SslpreError(
            "the runs are of different images", f"sslpre probe {words} --plane plane.svg --data ./labelled"
        )
    found = images_of(candidates[0].table if data is None else candidates[0].table.model_copy(update={"images": data}))
    tables, views = views_of(paths)
    reports, points, images, seen = [], [], 0, set()
    for one in candidates:
        report = judge(one.path)
        question = next(q for q in reversed(report.heads) if q.metric == report.heads[0].metric)
        reports.append(report)
        network = (one.encoder.architecture, str(one.encoder.model_args), one.encoder.image_size, one.encoder.colour)
        bad = one.table.max_bad if max_bad is None else max_bad
        threads = (os.cpu_count() or 1) if workers is None else workers
        own, images = measured(one, found, tables, network not in seen, device, threads, bad)
        seen.add(network)
        for weights, (align, uniform) in own.items():
            code = report.encoder_hash if weights == "encoder" else ""
            name = one.encoder.architecture if weights == "random weights" else str(one.path)
            points.append(Point(name, weights, align, uniform, report.last(weights).scores[question], code))
    notes = [f"{one.path}: {note}" for one, report in zip(candidates, reports, strict=True) for note in report.warnings]
    return Plane(tuple(points), question, reports[0], images, views, tuple(notes)), reports


def measured(
    one: Candidate,
    found: Found,
    tables: Sequence[View],
    random: bool,
    device: torch.device,
    workers: int,
    max_bad: float,
) -> tuple[dict[str, tuple[float, float]], int]:
    """Alignment and uniformity of the encoder, of its start and of random weights, and of how many images."""
    from sslpre.data.stream import BadList
    from sslpre.probe import SEEDS, lent
    from sslpre.probe.features import Centres, calibration_images, random_twin
    from sslpre.probe.plane import on_the_sphere, sample
    from sslpre.train.progress import say
    from sslpre.views.build import Views

    encoder, side = one.encoder, int(one.table.store_size)
    with lent(encoder, device), lent(one.start or encoder, device):
        networks = {"encoder": [encoder]} | ({"start": [one.start]} if one.start is not None else {})
        if random:
            part = sample(found.train)
            bad = BadList(None, max_bad, len(part))
            centres = Centres(
                part, side=encoder.image_size, canvas=side, batch=64, workers=workers, device=device, bad=bad, keep=True
            )
            for _ in centres:
                continue
            images = calibration_images(centres, 0)
            networks["random weights"] = [random_twin(encoder, 1 + seed, images, 64) for seed in range(SEEDS)]
        say(f"alignment and uniformity of {one.path}")
        views = Views(tables, encoder.image_size, 0)
        flat = [network for some in networks.values() for network in some]
        test = sample(found.train if found.test is None else found.test)
        pairs, count = on_the_sphere(flat, test, views, side=side, device=device, workers=workers, max_bad=max_bad)
    left = iter(pairs)
    own = {name: [next(left) for _ in some] for name, some in networks.items()}
    means = {
        name: (mean([align for align, _ in some]), mean([uniform for _, uniform in some])) for name, some in own.items()
    }
    return means, count


def views_of(paths: Sequence[Path]) -> tuple[list[View], str]:
    """Tables of two views, and in words what they are: those of the runs' recipes where all have the same two, else the
    recipe `simclr`'s."""
    from sslpre.recipe import load

    of_runs = [load(str(path / "recipe.toml")) for path in paths if is_run(path)]
    views = [tuple(view.model_copy(update={"size": 0}) for view in recipe.views) for recipe in of_runs]
    if len(views) == len(paths) and all(one == views[0] and sum(v.copies for v in one) == 2 for one in views):
        return list(views[0]), "of the runs' recipe"
    return [view.model_copy(update={"size": 0}) for view in load("simclr").views], "of the recipe `simclr`"
