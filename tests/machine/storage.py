"""What the volumes of a suite lie on, by a backend's name: how a driver is told, and where a volume's bytes are."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from csi_driver.backends.lvmtool import dm_name
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.mounts import Mounts
from csi_driver.host.workers import Workers
from csi_driver.model.settings import Settings
from csi_driver.volumes.driver import WARM
from tests.backends.rigs import GROUP, POOL, LvmRig, lvm

DISK_BYTES, POOL_BYTES = 3 << 30, 2 << 30
VOLUMES = f"{dm_name(GROUP, 'luks')}-"
"""What device-mapper's names of volumes of a group begin with."""
BACKENDS = ("loopfile", "lvm-thick", "lvm-thin")


class Storage(Protocol):
    """The storage of one driver."""

    parameters: Mapping[str, str]
    """What a class of it says."""
    makes_from_file: bool
    """Whether volumes can start with an image, and a folder that is copied is a volume."""
    enlarges_plain: bool
    """Whether a volume that is not encrypted is enlarged while it is in use."""
    root: Path
    """With the folders volumes, new and trash."""
    files: frozenset[str]
    """What is in a volume's folder."""

    def settings(self, settings: Settings) -> Settings:
        """Those of a driver for it."""

    def folder(self, volume_id: str) -> Path:
        """Where the record of a volume is, and the copy of its header."""

    def made(self) -> set[str]:
        """The ids of the volumes whose bytes are there, apart from their folders."""

    def device(self, volume_id: str) -> AbstractContextManager[Path]:
        """A volume's bytes, attached or not; afterwards the driver finds what it has left."""


class LoopfileStorage:
    """Sparse files below the state directory."""

    parameters: Mapping[str, str] = {}
    makes_from_file = True
    enlarges_plain = True
    files = frozenset({"record.json", "disk.img", "header.luks2"})

    def __init__(self, state: Path) -> None:
        self.root = state / "loopfile"

    def settings(self, settings: Settings) -> Settings:
        return settings

    def folder(self, volume_id: str) -> Path:
        return self.root / "volumes" / volume_id

    def made(self) -> set[str]:
        return set()

    def device(self, volume_id: str) -> AbstractContextManager[Path]:
        return nullcontext(self.folder(volume_id) / "disk.img")


class GroupStorage:
    """A volume group, whose records are mounted below the state directory."""

    makes_from_file = False
    files = frozenset({"record.json", "lv.json", "header.luks2"})

    def __init__(self, state: Path, *, thin: bool) -> None:
        self.root = state / "lvm"
        self.parameters: Mapping[str, str] = {"thinPool": POOL} if thin else {}
        self.enlarges_plain = thin

    def settings(self, settings: Settings) -> Settings:
        return replace(settings, backend="lvm", volume_group=GROUP)

    def folder(self, volume_id: str) -> Path:
        return self.root / "volumes" / volume_id

    def made(self) -> set[str]:
        found = lvm("lvs", "--noheadings", "-o", "lv_name", GROUP).split()
        return {name.removeprefix("luks-") for name in found if name.startswith("luks-")}

    @contextmanager
    def device(self, volume_id: str) -> Iterator[Path]:
        logical, mapper = f"luks-{volume_id}", DeviceMapper()
        name = dm_name(GROUP, logical)
        is_shown = mapper.get(name) is not None
        if not is_shown:
            lvm("lvchange", "-ay", "-K", f"{GROUP}/{logical}")
        try:
            shown = mapper.get(name)
            assert shown is not None, f"{GROUP}/{logical} is not shown"
            yield Path(f"/dev/dm-{shown.minor}")
        finally:
            if not is_shown:
                lvm("lvchange", "-an", f"{GROUP}/{logical}")


@contextmanager
def storage(backend: str, folder: Path, state: Path) -> Iterator[Storage]:
    """Storage for the driver with the state directory `state`; what else it needs is in `folder`. It ends with it."""
    if backend == "loopfile":
        yield LoopfileStorage(state)
        return
    workers = Workers(WARM)
    try:
        with LvmRig(folder, workers, thin=backend == "lvm-thin", disk_bytes=DISK_BYTES, pool_bytes=POOL_BYTES) as rig:
            rig.restart()
            rig.disown()
            try:
                yield GroupStorage(state, thin=backend == "lvm-thin")
            finally:
                Mounts().unmount(str(state / "lvm"))
    finally:
        workers.stop()


def after_boot(backend: str, folder: Path, state: Path) -> Storage:
    """As `storage`, in a machine that may lose its power: made in its first boot, and found in the next ones."""
    if backend == "loopfile":
        return LoopfileStorage(state)
    thin, disk = backend == "lvm-thin", folder / "group.disk"
    is_first = not disk.exists()
    with disk.open("ab") as file:
        file.truncate(DISK_BYTES)
    loop = subprocess.run(["losetup", "--find", "--show", disk], check=True, stdout=subprocess.PIPE, text=True)
    DeviceMapper().target_version("thin-pool")
    if is_first:
        lvm("vgcreate", GROUP, loop.stdout.strip())
        if thin:
            lvm("lvcreate", "-L", f"{POOL_BYTES}b", "--type", "thin-pool", "-n", POOL, GROUP)
        os.sync()
    return GroupStorage(state, thin=thin)


def chosen() -> str:
    """The backend that BACKEND names, else loopfile."""
    backend = os.environ.get("BACKEND") or "loopfile"
    if backend not in BACKENDS:
        raise SystemExit(f"BACKEND is {backend!r} and must be one of {', '.join(BACKENDS)}")
    return backend
