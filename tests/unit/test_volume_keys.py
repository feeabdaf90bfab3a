"""Whose key a volume's is: what may be destroyed with it, and what a new one is called."""

import re

import msgspec
import pytest

from csi_driver.keys.secret import SecretKey, read_secret
from csi_driver.keys.sources import GENERATED
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail, VolumeParameters, VolumeRecord
from csi_driver.volumes.keys import VolumeKeys
from tests.keys.given import GivenSources

OWN = KeyTrail(kms_id="kms", type="given", name="pvc-1.0123abcd.1")
RECORD = VolumeRecord(
    id="pvc-1", name="pvc-1", capacity_bytes=1, parameters=VolumeParameters(encrypted=True), key=OWN, created="now"
)
NO_SECRET = SecretKey(None)


class Kept:
    """A KMS that keeps keys by their names."""

    def __init__(self) -> None:
        self.names = {OWN.name}

    def create(self, name: str) -> KeyTrail:
        self.names.add(name)
        return KeyTrail(kms_id="", type="", name=name)

    def fetch(self, trail: KeyTrail) -> Passphrase:
        return Passphrase(trail.name.encode())

    def rewrap(self, trail: KeyTrail) -> KeyTrail:
        return trail

    def destroy(self, trail: KeyTrail) -> None:
        self.names.discard(trail.name)

    def check(self) -> str:
        return "here"

    def close(self) -> None:
        """Nothing."""


def given(kept: Kept) -> VolumeKeys:
    return VolumeKeys(GivenSources(kms=kept), "node-1")


def test_a_volumes_own_key_goes_with_it_and_a_foreign_or_retained_one_does_not() -> None:
    kept = Kept()
    keys = given(kept)
    keys.destroy(RECORD, msgspec.structs.replace(OWN, foreign=True), "delete volume")
    retained = msgspec.structs.replace(RECORD, parameters=VolumeParameters(encrypted=True, retain_key=True))
    keys.destroy(retained, OWN, "delete volume")
    assert kept.names == {OWN.name}
    keys.destroy(RECORD, OWN, "delete volume")
    assert kept.names == set()


def test_a_successor_is_the_next_of_the_same_name() -> None:
    assert given(Kept()).successor(RECORD, OWN, NO_SECRET).name == "pvc-1.0123abcd.2"


@pytest.mark.parametrize("name", ["pvc-1.0123abcd.1", "0001-0009-rook-ceph-0000000000000001-8a710f4c", "a.7"])
def test_the_successor_of_a_foreign_key_is_no_other_volumes(name: str) -> None:
    """Of a copy of pvc-1 it would be the name that pvc-1 itself goes on to, and both would have one key."""
    foreign = msgspec.structs.replace(OWN, name=name, foreign=True)
    made = [given(Kept()).successor(RECORD, foreign, NO_SECRET) for _ in range(2)]
    assert all(re.fullmatch(r"pvc-1\.[0-9a-f]{8}\.1", trail.name) for trail in made)
    assert made[0] == made[1]  # what a cut call has left is found again
    assert made[0].name != OWN.name
    assert not any(trail.foreign for trail in made)


def test_the_successor_of_a_generated_key_is_generated_whatever_the_class_said() -> None:
    asked: list[str | None] = []

    class Sources(GivenSources):
        def create(self, kms_id: str | None, *_: object) -> KeyTrail:
            asked.append(kms_id)
            return OWN

    VolumeKeys(Sources(), "node-1").successor(RECORD, KeyTrail(kms_id="", type=GENERATED, name="x"), NO_SECRET)
    assert asked == [None]


def test_a_previous_passphrase_that_was_emptied_is_none() -> None:
    assert read_secret({"CRYPTO_KEY_VALUE": "one", "CRYPTO_KEY_VALUE_PREVIOUS": ""}).previous is None
