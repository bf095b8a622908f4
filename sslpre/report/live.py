"""The page of a run that trains, rewritten now and then, in at most a fiftieth of the run's time."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sslpre.errors import SslpreError
from sslpre.ops import ranks
from sslpre.report import NAME, kept_probe, known, pictured, previewed
from sslpre.report.gallery import MOST, Sample
from sslpre.report.page import LATER, Content, page
from sslpre.train.disk import reason
from sslpre.train.progress import say
from sslpre.train.runs import write_text

if TYPE_CHECKING:
    from sslpre.train.loop import Run

SHARE = 0.02  # of the run's time
CURVES, IMAGES = 1.5, 4.0  # seconds that curves, and all but the encoder's pass, are taken to need the first time


class Live:
    """`Live()(run)` after each line of the log: rewrites RUN/report.html when there is time for it.

    Curves and verdict come from the log; map, neighbours, clusters and preview are made anew when their time has been
    earned, too, by one process that is alone. Nothing that fails here stops a run or changes a bit of it: it is said
    once, and the page stays as it was.
    """

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.spent = 0.0
        self.curves, self.images = CURVES, 0.0  # seconds that they took the last time
        self.content: Content | None = None  # the last one with images
        self.sample: Sample | None = None
        self.written = self.over = self.told = False

    def __call__(self, run: Run) -> None:
        if self.over or ranks.rank():
            return
        began = time.monotonic()
        earned = SHARE * (began - self.begun) - self.spent
        ended = run.step >= run.steps
        if earned < self.curves and not (
            ended and (run.folder / NAME).exists()
        ):  # a page that is there must not say: training
            return
        try:
            self.rewrite(run, earned - self.curves)
        except OSError as error:
            self.tell(f"warning: `{run.folder / NAME}` is not rewritten: {reason(error)}")
        except SslpreError as error:
            self.over = True
            self.tell(f"hint: no {NAME} while training: {error.message}; {error.hint}")
        except Exception as error:  # whatever it is, a night's training does not end for a page
            self.over = True
            self.tell(f"warning: no {NAME} from here on, please report it: {type(error).__name__}: {error}")
        self.spent += time.monotonic() - began

    def rewrite(self, run: Run, earned: float) -> None:
        began = time.monotonic()
        content = known(run.folder, run.recipe)
        content = replace(content, step=run.step, state="finished" if run.step >= run.steps else "training")
        needed = self.images or IMAGES + self.passing(run, content)
        made = 0.0
        if ranks.world() == 1 and earned > needed:
            at = time.monotonic()
            self.content = self.seen(run, content)
            made = self.images = time.monotonic() - at
        write_text(run.folder / NAME, page(self.joined(content)))
        self.curves = time.monotonic() - began - made
        if not self.written:
            say(f"report     {run.folder / NAME}, rewritten while it trains")
        self.written = True

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
            if self.content is None:
                return previewed(content, run.folder, run.device, lambda line: None)
        return replace(content, rows=self.content.rows, absent=self.content.absent)

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
