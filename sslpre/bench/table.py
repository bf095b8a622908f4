"""What a bench found: numbers for programs, a table of 80 columns and one line of advice for people."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any

from sslpre.bench.advice import LOADING, advice
from sslpre.bench.setting import Setting
from sslpre.data.packed import amount
from sslpre.train.progress import duration

STAGES = ("decode", "store", "copy", "views", "forward", "backward", "optimiser")
WIDE = 0.25  # spread above which it is said
LIGHT = 0.05  # share of a step below which nobody asks how steady a stage is


@dataclass(frozen=True)
class Timing:
    """One stage alone: images a second and milliseconds for a batch (medians; of decode and store, whose batches come
    in bursts, means), the distance of the quartiles over the median, and how often it was timed."""

    images_per_s: float
    ms_per_step: float
    spread: float
    repeats: int


@dataclass(frozen=True)
class Whole:
    """Whole steps as training takes them, one after another, means over `steps`; shares in [0, 1].

    waiting: of the time, in which the step had nothing to work on; loading: of the time, by which reading the images
    makes a step longer, whether it is waited for or takes the cores away; hidden: of the reading's own time, that costs
    nothing because it runs beside the rest; limit: "decode", "store", "copy", "views", "network" or "optimiser",
    whatever takes most of the time.
    """

    images_per_s: float
    ms_per_step: float
    spread: float
    steps: int
    waiting: float
    loading: float = 0.0
    hidden: float = 0.0
    limit: str = ""
    shares: dict[str, float] = field(default_factory=dict)  # of each stage alone, in a step: they may overlap


@dataclass(frozen=True)
class Report:
    setting: Setting
    stages: dict[str, Timing | None]  # None: there is no such stage here
    first: Whole  # the first epoch, nothing stored yet
    later: Whole  # the others; the same as `first` without a store
    peak_memory: int  # bytes, of the process, or of the GPU where there is one
    run_memory: int  # the same for the run, whose store in that memory may be larger than what was measured with
    seconds: float  # that the bench took

    @property
    def run_seconds(self) -> float:
        """What all epochs of the run will take."""
        setting = self.setting
        held = setting.held if setting.store != "off" else None
        return lasting(setting.count, setting.epochs, held, self.first, self.later)

    @property
    def decoding_seconds(self) -> float:
        """How much of it is for decoding."""
        setting = self.setting
        decoded = setting.count - setting.held if setting.store != "off" else setting.count * setting.epochs
        return self.first.loading * decoded / self.first.images_per_s

    def json(self) -> dict[str, Any]:
        """Plain values; the keys are those of Setting, Timing and Whole. Shares in [0, 1].

        schema (1) · setting · stages {decode, store, copy, views, forward, backward, optimiser: Timing or null} ·
        first_epoch, later_epochs (Whole) · peak_memory, run_memory
        (bytes, as measured and as the run would take it) · run_seconds, decoding_seconds (what the whole run
        will take, and the part of it that is decoding) · seconds (the bench's own) · advice
        """
        stages = {name: asdict(found) if (found := self.stages.get(name)) else None for name in STAGES}
        return {
            "schema": 1,
            "setting": asdict(self.setting),
            "stages": stages,
            "first_epoch": asdict(self.first),
            "later_epochs": asdict(self.later),
            "peak_memory": self.peak_memory,
            "run_memory": self.run_memory,
            "run_seconds": self.run_seconds,
            "decoding_seconds": self.decoding_seconds,
            "seconds": self.seconds,
            "advice": advice(self),
        }

    def table(self) -> str:
        """Lines of at most 80 characters, without colour."""
        return table(self)


def lasting(images: int, epochs: int, held: int | None, first: Whole, later: Whole) -> float:
    """Seconds that so many epochs take. held: images that are stored already; None where none ever is."""
    decoded = images * epochs if held is None else images - held
    return decoded / first.images_per_s + (images * epochs - decoded) / later.images_per_s


def timing(times: list[float], batch: int) -> Timing:
    """times: seconds, each for one batch."""
    middle = max(median(times), 1e-9)
    return Timing(batch / middle, 1000 * middle, spread(times), len(times))


def spread(times: list[float]) -> float:
    if len(times) < 4:
        return (max(times) - min(times)) / max(median(times), 1e-9)
    low, middle, high = quantiles(times, n=4)
    return (high - low) / max(middle, 1e-9)


def weighed(whole: Whole, stages: dict[str, Timing | None], reading: tuple[str, ...], rest: float | None) -> Whole:
    """`whole` with its shares, and what limits it.

    reading: the stages that bring its images. rest: milliseconds of a step for which reading costs nothing, None where
    reading is so light that only waiting for it can be seen.
    """
    step = whole.ms_per_step
    alone = {name: found.ms_per_step for name in STAGES if (found := stages[name]) is not None}
    own = {name: ms for name, ms in alone.items() if name not in LOADING or name in reading}
    loading = max(whole.waiting, 0.0 if rest is None else 1 - rest / step)
    brought = sum(alone.get(name, 0.0) for name in reading)
    hidden = min(1.0, max(0.0, 1 - loading * step / brought)) if brought else 0.0
    visible = {
        max(reading, key=lambda name: alone.get(name, 0.0)): loading,
        "views": alone["views"] / step,
        "network": (alone["forward"] + alone["backward"]) / step,
        "optimiser": alone["optimiser"] / step,
    }
    return Whole(
        whole.images_per_s,
        step,
        whole.spread,
        whole.steps,
        whole.waiting,
        loading,
        hidden,
        max(visible, key=lambda name: visible[name]),
        {name: ms / step for name, ms in own.items()},
    )


def table(report: Report) -> str:
    head = line("stage", "images/s", "ms a step", "first epoch", "later epochs")
    rows = [row(name, report) for name in STAGES]
    ends = [
        line(name, f"{whole.images_per_s:,.0f}", f"{whole.ms_per_step:,.1f}", *shares)
        for name, whole, *shares in (
            ("first epoch", report.first, "100%", ""),
            ("later epochs", report.later, "", "100%"),
        )
    ]
    rule = "-" * len(head)
    below = [part for text in notes(report) for part in wrapped(text)]
    return "\n".join([head, rule, *rows, rule, *ends, rule, *below, "", *wrapped(f"advice: {advice(report)}")])


def row(name: str, report: Report) -> str:
    found = report.stages.get(name)
    cells = ["-", "-"] if found is None else [f"{found.images_per_s:,.0f}", f"{found.ms_per_step:,.1f}"]
    shares = [f"{whole.shares[name]:.0%}" if name in whole.shares else "-" for whole in (report.first, report.later)]
    return line(name, *cells, *shares)


def line(name: str, *cells: str) -> str:
    return f"{name:<14}{''.join(f'{cell:>14}' for cell in cells)}".rstrip()


def notes(report: Report) -> list[str]:
    """What the numbers mean."""
    setting, found = report.setting, [waits("first epoch", report.first)]
    if setting.store != "off":
        found.append(waits("later epochs", report.later))
    found.append(f"the whole run: about {duration(report.run_seconds)}{compiling(setting)}")
    more = report.run_memory - report.peak_memory
    counted = f", of which {amount(more)} for images that were not stored here" if more > 0 else ""
    found.append(f"peak memory of the run: about {amount(report.run_memory)}{counted}")
    if setting.note:
        found.append(f"note: {setting.note}")
    found.append("a stage was timed alone; on the right: what share of a whole step that is, some run beside others")
    if setting.batch < setting.batch_size:
        found.append(f"a step of {setting.batch} images; the run's have {setting.batch_size}")
    every = {**report.stages, "first epoch": report.first, "later epochs": report.later}
    long = {name for whole in (report.first, report.later) for name, share in whole.shares.items() if share > LIGHT}
    long |= {"first epoch", "later epochs"}
    unsteady = [name for name, one in every.items() if one is not None and one.spread > WIDE and name in long]
    if unsteady:
        found.append(f"note: unsteady, by more than a quarter: {', '.join(dict.fromkeys(unsteady))}")
    return found


def compiling(setting: Setting) -> str:
    """What is compiled before, and not in the time of any step."""
    parts = {"views": setting.compile_s, "network": setting.network_s}
    told = " and ".join(f"{duration(seconds)} to compile the {name}" for name, seconds in parts.items() if seconds)
    return f", and {told}" if told else ""


def waits(name: str, whole: Whole) -> str:
    """What takes most of the time, and what of the loading shows."""
    limit = {"decode": "decoding", "store": "the store", "copy": "copying", "views": "making views"}
    text = f"{name}: {limit.get(whole.limit, f'the {whole.limit}')} takes most of the time; "
    what = "decoding" if "decode" in whole.shares else "loading"
    if whole.loading < 0.01:
        return f"{text}{what} is hidden behind the rest"
    return f"{text}{what} makes up {whole.loading:.0%} of a step, {whole.hidden:.0%} of it is hidden behind the rest"


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 80, subsequent_indent="  ", break_on_hyphens=False)
