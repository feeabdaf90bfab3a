"""Volumes with keys of their own on real dm-crypt: their life, other keys while in use, what a KMS's failure leaves."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from kmip.core import enums

from csi_driver.host.blockdev import size_bytes
from csi_driver.host.files import Files
from csi_driver.host.keyring import unlink_from_user
from csi_driver.host.loop import LoopDevices
from csi_driver.host.workers import Workers
from csi_driver.keys.aws import Account, AwsWrapper
from csi_driver.keys.azure import Account as AzureAccount
from csi_driver.keys.azure import KeyVault
from csi_driver.keys.base import Announce, EntryReader, KeySource, Wrapped, Wrapping, nobody
from csi_driver.keys.exec import ExecWrapper
from csi_driver.keys.gcp import Account as GoogleAccount
from csi_driver.keys.gcp import CloudKms
from csi_driver.keys.http import Tls
from csi_driver.keys.ibm import Instance, KeyProtect
from csi_driver.keys.kmip import KmipWrapper, server_of
from csi_driver.keys.ledger import KeyLedger
from csi_driver.keys.metadata import MetadataWrapper
from csi_driver.keys.plugin import PluginWrapper
from csi_driver.keys.secret import read_secret
from csi_driver.keys.vault import Login, Vault
from csi_driver.keys.vault_kv import VaultKv
from csi_driver.keys.vault_transit import VaultTransit
from csi_driver.luks import key_token
from csi_driver.luks.device import Opening, read_header, volume_key_name
from csi_driver.luks.header import Header
from csi_driver.luks.header_rules import Limits as HeaderLimits
from csi_driver.luks.recovery import open_with_header
from csi_driver.luks.rekey import Added
from csi_driver.model.errors import (
    AlreadyExists,
    DeviceInUse,
    FailedPrecondition,
    ForeignSignature,
    KeyLost,
    Unauthenticated,
    Unavailable,
)
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Limits
from csi_driver.model.volume import EncryptionState, KeyTrail, NamedSlot, Rekey, RekeyPhase
from csi_driver.volumes import rekey
from csi_driver.volumes.adoption import Adoption, AdoptRequest
from csi_driver.volumes.conversion import Watch
from csi_driver.volumes.keys import VolumeKeys, shares_key
from csi_driver.volumes.keyslots import KeySlots
from csi_driver.volumes.recovery import Recovery
from tests import volume_images
from tests.cluster.pki import Authority
from tests.keys import clouds, servers, softhsm
from tests.keys.given import GivenSources
from tests.machine.keeping import KeepingKms
from tests.machine.node import BLANK, CHEAP, MIB, SECRET, SIZE, VOLUME, Node, fingerprint
from tests.volume_images import BOOT_FILE, GREETING, encrypted_image, make_file_system, put_image

NONE: dict[str, str] = {}
OF_KMS = {"encrypted": "true", "encryptionKMSID": "kms"}
OTHER = {"CRYPTO_KEY_VALUE": "another passphrase"}


def with_keys(folder: Path, workers: Workers, sources: GivenSources) -> Node:
    return Node(folder, workers, given_keys=keys_of(folder, sources))


def used_once(node: Node) -> None:
    """A volume of the KMS that was staged, written and unstaged."""
    node.create(parameters=OF_KMS, secret=NONE)
    node.stage(secret=NONE)
    node.write()
    node.unstage()


def keys_of(folder: Path, sources: GivenSources) -> VolumeKeys:
    return VolumeKeys(sources, KeyLedger(folder / "state", Files()))


def rotate(node: Node, secret: Mapping[str, str] = NONE, new: Mapping[str, str] = NONE) -> bool:
    with node.locks.hold(VOLUME):
        return node.rekeying.rotate(VOLUME, read_secret(secret), read_secret(new).passphrase).changed


def rewrap(node: Node) -> bool:
    with node.locks.hold(VOLUME):
        return node.rekeying.rewrap(VOLUME, read_secret({})).changed


def trail_of(node: Node) -> KeyTrail:
    found = node.record().key
    assert found is not None
    return found


def token_of(node: Node) -> KeyTrail | None:
    area, header = read_header("the test's volume", str(node.disk()))
    return key_token.read(area, header)


def header_copy(node: Node) -> Header:
    return read_header("the copy", str(node.disk().with_name("header.luks2")))[1]


def opens(path: Path, passphrase: Passphrase, header: Path | None = None) -> bool:
    """Whether the real cryptsetup opens it."""
    argv = ["cryptsetup", "open", "--test-passphrase", "--key-file", "-", str(path)]
    argv += ["--header", str(header)] if header else []
    done = subprocess.run(argv, input=passphrase.reveal(), check=False, capture_output=True, timeout=60)
    return done.returncode == 0


# --- servers, one of each kind for the whole module -------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], KeySource]]:
    """Makes a source of a kind; its server starts with the first one."""
    folder = tmp_path_factory.mktemp("kms")
    with ExitStack() as stack:
        made: dict[str, KeySource] = {}

        def source(kind: str) -> KeySource:
            if kind not in made:
                made[kind] = MAKERS[kind](folder, stack)
                stack.callback(made[kind].close)
            return made[kind]

        yield source


def _vault(folder: Path, stack: ExitStack) -> tuple[Vault, EntryReader, servers.Vault]:
    server = stack.enter_context(servers.vault(folder))
    reader = EntryReader("KMS kms (vault)", {"vaultAddress": server.address, "vaultTransitKey": "csi"})
    return Vault(reader, Tls(), Login(server.root)), reader, server


def _kv(folder: Path, stack: ExitStack) -> KeySource:
    vault, reader, server = _vault(folder, stack)
    server.ask("POST", "sys/mounts/secret", {"type": "kv", "options": {"version": "2"}})
    return VaultKv(vault, reader, "secret", "csi")


def _transit(folder: Path, stack: ExitStack) -> KeySource:
    vault, reader, server = _vault(folder, stack)
    server.ask("POST", "sys/mounts/transit", {"type": "transit"})
    server.ask("POST", "transit/keys/csi", {"derived": True})
    return Wrapping(VaultTransit(vault, reader))


def _aws(folder: Path, stack: ExitStack) -> KeySource:
    return _aws_at(stack.enter_context(servers.aws(folder)))


def _local_kms(folder: Path, stack: ExitStack) -> KeySource:
    return _aws_at(stack.enter_context(servers.local_kms(folder)))


def _aws_at(address: str, key: str = "") -> KeySource:
    account = Account(servers.REGION, key or servers.aws_key(address), servers.AWS_CREDENTIALS, address)
    return Wrapping(AwsWrapper("KMS kms (aws-metadata)", lambda: account))


def _trusted(folder: Path, stack: ExitStack) -> Authority:
    """An authority that whoever asks by requests trusts."""
    authority = Authority(folder / f"pki-{os.urandom(4).hex()}")
    stack.enter_context(pytest.MonkeyPatch.context()).setenv("REQUESTS_CA_BUNDLE", authority.certificate)
    return authority


def _azure(folder: Path, stack: ExitStack) -> KeySource:
    cloud = stack.enter_context(clouds.serving(clouds.AzureKeyVault(), _trusted(folder, stack)))
    account = AzureAccount(cloud.address, cloud.tenant, cloud.application, cloud.certificate, cloud.address)
    return KeyVault("KMS kms (azure-kv)", lambda: account)


def _ibm(folder: Path, stack: ExitStack) -> KeySource:
    cloud = stack.enter_context(clouds.serving(clouds.IbmKeyProtect(), _trusted(folder, stack)))
    instance = Instance(cloud.address, cloud.address, cloud.instance, cloud.root_key(), cloud.api_key)
    return Wrapping(KeyProtect("KMS kms (ibmkeyprotect)", lambda: instance))


def _google(folder: Path, stack: ExitStack) -> KeySource:
    authority = _trusted(folder, stack)
    cloud = stack.enter_context(clouds.google(authority))
    found = Path(authority.certificate).read_text()
    account = GoogleAccount(cloud.new_key(), cloud.credentials, cloud.endpoint, found)
    return Wrapping(CloudKms("KMS kms (gcp-kms)", lambda: account))


def _kmip(folder: Path, stack: ExitStack) -> KeySource:
    server = stack.enter_context(servers.kmip(folder, Authority(folder / "pki")))
    reader = EntryReader("KMS kms (kmip)", {"KMIP_ENDPOINT": server.endpoint})
    with servers.kmip_client(server) as client:
        uses = [enums.CryptographicUsageMask.ENCRYPT, enums.CryptographicUsageMask.DECRYPT]
        key = client.create(enums.CryptographicAlgorithm.AES, 256, cryptographic_usage_mask=uses)
        client.activate(key)
    found = server_of(reader, server.entries | {"UNIQUE_IDENTIFIER": str(key)}, "secret")
    return Wrapping(KmipWrapper(reader.where, lambda: found))


def _plugin(folder: Path, stack: ExitStack) -> KeySource:
    _, endpoint = stack.enter_context(servers.plugin(folder))
    return Wrapping(PluginWrapper(EntryReader("KMS kms (kms-plugin)", {"endpoint": endpoint})))


def _pkcs11(folder: Path, stack: ExitStack) -> KeySource:
    token = softhsm.soft_hsm(folder / "hsm", folder)
    workers = Workers(("csi_driver.keys.exec",))
    workers.start()
    stack.callback(workers.stop)
    return Wrapping(ExecWrapper(EntryReader("KMS kms (exec)", token.entry), workers, folder))


def _metadata(_folder: Path, _stack: ExitStack) -> KeySource:
    return Wrapping(MetadataWrapper("KMS kms (metadata)", lambda: Passphrase(b"a passphrase of the class")))


MAKERS = {
    "metadata": _metadata,
    "vault": _kv,
    "vaulttransit": _transit,
    "aws-metadata": _aws,
    "aws-metadata of local-kms": _local_kms,
    "azure-kv": _azure,
    "ibmkeyprotect": _ibm,
    "gcp-kms": _google,
    "kmip": _kmip,
    "kms-plugin": _plugin,
    "exec with a PKCS#11 token": _pkcs11,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_life_of_a_volume_with_a_key_of_its_own(
    kind: str, running: Callable[[str], KeySource], folder: Path, workers: Workers
) -> None:
    source = running(kind)
    sources = GivenSources(kms=source)
    node = with_keys(folder, workers, sources)
    node.create(parameters=OF_KMS, secret=NONE)
    made = trail_of(node)
    assert node.encryption_state() is EncryptionState.PREPARED
    assert fingerprint(node.disk()) == BLANK
    node.stage(secret=NONE)
    node.write()
    (slot,) = node.header().keyslots.values()
    assert getattr(slot.kdf, "iterations", 0) == 1000
    assert token_of(node) == made
    assert opens(node.disk(), source.fetch(made))

    node = with_keys(folder, workers, sources)  # the driver after a restart
    node.stage(secret=NONE)
    node.expand(2 * SIZE)
    assert size_bytes(f"/dev/mapper/luks-{VOLUME}") == 2 * SIZE
    assert rotate(node)
    changed = trail_of(node)
    assert changed.name != made.name
    assert len(node.header().keyslots) == 1
    assert node.read() == "precious"
    rewrap(node)
    assert trail_of(node).name == changed.name
    assert token_of(node) == trail_of(node)
    assert source.fetch(trail_of(node)) == source.fetch(changed)
    node.unstage()
    assert node.closed()

    node.stage(secret=NONE)
    assert node.read() == "precious"
    node.unstage()
    assert opens(node.disk(), source.fetch(trail_of(node)), node.disk().with_name("header.luks2"))
    last = trail_of(node)
    node.delete()
    if not last.wrapped:
        for trail in (made, last):
            with pytest.raises(KeyLost):
                source.fetch(trail)


# --- a KMS that fails -------------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[tuple[servers.Plugin, GivenSources]]:
    with servers.plugin(tmp_path) as (servicer, endpoint):
        sources = GivenSources(kms=Wrapping(PluginWrapper(EntryReader("KMS kms", {"endpoint": endpoint}))))
        yield servicer, sources
        sources.given["kms"].close()


def test_a_kms_that_is_down_leaves_nothing_made_and_nothing_formatted(
    plugin: tuple[servers.Plugin, GivenSources], folder: Path, workers: Workers
) -> None:
    kms, sources = plugin
    node = with_keys(folder, workers, sources)
    kms.fail = grpc.StatusCode.UNAVAILABLE
    with pytest.raises(Unavailable, match="KMS kms at unix"):
        node.create(parameters=OF_KMS, secret=NONE)
    assert not node.disk().exists()
    kms.fail = None
    node.create(parameters=OF_KMS, secret=NONE)
    kms.fail = grpc.StatusCode.UNAVAILABLE
    with pytest.raises(Unavailable, match="KMS kms at unix"):
        node.stage(secret=NONE)
    assert node.encryption_state() is EncryptionState.PREPARED
    assert fingerprint(node.disk()) == BLANK
    assert node.closed()


def test_open_volumes_go_on_while_their_kms_is_down(
    plugin: tuple[servers.Plugin, GivenSources], folder: Path, workers: Workers
) -> None:
    kms, sources = plugin
    node = with_keys(folder, workers, sources)
    node.create(parameters=OF_KMS, secret=NONE)
    node.stage(secret=NONE)
    kms.fail = grpc.StatusCode.UNAVAILABLE
    node.stage(secret=NONE)  # kubelet repeats it
    node.publish()
    node.expand(2 * SIZE)
    node.unpublish()
    node.unstage()
    with pytest.raises(Unavailable):
        node.stage(secret=NONE)
    node.delete()
    assert not node.disk().exists()


def test_an_expansion_asks_the_kms_where_the_kernel_has_lost_the_key(
    plugin: tuple[servers.Plugin, GivenSources], folder: Path, workers: Workers
) -> None:
    _, sources = plugin
    node = with_keys(folder, workers, sources)
    node.create(parameters=OF_KMS, secret=NONE)
    node.stage(secret=NONE)
    luks = node.record().luks
    assert luks is not None
    assert unlink_from_user(volume_key_name(luks.uuid))
    node.expand(2 * SIZE)
    assert size_bytes(f"/dev/mapper/luks-{VOLUME}") == 2 * SIZE
    node.unstage()


def test_a_key_that_is_gone_is_told_and_the_data_stays(
    plugin: tuple[servers.Plugin, GivenSources], folder: Path, workers: Workers
) -> None:
    kms, sources = plugin
    node = with_keys(folder, workers, sources)
    used_once(node)
    kept, before = kms.keys.pop("key-1"), fingerprint(node.disk())
    with pytest.raises(KeyLost, match="has the key no more"):
        node.stage(secret=NONE)
    assert fingerprint(node.disk()) == before
    kms.keys["key-1"] = kept
    node.stage(secret=NONE)
    assert node.read() == "precious"
    node.unstage()


@pytest.mark.parametrize(
    ("take_away", "give_back", "said"),
    [
        (servers.disable, servers.enable, "DisabledException"),
        (servers.begin_deletion, servers.cancel_deletion, "KMSInvalidStateException"),
    ],
    ids=["disabled", "about to be deleted"],
)
def test_a_key_of_aws_that_may_not_be_used_makes_no_volume_and_formats_nothing(
    take_away: Callable[[Any, str], None],
    give_back: Callable[[Any, str], None],
    said: str,
    folder: Path,
    workers: Workers,
    tmp_path: Path,
) -> None:
    words = rf"the key of KMS kms \(aws-metadata\) cannot be used \({said}\); enable it, or restore it"
    with servers.local_kms(tmp_path) as address, servers.aws_client(address) as client:
        key = servers.aws_key(address)
        source = _aws_at(address, key)
        node = with_keys(folder, workers, GivenSources(kms=source))
        take_away(client, key)
        with pytest.raises(KeyLost, match=words):
            node.create(parameters=OF_KMS, secret=NONE)
        assert not node.disk().exists()
        give_back(client, key)
        node.create(parameters=OF_KMS, secret=NONE)
        take_away(client, key)
        with pytest.raises(KeyLost, match=words):
            node.stage(secret=NONE)
        assert node.encryption_state() is EncryptionState.PREPARED
        assert fingerprint(node.disk()) == BLANK
        assert node.closed()
        give_back(client, key)
        node.stage(secret=NONE)
        node.write()
        before = trail_of(node)
        take_away(client, key)
        for change in (rotate, rewrap):
            with pytest.raises(KeyLost, match=words):
                change(node)
        assert trail_of(node) == before
        assert node.read() == "precious"
        node.unstage()
        node.delete()  # which asks no KMS that keeps nothing
        source.close()


# --- another passphrase -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staged", [True, False])
def test_a_passphrase_is_changed_in_use_and_closed(used: Node, *, staged: bool) -> None:
    if staged:
        used.stage()
    assert rotate(used, SECRET, OTHER)
    assert not rotate(used, SECRET, OTHER)  # repeating is fine
    assert len(used.header().keyslots) == 1
    assert header_copy(used).seqid == used.header().seqid
    if staged:
        assert used.read() == "precious"
        used.unstage()
    with pytest.raises(Unauthenticated):
        used.stage()
    used.stage(secret=OTHER)
    assert used.read() == "precious"
    used.unstage()


def test_a_wrong_old_passphrase_changes_nothing(used: Node) -> None:
    before = fingerprint(used.disk())
    with pytest.raises(Unauthenticated):
        rotate(used, {"CRYPTO_KEY_VALUE": "wrong"}, OTHER)
    assert fingerprint(used.disk()) == before
    assert used.record().rekey is None


def test_the_same_passphrase_again_is_refused(used: Node) -> None:
    with pytest.raises(FailedPrecondition, match="is the one that it has"):
        rotate(used, SECRET, SECRET)
    used.stage()
    used.unstage()


def test_a_secret_with_the_previous_passphrase_changes_it_at_the_next_stage(used: Node) -> None:
    both = {**OTHER, "CRYPTO_KEY_VALUE_PREVIOUS": SECRET["CRYPTO_KEY_VALUE"]}
    used.stage(secret=both)
    assert used.read() == "precious"
    assert used.record().rekey is None
    assert len(used.header().keyslots) == 1
    used.unstage()
    used.stage(secret=both)  # the old one may stay in the secret
    used.unstage()
    with pytest.raises(Unauthenticated):
        used.stage()


@pytest.mark.parametrize("hindered", ["before", "announced", "written"])
def test_the_previous_passphrase_opens_what_cannot_be_changed_now(
    used: Node, hindered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {**OTHER, "CRYPTO_KEY_VALUE_PREVIOUS": SECRET["CRYPTO_KEY_VALUE"]}
    add: Callable[..., Added] = KeySlots.add_passphrase

    def refused(*_: object) -> None:
        raise DeviceInUse("two nodes have it")

    def cut_when_announced(*arguments: Any) -> None:
        def announce(added: Added) -> None:
            arguments[-1](added)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        add(*arguments[:-1], announce)

    def cut_when_written(*arguments: Any) -> None:
        add(*arguments)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        if hindered == "before":
            patch.setattr(rekey, "refuse_many_nodes", refused)
        else:
            cut = cut_when_announced if hindered == "announced" else cut_when_written
            patch.setattr(KeySlots, "add_passphrase", cut)
        used.stage(secret=both)
    assert used.read() == "precious"
    used.unstage()
    assert opens(used.disk(), Passphrase(SECRET["CRYPTO_KEY_VALUE"].encode()))
    assert opens(used.disk(), Passphrase(OTHER["CRYPTO_KEY_VALUE"].encode())) is (hindered == "written")
    used.stage(secret=both)  # and nothing hinders it any longer
    used.unstage()
    assert used.record().rekey is None
    assert len(used.header().keyslots) == 1
    used.stage(secret=OTHER)
    used.unstage()


def test_a_previous_passphrase_that_opens_nothing_is_no_help(used: Node) -> None:
    with pytest.raises(Unauthenticated, match=r"; its CRYPTO_KEY_VALUE_PREVIOUS was tried too and opens none either$"):
        used.stage(secret={**OTHER, "CRYPTO_KEY_VALUE_PREVIOUS": "wrong too"})
    assert used.closed()
    used.stage()
    used.unstage()


def test_key_slots_that_somebody_else_made_stay(used: Node) -> None:
    _add_slot(used, b"an administrator's")
    assert rotate(used, SECRET, OTHER)
    assert len(used.header().keyslots) == 2
    assert opens(used.disk(), Passphrase(b"an administrator's"))
    assert opens(used.disk(), Passphrase(OTHER["CRYPTO_KEY_VALUE"].encode()))
    assert not opens(used.disk(), Passphrase(SECRET["CRYPTO_KEY_VALUE"].encode()))


def test_what_an_old_key_slot_left_is_overwritten(used: Node) -> None:
    (slot,) = used.header().keyslots.values()
    with used.disk().open("rb") as disk:
        before = os.pread(disk.fileno(), slot.area.size, slot.area.offset)
    old_header = used.disk().with_name("old-header")
    old_header.write_bytes(used.disk().with_name("header.luks2").read_bytes())
    rotate(used, SECRET, OTHER)
    with used.disk().open("rb") as disk:
        assert os.pread(disk.fileno(), slot.area.size, slot.area.offset) != before
    old_header.unlink()


def slot_of(node: Node, number: int = 0) -> NamedSlot:
    return NamedSlot(number=number, salt=node.header().keyslots[str(number)].kdf.salt.hex())


def cut(node: Node, phase: RekeyPhase, *slots: NamedSlot) -> None:
    """Let the record say that a change was cut there."""
    node.store.update(msgspec.structs.replace(node.record(), rekey=Rekey(phase=phase, slots=slots)))


def test_a_record_that_names_the_slot_that_counts_takes_none(used: Node) -> None:
    """A slot that is not the old passphrase's is never removed: the proof is what the new one opens."""
    cut(used, RekeyPhase.REMOVING, slot_of(used))
    used.stage()  # with the passphrase that opens the slot that is to go
    assert used.read() == "precious"
    assert len(used.header().keyslots) == 1
    used.unstage()


