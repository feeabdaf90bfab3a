"""Harvester's VirtualMachineImages: the BackingImage and the class that are made, what is told, who goes first."""

import itertools
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest

from csi_driver.kube.kinds import (
    BACKING_IMAGE,
    CLAIM,
    CRD,
    IMAGE,
    IMAGE_COPY,
    MANAGED_BY,
    ORIGIN,
    STORAGE_CLASS,
    VIRTUAL_MACHINE_IMAGE,
    VOLUME,
    Json,
    Kind,
)
from csi_driver.kube.refusals import NamespaceGoing
from csi_driver.model.errors import (
    DriverError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from csi_driver.operator.backing_images import RETRIES, BackingImages
from csi_driver.operator.class_parameters import secret_keys, verified
from csi_driver.operator.compat import check_crds
from csi_driver.operator.machine_image_status import Standing, status_of
from csi_driver.operator.standing import LATER, SOON, Problem
from csi_driver.operator.virtual_machine_images import SOURCE, VirtualMachineImages, backing_of, class_of
from tests.operator_fakes import NOW, Cache, Call, EventList, FakeApi, conditions, kept

SPACE, DRIVER = "longhorn-system", "driver.longhorn.io"
URL = "https://example.org/alpine.iso"
LATER_ON = "2026-11-28T13:00:00+00:00"


def secrets(name: str, *operations: str) -> dict[str, str]:
    """A class's parameters that name the secret default/NAME for these operations, or for the usual three."""
    found: dict[str, str] = {}
    for operation in operations or ("node-publish", "node-stage", "provisioner"):
        found |= dict(zip(secret_keys(operation), (name, "default"), strict=True))
    return found


PLAIN = {"migratable": "true", "numberOfReplicas": "2", "staleReplicaTimeout": "2880"}
ENCRYPTING = PLAIN | secrets("encryption")


def machine(kind: str = "download", /, name: str = "alpine", **more: Any) -> Json:
    spec = {"displayName": "Alpine", "sourceType": kind, "retry": 3} | ({"url": URL} if kind == "download" else {})
    metadata = {"name": name, "namespace": "default", "uid": f"m-{name}"}
    return {"metadata": metadata, "spec": spec | more}


def clone(operation: str, parameters: Mapping[str, str] | None = None) -> Json:
    security = {"cryptoOperation": operation, "sourceImageName": "alpine", "sourceImageNamespace": "default"}
    more = {} if parameters is None else {"storageClassParameters": dict(parameters)}
    return machine("clone", name="result", securityParameters=security, **more)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (machine(), {"sourceType": "download", "sourceParameters": {"url": URL}}),
        (
            machine(checksum="ab" * 64, storageClassParameters=PLAIN),
            {
                "sourceType": "download",
                "sourceParameters": {"url": URL},
                "checksum": "ab" * 64,
                "minNumberOfCopies": 2,
            },
        ),
        (machine("upload", storageClassParameters={}), {"sourceType": "upload", "sourceParameters": {}}),
        (
            machine("export-from-volume", pvcName="data", pvcNamespace="team"),
            {
                "sourceType": "export-from-volume",
                "sourceParameters": {"volume-name": "pvc-1", "export-type": "raw"},
            },
        ),
        (
            clone("encrypt", ENCRYPTING),
            {
                "sourceType": "clone",
                "minNumberOfCopies": 2,
                "sourceParameters": {
                    "backing-image": "vmi-m-alpine",
                    "encryption": "encrypt",
                    "secret": "encryption",
                    "secret-namespace": "default",
                },
            },
        ),
        (
            clone("decrypt"),
            {
                "sourceType": "clone",
                "sourceParameters": {
                    "backing-image": "vmi-m-alpine",
                    "encryption": "decrypt",
                    "secret": "of-source",
                    "secret-namespace": "default",
                },
            },
        ),
    ],
)
def test_each_field_becomes_what_it_means(given: Json, wanted: Json) -> None:
    source = machine(storageClassParameters=secrets("of-source"))
    assert backing_of(given, source, "pvc-1") == wanted


def test_a_clone_without_its_source_or_without_a_secret_says_what_to_do() -> None:
    with pytest.raises(InvalidArgument, match=r"no VirtualMachineImage default/alpine to encrypt \(its name is wanted"):
        backing_of(clone("encrypt", ENCRYPTING))
    with pytest.raises(InvalidArgument, match=r"the storageClassParameters name no secret to encrypt it with .*anew"):
        backing_of(clone("encrypt", PLAIN), machine(storageClassParameters=ENCRYPTING))
    with pytest.raises(InvalidArgument, match=r"of the source default/alpine name no secret to decrypt it with"):
        backing_of(clone("decrypt", ENCRYPTING), machine())


