"""The KMS configuration: found by id, read anew each time, and refused entry by entry."""

import contextlib
import gc
import json
import re
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest

from csi_driver.host.workers import Workers
from csi_driver.keys import types
from csi_driver.keys.audit import Audit
from csi_driver.keys.base import EntryReader, KeyRequest
from csi_driver.keys.config import KmsConfig
from csi_driver.keys.fields import FIELDS, unknown_fields
from csi_driver.keys.kubernetes import Kubernetes
from csi_driver.keys.secret import read_secret
from csi_driver.keys.sources import KeySources
from csi_driver.keys.types import BUILDERS
from csi_driver.keys.vault import auth_mount, joined, plain_entry
from csi_driver.model.errors import DriverError, FailedPrecondition
from csi_driver.model.volume import KeyTrail
from tests.told_lines import told_lines

NOBODY = Kubernetes("", "")


class Cluster(Kubernetes):
    """The API of a cluster that has one ConfigMap."""

    def __init__(self, data: Mapping[str, str] | None) -> None:
        super().__init__("", "")
        self.data = data

    is_here = True
    namespace = "luks-csi"

    def config_map(self, namespace: str, name: str) -> Mapping[str, str] | None:
        assert (namespace, name) == ("luks-csi", "csi-kms-connection-details")
        return self.data


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


def test_an_entry_is_found_by_its_id_and_either_name_of_its_type(file: Path) -> None:
    file.write_text('{"a": {"encryptionKMSType": "vault", "x": "1"}, "b": {"KMS_PROVIDER": "vaulttokens"}}')
    config = KmsConfig(file, NOBODY)
    assert config.entry("a") == ("vault", {"encryptionKMSType": "vault", "x": "1"})
    assert config.entry("b")[0] == "vaulttokens"
    assert config.ids() == ["a", "b"]


def test_a_change_counts_at_once(file: Path) -> None:
    file.write_text('{"a": {"encryptionKMSType": "vault"}}')
    config = KmsConfig(file, NOBODY)
    assert config.entry("a")[0] == "vault"
    file.write_text('{"a": {"encryptionKMSType": "kmip"}}')
    assert config.entry("a")[0] == "kmip"


@pytest.mark.parametrize("entry", ["null", "[]", '""', "1", "{}", '{"encryptionKMSType": ""}', '{"KMS_PROVIDER": 1}'])
def test_a_wrong_entry_is_refused_by_name_and_disturbs_no_other(file: Path, entry: str) -> None:
    file.write_text(f'{{"bad": {entry}, "good": {{"encryptionKMSType": "vault"}}}}')
    config = KmsConfig(file, NOBODY)
    with pytest.raises(FailedPrecondition, match="'bad'"):
        config.entry("bad")
    assert config.entry("good")[0] == "vault"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": ', "\xff"])
def test_a_file_that_is_no_configuration_is_told(file: Path, content: str) -> None:
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(FailedPrecondition, match=r"config\.json"):
        KmsConfig(file, NOBODY).entry("a")


def test_without_any_configuration_it_is_told_where_one_goes(file: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"no KMS is configured.*--kms-config"):
        KmsConfig(file, NOBODY).entry("a")
    assert KmsConfig(file, NOBODY).ids() == []


def test_an_unknown_id_is_told_with_the_known_ones(file: Path) -> None:
    file.write_text('{"a": {"encryptionKMSType": "vault"}}')
    with pytest.raises(FailedPrecondition, match=r"no KMS 'vault-1' in .*\(there is: a\)"):
        KmsConfig(file, NOBODY).entry("vault-1")


def test_in_a_cluster_a_config_map_serves_where_there_is_no_file(file: Path) -> None:
    data = {"a": '{"KMS_PROVIDER": "vaulttokens", "VAULT_ADDR": "https://v"}', "bad": "no json"}
    config = KmsConfig(file, Cluster(data))
    assert config.entry("a") == ("vaulttokens", {"KMS_PROVIDER": "vaulttokens", "VAULT_ADDR": "https://v"})
    with pytest.raises(FailedPrecondition, match="'bad'"):
        config.entry("bad")
    file.write_text("{}")
    with pytest.raises(FailedPrecondition, match=str(file)):
        config.entry("a")


