"""What admission decides, over a cluster in memory: the wire format, secrets, classes, rights, who uses what."""

import base64
import json
from collections.abc import Mapping
from typing import Any

import pytest

from csi_driver.kube.kinds import (
    BACKING_IMAGE,
    CLAIM,
    IMAGE,
    NAMESPACE,
    SECRET,
    STORAGE_CLASS,
    VIRTUAL_MACHINE_IMAGE,
    VOLUME,
    Json,
    Kind,
)
from csi_driver.kube.users import User
from csi_driver.model.errors import CommandFailed, DriverError, FailedPrecondition, InvalidArgument, PermissionDenied
from csi_driver.operator.admission import machine_images, needs, review
from csi_driver.operator.admission.admission import Admission
from csi_driver.operator.admission.classes import ClassRules
from csi_driver.operator.admission.images import ImageRules
from csi_driver.operator.admission.lookups import ApiCluster
from csi_driver.operator.admission.review import Request, Verdict
from csi_driver.operator.admission.secrets import SecretRules, check_content
from csi_driver.operator.admission.tally import Tally
from csi_driver.operator.class_parameters import secret_keys
from csi_driver.operator.settings import OperatorSettings, Profile
from csi_driver.operator.users import (
    claim_kept,
    named,
    secrets_kept,
    secrets_of_image,
    users_of_secret,
    waiting_claims,
)

DRIVER = "luks.csi.internal"
OPERATOR = "system:serviceaccount:luks-csi:luks-csi-operator"
VALUE = "a passphrase that nobody may see"


class MemoryCluster:
    """Objects by kind, namespace and name; `may` are those that the user may read."""

    def __init__(self) -> None:
        self.things: dict[tuple[Kind, str, str], Json] = {}
        self.may: set[tuple[str, str, str]] = set()

    def put(self, kind: Kind, thing: Json, namespace: str = "") -> Json:
        metadata = {"uid": "1", **thing["metadata"]} | ({"namespace": namespace} if namespace else {})
        made = {**thing, "metadata": metadata}
        self.things[kind, namespace, metadata["name"]] = made
        return made

    def get(self, kind: Kind, name: str, namespace: str = "") -> Json | None:
        return self.things.get((kind, namespace, name))

    def all(self, kind: Kind) -> list[Json]:
        return [thing for (of, _, _), thing in self.things.items() if of == kind]

    def may_do(self, _user: User, verb: str, kind: Kind, name: str, namespace: str = "") -> bool:
        return (kind.name if verb == "get" else f"{verb} {kind.name}", namespace, name) in self.may


@pytest.fixture
def cluster() -> MemoryCluster:
    return MemoryCluster()


def asked(
    kind: Kind,
    thing: Json | None = None,
    old: Json | None = None,
    *,
    name: str = "it",
    namespace: str = "",
    user: str = "alice",
) -> Request:
    operation = "DELETE" if thing is None else "CREATE" if old is None else "UPDATE"
    resource = f"{kind.plural}.{kind.group}".rstrip(".")
    return Request("u", operation, resource, name, namespace, User(user, {"user": user}), thing, old)


def secret(notes: Mapping[str, str] | None = None, /, **entries: str) -> Json:
    data = {key: base64.b64encode(value.encode()).decode() for key, value in entries.items()}
    return {"metadata": {"name": "it", "annotations": dict(notes or {})}, "data": data}


def encrypted(name: str = "it", namespace: str = "team", **more: str) -> Json:
    prefix = "csi.storage.k8s.io/node-stage-secret"
    return {"encrypted": "true", f"{prefix}-name": name, f"{prefix}-namespace": namespace, **more}


def storage_class(parameters: Json, name: str = "c", provisioner: str = DRIVER, **more: object) -> Json:
    return {"metadata": {"name": name, **more}, "provisioner": provisioner, "parameters": parameters}


# The wire.

DOCUMENT: Json = {
    "apiVersion": "admission.k8s.io/v1",
    "kind": "AdmissionReview",
    "request": {
        "uid": "u1", "operation": "DELETE", "name": "", "namespace": "team",
        "resource": {"group": "", "version": "v1", "resource": "secrets"},
        "userInfo": {"username": "alice", "groups": ["a"], "uid": "7", "extra": {"x": ["y"]}},
        "object": None, "oldObject": {"metadata": {"name": "key"}, "data": {"x": VALUE}},
    },
}  # fmt: skip


def document(**changes: object) -> bytes:
    return json.dumps({**DOCUMENT, "request": {**DOCUMENT["request"], **changes}}).encode()


def test_of_a_deleted_collection_the_name_is_in_the_object() -> None:
    request = review.read(document())
    assert (request.name, request.namespace, request.resource) == ("key", "team", "secrets")
    assert request.user == User("alice", {"user": "alice", "groups": ["a"], "uid": "7", "extra": {"x": ["y"]}})
    assert VALUE not in repr(request)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"nonsense", b"[]", b"null", b"{}", b'{"request": 1}', b"\xff", b"[" * 100_000,
        json.dumps({**DOCUMENT, "apiVersion": "admission.k8s.io/v1beta1"}).encode(),
        document(uid=1), document(resource=None), document(oldObject=None), document(oldObject=7),
        document(userInfo=3), document(oldObject={"metadata": []}), document(namespace={"a": "b"}),
    ],
)  # fmt: skip
def test_what_is_no_review_is_told_so(body: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"AdmissionReview"):
        review.read(body)


