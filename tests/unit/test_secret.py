"""Passphrases travel byte for byte and show in nothing that people or machines keep."""

import copy
import json
import logging
import pickle
import traceback
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.cli.logs import Render, _json, _plain, _text
from csi_driver.keys.secret import SecretKey, read_secret, require_passphrase
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.secret import Passphrase

HELD = b"hunter2"
VALUE = "correct horse\nbattery staple"


@given(st.text(min_size=1, max_size=200), st.sampled_from(["CRYPTO_KEY_VALUE", "encryptionPassphrase"]))
def test_a_passphrase_is_the_exact_bytes_of_the_secret(text: str, entry: str) -> None:
    found = require_passphrase(read_secret({entry: text}), "pvc-1")
    assert found.reveal() == text.encode()


@pytest.mark.parametrize(
    "text", ["secret\n", "\n", " secret ", "\tsecret\r\n", "\0", "secret\0more", "ünïcode", "'\"$(id)"]
)
def test_nothing_is_taken_off_or_added(text: str) -> None:
    assert require_passphrase(read_secret({"CRYPTO_KEY_VALUE": text}), "pvc-1").reveal() == text.encode()


def test_a_longhorn_secret_is_read_whole() -> None:
    found = read_secret(
        {
            "CRYPTO_KEY_VALUE": VALUE,
            "CRYPTO_KEY_PROVIDER": "secret",
            "CRYPTO_KEY_CIPHER": "aes-xts-plain64",
            "CRYPTO_KEY_HASH": "sha256",
            "CRYPTO_KEY_SIZE": "256",
            "CRYPTO_PBKDF": "argon2i",
        }
    )
    assert found == SecretKey(Passphrase(VALUE.encode()), "aes-xts-plain64", "sha256", "256", "argon2i")


def test_empty_wishes_are_none_and_other_entries_are_left_alone() -> None:
    entries = {"CRYPTO_KEY_CIPHER": "", "CRYPTO_KEY_HASH": "", "CRYPTO_KEY_SIZE": "", "CRYPTO_PBKDF": ""}
    others = {"userID": "admin", "userKey": "AQ==", "crypto_key_value": "small letters are another name"}
    assert read_secret(entries | others) == SecretKey(passphrase=None)


@pytest.mark.parametrize("provider", ["", "secret"])
def test_the_provider_may_be_absent_or_the_secret_itself(provider: str) -> None:
    assert read_secret({"CRYPTO_KEY_PROVIDER": provider}) == read_secret({})


@pytest.mark.parametrize("provider", ["vault", "Secret", "secret ", VALUE])
def test_another_provider_is_refused_and_not_quoted(provider: str) -> None:
    with pytest.raises(
        FailedPrecondition, match=r"CRYPTO_KEY_PROVIDER names a key provider that does not exist"
    ) as caught:
        read_secret({"CRYPTO_KEY_PROVIDER": provider, "CRYPTO_KEY_VALUE": "x"})
    assert provider not in str(caught.value).replace("set it to secret", "")


@pytest.mark.parametrize("entry", ["CRYPTO_KEY_VALUE", "encryptionPassphrase"])
def test_an_empty_passphrase_is_refused(entry: str) -> None:
    with pytest.raises(FailedPrecondition, match=rf"{entry} is empty"):
        read_secret({entry: ""})


@pytest.mark.parametrize("entry", ["CRYPTO_KEY_VALUE", "encryptionPassphrase"])
def test_a_passphrase_has_at_most_64_kib(entry: str) -> None:
    largest = "é" * (32 * 1024)
    assert read_secret({entry: largest}).passphrase == Passphrase(largest.encode())
    with pytest.raises(FailedPrecondition, match=rf"{entry} is longer than 65536 bytes"):
        read_secret({entry: largest + "x"})


def test_two_passphrases_must_be_one() -> None:
    both = {"CRYPTO_KEY_VALUE": VALUE, "encryptionPassphrase": VALUE}
    assert read_secret(both).passphrase == Passphrase(VALUE.encode())
    with pytest.raises(FailedPrecondition, match=r"CRYPTO_KEY_VALUE and encryptionPassphrase disagree") as caught:
        read_secret(both | {"encryptionPassphrase": f"{VALUE}\n"})
    assert VALUE not in str(caught.value)


def test_a_missing_passphrase_names_volume_entries_and_parameter() -> None:
    said = r"volume pvc-1 .*CRYPTO_KEY_VALUE nor encryptionPassphrase.*csi.storage.k8s.io/node-stage-secret-name"
    with pytest.raises(FailedPrecondition, match=said):
        require_passphrase(read_secret({"userID": "admin"}), "pvc-1")


def logged(render: Render, one: object) -> str:
    return render(logging.INFO, "opened", {"key": one}).decode()


SHOWN: list[Callable[[object], str]] = [
    repr,
    str,
    "{}".format,
    lambda one: f"{one!r:>40}",
    lambda one: "%s %r" % (one, one),  # noqa: UP031 -- one of the ways
    lambda one: ascii([one, {"key": one}]),
    lambda one: repr(logging.LogRecord("n", logging.INFO, "p", 1, "%s", (one,), None).getMessage()),
    lambda one: logged(_json, one),
    lambda one: logged(_text(_plain), one),
    lambda one: str(dir(one)),
]


@pytest.mark.parametrize("show", SHOWN)
@pytest.mark.parametrize("wrap", [lambda key: key, SecretKey, ValueError])
def test_no_way_of_showing_it_shows_it(show: Callable[[object], str], wrap: Callable[[Passphrase], object]) -> None:
    shown = show(wrap(Passphrase(HELD)))
    assert "hunter2" not in shown
    assert HELD.hex() not in shown


@pytest.mark.parametrize(
    "use",
    [
        *(hash, len, bytes, int, vars, json.dumps, msgspec.json.encode, msgspec.json.Encoder(enc_hook=repr).encode),
        *(lambda key: key + b"x", lambda key: {key: 1}, lambda key: key.reveal(1)),
    ],
)
def test_misuse_ends_in_an_error_that_does_not_show_it(use: Callable[[Passphrase], object]) -> None:
    try:
        result = use(Passphrase(HELD))
    except Exception as error:  # noqa: BLE001 -- whichever it is
        told = "".join(traceback.format_exception(error))
    else:
        told = repr(result)
    assert "hunter2" not in told


def test_it_travels_pickled_to_the_one_worker_that_uses_it() -> None:
    key = Passphrase(b"hunter2\n")
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(key, protocol)).reveal() == b"hunter2\n"  # noqa: S301 -- our own
    assert copy.deepcopy(key) == key


def test_passphrases_compare_by_value_and_with_nothing_else() -> None:
    assert Passphrase(b"one") == Passphrase(b"one")
    assert Passphrase(b"one") != Passphrase(b"two")
    assert Passphrase(b"one") != b"one"