def image(phase: str = "Ready", /, *, name: str = "vmi-m-alpine", **told: Any) -> Json:
    facts = {"encrypted": False, "fileSize": 10, "virtualSize": 20} if phase == "Ready" else {}
    return {"metadata": {"name": name, "uid": "i-1"}, "spec": {}, "status": {"phase": phase, **facts, **told}}


def test_the_class_is_as_harvesters_document_shows_it() -> None:
    made = class_of(
        clone("encrypt", ENCRYPTING), image(encrypted=True, secret="default/encryption"), "longhorn-result", DRIVER
    )
    metadata = made.pop("metadata")
    assert metadata == {
        "name": "longhorn-result",
        "annotations": {ORIGIN: "VirtualMachineImage/default/result/m-result"},
        "labels": {MANAGED_BY: "luks-csi"},
    }
    assert made == {
        "provisioner": DRIVER,
        "parameters": {
            "backingImage": "vmi-m-alpine",
            "backingImageDataSourceType": "clone",
            "encrypted": "true",
            **ENCRYPTING,
        },
        "reclaimPolicy": "Delete",
        "volumeBindingMode": "Immediate",
        "allowVolumeExpansion": True,
    }


def test_what_was_verified_counts_and_not_what_a_parameter_says() -> None:
    said = ENCRYPTING | secrets("encryption", "node-expand") | {"encrypted": "true"}
    assert verified(said, encrypted=False, secret=None) == PLAIN | {"encrypted": "false"}
    assert verified(PLAIN | {"encrypted": "false"}, encrypted=True, secret="default/real") == PLAIN | {
        "encrypted": "true",
        **secrets("real"),
    }
    assert verified(said, encrypted=True, secret="default/real") == PLAIN | {
        "encrypted": "true",
        **secrets("real", "node-publish", "node-stage", "provisioner", "node-expand"),
    }
    assert verified(said, encrypted=True, secret=None) == said
    assert verified(PLAIN, encrypted=True, secret=None) == PLAIN | {"encrypted": "true"}


def test_a_parameter_that_is_not_taken_over_stays_out_of_the_class() -> None:
    assert verified({"backingImage": "other", "mkfsOptions": "-b 1"}, encrypted=False, secret=None) == {
        "encrypted": "false"
    }


BACKING: Json = {"metadata": {"name": "vmi-m-alpine", "namespace": SPACE, "uid": "b-1"}}


def maker(state: str = "Failed", /, **told: Any) -> Json:
    return {"spec": {"node": "one", "make": True}, "status": {"state": state, **told}}


Told = tuple[str, str, str]


@pytest.mark.parametrize(
    ("there", "progress", "imported", "held"),
    [
        (Standing(), 0, ("Unknown", "Pending", ""), set()),
        (Standing(backing=BACKING), 0, ("Unknown", "Pending", ""), {"Initialized"}),
        (
            Standing(backing=BACKING, image=image("Pending", message="waits for luks-csi image upload")),
            0,
            ("Unknown", "Pending", "waits for luks-csi image upload"),
            {"Initialized"},
        ),
        (
            Standing(backing=BACKING, image=image("InProgress", progress=43, message="43 %")),
            43,
            ("Unknown", "InProgress", "43 %"),
            {"Initialized"},
        ),
        (
            Standing(backing=BACKING, image=image("InProgress", progress=100, message="")),
            99,
            ("Unknown", "InProgress", ""),
            {"Initialized"},
        ),
        (
            Standing(backing=BACKING, image=image(progress=100)),
            99,
            ("Unknown", "Ready", ""),
            {"Initialized", "MetadataReady"},
        ),
        (
            Standing(backing=BACKING, image=image(progress=100), class_name="longhorn-alpine"),
            100,
            ("True", "Imported", ""),
            {"Initialized", "Imported", "MetadataReady"},
        ),
        (
            Standing(
                backing=BACKING,
                image=image("Failed", progress=7, message="node one: 404; it is tried again"),
                maker=maker(attempts=2, permanent=False),
            ),
            7,
            ("Unknown", "Failed", "node one: 404; it is tried again"),
            {"Initialized"},
        ),
        (
            Standing(
                backing=BACKING,
                image=image("Failed", message="node one: 404 (given up after 4 attempts)"),
                maker=maker(attempts=4, permanent=True),
            ),
            0,
            ("False", "Failed", "node one: 404 (given up after 4 attempts)"),
            {"Initialized", "RetryLimitExceeded"},
        ),
        (
            Standing(
                backing=BACKING,
                image=image("Failed", message="node one: no disk image"),
                maker=maker(attempts=1, permanent=True),
            ),
            0,
            ("False", "Failed", "node one: no disk image"),
            {"Initialized"},
        ),
        (
            Standing(backing=BACKING, image=image("Failed", message="image a is encrypted already")),
            0,
            ("False", "Failed", "image a is encrypted already"),
            {"Initialized"},
        ),
        (
            Standing(problem=Problem("Refused", "there is no claim team/data")),
            0,
            ("False", "Refused", "there is no claim team/data"),
            set(),
        ),
        (
            Standing(backing=BACKING, image=image(), problem=Problem("NameTaken", "delete it")),
            0,
            ("False", "NameTaken", "delete it"),
            {"Initialized", "MetadataReady"},
        ),
    ],
)
def test_each_state_has_its_conditions(there: Standing, progress: int, imported: Told, held: set[str]) -> None:
    status = status_of(machine(), there, NOW)
    assert status["progress"] == progress
    told = conditions({"status": status})
    assert told["Imported"] == imported
    assert {kind for kind, (state, _, _) in told.items() if state == "True"} == held
    assert set(told) == {"Initialized", "Imported", "RetryLimitExceeded", "BackingImageMissing", "MetadataReady"}
    if there.problem is not None and there.backing is None:
        assert told["Initialized"] == ("False", there.problem.reason, there.problem.message)


