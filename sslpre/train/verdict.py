"""Is it learning? One verdict in words on a run's health, its likely cause, and what to type."""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslpre.errors import SslpreError
from sslpre.train import distributed, health
from sslpre.train.health import Ring, rounded
from sslpre.train.progress import say

if TYPE_CHECKING:
    from sslpre.data.stream import Pixels
    from sslpre.train.loop import Run

CODE = 11
SHARE = 0.02  # of a run's time that looking at it may take
CERTAIN = 2  # looks in a row with the same verdict, before it is said and acted on
LOOKS = 3  # the loss of so many is held against chance: that of one may be a little below it by luck
FEWEST = 64  # images of the last survey, where time is for no more

HEALTHY, NOT_YET, PARTLY, COLLAPSED = "healthy", "not yet learning", "partly collapsed", "collapsed"
LEARNED = 0.98  # of the loss of chance: below it something is learned
POINT = 1e-3  # spread of features that are one point
LITTLE = 0.05  # spread above which nothing has collapsed; untrained networks without normalisation have less
FALL = 10.0, 3.0  # how many times less than at the first look: collapsed, partly
DIRECTIONS, ROWS = 2.0, 256  # effective number of directions, or a hundredth of all: partly; of so many rows at least
FEWER = 4.0  # times fewer directions than at the first look: partly. Healthy runs kept two fifths of them or more
FIRST = ("std", "eval_std", "directions")  # what is held against the first look
ALIKE = 0.01  # deviation of coarse pictures, below which images show nothing that differs


@dataclass
class Watch:
    """What is known of a run. first: spread in training and in evaluation, and directions, at the first look."""

    ring: Ring = field(default_factory=Ring)
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=LOOKS))  # of the last losses to those of chance
    first: dict[str, float] = field(default_factory=dict)
    told: dict[str, float] = field(default_factory=dict)  # the newest figure of each kind
    clusters: dict[str, float] = field(default_factory=dict)  # what the method tells of them
    verdict: str = ""
    times: int = 0  # how often in a row the verdict was the same
    since: int = 0  # the step at which it first was
    said: str = HEALTHY  # the last verdict that was certain
    looks: int = 0  # of those that cost something
    looked: float = 0.0  # when, by a clock that only rises
    spent: float = 0.0  # seconds that the last one took
    surveyed: int = 0  # pixels that the encoder had been shown at the last survey

    def look(self, run: Run, pixels: Pixels, epoch: int, figures: Mapping[str, float]) -> dict[str, Any]:
        """Figures and verdict for a line of the log. figures: of the line, the mean loss since the last among them.

        Figures that cost something are left out until looking takes a fiftieth of the time; the first look, which may
        compile, does not count.
        """
        line: dict[str, Any] = {}
        if (chance := chance_of(run, figures)) is not None:
            self.ratios.append(chance[0] / chance[1])
            line["chance"] = chance[1]
        else:
            self.ratios.clear()
        rows = self.ring.finite()
        if len(rows) < 2:
            return line
        fresh = health.of_quick(rows)
        began = time.monotonic()
        if began - self.looked >= self.spent / SHARE:
            fresh |= health.guarded(lambda: health.of_ring(rows) | health.of_batch(run, pixels, epoch))
            self.looked = time.monotonic()
            self.spent, self.looks = self.looked - began if self.looks else 0.0, self.looks + 1
        for name in FIRST:
            if name in fresh:
                self.first.setdefault(name, fresh[name])
        self.told |= fresh
        verdict = verdict_of(self, len(rows), rows.shape[1])
        same = verdict == self.verdict
        self.verdict, self.times, self.since = verdict, self.times + 1 if same else 1, self.since if same else run.step
        line["health"] = {"verdict": verdict, "advice": self.advice(run), **rounded(fresh), **self.clusters}
        return line

    def advice(self, run: Run) -> str:
        """The likely cause and what to type; empty where there is nothing to do."""
        if self.verdict in ("", HEALTHY):
            return ""
        rate, ratio = run.recipe.optim.lr, min(self.ratios, default=1.0)
        assert rate != "auto"
        lower, picture = f"try --lr {rate / 10:.1g}", f"sslpre preview {shlex.quote(str(run.folder))} sheet.png"
        if self.verdict == NOT_YET and run.step <= patience(run):
            return "the loss is that of guessing; early in a run that is usual"
        if self.told.get("images_std", 1.0) < ALIKE:
            return f"what the network is shown hardly differs from image to image; look: {picture}"
        if self.verdict == NOT_YET and ratio > 2 - LEARNED:
            return f"the loss is above that of guessing, so the rate is too high: try --lr {rate / 3:.1g}"
        if self.verdict == NOT_YET:
            return (
                f"the loss is that of guessing; see whether pictures show what is asked: {picture}; "
                f"if they do, another rate: try --lr {rate * 3:.1g}, then --lr {rate / 3:.1g}"
            )
        what = "all images get the same features"
        if self.verdict == PARTLY:
            what = f"features differ little, and in {self.told.get('directions', 0):.1f} directions"
        if run.passed_over:
            return f"{what}, after steps that were not finite: the rate is too high; {lower}"
        if self.ratios and ratio < LEARNED:
            return (
                f"{what}, and yet the loss is below that of guessing: there is a way round the images; look: {picture}"
            )
        return f"{what}: mostly the rate is too high; {lower}"

    def ends(self, run: Run) -> bool:
        """Say once what was seen twice in a row. Has it collapsed, and is to stop then? Every process calls it."""
        run.verdict = f"{self.verdict}: {advice}" if (advice := self.advice(run)) else self.verdict
        early = self.verdict == NOT_YET and run.step <= patience(run)
        if self.times >= CERTAIN and self.verdict != self.said and not early:
            well, self.said = self.verdict == HEALTHY, self.verdict
            say(
                f"health     healthy again since step {self.since}"
                if well
                else f"warning: {run.verdict}{self.from_step}"
            )
        if run.recipe.train.on_collapse == "warn":
            return False
        return distributed.from_first(lambda: self.verdict == COLLAPSED and self.times >= CERTAIN)

    @property
    def from_step(self) -> str:
        return f" (since step {self.since})"

    def stopped(self, run: Run) -> SslpreError:
        message = f"collapsed: all images get the same features; saved at step {run.step}"
        rate = run.recipe.optim.lr
        assert rate != "auto"
        go_on = f"sslpre pretrain --resume {shlex.quote(str(run.folder))} --on-collapse warn"
        return distributed.everywhere(SslpreError(message, f"begin again with --lr {rate / 10:.1g}; or: {go_on}", CODE))

    def survey(self, run: Run) -> dict[str, float]:
        """`health.survey` of 1,000 images, at the end of those epochs where it takes a fiftieth at most of the time
        trained since the last one; at the end of the run of as many images as there is time for, if that is not few.

        Every process calls it.
        """
        shown = distributed.summed([float(self.ring.pixels - self.surveyed)])[0]
        each = health.VIEWS * run.objective.encoder.image_size**2
        time_for = min(1e9, 3 * SHARE * shown / each)  # a backward pass takes about twice the time of one forward
        wanted = min(health.IMAGES, len(run.stream.source))
        if time_for < wanted and (run.step < run.steps or time_for < FEWEST):
            return {}
        self.surveyed = self.ring.pixels
        return health.survey(run, min(wanted, int(time_for)))