def test_answers_have_codes_warnings_and_patches() -> None:
    request = review.read(document())
    allowed = json.loads(review.allow(request, Verdict(["w" * 400], [{"op": "add"}])))["response"]
    assert allowed.pop("warnings") == ["w" * 250]
    assert json.loads(base64.b64decode(allowed.pop("patch"))) == [{"op": "add"}]
    assert allowed == {"uid": "u1", "allowed": True, "patchType": "JSONPatch"}
    for error, code, reason in (
        (InvalidArgument("no"), 422, "Invalid"),
        (PermissionDenied("no"), 403, "Forbidden"),
        (FailedPrecondition("no"), 403, "Forbidden"),
    ):
        status = {"code": code, "reason": reason, "message": "no"}
        refused = json.loads(review.refuse(request, error))
        assert refused["response"] == {"uid": "u1", "allowed": False, "status": status}
        assert (refused["apiVersion"], refused["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")


# What a secret holds.


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({}, "it holds neither CRYPTO_KEY_VALUE nor encryptionPassphrase"),
        ({"CRYPTO_KEY_VALUE": ""}, "CRYPTO_KEY_VALUE is empty; put the passphrase there"),
        (
            {"CRYPTO_KEY_VALUE": VALUE, "encryptionPassphrase": "b"},
            "CRYPTO_KEY_VALUE and encryptionPassphrase disagree",
        ),
        ({"CRYPTO_KEY_VALUE": VALUE, "CRYPTO_KEY_PROVIDER": "vault"}, "names a key provider that does not exist"),
        ({"CRYPTO_KEY_VALUE": VALUE, "CRYPTO_KEY_CIPHER": VALUE}, "CRYPTO_KEY_CIPHER is wrong; it must be one of aes-"),
        ({"CRYPTO_KEY_VALUE": VALUE, "CRYPTO_KEY_HASH": "md5"}, "must be one of sha256, sha384, sha512"),
        ({"CRYPTO_KEY_VALUE": VALUE, "CRYPTO_KEY_SIZE": "1024"}, "must be a whole number from 128 to 512"),
        ({"CRYPTO_KEY_VALUE": VALUE, "CRYPTO_KEY_SIZE": "128"}, "the secret's wishes count here too"),
        ({"CRYPTO_KEY_VALUE": VALUE, "CRYPTO_PBKDF": "scrypt"}, "must be one of argon2id, argon2i, pbkdf2"),
    ],
)
def test_what_nothing_can_be_encrypted_with_is_refused(entries: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_content(secret(**entries), ("team", "it"))
    assert str(caught.value).startswith("the secret team/it cannot be used: ")
    assert words in str(caught.value)
    assert VALUE not in str(caught.value)


@pytest.mark.parametrize("data", [{"CRYPTO_KEY_VALUE": "/w=="}, {"CRYPTO_KEY_VALUE": "no base64"}])
def test_a_passphrase_is_text(data: Json) -> None:
    with pytest.raises(InvalidArgument, match="CRYPTO_KEY_VALUE is no text in UTF-8"):
        check_content({"metadata": {"name": "it"}, "data": data}, ("team", "it"))


@pytest.mark.parametrize(
    "entries",
    [
        {"CRYPTO_KEY_VALUE": VALUE},
        {"encryptionPassphrase": VALUE, "userID": "ceph"},
        {
            "CRYPTO_KEY_VALUE": VALUE, "CRYPTO_KEY_PROVIDER": "secret", "CRYPTO_KEY_CIPHER": "aes-xts-plain64",
            "CRYPTO_KEY_HASH": "sha256", "CRYPTO_KEY_SIZE": "256", "CRYPTO_PBKDF": "argon2i",
        },
    ],
)  # fmt: skip
def test_the_secrets_of_the_documents_are_good(entries: dict[str, str]) -> None:
    check_content(secret(**entries), ("team", "it"))


# Who must not lose it.


@pytest.fixture
def rules(cluster: MemoryCluster) -> SecretRules:
    cluster.put(STORAGE_CLASS, storage_class(encrypted()))
    cluster.put(NAMESPACE, {"metadata": {"name": "team"}})
    return SecretRules(cluster, DRIVER)


def changed(old: Json, new: Json) -> Request:
    return asked(SECRET, new, old, namespace="team")


OLD = secret(CRYPTO_KEY_VALUE=VALUE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (OLD, secret(CRYPTO_KEY_VALUE=VALUE, CRYPTO_KEY_SIZE="512")),
        (OLD, secret(encryptionPassphrase=VALUE)),
        (OLD, secret(CRYPTO_KEY_VALUE="new", CRYPTO_KEY_VALUE_PREVIOUS=VALUE)),
        (OLD, secret({"luks.csi.internal/allow-key-loss": "true"}, CRYPTO_KEY_VALUE="new")),
        (secret(), OLD),
        (secret(CRYPTO_KEY_VALUE=""), OLD),
    ],
)
def test_a_change_that_loses_nothing_passes(rules: SecretRules, old: Json, new: Json) -> None:
    assert rules.review(changed(old, new)) == Verdict([])


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (
            secret(CRYPTO_KEY_VALUE="new"),
            "a new passphrase would make their data unreadable; keep the old one as CRYPTO",
        ),
        (secret(CRYPTO_KEY_VALUE_PREVIOUS=VALUE), "without its passphrase their data cannot be read"),
        (secret(), "a new passphrase would make their data unreadable"),
        (secret(CRYPTO_KEY_VALUE=""), "it could be read no more: the secret's entry CRYPTO_KEY_VALUE is empty"),
        (secret(CRYPTO_KEY_VALUE=VALUE, encryptionPassphrase="b"), "it could be read no more: the secret's entries"),
        (secret({"luks.csi.internal/allow-key-loss": "yes"}, CRYPTO_KEY_VALUE="new"), "annotate the secret with"),
    ],
)
def test_a_change_that_loses_a_passphrase_is_refused(rules: SecretRules, new: Json, words: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        rules.review(changed(OLD, new))
    assert words in str(caught.value)
    assert VALUE not in str(caught.value)


_TWO = secret(CRYPTO_KEY_VALUE=VALUE, encryptionPassphrase="other")
_ODD = secret(CRYPTO_KEY_VALUE=VALUE, CRYPTO_KEY_PROVIDER="sercet")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (_TWO, secret(CRYPTO_KEY_VALUE="new")),
        (_TWO, OLD),
        (_TWO, secret(encryptionPassphrase="other")),
        (_ODD, secret(CRYPTO_KEY_VALUE="new")),
        (_ODD, secret(CRYPTO_KEY_VALUE="new", CRYPTO_KEY_PROVIDER="sercet")),
        (_ODD, secret()),
    ],
)
def test_no_passphrase_goes_of_a_secret_that_cannot_be_read(rules: SecretRules, old: Json, new: Json) -> None:
    """Its volumes may have been made before it became so."""
    with pytest.raises(FailedPrecondition, match=r"may be what opens them, .*keep that one too, as CRYPTO") as caught:
        rules.review(changed(old, new))
    assert VALUE not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (_TWO, secret(CRYPTO_KEY_VALUE=VALUE, CRYPTO_KEY_VALUE_PREVIOUS="other")),
        (_TWO, secret({"luks.csi.internal/allow-key-loss": "true"}, CRYPTO_KEY_VALUE=VALUE)),
        (_ODD, OLD),
    ],
)
def test_such_a_secret_is_mended_with_all_of_them(rules: SecretRules, old: Json, new: Json) -> None:
    assert rules.review(changed(old, new)) == Verdict([])


