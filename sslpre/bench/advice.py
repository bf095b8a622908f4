"""One line for whoever measured a run: what limits it, and what to type about it; nothing that would be refused."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from sslpre.bench.setting import Setting

if TYPE_CHECKING:
    from sslpre.bench.table import Report

LOADING = ("decode", "store", "copy")
DEAR = 0.15  # share of the run's time from which decoding is worth a word of advice


def advice(report: Report) -> str:
    """One line: what limits the run, and what to type about it."""
    setting = report.setting
    decoding = report.decoding_seconds / report.run_seconds
    if decoding > DEAR or (setting.store == "off" and report.first.limit == "decode"):
        return about_decoding(report, decoding)
    limit = report.later.limit
    if limit in LOADING:
        return about_loading(setting)
    if limit == "views":
        return about_views(setting)
    if limit == "optimiser":
        return about_optimiser(setting)
    return about_network(setting)


def about_decoding(report: Report, share: float) -> str:
    setting = report.setting
    text = f"decoding takes {share:.0%} of the run"
    if setting.workers < setting.cores and setting.kind != "cpu":
        return f"{text}: --workers {setting.cores}"
    if setting.store_line == "off" and setting.epochs > 1:
        return f"{text}, in every epoch again: leave out --store off"
    if setting.store == "off" and setting.epochs > 1:
        return f"{text}, in every epoch again: --store disk, with SSLPRE_CACHE naming a folder on a larger disk"
    if not setting.simplejpeg:
        return f"{text}: pip install 'sslpre[fast]' makes the same pixels sooner"
    if not setting.images:
        return f"{text}: the sample set is drawn anew for each run, a folder of images need not be"
    command = f"sslpre pack {shlex.quote(setting.images)} --size {setting.store_size}"
    return f"{text}, and later runs can begin without: {command}"


def about_loading(setting: Setting) -> str:
    text = "bringing images is the limit, though they are decoded"
    least = max(setting.sides)
    if setting.store_size > least:
        return f"{text}: --set data.store_size={max(least, setting.store_size * 3 // 4)}"
    if setting.workers < setting.cores:
        return f"{text}: --workers {setting.cores}"
    if setting.store != "disk":
        return f"{text}: they come from memory, and nothing is quicker"
    return f"{text}: --store ram" if setting.fits_ram else f"{text}: SSLPRE_CACHE may name a folder on a faster disk"


def about_views(setting: Setting) -> str:
    if setting.compiler is None and setting.compilable:
        what = "triton, gcc" if setting.kind == "cuda" else "g++"
        return f"the views are the limit, and nothing is there to compile them: install {what} and python3-dev"
    if setting.smaller:
        return f"the views are the limit: smaller ones are quicker, --image-size {setting.smaller}"
    return "the views are the limit: fewer operations in the recipe's [[views]] are quicker"


def about_optimiser(setting: Setting) -> str:
    text, larger = "the optimiser is the limit", 2 * setting.batch_size
    if larger <= setting.count and not setting.part:
        return f"{text}: it costs less an image with --batch-size {larger}"
    return f"{text}: a lighter --backbone"


def about_network(setting: Setting) -> str:
    text = "the network is the limit, nothing is gained from loading faster"
    if setting.precision == "fp32" and setting.bf16:
        return f"{text}: --precision bf16"
    if setting.part and setting.batch == setting.batch_size:
        return f"{text}; the batch does not fit in one piece: --batch-size {setting.part}"
    if setting.kind == "cuda" and not setting.compile:
        return f"{text}: --compile"
    if setting.smaller:
        return f"{text}: --image-size {setting.smaller}, or a lighter --backbone"
    return f"{text}: a lighter --backbone, or fewer --epochs"
