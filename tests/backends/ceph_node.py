"""A node of `test_rbd_guests.py`, in a guest: its driver's server, which stages the volume, and what a pod does in it.

`python -m tests.backends.ceph_node ADDRESS NODE ACTION`, in the folder $MACHINE_OUT that the host shares: `volume.json`
says which volume, `acknowledged` and `seen` get numbers of files.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from csi_driver.rpc.client import CsiClient, RemoteVolume
from csi_driver.volumes.capability import AccessMode, Capability
from tests.machine.server import ServerProcess

MOUNT = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="ext4")


def content(number: int) -> bytes:
    """Of the file of that number."""
    return f"{number:08d}\n".encode() * 512


def main(address: str, node: str, action: str) -> int:
    """Stage the volume, then write to it until the end of days, or see what is there."""
    shared, folder = Path(os.environ["MACHINE_OUT"]), Path(os.environ["MACHINE_STATE"])
    for words in (("addr", "add", f"{address}/24", "dev", "vec0"), ("link", "set", "vec0", "up")):
        subprocess.run(["ip", *words], check=True)
    subprocess.run(["modprobe", "rbd"], check=True)
    told = json.loads((shared / "volume.json").read_text())
    volume = RemoteVolume(told["id"], told["capacity"], told["context"])
    options = (
        "--backend",
        "rbd",
        "--ceph-config",
        str(shared / "config.json"),
        "--services",
        "node",
        "--node-id",
        node,
    )
    stage = folder / "stage"
    stage.mkdir()
    with ServerProcess(folder / "server", *options) as server, CsiClient(server.endpoint) as client:
        client.stage(volume, stage, MOUNT, told["secret"])
        if action == "write":
            _write(stage, shared / "acknowledged")
        found = [path for path in stage.iterdir() if path.name.isdecimal()]
        whole = [int(path.name) for path in found if path.read_bytes() == content(int(path.name))]
        (shared / "seen").write_text(json.dumps(sorted(whole)))
        client.unstage(volume.id, stage)
    return 0


def _write(stage: Path, acknowledged: Path) -> None:
    """File after file, each told when it is durable."""
    number = 0
    while True:
        with (stage / str(number)).open("wb") as file:
            file.write(content(number))
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(stage, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        acknowledged.write_text(str(number))
        number += 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
