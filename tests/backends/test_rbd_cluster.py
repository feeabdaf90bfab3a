"""The backend rbd on a real Ceph as far as it needs no device: records, makers and kills, users, what lies in the pool.

On the host, where Ceph's programs start ten times as fast as in a guest: `make ceph-test` runs it.
"""

import contextlib
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from csi_driver.backends.rbd import RbdBackend
from csi_driver.backends.rbdplace import image_name
from csi_driver.backends.rbdrecords import VolumeLogs, VolumeState
from csi_driver.model.access import Access
from csi_driver.model.errors import Aborted, DeadlineExceeded, FailedPrecondition, NotFound, ResourceExhausted
from csi_driver.model.volume import EncryptionState
from tests.backends.ceph import POOL, new_key
from tests.backends.ceph_csi import CephCsiVolume
from tests.backends.rigs import RbdRig
from tests.backends.test_conformance import SIZE, Countdown, Killed, check_foreign, record_of

MIB = 1 << 20

pytestmark = pytest.mark.skipif(
    "MACHINE_STATE" in os.environ or os.environ.get("BACKEND") != "rbd", reason="it starts a Ceph: make ceph-test"
)


def made(rig: RbdRig) -> str:
    record = record_of(rig)
    rig.backend().create(record, SIZE)
    return record.id


def objects(rig: RbdRig) -> set[str]:
    """What lies in the pool, but for what Ceph itself keeps there."""
    kept = {"rbd_directory", "rbd_info", "rbd_trash", "rbd_children", "luks-csi.volumes"}
    return set(rig.ceph.admin("rados", "-p", POOL, "ls").split()) - kept


def metadata(rig: RbdRig, volume_id: str) -> dict[str, str]:
    found = rig.ceph.asked("rbd", "image-meta", "list", f"{POOL}/{image_name(volume_id)}")
    return dict(found) if found else {}


def test_a_user_that_the_cluster_does_not_know_is_told_so_and_shown_nowhere(ceph: RbdRig) -> None:
    volume_id = made(ceph)
    backend = ceph.backend()
    for secrets in ({"userID": "nobody", "userKey": ceph.ceph.key}, {"userID": "csi", "userKey": new_key()}):
        backend.use(volume_id, Access(secrets=secrets))
        with pytest.raises(FailedPrecondition) as refused:
            backend.get(volume_id)
        assert f"client.{secrets['userID']}" in str(refused.value)
        assert secrets["userKey"] not in str(refused.value)


def test_the_state_is_told_by_the_keys_of_ceph_csi_too(ceph: RbdRig) -> None:
    backend = ceph.backend()
    record = backend.create(record_of(ceph), SIZE)
    assert metadata(ceph, record.id) == {"rbd.csi.ceph.com/encrypted": "encryptionPrepared"}
    backend.update(msgspec.structs.replace(record, encryption=EncryptionState.ENCRYPTED))
    assert metadata(ceph, record.id) == {"rbd.csi.ceph.com/encrypted": "encrypted"}


