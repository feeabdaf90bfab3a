"""What a holder pod does: it opens its claim's block device once, hands it on, and stays while the volume is in use."""

import os
import select
from pathlib import Path
from typing import Final

from csi_driver.backends.csipins import Pins
from csi_driver.host.blockdev import is_claimed
from csi_driver.host.handle import Handle
from csi_driver.host.log import log
from csi_driver.host.passing import Passing
from csi_driver.host.syscalls import error_name
from csi_driver.model.errors import DeviceAbsent, DriverError

_LOOK_SECONDS: Final = 1.0


def hold(path: Path, volume_id: str, holder_id: str, pins: Pins, told: int) -> None:
    """Hold the device at `path` until the descriptor `told` can be read, and beyond that while the volume is in use.

    To let go sooner would have kubelet, and the other driver, take the device from under an open mapping. Raises
    DeviceAbsent when it cannot be opened.
    """
    try:
        device = Handle(os.open(path, os.O_RDWR | os.O_CLOEXEC), str(path))
    except OSError as error:
        raise DeviceAbsent(
            f"the device {path} of volume {volume_id} cannot be opened ({error_name(error)}); look at its claim"
        ) from None
    with device, Passing(pins.socket(volume_id), device, {"volume": volume_id, "holder": holder_id}):
        log.info("holding a device", volume_id=volume_id, device="{}:{}".format(*device.number))
        select.select([told], [], [])
        said = None
        while (why := reason_to_stay(pins, volume_id, device)) is not None:
            if why != said:
                log.warning("told to end and staying", volume_id=volume_id, reason=why)
                said = why
            select.select([], [], [], _LOOK_SECONDS)
        log.info("letting go of a device", volume_id=volume_id)


def reason_to_stay(pins: Pins, volume_id: str, device: Handle) -> str | None:
    """Why the device must stay, by the kernel's word first; None when nobody uses it. In doubt it stays."""
    try:
        if is_claimed(device):
            return "a mapping or a mount is on it"
    except DeviceAbsent:
        pass  # nothing is left to hold
    except DriverError as error:
        return str(error)
    return "the driver has it attached" if pins.held(volume_id) is not None else None
