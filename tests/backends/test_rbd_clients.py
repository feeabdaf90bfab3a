"""What a pool of a real Ceph answers through librados and librbd, and what becomes of a session that is kept.

On the host, as `test_rbd_cluster.py`: `make ceph-test` runs it.
"""

import base64
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csi_driver.backends import librados
from csi_driver.backends.rbdclients import CephClients, Credentials, pools_of
from csi_driver.backends.rbderrors import CephExists, CephMissing
from csi_driver.backends.rbdplace import Cluster
from csi_driver.backends.rbdpool import CephPool
from csi_driver.host.handle import Handle
from csi_driver.model.errors import CommandFailed, DeviceInUse, FailedPrecondition, ResourceExhausted
from tests.backends.ceph import CLUSTER, POOL, USER, new_key
from tests.backends.rigs import RbdRig

MIB = 1 << 20
FEATURES = ("layering", "exclusive-lock", "object-map", "fast-diff")
RIGHTS = ("mon", "profile rbd", "osd", "profile rbd", "mgr", "profile rbd")

pytestmark = pytest.mark.skipif(
    "MACHINE_STATE" in os.environ or os.environ.get("BACKEND") != "rbd", reason="it starts a Ceph: make ceph-test"
)


def pool_of(rig: RbdRig, name: str = POOL, namespace: str = "", user: str = USER, key: str = "") -> CephPool:
    clients = CephClients(rig.workers, 20)
    place = Cluster(CLUSTER, tuple(rig.ceph.monitors), namespace).place(name)
    return CephPool(clients, place, Credentials(user, key or rig.ceph.key))


@pytest.fixture
def pool(ceph: RbdRig) -> CephPool:
    return pool_of(ceph)


@pytest.fixture
def user(ceph: RbdRig) -> Iterator[str]:
    """Another user, with the rights of the driver's."""
    ceph.ceph.admin("ceph", "auth", "get-or-create", "client.other", *RIGHTS)
    yield "other"
    ceph.ceph.admin("ceph", "auth", "rm", "client.other")


def pool_credentials(rig: RbdRig) -> Credentials:
    return Credentials(USER, rig.ceph.key)


def memory(content: bytes) -> Handle:
    descriptor = os.memfd_create("question", os.MFD_CLOEXEC)
    os.write(descriptor, content)
    return Handle(descriptor, "a question")


def exported(rig: RbdRig) -> bytes:
    """All of the image `one`."""
    path = rig.folder_of("exported")
    rig.ceph.admin("rbd", "export", "--no-progress", f"{POOL}/one", str(path))
    try:
        return path.read_bytes()
    finally:
        path.unlink()


def key_of(rig: RbdRig, user: str) -> str:
    return rig.ceph.admin("ceph", "auth", "get-key", f"client.{user}").strip()


def test_an_object_is_what_was_put_and_appended(pool: CephPool) -> None:
    assert (pool.get("one"), pool.has("one")) == (None, False)
    pool.append("one", b"a" * 70_000)
    pool.append("one", b"")
    pool.append("one", b"b")
    assert (pool.get("one"), pool.has("one")) == (b"a" * 70_000 + b"b", True)
    pool.put("one", b"\0\n")
    assert pool.get("one") == b"\0\n"
    pool.put("one", b"")
    assert pool.get("one") == b""
    pool.drop("one")
    pool.drop("one")
    assert not pool.has("one")


@pytest.mark.parametrize("size", [64 << 10, (256 << 10) - 1, 256 << 10, (256 << 10) + 1])
def test_an_object_as_long_as_what_is_read_at_once_is_read_whole(pool: CephPool, size: int) -> None:
    content = os.urandom(size)
    pool.put("one", content)
    assert pool.get("one") == content


