"""Where volumes of Ceph lie: clusters as Ceph-CSI configures them, ids that tell the pool, users that calls bring."""

import json
from pathlib import Path
from typing import Any

import pytest

from csi_driver.backends import librados
from csi_driver.backends.rbdaccess import CephAccess
from csi_driver.backends.rbdclients import CephClients, Credentials
from csi_driver.backends.rbdplace import Cluster, Clusters, Place, digest_of, image_name
from csi_driver.host.workers import Workers
from csi_driver.model.access import Access
from csi_driver.model.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound
from csi_driver.model.volume import VolumeParameters, is_volume_id

DOCUMENT = """
[
  {
    "clusterID": "b9127830-b0cc-4e34-aa47-9d1a2e9949a8",
    "monitors": ["192.168.39.231:6789", "[v2:10.0.0.1:3300,v1:10.0.0.1:6789]"],
    "rbd": {"radosNamespace": "tenants", "mirrorDaemonCount": 1},
    "cephFS": {"subvolumeGroup": "csi"},
    "readAffinity": {"enabled": false}
  },
  {"clusterID": "old", "radosNamespace": "ns", "monitors": ["mon.ceph.svc:6789"]}
]
"""
BROUGHT_KEY, OWN_KEY = "AQD3hgtrNWVcARAA9pyAptqiXB8WuYkBlPCHSw==", "AQD9o0Fd6hQRChAAt7fMaSZXduT3NWEqylNpmg=="
BROUGHT = Access(secrets={"userID": "csi-user", "userKey": BROUGHT_KEY, "encryptionPassphrase": "chairs"})


class Clients(CephClients):
    """Tells the pools of each cluster; and who asked."""

    def __init__(self, pools: dict[str, str]) -> None:
        super().__init__(Workers(()), 1)
        self.pools = pools
        self.asked: list[tuple[str, Credentials]] = []

    def ask(
        self, cluster: Cluster, credentials: Credentials, what: str, function: Any, *args: Any, **limit: Any
    ) -> Any:
        assert (function, args, limit) == (librados.pools, (), {})
        self.asked.append((cluster.id, credentials))
        if cluster.id not in self.pools:
            raise DeadlineExceeded(f"the cluster {cluster.id} did not answer")
        return self.pools[cluster.id].splitlines()


def clusters(tmp_path: Path, content: str = DOCUMENT) -> Clusters:
    path = tmp_path / "config.json"
    path.write_text(content)
    return Clusters(path)


def test_the_configuration_of_ceph_csi_is_read_with_what_others_have_in_it(tmp_path: Path) -> None:
    first, old = clusters(tmp_path).all()
    assert first.id == "b9127830-b0cc-4e34-aa47-9d1a2e9949a8"
    assert first.monitors == ("192.168.39.231:6789", "[v2:10.0.0.1:3300,v1:10.0.0.1:6789]")
    assert (first.namespace, old.namespace) == ("tenants", "ns")
    assert first.place("rbd").spec == "rbd/tenants"


def test_a_change_of_the_configuration_is_seen_at_once(tmp_path: Path) -> None:
    found = clusters(tmp_path)
    assert found.named("old").monitors == ("mon.ceph.svc:6789",)
    clusters(tmp_path, '[{"clusterID": "old", "monitors": ["10.0.0.9"]}]')
    assert found.named("old").monitors == ("10.0.0.9",)
    with pytest.raises(FailedPrecondition, match=r"'new' is not configured; .* has 'old': add it there, or correct"):
        found.named("new")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{}", "must be a list of clusters"),
        ("[{", "cannot be understood"),
        ('[{"monitors": ["a"]}]', "clusterID"),
        ('[{"clusterID": "a", "monitors": []}]', "needs a clusterID and the addresses"),
        ('[{"clusterID": "a", "monitors": ["-c /etc/shadow"]}]', "needs a clusterID and the addresses"),
        ('[{"clusterID": "a", "monitors": ["a"], "rbd": {"radosNamespace": "-x/y"}}]', "radosNamespace"),
        ('[{"clusterID": "a", "monitors": ["a"], "rbd": {"netNamespaceFilePath": "/x"}}]', "host's network only"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(tmp_path: Path, content: str, text: str) -> None:
    with pytest.raises(FailedPrecondition, match=text):
        clusters(tmp_path, content).all()


def test_a_configuration_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"--ceph-config"):
        Clusters(tmp_path / "none").all()


def test_an_id_tells_the_place_and_is_one_wherever_it_goes() -> None:
    place = Place(Cluster("one", ("a",)), "rbd")
    for name in ("pvc-8a710f4c-9348-11e9-b396-005056af3de0", "a", "A b", "x" * 128, "x-" + "0" * 64, "a.b"):
        volume_id = place.id_for(name)
        assert is_volume_id(volume_id)
        assert digest_of(volume_id) == place.digest
        assert len(image_name(volume_id)) < 80
    assert place.id_for("pvc-1") == f"pvc-1.{place.digest}"
    others = {
        Place(Cluster("two", ("a",)), "rbd"),
        Place(Cluster("one", ("a",)), "rbd2"),
        Place(Cluster("one", ("a",), "ns"), "rbd"),
    }
    assert len({place.digest, *(other.digest for other in others)}) == 4
    assert Place(Cluster("one", ("b",)), "rbd").digest == place.digest
    for none in ("pvc-1", "pvc-1.", ".0123456789", "a.012345678g", "a.0123456789a"):
        assert digest_of(none) is None


