"""What is to be done for an Image, decided from what there is: every state that a cluster can be in."""

from typing import Any

import pytest

from csi_driver.kube.copies import copy_of
from csi_driver.kube.kinds import FINALIZER, Json, name_of
from csi_driver.operator.plan import Exported, Plan, World, plan

_NOW = "2026-11-28T12:00:00+00:00"
_FACTS = {"format": "raw", "fileSize": 10, "virtualSize": 10, "encrypted": False, "checksum": "00"}


def image(name: str = "disk", source: Json | None = None, status: Json | None = None, **spec: Any) -> Json:
    return {
        "metadata": {"name": name, "uid": f"uid-{name}", "finalizers": [FINALIZER], "generation": 1},
        "spec": {"source": source or {"download": {"url": "https://example.org/disk"}}, **spec},
        "status": status or {},
    }


def copy(of: Json, node: str, state: str | None = None, *, make: bool = False, **status: Any) -> Json:
    made = copy_of(of, node, make=make)
    if state is not None:
        facts = {"image": _FACTS, "address": f"{node}:9810"} if state == "Ready" else {}
        made["status"] = {"state": state, **facts, **status}
    return made


def world(*agents: str, **more: Any) -> World:
    labels: dict[str, dict[str, str]] = {name: {"kubernetes.io/hostname": name} for name in agents}
    return World(now=_NOW, agents=labels, nodes=more.pop("nodes", frozenset(agents)), **more)


def placed(found: Plan) -> list[tuple[str, bool]]:
    return [(each["spec"]["node"], each["spec"]["make"]) for each in found.create]


def clone(encryption: str = "encrypt") -> Json:
    return image("clone", {"clone": {"image": "disk", "encryption": encryption}})


READY = {"phase": "Ready", **_FACTS}


def test_a_new_image_gets_its_finalizer_first() -> None:
    new = image()
    new["metadata"]["finalizers"] = []
    assert plan(new, [], world("a")) == Plan(finalizer=True)


def test_one_node_makes_it_and_the_same_one_whenever_it_is_asked() -> None:
    found = plan(image(), [], world("a", "b", "c"))
    assert [make for _, make in placed(found)] == [True]
    assert plan(image(), [], world("c", "b", "a")).create == found.create
    assert found.status["phase"] == "Pending"


def test_images_spread_over_the_nodes() -> None:
    nodes = {placed(plan(image(f"disk-{n}"), [], world("a", "b", "c")))[0][0] for n in range(30)}
    assert nodes == {"a", "b", "c"}


def test_only_nodes_that_fit_the_selector_are_taken() -> None:
    wanted = image(nodeSelector={"kubernetes.io/hostname": "b"}, copies=2)
    assert placed(plan(wanted, [], world("a", "b"))) == [("b", True)]
    found = plan(wanted, [copy(wanted, "b", "Ready", make=True)], world("a", "b"))
    assert found.create == []
    assert found.status["message"] == "one more copy is wanted and no other node can have one"
    nowhere = plan(image(nodeSelector={"x": "y"}), [], world("a"))
    assert (nowhere.create, nowhere.status["message"]) == ([], "no node with an agent fits its nodeSelector")


def test_more_copies_are_pulled_when_one_is_ready() -> None:
    wanted = image(copies=3)
    first = copy(wanted, "a", "Ready", make=True)
    found = plan(wanted, [first], world("a", "b", "c", "d"))
    assert len(found.create) == 2
    assert not any(make for _, make in placed(found))
    assert found.status["copies"] == "1/3"
    assert found.status["virtualSize"] == 10
    coming = [copy(wanted, each["spec"]["node"], "InProgress", progress=10) for each in found.create]
    assert plan(wanted, [first, *coming], world("a", "b", "c", "d")).create == []


def test_a_copy_that_failed_is_made_good_by_another_node() -> None:
    wanted = image(copies=2)
    copies = [copy(wanted, "a", "Ready", make=True), copy(wanted, "b", "Failed", message="no room")]
    assert placed(plan(wanted, copies, world("a", "b", "c"))) == [("c", False)]


