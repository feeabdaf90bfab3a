"""Headers that somebody forged or a disk damaged: refused before any key is tried, and never written to.

Field problems 3, 4 and 20, and the security bugs of the list. A header is unauthenticated: `forged` sets its checksums
right, as an attacker on the storage would.
"""

import os
import resource
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec
import pytest

from csi_driver.host.workers import Workers
from csi_driver.model.errors import (
    FailedPrecondition,
    ForeignSignature,
    InvalidArgument,
    InvalidHeader,
    Unauthenticated,
)
from csi_driver.model.volume import EncryptionState
from csi_driver.volumes.driver import WARM
from tests import headers
from tests.headers import HDR_SIZE, Metadata, head_of, metadata_of
from tests.machine.node import BLOCK, CHEAP, DATA_OFFSET, LIMITS, MIB, SECRET, VOLUME, Node, fingerprint
from tests.machine.places import DEVICE

P = ParamSpec("P")
R = TypeVar("R")


def overwrite(node: Node, area: bytes, at: int = 0) -> None:
    with node.disk().open("r+b") as file:
        file.seek(at)
        file.write(area)
        os.fsync(file.fileno())


def is_refused_untouched(node: Node, words: str) -> None:
    """Staging is refused for the header, with any key, and nothing is written or left open."""
    before = fingerprint(node.disk())
    for secret in (SECRET, {"CRYPTO_KEY_VALUE": "wrong"}):
        with pytest.raises(InvalidHeader, match=words):
            node.stage(secret=secret)
    assert fingerprint(node.disk()) == before
    assert node.encryption_state() is EncryptionState.ENCRYPTED
    assert node.closed()


def forge(node: Node, change: Callable[[Metadata], object]) -> None:
    overwrite(node, headers.forged(head_of(node.disk()), change))


def set_segment(name: str, value: object) -> Callable[[Metadata], object]:
    return lambda metadata: metadata["segments"]["0"].update({name: value})


@pytest.mark.parametrize(
    "cipher", ["cipher_null-ecb", "cipher_null-cbc-essiv:sha256", "null-ecb", "capi:ecb(cipher_null)-plain"]
)
def test_cve_2025_59054_null_cipher(used: Node, cipher: str) -> None:
    """The segment or the key slot's area claims a cipher that does nothing."""
    original = head_of(used.disk())
    forge(used, set_segment("encryption", cipher))
    is_refused_untouched(used, "expected one of the ciphers")
    overwrite(used, original)
    forge(used, lambda metadata: metadata["keyslots"]["0"]["area"].update(encryption=cipher))
    is_refused_untouched(used, "in key slot 0, found|one of the ciphers")
    overwrite(used, original)
    used.stage()
    assert used.read() == "precious"
    used.unstage()


def add_reencryption(metadata: Metadata) -> None:
    """CVE-2021-4122: a forged reencryption makes libcryptsetup decrypt the data in place as it opens the device."""
    metadata["config"]["requirements"] = {"mandatory": ["online-reencrypt"]}
    metadata["keyslots"]["1"] = {
        "type": "reencrypt",
        "mode": "decrypt",
        "direction": "forward",
        "key_size": 1,
        "area": {"type": "checksum", "offset": "290816", "size": "126976", "hash": "sha256", "sector_size": 512},
    }


@pytest.mark.parametrize(
    "change",
    [
        add_reencryption,
        lambda metadata: metadata["config"].update(requirements={"mandatory": ["online-reencrypt"]}),
        lambda metadata: metadata["config"].update(requirements={"mandatory": ["online-reencrypt-v2"]}),
        lambda metadata: metadata["segments"].update({"1": metadata["segments"]["0"] | {"flags": ["in-reencryption"]}}),
        set_segment("flags", ["in-reencryption"]),
    ],
    ids=["whole", "requirement", "requirement-v2", "segment", "flag"],
)
def test_cve_2021_4122_forged_reencryption(used: Node, change: Callable[[Metadata], object]) -> None:
    forge(used, change)
    is_refused_untouched(used, rf"volume {VOLUME} on {DEVICE}")


@pytest.mark.parametrize(
    "change",
    [
        set_segment("type", "linear"),
        set_segment("offset", str(DATA_OFFSET + MIB)),
        set_segment("size", str(MIB)),
        set_segment("iv_tweak", "8"),
        set_segment("sector_size", 4096),
        set_segment("encryption", "aes-cbc-plain64"),
        lambda metadata: metadata["digests"]["0"].update(digest="AAAA" * 10 + "AAA="),
        lambda metadata: metadata["config"].update(flags=["no-journal", "allow-discards"]),
    ],
    ids=["linear", "offset", "size", "iv", "sector", "cipher", "digest", "flags"],
)
def test_ghsa_f5p4_a_header_unlike_its_record(used: Node, change: Callable[[Metadata], object]) -> None:
    """What the record pins outside the device cannot be changed on it: geometry, cipher, volume key."""
    forge(used, change)
    is_refused_untouched(used, rf"volume {VOLUME} on {DEVICE}")


