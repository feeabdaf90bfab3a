"""Two machines on one Ceph: one dies under a writer, is fenced off, and the other one has all that was written.

On the host, as it boots the machines: `make ceph-test` runs it. The controller is a process of the host, which has
neither device-mapper nor images: a controller needs none.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.rpc.client import CsiClient
from tests.backends.ceph import CLUSTER, POOL, USER, Ceph
from tests.backends.ceph_node import MOUNT
from tests.backends.on_ceph import ADDRESS, NODES, machine, network
from tests.machine.guest import Guest, missing
from tests.machine.server import ServerProcess

MIB = 1 << 20
CLASS = {"clusterID": CLUSTER, "pool": POOL, "encrypted": "true", "pbkdf": "pbkdf2", "pbkdfIterations": "1000"}
SECONDS = 600.0
FILES = 20

pytestmark = pytest.mark.skipif(
    "MACHINE_STATE" in os.environ or os.environ.get("BACKEND") != "rbd", reason="it boots machines: make ceph-test"
)


@pytest.fixture
def bridged() -> Iterator[None]:
    """The host's side of the network."""
    with network():
        yield


def command(number: int, action: str) -> list[str]:
    return [sys.executable, "-m", "tests.backends.ceph_node", NODES[number], f"node-{number}", action]


def acknowledged(shared: Path) -> int:
    """How many files were told to be durable."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int((shared / "acknowledged").read_text()) + 1
    return 0


@pytest.mark.usefixtures("bridged")
def test_a_machine_that_dies_under_a_writer_is_fenced_off_and_the_next_has_what_it_wrote(tmp_path: Path) -> None:
    assert missing() is None
    shared = tmp_path / "shared"
    shared.mkdir()
    with contextlib.ExitStack() as stack:
        memory = Path("/dev/shm", tmp_path.name)
        stack.callback(subprocess.run, ["rm", "-rf", str(memory)], check=True)
        ceph = stack.enter_context(Ceph(memory, ADDRESS))
        (shared / "config.json").write_text(ceph.config())
        secret = {"userID": USER, "userKey": ceph.key, "encryptionPassphrase": "plain oak table, seven chairs"}
        options = ("--backend", "rbd", "--ceph-config", str(shared / "config.json"), "--services", "controller")
        controller = stack.enter_context(ServerProcess(tmp_path / "controller", *options))
        client = stack.enter_context(CsiClient(controller.endpoint))
        volume = client.create_volume("life", [MOUNT], 64 * MIB, parameters=CLASS, secrets=secret)
        told = {"id": volume.id, "capacity": volume.capacity_bytes, "context": dict(volume.context), "secret": secret}
        (shared / "volume.json").write_text(json.dumps(told))
        client.attach(volume, "node-0", MOUNT, secret)
        with Guest(machine(0, shared)) as first:
            first.start(command(0, "write"))
            deadline = time.monotonic() + SECONDS
            while acknowledged(shared) < FILES:
                assert time.monotonic() < deadline, (first.output(), first.output("stderr"))
                time.sleep(0.2)
            first.kill()
        written = acknowledged(shared)
        client.detach(volume.id, "node-0", secret)  # as the attacher does with a node that is out of service
        listed = ceph.admin("ceph", "osd", "blocklist", "ls")
        assert NODES[0] in listed
        client.attach(volume, "node-1", MOUNT, secret)
        with Guest(machine(1, shared)) as second:
            second.start(command(1, "see"))
            code = second.wait(SECONDS)
            assert code == 0, (second.output(), second.output("stderr"))
        seen = json.loads((shared / "seen").read_text())
        assert set(range(written)) <= set(seen)
        client.detach(volume.id, "node-1", secret)
        client.delete_volume(volume.id, secret)
        assert ceph.asked("rbd", "ls", POOL) == []