def test_a_map_has_what_was_set(pool: CephPool) -> None:
    assert (pool.keys("map"), pool.value("map", "a")) == ([], None)
    pool.drop_value("map", "a")
    pool.set_value("map", "b", "")
    pool.set_value("map", "a", "ä\n\0x")
    assert (pool.keys("map"), pool.value("map", "a"), pool.value("map", "b")) == (["a", "b"], "ä\n\0x", "")
    assert pool.value("map", "c") is None
    pool.drop_value("map", "a")
    pool.drop_value("map", "a")
    assert pool.keys("map") == ["b"]


def test_a_map_is_read_to_its_end_however_many_keys_the_cluster_tells_at_once(ceph: RbdRig, pool: CephPool) -> None:
    before = ceph.ceph.admin("ceph", "config", "get", "osd", "osd_max_omap_entries_per_request").strip()
    ceph.ceph.admin("ceph", "config", "set", "osd", "osd_max_omap_entries_per_request", "3")
    try:
        for number in range(10):
            pool.set_value("map", f"key-{number}", "x")
        assert pool.keys("map") == [f"key-{number}" for number in range(10)]
    finally:
        ceph.ceph.admin("ceph", "config", "set", "osd", "osd_max_omap_entries_per_request", before)


def test_an_image_is_what_was_made(ceph: RbdRig, pool: CephPool) -> None:
    assert pool.info("one") is None
    pool.make("one", 5 * MIB, FEATURES, None)
    told = ceph.ceph.asked("rbd", "info", f"{POOL}/one")
    found = pool.info("one")
    assert found is not None
    assert (found.id, found.size, found.data_pool) == (told["id"], 5 * MIB, None)
    assert tuple(told["features"]) == FEATURES
    with pytest.raises(CephExists):
        pool.make("one", MIB, FEATURES, None)
    pool.resize("one", 5 << 40)
    pool.resize("one", 4 << 40)
    assert ceph.ceph.asked("rbd", "info", f"{POOL}/one")["size"] == 5 << 40  # never shorter, whoever has grown it
    pool.make("two", MIB, FEATURES, None)
    with pytest.raises(CephExists):
        pool.rename("one", "two")
    pool.rename("one", "three")
    assert ceph.ceph.asked("rbd", "info", f"{POOL}/three")["id"] == told["id"]
    for act in (lambda: pool.rename("one", "four"), lambda: pool.resize("one", MIB), lambda: pool.watchers("one")):
        with pytest.raises(CephMissing, match="look whether the pool or image was removed by hand"):
            act()


def test_an_image_can_have_its_data_in_another_pool(ceph: RbdRig, pool: CephPool) -> None:
    ceph.ceph.admin("ceph", "osd", "pool", "create", "data", "1")
    try:
        pool.make("one", MIB, FEATURES, "data")
        found = pool.info("one")
        assert found is not None
        assert found.data_pool == "data"
        assert ceph.ceph.asked("rbd", "info", f"{POOL}/one")["data_pool"] == "data"
        pool.remove("one", 20)
    finally:
        ceph.ceph.admin("ceph", "osd", "pool", "rm", "data", "data", "--yes-i-really-really-mean-it")


def test_what_was_ever_written_to_an_image_is_seen_and_its_start_overwritten(ceph: RbdRig, pool: CephPool) -> None:
    pool.make("one", 9 * MIB, FEATURES, None)
    assert pool.is_unwritten("one", 20)
    pool.overwrite("one", 5 * MIB, 20)
    assert not pool.is_unwritten("one", 20)
    content = exported(ceph)
    assert len(content) == 9 * MIB
    assert content[5 * MIB :] == bytes(4 * MIB)
    assert all(len(set(content[at : at + 4096])) > 200 for at in range(0, 5 * MIB, 4096))
    pool.overwrite("one", 1 << 40, 20)
    with pytest.raises(CephMissing):
        pool.overwrite("two", MIB, 20)
    pool.remove("one", 20)
    pool.remove("one", 20)
    assert pool.info("one") is None


