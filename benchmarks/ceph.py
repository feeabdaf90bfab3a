"""What Ceph-CSI (internal/rbd and internal/util/cryptsetup, with Kubernetes' mount-utils) runs to stage an RBD volume.

These are facts about another program, retold: the programs, their options and their order. The device below is an
image that is mapped as Ceph-CSI does it, or a loop device that was attached beforehand: then `rbd map` would come on
top, while ours attaches its device within the measured call. What Ceph-CSI asks the cluster by librbd, in its own
process, is left out.
"""

import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.luks.formats import DATA_OFFSET

_STEP_SECONDS = 300
_NOT_FOUND = 2  # blkid
_INACTIVE = 4  # cryptsetup status


@dataclass(frozen=True)
class Step:
    """One program: with the key on standard input or not, and the exit code that the sequence goes on with."""

    argv: Sequence[str]
    key: bool = False
    code: int = 0


@dataclass(frozen=True)
class CephVolume:
    """A volume as Ceph-CSI would stage it. `cheap_kdf` is not its own: it formats with ours."""

    folder: Path
    capacity: int
    key: str = field(repr=False)
    cheap_kdf: bool
    name: str = "luks-rbd-bench"

    @property
    def _mapper(self) -> str:
        return f"/dev/mapper/{self.name}"

    @property
    def _stage_path(self) -> Path:
        return self.folder / "ceph-stage"

    @property
    def _image(self) -> Path:
        return self.folder / "ceph.img"

    @contextmanager
    def attached(self) -> Iterator[str]:
        """A blank device for the length of the block, whose path this is; however it ends, nothing of it stays."""
        self._stage_path.mkdir(exist_ok=True)
        self._image.touch()
        os.truncate(self._image, self.capacity + DATA_OFFSET)
        losetup = Step(["losetup", "--find", "--show", str(self._image)])
        device = self.call(losetup).stdout.decode().strip()
        try:
            yield device
        finally:
            # The first two do nothing unless the block failed.
            for argv in (
                ["umount", str(self._stage_path)],
                ["cryptsetup", "luksClose", self.name],
                ["losetup", "--detach", device],
            ):
                self.call(Step(argv))
            self._image.unlink()

    def first_stage(self, device: str) -> None:
        """NodeStageVolume of a new volume."""
        self._run(self._first_steps(device))

    def stage(self, device: str) -> None:
        """NodeStageVolume of a volume that was staged before."""
        self._run(self._again_steps(device))

    def unstage(self) -> None:
        """NodeUnstageVolume."""
        self._run(
            [
                Step(["umount", str(self._stage_path)]),
                Step(["cryptsetup", "status", self.name]),
                Step(["cryptsetup", "luksClose", self.name]),
            ]
        )

    def _first_steps(self, device: str) -> Iterator[Step]:
        kdf = (
            ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"] if self.cheap_kdf else ["--pbkdf-memory", "32768"]
        )
        luks_format = ["cryptsetup", "-q", "luksFormat", "--type", "luks2", "--hash", "sha256", *kdf, device]
        yield _blkid(device, _NOT_FOUND)
        yield Step([*luks_format, "-d", "/dev/stdin"], key=True)
        yield from self._open(device)
        yield _blkid(self._mapper, _NOT_FOUND)
        yield Step(["mkfs.ext4", "-m0", "-Enodiscard,lazy_itable_init=1,lazy_journal_init=1", self._mapper])
        yield _blkid(self._mapper)
        yield from self._mount(device)

    def _again_steps(self, device: str) -> Iterator[Step]:
        yield from self._open(device)
        yield _blkid(self._mapper)
        yield _blkid(self._mapper)
        yield from self._mount(device)

    def _open(self, device: str) -> Iterator[Step]:
        yield Step(["cryptsetup", "status", self.name], code=_INACTIVE)
        yield Step(["cryptsetup", "luksOpen", device, self.name, "--disable-keyring", "-d", "/dev/stdin"], key=True)

    def _mount(self, device: str) -> Iterator[Step]:
        """fsck and mount, then the question whether the file system fills its device."""
        yield Step(["fsck", "-a", self._mapper])
        yield Step(["mount", "-t", "ext4", "-o", "_netdev,defaults", self._mapper, str(self._stage_path)])
        yield Step(["blockdev", "--getsize64", device])
        yield Step(["blockdev", "--getsize64", self._mapper])
        yield Step(["blockdev", "--getro", self._mapper])
        yield _blkid(self._mapper)
        yield _blkid(self._mapper)
        yield Step(["resize2fs", self._mapper])

    def _run(self, steps: Iterable[Step]) -> None:
        for step in steps:
            ended = self.call(step)
            if ended.returncode != step.code:
                raise RuntimeError(f"{step.argv} ended with {ended.returncode}: {ended.stdout[-300:]!r}")

    def call(self, step: Step) -> "subprocess.CompletedProcess[bytes]":
        """Run one program to its end."""
        return subprocess.run(
            step.argv,
            check=False,
            input=self.key.encode() if step.key else b"",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_STEP_SECONDS,
        )


@dataclass
class CephImage:
    """An image, `spec`, in which `volume` lies; `access` is how Ceph's programs are told cluster and user."""

    volume: CephVolume
    spec: str
    access: Sequence[str]

    def stage_and_unstage(self) -> None:
        """NodeStageVolume of a volume that was staged before, and NodeUnstageVolume."""
        self._told("rbd", "device", "list", "--format=json", "--device-type", "krbd")
        said = self._told("rbd", *self.access, "map", self.spec, "--device-type", "krbd", "--options", "noudev")
        device = said.split()[-1]
        self.volume.stage(device)
        self.volume.unstage()
        self._told("rbd", "unmap", device, "--device-type", "krbd", "--options", "noudev")

    def _told(self, *argv: str) -> str:
        ended = self.volume.call(Step(argv))
        if ended.returncode:
            raise RuntimeError(f"{argv} ended with {ended.returncode}: {ended.stdout[-300:]!r}")
        return ended.stdout.decode()


def _blkid(device: str, code: int = 0) -> Step:
    return Step(["blkid", "-p", "-s", "TYPE", "-s", "PTTYPE", "-o", "export", device], code=code)
