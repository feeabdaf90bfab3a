"""A volume and what is recorded of it."""

import hashlib
import re
from enum import StrEnum

import msgspec

_SAFE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_HASHED_PREFIX = "x-"
_MOST_ID_BYTES = 66
_MOST_OBJECT_NAME = 253


class EncryptionState(StrEnum):
    """Tag `encryption` of an encrypted volume (docs/architecture.md, "A volume's life")."""

    PREPARED = "prepared"
    FORMATTING = "formatting"
    CLONING = "cloning"
    ENCRYPTED = "encrypted"


class FileSystemState(StrEnum):
    """Tag `filesystem`: what is known of the inside of a volume."""

    NONE = "none"
    MAKING = "making"
    MADE = "made"
    RAW = "raw"


class LuksIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What the device's LUKS2 header must say. Sizes in bytes, the key in bits.

    `digest` is the hexadecimal digest of the volume key, pinned once our own key has opened the fresh header.
    """

    uuid: str
    cipher: str
    key_bits: int
    sector_size: int
    data_offset: int
    digest: str | None = None


class KeyTrail(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where the passphrase of a volume comes from, never the passphrase: what its key management system has to be told.

    `kms_id` is the entry of the KMS configuration and `type` that entry's type. `name` is what the KMS knows the key
    by: what it is bound to, or the name of the secret that is kept there. `wrapped` is the wrapped data encryption key,
    "" where the KMS keeps the key itself. `key_id` and `key_version` are of the key that wrapped it, as far as the KMS
    tells. `tenant` is the namespace of the volume's claim. A `foreign` key was not made for this volume but came with
    what it was adopted from, which may still need it.
    """

    kms_id: str
    type: str
    name: str = ""
    wrapped: str = ""
    key_id: str = ""
    key_version: str = ""
    tenant: str = ""
    foreign: bool = False


class RekeyPhase(StrEnum):
    """How far a change of a volume's passphrase has come."""

    ADDING = "adding"
    REMOVING = "removing"


class NamedSlot(msgspec.Struct, frozen=True, kw_only=True):
    """A key slot of a LUKS2 header: its number, which another may get later, and its salt, in hexadecimal."""

    number: int
    salt: str


class Rekey(msgspec.Struct, frozen=True, kw_only=True):
    """A change of a volume's passphrase under way (docs/architecture.md, "A new key").

    While `adding`, `other` is the trail of the key that is to come; while `removing`, of the one that was. None for the
    passphrase of a secret. What counts is the record's `key`. `slots` are key slots of ours: while `adding`, that of
    the key that is there, and those that this change, and any that was cut before it, has made or was about to make;
    while `removing`, those that are to go.
    """

    phase: RekeyPhase
    other: KeyTrail | None = None
    slots: tuple[NamedSlot, ...] = ()


class Conversion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A volume whose content is being moved under another volume key (docs/architecture.md, "A new volume key").

    `luks` is what the header of the storage that takes its place says. `done` bytes of the content, from its start on,
    lie there and there alone. `key` is the trail that the volume is to have, where it was not encrypted before.
    """

    luks: LuksIdentity
    done: int = 0
    key: KeyTrail | None = None


class MovePhase(StrEnum):
    """Where a volume is that is moved between two drivers of its node (docs/architecture.md, "Another backend")."""

    LEAVING = "leaving"
    LEFT = "left"
    ARRIVING = "arriving"
    ARRIVED = "arrived"


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """The bytes of a device from its start on, and the chained digest of all of them that is not zero."""

    end: int = 0
    digest: str = ""


class Move(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A volume that is moved, in the records of both drivers; `other` is the state directory of the other one, and
    `volume_id` its id there. `id` is that of the move. `node` is the one that has that state directory, where the
    record is seen from other nodes too.

    While it is `arriving`, `source` says what the source was when the copy began, `size` how many bytes are to come,
    `copied` what was written, and `compared` what was read again.
    """

    phase: MovePhase
    id: str
    other: str
    volume_id: str
    node: str = ""
    source: str = ""
    size: int = 0
    copied: Span = Span()
    compared: Span = Span()


