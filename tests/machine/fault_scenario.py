"""The life of one volume, call by call as an orchestrator makes them, and what must hold after each call."""

import contextlib
import errno
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from csi_driver.host import blockdev
from csi_driver.host.devicemapper import DeviceMapper, Target
from csi_driver.keys.secret import read_secret
from csi_driver.luks.device import read_header
from csi_driver.luks.header import Header
from csi_driver.model.volume import EncryptionState, FileSystemState, VolumeRecord, mapping_name
from csi_driver.volumes.attachment import AttachRequest
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.expand import ExpandRequest
from csi_driver.volumes.provision import CreateRequest
from csi_driver.volumes.publish import PublishRequest
from csi_driver.volumes.stage import StageRequest
from tests.machine.fault_points import Begun
from tests.machine.fault_server import (
    DeleteRequest,
    DetachRequest,
    GrowRequest,
    Request,
    RotateRequest,
    UnpublishRequest,
    UnstageRequest,
)
from tests.machine.storage import LoopfileStorage, Storage
from tests.volume_images import BOOT_FILE, GREETING, SECRET, encrypted_image, make_file_system, put_image

_MIB = 1 << 20
_SIZE, _GROWN = 16 * _MIB, 24 * _MIB
_IMAGE, _IMAGE_SIZE = "installed", 8 * _MIB
_LEAST_PART = 0.75  # of a volume, that its file system gives to files: more than one that was not grown can have
_DATA = random.Random("what the pod wrote").randbytes(256 * 1024)
_FOREIGN = random.Random("what somebody else wrote").randbytes(4096)
_FOREIGN_AT = (0, 12 * _MIB)
_KEY = read_secret({**SECRET, "CRYPTO_PBKDF": "pbkdf2"})
_NEW_KEY = read_secret({"CRYPTO_KEY_VALUE": "another passphrase", "CRYPTO_PBKDF": "pbkdf2"})
_NO_KEY = read_secret({})

FAULTED = (
    "create", "attach", "stage", "publish", "grow", "expand", "rotate", "unpublish", "unstage", "restage", "detach",
    "delete",
)  # fmt: skip
"""The calls that faults are injected into."""
_WITH_KMS = ("create", "stage", "expand", "rotate", "delete")
_AGAIN = ("restage", "publish again", "unpublish again", "unstage again", "detach", "delete")
_USED = ("stage", "publish", "unpublish", "unstage", *_AGAIN)
_ENLARGED = ("stage", "publish", "grow", "expand", "unpublish", "unstage", *_AGAIN)
CALLS = ("create", "attach", "stage", "publish", "grow", "expand", "rotate", "unpublish", "unstage", *_AGAIN)
"""All calls, in their order."""
_WITH_NODE = ("attach", "detach")
"""Those that give a volume to a node and take it back, where it does not lie there."""
_LIVES = {
    "create": ("create", "attach", "stage", "unstage", "detach", "delete"),
    "attach": ("create", "attach", *_USED),
    "stage": ("create", "attach", *_USED),
    "publish": ("stage", "publish", "unpublish", "unstage", "detach", "delete"),
    "grow": _ENLARGED,
    "expand": _ENLARGED,
    "rotate": ("stage", "publish", "rotate", "unpublish", "unstage", *_AGAIN),
    "unpublish": _USED,
    "unstage": _USED,
    "restage": _USED,
    "detach": ("detach", "delete"),
    "delete": ("detach", "delete"),
}
"""The calls around each faulted one that show what the fault did. A life without a `create` begins with a volume that
was created, staged and unstaged, a copy of it where that can be: making a file system takes half of a whole life.
"""
_BEGIN = ("create", "attach", "stage", "unstage")
_GIVE_UP = ("unpublish", "unstage", "detach", "delete")


class Lost(Exception):
    """A promise was broken: data is gone, a call does not succeed, something was formatted twice."""


@dataclass(frozen=True)
class Scenario:
    """A kind of volume."""

    name: str
    encrypted: bool
    block: bool
    from_image: bool = False
    kms: bool = False

    @property
    def faulted(self) -> tuple[str, ...]:
        """Its calls that faults are injected into: those of a volume from an image that differ from any other's."""
        if self.kms:
            return _WITH_KMS
        return ("create", "stage") if self.from_image else FAULTED

    @property
    def parameters(self) -> dict[str, str]:
        """Its StorageClass."""
        if self.from_image:
            return {"encrypted": "true", "backingImage": _IMAGE}
        if self.kms:
            return {"encrypted": "true", "encryptionKMSID": "kms"}
        return {"encrypted": "true", "pbkdfIterations": "1000"} if self.encrypted else {}

    @property
    def capability(self) -> Capability:
        return Capability(AccessMode.SINGLE_NODE_WRITER, self.block, None if self.block else "ext4")


SCENARIOS = (
    Scenario("mount", encrypted=True, block=False),
    Scenario("block", encrypted=True, block=True),
    Scenario("plain mount", encrypted=False, block=False),
    Scenario("plain block", encrypted=False, block=True),
    Scenario("image", encrypted=True, block=False, from_image=True),
    Scenario("kms", encrypted=True, block=False, kms=True),
)


