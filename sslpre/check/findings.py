"""What to think of the images: one finding of each kind, with the images that it is about and what to type."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sslpre.check.copies import Copies
from sslpre.check.files import Files
from sslpre.train.plan import FEWEST

if TYPE_CHECKING:
    from sslpre.check.choice import Choice

STOPS, ADVICE, NOTE = "stops", "advice", "note"
FEW = 5000  # images to train on, under which random weights are a bad start
NARROW = 4  # times as long as wide
SMALLER = 1.1  # a view may be so many times larger than the image: as the image size is chosen
DARK, MANY = 64, 0.5  # of 255; share of the images of more than 8 bits
SIZES = (32, 64, 96, 128, 160, 224)


@dataclass(frozen=True)
class Finding:
    """level: STOPS, a run would end with it, ADVICE or NOTE; code: exit code of what stops; text: one line; type: what
    to type, line by line; images: names; reasons: for each of them, or none; groups: of names that belong together."""

    kind: str
    level: str
    text: str
    type: tuple[str, ...] = ()
    code: int = 0
    images: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    groups: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Typed:
    """The words of the command, as typed; device and workers where they were."""

    recipe: str
    images: str
    device: str = "auto"
    workers: int | None = None

    def pretrain(self, more: str = "", recipe: str = "") -> str:
        images = f"./{self.images}" if self.images.startswith("-") else self.images
        words = ["sslpre", "pretrain", recipe or self.recipe, images]
        words += [] if self.device == "auto" else ["--device", self.device]
        words += [] if self.workers is None else ["--workers", str(self.workers)]
        return f"{shlex.join(words)} {more}".rstrip()


def about_images(files: Files, twice: Copies, typed: Typed, max_bad: float, choice: Choice | None) -> list[Finding]:
    """All that is to be said of the files, what stops a run first."""
    found = [
        *bad(files, typed, max_bad),
        *few(files, typed, choice),
        *leaks(files, twice),
        *equal(files, twice),
        *mixed(files, typed, choice),
        *small(files, typed, choice),
        *narrow(files),
        *deep(files),
        *flat(files),
        *turned(files),
        *clear(files),
        *labels(files),
    ]
    return sorted(found, key=lambda one: (STOPS, ADVICE, NOTE).index(one.level))


def count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def named(files: Files, numbers: list[int]) -> list[str]:
    return [files.name(n) for n in numbers]


def grouped(files: Files, groups: list[list[int]]) -> list[list[str]]:
    return [named(files, group) for group in groups]


def bad(files: Files, typed: Typed, max_bad: float) -> list[Finding]:
    """Bad images: of those for training a run allows a share. What was not decoded is reckoned with in proportion."""
    if not files.bad:
        return []
    numbers = sorted(files.bad)
    told, reasons = named(files, numbers), [files.bad[n] for n in numbers]
    train = [n for n in numbers if n < files.train]
    seen = {n for n in files.decoded if n < files.train}  # evenly spread; of headers more may have been read
    whole, met = len(seen) == files.train, sum(n in seen for n in train)
    share = len(train) / files.train if whole else met / max(1, len(seen))
    low = share - 2 * math.sqrt(share * (1 - share) / max(1, len(seen)))  # a run's end is not told from bad luck
    allowed = math.floor(max_bad * files.train + 1e-9)
    if len(train) > allowed or (not whole and low * files.train > allowed):
        part = f"{len(train):,} of {files.train:,}" if whole else f"about {100 * share:.2g} % of {files.train:,}"
        of = "" if whole else f" ({met:,} of {len(seen):,} tried)"
        text = f"{part} images to train on are bad{of}, and a run stops above {max_bad * 100:g} %"
        needed = min(1.0, math.ceil(1000 * max(share, len(train) / files.train) * (1 if whole else 1.2)) / 1000)
        lines = (typed.pretrain(f"--max-bad {needed:g}"),)
        return [Finding("bad images", STOPS, f"{text}; remove them, or allow them", lines, 4, told, reasons)]
    text = f"{count(len(numbers), 'image')} cannot be read"
    of = (
        "those to train on"
        if whole
        else f"the {len(seen):,} tried of those to train on; a run stops above {max_bad:.2%}"
    )
    text += f", {100 * share:.2g} % of {of}" if train else ", none of them to train on"
    text += "; a run names them and takes neighbours in their place"
    return [Finding("bad images", ADVICE, text, images=told, reasons=reasons)]


def few(files: Files, typed: Typed, choice: Choice | None) -> list[Finding]:
    if not FEWEST <= files.train < FEW or (choice is not None and choice.init):
        return []
    text = (
        f"{count(files.train, 'image')} to train on are few: begun with random weights, a run wants {FEW:,} or more "
        "(simclr on 1,192 photos did not beat raw pixels by nearest neighbours); begin with pretrained weights, and "
        "let probe hold the run against its start"
    )
    judge = "sslpre probe --linear" if files.sources[0].classes else "sslpre probe --data ./labelled --linear"
    lines = (typed.pretrain("--init pretrained --backbone resnet18", "simclr"), judge)
    return [Finding("few images", ADVICE, text, lines)]


def leaks(files: Files, twice: Copies) -> list[Finding]:
    """The same images in training and test, and in folders of different classes."""
    found, test = [], len(files) - files.train
    if twice.leaked:
        text = (
            f"{len(twice.leaked):,} of {count(test, 'test image')} also lie in training, the same bytes"
            f"{partly(files)}: accuracy on them flatters (sslpre probe leaves them out); remove them from one side"
        )
        found.append(Finding("leaked", ADVICE, text, groups=grouped(files, twice.leaked)))
    if twice.like_leaked:
        text = (
            f"{len(twice.like_leaked):,} of {count(test, 'test image')} look like one in training "
            f"(perceptual hash{sampled(files)}); look at some, and remove what is the same picture"
        )
        found.append(Finding("leaked, nearly", ADVICE, text, groups=grouped(files, twice.like_leaked)))
    if twice.torn:
        inside = sum(map(len, twice.torn))
        text = (
            f"{inside:,} files of the same bytes, in {count(len(twice.torn), 'group')}, lie in folders of different "
            "classes: their labels contradict each other"
        )
        found.append(Finding("several labels", ADVICE, text, groups=grouped(files, twice.torn)))
    return found


def equal(files: Files, twice: Copies) -> list[Finding]:
    found = []
    for kind, groups, what in (
        ("copies", twice.equal, ("copy of another file, the same bytes", "copies of other files, the same bytes")),
        ("near copies", twice.alike, ("image that looks like another", "images that look like others")),
    ):
        if groups:
            more = sum(map(len, groups)) - len(groups)
            many = more > 0.01 * (files.compared if kind == "copies" else len(files.hashes))
            text = f"{count(more, *what)}, in {count(len(groups), 'group')}"
            text += f" (perceptual hash{sampled(files)})" if kind == "near copies" else partly(files)
            text += "; contrastive methods push copies apart, and what is rare weighs less" if many else ""
            found.append(Finding(kind, ADVICE if many else NOTE, text, groups=grouped(files, groups)))
    return found


def partly(files: Files) -> str:
    return "" if files.compared == len(files) else f" (of {files.compared:,} compared)"


def sampled(files: Files) -> str:
    return "" if len(files.decoded) == len(files) else f", of {len(files.decoded):,} compared"


def mixed(files: Files, typed: Typed, choice: Choice | None) -> list[Finding]:
    seen = {n: one.grey for n, one in files.headers.items() if n < files.train}
    grey = sorted(n for n, is_grey in seen.items() if is_grey)
    if not grey or len(grey) == len(seen):
        return []
    colour = sorted(n for n, is_grey in seen.items() if not is_grey)
    rare, what = (grey, "grey") if len(grey) <= len(colour) else (colour, "coloured")
    other = "others in colour" if what == "grey" else "others grey"
    text = f"{len(rare):,} of {len(seen):,} images are {what}, the {other}: that alone tells them apart"
    if choice is None or choice.coloured:  # of a task that asks for colours they cannot be taken
        text += "; train on those of one kind" if choice is not None else ""
        return [Finding("grey and colour", ADVICE, text, images=named(files, rare))]
    text += "; to take the colour away:"
    lines = (typed.pretrain(" ".join(f"--set views.{n}.gray=1" for n in range(choice.tables))),)
    return [Finding("grey and colour", ADVICE, text, lines, images=named(files, rare))]


def small(files: Files, typed: Typed, choice: Choice | None) -> list[Finding]:
    """Images that fill no view."""
    if choice is None:
        return []
    side = choice.largest_view
    sides = {n: min(one.height, one.width) for n, one in files.headers.items() if n < files.train}
    less = sorted(n for n, short in sides.items() if short * SMALLER < side)
    if not less:
        return []
    text = f"{len(less):,} of {len(sides):,} images are smaller than a view of {side} px, and are enlarged"
    fits = np.quantile(list(sides.values()), 0.05) * SMALLER
    smaller = max((one for one in SIZES if one <= fits), default=0)
    many = len(less) > 0.05 * len(sides)
    lines = (typed.pretrain(f"--image-size {smaller}"),) if many and 0 < smaller < side else ()
    return [Finding("small", ADVICE if many else NOTE, text, lines, images=named(files, less))]


def narrow(files: Files) -> list[Finding]:
    long = sorted(
        n
        for n, one in files.headers.items()
        if max(one.height, one.width) > NARROW * min(one.height, one.width) and n < files.train
    )
    if not long:
        return []
    many = len(long) > 0.05 * sum(n < files.train for n in files.headers)
    text = (
        f"{count(len(long), 'image is', 'images are')} more than {NARROW} times as long as wide: squeezed into a "
        "square before they are cropped, they lose detail along the long side; cut them into tiles"
    )
    return [Finding("narrow", ADVICE if many else NOTE, text, images=named(files, long))]


def deep(files: Files) -> list[Finding]:
    """More than 8 bits: scaled by their range, so that 12 bits kept in 16 come out dark."""
    wide = sorted(n for n, one in files.headers.items() if one.bits > 8)
    if not wide:
        return []
    known = [n for n in wide if n in files.peaks]  # of those that were decoded
    dark = [n for n in known if files.peaks[n] < DARK]
    if known and len(dark) > MANY * len(known):
        text = (
            f"{len(dark):,} of {count(len(known), 'image')} of more than 8 bits use less than a quarter of their "
            "range, and come out dark: 12 bits kept in 16, perhaps; scale the files to their whole range"
        )
        return [Finding("dark", ADVICE, text, images=named(files, dark))]
    text = f"{count(len(wide), 'image has', 'images have')} more than 8 bits, and are scaled to 8 by their range"
    return [
        Finding(
            "deep",
            NOTE,
            text.replace("has more than 8 bits, and are", "has more than 8 bits, and is"),
            images=named(files, wide),
        )
    ]


def flat(files: Files) -> list[Finding]:
    """Images of one colour, and those too even for a perceptual hash."""
    found, even = [], sorted(set(files.hashes) - files.shown - files.blank)
    if files.blank:
        many = len(files.blank) > 0.01 * len(files.hashes)
        text = f"{count(len(files.blank), 'image shows', 'images show')} a single colour, of which nothing is learned"
        found.append(Finding("blank", ADVICE if many else NOTE, text, images=named(files, sorted(files.blank))))
    if even:
        text = f"{count(len(even), 'image is', 'images are')} too even to be told from others by look: only by bytes"
        found.append(Finding("even", NOTE, text, images=named(files, even)))
    return found


def turned(files: Files) -> list[Finding]:
    lying = sorted(n for n, one in files.headers.items() if one.turn != 1)
    if not lying:
        return []
    text = f"{count(len(lying), 'image lies', 'images lie')} turned or mirrored in the file, and EXIF says how: obeyed"
    return [Finding("turned", NOTE, text, images=named(files, lying))]


def clear(files: Files) -> list[Finding]:
    glass = sorted(n for n, one in files.headers.items() if one.clear)
    if not glass:
        return []
    text = f"{count(len(glass), 'image has', 'images have')} transparency, which becomes white"
    return [Finding("transparent", NOTE, text, images=named(files, glass))]


def labels(files: Files) -> list[Finding]:
    if files.sources[0].classes:
        return []
    text = "no class folders: a run needs none, but to be judged it needs some labelled images"
    return [Finding("labels", NOTE, text, ("sslpre probe --data ./labelled --linear",))]
