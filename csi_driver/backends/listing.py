"""The names in a folder that holds many."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# Two changes within one tick of the file system's clock leave the same time: a tick has up to 2 s on coarse ones.
_SETTLED_NS = 3_000_000_000


class SortedNames:
    """The names in `folder`, in order, read anew only when the folder has changed; safe for many threads.

    Whatever is made, renamed or removed in a folder, by hand too, changes its ctime (inode(7)), which nobody can set
    back. `clock` tells the time of day in nanoseconds.
    """

    def __init__(self, folder: Path, clock: Callable[[], int] = time.time_ns) -> None:
        self._folder = folder
        self._clock = clock
        self._kept: tuple[tuple[int, int, int], Sequence[str]] | None = None

    def read(self) -> Sequence[str]:
        """All names that are there now. Raises OSError."""
        # Looked at before it is read: a change in between makes the next look differ.
        now, found = self._clock(), os.stat(self._folder)
        look = (found.st_dev, found.st_ino, found.st_ctime_ns)
        if (kept := self._kept) is not None and kept[0] == look:
            return kept[1]
        names = tuple(sorted(os.listdir(self._folder)))
        if now - found.st_ctime_ns > _SETTLED_NS:
            self._kept = look, names
        return names