def test_a_number_that_somebody_elses_key_slot_has_got_is_not_removed(used: Node) -> None:
    """A change cut behind the removal; then an administrator's key slot gets the number that has become free."""
    old = slot_of(used)
    assert rotate(used, SECRET, OTHER)
    cut(used, RekeyPhase.REMOVING, old)
    _add_slot(used, b"an administrator's", OTHER)
    assert slot_of(used).salt != old.salt
    used.stage(secret=OTHER)
    used.unstage()
    assert used.record().rekey is None
    assert opens(used.disk(), Passphrase(b"an administrator's"))


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("third", [{"CRYPTO_KEY_VALUE": "a third one"}, SECRET])
def test_a_secret_that_is_changed_once_more_behind_a_cut_ends_at_what_it_says(
    used: Node, third: Mapping[str, str], *, removed: bool
) -> None:
    old = slot_of(used)
    if removed:
        assert rotate(used, SECRET, OTHER)
    else:
        _add_slot(used, OTHER["CRYPTO_KEY_VALUE"].encode())
    cut(used, RekeyPhase.REMOVING, old)
    used.stage(secret={**third, "CRYPTO_KEY_VALUE_PREVIOUS": OTHER["CRYPTO_KEY_VALUE"]})
    assert used.read() == "precious"
    used.unstage()
    assert used.record().rekey is None
    assert len(used.header().keyslots) == 1
    used.stage(secret=third)
    used.unstage()


