"""A volume that Ceph-CSI made becomes one of ours where it lies: its image gets our name, and nothing is copied.

What Ceph-CSI keeps of it (ceph-csi, internal/journal/voljournal.go and internal/rbd/encryption.go):

0001-<length>-<clusterID>-<pool>-<uuid>  its id, the `volumeHandle` of its PersistentVolume; the numbers hexadecimal
csi.volume.<uuid>                        an object with a map: name and id of the image, its KMS, the claim's namespace
rbd.csi.ceph.com/encrypted, …/dek        in the image's metadata: whether it was formatted, and its wrapped key

All of that stays as it is. By the new name Ceph-CSI finds the image no more, and can neither use nor remove it.

| step of `take` | a kill behind it |
| the log says the image's id, the record and Ceph-CSI's id | the volume has no image yet; the next call goes on |
| rbd rename | the volume is whole; `attach` lets nobody to it while somebody else has it open |
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from csi_driver.backends.base import ForeignVolume
from csi_driver.backends.librbd import Image
from csi_driver.backends.rbdaccess import CephAccess
from csi_driver.backends.rbddevices import MappedVolumes, Pin
from csi_driver.backends.rbderrors import CephExists, CephMissing
from csi_driver.backends.rbdplace import image_name
from csi_driver.backends.rbdpool import CephPool
from csi_driver.backends.rbdrecords import VolumeLogs, VolumeState
from csi_driver.backends.records import RecordCodec
from csi_driver.host.handle import Handle
from csi_driver.model.errors import (
    Aborted,
    AlreadyExists,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from csi_driver.model.volume import VolumeParameters, VolumeRecord

_HANDLE: Final = re.compile(r"0001-([0-9a-f]{4})-(.+)-([0-9a-f]{16})-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")
_PREFIX: Final = "rbd.csi.ceph.com/"
_NO_KMS: Final = ("", "default")  # the passphrase of a secret


@dataclass(frozen=True)
class CsiHandle:
    """The id of a volume of Ceph-CSI, and what it tells."""

    text: str
    cluster_id: str
    pool_number: int
    uuid: str

    @classmethod
    def read(cls, text: str) -> "CsiHandle":
        """Raise InvalidArgument for anything else."""
        found = _HANDLE.fullmatch(text)
        if found is None or int(found[1], 16) != len(found[2]):
            raise InvalidArgument(
                f"{text!r} is no id of a volume of Ceph-CSI; name its volumeHandle, which begins with 0001- and ends "
                f"in the UUID that is in the name of its image"
            )
        return cls(text, found[2], int(found[3], 16), found[4])

    @property
    def journal(self) -> str:
        """The object that says what it is."""
        return f"csi.volume.{self.uuid}"


class CsiVolumes:
    """Finds volumes that Ceph-CSI made, and takes them over."""

    def __init__(self, access: CephAccess, logs: VolumeLogs, devices: MappedVolumes, codec: RecordCodec) -> None:
        self._access = access
        self._logs = logs
        self._devices = devices
        self._codec = codec

    def find(self, handle: str, name: str) -> ForeignVolume:
        """The volume that Ceph-CSI calls `handle` and that is to be `name`, or is already.

        Raises InvalidArgument, NotFound, AlreadyExists, Aborted, FailedPrecondition (no encrypted one that was used).
        """
        told = CsiHandle.read(handle)
        pool = self._access.numbered(told.cluster_id, told.pool_number)
        volume_id = pool.place.id_for(name)
        state = _takeable(volume_id, handle, self._logs.state(pool, volume_id))
        kept = {key: pool.value(told.journal, key) or "" for key in pool.keys(told.journal)}
        if not kept:
            raise NotFound(
                f"Ceph-CSI has no volume {told.uuid} in {pool.place}, where the object {told.journal} is missing; "
                f"compare the volumeHandle"
            )
        storage = kept.get("csi.imagename") or image_name(told.uuid)
        image, is_ours = _image(pool, volume_id, storage, kept.get("csi.imageid"), state)
        spec = f"{pool.place.spec}/{storage}"
        metadata = pool.metadata(image_name(volume_id) if is_ours else storage)
        if kept.get("csi.volume.encryptionType", "block") != "block":
            raise FailedPrecondition(
                f"volume {handle} of Ceph-CSI has encrypted files (fscrypt) in the image {spec}, and this driver reads "
                f"LUKS2; copy the files to a new volume"
            )
        if (formatted := _of(metadata, "encrypted")) != "encrypted":
            raise FailedPrecondition(
                f"volume {handle} of Ceph-CSI is not encrypted, or was never used: its image {spec} has "
                f"{_PREFIX}encrypted={formatted!r}; it was left as it is, make a new volume and copy the files"
            )
        kms_id = kept.get("csi.volume.encryptKMS", "")
        return ForeignVolume(
            handle=handle,
            volume_id=volume_id,
            where=f"the image {spec}",
            storage=storage,
            storage_id=image.id,
            size=image.size,
            parameters=VolumeParameters(
                encrypted=True, cluster_id=told.cluster_id, pool=pool.place.pool, data_pool=image.data_pool
            ),
            kms_id="" if kms_id in _NO_KMS else kms_id,
            wrapped=_of(metadata, "dek"),
            tenant=kept.get("csi.volume.owner", ""),
            is_ours=is_ours,
        )

    @contextmanager
    def looked_at(self, foreign: ForeignVolume) -> Iterator[Handle]:
        """Its device, for reading alone, by a mapping that changes nothing in the cluster. Raises DeviceInUse."""
        volume_id = foreign.volume_id
        pool = self._access.pool(volume_id)
        _refuse_used(pool, foreign.storage)
        self._let_go(volume_id)  # of what a killed look has left
        pin = Pin(
            fsid=pool.cluster_uuid(),
            namespace=pool.place.cluster.namespace,
            pool_number=CsiHandle.read(foreign.handle).pool_number,
            image_id=foreign.storage_id,
            image=foreign.storage,
        )
        try:
            with self._devices.open(self._devices.map(volume_id, pool, pin, ("ro",))) as device:
                yield device
        finally:
            self._let_go(volume_id)

    def take(self, foreign: ForeignVolume, record: VolumeRecord) -> None:
        """Make it the volume of that record. Repeating is fine wherever it was cut.

        Raises DeviceInUse where somebody has opened it meanwhile: it is as it was then. AlreadyExists, Aborted.
        """
        volume_id = foreign.volume_id
        pool, ours = self._access.pool(volume_id), image_name(volume_id)
        taken = VolumeState(
            image_id=foreign.storage_id,
            pool_number=CsiHandle.read(foreign.handle).pool_number,
            cluster=pool.cluster_uuid(),
            record=self._codec.encode(record).decode(),
            adopted=foreign.handle,
        )
        self._logs.change(pool, volume_id, lambda state: _takeable(volume_id, foreign.handle, state) or taken)
        self._logs.confirm(pool, volume_id)
        try:
            pool.rename(foreign.storage, ours)
        except (CephMissing, CephExists):
            found = pool.info(ours)
            if found is not None and found.id == foreign.storage_id:
                return  # by a call that was cut, or by another one at this moment
            self._logs.forget(pool, volume_id)
            raise
        try:
            _refuse_used(pool, ours)  # who came before sees it still; nobody of Ceph-CSI comes from here on
        except DeviceInUse:
            pool.rename(ours, foreign.storage)
            self._logs.forget(pool, volume_id)
            raise

    def _let_go(self, volume_id: str) -> None:
        if (mapped := self._devices.mapped(volume_id)) is not None:
            self._devices.unmap(volume_id, mapped)
        self._devices.forget(volume_id)


def cut_short(volume_id: str, state: VolumeState, found: DriverError) -> DriverError:
    """What is said of a volume without an image: whether it was not taken over to its end, or what was found."""
    if state.adopted is None:
        return found
    return FailedPrecondition(
        f"volume {volume_id} was not taken over to its end, and its image may have Ceph-CSI's name still; run "
        f"'luks-csi volume adopt' for {state.adopted} again"
    )


def _image(
    pool: CephPool, volume_id: str, storage: str, journaled: str | None, state: VolumeState | None
) -> tuple[Image, bool]:
    """The image, and whether it has our name already."""
    ours, theirs = pool.info(image_name(volume_id)), pool.info(storage)
    if state is not None and ours is not None and ours.id == state.image_id:
        return ours, True
    wanted = state.image_id if state is not None else journaled or (theirs and theirs.id)
    if theirs is None or theirs.id != wanted:
        raise FailedPrecondition(
            f"the image {storage} in {pool.place} is not the one that Ceph-CSI made: expected the id "
            f"{wanted or 'of any'}, found {theirs.id if theirs else 'no image'}; nothing was changed"
        )
    if ours is not None:
        raise AlreadyExists(
            f"{pool.place} has an image {image_name(volume_id)} already, which is none of volume {volume_id}; choose "
            f"another name"
        )
    return theirs, False


def _takeable(volume_id: str, handle: str, state: VolumeState | None) -> VolumeState | None:
    """The state, if it is none or that of the same volume of Ceph-CSI."""
    if state is not None and state.record is None:
        raise Aborted(f"volume {volume_id} is being made or removed; delete it, or choose another name")
    if state is not None and state.adopted != handle:
        raise AlreadyExists(f"volume {volume_id} exists already; choose another name")
    return state


def _refuse_used(pool: CephPool, image: str) -> None:
    if clients := pool.watchers(image):
        raise DeviceInUse(
            f"the image {pool.place.spec}/{image} is open at {', '.join(clients)}; end what uses it, or wait "
            f"30 s for a client that crashed"
        )


def _of(metadata: Mapping[str, str], name: str) -> str:
    """A value of Ceph-CSI's; earlier versions had a dot before the name, so that clones did not inherit it."""
    return (metadata.get(f"{_PREFIX}{name}") or metadata.get(f".{_PREFIX}{name}", "")).strip()
