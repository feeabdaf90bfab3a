"""What version 0.1.0 left on a node, made by its steps with the system's own tools: no code of the driver writes it.

The forms are those that were seen when that version's server was killed: records, stage files, open mappings with the
volume key in root's user keyring, guarded loop devices, mounts, lock files; no identity of the state directory and no
revision mark.
"""

import json
import os
import subprocess
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from csi_driver.host import keyring
from csi_driver.host.loop import AttachedLoop, LoopDevices
from csi_driver.host.syscalls import syscall
from csi_driver.luks.device import volume_key_name
from csi_driver.luks.header import parse
from csi_driver.luks.libcryptsetup import KEYRING_KEY, crypt_device
from csi_driver.model.secret import Passphrase
from tests.headers import head_of
from tests.machine.node import DATA_OFFSET, PASSPHRASE
from tests.machine.processes import run

MKFS: Final[Mapping[str, tuple[str, ...]]] = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-m0", "-E", "nodiscard,lazy_itable_init=1"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-K"),
    "btrfs": ("mkfs.btrfs", "-q", "-f", "-K"),
}
_IDENTITY: Final[Mapping[str, object]] = {
    "uuid": None, "cipher": "aes-xts-plain64", "key_bits": 512, "sector_size": 512, "data_offset": DATA_OFFSET,
    "digest": None,
}  # fmt: skip
_THREAD, _USER = -1, -4
_SETPERM, _LINK, _SEARCH = 5, 8, 10
_BOX_PERMISSIONS, _KEY_PERMISSIONS = 0x37370000, 0x3D110000


def old_json(content: object) -> bytes:
    """JSON as it was written: without blanks."""
    return json.dumps(content, separators=(",", ":")).encode()


def keep_key(luks_uuid: str, device: str) -> None:
    """Leave the volume key in root's user keyring, where its finder could still replace it."""
    name = volume_key_name(luks_uuid)
    with crypt_device("the test's volume", device) as context:
        context.load()
        context.unlock(Passphrase(PASSPHRASE.encode()), KEYRING_KEY)
    key = syscall("keyctl", _SEARCH, _THREAD, b"logon", name.encode(), 0)
    box = syscall("add_key", b"keyring", f"luks-csi:{name}".encode(), None, 0, _THREAD)
    syscall("keyctl", _SETPERM, box, _BOX_PERMISSIONS)
    syscall("keyctl", _SETPERM, key, _KEY_PERMISSIONS)
    syscall("keyctl", _LINK, key, box)
    syscall("keyctl", _LINK, box, _USER)
    keyring.clear_thread()


def luks_format(disk: Path, luks_uuid: str) -> None:
    """luksFormat with a cheap key slot, all else as by default."""
    subprocess.run(
        [
            "cryptsetup", "luksFormat", "-q", "--type", "luks2", "--uuid", luks_uuid, "--cipher", "aes-xts-plain64",
            "--key-size", "512", "--sector-size", "512", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
            "--key-file", "-", disk,
        ],
        input=PASSPHRASE.encode(), check=True, timeout=60,
    )  # fmt: skip


def luks_open(device: str | Path, name: str) -> None:
    """The mapping of that name."""
    command = ["cryptsetup", "open", "--type", "luks2", "--key-file", "-", device, name]
    subprocess.run(command, input=PASSPHRASE.encode(), check=True, timeout=60)


def identity_of(disk: Path) -> dict[str, object]:
    """What is recorded of the header there."""
    header = parse(head_of(disk), f"the test's {disk}")
    return {**_IDENTITY} | {"uuid": header.uuid, "digest": header.key_digest}


