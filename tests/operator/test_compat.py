"""The documents of Longhorn and Harvester at work: their manifests, with an operator and agents that do what they say.

What a test changes of a manifest is in one patch: the URL, the checksum, what the admission would add.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, Final

import pytest

from csi_driver.kube.kinds import (
    BACKING_IMAGE,
    EVENT,
    IMAGE,
    IMAGE_COPY,
    NAMESPACE,
    SECRET,
    STORAGE_CLASS,
    VIRTUAL_MACHINE_IMAGE,
    Json,
    Kind,
    name_of,
)
from tests.image_server import ImageServer, sha512
from tests.operator.api import MANIFESTS
from tests.operator.lab import Lab, documents

LONGHORN: Final = "longhorn-system"
SOURCE: Final = "alpine-extended"
KINDS = {kind.name: kind for kind in (BACKING_IMAGE, VIRTUAL_MACHINE_IMAGE, SECRET, STORAGE_CLASS)}


@pytest.fixture(autouse=True)
def spaces(lab: Lab) -> Iterator[None]:
    """The documents' namespaces; after each test nothing is left of what stands for an image, nor of images."""
    for name in (LONGHORN, "default"):
        if lab.kube.get(NAMESPACE, name) is None:
            lab.kube.create(NAMESPACE, {"metadata": {"name": name}})
    yield
    for kind in (IMAGE, IMAGE_COPY, BACKING_IMAGE, VIRTUAL_MACHINE_IMAGE, STORAGE_CLASS):
        assert lab.kube.list(kind)[0] == []
    lab.kube.delete(SECRET, "longhorn-crypto", LONGHORN)


def apply(lab: Lab, file: str, patch: Json | None = None) -> Json:
    """A document's manifest, with `patch` in its spec."""
    (made,) = documents(MANIFESTS / file)
    kind = KINDS[made.pop("kind")]
    del made["apiVersion"]
    if patch:
        made["spec"] |= patch
    return lab.kube.create(kind, made, made["metadata"].get("namespace", "") if kind.namespaced else "")


def wait(lab: Lab, kind: Kind, name: str, namespace: str, condition: str, state: str = "True") -> Json:
    """Until the condition is that; the status."""

    def look() -> Json | None:
        found = lab.kube.get(kind, name, namespace)
        assert found is not None, f"{kind} {name} is gone"
        status: Json = found.get("status", {})
        told = {each["type"]: each for each in status.get("conditions", ())}
        assert told.get(condition, {}).get("status") == state, told
        return status

    return lab.wait(f"{condition} {state} of {kind} {name}", look)


def delete(lab: Lab, kind: Kind, name: str, namespace: str = "") -> None:
    """Until it is gone."""
    lab.kube.delete(kind, name, namespace)
    lab.wait(f"end of {kind} {name}", lambda: lab.kube.get(kind, name, namespace) is None)


def message(status: Json, condition: str) -> str:
    return str(next(each["message"] for each in status["conditions"] if each["type"] == condition))


def file_of(lab: Lab, name: str) -> bytes:
    """The file of an image, from the first node that has it."""
    return lab.file(lab.status(name)["nodes"][0]["name"], name).read_bytes()


def test_longhorns_images_are_downloaded_cloned_encrypted_and_decrypted(lab: Lab, web: ImageServer) -> None:
    apply(lab, "longhorn/secret.yaml")
    apply(
        lab,
        "longhorn/downloaded.yaml",
        {"sourceParameters": {"url": web.url()}, "checksum": sha512(web.content)},
    )
    for file in ("cloned", "encrypted", "decrypted"):
        apply(lab, f"longhorn/{file}.yaml")
    for name in ("parrot", "parrot-cloned", "parrot-cloned-encrypted", "parrot-cloned-decrypt"):
        status = wait(lab, BACKING_IMAGE, name, LONGHORN, "Ready")
        assert status["virtualSize"] == len(web.content)
        assert {each["state"] for each in status["diskFileStatusMap"].values()} == {"ready"}
    assert file_of(lab, "parrot-cloned") == file_of(lab, "parrot-cloned-decrypt") == web.content
    assert file_of(lab, "parrot-cloned-encrypted")[:6] == b"LUKS\xba\xbe"
    delete(lab, BACKING_IMAGE, "parrot", LONGHORN)
    apply(lab, "longhorn/storage-class.yaml")
    assert lab.status("parrot-cloned-encrypted")["phase"] == "Ready"
    delete(lab, STORAGE_CLASS, "longhorn-crypto-global")
    for name in ("parrot-cloned", "parrot-cloned-encrypted", "parrot-cloned-decrypt"):
        delete(lab, BACKING_IMAGE, name, LONGHORN)


