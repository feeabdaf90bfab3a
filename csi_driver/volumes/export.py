"""The content of a volume of this node as an image: an encrypted one stays encrypted, with its header and its keys.

What the image is comes from the volume's record and its checked header, never from what lies inside: that a VM may have
written (docs/images.md, "A volume as an image").
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from csi_driver.backends.base import Backend, MakesFromFile
from csi_driver.host import blockdev, ofdlock
from csi_driver.host.handle import Handle
from csi_driver.host.locks import VolumeLocks
from csi_driver.host.loop import LoopDevices
from csi_driver.host.syscalls import error_name
from csi_driver.images.base import ImageFormat
from csi_driver.images.bring import Meter
from csi_driver.images.checkpoint import Job, Operation, SourceIdentity
from csi_driver.images.clone import run_pass
from csi_driver.images.library import ImageLibrary
from csi_driver.images.requests import MOST_BYTES, check_secret
from csi_driver.images.source import RawReader
from csi_driver.images.stopping import Told, untold
from csi_driver.images.store import ImageRecord, Provenance, check_name
from csi_driver.images.target import Target
from csi_driver.luks.header import PRIMARY_MAGIC
from csi_driver.luks.image_header import read_image_header
from csi_driver.model.errors import DeviceInUse, DeviceUnreadable, FailedPrecondition, InvalidArgument
from csi_driver.model.times import recorded_now
from csi_driver.model.volume import EncryptionState, FileSystemState, VolumeRecord
from csi_driver.volumes.image_source import EXPORTED
from csi_driver.volumes.keyslots import KeySlots, device_size, recorded_identity
from csi_driver.volumes.moved import refuse_away
from csi_driver.volumes.presence import Presences
from csi_driver.volumes.two_keys import refuse_changing, refuse_half


@dataclass(frozen=True)
class Export:
    """The image `name` is to be made of a volume of `limit` bytes at most. `secret` (namespace/name), of an encrypted
    one, and `owner` as in Import.
    """

    volume_id: str
    name: str
    secret: str | None = None
    owner: str | None = None
    limit: int = MOST_BYTES


class Exports:
    """Makes images of volumes. It takes the volume's lock itself, for as long as the volume is read: a moment where the
    file system lets image and volume share their blocks.
    """

    def __init__(
        self, backend: Backend, locks: VolumeLocks, presences: Presences, loops: LoopDevices, slots: KeySlots
    ) -> None:
        self._backend = backend
        self._locks = locks
        self._presences = presences
        self._loops = loops
        self._slots = slots

    def export(self, wanted: Export, library: ImageLibrary, meter: Meter, stopping: Told = untold) -> ImageRecord:
        """Copy a closed volume's file into the library; a killed call is gone on with by the next one of this name.

        A volume that was written to in between is copied from its start. Raises InvalidArgument (a secret for what is
        not encrypted, more than the limit), NotFound, VolumeBusy, DeviceInUse (it is staged or open),
        FailedPrecondition (nothing is in it yet, its key or volume key is being changed, it has a key of its own, it
        is no file, record and content disagree), InvalidHeader, AlreadyExists and what `run_pass` raises.
        """
        check_name(wanted.name)
        check_secret(wanted.secret)
        self._backend.get(wanted.volume_id)  # before a lock is made for what is not there
        with self._locks.hold(wanted.volume_id):
            record = self._backend.get(wanted.volume_id)
            _refuse(record, wanted, files=isinstance(self._backend, MakesFromFile))
            refuse_half(self._backend, record)
            with self._backend.open_storage(record.id) as storage:
                self._refuse_open(record, storage)
                image = self._described(record, storage, wanted)

                def bring(folder: Path) -> tuple[Path, ImageRecord]:
                    return _copy(f"volume {record.id}", Path(storage.name), folder, meter, stopping), image

                return library.receive(wanted.name, wanted.owner, bring)

    def _refuse_open(self, record: VolumeRecord, storage: Handle) -> None:
        """Whoever has it attached, by hand too, may write to it.

        A loop device of the driver is known by its lock, where this process does not see it: in a container of its own.
        """
        present = self._presences.of(record.id, record)
        attached = ofdlock.is_locked(storage.fd) or self._loops.find(storage.name)
        if present.is_open or present.stage is not None or attached:
            places = [mount.mount_point for mount in (*present.mounts, *present.nodes)]
            where = f" at {' and '.join(places)}" if places else ""
            raise DeviceInUse(
                f"volume {record.id} is in use{where} and only a closed one becomes an image; end its pods, and "
                f"unstage it if Kubernetes does not"
            )

    def _described(self, record: VolumeRecord, storage: Handle, wanted: Export) -> ImageRecord:
        """What the image will be; the content is durable, and as the record says."""
        where = f"volume {record.id}"
        try:
            os.fsync(storage.fd)
            size = os.fstat(storage.fd).st_size
            head = os.pread(storage.fd, len(PRIMARY_MAGIC), 0)
        except OSError as error:
            raise DeviceUnreadable(f"{where} cannot be read ({error_name(error)}); check its storage") from None
        if size != device_size(record):
            raise FailedPrecondition(
                f"{where} is recorded with {device_size(record)} bytes and its file has {size}; end its expansion first"
            )
        if size > wanted.limit:
            raise InvalidArgument(
                f"{where} has {size} bytes and at most {wanted.limit} are allowed for image {wanted.name}; raise the "
                f"limit"
            )
        payload, luks = size, None
        if record.encryption is not None:
            luks = recorded_identity(record)
            found = read_image_header(
                where, lambda at, length: blockdev.read_at(storage.fd, at, length), size, self._slots.header_limits
            )
            if found.identity != luks:
                raise FailedPrecondition(
                    f"expected the header with UUID {luks.uuid} and volume key digest {luks.digest} in {where}, found "
                    f"UUID {found.identity.uuid} and digest {found.identity.digest}; check the record and the volume"
                )
            payload = found.payload
        elif head == PRIMARY_MAGIC:
            raise FailedPrecondition(
                f"{where} is recorded as not encrypted and its data begins like LUKS, so no volume could start from "
                f"that image; copy what it holds, and import that"
            )
        return ImageRecord(
            name=wanted.name,
            format=ImageFormat.LUKS2 if luks else ImageFormat.RAW,
            size=payload,
            file_size=size,
            luks=luks,
            secret=wanted.secret,
            owner=wanted.owner,
            created=recorded_now(),
            provenance=Provenance(operation=EXPORTED, source=record.id),
        )


def _copy(where: str, file: Path, folder: Path, meter: Meter, stopping: Told) -> Path:
    job = Job(Operation.IGNORE, file, SourceIdentity.of(file, where), ImageFormat.RAW, where)
    with contextlib.closing(RawReader(str(file), where)) as reader, meter("copying", reader.size) as progress:
        return run_pass(reader, Target(folder), job, progress, stopping=stopping).part


def _refuse(record: VolumeRecord, wanted: Export, *, files: bool) -> None:
    """What the record alone says against it."""
    where = f"volume {record.id}"
    if not files:
        raise FailedPrecondition(
            f"{where} is no file of this node, and only one of the backend loopfile becomes an image; copy what it "
            f"holds, and import that"
        )
    refuse_away(record)
    refuse_changing(record)
    if record.encryption not in (None, EncryptionState.ENCRYPTED) or record.file_system is FileSystemState.NONE:
        raise FailedPrecondition(f"{where} was never staged, so there is nothing in it; stage it first")
    if record.file_system is FileSystemState.MAKING:
        raise FailedPrecondition(f"{where} has no file system yet; stage it as a mount first")
    if record.key is not None:
        raise FailedPrecondition(
            f"{where} has a key of its own, which no secret of an image can name; copy what it holds to a "
            f"volume of a class without encryptionKMSID and generateKey, and make the image of that one"
        )
    if wanted.secret is not None and record.encryption is None:
        raise InvalidArgument(f"{where} is not encrypted, but a secret was named for its image; leave that out")
