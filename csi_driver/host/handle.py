"""Open descriptors of what is worked on, in the place of names.

A name can come to mean something else between a check and its use: the number of a loop device goes to the next file as
soon as nobody has it open. What was opened stays what it was.
"""

import os
from types import TracebackType
from typing import Final, Self

from csi_driver.host.log import log
from csi_driver.host.patience import within

_CLOSE_SECONDS: Final = 2.0


class Handle(os.PathLike[str]):
    """An open block device or file; `name` is what people call it. Use it as a context manager, or `close` it.

    As an argument of `Workers.call` it takes its descriptor along to the worker, and in the argv of a program to that.
    """

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name

    @property
    def path(self) -> str:
        """The path by which this process, and a child that inherits the descriptor, opens the very same thing."""
        return f"/proc/self/fd/{self.fd}"

    @property
    def number(self) -> tuple[int, int]:
        """(major, minor) of the block device."""
        device = os.fstat(self.fd).st_rdev
        return os.major(device), os.minor(device)

    @property
    def major(self) -> int:
        """Major number of the block device."""
        return self.number[0]

    @property
    def minor(self) -> int:
        """Minor number of the block device."""
        return self.number[1]

    def close(self) -> None:
        """Close it; again is fine."""
        descriptor, self.fd = self.fd, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_handle(path: str, flags: int) -> Handle:
    """Open `path`, never following a link at its end. Raises OSError."""
    return Handle(os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW), path)


def let_go(device: Handle) -> None:
    """Close a device after an error. The last close waits for I/O under way, which need not end: not our time limit."""

    def close() -> bool:
        device.close()
        return True

    if not within(_CLOSE_SECONDS, close):
        log.warning("a device does not answer and stays open until it does", device=device.name)