class Life:
    """One volume of a scenario; `folder` holds the state directory and the paths that kubelet would make."""

    def __init__(self, scenario: Scenario, folder: Path, below: Storage) -> None:
        self._scenario = scenario
        self._name = scenario.name.replace(" ", "-")
        self._id = below.id_of(self._name)
        self._below = below
        self._template = folder / "templates" / self._id
        self._pod = folder / "pods" / self._id
        self._stage = self._pod / "stage"
        self._target = self._pod / "target"
        self._written: list[tuple[int, str]] = []
        self._pinned: VolumeRecord | None = None
        self._made = False
        self._size = _SIZE
        self._key = _NO_KEY if scenario.kms else _KEY
        self._stage.mkdir(parents=True, exist_ok=True)
        self._image = folder / "state/images/ready" / _IMAGE / "image"
        if scenario.from_image and not self._image.exists():
            made = encrypted_image(make_file_system(folder / "image.raw", _IMAGE_SIZE), folder / "image")
            put_image(folder / "state", _IMAGE, made)
        self._image_before = self._image.stat() if scenario.from_image else None

    @property
    def calls(self) -> tuple[str, ...]:
        """All its calls, in their order."""
        is_fixed = not (self._scenario.encrypted or self._below.enlarges_plain)
        left_out = ("rotate",) * (not self._scenario.encrypted) + ("grow", "expand") * is_fixed
        return tuple(call for call in self._there_are(CALLS) if call not in left_out)

    @property
    def begin(self) -> tuple[str, ...]:
        """Those of a volume that was staged once."""
        return self._there_are(_BEGIN)

    @property
    def give_up(self) -> tuple[str, ...]:
        """Those of an orchestrator that takes a volume down, wherever it is."""
        return self._there_are(_GIVE_UP)

    def around(self, call: str) -> tuple[str, ...]:
        """Those around one that a fault is injected into."""
        return self._there_are(_LIVES[call])

    def _there_are(self, calls: Sequence[str]) -> tuple[str, ...]:
        return tuple(call for call in calls if self._below.node or call not in _WITH_NODE)

    @property
    def has_template(self) -> bool:
        """Whether a volume was kept."""
        return self._template.exists()

    def keep(self) -> None:
        """Take the volume, unstaged, out of the driver's sight and keep it as template."""
        self._template.parent.mkdir(exist_ok=True)
        self._folder().rename(self._template)

    def inherit(self) -> None:
        """Begin with a copy of the template."""
        volume = self._folder()
        volume.mkdir(mode=0o700)
        for name in ("record.json", "disk.img", *(["header.luks2"] if self._scenario.encrypted else [])):
            _copy(self._template / name, volume / name)
        self.watch(())

    def _folder(self) -> Path:
        assert isinstance(self._below, LoopfileStorage)
        return self._below.folder(self._id)

    def request(self, call: str) -> Request:
        """The request of a call."""
        name, scenario = call.removesuffix(" again"), self._scenario
        context = {"encrypted": "true" if scenario.encrypted else "false"}
        match name:
            case "attach":
                return AttachRequest(self._id, self._below.node, scenario.capability, read_only=False, context=context)
            case "stage" | "restage":
                return StageRequest(self._id, str(self._stage), scenario.capability, self._key, context)
            case "publish":
                return PublishRequest(
                    self._id, str(self._stage), str(self._target), scenario.capability, read_only=False, context=context
                )
            case "expand":
                return ExpandRequest(self._id, str(self._target), _GROWN, 0, _NO_KEY)
            case "unpublish":
                return UnpublishRequest(self._id, str(self._target))
            case "unstage":
                return UnstageRequest(self._id, str(self._stage))
        return self._request_without_a_node(name)

    def _request_without_a_node(self, name: str) -> Request:
        match name:
            case "create":
                parameters = {**self._scenario.parameters, **self._below.parameters}
                return CreateRequest(self._name, _SIZE, 0, (self._scenario.capability,), parameters, self._key)
            case "grow":
                return GrowRequest(self._id, _GROWN)
            case "rotate":
                return RotateRequest(self._id, self._key, None if self._scenario.kms else _NEW_KEY.passphrase)
            case "detach":
                return DetachRequest(self._id, self._below.node)
        return DeleteRequest(self._id)

    def watch(self, steps: Sequence[Begun]) -> None:
        """Look at record, header and steps after a call, whatever became of it. Raises Lost."""
        for step in steps:
            if self._made and step.seam.startswith("worker mkfs"):
                raise Lost(f"{step.title!r} ran though the file system was recorded as made")
            if self._pinned and step.seam == "worker luks-format":
                raise Lost("luksFormat ran though the volume was recorded as encrypted")
        record = self._below.record(self._id)
        if self._pinned and record and record.luks != self._pinned.luks:
            raise Lost(f"the recorded LUKS identity was {self._pinned.luks} and is {record.luks}")
        if record and record.encryption is EncryptionState.ENCRYPTED and record.luks:
            self._pinned = record
            header = self._header()
            if (header.uuid, header.key_digest) != (record.luks.uuid, record.luks.digest):
                raise Lost(f"the header has UUID and digest {header.uuid} {header.key_digest}, recorded {record.luks}")
        self._made = self._made or (record is not None and record.file_system is FileSystemState.MADE)

    def after(self, call: str) -> None:
        """Use the volume as a pod would after a call that succeeded. Raises Lost."""
        match call:
            case "stage" | "restage" if self._scenario.from_image:
                self._check_clone()
            case "publish":
                self._write(0, "first")
            case "grow":
                self._verify()
            case "expand":
                self._size = _GROWN
                self._check_size()
                self._verify()
                self._write(_GROWN - len(_DATA), "second")
            case "rotate":
                self._check_rotated()
                self._verify()
            case "publish again":
                self._check_size()
                self._verify()
            case "unpublish" | "unpublish again":
                _refuse(self._target)
            case "delete" if left := self._below.left_of(self._id):
                raise Lost(f"{', '.join(left)} is still there")

    def end(self) -> None:
        """Remove the folders that kubelet would remove; what is left in them stays."""
        for folder in (self._target, self._stage, self._pod):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def spoil(self) -> None:
        """Somebody else's data gets onto the device."""
        self._scribble(_FOREIGN)

    def unspoil(self) -> None:
        """Check that somebody else's data is still there and take it away. Raises Lost."""
        with self._below.device(self._id) as device, device.open("rb") as disk:
            if any(os.pread(disk.fileno(), len(_FOREIGN), at) != _FOREIGN for at in _FOREIGN_AT):
                raise Lost("somebody else's data was overwritten")
        self._scribble(bytes(len(_FOREIGN)))

    def bereave(self) -> None:
        """Take the device away from under the open mapping."""
        name = mapping_name(self._id)
        mapping = DeviceMapper().get(name)
        if mapping is None:
            raise Lost(f"the mapping {name} is not open")
        DeviceMapper().reload(name, [Target(0, mapping.size_bytes // 512, "error", "")])

    def _header(self) -> Header:
        with self._below.device(self._id) as device:
            return read_header(self._id, str(device))[1]

    def _scribble(self, content: bytes) -> None:
        with self._below.device(self._id) as device, device.open("r+b", buffering=0) as disk:
            for at in _FOREIGN_AT:
                os.pwrite(disk.fileno(), content, at)
            os.fsync(disk.fileno())

    def _write(self, offset: int, name: str) -> None:
        if self._scenario.block:
            descriptor = os.open(self._target, os.O_WRONLY | os.O_CLOEXEC)
        else:
            offset = 0
            descriptor = os.open(self._target / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(descriptor, _DATA, offset)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._written.append((offset, name))

    def _verify(self) -> None:
        for offset, name in self._written:
            path = self._target if self._scenario.block else self._target / name
            try:
                with path.open("rb", buffering=0) as file:
                    found = os.pread(file.fileno(), len(_DATA), offset)
            except OSError as error:
                raise Lost(f"the {name} data cannot be read: {error}") from None
            if found != _DATA:
                raise Lost(f"the {name} data is not what was written")

    def _check_rotated(self) -> None:
        record, header = self._below.record(self._id), self._header()
        if record is None or record.rekey is not None or len(header.keyslots) != 1:
            raise Lost(
                f"the change of its key did not end: {record and record.rekey}, {len(header.keyslots)} key slots"
            )
        _, copy = read_header(self._id, str(self._below.header_copy(self._id)))
        if copy.seqid != header.seqid:
            raise Lost(f"the header's copy has the sequence id {copy.seqid} and the header {header.seqid}")
        if not self._scenario.kms:
            self._key = _NEW_KEY

    def _check_clone(self) -> None:
        if (self._stage / BOOT_FILE).read_text() != GREETING:
            raise Lost("the volume does not hold what is in its image")
        _, header = read_header(_IMAGE, str(self._image))
        if self._pinned is None or self._pinned.luks is None or self._pinned.luks.uuid == header.uuid:
            raise Lost("the volume has no LUKS UUID of its own")
        after, before = self._image.stat(), self._image_before
        if before is None or (after.st_mtime_ns, after.st_size) != (before.st_mtime_ns, before.st_size):
            raise Lost("the image was written to")

    def _check_size(self) -> None:
        size = self._size
        if self._scenario.block:
            found = blockdev.size_bytes(str(self._target))
            if found != size:
                raise Lost(f"the block device has {found} bytes and should have {size}")
            return
        usage = os.statvfs(self._target)
        if not _LEAST_PART * size < usage.f_blocks * usage.f_frsize <= size:
            raise Lost(f"the file system has {usage.f_blocks * usage.f_frsize} bytes on a volume of {size}")


def _refuse(path: Path) -> None:
    if path.exists():
        raise Lost(f"{path} is still there")


def _copy(source: Path, target: Path) -> None:
    """Copy a file with its holes."""
    with source.open("rb") as old, target.open("xb") as new:
        size, at = os.fstat(old.fileno()).st_size, 0
        os.ftruncate(new.fileno(), size)
        while at < size:
            try:
                start = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # nothing but a hole is left
            at = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            os.pwrite(new.fileno(), os.pread(old.fileno(), at - start, start), start)