SECOND, THIRD = OTHER, {"CRYPTO_KEY_VALUE": "a third one"}


class Killed(BaseException):
    """The process ends here."""


class CutSlots(KeySlots):
    """Is killed in the middle of adding a key slot: before it is in the header, or behind that."""

    at: str | None = None

    def add_passphrase(self, *args: Any) -> Added:
        *others, announce = args

        def killed(added: Added) -> None:
            announce(added)
            if self.at == "before":
                raise Killed

        add: Callable[..., Added] = super().add_passphrase
        made = add(*others, killed)
        if self.at is not None:
            raise Killed
        return made


def cut_in_adding(folder: Path, workers: Workers, at: str, **options: Any) -> Node:
    """A used volume whose change of its key was killed `at` that moment, and the driver after a restart."""
    node = Node(folder, workers, make_slots=CutSlots, **options)
    assert isinstance(node.slots, CutSlots)
    given = options.get("given_keys")
    node.create(parameters=OF_KMS if given else CHEAP, secret=NONE if given else SECRET)
    node.stage(secret=NONE if given else SECRET)
    node.write()
    node.unstage()
    node.slots.at = at
    with suppress(Killed):
        rotate(node, NONE if given else SECRET, NONE if given else SECOND)
    rekey = node.record().rekey
    assert rekey is not None
    assert (rekey.phase, len(rekey.slots)) == (RekeyPhase.ADDING, 2)
    return Node(folder, workers, **options)


