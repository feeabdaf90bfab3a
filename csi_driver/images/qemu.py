"""The payload of a qcow2, vmdk, vhdx, vhd or vdi image, by a qemu-nbd that is locked up (`csi_driver.images.sandbox`).

The file's headers were checked before (csi_driver.images.formats); its format is named to qemu-nbd, which probes
nothing. What checks may have missed meets a program that can read this one file and write none.
"""

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from csi_driver.host.commands import run_program
from csi_driver.images.base import Extent, ImageFormat
from csi_driver.images.nbd import NbdConnection, printable
from csi_driver.images.sandbox import IMAGE, MESSAGE_BYTES, NO_SANDBOX, Sandbox
from csi_driver.images.source import open_regular
from csi_driver.model.errors import DeviceUnreadable, DriverError, FailedPrecondition, InvalidArgument

PROGRAM: Final = "/usr/bin/qemu-nbd"

# How the format is named to qemu-nbd. Which of a vhd's two sizes counts, qemu would guess by who made it.
_OPENED: Final = {
    ImageFormat.QCOW2: ("--format=qcow2", IMAGE),
    ImageFormat.VMDK: ("--format=vmdk", IMAGE),
    ImageFormat.VHDX: ("--format=vhdx", IMAGE),
    ImageFormat.VHD: (
        "--image-opts", f"driver=vpc,force_size_calc=current_size,file.driver=file,file.filename={IMAGE}",
    ),
    ImageFormat.VDI: ("--format=vdi", IMAGE),
}  # fmt: skip
# qemu-nbd allocates a buffer for each request. By default one of this size is given back to the kernel each time, and
# getting its pages anew is a third of the time; larger ones, kept, fragment its memory (mallopt(3)).
_REQUEST_BYTES: Final = 1 << 20
_ENVIRONMENT: Final = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 20),
}
_LINKER_CACHE: Final = "/etc/ld.so.cache"
_MEMORY: Final = 1 << 30
_CPU_SECONDS: Final = 600
_BYTES_PER_CPU_SECOND: Final = 128 << 10  # of the file: compressed, they may stand for a thousand times as many
_STATUS_BYTES: Final = 1 << 30
_FORGET_BYTES: Final = 64 << 20
_START_SECONDS: Final = 30.0
_TELL_SECONDS: Final = 1.0
_END_SECONDS: Final = 5.0
_LDD_SECONDS: Final = 10.0


