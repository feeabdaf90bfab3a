"""A node's side of the backend csi: devices that holders, or the driver below, hand on, pinned while attached."""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Final

import msgspec

from csi_driver.backends.csidevice import HeldDevice, pinned, received
from csi_driver.backends.csidirect import DirectDevices
from csi_driver.backends.csipins import Direct, Pin, Pins, disk_of, fits
from csi_driver.backends.csirecords import Api, Known, RecordObjects, Spec, Staged
from csi_driver.host import blockdev
from csi_driver.host.handle import Handle
from csi_driver.host.log import log
from csi_driver.kube.kinds import CSI_NODE
from csi_driver.model.errors import (
    Aborted,
    DeadlineExceeded,
    DeviceAbsent,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
    VolumeBusy,
)

_WAIT_SECONDS: Final = 15.0
_PAUSE: Final = 0.2
_FORGOTTEN_SECONDS: Final = 600.0
"""Kubelet asks again for what it stages, later and later, but within three minutes."""
_GOES_ON: Final = (Aborted, DeadlineExceeded, ResourceExhausted, Unavailable)
"""After these kubelet calls again, to stage or to unstage; after others it takes the stage for never begun."""


class NodeDevices:
    """The devices of the node `node_id`; `driver_below` is whose limit of volumes is ours too, "" for none.

    `direct` are those that no holder hands on. `wait_seconds` is how long one call waits for a holder to come up, and
    for a device to have its size.
    """

    def __init__(
        self,
        api: Api,
        records: RecordObjects,
        pins: Pins,
        direct: DirectDevices,
        node_id: str,
        driver_below: str,
        wait_seconds: float = _WAIT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._records = records
        self._pins = pins
        self._direct = direct
        self._node_id = node_id
        self._driver_below = driver_below
        self._wait_seconds = wait_seconds
        self._clock = clock
        self._asked: dict[str, float] = {}
        self._said: dict[str, str] = {}

    def prepare(self) -> None:
        """Make the folder for sockets and pins. Raises OSError."""
        self._pins.prepare()

    def is_known(self, volume_id: str) -> bool:
        """Whether it is attached here, or was and its record has not heard of its end."""
        return self._pins.get(volume_id) is not None

    def ids(self) -> Sequence[str]:
        """Of the volumes that are attached here, sorted."""
        return [pin.volume_id for pin in self._pins.all() if pin.has_device and not pin.released]

    def attach(self, volume_id: str) -> Handle:
        """Get the device from the volume's holder or the driver below, and pin it.

        Raises Aborted, DeviceAbsent, DeviceMismatch, and what `DirectDevices.take` does.
        """
        known = self._found(volume_id)
        self._refuse_others(known)
        if known.spec.direct is not None:
            return self._taken(known, known.spec.direct)
        device, holder = received(self._pins, volume_id, self._wait_seconds)
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
                self._await_size(device, known.spec)
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
        if self._found(volume_id).spec.direct is not None:
            raise DeviceAbsent(f"volume {volume_id} has no device: it is not attached, and has no holder")
        return received(self._pins, volume_id, self._wait_seconds)[0]

    @contextmanager
    def opened(self, volume_id: str) -> Iterator[Handle]:
        """The same for a while, attached for that where it takes calls of the driver below. Raises what these do."""
        device = self.device_of(volume_id)
        if device is None and self._found(volume_id).spec.direct is not None:
            try:
                with self.attach(volume_id) as attached:
                    yield attached
            except BaseException:
                self._let_go(volume_id)
                raise
            self.detach(volume_id)
            return
        with device or self.open(volume_id) as found:
            yield found

    def device_of(self, volume_id: str) -> Handle | None:
        """The pinned device, opened by its number and looked at again. It asks neither holder nor record."""
        return pinned(self._pins, volume_id)

    def is_device_of(self, volume_id: str, number: tuple[int, int]) -> bool:
        """Whether it is the pinned one, and that disk still."""
        pin = self._pins.held(volume_id)
        return pin is not None and fits(pin, number)

    def detach(self, volume_id: str) -> None:
        """Let go of it; the record is told now, or by and by where it cannot be reached. Absent is fine.

        Raises DeviceInUse while a mapping or mount is on it, as after a stage that failed beside an earlier one: who
        is told that it is free takes it away. Raises what `DirectDevices.give_back` does: until then it is not free.
        On a full disk the record must be told now: Unavailable, and what else the API raises.
        """
        pin = self._pins.get(volume_id) or self._pins.left(volume_id)
        if pin is None:
            return
        is_noted = True
        if not pin.released:
            if (name := self._claimed(volume_id)) is not None:
                raise DeviceInUse(
                    f"volume {volume_id} cannot be let go of: a mapping or mount is on its device {name}; end that "
                    f"first"
                )
            if (direct := pin.direct) is not None:
                pin = pin.without_device(leaving=True)
                self._pins.note(pin)  # whoever was told of an error may not come again
                self._direct.give_back(volume_id, direct)
            pin = msgspec.structs.replace(pin, released=True)
            is_noted = self._pins.note(pin)
        try:
            self._tell(pin)
        except DriverError as error:
            if not is_noted:
                raise
            log.warning("a record will hear later that its device is free", volume_id=volume_id, error=str(error))

    def mend(self, hold: Callable[[str], AbstractContextManager[None]], is_ending: Callable[[], bool]) -> None:
        """Tell the records of what was let go of while they could not be reached; put down what a driver below was
        asked for in an earlier boot, or for nobody any more.
        """
        for volume_id in [pin.volume_id for pin in (*self._pins.all(), *self._pins.all_left()) if self._is_idle(pin)]:
            if is_ending():
                return
            with suppress(VolumeBusy, Aborted), hold(volume_id):
                self._mend(volume_id)

    def _mend(self, volume_id: str) -> None:
        pin = self._pins.get(volume_id) or self._pins.left(volume_id)
        if pin is None or not self._is_idle(pin):
            return
        try:
            self.detach(volume_id)
        except DriverError as error:
            if (said := str(error)) != self._said.get(volume_id):
                log.warning("a volume cannot be put down below", volume_id=volume_id, error=said)
                self._said[volume_id] = said

    def _is_idle(self, pin: Pin) -> bool:
        if pin.released or pin.leaving or self._pins.is_left(pin):
            return True
        if pin.has_device:
            return False
        return self._clock() > self._asked.setdefault(pin.volume_id, self._clock()) + _FORGOTTEN_SECONDS

    def check_size(self, device: Handle) -> None:
        """Wait a moment until the device has the size that is recorded. Raises Aborted."""
        if isinstance(device, HeldDevice):
            self._await_size(device, self._records.ready(device.volume_id).spec)

    def most_volumes(self) -> int:
        """What the driver below says of this node in CSINode; 0 where it says nothing."""
        found = self._api.get(CSI_NODE, self._node_id) if self._driver_below else None
        drivers = (found or {}).get("spec", {}).get("drivers") or ()
        limits = [each.get("allocatable", {}).get("count") for each in drivers if each["name"] == self._driver_below]
        return int(limits[0] or 0) if limits else 0

    def _found(self, volume_id: str) -> Known:
        known = self._records.find(volume_id)
        if known is None or known.spec.state != "Ready":
            raise DeviceAbsent(f"volume {volume_id} has no device: there is no VolumeRecord of it")
        return known

    def _taken(self, known: Known, direct: Direct) -> Handle:
        """The device from the driver below. What may have been asked of that is pinned before, and then recorded: it is
        this node's until it is given back.
        """
        volume_id = known.volume_id
        self._asked[volume_id] = self._clock()
        pin = self._pins.held(volume_id)
        if pin is None:
            left = self._pins.left(volume_id)
            if left is not None or self._direct.is_shown(volume_id):
                # Of an earlier boot: a node that it left may be another disk's by now.
                earlier = left.direct if left is not None else None
                self._direct.give_back(volume_id, earlier or direct)
            pin = Pin(
                volume_id=volume_id,
                boot_id=self._pins.boot_id,
                holder=direct.driver,
                ticket=secrets.token_hex(8),
                direct=direct,
            )
            self._pins.put(pin)
        elif pin.leaving:
            pin = pin.without_device(leaving=False)
            self._pins.put(pin)
        place = str(self._direct.target(volume_id))
        staged = Staged(node=self._node_id, boot_id=pin.boot_id, ticket=pin.ticket, device=place)
        try:
            self._records.change(volume_id, self._refuse_others, staged=staged)
            device = self._direct.take(volume_id, direct)
        except _GOES_ON:
            raise
        except DriverError:
            if not pin.has_device:  # else something may be open on it
                self._let_go(volume_id)
            raise
        try:
            self._earlier(volume_id, device)
            number = {"major": device.major, "minor": device.minor, "disk": disk_of(device.number)}
            self._pins.put(msgspec.structs.replace(pin, **number))
            self._await_size(device, known.spec)
        except BaseException:
            device.close()
            raise
        log.info("device taken over", volume_id=volume_id, device=device.name, driver=direct.driver)
        return device

    def _let_go(self, volume_id: str) -> None:
        """After an error that the caller must hear of."""
        try:
            self.detach(volume_id)
        except DriverError as error:
            log.warning("a volume could not be put down below", volume_id=volume_id, error=str(error))

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

    def _await_size(self, device: HeldDevice, spec: Spec) -> None:
        deadline = time.monotonic() + self._wait_seconds
        if spec.direct is not None and blockdev.size_bytes(device.fd) < spec.size:
            self._direct.enlarge(device.volume_id, spec.direct, spec.size)
        while (found := blockdev.size_bytes(device.fd)) < spec.size:
            if time.monotonic() > deadline:
                raise Aborted(
                    f"the device {device.name} of volume {device.volume_id} has {found} bytes and is to have "
                    f"{spec.size}: {'' if spec.direct else 'kubelet and '}the driver below "
                    f"{'has' if spec.direct else 'have'} not enlarged it yet; this is tried again"
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
        for of_attached in (self._asked, self._said):
            of_attached.pop(pin.volume_id, None)