@pytest.mark.parametrize("others", [True, False], ids=["beside an administrator's", "alone"])
@pytest.mark.parametrize(
    ("at", "secret", "counts"),
    [
        ("behind", {**THIRD, "CRYPTO_KEY_VALUE_PREVIOUS": SECRET["CRYPTO_KEY_VALUE"]}, THIRD),
        ("behind", {**THIRD, "CRYPTO_KEY_VALUE_PREVIOUS": SECOND["CRYPTO_KEY_VALUE"]}, THIRD),
        ("behind", SECRET, SECRET),
        ("behind", SECOND, SECOND),
        ("before", {**THIRD, "CRYPTO_KEY_VALUE_PREVIOUS": SECRET["CRYPTO_KEY_VALUE"]}, THIRD),
        ("before", {**SECOND, "CRYPTO_KEY_VALUE_PREVIOUS": SECRET["CRYPTO_KEY_VALUE"]}, SECOND),
        ("before", SECRET, SECRET),
    ],
    ids=["third of first", "third of second", "first", "second", "third", "as it was meant", "taken back"],
)
def test_whatever_the_secret_says_behind_a_cut_one_key_slot_of_ours_is_left(
    folder: Path, workers: Workers, at: str, secret: Mapping[str, str], counts: Mapping[str, str], *, others: bool
) -> None:
    node = cut_in_adding(folder, workers, at)
    if others:
        _add_slot(node, b"an administrator's")
    node.stage(secret=secret)
    assert node.read() == "precious"
    node.unstage()
    assert node.record().rekey is None
    assert len(node.header().keyslots) == 1 + others
    assert opens(node.disk(), Passphrase(counts["CRYPTO_KEY_VALUE"].encode()))
    assert opens(node.disk(), Passphrase(b"an administrator's")) is others


