"""mountOptions of a StorageClass as flags and data for mount(2), from an allow-list."""

import re
from collections.abc import Callable, Sequence
from typing import Final

from msgspec import Struct

from csi_driver.model.errors import InvalidArgument

_MS_RDONLY: Final = 1
_MS_SYNCHRONOUS: Final = 16
# These belong to the mount, the rest to the file system below it (mount_setattr(2)).
_PER_MOUNT: Final = {
    "ro": _MS_RDONLY,
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
    "noatime": 1 << 10,
    "nodiratime": 1 << 11,
    "relatime": 1 << 21,
    "strictatime": 1 << 24,
}
_PER_FILE_SYSTEM: Final = {"sync": _MS_SYNCHRONOUS, "dirsync": 128, "lazytime": 1 << 25}
# What the kernel does anyway; they are dropped so that equal behaviour compares equal.
_WITHOUT_EFFECT: Final = frozenset({"defaults", "rw", "_netdev", "relatime"})
_CONFLICTS: Final = (("ro", "rw"), ("noatime", "relatime", "strictatime"), ("discard", "nodiscard"))
_CONTEXTS: Final = frozenset({"context", "fscontext", "defcontext", "rootcontext"})
_CONTEXT_VALUE: Final = re.compile(r"[A-Za-z0-9_.:,-]+")

# mount(2) reads a page; what the driver and the quotes around labels add must fit too. CSI bounds mount_flags at 4 KiB.
_MOST_BYTES: Final = 4000

_EXT4: Final = frozenset({"ext4"})
_XFS: Final = frozenset({"xfs"})
_BTRFS: Final = frozenset({"btrfs"})
_ALL: Final = _EXT4 | _XFS | _BTRFS


def _one_of(*allowed: str) -> Callable[[str], bool]:
    return allowed.__contains__


def _number(low: int, high: int) -> Callable[[str], bool]:
    return lambda value: re.fullmatch(r"[0-9]{1,9}", value) is not None and low <= int(value) <= high


def _size(value: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}[kKmMgG]?", value) is not None


def _compression(value: str) -> bool:
    return re.fullmatch(r"no|none|lzo|zlib(:[1-9])?|zstd(:(1[0-5]|[1-9]))?", value) is not None


# Option -> the file systems that know it. `barrier` stays, `nobarrier` does not: it loses fsynced data on power cuts.
_PLAIN: Final[dict[str, frozenset[str]]] = {
    "discard": _ALL,
    "nodiscard": _ALL,
    "barrier": _EXT4 | _BTRFS,
    "usrquota": _EXT4 | _XFS,
    "grpquota": _EXT4 | _XFS,
    "prjquota": _EXT4 | _XFS,
    "uquota": _XFS,
    "gquota": _XFS,
    "pquota": _XFS,
    "inode64": _XFS,
    "nouuid": _XFS,
    "compress": _BTRFS,
    "compress-force": _BTRFS,
    "ssd": _BTRFS,
    "autodefrag": _BTRFS,
}
_VALUED: Final[dict[str, tuple[frozenset[str], Callable[[str], bool], str]]] = {
    "barrier": (_EXT4, _one_of("1"), "1"),
    "commit": (_EXT4 | _BTRFS, _number(1, 300), "1 to 300 seconds"),
    "data": (_EXT4, _one_of("ordered", "journal"), "ordered or journal"),
    "errors": (_EXT4, _one_of("remount-ro"), "remount-ro"),
    "discard": (_BTRFS, _one_of("sync", "async"), "sync or async"),
    "logbufs": (_XFS, _number(2, 8), "2 to 8"),
    "logbsize": (_XFS, _size, "a size such as 256k"),
    "allocsize": (_XFS, _size, "a size such as 64m"),
    "compress": (_BTRFS, _compression, "zstd[:1-15], zlib[:1-9], lzo or no"),
    "compress-force": (_BTRFS, _compression, "zstd[:1-15], zlib[:1-9], lzo or no"),
    "space_cache": (_BTRFS, _one_of("v2"), "v2"),
}
ALLOWED: Final = tuple(
    sorted({*_PER_MOUNT, *_PER_FILE_SYSTEM, *_WITHOUT_EFFECT, *_PLAIN, *_CONTEXTS, *(f"{name}=" for name in _VALUED)})
)
"""The names that `parse_options` knows; those that end in "=" take a value."""