def test_an_image_that_is_open_is_not_removed(ceph: RbdRig, pool: CephPool) -> None:
    pool.make("one", MIB, FEATURES, None)
    bench = ("bench", "--io-type", "write", "--io-size", "4096", "--io-total", "10G", f"{POOL}/one")
    with ceph.ceph.running("rbd", *bench) as writer:
        deadline = time.monotonic() + 20
        while not pool.watchers("one"):
            assert writer.poll() is None
            assert time.monotonic() < deadline
        with pytest.raises(DeviceInUse, match=r"rbd rm rbd/one .* unmap it where it is mapped"):
            pool.remove("one", 20)
    pool.fence("one", pool.watchers("one")[0])
    assert pool.info("one") is not None


def test_the_kernel_is_told_where_the_monitors_are(ceph: RbdRig, pool: CephPool) -> None:
    assert pool.address("one", ("noshare",)).line == (
        f"{ceph.ceph.address}:6789 name=csi,key=client.csi,noshare rbd one -"
    )
    within = pool_of(ceph, namespace="tenant").address("one", ("ms_mode=secure",))
    assert within.line == f"{ceph.ceph.address}:3300 name=csi,key=client.csi,ms_mode=secure,_pool_ns=tenant rbd one -"
    assert ceph.ceph.key not in f"{within} {within.line}"
    assert base64.b64encode(within.key).decode() == ceph.ceph.key


def test_what_is_removed_on_a_condition_is_that_and_nothing_else(pool: CephPool) -> None:
    pool.set_value("map", "a", "one")
    pool.drop_value("map", "a", only="two")
    pool.drop_value("map", "b", only="one")
    pool.drop_value("none", "a", only="one")
    assert pool.value("map", "a") == "one"
    pool.drop_value("map", "a", only="one")
    assert pool.value("map", "a") is None
    pool.make("one", MIB, FEATURES, None)
    pool.remove("one", 20, only="another")
    found = pool.info("one")
    assert found is not None
    pool.remove("one", 20, only=found.id)
    pool.remove("one", 20, only=found.id)
    assert pool.info("one") is None


def test_a_quota_counts_as_room_and_a_full_pool_is_told_at_once(ceph: RbdRig, pool: CephPool) -> None:
    ceph.ceph.admin("ceph", "osd", "pool", "create", "small", "1")
    small = pool_of(ceph, name="small")
    try:
        ceph.ceph.admin("ceph", "osd", "pool", "set-quota", "small", "max_bytes", str(8 * MIB))
        while not any(room.name == "small" and room.stats.quota for room in pool.rooms()):
            time.sleep(0.1)
        assert pool.room_of(pool.rooms(), "small").available == 8 * MIB
        small.put("one", b"x" * MIB)
        ceph.ceph.admin("ceph", "osd", "pool", "set-quota", "small", "max_bytes", "1000")
        while ceph.ceph.asked("ceph", "osd", "pool", "ls", "detail")[-1]["flags_names"].find("full_quota") < 0:
            time.sleep(0.1)
        with pytest.raises(ResourceExhausted, match="free space in the pool or raise its quota"):
            small.put("two", b"x")
        small.append("log", b"x")  # without which nothing could be removed
        small.append("log", b"y")
        assert small.get("log") == b"xy"
        small.drop("one")
    finally:
        ceph.ceph.admin("ceph", "osd", "pool", "rm", "small", "small", "--yes-i-really-really-mean-it")


def test_metadata_comes_whole_however_much_it_is(pool: CephPool) -> None:
    pool.make("one", MIB, FEATURES, None)
    assert pool.metadata("one") == {}
    wanted = {f"rbd.csi.ceph.com/{number}": "v" * number * 100 for number in range(30)}
    for key, value in wanted.items():
        pool.describe("one", key, value)
    assert pool.metadata("one") == wanted


def test_snapshots_are_counted_and_an_image_that_has_some_stays(ceph: RbdRig, pool: CephPool) -> None:
    pool.make("one", MIB, FEATURES, None)
    for number in range(3):
        assert pool.snapshots("one") == number
        ceph.ceph.admin("rbd", "snap", "create", f"{POOL}/one@{number}")
    with pytest.raises(DeviceInUse, match=r"; it has snapshots \(.*\), remove them"):
        pool.remove("one", 60)
    ceph.ceph.admin("rbd", "snap", "purge", f"{POOL}/one")
    assert pool.snapshots("one") == 0
    pool.remove("one", 60)
    assert pool.info("one") is None


