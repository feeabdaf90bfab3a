"""StorageClass parameters: read, checked, typed; and their agreement with what a secret wishes.

docs/parameters.md is the table for users.
"""

import difflib
import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import structlog

from csi_driver.keys.secret import SecretKey
from csi_driver.luks import formats
from csi_driver.luks.formats import LuksFormat
from csi_driver.model.errors import InvalidArgument
from csi_driver.model.volume import VolumeParameters

_log = structlog.get_logger(__name__)
T = TypeVar("T")

FILE_SYSTEMS = ("ext4", "xfs", "btrfs")
DEFAULT_FILE_SYSTEM = "ext4"

_KUBERNETES = "csi.storage.k8s.io/"
_SECRET_KEYS = frozenset(
    f"{_KUBERNETES}{stage}-secret-{part}"
    for stage in ("provisioner", "controller-publish", "controller-expand", "node-stage", "node-publish", "node-expand")
    for part in ("name", "namespace")
)
"""The provisioner takes these out; who sends a class's parameters by hand may leave them in."""

_IGNORED = {
    "staleReplicaTimeout": "volumes have no replicas",
    "migratable": "a volume lives on one node",
    "imageFeatures": "it belongs to Ceph images",
    "clusterID": "it names a Ceph cluster and this backend is not Ceph",
    "pool": "it names a Ceph pool and this backend is not Ceph",
    "dataLocality": "a volume's data is always on its own node",
}

_MKFS_FLAGS: Mapping[str, Mapping[str, Sequence[str] | None]] = {
    "ext4": {"-b": None, "-i": None, "-I": None, "-N": None, "-m": None, "-O": None, "-T": None, "-g": None, "-G": None,
             "-E": ("stride", "stripe_width", "resize", "packed_meta_blocks", "num_backup_sb", "nodiscard",
                    "lazy_itable_init", "hash_seed"),
             "-J": ("size",)},
    "xfs": {"-b": None, "-m": None, "-n": None, "-i": None, "-s": None,
            "-d": ("agcount", "agsize", "su", "sw", "sunit", "swidth"),
            "-l": ("size", "version", "su", "sunit", "lazy-count")},
    "btrfs": {"-n": None, "-s": None, "-m": None, "-d": None, "-O": None, "--csum": None, "--checksum": None,
              "-M": None},
}  # fmt: skip
"""Options of mkfs that shape the new file system and do nothing else; sub-options are listed where some name files."""


def read_parameters(given: Mapping[str, str]) -> VolumeParameters:
    """Read the parameters of CreateVolume.

    Raises InvalidArgument for an unknown parameter (naming the nearest known one) or a value that cannot be. A
    parameter that other drivers' classes carry and that promises nothing here is logged as ignored.
    """
    values: dict[str, Any] = {}
    mkfs_options = ""
    for name, text in given.items():
        if name in _READERS:
            field, read = _READERS[name]
            value = read(name, text)
            if values.get(field, value) != value:
                raise InvalidArgument(f"the parameter {name} says {text!r} and another one says {values[field]!r}")
            values[field] = value
        elif name == "mkfsOptions":
            mkfs_options = text
        elif name in _IGNORED:
            _tell_ignored(name)
        elif name not in _CHECKED and name not in _SECRET_KEYS:
            raise _unknown(name)
        if name in _CHECKED and (refusal := _CHECKED[name](text)):
            raise InvalidArgument(refusal)
    claim = "/".join(given[key] for key in (f"{_KUBERNETES}pvc/namespace", f"{_KUBERNETES}pvc/name") if given.get(key))
    fs_type = values.get("fs_type")
    parameters = VolumeParameters(
        **values, claim=claim or None, mkfs_options=_mkfs_options(fs_type or DEFAULT_FILE_SYSTEM, mkfs_options)
    )
    luks_format(parameters, SecretKey(passphrase=None))
    return parameters


def check_mkfs_options(fs_type: str, options: Sequence[str]) -> None:
    """Raise InvalidArgument when an option is not one that mkfs of `fs_type` may get."""
    _mkfs_options(fs_type, shlex.join(options))


def luks_format(parameters: VolumeParameters, key: SecretKey) -> LuksFormat:
    """The choice for luksFormat: the parameter, else the secret's wish, else the default.

    Raises InvalidArgument when parameter and secret disagree or a wish is not on the allow-list.
    """
    wished_cipher = key.cipher and _one_of(*formats.CIPHER_KEY_BITS)("CRYPTO_KEY_CIPHER", key.cipher)
    wished_hash = key.hash and _one_of(*formats.HASHES)("CRYPTO_KEY_HASH", key.hash)
    wished_pbkdf = key.pbkdf and _one_of(*formats.PBKDFS)("CRYPTO_PBKDF", key.pbkdf)
    wished_bits = _number(128, 512)("CRYPTO_KEY_SIZE", key.key_size) if key.key_size else None
    cipher = _agree("cipher", parameters.cipher, "CRYPTO_KEY_CIPHER", wished_cipher) or LuksFormat.cipher
    key_bits = _agree("keySize", parameters.key_bits, "CRYPTO_KEY_SIZE", wished_bits)
    key_bits = key_bits or formats.default_key_bits(cipher)
    formats.check_key_bits(cipher, key_bits)
    hash_name = _agree("hash", parameters.hash, "CRYPTO_KEY_HASH", wished_hash) or LuksFormat.hash
    pbkdf = _agree("pbkdf", parameters.pbkdf, "CRYPTO_PBKDF", wished_pbkdf) or LuksFormat.pbkdf
    iterations = parameters.pbkdf_iterations or formats.default_iterations(pbkdf, hash_name)
    least = formats.PBKDF2_LEAST_ITERATIONS if pbkdf == "pbkdf2" else formats.ARGON2_LEAST_TIME
    if iterations < least:
        raise InvalidArgument(f"the parameter pbkdfIterations is {iterations}, but {pbkdf} wants at least {least}")
    if pbkdf == "pbkdf2" and parameters.pbkdf_memory_kib is not None:
        raise InvalidArgument("the parameter pbkdfMemory means nothing with pbkdf2; leave it out or choose argon2id")
    return LuksFormat(
        cipher=cipher,
        key_bits=key_bits,
        hash=hash_name,
        pbkdf=pbkdf,
        memory_kib=0 if pbkdf == "pbkdf2" else parameters.pbkdf_memory_kib or formats.ARGON2_DEFAULT_MEMORY_KIB,
        iterations=iterations,
        sector_size=parameters.sector_size or LuksFormat.sector_size,
    )