def test_copies_of_an_earlier_image_of_the_name_are_not_its() -> None:
    earlier = image()
    earlier["metadata"]["uid"] = "uid-earlier"
    assert len(plan(image(), [copy(earlier, "a", "Ready", make=True)], world("a")).create) == 1


def test_a_node_that_is_gone_is_replaced_and_one_that_is_silent_for_too_long_too() -> None:
    wanted = image(copies=2)
    copies = [copy(wanted, "a", "Ready", make=True), copy(wanted, "b", "Ready")]
    gone = plan(wanted, copies, world("a", "c"))
    assert gone.forget == [name_of(copies[1])]
    assert placed(gone) == [("c", False)]
    silent = plan(wanted, copies, world("a", "c", nodes=frozenset("abc"), lost=frozenset("b")))
    assert (silent.forget, silent.delete, placed(silent)) == ([], [], [("c", False)])
    not_yet = plan(wanted, copies, world("a", "c", nodes=frozenset("abc")))
    # Its agent may only be starting anew.
    assert (not_yet.forget, not_yet.delete, not_yet.create) == ([], [], [])


def test_a_maker_that_is_lost_before_it_was_ready_is_replaced() -> None:
    wanted = image()
    maker = copy(wanted, "a", "InProgress", make=True)
    found = plan(wanted, [maker], world("b", nodes=frozenset("ab"), lost=frozenset("a")))
    assert (found.delete, placed(found)) == ([name_of(maker)], [("b", True)])


def test_a_maker_that_is_lost_stays_while_nobody_else_can_make_it() -> None:
    there: dict[str, Any] = {"nodes": frozenset("ab"), "lost": frozenset("a")}
    wanted = image(nodeSelector={"kubernetes.io/hostname": "a"})
    alone = plan(wanted, [copy(wanted, "a", "InProgress", make=True)], world("b", **there))
    assert (alone.delete, alone.create, alone.status["conditions"][0]["reason"]) == ([], [], "NoNode")
    cloned = clone()
    maker = copy(cloned, "a", "InProgress", make=True)
    assert plan(cloned, [maker], world("b", **there)).delete == []
    source = image(status=READY)
    brought = plan(cloned, [maker], world("b", source=source, source_copies=[copy(source, "a", "Ready")], **there))
    assert (brought.delete, placed(brought)) == ([], [("b", False)])
    copies = [copy(source, "b", "Ready")]
    found = plan(cloned, [maker], world("b", source=source, source_copies=copies, **there))
    assert (found.delete, placed(found)) == ([name_of(maker)], [("b", True)])


@pytest.mark.parametrize("state", ["InProgress", "Failed", "Pending"])
def test_an_upload_that_has_come_is_waited_for(state: str) -> None:
    wanted = image(source={"upload": {}})
    there: dict[str, Any] = {"nodes": frozenset("ab"), "lost": frozenset("a")}
    asked = copy(wanted, "a", state, make=True)
    asked["status"]["address"] = "10.0.0.1:9812"
    found = plan(wanted, [asked], world("b", **there))
    assert (found.delete, found.create, found.status["phase"]) == ([], [], "Pending")
    assert found.status["message"].startswith("node a, which may have all of its upload, does not answer")
    awaited, never = copy(wanted, "a", "AwaitingUpload", make=True), copy(wanted, "a", "Pending", make=True)
    awaited["status"]["address"] = "10.0.0.1:9812"
    for each in (awaited, never):
        found = plan(wanted, [each], world("b", **there))
        assert (found.delete, placed(found)) == ([name_of(each)], [("b", True)])