class VolumeParameters(msgspec.Struct, frozen=True, kw_only=True):
    """The StorageClass parameters of a volume, typed; None where the class says nothing.

    docs/parameters.md tells each one's meaning; `csi_driver.volumes.parameters` reads them.
    """

    encrypted: bool = False
    cipher: str | None = None
    key_bits: int | None = None
    hash: str | None = None
    pbkdf: str | None = None
    pbkdf_memory_kib: int | None = None
    pbkdf_iterations: int | None = None
    sector_size: int | None = None
    kms_id: str | None = None
    generate_key: bool = False
    retain_key: bool = False
    erase_on_delete: bool = False
    key_rotation_seconds: int | None = None
    discard: bool = False
    no_read_workqueue: bool = False
    no_write_workqueue: bool = False
    mkfs_options: tuple[str, ...] = ()
    fs_type: str | None = None
    backing_image: str | None = None
    image_source_type: str | None = None
    image_source: dict[str, str] = {}
    backend: str | None = None
    thin_pool: str | None = None
    backing_storage_class: str | None = None
    backing_attach: str | None = None
    cluster_id: str | None = None
    pool: str | None = None
    data_pool: str | None = None
    image_features: tuple[str, ...] | None = None
    mounter: str | None = None
    map_options: tuple[str, ...] = ()
    replicas: int = 1
    claim: str | None = None


class VolumeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """All that is recorded of a volume, outside its device. `capacity_bytes` is what a pod sees.

    `revision` counts the writes: an update names the revision it was made from (compare-and-swap). `cloned_uuid` is
    set while `cloning`: the UUID of the header that was cloned, which becomes that of `luks`. `key` is set where the
    passphrase comes from a KMS, `rekey` while it is being changed, `conversion` while the volume key is, `move` while
    the volume goes to another backend. `key_since` is when the present key began to count; None where that is
    `created`.
    """

    id: str
    name: str
    capacity_bytes: int
    parameters: VolumeParameters
    encryption: EncryptionState | None = None
    luks: LuksIdentity | None = None
    cloned_uuid: str | None = None
    key: KeyTrail | None = None
    rekey: Rekey | None = None
    conversion: Conversion | None = None
    move: Move | None = None
    key_since: str | None = None
    file_system: FileSystemState = FileSystemState.NONE
    made_fs_type: str | None = None
    created: str
    revision: int = 0

    @property
    def tenant(self) -> str:
        """The namespace of its claim; "" where nobody said."""
        return (self.parameters.claim or "").partition("/")[0]

    @property
    def mapping_name(self) -> str:
        """Name of the volume's open LUKS device below /dev/mapper."""
        return mapping_name(self.id)

    @property
    def percent_moved(self) -> int:
        """How much of the volume is under the volume key that `conversion` brings; 0 without one."""
        return self.conversion.done * 100 // self.capacity_bytes if self.conversion else 0

    @property
    def is_settled(self) -> bool:
        """Whether nothing is ever formatted, made, moved or given another identity by what it says."""
        return (
            self.conversion is None
            and self.move is None
            and self.encryption in (None, EncryptionState.ENCRYPTED)
            and self.file_system
            in (
                FileSystemState.MADE,
                FileSystemState.RAW,
            )
        )


def mapping_name(volume_id: str) -> str:
    """Name of the mapping of `volume_id` below /dev/mapper."""
    return f"luks-{volume_id}"


def is_mapping_name(name: str) -> bool:
    """Whether `mapping_name` may have given that name."""
    return name.startswith("luks-")


def volume_of(mapping: str) -> str:
    """The id of the volume whose mapping has that name."""
    return mapping.removeprefix("luks-")


def volume_id_for(name: str) -> str:
    """The id of the volume that CreateVolume calls `name`: the name where it is short and safe, else a hash of it.

    Derived, so that CreateVolume is idempotent without a scan; at most 66 bytes, so that mapping name and
    device-mapper UUID (128 bytes, <linux/dm-ioctl.h>) hold it.
    """
    if _SAFE_NAME.fullmatch(name) and not name.startswith(_HASHED_PREFIX):
        return name
    return _HASHED_PREFIX + hashlib.sha256(name.encode()).hexdigest()


def is_object_name(text: str) -> bool:
    """Whether an object of Kubernetes can be called so (RFC 1123, subdomain)."""
    label = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
    return len(text) <= _MOST_OBJECT_NAME and re.fullmatch(rf"{label}(\.{label})*", text) is not None


def is_volume_id(text: str) -> bool:
    """Whether `text` can be an id of ours; anything else never reaches a path."""
    return len(text) <= _MOST_ID_BYTES and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", text) is not None
