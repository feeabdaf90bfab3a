"""What this node offers and lacks: for Probe, metrics and `luks-csi doctor`."""

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from csi_driver.backends.base import Backend, HasPools, StandsOnClusters
from csi_driver.host import loopcontrol
from csi_driver.host.commands import Commands
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.keyquota import KeyQuota, read_key_quota
from csi_driver.host.log import log
from csi_driver.host.mounts import Mounts
from csi_driver.keys.sources import CheckedEntry
from csi_driver.luks.libcryptsetup import check_library
from csi_driver.luks.mapping import Mappings
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.settings import Service, Settings
from csi_driver.model.volume import mapping_name
from csi_driver.volumes.filesystem import PROGRAMS
from csi_driver.volumes.finding import Finding, look_at
from csi_driver.volumes.stages import Stages

if TYPE_CHECKING:
    from csi_driver.host.machine import Machine

_LEAST_CRYPTSETUP = (2, 6)
_LEAST_KERNEL = (5, 12)
_EPOCH_OF_SENSE = 1_767_225_600  # 2026-01-01: a clock before it was never set
_CAPABILITIES = {"CAP_SYS_ADMIN": 21, "CAP_LINUX_IMMUTABLE": 9}
_GIB = 1 << 30
_RECHECK_SECONDS = 10.0
_COMMAND_SECONDS = 20.0
_KEYS_RUN_OUT = 0.8
_OF_BACKENDS = {"lvm": ("lvm", "thin_check")}


