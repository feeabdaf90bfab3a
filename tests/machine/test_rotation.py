"""Keys that are changed by schedule and by CSI-Addons, on real dm-crypt."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from csi_driver.host.files import Files
from csi_driver.host.workers import Workers
from csi_driver.keys.base import Wrapping
from csi_driver.keys.ledger import KeyLedger
from csi_driver.keys.metadata import MetadataWrapper
from csi_driver.model.errors import Unavailable
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Settings
from csi_driver.model.volume import RekeyPhase
from csi_driver.rpc import addons_keyrotation_pb2 as keyrotation
from csi_driver.rpc.addons_keyrotation_pb2_grpc import EncryptionKeyRotationControllerStub
from csi_driver.rpc.client import CsiClient
from csi_driver.rpc.endpoint import address_of
from csi_driver.rpc.server import driver_server
from csi_driver.volumes.driver import Driver, Host, build_driver
from csi_driver.volumes.keys import VolumeKeys
from csi_driver.volumes.keyslots import KeySlots
from csi_driver.volumes.rotation import KeyRotation
from tests.keys.given import GivenSources
from tests.machine.keeping import KeepingKms
from tests.machine.node import EXT4, MIB, SECRET, SIZE, VOLUME, Node

NONE: dict[str, str] = {}
SCHEDULED = {"encrypted": "true", "encryptionKMSID": "kms", "keyRotationPeriod": "1h"}
OTHER = "pvc-2"
SECONDS = 60.0


class Lab:
    """A node whose volumes have a KMS and the shortest period, and who looks at their keys."""

    def __init__(self, folder: Path, workers: Workers, make_slots: Callable[..., KeySlots] = KeySlots) -> None:
        self.kms = KeepingKms()
        keys = VolumeKeys(GivenSources(kms=self.kms), KeyLedger(folder / "state", Files()))
        self.node = Node(folder, workers, make_slots=make_slots, given_keys=keys)
        self.restart()

    def restart(self) -> None:
        """The rotation of another process on the same records."""
        self.rotation = KeyRotation(self.node.store, self.node.locks, self.node.rekeying, self._healthy)

    @staticmethod
    def _healthy() -> None:
        """The state directory is the one that it was."""

    def create(self, *volumes: str) -> None:
        """Make volumes with a file each, the first of which is left staged."""
        for volume in volumes:
            self.node.create(volume, parameters=SCHEDULED, secret=NONE)
            self.node.stage(volume, secret=NONE)
            self.node.write(volume=volume)
            if volume != volumes[0]:
                self.node.unstage(volume)

    def age(self, hours: float) -> None:
        """Let the first keys of all volumes be that old."""
        made = (datetime.now(UTC) - timedelta(hours=hours)).isoformat(timespec="seconds")
        for volume in self.node.store.ids():
            self.node.store.update(msgspec.structs.replace(self.node.record(volume), created=made))

    def name(self, volume: str = VOLUME) -> str:
        """The name of the key that counts."""
        trail = self.node.record(volume).key
        assert trail is not None
        return trail.name

    def check(self, volume: str = VOLUME) -> None:
        """The volume opens with its recorded key and with no other, and holds its data."""
        record = self.node.record(volume)
        assert record.rekey is None
        assert record.key_since is not None
        assert len(self.node.header(volume).keyslots) == 1
        assert [name for name in self.kms.kept if name.startswith(volume)] == [self.name(volume)]
        assert self.node.read(volume) == "precious"
        self.node.unstage(volume)
        assert self.node.closed(volume)
        self.node.stage(volume, secret=NONE)
        assert self.node.read(volume) == "precious"
        self.node.unstage(volume)


def test_a_look_changes_the_keys_of_staged_and_of_closed_volumes(folder: Path, workers: Workers) -> None:
    lab = Lab(folder, workers)
    lab.create(VOLUME, OTHER)
    before = [lab.name(VOLUME), lab.name(OTHER)]
    lab.age(0.5)
    lab.rotation.look(lambda: False)
    assert [lab.name(VOLUME), lab.name(OTHER)] == before
    lab.age(1)
    lab.rotation.look(lambda: False)
    changed = [lab.name(VOLUME), lab.name(OTHER)]
    assert not set(changed) & set(before)
    assert (lab.rotation.failed(), lab.rotation.overdue()) == (0, 0)
    assert not lab.node.loops_of(OTHER)
    lab.rotation.look(lambda: False)  # the new ones count from now
    assert [lab.name(VOLUME), lab.name(OTHER)] == changed
    lab.node.stage(OTHER, secret=NONE)
    lab.check(VOLUME)
    lab.check(OTHER)


def test_a_kms_that_is_down_is_asked_again_at_the_next_look(folder: Path, workers: Workers) -> None:
    lab = Lab(folder, workers)
    lab.create(VOLUME)
    before = lab.name()
    lab.kms.down = Unavailable("KMS kms cannot be reached")
    lab.age(1)
    lab.rotation.look(lambda: False)
    assert (lab.name(), lab.rotation.failed(), lab.rotation.overdue()) == (before, 1, 1)
    lab.kms.down = None
    lab.rotation.look(lambda: False)
    assert lab.name() != before
    assert (lab.rotation.failed(), lab.rotation.overdue()) == (1, 0)
    lab.check()


class Cut(KeySlots):
    """Is cut in the step `at`, once, behind what that step does to the header or before it."""

    at: str | None = None
    behind = False

    def add_passphrase(self, *args: Any) -> Any:
        return self._cut("add_passphrase", *args)

    def remove_passphrase(self, *args: Any) -> Any:
        return self._cut("remove_passphrase", *args)

    def _cut(self, step: str, *args: Any) -> Any:
        does: Callable[..., Any] = getattr(super(), step)
        if self.at != step:
            return does(*args)
        self.at = None
        if self.behind:
            does(*args)
        raise Unavailable("cut")


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize(
    ("step", "phase"), [("add_passphrase", RekeyPhase.ADDING), ("remove_passphrase", RekeyPhase.REMOVING)]
)
@pytest.mark.parametrize("staged", [True, False], ids=["staged", "closed"])
def test_a_rotation_that_was_cut_is_ended_by_the_next_look(
    folder: Path, workers: Workers, step: str, phase: RekeyPhase, *, behind: bool, staged: bool
) -> None:
    made: list[Cut] = []

    def make(*args: Any) -> Cut:
        made.append(Cut(*args))
        return made[-1]

    lab = Lab(folder, workers, make)
    lab.create(VOLUME)
    if not staged:
        lab.node.unstage()
    before = lab.name()
    made[0].at, made[0].behind = step, behind
    lab.age(1)
    lab.rotation.look(lambda: False)
    rekey = lab.node.record().rekey
    assert rekey is not None
    assert rekey.phase is phase
    lab.restart()
    lab.rotation.look(lambda: False)  # it ends the one, and begins no other
    (kept,) = lab.kms.kept
    assert lab.name() == kept != before
    if not staged:
        lab.node.stage(secret=NONE)
    lab.check()


# CSI-Addons


def test_a_new_key_by_csi_addons(folder: Path) -> None:
    """The whole server: a volume with a key of a KMS in use, and one that opens with a secret's passphrase."""
    kms = KeepingKms()
    wrapped = Wrapping(MetadataWrapper("KMS wrapped", lambda: Passphrase(b"a passphrase of the class")))
    settings = Settings(
        endpoint=folder / "run/csi.sock",
        addons_endpoint=folder / "run/addons.sock",
        node_id="node-1",
        state_dir=folder / "state",
        free_space_floor=64 * MIB,
    )
    driver = build_driver(settings, Host(sources=GivenSources(kms=kms, wrapped=wrapped)))
    driver.start()
    server = driver_server(driver)
    server.start()
    assert settings.addons_endpoint is not None
    try:
        with (
            CsiClient(settings.endpoint, timeout=SECONDS) as client,
            grpc.insecure_channel(address_of(settings.addons_endpoint)) as channel,
        ):
            for kms_id in ("kms", "wrapped"):
                _changes_the_key_of_a_kms(client, channel, folder / "stage", kms_id)
                assert not driver.backend.ids()
            assert kms.kept == {}
            _changes_a_passphrase(driver, client, channel, folder / "stage")
    finally:
        server.stop()
        driver.stop()


