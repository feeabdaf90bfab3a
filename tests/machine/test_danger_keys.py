"""Secrets and keys: missing, wrong, exact; and what needs none. Field problems 15, 17 and 23."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec
import pytest

from csi_driver.host import keyring
from csi_driver.host.devicemapper import DeviceMapper, Target
from csi_driver.host.dmnodes import name_path
from csi_driver.host.handle import Handle
from csi_driver.host.syscalls import syscall
from csi_driver.host.workers import Workers
from csi_driver.luks.device import resize_mapping, volume_key_name
from csi_driver.luks.key_proof import proof_name
from csi_driver.model.errors import CommandFailed, DeviceInUse, FailedPrecondition, NotFound, Unauthenticated
from csi_driver.model.volume import EncryptionState
from csi_driver.volumes.capability import Capability
from csi_driver.volumes.driver import WARM
from tests.headers import run_cryptsetup
from tests.machine.node import BLOCK, CHEAP, MIB, MOUNT, PASSPHRASE, SECRET, SIZE, VOLUME, Node, fingerprint
from tests.machine.places import BACKEND, DEVICE, RECORDS_ARE_FILES, not_on
from tests.machine.processes import wait_for

P = ParamSpec("P")
R = TypeVar("R")
WRONG = {"CRYPTO_KEY_VALUE": PASSPHRASE[:-1]}
LARGER = 40 * MIB
THREAD, USER = -1, -4
SETPERM, LINK = 5, 8


def key_in_kernel(node: Node) -> bool:
    identity = node.record().luks
    assert identity is not None
    return keyring.find_user(volume_key_name(identity.uuid)) is not None


def test_a_wrong_key_opens_nothing_and_leaves_nothing_open(used: Node) -> None:
    before = fingerprint(used.disk())
    for capability in (MOUNT, BLOCK):
        with pytest.raises(Unauthenticated, match=rf"opens no key slot of volume {VOLUME} on {DEVICE}") as refused:
            used.stage(capability=capability, secret=WRONG)
        assert PASSPHRASE[:-1] not in str(refused.value)
        assert used.closed()
        assert not key_in_kernel(used)
    assert fingerprint(used.disk()) == before
    used.stage()
    assert used.read() == "precious"
    used.unstage()


NEAR = {
    "newline": PASSPHRASE + "\n",
    "blank": PASSPHRASE + " ",
    "nul": PASSPHRASE + "\0x",  # not a NUL alone: HMAC fills a short key with zeros, so PBKDF2 cannot tell it
    "case": PASSPHRASE.upper(),
    "no-break-space": PASSPHRASE.replace(" ", "\xa0"),
}


@pytest.mark.parametrize("near", NEAR.values(), ids=NEAR)
def test_lh10584_the_exact_bytes_are_the_key(used: Node, near: str) -> None:
    """A trailing newline is part of the key, and its absence too: nothing is stripped anywhere on the way."""
    with pytest.raises(Unauthenticated):
        used.stage(secret={"CRYPTO_KEY_VALUE": near})
    used.create("pvc-2", secret={"CRYPTO_KEY_VALUE": near})
    used.stage("pvc-2", secret={"CRYPTO_KEY_VALUE": near})
    used.write("kept", "pvc-2")
    used.unstage("pvc-2")
    with pytest.raises(Unauthenticated):
        used.stage("pvc-2", secret=SECRET)
    used.stage("pvc-2", secret={"encryptionPassphrase": near})
    assert used.read("pvc-2") == "kept"
    used.unstage("pvc-2")


def test_lh9002_the_real_cryptsetup_opens_what_was_formatted(used: Node) -> None:
    arguments = ("open", "--test-passphrase", "--key-file", "-", str(used.disk()))
    run_cryptsetup(*arguments, key=PASSPHRASE.encode())
    with pytest.raises(AssertionError, match="exit 2"):
        run_cryptsetup(*arguments, key=PASSPHRASE.encode() + b"\n")


@pytest.mark.parametrize("secret", [{}, {"password": "x"}, {"CRYPTO_KEY_PROVIDER": "secret"}], ids=str)
def test_lh9571_a_secret_without_the_entry_names_secret_and_entry(used: Node, secret: dict[str, str]) -> None:
    used.create("pvc-new")
    for volume in (VOLUME, "pvc-new"):
        with pytest.raises(FailedPrecondition) as refused:
            used.stage(volume, secret=secret)
        for words in (volume, "CRYPTO_KEY_VALUE", "encryptionPassphrase", "node-stage-secret-name", "-namespace"):
            assert words in str(refused.value)
        assert used.closed(volume)
    assert used.encryption_state("pvc-new") is EncryptionState.PREPARED


@pytest.mark.parametrize(
    ("secret", "words"),
    [
        ({"CRYPTO_KEY_VALUE": ""}, "CRYPTO_KEY_VALUE is empty"),
        ({"encryptionPassphrase": ""}, "encryptionPassphrase is empty"),
        ({**SECRET, "CRYPTO_KEY_PROVIDER": "vault"}, "CRYPTO_KEY_PROVIDER names a key provider that does not exist"),
        ({**SECRET, "encryptionPassphrase": "other"}, "CRYPTO_KEY_VALUE and encryptionPassphrase disagree"),
        ({"CRYPTO_KEY_VALUE": "x" * (64 * 1024 + 1)}, "longer than 65536 bytes"),
    ],
)
def test_lh3521_a_secret_that_cannot_be_right(used: Node, secret: dict[str, str], words: str) -> None:
    with pytest.raises(FailedPrecondition, match=words) as refused:
        used.stage(secret=secret)
    assert "other" not in str(refused.value)
    assert "xxxx" not in str(refused.value)
    assert used.closed()


def test_lh9571_an_encrypted_volume_is_never_staged_as_a_plain_one(used: Node) -> None:
    """No secret is no reason to mount the ciphertext, and a claim that says "plain" does not make it so."""
    before = fingerprint(used.disk())
    with pytest.raises(FailedPrecondition, match=r"says encrypted='false'.*says 'true'"):
        used.stage(secret={}, context={"encrypted": "false"})
    assert used.closed()
    assert fingerprint(used.disk()) == before


def test_cc5148_a_volume_is_deleted_when_its_secret_is_gone(used: Node) -> None:
    folder = used.record_file().parent if RECORDS_ARE_FILES else None
    used.delete()
    assert folder is None or not folder.exists()
    assert not used.disk().exists()
    with pytest.raises(NotFound):
        used.record()
    used.delete()


@pytest.mark.parametrize("capability", [MOUNT, BLOCK], ids=["mount", "block"])
@pytest.mark.parametrize("parameters", [CHEAP, {}], ids=["encrypted", "plain"])
def test_cc5148_a_published_volume_is_not_deleted(
    node: Node, capability: Capability, parameters: dict[str, str]
) -> None:
    node.create(parameters=parameters)
    node.stage(capability=capability)
    if not capability.block:
        node.write()
    target = node.publish(capability=capability)
    with pytest.raises(DeviceInUse, match=rf"volume {VOLUME} is still published at {target}; unpublish it first"):
        node.delete()
    assert node.disk().exists()
    if not capability.block:
        assert node.read() == "precious"
    node.unpublish()
    if BACKEND == "rbd":  # Kubernetes takes it from its node before
        node.unstage()
    node.delete()
    assert node.closed()


@not_on("record", "rbd", "csi")
def test_unstage_needs_neither_key_nor_record_nor_volume(used: Node) -> None:
    used.unstage("pvc-never-was")
    used.stage()
    used.record_file().unlink()
    used.unstage()
    assert used.closed()


def test_the_volume_key_leaves_the_kernel_with_the_mapping(used: Node) -> None:
    used.stage()
    assert key_in_kernel(used)
    used.unstage()
    assert not key_in_kernel(used)
    # The kernel destroys a key that nothing links any more by and by.
    wait_for(lambda: "cryptsetup:" not in Path("/proc/keys").read_text(), "the end of the key", 10)


def attack(node: Node, kind: str) -> str:
    """What a container's root without any capability reaches against the kept volume key."""
    identity = node.record().luks
    assert identity is not None
    stripped = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
    return subprocess.run(
        [*stripped, sys.executable, "-m", "tests.machine.key_attacker", kind, identity.uuid],
        check=False, capture_output=True, text=True, timeout=60,
    ).stdout  # fmt: skip