def test_a_snapshot_in_the_trash_keeps_the_image_while_a_clone_needs_it(ceph: RbdRig, pool: CephPool) -> None:
    """As Ceph-CSI's snapshots and clones leave it: removed, and with a clone of the second format."""
    admin = ceph.ceph.admin
    pool.make("one", MIB, FEATURES, None)
    admin("rbd", "snap", "create", f"{POOL}/one@snapshot")
    admin("rbd", "clone", "--rbd-default-clone-format", "2", f"{POOL}/one@snapshot", f"{POOL}/clone")
    admin("rbd", "snap", "rm", f"{POOL}/one@snapshot")
    try:
        assert pool.snapshots("one") == 1
    finally:
        admin("rbd", "rm", f"{POOL}/clone")
    assert pool.snapshots("one") == 0
    pool.remove("one", 60)


def test_an_image_in_a_group_stays(ceph: RbdRig, pool: CephPool) -> None:
    pool.make("one", MIB, FEATURES, None)
    assert pool.group("one") == ""
    ceph.ceph.admin("rbd", "group", "create", f"{POOL}/backup")
    ceph.ceph.admin("rbd", "group", "image", "add", f"{POOL}/backup", f"{POOL}/one")
    try:
        assert pool.group("one") == "backup"
        with pytest.raises(DeviceInUse, match=r"it is in a group, take it out of that first"):
            pool.remove("one", 60)
    finally:
        ceph.ceph.admin("rbd", "group", "rm", f"{POOL}/backup")
    pool.remove("one", 60)


def test_snapshots_of_mirroring_keep_no_image(ceph: RbdRig, pool: CephPool) -> None:
    pool.make("one", MIB, FEATURES, None)
    ceph.ceph.admin("rbd", "mirror", "pool", "enable", POOL, "image")
    try:
        ceph.ceph.admin("rbd", "mirror", "image", "enable", f"{POOL}/one", "snapshot")
        assert ceph.ceph.asked("rbd", "snap", "ls", "--all", f"{POOL}/one")
        assert pool.snapshots("one") == 0
        pool.remove("one", 60)
        assert pool.info("one") is None
    finally:
        ceph.ceph.admin("rbd", "mirror", "pool", "disable", POOL)


def test_who_has_an_image_open_is_told_and_his_lock_broken_when_he_is_fenced(ceph: RbdRig, pool: CephPool) -> None:
    pool.make("one", MIB, FEATURES, None)
    assert pool.watchers("one") == []
    assert pool.info("one") is not None  # a look leaves nothing open
    pool.describe("one", "a", "b")
    assert pool.watchers("one") == []
    ceph.ceph.admin("rbd", "lock", "add", f"{POOL}/one", "cookie")
    locks = ceph.ceph.asked("rbd", "lock", "ls", f"{POOL}/one")
    pool.fence("one", "192.0.2.7:0/1")
    assert ceph.ceph.asked("rbd", "lock", "ls", f"{POOL}/one") == locks
    pool.fence("one", locks[0]["address"])
    pool.fence("gone", "192.0.2.7:0/2")
    assert ceph.ceph.asked("rbd", "lock", "ls", f"{POOL}/one") == []
    blocked = {each["addr"] for each in ceph.ceph.asked("ceph", "osd", "blocklist", "ls")}
    assert blocked >= {locks[0]["address"], "192.0.2.7:0/1", "192.0.2.7:0/2"}


