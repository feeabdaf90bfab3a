"""Moves to another volume key where something goes wrong: others' moves, errors, damage, old records, discards."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from csi_driver.backends.loopfile import LoopfileBackend
from csi_driver.host import dmnodes
from csi_driver.keys.secret import read_secret
from csi_driver.luks.two_keys import Mover
from csi_driver.model.errors import Aborted, CommandFailed, DriverError, FailedPrecondition
from csi_driver.model.volume import FileSystemState
from csi_driver.volumes.adoption import Adoption, AdoptRequest
from csi_driver.volumes.conversion import Watch
from csi_driver.volumes.conversion_steps import ConversionSteps
from csi_driver.volumes.recovery import Recovery
from tests.keys.given import GivenSources
from tests.machine.node import BLOCK, CHEAP, LIMITS, SECRET, VOLUME, Node
from tests.machine.places import only_of_files
from tests.machine.processes import wait_for
from tests.machine.test_conversion import (
    CHUNK,
    PLAIN,
    SIZE,
    device_of,
    digest_of,
    encrypt,
    filled,
    next_file,
    reencrypt,
    stop_after,
)

pytestmark = only_of_files("key")


@pytest.fixture(autouse=True)
def unstaged(node: Node) -> Iterator[None]:
    yield
    if node.stages.get(VOLUME) is not None:
        node.unstage()


def flags(path: Path) -> str:
    done = subprocess.run(["lsattr", str(path)], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.split()[0]


def loopfile(node: Node) -> LoopfileBackend:
    assert isinstance(node.store, LoopfileBackend)
    return node.store


def kept_keys() -> set[str]:
    """The names of the volume keys in root's user keyring."""
    lines = Path("/proc/keys").read_text().splitlines()
    return {line.split("cryptsetup:")[1].split(":")[0] for line in lines if "cryptsetup:" in line and "keyring" in line}


def cut(*_: Any) -> None:
    raise CommandFailed("cut")


def cut_at_the_end(done: int) -> None:
    if done >= SIZE:
        raise CommandFailed("cut before its end")


def test_a_volume_without_a_file_system_is_not_moved(node: Node) -> None:
    node.create(size=SIZE * 4)
    node.stage(capability=BLOCK)
    node.unstage()
    node.store.update(msgspec.structs.replace(node.record(), file_system=FileSystemState.NONE))  # a kill before mkfs
    with pytest.raises(FailedPrecondition, match="stage it first"):
        reencrypt(node)
    node.stage()


def test_no_older_volume_key_stays_in_roots_keyring(node: Node) -> None:
    filled(node)
    reencrypt(node)
    with pytest.raises(CommandFailed):
        reencrypt(node, watch=Watch(cut_at_the_end))
    reencrypt(node)
    wait_for(lambda: len(kept_keys()) == 1, "the end of older keys, which the kernel shows until it has cleared up")


def test_an_end_without_its_file_changes_no_record(node: Node) -> None:
    content = filled(node)
    node.unstage()
    with pytest.raises(CommandFailed):
        reencrypt(node, watch=Watch(cut_at_the_end))
    aside = node.folder / "aside.img"
    next_file(node).rename(aside)  # disk.img and record were restored from a backup without it, say
    with pytest.raises(DriverError):
        reencrypt(node)
    assert node.record().conversion is not None
    aside.rename(next_file(node))
    reencrypt(node)
    node.stage(capability=BLOCK)
    assert digest_of(device_of(node)) == content


def test_an_older_record_from_before_the_move_is_not_taken(node: Node) -> None:
    filled(node)
    node.unstage()
    before = node.record_file().read_bytes()
    stop_after(node, 2)
    newest = node.record_file().read_bytes()
    node.record_file().write_bytes(before)
    with pytest.raises(FailedPrecondition, match="restore the newest record"):
        loopfile(node).accept_record(VOLUME)
    node.record_file().write_bytes(newest)


