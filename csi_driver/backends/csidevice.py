"""The device of a volume of the backend csi as an open descriptor: handed on by its holder, or opened by its pin."""

import os
import time
from pathlib import Path
from typing import Final

from csi_driver.backends.csipins import Pins, fits, opened_by_number
from csi_driver.host import blockdev
from csi_driver.host.handle import Handle
from csi_driver.host.passing import receive
from csi_driver.model.errors import Aborted, DeviceAbsent, DeviceMismatch

_PAUSE: Final = 0.2


class HeldDevice(Handle):
    """The device of a volume, and which volume that is."""

    def __init__(self, fd: int, name: str, volume_id: str) -> None:
        super().__init__(fd, name)
        self.volume_id = volume_id


def held(handle: Handle, volume_id: str) -> HeldDevice:
    """The same descriptor, knowing its volume, by the kernel's name. Raises DeviceAbsent."""
    try:
        name = f"/dev/{blockdev.kernel_name(handle.number)}"
    except OSError:
        handle.close()
        raise DeviceAbsent(
            f"the device of volume {volume_id} is not there any more; its storage took it away"
        ) from None
    fd, handle.fd = handle.fd, -1
    return HeldDevice(fd, name, volume_id)


def received(pins: Pins, volume_id: str, seconds: float) -> tuple[HeldDevice, str]:
    """What the volume's holder hands on, and the uid of that; one that is just starting is waited for so long.

    Raises DeviceMismatch, DeviceAbsent, and what `receive` does.
    """
    what, deadline = f"the device of volume {volume_id}", time.monotonic() + seconds
    handle, words = _awaited(pins.socket(volume_id), what, deadline)
    if words.get("volume") != volume_id:
        handle.close()
        raise DeviceMismatch(
            f"{what} was asked for and that of volume {words.get('volume')} was handed on by the holder pod with the "
            f"uid {words.get('holder')}; delete that pod"
        )
    return held(handle, volume_id), str(words.get("holder", ""))


def _awaited(socket: Path, what: str, deadline: float) -> tuple[Handle, dict[str, str]]:
    while True:
        try:
            return receive(socket, what)
        except Aborted:
            if time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE)


def pinned(pins: Pins, volume_id: str) -> HeldDevice | None:
    """The pinned device, opened by its number and looked at again; None where it is not there any more."""
    pin = pins.held(volume_id)
    if pin is None or not fits(pin, pin.number):
        return None
    try:
        name = f"/dev/{blockdev.kernel_name(pin.number)}"
    except OSError:
        return None
    aside = pins.socket(volume_id).with_suffix(f".node-{os.getpid()}")
    found = opened_by_number(name, pin.number, aside)
    if found is None:
        return None
    if fits(pin, found.number):
        return held(found, volume_id)
    found.close()
    return None
