"""Whether the state directory is the one that it was: a disk that is not mounted leaves an empty folder in its place.

<state-dir>/identity        a random id, made once; it tells one state directory from another
<endpoint>.identity         the same and its path, kept beside the socket: which one this driver had at its last start
"""

import os
import uuid
from pathlib import Path

import msgspec

from csi_driver.host.files import Files, read_file
from csi_driver.host.log import log
from csi_driver.host.mounts import Mounts
from csi_driver.host.syscalls import error_name
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.reading import decode

_VERSION = 1
_NAME = "identity"
NODE_MOUNTS = "/proc/1/mountinfo"
"""The mounts of the node, seen from a container too as long as it shares the node's process ids (proc(5))."""


class _Identity(msgspec.Struct, frozen=True, omit_defaults=True):
    version: int
    id: str
    path: str | None = None


class StateDirectory:
    """The folder at `path`, remembered beside the socket `endpoint`.

    With `require_mount` something must be mounted at the path itself, on the node and not just in the driver's
    container. `check` costs one stat.
    """

    def __init__(
        self, path: Path, endpoint: Path, files: Files, mounts: Mounts, node_mounts: Mounts, *, require_mount: bool
    ) -> None:
        self._path = path
        self._marker = path / _NAME
        self._memory = _memory(endpoint)
        self._files = files
        self._mounts = mounts
        self._node_mounts = node_mounts
        self._require_mount = require_mount
        self._seen: tuple[int, int] | None = None

    def start(self) -> None:
        """Make the folder and its marker if they are new, else see that it is the remembered one.

        Nothing is made in place of a folder that is remembered or must be mounted. Raises FailedPrecondition.
        """
        if self._require_mount:
            self._refuse_unmounted()
        remembered = _read(self._memory)
        if remembered is None:
            self._make()
        found = self._compared(remembered)
        fresh = _Identity(_VERSION, found.id, str(self._path))
        if fresh != remembered:
            self._remember(fresh)
        self._seen = self._look()

    def refuse_other(self) -> None:
        """For commands beside the server: raise FailedPrecondition when it had another state directory at this path.

        Nothing is made. Where no server has started, or its memory cannot be read, nothing is known.
        """
        try:
            remembered = _read(self._memory)
        except FailedPrecondition:
            return
        if remembered is not None and remembered.path == str(self._path):
            self._compared(remembered)

    def check(self) -> None:
        """Raise FailedPrecondition when the path no longer shows the folder that it did at `start`."""
        if self._seen is not None and self._look() != self._seen:
            raise FailedPrecondition(
                f"the state directory {self._path} is not the one that this driver was started with: its disk was "
                f"unmounted, or something was mounted over it; undo that, or start the driver anew when its disk is "
                f"mounted"
            )

    def _compared(self, remembered: _Identity | None) -> _Identity:
        found = _read(self._marker)
        if found is None or (remembered is not None and remembered.id != found.id):
            raise FailedPrecondition(
                f"the state directory {self._path} is not the one that this driver had: expected the identity "
                f"{_told(remembered)}, found {_told(found)}; mount its disk there, or, if it is meant to be a new one, "
                f"remove {self._memory}"
            )
        return found

    def _look(self) -> tuple[int, int] | None:
        """Device and inode of the marker; None where there is none, or none that can be looked at."""
        try:
            found = self._marker.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _refuse_unmounted(self) -> None:
        try:
            here, there = (mounts.at(os.path.realpath(self._path)) for mounts in (self._mounts, self._node_mounts))
        except OSError as error:
            raise FailedPrecondition(
                f"the node's mounts cannot be read ({error_name(error)}), so nobody knows whether the state directory "
                f"{self._path} is one; run the driver with the node's process ids, or without --require-mount"
            ) from None
        if here is None or there is None or (here.device, here.root) != (there.device, there.root):
            raise FailedPrecondition(
                f"the state directory {self._path} must be a mount of the node and is none; mount its disk there, or "
                f"start the driver without --require-mount"
            )

    def _make(self) -> None:
        """Make the folder and the marker. Of servers that start at once the first one's marker stays."""
        identity = _Identity(_VERSION, str(uuid.uuid4()))
        fresh = self._path / f".{_NAME}.{identity.id}"
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._marker.exists():
                return
            self._files.fill(fresh, msgspec.json.encode(identity), durable=True)
            try:
                os.link(fresh, self._marker)
            except FileExistsError:
                pass
            finally:
                self._files.remove(fresh)
            self._files.sync_folder(self._path)
            log.info("state directory taken as new", state_dir=str(self._path), identity=identity.id)
        except OSError as error:
            raise FailedPrecondition(
                f"the state directory {self._path} cannot be made ({error_name(error)}); make it a writable folder"
            ) from None

    def _remember(self, identity: _Identity) -> None:
        try:
            self._memory.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            self._files.write(self._memory, msgspec.json.encode(identity))
        except OSError as error:
            raise FailedPrecondition(
                f"{self._memory} cannot be written ({error_name(error)}); choose an endpoint in a writable folder"
            ) from None


def server_state_dir(endpoint: Path, told: Path | None, usual: Path) -> Path:
    """The state directory of the server at `endpoint`: `told` if given, else the one it remembers, else the usual one.

    Raises FailedPrecondition when that is not the one that the server had when it last started.
    """
    remembered = _read(_memory(endpoint))
    folder = told or Path((remembered.path if remembered else "") or usual)
    if remembered is not None:
        found = _read(folder / _NAME)
        if found is None or found.id != remembered.id:
            raise FailedPrecondition(
                f"{folder} is not the state directory of the server at {endpoint}; name that with --state-dir"
            )
    return folder


def identity_of(state_dir: Path) -> str:
    """The random id of a state directory. Raises FailedPrecondition where a server never had one there."""
    found = _read(state_dir / _NAME)
    if found is None:
        raise FailedPrecondition(f"{state_dir} is no state directory: {_NAME} is absent; start the server on it")
    return found.id


def _memory(endpoint: Path) -> Path:
    return endpoint.with_name(f"{endpoint.name}.{_NAME}")


def _read(path: Path) -> _Identity | None:
    """The identity in a file, None where there is none. Raises FailedPrecondition."""
    try:
        found = decode(read_file(path), _Identity)
        if found.version != _VERSION:
            raise FailedPrecondition(
                f"{path} has version {found.version} and this driver knows {_VERSION}; use the driver that wrote it"
            )
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeError) as error:
        said = error_name(error) if isinstance(error, OSError) else "it holds something else"
        raise FailedPrecondition(
            f"{path} cannot be read as the identity of a state directory ({said}); restore it, or remove it if the "
            f"state directory is known to be the right one"
        ) from None
    return found


def _told(identity: _Identity | None) -> str:
    return identity.id if identity else "none"