def test_a_cluster_without_the_config_map_is_told(file: Path) -> None:
    with pytest.raises(FailedPrecondition, match="neither a file"):
        KmsConfig(file, Cluster(None)).entry("a")
    assert KmsConfig(file, Cluster(None)).ids() == []


def sources(file: Path) -> KeySources:
    return KeySources(KmsConfig(file, NOBODY), NOBODY, Workers(()), file.parent, Audit(None))


REQUEST = KeyRequest("pvc-1", "team-a", read_secret({"encryptionPassphrase": "a passphrase"}))


def test_a_type_that_nobody_knows_is_refused_with_those_that_are_known(file: Path) -> None:
    file.write_text('{"a": {"encryptionKMSType": "abacus"}}')
    with pytest.raises(FailedPrecondition, match=r"type 'abacus'.*known are aws-metadata"):
        sources(file).create("a", "n", REQUEST, "test")


@pytest.mark.parametrize("kind", sorted(set(BUILDERS) - {"metadata"}))
def test_an_entry_without_its_fields_is_refused_by_one_of_them_or_by_what_is_missing_here(
    file: Path, kind: str
) -> None:
    file.write_text(f'{{"a": {{"encryptionKMSType": "{kind}"}}}}')
    with pytest.raises(FailedPrecondition, match=r"KMS a|cluster"):
        sources(file).create("a", "n", REQUEST, "test")


def test_a_volumes_kms_must_not_become_one_of_another_type(file: Path) -> None:
    file.write_text('{"a": {"encryptionKMSType": "metadata"}}')
    made = sources(file)
    trail = made.create("a", "n", REQUEST, "test")
    file.write_text('{"a": {"encryptionKMSType": "exec", "program": "p"}}')
    with pytest.raises(FailedPrecondition, match="was of type metadata and is of type exec now"):
        made.fetch(trail, REQUEST, "test")


@pytest.mark.parametrize(
    "entry",
    [
        {"encryptionKMSType": "metadata"},
        {"encryptionKMSType": "kms-plugin", "endpoint": "unix:///nonexistent/kms.sock", "timeoutSeconds": "0.1"},
        {"encryptionKMSType": "aws-sts-metadata"},
        {"encryptionKMSType": "vaulttransit", "vaultAddress": "https://127.0.0.1:1", "vaultTransitKey": "k"},
    ],
    ids=lambda entry: entry["encryptionKMSType"],
)
def test_no_secret_of_a_request_outlives_it(file: Path, entry: dict[str, str]) -> None:
    file.write_text(json.dumps({"a": entry}))
    made = sources(file)
    request = KeyRequest("pvc-1", "team-a", read_secret({"encryptionPassphrase": "a passphrase"}))
    secret = weakref.ref(request.secret)
    with contextlib.suppress(DriverError):
        made.create("a", "n", request, "test")
    del request
    gc.collect()
    assert secret() is None
    made.close()


def test_a_source_is_kept_for_the_same_entry_and_the_same_secret_alone(file: Path) -> None:
    file.write_text('{"a": {"encryptionKMSType": "metadata"}}')
    made = sources(file)
    trail = made.create("a", "n", REQUEST, "test")
    other = KeyRequest("pvc-1", "team-a", read_secret({"encryptionPassphrase": "another one"}))
    assert made.fetch(trail, REQUEST, "test") == made.fetch(trail, REQUEST, "test")
    with pytest.raises(FailedPrecondition, match="does not unwrap"):
        made.fetch(trail, other, "test")


