"""Do torch and torchvision belong together? Two that do not fail when timm is imported, with words that help nobody.

What decides is what the installed torchvision says that it needs. Up to 0.28 its wheels name one version of torch; from
0.29 on they name the oldest. Builds that name none are held against the table of https://github.com/pytorch/vision.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from sslpre.errors import SslpreError

FITS, MISFIT, UNKNOWN = "fits", "does not fit", "not known"
# torch 2.n and torchvision 0.(n + 15) came out together, of each minor version from 2.0 and 0.15 to these
TABLE, LAST = 15, 14


@dataclass(frozen=True)
class Pair:
    """Installed versions, "" where there is none; verdict: FITS, MISFIT or UNKNOWN; needs: what torchvision names."""

    torch: str
    torchvision: str
    verdict: str
    needs: str = ""


def pair() -> Pair:
    """The installed pair, by what is written about it: nothing is imported."""
    torch, torchvision = installed("torch"), installed("torchvision")
    if not torchvision:
        return Pair(torch, "", MISFIT)
    needs = next((one for one in requires("torchvision") or () if re.match(r"torch(?![\w-])", one)), "")
    needs = re.sub(r"^torch\s*\(?|\)?\s*(;.*)?$", "", needs)
    return Pair(torch, torchvision, judged(torch, torchvision, needs), needs)


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def judged(torch: str, torchvision: str, needs: str) -> str:
    """FITS, MISFIT or UNKNOWN. needs: of torch, as metadata has it (`==2.13.0`, `>=2.14.0`), "" where it is silent."""
    clauses = [re.fullmatch(r"\s*(==|>=|<=|!=|<|>)\s*(\d+(?:\.\d+)*)\s*", one) for one in needs.split(",")]
    ours = numbers(torch)
    if needs and ours and all(clauses):
        return FITS if all(holds(ours, *one.groups()) for one in clauses if one) else MISFIT
    theirs = numbers(torchvision)
    if len(ours) < 2 or len(theirs) < 2 or ours[0] != 2 or theirs[0] != 0:
        return UNKNOWN
    if ours[1] > LAST or theirs[1] > LAST + TABLE:
        return UNKNOWN
    return FITS if theirs[1] == ours[1] + TABLE else MISFIT


def numbers(text: str) -> tuple[int, ...]:
    """The release in a version: (2, 14, 1) of `2.14.1+cpu` and of `2.14.1a0`."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def holds(ours: tuple[int, ...], sign: str, wanted: str) -> bool:
    length = max(len(ours), len(other := numbers(wanted)))
    a, b = ((*one, *[0] * (length - len(one))) for one in (ours, other))
    return {"==": a == b, ">=": a >= b, "<=": a <= b, "!=": a != b, "<": a < b, ">": a > b}[sign]


def remedy(found: Pair) -> str:
    """What to type for a pair that fits."""
    minor = numbers(found.torch)[1:2]
    if numbers(found.torch)[:1] == (2,) and minor and minor[0] <= LAST:
        return f"pip install 'torchvision==0.{minor[0] + TABLE}.*'"
    return "pip install --upgrade torch torchvision"


def refuse_misfit() -> None:
    """Raises SslpreError (exit 3) where timm could not be imported for the pair that is installed."""
    found = pair()
    try:
        import torchvision  # noqa: F401  (timm does)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        told = f"torch {found.torch} and torchvision {found.torchvision or '(not installed)'} do not work together"
        why = " ".join(str(error).split())
        hint = remedy(found)
        if found.verdict == FITS:  # the versions are right, so they are builds for different machines
            hint = "install both at once and from one place: pip install --force-reinstall torch torchvision"
        raise SslpreError(f"{told}: {why}", hint, 3) from error
