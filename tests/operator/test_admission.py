"""Admission at a real API: each rule of the documents with what a user is told, and nobody's rights but his own."""

import base64
import json
from collections.abc import Iterator
from functools import partial

import pytest

from csi_driver.kube.client import Kube
from csi_driver.kube.kinds import (
    BACKING_IMAGE,
    CLAIM,
    IMAGE,
    IMAGE_COPY,
    NAMESPACE,
    POD,
    SECRET,
    STORAGE_CLASS,
    VIRTUAL_MACHINE_IMAGE,
    VOLUME,
    Json,
    Kind,
)
from csi_driver.operator.settings import Profile
from tests.operator.admission import Admitted, refusal, until
from tests.operator.api import DEPLOY, MANIFESTS, Api

ALLOW_LOSS = "luks.csi.internal/allow-key-loss"
OPERATIONS = ("provisioner", "node-stage", "node-publish")


def pairs(name: str = "key", namespace: str = "team", operations: tuple[str, ...] = OPERATIONS) -> Json:
    prefix = "csi.storage.k8s.io"
    named = {f"{prefix}/{each}-secret-name": name for each in operations}
    return named | {f"{prefix}/{each}-secret-namespace": namespace for each in operations}


def encrypted(name: str = "key", namespace: str = "team", **more: str) -> Json:
    return {"encrypted": "true", **pairs(name, namespace), **more}


def ready(*, secret: str | None = None) -> Json:
    facts = {"encrypted": secret is not None, "virtualSize": 1 << 20, "phase": "Ready"}
    return facts | ({"secret": secret} if secret else {})


def clone(image: str, encryption: str = "ignore") -> Json:
    return {"clone": {"image": image, "encryption": encryption}}


def reference(name: str, namespace: str = "team") -> Json:
    return {"name": name, "namespace": namespace}


def crypto(operation: str, name: str) -> Json:
    return {"cryptoOperation": operation, "sourceImageName": name, "sourceImageNamespace": "team"}


@pytest.fixture(scope="module")
def lab(api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admitted]:
    for name in ("crds.yaml", "rbac.yaml", "policies.yaml"):
        api.kubectl("apply", "-n", "luks-csi", "-f", DEPLOY / "images" / name)
    api.install(DEPLOY / "compat")
    for name in ("team", "vault", "longhorn-system"):
        api.kubectl("create", "namespace", name)
    api.kubectl("apply", "-f", "-", stdin=ROLES)
    operator = api.account("luks-csi-operator")
    with api.client() as kube:
        lab = Admitted(api, kube, operator, tmp_path_factory.mktemp("admission"))
        lab.start()
        api.kubectl("apply", "-f", "-", stdin=lab.configurations())
        # The API takes a moment until it asks.
        until("the API asks", lambda: asks(lab))
        secret(lab, "key")
        secret(lab, "hidden", "vault")
        yield lab
        lab.stop()
        operator.close()


def asks(lab: Admitted) -> bool:
    found = lab.api.kubectl("create", "--dry-run=server", "-f", "-", stdin=UNREADABLE, check=False, user="alice")
    return b"a role must allow get of Secret vault/hidden" in found.stderr


@pytest.fixture(scope="module")
def alice(lab: Admitted) -> Iterator[Kube]:
    """May make and delete everything here, and read secrets and claims of the namespace team alone."""
    with lab.api.client("alice", "") as kube:
        yield kube


def secret(lab: Admitted, name: str, namespace: str = "team", notes: Json | None = None, **entries: str) -> Json:
    data = {
        key: base64.b64encode(value.encode()).decode()
        for key, value in ({"CRYPTO_KEY_VALUE": "right"} | entries).items()
    }
    return lab.kube.create(SECRET, {"metadata": {"name": name, "annotations": notes or {}}, "data": data}, namespace)


def change(lab: Admitted, name: str, namespace: str = "team", **entries: str | None) -> Json:
    data = {key: value and base64.b64encode(value.encode()).decode() for key, value in entries.items()}
    return lab.kube.patch(SECRET, name, {"data": data}, namespace)


ROLES = """
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: alice}
rules:
  - apiGroups: [images.luks.csi.internal, longhorn.io, harvesterhci.io]
    resources: [images, backingimages, virtualmachineimages]
    verbs: [create, delete, patch]
  - {apiGroups: [storage.k8s.io], resources: [storageclasses], verbs: [create, get, delete]}
  - apiGroups: [images.luks.csi.internal]
    resources: [images]
    resourceNames: [plain, sealed]
    verbs: [get]
  - {apiGroups: [longhorn.io], resources: [backingimages], resourceNames: [plain], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: alice}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: alice}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: alice}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: alice, namespace: team}
rules:
  - {apiGroups: [""], resources: [secrets, persistentvolumeclaims], verbs: [get]}
  - {apiGroups: [""], resources: [pods], verbs: [create]}
  - {apiGroups: [harvesterhci.io], resources: [virtualmachineimages], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: alice, namespace: team}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: alice}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: alice}]
"""
UNREADABLE = """
apiVersion: images.luks.csi.internal/v1alpha1
kind: Image
metadata: {name: unreadable}
spec:
  source: {upload: {}}
  secretRef: {name: hidden, namespace: vault}
"""


