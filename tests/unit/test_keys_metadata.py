"""The wrapping of KMS type metadata, against a second implementation made of what Ceph-CSI publishes."""

import base64
import json

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from hypothesis import given, settings
from hypothesis import strategies as st

from csi_driver.keys.base import Wrapping
from csi_driver.keys.metadata import MetadataWrapper
from csi_driver.model.errors import FailedPrecondition, KeyLost, Unavailable
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail

VOLUME = "0001-0009-rook-ceph-0000000000000001-8a710f4c-9348-11e9"
TEXTS = st.text(min_size=1, max_size=40)


def key_of(passphrase: str, volume: str) -> bytes:
    return Scrypt(salt=volume.encode(), length=32, n=32768, r=8, p=1).derive(passphrase.encode())


def ceph_wraps(passphrase: str, volume: str, dek: str, nonce: bytes = b"twelve bytes") -> str:
    """As Ceph-CSI writes it into the image's metadata: Go's json of two byte slices."""
    encryptor = Cipher(algorithms.AES(key_of(passphrase, volume)), modes.GCM(nonce)).encryptor()
    sealed = encryptor.update(dek.encode()) + encryptor.finalize() + encryptor.tag
    return json.dumps({"dek": base64.b64encode(sealed).decode(), "nonce": base64.b64encode(nonce).decode()})


def ceph_unwraps(passphrase: str, volume: str, text: str) -> str:
    found = json.loads(text)
    sealed, nonce = base64.b64decode(found["dek"]), base64.b64decode(found["nonce"])
    decryptor = Cipher(algorithms.AES(key_of(passphrase, volume)), modes.GCM(nonce, sealed[-16:])).decryptor()
    return (decryptor.update(sealed[:-16]) + decryptor.finalize()).decode()


def wrapper(passphrase: str) -> MetadataWrapper:
    return MetadataWrapper("KMS kms (metadata)", lambda: Passphrase(passphrase.encode()))


class Fickle(MetadataWrapper):
    """Two servers behind one address, each with a key of its own: what one wraps is another key at the other."""

    def __init__(self) -> None:
        super().__init__("KMS kms (metadata)", lambda: Passphrase(b"a passphrase"))

    def unwrap(self, trail: KeyTrail) -> Passphrase:
        return Passphrase(super().unwrap(trail).reveal()[::-1])


def test_a_kms_that_unwraps_another_key_than_it_wrapped_gets_no_volume() -> None:
    """What is encrypted with it nobody would ever open again."""
    with pytest.raises(KeyLost, match=r"unwraps into another one; nothing was encrypted with it"):
        Wrapping(Fickle()).create(VOLUME)


@settings(max_examples=8, deadline=None)
@given(TEXTS, TEXTS)
def test_what_ceph_csi_wrapped_is_unwrapped_here(passphrase: str, dek: str) -> None:
    trail = KeyTrail(kms_id="kms", type="metadata", name=VOLUME, wrapped=ceph_wraps(passphrase, VOLUME, dek))
    assert wrapper(passphrase).unwrap(trail) == Passphrase(dek.encode())


@settings(max_examples=8, deadline=None)
@given(TEXTS)
def test_what_is_wrapped_here_ceph_csi_unwraps(passphrase: str) -> None:
    trail = Wrapping(wrapper(passphrase)).create(VOLUME)
    dek = wrapper(passphrase).unwrap(trail).reveal().decode()
    assert ceph_unwraps(passphrase, VOLUME, trail.wrapped) == dek


@pytest.mark.parametrize(
    ("passphrase", "volume"), [("another", VOLUME), ("the right one", "another volume"), ("the right one ", VOLUME)]
)
def test_another_passphrase_or_volume_unwraps_nothing(passphrase: str, volume: str) -> None:
    wrapped = ceph_wraps("the right one", VOLUME, "the key of the volume")
    trail = KeyTrail(kms_id="kms", type="metadata", name=volume, wrapped=wrapped)
    with pytest.raises(KeyLost, match="does not unwrap the key of") as told:
        wrapper(passphrase).unwrap(trail)
    assert "the key of the volume" not in str(told.value)


@pytest.mark.parametrize("text", ["", "{}", "null", '{"dek":"AAAA"}', '{"dek":"?","nonce":"?"}', "\x00", "[" * 100_000])
def test_what_is_no_wrapped_key_is_told(text: str) -> None:
    with pytest.raises(KeyLost, match="restore the record from a backup"):
        wrapper("p").unwrap(KeyTrail(kms_id="kms", type="metadata", name=VOLUME, wrapped=text))


@pytest.mark.parametrize("error", [Unavailable("the API does not answer"), FailedPrecondition("there is no secret")])
def test_what_hinders_the_passphrase_is_told_as_it_is(error: Exception) -> None:
    """And not as a key that is lost: one passes by itself."""
    answers: list[Passphrase | Exception] = [Passphrase(b"a passphrase"), error]

    def passphrase() -> Passphrase:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    wrapper = MetadataWrapper("KMS a (metadata)", passphrase)
    wrapped = wrapper.wrap("pvc-1", Passphrase(b"a DEK")).text
    with pytest.raises(type(error), match=f"^{error}$"):
        wrapper.unwrap(KeyTrail(kms_id="a", type="metadata", name="pvc-1", wrapped=wrapped))