def test_why_a_backing_image_has_no_image_is_told() -> None:
    told = [{"type": "Ready", "status": "False", "reason": "NameTaken", "message": "delete one of them"}]
    there = Standing(backing=BACKING | {"status": {"conditions": told}})
    assert conditions({"status": status_of(machine(), there, NOW)})["Imported"] == (
        "False",
        "NameTaken",
        "delete one of them",
    )


def test_sizes_class_and_url_are_told_as_they_come_to_be_known() -> None:
    bare = status_of(machine("upload"), Standing(backing=BACKING), NOW)
    assert not bare.keys() & {"appliedUrl", "size", "virtualSize", "storageClassName", "targetStorageClassName"}
    full = status_of(machine(), Standing(backing=BACKING, image=image(), class_name="longhorn-alpine"), NOW)
    del full["conditions"]
    assert full == {
        "appliedUrl": URL,
        "progress": 100,
        "size": 10,
        "virtualSize": 20,
        "storageClassName": "longhorn-alpine",
        "targetStorageClassName": "longhorn-alpine",
        "failed": 0,
    }


def test_failures_are_counted_with_the_time_of_the_last_and_not_forgotten() -> None:
    def after(before: Json, now: str, **told: Any) -> Json:
        there = Standing(backing=BACKING, image=image("Failed"), maker=maker(**told))
        status = status_of(machine() | {"status": before}, there, now)
        return {"failed": status["failed"], "lastFailedTime": status.get("lastFailedTime")}

    first = after({}, NOW, attempts=1)
    assert first == {"failed": 1, "lastFailedTime": NOW}
    assert after(first, LATER_ON, attempts=1) == first
    assert after(first, LATER_ON, attempts=2) == {"failed": 2, "lastFailedTime": LATER_ON}
    assert after(first, LATER_ON, attempts=None) == first