def test_no_process_and_no_file_has_the_key(ceph: RbdRig) -> None:
    """While workers run: their arguments and environments, and what is below the state directory."""
    volume_id, key = made(ceph), ceph.ceph.key.encode()
    backend = ceph.backend(seconds=6)
    ceph.ceph.stop("osd.0")
    seen: list[str] = []

    def look() -> Sequence[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    content = (process / name).read_bytes()
                    seen.append(content.decode(errors="replace"))
                    if key in content:
                        found.append(f"{process}/{name}")
        return found

    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(backend.get, volume_id)
            while not asked.done():
                assert not look()
            with pytest.raises(DeadlineExceeded):
                asked.result()
    finally:
        ceph.ceph.go_on("osd.0")
    assert any("csi_driver.host.launcher" in one for one in seen)
    found = subprocess.run(["grep", "-rlF", key.decode(), str(ceph.folder_of("node-1"))], check=False, text=True)
    assert found.returncode == 1, found


def test_a_header_copy_of_a_real_size_is_kept_and_comes_back(ceph: RbdRig) -> None:
    backend, content = ceph.backend(), os.urandom(9 * MIB) + bytes(7 * MIB)
    volume_id = made(ceph)

    def fill(path: str) -> None:
        Path(path).write_bytes(content)

    backend.keep_header_copy(volume_id, fill)
    assert ceph.backend(node_id="node-b").header_copy(volume_id).read_bytes() == content


def test_what_lies_in_the_pool_goes_with_the_volume(ceph: RbdRig) -> None:
    backend = ceph.backend()
    volume_id = made(ceph)

    def fill(path: str) -> None:
        Path(path).write_bytes(b"x" * 1000)

    backend.keep_header_copy(volume_id, fill)
    for number in range(10):
        backend.publish(volume_id, f"node-{number % 2}", many_nodes=False)
        backend.unpublish(volume_id, "")
    backend.delete(volume_id)
    assert not objects(ceph)


def test_foreign_images_are_left_alone(ceph: RbdRig) -> None:
    check_foreign(ceph)


# --- records


def test_of_writers_from_one_revision_one_wins_and_the_others_are_told(ceph: RbdRig) -> None:
    record = ceph.backend().get(made(ceph))

    def write(number: int) -> bool:
        try:
            ceph.backend().update(msgspec.structs.replace(record, created=f"by {number}"))
        except Aborted:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(write, range(6))) == 1
    assert ceph.backend().get(record.id).revision == 1


def test_changes_of_many_writers_are_all_there_when_the_log_has_gone_on(ceph: RbdRig) -> None:
    pool, volume_id = ceph.backend().pool_of(ceph.id_of("pvc-1")), ceph.id_of("pvc-1")
    VolumeLogs().change(pool, volume_id, lambda _: VolumeState(record=""))
    told: list[str] = []

    def write(writer: int) -> None:
        logs = VolumeLogs()
        for number in range(30):
            mark = f"{writer}-{number}"

            def add(state: VolumeState | None, mark: str = mark) -> VolumeState:
                return VolumeState(record=f"{state.record if state else ''} {mark}")

            with contextlib.suppress(Aborted):
                logs.change(pool, volume_id, add)
                told.append(mark)

    with ThreadPoolExecutor(3) as writers:
        list(writers.map(write, range(3)))
    state = VolumeLogs().state(pool, volume_id)
    assert state is not None
    written = (state.record or "").split()
    assert len(written) == len(set(written))
    assert set(told) <= set(written)
    assert len(told) > 64
    assert len(objects(ceph)) == 2
    VolumeLogs().forget(pool, volume_id)
    assert not objects(ceph)


def test_a_writer_that_is_killed_delays_nobody(ceph: RbdRig) -> None:
    record = ceph.backend().get(made(ceph))
    for left in range(2):
        backend = ceph.backend(step := Countdown())
        step.left = left
        with contextlib.suppress(Killed):
            backend.update(msgspec.structs.replace(record, created=f"by the killed {left}"))
        found = ceph.backend().get(record.id)
        record = ceph.backend().update(msgspec.structs.replace(found, created=f"by the next {left}"))
        assert ceph.backend().get(record.id).created == f"by the next {left}"


# --- kills


def killed_everywhere(
    rig: RbdRig, before: Callable[[], object], act: Callable[[RbdBackend], object], after: Callable[[str], None]
) -> int:
    """`act` is killed behind each step that it has; how many there are."""
    before()
    steps: list[str] = []
    backend = rig.backend(steps.append)
    act(backend)
    for number in itertools.count():
        rig.clear()
        before()
        backend = rig.backend(step := Countdown())
        step.left = number
        try:
            act(backend)
        except Killed:
            after(steps[number])
            continue
        return number
    raise AssertionError("it has no end")


