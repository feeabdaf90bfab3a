"""`make sanity`: csi-sanity against the real server with encrypted volumes, mount and block, on real dm-crypt.

BACKEND is one of tests/backends; without it, loopfile.

Nothing is skipped or focused by us. What csi-sanity skips by itself, because a capability is not advertised, must be
exactly what tests/data/sanity-skips.json lists, with a reason for each. On rbd, which offers to attach, one case is
left out by us: that a node does not exist can only be told by who knows all of them.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from csi_driver.host.mounts import Mounts
from csi_driver.host.workers import Workers
from csi_driver.volumes.driver import WARM
from tests.backends.ceph import CLUSTER
from tests.backends.ceph import POOL as CEPH_POOL
from tests.backends.csirig import BELOW
from tests.backends.rigs import GROUP, POOL, LvmRig, RbdRig
from tests.machine.server import PROGRAM, ServerProcess

_CSI_SERVER = (sys.executable, "-m", "tests.backends.csi_server")
_SKIPS = Path(__file__).parent.parent / "data" / "sanity-skips.json"
_PASSPHRASE = "csi-sanity's own passphrase"
_MIB = 1 << 20
_RUN_SECONDS = 900
_PUBLISHING = "[It] Controller Service [Controller Server] ControllerPublishVolume should fail when "
_UNKNOWN_NODE = "the node does not exist"
_SKIPPED_ON_RBD = frozenset(
    f"{_PUBLISHING}{what}"
    for what in (
        _UNKNOWN_NODE,
        "publishing more volumes than the node max attach limit",  # there is none
        "the volume is already published but is incompatible",  # PUBLISH_READONLY is not offered
    )
)
_SECRETS = (
    "CreateVolumeSecret",
    "NodeStageVolumeSecret",
    "NodePublishVolumeSecret",
    "ControllerValidateVolumeCapabilitiesSecret",
)


def main(backend: str = "loopfile") -> int:
    """Run both access types on that backend; returns 0 when nothing failed and the skips are the listed ones."""
    program, state = os.environ["CSI_SANITY"], Path(os.environ.get("MACHINE_STATE", "/var/tmp"))
    listed = _listed(backend)
    passed = failed = 0
    skipped: set[str] = set()
    with tempfile.TemporaryDirectory(dir=state, prefix="sanity-") as folder, _storage(Path(folder), backend) as storage:
        for access_type in ("mount", "block"):
            results = _run(program, Path(folder) / access_type, access_type, storage)
            passed += sum(status == "passed" for status in results.values())
            failed += sum(status not in ("passed", "skipped", "pending") for status in results.values())
            skipped |= {name for name, status in results.items() if status in ("skipped", "pending")}
    unlisted, needless = skipped - listed, listed - skipped
    for name in sorted(unlisted):
        print(f"skipped and not listed: {name}")
    for name in sorted(needless):
        print(f"listed and not skipped: {name}")
    print(
        f"sanity: backend={backend} passed={passed} failed={failed} skipped={len(skipped)} listed={len(listed)} "
        f"unlisted={len(unlisted)} needless={len(needless)}"
    )
    return 0 if passed and not (failed or unlisted or needless) else 1


def _listed(backend: str) -> frozenset[str]:
    """What is skipped on that backend."""
    read: Mapping[str, list[str]] = json.loads(_SKIPS.read_text())
    if not backend.startswith(("csi", "rbd")):
        return frozenset(skip for skips in read.values() for skip in skips)
    there = (skips for reason, skips in read.items() if "PUBLISH_UNPUBLISH_VOLUME" not in reason)
    outside = _SKIPPED_ON_RBD if backend == "rbd" else _SKIPPED_ON_RBD - {f"{_PUBLISHING}{_UNKNOWN_NODE}"}
    return frozenset(skip for skips in there for skip in skips) | outside


@dataclass(frozen=True)
class _Storage:
    """What the server and its class need to be told of a backend; `end` takes back what a server has mounted."""

    options: Sequence[str]
    parameters: str
    end: Callable[[ServerProcess], object]
    seconds: float = _RUN_SECONDS
    skip: str = ""
    program: Sequence[str] = PROGRAM


@contextmanager
def _storage(folder: Path, backend: str) -> Iterator[_Storage]:
    if backend == "loopfile":
        yield _Storage((), "", lambda _: None)
        return
    if backend.startswith("csi"):
        parameters = f"backingStorageClass: {BELOW}\n" + ("backingAttach: direct\n" if backend == "csi-direct" else "")
        yield _Storage((), parameters, ServerProcess.stop, program=(*_CSI_SERVER, backend))
        return
    workers, thin = Workers(WARM), backend == "lvm-thin"
    if backend == "rbd":
        with RbdRig(folder, workers) as ceph:
            options = ("--backend", "rbd", "--ceph-config", str(ceph.config), "--ceph-secret", str(ceph.secret))
            parameters = f"clusterID: {CLUSTER}\npool: {CEPH_POOL}\n"
            yield _Storage(options, parameters, lambda _: None, 3000, _UNKNOWN_NODE)
        workers.stop()
        return
    try:
        with LvmRig(folder, workers, thin=thin, disk_bytes=16 << 30, pool_bytes=4 << 30) as rig:
            rig.restart()
            rig.disown()

            def end(server: ServerProcess) -> None:
                server.stop()
                Mounts().unmount(str(server.state_dir / "lvm"))

            yield _Storage(("--backend", "lvm", "--volume-group", GROUP), f"thinPool: {POOL}\n" if thin else "", end)
    finally:
        workers.stop()


def _run(program: str, folder: Path, access_type: str, storage: _Storage) -> Mapping[str, str]:
    folder.mkdir()
    files = {"secrets": folder / "secrets.yaml", "parameters": folder / "parameters.yaml", "report": folder / "out.xml"}
    files["secrets"].write_text("".join(f"{name}:\n  CRYPTO_KEY_VALUE: {_PASSPHRASE!r}\n" for name in _SECRETS))
    files["parameters"].write_text('encrypted: "true"\npbkdf: "pbkdf2"\npbkdfIterations: "1000"\n' + storage.parameters)
    with ServerProcess(folder / "server", *storage.options, program=storage.program) as server:
        argv = [
            program,
            f"-csi.endpoint=unix://{server.endpoint}",
            f"-csi.mountdir={folder / 'mount'}",
            f"-csi.stagingdir={folder / 'stage'}",
            f"-csi.secrets={files['secrets']}",
            f"-csi.testvolumeparameters={files['parameters']}",
            f"-csi.testvolumeaccesstype={access_type}",
            f"-csi.testvolumesize={64 * _MIB}",
            f"-csi.testvolumeexpandsize={128 * _MIB}",
            f"-ginkgo.junit-report={files['report']}",
            "-ginkgo.no-color",
            "-ginkgo.succinct",
            *([f"-ginkgo.skip={storage.skip}"] if storage.skip else []),
        ]
        ended = subprocess.run(argv, check=False, timeout=storage.seconds, stdout=subprocess.PIPE, text=True)
        if ended.returncode:
            print(ended.stdout)
            print(server.log())
        storage.end(server)
    return {
        case.attrib["name"]: case.attrib["status"]
        for case in ET.parse(files["report"]).iter("testcase")  # noqa: S314 - csi-sanity wrote it just now
        if case.attrib["name"].startswith("[It]")
    }


if __name__ == "__main__":
    sys.exit(main(os.environ.get("BACKEND") or "loopfile"))