class Rig:
    """Both controllers over an API in memory, BackingImages and Images as they would be; nobody makes an image."""

    def __init__(self) -> None:
        self.api = FakeApi()
        kinds = {*VirtualMachineImages.KINDS, *BackingImages.KINDS}
        self.seen: dict[Kind, Cache] = {kind: Cache(self.api, kind) for kind in kinds}
        minutes = itertools.count(step=60)
        self.events = EventList()
        clock = partial(next, map(float, minutes))
        self.machines = VirtualMachineImages(self.api, self.seen, SPACE, DRIVER, self.events, clock)
        self.backings = BackingImages(self.api, self.seen, SPACE, self.events, clock)

    def put(self, given: Json) -> Json:
        return self.api.put(VIRTUAL_MACHINE_IMAGE, given, "default")

    def look(self, name: str = "alpine") -> float | None:
        wait = self.machines.reconcile(f"default/{name}")
        self.backings.reconcile(f"vmi-m-{name}")
        return wait

    def ready(self, name: str = "alpine", **told: Any) -> float | None:
        """Its Image becomes ready."""
        self.look(name)
        status = image(**told)["status"]
        self.api.change(IMAGE, f"vmi-m-{name}", {"metadata": {"finalizers": ["held"]}, "status": status})
        return self.look(name)

    def machine(self, name: str = "alpine") -> Json:
        found = self.api.get(VIRTUAL_MACHINE_IMAGE, name, "default")
        assert found is not None
        return found

    def told(self, name: str = "alpine") -> dict[str, Told]:
        return conditions(self.machine(name))

    def storage_class(self, name: str) -> Json:
        found = self.api.get(STORAGE_CLASS, name)
        assert found is not None
        return found

    def backing(self, name: str = "vmi-m-alpine") -> Json | None:
        return self.api.get(BACKING_IMAGE, name, SPACE)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_backing_image_is_made_and_then_a_class(rig: Rig) -> None:
    rig.put(machine(storageClassParameters=PLAIN))
    assert rig.look() is None
    assert kept(rig.machine())
    backing = rig.backing()
    assert backing is not None
    assert backing["metadata"]["annotations"] == {
        ORIGIN: "VirtualMachineImage/default/alpine/m-alpine",
        RETRIES: "3",
    }
    assert rig.api.all(STORAGE_CLASS) == []
    assert rig.ready() is None
    assert rig.machine()["status"]["storageClassName"] == "longhorn-alpine"
    assert rig.storage_class("longhorn-alpine")["parameters"] == {
        "backingImage": "vmi-m-alpine",
        "backingImageDataSourceType": "download",
        "encrypted": "false",
        **PLAIN,
    }
    assert rig.told()["Imported"] == ("True", "Imported", "")
    assert sorted(rig.events.lines) == [
        "BackingImage vmi-m-alpine: Ready: image vmi-m-alpine is ready",
        "VirtualMachineImage alpine: Ready: image alpine is ready",
    ]


def test_a_failure_is_an_event_of_both_kinds_told_once(rig: Rig) -> None:
    rig.put(machine())
    rig.look()
    assert rig.events.lines == []
    rig.api.change(IMAGE, "vmi-m-alpine", {"status": {"phase": "Failed", "message": "no route to example.org"}})
    for _ in range(2):
        rig.look()
    assert sorted(rig.events.lines) == [
        "! BackingImage vmi-m-alpine: Failed: no route to example.org",
        "! VirtualMachineImage alpine: Failed: no route to example.org",
    ]


def test_no_class_is_made_for_an_image_that_goes(rig: Rig) -> None:
    rig.put(machine())
    rig.look()
    rig.api.change(IMAGE, "vmi-m-alpine", {"metadata": {"finalizers": ["held"]}, "status": image()["status"]})
    rig.api.remove(IMAGE, "vmi-m-alpine")
    rig.look()
    assert rig.api.all(STORAGE_CLASS) == []
    assert rig.told()["Imported"][0] == "Unknown"


def test_looking_again_writes_nothing(rig: Rig) -> None:
    rig.put(machine())
    rig.ready()
    rig.look()
    rig.api.written()
    assert rig.look() is None
    assert rig.api.written() == []


def test_a_plain_image_of_an_encrypted_class_is_not_passed_off_as_encrypted(rig: Rig) -> None:
    rig.put(machine(storageClassParameters=ENCRYPTING | {"encrypted": "true"}))
    rig.ready(encrypted=False)
    parameters = rig.storage_class("longhorn-alpine")["parameters"]
    assert parameters["encrypted"] == "false"
    assert not [key for key in parameters if "secret" in key]
    said = rig.told()["Imported"][2]
    assert 'what was imported is not encrypted, and so its StorageClass longhorn-alpine says encrypted "false"' in said


def test_an_encrypted_image_of_a_plain_class_says_so(rig: Rig) -> None:
    rig.put(machine(storageClassParameters=PLAIN))
    rig.ready(encrypted=True, secret="default/key")
    assert rig.storage_class("longhorn-alpine")["parameters"].items() >= {"encrypted": "true", **secrets("key")}.items()


def test_another_number_of_retries_reaches_the_image(rig: Rig) -> None:
    rig.put(machine())
    rig.look()
    rig.api.change(VIRTUAL_MACHINE_IMAGE, "alpine", {"spec": {"retry": 0}}, "default")
    rig.look()
    made = rig.api.get(IMAGE, "vmi-m-alpine")
    assert made is not None
    assert made["spec"]["retries"] == 0