def _agree(parameter: str, chosen: T | None, entry: str, wished: T | None) -> T | None:
    if chosen is not None and wished is not None and chosen != wished:
        raise InvalidArgument(
            f"the StorageClass parameter {parameter} is {chosen} and the secret's entry {entry} is {wished}; "
            f"make them equal or leave one out"
        )
    return chosen if chosen is not None else wished


@functools.cache  # once in the life of the process is enough
def _tell_ignored(name: str) -> None:
    _log.info("StorageClass parameter ignored", parameter=name, reason=_IGNORED[name])


def _unknown(name: str) -> InvalidArgument:
    known = [*_READERS, *_IGNORED, *_CHECKED, "mkfsOptions"]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}" if near else f"; known are {', '.join(sorted(_READERS))} and mkfsOptions"
    return InvalidArgument(f"the parameter {name} is unknown{hint}")


def _boolean(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise InvalidArgument(f'the parameter {name} is {text!r}; it must be "true" or "false"')
    return text == "true"


def _one_of(*allowed: str) -> Callable[[str, str], str]:
    def read(name: str, text: str) -> str:
        if text not in allowed:
            raise InvalidArgument(f"{name} is {text!r}; it must be one of {', '.join(allowed)}")
        return text

    return read


def _number(least: int, most: int) -> Callable[[str, str], int]:
    def read(name: str, text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
            raise InvalidArgument(f"{name} is {text!r}; it must be a whole number from {least} to {most}")
        return int(text)

    return read


def _sector_size(name: str, text: str) -> int:
    return int(_one_of(*map(str, formats.SECTOR_SIZES))(name, text))


def _any(_: str, text: str) -> str:
    return text


_file_system = _one_of(*FILE_SYSTEMS)
_READERS: Mapping[str, tuple[str, Callable[[str, str], Any]]] = {
    "encrypted": ("encrypted", _boolean),
    "cipher": ("cipher", _one_of(*formats.CIPHER_KEY_BITS)),
    "keySize": ("key_bits", _number(128, 512)),
    "hash": ("hash", _one_of(*formats.HASHES)),
    "pbkdf": ("pbkdf", _one_of(*formats.PBKDFS)),
    "pbkdfMemory": ("pbkdf_memory_kib", _number(formats.ARGON2_LEAST_MEMORY_KIB, 4 << 20)),
    "pbkdfIterations": ("pbkdf_iterations", _number(formats.ARGON2_LEAST_TIME, (1 << 32) - 1)),
    "sectorSize": ("sector_size", _sector_size),
    "discard": ("discard", _boolean),
    "noReadWorkqueue": ("no_read_workqueue", _boolean),
    "noWriteWorkqueue": ("no_write_workqueue", _boolean),
    "backend": ("backend", _any),
    "numberOfReplicas": ("replicas", _number(1, 20)),
    "fstype": ("fs_type", _file_system),
    "fsType": ("fs_type", _file_system),
    f"{_KUBERNETES}fstype": ("fs_type", _file_system),
}
_CHECKED: Mapping[str, Callable[[str], str | None]] = {
    "fromBackup": lambda text: "the parameter fromBackup names a backup; this driver restores none" if text else None,
    "encryptionKMSID": lambda text: (
        f"the parameter encryptionKMSID is {text!r}, but no key management system is configured; leave it empty and "
        f"give the passphrase in the secret"
        if text
        else None
    ),
    f"{_KUBERNETES}pvc/name": lambda _: None,
    f"{_KUBERNETES}pvc/namespace": lambda _: None,
    f"{_KUBERNETES}pv/name": lambda _: None,
}


def _mkfs_options(fs_type: str, text: str) -> tuple[str, ...]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InvalidArgument(f"the parameter mkfsOptions cannot be split into words: {error}") from None
    allowed = _MKFS_FLAGS[fs_type]
    position = 0
    while position < len(words):
        flag = words[position]
        value = words[position + 1] if position + 1 < len(words) else None
        if flag not in allowed or value is None or value.startswith("-"):
            raise InvalidArgument(
                f"the parameter mkfsOptions holds {flag!r}, which is not an option with a value that mkfs.{fs_type} "
                f"may get; allowed are {', '.join(allowed)}, each followed by its value as a word of its own"
            )
        _check_suboptions(fs_type, flag, value, allowed[flag])
        position += 2
    return tuple(words)


def _check_suboptions(fs_type: str, flag: str, value: str, names: Sequence[str] | None) -> None:
    if names is None:
        return
    for part in value.split(","):
        if part.partition("=")[0] not in names:
            raise InvalidArgument(
                f"the parameter mkfsOptions holds {flag} {part!r}; for mkfs.{fs_type} {flag} allowed are "
                f"{', '.join(names)}"
            )
