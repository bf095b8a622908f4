"""How much is free: memory for this process, by all that may limit it, and space on a disk. In bytes."""

from __future__ import annotations

import os
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # version 1 writes a number near 2**63 where there is no limit


def memory() -> int | None:
    """Memory that this process can take without swapping or being killed; None where the system does not say."""
    limits = [available(_text(PROC / "meminfo")), address_space(), *cgroup_rooms(_text(PROC / "self/cgroup"))]
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else None


def disk(path: Path) -> int:
    """Free bytes, for one who is not root, on the disk that `path` is or would be on. Raises OSError."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    free = os.statvfs(place)
    return free.f_bavail * free.f_frsize


def available(meminfo: str) -> int | None:
    """MemAvailable of the text of /proc/meminfo."""
    return _number(meminfo, "MemAvailable:", 1024)


def address_space() -> int | None:
    """What RLIMIT_AS (`ulimit -v`) leaves; None without such a limit."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    pages = _text(PROC / "self/statm").split()
    return limit - (int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 0)


def cgroup_rooms(membership: str, root: Path = CGROUPS) -> list[int]:
    """What each group that this process is in leaves it, of version 1 or 2; `membership`: /proc/self/cgroup.

    Inside a container the path may be that of the host, of which only the upper end is there: all parents are read.
    """
    rooms = []
    for line in membership.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top, names = root, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        folder = top / path.lstrip("/")
        for place in (folder, *folder.parents):
            if place == top or top in place.parents:
                limit, used, stat = (_text(place / name) for name in (*names[:2], "memory.stat"))
                left = cgroup_room(limit, used, stat, names[2])
                rooms += [left] if left is not None else []
    return rooms


def cgroup_room(limit: str, used: str, stat: str, prefix: str = "") -> int | None:
    """What one group leaves, from the text of its files; the files that it has cached count as free.

    prefix: of the lines in `memory.stat`, "total_" in version 1.
    """
    if not limit.strip().isdigit() or int(limit) >= NO_LIMIT:
        return None
    cached = sum(_number(stat, f"{prefix}{kind}_file") or 0 for kind in ("active", "inactive"))
    return int(limit) - max(0, int(used or 0) - cached)


def _number(text: str, name: str, unit: int = 1) -> int | None:
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name and words[1].isdigit():
            return int(words[1]) * unit
    return None


def _text(path: Path) -> str:
    """What a file of the kernel says; nothing where there is none, or where it may not be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
