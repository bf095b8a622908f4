"""All of it in one report: numbers for programs, lines of 80 characters for people."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

import sslpre
from sslpre.check.choice import Choice, choice
from sslpre.check.copies import Copies, copies
from sslpre.check.files import Files, survey
from sslpre.check.findings import STOPS, Finding, Typed, about_images, count
from sslpre.check.machine import Machine, machine, needed
from sslpre.check.remarks import about_machine, about_run, stopped
from sslpre.data import Source
from sslpre.data.find import Found, find, printable
from sslpre.errors import SslpreError
from sslpre.train import memory
from sslpre.train.run import Options, planned, wish

QUANTILES = (0, 0.05, 0.5, 0.95, 1)


@dataclass(frozen=True)
class Report:
    """files, twice, found: None where there are no images; run: None where nothing could be measured."""

    typed: Typed
    found: Found | None
    files: Files | None
    twice: Copies | None
    machine: Machine
    run: Choice | None
    findings: list[Finding]
    seconds: float

    @property
    def stops(self) -> list[Finding]:
        return [one for one in self.findings if one.level == STOPS]

    @property
    def code(self) -> int:
        """0, or the exit code of what would stop a run: the images' before the machine's."""
        return max((one.code for one in self.stops), default=0, key=lambda code: (code == 4, code))

    @property
    def verdict(self) -> str:
        if self.stops:
            more = f" (and {count(len(self.stops) - 1, 'other thing')}, see above)" if len(self.stops) > 1 else ""
            return f"not ready: {self.stops[0].text}{more}"
        advice = sum(one.level != "note" for one in self.findings)
        more = f", with {count(advice, 'thing')} to think about first" if advice else ""
        return f"ready{more}: {self.typed.pretrain()}"

    def json(self) -> dict[str, Any]:
        """Plain values, every name in full.

        schema (1) · sslpre · recipe · images {…, null where there are none} · machine (Machine) · run (Choice, or null)
        · findings [{kind, level: stops, advice or note, text, type, code, images, reasons,
        groups}] · ready · code · verdict ·
        seconds (that the check took)
        """
        return {
            "schema": 1,
            "sslpre": sslpre.__version__,
            "recipe": self.typed.recipe,
            "images": None if self.files is None or self.found is None else images(self.found, self.files),
            "machine": asdict(self.machine),
            "run": None if self.run is None else asdict(self.run),
            "findings": [asdict(one) for one in self.findings],
            "ready": not self.stops,
            "code": self.code,
            "verdict": self.verdict,
            "seconds": self.seconds,
        }


def check(options: Options, typed: Typed, busy: Callable[[str], None] = lambda what: None) -> Report:
    """Look at images and machine, and measure some steps of the run that `options` would begin.

    What would stop a run is a finding, not an error. Raises SslpreError: exit 2 for a recipe that cannot be read, and
    where several processes were started; 4 for a folder whose name is not UTF-8.
    """
    begun = time.monotonic()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SslpreError("check looks at a single process", "type sslpre check, without torchrun")
    memory.keep_freed()
    wanted = wish(options)
    found, files, twice, run, stops = None, None, None, None, list[Finding]()
    try:
        where = needed(options.device)
    except SslpreError as error:
        stops.append(stopped(error))
        where = torch.device("cpu")
    busy("the machine")
    here = machine(where)
    busy("the folder")
    try:
        assert options.images is not None
        found = find(options.images, wanted.data.max_pixels)
    except SslpreError as error:
        stops.append(stopped(error))
    if found is not None:
        files = survey(found, options.workers or here.cores, busy)
        twice = copies(files)
        if not stops:
            try:
                plan = planned(options, where, found)
                run = choice(options, plan, readable(files), where, busy)
            except SslpreError as error:
                stops.append(stopped(error))
            except (OSError, MemoryError, torch.OutOfMemoryError) as error:  # what else was found is worth telling
                why = " ".join(printable(os.fsencode(str(error))).split())[:120]
                stops.append(Finding("run", STOPS, f"its steps could not be measured: {why}", code=3))
    findings = stops
    if files is not None and twice is not None:
        jpegs = 2 * sum(one.kind == "JPEG" for one in files.headers.values()) > len(files.headers)
        findings = [*stops, *about_images(files, twice, typed, wanted.data.max_bad, run)]
    else:
        jpegs = False
    findings += about_machine(here, typed, jpegs)
    findings += about_run(run, here, typed) if run is not None else []
    findings.sort(key=lambda one: ("stops", "advice", "note").index(one.level))
    return Report(typed, found, files, twice, here, run, findings, time.monotonic() - begun)


def readable(files: Files) -> np.ndarray:
    """Numbers of the images for training that are not known to be bad. None is left: SslpreError (exit 4)."""
    rows = np.setdiff1d(np.arange(files.train), np.array(list(files.bad), np.int64))
    if not len(rows):
        where = files.sources[0].where
        raise SslpreError(f"none of the images of `{where}` can be read", "check the files", 4)
    return rows


def images(found: Found, files: Files) -> dict[str, Any]:
    """What is known of the images, in plain values. headers, decoded, compared: of how many that is."""
    seen = list(files.headers.values())
    sides = sorted(((one.width, one.height) for one in seen), key=lambda side: (side[0] * side[1], side))
    shorter = [min(side) for side in sides]
    return {
        "where": found.train.where,
        "count": files.train,
        "test": {"where": found.test.where, "count": len(found.test)} if found.test is not None else None,
        "note": found.note,
        "passed_over": found.passed_over,
        "left_alone": dict(sorted(found.skipped.items())),
        "bytes": int(sum(source.sizes.sum() for source in files.sources)),
        "headers": files.looked,
        "decoded": len(files.decoded),
        "compared": files.compared,
        "kinds": tally(one.kind for one in seen),
        "modes": tally(one.mode for one in seen),
        "bits": tally(str(one.bits) for one in seen),
        "turns": tally(str(one.turn) for one in seen),
        "short_side": {str(q): int(np.quantile(shorter, q, method="lower")) for q in QUANTILES} if seen else {},
        "smallest": list(sides[0]) if sides else None,
        "largest": list(sides[-1]) if sides else None,
        "sizes": len(set(sides)),
        "bad": len(files.bad),
        "classes": classes(found.train),
        "test_classes": {} if found.test is None else classes(found.test),
        "unlabelled": int((found.train.labels < 0).sum()),
    }


def tally(words: Any) -> dict[str, int]:
    """How often each, the most frequent first."""
    return dict(sorted(Counter(words).items(), key=lambda pair: (-pair[1], pair[0])))


def classes(source: Source) -> dict[str, int]:
    """How many images each class has."""
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
    return {name: int(counts[i]) for i, name in enumerate(source.classes)}
