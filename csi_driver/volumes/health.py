"""What this node offers and lacks: for Probe, metrics and `luks-csi doctor`."""

import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from csi_driver.backends.base import Backend
from csi_driver.host.commands import Commands
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.hardening import swap_active
from csi_driver.host.mounts import Mounts
from csi_driver.host.workers import Workers
from csi_driver.luks.libcryptsetup import check_library
from csi_driver.luks.mapping import Mappings
from csi_driver.model.errors import DriverError, FailedPrecondition
from csi_driver.model.settings import Settings
from csi_driver.model.volume import mapping_name

_LEAST_CRYPTSETUP = (2, 6)
_LEAST_KERNEL = (5, 12)
_EPOCH_OF_SENSE = 1_767_225_600  # 2026-01-01: a clock before it was never set
_RECHECK_SECONDS = 10.0
_COMMAND_SECONDS = 20.0


@dataclass(frozen=True)
class Finding:
    """One look at the node. `fatal` ones stop staging; only they make Probe fail."""

    name: str
    ok: bool
    fatal: bool
    found: str
    advice: str = ""


class Health:
    """Looks at the node; nothing here changes it."""

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        workers: Workers,
        commands: Commands,
        mapper: DeviceMapper,
        mappings: Mappings,
        mounts: Mounts,
    ) -> None:
        self._settings = settings
        self._backend = backend
        self._workers = workers
        self._commands = commands
        self._mapper = mapper
        self._mappings = mappings
        self._mounts = mounts
        self._guard = threading.Lock()
        self._checked_at = -_RECHECK_SECONDS
        self._obstacle: str | None = None

    def obstacle(self) -> str | None:
        """What stops staging for good or may be mended by a restart, in one sentence; asked anew every 10 s.

        A full disk or a wrong clock is none: they must never restart the one process that can unstage.
        """
        if time.monotonic() - self._checked_at < _RECHECK_SECONDS:
            return self._obstacle
        with self._guard:
            if time.monotonic() - self._checked_at >= _RECHECK_SECONDS:
                failed = [finding for check in self._fatal_checks() if not (finding := check()).ok]
                self._obstacle = "; ".join(f"{one.name}: {one.found}; {one.advice}" for one in failed) or None
                self._checked_at = time.monotonic()
        return self._obstacle

    def findings(self) -> list[Finding]:
        """Everything that is looked at, the fatal ones first."""
        checks = (
            *self._fatal_checks(),
            self._cryptsetup,
            self._kernel,
            self._permissions,
            self._space,
            self._clock,
            self._swap,
            self._orphans,
            self._unknown_mappings,
        )
        return [check() for check in checks]

    def free_bytes(self) -> int:
        """Room for new volumes above the floor."""
        return self._backend.space().available

    def open_mappings(self) -> int:
        """How many mappings of volumes are open on this node."""
        return sum(name.startswith(mapping_name("")) for name in self._mappings.names())

    def _fatal_checks(self) -> tuple[Callable[[], Finding], ...]:
        return (self._dm_crypt, self._library, self._state_dir, self._propagation)

    def _dm_crypt(self) -> Finding:
        def look() -> str:
            return f"device-mapper {self._mapper.version()}, crypt target {self._mapper.target_version('crypt')}"

        return _finding("dm-crypt", look, "load the kernel module dm_crypt on this node (modprobe dm_crypt)")

    def _library(self) -> Finding:
        def look() -> str:
            return self._workers.call("luks-check of the worker", _COMMAND_SECONDS, check_library)

        return _finding("libcryptsetup", look, "install the package cryptsetup-bin, or restart the driver")

    def _state_dir(self) -> Finding:
        path = self._settings.state_dir

        def look() -> str:
            if not os.access(path, os.W_OK | os.X_OK) or os.statvfs(path).f_flag & os.ST_RDONLY:
                raise FailedPrecondition(f"{path} cannot be written")
            return f"{path} can be written"

        return _finding("state directory", look, "make it a writable folder of this node that outlives the driver")

    def _propagation(self) -> Finding:
        path = self._settings.kubelet_dir

        def look() -> str:
            if not path.exists():
                return f"{path} is not there: no kubelet on this node"
            found = self._mounts.propagation(str(path))
            if "shared" not in found:
                raise FailedPrecondition(f"{path} has the mount propagation {found}, so pods would not see mounts")
            return f"{path} is {found}"

        return _finding("mount propagation", look, "mount it with mountPropagation: Bidirectional")

    def _cryptsetup(self) -> Finding:
        def look() -> str:
            said = self._commands.run(["cryptsetup", "--version"], timeout=_COMMAND_SECONDS).stdout.strip()
            if _version(said) < _LEAST_CRYPTSETUP:
                raise FailedPrecondition(f"{said} is older than 2.6")
            return said

        return _finding("cryptsetup", look, "install cryptsetup 2.6 or newer", fatal=False)

    def _kernel(self) -> Finding:
        def look() -> str:
            release = os.uname().release
            if _version(release) < _LEAST_KERNEL:
                raise FailedPrecondition(f"Linux {release} is older than 5.12")
            return f"Linux {release}"

        return _finding("kernel", look, "run Linux 5.12 or newer: read-only publishing needs it", fatal=False)

    def _permissions(self) -> Finding:
        def look() -> str:
            if os.geteuid() != 0:
                raise FailedPrecondition(f"the driver runs as user {os.geteuid()}")
            return "the driver runs as root"

        return _finding("permissions", look, "run the node service as root in a privileged container", fatal=False)

    def _space(self) -> Finding:
        def look() -> str:
            space = self._backend.space()
            if space.available == 0:
                raise FailedPrecondition(f"nothing is free above the floor of {self._settings.free_space_floor} bytes")
            return f"{space.available} of {space.total} bytes are free above the floor"

        return _finding("free space", look, "free space there; no volume can be made or enlarged", fatal=False)

    def _clock(self) -> Finding:
        def look() -> str:
            if time.time() < _EPOCH_OF_SENSE:
                raise FailedPrecondition(f"the clock says {time.strftime('%Y-%m-%d')}")
            return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

        return _finding("clock", look, "let the node's clock be set (NTP)", fatal=False)

    def _swap(self) -> Finding:
        def look() -> str:
            if swap_active():
                raise FailedPrecondition("swap is on and may receive pages of a process that holds a passphrase")
            return "no swap"

        return _finding("swap", look, "turn swap off or encrypt it", fatal=False)

    def _orphans(self) -> Finding:
        def look() -> str:
            if orphans := self._backend.orphans():
                raise FailedPrecondition(f"{len(orphans)} leftovers of killed calls: {', '.join(orphans[:5])}")
            return "none"

        return _finding("orphans", look, "look at them, then run `luks-csi orphans remove`", fatal=False)

    def _unknown_mappings(self) -> Finding:
        def look() -> str:
            known = {mapping_name(volume_id) for volume_id in self._backend.ids()}
            names = [name for name in self._mappings.names() if name.startswith(mapping_name("")) and name not in known]
            if names:
                raise FailedPrecondition(f"open mappings without a volume: {', '.join(names[:5])}")
            return "all mappings belong to volumes"

        return _finding("mappings", look, "close each with `cryptsetup close` if nothing needs it", fatal=False)


def _finding(name: str, look: Callable[[], str], advice: str, *, fatal: bool = True) -> Finding:
    try:
        return Finding(name, ok=True, fatal=fatal, found=look())
    except (DriverError, OSError) as error:
        return Finding(name, ok=False, fatal=fatal, found=str(error), advice=advice)


def _version(text: str) -> tuple[int, ...]:
    found = re.search(r"(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else (0, 0)
