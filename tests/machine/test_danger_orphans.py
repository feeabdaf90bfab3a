"""Work of a killed server that goes on: a fresh server waits for its end, so that no key changes under data.

Measured with cryptsetup 2.6: an orphaned luksFormat that went on after a second one changed the volume key under a
mounted file system; one killed in its key derivation leaves a valid header without key slots. The bug that reddens
these tests: lock descriptors that the children do not inherit (`held_descriptors` empty).
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from csi_driver.host.workers import Workers
from csi_driver.model.errors import DriverError, VolumeBusy
from csi_driver.model.volume import EncryptionState, FileSystemState
from csi_driver.rpc.client import CsiClient, RemoteError, RemoteVolume
from tests.headers import Metadata, forged, head_of, metadata_of
from tests.machine.node import EXT4, MIB, NAME, SECRET, SIZE, VOLUME, Node
from tests.machine.places import of_class, server_on
from tests.machine.processes import first_pid, has_ended, pids_of, wait_for
from tests.machine.server import ServerProcess

SLOW = {"encrypted": "true", "pbkdf": "argon2id", "pbkdfMemory": "8192", "pbkdfIterations": "32"}
SLOW_MKFS = {
    "encrypted": "true", "pbkdf": "pbkdf2", "pbkdfIterations": "1000",
    "mkfsOptions": "-i 1024 -I 256 -E lazy_itable_init=0",
}  # fmt: skip


class Background(threading.Thread):
    """A call of the server that is under way."""

    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.error: RemoteError | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except RemoteError as error:
            self.error = error


@pytest.fixture
def server(folder: Path) -> Iterator[ServerProcess]:
    with server_on(folder) as server:
        yield server


@contextmanager
def staging(server: ServerProcess, node: Node, parameters: dict[str, str], size: int = SIZE) -> Iterator[Background]:
    """A first stage, under way on the server."""
    node.staging_path().mkdir(parents=True)
    with CsiClient(server.endpoint) as client:
        volume: RemoteVolume = client.create_volume(NAME, [EXT4], size, parameters=of_class(parameters), secrets=SECRET)
        yield Background(lambda: client.stage(volume, node.staging_path(), EXT4, SECRET))


def deriving(node: Node) -> int | None:
    """The luksFormat worker in its key derivation: the header is written and has no key slot yet."""
    pid = first_pid("luks-format")
    try:
        return pid if pid is not None and not metadata_of(head_of(node.disk()))["keyslots"] else None
    except msgspec.DecodeError:
        return None


def stage_when_free(node: Node) -> None:
    """Stage as kubelet does, again and again while it is ABORTED."""

    def attempt() -> bool:
        try:
            node.stage()
        except VolumeBusy:
            return False
        return True

    wait_for(attempt, "the end of the earlier operation", 50)


def holds_its_data(node: Node) -> None:
    """Data written now is there after the mapping was opened anew, under the volume key that the record pins."""
    node.write("after the orphan")
    node.unstage()
    identity = node.record().luks
    assert identity is not None
    assert node.header().key_digest == identity.digest
    node.stage()
    assert node.read() == "after the orphan"
    node.unstage()


def test_luks_format_of_a_killed_server_is_waited_for(server: ServerProcess, folder: Path, workers: Workers) -> None:
    node = Node(folder, workers)
    with staging(server, node, SLOW) as call:
        orphan = wait_for(lambda: deriving(node), "luksFormat in its key derivation")
        os.kill(orphan, signal.SIGSTOP)
        server.kill()
        call.join(30)
    assert call.error is not None
    assert not has_ended(orphan)
    before = head_of(node.disk())
    for _ in range(2):
        with pytest.raises(VolumeBusy, match=rf"volume {VOLUME} is still at work in process {orphan} \(luks-format"):
            node.stage()
    with pytest.raises(VolumeBusy):
        node.unstage()
    with pytest.raises(VolumeBusy):
        node.delete()
    assert head_of(node.disk()) == before
    assert node.encryption_state() is EncryptionState.FORMATTING
    os.kill(orphan, signal.SIGCONT)
    stage_when_free(node)
    assert has_ended(orphan)
    holds_its_data(node)


def test_luks_format_of_a_killed_server_that_is_not_stopped(
    server: ServerProcess, folder: Path, workers: Workers
) -> None:
    node = Node(folder, workers)
    with staging(server, node, SLOW) as call:
        orphan = wait_for(lambda: deriving(node), "luksFormat in its key derivation")
        server.kill()
        with pytest.raises(VolumeBusy, match=str(orphan)):
            node.stage()
        call.join(30)
    stage_when_free(node)
    assert not pids_of("luks-format")
    holds_its_data(node)


def test_mkfs_of_a_killed_server_is_waited_for(server: ServerProcess, folder: Path, workers: Workers) -> None:
    node = Node(folder, workers)
    with staging(server, node, SLOW_MKFS, 384 * MIB) as call:
        orphan = wait_for(lambda: first_pid("mkfs.ext4"), "mkfs")
        os.kill(orphan, signal.SIGSTOP)
        server.kill()
        call.join(30)
    assert not has_ended(orphan), "mkfs ended before it could be stopped"
    with pytest.raises(VolumeBusy, match=rf"process {orphan} \(mkfs\.ext4"):
        node.stage()
    assert node.file_system_state() is FileSystemState.MAKING
    os.kill(orphan, signal.SIGCONT)
    stage_when_free(node)
    assert has_ended(orphan)
    holds_its_data(node)


@pytest.mark.parametrize("server_too", [False, True], ids=["worker", "worker-and-server"])
def test_luks_format_killed_in_its_kdf_is_not_taken_for_encrypted(
    server: ServerProcess, folder: Path, workers: Workers, *, server_too: bool
) -> None:
    """A valid header of the right UUID without key slots: nobody's key opens it, so it is formatted again."""
    node = Node(folder, workers)
    with staging(server, node, SLOW) as call:
        worker = wait_for(lambda: deriving(node), "luksFormat in its key derivation")
        if server_too:
            server.kill()
        os.kill(worker, signal.SIGKILL)
        call.join(30)
    assert call.error is not None
    if not server_too:
        assert "was killed before it could answer; call again" in str(call.error)
    wait_for(lambda: has_ended(worker), "the end of the worker")
    half = node.header()
    assert not half.keyslots
    assert node.encryption_state() is EncryptionState.FORMATTING
    stage_when_free(node)
    assert node.encryption_state() is EncryptionState.ENCRYPTED
    whole = node.header()
    assert whole.uuid == half.uuid
    assert len(whole.keyslots) == 1
    holds_its_data(node)


def without_key_slots(metadata: Metadata) -> None:
    metadata["keyslots"] = {}
    metadata["digests"]["0"]["keyslots"] = []


def test_a_header_without_key_slots_is_never_formatted_again_once_it_held_data(used: Node) -> None:
    """The same header on a volume recorded as encrypted is damage, not an unfinished format."""
    bare = forged(head_of(used.disk()), without_key_slots)
    with used.disk().open("r+b") as file:
        file.write(bare)
    with pytest.raises(DriverError):
        used.stage()
    assert used.encryption_state() is EncryptionState.ENCRYPTED
    assert head_of(used.disk()) == bare
    assert used.closed()
