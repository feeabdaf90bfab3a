"""What is staged on this node since it booted: one small file per volume, gone in meaning with a reboot."""

import os
from pathlib import Path

import msgspec

from csi_driver.host.boot import boot_id
from csi_driver.host.files import Files, read_file, though_read_only
from csi_driver.host.keyring import KeptKey
from csi_driver.model.reading import decode


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """How a volume was staged. `device` is the name of what a pod gets to see: the mapping, or the plain device.

    `mount_options` is canonical; `luks_uuid` lets unstage forget the volume key when volume and mapping are gone;
    `kept_key` is where it waits for a resize, `kept_next` where a new one does that is to take its place. `key_drift`
    says that the secret as it was last seen does not open the volume.
    """

    staging_path: str
    block: bool
    device: str
    fs_type: str | None = None
    mount_options: tuple[str, ...] = ()
    read_only: bool = False
    luks_uuid: str | None = None
    kept_key: KeptKey | None = None
    kept_next: KeptKey | None = None
    key_drift: bool = False


class _StageFile(msgspec.Struct, frozen=True, kw_only=True):
    boot_id: str
    stage: Stage


class Stages:
    """Keeps one `Stage` per volume in `folder`.

    A stage of another boot, or a file that a power cut left unreadable, counts as none: nothing is mounted then. So
    these files need no fsync.
    """

    def __init__(self, folder: Path, files: Files) -> None:
        self._folder = folder
        self._name = str(folder)
        self._files = files
        self._boot_id = boot_id()

    def get(self, volume_id: str) -> Stage | None:
        """The stage of this boot, complete or being made."""
        try:
            found = decode(read_file(f"{self._name}/{volume_id}"), _StageFile)
        except (FileNotFoundError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
            return None
        return found.stage if found.boot_id == self._boot_id else None

    def put(self, volume_id: str, stage: Stage) -> None:
        """Write it; done before the mount that it announces."""
        path, content = self._folder / volume_id, msgspec.json.encode(_StageFile(boot_id=self._boot_id, stage=stage))
        try:
            self._files.write_volatile(path, content)
        except FileNotFoundError:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._files.write_volatile(path, content)

    def drifted(self) -> list[str]:
        """The volumes that are staged and whose secret no longer opens them, sorted."""
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        return sorted(name for name in names if name[0] != "." and (stage := self.get(name)) and stage.key_drift)

    def remove(self, volume_id: str) -> None:
        """Forget it; absent is fine. On a read-only file system it stays: what the kernel shows decides."""
        with though_read_only("stage", volume_id):
            self._files.remove(self._folder / volume_id)