def test_what_nobody_foresaw_of_one_entry_hides_no_other(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('{"a": {"encryptionKMSType": "metadata"}, "b": {"encryptionKMSType": "metadata"}}')
    made, really = sources(file), KeySources.check

    def check(self: KeySources, kms_id: str) -> str:
        if kms_id == "a":
            raise AttributeError("of a passphrase")
        return really(self, kms_id)

    monkeypatch.setattr(KeySources, "check", check)
    one, other = made.checked()
    assert (one.works, one.found) == (False, "the check ended in AttributeError, which nobody foresaw")
    assert other.works is None


DOCUMENTED: Mapping[str, Mapping[str, object]] = {
    "vault": {
        "encryptionKMSType": "vault",
        "vaultAddress": "https://vault:8200",
        "vaultAuthPath": "/v1/auth/kubernetes/login",
        "vaultRole": "csi-kubernetes",
        "vaultBackend": "kv-v2",
        "vaultDestroyKeys": "true",
        "vaultPassphraseRoot": "/v1/secret",
        "vaultPassphrasePath": "ceph-csi/",
        "vaultCAVerify": "false",
    },
    "tokens": {
        "encryptionKMSType": "vaulttokens",
        "vaultAddress": "https://vault:8200",
        "vaultTLSServerName": "vault",
        "tenantConfigName": "ceph-csi-kms-config",
        "tenantTokenName": "ceph-csi-kms-token",
        "tenants": {"app": {"vaultAddress": "https://other:8200"}, "other": {"vaultDestroyKeys": "false"}},
    },
    "account": {
        "encryptionKMSType": "vaulttenantsa",
        "vaultAuthNamespace": "devops",
        "vaultNamespace": "devops/homepage",
        "tenantSAName": "ceph-csi-vault-sa",
        "tenants": {"app": {"tenantSAName": "storage-encryption-sa"}},
    },
    "rook": {
        "KMS_PROVIDER": "vaulttokens",
        "KMS_SERVICE_NAME": "vault",
        "VAULT_ADDR": "https://vault:8200",
        "VAULT_BACKEND_PATH": "secret",
        "VAULT_DESTROY_KEYS": "true",
        "VAULT_SKIP_VERIFY": "true",
    },
    "kmip": {
        "KMS_PROVIDER": "kmip",
        "KMIP_ENDPOINT": "kmip:5696",
        "TLS_SERVER_NAME": "kmip",
        "READ_TIMEOUT": 10,
        "WRITE_TIMEOUT": 10,
    },
    "ibm": {"KMS_PROVIDER": "ibmkeyprotect", "IBM_KP_SERVICE_INSTANCE_ID": "7abef064", "IBM_KP_REGION": "us-south-2"},
}
"""Entries as Ceph-CSI and Rook document them."""


@pytest.mark.parametrize("entry", DOCUMENTED.values(), ids=DOCUMENTED.keys())
def test_what_ceph_csi_documents_is_known(entry: Mapping[str, object]) -> None:
    kind = str(entry.get("encryptionKMSType", entry.get("KMS_PROVIDER")))
    assert unknown_fields(kind, entry) == []


def test_what_nobody_reads_is_told_with_what_may_be_meant() -> None:
    entry: dict[str, object] = {"encryptionKMSType": "vault", "vaultDestroyKey": "false", "42": "", "tenants": {}}
    assert unknown_fields("vault", entry) == ["42", "tenants", "vaultDestroyKey (did you mean vaultDestroyKeys?)"]
    entry = {"KMS_PROVIDER": "vaulttokens", "VAULT_DESTROY_KEY": "false"}
    assert unknown_fields("vaulttokens", entry) == ["VAULT_DESTROY_KEY (did you mean VAULT_DESTROY_KEYS?)"]
    entry = {"encryptionKMSType": "vaulttokens", "tenants": {"app": {"vaultRoot": "", "tenants": {}}, "other": "x"}}
    assert [one.partition(" ")[0] for one in unknown_fields("vaulttokens", entry)] == [
        "tenants.app.tenants",
        "tenants.app.vaultRoot",
    ]


def test_every_type_has_its_fields_and_every_field_that_is_read_is_one() -> None:
    assert FIELDS.keys() == BUILDERS.keys()
    text = "".join(path.read_text() for path in Path(types.__file__).parent.glob("*.py"))
    read = set(re.findall(r"""\breader\.(?:text|truth|seconds|texts)\(\s*"(\w+)\"""", text))
    assert len(read) > 30
    assert read <= set().union(*FIELDS.values())


def test_the_log_warns_once_of_what_nobody_reads_until_that_changes(file: Path) -> None:
    made = sources(file)
    with told_lines() as told:
        for wrong in ("secretname", "secretname", "secretNam"):
            file.write_text(json.dumps({"a": {"encryptionKMSType": "metadata", wrong: "x"}}))
            with contextlib.suppress(DriverError):
                made.check("a")
    assert [(line.level, line.event) for line in told] == [
        ("warning", "a KMS entry has fields that nobody reads"),
        ("warning", "a KMS entry has fields that nobody reads"),
    ]
    assert told[0].fields == {"kms": "a", "fields": "secretname (did you mean secretName?)"}


@pytest.mark.parametrize(
    ("path", "mount"),
    [
        ("/v1/auth/kubernetes/login", "kubernetes"),
        ("/v1/auth/a/b/login", "a/b"),
        ("auth/kubernetes/login", "kubernetes"),
        ("kubernetes", "kubernetes"),
        ("/kubernetes/", "kubernetes"),
        ("a?b", "a%3Fb"),
    ],
)
def test_an_auth_path_names_a_mount(path: str, mount: str) -> None:
    assert auth_mount(path) == mount


def test_parts_of_a_path_are_encoded_and_never_empty() -> None:
    assert joined("/secret/", "a//b", "", "pvc-1?x#y") == "secret/a/b/pvc-1%3Fx%23y"


def test_vaults_own_names_mean_the_same() -> None:
    found = plain_entry({"KMS_PROVIDER": "vaulttokens", "VAULT_ADDR": "https://v", "VAULT_SKIP_VERIFY": "true"})
    assert found == {"vaultAddress": "https://v", "vaultCAVerify": "false"}
    assert plain_entry({"encryptionKMSType": "vault", "VAULT_ADDR": "x"})["VAULT_ADDR"] == "x"


def test_fields_are_read_by_their_kind() -> None:
    reader = EntryReader(
        "KMS a (vault)", {"t": "x", "n": 1, "yes": "True", "no": False, "s": "2.5", "l": ["a"], "e": ""}
    )
    assert (reader.text("t"), reader.text("e", "d"), reader.text("absent", "d")) == ("x", "d", "d")
    assert (reader.truth("yes", default=False), reader.truth("no", default=True), reader.truth("e", default=True)) == (
        True,
        False,
        True,
    )
    assert (reader.seconds("s", 1), reader.seconds("n", 2), reader.seconds("absent", 3)) == (2.5, 1, 3)
    assert (reader.texts("l"), reader.texts("absent")) == (("a",), ())
    for wrong in (
        lambda: reader.text("n"),
        lambda: reader.text("absent"),
        lambda: reader.truth("t", default=True),
        lambda: reader.seconds("t", 1),
        lambda: reader.texts("t"),
    ):
        with pytest.raises(FailedPrecondition, match=r"KMS a \(vault\)"):
            wrong()


def test_an_empty_name_never_means_all_of_a_kind() -> None:
    with pytest.raises(FailedPrecondition, match="empty name"):
        Kubernetes("127.0.0.1", "1").secret("", "name")


@pytest.mark.parametrize(
    ("kind", "wrapped", "name"),
    [
        ("vault", "", "handle"),
        ("metadata", "wrapped", "handle"),
        ("ibmkeyprotect", "wrapped", "handle"),
        ("aws-metadata", "wrapped", ""),
        ("kmip", "wrapped", ""),
    ],
)
def test_a_key_that_ceph_csi_had_made_is_asked_for_as_that_had_it(
    tmp_path: Path, kind: str, wrapped: str, name: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"kms": {"encryptionKMSType": kind}}))
    sources = KeySources(KmsConfig(file, NOBODY), NOBODY, Workers(()), tmp_path, Audit(None))
    trail = sources.foreign("kms", "handle", wrapped, "tenant")
    assert trail == KeyTrail(kms_id="kms", type=kind, name=name, wrapped=wrapped, tenant="tenant", foreign=True)
    with pytest.raises(FailedPrecondition, match=r"there is no KMS 'another'"):
        sources.foreign("another", "handle", wrapped, "tenant")
