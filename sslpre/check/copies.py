"""Which images are there more than once: by the bytes of their files, and by how they look."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sslpre.check.files import Files, size_of
from sslpre.ops.duplicates import groups, near


@dataclass(frozen=True)
class Copies:
    """Numbers of images. equal: groups of files with the same bytes; alike: groups that look the same, of equal files
    the first alone; leaked: pairs of a test image and a training image with the same bytes; like_leaked: pairs that
    look the same, of test images not in `leaked`; torn: groups of equal files that lie in several class folders."""

    equal: list[list[int]]
    alike: list[list[int]]
    leaked: list[list[int]]
    like_leaked: list[list[int]]
    torn: list[list[int]]


def copies(files: Files) -> Copies:
    numbers = sorted(files.digests)
    keys = [(size_of(files, number), files.digests[number]) for number in numbers]
    equal = [[numbers[at] for at in group] for group in groups(keys)]
    leaked = [pair for group in equal for pair in across(files, group)]
    torn = [group for group in equal if len({files.label(n) for n in group} - {-1}) > 1]
    alike = alike_groups(files, {n: group[0] for group in equal for n in group})
    known = {test for test, _ in leaked}
    return Copies(equal, alike, leaked, [pair for pair in like_pairs(files) if pair[0] not in known], torn)


def across(files: Files, group: list[int]) -> list[list[int]]:
    """[test image, first training image] for each test image of a group that has both."""
    first = [n for n in group if n < files.train][:1]
    return [[n, *first] for n in group if n >= files.train] if first else []


def alike_groups(files: Files, first: dict[int, int]) -> list[list[int]]:
    """Groups that near pairs join, of images that show something. first: for each of equal files, which stands for all
    of them."""
    rows = sorted(n for n in files.shown if first.get(n, n) == n)
    if not rows:
        return []
    hashes, place = np.unique(np.array([files.hashes[n] for n in rows], np.uint64), return_inverse=True)
    over = np.arange(len(hashes))  # of each hash another one of its group, or itself

    def root(at: int) -> int:
        while over[at] != at:
            over[at] = over[over[at]]
            at = int(over[at])
        return at

    for one, other in near(hashes).tolist():  # of different hashes: a thousand equal images are a million pairs
        over[root(one)] = root(other)
    found = groups([root(at) for at in place.tolist()])
    return [[rows[at] for at in group] for group in found]


def like_pairs(files: Files) -> list[list[int]]:
    """[test image, training image] that looks the same, one for each such test image."""
    test = [n for n in sorted(files.shown) if n >= files.train]
    train = [n for n in sorted(files.shown) if n < files.train]
    if not test or not train:
        return []
    hashes, place = np.unique(np.array([files.hashes[n] for n in test], np.uint64), return_inverse=True)
    others, at = np.unique(np.array([files.hashes[n] for n in train], np.uint64), return_index=True)
    like = {i: train[int(at[j])] for i, j in reversed(near(hashes, others).tolist())}
    return [[n, like[i]] for n, i in zip(test, place.tolist(), strict=True) if i in like]
