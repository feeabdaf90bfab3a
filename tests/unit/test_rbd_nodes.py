"""Which node has a volume of Ceph, and that one which lost it is fenced off before another gets it."""

import msgspec
import pytest

from csi_driver.backends.rbdimages import Images
from csi_driver.backends.rbdnodes import NodeAttachments
from csi_driver.backends.rbdplace import image_name
from csi_driver.backends.rbdpool import CephPool
from csi_driver.backends.rbdrecords import Attachment, VolumeLogs, VolumeState
from csi_driver.model.errors import Aborted, AlreadyExists, DeviceInUse, FailedPrecondition, NotFound
from csi_driver.model.volume import VolumeParameters
from tests.ceph_fakes import PLACE, FakePool

ID = PLACE.id_for("pvc-1")
IMAGE = image_name(ID)
MIB = 1 << 20


def made() -> FakePool:
    pool = FakePool()
    state = VolumeState(cluster="fsid-1", pool_number=7, record="{}")
    Images(VolumeLogs(), 1).make(pool, ID, None, VolumeParameters(), 16 * MIB, state)
    return pool


def nodes(pool: FakePool) -> dict[str, Attachment]:
    state = VolumeLogs().state(pool, ID)
    assert state is not None
    return state.nodes


def node(name: str, boot: str = "boot-1") -> NodeAttachments:
    return NodeAttachments(VolumeLogs(), name, boot)


def may_write(pool: FakePool, name: str, client: str) -> None:
    """As a node that has looked at it just before."""
    before = nodes(pool).get(name, Attachment(by_itself=True))
    node(name).may_write(pool, ID, client, before)


def test_one_node_has_it_and_another_is_told_which() -> None:
    pool = made()
    for _ in range(2):
        node("").give(pool, ID, "node-a", many_nodes=False)
    with pytest.raises(FailedPrecondition, match=r"given to node node-b: node node-a has it"):
        node("").give(pool, ID, "node-b", many_nodes=False)
    with pytest.raises(AlreadyExists, match=r"for one node alone and is asked for several nodes"):
        node("").give(pool, ID, "node-a", many_nodes=True)
    for _ in range(2):
        node("").take(pool, ID, "node-a")
    node("").take(pool, ID, "node-c")
    node("").give(pool, ID, "node-b", many_nodes=False)
    assert list(nodes(pool)) == ["node-b"]
    assert not pool.fenced


def test_several_nodes_have_what_is_for_several() -> None:
    pool = made()
    for name in ("node-a", "node-b"):
        node("").give(pool, ID, name, many_nodes=True)
    with pytest.raises(FailedPrecondition, match=r"has it"):
        node("").give(pool, ID, "node-c", many_nodes=False)
    assert sorted(nodes(pool)) == ["node-a", "node-b"]
    node("").take(pool, ID, "")
    assert not nodes(pool)


def test_a_node_that_let_go_is_not_fenced_off_and_one_that_did_not_is_before_another_gets_it() -> None:
    pool = made()
    node("").give(pool, ID, "node-a", many_nodes=False)
    may_write(pool, "node-a", "192.0.2.7:0/1")
    node("node-a").writes_no_more(pool, ID)
    node("").take(pool, ID, "node-a")
    assert not pool.fenced
    node("").give(pool, ID, "node-a", many_nodes=False)
    may_write(pool, "node-a", "192.0.2.7:0/2")
    pool.step = lambda step: check(step.startswith("fence") or bool(pool.fenced), step)
    node("").take(pool, ID, "node-a")
    assert pool.fenced == ["192.0.2.7:0/2"]
    assert not nodes(pool)


def check(allowed: bool, step: str) -> None:  # noqa: FBT001 - what it is about
    assert allowed, step


def test_a_fence_that_fails_keeps_the_volume_with_its_node() -> None:
    pool = made()
    node("").give(pool, ID, "node-a", many_nodes=False)
    may_write(pool, "node-a", "192.0.2.7:0/1")

    def fails(_: CephPool, image: str, client: str) -> None:
        raise FailedPrecondition(f"{client} of {image} cannot be fenced off")

    with pytest.raises(FailedPrecondition, match=r"cannot be fenced off"):
        NodeAttachments(VolumeLogs(), "", "boot", fails).take(pool, ID, "node-a")
    assert nodes(pool)["node-a"].client == "192.0.2.7:0/1"
    with pytest.raises(FailedPrecondition, match=r"node-a has it"):
        node("").give(pool, ID, "node-b", many_nodes=False)


