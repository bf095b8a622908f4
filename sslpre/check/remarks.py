"""What to think of the machine, and of the run that would be: one finding of each kind."""

from __future__ import annotations

from sslpre.check.choice import Choice
from sslpre.check.findings import ADVICE, NOTE, STOPS, Finding, Typed
from sslpre.check.machine import Machine
from sslpre.check.pair import FITS, MISFIT, remedy
from sslpre.data.room import amount
from sslpre.errors import SslpreError
from sslpre.train.progress import duration

SHARED = 1 << 30  # bytes of /dev/shm that several GPUs of a machine talk over


def stopped(error: SslpreError) -> Finding:
    """What a run would end with before its first step. The machine's failures are exit 3 here, memory among them."""
    command = error.hint.startswith("sslpre pretrain ")
    text = f"{error.message}: {error.hint}" if error.hint and not command else error.message
    return Finding("run", STOPS, text, (error.hint,) if command else (), 3 if error.code == 12 else error.code)


def about_machine(here: Machine, typed: Typed, jpegs: bool) -> list[Finding]:
    found = []
    if here.runs.lacking:
        text = f"no run can be made in `{here.runs.at}`: {here.runs.lacking}"
        found.append(Finding("runs", STOPS, text, (typed.pretrain("--out /elsewhere/run-1"),), 3))
    pair = here.pair
    if pair.verdict != FITS:
        needs = f", which wants torch{pair.needs}" if pair.needs else ""
        how = "do not belong together" if pair.verdict == MISFIT else "are newer than what is known here of pairs"
        text = f"torch {pair.torch} and torchvision {pair.torchvision}{needs} {how}; they were imported, though"
        level = ADVICE if pair.verdict == MISFIT else NOTE
        found.append(Finding("pair", level, text, (remedy(pair),) if pair.verdict == MISFIT else ()))
    if here.idle and typed.device != "cpu":
        text = f"there is an NVIDIA driver, but torch {pair.torch} sees no GPU"
        found.append(Finding("GPU", ADVICE, text, ("nvidia-smi", "pip install --force-reinstall torch torchvision")))
    if jpegs and not here.simplejpeg:
        text = "JPEGs are decoded by Pillow; simplejpeg makes the same pixels sooner"
        found.append(Finding("simplejpeg", ADVICE, text, ("pip install 'sslpre[fast]'",)))
    if len(here.gpus) > 1 and here.shared is not None and here.shared < SHARED:
        text = f"/dev/shm has {amount(here.shared)} free: NCCL may want more for {len(here.gpus)} GPUs"
        found.append(Finding("shared memory", ADVICE, text, ("docker run --shm-size=2g …",)))
    return found


def about_run(choice: Choice, here: Machine, typed: Typed) -> list[Finding]:
    found = []
    free = here.runs.free
    if free is not None and choice.disk > free and not here.runs.lacking:
        text = f"a run's directory takes up to {amount(choice.disk)}, and `{here.runs.at}` has {amount(free)} free"
        found.append(Finding("disk", STOPS, text, (typed.pretrain("--out /a/larger/disk/run-1"),), 3))
    if choice.store == "off" and choice.epochs > 1:
        text = f"decoded images ({amount(choice.stored)}) have no place, so each is decoded in every epoch again"
        line = f"SSLPRE_CACHE=/a/larger/disk {typed.pretrain()}"
        found.append(Finding("store", ADVICE, text, (line,)))
    if choice.part:
        text = f"a batch of {choice.batch_size} does not fit into memory: {choice.part} images are taken at a time"
        found.append(Finding("memory", NOTE, text))
    if choice.shorter:
        found.append(Finding("long", ADVICE, f"{duration(choice.lasts)} are long for a CPU; {choice.shorter}"))
    return found