def test_a_cut_change_that_no_secret_in_hand_ends_stays_in_the_record(folder: Path, workers: Workers) -> None:
    node = cut_in_adding(folder, workers, "before")
    _add_slot(node, b"an administrator's")
    begun = node.record().rekey
    node.stage(secret={"CRYPTO_KEY_VALUE": "an administrator's"})  # which is no key slot of ours, and takes none away
    assert node.read() == "precious"
    node.unstage()
    with pytest.raises(Unauthenticated):
        node.stage(secret={**THIRD, "CRYPTO_KEY_VALUE_PREVIOUS": "wrong"})
    assert node.record().rekey == begun
    node.stage()
    node.unstage()
    assert node.record().rekey is None
    assert len(node.header().keyslots) == 2


class Forgetful(MetadataWrapper):
    """Unwraps no key whose name is in `lost`."""

    lost: tuple[str, ...] = ()

    def unwrap(self, trail: KeyTrail) -> Passphrase:
        if trail.name in self.lost:
            raise KeyLost(f"the key {trail.name} is gone")
        return super().unwrap(trail)


def test_a_kms_that_gives_another_key_each_time_takes_no_volume_along(folder: Path, workers: Workers) -> None:
    class Fickle(KeepingKms):
        """Mixes up keys, but that of the volume."""

        def fetch(self, trail: KeyTrail) -> Passphrase:
            found = super().fetch(trail)
            return found if trail.name == self.kept_name else Passphrase.random()

        kept_name = ""

    kms = Fickle()
    node = with_keys(folder, workers, GivenSources(kms=kms))
    node.create(parameters=OF_KMS, secret=NONE)
    before = trail_of(node)
    kms.kept_name = before.name
    node.stage(secret=NONE)
    node.write()
    node.unstage()
    for _ in range(2):
        with pytest.raises(KeyLost, match="is another one each time that its KMS is asked"):
            rotate(node)
        assert trail_of(node) == before
        assert (node.record().rekey, len(node.header().keyslots)) == (None, 1)
        assert list(kms.kept) == [before.name]
    kms.kept_name = "nobody's"
    with pytest.raises(KeyLost, match=rf"^the key {before.name} of the KMS kms opens no key slot of volume pvc-1"):
        rotate(node)
    kms.fetch = KeepingKms.fetch.__get__(kms)  # type: ignore[method-assign]
    assert rotate(node)
    node.stage(secret=NONE)
    assert node.read() == "precious"
    node.unstage()
    assert len(node.header().keyslots) == 1


def test_a_kms_that_gives_one_key_by_two_names_leaves_the_volume_as_it_was(folder: Path, workers: Workers) -> None:
    class OneForAll(KeepingKms):
        """Looks at no name."""

        def create(self, name: str, announce: Announce = nobody) -> KeyTrail:
            found = next(iter(self.kept.values()), None)
            if found is not None and self.same:
                self.kept.setdefault(name, found)
            return super().create(name, announce)

        same = True

    kms = OneForAll()
    node = with_keys(folder, workers, GivenSources(kms=kms))
    node.create(parameters=OF_KMS, secret=NONE)
    before = trail_of(node)
    node.stage(secret=NONE)
    node.write()
    head = node.header()
    with pytest.raises(
        KeyLost, match=rf"^the key pvc-1\.[0-9a-f]{{16}} .* is the very one that it has, {before.name};"
    ):
        rotate(node)
    record = node.record()
    assert (record.key, record.rekey, node.header()) == (before, None, head)
    assert before.name in kms.kept  # nothing was destroyed: it may be one there
    assert len(kms.kept) == 2
    kms.same = False
    assert rotate(node)
    node.unstage()
    node.stage(secret=NONE)
    assert node.read() == "precious"
    node.unstage()
    assert (node.record().rekey, len(node.header().keyslots)) == (None, 1)


def test_the_life_of_a_volume_with_a_passphrase(folder: Path, workers: Workers) -> None:
    """The KMS type `default`, and no KMS at all."""
    node = Node(folder, workers)
    node.create()
    node.stage()
    node.write()
    node = Node(folder, workers)  # the driver after a restart
    node.stage()
    node.expand(2 * SIZE)
    assert size_bytes(f"/dev/mapper/luks-{VOLUME}") == 2 * SIZE
    assert rotate(node, SECRET, OTHER)
    assert node.read() == "precious"
    node.unstage()
    with pytest.raises(Unauthenticated):
        node.stage()
    node.stage(secret=OTHER)
    assert node.read() == "precious"
    node.unstage()
    assert len(node.header().keyslots) == 1
    node.delete()
    assert not node.disk().exists()


@pytest.mark.parametrize("at", ["before", "behind"])
@pytest.mark.parametrize("by_stage", [True, False], ids=["stage", "rotate"])
def test_a_new_key_that_is_lost_before_it_counted_is_given_up(
    folder: Path, workers: Workers, at: str, *, by_stage: bool
) -> None:
    wrapper = Forgetful("KMS kms (metadata)", lambda: Passphrase(b"a passphrase"))
    keys = keys_of(folder, GivenSources(kms=Wrapping(wrapper)))
    node = cut_in_adding(folder, workers, at, given_keys=keys)
    rekey, before = node.record().rekey, trail_of(node)
    assert rekey is not None
    assert rekey.other is not None
    wrapper.lost = (rekey.other.name,)
    if by_stage:
        node.stage(secret=NONE)
        assert trail_of(node) == before
    else:
        assert rotate(node)
        assert trail_of(node).name not in (before.name, *wrapper.lost)
        node.stage(secret=NONE)
    assert node.read() == "precious"
    node.unstage()
    assert node.record().rekey is None
    assert len(node.header().keyslots) == 1


def test_a_change_that_cannot_be_leaves_no_trace_in_the_record(used: Node) -> None:
    with pytest.raises(FailedPrecondition, match="is the one that it has"):
        rotate(used, SECRET, SECRET)
    assert used.record().rekey is None


def test_a_header_that_does_not_open_replaces_no_copy(used: Node) -> None:
    """A key slot's area is gone, which no checksum of the header tells: the copy is the last that opens."""
    copy = used.disk().with_name("header.luks2")
    good = copy.read_bytes()
    (slot,) = used.header().keyslots.values()
    with used.disk().open("r+b") as disk:
        disk.seek(slot.area.offset)
        disk.write(bytes(slot.area.size))
    with pytest.raises(Unauthenticated):
        rotate(used, SECRET, OTHER)
    assert copy.read_bytes() == good
    copy.unlink()
    with pytest.raises(Unauthenticated):
        used.stage()
    assert not copy.exists()


def test_a_wrapping_counts_once_it_has_opened_the_volume(folder: Path, workers: Workers) -> None:
    class Wrong(MetadataWrapper):
        """Wraps anew into what is another key."""

        def wrap(self, name: str, key: Passphrase) -> Wrapped:
            return super().wrap(name, Passphrase(key.reveal() + self.more))

        more = b""

    wrapper = Wrong("KMS kms (metadata)", lambda: Passphrase(b"a passphrase"))
    node = with_keys(folder, workers, GivenSources(kms=Wrapping(wrapper)))
    node.create(parameters=OF_KMS, secret=NONE)
    node.stage(secret=NONE)
    node.unstage()
    before, wrapper.more = trail_of(node), b"x"
    with pytest.raises(Unauthenticated):
        rewrap(node)
    assert trail_of(node) == before
    node.stage(secret=NONE)
    node.unstage()


