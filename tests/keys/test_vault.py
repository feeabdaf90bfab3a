"""What is wrong with the entry of a Vault, or with its policy there, is told by the field; at a real Vault."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from csi_driver.keys.base import EntryReader, KeySource, Wrapping
from csi_driver.keys.http import Tls
from csi_driver.keys.vault import Login, Vault, kubernetes_login
from csi_driver.keys.vault_kv import VaultKv
from csi_driver.keys.vault_transit import VaultTransit
from csi_driver.model.errors import DriverError, FailedPrecondition, KeyLost, PermissionDenied
from csi_driver.model.volume import KeyTrail
from tests.keys import servers

NAME = "pvc-1.0a1b2c3d4e5f6071"
LEAST = {
    "kv-v2": (("secret/data/csi/*", "create,read"), ("secret/metadata/csi/*", "delete")),
    "kv-v2, not for good": (("secret/data/csi/*", "create,read,delete"),),
    "kv": (("old/csi/*", "create,read,delete"),),
    "transit": tuple((f"transit/{each}/csi", "update") for each in ("encrypt", "decrypt", "rewrap")),
}
"""As docs/kms.md has them."""

pytestmark = pytest.mark.usefixtures("once")


class Made:
    """Makes sources at the Vault of the session."""

    def __init__(self, vault: servers.Vault, stack: ExitStack) -> None:
        self.server = vault
        self.stack = stack

    def vault(self, login: Login | None = None, token: str = "") -> Vault:
        reader = EntryReader("KMS kms (vault)", {"vaultAddress": self.server.address})
        made = Vault(reader, Tls(ca=self.server.ca), login or Login(token or self.server.root))
        self.stack.callback(made.close)
        return made

    def kv(self, mount: str, backend: str = "", token: str = "", **fields: str) -> VaultKv:
        reader = EntryReader("KMS kms (vault)", {"vaultBackend": backend, **fields})
        return VaultKv(self.vault(token=token), reader, mount, "csi", "vaultPassphraseRoot")

    def transit(self, key: str = "csi", mount: str = "transit", token: str = "") -> KeySource:
        reader = EntryReader("KMS kms (vaulttransit)", {"vaultTransitKey": key, "vaultTransitPath": mount})
        return Wrapping(VaultTransit(self.vault(token=token), reader))

    def names(self, path: str) -> list[str]:
        """What is below a path of Vault."""
        try:
            return list(self.server.ask("LIST", path)["data"]["keys"])
        except AssertionError as error:
            assert ": 404 " in str(error)  # noqa: PT017 - nothing is there
            return []


@pytest.fixture
def made(vault: servers.Vault) -> Iterator[Made]:
    vault.ask("POST", "transit/keys/csi", {"derived": True})
    with ExitStack() as stack:
        yield Made(vault, stack)


def refused(call: Callable[[], object], kind: type[DriverError], *words: str) -> None:
    with pytest.raises(DriverError) as caught:
        call()
    assert type(caught.value) is kind
    for each in words:
        assert each in str(caught.value)


@pytest.mark.parametrize(("mount", "backend", "there"), [("old", "kv-v2", 1), ("secret", "kv", 2)])
def test_a_version_that_is_not_the_mounts_is_refused_by_its_field(
    made: Made, mount: str, backend: str, there: int
) -> None:
    for call in (lambda: made.kv(mount, backend).create(NAME), lambda: made.kv(mount, backend).check()):
        refused(
            call,
            FailedPrecondition,
            f"the field vaultBackend of KMS kms (vault) at {made.server.address} says {backend}",
            f"at {mount} is of version {there}; correct the field, or leave it out",
        )
    trail = KeyTrail(kms_id="", type="", name=NAME)
    refused(lambda: made.kv(mount, backend).fetch(trail), FailedPrecondition, "vaultBackend")
    for path in ("old/data/csi", "old/csi", "secret/metadata/csi"):
        assert NAME not in made.names(path)


def test_what_was_put_into_a_store_of_version_1_as_if_it_were_of_2_is_found_and_destroyed(made: Made) -> None:
    made.server.ask("POST", f"old/data/csi/{NAME}", {"data": {"data": {"passphrase": "as was made once"}}})
    trail = KeyTrail(kms_id="", type="", name=NAME)
    assert made.kv("old", "kv-v2").fetch(trail).reveal() == b"as was made once"
    assert NAME in made.names("old/data/csi")
    made.kv("old", "kv-v2").destroy(trail)
    assert NAME not in made.names("old/data/csi")


def test_no_key_is_taken_for_destroyed_by_another_version(made: Made) -> None:
    trail = made.kv("secret").create(NAME)
    refused(lambda: made.kv("secret", "kv").destroy(trail), FailedPrecondition, "is of version 2")
    assert NAME in made.names("secret/metadata/csi")
    made.kv("secret").destroy(trail)
    assert NAME not in made.names("secret/metadata/csi")


def test_no_key_is_taken_for_destroyed_at_another_place(made: Made) -> None:
    trail = made.kv("secret").create(NAME)
    moved = VaultKv(made.vault(), EntryReader("KMS kms (vault)", {}), "secret", "elsewhere", "vaultPassphraseRoot")
    refused(
        lambda: moved.destroy(trail),
        FailedPrecondition,
        f"kept a key at secret/data/csi/{NAME}, and its entry says secret/data/elsewhere/{NAME} by now; it was not",
    )
    assert NAME in made.names("secret/metadata/csi")
    made.kv("secret").destroy(msgspec.structs.replace(trail, key_id=f"secret/csi/{NAME}"))  # before versions came
    assert NAME not in made.names("secret/metadata/csi")


@pytest.mark.parametrize("backend", ["kv", "kv-v2"])
def test_a_mount_that_is_not_there_is_told(made: Made, backend: str) -> None:
    for ask in (made.kv("nomount", backend).check, lambda: made.kv("nomount", backend).create(NAME)):
        refused(ask, FailedPrecondition, "has nothing mounted at nomount; correct vaultPassphraseRoot")
    refused(made.kv("nomount").check, PermissionDenied, "shows us no mount nomount", "vaultPassphraseRoot")


def test_what_is_no_key_value_store_or_a_folder_of_one_is_told(made: Made) -> None:
    refused(made.kv("transit").check, FailedPrecondition, "is of type transit and no key-value store")
    words = "is secret/team", "store is secret/", "vaultPassphrasePath"
    refused(made.kv("secret/team").check, FailedPrecondition, *words)
    made.kv("old/team").check()


def test_a_store_that_does_not_let_us_read_is_told_by_its_check(made: Made) -> None:
    token = made.server.token(("secret/data/other/*", "read"))
    refused(made.kv("secret", token=token).check, PermissionDenied, "permission denied")


def test_a_write_that_a_store_answers_by_404_has_its_sentence(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a Vault that does not say what is mounted."""
    monkeypatch.setattr(VaultKv, "_asked_version", lambda _: None)
    refused(
        lambda: made.kv("secret", "kv").create(NAME),
        FailedPrecondition,
        f"takes no key at secret/csi/{NAME} (HTTP 404); correct vaultBackend, which is version 1 here",
    )


