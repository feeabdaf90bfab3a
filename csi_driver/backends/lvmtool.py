"""LVM's own program, for one volume group: what is there, made, lengthened, shown and removed.

Every command takes LVM's locks as it always does, and its answers are read as JSON (lvmreport(7)). Whether it succeeded
is its exit code; the text of a failure goes into an error.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from csi_driver.host.commands import Commands, ProgramFailed
from csi_driver.model.errors import (
    CommandFailed,
    DeadlineExceeded,
    DeviceAbsent,
    DeviceInUse,
    FailedPrecondition,
    ResourceExhausted,
)
from csi_driver.model.reading import convert, decode

OURS: Final = "luks-csi"
"""The tag of every logical volume that this driver made (lvm(8): tags are set in the same step as it is made)."""

_CONFIG: Final = (
    "activation{{udev_sync=0 udev_rules={udev} verify_udev_operations=0 monitoring=0}} "
    "global{{use_lvmpolld=0 notify_dbus=0 event_activation=0}} "
    "backup{{backup=0 archive=0}} "
    'devices{{use_devicesfile=0 obtain_device_list_from_udev=0 external_device_info_source="none" scan_lvs=0 '
    'filter=["r|^/dev/mapper/luks-|"]}}'
)
"""lvm.conf(5). udev is never waited for: its cookies hang in a container with IPC of its own (docs/architecture.md,
"Device-mapper and mounts"). What a pod writes into its mapping is never looked at for volume groups.
"""
LACKS: Final = (
    "lacks disks (vgs -o +vg_missing_pv_count), and LVM changes no such group; bring them back and run vgextend "
    "--restoremissing, or give them up with vgreduce --removemissing"
)
_GONE: Final = re.compile(r"not found|Failed to find")
_NO_ROOM: Final = re.compile(r"[Ii]nsufficient (free space|suitable)|free extents")
_TWICE: Final = re.compile(r"Multiple VGs found|is used by VGs")
_BUSY: Final = re.compile(r"in use|is used by|contains a filesystem")
_LV_FIELDS: Final = ("lv_name", "lv_uuid", "vg_uuid", "lv_size", "pool_lv", "lv_tags")
_VG_FIELDS: Final = ("vg_uuid", "vg_size", "vg_free", "vg_extent_size", "vg_attr", "vg_missing_pv_count")


@dataclass(frozen=True)
class Group:
    """The volume group; sizes in bytes. One that is not usable is another node's too, exported, or read-only."""

    uuid: str
    size: int
    free: int
    extent: int
    is_usable: bool
    is_whole: bool


@dataclass(frozen=True)
class LogicalVolume:
    """A logical volume; size in bytes. `pool` is the thin pool that it is in."""

    name: str
    uuid: str
    group_uuid: str
    size: int
    pool: str | None
    tags: frozenset[str]


def dm_name(group: str, name: str) -> str:
    """The device-mapper name of a logical volume: hyphens within the parts are doubled."""
    return f"{group.replace('-', '--')}-{name.replace('-', '--')}"


