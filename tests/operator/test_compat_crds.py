"""Longhorn's and Harvester's kinds at a real API: it takes their documents' manifests byte for byte, and refuses what
cannot be, each with its sentence.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from csi_driver.kube.kinds import BACKING_IMAGE, VIRTUAL_MACHINE_IMAGE, Kind
from csi_driver.operator import backing_images, machine_image_status
from csi_driver.operator.machine_image_status import Standing
from tests.operator.api import DEPLOY, MANIFESTS, Api
from tests.operator.lab import documents
from tests.operator_fakes import NOW

DOCUMENTS = sorted(MANIFESTS.glob("*/*.yaml"))
BACKING, MACHINE = "BackingImage", "VirtualMachineImage"
SHA512 = "ab" * 64
Json = dict[str, Any]


@pytest.fixture(scope="module")
def api(api: Api) -> Api:
    api.install(DEPLOY / "compat")
    api.kubectl("create", "namespace", "longhorn-system")
    return api


def thing(kind: str, spec: Json, name: str = "a") -> str:
    group, namespace = (
        ("longhorn.io/v1beta2", "longhorn-system") if kind == BACKING else ("harvesterhci.io/v1beta1", "default")
    )
    return json.dumps(
        {"apiVersion": group, "kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": spec}
    )


def backing(kind: str, parameters: Json, **more: object) -> Json:
    return {"sourceType": kind, "sourceParameters": parameters} | more


def machine(kind: str = "download", **more: object) -> Json:
    return {"displayName": "an image", "sourceType": kind} | more


def crypto(operation: str = "encrypt") -> Json:
    return {"cryptoOperation": operation, "sourceImageName": "s", "sourceImageNamespace": "default"}


URL = "https://example.org/disk.raw"
FROM = {"url": URL}
SECRET = {"secret": "key", "secret-namespace": "keys"}
RESULT = {"secret": "new", "secretNamespace": "keys"}

TAKEN: list[tuple[str, Json]] = [
    (BACKING, backing("download", {"url": "http://example.org/disk.raw"})),
    (BACKING, backing("download", FROM, checksum="", nodeSelector=[], diskSelector=["ssd"], dataEngine="v1")),
    (BACKING, backing("upload", {}, minNumberOfCopies=0, checksum=SHA512, **RESULT)),
    (BACKING, {"sourceType": "upload"}),
    (BACKING, backing("export-from-volume", {"volume-name": "pvc-1", "export-type": "raw"})),
    (BACKING, backing("clone", {"backing-image": "b"})),
    (BACKING, backing("clone", {"backing-image": "b", "encryption": ""})),
    (BACKING, backing("clone", {"backing-image": "b", "encryption": "reencrypt", **SECRET}, **RESULT)),
    (MACHINE, machine(url=URL, checksum=SHA512, retry=0, backend="backingimage", targetStorageClassName="")),
    (MACHINE, machine("upload", url="", storageClassParameters={"numberOfReplicas": "2"})),
    (MACHINE, machine("export-from-volume", pvcName="data", pvcNamespace="default")),
    (MACHINE, machine("clone", securityParameters=crypto("decrypt"))),
]

REFUSED: list[tuple[str, Json, str]] = [
    (BACKING, backing("restore", {"backup-url": "s3://x"}), "nobody here reads those; use download or upload"),
    (BACKING, backing("download", {}), "download needs url in sourceParameters, an http or https URL"),
    (BACKING, {"sourceType": "download"}, "download needs url in sourceParameters, an http or https URL"),
    (
        BACKING,
        backing("download", {"url": "ftp://example.org/x"}),
        "download needs url in sourceParameters, an http or https URL",
    ),
    (BACKING, backing("export-from-volume", {}), "export-from-volume needs volume-name in sourceParameters"),
    (BACKING, {"sourceType": "clone"}, "clone needs backing-image in sourceParameters"),
    (BACKING, backing("clone", {"backing-image": "a"}), "a backing image is no clone of itself; name another one"),
    (BACKING, backing("clone", {"backing-image": ""}), "clone needs backing-image in sourceParameters"),
    (
        BACKING,
        backing("clone", {"backing-image": "b", "encryption": "rot13", **SECRET}),
        "encryption must be ignore, encrypt, decrypt or reencrypt",
    ),
    *(
        (
            BACKING,
            backing("clone", {"backing-image": "b", "encryption": operation, **partly}, **RESULT),
            "encrypt, decrypt and reencrypt need secret and secret-namespace in sourceParameters",
        )
        for operation, partly in (
            ("encrypt", {}),
            ("decrypt", {"secret": "key"}),
            ("reencrypt", {"secret": "", "secret-namespace": "keys"}),
        )
    ),
    (
        BACKING,
        backing("clone", {"backing-image": "b", "encryption": "reencrypt", **SECRET}),
        "reencrypt needs secret and secretNamespace in spec, the secret of the result",
    ),
    (BACKING, backing("download", FROM, secret="key"), "secret and secretNamespace go together; name both or none"),
    (BACKING, backing("download", FROM, checksum="1234"), "spec.checksum in body should match"),
    (BACKING, backing("download", FROM, nodeSelector=["a b"]), "spec.nodeSelector[0] in body should match"),
    (BACKING, backing("imported", {}), 'Unsupported value: "imported"'),
    (MACHINE, machine("restore"), "nobody here reads those; use download or upload"),
    (MACHINE, machine(url=URL, backend="cdi"), "the backend cdi is not here; leave backend out"),
    (MACHINE, machine(url=URL, targetStorageClassName="fast"), "name a class in the annotation"),
    (MACHINE, machine(), "download needs url, an http or https URL"),
    (MACHINE, machine(url="file:///etc/shadow"), "download needs url, an http or https URL"),
    (MACHINE, machine("upload", url=URL), "a url is for sourceType download; leave it out"),
    (
        MACHINE,
        machine("clone", securityParameters=crypto(), checksum=SHA512),
        "a checksum is of what is downloaded or uploaded; leave it out",
    ),
    (MACHINE, machine("export-from-volume", pvcName="data"), "export-from-volume needs pvcName and pvcNamespace"),
    (MACHINE, machine("clone"), "clone needs securityParameters"),
    (MACHINE, machine(url=URL, securityParameters=crypto()), "and nothing else takes them"),
    (MACHINE, machine("clone", securityParameters=crypto("reencrypt")), 'Unsupported value: "reencrypt"'),
    (MACHINE, machine("clone", securityParameters={"cryptoOperation": "encrypt"}), "sourceImageName: Required value"),
    (MACHINE, {"sourceType": "upload"}, "displayName: Required value"),
]

KEPT = "do not change; delete the image and make another one"
STAYS = "does not change; delete it and make another one"
CHANGES: list[tuple[str, Json, Json, str | None]] = [
    *(
        (BACKING, backing("upload", {"a": "b"}, checksum=SHA512, **RESULT), change, STAYS)
        for change in (
            {"sourceType": "download", "sourceParameters": {"url": URL}},
            {"sourceParameters": {"a": "c"}},
            {"sourceParameters": None},
            {"checksum": None},
            {"checksum": "cd" * 64},
            {"secret": "other"},
            {"secretNamespace": "other"},
            {"secret": None, "secretNamespace": None},
        )
    ),
    (
        BACKING,
        backing("download", FROM),
        {"minNumberOfCopies": 2, "nodeSelector": ["a"], "diskSelector": ["ssd"]},
        None,
    ),
    *(
        (
            MACHINE,
            machine("export-from-volume", pvcName="p", pvcNamespace="n", storageClassParameters={"a": "b"}),
            change,
            KEPT,
        )
        for change in (
            {"displayName": "another"},
            {"sourceType": "upload"},
            {"pvcName": "q"},
            {"pvcNamespace": "o"},
            {"storageClassParameters": {"a": "c"}},
            {"storageClassParameters": None},
        )
    ),
    (MACHINE, machine(url=URL, checksum=SHA512), {"url": "https://example.org/other.raw"}, KEPT),
    (MACHINE, machine(url=URL, checksum=SHA512), {"checksum": None}, KEPT),
    (
        MACHINE,
        machine("clone", securityParameters=crypto()),
        {"securityParameters": {"sourceImageName": "other"}},
        KEPT,
    ),
    (MACHINE, machine(url=URL), {"description": "told", "retry": 5}, None),
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_documents_manifest_is_taken_byte_for_byte(api: Api, path: Path) -> None:
    said = api.kubectl("create", "--validate=strict", "-f", path).said
    assert " created" in said
    assert "Warning" not in said
    api.kubectl("delete", "-f", path)


@pytest.mark.parametrize(("kind", "spec"), TAKEN)
def test_what_can_be_is_taken(api: Api, kind: str, spec: Json) -> None:
    said = api.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", stdin=thing(kind, spec)).said
    assert "created" in said


@pytest.mark.parametrize(("kind", "spec", "why"), REFUSED)
def test_what_cannot_be_is_refused_with_its_sentence(api: Api, kind: str, spec: Json, why: str) -> None:
    refused = api.kubectl("create", "--dry-run=server", "-f", "-", stdin=thing(kind, spec), check=False)
    assert refused.code == 1
    assert why in refused.said


@pytest.fixture
def made(api: Api, request: pytest.FixtureRequest) -> Iterator[str]:
    kind, spec = request.param
    api.kubectl("create", "-f", "-", stdin=thing(kind, spec))
    namespace = "longhorn-system" if kind == BACKING else "default"
    yield f"--namespace={namespace} {kind.lower()}/a"
    api.kubectl("delete", f"--namespace={namespace}", f"{kind.lower()}/a")


@pytest.mark.parametrize(
    ("made", "change", "why"), [((kind, spec), change, why) for kind, spec, change, why in CHANGES], indirect=["made"]
)
def test_what_it_is_made_of_stays_and_what_is_wanted_of_it_changes(
    api: Api, made: str, change: Json, why: str | None
) -> None:
    patched = api.kubectl("patch", *made.split(), "--type=merge", "-p", json.dumps({"spec": change}), check=why is None)
    assert (patched.code == 0) == (why is None)
    assert why is None or why in patched.said


def test_a_name_that_no_image_can_have_is_refused(api: Api) -> None:
    refused = api.kubectl("create", "-f", "-", stdin=thing(BACKING, backing("download", FROM), "x" * 64), check=False)
    assert "a backing image's name has at most 63 lower-case letters, digits, - and ." in refused.said


def test_a_retry_count_is_three_unless_told(api: Api) -> None:
    said = api.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", stdin=thing(MACHINE, machine(url=URL)))
    assert json.loads(said.stdout)["spec"]["retry"] == 3


def test_every_field_of_a_status_is_kept(api: Api) -> None:
    """What the API dropped would be written again and again."""
    telling = {"phase": "Failed", "message": "m", "fileSize": 1, "virtualSize": 2, "checksum": "c", "progress": 3}
    image = {"metadata": {"name": "a", "uid": "i"}, "status": telling}
    states = {"one": {"state": "Failed", "attempts": 9, "permanent": True, "progress": 3, "message": "m"}}
    copies = [{"spec": {"node": node, "make": True}, "status": status} for node, status in states.items()]
    told = {
        BACKING_IMAGE: (backing("download", FROM, dataEngine="v2"), "longhorn-system"),
        VIRTUAL_MACHINE_IMAGE: (machine(url=URL), "default"),
    }
    with api.client() as kube:
        for kind, (spec, namespace) in told.items():
            made = kube.create(kind, {"metadata": {"name": "a"}, "spec": spec}, namespace)
            if kind == BACKING_IMAGE:
                status = backing_images.status_of(made, image, copies, NOW)
                assert status.keys() == schema(kind).keys() - {"realSize"}
            else:
                there = Standing(backing=made, image=image, maker=copies[0], class_name="c")
                status = machine_image_status.status_of(made, there, NOW)
                assert status.keys() == schema(kind).keys()
            assert kube.patch(kind, "a", {"status": status}, namespace, status=True)["status"] == status
            kube.delete(kind, "a", namespace)


def schema(kind: Kind) -> Json:
    """The fields of a kind's status."""
    (crd,) = documents(DEPLOY / f"compat/{kind.plural}.yaml")
    found: Json = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
    return found


def test_an_administrator_sees_progress_and_reason_in_the_list(api: Api) -> None:
    heads = {
        BACKING: {"UUID", "SOURCETYPE", "READY", "SIZE", "VIRTUALSIZE", "AGE", "MESSAGE"},
        MACHINE: {"DISPLAY-NAME", "PROGRESS", "SIZE", "VIRTUALSIZE", "CLASS", "AGE", "MESSAGE"},
    }
    for kind, columns in heads.items():
        api.kubectl(
            "create", "-f", "-", stdin=thing(kind, backing("download", FROM) if kind == BACKING else machine(url=URL))
        )
        namespace = "--namespace=longhorn-system" if kind == BACKING else "--namespace=default"
        assert columns <= set(api.kubectl("get", namespace, kind.lower(), "-o", "wide").text.split("\n")[0].split())
        api.kubectl("delete", namespace, f"{kind.lower()}/a")
