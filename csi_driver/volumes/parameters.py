"""StorageClass parameters: read, checked, typed.

docs/parameters.md is the table for users.
"""

import functools
import itertools
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from csi_driver.host.log import log
from csi_driver.luks import formats
from csi_driver.luks.choice import one_of, whole_number
from csi_driver.model.errors import InvalidArgument
from csi_driver.model.volume import VolumeParameters, is_object_name
from csi_driver.volumes import ceph_parameters, image_source

FILE_SYSTEMS = ("ext4", "xfs", "btrfs")
DEFAULT_FILE_SYSTEM = "ext4"

_KUBERNETES = "csi.storage.k8s.io/"
_SECRET_KEYS = frozenset(
    key
    for part in ("name", "namespace")
    for key in (
        f"{_KUBERNETES}secret-{part}",
        *(
            f"{_KUBERNETES}{stage}-secret-{part}"
            for stage in (
                "provisioner", "controller-publish", "controller-expand", "controller-modify", "node-stage",
                "node-publish", "node-expand",
            )
        ),
        *(
            f"csi{stage}Secret{part.capitalize()}"
            for stage in ("Provisioner", "ControllerPublish", "NodeStage", "NodePublish")
        ),
    )
)  # fmt: skip
"""What external-provisioner reads itself: GetCapacity is sent all of them, CreateVolume those without a prefix."""

_NAMES_OF_CLAIM = (f"{_KUBERNETES}pvc/namespace", f"{_KUBERNETES}pvc/name", f"{_KUBERNETES}pv/name")

_KEY_SOURCES = {
    "encryptionKMSID": "kms_id",
    "generateKey": "generate_key",
    "keyReclaimPolicy": "retain_key",
    "eraseOnDelete": "erase_on_delete",
    "keyRotationPeriod": "key_rotation_seconds",
}
_IGNORED = {
    "staleReplicaTimeout": "volumes have no replicas",
    "replicaAutoBalance": "volumes have no replicas",
    "replicaSoftAntiAffinity": "volumes have no replicas",
    "replicaZoneSoftAntiAffinity": "volumes have no replicas",
    "replicaDiskSoftAntiAffinity": "volumes have no replicas",
    "disableRevisionCounter": "volumes have no replicas",
    "dataEngine": "it names an engine of Longhorn",
    "unmapMarkSnapChainRemoved": "volumes have no snapshots",
    "freezeFilesystemForSnapshot": "volumes have no snapshots",
    "backupTargetName": "volumes have no backups",
    "backupBlockSize": "volumes have no backups",
    "nfsOptions": "no volume is shared by NFS",
    "shareManagerNodeSelector": "no volume is shared by NFS",
    "shareManagerTolerations": "no volume is shared by NFS",
    "migratable": "a volume lives on one node",
    "diskSelector": "nodes have no disks by tag",
    "nodeSelector": "a volume is made on the node that uses it",
    "imageFeatures": "it belongs to Ceph images",
    "dataPool": "it names a Ceph pool and this backend is not Ceph",
    "mounter": "it says how Ceph images are mapped and this backend is not Ceph",
    "mapOptions": "it says how Ceph images are mapped and this backend is not Ceph",
    "clusterID": "it names a Ceph cluster and this backend is not Ceph",
    "pool": "it names a Ceph pool and this backend is not Ceph",
    "dataLocality": "a volume's data is always on its own node",
}
_ONE_VALUE = {
    "fromBackup": ("", "no backup can be restored"),
    "recurringJobSelector": ("", "nothing makes snapshots or backups of a volume by itself"),
    "backingImageChecksum": ("", "an image is compared with its checksum when it is imported, and not by a class"),
    "dataLayout.type": ("replicated", "a volume has one copy, without parity"),
    "dataLayout.mode": ("raid1", "a volume has one copy, without parity"),
    "encryptionType": ("block", "it is the device that is encrypted, with LUKS2, and no files (fscrypt)"),
    "integrityMode": ("", "encryption is without integrity protection (dm-integrity)"),
}
"""What another driver's parameter may say here if it says anything, and why nothing else: it would promise more."""

