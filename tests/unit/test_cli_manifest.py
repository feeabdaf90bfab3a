"""`luks-csi volume manifest`: the objects of a volume that Kubernetes does not know."""

import dataclasses
import json
import re
from typing import Any

import msgspec
import pytest
from click.testing import Result

from csi_driver.model.volume import FileSystemState, KeyTrail, Move, MovePhase, VolumeParameters, VolumeRecord
from csi_driver.rpc.client import PluginInfo, RemoteVolume
from tests.unit.test_cli_volume import DATA, MIB, FakeClient, run

RECORD = VolumeRecord(
    id="data",
    name="data",
    capacity_bytes=256 * MIB,
    parameters=VolumeParameters(encrypted=True, claim="shop/db"),
    file_system=FileSystemState.MADE,
    made_fs_type="xfs",
    created="2026-11-20T00:00:00+00:00",
)
ON_CEPH = RemoteVolume("data.0123456789", 256 * MIB, {"encrypted": "true", "backend": "rbd"})
USUAL = ("--class", "encrypted")
GIVEN = ("--secret", "keys/db")


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
    volume, claim = printed(client, *GIVEN)
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
    volume, claim = printed(client, *GIVEN, "--claim", "other/name")
    assert (claim["metadata"]["namespace"], claim["metadata"]["name"]) == ("other", "name")
    assert (volume["spec"]["claimRef"]["namespace"], volume["spec"]["claimRef"]["name"]) == ("other", "name")
    client.record = msgspec.structs.replace(RECORD, parameters=VolumeParameters(encrypted=True))
    assert "name one by --claim" in refused(client, *GIVEN)


def test_where_a_kms_has_the_key_there_need_be_no_secret_and_that_is_said(client: Client) -> None:
    client.record = msgspec.structs.replace(RECORD, key=KeyTrail(kms_id="vault-1", type="vault"))
    done = run(client, "manifest", "data", *USUAL)
    csi = json.loads(done.stdout)["items"][0]["spec"]["csi"]
    assert not [name for name in csi if name.endswith("SecretRef")]
    assert "comes from the KMS vault-1 (vault); where its entry takes something from the secret" in done.stderr
    client.record = msgspec.structs.replace(RECORD, key=KeyTrail(kms_id="generateKey", type="kubernetes-secret"))
    assert run(client, "manifest", "data", *USUAL).stderr == ""
    client.there = [ON_CEPH]
    assert "name the secret with it by --secret" in refused(client)


def test_that_a_node_still_has_a_volume_is_said(client: Client) -> None:
    client.there = [dataclasses.replace(ON_CEPH, published=("n1",))]
    done = run(client, "manifest", client.there[0].id, *USUAL, *GIVEN)
    assert json.loads(done.stdout)["kind"] == "List"
    assert (
        "is given to node n1; if no VolumeAttachment says so, take it back by 'luks-csi volume detach'" in done.stderr
    )


def test_each_place_that_can_have_a_volume_is_named(client: Client) -> None:
    client.there = [RemoteVolume("data", MIB, DATA.context, ({"zone": "a"}, {"zone": "b"}))]
    volume, _ = printed(client, *GIVEN)
    terms = volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"]
    assert [term["matchExpressions"][0]["values"] for term in terms] == [["a"], ["b"]]


def test_mount_options_are_those_that_are_told(client: Client) -> None:
    options = ("--mount-option", "nosuid", "--mount-option", "noatime")
    assert printed(client, *GIVEN, *options)[0]["spec"]["mountOptions"] == ["nosuid", "noatime"]
    assert "loud" in refused(client, *GIVEN, "--mount-option", "loud")


def test_how_a_volume_was_used_is_asked_where_its_record_does_not_tell(client: Client) -> None:
    client.record = msgspec.structs.replace(RECORD, file_system=FileSystemState.NONE, made_fs_type=None)
    assert "say --block or --filesystem" in refused(client, *GIVEN)
    client.record = msgspec.structs.replace(RECORD, file_system=FileSystemState.RAW, made_fs_type=None)
    assert "say --block or --filesystem" in refused(client, *GIVEN)
    client.there = [ON_CEPH]
    assert "say --access-mode" in refused(client, *GIVEN, "--block")
    client.there = [DATA]
    for option, mode in (("--block", "Block"), ("--filesystem", "Filesystem")):
        volume, claim = printed(client, *GIVEN, option)
        assert volume["spec"]["volumeMode"] == claim["spec"]["volumeMode"] == mode
    assert "leave --mount-option out" in refused(client, *GIVEN, "--block", "--mount-option", "noatime")
    client.record = RECORD
    assert "holds a file system, xfs; leave --block out" in refused(client, *GIVEN, "--block")


def test_that_a_volume_is_not_encrypted_nobody_takes_from_its_record_alone(client: Client) -> None:
    """By what is printed a node tells whether the record is the volume's own."""
    client.there = [RemoteVolume("data", MIB, {"encrypted": "false", "backend": "loopfile"})]
    client.record = msgspec.structs.replace(RECORD, parameters=VolumeParameters(claim="shop/db"))
    assert "if that is right, say --plain" in refused(client)
    assert printed(client, "--plain")[0]["spec"]["csi"]["volumeAttributes"]["encrypted"] == "false"
    assert "no secret opens it" in refused(client, "--plain", *GIVEN)
    client.record = RECORD
    assert "restore the one that it had" in refused(client, "--plain")
    client.there = [DATA]
    assert "is encrypted; leave --plain out" in refused(client, "--plain", *GIVEN)


@pytest.mark.parametrize("phase", [MovePhase.LEFT, MovePhase.ARRIVING])
def test_a_volume_that_is_elsewhere_is_not_given_to_anybody(client: Client, phase: MovePhase) -> None:
    client.record = msgspec.structs.replace(RECORD, move=Move(phase=phase, id="m", other="/other", volume_id="data"))
    assert "/other" in refused(client, *GIVEN)


def test_what_cannot_be_right_is_refused_and_prints_nothing(client: Client) -> None:
    assert "is opened by a passphrase; name the secret with it by --secret" in refused(client)
    assert "cannot be ReadWriteMany" in refused(client, *GIVEN, "--access-mode", "ReadWriteMany")
    assert "must be NAMESPACE/NAME" in refused(client, "--secret", "db")
    client.record = None
    assert "its record is told by the test" in refused(client, *GIVEN)


def test_a_volume_whose_name_no_object_can_have_gets_another_one(client: Client) -> None:
    client.there = [RemoteVolume("a-", MIB, DATA.context)]
    client.record = msgspec.structs.replace(RECORD, id="a-", name="a-")
    volume, claim = printed(client, *GIVEN)
    assert re.fullmatch("x-[0-9a-f]{64}", claim["spec"]["volumeName"])
    assert (volume["metadata"]["name"], volume["spec"]["csi"]["volumeHandle"]) == (claim["spec"]["volumeName"], "a-")