# Nobody has the operator read for him what he may not.

BESIDE = ", create of Pods of namespace vault"


def make(kube: Kube, name: str, source: Json, **spec: object) -> Json:
    return kube.create(IMAGE, {"metadata": {"name": name}, "spec": {"source": source, **spec}})


def test_an_image_needs_its_users_right_to_each_secret_source_and_claim(lab: Admitted, alice: Kube) -> None:
    lab.image("plain", status=ready())
    lab.image("sealed", status=ready(secret="vault/hidden"))
    lab.image("others", status=ready())
    for name, source, spec, what in (
        ("a", {"upload": {}}, {"secretRef": reference("hidden", "vault")}, "Secret vault/hidden"),
        ("a", clone("sealed", "decrypt"), {"secretRef": reference("hidden", "vault")}, "Secret vault/hidden"),
        ("a", clone("sealed", "reencrypt"),
         {"secretRef": reference("hidden", "vault"), "newSecretRef": reference("key")}, "Secret vault/hidden"),
        ("a", clone("others"), {}, "Image others"),
        ("a", {"claim": reference("data", "vault")}, {}, f"PersistentVolumeClaim vault/data{BESIDE}"),
        ("a", {"download": {"url": "http://example.org", "credentialsRef": reference("hidden", "vault")}}, {},
         "Secret vault/hidden"),
        ("a", {"download": {"url": "http://example.org", "caConfigMapRef": reference("trust", "vault")}}, {},
         "ConfigMap vault/trust"),
    ):  # fmt: skip
        said = refusal(partial(make, alice, name, source, **spec))
        assert said.endswith(
            "alice may not have an image made of what he may not read himself; a role must allow get of " + what
        ), said
    make(alice, "allowed", clone("plain", "encrypt"), secretRef=reference("key"))
    make(alice, "claimed", {"claim": reference("data")})
    for name in ("plain", "sealed", "others", "allowed", "claimed"):
        alice.delete(IMAGE, name)


def test_a_backing_image_needs_the_same(lab: Admitted, alice: Kube) -> None:
    lab.image("plain", status=ready(), origin="BackingImage/longhorn-system/plain/1")
    hidden = {"secret": "hidden", "secret-namespace": "vault"}
    parameters: Json
    for kind, parameters, spec, what in (
        ("clone", {"backing-image": "plain", "encryption": "encrypt", **hidden}, {}, "Secret vault/hidden"),
        ("clone", {"backing-image": "later"}, {}, "BackingImage longhorn-system/later"),
        ("upload", {}, {"secret": "hidden", "secretNamespace": "vault"}, "Secret vault/hidden"),
        ("export-from-volume", {"volume-name": "pvc-1"}, {}, "every PersistentVolumeClaim, create of Pods"),
    ):
        said = refusal(partial(lab.backing, "b", kind, parameters, alice, **spec))
        assert said.endswith("a role must allow get of " + what), said
    lab.backing("b", "clone", {"backing-image": "plain"}, alice)
    alice.delete(BACKING_IMAGE, "b", "longhorn-system")
    lab.kube.delete(IMAGE, "plain")
    lab.image("plain", status=ready())  # somebody else's, under the name that she may read as a BackingImage
    said = refusal(partial(lab.backing, "b", "clone", {"backing-image": "plain"}, alice))
    assert "the Image plain stands for no BackingImage of namespace longhorn-system" in said
    lab.kube.delete(IMAGE, "plain")


def test_a_machine_image_needs_the_secrets_of_its_class_and_of_its_source(lab: Admitted, alice: Kube) -> None:
    lab.storage_class("hidden", encrypted("hidden", "vault"))
    lab.storage_class("mine", encrypted())
    for kind, spec, what in (
        ("download", {"class_name": "hidden"}, "Secret vault/hidden"),
        ("download", {"storageClassParameters": encrypted("hidden", "vault")}, "Secret vault/hidden"),
        (
            "export-from-volume",
            {"pvcName": "data", "pvcNamespace": "vault"},
            "PersistentVolumeClaim vault/data" + BESIDE,
        ),
        ("clone", {"securityParameters": crypto("decrypt", "later")}, "every Secret"),
    ):
        said = refusal(partial(lab.machine, "m", kind, alice, **spec))
        assert said.endswith("a role must allow get of " + what), said
    lab.machine("source", class_name="hidden")
    said = refusal(lambda: lab.machine("m", "clone", alice, securityParameters=crypto("decrypt", "source")))
    assert said.endswith("a role must allow get of Secret vault/hidden"), said
    lab.machine("m", class_name="mine", by=alice)
    for name in ("m", "source"):
        lab.kube.delete(VIRTUAL_MACHINE_IMAGE, name, "team")
    for name in ("hidden", "mine"):
        lab.kube.delete(STORAGE_CLASS, name)
        lab.seen(STORAGE_CLASS, name)


# What an image is, is what was found in it.