@pytest.mark.parametrize("pool", ["", "-x", "a/b", "a@b", "a b", "ä"])
def test_a_pool_that_could_be_taken_for_something_else_is_refused(pool: str) -> None:
    with pytest.raises(InvalidArgument, match=r"must be the name of a Ceph pool"):
        Cluster("one", ("a",)).place(pool)


def test_a_class_that_does_not_say_where_is_told_what_it_lacks(tmp_path: Path) -> None:
    access = CephAccess(clusters(tmp_path), Clients({}), ())
    with pytest.raises(InvalidArgument, match=r"the parameter clusterID is missing"):
        access.place_of(VolumeParameters(pool="rbd"))
    with pytest.raises(InvalidArgument, match=r"the parameter pool is missing"):
        access.place_of(VolumeParameters(cluster_id="old"))
    assert access.place_of(VolumeParameters(cluster_id="old", pool="rbd")).spec == "rbd/ns"


def test_a_volume_is_found_by_its_id_in_whichever_cluster_answers(tmp_path: Path) -> None:
    clients = Clients({"old": ".mgr\nrbd\nfast pool\n"})
    access = CephAccess(clusters(tmp_path), clients, ())
    volume_id = access.place_of(VolumeParameters(cluster_id="old", pool="rbd")).id_for("pvc-1")
    access.use(volume_id, BROUGHT)
    pool = access.pool(volume_id)
    assert (pool.place.cluster.id, pool.place.pool) == ("old", "rbd")
    asked = len(clients.asked)
    assert {credentials.user for _, credentials in clients.asked} == {"csi-user"}
    access.pool(volume_id)
    assert len(clients.asked) == asked
    with pytest.raises(NotFound):
        access.pool("pvc-1")
    access.use("pvc-1.0123456789", BROUGHT)
    with pytest.raises(DeadlineExceeded, match=r"did not answer"):  # it may be there: nobody knows
        access.pool("pvc-1.0123456789")
    clients.pools["b9127830-b0cc-4e34-aa47-9d1a2e9949a8"] = "rbd\n"
    with pytest.raises(FailedPrecondition, match=r"none of the configured Ceph clusters"):
        access.pool("pvc-1.0123456789")


def test_what_a_call_brought_is_used_until_it_is_forgotten_and_shown_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "secret"
    folder.mkdir()
    clients = Clients({"old": "rbd\n", "b9127830-b0cc-4e34-aa47-9d1a2e9949a8": ""})
    access = CephAccess(clusters(tmp_path), clients, [folder])
    volume_id = access.place_of(VolumeParameters(cluster_id="old", pool="rbd")).id_for("pvc-1")
    with pytest.raises(
        FailedPrecondition, match=r"name a secret .* in its class, or mount one for the server with --ceph-s"
    ):
        access.pool(volume_id)
    assert not access.knows(volume_id)
    access.use(volume_id, BROUGHT)
    assert access.knows(volume_id)
    access.pool(volume_id)
    assert BROUGHT_KEY not in repr(clients.asked)
    (folder / "userID").write_text("server\n")
    (folder / "userKey").write_text(f"{OWN_KEY}\n")
    access.use(volume_id, Access())  # a call that brings nothing takes nothing away
    access.forget(volume_id)
    clients.asked.clear()
    list(access.every_pool())
    assert {(each.user, each.key) for _, each in clients.asked} == {("server", OWN_KEY)}


@pytest.mark.parametrize(
    "key",
    [
        "AgAAAAAAAAAAABAAAAECAwQFBgcICQoLDA0ODw==",
        "AQ" + "A" * 38,
        "AQD9o0Fd6hQRChAAt7fMaSZXduT3NWEqylNpmg",
        "precious",
        "ä",
    ],
)
def test_what_is_no_key_of_ceph_never_reaches_its_libraries(tmp_path: Path, key: str) -> None:
    clients = Clients({"old": "rbd\n"})
    access = CephAccess(clusters(tmp_path), clients, [tmp_path])
    with pytest.raises(FailedPrecondition, match=r"has a userKey that is no key of Ceph") as refused:
        access.use("pvc-1.0123456789", Access(secrets={"userID": "a", "userKey": key}))
    assert key not in str(refused.value)
    (tmp_path / "userID").write_text("a")
    (tmp_path / "userKey").write_text(key)
    with pytest.raises(FailedPrecondition, match=r"that is no key of Ceph"):
        access.pool("pvc-1.0123456789")
    assert not clients.asked


@pytest.mark.parametrize("user", ["a b", "a,secret=b", "a=b", "a\n", "ä\x7f"])
def test_a_user_that_the_kernel_would_read_as_options_is_refused(tmp_path: Path, user: str) -> None:
    access = CephAccess(clusters(tmp_path), Clients({}), ())
    with pytest.raises(FailedPrecondition, match=r"a userID that is no user of Ceph"):
        access.use("pvc-1.0123456789", Access(secrets={"userID": user, "userKey": OWN_KEY}))


@pytest.mark.parametrize("secrets", [{"userID": "a"}, {"userKey": "b"}])
def test_half_a_user_is_refused(tmp_path: Path, secrets: dict[str, str]) -> None:
    access = CephAccess(clusters(tmp_path), Clients({}), ())
    with pytest.raises(FailedPrecondition) as refused:
        access.use("pvc-1.0123456789", Access(secrets=secrets))
    assert "pvc-1.0123456789" in str(refused.value)
    assert not any(value in str(refused.value).split() for value in secrets.values() if value != "a")


def test_the_document_is_what_it_says() -> None:
    assert len(json.loads(DOCUMENT)) == 2