def test_a_begin_that_fails_leaves_no_file(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(node)
    node.unstage()
    with monkeypatch.context() as patch:
        patch.setattr(type(node.store), "attach_next", cut)
        with pytest.raises(CommandFailed):
            reencrypt(node)
    assert not next_file(node).exists()
    assert node.record().conversion is None


def test_a_move_leaves_others_the_lock(node: Node) -> None:
    """Kubelet's calls are refused while a step holds it: between two steps it is free."""
    filled(node)
    free: list[bool] = []

    def told(_: int) -> None:
        with node.locks.hold(VOLUME):
            free.append(True)

    reencrypt(node, watch=Watch(told))
    assert len(free) == SIZE // CHUNK + 2


def test_a_command_that_sleeps_does_not_go_on_with_the_keys_of_an_earlier_move(node: Node) -> None:
    content = filled(node)
    node.unstage()
    seen: list[int] = []

    def told(done: int) -> None:
        seen.append(done)
        if len(seen) == 2:  # the first command lies between two steps (--rate), a second one ends it, a third begins
            reencrypt(node)
            stop_after(node, 2)

    with pytest.raises(Aborted, match="than this command was at"):
        reencrypt(node, watch=Watch(told))
    if node.record().conversion is not None:
        reencrypt(node)
    node.stage(capability=BLOCK)
    assert digest_of(device_of(node)) == content


def test_kubelet_repeats_an_expansion_to_the_size_that_is_there(node: Node) -> None:
    filled(node)
    stop_after(node, 2)
    assert node.expand(SIZE) == SIZE


def test_a_discard_after_a_cut_copy_is_not_taken_for_an_older_record(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(node, {**CHEAP, "discard": "true"})
    stop_after(node, 1)

    def cut(*_: Any) -> None:
        raise CommandFailed("cut")

    with monkeypatch.context() as patch:
        patch.setattr(ConversionSteps, "_advanced", cut)  # as a kill between copy and record
        with pytest.raises(CommandFailed):
            reencrypt(node)
    subprocess.run(["blkdiscard", "-o", str(CHUNK), "-l", str(CHUNK), device_of(node)], check=True)
    content = digest_of(device_of(node))
    node.unstage()
    reencrypt(node)
    node.stage(capability=BLOCK)
    assert digest_of(device_of(node)) == content


def test_a_secret_with_its_previous_passphrase_stages_in_the_middle(node: Node) -> None:
    content = filled(node)
    stop_after(node, 2)
    node.unstage()
    changed = {"CRYPTO_KEY_VALUE": "the new one, long enough", "CRYPTO_KEY_VALUE_PREVIOUS": SECRET["CRYPTO_KEY_VALUE"]}
    node.stage(capability=BLOCK, secret=changed)
    assert digest_of(device_of(node)) == content


def test_an_error_after_the_mapping_went_on_takes_nothing_back(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """resume() is the ioctl and then the name in /dev/mapper: only the second fails here."""
    filled(node)
    stop_after(node, 1)
    real, calls = dmnodes.ensure_name, []

    def fails_once(name: str, number: int) -> None:
        calls.append(name)
        if len(calls) == 1:
            with open(f"/dev/dm-{os.minor(number)}", "r+b", buffering=0) as device:  # the pod, whose I/O flows
                os.pwrite(device.fileno(), b"P" * 4096, CHUNK)
                os.fsync(device.fileno())
            raise CommandFailed("the device node could not be made")
        real(name, number)

    with monkeypatch.context() as patch:
        patch.setattr(dmnodes, "ensure_name", fails_once)
        with pytest.raises(CommandFailed):
            reencrypt(node)
    done = node.record().conversion
    targets = node.open_mapping().targets
    node.unstage()
    node.stage(capability=BLOCK)
    with open(device_of(node), "rb", buffering=0) as device:
        assert os.pread(device.fileno(), 4096, CHUNK) == b"P" * 4096, f"lost; record {done}, live {targets}"


def test_a_damaged_header_can_be_put_back_in_the_middle(node: Node) -> None:
    content = filled(node)
    stop_after(node, 2)
    node.unstage()
    with node.disk().open("r+b") as file:
        file.write(bytes(32768))
    with pytest.raises(DriverError):
        reencrypt(node)
    recovery = Recovery(
        node.store, node.presences, node.workers, node.loops, GivenSources(), node.keys, node.homes, LIMITS
    )
    recovery.restore_header(VOLUME, loopfile(node).header_copy(VOLUME), read_secret(SECRET))
    reencrypt(node)
    node.stage(capability=BLOCK)
    assert digest_of(device_of(node)) == content


def test_the_guard_is_on_after_it_went_on(node: Node) -> None:
    filled(node)
    stop_after(node, 2)
    assert "a" in flags(next_file(node)), flags(next_file(node))
    assert "a" in flags(node.disk())
    node.mapper.suspend(f"luks-{VOLUME}")
    node.standing.look(lambda: False)
    assert not node.open_mapping().suspended
    assert "a" in flags(node.disk()), "disk"
    assert "a" in flags(next_file(node)), "next.img can be opened for writing by anybody"


def test_the_guard_is_on_after_an_error(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(node)
    stop_after(node, 2)

    def cut(*_: Any) -> None:
        raise CommandFailed("cut")

    with monkeypatch.context() as patch:
        patch.setattr(Mover, "copy", cut)
        with pytest.raises(CommandFailed):
            reencrypt(node)
    assert "a" in flags(next_file(node)), "next.img can be opened for writing by anybody"


@pytest.mark.parametrize(
    "more",
    [
        {"cipher": "aes-cbc-essiv:sha256", "keySize": "256"},
        {"sectorSize": "4096"},
        {"sectorSize": "4096", "cipher": "aes-cbc-essiv:sha256"},
        {"cipher": "aes-xts-plain", "keySize": "384"},
    ],
    ids=str,
)
def test_ciphers_and_sectors(node: Node, more: dict[str, str]) -> None:
    content = filled(node, {**CHEAP, **more})
    stop_after(node, 2)
    assert digest_of(device_of(node)) == content
    node.unstage()
    stop_after(node, 1)
    node.stage(capability=BLOCK)
    assert digest_of(device_of(node)) == content
    reencrypt(node)
    assert digest_of(device_of(node)) == content
    node.unstage()
    node.stage(capability=BLOCK)
    assert digest_of(device_of(node)) == content


def test_an_older_record_is_refused_by_a_stage_too(node: Node) -> None:
    content = filled(node)
    stop_after(node, 1)
    old = node.record_file().read_bytes()
    stop_after(node, 1)
    newest = node.record_file().read_bytes()
    node.record_file().write_bytes(old)
    os.removexattr(node.disk().parent, "trusted.luks-csi.revision")
    with open(device_of(node), "rb"):
        stage = node.stages.get(VOLUME)
        node.stages.remove(VOLUME)  # lost, as after a power cut or a read-only state directory
        try:
            node.stage(capability=BLOCK)
            said = "staged"
        except FailedPrecondition as error:
            said = str(error)
            assert stage is not None
            node.stages.put(VOLUME, stage)
        found = digest_of(f"/dev/mapper/luks-{VOLUME}")
    node.record_file().write_bytes(newest)
    assert found == content, f"{said}, and zeros of the old place are shown"


def test_recover_and_adopt_tell_of_the_other_half(node: Node) -> None:
    filled(node)
    node.unstage()
    stop_after(node, 2)
    key = read_secret(SECRET)
    with pytest.raises(FailedPrecondition, match=r"next\.img the other half"):
        recovery_of(node).open(node.disk(), "review", None, key, read_only=False)
    adoption = Adoption(node.store, node.workers, node.loops, node.slots, GivenSources(), node.rekeying, node.limits)
    for half in (node.disk(), next_file(node)):
        with pytest.raises(FailedPrecondition, match="the other half"):
            adoption.adopt(AdoptRequest("half", half, key))
    assert not node.store.has("half")


def recovery_of(node: Node) -> Recovery:
    return Recovery(node.store, node.presences, node.workers, node.loops, GivenSources(), node.keys, node.homes, LIMITS)


def test_no_plain_text_stays_after_a_cut(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut between `done` and the overwriting: the next run begins behind that chunk."""
    from csi_driver.luks.two_keys import Mover
    from csi_driver.model.errors import CommandFailed

    filled(node, PLAIN)
    node.unstage()

    def cut(*_: object) -> None:
        raise CommandFailed("cut")

    with node.disk().open("rb") as old:
        with monkeypatch.context() as patch:
            patch.setattr(Mover, "let_go", cut)
            with pytest.raises(CommandFailed):
                encrypt(node)
        encrypt(node)
        left = len(old.read().strip(b"\0"))
    assert left == 0, f"{left} bytes of plain text lie where the old file was"
