"""How much is free, in bytes: memory for this process, by all that may limit it, and a disk's space; and taking it."""

from __future__ import annotations

import os
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
PIECE = 1 << 30  # bytes of a file that are reserved in one call, which no signal interrupts
NO_LIMIT = 1 << 60  # version 1 writes a number near 2**63 where there is no limit


def memory() -> int | None:
    """Memory that this process can take without swapping or being killed; None where the system does not say.

    Where the kernel has no word for it, half of what the machine has.
    """
    free, whole = available(_text(PROC / "meminfo")), physical()
    if free is None and whole is not None:
        free = whole // 2
    limits = [free, address_space(), *cgroup_rooms(_text(PROC / "self/cgroup"))]
    if _text(PROC / "sys/vm/overcommit_memory").strip() == "2":  # then no more is given than can be kept
        limits.append(promisable(_text(PROC / "meminfo")))
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else None


def promisable(meminfo: str) -> int | None:
    """What CommitLimit leaves, of the text of /proc/meminfo."""
    limit, given = (_number(meminfo, name, 1024) for name in ("CommitLimit:", "Committed_AS:"))
    return None if limit is None or given is None else max(0, limit - given)


def physical() -> int | None:
    """All memory of the machine; None where the system does not say."""
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no such call, other systems not every name
        return None
    return pages * size if pages > 0 and size > 0 else None


def reserve(fd: int, total: int) -> None:
    """Make the file `total` bytes long, with space on the disk for all of them; what is in it stays. Raises OSError.

    In pieces, between which Ctrl-C is heard; a file that was left half done goes on where it ends. A system without
    `posix_fallocate` writes zeros from the end of the file on.
    """
    if hasattr(os, "posix_fallocate"):
        for at in range(0, total, PIECE):
            os.posix_fallocate(fd, at, min(PIECE, total - at))
        return
    zeros, at = bytes(1 << 20), os.fstat(fd).st_size
    while at < total:
        at += os.pwrite(fd, zeros[: total - at], at)


def disk(path: Path) -> int:
    """Free bytes, for one who is not root, on the disk that `path` is or would be on. Raises OSError."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    free = os.statvfs(place)
    return free.f_bavail * free.f_frsize


def amount(count: float) -> str:
    """Bytes in words: 196 MB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:,.1f} {unit}" if count < 9.95 and unit != "bytes" else f"{count:,.0f} {unit}"


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
