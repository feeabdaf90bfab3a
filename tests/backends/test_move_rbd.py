"""A closed volume goes from sparse files to Ceph, and what other nodes see of it meanwhile: a real Ceph and krbd."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from csi_driver.backends.rbdplace import image_name
from csi_driver.host.krbd import MappedImages
from csi_driver.images.stopping import Stop
from csi_driver.model.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Stopped
from csi_driver.model.volume import FileSystemState, MovePhase, VolumeParameters, VolumeRecord
from csi_driver.rpc.client import CsiClient, RemoteVolume
from csi_driver.volumes.attachment import Attachments, AttachRequest
from csi_driver.volumes.move import MoveRequest
from csi_driver.volumes.move_copy import Onlooker, move_of
from csi_driver.volumes.moved import Homes
from tests.backends.ceph import CLUSTER, POOL, USER
from tests.backends.move_kills import Case, Result, pair_on, run, run_all
from tests.backends.moving import PLAIN, Pair, Shown, fill, is_refused, shown
from tests.backends.rigs import RbdRig
from tests.backends.test_life import MOUNT as STAGED
from tests.backends.test_life import SECRET
from tests.backends.test_move_command import move
from tests.machine.node import BLOCK, CHEAP, EXT4, MIB, NAME, Node
from tests.machine.server import ServerProcess

OTHER = "node-2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = Path(os.environ.get("MACHINE_STATE", tmp_path), f"move-{os.urandom(4).hex()}")
    made.mkdir()
    return made


@pytest.fixture
def pair(rbd_rig: RbdRig, folder: Path) -> Pair:
    return pair_on(rbd_rig, folder)


@pytest.fixture
def other(rbd_rig: RbdRig, folder: Path) -> Node:
    """Another node, which has no state directory that the volume came from."""
    return Node(folder / "other", rbd_rig.workers, backend=rbd_rig.backend(node_id=OTHER))


def give(rig: RbdRig, pair: Pair, node: str) -> None:
    """ControllerPublishVolume."""
    controller = rig.backend(node_id="controller")
    Attachments(controller, controller).attach(AttachRequest(pair.far, node, BLOCK, read_only=False, context={}))


def stopped(pair: Pair, at: int) -> None:
    """Stopped by a signal once so many bytes are copied."""
    stop = Stop()

    def each(done: int) -> None:
        if done >= at:
            stop.name = "SIGINT"

    with pytest.raises(Stopped, match=r"SIGINT stopped it, \d+ % are done; the same command goes on"):
        pair.move(onlooker=Onlooker(Shown(each=each), stop=stop))


class Cut(BaseException):
    """Instead of a kill."""


def cut_behind(node: Node, phase: MovePhase) -> Callable[[], None]:
    """Let the record of that phase be the last thing that is written there; returns what ends that."""
    update = node.store.update

    def cut(record: VolumeRecord) -> VolumeRecord:
        written = update(record)
        if record.move is not None and record.move.phase is phase:
            raise Cut
        return written

    node.store.update = cut  # type: ignore[method-assign]
    return lambda: setattr(node.store, "update", update)


@pytest.mark.parametrize("parameters", [CHEAP, PLAIN], ids=["encrypted", "plain"])
def test_a_volume_goes_to_ceph_byte_by_byte_and_any_node_can_have_it(
    rbd_rig: RbdRig, pair: Pair, other: Node, parameters: dict[str, str]
) -> None:
    content = fill(pair.files, parameters)
    blocked = rbd_rig.ceph.asked("ceph", "osd", "blocklist", "ls")
    before, disk = pair.files.record(), pair.files.disk().read_bytes()
    copy = pair.files.store.header_copy(NAME).read_bytes() if before.luks else b""
    moved = pair.move()
    assert not pair.files.store.has(NAME)
    assert moved == pair.group.record(pair.far)
    there = msgspec.structs.replace(before.parameters, cluster_id=CLUSTER, pool=POOL)
    expected = msgspec.structs.replace(before, id=pair.far, revision=0, parameters=there)
    assert msgspec.structs.replace(moved, revision=0) == expected
    ciphertext = rbd_rig.ceph.admin
    image = f"{POOL}/{image_name(pair.far)}"
    exported = pair.files.folder / "exported"
    ciphertext("rbd", "export", "--no-progress", image, str(exported))
    assert exported.read_bytes() == disk
    if before.luks:
        assert pair.group.store.header_copy(pair.far).read_bytes() == copy
        assert "encrypted" in ciphertext("rbd", "image-meta", "get", image, "rbd.csi.ceph.com/encrypted")
        used = rbd_rig.ceph.asked("rbd", "du", image)["images"][0]["used_size"]
        assert used < len(disk) - 4 * MIB, "holes stayed no holes"
    assert not any(MappedImages().all())
    give(rbd_rig, pair, OTHER)
    assert shown(other, pair.far)[: len(content)] == content
    assert is_refused(pair.group, pair.far), "another node has it"
    assert rbd_rig.ceph.asked("ceph", "osd", "blocklist", "ls") == blocked, "who let go of it was fenced off"


def test_a_file_system_goes_along_and_can_be_enlarged_there(pair: Pair) -> None:
    pair.files.create(capability=EXT4)
    pair.files.stage()
    pair.files.write("precious")
    pair.files.unstage()
    pair.move()
    pair.group.stage(pair.far)
    assert pair.group.read(volume=pair.far) == "precious"
    assert pair.group.expand(24 * MIB, pair.far) == 24 * MIB
    pair.group.unstage(pair.far)
    assert pair.group.record(pair.far).file_system is FileSystemState.MADE


def test_what_is_on_its_way_is_used_where_it_was_and_by_no_node_of_ceph(
    rbd_rig: RbdRig, pair: Pair, other: Node
) -> None:
    content = fill(pair.files, dict(CHEAP))
    stopped(pair, 2 * MIB)
    where = rf"is being copied here from {pair.files.state} of node node-1, \d+ % are there; .* on that node"
    for node in (pair.group, other):
        with pytest.raises(FailedPrecondition, match=where):
            node.stage(pair.far, BLOCK)
    with pytest.raises(FailedPrecondition, match=where):
        give(rbd_rig, pair, OTHER)
    with pytest.raises(FailedPrecondition, match=where):
        other.grow(64 * MIB, pair.far)
    assert (*pair.files.store.ids(), *rbd_rig.backend().ids()) == (NAME, pair.far)
    assert rbd_rig.backend().published(pair.far) == []
    done, meter = move_of(pair.group.record(pair.far)).copied.end, Shown()
    assert 2 * MIB < done < pair.files.disk().stat().st_size
    pair.move(onlooker=Onlooker(meter))
    assert meter.done[0] == done
    assert shown(pair.group, pair.far)[: len(content)] == content


def test_what_was_copied_can_be_deleted_there_and_the_move_begins_anew(rbd_rig: RbdRig, pair: Pair) -> None:
    content = fill(pair.files, dict(CHEAP))
    stopped(pair, 2 * MIB)
    Node(pair.files.folder / "controller", rbd_rig.workers, backend=rbd_rig.backend(node_id="")).delete(pair.far)
    assert rbd_rig.ceph.asked("rbd", "ls", POOL) == []
    assert shown(pair.files)[: len(content)] == content
    pair.move()
    assert shown(pair.group, pair.far)[: len(content)] == content


def test_between_the_two_last_records_its_node_has_it_and_the_others_are_told_which(
    rbd_rig: RbdRig, pair: Pair, other: Node
) -> None:
    content = fill(pair.files, dict(CHEAP))
    whole = cut_behind(pair.files, MovePhase.LEFT)
    with pytest.raises(Cut):
        pair.move()
    whole()
    assert move_of(pair.group.record(pair.far)).phase is MovePhase.ARRIVED
    assert is_refused(pair.files)
    with pytest.raises(
        FailedPrecondition,
        match=rf"was copied here from {pair.files.state} of node node-1, and nobody knows .* once more on that node",
    ):
        other.stage(pair.far, BLOCK)
    pair.move()
    assert not pair.files.store.has(NAME)
    give(rbd_rig, pair, OTHER)
    assert shown(other, pair.far)[: len(content)] == content


def test_what_arrived_and_has_not_left_is_used_where_it_was(rbd_rig: RbdRig, pair: Pair, other: Node) -> None:
    content = fill(pair.files, dict(CHEAP))
    whole = cut_behind(pair.group, MovePhase.ARRIVED)
    with pytest.raises(Cut):
        pair.move()
    whole()
    assert is_refused(pair.group, pair.far)
    assert is_refused(other, pair.far)
    assert shown(pair.files)[: len(content)] == content
    pair.move()
    assert shown(pair.group, pair.far)[: len(content)] == content
    assert rbd_rig.backend().published(pair.far) == []


def test_a_move_is_given_up_and_where_it_was_begun_to_need_not_be_said(rbd_rig: RbdRig, pair: Pair) -> None:
    content = fill(pair.files, dict(CHEAP))
    stopped(pair, 2 * MIB)
    there = pair.group.moves.here
    elsewhere = VolumeParameters(cluster_id=CLUSTER, pool="elsewhere")
    with pytest.raises(FailedPrecondition, match=r"it would be pvc-1\.[0-9a-f]{10}; go on as it was begun, or give"):
        pair.files.moves.move(MoveRequest(NAME, elsewhere), there, Onlooker(Shown()))
    pair.files.moves.undo(NAME, there)
    assert rbd_rig.ceph.asked("rbd", "ls", POOL) == []
    assert shown(pair.files)[: len(content)] == content
    with pytest.raises(InvalidArgument, match=r"the parameter clusterID is missing"):
        pair.files.moves.move(MoveRequest(NAME), there, Onlooker(Shown()))
    assert pair.files.record().move is None
    stopped(pair, 2 * MIB)
    pair.files.moves.move(MoveRequest(NAME), there, Onlooker(Shown()))
    assert shown(pair.group, pair.far)[: len(content)] == content
    with pytest.raises(FailedPrecondition, match=r"is of the backend rbd, which lies outside this node"):
        pair.move(pair.group)


def test_a_volume_of_that_id_over_there_is_left_alone(rbd_rig: RbdRig, pair: Pair) -> None:
    content = fill(pair.files, dict(CHEAP))
    size = 16 * MIB
    record = msgspec.structs.replace(pair.files.record(), id=pair.far, parameters=rbd_rig.parameters)
    rbd_rig.backend().create(record, size)
    with pytest.raises(AlreadyExists, match=rf"has a volume {pair.far} already"):
        pair.move()
    assert rbd_rig.backend().get(pair.far) == record
    assert shown(pair.files)[: len(content)] == content


def test_the_command_takes_it_from_server_to_server_and_a_pod_has_it_there(rbd_rig: RbdRig, folder: Path) -> None:
    """As an administrator types it; the servers of Ceph have no Secret, and the calls bring one."""
    options = ("--backend", "rbd", "--ceph-config", str(rbd_rig.config))
    servers = (
        ServerProcess(folder / "files"),
        ServerProcess(folder / "node", *options, "--services", "node"),
        ServerProcess(folder / "controller", *options, "--services", "controller"),
    )
    files, node, controller = servers
    stage, user = folder / "stage", {"userID": USER, "userKey": rbd_rig.ceph.key}
    stage.mkdir()
    with contextlib.ExitStack() as stack:
        here, there, control = (stack.enter_context(CsiClient(stack.enter_context(each).endpoint)) for each in servers)
        volume = here.create_volume(
            "life", [STAGED], 32 * MIB, parameters={"encrypted": "true", **CHEAP}, secrets=SECRET
        )
        here.stage(volume, stage, STAGED, SECRET)
        (stage / "file").write_text("precious")
        here.unstage(volume.id, stage)
        place = ("--to-parameter", f"clusterID={CLUSTER}", "--to-parameter", f"pool={POOL}")
        refused = move(files, node, "--yes", *place)
        assert "nobody told a user of the Ceph cluster" in " ".join(refused.stderr.split())
        moved = move(files, node, "--yes", *place, "--to-secret-dir", str(rbd_rig.secret), "-o", "json")
        assert moved.returncode == 0, moved.stderr
        far = json.loads(moved.stdout)
        assert (far["name"], far["id"], far["move"]) == ("life", rbd_rig.id_of("life"), None)
        assert not list(here.volumes())
        there_now = RemoteVolume(far["id"], far["capacity_bytes"], {"encrypted": "true", "backend": "rbd"})
        secret = {**user, **SECRET}
        context = control.attach(there_now, "node-1", STAGED, secret)
        there.stage(there_now, stage, STAGED, secret, context)
        assert (stage / "file").read_text() == "precious"
        there.unstage(far["id"], stage)
        control.detach(far["id"], "node-1", secret)
        control.delete_volume(far["id"], secret)
    assert not any(MappedImages().all())
    assert controller.log().count(rbd_rig.ceph.key) == node.log().count(rbd_rig.ceph.key) == 0


def test_a_seeded_handful_of_kills_loses_nothing(rbd_rig: RbdRig) -> None:
    result = run_all(rbd_rig, rbd_rig.config.parent, "rbd", seed=3, count=1)
    assert (result.lost, result.leaked) == ([], [])
    assert result.points > 100
    assert result.kills == 2


def test_a_volume_that_can_be_used_in_both_places_is_noticed(
    rbd_rig: RbdRig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def anywhere(_: Homes, record: VolumeRecord) -> VolumeRecord:
        return record

    def killed(case: Case, _: int) -> int | None:
        pair = pair_on(rbd_rig, case.folder)
        cut_behind(pair.group, MovePhase.ARRIVED)
        with pytest.raises(Cut):
            pair.move()
        return None

    monkeypatch.setattr(Homes, "here", anywhere)
    monkeypatch.setattr(Case, "killed", killed)
    result = Result()
    run(rbd_rig, Case(folder, folder, "rbd", "files"), "plain", 2, result)
    assert any("it can be used in 2 places" in each for each in result.lost)
