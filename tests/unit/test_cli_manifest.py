"""`luks-csi volume manifest`: the objects of a volume that Kubernetes does not know."""

import json
from typing import Any

import msgspec
import pytest
from click.testing import Result

from csi_driver.model.volume import FileSystemState, KeyTrail, VolumeParameters, VolumeRecord
from csi_driver.rpc.client import PluginInfo, RemoteVolume
from tests.unit.test_cli_volume import MIB, FakeClient, run

RECORD = VolumeRecord(
    id="data",
    name="data",
    capacity_bytes=256 * MIB,
    parameters=VolumeParameters(encrypted=True, claim="shop/db"),
    file_system=FileSystemState.MADE,
    made_fs_type="xfs",
    created="2026-11-20T00:00:00+00:00",
)
ON_CEPH = RemoteVolume("data.0123456789", 256 * MIB, {"encrypted": "true", "backend": "rbd"}, {})
USUAL = ("--class", "encrypted")


class Client(FakeClient):
    def plugin_info(self) -> PluginInfo:
        return PluginInfo("driver.x", "1")


@pytest.fixture
def client() -> Client:
    made = Client()
    made.record = RECORD
    return made


def printed(client: Client, *options: str) -> tuple[Any, Any]:
    """The PersistentVolume and the claim."""
    done = run(client, "manifest", client.there[0].id, *USUAL, *options)
    assert done.exit_code == 0, done.stderr
    volume, claim = json.loads(done.stdout)["items"]
    return volume, claim


def refused(client: Client, *options: str) -> str:
    done: Result = run(client, "manifest", client.there[0].id, *USUAL, *options)
    assert done.exit_code != 0
    assert done.stdout == ""
    return " ".join(done.stderr.split())


def test_a_volume_of_a_node_is_its_claims_and_stays_when_that_is_deleted(client: Client) -> None:
    volume, claim = printed(client, "--secret", "keys/db")
    assert volume["metadata"]["name"] == claim["spec"]["volumeName"] == "data"
    assert volume["metadata"]["annotations"] == {
        "pv.kubernetes.io/provisioned-by": "driver.x",
        "volume.kubernetes.io/provisioner-deletion-secret-name": "db",
        "volume.kubernetes.io/provisioner-deletion-secret-namespace": "keys",
    }
    spec = volume["spec"]
    assert spec["persistentVolumeReclaimPolicy"] == "Retain"
    assert spec["capacity"] == claim["spec"]["resources"]["requests"] == {"storage": str(256 * MIB)}
    assert (spec["claimRef"]["namespace"], spec["claimRef"]["name"]) == ("shop", "db")
    assert (claim["metadata"]["namespace"], claim["metadata"]["name"]) == ("shop", "db")
    for each in (spec, claim["spec"]):
        assert (each["accessModes"], each["volumeMode"]) == (["ReadWriteOnce"], "Filesystem")
        assert each["storageClassName"] == "encrypted"
    assert spec["csi"] == {
        "driver": "driver.x",
        "volumeHandle": "data",
        "fsType": "xfs",
        "volumeAttributes": {"encrypted": "true", "backend": "loopfile"},
        "nodeStageSecretRef": {"namespace": "keys", "name": "db"},
    }
    (term,) = spec["nodeAffinity"]["required"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": "topology.x/node", "operator": "In", "values": ["n1"]}]


def test_a_volume_of_ceph_is_for_all_nodes_and_takes_its_secret_to_each_call(client: Client) -> None:
    client.there = [ON_CEPH]
    client.record = msgspec.structs.replace(RECORD, file_system=FileSystemState.RAW, made_fs_type=None)
    volume, _ = printed(client, "--secret", "ceph/user", "--block", "--access-mode", "ReadWriteMany")
    assert "nodeAffinity" not in volume["spec"]
    assert (volume["metadata"]["name"], volume["spec"]["csi"]["volumeHandle"]) == ("data", "data.0123456789")
    assert volume["spec"]["volumeMode"] == "Block"
    csi = volume["spec"]["csi"]
    assert "fsType" not in csi
    references = {name: value for name, value in csi.items() if name.endswith("SecretRef")}
    assert set(references) == {"nodeStageSecretRef", "controllerPublishSecretRef", "controllerExpandSecretRef"}
    assert list(references.values()) == [{"namespace": "ceph", "name": "user"}] * 3


def test_the_claim_is_the_one_that_is_named_else_the_one_that_it_was_made_for(client: Client) -> None:
    given = ("--secret", "keys/db")
    volume, claim = printed(client, *given, "--claim", "other/name")
    assert (claim["metadata"]["namespace"], claim["metadata"]["name"]) == ("other", "name")
    assert (volume["spec"]["claimRef"]["namespace"], volume["spec"]["claimRef"]["name"]) == ("other", "name")
    client.record = msgspec.structs.replace(RECORD, parameters=VolumeParameters(encrypted=True))
    assert "name one by --claim" in refused(client, *given)


def test_where_a_kms_has_the_key_there_is_no_secret(client: Client) -> None:
    client.record = msgspec.structs.replace(RECORD, key=KeyTrail(kms_id="vault-1", type="vault"))
    volume, _ = printed(client)
    assert not [name for name in volume["spec"]["csi"] if name.endswith("SecretRef")]
    client.there = [ON_CEPH]
    assert "name the one with the user of Ceph by --secret" in refused(client)


def test_what_cannot_be_right_is_refused_and_prints_nothing(client: Client) -> None:
    assert "name the one with its passphrase by --secret" in refused(client)
    given = ("--secret", "keys/db")
    assert "holds a file system, xfs; leave --block out" in refused(client, *given, "--block")
    assert "cannot be ReadWriteMany" in refused(client, *given, "--access-mode", "ReadWriteMany")
    assert "must be NAMESPACE/NAME" in refused(client, "--secret", "db")
    client.there = [RemoteVolume("a..b", MIB, {"encrypted": "true", "backend": "loopfile"}, {})]
    client.record = msgspec.structs.replace(RECORD, id="a..b", name="a..b")
    assert "no object can be called a..b" in refused(client, *given)
    client.record = None
    assert "its record is told by the test" in refused(client, *given)
