"""Volumes that start from an image of this node: checked against each other first, then cloned, then made their own.

An image's content is somebody's data: the volume is `raw` from its first moment and nothing is ever formatted in it.
"""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Final

import msgspec

from csi_driver.backends.base import Backend, made_from_file
from csi_driver.host.clonefile import FileIdentity, clone_file
from csi_driver.host.handle import Handle
from csi_driver.host.log import log
from csi_driver.host.syscalls import error_name
from csi_driver.host.workers import Workers
from csi_driver.images.base import ImageFormat
from csi_driver.images.cluster import ClusterImage, ClusterImages
from csi_driver.images.store import ImageRecord, ImageStore
from csi_driver.keys.secret import CEPH_PASSPHRASE, LONGHORN_VALUE, SecretKey, require_passphrase, with_either
from csi_driver.luks.header import PRIMARY_MAGIC
from csi_driver.luks.header_metadata import Argon2id, Keyslot, Pbkdf2, with_advice
from csi_driver.model.errors import (
    Aborted,
    DeadlineExceeded,
    DeviceUnreadable,
    DriverError,
    FailedPrecondition,
    InvalidArgument,
    InvalidHeader,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
)
from csi_driver.model.settings import Limits
from csi_driver.model.volume import EncryptionState, FileSystemState, LuksIdentity, VolumeParameters, VolumeRecord
from csi_driver.volumes.image_source import check_source
from csi_driver.volumes.keys import VolumeKeys
from csi_driver.volumes.keyslots import KeySlots, device_size

_SLOWEST: Final = 8 << 20
"""Bytes per second below which a copy counts as hanging."""

_CLONES_AT_ONCE: Final = 2
"""A copy may take minutes and keeps a thread of the server: most of them stay free for all other calls."""
_WAITING_AT_ONCE: Final = 4
_HEAD_START_SECONDS: Final = 3.0
"""More than the first delay of a provisioner, 2 s at most with --node-deployment-base-delay=2s."""


class BackingImage(msgspec.Struct, frozen=True):
    """An image that a volume may start from. `size` is what is inside, in bytes; `luks` is set for an encrypted one."""

    name: str
    size: int
    luks: LuksIdentity | None
    file: FileIdentity

    @property
    def where(self) -> str:
        """Its name in errors."""
        return f"image {self.name}"