def test_namespaces_of_a_pool_do_not_see_each_other(ceph: RbdRig, pool: CephPool) -> None:
    ceph.ceph.admin("rbd", "namespace", "create", f"{POOL}/tenant")
    within = pool_of(ceph, namespace="tenant")
    try:
        within.put("one", b"theirs")
        within.make("one", MIB, FEATURES, None)
        assert (pool.get("one"), pool.info("one")) == (None, None)
        assert within.info("one") is not None
    finally:
        within.drop("one")
        within.remove("one", 20)
        ceph.ceph.admin("rbd", "namespace", "remove", f"{POOL}/tenant")


@pytest.mark.parametrize(
    "ask",
    [
        lambda pool: pool.get("one"),
        lambda pool: pool.has("one"),
        lambda pool: pool.keys("one"),
        lambda pool: pool.value("one", "a"),
        lambda pool: pool.info("one"),
        lambda pool: pool.snapshots("one"),
        lambda pool: pool.put("one", b"x"),
        lambda pool: pool.append("one", b"x"),
        lambda pool: pool.drop("one"),
        lambda pool: pool.drop_value("one", "a"),
        lambda pool: pool.remove("one", 20),
        lambda pool: pool.room_of(pool.rooms(), "absent"),
    ],
)
def test_a_pool_that_is_not_there_is_told_and_nothing_in_it_counts_as_gone(
    ceph: RbdRig, ask: Callable[[CephPool], object]
) -> None:
    with pytest.raises(FailedPrecondition, match=r"failed: it has no pool absent; make it"):
        ask(pool_of(ceph, name="absent"))


def test_the_cluster_tells_its_fsid_and_its_room(ceph: RbdRig, pool: CephPool) -> None:
    assert pool.cluster_uuid() == ceph.ceph.fsid
    assert pool.room_of(pool.rooms(), POOL).available > 0


def test_each_cluster_is_told_with_its_fsid_and_the_first_one_that_cannot_be_asked(ceph: RbdRig) -> None:
    backend, before = ceph.backend(), ceph.config.read_text()
    assert backend.reached() == f"{CLUSTER} ({ceph.ceph.fsid})"
    ceph.config.write_text(json.dumps([*json.loads(before), {"clusterID": "two", "monitors": ["mon.invalid:6789"]}]))
    try:
        with pytest.raises(FailedPrecondition, match=r"the Ceph cluster two cannot be reached"):
            backend.reached()
    finally:
        ceph.config.write_text(before)


# --- sessions that are kept ------------------------------------------------------------------------------------------


def test_pools_that_are_made_and_renamed_are_known_at_once_by_a_session_that_is_kept(
    ceph: RbdRig, pool: CephPool
) -> None:
    clients, admin = CephClients(ceph.workers, 20), ceph.ceph.admin
    pool.put("one", b"x")
    try:
        admin("ceph", "osd", "pool", "create", "first", "1")
        assert "first" in pools_of(clients, Cluster(CLUSTER, tuple(ceph.ceph.monitors)), pool_credentials(ceph))
        pool_of(ceph, name="first").put("one", b"of the first")
        admin("ceph", "osd", "pool", "rename", "first", "second")
        admin("ceph", "osd", "pool", "create", "first", "1")
        assert pool_of(ceph, name="first").get("one") is None
        assert pool_of(ceph, name="second").get("one") == b"of the first"
    finally:
        for name in ("first", "second"):
            admin("ceph", "osd", "pool", "rm", name, name, "--yes-i-really-really-mean-it", check=False)


def test_a_worker_keeps_few_sessions(ceph: RbdRig, pool: CephPool) -> None:
    pool.put("one", b"x")
    users = [f"tenant-{number}" for number in range(6)]
    try:
        for user in users:
            ceph.ceph.admin("ceph", "auth", "get-or-create", f"client.{user}", *RIGHTS)
        for user in [*users, *users]:
            assert pool_of(ceph, user=user, key=key_of(ceph, user)).get("one") == b"x"
        with ceph.workers.apart("ceph"):
            threads = ceph.workers.call("count", 10, os.listdir, "/proc/self/task")
        assert 10 < len(threads) < 6 * 10
    finally:
        for user in users:
            ceph.ceph.admin("ceph", "auth", "rm", f"client.{user}", check=False)