def test_what_was_ready_once_is_never_made_anew() -> None:
    had = image(status=READY)
    gone = plan(had, [copy(had, "a", "Ready", make=True)], world("b"))
    assert (gone.create, gone.status["phase"]) == ([], "Failed")
    assert "delete it and make it anew" in gone.status["message"]
    silent = plan(had, [copy(had, "a", "Ready", make=True)], world("b", nodes=frozenset("ab"), lost=frozenset("a")))
    assert (silent.create, silent.status["phase"]) == ([], "Pending")
    assert silent.status["message"] == "no node that has it answers (a); it is usable when one does"
    lost = plan(had, [copy(had, "a", "Failed", make=True, image=_FACTS, message="its file is gone")], world("a"))
    assert (lost.create, lost.delete, lost.status["phase"]) == ([], [], "Failed")


def test_copies_that_somebody_deleted_are_told_as_that_and_not_as_nodes_that_are_gone() -> None:
    had = image(status={**READY, "nodes": [{"name": node, "state": "Ready"} for node in "ba"]})
    going = copy(had, "a", "Ready", make=True)
    going["metadata"]["deletionTimestamp"] = _NOW
    told = plan(had, [going], world("a", "b")).status
    said = "somebody deleted its copies, and with them the files on a, b; delete it and make it anew"
    assert (told["phase"], told["message"], told["nodes"]) == ("Failed", said, [])
    assert plan(image(status=told), [], world("a", "b")).status["message"] == said, "and so it stays"
    gone = plan(had, [], world("c")).status
    assert gone["message"].startswith("the nodes that had it are gone, and with them each copy; it is usable when one")
    assert plan(image(status=gone), [], world("a", "c")).status["message"] == gone["message"]


@pytest.mark.parametrize("permanent", [True, False])
def test_a_failure_is_told_with_its_node(permanent: bool) -> None:  # noqa: FBT001
    wanted = image()
    found = plan(wanted, [copy(wanted, "a", "Failed", make=True, message="no", permanent=permanent)], world("a"))
    assert found.status["phase"] == "Failed"
    assert found.status["message"] == f"node a: no{'' if permanent else '; it is tried again'}"


def test_an_upload_is_awaited_at_an_address() -> None:
    wanted = image(source={"upload": {}})
    waiting = copy(wanted, "a", "AwaitingUpload", make=True, address="10.0.0.1:9810")
    found = plan(wanted, [waiting], world("a"))
    assert found.status["upload"] == {"node": "a", "address": "10.0.0.1:9810"}
    assert found.status["message"] == "waits for: luks-csi image upload FILE disk"
    sealed = image("vmi-1", {"upload": {}}, checksum="ab" * 32, secretRef={"name": "key", "namespace": "vms"})
    there = copy(sealed, "a", "AwaitingUpload", make=True, address="10.0.0.1:9810")
    assert plan(sealed, [there], world("a")).status["message"] == (
        "waits for: luks-csi image upload FILE vmi-1 --secret vms/key"
    )
    going_on = plan(wanted, [copy(wanted, "a", "InProgress", make=True, progress=3)], world("a"))
    assert (going_on.status["upload"], going_on.status["progress"]) == (None, 3)


def test_a_clone_is_made_where_its_source_is() -> None:
    source = image(status=READY)
    having = [copy(source, "c", "Ready")]
    found = plan(clone(), [], world("a", "b", "c", source=source, source_copies=having))
    assert placed(found) == [("c", True)]


def test_a_source_is_brought_to_a_node_that_the_clone_may_be_on() -> None:
    source = image(status=READY)
    wanted = clone()
    wanted["spec"]["nodeSelector"] = {"kubernetes.io/hostname": "b"}
    having = [copy(source, "c", "Ready")]
    found = plan(wanted, [], world("a", "b", "c", source=source, source_copies=having))
    assert [(each["spec"]["image"], each["spec"]["node"]) for each in found.create] == [("disk", "b")]
    having.append(copy(source, "b", "InProgress"))
    assert plan(wanted, [], world("a", "b", "c", source=source, source_copies=having)).create == []


@pytest.mark.parametrize(
    ("source", "phase", "words"),
    [
        (None, "Pending", "there is no image disk"),
        (image(status={"phase": "InProgress"}), "Pending", "waits for image disk, which is InProgress"),
        (image(status=READY | {"encrypted": True}), "Failed", "is encrypted already and is not encrypted again"),
    ],
)
def test_a_clone_waits_for_its_source_or_is_refused(source: Json | None, phase: str, words: str) -> None:
    found = plan(clone(), [], world("a", source=source))
    assert (found.create, found.status["phase"]) == ([], phase)
    assert words in found.status["message"]