_MKFS_FLAGS: Mapping[str, Mapping[str, Sequence[str] | None]] = {
    "ext4": {"-b": ("1024", "2048", "4096"),
             "-i": None, "-I": None, "-N": None, "-m": None, "-O": None, "-T": None, "-g": None, "-G": None,
             "-E": ("stride", "stripe_width", "resize", "packed_meta_blocks", "num_backup_sb", "nodiscard",
                    "lazy_itable_init", "hash_seed"),
             "-J": ("size",)},
    "xfs": {"-b": None, "-m": None, "-n": None, "-i": None, "-s": None,
            "-d": ("agcount", "agsize", "su", "sw", "sunit", "swidth"),
            "-l": ("size", "version", "su", "sunit", "lazy-count")},
    "btrfs": {"-n": None, "-s": None, "-m": None, "-d": None, "-O": None, "--csum": None, "--checksum": None},
}  # fmt: skip
"""Options of mkfs that shape the new file system and do nothing else; sub-options are listed where some name files, and
block sizes of ext4, as in a larger one there may be no room for a journal.

Each takes a value: what followed one that takes none (-M of btrfs) would be one more device to format.
"""
_MKFS_VALUE = re.compile(r"[A-Za-z0-9^=_,.:+-]+")  # nothing that could name a file
_SIZE = re.compile(r"(?:size=)?([0-9]{1,9})([kK]?)")  # of blocks or sectors, for all three
_LONGEST_KMS_ID = 253
_POOL_NAME = re.compile(r"[A-Za-z0-9_.+][A-Za-z0-9_.+-]{0,63}")  # lvm(8), "Valid names"
_PERIOD = re.compile(r"([1-9][0-9]{0,3})([hdw])")
_UNIT_SECONDS = {"h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}
_NO_FILE_SYSTEM = frozenset({"journal_dev", "list-all"})  # values of -O with which mkfs succeeds and makes none
_NO_JOURNAL = re.compile(r"none|clear|[-^](has_journal|feature_c[+0]*2)", re.IGNORECASE)
"""Values of -O that take ext4's journal away (mke2fs(8); libe2p reads a feature's number too)."""


def read_parameters(given: Mapping[str, str], backend: str = "") -> VolumeParameters:
    """Read the parameters of CreateVolume for a driver of that backend; those of other backends are ignored.

    Raises InvalidArgument for an unknown parameter (naming the nearest known one) or a value that cannot be; what must
    fit together is for `luks_format` and `check_mkfs_options` to say. A parameter that other drivers' classes carry and
    that promises nothing here is logged as ignored.
    """
    values: dict[str, Any] = {}
    own = _OF_BACKENDS.get(backend, {})
    for name, text in given.items():
        if (reader := own.get(name) or _READERS.get(name)) is not None:
            field, value = _value(name, text, reader)
            if values.get(field, value) != value:
                raise InvalidArgument(f"the parameter {name} says {text!r} and another one says {values[field]!r}")
            values[field] = value
        elif name in _ONE_VALUE:
            _check_one_value(name, text)
        elif name in _IGNORED:
            _tell_ignored(name)
        elif name not in _NAMES_OF_CLAIM and name not in _SECRET_KEYS:
            raise _unknown(name)
    claim = "/".join(given[key] for key in _NAMES_OF_CLAIM[:2] if given.get(key))
    parameters = VolumeParameters(**values, claim=claim or None)
    if parameters.fs_type is not None:  # else it comes with the volume's capability
        check_mkfs_options(parameters.fs_type, parameters.mkfs_options)
    image_source.check_together(parameters)
    _check_key_source(parameters)
    return parameters


def _check_key_source(parameters: VolumeParameters) -> None:
    wished = [name for name, wish in _KEY_SOURCES.items() if getattr(parameters, wish)]
    if wished and not parameters.encrypted:
        raise InvalidArgument(f'the parameter {wished[0]} means nothing without encrypted: "true"; add it')
    if parameters.kms_id is not None and parameters.generate_key:
        raise InvalidArgument(
            "the parameters encryptionKMSID and generateKey each say where the key comes from; leave one of them out"
        )
    own_key = parameters.kms_id is not None or parameters.generate_key
    if parameters.key_rotation_seconds is not None and not own_key:
        raise InvalidArgument(
            "the parameter keyRotationPeriod wants new keys, and nobody makes one for the passphrase of a secret; "
            "leave it out, or name a KMS by encryptionKMSID"
        )
    if parameters.retain_key and not own_key:
        raise InvalidArgument(
            "the parameter keyReclaimPolicy means nothing for the passphrase of a secret; leave it out, or name a KMS"
        )


def _value(name: str, text: str, reader: tuple[str, Callable[[str], Any]]) -> tuple[str, object]:
    field, read = reader
    try:
        return field, read(text)
    except ValueError as error:
        raise InvalidArgument(f"the parameter {name} is {text!r}; it must be {error}") from None


def _check_one_value(name: str, text: str) -> None:
    value, reason = _ONE_VALUE[name]
    if text not in ("", value):
        remedy = f"make it {value!r} or leave it out" if value else "leave it out"
        raise InvalidArgument(f"the parameter {name} is {text!r} and {reason}; {remedy}")


def check_mkfs_options(fs_type: str, options: Sequence[str]) -> None:
    """Raise InvalidArgument when an option is not one that mkfs of `fs_type` may get, with a value of its own."""
    allowed = _MKFS_FLAGS[fs_type]
    for flag, value in itertools.zip_longest(options[::2], options[1::2], fillvalue=""):
        if flag not in allowed or value.startswith("-") or not _MKFS_VALUE.fullmatch(value):
            raise InvalidArgument(
                f"the parameter mkfsOptions holds {f'{flag} {value}'.strip()!r}, which is not an option with a value "
                f"that mkfs.{fs_type} may get; allowed are {', '.join(allowed)}, each followed by its value as a word "
                f"of its own"
            )
        _check_suboptions(fs_type, flag, value, allowed[flag])


def wants_small_blocks(options: Sequence[str]) -> bool:
    """Whether checked mkfsOptions ask for blocks or sectors below 4096 bytes, which a device of such sectors lacks."""
    sizes = [value for flag, value in zip(options[::2], options[1::2], strict=True) if flag in ("-b", "-s")]
    found = (_SIZE.fullmatch(part) for value in sizes for part in value.split(","))
    return any(one and int(one[1]) << (10 if one[2] else 0) < formats.LARGE_SECTOR for one in found)


@functools.cache  # once in the life of the process is enough
def _tell_ignored(name: str) -> None:
    log.info("StorageClass parameter ignored", parameter=name, reason=_IGNORED[name])


def _unknown(name: str) -> InvalidArgument:
    known = [*_READERS, *_IGNORED, *_ONE_VALUE, *_NAMES_OF_CLAIM]
    import difflib  # noqa: PLC0415 - for a refusal alone

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}" if near else f"; known are {', '.join(sorted(_READERS))}"
    return InvalidArgument(f"the parameter {name!r} is unknown{hint}")


