"""A key that never leaves a PKCS#11 token, by the program of deploy/kms and a token of SoftHSM: what fails, and how."""

import base64
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from csi_driver.model.errors import DriverError, FailedPrecondition, KeyLost, PermissionDenied, Unavailable
from csi_driver.model.volume import KeyTrail
from csi_driver.rpc.status import code_of
from tests.keys.conftest import Make
from tests.keys.softhsm import KEY, MODULE, PIN, TOKEN, SoftHsm, soft_hsm
from tests.keys.test_types import REQUEST, Case

SOURCE = Path(__file__).with_name("last_try.c")


@pytest.fixture
def hsm(tmp_path: Path) -> SoftHsm:
    return soft_hsm(tmp_path / "hsm", tmp_path / "programs")


@pytest.fixture
def case(hsm: SoftHsm, sources: Make) -> Case:
    return Case(sources(**hsm.entry), "exec")


def test_the_key_cannot_be_taken_out_of_the_token(hsm: SoftHsm) -> None:
    argv = ["--read-object", "--type", "secrkey", "--label", KEY]
    with pytest.raises(subprocess.CalledProcessError, match="exit status 1"):
        hsm.tool(*argv)


def test_a_wrapped_key_says_by_which_key_of_the_token(case: Case) -> None:
    trail = case.create()
    assert (trail.key_id, trail.key_version) == (KEY, "01")
    assert len(base64.b64decode(trail.wrapped)) == 12 + len(case.fetch(trail)) + 16


def test_another_label_in_the_entry_is_another_key_and_the_old_one_opens_what_it_wrapped(
    hsm: SoftHsm, case: Case, sources: Make
) -> None:
    trail = case.create()
    key = case.fetch(trail)
    hsm.make_key("newer", "02")
    later = Case(sources(**{**hsm.entry, "arguments": [TOKEN, "newer"]}), "exec")
    assert later.fetch(trail) == key
    fresh = later.sources.rewrap(trail, REQUEST)
    assert (fresh.key_id, fresh.key_version) == ("newer", "02")
    hsm.destroy_key()
    assert later.fetch(fresh) == key


def wrong_pin(hsm: SoftHsm) -> None:
    hsm.pin_file.write_text("12345678\n")


def no_pin(hsm: SoftHsm) -> None:
    hsm.pin_file.unlink()


def token_missing(hsm: SoftHsm) -> None:
    hsm.run("softhsm2-util", "--delete-token", "--token", TOKEN)


def module_missing(hsm: SoftHsm) -> None:
    hsm.settle(module=str(hsm.folder / "none.so"))


def no_module(hsm: SoftHsm) -> None:
    hsm.settle(module="libcrypt.so.1")


def settings_of_another_token(hsm: SoftHsm) -> None:
    hsm.settle(token="other")


def settings_missing(hsm: SoftHsm) -> None:
    (hsm.programs / "pkcs11.json").unlink()


def key_destroyed(hsm: SoftHsm) -> None:
    hsm.destroy_key()


def two_keys(hsm: SoftHsm) -> None:
    hsm.make_key(KEY, "02")


def last_try(hsm: SoftHsm) -> None:
    module = hsm.folder / "last_try.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", f'-DSOFTHSM="{MODULE}"', "-o", str(module), str(SOURCE), "-ldl"], check=True
    )
    hsm.settle(module=str(module))


FAULTS: list[tuple[Callable[[SoftHsm], None], type[DriverError], str]] = [
    (wrong_pin, PermissionDenied, "the token luks refuses the PIN in /.*/pin: it is not the token's"),
    (no_pin, FailedPrecondition, "the PIN file /.*/pin cannot be read .No such file"),
    (last_try, PermissionDenied, "one more wrong PIN would lock the token luks, so none was tried"),
    (token_missing, Unavailable, "no token luks is there; plug it in"),
    (module_missing, FailedPrecondition, r"/none.so is no PKCS#11 module that can be loaded"),
    (no_module, FailedPrecondition, r"libcrypt.so.1 is no PKCS#11 module that can be loaded"),
    (settings_of_another_token, FailedPrecondition, "pkcs11.json must say module and pinFile of the token luks"),
    (settings_missing, FailedPrecondition, "the settings /.*/pkcs11.json cannot be read"),
    (key_destroyed, KeyLost, "the token luks has no AES key csi"),
]