@pytest.mark.parametrize(
    ("origin", "is_made"),
    [(None, False), ("BackingImage/lh/disk/2", True), ("BackingImage/elsewhere/disk/2", False)],
)
def test_a_backing_image_is_no_clone_of_an_image_that_got_the_name_of_its_source(
    origin: str | None,
    is_made: bool,  # noqa: FBT001
) -> None:
    source, wanted = image(status=READY), clone()
    wanted["metadata"]["annotations"] = {"images.luks.csi.internal/origin": "BackingImage/lh/clone/1"}
    source["metadata"]["annotations"] = {"images.luks.csi.internal/origin": origin} if origin else {}
    found = plan(wanted, [], world("a", source=source, source_copies=[copy(source, "a", "Ready")]))
    assert placed(found) == ([("a", True)] if is_made else [])
    if not is_made:
        assert found.status["phase"] == "Pending"
        assert "the Image disk stands for no BackingImage of namespace lh" in found.status["message"]


def test_what_an_image_is_comes_from_what_was_verified() -> None:
    """Whatever its class or its spec may say."""
    source = image(status=READY)
    for encryption in ("decrypt", "reencrypt"):
        found = plan(clone(encryption), [], world("a", source=source, source_copies=[copy(source, "a", "Ready")]))
        assert found.status["message"].startswith("image disk is not encrypted, so it cannot be cloned with")


def test_a_claim_is_exported_where_its_volume_lies() -> None:
    wanted = image(source={"claim": {"name": "data", "namespace": "default"}})
    found = plan(wanted, [], world("a", "b", claim=Exported("pvc-1", "b")))
    assert [each["spec"] for each in found.create] == [
        {"image": "disk", "imageUID": "uid-disk", "node": "b", "make": True, "volume": "pvc-1"}
    ]
    assert plan(wanted, [], world("a", claim=Exported("pvc-1", "b"))).status["message"] == (
        "node b, which has the claim's volume, has no agent now"
    )
    assert plan(wanted, [], world("a", claim="there is no claim default/data")).status["message"] == (
        "there is no claim default/data; it is looked at again, else make the image anew of another claim"
    )


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        (Exported("other", "a"), "its claim has another volume now"),
        ("the claim n/c names the PersistentVolume v, which is not bound to it", "is not bound to it"),
        (None, "its claim has not been looked at"),
    ],
)
def test_no_volume_is_exported_that_is_not_the_claims_any_more(claim: Exported | str | None, said: str) -> None:
    wanted = image(source={"claim": {"name": "c", "namespace": "n"}})
    made = copy(wanted, "a", "Failed", make=True, message="volume v is in use")
    made["spec"]["volume"] = "v"
    found = plan(wanted, [made], world("a", claim=claim))
    assert found.delete == [name_of(made)]
    assert said in found.status["message"]
    assert plan(wanted, [made], world("a", claim=Exported("v", "a"))).delete == []


def test_an_exported_volumes_own_secret_opens_the_image_unless_that_names_one() -> None:
    own, source = {"name": "key", "namespace": "vms"}, {"claim": {"name": "c", "namespace": "n"}}
    there = world("a", claim=Exported("v", "a", own))
    assert [each["spec"]["secretRef"] for each in plan(image(source=source), [], there).create] == [own]
    named = image(source=source, secretRef={"name": "other", "namespace": "vms"})
    assert ["secretRef" in each["spec"] for each in plan(named, [], there).create] == [False]