def test_a_class_of_that_name_is_left_alone_and_another_name_taken(rig: Rig) -> None:
    theirs = rig.api.put(STORAGE_CLASS, {"metadata": {"name": "longhorn-alpine"}, "provisioner": "other"})
    rig.put(machine())
    rig.ready()
    assert rig.storage_class("longhorn-alpine") == theirs
    assert rig.machine()["status"]["storageClassName"] == "lh-m-alpine"
    rig.api.lose(STORAGE_CLASS, "longhorn-alpine")
    rig.look()
    assert [each["metadata"]["name"] for each in rig.api.all(STORAGE_CLASS)] == ["lh-m-alpine"], "it keeps its name"


def test_where_both_names_are_taken_it_says_so(rig: Rig) -> None:
    for name in ("longhorn-alpine", "lh-m-alpine"):
        rig.api.put(STORAGE_CLASS, {"metadata": {"name": name}, "provisioner": "other"})
    rig.put(machine())
    assert rig.ready() == LATER
    assert rig.told()["Imported"] == (
        "False",
        "NameTaken",
        "there is a StorageClass lh-m-alpine that was not made for this image, and it is left alone; delete it",
    )


def test_a_name_too_long_for_a_class_takes_the_other(rig: Rig) -> None:
    name = "a" * 250
    made = machine(name=name)
    made["metadata"]["uid"] = "m-long"
    rig.put(made)
    rig.machines.reconcile(f"default/{name}")
    rig.backings.reconcile("vmi-m-long")
    rig.api.change(IMAGE, "vmi-m-long", {"status": image()["status"]})
    rig.machines.reconcile(f"default/{name}")
    assert [each["metadata"]["name"] for each in rig.api.all(STORAGE_CLASS)] == ["lh-m-long"]


def test_a_class_that_somebody_has_deleted_is_made_anew(rig: Rig) -> None:
    rig.put(machine())
    rig.ready()
    rig.api.lose(STORAGE_CLASS, "longhorn-alpine")
    rig.look()
    assert rig.storage_class("longhorn-alpine")


def test_a_class_that_says_something_else_than_was_verified_is_made_anew(rig: Rig) -> None:
    rig.put(machine())
    rig.ready()
    rig.ready(encrypted=True, secret="default/key")
    assert rig.storage_class("longhorn-alpine")["parameters"]["encrypted"] == "true"


THEIRS: list[Json] = [
    {"provisioner": "ebs.csi.aws.com", "labels": {MANAGED_BY: "luks-csi"}},
    {"provisioner": DRIVER, "labels": {}},
    {"provisioner": DRIVER, "labels": None},
]


@pytest.mark.parametrize("theirs", THEIRS)
@pytest.mark.parametrize("origin", ["VirtualMachineImage/nix/nix/nix", "VirtualMachineImage/default/alpine/m-alpine"])
def test_who_may_annotate_classes_has_none_of_others_deleted(rig: Rig, origin: str, theirs: Json) -> None:
    metadata = {"name": "standard", "annotations": {ORIGIN: origin}, "labels": theirs["labels"]}
    standard = rig.api.put(STORAGE_CLASS, {"metadata": metadata, "provisioner": theirs["provisioner"]})
    for key in ("nix/nix", "default/alpine"):
        rig.machines.reconcile(key)
    rig.put(machine())
    rig.ready()
    rig.api.remove(VIRTUAL_MACHINE_IMAGE, "alpine", "default")
    rig.look()
    assert rig.api.all(STORAGE_CLASS) == [standard]


@pytest.mark.parametrize("theirs", THEIRS)
def test_a_class_of_others_is_not_made_the_images_own_by_an_annotation(rig: Rig, theirs: Json) -> None:
    marks = {"annotations": {ORIGIN: "VirtualMachineImage/default/alpine/m-alpine"}, "labels": theirs["labels"]}
    posing = {"metadata": {"name": "longhorn-alpine", **marks}, "provisioner": theirs["provisioner"], "parameters": {}}
    posing = rig.api.put(STORAGE_CLASS, posing)
    rig.put(machine())
    rig.ready()
    assert rig.storage_class("longhorn-alpine") == posing
    assert rig.machine()["status"]["storageClassName"] == "lh-m-alpine"


@pytest.mark.parametrize("name", ["longhorn-alpine", "lh-m-alpine"])
def test_a_class_that_said_no_more_what_it_was_made_for_is_missed_too(rig: Rig, name: str) -> None:
    rig.put(machine())
    rig.ready()
    rig.api.lose(STORAGE_CLASS, "longhorn-alpine")
    controller = rig.machines.controller
    controller.start()
    rig.machines.changed(STORAGE_CLASS, {"metadata": {"name": name}, "provisioner": DRIVER})
    deadline = time.monotonic() + 60
    while not rig.api.all(STORAGE_CLASS):
        assert time.monotonic() < deadline, "it is not made again"
        time.sleep(0.01)
    controller.ask_to_end()
    controller.join(60)