def test_killed_at_every_step_of_its_creation_a_volume_is_there_or_made_by_the_next_call(ceph: RbdRig) -> None:
    record = record_of(ceph)

    def after(step: str) -> None:
        backend = ceph.backend()
        if not backend.has(record.id):
            backend.create(record, SIZE)
        assert backend.get(record.id) == record, step
        assert not backend.orphans(), step
        assert len(ceph.ceph.asked("rbd", "ls", POOL)) == 1, step
        backend.delete(record.id)
        assert not objects(ceph), step

    assert killed_everywhere(ceph, lambda: None, lambda backend: backend.create(record, SIZE), after) > 5


def test_killed_at_every_step_of_its_creation_a_volume_can_be_deleted(ceph: RbdRig) -> None:
    record = record_of(ceph)

    def after(step: str) -> None:
        backend = ceph.backend()
        for _ in range(2):
            backend.delete(record.id)
        assert not objects(ceph), step
        assert not backend.ids(), step

    assert killed_everywhere(ceph, lambda: None, lambda backend: backend.create(record, SIZE), after) > 5


def test_killed_at_every_step_of_its_deletion_a_volume_is_whole_or_gone_with_the_next_call(ceph: RbdRig) -> None:
    record = record_of(ceph)

    def after(step: str) -> None:
        backend = ceph.backend()
        with contextlib.suppress(NotFound):
            assert backend.get(record.id) == record, step
            assert len(ceph.ceph.asked("rbd", "ls", POOL)) == 1, step
        backend.delete(record.id)
        assert not objects(ceph), step
        backend.create(record, SIZE)

    def before() -> None:
        ceph.backend().create(record, SIZE)

    assert killed_everywhere(ceph, before, lambda backend: backend.delete(record.id), after) > 4


def test_a_header_is_overwritten_before_the_image_goes_without_a_device(ceph: RbdRig) -> None:
    volume_id = made(ceph)
    backend, pool = ceph.backend(), ceph.backend().pool_of(volume_id)
    pool.overwrite(image_name(volume_id), 5 * MIB, 60)
    exported = subprocess.run(
        ["rbd", "-c", ceph.ceph.conf, "export", "--no-progress", f"{POOL}/{image_name(volume_id)}", "-"],
        check=True,
        capture_output=True,
    ).stdout
    assert len(exported) == SIZE
    assert exported[: 5 * MIB].count(0) < MIB
    assert not exported[5 * MIB :].strip(b"\0")
    backend.delete(volume_id)


def test_what_has_no_room_and_what_grows(ceph: RbdRig) -> None:
    backend = ceph.backend()
    room = backend.space(ceph.parameters)
    assert 0 < room.available <= room.free <= room.total
    assert backend.space().available >= room.available
    with pytest.raises(ResourceExhausted, match=r"no room for volume pvc-1"):
        backend.create(record_of(ceph), room.total + (1 << 30))
    assert not backend.ids()
    volume_id = made(ceph)
    with pytest.raises(ResourceExhausted, match=r"no room for volume pvc-1"):
        backend.grow(volume_id, room.total + (1 << 30))
    for size, expected in ((1, SIZE), (2 * SIZE + 1, 2 * SIZE + 512), (SIZE, 2 * SIZE + 512)):
        backend.grow(volume_id, size)
        assert ceph.ceph.asked("rbd", "info", f"{POOL}/{image_name(volume_id)}")["size"] == expected


def test_a_volume_is_taken_from_its_node_and_deleted_in_a_pool_that_is_full(ceph: RbdRig) -> None:
    """Also by the first image that is removed from it at all, for which Ceph makes its trash."""
    backend, volume_id = ceph.backend(), made(ceph)
    backend.publish(volume_id, "node-a", many_nodes=False)
    ceph.ceph.admin("rados", "-p", POOL, "rm", "rbd_trash", check=False)
    ceph.ceph.admin("ceph", "osd", "pool", "set-quota", POOL, "max_objects", "1")
    try:
        while "full_quota" not in ceph.ceph.asked("ceph", "osd", "pool", "ls", "detail")[0]["flags_names"]:
            time.sleep(0.1)
        backend.unpublish(volume_id, "node-a")
        assert backend.published(volume_id) == []
        backend.delete(volume_id)
        assert not objects(ceph)
    finally:
        ceph.ceph.admin("ceph", "osd", "pool", "set-quota", POOL, "max_objects", "0")
        while "full_quota" in ceph.ceph.asked("ceph", "osd", "pool", "ls", "detail")[0]["flags_names"]:
            time.sleep(0.1)