def test_a_client_that_the_node_took_meanwhile_is_fenced_off_too() -> None:
    pool = made()
    node("").give(pool, ID, "node-a", many_nodes=False)
    may_write(pool, "node-a", "192.0.2.7:0/1")

    def step(said: str) -> None:
        if said == "fence 192.0.2.7:0/1":
            pool.step = lambda _: None
            may_write(pool, "node-a", "192.0.2.7:0/2")

    pool.step = step
    node("").take(pool, ID, "node-a")
    assert pool.fenced == ["192.0.2.7:0/1", "192.0.2.7:0/2"]
    assert not nodes(pool)


def test_a_node_that_was_not_given_it_cannot_write_it_down() -> None:
    pool = made()
    node("").give(pool, ID, "node-a", many_nodes=False)
    with pytest.raises(FailedPrecondition, match=r"cannot be attached to node node-b: it was given to node-a"):
        may_write(pool, "node-b", "192.0.2.8:0/1")
    node("node-b").writes_no_more(pool, ID)
    assert list(nodes(pool)) == ["node-a"]


def test_a_node_that_it_was_taken_from_while_it_attached_is_no_command() -> None:
    """It would keep the volume by itself, and from every other node."""
    pool = made()
    node("").give(pool, ID, "node-a", many_nodes=False)
    before = nodes(pool)["node-a"]
    node("").take(pool, ID, "node-a")
    with pytest.raises(Aborted, match=r"was taken from node node-a \(ControllerUnpublishVolume\) while it was being"):
        node("node-a").may_write(pool, ID, "192.0.2.7:0/1", before)
    assert not nodes(pool)


def test_what_a_command_has_by_itself_waits_for_it_and_is_fenced_off_when_it_is_gone() -> None:
    pool = made()
    may_write(pool, "node-a", "192.0.2.7:0/1")
    assert nodes(pool)["node-a"].by_itself
    pool.images[IMAGE].open_at.append("192.0.2.7:0/1")
    with pytest.raises(Aborted, match=r"a command on node node-a is at work on it"):
        node("").give(pool, ID, "node-b", many_nodes=False)
    pool.images[IMAGE].open_at.clear()
    node("").give(pool, ID, "node-b", many_nodes=False)
    assert (list(nodes(pool)), pool.fenced) == (["node-b"], ["192.0.2.7:0/1"])


def test_a_command_that_ended_leaves_nothing_and_one_on_the_same_node_hinders_nobody() -> None:
    pool = made()
    may_write(pool, "node-a", "192.0.2.7:0/1")
    node("").give(pool, ID, "node-a", many_nodes=False)
    assert not nodes(pool)["node-a"].by_itself
    node("node-a").writes_no_more(pool, ID)
    assert list(nodes(pool)) == ["node-a"]
    node("").take(pool, ID, "node-a")
    may_write(pool, "node-a", "192.0.2.7:0/2")
    node("node-a").writes_no_more(pool, ID)
    assert not nodes(pool)


def test_what_a_command_has_left_of_an_image_that_is_gone_hinders_nobody() -> None:
    pool = made()
    may_write(pool, "node-a", "192.0.2.7:0/1")
    del pool.images[IMAGE]
    assert node("").take_from_commands(pool, ID).nodes == {}


def test_what_was_mapped_before_the_node_booted_is_fenced_off() -> None:
    pool = made()
    node("").give(pool, ID, "node-a", many_nodes=False)
    may_write(pool, "node-a", "192.0.2.7:0/1")
    mine = nodes(pool)["node-a"]
    node("node-a").fence_earlier_boot(pool, ID, mine)
    assert not pool.fenced
    node("node-a", "boot-2").fence_earlier_boot(pool, ID, mine)
    assert pool.fenced == ["192.0.2.7:0/1"]


def test_what_is_gone_cannot_be_given_and_is_taken_without_a_word() -> None:
    pool = FakePool()
    with pytest.raises(NotFound):
        node("").give(pool, ID, "node-a", many_nodes=False)
    node("").take(pool, ID, "node-a")
    node("node-a").writes_no_more(pool, ID)
    assert (pool.objects, pool.maps) == ({}, {})


# --- images


def test_of_two_makers_at_once_one_volume_comes_with_the_image_that_it_has() -> None:
    pool = FakePool()
    images, state = Images(VolumeLogs(), 1), VolumeState(cluster="fsid-1", pool_number=7, record="{}")
    other = Images(VolumeLogs(), 1)

    def step(said: str) -> None:
        if said == "after create":
            pool.step = lambda _: None
            other.make(pool, ID, VolumeLogs().state(pool, ID), VolumeParameters(), MIB, state)

    pool.step = step
    with pytest.raises(Aborted, match=r"somebody else"):
        images.make(pool, ID, None, VolumeParameters(), MIB, state)
    found = VolumeLogs().state(pool, ID)
    assert found is not None
    assert found.image_id == pool.images[IMAGE].id