class QemuReader:
    """Reads the payload of the image at `path` through a qemu-nbd of its own, over `connections` connections.

    `where` names the image in errors. As many threads as there are connections read at once; more wait. Each answer
    may take `timeout` seconds. The size is the format's: a multiple of 512 bytes. qemu tells no holes of a vhdx: it is
    all data.

    The constructor raises InvalidArgument when qemu-nbd refuses the file or it is no regular file of one of these
    formats, FailedPrecondition where no sandbox can be made (not root, qemu-nbd missing, no namespaces), and
    DeviceUnreadable.
    """

    def __init__(
        self,
        path: str,
        image_format: ImageFormat,
        where: str,
        *,
        connections: int = 4,
        timeout: float = 60.0,
        program: str = PROGRAM,
    ) -> None:
        if image_format not in _OPENED:
            raise InvalidArgument(f"{where} is {image_format} and needs no qemu-nbd; read it as it is")
        self._where = where
        self._format = image_format
        self._timeout = timeout
        self._guard = threading.Lock()
        self._unforgotten = 0
        self._end: _End | None = None
        self._connections: list[NbdConnection] = []
        self._idle: queue.SimpleQueue[NbdConnection] = queue.SimpleQueue()
        self._resources = contextlib.ExitStack()
        files = program_files(program, where)
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._descriptor = open_regular(path, where)
            self._resources.callback(os.close, self._descriptor)
            argv = (program, "--read-only", f"--shared={connections}", *_OPENED[image_format])
            self._connect(argv, files, connections)
            undo.pop_all()

    @property
    def size(self) -> int:
        return self._connections[0].size

    def extents(self) -> Iterator[Extent]:
        """The whole payload in order; neighbours of one kind come as one, but for where a question ended."""
        offset = 0
        while offset < self.size:
            with self._connection() as connection:
                found = connection.block_status(offset, min(_STATUS_BYTES, self.size - offset))
            merged = found[0]
            for extent in found[1:]:
                if extent.zero == merged.zero:
                    merged = Extent(merged.offset, merged.length + extent.length, extent.zero)
                else:
                    yield merged
                    merged = extent
            yield merged
            offset = merged.offset + merged.length

    def read_into(self, offset: int, buffer: memoryview) -> None:
        with self._connection() as connection:
            for start in range(0, len(buffer), _REQUEST_BYTES):
                connection.read_into(offset + start, buffer[start : start + _REQUEST_BYTES])
        self._forget(len(buffer))

    def close(self) -> None:
        """Hang up, and end qemu-nbd and its sandbox; reads of other threads fail."""
        for connection in self._connections:
            connection.close()
        self._resources.close()

    def _connect(self, argv: tuple[str, ...], files: tuple[str, ...], connections: int) -> None:
        """Start qemu-nbd in its sandbox and shake hands on every connection."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_START_SECONDS)
        sandbox = Sandbox(
            control=theirs.fileno(),
            image=self._descriptor,
            parent=os.getpid(),
            argv=argv,
            environment=_ENVIRONMENT,
            files=files,
            connections=connections,
            memory=_MEMORY,
            cpu_seconds=_CPU_SECONDS + os.fstat(self._descriptor).st_size // _BYTES_PER_CPU_SECOND,
        )
        with theirs:
            warden = subprocess.Popen(
                [sys.executable, "-I", "-m", "csi_driver.images.sandbox", sandbox.encode()],
                pass_fds=(sandbox.control, sandbox.image),
                stdin=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # a terminal's Ctrl-C is for us alone
            )
        self._resources.callback(_wait, warden)
        self._resources.callback(self._control.close)  # before the wait: that is how the warden is told
        try:
            content, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE_BYTES, connections)
        except TimeoutError:
            raise DeviceUnreadable(
                f"the sandbox for {self._where} was not ready within {_START_SECONDS:g} s; look for a stuck storage"
            ) from None
        channels = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        for channel in channels:
            self._resources.callback(channel.close)
        if len(channels) != connections:
            raise self._no_sandbox(json.loads(content)["error"] if content else "its process ended")
        try:
            for channel in channels:
                self._connections.append(NbdConnection(channel, self._where, self._timeout))
        except DeviceUnreadable as error:
            raise self._refused() or error from None
        if len({connection.size for connection in self._connections}) != 1:
            raise DeviceUnreadable(f"{self._where} cannot be read: its size changes from one look to the next")
        for connection in self._connections:
            self._idle.put(connection)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[NbdConnection]:
        """A connection for one request. A broken one goes back too: whoever gets it fails at once."""
        try:
            connection = self._idle.get(timeout=2 * self._timeout)
        except queue.Empty:
            raise DeviceUnreadable(
                f"{self._where} cannot be read: no connection to qemu-nbd was free for {2 * self._timeout:g} s"
            ) from None
        try:
            yield connection
        except DeviceUnreadable as error:
            if connection.hung_up and (ended := self._ended()):
                raise DeviceUnreadable(f"{self._where} cannot be read: {ended}") from error
            raise
        finally:
            self._idle.put(connection)

    def _forget(self, count: int) -> None:
        """Take what was read out of the page cache from time to time: which part of the file it was, qemu-nbd knows."""
        with self._guard:
            self._unforgotten += count
            if self._unforgotten < _FORGET_BYTES:
                return
            self._unforgotten = 0
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def _refused(self) -> DriverError | None:
        """Why qemu-nbd ended before it served anything; None when it did not end."""
        ended = self._ended()
        if ended is None:
            return None
        if ended.code == NO_SANDBOX:
            return self._no_sandbox(ended.said)
        return InvalidArgument(f"{self._where} cannot be read as {self._format}: {ended}; use an image that is whole")

    def _no_sandbox(self, cause: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"{self._where} cannot be read: no sandbox could be made for qemu-nbd ({cause}); run as root with all "
            f"capabilities on Linux 5.12 or newer"
        )

    def _ended(self) -> "_End | None":
        """How qemu-nbd ended, None while it runs; the warden tells a moment after the connections broke."""
        with self._guard:
            if self._end is None:
                with contextlib.suppress(OSError):  # it runs still, or this reader was closed
                    self._control.settimeout(_TELL_SECONDS)
                    if answer := self._control.recv(MESSAGE_BYTES):
                        self._end = _End(**json.loads(answer))
            return self._end


@dataclass(frozen=True)
class _End:
    """How the program ended, and the end of what it wrote."""

    code: int
    said: str

    def __str__(self) -> str:
        said = printable(self.said.strip().splitlines()[-1].encode()) if self.said.strip() else "nothing on stderr"
        how = f"was ended by signal {-self.code}" if self.code < 0 else f"ended with exit code {self.code}"
        return f"qemu-nbd {how}: {said}"


def program_files(program: str, where: str) -> tuple[str, ...]:
    """The program, the libraries that it was linked with, and the list in which the linker looks them up."""
    if os.geteuid() != 0:
        raise FailedPrecondition(f"{where} can only be read by root, as qemu-nbd is locked up for it; run as root")
    if not os.access(program, os.X_OK):
        raise FailedPrecondition(f"{where} cannot be read without {program}; install the package qemu-utils")
    listed = run_program(["ldd", program], timeout=_LDD_SECONDS).stdout
    libraries = [word for line in listed.splitlines() for word in line.split() if word.startswith("/")]
    cache = [_LINKER_CACHE] if os.path.exists(_LINKER_CACHE) else []
    return program, *libraries, *cache


def _wait(warden: "subprocess.Popen[bytes]") -> None:
    """See the warden off, who was told to end; one that a dead storage holds up is left to the kernel."""
    try:
        warden.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        warden.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            warden.wait(_END_SECONDS)