def test_a_clone_waits_for_its_source_and_takes_that_ones_secret(rig: Rig) -> None:
    missing = "there is no VirtualMachineImage default/alpine to decrypt (its name is wanted, not its displayName)"
    rig.put(clone("decrypt", PLAIN))
    assert rig.look("result") == LATER
    assert rig.told("result")["Initialized"] == (
        "False",
        "Refused",
        f"{missing}; it is looked for again",
    )
    rig.put(machine(storageClassParameters=secrets("of-source")))
    assert rig.look("result") is None
    made = rig.api.get(IMAGE, "vmi-m-result")
    assert made is not None
    assert made["spec"]["secretRef"] == {"name": "of-source", "namespace": "default"}
    assert made["spec"]["source"] == {"clone": {"image": "vmi-m-alpine", "encryption": "decrypt"}}


def test_a_clone_is_made_of_the_image_that_its_maker_was_asked_for_his_rights_to(rig: Rig) -> None:
    """Another one of that name has another secret, which he may not read."""
    wanted = clone("decrypt", PLAIN)
    wanted["metadata"]["annotations"] = {SOURCE: "m-earlier"}
    rig.put(wanted)
    rig.put(machine(storageClassParameters=secrets("of-another")))
    assert rig.look("result") == LATER
    assert "default/alpine is another one than when this image was made" in rig.told("result")["Initialized"][2]
    assert rig.api.get(IMAGE, "vmi-m-result") is None
    wanted["metadata"]["annotations"] = {SOURCE: "m-alpine"}
    rig.put(wanted)
    assert rig.look("result") is None
    assert rig.api.get(IMAGE, "vmi-m-result") is not None


@pytest.mark.parametrize(
    ("claim", "said"),
    [(None, "there is no claim team/data"), ({"spec": {}}, "the claim team/data is not bound yet")],
)
def test_a_claim_that_cannot_be_exported_is_told_of_and_looked_for_again(
    rig: Rig, claim: Json | None, said: str
) -> None:
    if claim:
        rig.api.put(CLAIM, {"metadata": {"name": "data"}} | claim, "team")
    rig.put(machine("export-from-volume", pvcName="data", pvcNamespace="team"))
    assert rig.look() == LATER
    assert rig.told()["Imported"][2] == f"{said}; it is looked at again, else make the image anew of another claim"
    rig.api.put(CLAIM, {"metadata": {"name": "data", "uid": "c-1"}, "spec": {"volumeName": "pvc-1"}}, "team")
    volume = {
        "metadata": {"name": "pvc-1"},
        "spec": {"claimRef": {"name": "data", "namespace": "others", "uid": "c-0"}},
    }
    rig.api.put(VOLUME, volume)
    assert rig.look() == LATER
    assert "names the PersistentVolume pvc-1, which is not bound to it" in rig.told()["Imported"][2]
    assert rig.backing() is None
    volume["spec"] = {"claimRef": {"name": "data", "namespace": "team", "uid": "c-1"}}
    rig.api.put(VOLUME, volume)
    assert rig.look() is None
    backing = rig.backing()
    assert backing is not None
    assert backing["spec"]["sourceParameters"]["volume-name"] == "pvc-1"


def test_a_backing_image_that_somebody_has_deleted_is_told_of_until_it_is_there_again(rig: Rig) -> None:
    rig.put(machine())
    rig.ready()
    rig.api.lose(BACKING_IMAGE, "vmi-m-alpine", SPACE)
    rig.api.lose(IMAGE, "vmi-m-alpine")
    for _ in range(2):
        rig.look()
        assert rig.told()["BackingImageMissing"] == (
            "True",
            "Missing",
            "somebody deleted the BackingImage of this image; it is made anew from its source",
        )
        assert rig.told()["Imported"][0] == "Unknown"
    assert rig.machine()["status"]["storageClassName"] == "longhorn-alpine", "its volumes can be used meanwhile"
    rig.ready()
    assert rig.told()["BackingImageMissing"][0] == "False"
    assert rig.told()["Imported"][0] == "True"


