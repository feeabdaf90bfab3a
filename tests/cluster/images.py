"""A disk with every image that a node runs, made without a registry: `python -m tests.cluster.images` prints its path.

Ours is built from the Dockerfile, as users do, on a base that the distribution's own packages give; the sidecars come
from the binaries in $KUBERNETES_BIN and $CSI_ADDONS_BIN under the names that the manifests use. All of it, and what it
is made of, is kept in the cache folder: the next one takes seconds.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csi_driver import __version__
from tests.cluster.settings import CLUSTER_CEPH, CSI_ADDONS_BIN, KUBERNETES_BIN, ROOT
from tests.machine.guest_uml import system_path

BASE = "docker.io/library/debian:12-slim"
OURS = f"localhost/luks-csi:{__version__}"
OURS_WITH_CEPH = f"localhost/luks-csi-ceph:{__version__}"
"""Where $CLUSTER_CEPH wants it."""
BUSYBOX = "docker.io/library/busybox:1"
PAUSE = "localhost/pause:1"
SIDECARS = {
    "registry.k8s.io/sig-storage/csi-provisioner:v6.3.0": "csi-provisioner",
    "registry.k8s.io/sig-storage/csi-resizer:v2.3.0": "csi-resizer",
}
# Those of CSI-Addons, where $CSI_ADDONS_BIN has them.
ADDONS = {
    "quay.io/csiaddons/k8s-controller:latest": "manager",
    "quay.io/csiaddons/k8s-sidecar:v0.14.0": "sidecar",
    "registry.k8s.io/sig-storage/csi-attacher:v4.13.0": "csi-attacher",
}

_SUITE = "bookworm"
_DISK_BYTES = 12 << 30
_KEPT = 2  # disks: of this state of the code and of the one before
_STEP_SECONDS = 900
_START_SECONDS = 20
_LINES = 30  # of a failed command's output


def prepared_disk(binaries: Path, cache: Path) -> Path:
    """An ext4 image whose folder `containerd` is a containerd root with all images unpacked; made if it is not there.

    CalledProcessError, with the command's own words on standard error, if a step fails.
    """
    cache.mkdir(parents=True, exist_ok=True)
    made = json.loads(_inside("images", str(binaries), str(cache)))
    key = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]
    disk = cache / f"node-{key}.img"
    if not disk.exists():
        _inside("disk", str(disk), str(cache), json.dumps(made))
    os.utime(disk)
    for old in sorted(cache.glob("node-*.img"), key=lambda path: path.stat().st_mtime, reverse=True)[_KEPT:]:
        old.unlink()
    return disk


def _inside(*arguments: str) -> str:
    """Run a part of this module where its mounts and processes cannot outlive it; what it printed."""
    separate = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [*separate, sys.executable, "-m", "tests.cluster.images", *arguments]
    environment = os.environ | {"PATH": system_path()}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    return output.stdout


@contextmanager
def _step(name: str) -> Iterator[None]:
    begin = time.monotonic()
    yield
    print(f"{name}: {time.monotonic() - begin:.1f} s", file=sys.stderr)


def _run(*command: str) -> str:
    output = subprocess.run(
        command, check=False, timeout=_STEP_SECONDS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if output.returncode:
        print(*output.stdout.splitlines()[-_LINES:], sep="\n", file=sys.stderr)
        output.check_returncode()
    return output.stdout.strip()


class _Images:
    """Container images in a storage of their own, by buildah."""

    def __init__(self, cache: Path) -> None:
        folder = cache / "storage"
        self._buildah = ["buildah", "--root", str(folder), "--runroot", f"{folder}.run", "--storage-driver", "overlay"]

    def run(self, *arguments: str) -> str:
        return _run(*self._buildah, *arguments)

    def label(self, image: str) -> str:
        """What `commit` got as `source`; "" if there is no such image."""
        output = subprocess.run(
            [*self._buildah, "inspect", "--type", "image", image], check=False, capture_output=True, timeout=60
        )
        config = json.loads(output.stdout)["OCIv1"]["config"] if output.returncode == 0 else {}
        return str((config.get("Labels") or {}).get("source", ""))

    def id(self, image: str) -> str:
        return str(json.loads(self.run("inspect", "--type", "image", image))["FromImageID"])

    def make(self, image: str, source: str, content: Path, *config: str) -> None:
        """An image of one layer, unless there is one of this source already."""
        if self.label(image) == source:
            return
        with _step(image):
            container = self.run("from", "scratch")
            try:
                self.run("add", "--quiet", container, str(content), "/")
                self.run("config", "--label", f"source={source}", *config, container)
                self.run("commit", "--quiet", container, image)
            finally:
                self.run("rm", container)

    def save(self, image: str, file: Path) -> None:
        self.run("push", "--quiet", image, f"docker-archive:{file}:{image}")


def _make_images(binaries: Path, cache: Path) -> dict[str, str]:
    """Every image and its id."""
    images, ours = _Images(cache), {OURS: ""}
    if os.environ.get(CLUSTER_CEPH):
        ours[OURS_WITH_CEPH] = "librbd1 kmod"
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        _make_base(images, Path(scratch))
        for name, packages in ours.items():
            _make_ours(images, Path(scratch), name, packages)
        _make_pause(images, Path(scratch))
        _make_busybox(images, Path(scratch))
        programs = {name: binaries / binary for name, binary in SIDECARS.items()}
        if addons := os.environ.get(CSI_ADDONS_BIN):
            programs |= {name: Path(addons, binary) for name, binary in ADDONS.items()}
        for name, program in programs.items():
            content = Path(scratch, f"{program.name}.d")
            content.mkdir()
            shutil.copy(program, content)
            images.make(name, _digest(program), content, "--entrypoint", json.dumps([f"/{program.name}"]))
    return {image: images.id(image) for image in (*ours, PAUSE, BUSYBOX, *programs)}


def _make_ours(images: _Images, scratch: Path, name: str, packages: str) -> None:
    with _step(name):
        # How this machine gets its packages, and whom it trusts there.
        trust = scratch / "pip.conf"
        trust.write_text("[global]\ncert = /run/certs/ca-certificates.crt\n")
        volumes = {
            "/etc/apt/apt.conf.d": "/etc/apt/apt.conf.d",
            "/etc/ssl/certs": "/run/certs",
            str(trust): "/etc/pip.conf",
        }
        own = [f"--volume={here}:{there}:ro" for here, there in volumes.items()]
        own.append(f"--build-arg=PACKAGES={packages}")
        images.run("build", "--isolation", "chroot", "--layers", "--pull-never", *own, "--tag", name, str(ROOT))


def _make_base(images: _Images, scratch: Path) -> None:
    if images.label(BASE) != _SUITE:
        content = scratch / "base"
        with _step("mmdebstrap"):
            _run(
                "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--format=directory", _SUITE, str(content)
            )
        images.make(BASE, _SUITE, content, "--cmd", "bash")


def _make_pause(images: _Images, scratch: Path) -> None:
    source = ROOT / "tests" / "cluster" / "pause.c"
    content = scratch / "pause.d"
    content.mkdir()
    _run("gcc", "-static", "-Os", "-s", "-o", str(content / "pause"), str(source))
    images.make(PAUSE, _digest(source), content, "--entrypoint", '["/pause"]', "--user", "65535")


def _make_busybox(images: _Images, scratch: Path) -> None:
    busybox = Path("/bin/busybox")
    content = scratch / "busybox.d"
    for folder in ("bin", "dev", "etc", "proc", "root", "sys", "tmp"):
        (content / folder).mkdir(parents=True)
    (content / "tmp").chmod(0o1777)
    shutil.copy(busybox, content / "bin")
    for applet in _run(str(busybox), "--list").split():
        if applet != "busybox":
            (content / "bin" / applet).symlink_to("busybox")
    (content / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n")
    (content / "etc" / "group").write_text("root:x:0:\nuser:x:1000:\n")
    images.make(BUSYBOX, _digest(busybox), content, "--cmd", "sh", "--env", "PATH=/bin")


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _make_disk(disk: Path, cache: Path, names: list[str]) -> None:
    """Let a containerd of this machine's own import the images into the disk, under a temporary name at first."""
    images = _Images(cache)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        scratch = Path(folder)
        new, archive = scratch / "disk", scratch / "archive.tar"
        with new.open("xb") as file:
            file.truncate(_DISK_BYTES)
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(new))
        with _mounted(new, scratch / "mounted") as mounted, _containerd(mounted / "containerd", scratch) as ctr:
            for name in names:
                with _step(f"import {name}"):
                    images.save(name, archive)
                    _run(*ctr, "images", "import", "--snapshotter", "overlayfs", str(archive))
                    archive.unlink()
        new.rename(disk)