@pytest.mark.parametrize(("key", "mount"), [("nokey", "transit"), ("csi", "nomount")])
def test_a_transit_key_or_engine_that_is_not_there_is_known_and_none_is_made(made: Made, key: str, mount: str) -> None:
    keys = made.names("transit/keys")
    refused(made.transit(key, mount).check, KeyLost, f"no transit engine at {mount} or no key {key}")
    assert made.names("transit/keys") == keys


def test_a_transit_key_that_is_not_derived_or_may_not_be_used_is_known(made: Made) -> None:
    made.server.ask("POST", "transit/keys/plain", {})
    refused(made.transit("plain").check, FailedPrecondition, "is no derived one")
    token = made.server.token(("transit/decrypt/csi", "update"))
    refused(made.transit(token=token).check, PermissionDenied, "refuses (HTTP 403)")
    assert "the key csi at transit wraps and unwraps, in version 1" in made.transit().check()


@pytest.mark.parametrize("what", LEAST)
def test_the_least_policy_is_enough_and_less_is_not(made: Made, what: str) -> None:
    def source(*rules: tuple[str, str]) -> KeySource:
        token = made.server.token(*rules)
        if what == "transit":
            return made.transit(token=token)
        for_good = {"vaultDestroyKeys": str("not" not in what).lower()}
        return made.kv("old" if what == "kv" else "secret", token=token, **for_good)

    def life(source: KeySource, name: str) -> None:
        source.check()
        trail = source.create(name)
        assert source.fetch(source.rewrap(trail)) == source.fetch(trail)
        source.destroy(trail)

    life(source(*LEAST[what]), f"{NAME}-{len(what)}")
    for rule, may in LEAST[what]:
        others = tuple(each for each in LEAST[what] if each[0] != rule)
        for each in may.split(","):
            rest = ",".join(one for one in may.split(",") if one != each)
            with pytest.raises(PermissionDenied):
                life(source(*others, *([(rule, rest)] if rest else [])), f"{NAME}-{len(what)}-{each}")