def test_a_backing_image_of_somebody_else_is_left_alone(rig: Rig) -> None:
    theirs = rig.api.put(BACKING_IMAGE, {"metadata": {"name": "vmi-m-alpine"}, "spec": {"sourceType": "upload"}}, SPACE)
    rig.put(machine())
    assert rig.machines.reconcile("default/alpine") == LATER
    assert rig.backing() == theirs
    assert rig.told()["Initialized"][1] == "NameTaken"
    rig.api.remove(VIRTUAL_MACHINE_IMAGE, "alpine", "default")
    rig.machines.reconcile("default/alpine")
    assert rig.backing() == theirs
    assert rig.api.all(VIRTUAL_MACHINE_IMAGE) == []


def test_a_deletion_takes_the_class_first_then_the_backing_image_and_then_itself(rig: Rig) -> None:
    theirs = rig.api.put(STORAGE_CLASS, {"metadata": {"name": "theirs"}, "provisioner": DRIVER})
    rig.put(machine())
    rig.ready()
    rig.look()
    rig.api.written()
    rig.api.remove(VIRTUAL_MACHINE_IMAGE, "alpine", "default")
    assert rig.machines.reconcile("default/alpine") == LATER
    deleted = [(call.kind, call.name) for call in rig.api.written() if call.verb == "delete"]
    assert deleted == [(STORAGE_CLASS, "longhorn-alpine"), (BACKING_IMAGE, "vmi-m-alpine")]
    rig.backings.reconcile("vmi-m-alpine")
    held = "image vmi-m-alpine is kept until it is used no more: image b is being cloned from it"
    rig.api.change(IMAGE, "vmi-m-alpine", {"status": {"phase": "Deleting", "message": held}})
    rig.look()
    assert rig.told()["Imported"] == ("False", "Deleting", held)
    rig.api.written()
    assert rig.look() == LATER
    assert rig.api.written() == []
    rig.api.finish(IMAGE, "vmi-m-alpine")
    rig.backings.reconcile("vmi-m-alpine")
    assert rig.look() is None
    assert rig.api.all(VIRTUAL_MACHINE_IMAGE) == rig.api.all(BACKING_IMAGE) == rig.api.all(IMAGE) == []
    assert rig.api.all(STORAGE_CLASS) == [theirs]


def test_what_one_without_its_finalizer_left_goes_too_and_a_successors_stays(rig: Rig) -> None:
    rig.put(machine())
    rig.ready()
    rig.look()
    rig.api.lose(VIRTUAL_MACHINE_IMAGE, "alpine", "default")
    successor = machine()
    successor["metadata"]["uid"] = "m-next"
    rig.put(successor)
    rig.machines.reconcile("default/alpine")
    rig.backings.reconcile("vmi-m-next")
    assert rig.api.all(STORAGE_CLASS) == []
    old, new = rig.backing(), rig.backing("vmi-m-next")
    assert old is not None
    assert new is not None
    assert "deletionTimestamp" in old["metadata"]
    assert "deletionTimestamp" not in new["metadata"]
    rig.api.lose(VIRTUAL_MACHINE_IMAGE, "alpine", "default")
    rig.machines.reconcile("default/alpine")
    gone = rig.backing("vmi-m-next")
    assert gone is not None
    assert "deletionTimestamp" in gone["metadata"]


def test_while_they_cannot_be_seen_nothing_is_removed(rig: Rig) -> None:
    rig.put(machine())
    rig.ready()
    rig.api.lose(VIRTUAL_MACHINE_IMAGE, "alpine", "default")
    rig.api.written()
    rig.seen[VIRTUAL_MACHINE_IMAGE].error = "cannot be listed"
    assert rig.machines.reconcile("default/alpine") == LATER
    assert rig.api.written() == []


def test_one_that_the_cache_has_missed_keeps_what_was_made_for_it(rig: Rig) -> None:
    rig.seen[VIRTUAL_MACHINE_IMAGE].freeze()
    rig.put(machine())
    marks = {"annotations": {ORIGIN: "VirtualMachineImage/default/alpine/m-alpine"}}
    rig.api.create(BACKING_IMAGE, {"metadata": {"name": "vmi-m-alpine", **marks}, "spec": {}}, SPACE)
    rig.api.written()
    assert rig.machines.reconcile("default/alpine") == SOON
    assert rig.api.written() == []