# Readers of a value; what they raise says what it must be.


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError('"true" or "false"')
    return text == "true"


def _words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"words as a shell reads them ({error})") from None


def _sector_size(text: str) -> int:
    return int(one_of(*map(str, formats.SECTOR_SIZES))(text))


def _kms_id(text: str) -> str | None:
    """Ceph-CSI's words for the passphrase of the secret are nothing, and default."""
    if len(text) > _LONGEST_KMS_ID or not text.isprintable():
        raise ValueError(f"an id of the KMS configuration, at most {_LONGEST_KMS_ID} printable characters")
    return None if text in ("", "default") else text


def _retains(text: str) -> bool:
    return one_of("Delete", "Retain")(text) == "Retain"


def _pool(text: str) -> str:
    if not _POOL_NAME.fullmatch(text):
        raise ValueError("the name of a thin pool: at most 64 letters, digits, '_', '.', '+' and '-'")
    return text


def _period(text: str) -> int:
    """A period in seconds; as it is of whole hours at least, none is shorter than an hour."""
    found = _PERIOD.fullmatch(text)
    if found is None:
        raise ValueError('1 to 9999 hours, days or weeks, such as "12h", "90d" or "4w"')
    return int(found[1]) * _UNIT_SECONDS[found[2]]


def _class_name(text: str) -> str:
    if not is_object_name(text):
        raise ValueError("a name of small letters, digits, '-' and '.'")
    return text