class OldVolume:
    """One volume of `size` bytes in the state directory `state`. `luks_uuid` is set where it is encrypted."""

    def __init__(self, state: Path, name: str, size: int, *, encrypted: bool, fs_type: str | None) -> None:
        for folder in ("locks", "stages", "loopfile/volumes", "loopfile/new", "loopfile/trash"):
            (state / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        (state / "locks" / name).touch(0o600)
        self.state, self.name, self.size, self.fs_type = state, name, size, fs_type
        self.luks_uuid = str(uuid.uuid4()) if encrypted else None
        self.folder = state / "loopfile/volumes" / name
        self.folder.mkdir(mode=0o700)
        self.disk = self.folder / "disk.img"
        with self.disk.open("wb") as file:
            file.truncate(size + (DATA_OFFSET if encrypted else 0))

    @property
    def shown(self) -> str:
        """The mapping."""
        return f"/dev/mapper/luks-{self.name}"

    def record(self, revision: int, *, luks: bool = True, digest: bool = True, **differing: object) -> None:
        """Write the record; `differing` as in the record, by default what is known of an encrypted volume."""
        encrypted = self.luks_uuid is not None
        identity: dict[str, object] | None = None
        if luks and encrypted:
            identity = {**_IDENTITY} | (identity_of(self.disk) if digest else {}) | {"uuid": self.luks_uuid}
        parameters = {
            "encrypted": encrypted, "cipher": None, "key_bits": None, "hash": None,
            "pbkdf": "pbkdf2" if encrypted else None, "pbkdf_memory_kib": None,
            "pbkdf_iterations": 1000 if encrypted else None, "sector_size": None, "discard": False,
            "no_read_workqueue": False, "no_write_workqueue": False, "mkfs_options": [], "fs_type": self.fs_type,
            "backing_image": differing.pop("backing_image", None), "image_source_type": None, "image_source": {},
            "backend": None, "replicas": 1, "claim": None,
        }  # fmt: skip
        volume = {
            "id": self.name, "name": self.name, "capacity_bytes": self.size, "parameters": parameters,
            "encryption": "encrypted" if encrypted else None, "luks": identity,
            "cloned_uuid": None, "file_system": "none", "made_fs_type": None, "created": "2026-11-20T00:00:00+00:00",
            "revision": revision,
        }  # fmt: skip
        (self.folder / "record.json").write_bytes(old_json({"version": 1, "volume": volume | differing}))

    def format(self) -> None:
        """luksFormat with the volume's UUID."""
        luks_format(self.disk, str(self.luks_uuid))

    def open(self, undo: ExitStack, *, lasting: bool = False) -> str:
        """Attach it and, encrypted, open its mapping; what holds the loop device meanwhile ends with `undo`."""
        loop: AttachedLoop = undo.enter_context(LoopDevices().attach(str(self.disk), autoclear=not lasting))
        if self.luks_uuid is None:
            return loop.name
        luks_open(loop.name, f"luks-{self.name}")
        return self.shown

    def mkfs(self, device: str) -> None:
        """As it was made."""
        run(*MKFS[str(self.fs_type)], device)

    def inside(self, *, mkfs: bool = False, content: str | None = None) -> None:
        """Make its file system, if asked for, and write into it as a pod would, if asked for; then it is closed."""
        with ExitStack() as undo:
            device = self.open(undo)
            if self.luks_uuid is not None:
                undo.callback(run, "cryptsetup", "close", f"luks-{self.name}")
            if mkfs:
                self.mkfs(device)
            if content is not None:
                place = self.state.parent / f"inside-{self.name}"
                place.mkdir()
                run("mount", "-t", str(self.fs_type), device, place)
                undo.callback(run, "umount", place)
                (place / "file").write_text(content)

    def stage(self, path: Path) -> str:
        """Open and mounted at `path`, a block volume open only, by a server that is gone; returns the device."""
        block = self.fs_type is None
        with ExitStack() as undo:
            device = self.open(undo, lasting=block and self.luks_uuid is None)
            if self.luks_uuid is not None:
                keep_key(self.luks_uuid, str(self.disk))
            stage = {
                "staging_path": str(path), "block": block, "device": device, "fs_type": self.fs_type,
                "mount_options": [], "read_only": False, "luks_uuid": self.luks_uuid,
            }  # fmt: skip
            boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            (self.state / "stages" / self.name).write_bytes(old_json({"boot_id": boot_id, "stage": stage}))
            if not block:
                run("mount", "--no-mtab", "-t", str(self.fs_type), device, path)
            LoopDevices().guard(str(self.disk))
        return device

    def publish(self, staging: Path, device: str, target: Path) -> None:
        """Bound there, as for a pod."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.fs_type is None:
            target.touch(0o600)
            run("mount", "--no-mtab", "--bind", device, target)
        else:
            target.mkdir()
            run("mount", "--no-mtab", "--bind", os.path.realpath(staging), target)