MADE = f"kubectl create namespace {SPACE}"
ANEW = f"make it anew when it is gone ({MADE})"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            NotFound('there is no BackingImage: namespaces "longhorn-system" not found'),
            f"there is no namespace {SPACE}, in which its BackingImage belongs; make it ({MADE})",
        ),
        (
            NamespaceGoing("the namespace of BackingImage is being deleted: so says the API"),
            f"the namespace {SPACE}, in which its BackingImage belongs, is being deleted; {ANEW}",
        ),
        (PermissionDenied("the API refuses BackingImage"), "the API refuses BackingImage"),
        (ResourceExhausted("a quota leaves no room"), "a quota leaves no room"),
        (FailedPrecondition("the cluster does not admit it"), "the cluster does not admit it"),
    ],
)
def test_what_the_api_does_not_let_the_operator_make_is_told_and_tried_again(
    rig: Rig, error: DriverError, said: str
) -> None:
    def refuse(call: Call) -> None:
        if (call.verb, call.kind) == ("create", BACKING_IMAGE):
            raise error

    said += "; it is tried again"
    rig.put(machine())
    rig.api.before = refuse
    assert rig.look() == LATER
    assert rig.told()["Imported"] == rig.told()["Initialized"] == ("False", "Refused", said)
    assert rig.events.lines == [f"! VirtualMachineImage alpine: Refused: {said}"]
    rig.api.before = lambda _call: None
    assert rig.ready() is None
    assert rig.told()["Imported"][0] == "True"


def test_a_class_and_an_image_that_the_operator_may_not_make_are_told_too(rig: Rig) -> None:
    def refuse(call: Call) -> None:
        if call.verb == "create" and call.kind in (IMAGE, STORAGE_CLASS):
            raise PermissionDenied(f"the API refuses {call.kind}")

    rig.put(machine())
    rig.api.before = refuse
    rig.look()
    rig.look()
    assert rig.told()["Imported"] == ("False", "Refused", "the API refuses Image; it is tried again")
    rig.api.before = lambda _call: None
    rig.look()
    rig.api.before = refuse
    assert rig.ready() == LATER
    assert rig.told()["Imported"] == ("False", "Refused", "the API refuses StorageClass; it is tried again")


def test_what_was_made_and_is_not_seen_yet_is_not_made_twice(rig: Rig) -> None:
    rig.put(machine())
    rig.seen[BACKING_IMAGE].freeze()
    rig.look()
    assert rig.machines.reconcile("default/alpine") == SOON


def test_the_failures_of_the_one_that_makes_it_are_told(rig: Rig) -> None:
    rig.put(machine())
    rig.look()
    made = rig.api.change(IMAGE, "vmi-m-alpine", {"status": {"phase": "Failed", "message": "node one: 404"}})
    for node, make, attempts in (("two", False, 9), ("one", True, 2)):
        spec = {"image": "vmi-m-alpine", "imageUID": made["metadata"]["uid"], "node": node, "make": make}
        status = {"state": "Failed", "attempts": attempts}
        rig.api.put(IMAGE_COPY, {"metadata": {"name": node}, "spec": spec, "status": status})
    rig.look()
    assert rig.machine()["status"]["failed"] == 2


def crd(kind: Kind, labels: Json) -> Json:
    return {"metadata": {"name": f"{kind.plural}.{kind.group}", "labels": labels}}


def test_the_kinds_are_served_where_they_are_ours() -> None:
    api = FakeApi()
    assert check_crds(api) == set()
    api.put(CRD, crd(BACKING_IMAGE, {MANAGED_BY: "luks-csi"}))
    assert check_crds(api) == {BACKING_IMAGE}
    api.put(CRD, crd(VIRTUAL_MACHINE_IMAGE, {MANAGED_BY: "luks-csi"}))
    assert check_crds(api) == {BACKING_IMAGE, VIRTUAL_MACHINE_IMAGE}


@pytest.mark.parametrize("kind", [BACKING_IMAGE, VIRTUAL_MACHINE_IMAGE], ids=str)
@pytest.mark.parametrize("labels", [None, {}, {MANAGED_BY: "Helm"}])
def test_somebody_elses_kind_is_not_served(kind: Kind, labels: Json) -> None:
    api = FakeApi()
    for each in (BACKING_IMAGE, VIRTUAL_MACHINE_IMAGE):
        api.put(CRD, crd(each, labels if each == kind else {MANAGED_BY: "luks-csi"}))
    with pytest.raises(FailedPrecondition, match=rf"{kind.plural}.{kind.group} lacks the label .*: luks-csi"):
        check_crds(api)


def test_machine_images_without_backing_images_are_not_served() -> None:
    api = FakeApi()
    api.put(CRD, crd(VIRTUAL_MACHINE_IMAGE, {MANAGED_BY: "luks-csi"}))
    with pytest.raises(FailedPrecondition, match=r"VirtualMachineImage is here without BackingImage"):
        check_crds(api)