@contextmanager
def _mounted(file: Path, folder: Path) -> Iterator[Path]:
    folder.mkdir()
    _run("mount", "-o", "loop", str(file), str(folder))
    try:
        yield folder
    finally:
        _run("umount", str(folder))


@contextmanager
def _containerd(root: Path, scratch: Path) -> Iterator[list[str]]:
    """A containerd with this root; the command that talks to it."""
    socket = scratch / "containerd.sock"
    config = scratch / "containerd.toml"
    config.write_text(
        f'version = 2\nroot = "{root}"\nstate = "{scratch / "state"}"\n'
        f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\n  address = "{socket}"\n'
    )
    log = scratch / "containerd.log"
    ctr = ["ctr", "--address", str(socket), "--namespace", "k8s.io"]
    with log.open("wb") as output:
        process = subprocess.Popen(["containerd", "--config", str(config)], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while subprocess.run([*ctr, "version"], check=False, capture_output=True, timeout=_START_SECONDS).returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                print(log.read_text(), file=sys.stderr)
                raise TimeoutError("containerd does not answer; its log is above")
            time.sleep(0.1)
        yield ctr
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(_START_SECONDS)


def cache_folder() -> Path:
    """Where things that were built stay between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luks-csi" / "images"


def main(arguments: list[str]) -> None:
    match arguments:
        case ["images", binaries, cache]:
            print(json.dumps(_make_images(Path(binaries), Path(cache))))
        case ["disk", disk, cache, made]:
            _make_disk(Path(disk), Path(cache), list(json.loads(made)))
        case _:
            print(prepared_disk(Path(os.environ[KUBERNETES_BIN]), cache_folder()))


if __name__ == "__main__":
    main(sys.argv[1:])