@contextlib.contextmanager
def watching(run: Run) -> Iterator[Watch]:
    """Inside, the encoder tells the watch what it gives in training. What the log of the run has told is known."""
    watch = Watch()
    if distributed.first():
        remember(watch, run.folder / "metrics.jsonl")
    run.objective.encoder.listener = watch.ring.add
    try:
        yield watch
    finally:
        run.objective.encoder.listener = None


def remember(watch: Watch, path: Path) -> None:
    """What earlier parts of the run have found: a verdict that was said is not said again."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        figures = json.loads(line).get("health")
        if not isinstance(figures, dict):
            continue
        for name in FIRST:
            if isinstance(figures.get(name), float):
                watch.first.setdefault(name, figures[name])
        if isinstance(verdict := figures.get("verdict"), str):
            if verdict != watch.verdict:
                watch.verdict, watch.times, watch.since = verdict, 0, int(json.loads(line)["step"])
            watch.times += 1
            if watch.times >= CERTAIN:
                watch.said = verdict


def patience(run: Run) -> int:
    """The step until which a loss of chance means nothing: a tenth of the run, and while the rate rises."""
    warmup = run.recipe.optim.warmup
    assert warmup != "auto"
    return int(max(warmup, 0.1) * run.steps)


def chance_of(run: Run, figures: Mapping[str, float]) -> tuple[float, float] | None:
    """What the method is judged by, and what that would be if nothing were learned; None where nobody knows."""
    name, bar = run.objective.judged
    chance = run.objective.chance if bar == "chance" else figures.get(bar)
    return (figures[name], chance) if chance and name in figures else None


def verdict_of(watch: Watch, rows: int, dim: int) -> str:
    """Of the newest figures, from `rows` embeddings of `dim` numbers."""
    told, first = watch.told, watch.first
    falls = [fallen(told[name], first[name]) for name in ("std", "eval_std") if name in told and name in first]
    if COLLAPSED in falls or watch.clusters.get("clusters") == 1:
        return COLLAPSED
    least = max(DIRECTIONS, min(dim, rows) / 100, first.get("directions", 0.0) / FEWER)
    few = rows >= ROWS and told.get("directions", dim) < least
    if PARTLY in falls or few:
        return PARTLY
    return HEALTHY if not watch.ratios or min(watch.ratios) < LEARNED else NOT_YET


def of_features(figures: Mapping[str, float], rows: int, dim: int) -> str:
    """The verdict on features alone, where nothing is known of the loss or of what was before."""
    return verdict_of(Watch(told=dict(figures), first={"std": figures["std"]}), rows, dim)


def fallen(std: float, first: float) -> str:
    """What a spread says that was `first` at the first look. Features of untrained networks may differ little, by 0.02
    in some without normalisation: that alone is no collapse."""
    if std < POINT or (std < LITTLE and std < first / FALL[0]):
        return COLLAPSED
    return PARTLY if std < LITTLE and std < first / FALL[1] else HEALTHY