def test_a_key_that_opens_nothing_is_told_by_its_name(folder: Path, workers: Workers) -> None:
    class Other(MetadataWrapper):
        """Gives what is another key."""

        def unwrap(self, trail: KeyTrail) -> Passphrase:
            return Passphrase(super().unwrap(trail).reveal() + self.more)

        more = b""

    wrapper = Other("KMS kms (metadata)", lambda: Passphrase(b"a passphrase"))
    node = with_keys(folder, workers, GivenSources(kms=Wrapping(wrapper)))
    node.create(parameters=OF_KMS, secret=NONE)
    node.stage(secret=NONE)
    node.unstage()
    wrapper.more = b"x"
    with pytest.raises(KeyLost, match=r"^the key pvc-1\.[0-9a-f]{16} of the KMS kms opens no key slot of volume pvc-1"):
        node.stage(secret=NONE)
    wrapper.more = b""
    node.stage(secret=NONE)
    node.unstage()


def test_wrapping_anew_takes_along_the_key_that_is_to_come(folder: Path, workers: Workers) -> None:
    """Else the old key of the KMS cannot go without the change that was cut losing its own."""
    passphrases = [Passphrase(b"old"), Passphrase(b"new")]

    class Newest(MetadataWrapper):
        """Unwraps by any of its passphrases, wraps by the last one."""

        def unwrap(self, trail: KeyTrail) -> Passphrase:
            for each in passphrases:
                with suppress(KeyLost):
                    return MetadataWrapper("KMS kms (metadata)", lambda each=each: each).unwrap(trail)  # type: ignore[misc]
            raise KeyLost("gone")

    sources = GivenSources(kms=Wrapping(Newest("KMS kms (metadata)", lambda: passphrases[-1])))
    node = with_keys(folder, workers, sources)
    newest = passphrases.pop()
    used_once(node)
    record = node.record()
    with keys_of(folder, sources).successor(record, trail_of(node), read_secret({})) as other:
        node.store.update(msgspec.structs.replace(record, rekey=Rekey(phase=RekeyPhase.ADDING, other=other)))
    passphrases.append(newest)
    assert rewrap(node)
    del passphrases[0]
    node.stage(secret=NONE)  # which ends the change
    assert node.read() == "precious"
    node.unstage()
    assert node.record().rekey is None
    assert trail_of(node).name == other.name


def test_an_expansion_takes_the_passphrase_that_the_secret_had_before(used: Node) -> None:
    used.stage()
    used.expand(SIZE + 16 * MIB, secret={**OTHER, "CRYPTO_KEY_VALUE_PREVIOUS": SECRET["CRYPTO_KEY_VALUE"]})
    with pytest.raises(Unauthenticated):
        used.expand(SIZE + 32 * MIB, secret=OTHER)
    used.unstage()