def refused(call: Callable[[], object], kind: type[DriverError], words: str) -> None:
    """The call fails with one sentence of that class, which tells the program, the KMS, and no secret."""
    with pytest.raises(DriverError, match=words) as caught:
        call()
    said = str(caught.value)
    assert type(caught.value) is kind
    assert said.startswith("the program /")
    assert "of KMS kms (exec) ended with code" in said
    assert PIN not in said
    assert "\n" not in said


@pytest.mark.parametrize(("spoil", "kind", "words"), FAULTS, ids=lambda each: getattr(each, "__name__", ""))
def test_each_fault_has_its_class_and_its_sentence(
    spoil: Callable[[SoftHsm], None], kind: type[DriverError], words: str, hsm: SoftHsm, case: Case
) -> None:
    trail = case.create()
    spoil(hsm)
    refused(case.create, kind, words)
    refused(lambda: case.fetch(trail), kind, words)
    refused(lambda: case.sources.rewrap(trail, REQUEST), kind, words)
    (one,) = case.sources.checked()
    assert one.works is False
    assert PIN not in one.found


def test_the_codes_that_callers_get() -> None:
    told = {kind: code_of(kind("")).name for _, kind, _ in FAULTS}
    assert told == {
        PermissionDenied: "PERMISSION_DENIED",
        FailedPrecondition: "FAILED_PRECONDITION",
        Unavailable: "UNAVAILABLE",
        KeyLost: "FAILED_PRECONDITION",
    }


def test_two_keys_of_one_label_wrap_nothing_and_the_right_one_unwraps(hsm: SoftHsm, case: Case) -> None:
    trail = case.create()
    key = case.fetch(trail)
    two_keys(hsm)
    refused(case.create, FailedPrecondition, "the token luks has 2 AES keys csi; give each its own label")
    assert case.fetch(trail) == key


def another_volume(trail: KeyTrail) -> KeyTrail:
    return msgspec.structs.replace(trail, name="pvc-2.0a1b2c3d.1")


def another_key(trail: KeyTrail) -> KeyTrail:
    return msgspec.structs.replace(trail, key_version="77")


def cut(length: int) -> Callable[[KeyTrail], KeyTrail]:
    def spoil(trail: KeyTrail) -> KeyTrail:
        return msgspec.structs.replace(trail, wrapped=trail.wrapped[:length])

    return spoil


def flipped(place: int) -> Callable[[KeyTrail], KeyTrail]:
    def spoil(trail: KeyTrail) -> KeyTrail:
        sealed = bytearray(base64.b64decode(trail.wrapped))
        sealed[place] ^= 1
        return msgspec.structs.replace(trail, wrapped=base64.b64encode(sealed).decode())

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (another_volume, "the token luks does not unwrap the key"),
        (another_key, "the token luks has no AES key csi with the id 77"),
        (cut(-4), "the token luks does not unwrap the key"),
        (cut(-1), "the wrapped key is none of this program, or was cut"),
        (cut(32), "the wrapped key is none of this program, or was cut"),
        (cut(0), "the wrapped key is none of this program, or was cut"),
        *((flipped(place), "the token luks does not unwrap the key") for place in (0, 12, -1)),
    ],
)
def test_what_was_damaged_or_is_anothers_does_not_unwrap(
    spoil: Callable[[KeyTrail], KeyTrail], words: str, case: Case
) -> None:
    trail = case.create()
    key = case.fetch(trail)
    refused(lambda: case.fetch(spoil(trail)), KeyLost, words)
    refused(lambda: case.sources.rewrap(spoil(trail), REQUEST), KeyLost, words)
    assert case.fetch(trail) == key


@pytest.mark.parametrize(("arguments", "asked"), [((), "{}"), ((TOKEN, KEY), "[]"), ((TOKEN, KEY), "no JSON")])
def test_what_is_no_question_of_the_drivers_is_told(hsm: SoftHsm, arguments: tuple[str, ...], asked: str) -> None:
    argv = [str(hsm.programs / "pkcs11.py"), *arguments]
    done = subprocess.run(argv, input=asked, capture_output=True, text=True, env={"PATH": os.defpath}, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