def test_a_good_secret_is_not_made_a_bad_one(rules: SecretRules) -> None:
    with pytest.raises(
        InvalidArgument, match="the secret team/it cannot be used: the secret's entry CRYPTO_KEY_CIPHER"
    ):
        rules.review(changed(OLD, secret(CRYPTO_KEY_VALUE=VALUE, CRYPTO_KEY_CIPHER="bogus")))
    bad = secret(CRYPTO_KEY_VALUE=VALUE, CRYPTO_KEY_CIPHER="bogus")
    assert rules.review(changed(bad, secret(CRYPTO_KEY_VALUE=VALUE, CRYPTO_KEY_CIPHER="worse"))).warnings


def test_what_will_be_missed_later_is_a_warning(rules: SecretRules) -> None:
    before = secret(CRYPTO_KEY_VALUE=VALUE, CRYPTO_KEY_VALUE_PREVIOUS="old")
    said = rules.review(changed(before, OLD)).warnings
    assert said == [
        "what was not opened since secret team/it was last changed needs the CRYPTO_KEY_VALUE_PREVIOUS that goes"
    ]
    (said_of_new,) = rules.review(
        asked(SECRET, secret(CRYPTO_KEY_VALUE=VALUE, CRYPTO_PBKDF="x"), namespace="team")
    ).warnings
    assert "the secret's entry CRYPTO_PBKDF is wrong" in said_of_new


@pytest.mark.parametrize(
    ("kind", "thing"),
    [
        (STORAGE_CLASS, storage_class(encrypted(), provisioner="example.org")),
        (STORAGE_CLASS, storage_class({**encrypted(), "encrypted": "false"})),
        (STORAGE_CLASS, storage_class(encrypted("${pvc.name}"))),
        (STORAGE_CLASS, storage_class(encrypted(namespace="other"))),
        (IMAGE, {"metadata": {"name": "a"}, "spec": {}, "status": {"phase": "Ready", "encrypted": False}}),
        (VOLUME, {"metadata": {"name": "a"}, "spec": {"hostPath": {}}}),
        (
            VOLUME,
            {
                "metadata": {"name": "a"},
                "spec": {"csi": {"driver": "other", "nodeStageSecretRef": {"name": "it", "namespace": "team"}}},
            },
        ),
    ],
)
def test_a_secret_that_nobody_of_ours_needs_goes(cluster: MemoryCluster, kind: Kind, thing: Json) -> None:
    cluster.put(kind, thing)
    assert SecretRules(cluster, DRIVER).review(asked(SECRET, None, OLD, namespace="team")) == Verdict()


def test_a_volume_keeps_the_secret_that_its_deletion_needs(cluster: MemoryCluster) -> None:
    stem = "volume.kubernetes.io/provisioner-deletion-secret"
    notes = {"annotations": {f"{stem}-name": "it", f"{stem}-namespace": "team"}}
    cluster.put(VOLUME, {"metadata": {"name": "pv", **notes}, "spec": {"csi": {"driver": DRIVER}}})
    with pytest.raises(FailedPrecondition, match="is used by PersistentVolume pv"):
        SecretRules(cluster, DRIVER).review(asked(SECRET, None, OLD, namespace="team"))


def test_what_is_kept_of_volumes_and_claims_is_enough() -> None:
    notes = {"volume.kubernetes.io/provisioner-deletion-secret-name": "b", "other": "x"}
    csi = {"driver": DRIVER, "volumeHandle": "h", "nodeExpandSecretRef": {"name": "a", "namespace": "n"}}
    named = {"name": "pv", "resourceVersion": "7", "uid": "u"}
    volume = {"metadata": {**named, "annotations": notes}, "spec": {"csi": csi, "capacity": {}}}
    kept = secrets_kept(volume)
    assert kept["metadata"]["resourceVersion"] == "7"
    assert "other" not in kept["metadata"]["annotations"]
    for place in (("n", "a"), ("", "b")):
        assert users_of_secret(place, DRIVER, [], [], [kept]) == ["PersistentVolume pv"]
    assert secrets_kept({"metadata": named, "spec": {"hostPath": {}}})["spec"] == {"csi": {}}
    claim: dict[str, Any] = {
        "metadata": {"name": "c", "namespace": "n"},
        "spec": {"storageClassName": "s", "resources": {}},
    }
    classes = [storage_class({}, "s")]
    assert waiting_claims(classes, [claim_kept(claim)]) == ["claim n/c waits for a volume of it"]
    claim["spec"]["volumeName"] = "pv"
    assert waiting_claims(classes, [claim_kept(claim)]) == []