class MountOptions(Struct, frozen=True):
    """Options ready for mount(2).

    `flags` and `data` are its arguments, `per_mount` is the part of `flags` that belongs to the mount and not to the
    file system, `canonical` is equal for two sets that mean the same, in whatever order and spelling they came.
    """

    flags: int
    data: str
    per_mount: int
    canonical: tuple[str, ...]

    @property
    def read_only(self) -> bool:
        """Whether "ro" is among them."""
        return bool(self.flags & _MS_RDONLY)


def parse_options(options: Sequence[str], fs_type: str | None = None) -> MountOptions:
    """Turn mountOptions, one option per element, into what mount(2) takes; `fs_type` refuses what that one lacks.

    Raises InvalidArgument, naming the option and what is allowed.
    """
    if (size := len(",".join(options).encode())) > _MOST_BYTES:
        raise InvalidArgument(f"the mount options take {size} bytes; give at most {_MOST_BYTES}")
    flags = 0
    data: dict[str, str] = {}
    seen: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if name in _CONTEXTS:
            value = _context(option, value)
        else:
            _check(option, name, value if equals else None, fs_type)
        if seen.setdefault(name, value) != value:
            raise InvalidArgument(f"the mount option '{name}' is given twice with different values; give it once")
        if name in _WITHOUT_EFFECT:
            continue
        if not equals and (flag := _PER_MOUNT.get(name) or _PER_FILE_SYSTEM.get(name)):
            flags |= flag
        else:
            data[name] = f'{name}="{value}"' if name in _CONTEXTS else option
    for group in _CONFLICTS:
        if len(given := [name for name in group if name in seen]) > 1:
            raise InvalidArgument(f"the mount options {' and '.join(given)} exclude each other; give one of them")
    per_mount = sum(flag for flag in _PER_MOUNT.values() if flags & flag)
    named = [name for name, flag in (_PER_MOUNT | _PER_FILE_SYSTEM).items() if flags & flag]
    entries = [data[name] for name in sorted(data)]
    return MountOptions(flags, ",".join(entries), per_mount, tuple(sorted([*named, *entries])))


def _context(option: str, value: str) -> str:
    """An SELinux label without the quotes that kubelet puts around it; the kernel needs them for the commas inside."""
    if len(value) > 1 and value[0] == value[-1] == '"':
        value = value[1:-1]
    if not _CONTEXT_VALUE.fullmatch(value):
        raise InvalidArgument(f"the mount option {option!r} does not hold an SELinux label")
    return value


def _check(option: str, name: str, value: str | None, fs_type: str | None) -> None:
    if value is None:
        known = name in _PER_MOUNT or name in _PER_FILE_SYSTEM or name in _WITHOUT_EFFECT
        file_systems = _ALL if known else _PLAIN.get(name)
    else:
        file_systems = _VALUED[name][0] if name in _VALUED else None
    if file_systems is None:
        raise InvalidArgument(_unknown(option, name, value))
    if value is not None and not _VALUED[name][1](value):
        raise InvalidArgument(f"the mount option {option!r} has a wrong value: {name}= takes {_VALUED[name][2]}")
    if fs_type is not None and fs_type not in file_systems:
        raise InvalidArgument(
            f"the mount option '{option}' does not exist for {fs_type}, only for {', '.join(sorted(file_systems))}"
        )


def _unknown(option: str, name: str, value: str | None) -> str:
    if name in _VALUED and value is None:
        return f"the mount option '{name}' needs a value: {_VALUED[name][2]}"
    import difflib  # noqa: PLC0415 - for a refusal alone

    nearest = difflib.get_close_matches(name if value is None else f"{name}=", ALLOWED, n=1)
    meant = f", did you mean '{nearest[0]}'?" if nearest else ";"
    return f"the mount option {option!r} is not allowed{meant} allowed are {' '.join(ALLOWED)}"