def test_an_image_in_use_is_kept_and_says_by_whom() -> None:
    going = image(status=READY)
    going["metadata"]["deletionTimestamp"] = _NOW
    copies = [copy(going, "a", "Ready", make=True)]
    found = plan(going, copies, world("a", users=("StorageClass gold names it",)))
    assert (found.delete, found.finalizer, found.status["phase"]) == ([], None, "Deleting")
    assert found.status["message"] == "image disk is kept until it is used no more: StorageClass gold names it"
    free = plan(going, copies, world("a"))
    assert (free.delete, free.finalizer) == ([name_of(copies[0])], None)
    assert plan(going, [], world("a")).finalizer is False


def test_a_removal_that_nobody_does_names_the_node_and_what_helps() -> None:
    going = image(status=READY)
    going["metadata"]["deletionTimestamp"] = _NOW
    copies = [copy(going, node, "Ready", make=node == "a", message="" if node == "c" else "busy") for node in "cba"]
    away = (
        "no image agent answers on node {}; its file there is removed when one does, and forgotten when the node is "
        "deleted from the cluster"
    )
    there = frozenset("abc")
    assert plan(going, copies, world("c", nodes=frozenset("bc"))).status["message"] == (
        f"its files are being removed from c; {away.format('b')}"
    )
    assert plan(going, copies, world("b", nodes=there)).status["message"] == (
        "node b: busy; " + away.format("a, c").replace("node a", "nodes a")
    )
    assert plan(going, copies[:1], world("c", nodes=there)).status["message"] == "its files are being removed from c"


def test_copies_on_nodes_that_are_gone_do_not_keep_an_image() -> None:
    going = image(status=READY)
    going["metadata"]["deletionTimestamp"] = _NOW
    copies = [copy(going, "a", "Ready", make=True), copy(going, "b", "Ready")]
    found = plan(going, copies, world("a"))
    assert (found.forget, found.delete) == ([name_of(copies[1])], [name_of(copies[0])])


def test_a_condition_keeps_its_time_while_it_holds() -> None:
    wanted = image(status={"conditions": [
        {"type": "Ready", "status": "True", "reason": "Ready", "message": "", "lastTransitionTime": "before"},
        {"type": "CopiesComplete", "status": "False", "reason": "x", "message": "", "lastTransitionTime": "before"},
    ]})  # fmt: skip
    found = plan(wanted, [copy(wanted, "a", "Ready", make=True)], world("a"))
    times = {each["type"]: each["lastTransitionTime"] for each in found.status["conditions"]}
    assert times == {"Ready": "before", "CopiesComplete": _NOW}


# A node that fails by its own fault.

FULL = {"message": "no room", "attempts": 3, "elsewhere": True}


def told(of: Json, found: Plan) -> Json:
    """The image as it is when that status was written."""
    return {**of, "status": {name: value for name, value in found.status.items() if value is not None}}


def test_another_node_makes_it_when_the_first_has_let_go_of_it() -> None:
    wanted = image()
    (first, _), *_ = placed(plan(wanted, [], world("a", "b")))
    (other,) = {"a", "b"} - {first}
    for attempts in (1, 2):
        trying = copy(wanted, first, "Failed", make=True, **{**FULL, "attempts": attempts})
        found = plan(wanted, [trying], world("a", "b"))
        assert (found.delete, found.status["message"]) == ([], f"node {first}: no room; it is tried again")
    failed = copy(wanted, first, "Failed", make=True, **FULL)
    found = plan(wanted, [failed], world("a", "b"))
    assert (found.delete, found.create) == ([name_of(failed)], [])
    assert found.status["phase"] == "Pending"
    assert found.status["message"] == f"node {first}: no room; another node is to make it"
    assert found.status["tried"] == [{"node": first, "attempts": 3, "permanent": False, "message": "no room"}]
    wanted = told(wanted, found)
    failed["metadata"]["deletionTimestamp"] = _NOW
    waits = plan(wanted, [failed], world("a", "b"))
    assert (waits.delete, waits.create) == ([], [])
    assert waits.status["message"] == f"node {first}: no room; another node makes it when {first} has removed its part"
    assert waits.status["tried"] == found.status["tried"]
    # Nobody waits for one that is silent.
    silent = plan(wanted, [failed], world(other, nodes=frozenset("ab"), lost=frozenset([first])))
    assert placed(silent) == [(other, True)]
    assert placed(plan(wanted, [], world("a", "b"))) == [(other, True)]
    ready = plan(wanted, [copy(wanted, other, "Ready", make=True)], world("a", "b"))
    assert (ready.status["phase"], ready.status["tried"]) == ("Ready", None)