def test_a_volume_whose_pool_was_renamed_is_not_deleted(ceph: RbdRig) -> None:
    """By a controller that has seen it there."""
    admin = ceph.ceph.admin
    admin("ceph", "osd", "pool", "create", "first", "1")
    admin("rbd", "pool", "init", "first")
    name = "first"
    try:
        backend = ceph.backend()
        parameters = msgspec.structs.replace(ceph.parameters, pool="first")
        while "first" not in {each["name"] for each in ceph.ceph.asked("ceph", "df")["pools"]}:
            time.sleep(0.1)
        volume_id = backend.id_for("pvc-1", parameters)
        backend.create(msgspec.structs.replace(record_of(ceph), id=volume_id, parameters=parameters), SIZE)
        backend.publish(volume_id, "node-a", many_nodes=False)
        admin("ceph", "osd", "pool", "rename", "first", name := "second")
        for call in (
            lambda: backend.get(volume_id),
            lambda: backend.has(volume_id),
            lambda: backend.unpublish(volume_id, "node-a"),
            lambda: backend.delete(volume_id),
        ):
            with pytest.raises(FailedPrecondition, match=r"it has no pool first; .* give a pool that was renamed its"):
                call()
        admin("ceph", "osd", "pool", "rename", "second", name := "first")
        assert backend.published(volume_id) == ["node-a"]
        backend.unpublish(volume_id, "node-a")
        backend.delete(volume_id)
    finally:
        admin("ceph", "osd", "pool", "rm", name, name, "--yes-i-really-really-mean-it")


# --- volumes of Ceph-CSI


def taken(rig: RbdRig, backend: RbdBackend, peer: CephCsiVolume) -> None:
    """As the command does it behind its look at the header, which needs a device."""
    foreign = backend.foreign.find(peer.handle, "pvc-1")
    record = msgspec.structs.replace(
        record_of(rig), parameters=foreign.parameters, encryption=EncryptionState.ENCRYPTED, capacity_bytes=48 * MIB
    )
    if not foreign.is_ours:
        backend.foreign.take(foreign, record)


def test_killed_at_every_step_a_volume_of_ceph_csi_is_ours_with_the_next_call_or_given_back(ceph: RbdRig) -> None:
    peers: list[CephCsiVolume] = []

    def before() -> None:
        peers.append(CephCsiVolume(ceph.ceph, b"key"))
        peers[-1].create(dek="wrapped")
        peers[-1].tell("encrypted", "encrypted")

    def after(step: str) -> None:
        peer, backend, volume_id = peers[-1], ceph.backend(), ceph.id_of("pvc-1")
        found = ceph.ceph.asked("rbd", "ls", POOL)
        assert found in ([peer.image], [image_name(volume_id)]), step
        journal = ceph.ceph.admin("rados", "-p", POOL, "listomapvals", f"csi.volume.{peer.uuid}")
        if found == [peer.image]:  # who deletes what was cut deletes nothing of Ceph-CSI
            backend.delete(volume_id)
            assert ceph.ceph.asked("rbd", "ls", POOL) == [peer.image], step
        taken(ceph, backend, peer)
        assert ceph.ceph.asked("rbd", "ls", POOL) == [image_name(volume_id)], step
        assert metadata(ceph, volume_id)["rbd.csi.ceph.com/dek"] == "wrapped", step
        assert ceph.ceph.admin("rados", "-p", POOL, "listomapvals", f"csi.volume.{peer.uuid}") == journal, step
        taken(ceph, backend, peer)
        assert backend.get(volume_id).capacity_bytes == 48 * MIB, step
        backend.delete(volume_id)
        assert ceph.ceph.asked("rbd", "ls", POOL) == [], step

    assert killed_everywhere(ceph, before, lambda backend: taken(ceph, backend, peers[-1]), after) > 3
