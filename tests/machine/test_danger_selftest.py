"""Self-tests of the danger tests: each plants the bug that a test is for, and that test must go red.

The bugs are put in where collaborators come by the constructor; nothing of the driver is patched.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

import msgspec
import pytest

from csi_driver.backends.base import Backend
from csi_driver.host.devicemapper import Target
from csi_driver.host.handle import Handle
from csi_driver.host.workers import Workers
from csi_driver.luks import device as luks
from csi_driver.luks.blank import prove_blank
from csi_driver.luks.formats import LuksFormat
from csi_driver.luks.header_rules import Limits as HeaderLimits
from csi_driver.luks.libcryptsetup import crypt_device
from csi_driver.model.errors import DeviceBlank
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import EncryptionState, LuksIdentity, VolumeRecord
from csi_driver.volumes.driver import WARM
from csi_driver.volumes.encryption import Encryption, Opened
from csi_driver.volumes.keys import KeyInHand
from tests.machine import test_danger_blank, test_danger_mapping
from tests.machine.node import Node

P = ParamSpec("P")
R = TypeVar("R")


def careless_format(
    where: str,
    device: Handle,
    _size: int,
    chosen: LuksFormat,
    identity: LuksIdentity,
    _: HeaderLimits,
    key: Passphrase,
    _storage: Handle,
    _token: bytes | None,
) -> str:
    """luksFormat without a look at what is there."""
    with crypt_device(where, device.path) as context:
        context.format(chosen, identity.uuid, key)
    return luks.read_header(where, device)[1].key_digest


class SkipsTheBlankCheck(Workers):
    """HC#1346, csi-driver-lvm#140: what cannot be read as ours is taken for blank."""

    def __init__(self) -> None:
        super().__init__((*WARM, __name__))

    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        if cast("object", function) is prove_blank:
            return cast("R", None)
        planted = cast("Callable[P, R]", careless_format) if function is luks.format_device else function
        return super().call(what, timeout, planted, *args, **kwargs)


class FormatsWhatLooksBlank(Encryption):
    """LH#10416: a device that reads as zeros is formatted, whatever is recorded."""

    def open(self, backend: Backend, record: VolumeRecord, device: Handle, key: KeyInHand, undo: ExitStack) -> Opened:
        try:
            return super().open(backend, record, device, key, undo)
        except DeviceBlank:
            blank = msgspec.structs.replace(record, encryption=EncryptionState.PREPARED, luks=None)
            return super().open(backend, backend.update(blank), device, key, undo)


class ReusesAnyMapping(Encryption):
    """LH#9385, csi-cloudscale PR153: there is a mapping of that name, so it will be the right one."""

    def open(self, backend: Backend, record: VolumeRecord, device: Handle, key: KeyInHand, undo: ExitStack) -> Opened:
        if self._mappings.get(record.mapping_name) is not None:
            undo.callback(self._mappings.close, record.mapping_name)
            mapping = self._mappings.open(record.mapping_name)
            undo.callback(mapping.close)
            return Opened(record, mapping, None)
        return super().open(backend, record, device, key, undo)


def goes_red(node: Node, danger: Callable[[], None]) -> None:
    """A test that fails, whichever way: an assertion, an error that was not raised, another error than wanted."""
    try:
        danger()
    except (Exception, pytest.fail.Exception):  # noqa: BLE001 - any way to fail will do
        if node.mounts.at(str(node.staging_path())):
            node.unstage()
        node.mapper.remove("luks-pvc-1")
        return
    pytest.fail("the planted bug was not noticed")


def test_a_skipped_blank_check_is_noticed(folder: Path) -> None:
    careless = SkipsTheBlankCheck()
    try:
        node = Node(folder, careless)
        name = "LVM2 physical volume"
        goes_red(
            node,
            lambda: test_danger_blank.check_foreign_signature(node, name, *test_danger_blank.SIGNATURES[name]),
        )
        assert node.header().keyslots, "the planted bug did not format the device"
    finally:
        careless.stop()


def test_formatting_what_looks_blank_is_noticed(used: Node, workers: Workers) -> None:
    node = Node(used.folder, workers, make_encryption=FormatsWhatLooksBlank)
    goes_red(node, lambda: test_danger_blank.check_comes_back_blank(node))
    assert node.header().keyslots, "the planted bug did not format the device"


def test_a_reused_mapping_is_noticed(used: Node, folder: Path, workers: Workers) -> None:
    trusting = Node(used.folder, workers, make_encryption=ReusesAnyMapping)
    test_danger_mapping.open_copy(trusting, folder)
    other = trusting.open_mapping()
    goes_red(trusting, lambda: test_danger_mapping.check_replaced(trusting, other))


def test_a_zombie_that_is_reused_is_noticed(used: Node, workers: Workers) -> None:
    trusting = Node(used.folder, workers, make_encryption=ReusesAnyMapping)
    uuid = test_danger_mapping.uuid_of(used)
    target = Target(0, test_danger_mapping.SECTORS, "error", "")
    zombie = used.mapper.create(test_danger_mapping.NAME, uuid, [target])
    goes_red(trusting, lambda: test_danger_mapping.check_replaced(trusting, zombie))
