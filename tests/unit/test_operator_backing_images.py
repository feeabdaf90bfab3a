"""Longhorn's BackingImages as Images: what becomes of each field, what is told, and who goes first."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from csi_driver.kube.kinds import BACKING_IMAGE, FINALIZER, IMAGE, MANAGED_BY, ORIGIN, VOLUME, Json
from csi_driver.kube.refusals import Conflict
from csi_driver.model.errors import InvalidArgument, Unavailable
from csi_driver.operator.backing_images import RETRIES, BackingImages, ignored_of, image_of, status_of
from csi_driver.operator.standing import LATER, SOON, Problem, Statuses, changes
from tests.operator_fakes import NOW, Cache, Call, EventList, FakeApi, conditions, kept, merge

SPACE = "longhorn-system"
URL = "https://example.org/parrot.raw"
SUM = "30" * 64
LATER_ON = "2026-11-28T13:00:00+00:00"


def backing(
    kind: str = "download", parameters: dict[str, str] | None = None, /, *, retries: str = "", **more: Any
) -> Json:
    parameters = {"url": URL} if parameters is None and kind == "download" else parameters
    metadata: Json = {"name": "parrot", "namespace": SPACE, "uid": "b-1"}
    if retries:
        metadata["annotations"] = {RETRIES: retries}
    return {"metadata": metadata, "spec": {"sourceType": kind, "sourceParameters": parameters or {}} | more}


def clone(encryption: str | None, **more: Any) -> Json:
    secret = {"secret": "key", "secret-namespace": "keys"} if encryption not in (None, "", "ignore") else {}
    named = {} if encryption is None else {"encryption": encryption}
    return backing("clone", {"backing-image": "source", **named, **secret}, **more)


KEY, NEW = {"name": "key", "namespace": "keys"}, {"name": "new", "namespace": "news"}
RESULT = {"secret": "new", "secretNamespace": "news"}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (backing(checksum=SUM), {"source": {"download": {"url": URL}}, "checksum": SUM, "copies": 1}),
        (backing(checksum="", secret=""), {"source": {"download": {"url": URL}}, "copies": 1}),
        (backing(**RESULT), {"source": {"download": {"url": URL}}, "secretRef": NEW, "copies": 1}),
        (backing("upload", minNumberOfCopies=3), {"source": {"upload": {}}, "copies": 3}),
        (backing("upload", minNumberOfCopies=0), {"source": {"upload": {}}, "copies": 1}),
        (clone(None), {"source": {"clone": {"image": "source", "encryption": "ignore"}}, "copies": 1}),
        (clone(""), {"source": {"clone": {"image": "source", "encryption": "ignore"}}, "copies": 1}),
        (clone("ignore", **RESULT), {"source": {"clone": {"image": "source", "encryption": "ignore"}}, "copies": 1}),
        (
            clone("encrypt", checksum=SUM),
            {"source": {"clone": {"image": "source", "encryption": "encrypt"}}, "secretRef": KEY, "copies": 1},
        ),
        (
            clone("decrypt"),
            {"source": {"clone": {"image": "source", "encryption": "decrypt"}}, "secretRef": KEY, "copies": 1},
        ),
        (
            clone("reencrypt", **RESULT),
            {
                "source": {"clone": {"image": "source", "encryption": "reencrypt"}},
                "secretRef": KEY,
                "newSecretRef": NEW,
                "copies": 1,
            },
        ),
        (
            backing("upload", nodeSelector=["fast", "a.b"], retries="3"),
            {
                "source": {"upload": {}},
                "copies": 1,
                "nodeSelector": {"images.luks.csi.internal/tag-fast": "", "images.luks.csi.internal/tag-a.b": ""},
                "retries": 3,
            },
        ),
        (backing("upload", retries="many"), {"source": {"upload": {}}, "copies": 1}),
    ],
)
def test_each_field_becomes_what_it_means(given: Json, wanted: Json) -> None:
    assert image_of(given) == wanted


def test_an_exported_volume_is_that_of_its_claim_and_its_checksum_of_nothing() -> None:
    given = backing("export-from-volume", {"volume-name": "pvc-1"}, checksum=SUM)
    assert image_of(given, {"name": "data", "namespace": "team"}) == {
        "source": {"claim": {"name": "data", "namespace": "team"}},
        "copies": 1,
    }


def test_a_restore_is_refused_with_a_way_out() -> None:
    with pytest.raises(InvalidArgument, match=r"sourceType restore cannot be made here; use download or upload"):
        image_of(backing("restore", {"backup-url": "s3://x"}))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (backing(diskSelector=["ssd"]), "diskSelector (nodes have no disks by tag; use nodeSelector)"),
        (backing(dataEngine="v2"), "dataEngine v2 (there is one engine)"),
        (backing(diskFileSpecMap={"d": {}}), "diskFileSpecMap (Longhorn's own notes on its disks)"),
        (clone("encrypt", checksum=SUM), "checksum (it is of what is downloaded or uploaded)"),
        (clone("encrypt", **RESULT), "secret (a clone's is in sourceParameters; only reencrypt takes two)"),
        (
            backing("export-from-volume", {"volume-name": "v", "export-type": "qcow2"}),
            "export-type qcow2 (a volume is exported as it is)",
        ),
    ],
)
def test_what_has_no_meaning_here_is_told_and_not_passed_over(given: Json, said: str) -> None:
    assert ignored_of(given) == [said]
    (told,) = [each for each in status_of(given, None, (), NOW)["conditions"] if each["type"] == "FieldsIgnored"]
    assert told["message"] == f"these have no meaning here: {said}"


def test_where_every_field_has_a_meaning_no_condition_speaks_of_it() -> None:
    usual = backing(diskSelector=[], dataEngine="v1", nodeSelector=["a"], checksum=SUM, **RESULT)
    assert ignored_of(usual) == ignored_of(clone("reencrypt", **RESULT)) == []
    assert [each["type"] for each in status_of(usual, None, (), NOW)["conditions"]] == ["Ready"]


def image(phase: str = "Ready", /, **told: object) -> Json:
    return {"metadata": {"name": "parrot", "uid": "i-1"}, "spec": {}, "status": {"phase": phase, **told}}


def copy(state: str | None = "Ready", node: str = "one", *, make: bool = False, **told: object) -> Json:
    status = {"status": {"state": state, **told}} if state else {}
    spec = {"image": "parrot", "imageUID": "i-1", "node": node, "make": make}
    return {"metadata": {"name": f"parrot.{node}", "uid": node}, "spec": spec} | status


@pytest.mark.parametrize(
    ("phase", "given", "state", "progress"),
    [
        ("Pending", copy(None), "pending", 0),
        ("Pending", copy("Pending"), "pending", 0),
        ("Pending", copy("AwaitingUpload"), "starting", 0),
        ("InProgress", copy("InProgress", progress=43), "in-progress", 43),
        ("InProgress", copy("Ready"), "ready-for-transfer", 100),
        ("Ready", copy("Ready"), "ready", 100),
        ("Failed", copy("Failed", progress=7, permanent=True), "failed", 7),
        ("Failed", copy("Failed", progress=7, permanent=False), "failed-and-cleanup", 7),
        ("Pending", copy("Resting"), "unknown", 0),
    ],
)
def test_each_state_of_a_copy_has_longhorns_word(phase: str, given: Json, state: str, progress: int) -> None:
    found = status_of(backing(), image(phase), [given], NOW)["diskFileStatusMap"]
    assert found == {"one": {"state": state, "progress": progress, "message": ""}}


def test_the_facts_of_the_image_are_told_by_longhorns_names() -> None:
    facts = {"fileSize": 10, "virtualSize": 20, "checksum": "ab", "encrypted": True, "message": ""}
    copies = [copy(node="one"), copy(node="two", make=True, message="slow")]
    status = status_of(backing(), image(**facts), copies, NOW)
    assert status == {
        "uuid": "i-1",
        "ownerID": "two",
        "size": 10,
        "virtualSize": 20,
        "checksum": "ab",
        "diskFileStatusMap": {
            "one": {"state": "ready", "progress": 100, "message": ""},
            "two": {"state": "ready", "progress": 100, "message": "slow"},
        },
        "conditions": [
            {
                "type": "Ready",
                "status": "True",
                "reason": "Ready",
                "message": "image parrot is Ready",
                "lastTransitionTime": NOW,
            }
        ],
    }


def test_a_problem_is_the_reason_why_it_is_not_ready() -> None:
    told = status_of(backing(), image(), [copy()], NOW, Problem("NameTaken", "delete one"))
    assert conditions({"status": told}) == {"Ready": ("False", "NameTaken", "delete one")}


def test_a_condition_changes_its_time_with_its_status_alone() -> None:
    before = {"status": status_of(backing(), image("InProgress", message="3 %"), (), NOW)}
    still = status_of(backing() | before, image("InProgress", message="4 %"), (), LATER_ON)["conditions"][0]
    assert (still["message"], still["lastTransitionTime"]) == ("4 %", NOW)
    assert status_of(backing() | before, image(), (), LATER_ON)["conditions"][0]["lastTransitionTime"] == LATER_ON


@pytest.mark.parametrize(
    ("before", "after"),
    list(itertools.permutations([{}, {"a": 1}, {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"c": [2]}, "e": {}}], 2)),
)
def test_a_patch_makes_one_of_the_other_and_says_nothing_twice(before: Json, after: Json) -> None:
    patched: dict[str, Any] = {"before": before}
    merge(patched, {"before": changes(before, after)})
    assert patched["before"] == after
    assert changes(after, after) == {}


class Rig:
    """The controller over an API in memory."""

    def __init__(self) -> None:
        self.api = FakeApi()
        self.seen = {kind: Cache(self.api, kind) for kind in BackingImages.KINDS}
        minutes = itertools.count(step=60)
        self.backings = BackingImages(self.api, self.seen, SPACE, EventList(), lambda: float(next(minutes)))

    def look(self) -> float | None:
        return self.backings.reconcile("parrot")

    def put(self, given: Json) -> Json:
        return self.api.put(BACKING_IMAGE, given, SPACE)

    @property
    def backing(self) -> Json:
        found = self.api.get(BACKING_IMAGE, "parrot", SPACE)
        assert found is not None
        return found

    @property
    def image(self) -> Json | None:
        return self.api.get(IMAGE, "parrot")

    def image_has(self, **told: object) -> Json:
        return self.api.change(IMAGE, "parrot", {"metadata": {"finalizers": [FINALIZER]}, "status": told})


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_an_image_is_made_behind_the_finalizer_and_names_what_it_stands_for(rig: Rig) -> None:
    rig.put(backing(checksum=SUM))
    assert rig.look() is None
    assert [(call.verb, call.kind) for call in rig.api.written()] == [
        ("patch", BACKING_IMAGE),
        ("create", IMAGE),
        ("patch status", BACKING_IMAGE),
    ]
    assert kept(rig.backing)
    assert rig.image is not None
    assert rig.image["spec"] == image_of(backing(checksum=SUM))
    assert rig.image["metadata"]["annotations"] == {ORIGIN: f"BackingImage/{SPACE}/parrot/b-1"}
    assert rig.image["metadata"]["labels"] == {MANAGED_BY: "luks-csi"}
    assert conditions(rig.backing) == {"Ready": ("False", "Pending", "image parrot is Pending")}


def test_looking_again_writes_nothing(rig: Rig) -> None:
    rig.put(backing(diskSelector=["ssd"]))
    rig.look()
    rig.image_has(phase="Ready", fileSize=1)
    rig.look()
    rig.api.written()
    assert rig.look() is None
    assert rig.api.written() == []


def test_a_change_of_copies_nodes_and_retries_reaches_the_image(rig: Rig) -> None:
    rig.put(backing(nodeSelector=["old"]))
    rig.look()
    rig.api.change(
        BACKING_IMAGE,
        "parrot",
        {
            "metadata": {"annotations": {RETRIES: "2"}},
            "spec": {"minNumberOfCopies": 3, "nodeSelector": ["new"]},
        },
        SPACE,
    )
    rig.look()
    assert rig.image is not None
    assert rig.image["spec"] == image_of(rig.backing)
    rig.api.change(BACKING_IMAGE, "parrot", {"spec": {"nodeSelector": None, "minNumberOfCopies": None}}, SPACE)
    rig.look()
    assert rig.image["spec"] == image_of(rig.backing)
    assert "nodeSelector" not in rig.image["spec"]


def test_an_image_of_somebody_else_is_told_of_and_left_alone(rig: Rig) -> None:
    theirs = rig.api.put(IMAGE, {"metadata": {"name": "parrot"}, "spec": {"source": {"upload": {}}, "copies": 7}})
    rig.put(backing())
    assert rig.look() == LATER
    assert rig.image == theirs
    status, reason, message = conditions(rig.backing)["Ready"]
    assert (status, reason) == ("False", "NameTaken")
    assert "was not made for this BackingImage, and it is left alone" in message
    assert "uuid" not in rig.backing["status"]
    rig.api.remove(BACKING_IMAGE, "parrot", SPACE)
    rig.look()
    assert rig.image == theirs
    assert rig.api.get(BACKING_IMAGE, "parrot", SPACE) is None


def test_the_image_of_an_earlier_one_of_the_name_goes_first(rig: Rig) -> None:
    rig.put(backing())
    rig.look()
    rig.image_has(phase="Ready")
    rig.api.lose(BACKING_IMAGE, "parrot", SPACE)
    rig.put(backing("upload") | {"metadata": {"name": "parrot", "uid": "b-2"}})
    assert rig.look() == LATER
    assert conditions(rig.backing)["Ready"][1] == "Replaced"
    rig.api.finish(IMAGE, "parrot")
    rig.look()
    assert rig.image is not None
    assert rig.image["metadata"]["annotations"][ORIGIN].endswith("/b-2")
    assert "upload" in rig.image["spec"]["source"]


def test_a_deletion_waits_for_the_image_and_tells_what_that_waits_for(rig: Rig) -> None:
    rig.put(backing())
    rig.look()
    rig.image_has(phase="Ready")
    rig.api.remove(BACKING_IMAGE, "parrot", SPACE)
    rig.look()
    rig.image_has(phase="Deleting", message="image parrot is kept until it is used no more: StorageClass a names it")
    assert rig.look() == LATER
    assert conditions(rig.backing)["Ready"][1:] == (
        "Deleting",
        "image parrot is kept until it is used no more: StorageClass a names it",
    )
    rig.api.written()
    assert rig.look() == LATER
    assert rig.api.written() == []
    rig.api.finish(IMAGE, "parrot")
    assert rig.look() is None
    assert rig.api.get(BACKING_IMAGE, "parrot", SPACE) is None


def test_an_image_that_the_cache_does_not_know_yet_still_goes_first(rig: Rig) -> None:
    rig.put(backing())
    rig.seen[IMAGE].freeze()
    rig.look()
    rig.api.remove(BACKING_IMAGE, "parrot", SPACE)
    rig.image_has(phase="Ready")
    rig.look()
    assert kept(rig.backing)
    assert rig.image is not None
    assert "deletionTimestamp" in rig.image["metadata"]


def test_what_was_made_and_is_not_seen_yet_is_not_made_twice(rig: Rig) -> None:
    rig.put(backing())
    rig.seen[IMAGE].freeze()
    rig.look()
    assert rig.look() == SOON
    rig.seen[IMAGE].thaw()
    assert rig.look() is None


def test_an_image_that_somebody_has_deleted_is_made_anew(rig: Rig) -> None:
    rig.put(backing())
    rig.look()
    rig.api.lose(IMAGE, "parrot")
    rig.look()
    assert rig.image is not None


def test_an_image_whose_backing_image_lost_its_finalizer_goes_too(rig: Rig) -> None:
    rig.put(backing())
    rig.look()
    rig.image_has(phase="Ready")
    rig.api.lose(BACKING_IMAGE, "parrot", SPACE)
    rig.look()
    assert rig.image is not None
    assert "deletionTimestamp" in rig.image["metadata"]


def test_while_backing_images_cannot_be_seen_no_image_is_removed(rig: Rig) -> None:
    rig.put(backing())
    rig.look()
    rig.api.written()
    rig.api.lose(BACKING_IMAGE, "parrot", SPACE)
    rig.seen[BACKING_IMAGE].error = "cannot be listed"
    assert rig.look() == LATER
    assert rig.api.written() == []


def test_a_backing_image_that_the_cache_has_missed_keeps_its_image(rig: Rig) -> None:
    rig.seen[BACKING_IMAGE].freeze()
    rig.put(backing())
    rig.api.create(IMAGE, {"metadata": {"name": "parrot", "annotations": {ORIGIN: f"BackingImage/{SPACE}/parrot/b-1"}}})
    rig.api.written()
    assert rig.look() == SOON
    assert rig.api.written() == []


def test_an_image_without_a_backing_image_is_nobodys_business(rig: Rig) -> None:
    rig.api.put(IMAGE, {"metadata": {"name": "parrot"}, "spec": {}})
    assert rig.look() is None
    assert rig.api.written() == []


@pytest.mark.parametrize(
    ("volume", "said"),
    [
        (None, "there is no PersistentVolume pvc-1"),
        ({"spec": {}}, "the PersistentVolume pvc-1 belongs to no claim"),
    ],
)
def test_a_volume_that_cannot_be_exported_is_told_of_and_looked_for_again(
    rig: Rig, volume: Json | None, said: str
) -> None:
    if volume:
        rig.api.put(VOLUME, {"metadata": {"name": "pvc-1"}} | volume)
    rig.put(backing("export-from-volume", {"volume-name": "pvc-1"}))
    assert rig.look() == LATER
    assert said in conditions(rig.backing)["Ready"][2]
    rig.api.put(
        VOLUME, {"metadata": {"name": "pvc-1"}, "spec": {"claimRef": {"name": "c", "namespace": "n", "uid": "u"}}}
    )
    assert rig.look() is None
    assert rig.image is not None
    assert rig.image["spec"]["source"] == {"claim": {"name": "c", "namespace": "n"}}


def refusing(verb: str, error: Exception) -> Callable[[Call], None]:
    def refuse(call: Call) -> None:
        if call.verb == verb:
            raise error

    return refuse


def test_what_the_api_refuses_is_told_at_the_backing_image_and_tried_again(rig: Rig) -> None:
    rig.put(clone("encrypt"))
    rig.api.before = refusing("create", InvalidArgument("Image parrot is refused: no access to the secret keys/key"))
    assert rig.look() == LATER
    assert conditions(rig.backing)["Ready"] == (
        "False",
        "Refused",
        "Image parrot is refused: no access to the secret keys/key",
    )
    rig.api.before = lambda _call: None
    assert rig.look() is None
    assert rig.image is not None


def test_an_api_that_fails_is_the_controllers_affair(rig: Rig) -> None:
    rig.put(backing())
    rig.api.before = refusing("create", Unavailable("later"))
    with pytest.raises(Unavailable):
        rig.look()


def test_progress_is_written_once_a_second_and_what_counts_at_once() -> None:
    api, now = FakeApi(), [100.0]
    thing = api.put(BACKING_IMAGE, backing(), SPACE)
    statuses = Statuses(api, BACKING_IMAGE, Cache(api, BACKING_IMAGE), EventList(), "Ready", lambda: now[0])

    def write(percent: int, state: str = "in-progress") -> float | None:
        found = api.get(BACKING_IMAGE, "parrot", SPACE)
        assert found is not None
        return statuses.write(found, {"diskFileStatusMap": {"one": {"state": state, "progress": percent}}})

    assert write(1) is None
    now[0] += 0.25
    assert write(2) == 0.75
    assert write(1) is None
    assert write(3, "ready") is None
    now[0] += 1
    assert write(4, "ready") is None
    assert len(api.calls) == 3
    statuses.forget(thing["metadata"]["uid"])
    assert write(5, "ready") is None


def test_an_image_that_has_come_to_the_name_unseen_is_not_taken_for_the_earlier_one(rig: Rig) -> None:
    rig.put(backing("upload"))
    rig.look()
    rig.look()
    rig.seen[IMAGE].freeze()  # its watch is silent
    rig.api.lose(BACKING_IMAGE, "parrot", SPACE)
    rig.api.lose(IMAGE, "parrot")
    other = rig.api.put(IMAGE, {"metadata": {"name": "parrot"}, "spec": {"source": {"upload": {}}}})
    again = backing("upload")
    again["metadata"]["uid"] = "b-2"
    rig.put(again)
    with pytest.raises(Conflict):
        rig.look()
    assert rig.image == other


@pytest.mark.parametrize("retries", ["\u00b2", "\u0663", "-1", "x"])
def test_what_is_no_number_is_no_number_of_retries(retries: str) -> None:
    assert "retries" not in image_of(backing(retries=retries))