def test_what_was_tried_is_not_forgotten_while_the_source_is_away() -> None:
    tried = [{"node": "a", "attempts": 3, "permanent": False, "message": "no room"}]
    wanted = clone()
    wanted["status"] = {"tried": tried}
    assert plan(wanted, [], world("a", "b")).status["tried"] == tried


def test_when_all_have_failed_each_has_its_turn_again_and_all_are_told() -> None:
    wanted = image(status={"tried": [{"node": "a", "attempts": 3, "permanent": False, "message": "no room"}]})
    trying = copy(wanted, "b", "Failed", make=True, message="broken", attempts=1, elsewhere=True)
    said = plan(wanted, [trying], world("a", "b")).status
    assert (said["phase"], said["message"]) == ("Failed", "node a: no room; node b: broken; it is tried again")
    failed = copy(wanted, "b", "Failed", make=True, message="broken", attempts=4, elsewhere=True)
    wanted = told(wanted, plan(wanted, [failed], world("a", "b")))
    assert placed(plan(wanted, [], world("a", "b"))) == [("a", True)]
    again = copy(wanted, "a", "Failed", make=True, **FULL)
    found = plan(wanted, [again], world("a", "b"))
    assert {each["node"]: each["attempts"] for each in found.status["tried"]} == {"a": 6, "b": 4}


def test_who_has_failed_for_good_is_not_asked_again() -> None:
    wanted = image()
    failed = copy(wanted, "a", "Failed", make=True, **FULL, permanent=True)
    wanted = told(wanted, plan(wanted, [failed], world("a", "b")))
    last = copy(wanted, "b", "Failed", make=True, **FULL, permanent=True)
    found = plan(wanted, [last], world("a", "b"))
    assert (found.delete, found.create, found.status["phase"]) == ([], [], "Failed")
    assert found.status["message"] == "node a: no room; node b: no room"
    alone = plan(wanted, [], world("a"))  # b is gone
    assert (alone.create, alone.status["phase"], alone.status["message"]) == ([], "Failed", "node a: no room")


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ({"download": {"url": "https://example.org/disk"}}, {"message": "the server is away", "attempts": 9}),
        ({"upload": {}}, FULL),
        ({"claim": {"name": "c", "namespace": "n"}}, FULL),
    ],
)
def test_what_another_node_cannot_do_better_stays_where_it_is(source: Json, status: Json) -> None:
    wanted = image(source=source)
    made = copy(wanted, "a", "Failed", make=True, **status)
    made["spec"]["volume"] = "v"
    found = plan(wanted, [made], world("a", "b", claim=Exported("v", "a")))
    assert (found.delete, found.status["phase"], found.status["tried"]) == ([], "Failed", None)


def test_an_upload_that_a_node_has_no_room_for_is_awaited_by_another_one() -> None:
    wanted = image(source={"upload": {}})
    said: dict[str, Any] = {"message": "no room", "elsewhere": True}
    full = copy(wanted, "a", "AwaitingUpload", make=True, address="a:9810", **said)
    alone = plan(wanted, [full], world("a"))
    assert (alone.delete, alone.status["phase"], alone.status["upload"]) == (
        [], "Pending", {"node": "a", "address": "a:9810"},
    )  # fmt: skip
    assert alone.status["message"] == "node a: no room; then this goes on: luks-csi image upload FILE disk"
    found = plan(wanted, [full], world("a", "b"))
    assert (found.delete, found.create, found.status["upload"]) == ([name_of(full)], [], None)
    assert found.status["message"] == "node a: no room; another node is to make it"
    wanted = told(wanted, found)
    assert placed(plan(wanted, [], world("a", "b"))) == [("b", True)]
    # When all are full each has its turn again: whoever uploads once more finds the one that has been asked least.
    full = copy(wanted, "b", "AwaitingUpload", make=True, **said)
    wanted = told(wanted, plan(wanted, [full], world("a", "b")))
    assert {each["node"]: each["attempts"] for each in wanted["status"]["tried"]} == {"a": 1, "b": 1}