def test_what_is_encrypted_is_not_encrypted_again_nor_the_other_way(lab: Admitted) -> None:
    lab.image("plain", status=ready(), origin="BackingImage/longhorn-system/plain/1")
    lab.image("sealed", status=ready(secret="team/key"), origin="BackingImage/longhorn-system/sealed/1")
    key = {"secret": "key", "secret-namespace": "team"}
    again = "image sealed is encrypted already and is not encrypted again; use reencrypt for another key, or ignore"
    never = "image plain is not encrypted, so it cannot be cloned with {}; use encrypt, or ignore"
    for name, encryption, words in (
        ("sealed", "encrypt", again),
        ("plain", "decrypt", never.format("decrypt")),
        ("plain", "reencrypt", never.format("reencrypt")),
    ):
        new = {"newSecretRef": reference("key")} if encryption == "reencrypt" else {}
        said = refusal(partial(make, lab.kube, "a", clone(name, encryption), secretRef=reference("key"), **new))
        assert said.endswith(words), said
        parameters = {"backing-image": name, "encryption": encryption, **key}
        result: Json = {"secret": "key", "secretNamespace": "team"} if new else {}
        said = refusal(partial(lab.backing, "b", "clone", parameters, **result))
        assert said.endswith(words), said
    for name in ("plain", "sealed"):
        lab.kube.delete(IMAGE, name)


def test_an_image_that_would_wait_for_itself_is_refused(lab: Admitted) -> None:
    assert "an image is no clone of itself; name another one in source.clone.image" in refusal(
        lambda: make(lab.kube, "a", clone("a"))
    )
    security: Json = {"securityParameters": crypto("decrypt", "a")}
    assert "image team/a is no clone of itself; name another source" in refusal(
        lambda: lab.machine("a", "clone", **security)
    )
    make(lab.kube, "first", clone("second"))
    lab.seen(IMAGE, "first")
    words = (
        "image first is itself to be cloned from second, directly or by way of others, so neither would ever be made"
    )
    assert words in refusal(lambda: make(lab.kube, "second", clone("first")))
    lab.kube.delete(IMAGE, "first")


def test_a_warning_of_what_comes_too_late_says_what_to_do(lab: Admitted) -> None:
    machine = {
        "apiVersion": "harvesterhci.io/v1beta1", "kind": "VirtualMachineImage",
        "metadata": {"name": "m", "namespace": "team", "annotations": {"harvesterhci.io/storageClassName": "late"}},
        "spec": {"displayName": "m", "sourceType": "upload"},
    }  # fmt: skip
    said = lab.api.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(machine)).said
    assert (
        "Warning: there is no StorageClass late, which the annotation harvesterhci.io/storageClassName names; its "
        "parameters are not taken over later; delete this image and make it anew when the class is there"
    ) in said


def imported(lab: Admitted, machine: Json, status: Json) -> str:
    """The Image of a VirtualMachineImage."""
    name = f"vmi-{machine['metadata']['uid']}"
    lab.image(name, status=status)
    return name


def test_harvesters_words_for_the_same(lab: Admitted) -> None:
    lab.storage_class("mine", encrypted())
    made = lab.machine("a", class_name="mine")
    image = imported(lab, made, ready(secret="team/key"))

    def say(operation: str) -> str:
        return refusal(lambda: lab.machine("m", "clone", class_name="mine", securityParameters=crypto(operation, "a")))

    assert say("encrypt").endswith("can not re-encrypt, source image team/a (a) is already encrypted")
    lab.operator.patch(IMAGE, image, {"status": {"encrypted": False, "secret": None}}, status=True)
    assert say("decrypt").endswith("can not re-decrypt, source image team/a (a) is not encrypted")
    lab.kube.delete(IMAGE, image)
    lab.kube.delete(VIRTUAL_MACHINE_IMAGE, "a", "team")
    lab.kube.delete(STORAGE_CLASS, "mine")
    lab.seen(STORAGE_CLASS, "mine")


# Harvester's six rules.


BY_HALF = {"encrypted": "true", "csi.storage.k8s.io/node-stage-secret-name": "key"}
NODE_STAGE_ALONE = {"encrypted": "true", **pairs(operations=("node-stage",))}
MUST_EXIST = "; an encrypted StorageClass must name one that exists (the operator's admission profile is harvester)"
FILLED_IN = "there only ${pv.name}, ${pvc.namespace}, ${pvc.name} and ${pvc.annotations['…']} are filled in"