def _add_slot(node: Node, passphrase: bytes, secret: Mapping[str, str] = SECRET) -> None:
    argv = ["cryptsetup", "luksAddKey", "--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
    old = node.folder / "old"
    old.write_text(secret["CRYPTO_KEY_VALUE"])
    argv += ["--key-file", str(old), str(node.disk()), "-"]
    subprocess.run(argv, input=passphrase, check=True, capture_output=True, timeout=60)
    old.unlink()


# --- an image, recovery -----------------------------------------------------------------------------------------------


def test_a_volume_from_an_encrypted_image_gets_a_key_of_its_own(
    plugin: tuple[servers.Plugin, GivenSources], folder: Path, workers: Workers
) -> None:
    _, sources = plugin
    node = with_keys(folder, workers, sources)
    image = encrypted_image(make_file_system(folder / "image.raw", 8 * MIB), folder / "image")
    put_image(node.state, "installed", image)
    node.create(parameters={**OF_KMS, "backingImage": "installed"}, secret=volume_images.SECRET)
    assert node.encryption_state() is EncryptionState.ENCRYPTED
    assert len(node.header().keyslots) == 1
    node.stage(secret=NONE)
    assert (node.staging_path() / BOOT_FILE).read_text() == GREETING
    node.unstage()
    assert not opens(node.disk(), Passphrase(volume_images.SECRET["CRYPTO_KEY_VALUE"].encode()))


def recovery(node: Node, sources: GivenSources) -> Recovery:
    keys = VolumeKeys(sources, KeyLedger(node.state, Files()))
    return Recovery(node.store, node.presences, node.workers, LoopDevices(), sources, keys, node.homes, Limits())


def test_a_damaged_header_is_put_back_from_its_copy(used: Node) -> None:
    copy = used.disk().with_name("header.luks2")
    with used.disk().open("r+b") as disk:
        disk.write(bytes(64 * 1024))
    made = recovery(used, GivenSources())
    assert made.restore_header(VOLUME, copy, read_secret(SECRET)) is None
    used.stage()
    assert used.read() == "precious"
    with pytest.raises(DeviceInUse, match="is open"):
        made.restore_header(VOLUME, copy, read_secret(SECRET))
    used.unstage()


def test_what_is_in_use_is_not_opened_a_second_time(used: Node) -> None:
    used.stage()
    (loop,) = LoopDevices().find(str(used.disk()))
    made = recovery(used, GivenSources())
    for path in (used.disk(), Path(loop.path), Path("/dev/mapper") / used.record().mapping_name):
        for read_only in (True, False):
            with pytest.raises(DeviceInUse, match="is in use by"):
                made.open(path, "recovered", None, read_secret(SECRET), read_only=read_only)
    assert used.read() == "precious"
    used.unstage()


def test_what_recover_has_open_is_neither_staged_nor_changed_nor_deleted(used: Node) -> None:
    made = recovery(used, GivenSources())
    secret = read_secret(SECRET)
    made.open(used.disk(), "recovered", None, secret, read_only=False)
    try:
        before = used.record()
        assert before.luks is not None
        assert not used.mappings.keeps_key(before.luks.uuid)  # who closes it by hand takes no key out of a keyring
        for call in (
            used.stage,
            lambda: made.restore_header(VOLUME, used.disk().with_name("header.luks2"), secret),
            lambda: rotate(used, SECRET, OTHER),
            lambda: used.conversions.reencrypt(VOLUME, secret, Watch()),
            used.delete,
        ):
            with pytest.raises(DeviceInUse, match=r"open as /dev/mapper/recovered too.*cryptsetup close recovered"):
                call()
        assert used.record() == before
        assert used.mapping() is None
        assert not used.disk().with_name("next.img").exists()
    finally:
        used.mapper.remove("recovered")
    used.stage()
    assert used.read() == "precious"
    used.unstage()
    assert used.closed()


def test_what_is_staged_while_recover_derives_the_key_is_not_opened_a_second_time(used: Node) -> None:
    used.stage()
    (bound,) = used.loops_of()
    identity = used.record().luks
    assert identity is not None
    with used.loops.open(bound.path) as device, pytest.raises(DeviceInUse, match="opened by somebody else meanwhile"):
        used.workers.call(
            "luks-open of the test",
            60.0,
            open_with_header,
            "the test's volume",
            device,
            device,
            identity,
            HeaderLimits(),
            Passphrase(SECRET["CRYPTO_KEY_VALUE"].encode()),
            Opening("recovered"),
            read_only=False,
        )
    assert used.mapper.get("recovered") is None
    used.write("still mine")
    used.unstage()
    assert used.closed()


def test_a_copy_of_another_volumes_header_is_refused(used: Node) -> None:
    used.staged_once("pvc-2")
    before = fingerprint(used.disk())
    with pytest.raises(ForeignSignature):
        recovery(used, GivenSources()).restore_header(
            VOLUME, used.disk("pvc-2").with_name("header.luks2"), read_secret(SECRET)
        )
    assert fingerprint(used.disk()) == before


def test_an_old_copy_that_the_passphrase_does_not_open_is_not_put_back(used: Node) -> None:
    old = used.folder / "old"
    old.write_bytes(used.disk().with_name("header.luks2").read_bytes())
    assert rotate(used, SECRET, OTHER)
    before = fingerprint(used.disk())
    made = recovery(used, GivenSources())
    for secret, kind in ((OTHER, Unauthenticated), (NONE, FailedPrecondition)):
        with pytest.raises(kind, match="--force"):
            made.restore_header(VOLUME, old, read_secret(secret))
    assert fingerprint(used.disk()) == before
    kept = used.disk().with_name("header.before")
    assert not kept.exists()
    assert made.restore_header(VOLUME, old, read_secret(NONE), force=True) == kept
    with pytest.raises(Unauthenticated):
        used.stage(secret=OTHER)
    assert made.restore_header(VOLUME, kept, read_secret(OTHER)) == used.disk().with_name("header.before.1")
    used.stage(secret=OTHER)
    assert used.read() == "precious"
    used.unstage()
    assert rotate(used, OTHER, SECRET)
    assert not list(used.disk().parent.glob("header.before*")), "a passphrase that was removed opens them"


def test_a_copy_is_tried_with_the_key_of_the_kms_before_it_is_put_back(
    plugin: tuple[servers.Plugin, GivenSources], folder: Path, workers: Workers
) -> None:
    _, sources = plugin
    node = with_keys(folder, workers, sources)
    used_once(node)
    copy, old = node.disk().with_name("header.luks2"), folder / "old"
    old.write_bytes(copy.read_bytes())
    assert rotate(node)
    made = recovery(node, sources)
    with pytest.raises(Unauthenticated, match=r"the key pvc-1\..* opens no key slot of the copy .*old"):
        made.restore_header(VOLUME, old, read_secret({}))
    assert made.restore_header(VOLUME, copy, read_secret({})) == node.disk().with_name("header.before")
    node.stage(secret=NONE)
    assert node.read() == "precious"
    node.unstage()


def test_the_header_of_another_volume_opens_nothing(used: Node) -> None:
    used.staged_once("pvc-2")
    copy, secret = used.disk("pvc-2").with_name("header.luks2"), read_secret(SECRET)
    made = recovery(used, GivenSources())
    older = used.folder / "older"
    older.write_bytes(used.disk().with_name("header.luks2").read_bytes())
    with pytest.raises(FailedPrecondition, match="is the header of another volume"):
        made.open(used.disk(), "recovered", copy, secret, read_only=False)
    used.conversions.reencrypt(VOLUME, secret, Watch())
    with pytest.raises(FailedPrecondition, match="has another volume key"):
        made.open(used.disk(), "recovered", older, secret, read_only=True)
    assert used.mapper.get("recovered") is None
    assert not used.loops_of()


def test_a_volume_is_opened_by_its_file_a_copy_of_its_header_and_its_kms_alone(
    plugin: tuple[servers.Plugin, GivenSources], folder: Path, workers: Workers
) -> None:
    _, sources = plugin
    node = with_keys(folder, workers, sources)
    used_once(node)
    copy = folder / "header"
    copy.write_bytes(node.disk().with_name("header.luks2").read_bytes())
    with node.disk().open("r+b") as disk:
        disk.write(bytes(64 * 1024))
    with _recovered(node, sources, copy) as path:
        mounted = folder / "mounted"
        mounted.mkdir()
        subprocess.run(["mount", "-o", "ro", path, str(mounted)], check=True, timeout=60)
        try:
            assert (mounted / "file").read_text() == "precious"
        finally:
            subprocess.run(["umount", str(mounted)], check=True, timeout=60)


@contextmanager
def _recovered(node: Node, sources: GivenSources, header: Path | None) -> Iterator[str]:
    path = recovery(node, sources).open(node.disk(), "recovered", header, read_secret({}), read_only=True)
    luks = node.record().luks
    assert luks is not None
    try:
        yield path
    finally:
        node.mapper.remove("recovered")
        unlink_from_user(volume_key_name(luks.uuid))


# --- volumes of others ------------------------------------------------------------------------------------------------


def foreign(folder: Path, passphrase: bytes, *options: str) -> Path:
    """A LUKS2 file as cryptsetup makes it by hand, with a file system and a file in it."""
    inside = make_file_system(folder / "inside", 8 * MIB)
    path = folder / "foreign.img"
    path.touch()
    os.truncate(path, 24 * MIB)
    fast = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    argv = ["cryptsetup", "-q", "luksFormat", "--type", "luks2", *(options or fast), "--key-file", "-", str(path)]
    subprocess.run(argv, input=passphrase, check=True, capture_output=True, timeout=60)
    argv = ["cryptsetup", "open", "--key-file", "-", str(path), "foreign"]
    subprocess.run(argv, input=passphrase, check=True, capture_output=True, timeout=60)
    try:
        subprocess.run(
            ["dd", f"if={inside}", "of=/dev/mapper/foreign", "bs=1M", "conv=fsync"], check=True, capture_output=True
        )
    finally:
        subprocess.run(["cryptsetup", "close", "foreign"], check=True, timeout=60)
    return path


def adoption(node: Node, sources: GivenSources) -> Adoption:
    return Adoption(node.store, node.workers, node.loops, node.slots, sources, node.rekeying, node.limits)


def test_a_volume_that_was_made_by_hand_is_adopted(node: Node) -> None:
    path = foreign(
        node.folder, b"by hand", "--sector-size", "512", "--pbkdf-memory", "32768", "--pbkdf-force-iterations", "4"
    )
    before = path.read_bytes()
    secret = {"CRYPTO_KEY_VALUE": "by hand"}
    made = adoption(node, GivenSources()).adopt(AdoptRequest(VOLUME, path, read_secret(secret)))
    assert made.capacity_bytes == 8 * MIB
    assert path.read_bytes() == before
    node.stage(secret=secret)
    assert (node.staging_path() / BOOT_FILE).read_text() == GREETING
    node.expand(16 * MIB)
    node.unstage()
    with pytest.raises(AlreadyExists):
        adoption(node, GivenSources()).adopt(AdoptRequest(VOLUME, path, read_secret(secret)))
    assert rotate(node, secret, OTHER)
    node.stage(secret=OTHER)
    node.unstage()


CEPH_KDF = ("--pbkdf-memory", "1024", "--pbkdf-force-iterations", "98")
"""As many passes as cryptsetup took for Ceph-CSI's 32 MiB on a slow machine, with less memory to be quick."""


def test_a_volume_of_ceph_csi_is_adopted_with_its_wrapped_key(folder: Path, workers: Workers) -> None:
    wrapper = MetadataWrapper("KMS kms (metadata)", lambda: Passphrase(b"a passphrase of the class"))
    handle = "0001-0009-rook-ceph-0000000000000001-8a710f4c"
    dek = Passphrase(b"MDEyMzQ1Njc4OWFiY2RlZjAxMjM=")
    path = foreign(folder, dek.reveal(), "--hash", "sha256", "--sector-size", "512", *CEPH_KDF)
    trail = KeyTrail(kms_id="kms", type="given", name=handle, wrapped=wrapper.wrap(handle, dek).text)
    sources = GivenSources(kms=Wrapping(wrapper))
    node = with_keys(folder, workers, sources)
    wrong = msgspec.structs.replace(trail, wrapped=wrapper.wrap(handle, Passphrase(b"another")).text)
    with pytest.raises(KeyLost, match=rf"the key {handle} of the KMS kms opens no key slot"):
        adoption(node, sources).adopt(AdoptRequest(VOLUME, path, read_secret({}), wrong))
    adoption(node, sources).adopt(AdoptRequest(VOLUME, path, read_secret({}), trail))
    assert token_of(node) == trail_of(node), "record.json would be all that has the key"
    assert token_of(node) == key_token.read(*read_header("the copy", str(node.disk().with_name("header.luks2"))))
    with _recovered(node, sources, None):
        assert node.mapper.get("recovered") is not None
    node.stage(secret=NONE)
    assert (node.staging_path() / BOOT_FILE).read_text() == GREETING
    assert trail_of(node).foreign
    assert rotate(node)
    assert not trail_of(node).foreign
    node.unstage()
    node.stage(secret=NONE)
    node.unstage()


@pytest.fixture
def kept_here(folder: Path, workers: Workers) -> tuple[Node, GivenSources, KeepingKms, Path]:
    """A used volume whose key a KMS keeps, and a copy of its file as it was, before anything was done to either."""
    kms = KeepingKms()
    sources = GivenSources(kms=kms)
    node = with_keys(folder, workers, sources)
    used_once(node)
    copy = folder / "copy.img"
    subprocess.run(["cp", "--sparse=always", str(node.disk()), str(copy)], check=True, timeout=60)
    return node, sources, kms, copy


def test_an_adopted_copy_of_what_a_kms_keeps_the_key_of_outlives_the_original(
    kept_here: tuple[Node, GivenSources, KeepingKms, Path],
) -> None:
    node, sources, kms, copy = kept_here
    before = copy.read_bytes()
    made = adoption(node, sources).adopt(AdoptRequest("copy", copy, read_secret({})))
    assert not shares_key(made)
    assert copy.read_bytes() == before
    node.delete()
    assert list(kms.kept) == [made.key.name if made.key else ""]
    node.stage("copy", secret=NONE)
    assert node.read(volume="copy") == "precious"
    node.unstage("copy")
    node.delete("copy")
    assert not kms.kept


def test_an_adopted_copy_that_is_to_share_a_key_is_told(
    kept_here: tuple[Node, GivenSources, KeepingKms, Path],
) -> None:
    node, sources, kms, copy = kept_here
    made = adoption(node, sources).adopt(AdoptRequest("copy", copy, read_secret({}), share=True))
    assert shares_key(made)
    assert made.key is not None
    assert made.key.name == trail_of(node).name
    assert key_token.read(*read_header("the copy", str(node.disk("copy")))) == made.key
    assert node.disk("copy").with_name("header.luks2").exists()
    node.delete("copy")
    assert list(kms.kept) == [trail_of(node).name]
    node.stage(secret=NONE)
    node.unstage()


def test_a_copy_that_cannot_be_given_its_own_key_is_there_and_says_so(
    kept_here: tuple[Node, GivenSources, KeepingKms, Path],
) -> None:
    node, sources, kms, copy = kept_here

    def refuse(_name: str, _announce: object) -> KeyTrail:
        raise Unavailable("the KMS is down; call again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kms, "create", refuse)
        with pytest.raises(Unavailable, match=r"^volume copy was adopted .* lost with that, .*keys rotate copy"):
            adoption(node, sources).adopt(AdoptRequest("copy", copy, read_secret({})))
    assert shares_key(node.store.get("copy"))
    with node.locks.hold("copy"):
        assert not shares_key(node.rekeying.rotate("copy", read_secret({}), None).record)
    node.delete()
    node.stage("copy", secret=NONE)
    assert node.read(volume="copy") == "precious"
    node.unstage("copy")


def test_what_cannot_be_adopted_makes_no_volume(node: Node) -> None:
    path = foreign(node.folder, b"by hand")
    made = adoption(node, GivenSources())
    with node.loops.attach(str(path), autoclear=True) as loop:
        for one, words in ((path, rf"is in use by {loop.name}"), (Path(loop.name), "is a block device and a volume")):
            with pytest.raises(FailedPrecondition, match=words):
                made.adopt(AdoptRequest(VOLUME, one, read_secret({"CRYPTO_KEY_VALUE": "by hand"})))
    for request, kind in (
        (AdoptRequest(VOLUME, path, read_secret({"CRYPTO_KEY_VALUE": "wrong"})), Unauthenticated),
        (AdoptRequest(VOLUME, path, read_secret({})), FailedPrecondition),
        (AdoptRequest(VOLUME, node.folder / "inside", read_secret(SECRET)), ForeignSignature),
        (AdoptRequest(VOLUME, node.folder / "nothing", read_secret(SECRET)), FailedPrecondition),
    ):
        with pytest.raises(kind):
            made.adopt(request)
    assert not node.store.has(VOLUME)
    assert not list((node.state / "loopfile" / "new").iterdir())