def test_an_image_needs_what_was_verified_to_open_it() -> None:
    spec = {"secretRef": {"name": "a", "namespace": "n"}, "newSecretRef": {"name": "b", "namespace": "n"}}
    image: Json = {"metadata": {"name": "i"}, "spec": spec}
    assert secrets_of_image(image) == [("n", "a"), ("n", "b")]
    image["status"] = {"phase": "Failed"}
    assert secrets_of_image(image) == [], "a secret that was wrong can be put right"
    for phase in ("Ready", "Pending", "Failed"):  # its node may be away for a while
        image["status"] = {"phase": phase, "virtualSize": 1, "encrypted": True, "secret": "n/b"}
        assert secrets_of_image(image) == [("n", "b")]
        image["status"] = {"phase": phase, "virtualSize": 1, "encrypted": False}
        assert secrets_of_image(image) == []


def test_the_passphrase_that_may_open_an_image_stays(cluster: MemoryCluster, rules: SecretRules) -> None:
    status = {"phase": "Ready", "virtualSize": 1, "encrypted": True, "secret": "team/it"}
    cluster.put(IMAGE, {"metadata": {"name": "i"}, "spec": {}, "status": status})
    before = secret(CRYPTO_KEY_VALUE=VALUE, CRYPTO_KEY_VALUE_PREVIOUS="old")
    with pytest.raises(
        FailedPrecondition, match=r"used by Image i, and the CRYPTO_KEY_VALUE_PREVIOUS that goes may be"
    ):
        rules.review(changed(before, OLD))
    allowed = secret({"luks.csi.internal/allow-key-loss": "true"}, CRYPTO_KEY_VALUE=VALUE)
    assert rules.review(changed(before, allowed)).warnings


def test_of_very_many_users_some_are_named() -> None:
    assert named(["a", "b"]) == "a, b"
    assert named([*"abcdefg"]) == "a, b, c, d, e and 2 more"


# Classes.


@pytest.mark.parametrize(
    ("name", "namespace", "good"),
    [
        ("${pvc.name}", "${pvc.namespace}", True),
        ("key-${pvc.name}-${pv.name}", "keys", True),
        ("${pvc.annotations['example.org/key']}", "${pv.name}", True),
        ("${pvc.annotations[key]}", "keys", False),
        ("key", "${pvc.name}", False),
        ("${pvc.name", "keys", False),
        ("$${pvc.name}", "keys", False),
        ("${}", "keys", False),
    ],
)
def test_what_is_filled_in_is_checked_for_form(cluster: MemoryCluster, name: str, namespace: str, good: bool) -> None:  # noqa: FBT001
    rules = ClassRules(cluster, OperatorSettings())
    request = asked(STORAGE_CLASS, storage_class(encrypted(name, namespace)))
    if good:
        assert rules.review(request) == Verdict([])
    else:
        with pytest.raises(InvalidArgument, match="are filled in"):
            rules.review(request)


def test_an_encrypted_class_without_a_secret_is_a_warning(cluster: MemoryCluster) -> None:
    rules = ClassRules(cluster, OperatorSettings())
    said = rules.review(asked(STORAGE_CLASS, storage_class({"encrypted": "true"}))).warnings
    assert said == ["the StorageClass it names no secret for node-stage, which opens its volumes"]


@pytest.mark.parametrize("parameters", [{}, {"encrypted": "false"}, {"encrypted": "true", "generateKey": "true"}])
def test_a_class_without_a_secrets_passphrase_needs_none(cluster: MemoryCluster, parameters: Json) -> None:
    rules = ClassRules(cluster, OperatorSettings(profile=Profile.HARVESTER))
    assert rules.review(asked(STORAGE_CLASS, storage_class(parameters))) == Verdict([])


def test_all_operations_of_a_class_have_one_secret(cluster: MemoryCluster) -> None:
    rules = ClassRules(cluster, OperatorSettings())
    prefix = "csi.storage.k8s.io/node-expand-secret"
    other = {f"{prefix}-name": "b", f"{prefix}-namespace": "team"}
    with pytest.raises(InvalidArgument, match="the secrets of StorageClass it differ: team/a, team/b; all of its"):
        rules.review(asked(STORAGE_CLASS, storage_class(encrypted("a", **other))))


def test_a_class_of_an_image_that_is_gone_goes(cluster: MemoryCluster) -> None:
    rules = ClassRules(cluster, OperatorSettings())
    note = {"images.luks.csi.internal/origin": "VirtualMachineImage/team/m/7"}
    request = asked(STORAGE_CLASS, None, storage_class({}, annotations=note))
    assert rules.review(request) == Verdict()
    cluster.put(VIRTUAL_MACHINE_IMAGE, {"metadata": {"name": "m", "uid": "8"}}, "team")  # another one
    assert rules.review(request) == Verdict()
    cluster.put(VIRTUAL_MACHINE_IMAGE, {"metadata": {"name": "m", "uid": "7"}}, "team")
    with pytest.raises(FailedPrecondition, match="is used by VirtualMachineImage team/m"):
        rules.review(request)


# Rights.