@pytest.mark.parametrize(
    ("profile", "parameters", "words"),
    [
        (Profile.LONGHORN, {"encrypted": "yes"}, 'says encrypted: \'yes\'; it must be "true" or "false"'),
        (
            Profile.LONGHORN,
            encrypted() | {"csi.storage.k8s.io/node-stage-secret-name": "other"},
            "the secrets of StorageClass c differ: team/key, team/other; all of its operations have to name the same",
        ),
        (Profile.LONGHORN, BY_HALF, "needs csi.storage.k8s.io/node-stage-secret-name and -namespace"),
        (Profile.LONGHORN, encrypted("${pvc.nam}"), f"StorageClass c names the secret '${{pvc.nam}}'; {FILLED_IN}"),
        (Profile.LONGHORN, encrypted("broken"), "secret's entry CRYPTO_KEY_CIPHER is wrong; it must be one of aes-xts"),
        (Profile.HARVESTER, NODE_STAGE_ALONE, "lacks csi.storage.k8s.io/provisioner-secret-name and -namespace, "),
        (Profile.HARVESTER, encrypted("absent"), "no secret team/absent, which StorageClass c names" + MUST_EXIST),
        (Profile.HARVESTER, encrypted("${pvc.name}"), "of StorageClass c is another one for each claim" + MUST_EXIST),
    ],
)
def test_a_class_that_cannot_work_is_refused(lab: Admitted, profile: Profile, parameters: Json, words: str) -> None:
    if lab.kube.get(SECRET, "broken", "team") is None:
        secret(lab, "broken", CRYPTO_KEY_CIPHER="rot13")
    with lab.profile(profile):
        assert words in refusal(lambda: lab.storage_class("c", parameters))
    assert lab.kube.get(STORAGE_CLASS, "c") is None


def test_a_class_before_its_secret_is_a_warning_with_longhorns_rules(lab: Admitted) -> None:
    document = {
        "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "early"},
        "provisioner": "luks.csi.internal", "parameters": encrypted("absent"),
    }  # fmt: skip
    said = lab.api.kubectl("create", "-f", "-", stdin=json.dumps(document)).stderr.decode()
    assert said == (
        "Warning: there is no secret team/absent, which StorageClass early names; its volumes wait until there is\n"
    )
    document["parameters"] = {"backingImage": "absent"}
    document["metadata"] = {"name": "of-nothing"}
    said = lab.api.kubectl("create", "-f", "-", stdin=json.dumps(document)).stderr.decode()
    assert said.startswith("Warning: there is no Image absent, which StorageClass of-nothing names; its volumes wait")
    lab.storage_class("each", encrypted("${pvc.name}", "${pvc.namespace}"))
    lab.storage_class("kms", {"encrypted": "true", "encryptionKMSID": "vault"})
    lab.storage_class("foreign", {"encrypted": "yes"}, provisioner="example.org")
    for name in ("early", "of-nothing", "each", "kms", "foreign"):
        lab.kube.delete(STORAGE_CLASS, name)
        lab.seen(STORAGE_CLASS, name)


def test_a_secret_that_is_needed_is_neither_deleted_nor_changed(lab: Admitted) -> None:
    for name in ("by-class", "by-image", "by-volume", "by-nobody"):
        secret(lab, name)
    lab.storage_class("keyed", encrypted("by-class"))
    lab.image("keyed", secretRef=reference("by-image"))
    volume = {
        "metadata": {"name": "pv"},
        "spec": {
            "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "gone",
            "csi": {
                "driver": "luks.csi.internal", "volumeHandle": "pv",
                "nodeStageSecretRef": {"name": "by-volume", "namespace": "team"},
            },
        },
    }  # fmt: skip
    lab.kube.create(VOLUME, volume)
    lab.seen(VOLUME, "pv")
    for name, user in (
        ("by-class", "StorageClass keyed"),
        ("by-image", "Image keyed"),
        ("by-volume", "PersistentVolume pv"),
    ):
        said = refusal(partial(lab.kube.delete, SECRET, name, "team"))
        assert said.endswith(
            f"the secret team/{name} is used by {user}, and its deletion would make their data unreadable; if that is "
            f'wanted, annotate the secret with {ALLOW_LOSS}: "true" first'
        ), said
        said = refusal(partial(change, lab, name, CRYPTO_KEY_VALUE="wrong"))
        assert f"is used by {user}, and a new passphrase would make their data unreadable; keep the old one as " in said
        assert "wrong" not in said
        assert "right" not in said
    with pytest.raises(AssertionError, match="the secret team/by-class is used by StorageClass keyed"):
        lab.api.server.ask("DELETE", "/api/v1/namespaces/team/secrets?fieldSelector=metadata.name=by-class")
    lab.kube.patch(SECRET, "by-class", {"metadata": {"labels": {"a": "b"}}, "data": {"other": ""}}, "team")
    change(lab, "by-class", CRYPTO_KEY_VALUE="new", CRYPTO_KEY_VALUE_PREVIOUS="right")
    lab.kube.patch(SECRET, "by-class", {"metadata": {"annotations": {ALLOW_LOSS: "true"}}}, "team")
    for name in ("by-class", "by-nobody"):
        lab.kube.delete(SECRET, name, "team")
    lab.kube.delete(STORAGE_CLASS, "keyed")
    lab.kube.delete(IMAGE, "keyed")
    lab.kube.patch(VOLUME, "pv", {"metadata": {"finalizers": None}})  # nobody runs the controller that does it
    lab.kube.delete(VOLUME, "pv")
    for kind, name in ((STORAGE_CLASS, "keyed"), (IMAGE, "keyed"), (VOLUME, "pv")):
        lab.seen(kind, name)
    for name in ("by-image", "by-volume"):
        lab.kube.delete(SECRET, name, "team")