@pytest.mark.parametrize("bad", [0, HDR_SIZE], ids=["primary", "secondary"])
@pytest.mark.parametrize("damage", ["checksum", "zeros"])
def test_one_damaged_header_copy_is_made_good_from_the_other(used: Node, bad: int, damage: str) -> None:
    what, at = (b"\xff" * 16, 448) if damage == "checksum" else (bytes(4096), 0)
    overwrite(used, what, bad + at)
    used.stage()
    assert used.read() == "precious"
    used.unstage()


def test_two_damaged_header_copies_are_refused(used: Node) -> None:
    for copy in (0, HDR_SIZE):
        overwrite(used, b"\xff" * 16, copy + 448)
    is_refused_untouched(used, "expected a copy with a right checksum, found both damaged")


def test_two_contradicting_header_copies_are_refused(used: Node) -> None:
    """Two readers that choose different copies are how a forgery gets through."""
    area = head_of(used.disk())
    changed = headers.forged(area, set_segment("iv_tweak", "0"))
    metadata = metadata_of(changed)
    metadata["tokens"] = {"0": {"type": "luks2-keyring", "keyslots": [], "key_description": "x"}}
    overwrite(used, headers.with_json(area, msgspec.json.encode(metadata), (HDR_SIZE,)))
    is_refused_untouched(used, "same sequence id")


def test_ignition_1545_luks1_is_not_blank(node: Node, folder: Path) -> None:
    """`isLuks --type luks2` says no to LUKS1, which is no reason to format it."""
    first = folder / "luks1"
    with first.open("wb") as file:
        file.truncate(DATA_OFFSET)
    headers.run_cryptsetup(
        *("luksFormat", "-q", "--type", "luks1", "--pbkdf-force-iterations", "1000", "--key-file", "-", str(first)),
        key=b"x",
    )
    node.create("pvc-new")
    node.staged_once("pvc-old")
    for volume in ("pvc-new", "pvc-old"):
        with node.disk(volume).open("r+b") as file:
            file.write(first.read_bytes())
        before = fingerprint(node.disk(volume))
        with pytest.raises(ForeignSignature, match=r"LUKS1|LUKS version 1"):
            node.stage(volume)
        assert fingerprint(node.disk(volume)) == before
        assert node.closed(volume)


COSTS: dict[str, dict[str, object]] = {
    "memory": {"type": "argon2id", "time": 4, "memory": 4 * 1024 * 1024, "cpus": 1},
    "passes": {"type": "argon2id", "time": 1 << 30, "memory": 32, "cpus": 1},
    "lanes": {"type": "argon2i", "time": 4, "memory": 64 * 1024, "cpus": 1 << 20},
    "iterations": {"type": "pbkdf2", "hash": "sha256", "iterations": (1 << 32) - 1},
}