def test_an_encrypted_image_gets_another_key(lab: Lab, web: ImageServer) -> None:
    apply(lab, "longhorn/secret.yaml")
    lab.secret("another", namespace=LONGHORN)
    apply(lab, "longhorn/downloaded.yaml", {"sourceParameters": {"url": web.url()}, "checksum": ""})
    apply(lab, "longhorn/encrypted.yaml")
    made: dict[str, Any] = {
        "metadata": {"name": "parrot-rekeyed"},
        "spec": {
            "sourceType": "clone",
            "sourceParameters": {
                "backing-image": "parrot-cloned-encrypted",
                "encryption": "reencrypt",
                "secret": "longhorn-crypto",
                "secret-namespace": LONGHORN,
            },
            "secret": "another",
            "secretNamespace": LONGHORN,
        },
    }
    lab.kube.create(BACKING_IMAGE, made, LONGHORN)
    wait(lab, BACKING_IMAGE, "parrot-rekeyed", LONGHORN, "Ready")
    assert lab.status("parrot-rekeyed")["secret"] == f"{LONGHORN}/another"
    for name in ("parrot-rekeyed", "parrot-cloned-encrypted", "parrot"):
        delete(lab, BACKING_IMAGE, name, LONGHORN)
    lab.kube.delete(SECRET, "another", LONGHORN)


def test_harvesters_images_get_classes_that_say_what_they_are(lab: Lab, web: ImageServer) -> None:
    apply(lab, "harvester/secret.yaml")
    apply(lab, "harvester/downloaded.yaml", {"url": web.url()})
    template = apply(lab, "harvester/storage-class.yaml")["parameters"]
    usual = {key: value for key, value in template.items() if key not in ("fromBackup", "encrypted")}
    # What the admission takes over from the class.
    apply(lab, "harvester/encrypted-by-name.yaml", {"storageClassParameters": usual})
    apply(lab, "harvester/decrypted.yaml")
    expected = {SOURCE: "false", f"encrypted-{SOURCE}": "true", f"decrypt-{SOURCE}": "false"}
    for name, encrypted in expected.items():
        status = wait(lab, VIRTUAL_MACHINE_IMAGE, name, "default", "Imported")
        assert (status["progress"], status["storageClassName"]) == (100, f"longhorn-{name}")
        storage_class = lab.kube.get(STORAGE_CLASS, f"longhorn-{name}")
        assert storage_class is not None
        assert storage_class["parameters"]["encrypted"] == encrypted
        content = file_of(lab, storage_class["parameters"]["backingImage"])
        assert (content == web.content) == (encrypted == "false")
    made = lab.kube.get(STORAGE_CLASS, f"longhorn-encrypted-{SOURCE}")
    assert made is not None
    assert usual.items() <= made["parameters"].items()
    for name in expected:
        delete(lab, VIRTUAL_MACHINE_IMAGE, name, "default")
    delete(lab, STORAGE_CLASS, "harvester-longhorn-encryption")


def test_a_download_that_cannot_happen_is_failed_with_its_reason_and_counted(lab: Lab, web: ImageServer) -> None:
    uid = apply(lab, "harvester/downloaded.yaml", {"url": web.url(), "checksum": "0" * 128, "retry": 0})["metadata"][
        "uid"
    ]
    status = wait(lab, VIRTUAL_MACHINE_IMAGE, SOURCE, "default", "Imported", "False")
    assert "expected sha512:000" in message(status, "Imported")
    assert (status["failed"], "lastFailedTime" in status) == (1, True)
    events = lab.kube.list(EVENT, namespace="default")[0]
    assert [(each["type"], each["message"]) for each in events if each["involvedObject"].get("uid") == uid] == [
        ("Warning", message(status, "Imported"))
    ]
    delete(lab, VIRTUAL_MACHINE_IMAGE, SOURCE, "default")