def test_all_secrets_go_with_their_namespace(lab: Admitted) -> None:
    lab.api.kubectl("create", "namespace", "passing")
    secret(lab, "needed", "passing")
    lab.storage_class("keyed", encrypted("needed", "passing"))
    assert "is used by StorageClass keyed" in refusal(lambda: lab.kube.delete(SECRET, "needed", "passing"))
    lab.kube.delete(NAMESPACE, "passing")  # nobody runs the controller that empties it
    until("the namespace is going", lambda: going(lab, NAMESPACE, "passing"))
    lab.kube.delete(SECRET, "needed", "passing")
    lab.kube.delete(STORAGE_CLASS, "keyed")
    lab.seen(STORAGE_CLASS, "keyed")


def going(lab: Admitted, kind: Kind, name: str, namespace: str = "") -> bool:
    found = lab.kube.get(kind, name, namespace)
    return found is None or "deletionTimestamp" in found["metadata"]


def test_other_secrets_and_those_of_other_namespaces_are_nobodys_business(lab: Admitted) -> None:
    lab.storage_class("keyed", encrypted("needed", "kube-system"))
    before = lab.admission.tally.counts()
    secret(lab, "needed", "kube-system")
    lab.kube.delete(SECRET, "needed", "kube-system")
    lab.kube.create(SECRET, {"metadata": {"name": "plain"}, "data": {"password": "eA=="}}, "team")
    lab.kube.patch(SECRET, "plain", {"data": {"password": "eQ=="}}, "team")
    lab.kube.delete(SECRET, "plain", "team")
    assert lab.admission.tally.counts() == before
    lab.kube.delete(STORAGE_CLASS, "keyed")
    lab.seen(STORAGE_CLASS, "keyed")


def test_encrypt_needs_an_encrypted_class_that_is_there(lab: Admitted) -> None:
    lab.storage_class("plain", {"numberOfReplicas": "2"})
    lab.storage_class("of-an-image", encrypted(backingImage="x"))
    lab.storage_class("each", encrypted("${pvc.name}"))
    lab.machine("source")
    note = "the annotation harvesterhci.io/storageClassName"
    for class_name, words in (
        ("", f"encrypt needs {note}, the name of an encrypted StorageClass, whose secret it uses"),
        ("absent", f"there is no StorageClass absent, which {note} names; make it first"),
        ("../secrets", f"there is no StorageClass ../secrets, which {note} names; make it first"),
        ("plain", 'the StorageClass plain must say encrypted: "true" for an image that is to be encrypted'),
        ("of-an-image", "the StorageClass of-an-image belongs to the image x; name one that is not of an image"),
        ("each", "the StorageClass each must name one secret, without ${…}, by csi.storage.k8s.io/node-publish-secret"),
    ):
        security: Json = {"securityParameters": crypto("encrypt", "source")}
        said = refusal(partial(lab.machine, "m", "clone", class_name=class_name, **security))
        assert words in said, said
    said = refusal(lambda: lab.machine("m", "clone", securityParameters=crypto("decrypt", "source")))
    assert "can not decrypt, the storageClassParameters of source image team/source (source) name no secret" in said
    with lab.profile(Profile.HARVESTER):
        said = refusal(lambda: lab.machine("m", class_name="absent"))
        assert said.endswith(f"there is no StorageClass absent, which {note} names; make it first")
        lab.storage_class("mine", encrypted())
        clone_of = partial(lab.machine, "m", "clone", class_name="mine")
        said = refusal(lambda: clone_of(securityParameters=crypto("encrypt", "source")))
        assert "source image team/source (source) is not ready; make this one when kubectl -n team get" in said
        said = refusal(lambda: clone_of(securityParameters=crypto("encrypt", "absent")))
        assert "source image team/absent not found; its metadata.name is wanted (kubectl -n team get" in said
    lab.kube.delete(VIRTUAL_MACHINE_IMAGE, "source", "team")
    for name in ("plain", "of-an-image", "each", "mine"):
        lab.kube.delete(STORAGE_CLASS, name)
        lab.seen(STORAGE_CLASS, name)


def test_the_parameters_of_the_class_are_taken_over_by_an_allow_list(lab: Admitted) -> None:
    lab.storage_class("mine", encrypted(numberOfReplicas="2", fromBackup="", cipher="aes-xts-plain64"))
    made = lab.machine("m", class_name="mine")
    assert made["spec"]["storageClassParameters"] == {
        "encrypted": "true", "numberOfReplicas": "2", "staleReplicaTimeout": "30", "migratable": "true", **pairs(),
    }  # fmt: skip
    plain = lab.machine("n")
    assert plain["spec"]["storageClassParameters"] == {
        "numberOfReplicas": "3", "staleReplicaTimeout": "30", "migratable": "true",
    }  # fmt: skip
    note = {"metadata": {"annotations": {"harvesterhci.io/storageClassName": "other"}}}
    said = refusal(lambda: lab.kube.patch(VIRTUAL_MACHINE_IMAGE, "m", note, "team"))
    assert "the annotation harvesterhci.io/storageClassName does not change; delete the image and make" in said
    for name in ("m", "n"):
        lab.kube.delete(VIRTUAL_MACHINE_IMAGE, name, "team")
    lab.kube.delete(STORAGE_CLASS, "mine")
    lab.seen(STORAGE_CLASS, "mine")