def test_a_backing_image_clones_backing_images_alone(cluster: MemoryCluster) -> None:
    """The right to the BackingImage that is named is none to an Image that has its name."""
    backing: Json = {
        "metadata": {"name": "b", "namespace": "lh"},
        "spec": {"sourceType": "clone", "sourceParameters": {"backing-image": "s", "encryption": "decrypt"}},
    }
    backing["spec"]["sourceParameters"] |= {"secret": "a", "secret-namespace": "n"}
    assert list(map(str, needs.of_backing_image(backing, cluster))) == [
        "get of Secret n/a", "get of BackingImage lh/s",
    ]  # fmt: skip
    cluster.may |= {("BackingImage", "lh", "s"), ("Secret", "n", "a")}
    request = asked(BACKING_IMAGE, backing, namespace="lh")
    for origin in (None, "BackingImage/lh/other/1", "BackingImage/elsewhere/s/1", "VirtualMachineImage/lh/s/1"):
        notes = {"images.luks.csi.internal/origin": origin} if origin else {}
        image = {"metadata": {"name": "s", "annotations": notes}, "status": {"encrypted": False}}
        cluster.put(IMAGE, image)
        with pytest.raises(InvalidArgument, match="the Image s stands for no BackingImage of namespace lh"):
            image_rules(cluster, "lh").review(request)
    notes = {"images.luks.csi.internal/origin": "BackingImage/lh/s/1"}
    cluster.put(IMAGE, {"metadata": {"name": "s", "annotations": notes}, "status": {"encrypted": False}})
    with pytest.raises(InvalidArgument, match="image s is not encrypted"):
        image_rules(cluster, "lh").review(request)


def test_a_backing_image_that_nobody_looks_after_is_refused(cluster: MemoryCluster) -> None:
    backing: Json = {"metadata": {"name": "b"}, "spec": {"sourceType": "download", "sourceParameters": {}}}
    with pytest.raises(
        InvalidArgument, match="namespace default are looked after by nobody; make it in longhorn-system"
    ):
        image_rules(cluster).review(asked(BACKING_IMAGE, backing, namespace="default"))
    assert not image_rules(cluster).review(asked(BACKING_IMAGE, backing, namespace="longhorn-system")).warnings


@pytest.mark.parametrize(("namespace", "count"), [("luks-csi", 1), ("kube-system", 1), ("vms", 0)])
def test_a_secret_that_is_never_reviewed_is_warned_of(cluster: MemoryCluster, namespace: str, count: int) -> None:
    cluster.put(SECRET, secret(CRYPTO_KEY_VALUE="x"), namespace)
    cluster.may.add(("Secret", namespace, "it"))
    place = {"name": "it", "namespace": namespace}
    image: Json = {"metadata": {"name": "i"}, "spec": {"source": {"upload": {}}, "secretRef": place}}
    said = image_rules(cluster).review(asked(IMAGE, image)).warnings
    assert [f"nobody keeps the secret {namespace}/it from being deleted" in each for each in said] == [True] * count
    request = asked(STORAGE_CLASS, storage_class(encrypted(namespace=namespace)))
    assert list(ClassRules(cluster, OperatorSettings()).review(request).warnings) == list(said)


@pytest.mark.parametrize(
    ("told", "said", "words"),
    [
        (False, "true", 'the Image i is not encrypted and StorageClass it says encrypted "true"'),
        (True, "false", 'the Image i is encrypted and StorageClass it says encrypted "false"'),
        (True, None, 'the Image i is encrypted and StorageClass it says encrypted "false"'),
        (False, "false", ""),
        (True, "true", ""),
        (None, "true", ""),
    ],
)
def test_a_class_unlike_its_image_is_warned_of(
    cluster: MemoryCluster,
    told: bool | None,  # noqa: FBT001
    said: str | None,
    words: str,
) -> None:
    parameters = (encrypted() if said == "true" else {} if said is None else {"encrypted": said}) | {
        "backingImage": "i"
    }
    request = asked(STORAGE_CLASS, storage_class(parameters))
    cluster.put(SECRET, secret(CRYPTO_KEY_VALUE="x"), "team")
    found = ClassRules(cluster, OperatorSettings()).review(request).warnings
    assert "there is no Image i, which StorageClass it names" in found[0]
    status = {} if told is None else {"encrypted": told}
    cluster.put(IMAGE, {"metadata": {"name": "i"}, "status": status})
    found = ClassRules(cluster, OperatorSettings()).review(request).warnings
    assert [words in each for each in found] == [True] * bool(words)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"encrypted": True, "secret": "team/other"}, "was verified to open with the secret team/other and"),
        ({"encrypted": True, "secret": "team/it"}, ""),
        ({"phase": "Failed", "message": "no route"}, "has failed: no route"),
    ],
)
def test_a_class_that_no_volume_can_be_made_by_is_warned_of(cluster: MemoryCluster, status: Json, words: str) -> None:
    cluster.put(SECRET, secret(CRYPTO_KEY_VALUE="x"), "team")
    cluster.put(IMAGE, {"metadata": {"name": "i"}, "status": status})
    request = asked(STORAGE_CLASS, storage_class(encrypted(backingImage="i")))
    found = ClassRules(cluster, OperatorSettings()).review(request).warnings
    assert [words in each for each in found] == [True] * bool(words)


def test_an_exported_volume_is_its_claims(cluster: MemoryCluster) -> None:
    backing: Json = {"metadata": {"name": "b"}, "spec": {"sourceType": "export-from-volume", "sourceParameters": {}}}
    assert list(map(str, needs.of_backing_image(backing, cluster))) == [
        "get of every PersistentVolumeClaim", "create of Pods",
    ]  # fmt: skip
    backing["spec"]["sourceParameters"] = {"volume-name": "pv"}
    cluster.put(VOLUME, {"metadata": {"name": "pv"}, "spec": {"claimRef": {"name": "c", "namespace": "n"}}})
    assert list(map(str, needs.of_backing_image(backing, cluster))) == [
        "get of PersistentVolumeClaim n/c", "create of Pods of namespace n",
    ]  # fmt: skip