def test_the_least_policies_are_the_documents() -> None:
    lines = (Path(__file__).parents[2] / "docs/kms.md").read_text().splitlines()
    for rules in LEAST.values():
        for path, may in rules:
            mount, _, rest = path.partition("/")
            rest = rest.replace("/csi", "/KEY") if mount == "transit" else rest.replace("csi", "FOLDER")
            shown = f"`MOUNT/{rest}`"
            (line,) = [each for each in lines if shown in each]
            for each in may.split(","):
                assert f"`{each}`" in line


def test_a_login_that_is_refused_names_role_and_path(made: Made, vault: servers.Vault) -> None:
    vault.ask("POST", "sys/auth/lab", {"type": "kubernetes"})
    vault.ask("POST", "auth/lab/config", {"kubernetes_host": "https://127.0.0.1:1", "kubernetes_ca_cert": vault.ca})
    for path, kind in (("/v1/auth/lab/login", FailedPrecondition), ("/v1/auth/nope/login", PermissionDenied)):
        reader = EntryReader("KMS kms (vault)", {"vaultAuthPath": path, "vaultRole": "no-such-role"})
        login = kubernetes_login(reader, None, lambda: "a.b.c")
        with pytest.raises(kind) as caught:
            made.vault(login).log_in()
        assert f"refuses the login as role no-such-role at {path.removeprefix('/v1/')}" in str(caught.value)
        assert "correct vaultRole or vaultAuthPath" in str(caught.value)


def test_a_login_that_is_refused_is_not_tried_again_for_the_mount(made: Made) -> None:
    asked = []

    def document() -> dict[str, str]:
        asked.append(1)
        return {"role": "r", "jwt": "j"}

    login = Login(path="auth/nope/login", document=document, role="r")
    source = VaultKv(made.vault(login), EntryReader("KMS kms", {"vaultBackend": "kv-v2"}), "secret", "csi")
    refused(lambda: source.create(NAME), PermissionDenied, "refuses the login as role r")
    assert len(asked) == 1


def test_a_key_is_announced_right_before_it_is_kept(made: Made) -> None:
    name, told = f"{NAME}-announced", []

    def announce() -> None:
        told.append(name in made.names("secret/metadata/csi"))

    for _ in range(2):
        made.kv("secret").create(name, announce)
    assert told == [False]  # the second time it is there


def test_a_name_that_was_left_out_is_asked_for(made: Made) -> None:
    trail = KeyTrail(kms_id="", type="", name="")
    refused(lambda: made.kv("secret").fetch(trail), FailedPrecondition, "--kms-name")
