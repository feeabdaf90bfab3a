"""A node in the guest: the driver behind its gRPC server, a client, and eyes of its own for what is on the disk."""

import os
import struct
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from csi_driver.backends.base import movable
from csi_driver.host import blockdev
from csi_driver.keys.secret import read_secret
from csi_driver.luks.device import read_header
from csi_driver.model.errors import DriverError, NotFound
from csi_driver.model.settings import Settings
from csi_driver.model.volume import VolumeRecord
from csi_driver.rpc.client import CsiClient, RemoteError, RemoteVolume
from csi_driver.rpc.server import driver_server
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.conversion import Watch
from csi_driver.volumes.driver import Driver, Host, build_driver
from tests.keys.program import program
from tests.machine.crash_log import Identity, Kind
from tests.machine.storage import FolderStorage, LoopfileStorage

_CALL_SECONDS = 60.0
_START_SECONDS = 60.0
_BUSY_SECONDS = 5.0
_PAUSE = 0.02
_SECRET = {"CRYPTO_KEY_VALUE": "the passphrase of the crash tests"}
_PARAMETERS = {"pbkdf": "pbkdf2", "pbkdfIterations": "1000"}  # nobody guesses passphrases here
_PODS = Path("/mnt/crash")
_KMS = Path("/run/crash-kms")


def _secret(kind: Kind) -> dict[str, str]:
    return {} if kind.kms else _SECRET


