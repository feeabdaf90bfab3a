"""Bugs put into the driver through its seams: a run with one of them has to turn red."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import cast

from csi_driver.host import blockdev
from csi_driver.host.files import Files
from csi_driver.host.handle import Handle
from csi_driver.host.workers import P, R, Workers
from csi_driver.luks import device as luks
from csi_driver.luks.formats import LuksFormat
from csi_driver.luks.header_rules import Limits
from csi_driver.luks.libcryptsetup import crypt_device
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import LuksIdentity
from csi_driver.volumes.driver import WARM, Host


class Plant(StrEnum):
    """UNSYNCED: records are said to be written and left to the page cache. FORGETFUL: the end of formatting is never
    recorded, and formatting does not look at the device first.
    """

    NONE = "none"
    UNSYNCED = "unsynced"
    FORGETFUL = "forgetful"

    def host(self) -> Host:
        """The operating system as the driver gets to see it."""
        match self:
            case Plant.NONE:
                return Host()
            case Plant.UNSYNCED:
                return Host(files=UnsyncedFiles())
            case Plant.FORGETFUL:
                return Host(files=_ForgetfulFiles(), workers=_CarelessWorkers(WARM))


class UnsyncedFiles(Files):
    """Says that records are written and leaves them to the page cache."""

    def write(self, path: Path, content: bytes) -> None:
        self.write_volatile(path, content)

    def sync_folder(self, folder: Path) -> None:
        pass


class _ForgetfulFiles(Files):
    def write(self, path: Path, content: bytes) -> None:
        super().write(path, content.replace(b'"encryption":"encrypted"', b'"encryption":"formatting"'))


class _CarelessWorkers(Workers):
    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        chosen = cast("Callable[P, R]", _format) if function is luks.format_device else function
        return super().call(what, timeout, chosen, *args, **kwargs)


def _format(
    where: str,
    device: Handle,
    _: int,
    chosen: LuksFormat,
    identity: LuksIdentity,
    __: Limits,
    passphrase: Passphrase,
    ___: Handle,
    _token: bytes | None,
) -> str:
    with crypt_device(where, device.path) as context:
        context.format(chosen, identity.uuid, passphrase)
    blockdev.fsync_device(device)
    return luks.read_header(where, device)[1].key_digest
