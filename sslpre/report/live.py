"""The page of a run that trains, rewritten now and then, in at most a fiftieth of the run's time."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sslpre.errors import SslpreError
from sslpre.ops import ranks
from sslpre.preview import Subject, pictures
from sslpre.report import NAME, ROWS, kept_probe, known, pictured, strips
from sslpre.report.gallery import MOST, Sample
from sslpre.report.page import LATER, Content, page
from sslpre.train.disk import reason
from sslpre.train.progress import say
from sslpre.train.runs import write_text

if TYPE_CHECKING:
    from sslpre.train.loop import Run

SHARE = 0.02  # of the run's time, and what part of it is for curves
FOR_CURVES = 0.25
CURVES, IMAGES = 1.5, 4.0  # seconds that curves, and all but the encoder's pass, are taken to need the first time


class Live:
    """`Live()(run)` after each line of the log: rewrites RUN/report.html when there is time for it.

    Curves and verdict come from the log; map, neighbours, clusters and preview are made anew when their time has been
    earned, too, by one process that is alone. A page that `sslpre report` has written meanwhile is left until then.
    Nothing that fails here stops a run or changes a bit of it: it is said once, and the page stays as it was.
    """

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.spent = self.spent_images = 0.0  # seconds, each from a share of its own: curves are wanted more often
        self.curves, self.images = CURVES, 0.0  # seconds that they took the last time
        self.content: Content | None = None  # the last one with images
        self.sample: Sample | None = None
        self.own = 0  # when the page that lies there was written, if it was here
        self.over = self.told = False

    def __call__(self, run: Run) -> None:
        if self.over or ranks.rank():
            return
        began = time.monotonic()
        age = began - self.begun
        ended = bool(run.ending) or run.step >= run.steps
        there = written(run.folder / NAME)
        # a page that is there must not say that a run trains which has ended
        if age * SHARE * FOR_CURVES - self.spent < self.curves and not (ended and there):
            return
        before = self.spent_images
        try:
            self.rewrite(run, 0.0 if ended else age * SHARE * (1 - FOR_CURVES) - self.spent_images, there)
        except OSError as error:
            self.tell(f"warning: `{run.folder / NAME}` is not rewritten: {reason(error)}")
        except SslpreError as error:
            self.over = True
            self.tell(f"hint: no {NAME} while training: {error.message}; {error.hint}")
        except Exception as error:  # whatever it is, a night's training does not end for a page
            self.over = True
            self.tell(f"warning: no {NAME} from here on, please report it: {type(error).__name__}: {error}")
        self.spent += time.monotonic() - began - (self.spent_images - before)

    def rewrite(self, run: Run, earned: float, there: int) -> None:
        """earned: seconds for images. there: when the page that lies there was written, 0 for none."""
        began = time.monotonic()
        content = known(run.folder, run.recipe)
        state = "finished" if run.step >= run.steps else run.ending or "training"
        content = replace(content, step=run.step, state=state)
        made = 0.0
        if ranks.world() == 1 and earned > (self.images or IMAGES + self.passing(run, content)):
            at = time.monotonic()
            try:
                self.content = self.seen(run, content)
            finally:
                made = self.images = time.monotonic() - at
                self.spent_images += made
        if self.content is not None or not there or there == self.own:
            write_text(run.folder / NAME, page(self.joined(content)))
            if not self.own:
                say(f"report     {run.folder / NAME}, rewritten while it trains")
            self.own = written(run.folder / NAME)
        self.curves = time.monotonic() - began - made

    def passing(self, run: Run, content: Content) -> float:
        """Seconds that the images would take at the pace of training, which is slower than looking at them."""
        log = content.history
        return min(MOST, len(run.stream.source)) * log.seconds / log.images if log.images else 0.0

    def seen(self, run: Run, content: Content) -> Content:
        """With the images as the encoder sees them now, and the first time what the task shows it."""
        encoder, stream = run.objective.encoder, run.stream
        if self.sample is None:
            self.sample = Sample(stream.source, encoder.image_size, stream.side, run.device, stream.workers)
        with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
            content = pictured(content, self.sample, encoder, run.step, run.device, spread=False)
            weights = f"weights: step {run.step:,} of {run.steps:,}"
            epoch, progress = run.step // stream.steps_per_epoch, run.step / run.steps
            subject = Subject(run, "", (weights,), epoch, progress)
            return replace(content, rows=strips.drawn(pictures(subject, ROWS), subject))

    def joined(self, content: Content) -> Content:
        """What the log tells now, with the images of the last time."""
        probe = kept_probe(Path(content.run))
        if self.content is None:
            return replace(content, probe=probe, absent={"images": LATER, "preview": LATER})
        last = self.content
        return replace(
            content,
            picked=last.picked,
            seen=last.seen,
            encoder_step=last.encoder_step,
            measured=last.measured,
            rows=last.rows,
            probe=probe,
            absent=last.absent,
        )

    def tell(self, line: str) -> None:
        if not self.told:
            say(line)
        self.told = True


def written(path: Path) -> int:
    """When the file was last written, in nanoseconds; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