class BackingImages:
    """The images of this node, and those that the cluster brings to it, as volumes start from them.

    Callers hold the volume's lock. `pause` waits for so many seconds.
    """

    def __init__(
        self,
        store: ImageStore,
        cluster: ClusterImages,
        workers: Workers,
        slots: KeySlots,
        keys: VolumeKeys,
        limits: Limits,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._cluster = cluster
        self._workers = workers
        self._slots = slots
        self._keys = keys
        self._limits = limits
        self._clones = threading.BoundedSemaphore(_CLONES_AT_ONCE)
        self._pause = pause
        self._waiting = threading.BoundedSemaphore(_WAITING_AT_ONCE)

    def is_here(self, name: str) -> bool:
        """Whether this node has that image, or the cluster has it and brings it here when a volume wants it."""
        return self._store.file(name).exists() or self._cluster.has(name)

    def let_others_go_first(self, name: str) -> None:
        """Wait where the cluster has an image and this node has not: others are to take a claim that binds at once.

        Their provisioners ask for room last, then write their node into the claim; whose node has the image is faster.
        It is only that: where no such node takes it, this one may. Of many claims few wait at once, for other calls.
        """
        found = None if self._store.file(name).exists() else self._cluster.find(name)
        if found is not None and found.ready and self._waiting.acquire(blocking=False):
            try:
                self._pause(_HEAD_START_SECONDS)
            finally:
                self._waiting.release()

    def find(self, volume_id: str, parameters: VolumeParameters, key: SecretKey) -> BackingImage | None:
        """The image that the parameters name, None where they name none; nothing is made yet.

        Raises ResourceExhausted when neither this node nor the cluster has it, another node may; Aborted while it is
        being brought here, which this call asks for; InvalidArgument naming both sides where image and parameters do
        not fit: what the class says of its origin, its format, encryption, a parameter that the header contradicts;
        FailedPrecondition when the secret has no passphrase or does not open it, as that can be put right while the
        claim waits; InvalidHeader.
        """
        if (name := parameters.backing_image) is None:
            return None
        file, record = self._look(name)
        check_source(record, parameters)
        _check_format(record, encrypted=parameters.encrypted)
        _check_encryption(record, encrypted=parameters.encrypted)
        image = BackingImage(name, record.size, record.luks, file)
        if record.luks is None:
            _refuse_luks(image)
            return image
        if key.passphrase is None:
            raise FailedPrecondition(
                f"volume {volume_id} starts from the encrypted {image.where} and CreateVolume brought neither "
                f"{LONGHORN_VALUE} nor {CEPH_PASSPHRASE}; name the image's secret in "
                f"csi.storage.k8s.io/provisioner-secret-name and -namespace of the StorageClass too"
            )
        try:
            with self._keys.using_image(volume_id, parameters):
                check = partial(self._slots.check_image, image.where, file, record.luks)
                slots = with_either(key, key.passphrase, check)
        except InvalidHeader as error:
            raise with_advice(
                error,
                "clone it with reencrypt, which makes a header anew, or, where its key costs too much memory, raise "
                "--pbkdf-memory-limit on all nodes",
            ) from None
        except Unauthenticated as error:
            recorded = f"; the image is recorded with the secret {record.secret}" if record.secret else ""
            raise FailedPrecondition(f"{error}{recorded}") from None
        _check_parameters(image.where, parameters, record.luks, slots)
        return image

    def make(self, backend: Backend, record: VolumeRecord, image: BackingImage, key: SecretKey) -> VolumeRecord:
        """Make the volume with the image's content; an encrypted one gets a LUKS UUID of its own, and its own key.

        After an error there is no volume, but for those that `finish` leaves. Raises ResourceExhausted, Aborted (too
        many at once too), DeviceUnreadable, DeadlineExceeded and what `KeySlots.take_identity` raises.
        """
        record = msgspec.structs.replace(record, file_system=FileSystemState.RAW)
        if image.luks is not None:
            identity = msgspec.structs.replace(image.luks, uuid=str(uuid.uuid4()))
            record = msgspec.structs.replace(
                record, encryption=EncryptionState.CLONING, luks=identity, cloned_uuid=image.luks.uuid
            )
        size = device_size(record)
        maker = made_from_file(backend, record.id)
        record = maker.create_filled(record, size, partial(self._fill, record.id, image, size))
        return self.finish(backend, record, key)

    def finish(self, backend: Backend, record: VolumeRecord, key: SecretKey) -> VolumeRecord:
        """Go on with a clone that was cut, if this is one; one that cannot be ended is removed, nobody has seen it.

        It stays where somebody may still be at work on it or has changed its record meanwhile: the call is made again.
        """
        if record.encryption is not EncryptionState.CLONING:
            return record
        ours = record.revision
        try:
            with backend.storage(record.id) as clone:
                ended = self._slots.take_identity(record, clone)
                if record.key is not None:
                    self._take_key(backend, record, clone, key)
                ours += 1  # written by this call, though perhaps not so that it lasts
                return backend.update(ended)
        except (DeadlineExceeded, Aborted):
            raise
        except (DriverError, OSError):
            with contextlib.suppress(DriverError, OSError):
                if backend.get(record.id).revision <= ours:
                    backend.delete(record.id)
            raise

    def _take_key(self, backend: Backend, record: VolumeRecord, clone: Handle, secret: SecretKey) -> None:
        """Another key slot for the volume's own key, in place of the one that the image's passphrase opens."""
        own = self._keys.of(record, secret, "create volume").passphrase
        self._slots.take_key(backend, record, clone, require_passphrase(secret, record.id), own, secret)

    def _fill(self, volume_id: str, image: BackingImage, size: int, path: str) -> None:
        if not self._clones.acquire(blocking=False):
            raise Aborted(
                f"volume {volume_id} cannot be made from {image.where} yet: two volumes are being cloned from images "
                f"on this node; the call is repeated"
            )
        try:
            with self._store.reading(image.name, f"volume {volume_id}"):
                shared = self._workers.call(
                    f"luks-clone of {image.where} for volume {volume_id}",
                    self._limits.format_seconds + image.file.size / _SLOWEST,
                    clone_file,
                    image.where,
                    image.file,
                    path,
                    size,
                )
        finally:
            self._clones.release()
        log.info("volume cloned from an image", volume_id=volume_id, image=image.name, shared=shared)

    def _look(self, name: str) -> tuple[FileIdentity, ImageRecord]:
        """The image's file and record; the file first: whoever reads it later notices that it is another one."""
        path = self._store.file(name)
        try:
            file = FileIdentity.of(path)
            record = self._store.get(name)
        except (FileNotFoundError, NotFound):
            raise self._absent(name) from None
        except OSError as error:
            raise FailedPrecondition(f"image {name} cannot be looked at ({error_name(error)}); check {path}") from None
        if file.size != record.file_size:
            raise FailedPrecondition(
                f"the file of image {name} has {file.size} bytes and {record.file_size} are recorded; delete the image "
                f"and import it anew"
            )
        if record.owner is not None:
            self._refuse_other(name, record.owner)
            with contextlib.suppress(DriverError):  # a copy that is taken for unused is brought again
                self._cluster.use(name)
        return file, record

    def _absent(self, name: str) -> DriverError:
        """Why a volume cannot start from an image that is not here, by the code that makes the provisioner do right.

        ResourceExhausted alone lets it have another node chosen. Aborted lets it ask this one again, for ever, by an
        Immediate class too.
        """
        found = self._cluster.find(name)
        if found is None:
            return ResourceExhausted(
                f"image {name} is not on this node; import it here first (luks-csi image import), then the volume can "
                f"be made"
            )
        self._cluster.want(name)
        return _awaited(name, found)

    def _refuse_other(self, name: str, owner: str) -> None:
        """What is here may be left of an Image that another one has taken the name of since, or be another file than
        the Image has: of a node that came back, say, when another one had made it meanwhile.
        """
        found = self._cluster.find(name)
        if found is not None and (found.uid != owner or found.here is False):
            self._cluster.want(name)
            raise _awaited(name, found)


def _awaited(name: str, image: ClusterImage) -> Aborted:
    percent = "" if image.percent is None else f"{image.percent} %"
    far = ", ".join(filter(None, (percent, image.message))) or "it was just asked for"
    doing = "is being brought to this node" if image.ready else "is not ready yet, and is brought to this node then"
    return Aborted(f"image {name} {doing}: {far}; the volume is made when it is whole")


def _check_format(image: ImageRecord, *, encrypted: bool) -> None:
    if image.format in (ImageFormat.RAW, ImageFormat.LUKS2):
        return
    if image.luks:
        way = f"clone it with {'reencrypt' if encrypted else 'decrypt'} and name that clone"
    elif encrypted:
        way = "clone it with encrypt and name that clone"
    else:
        way = "import its disk as raw, or clone it with encrypt and that clone with decrypt, and name the last one"
    raise InvalidArgument(
        f"image {image.name} is a {image.format} file and a volume starts from raw or luks2 only; {way}"
    )


def _check_encryption(image: ImageRecord, *, encrypted: bool) -> None:
    if image.luks is not None and not encrypted:
        raise InvalidArgument(
            f'image {image.name} is encrypted and the StorageClass says encrypted "false"; set it to "true" and name '
            f"the image's secret, or name a clone of the image that was made with decrypt"
        )
    if image.luks is None and encrypted:
        raise InvalidArgument(
            f'image {image.name} is not encrypted and the StorageClass says encrypted "true"; name a clone of the '
            f"image that was made with encrypt"
        )


def _refuse_luks(image: BackingImage) -> None:
    """Record and data decide: what begins like LUKS does not become an unencrypted volume."""
    descriptor = image.file.open(image.where)
    try:
        head = os.pread(descriptor, len(PRIMARY_MAGIC), 0)
    except OSError as error:
        raise DeviceUnreadable(f"{image.where} cannot be read ({error_name(error)}); check its storage") from None
    finally:
        os.close(descriptor)
    if head == PRIMARY_MAGIC:
        raise FailedPrecondition(
            f"{image.where} is recorded as not encrypted and its data begins like LUKS; delete it and import it anew"
        )


def _check_parameters(where: str, parameters: VolumeParameters, luks: LuksIdentity, slots: tuple[Keyslot, ...]) -> None:
    """Refuse parameters that the header contradicts: each of its key slots, as each opens it, must be as they say."""
    wished = {
        "cipher": parameters.cipher,
        "keySize": parameters.key_bits,
        "sectorSize": parameters.sector_size,
        "hash": parameters.hash,
        "pbkdf": parameters.pbkdf,
        "pbkdfMemory": parameters.pbkdf_memory_kib,
        "pbkdfIterations": parameters.pbkdf_iterations,
    }
    for slot in slots:
        found = {"cipher": luks.cipher, "keySize": luks.key_bits, "sectorSize": luks.sector_size, **_costs(slot)}
        for name, wish in wished.items():
            if wish not in (None, found[name]):
                raise InvalidArgument(
                    f"the StorageClass says {name} {wish} and the header of {where} says {found[name]}; a volume from "
                    f"an image has the image's header, so leave {name} out or clone the image with reencrypt"
                )


def _costs(slot: Keyslot) -> dict[str, str | int]:
    kdf = slot.kdf
    if isinstance(kdf, Pbkdf2):
        costs: dict[str, str | int] = {"pbkdf": "pbkdf2", "pbkdfMemory": "none", "pbkdfIterations": kdf.iterations}
    else:
        name = "argon2id" if isinstance(kdf, Argon2id) else "argon2i"
        costs = {"pbkdf": name, "pbkdfMemory": kdf.memory, "pbkdfIterations": kdf.time}
    return costs | {"hash": slot.af.hash}