def test_what_the_cluster_wants_of_its_clients_opens_no_socket_of_ours(ceph: RbdRig, tmp_path: Path) -> None:
    """It would tell the key."""
    socket = tmp_path / "client.asok"
    ceph.ceph.admin("ceph", "config", "set", "client", "admin_socket", str(socket))
    try:
        ceph.workers.dismiss("ceph")
        assert pool_of(ceph).get("one") is None
        assert not socket.exists()
    finally:
        ceph.ceph.admin("ceph", "config", "rm", "client", "admin_socket")


def test_a_question_ends_with_its_time_where_the_server_was_killed(ceph: RbdRig) -> None:
    """By the kernel: nobody is there who would kill the worker."""
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        login = librados.Login(f"v1:127.0.0.1:{silent.getsockname()[1]}", USER, ceph.ceph.key)
        asked = stack.enter_context(memory(librados.question(login, librados.uuid, (), seconds=-4)))
        into = stack.enter_context(memory(b""))
        stack.enter_context(ceph.workers.apart("ceph"))
        with pytest.raises(CommandFailed, match="was killed before it could answer"):
            ceph.workers.call("ceph fsid", 60, librados.answer, asked, into)


def test_rights_that_a_user_is_given_count_at_once(ceph: RbdRig, user: str) -> None:
    theirs = pool_of(ceph, user=user, key=key_of(ceph, user))
    ceph.ceph.admin("ceph", "auth", "caps", f"client.{user}", "mon", "profile rbd", "osd", "allow r")
    with pytest.raises(FailedPrecondition, match="needs the capabilities mon 'profile rbd', osd 'profile rbd'"):
        theirs.put("one", b"x")
    ceph.ceph.admin("ceph", "auth", "caps", f"client.{user}", *RIGHTS)
    theirs.put("one", b"x")
    assert theirs.get("one") == b"x"


def test_a_user_that_has_a_new_key_needs_it(ceph: RbdRig, user: str) -> None:
    old = key_of(ceph, user)
    pool_of(ceph, user=user, key=old).put("one", b"x")
    ceph.ceph.admin("ceph", "auth", "rm", f"client.{user}")
    ceph.ceph.admin("ceph", "auth", "get-or-create", f"client.{user}", *RIGHTS)
    assert pool_of(ceph, user=user, key=key_of(ceph, user)).get("one") == b"x"
    with pytest.raises(FailedPrecondition, match=r"refuses client\.other: .* 'ceph auth get client\.other' tells"):
        pool_of(ceph, user=user, key=old).get("one")


def test_a_node_that_was_fenced_off_is_told_so_and_goes_on_when_it_is_let_in_again(
    ceph: RbdRig, pool: CephPool
) -> None:
    pool.put("one", b"x")
    ceph.ceph.admin("ceph", "osd", "blocklist", "add", "127.0.0.1:0/0")
    try:
        with pytest.raises(FailedPrecondition, match="this node's client was fenced off"):
            pool.put("one", b"y")
    finally:
        ceph.ceph.admin("ceph", "osd", "blocklist", "rm", "127.0.0.1:0/0")
    pool.put("one", b"z")
    assert pool.get("one") == b"z"


def test_monitors_that_have_no_address_are_named(ceph: RbdRig) -> None:
    cluster = Cluster(CLUSTER, ("mon.invalid:6789",))
    clients = CephClients(ceph.workers, 20)
    with pytest.raises(FailedPrecondition, match=r"no address is found .* \(mon\.invalid:6789\); correct them"):
        CephPool(clients, cluster.place(POOL), Credentials(USER, ceph.ceph.key)).get("one")


@pytest.mark.parametrize(("user", "key"), [("nobody", ""), (USER, new_key())])
def test_a_user_that_the_cluster_does_not_know_is_refused(ceph: RbdRig, user: str, key: str) -> None:
    with pytest.raises(FailedPrecondition, match=rf"refuses client\.{user}"):
        pool_of(ceph, user=user, key=key).get("one")
