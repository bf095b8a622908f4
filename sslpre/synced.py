"""Writing that is on the disk when it says so: file contents first, then the folder that names the file."""

import os
import sys
import uuid
from pathlib import Path


def write_synced(path: Path, data: bytes) -> None:
    """Write a file with the umask's mode and wait until its bytes are on the disk."""
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk: after a rename, before it is relied on."""
    if sys.platform == "win32":
        return  # a folder cannot be opened there, and renames are already journalled
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and make the folders above it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        write_synced(temporary, data)
        temporary.rename(path)
    except BaseException:  # Ctrl-C too: nothing half made stays
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
