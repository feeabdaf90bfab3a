"""What befalls volumes in a volume group alone: they are renamed, or somebody else takes one."""

import subprocess

import pytest

from csi_driver.model.errors import DeviceInUse, FailedPrecondition
from csi_driver.model.volume import EncryptionState
from tests.machine import disks
from tests.machine.node import PASSPHRASE, SIZE, Node
from tests.machine.places import DEVICE


def test_hc1455_logical_volumes_that_were_renamed_are_refused(node: Node) -> None:
    """Each is known by its UUID, whichever name it has."""
    for volume in ("pvc-1", "pvc-2"):
        node.staged_once(volume, volume)
    disks.swap_names("pvc-1", "pvc-2")
    for volume in ("pvc-1", "pvc-2"):
        with pytest.raises(FailedPrecondition, match=volume):
            node.stage(volume)
        with pytest.raises(FailedPrecondition, match=volume):
            node.grow(4 * SIZE, volume)
        assert node.closed(volume)
    disks.swap_names("pvc-1", "pvc-2")
    for volume in ("pvc-1", "pvc-2"):
        node.stage(volume)
        assert node.read(volume) == volume
        node.unstage(volume)


def test_a_second_mapping_of_a_volume_in_use_cannot_be_and_who_has_it_is_left_alone(used: Node) -> None:
    """Of a file there could be one, for which loopfile has its guard."""
    open_it = ("cryptsetup", "open", "--key-file", "-", str(used.disk()), "second")
    used.stage()
    refused = subprocess.run(open_it, check=False, input=PASSPHRASE.encode(), capture_output=True, timeout=120)
    assert refused.returncode == 5, refused  # cryptsetup(8): device already exists or device is busy
    used.unstage()
    open_it = (*open_it[:-2], str(used.disk()), "second")
    subprocess.run(open_it, check=True, input=PASSPHRASE.encode(), capture_output=True, timeout=120)
    try:
        for refused_call in (used.stage, used.delete):
            with pytest.raises(DeviceInUse, match=rf"pvc-1 on {DEVICE} is open as /dev/mapper/second too"):
                refused_call()
        assert used.record().encryption is EncryptionState.ENCRYPTED
    finally:
        subprocess.run(["cryptsetup", "close", "second"], check=True, timeout=120)
    used.stage()
    assert used.read() == "precious"
    used.unstage()