def check_grown(node: Node, content: bytes) -> None:
    """The volume has its new size and, read from its storage, its content."""
    assert node.open_mapping().size_bytes == LARGER
    Path("/proc/sys/vm/drop_caches").write_text("3")
    assert (node.staging_path() / "large").read_bytes() == content
    node.write("afterwards")
    node.unstage()
    node.stage()
    assert (node.staging_path() / "large").read_bytes() == content
    assert node.read() == "afterwards"
    node.unstage()


@pytest.fixture
def content(used: Node) -> bytes:
    """What is in a large file of the volume, which is staged."""
    used.stage()
    content = os.urandom(2 * MIB)
    (used.staging_path() / "large").write_bytes(content)
    os.sync()
    return content


def test_a_key_that_a_container_put_into_the_place_of_the_volumes_is_never_used(used: Node, content: bytes) -> None:
    assert attack(used, "swap") == "swapped\n"
    with pytest.raises(FailedPrecondition, match=r"cannot be enlarged while it is open: .*(secret; unstage and stage)"):
        used.expand(LARGER)
    assert used.open_mapping().size_bytes == SIZE
    assert used.expand(LARGER, secret=SECRET) == LARGER
    check_grown(used, content)


def test_a_container_cannot_change_the_volume_key_that_waits_for_a_resize(used: Node, content: bytes) -> None:
    assert attack(used, "update") == "possessed\n"
    assert used.expand(LARGER) == LARGER
    check_grown(used, content)