def _ask(channel: grpc.Channel, volume: str, secrets: Mapping[str, str] = NONE) -> None:
    request = keyrotation.EncryptionKeyRotateRequest(volume_id=volume, secrets=secrets)
    EncryptionKeyRotationControllerStub(channel).EncryptionKeyRotate(request, timeout=SECONDS)


def _changes_the_key_of_a_kms(client: CsiClient, channel: grpc.Channel, stage: Path, kms_id: str) -> None:
    stage.mkdir(exist_ok=True)
    volume = client.create_volume("v", [EXT4], SIZE, parameters={"encrypted": "true", "encryptionKMSID": kms_id})
    client.stage(volume, stage, EXT4)
    (stage / "file").write_text("precious")
    _ask(channel, "v")
    _ask(channel, "v", SECRET)  # what the class names as node-stage secret does not matter
    assert (stage / "file").read_text() == "precious"
    client.unstage("v", stage)
    client.stage(volume, stage, EXT4)
    assert (stage / "file").read_text() == "precious"
    client.unstage("v", stage)
    client.delete_volume("v")


def _changes_a_passphrase(driver: Driver, client: CsiClient, channel: grpc.Channel, stage: Path) -> None:
    fast = {"encrypted": "true", "pbkdf": "pbkdf2", "pbkdfIterations": "1000"}
    volume = client.create_volume("v", [EXT4], SIZE, parameters=fast, secrets=SECRET)
    client.stage(volume, stage, EXT4, SECRET)
    with pytest.raises(grpc.RpcError) as raised:
        _ask(channel, "v", SECRET)
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "put the new passphrase into its entry CRYPTO_KEY_VALUE" in (raised.value.details() or "")
    assert driver.backend.get("v").key_since is None
    both = {"CRYPTO_KEY_VALUE": "another passphrase", "CRYPTO_KEY_VALUE_PREVIOUS": SECRET["CRYPTO_KEY_VALUE"]}
    _ask(channel, "v", both)
    since = driver.backend.get("v").key_since
    assert since is not None
    _ask(channel, "v", both)  # a job that did not hear the answer repeats it
    assert driver.backend.get("v").key_since == since
    client.unstage("v", stage)
    client.stage(volume, stage, EXT4, {"CRYPTO_KEY_VALUE": "another passphrase"})
    client.unstage("v", stage)
    client.delete_volume("v")