def test_a_namespace_that_is_missing_is_told_and_looked_for(lab: Lab, web: ImageServer) -> None:
    lab.operator.stop()
    elsewhere = lab.operator_with("--backing-image-namespace=late")
    elsewhere.start()
    try:
        apply(lab, "harvester/downloaded.yaml", {"url": web.url()})
        status = wait(lab, VIRTUAL_MACHINE_IMAGE, SOURCE, "default", "Imported", "False")
        assert message(status, "Imported") == (
            "there is no namespace late, in which its BackingImage belongs; make it (kubectl create namespace late); "
            "it is tried again"
        )
        lab.kube.create(NAMESPACE, {"metadata": {"name": "late"}})
        wait(lab, VIRTUAL_MACHINE_IMAGE, SOURCE, "default", "Imported")
        delete(lab, VIRTUAL_MACHINE_IMAGE, SOURCE, "default")
        lab.kube.delete(NAMESPACE, "late")  # nobody here sees to its end
        apply(lab, "harvester/downloaded.yaml", {"url": web.url()})
        status = wait(lab, VIRTUAL_MACHINE_IMAGE, SOURCE, "default", "Imported", "False")
        assert "the namespace late, in which its BackingImage belongs, is being deleted" in message(status, "Imported")
        delete(lab, VIRTUAL_MACHINE_IMAGE, SOURCE, "default")
    finally:
        elsewhere.stop()
        lab.operator.start()


def test_an_image_that_a_class_names_is_kept_and_says_so(lab: Lab, web: ImageServer) -> None:
    apply(lab, "longhorn/downloaded.yaml", {"sourceParameters": {"url": web.url()}, "checksum": ""})
    wait(lab, BACKING_IMAGE, "parrot", LONGHORN, "Ready")
    names_it = {
        "metadata": {"name": "user"},
        "provisioner": "luks.csi.internal",
        "parameters": {"backingImage": "parrot"},
    }
    lab.kube.create(STORAGE_CLASS, names_it)
    lab.kube.delete(BACKING_IMAGE, "parrot", LONGHORN)

    def kept() -> bool:
        status = wait(lab, BACKING_IMAGE, "parrot", LONGHORN, "Ready", "False")
        return "StorageClass user names it" in message(status, "Ready")

    lab.wait("reason why it is kept", kept)
    lab.kube.delete(STORAGE_CLASS, "user")
    lab.wait("end of the image", lambda: lab.kube.get(BACKING_IMAGE, "parrot", LONGHORN) is None)


def test_what_happens_while_the_operator_is_away_is_made_good(lab: Lab, web: ImageServer) -> None:
    source = {"sourceParameters": {"url": web.url()}, "checksum": ""}
    apply(lab, "longhorn/downloaded.yaml", source)
    apply(lab, "harvester/downloaded.yaml", {"url": web.url()})
    wait(lab, BACKING_IMAGE, "parrot", LONGHORN, "Ready")
    wait(lab, VIRTUAL_MACHINE_IMAGE, SOURCE, "default", "Imported")
    lab.operator.kill()
    for kind, name, namespace in ((BACKING_IMAGE, "parrot", LONGHORN), (VIRTUAL_MACHINE_IMAGE, SOURCE, "default")):
        lab.kube.patch(kind, name, {"metadata": {"finalizers": None}}, namespace)
        lab.kube.delete(kind, name, namespace)
        assert lab.kube.get(kind, name, namespace) is None
    successor = apply(lab, "harvester/downloaded.yaml", {"url": web.url()})["metadata"]["uid"]
    lab.operator.start()
    wait(lab, VIRTUAL_MACHINE_IMAGE, SOURCE, "default", "Imported")
    lab.wait(
        "end of what was left", lambda: [name_of(each) for each in lab.kube.list(IMAGE)[0]] == [f"vmi-{successor}"]
    )
    (made,) = lab.kube.list(STORAGE_CLASS)[0]
    assert made["parameters"]["backingImage"] == f"vmi-{successor}"
    delete(lab, VIRTUAL_MACHINE_IMAGE, SOURCE, "default")


def test_the_sum_of_a_file_is_told(lab: Lab, web: ImageServer) -> None:
    apply(lab, "longhorn/downloaded.yaml", {"sourceParameters": {"url": web.url()}, "checksum": ""})
    status = wait(lab, BACKING_IMAGE, "parrot", LONGHORN, "Ready")
    assert status["checksum"] == hashlib.sha256(web.content).hexdigest()
    delete(lab, BACKING_IMAGE, "parrot", LONGHORN)