def test_who_decrypts_a_machine_image_must_know_its_secret(cluster: MemoryCluster) -> None:
    security = {"cryptoOperation": "decrypt", "sourceImageName": "s", "sourceImageNamespace": "team"}
    machine: Json = {"metadata": {"name": "m"}, "spec": {"sourceType": "clone", "securityParameters": security}}
    source: Json = {"metadata": {"name": "s"}, "spec": {"storageClassParameters": encrypted("key", "vault")}}

    def found(of: Json | None) -> list[str]:
        return list(map(str, needs.of_machine_image(machine, of, cluster)))

    assert found(None) == ["get of VirtualMachineImage team/s", "get of every Secret"]
    assert found(source) == ["get of VirtualMachineImage team/s", "get of Secret vault/key"]
    security["cryptoOperation"] = "encrypt"
    assert found(source) == ["get of VirtualMachineImage team/s"]
    machine["metadata"]["annotations"] = {"harvesterhci.io/storageClassName": "c"}
    cluster.put(STORAGE_CLASS, storage_class(encrypted("key", "team")))
    assert found(source) == ["get of Secret team/key", "get of VirtualMachineImage team/s"]


@pytest.mark.parametrize(
    ("namespace", "name", "needed"),
    [
        ("${pvc.namespace}", "key", []),
        ("${pvc.namespace}", "${pvc.annotations['key']}", []),
        ("vault", "${pvc.name}", ["get of every Secret of namespace vault"]),
        ("vault", "${pvc.annotations['key']}", ["get of every Secret of namespace vault"]),
        ("${pv.name}", "key", ["get of every Secret"]),
        ("${pvc.namespace}-vault", "key", ["get of every Secret"]),
    ],
)
def test_a_class_that_lets_claims_choose_a_secret_gives_no_more_than_its_maker_may_read(
    cluster: MemoryCluster, namespace: str, name: str, needed: list[str]
) -> None:
    parameters = encrypted(name, namespace)
    machine: Json = {
        "metadata": {"name": "m"},
        "spec": {"sourceType": "download", "storageClassParameters": parameters},
    }
    assert list(map(str, needs.of_machine_image(machine, None, cluster))) == needed
    machine["spec"]["storageClassParameters"] = {}
    machine["metadata"]["annotations"] = {"harvesterhci.io/storageClassName": "c"}
    cluster.put(STORAGE_CLASS, storage_class(parameters))
    assert list(map(str, needs.of_machine_image(machine, None, cluster))) == needed


def test_who_may_look_at_a_claim_and_have_no_pod_beside_it_has_no_image_made_of_it(cluster: MemoryCluster) -> None:
    claim = {"source": {"claim": {"name": "c", "namespace": "n"}}}
    asking = asked(IMAGE, {"metadata": {"name": "it"}, "spec": claim})
    cluster.may = {("PersistentVolumeClaim", "n", "c")}
    with pytest.raises(PermissionDenied, match=r"a role must allow create of Pods of namespace n$"):
        image_rules(cluster).review(asking)
    cluster.may.add(("create Pod", "n", ""))
    assert not image_rules(cluster).review(asking).warnings


def image_rules(cluster: MemoryCluster, namespace: str = "longhorn-system") -> ImageRules:
    return ImageRules(cluster, OperatorSettings(backing_image_namespace=namespace), OPERATOR)


def test_what_the_operator_does_itself_was_reviewed_before(cluster: MemoryCluster) -> None:
    image: Json = {
        "metadata": {"name": "it"},
        "spec": {"source": {"upload": {}}, "secretRef": {"name": "a", "namespace": "n"}},
    }
    with pytest.raises(PermissionDenied):
        image_rules(cluster).review(asked(IMAGE, image))
    assert image_rules(cluster).review(asked(IMAGE, image, user=OPERATOR)) == Verdict()


def test_rights_are_looked_at_before_anything_is_told(cluster: MemoryCluster) -> None:
    image: Json = {
        "metadata": {"name": "it"},
        "spec": {
            "source": {"clone": {"image": "s", "encryption": "encrypt"}}, "secretRef": {"name": "a", "namespace": "n"},
        },
    }  # fmt: skip
    cluster.put(IMAGE, {"metadata": {"name": "s"}, "status": {"encrypted": True}})
    cluster.put(SECRET, secret(), "n")
    with pytest.raises(PermissionDenied):
        image_rules(cluster).review(asked(IMAGE, image))
    cluster.may |= {("Image", "", "s"), ("Secret", "n", "a")}
    with pytest.raises(InvalidArgument, match="is encrypted already"):
        image_rules(cluster).review(asked(IMAGE, image))
    cluster.put(IMAGE, {"metadata": {"name": "s"}})  # not looked into yet
    assert image_rules(cluster).review(asked(IMAGE, image)).warnings == [
        "there is no secret n/a yet; the image waits until there is"
    ]
    cluster.things.clear()
    assert image_rules(cluster).review(asked(IMAGE, image)).warnings == [
        "there is no image s yet; it is cloned when there is",
        "there is no secret n/a yet; the image waits until there is",
    ]


def clone_of(source: str) -> Json:
    return {"source": {"clone": {"image": source}}}


def test_images_that_would_wait_for_each_other_are_refused(cluster: MemoryCluster) -> None:
    cluster.may |= {("Image", "", name) for name in "abc"}

    def make(name: str, source: str) -> Verdict:
        return image_rules(cluster).review(
            asked(IMAGE, {"metadata": {"name": name}, "spec": clone_of(source)}, name=name)
        )

    with pytest.raises(InvalidArgument, match="image a is no clone of itself; name another source"):
        make("a", "a")
    cluster.put(IMAGE, {"metadata": {"name": "b"}, "spec": clone_of("c")})
    cluster.put(IMAGE, {"metadata": {"name": "c"}, "spec": clone_of("a")})
    with pytest.raises(InvalidArgument, match="image b is itself to be cloned from a, directly or by way of others"):
        make("a", "b")
    cluster.put(IMAGE, {"metadata": {"name": "d"}, "spec": clone_of("b")})
    assert make("x", "b").warnings == []
    # What has been made needs its source no more.
    cluster.put(IMAGE, {"metadata": {"name": "c"}, "spec": clone_of("a"), "status": {"virtualSize": 1}})
    assert make("a", "b").warnings == []
    # And somebody else's circle is none of this one.
    cluster.put(IMAGE, {"metadata": {"name": "c"}, "spec": clone_of("b")})
    assert make("a", "b").warnings == []