def test_an_image_with_data_is_never_thrown_away_for_a_new_volume() -> None:
    pool = made()
    pool.images[IMAGE].written = True
    logs = VolumeLogs()
    lost = logs.change(pool, ID, lambda _: VolumeState())  # somebody's hand took the record
    with pytest.raises(FailedPrecondition, match=r"has no record and holds data"):
        Images(logs, 1).make(pool, ID, lost, VolumeParameters(), MIB, VolumeState(record="{}"))
    with pytest.raises(FailedPrecondition, match=r"has no record and holds data"):
        Images(logs, 1).remove(pool, ID, lost)
    assert IMAGE in pool.images


def test_another_image_of_the_name_is_not_removed_with_the_volume() -> None:
    pool = made()
    logs = VolumeLogs()
    removed = Images(logs, 1).mark_removed(pool, ID, 0)
    pool.images[IMAGE].id = "another"
    Images(logs, 1).remove(pool, ID, removed)
    assert pool.images[IMAGE].id == "another"


def test_a_volume_that_a_node_has_or_a_client_has_open_is_not_removed() -> None:
    pool = made()
    logs, images = VolumeLogs(), Images(VolumeLogs(), 1)
    state = logs.state(pool, ID)
    assert state is not None
    pool.images[IMAGE].open_at.append("192.0.2.7:0/1")
    with pytest.raises(DeviceInUse, match=r"is open at 192\.0\.2\.7:0/1"):
        images.refuse_used(pool, ID, state)
    pool.images[IMAGE].open_at.clear()
    pool.images[IMAGE].snapshots = 2
    with pytest.raises(DeviceInUse, match=r"Ceph keeps its image .* for its snapshots \(2\); .* remove them first"):
        images.refuse_used(pool, ID, state)
    pool.images[IMAGE].snapshots, pool.images[IMAGE].group = 0, "backup"
    with pytest.raises(DeviceInUse, match=r"is in the group backup; take it out of that first"):
        images.refuse_used(pool, ID, state)
    node("").give(pool, ID, "node-a", many_nodes=False)
    with pytest.raises(DeviceInUse, match=r"it was given to node-a"):
        images.mark_removed(pool, ID, 0)
    assert msgspec.structs.replace(state, nodes=nodes(pool)) == logs.state(pool, ID)


def test_what_a_command_has_left_keeps_nobody_from_deleting_it_once_it_has_ended() -> None:
    pool = made()
    may_write(pool, "node-a", "192.0.2.7:0/1")
    pool.images[IMAGE].open_at = ["192.0.2.7:0/1"]
    with pytest.raises(
        Aborted, match=r"a command on node node-a is at work on it, or was killed there; call again when"
    ):
        node("").take_from_commands(pool, ID)
    pool.images[IMAGE].open_at = []
    assert node("").take_from_commands(pool, ID).nodes == {}
    assert pool.fenced == ["192.0.2.7:0/1"]
    node("").give(pool, ID, "node-a", many_nodes=False)
    assert list(node("").take_from_commands(pool, ID).nodes) == ["node-a"]


def test_what_one_node_has_for_itself_is_not_given_to_another_for_several() -> None:
    """Who has it for itself may have mounted it: neither knows of the other."""
    pool = made()
    node("").give(pool, ID, "node-a", many_nodes=False)
    with pytest.raises(FailedPrecondition, match=r"given to node node-b: node node-a has it"):
        node("").give(pool, ID, "node-b", many_nodes=True)
    assert list(nodes(pool)) == ["node-a"]


def test_a_node_is_given_what_a_command_of_its_own_has_and_that_is_not_fenced_off() -> None:
    pool = made()
    may_write(pool, "node-a", "192.0.2.7:0/1")
    pool.images[IMAGE].open_at.append("192.0.2.7:0/1")
    node("").give(pool, ID, "node-a", many_nodes=False)
    assert not pool.fenced
    assert nodes(pool)["node-a"].client == "192.0.2.7:0/1"


def test_what_somebody_else_has_open_is_not_used() -> None:
    """By hand, rbd map, or a client that the records do not know."""
    pool = made()
    pool.images[IMAGE].open_at.append("192.0.2.7:0/1")
    node("node-a").refuse_others(pool, ID, "192.0.2.7:0/1")
    pool.images[IMAGE].open_at.append("192.0.2.8:0/5")
    with pytest.raises(Aborted, match=r"is open at 192\.0\.2\.8:0/5 too"):
        node("node-a").refuse_others(pool, ID, "192.0.2.7:0/1")