@pytest.mark.parametrize("cost", COSTS)
def test_cc3472_a_huge_key_derivation_cost_is_refused_before_any_key_is_tried(used: Node, cost: str) -> None:
    """Bounded in time and memory: 4 GiB of Argon2 would take the node down, 2^30 passes a week."""
    salt = metadata_of(head_of(used.disk()))["keyslots"]["0"]["kdf"]["salt"]
    forge(used, lambda metadata: metadata["keyslots"]["0"].update(kdf={**COSTS[cost], "salt": salt}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    is_refused_untouched(used, "in key slot 0, found")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    assert not lingering_workers(), "a worker is still deriving a key"


def lingering_workers() -> list[str]:
    """Workers in the middle of something; idle ones have another name."""
    names = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            names.append(Path("/proc", entry, "comm").read_text().strip())
        except OSError:
            continue
    return [name for name in names if name in ("luks-format", "luks-open", "luks-unlock", "luks-resize")]


def test_cc_pr3781_the_default_cost_is_fixed_and_fits_the_smallest_node(node: Node) -> None:
    """No benchmark: what a big node formatted, a small one opens. 64 MiB, 4 passes, 1 lane."""
    node.create(parameters={"encrypted": "true"})
    node.stage()
    kdf = metadata_of(head_of(node.disk()))["keyslots"]["0"]["kdf"]
    assert (kdf["type"], kdf["memory"], kdf["time"], kdf["cpus"]) == ("argon2id", 64 * 1024, 4, 1)
    node.unstage()


def test_cc3472_more_memory_than_every_node_allows_is_refused_when_the_volume_is_made(node: Node) -> None:
    with pytest.raises(FailedPrecondition, match="pbkdfMemory"):
        node.create(parameters={"encrypted": "true", "pbkdfMemory": str(128 * 1024)})


def test_cc3472_a_node_with_less_memory_says_so_and_tries_no_key(folder: Path, workers: Workers) -> None:
    large = Node(folder, workers, replace(LIMITS, pbkdf_memory_kib=4096))
    large.create(parameters={"encrypted": "true"})
    large.stage()
    large.write()
    large.unstage()
    small = Node(folder, workers, replace(LIMITS, pbkdf_memory_kib=2048))
    is_refused_untouched(small, "KiB of Argon2 memory in key slot 0, found 4096")
    large.stage()
    assert large.read() == "precious"
    large.unstage()


class CountingWorkers(Workers):
    """Counts the key derivations that are at work at once."""

    def __init__(self) -> None:
        super().__init__(WARM)
        self._guard = threading.Lock()
        self._now = 0
        self.most = 0

    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not what.startswith(("luks-format", "luks-open", "luks-unlock")):
            return super().call(what, timeout, function, *args, **kwargs)
        with self._guard:
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            return super().call(what, timeout, function, *args, **kwargs)
        finally:
            with self._guard:
                self._now -= 1


@pytest.mark.parametrize("at_once", [1, 3])
def test_cc3472_only_so_many_key_derivations_run_at_once(folder: Path, at_once: int) -> None:
    """Each takes the memory that its key slot says: ten pods on one node must not take ten times that."""
    workers = CountingWorkers()
    try:
        node = Node(folder, workers, replace(LIMITS, unlocks_at_once=at_once))
        volumes = [f"pvc-{number}" for number in range(4)]
        for volume in volumes:
            node.create(volume, parameters={"encrypted": "true", "pbkdfMemory": "4096"}, capability=BLOCK)
        with ThreadPoolExecutor(len(volumes)) as threads:
            list(threads.map(lambda volume: node.stage(volume, BLOCK), volumes))
        assert workers.most == at_once
        for volume in volumes:
            node.unstage(volume)
    finally:
        workers.stop()


def test_a_changed_key_slot_opens_nothing(used: Node) -> None:
    """Key material that a disk damaged: the right passphrase is refused, and the volume is not formatted again."""
    area = metadata_of(head_of(used.disk()))["keyslots"]["0"]["area"]
    overwrite(used, struct.pack("<16Q", *range(16)), int(area["offset"]) + 4096)
    before = fingerprint(used.disk())
    with pytest.raises(Unauthenticated, match="opens no key slot"):
        used.stage()
    assert fingerprint(used.disk()) == before
    assert used.encryption_state() is EncryptionState.ENCRYPTED
    assert used.closed()


@pytest.mark.parametrize(
    ("cipher", "bits"), [("aes-cbc-essiv:sha256", 256), ("aes-cbc-plain64", 128), ("aes-xts-plain", 384)]
)
def test_hc1062_the_cipher_of_a_volume_is_its_own_for_good(node: Node, cipher: str, bits: int) -> None:
    """Chosen once from an allow-list, kept with the volume; a secret that changes its mind changes nothing."""
    node.create(parameters={**CHEAP, "cipher": cipher, "keySize": str(bits)})
    node.stage()
    node.write()
    table = node.open_mapping().targets[0].params
    assert table.startswith(f"{cipher} :{bits // 8}:logon:cryptsetup:")
    node.unstage()
    with pytest.raises(FailedPrecondition, match="CRYPTO_KEY_CIPHER"):
        node.stage(secret={**SECRET, "CRYPTO_KEY_CIPHER": "aes-xts-plain64"})
    node.stage()
    assert node.read() == "precious"
    node.unstage()


@pytest.mark.parametrize("cipher", ["cipher_null-ecb", "aes-ecb", "aes-xts-plain64 --debug", "", "AES-XTS-PLAIN64"])
def test_hc1062_a_cipher_outside_the_allow_list_is_refused(node: Node, cipher: str) -> None:
    with pytest.raises(InvalidArgument, match="cipher"):
        node.create(parameters={**CHEAP, "cipher": cipher})
    node.create()
    if cipher:
        with pytest.raises(FailedPrecondition, match="CRYPTO_KEY_CIPHER"):
            node.stage(secret={**SECRET, "CRYPTO_KEY_CIPHER": cipher})
    assert node.encryption_state() is EncryptionState.PREPARED