def machine_clone(name: str, source: str, operation: str = "decrypt") -> Json:
    security = {"cryptoOperation": operation, "sourceImageName": source, "sourceImageNamespace": "team"}
    metadata = {"name": name, "namespace": "team"}
    return {"metadata": metadata, "spec": {"sourceType": "clone", "securityParameters": security}}


def test_machine_images_that_would_wait_for_each_other_are_refused(cluster: MemoryCluster) -> None:
    with pytest.raises(InvalidArgument, match="image team/a is no clone of itself; name another source"):
        machine_images.check(machine_clone("a", "a"), None, cluster, Profile.LONGHORN)
    source = cluster.put(VIRTUAL_MACHINE_IMAGE, machine_clone("b", "a"), "team")
    with pytest.raises(InvalidArgument, match="image team/b is itself to be cloned from team/a, directly or by way"):
        machine_images.check(machine_clone("a", "b"), source, cluster, Profile.LONGHORN)


def test_what_is_missing_of_a_machine_image_says_what_to_do(cluster: MemoryCluster) -> None:
    def said(machine: Json, source: Json | None = None) -> tuple[str, str]:
        """What is warned of with Longhorn's rules, and refused with Harvester's."""
        (warning,) = machine_images.check(machine, source, cluster, Profile.LONGHORN)
        with pytest.raises(InvalidArgument) as refused:
            machine_images.check(machine, source, cluster, Profile.HARVESTER)
        return warning, str(refused.value)

    late = {"metadata": {"name": "m", "annotations": {"harvesterhci.io/storageClassName": "late"}}, "spec": {}}
    missing = "there is no StorageClass late, which the annotation harvesterhci.io/storageClassName names; "
    assert said(late) == (
        f"{missing}its parameters are not taken over later; delete this image and make it anew when the class is there",
        f"{missing}make it first",
    )
    absent = (
        "source image team/alpine.iso not found; its metadata.name is wanted (kubectl -n team get vmimages), not its "
        "displayName"
    )
    assert said(machine_clone("m", "alpine.iso")) == (f"{absent}; it is looked for again", absent)
    secret = dict(zip(secret_keys("node-publish"), ("key", "team"), strict=True))
    source = cluster.put(
        VIRTUAL_MACHINE_IMAGE,
        {"metadata": {"name": "s"}, "spec": {"displayName": "S", "storageClassParameters": secret}},
        "team",
    )
    assert said(machine_clone("m", "s"), source) == (
        "source image team/s (S) is not ready; this one is made when it is",
        "source image team/s (S) is not ready; make this one when kubectl -n team get vmimages shows it Imported",
    )
    cluster.put(STORAGE_CLASS, storage_class({"encrypted": "true", **secret}, "mine"))
    cluster.put(IMAGE, {"metadata": {"name": "vmi-1"}, "status": {"phase": "Ready", "encrypted": False}})
    wanted = machine_clone("m", "s", "encrypt")
    wanted["metadata"]["annotations"] = {"harvesterhci.io/storageClassName": "mine"}
    wanted["spec"]["storageClassParameters"] = secret
    assert said(wanted, source) == (
        "there is no secret team/key; the image waits until there is",
        "there is no secret team/key; make it first",
    )


def test_an_image_that_is_going_or_whose_namespace_is_goes(cluster: MemoryCluster) -> None:
    cluster.put(STORAGE_CLASS, storage_class({"backingImage": "it"}))
    old: Json = {"metadata": {"name": "it"}, "spec": {}}
    request = asked(BACKING_IMAGE, None, old, namespace="lh")
    with pytest.raises(FailedPrecondition, match="the BackingImage lh/it is in use: StorageClass c names it"):
        image_rules(cluster).review(request)
    cluster.put(NAMESPACE, {"metadata": {"name": "lh", "deletionTimestamp": "now"}})
    assert image_rules(cluster).review(request) == Verdict()
    old["metadata"]["deletionTimestamp"] = "now"
    assert image_rules(cluster).review(asked(IMAGE, None, old)) == Verdict()


def test_a_claim_of_an_images_own_class_keeps_it(cluster: MemoryCluster) -> None:
    machine = {"metadata": {"name": "m", "namespace": "team", "uid": "7"}, "spec": {}}
    note = {"images.luks.csi.internal/origin": "VirtualMachineImage/team/m/7"}
    cluster.put(STORAGE_CLASS, storage_class({"backingImage": "vmi-7"}, annotations=note))
    request = asked(VIRTUAL_MACHINE_IMAGE, None, machine, name="m", namespace="team")
    assert image_rules(cluster).review(request) == Verdict()
    claim: dict[str, Any] = {"metadata": {"name": "disk"}, "spec": {"storageClassName": "c"}}
    cluster.put(CLAIM, claim, "team")
    with pytest.raises(FailedPrecondition, match="in use: claim team/disk waits for a volume of it; it can be"):
        image_rules(cluster).review(request)
    claim["spec"]["volumeName"] = "pv"
    assert image_rules(cluster).review(request) == Verdict()


# The mutator.


@pytest.mark.parametrize("spec", [None, 7, [], {"storageClassParameters": "x"}, {"storageClassParameters": [1]}])
def test_what_its_schema_refuses_is_left_to_it(cluster: MemoryCluster, spec: object) -> None:
    machine = {"metadata": {"name": "m"}, "spec": spec}
    assert machine_images.mutate(asked(VIRTUAL_MACHINE_IMAGE, machine), cluster) == Verdict()