class Node:
    """`with Node(state_dir, host, below) as node`; calls are named as those of CSI and raise RemoteError."""

    def __init__(self, state_dir: Path, host: Host, below: FolderStorage | None = None) -> None:
        self.state_dir = state_dir
        self.below: FolderStorage = below or LoopfileStorage(state_dir)
        settings = Settings(
            endpoint=Path("/run/csi.sock"),
            node_id="node",
            state_dir=state_dir,
            kubelet_dir=Path("/mnt"),
            free_space_floor=0,
            grace_seconds=_CALL_SECONDS,
            kms_config=_KMS / "config.json",
            kms_programs=_KMS,
        )
        # The KMS outlives each crash: its key is always the same.
        _KMS.mkdir(exist_ok=True)
        program(_KMS, secret=b"the key of the KMS in crash tests")
        settings.kms_config.write_text('{"kms": {"encryptionKMSType": "exec", "program": "wrap-key"}}')
        self._settings = self.below.settings(settings)
        # Each replayed disk is one of its own, and none of them is to be held against the one before.
        Path("/run/csi.sock.identity").unlink(missing_ok=True)
        self.host = host
        self.driver: Driver = build_driver(self._settings, host)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            # The workers belong to the host, which may serve several nodes one after the other: they stay.
            self.driver.start()
            server = driver_server(self.driver)
            server.start()
            stack.callback(server.stop)
            self._client = stack.enter_context(CsiClient(self._settings.endpoint, _CALL_SECONDS))
            self._client.wait_until_ready(_START_SECONDS)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def create(self, name: str, kind: Kind, capacity: int) -> int:
        """Returns the capacity in bytes."""
        parameters = {"encrypted": "true", **_PARAMETERS} if kind.encrypted else {}
        if kind.kms:
            parameters = {"encrypted": "true", "encryptionKMSID": "kms"}
        parameters |= self.below.parameters
        wanted, secret = [_capability(kind)], _secret(kind)
        return self._client.create_volume(name, wanted, capacity, parameters=parameters, secrets=secret).capacity_bytes

    def stage(self, volume: str, kind: Kind) -> None:
        self.staging(volume).mkdir(parents=True, exist_ok=True)
        self._client.stage(self._remote(volume), self.staging(volume), _capability(kind), _secret(kind))

    def publish(self, volume: str, kind: Kind) -> Path:
        """Returns where the volume is seen then."""
        self._client.publish(self._remote(volume), self.staging(volume), self.target(volume), _capability(kind))
        return self.target(volume)

    def expand(self, volume: str, capacity: int, *, published: bool) -> int:
        """Grow the volume, and what a pod sees of it; returns the capacity in bytes."""
        granted = self._client.expand_volume(volume, capacity)
        return self._client.expand_on_node(volume, self.target(volume), capacity) if published else granted

    def rotate(self, volume: str) -> None:
        """Another key for a volume of a KMS, as `luks-csi keys rotate` does it beside the server."""
        with self.driver.locks.hold(volume):
            self.driver.rekeying.rotate(volume, read_secret({}), None)

    def reencrypt(self, volume: str, kind: Kind) -> None:
        """Another volume key, or the rest of a move to one that a crash has cut."""
        self.driver.offline().conversions.reencrypt(volume, read_secret(_secret(kind)), Watch())

    @property
    def moves_keys(self) -> bool:
        """Whether a volume here can have another volume key."""
        return movable(self.driver.backend) is not None

    def is_between_keys(self, volume: str) -> bool:
        """Whether such a move was cut."""
        return self.driver.backend.get(volume).conversion is not None

    def key_slots(self, volume: str) -> int:
        """How many its header has."""
        with self.below.device(volume) as device:
            return len(read_header(f"volume {volume}", str(device))[1].keyslots)

    def unpublish(self, volume: str) -> None:
        """Repeated while it is busy: who writes and who starts programs is one process here, and a child has what its
        parent had open until it executes something.
        """
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                return self._client.unpublish(volume, self.target(volume))
            except RemoteError as error:
                if "EBUSY" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(_PAUSE)

    def unstage(self, volume: str) -> None:
        self._client.unstage(volume, self.staging(volume))

    def delete(self, volume: str) -> None:
        self._client.delete_volume(volume)

    def staging(self, volume: str) -> Path:
        return _PODS / "stages" / volume

    def target(self, volume: str) -> Path:
        return _PODS / "pods" / volume

    def record(self, volume: str) -> VolumeRecord | None:
        """The record as it is on the disk; None without one. Raises FailedPrecondition when it cannot be read."""
        try:
            return self.driver.backend.get(volume)
        except NotFound:
            return None

    def device(self, volume: str, kind: Kind) -> str:
        """The device that a staged volume shows."""
        if kind.encrypted:
            return f"/dev/mapper/luks-{volume}"
        found = self.driver.backend.device_of(volume)
        if found is None:
            raise AssertionError(f"volume {volume} is staged and has no device")
        with found:
            number = os.fstat(found.fd).st_rdev
        # Not by its name: where no udev is, nobody makes those of logical volumes.
        return f"/dev/{os.path.basename(os.readlink(f'/sys/dev/block/{os.major(number)}:{os.minor(number)}'))}"

    def identity(self, volume: str, kind: Kind) -> Identity:
        """What a staged volume is, read from its devices."""
        found = self.luks_identity(volume)
        return found if kind.block else msgspec.structs.replace(found, fs_uuid=_fs_uuid(self.device(volume, kind)))

    def luks_identity(self, volume: str) -> Identity:
        """What the header of a volume says, staged or not; nothing without a good one."""
        try:
            with self.below.device(volume) as device:
                header = read_header(f"volume {volume}", str(device))[1]
        except DriverError:
            return Identity(None, None, None)
        return Identity(header.uuid, header.key_digest, None)

    def usable(self, volume: str, kind: Kind) -> int:
        """Bytes of the staged volume's device or file system."""
        if kind.block:
            return blockdev.size_bytes(self.device(volume, kind))
        found = os.statvfs(self.staging(volume))
        return found.f_blocks * found.f_frsize

    def _remote(self, volume: str) -> RemoteVolume:
        return self._client.volume(volume)


def _capability(kind: Kind) -> Capability:
    return Capability(AccessMode.SINGLE_NODE_WRITER, kind.block, kind.fs_type)


def _fs_uuid(device: str) -> str:
    with open(device, "rb", buffering=0) as file:
        head = file.read(4096)
    if struct.unpack_from("<H", head, 0x438)[0] == 0xEF53:  # https://docs.kernel.org/filesystems/ext4/super.html
        return str(uuid.UUID(bytes=head[0x468:0x478]))
    if head.startswith(b"XFSB"):
        return str(uuid.UUID(bytes=head[32:48]))
    raise AssertionError(f"{device} is mounted and holds no file system")