def test_the_source_of_a_clone_is_brought_to_the_node_that_makes_it_then() -> None:
    source, wanted = image(status=READY), clone()
    failed = copy(wanted, "a", "Failed", make=True, **FULL)
    having: dict[str, Any] = {"source": source, "source_copies": [copy(source, "a", "Ready", make=True)]}
    wanted = told(wanted, plan(wanted, [failed], world("a", "b", "c", **having)))
    found = plan(wanted, [], world("a", "b", "c", **having))
    ((brought, make),) = placed(found)
    assert (brought in "bc", make, found.create[0]["spec"]["image"]) == (True, False, "disk")
    # It has no room for that either: the third node, and after that the first again.
    having["source_copies"].append(copy(source, brought, "Failed", message="no room"))
    ((third, _),) = placed(plan(wanted, [], world("a", "b", "c", **having)))
    assert {brought, third} == {"b", "c"}
    having["source_copies"].append(copy(source, third, "Failed", message="no room"))
    assert placed(plan(wanted, [], world("a", "b", "c", **having))) == [("a", True)]
    nowhere = plan(wanted, [], world("b", "c", **having))
    assert nowhere.create == []
    assert "image disk cannot be brought: node b: no room" in nowhere.status["message"]


# Copies that nobody uses.


def test_copies_beyond_what_is_wanted_go_when_nobody_has_used_them_the_oldest_first() -> None:
    wanted = image()
    copies = [copy(wanted, node, "Ready", make=node == "a") for node in "abc"]
    names = [name_of(each) for each in copies]
    assert plan(wanted, copies, world("a", "b", "c")).delete == []
    idle = (names[2], names[0], names[1])
    assert plan(wanted, copies, world("a", "b", "c", idle=idle)).delete == [names[2], names[0]]
    assert plan(wanted, copies, world("a", "b", "c", idle=names[1:2])).delete == [names[1]]
    wanted["spec"]["copies"] = 3
    assert plan(wanted, copies, world("a", "b", "c", idle=idle)).delete == []


def test_one_whose_node_does_not_answer_makes_no_other_superfluous() -> None:
    """It may be dead, and may have been so for days before the operator began to look."""
    wanted = image()
    copies = [copy(wanted, node, "Ready", make=node == "a") for node in "abc"]
    names = tuple(map(name_of, copies))
    there = frozenset("abc")
    assert plan(wanted, copies, world("a", nodes=there, idle=names)).delete == []
    assert plan(wanted, copies, world("b", "a", nodes=there, idle=names)).delete == [names[0]]
    wanted["spec"]["nodeSelector"] = {"kubernetes.io/hostname": "b"}
    assert plan(wanted, copies, world("a", "c", nodes=there, idle=names)).delete == []


def test_where_the_selector_wants_none_a_copy_goes_when_enough_are_where_it_wants_them() -> None:
    wanted = image(nodeSelector={"kubernetes.io/hostname": "b"})
    copies = [copy(wanted, "a", "Ready", make=True), copy(wanted, "b", "Pending")]
    names = tuple(map(name_of, copies))
    assert plan(wanted, copies, world("a", "b", idle=names)).delete == []  # the one on b is on its way
    copies[1] = copy(wanted, "b", "Ready")
    assert plan(wanted, copies, world("a", "b", idle=names)).delete == [names[0]]


def test_what_an_image_is_stays_what_it_was_when_it_was_ready_first() -> None:
    wanted = image(status=READY)
    other = copy(wanted, "a", "Ready", make=True)
    other["status"]["image"] = _FACTS | {"checksum": "11"}
    assert plan(wanted, [other], world("a")).status["checksum"] == "00"