def test_a_key_that_may_be_written_to_is_proven_before_it_is_used(used: Node, content: bytes) -> None:
    """As an earlier version kept it, and a container then replaced its payload."""
    identity = used.record().luks
    assert identity is not None
    name = volume_key_name(identity.uuid)
    keyring.unlink_from_user(name)
    box = syscall("add_key", b"keyring", f"luks-csi:{name}".encode(), None, 0, THREAD)
    key = syscall("add_key", b"logon", name.encode(), b"B" * 64, 64, box)
    for serial in (box, key):
        syscall("keyctl", SETPERM, serial, 0x3F3F0000)
    syscall("keyctl", LINK, box, USER)
    keyring.clear_thread()
    stage = used.stages.get(VOLUME)
    assert stage is not None
    used.stages.put(VOLUME, msgspec.structs.replace(stage, kept_key=None))
    assert attack(used, "update") == "possessed\nupdated\n"
    with pytest.raises(FailedPrecondition, match=r"the key in the kernel's keyring is not its volume key, somebody"):
        used.expand(LARGER)
    assert used.mapper.get(proof_name(used.open_mapping().name)) is None
    assert used.expand(LARGER, secret=SECRET) == LARGER
    check_grown(used, content)


@contextlib.contextmanager
def writing_to(path: str) -> Iterator[None]:
    """Somebody who writes new bytes into most of the first 64 KiB all the time."""
    ended = threading.Event()

    def write() -> None:
        with open(os.open(path, os.O_WRONLY | os.O_DSYNC), "wb", buffering=0) as device:
            while not ended.is_set():
                os.pwrite(device.fileno(), os.urandom(48 << 10), 0)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()


def test_a_key_is_proven_while_a_pod_writes_and_where_a_killed_proof_was_left(node: Node) -> None:
    node.create(capability=BLOCK)
    node.stage(capability=BLOCK)
    mapping = node.open_mapping()
    (target,) = mapping.targets
    identity = node.record().luks
    assert identity is not None
    assert keyring.link_into_thread(volume_key_name(identity.uuid)) is not None
    node.mapper.create(proof_name(mapping.name), "left", [Target(0, 8, target.type, target.params)], read_only=True)
    keyring.clear_thread()
    with writing_to(mapping.path):
        assert node.expand(LARGER) == LARGER
    node.unstage()


def leave_a_proof(below: Handle, name: str) -> None:
    """In a worker: killed with the second mapping there, on the volume's device as a proof's is."""
    number = "{}:{}".format(*below.number)
    DeviceMapper().create(proof_name(name), "left", [Target(0, 8, "linear", f"{number} 0")], read_only=True)
    os.kill(os.getpid(), signal.SIGKILL)


class KilledInProof(Workers):
    """Has the worker killed in which a mapping is resized."""

    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        below = args[1] if function is resize_mapping else None
        if isinstance(below, Handle):
            super().call(what, timeout, leave_a_proof, below, f"luks-{VOLUME}")
        return super().call(what, timeout, function, *args, **kwargs)


def test_a_resize_that_is_killed_in_its_proof_leaves_no_second_mapping(folder: Path) -> None:
    workers = KilledInProof(WARM)
    try:
        node = Node(folder, workers)
        node.create(capability=BLOCK)
        node.stage(capability=BLOCK)
        with pytest.raises(CommandFailed, match="killed before it could answer"):
            node.expand(LARGER)
        assert node.mapper.get(proof_name(node.open_mapping().name)) is None
        node.unstage()
    finally:
        workers.stop()


def test_the_name_of_a_proof_goes_that_was_killed_between_its_removal_and_the_names(node: Node) -> None:
    node.create(capability=BLOCK)
    node.stage(capability=BLOCK)
    name = Path(name_path(proof_name(node.open_mapping().name)))
    name.symlink_to("../dm-199")
    node.unstage()
    assert not name.is_symlink()


def test_the_volume_key_is_in_no_table(used: Node) -> None:
    """`dmsetup table --showkeys` of a mapping opened with --disable-keyring prints the key."""
    used.stage()
    shown = subprocess.run(
        ["dmsetup", "table", "--showkeys", used.record().mapping_name],
        check=True, capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    assert shown.split()[4].startswith(":64:logon:cryptsetup:")
    used.unstage()