class VolumeGroup:
    """One volume group by its name. Every method raises DeviceAbsent when it is not there, CommandFailed,
    DeadlineExceeded, and FailedPrecondition where LVM is not installed.
    """

    def __init__(self, name: str, commands: Commands, seconds: float) -> None:
        self.name = name
        self._commands = commands
        self._seconds = seconds

    def look(self) -> Group:
        """The group as it is now."""
        (found,) = self._report("vgs", _VG_FIELDS, "vg", self.name)
        attributes = found["vg_attr"]
        return Group(
            uuid=found["vg_uuid"],
            size=int(found["vg_size"]),
            free=int(found["vg_free"]),
            extent=int(found["vg_extent_size"]),
            is_usable=attributes[0] == "w" and attributes[2] == "-" and attributes[5] not in "cs",  # vgs(8)
            is_whole=found["vg_missing_pv_count"] == "0",  # vg_free does not tell
        )

    def find(self, name: str) -> LogicalVolume | None:
        """The logical volume of that name, whoever made it."""
        found = self._report("lvs", _LV_FIELDS, "lv", "-S", f"lv_name={name}", self.name)
        return _volume(found[0]) if found else None

    def made_of(self, name: str) -> Sequence[str]:
        """The logical volumes that are snapshots of that one, or have it as external origin (lvmthin(7))."""
        found = self._report("lvs", ("lv_name",), "lv", "-S", f"origin={name}", self.name)
        return sorted(each["lv_name"] for each in found)

    def ours(self) -> Sequence[frozenset[str]]:
        """The tags of each logical volume that carries our tag."""
        found = self._report("lvs", ("lv_tags",), "lv", "-S", f"tags={OURS}", self.name)
        return [_tags(each) for each in found]

    def make(self, name: str, size: int, tags: Sequence[str], pool: str | None = None) -> None:
        """Make a logical volume of at least `size` bytes, thin in `pool`, else of extents of its own as they are.

        It is not shown, nor by what shows all of a group at boot. Raises ResourceExhausted.
        """
        kind = ["--type", "linear", "-Zn", "-Wn", "-L", f"{size}b"]
        if pool is not None:
            kind = ["--type", "thin", "--thinpool", pool, "-V", f"{size}b"]
        named = [word for tag in (OURS, *tags) for word in ("--addtag", tag)]
        self._run("make", name, "lvcreate", "-y", "-an", "-ky", *named, *kind, "-n", name, self.name)

    def extend(self, name: str, size: int) -> None:
        """Make it at least `size` bytes long; what shows it shows that at once. Raises ResourceExhausted."""
        self._run("extend", name, "lvextend", "-y", "-L", f"{size}b", f"{self.name}/{name}")

    def activate(self, uuid: str) -> None:
        """Show the logical volume of that very UUID, if it is there."""
        self._run("show", uuid, "lvchange", "-y", "-ay", "-K", "-S", f"lv_uuid={uuid}", self.name)

    def activate_pool(self, name: str) -> None:
        """Show a thin pool. thin_check(8) is run on it by name, before udev could have made that: so LVM has to."""
        self._run("show", name, "lvchange", "-y", "-ay", "-K", f"{self.name}/{name}", udev=0)

    def refresh(self, name: str) -> None:
        """Let what shows it show what it is."""
        self._run("refresh", name, "lvchange", "-y", "--refresh", f"{self.name}/{name}")

    def retag(self, name: str, old: str | None, new: str | None) -> None:
        """One tag for another, in one step; None for none."""
        words = [*(("--deltag", old) if old else ()), *(("--addtag", new) if new else ())]
        self._run("tag", name, "lvchange", "-y", *words, f"{self.name}/{name}")

    def remove(self, uuid: str) -> None:
        """Remove the logical volume of that very UUID; absent is fine. Raises DeviceInUse."""
        self._run("remove", uuid, "lvremove", "-y", "-S", f"lv_uuid={uuid}", self.name)

    def _report(self, command: str, fields: Sequence[str], kind: str, *words: str) -> Sequence[Mapping[str, str]]:
        told = self._run(
            "list", "", command, "--reportformat", "json", "--units", "b", "--nosuffix", "-o", ",".join(fields), *words
        )
        try:
            (report,) = decode(told, dict[str, Any])["report"]
            return convert(report[kind], list[dict[str, str]])
        except (msgspec.MsgspecError, ValueError, KeyError) as error:
            raise CommandFailed(f"{command} gave a report of {self.name} that cannot be read ({error})") from None

    def _run(self, what: str, name: str, command: str, *words: str, udev: int = 1) -> str:
        # Without udev no names are made for what we show, which is opened by its number: nobody would remove them.
        argv = ["lvm", command, "--config", _CONFIG.format(udev=udev), *words]
        try:
            return self._commands.read(argv, timeout=self._seconds)
        except DeadlineExceeded:
            raise DeadlineExceeded(
                f"LVM could not {what} {f'{name} in ' if name else ''}the volume group {self.name} within "
                f"{self._seconds:g} s: another command of LVM may hold its lock (/run/lock/lvm/V_{self.name}), or a "
                f"disk does not answer; look which one runs"
            ) from None
        except ProgramFailed as failed:
            said = [line.strip() for line in failed.stderr.splitlines() if "WARNING" not in line]
            text = f"LVM could not {what} {f'{name} in ' if name else ''}the volume group {self.name}: "
            reason = " / ".join(said[-2:]) or f"exit code {failed.code}"
            if f'Volume group "{self.name}" not found' in failed.stderr:
                raise self._absent() from None
            if _TWICE.search(failed.stderr):
                raise FailedPrecondition(
                    f"{text}there are several groups of that name on this node; take the disk of the other one away, "
                    f"or give that another name by its UUID (vgs -o +vg_uuid, vgrename)"
                ) from None
            if _NO_ROOM.search(failed.stderr):
                raise ResourceExhausted(f"{text}{reason}; free space there or extend it") from None
            if _BUSY.search(failed.stderr):
                raise DeviceInUse(f"{text}{reason}; end what uses it") from None
            if _GONE.search(failed.stderr):
                raise FailedPrecondition(f"{text}{reason}; look with 'lvs {self.name}'") from None
            raise CommandFailed(f"{text}{reason}; look with 'lvs {self.name}'") from None

    def _absent(self) -> DeviceAbsent:
        return DeviceAbsent(
            f"there is no volume group {self.name} on this node; attach its disks (vgs shows what is there), or name "
            f"another one with --volume-group"
        )


def _volume(fields: Mapping[str, str]) -> LogicalVolume:
    return LogicalVolume(
        name=fields["lv_name"],
        uuid=fields["lv_uuid"],
        group_uuid=fields["vg_uuid"],
        size=int(fields["lv_size"]),
        pool=fields["pool_lv"] or None,
        tags=_tags(fields),
    )


def _tags(fields: Mapping[str, str]) -> frozenset[str]:
    return frozenset(filter(None, fields["lv_tags"].split(",")))
