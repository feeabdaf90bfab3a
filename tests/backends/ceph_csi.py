"""A volume as Ceph-CSI leaves it: image, journal and metadata, and on a machine with krbd what it formats and writes.

Facts about another program, retold: internal/rbd and internal/journal of ceph-csi, as of 3.9 and of 3.15.
"""

import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.backends.ceph import CLUSTER, POOL, Ceph

OWNER = "tenant-a"
BLOCK_OF_OLD: Sequence[str] = ()
BLOCK_OF_NEW = ("--luks2-metadata-size", "4096k", "--luks2-keyslots-size", "8192k")
"""Options of luksFormat since 3.15: a header of 16 MiB, whatever cryptsetup would choose."""

_MAPPING = "luks-rbd-0001-of-ceph-csi"
_CHEAP = ("--pbkdf-memory", "32768", "--pbkdf-force-iterations", "4")  # its memory, fewer passes
_SECONDS = 300


@dataclass(frozen=True)
class CephCsiVolume:
    """A volume of Ceph-CSI, opened by `key`. `kms` is "" where that is the passphrase of a secret."""

    ceph: Ceph
    key: bytes = field(repr=False)
    kms: str = ""
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    options: Sequence[str] = BLOCK_OF_OLD

    @property
    def image(self) -> str:
        """Its name in the pool."""
        return f"csi-vol-{self.uuid}"

    @property
    def handle(self) -> str:
        """Its `volumeHandle`."""
        (number,) = (one["poolnum"] for one in self.ceph.asked("ceph", "osd", "lspools") if one["poolname"] == POOL)
        return f"0001-{len(CLUSTER):04x}-{CLUSTER}-{number:016x}-{self.uuid}"

    def create(self, size: str = "64M", dek: str = "") -> None:
        """CreateVolume."""
        journal = f"csi.volume.{self.uuid}"
        told = {"csi.volname": f"pvc-{self.uuid}", "csi.imagename": self.image, "csi.volume.owner": OWNER}
        told |= {"csi.volume.encryptKMS": self.kms or "default", "csi.volume.encryptionType": "block"}
        self._rados("setomapval", "csi.volumes.default", f"csi.volume.pvc-{self.uuid}", self.uuid)
        for name, value in told.items():
            self._rados("setomapval", journal, name, value)
        self._rbd("create", "--size", size, "--image-feature", "layering", f"{POOL}/{self.image}")
        image_id = self.ceph.asked("rbd", "info", f"{POOL}/{self.image}")["id"]
        self._rados("setomapval", journal, "csi.imageid", image_id)
        if dek:
            self.tell("dek", dek)
        self.tell("encrypted", "encryptionPrepared")

    def tell(self, name: str, value: str) -> None:
        """Set one of its keys of the image."""
        self._rbd("image-meta", "set", f"{POOL}/{self.image}", f"rbd.csi.ceph.com/{name}", value)

    @contextmanager
    def staged(self, path: Path) -> Iterator[Path]:
        """NodeStageVolume, formatted where it never was, and NodeUnstageVolume."""
        path.mkdir(exist_ok=True)
        device = self._rbd("map", "-o", "noudev", f"{POOL}/{self.image}").strip()
        mapper = f"/dev/mapper/{_MAPPING}"
        try:
            if self.ceph.asked("rbd", "image-meta", "list", f"{POOL}/{self.image}").get(_ENCRYPTED) != "encrypted":
                how = ("--type", "luks2", "--hash", "sha256", *_CHEAP, *self.options)
                self._run("cryptsetup", "-q", "luksFormat", *how, device, "-d", "/dev/stdin")
                self.tell("encrypted", "encrypted")
                self._open(device)
                self._run("mkfs.ext4", "-m0", "-Enodiscard,lazy_itable_init=1,lazy_journal_init=1", mapper)
            else:
                self._open(device)
            self._run("mount", "-t", "ext4", mapper, str(path))
            yield path
        finally:
            subprocess.run(["umount", str(path)], check=False)
            subprocess.run(["cryptsetup", "luksClose", _MAPPING], check=False)
            self._rbd("unmap", "-o", "noudev", device)

    def _open(self, device: str) -> None:
        self._run("cryptsetup", "luksOpen", device, _MAPPING, "--disable-keyring", "-d", "/dev/stdin")

    def _run(self, *argv: str) -> None:
        done = subprocess.run(argv, check=False, input=self.key, capture_output=True, timeout=_SECONDS)
        if done.returncode:
            raise AssertionError(f"{argv}: {done.stderr.decode(errors='replace')}")

    def _rados(self, *words: str) -> None:
        self.ceph.admin("rados", "-p", POOL, *words)

    def _rbd(self, *words: str) -> str:
        return self.ceph.admin("rbd", *words)


_ENCRYPTED = "rbd.csi.ceph.com/encrypted"