_file_system = one_of(*FILE_SYSTEMS)
_READERS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "encrypted": ("encrypted", _boolean),
    "cipher": ("cipher", one_of(*formats.CIPHER_KEY_BITS)),
    "keySize": ("key_bits", whole_number(128, 512)),
    "hash": ("hash", one_of(*formats.HASHES)),
    "pbkdf": ("pbkdf", one_of(*formats.PBKDFS)),
    "pbkdfMemory": ("pbkdf_memory_kib", whole_number(formats.ARGON2_LEAST_MEMORY_KIB, 4 << 20)),
    "pbkdfIterations": ("pbkdf_iterations", whole_number(formats.ARGON2_LEAST_TIME, formats.PBKDF2_MOST_ITERATIONS)),
    "sectorSize": ("sector_size", _sector_size),
    "encryptionCipher": ("cipher", one_of(*formats.CIPHER_KEY_BITS)),
    "encryptionKeySize": ("key_bits", whole_number(128, 512)),
    "encryptionSectorSize": ("sector_size", _sector_size),
    "encryptionKMSID": ("kms_id", _kms_id),
    "generateKey": ("generate_key", _boolean),
    "keyReclaimPolicy": ("retain_key", _retains),
    "eraseOnDelete": ("erase_on_delete", _boolean),
    "keyRotationPeriod": ("key_rotation_seconds", _period),
    "mkfsOptions": ("mkfs_options", _words),
    "mkfsParams": ("mkfs_options", _words),
    "discard": ("discard", _boolean),
    "noReadWorkqueue": ("no_read_workqueue", _boolean),
    "noWriteWorkqueue": ("no_write_workqueue", _boolean),
    image_source.NAME: ("backing_image", image_source.read_name),
    image_source.TYPE: ("image_source_type", image_source.read_type),
    image_source.PARAMETERS: ("image_source", image_source.read_source),
    "backend": ("backend", str),
    "thinPool": ("thin_pool", _pool),
    "backingStorageClass": ("backing_storage_class", _class_name),
    "backingAttach": ("backing_attach", one_of("holder", "direct")),
    "numberOfReplicas": ("replicas", whole_number(1, 20)),
    "fstype": ("fs_type", _file_system),
    "fsType": ("fs_type", _file_system),
    f"{_KUBERNETES}fstype": ("fs_type", _file_system),
}
_OF_BACKENDS: Mapping[str, Mapping[str, tuple[str, Callable[[str], Any]]]] = {"rbd": ceph_parameters.READERS}


def _check_suboptions(fs_type: str, flag: str, value: str, names: Sequence[str] | None) -> None:
    for part in value.split(","):
        if flag == "-O" and part in _NO_FILE_SYSTEM:
            raise InvalidArgument(f"the parameter mkfsOptions holds -O {part!r}, which makes no file system")
        if (fs_type, flag) == ("ext4", "-O") and _NO_JOURNAL.fullmatch(part):
            raise InvalidArgument(
                f"the parameter mkfsOptions holds -O {part!r}, which makes ext4 without a journal: after a power cut "
                f"nobody would repair it; leave it out"
            )
        if names is not None and part.partition("=")[0] not in names:
            raise InvalidArgument(
                f"the parameter mkfsOptions holds {flag} {part!r}; for mkfs.{fs_type} {flag} allowed are "
                f"{', '.join(names)}"
            )
