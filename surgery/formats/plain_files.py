"""Read plain files, and nothing else that a path may lead to.

Only regular files are read: a pipe would block, a device has no end, and a link may lead anywhere.
Links of a download cache of the Hugging Face hub are followed, from ``snapshots/`` to the
``blobs/`` beside it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from surgery.errors import StoreError, shown


def contents(path: Path, at_most: int | None = None) -> bytes | None:
    """Return the bytes of a plain file; None if there is no such file.

    Raises:
        StoreError: it is a link, a pipe, a device or a folder, too large, or cannot be read.
    """
    try:
        if path.is_symlink() and _is_link_of_hub(path):
            path = path.resolve()
        if not stat.S_ISREG(path.lstat().st_mode):  # before it is opened: a device may act on that
            raise StoreError(
                f"{path} is not a plain file. An adapter consists of plain files: copy them, "
                "not links to them."
            )
        handle = os.open(
            path, os.O_RDONLY | _flag("NOFOLLOW") | _flag("NONBLOCK") | _flag("BINARY")
        )
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if at_most is not None and found.st_size > at_most:
                raise StoreError(
                    f"{path} has {found.st_size:,} bytes, more than the {at_most:,} that a file of "
                    "an adapter for this model may have."
                )
            return file.read(found.st_size)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RuntimeError, MemoryError) as error:  # as of links in a circle
        raise StoreError(f"{path} cannot be read ({shown(error)}).") from error


def _flag(name: str) -> int:
    """Return a flag of ``os.open``; 0 on systems that lack it."""
    return int(getattr(os, f"O_{name}", 0))


def _is_link_of_hub(path: Path) -> bool:
    """Whether a link leads from a snapshot of the hub's cache to the blobs of that cache."""
    snapshots = [p for p in path.parent.resolve().parents if p.name == "snapshots"]
    return path.resolve().parent in [p.with_name("blobs") for p in snapshots]