def test_the_manifests_of_both_documents_are_admitted(lab: Admitted) -> None:
    harvester, longhorn = (MANIFESTS / each for each in ("harvester", "longhorn"))
    names = ("secret", "storage-class", "downloaded", "encrypted", "decrypted")
    files = [harvester / f"{name}.yaml" for name in names]
    files += [longhorn / f"{name}.yaml" for name in (*names, "cloned")]
    for file in files:
        lab.api.kubectl("apply", "-f", file)
    for name in ("encrypted-by-name", "encrypted-with-parameters"):  # of the same name
        lab.api.kubectl("replace", "--force", "-f", harvester / f"{name}.yaml")
    for file in reversed(files):
        lab.api.kubectl("delete", "--ignore-not-found", "-f", file)


# What is in use stays.


def test_an_image_in_use_is_not_deleted_and_its_users_are_named(lab: Admitted) -> None:
    source = lab.image("busy", status=ready())
    lab.storage_class("from-busy", {"backingImage": "busy"})
    claim = {
        "metadata": {"name": "disk"},
        "spec": {
            "accessModes": ["ReadWriteOnce"], "storageClassName": "from-busy",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }  # fmt: skip
    lab.kube.create(CLAIM, claim, "team")
    lab.seen(CLAIM, "disk", "team")
    copying = lab.image("copying", clone("busy"))
    copy = lab.copy(copying, "node")
    assert refusal(lambda: lab.kube.delete(IMAGE, "busy")).endswith(
        "the Image busy is in use: StorageClass from-busy names it, image copying is being cloned from it, claim "
        "team/disk waits for a volume of it; it can be deleted when it is not"
    )
    lab.kube.delete(STORAGE_CLASS, "from-busy")
    lab.operator.patch(IMAGE, "copying", {"status": ready()}, status=True)
    lab.seen(STORAGE_CLASS, "from-busy")
    lab.seen(IMAGE, "copying")
    lab.kube.delete(IMAGE, "busy")
    lab.kube.delete(CLAIM, "disk", "team")
    lab.kube.delete(IMAGE, "copying")
    lab.operator.patch(IMAGE_COPY, copy["metadata"]["name"], {"metadata": {"finalizers": None}})
    lab.operator.delete(IMAGE_COPY, copy["metadata"]["name"])
    assert source["metadata"]["name"] == "busy"


def test_what_stands_for_another_object_goes_with_that_one(lab: Admitted) -> None:
    machine = lab.machine("m")
    place, name = f"VirtualMachineImage/team/m/{machine['metadata']['uid']}", f"vmi-{machine['metadata']['uid']}"
    note = {"images.luks.csi.internal/origin": place}
    backing = lab.operator.create(
        BACKING_IMAGE,
        {"metadata": {"name": name, "annotations": note}, "spec": {"sourceType": "upload"}},
        "longhorn-system",
    )
    lab.seen(VIRTUAL_MACHINE_IMAGE, "m", "team")
    lab.seen(BACKING_IMAGE, name, "longhorn-system")
    origin = {"images.luks.csi.internal/origin": f"BackingImage/longhorn-system/{name}/{backing['metadata']['uid']}"}
    lab.operator.create(IMAGE, {"metadata": {"name": name, "annotations": origin}, "spec": {"source": {"upload": {}}}})
    made = {
        "metadata": {"name": "longhorn-m", "annotations": note}, "provisioner": "luks.csi.internal",
        "parameters": {"backingImage": name},
    }  # fmt: skip
    lab.operator.create(STORAGE_CLASS, made)
    lab.seen(STORAGE_CLASS, "longhorn-m")
    assert f"BackingImage longhorn-system/{name} stands for it, delete that one" in refusal(
        lambda: lab.kube.delete(IMAGE, name)
    )
    assert "VirtualMachineImage team/m stands for it, delete that one" in refusal(
        lambda: lab.kube.delete(BACKING_IMAGE, name, "longhorn-system")
    )
    assert refusal(lambda: lab.kube.delete(STORAGE_CLASS, "longhorn-m")).endswith(
        "the StorageClass longhorn-m is used by VirtualMachineImage team/m, which makes it; delete the image, and the "
        "class goes with it"
    )
    lab.storage_class("other", {"backingImage": name})
    assert refusal(lambda: lab.kube.delete(VIRTUAL_MACHINE_IMAGE, "m", "team")).endswith(
        "the VirtualMachineImage team/m is in use: StorageClass other names it; it can be deleted when it is not"
    )
    lab.kube.delete(STORAGE_CLASS, "other")
    lab.seen(STORAGE_CLASS, "other")
    lab.kube.delete(VIRTUAL_MACHINE_IMAGE, "m", "team")  # its own class does not keep it
    lab.operator.delete(STORAGE_CLASS, "longhorn-m")
    lab.operator.delete(BACKING_IMAGE, name, "longhorn-system")
    lab.operator.delete(IMAGE, name)


# What the request alone decides.


def test_only_the_operator_says_what_an_image_was_made_for(lab: Admitted) -> None:
    note = {"annotations": {"images.luks.csi.internal/origin": "BackingImage/longhorn-system/x/1"}}
    thing = {"metadata": {"name": "posing", **note}, "spec": {"source": {"upload": {}}}}
    words = "the annotation images.luks.csi.internal/origin is the operator's; leave it as it is"
    assert words in refusal(lambda: lab.kube.create(IMAGE, thing))
    lab.operator.patch(IMAGE, lab.image("posing")["metadata"]["name"], {"metadata": note})
    assert words in refusal(lambda: lab.kube.patch(IMAGE, "posing", {"metadata": {"annotations": None}}))
    lab.kube.patch(IMAGE, "posing", {"spec": {"copies": 2}})
    lab.kube.delete(IMAGE, "posing")


def test_only_the_operator_says_what_a_class_was_made_for(lab: Admitted) -> None:
    """It removes what it made, so whoever says of any class that it did would have it removed."""
    note = {"annotations": {"images.luks.csi.internal/origin": "VirtualMachineImage/nix/nix/nix"}}
    words = "the annotation images.luks.csi.internal/origin is the operator's; leave it as it is"
    standard: Json = {"metadata": {"name": "standard"}, "provisioner": "ebs.csi.aws.com"}
    posing = {**standard, "metadata": {"name": "posing", **note}}
    assert words in refusal(lambda: lab.kube.create(STORAGE_CLASS, posing))
    lab.kube.create(STORAGE_CLASS, standard)
    assert words in refusal(lambda: lab.kube.patch(STORAGE_CLASS, "standard", {"metadata": note}))
    lab.kube.patch(STORAGE_CLASS, "standard", {"metadata": {"labels": {"tier": "one"}}})
    lab.operator.create(STORAGE_CLASS, posing)
    nothing: Json = {"metadata": {"annotations": None}}
    assert words in refusal(lambda: lab.kube.patch(STORAGE_CLASS, "posing", nothing))
    for name in ("standard", "posing"):
        lab.kube.delete(STORAGE_CLASS, name)
        lab.seen(STORAGE_CLASS, name)


ALL_OF_IMAGES = """
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: bob}
rules:
  - {apiGroups: [images.luks.csi.internal], resources: ["*"], verbs: ["*"]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: bob}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: bob}
subjects:
  - {apiGroup: rbac.authorization.k8s.io, kind: User, name: bob}
  - {apiGroup: rbac.authorization.k8s.io, kind: User, name: "system:kube-controller-manager"}
  - {kind: ServiceAccount, name: generic-garbage-collector, namespace: kube-system}
"""


def test_who_may_do_everything_with_images_does_not_say_how_they_are_made(lab: Admitted) -> None:
    """A copy that he makes could have another's volume read, a status another's secret named in a class."""
    image = lab.image("tempting")
    copy = lab.copy(image, "node")["metadata"]["name"]
    lab.api.kubectl("apply", "-f", "-", stdin=ALL_OF_IMAGES)
    words = "copies of images, and what is told of them and of images, are written by luks-csi alone"
    spec = {"image": "tempting", "imageUID": image["metadata"]["uid"], "node": "node", "make": True, "volume": "pvc-1"}
    with lab.api.client("bob", "") as bob:
        for call in (
            partial(bob.create, IMAGE_COPY, {"metadata": {"name": "theirs"}, "spec": spec}),
            partial(bob.patch, IMAGE_COPY, copy, {"status": {"state": "Ready"}}, status=True),
            partial(bob.patch, IMAGE, "tempting", {"status": {"secret": "vault/hidden"}}, status=True),
        ):
            assert words in refusal(call)
        bob.patch(IMAGE, "tempting", {"spec": {"copies": 2}})
        kept = (
            f"the copy {copy} is not deleted by hand, as it may be the last one of image tempting; for fewer copies "
            f"change copies or nodeSelector of the Image, or delete the Image"
        )
        assert kept in refusal(lambda: bob.delete(IMAGE_COPY, copy))
        assert kept in lab.api.kubectl("delete", "imagecopies", "--all", check=False, user="bob").said
        assert not going(lab, IMAGE_COPY, copy)
    lab.kube.delete(IMAGE, "tempting")
    lab.operator.patch(IMAGE_COPY, copy, {"metadata": {"finalizers": None}})
    lab.operator.delete(IMAGE_COPY, copy)


@pytest.mark.parametrize(
    "collector", ["system:kube-controller-manager", "system:serviceaccount:kube-system:generic-garbage-collector"]
)
def test_the_copies_of_an_image_that_is_gone_are_collected(lab: Admitted, collector: str) -> None:
    copy = lab.copy(lab.image("collected"), "node")["metadata"]["name"]
    lab.api.kubectl("apply", "-f", "-", stdin=ALL_OF_IMAGES)
    lab.kube.delete(IMAGE, "collected")
    with lab.api.client(collector, "") as kube:
        kube.delete(IMAGE_COPY, copy)
        assert going(lab, IMAGE_COPY, copy)
    lab.operator.patch(IMAGE_COPY, copy, {"metadata": {"finalizers": None}})


def test_an_agent_has_a_say_in_what_its_own_node_has_alone(lab: Admitted) -> None:
    image = lab.image("shared")
    for node in ("one", "two"):
        lab.copy(image, node)
    spec = {"nodeName": "one", "serviceAccountName": "luks-csi-node", "containers": [{"name": "c", "image": "i"}]}
    pod = {"metadata": {"name": "node-one"}, "spec": spec}
    agent = lab.api.account("luks-csi-node", lab.kube.create(POD, pod, "luks-csi"))
    stranger = lab.api.account("luks-csi-node")
    copies = {each["spec"]["node"]: each["metadata"]["name"] for each in lab.kube.list(IMAGE_COPY)[0]}
    done = {"status": {"state": "Ready"}}
    agent.patch(IMAGE_COPY, copies["one"], done, status=True)
    agent.patch(IMAGE_COPY, copies["one"], {"metadata": {"finalizers": None}})
    words = "the agent of node one must leave alone what node two has of images"
    assert words in refusal(lambda: agent.patch(IMAGE_COPY, copies["two"], done, status=True))
    assert words in refusal(lambda: agent.patch(IMAGE_COPY, copies["two"], {"metadata": {"finalizers": None}}))
    assert "an agent changes the status and the finalizers of a copy, nothing else" in refusal(
        lambda: agent.patch(IMAGE_COPY, copies["one"], {"metadata": {"labels": {"a": "b"}}})
    )
    assert "the agent of no node (its token names none) must leave alone what node one has" in refusal(
        lambda: stranger.patch(IMAGE_COPY, copies["one"], done, status=True)
    )
    wish: Json = {"metadata": {"name": "wish"}, "spec": {"image": "shared", "imageUID": "u", "node": "one"}}
    agent.create(IMAGE_COPY, wish)
    changed: tuple[tuple[str, Json, str], ...] = (
        ("make", {"make": True}, "that one is made of an image's source only the operator says"),
        ("other", {"node": "two"}, words),
    )
    for name, more, said in changed:
        thing = {"metadata": {"name": name}, "spec": wish["spec"] | more}
        assert said in refusal(partial(agent.create, IMAGE_COPY, thing))
    agent.close()
    stranger.close()
    lab.operator.patch(IMAGE_COPY, copies["two"], {"metadata": {"finalizers": None}})
    for each in lab.kube.list(IMAGE_COPY)[0]:
        lab.operator.delete(IMAGE_COPY, each["metadata"]["name"])
    lab.kube.delete(IMAGE, "shared")


def test_without_the_operator_secrets_and_classes_go_on_and_images_wait(lab: Admitted, alice: Kube) -> None:
    with lab.down():
        secret(lab, "unseen")
        lab.kube.delete(SECRET, "unseen", "team")
        lab.storage_class("unseen", {"encrypted": "yes"})
        lab.kube.delete(STORAGE_CLASS, "unseen")
        said = refusal(lambda: make(alice, "unseen", {"upload": {}}))
        assert 'failed calling webhook "images.images.luks.csi.internal"' in said
        make(lab.operator, "own", {"upload": {}})
        lab.operator.delete(IMAGE, "own")
    make(alice, "seen", {"upload": {}})
    alice.delete(IMAGE, "seen")
    told = lab.api.kubectl("get", "--raw", "/metrics").stdout.decode()  # what the alert in the docs asks for
    opened = [line for line in told.splitlines() if line.startswith("apiserver_admission_webhook_fail_open_count{")]
    assert any('name="secrets.images.luks.csi.internal"' in line for line in opened)
    closed = [line for line in told.splitlines() if line.startswith("apiserver_admission_webhook_rejection_count{")]
    assert any('error_type="calling_webhook_error"' in line and 'name="images.images.' in line for line in closed)


def test_a_clone_notes_which_image_it_is_made_of_and_nobody_changes_that(lab: Admitted) -> None:
    note = "images.luks.csi.internal/source-image"
    source = lab.machine("source")
    lab.storage_class("mine", encrypted())
    made = lab.machine("m", "clone", class_name="mine", securityParameters=crypto("encrypt", "source"))
    assert made["metadata"]["annotations"][note] == source["metadata"]["uid"]
    for value in (None, "another"):
        forged = {"metadata": {"annotations": {note: value}}}
        said = refusal(partial(lab.kube.patch, VIRTUAL_MACHINE_IMAGE, "m", forged, "team"))
        assert f"the annotation {note} does not change" in said
    for name in ("m", "source"):
        lab.kube.delete(VIRTUAL_MACHINE_IMAGE, name, "team")
    lab.kube.delete(STORAGE_CLASS, "mine")
    lab.seen(STORAGE_CLASS, "mine")


def test_what_was_reviewed_is_counted(lab: Admitted) -> None:
    make(lab.kube, "counted", {"upload": {}})
    refusal(lambda: lab.machine("m", "clone", securityParameters=crypto("encrypt", "absent")))
    lab.kube.delete(IMAGE, "counted")
    counts = lab.admission.tally.counts()
    assert counts["images", "allowed"] >= 2
    assert counts["images", "refused"] >= 1
    assert counts["parameters", "allowed"] >= 1
