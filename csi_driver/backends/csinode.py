"""A node's side of the backend csi: devices that holders hand on, pinned for as long as they are attached."""

import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Final

import msgspec

from csi_driver.backends.csipins import Pin, Pins, disk_of, fits, opened_by_number
from csi_driver.backends.csirecords import Api, Known, RecordObjects, Staged
from csi_driver.host import blockdev
from csi_driver.host.handle import Handle
from csi_driver.host.log import log
from csi_driver.host.passing import receive
from csi_driver.kube.kinds import CSI_NODE
from csi_driver.model.errors import (
    Aborted,
    DeviceAbsent,
    DeviceInUse,
    DeviceMismatch,
    DriverError,
    FailedPrecondition,
    NotFound,
    VolumeBusy,
)

_SIZE_SECONDS: Final = 6.0
_PAUSE: Final = 0.2


class HeldDevice(Handle):
    """The device of a volume, and which volume that is."""

    def __init__(self, fd: int, name: str, volume_id: str) -> None:
        super().__init__(fd, name)
        self.volume_id = volume_id


class NodeDevices:
    """The devices of the node `node_id`; `driver_below` is whose limit of volumes is ours too, "" for none.

    `wait_seconds` is how long one call waits for a device to have its size.
    """

    def __init__(
        self,
        api: Api,
        records: RecordObjects,
        pins: Pins,
        node_id: str,
        driver_below: str,
        wait_seconds: float = _SIZE_SECONDS,
    ) -> None:
        self._api = api
        self._records = records
        self._pins = pins
        self._node_id = node_id
        self._driver_below = driver_below
        self._wait_seconds = wait_seconds

    def prepare(self) -> None:
        """Make the folder for sockets and pins. Raises OSError."""
        self._pins.prepare()

    def is_known(self, volume_id: str) -> bool:
        """Whether it is attached here, or was and its record has not heard of its end."""
        return self._pins.get(volume_id) is not None

    def ids(self) -> Sequence[str]:
        """Of the volumes that are attached here, sorted."""
        return [pin.volume_id for pin in self._pins.all() if not pin.released]

    def attach(self, volume_id: str) -> Handle:
        """Get the device from the volume's holder, and pin it. Raises Aborted, DeviceAbsent, DeviceMismatch."""
        known = self._records.find(volume_id)
        if known is None or known.spec.state != "Ready":
            raise DeviceAbsent(f"volume {volume_id} has no device: there is no VolumeRecord of it")
        self._refuse_others(known)
        device, holder = self._received(volume_id)
        try:
            earlier = self._earlier(volume_id, device)
            ticket = earlier.ticket if earlier is not None else secrets.token_hex(8)
            pin = Pin(
                volume_id=volume_id,
                boot_id=self._pins.boot_id,
                major=device.major,
                minor=device.minor,
                disk=disk_of(device.number),
                holder=holder,
                ticket=ticket,
            )
            # First here, then in the record: what the record says and no pin does was let go of.
            self._pins.put(pin)
            try:
                staged = Staged(node=self._node_id, boot_id=pin.boot_id, ticket=ticket, device=device.name)
                self._records.change(volume_id, self._refuse_others, staged=staged)
                self._await_size(device, known.spec.size)
            except BaseException:
                if earlier is None:  # else something may be open on it
                    self.detach(volume_id)
                raise
        except BaseException:
            device.close()
            raise
        log.info("device taken over", volume_id=volume_id, device=device.name, holder=holder)
        return device

    def open(self, volume_id: str) -> Handle:
        """The device as it is attached, else as a holder hands it on. Raises DeviceAbsent, Aborted."""
        found = self.device_of(volume_id)
        if found is not None:
            return found
        known = self._records.find(volume_id)
        if known is None or known.spec.state != "Ready":
            raise DeviceAbsent(f"volume {volume_id} has no device: there is no VolumeRecord of it")
        return self._received(volume_id)[0]

    def device_of(self, volume_id: str) -> Handle | None:
        """The pinned device, opened by its number and looked at again. It asks neither holder nor record."""
        pin = self._pins.held(volume_id)
        if pin is None or not fits(pin, pin.number):
            return None
        try:
            name = f"/dev/{blockdev.kernel_name(pin.number)}"
        except OSError:
            return None
        aside = self._pins.socket(volume_id).with_suffix(f".node-{os.getpid()}")
        found = opened_by_number(name, pin.number, aside)
        if found is None:
            return None
        if fits(pin, found.number):
            return _held(found, volume_id)
        found.close()
        return None

    def is_device_of(self, volume_id: str, number: tuple[int, int]) -> bool:
        """Whether it is the pinned one, and that disk still."""
        pin = self._pins.held(volume_id)
        return pin is not None and fits(pin, number)

    def detach(self, volume_id: str) -> None:
        """Let go of it; the record is told now, or by and by where it cannot be reached. Absent is fine.

        Raises DeviceInUse while a mapping or mount is on it, as after a stage that failed beside an earlier one: who
        is told that it is free takes it away.
        """
        pin = self._pins.get(volume_id)
        if pin is None:
            return
        if not pin.released:
            if (name := self._claimed(volume_id)) is not None:
                raise DeviceInUse(
                    f"volume {volume_id} cannot be let go of: a mapping or mount is on its device {name}; end that "
                    f"first"
                )
            pin = msgspec.structs.replace(pin, released=True)
            self._pins.put(pin)
        try:
            self._tell(pin)
        except DriverError as error:
            log.warning("a record will hear later that its device is free", volume_id=volume_id, error=str(error))

    def tell_released(self, hold: Callable[[str], AbstractContextManager[None]]) -> None:
        """Tell the records of what was let go of while they could not be reached."""
        for pin in self._pins.all():
            if pin.released:
                with suppress(VolumeBusy, Aborted), hold(pin.volume_id):
                    again = self._pins.get(pin.volume_id)
                    if again is not None and again.released:
                        self._tell(again)

    def check_size(self, device: Handle) -> None:
        """Wait a moment until the device has the size that is recorded. Raises Aborted."""
        if isinstance(device, HeldDevice):
            self._await_size(device, self._records.ready(device.volume_id).spec.size)

    def most_volumes(self) -> int:
        """What the driver below says of this node in CSINode; 0 where it says nothing."""
        found = self._api.get(CSI_NODE, self._node_id) if self._driver_below else None
        drivers = (found or {}).get("spec", {}).get("drivers") or ()
        limits = [each.get("allocatable", {}).get("count") for each in drivers if each["name"] == self._driver_below]
        return int(limits[0] or 0) if limits else 0

    def _received(self, volume_id: str) -> tuple[HeldDevice, str]:
        what = f"the device of volume {volume_id}"
        handle, words = receive(self._pins.socket(volume_id), what)
        try:
            if words.get("volume") != volume_id:
                raise DeviceMismatch(
                    f"{what} was asked for and that of volume {words.get('volume')} was handed on by the holder pod "
                    f"with the uid {words.get('holder')}; delete that pod"
                )
            try:
                name = f"/dev/{blockdev.kernel_name(handle.number)}"
            except OSError:
                raise DeviceAbsent(f"{what} is not there any more; its storage took it away") from None
        except BaseException:
            handle.close()
            raise
        handle.name = name
        return _held(handle, volume_id), str(words.get("holder", ""))

    def _refuse_others(self, known: Known) -> None:
        """The controller takes a volume from a node by the record, and its holder afterwards."""
        if known.spec.node != self._node_id:
            whose = f"node {known.spec.node} has it" if known.spec.node else "no node has it"
            raise FailedPrecondition(
                f"volume {known.volume_id} is not attached to node {self._node_id}: {whose} by its VolumeRecord; it is "
                f"attached by ControllerPublishVolume"
            )

    def _earlier(self, volume_id: str, device: Handle) -> Pin | None:
        """The pin that was there for this very device. Another device that is in use would split the volume in two."""
        earlier = self._pins.held(volume_id)
        if earlier is None or fits(earlier, device.number):
            return earlier
        if (name := self._claimed(volume_id)) is not None:
            raise DeviceInUse(
                f"volume {volume_id} is open on {name} and its holder hands on {device.name}; unstage it first"
            )
        return None

    def _claimed(self, volume_id: str) -> str | None:
        """The name of the pinned device, if a mapping or mount is on it. Raises what `blockdev.is_claimed` does."""
        found = self.device_of(volume_id)
        if found is None:
            return None
        with found, suppress(DeviceAbsent):  # nothing is left to be used
            return found.name if blockdev.is_claimed(found) else None
        return None

    def _await_size(self, device: HeldDevice, size: int) -> None:
        deadline = time.monotonic() + self._wait_seconds
        while (found := blockdev.size_bytes(device.fd)) < size:
            if time.monotonic() > deadline:
                raise Aborted(
                    f"the device {device.name} of volume {device.volume_id} has {found} bytes and is to have {size}: "
                    f"kubelet and the driver below have not enlarged it yet; this is tried again"
                )
            time.sleep(_PAUSE)

    def _tell(self, pin: Pin) -> None:
        """Take the attachment out of the record, if it still is this one, and then forget the pin."""
        try:
            known = self._records.ready(pin.volume_id)
            if known.spec.staged is not None and known.spec.staged.ticket == pin.ticket:
                self._records.write(known, staged=None)
        except NotFound:
            pass  # the volume is gone
        self._pins.remove(pin.volume_id)


def _held(handle: Handle, volume_id: str) -> HeldDevice:
    """The same descriptor, knowing its volume."""
    fd, handle.fd = handle.fd, -1
    return HeldDevice(fd, handle.name, volume_id)
