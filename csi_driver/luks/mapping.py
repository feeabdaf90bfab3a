"""Open LUKS mappings: whose they are, whether one may be used again, and how they are closed."""

import contextlib
import os
import time
from collections.abc import Iterable
from enum import StrEnum

from csi_driver.host import blockdev, dmnodes, keyring
from csi_driver.host.devicemapper import Device, DeviceMapper, MappingHandle
from csi_driver.host.dmcontrol import NoDeviceMapper
from csi_driver.host.holders import Holders, describe
from csi_driver.luks.device import ALL_KEYS, UUID_PREFIX, dm_uuid, key_prefix
from csi_driver.luks.key_proof import proof_name
from csi_driver.model.errors import DeviceInUse, MappingMismatch

_CLOSE_SECONDS = 3.0
_UUID_LENGTH = 36
_MOST_TARGETS = 2


class Fit(StrEnum):
    """What an open mapping of a volume's name is to the volume."""

    ABSENT = "absent"
    FITS = "fits"
    STALE = "stale"


class Mappings:
    """Looks at and closes mappings of this node; opening is `csi_driver.luks.device.open_device`."""

    def __init__(self, mapper: DeviceMapper, holders: Holders) -> None:
        self._mapper = mapper
        self._holders = holders

    def get(self, name: str) -> Device | None:
        """The open mapping of that name."""
        return self._mapper.get(name)

    def find(self, name: str) -> Device | None:
        """As `get`; on a host without device-mapper there is none."""
        try:
            return self.get(name)
        except NoDeviceMapper:
            return None

    def open(self, name: str) -> MappingHandle:
        """Hold the open mapping of that name, checked after it was opened. Raises DeviceAbsent."""
        return self._mapper.open(name)

    @staticmethod
    def is_made_for(mapping: Device, name: str) -> bool:
        """Whether it was opened, by whom ever, as a LUKS2 mapping of that name."""
        return mapping.uuid.startswith(UUID_PREFIX) and mapping.uuid.endswith(f"-{name}")

    def names(self) -> list[str]:
        """The names of all device-mapper devices of this node."""
        return self._mapper.names()

    def fit(self, mapping: Device | None, name: str, uuid: str) -> Fit:
        """Judge a mapping by its UUID and table; whether its device is the volume's is the backend's to say.

        STALE is a mapping made for this name that cannot be used: of another LUKS UUID, without a table, with another
        target, or with its device gone. Raises MappingMismatch when somebody else's device has taken the name.
        """
        if mapping is None:
            return Fit.ABSENT
        if not self.is_made_for(mapping, name):
            raise MappingMismatch(
                f"the device /dev/mapper/{name} has the UUID {mapping.uuid or '(none)'} and was not opened by this "
                f"driver; remove it with `dmsetup remove {name}` if nothing needs it"
            )
        if mapping.uuid != dm_uuid(name, uuid) or not self.backings(mapping):
            return Fit.STALE
        return Fit.FITS

    def backings(self, mapping: Device) -> frozenset[tuple[int, int]]:
        """Major and minor number of the live device below a crypt mapping; none when it is gone or there is no such.

        Two while a volume is moved under another volume key.
        """
        if not 1 <= len(mapping.targets) <= _MOST_TARGETS or {each.type for each in mapping.targets} != {"crypt"}:
            return frozenset()
        there = all(os.path.exists(f"/sys/dev/block/{major}:{minor}") for major, minor in mapping.backing)
        return frozenset(mapping.backing if there and len(mapping.backing) == len(mapping.targets) else ())

    def others_on(self, number: tuple[int, int], name: str) -> list[str]:
        """What else than the mapping `name` lies on the device of that number, by whom ever: paths of devices.

        Its proof, which a killed resize may have left, is its own.
        """
        own = {dmnodes.name_path(each) for each in (name, proof_name(name))}
        return [path for path in blockdev.on_top_of(number) if path not in own]

    def keeps_key(self, uuid: str) -> bool:
        """Whether a volume key with which an open mapping grows is in root's user keyring. Raises CommandFailed."""
        return bool(keyring.kept(key_prefix(uuid)))

    def keys_left(self) -> dict[str, int]:
        """Volume keys in root's user keyring of which no mapping is open, and their serials (`keyring.kept`)."""
        kept = keyring.kept(ALL_KEYS)  # before the mappings: a key is kept after its mapping was made
        opened = blockdev.mapping_uuids()
        left = {
            name: serial
            for name, serial in kept.items()
            if not any(each.startswith(dm_uuid("", name.removeprefix(ALL_KEYS)[:_UUID_LENGTH])) for each in opened)
        }
        return dict(left.items() & keyring.kept(ALL_KEYS).items())  # else it was closed meanwhile

    def close(self, name: str, uuid: str | None = None) -> None:
        """Close the mapping and forget its volume keys, also those of `uuid`; absent is fine, no key is needed.

        Somebody else's device that has taken the name stays. Something that merely glances at the device (udev) is
        waited for, up to 3 s. Raises DeviceInUse naming who keeps it busy.
        """
        mapping = self.find(name)
        self.end_proof(name)
        uuids = {uuid, luks_uuid(mapping.uuid, name) if mapping else None}
        deadline = time.monotonic() + _CLOSE_SECONDS
        pause = 0.01
        while mapping is not None and self.is_made_for(mapping, name):
            if mapping.open_count == 0:
                # The keys first: a kill between leaves a mapping, which is found by its name; a key would be by nobody.
                _forget_keys(uuids)
                with contextlib.suppress(DeviceInUse):
                    self._mapper.remove(name)
                    return
            if time.monotonic() > deadline:
                raise self._in_use(mapping)
            time.sleep(pause)
            pause *= 2
            mapping = self.find(name)
        if mapping is None:
            dmnodes.remove_name(name)  # a kill between removal and this left it, and the number is another's by now
        _forget_keys(uuids)

    def end_proof(self, name: str) -> None:
        """Remove the second mapping that a killed resize of this one has left on the volume's device. As `close`."""
        if self.find(proof := proof_name(name)) is not None:
            self._mapper.remove(proof)
        else:
            dmnodes.remove_name(proof)  # as in `close`

    def _in_use(self, mapping: Device) -> DeviceInUse:
        found = [
            *self._holders.of_device(mapping.major, mapping.minor),
            *self._holders.of_mount((mapping.major, mapping.minor)),
        ]
        who = describe(found) if found else "something that this process cannot see (another mount namespace)"
        return DeviceInUse(f"the mapping {mapping.path} cannot be closed: it is kept busy by {who}; end that first")


def _forget_keys(uuids: Iterable[str | None]) -> None:
    for known in filter(None, uuids):
        keyring.unlink_all(key_prefix(known))


def luks_uuid(dm_uuid: str, name: str) -> str | None:
    """The LUKS UUID inside a mapping's device-mapper UUID; None when it is not one of libcryptsetup's."""
    bare = dm_uuid.removeprefix(UUID_PREFIX).removesuffix(f"-{name}")
    if not dm_uuid.startswith(UUID_PREFIX) or len(bare) != 32:
        return None
    return "-".join((bare[:8], bare[8:12], bare[12:16], bare[16:20], bare[20:]))