@pytest.mark.parametrize("before", [None, {}, {"mine": "x"}, {"images.luks.csi.internal/source-image": "forged"}])
def test_which_image_a_clone_is_made_of_is_noted(cluster: MemoryCluster, before: dict[str, str] | None) -> None:
    note, path = "images.luks.csi.internal/source-image", "/metadata/annotations/images.luks.csi.internal~1source-image"
    security = {"cryptoOperation": "decrypt", "sourceImageName": "s", "sourceImageNamespace": "team"}
    given = {"numberOfReplicas": "1", "staleReplicaTimeout": "30", "migratable": "true"}
    machine: Json = {
        "metadata": {"name": "m", **({} if before is None else {"annotations": before})},
        "spec": {"storageClassParameters": given, "securityParameters": security},
    }

    def patch() -> list[Json]:
        return [*machine_images.mutate(asked(VIRTUAL_MACHINE_IMAGE, machine), cluster).patch]

    assert patch() == ([{"op": "remove", "path": path}] if note in (before or {}) else [])
    source = {"metadata": {"name": "s", "uid": "uid-s"}, "spec": {}}
    cluster.put(VIRTUAL_MACHINE_IMAGE, source, "team")
    (found,) = patch()
    if before:
        assert found == {"op": "add", "path": path, "value": "uid-s"}
    else:
        assert found == {"op": "add", "path": "/metadata/annotations", "value": {note: "uid-s"}}
    machine["metadata"]["annotations"] = {note: "uid-s"}
    assert patch() == []
    machine_images.check_noted(machine, source)
    for other in (None, {"metadata": {"name": "s", "uid": "uid-t"}}):
        with pytest.raises(InvalidArgument, match="was made or replaced in this very moment"):
            machine_images.check_noted(machine, other)


def test_parameters_that_are_complete_are_left_alone(cluster: MemoryCluster) -> None:
    given = {"numberOfReplicas": "1", "staleReplicaTimeout": "30", "migratable": "true", "encrypted": "false"}
    machine: Json = {"metadata": {"name": "m"}, "spec": {"storageClassParameters": given}}
    assert machine_images.mutate(asked(VIRTUAL_MACHINE_IMAGE, machine), cluster) == Verdict()
    machine["spec"]["storageClassParameters"] = given | {"fromBackup": ""}
    (patch,) = machine_images.mutate(asked(VIRTUAL_MACHINE_IMAGE, machine), cluster).patch
    assert patch == {"op": "add", "path": "/spec/storageClassParameters", "value": given}


# Lookups.


class Refusing:
    """An API that refuses the operator."""

    def __init__(self, error: DriverError | None = None, **status: object) -> None:
        self._error = error
        self._status = status
        self.asked: list[Json] = []

    def get(self, *_: object) -> Json | None:
        return self._answer()

    def create(self, _kind: Kind, thing: Json, _namespace: str = "") -> Json:
        self.asked.append(thing)
        return self._answer()

    def _answer(self) -> Json:
        if self._error is not None:
            raise self._error
        return {"status": self._status}


@pytest.mark.parametrize("error", [PermissionDenied("no"), FailedPrecondition("no credentials")])
def test_a_right_that_the_operator_lacks_is_no_refusal_of_the_user(error: DriverError) -> None:
    cluster = ApiCluster(Refusing(error), {})
    with pytest.raises(CommandFailed):
        cluster.get(SECRET, "a", "n")
    with pytest.raises(CommandFailed):
        cluster.may_do(User("alice", {"user": "alice"}), "get", SECRET, "a", "n")
    assert cluster.all(SECRET) == []


def test_a_question_on_rights_that_the_api_does_not_take_is_no_refusal_of_the_user() -> None:
    with pytest.raises(CommandFailed):
        ApiCluster(Refusing(InvalidArgument("no")), {}).may_do(
            User("alice", {"user": "alice"}), "get", SECRET, "a", "n"
        )


@pytest.mark.parametrize(
    ("status", "may"),
    [({"allowed": True}, True), ({"allowed": False}, False), ({}, False), ({"allowed": True, "denied": True}, False)],
)
def test_the_api_is_asked_as_the_user(status: dict[str, bool], may: bool) -> None:  # noqa: FBT001
    api = Refusing(None, **status)
    user = review.read(document()).user
    assert ApiCluster(api, {}).may_do(user, "get", SECRET, "a", "n") is may
    attributes = {
        "verb": "get", "group": "", "resource": "secrets", "subresource": "", "name": "a", "namespace": "n",
    }  # fmt: skip
    assert api.asked == [{"spec": {**user.document, "resourceAttributes": attributes}}]


# Counting.


def test_reviews_are_counted_by_outcome(cluster: MemoryCluster) -> None:
    admission = Admission(OperatorSettings(), cluster, lambda: pytest.fail("nobody connects"), ("127.0.0.1", 0))
    assert json.loads(admission.answer("secrets", document()))["response"] == {"uid": "u1", "allowed": True}
    cluster.put(STORAGE_CLASS, storage_class(encrypted("key")))
    assert json.loads(admission.answer("secrets", document()))["response"]["status"]["code"] == 403
    cluster.things[STORAGE_CLASS, "", "x"] = {"provisioner": DRIVER, "parameters": encrypted("key")}  # without a name
    with pytest.raises(KeyError):
        admission.answer("secrets", document())
    counts = {("secrets", "allowed"): 1, ("secrets", "refused"): 1, ("secrets", "failed"): 1}
    assert admission.tally.counts() == counts


def test_what_prometheus_gets() -> None:
    tally = Tally(lambda: 12.0)
    tally.count("images", "allowed")
    reviews, times = tally.collect()
    assert [(each.name, each.labels, each.value) for each in reviews.samples] == [
        ("luks_csi_operator_admission_reviews_total", {"webhook": "images", "outcome": "allowed"}, 1)
    ]
    assert [(each.name, each.labels, each.value) for each in times.samples] == [
        ("luks_csi_operator_admission_last_review_seconds", {"webhook": "images"}, 12.0)
    ]