class Health:
    """Looks at the node; nothing here changes it."""

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        stages: Stages,
        commands: Commands,
        mapper: DeviceMapper,
        mappings: Mappings,
        mounts: Mounts,
        check_state: Callable[[], None],
        checked_keys: Callable[[], Sequence[CheckedEntry]],
        machine: "Callable[[], Machine] | None" = None,
        key_quota: Callable[[], KeyQuota] = read_key_quota,
    ) -> None:
        self._settings = settings
        self._backend = backend
        self._stages = stages
        self._commands = commands
        self._mapper = mapper
        self._mappings = mappings
        self._mounts = mounts
        self._check_state = check_state
        self._checked_keys = checked_keys
        self._machine = machine or _machine
        self._key_quota = key_quota
        self._keys_run_out = False
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
                self._warn_of_keys()
                self._checked_at = time.monotonic()
        return self._obstacle

    def findings(self) -> list[Finding]:
        """Everything that is looked at, the fatal ones first; what is kept in a state directory only where one is."""
        checks = (
            *self._fatal_checks(),
            self._cryptsetup,
            self._kernel,
            self._file_systems,
            self._programs,
            *(self._ceph_checks() if isinstance(self._backend, StandsOnClusters) else ()),
            self._permissions,
            self._clock,
            self._memory,
            self._swap,
            self._keys,
            *((self._keys_left,) if Service.NODE in self._settings.services else ()),
            self._kms,
        )
        found = [check() for check in checks]
        if self._settings.state_dir.exists():
            from csi_driver.volumes.storage_health import StorageHealth  # noqa: PLC0415 - a server starts without it

            found += StorageHealth(self._settings, self._backend, self._stages, self._machine).findings()
        return found

    def free_bytes(self) -> int:
        """Room for new volumes above the floor."""
        return self._backend.space().available

    def thin_pool_percent(self) -> int:
        """What is used of the fullest thin pool with volumes, of data or metadata."""
        return self._backend.fullest_pool() if isinstance(self._backend, HasPools) else 0

    def open_mappings(self) -> int:
        """How many mappings of volumes are open on this node."""
        return len({mapping_name(volume_id) for volume_id in self._backend.ids()} & set(self._mappings.names()))

    def root_keys(self) -> int:
        """Keys that count against root's quota."""
        return self._key_quota().keys

    def root_keys_percent(self) -> int:
        """What is used of root's key quota, of keys or bytes, whichever is scarcer."""
        return int(100 * self._key_quota().used)

    def processes(self) -> int:
        """How many processes the driver is made of at this moment."""
        return self._machine().own_processes().count

    def resident_bytes(self) -> int:
        """Their resident memory; what they share is counted in each."""
        return self._machine().own_processes().resident

    def drifted_secrets(self) -> int:
        """How many staged volumes have a secret that no longer opens them."""
        return len(self._stages.drifted())

    def _fatal_checks(self) -> tuple[Callable[[], Finding], ...]:
        if Service.NODE not in self._settings.services:
            return (self._state_dir,)
        return (self._dm_crypt, self._loop, self._library, self._state_dir, self._propagation)

    def _dm_crypt(self) -> Finding:
        def look() -> str:
            return f"device-mapper {self._mapper.version()}, crypt target {self._mapper.target_version('crypt')}"

        return look_at("dm-crypt", look, "load the kernel module dm_crypt on this node (modprobe dm_crypt)")

    def _loop(self) -> Finding:
        def look() -> str:
            loopcontrol.check_control()
            return "the kernel gives out loop devices"

        return look_at("loop devices", look, "load the kernel module loop on this node (modprobe loop)")

    def _library(self) -> Finding:
        return look_at("libcryptsetup", check_library, "install the package cryptsetup-bin, or restart the driver")

    def _state_dir(self) -> Finding:
        path = self._settings.state_dir

        def look() -> str:
            if not path.exists():
                self._check_state()  # it was there when this driver was started
                above = next(parent for parent in path.parents if parent.exists())
                if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
                    raise FailedPrecondition(f"{path} is not there and cannot be made in {above}; name another folder")
                return f"{path} is not there yet; the first start of the driver makes it"
            if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK) or os.statvfs(path).f_flag & os.ST_RDONLY:
                raise FailedPrecondition(f"{path} is no folder that user {os.geteuid()} can write")
            self._check_state()
            return f"{path} can be written"

        return look_at("state directory", look, "make it a writable folder of this node that outlives the driver")

    def _propagation(self) -> Finding:
        path = self._settings.kubelet_dir

        def look() -> str:
            if not path.exists():
                return f"{path} is not there: no kubelet on this node"
            found = self._mounts.propagation(str(path))
            if "shared" not in found:
                raise FailedPrecondition(f"{path} has the mount propagation {found}, so pods would not see mounts")
            return f"{path} is {found}"

        return look_at("mount propagation", look, "mount it with mountPropagation: Bidirectional")

    def _cryptsetup(self) -> Finding:
        def look() -> str:
            said = self._commands.run(["cryptsetup", "--version"], timeout=_COMMAND_SECONDS).stdout.strip()
            if _version(said) < _LEAST_CRYPTSETUP:
                raise FailedPrecondition(f"{said} is older than 2.6")
            return said

        return look_at("cryptsetup", look, "install cryptsetup 2.6 or newer", fatal=False)

    def _kernel(self) -> Finding:
        def look() -> str:
            release = os.uname().release
            if _version(release) < _LEAST_KERNEL:
                raise FailedPrecondition(f"Linux {release} is older than 5.12")
            return f"Linux {release}"

        return look_at("kernel", look, "run Linux 5.12 or newer: read-only publishing needs it", fatal=False)

    def _file_systems(self) -> Finding:
        def look() -> str:
            if unknown := [fs_type for fs_type in PROGRAMS if not self._mounts.knows(fs_type)]:
                raise FailedPrecondition(f"the kernel cannot mount {', '.join(unknown)}")
            return f"the kernel mounts {', '.join(PROGRAMS)}"

        return look_at("file systems", look, "load these kernel modules if volumes are to have them", fatal=False)

    def _programs(self) -> Finding:
        def look() -> str:
            wanted = [program for programs in PROGRAMS.values() for program in programs]
            wanted += _OF_BACKENDS.get(self._backend.name, ())
            if absent := [program for program in wanted if not self._commands.has(program)]:
                raise FailedPrecondition(f"not installed: {', '.join(absent)}")
            return ", ".join(wanted)

        return look_at("programs", look, "install the packages that hold them", fatal=False)

    def _ceph_checks(self) -> Sequence[Callable[[], Finding]]:
        everywhere = (self._ceph, self._clusters)
        return (*everywhere, self._krbd) if Service.NODE in self._settings.services else everywhere

    def _clusters(self) -> Finding:
        def look() -> str:
            return self._backend.reached() if isinstance(self._backend, StandsOnClusters) else ""

        return look_at("clusters", look, "look at 'ceph status' and at the network of this node", fatal=False)

    def _ceph(self) -> Finding:
        from csi_driver.backends.librbd import version  # noqa: PLC0415 - who has no Ceph pays nothing for it

        return look_at("ceph", version, "install the package librbd1", fatal=False)

    def _krbd(self) -> Finding:
        from csi_driver.host.krbd import MappedImages  # noqa: PLC0415 - who has no Ceph pays nothing for it

        def look() -> str:
            if not MappedImages().is_loaded:
                raise FailedPrecondition("the kernel's module rbd is not loaded, and the first volume has to load it")
            return "the kernel maps images of Ceph"

        advice = "load it on this node (modprobe rbd) and at each boot; else the driver needs kmod and /lib/modules"
        return look_at("krbd", look, advice, fatal=False)

    def _permissions(self) -> Finding:
        def look() -> str:
            if os.geteuid() != 0:
                raise FailedPrecondition(f"this runs as user {os.geteuid()}")
            held = _effective_capabilities()
            if lacking := [name for name, bit in _CAPABILITIES.items() if not held >> bit & 1]:
                raise FailedPrecondition(f"this runs as root without {' and '.join(lacking)}")
            return f"this runs as root with {' and '.join(_CAPABILITIES)}"

        return look_at("permissions", look, "run the node service as root in a privileged container", fatal=False)

    def _clock(self) -> Finding:
        def look() -> str:
            if time.time() < _EPOCH_OF_SENSE:
                raise FailedPrecondition(f"the clock says {time.strftime('%Y-%m-%d')}")
            return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

        return look_at("clock", look, "let the node's clock be set (NTP)", fatal=False)

    def _swap(self) -> Finding:
        def look() -> str:
            swap = self._machine().swap()
            if swap.plain:
                raise FailedPrecondition(
                    f"{swap.total / _GIB:.1f} GiB of swap are on and may receive pages of a process that holds a "
                    f"passphrase: {', '.join(swap.plain)} is not known to be encrypted"
                )
            return f"{swap.total / _GIB:.1f} GiB of swap, encrypted or in memory" if swap.total else "no swap"

        return look_at("swap", look, "turn swap off or encrypt it", fatal=False)

    def _memory(self) -> Finding:
        limits = self._settings.limits

        def look() -> str:
            wanted, available = (
                limits.unlocks_at_once * limits.pbkdf_memory_kib << 10,
                self._machine().available_memory(),
            )
            told = (
                f"{limits.unlocks_at_once} key derivations at once of up to {limits.pbkdf_memory_kib >> 10} MiB, and "
                f"{available / _GIB:.1f} GiB of memory are available"
            )
            if wanted > available:
                raise FailedPrecondition(told)
            return told

        return look_at("memory", look, "lower --pbkdf-memory-limit or --unlocks-at-once", fatal=False)

    def _keys(self) -> Finding:
        def look() -> str:
            quota = self._key_quota()
            if quota.used >= _KEYS_RUN_OUT:
                raise FailedPrecondition(f"{quota}: when one is used up no volume can be staged")
            return str(quota)

        return look_at(
            "kernel keys", look, "raise kernel.keys.root_maxkeys and kernel.keys.root_maxbytes (sysctl)", fatal=False
        )

    def _keys_left(self) -> Finding:
        def look() -> str:
            if left := self._mappings.keys_left():
                told = ", ".join(f"{name} in keyring {serial:#x}" for name, serial in sorted(left.items()))
                raise FailedPrecondition(f"of volumes that are not open root keeps the volume keys {told}")
            return "none is kept of a volume that is not open"

        return look_at(
            "keys left", look, "take each out: keyctl unlink <the number of its keyring> @u (keyctl(1))", fatal=False
        )

    def _kms(self) -> Finding:
        def look() -> str:
            found = self._checked_keys()
            if failed := [f"{one.kms_id}: {one.found}" for one in found if one.works is False]:
                raise FailedPrecondition("; ".join(failed))
            return ", ".join(f"{one.kms_id} ({one.found})" for one in found) or "none is configured"

        return look_at("KMS", look, "correct the KMS configuration; volumes that are open go on", fatal=False)

    def _warn_of_keys(self) -> None:
        finding = self._keys()
        if not finding.ok and not self._keys_run_out:
            log.warning("kernel keys run out", found=finding.found, advice=finding.advice)
        self._keys_run_out = not finding.ok


def _machine() -> "Machine":
    from csi_driver.host.machine import Machine  # noqa: PLC0415 - psutil: not at start, not for a call that goes well

    return Machine()


def _effective_capabilities() -> int:
    """The capability set of proc_pid_status(5) as a bit mask."""
    with open("/proc/self/status", "rb") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith(b"CapEff:"))


def _version(text: str) -> tuple[int, ...]:
    found = re.search(r"(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else (0, 0)
