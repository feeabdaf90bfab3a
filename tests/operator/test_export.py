"""A claim's content as an Image: an encrypted volume stays encrypted, on every node, and waits until nobody uses it."""

import base64
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.host import ofdlock
from csi_driver.kube.kinds import CLAIM, VOLUME, Kind, uid_of
from csi_driver.kube.kinds import SECRET as SECRET_KIND
from tests.image_clones import make_source
from tests.keys.apiserver import NAMESPACE
from tests.operator.lab import DRIVER, Lab
from tests.unit.test_volume_from_image import SEALED, Rig, identity
from tests.volume_images import SECRET, encrypted_image, put_image

_CLAIM, _VOLUME, _NAMESPACE = "exported", "pvc-exported", "default"
_SIZE = 2 << 20


@pytest.fixture
def volume(lab: Lab, tmp_path: Path) -> Iterator[Rig]:
    """A closed, encrypted volume of node one, with its claim and its secret."""
    lab.secret("vm-key", SECRET["CRYPTO_KEY_VALUE"])
    state = lab.folder / "one"
    put_image(state, "sealed", encrypted_image(make_source(tmp_path / "source", _SIZE), tmp_path / "sealed"))
    rig = Rig(state)
    rig.create(SEALED, _VOLUME)
    rig.delete_image("sealed")
    resources = {"resources": {"requests": {"storage": "4Mi"}}, "accessModes": ["ReadWriteOnce"]}
    claim = {"metadata": {"name": _CLAIM}, "spec": {"volumeName": _VOLUME, **resources}}
    owner = {"name": _CLAIM, "namespace": _NAMESPACE, "uid": uid_of(lab.kube.create(CLAIM, claim, _NAMESPACE))}
    node = {"key": f"topology.{DRIVER}/node", "operator": "In", "values": ["one"]}
    spec = {
        "capacity": {"storage": "4Mi"},
        "accessModes": ["ReadWriteOnce"],
        "claimRef": owner,
        "csi": {
            "driver": DRIVER,
            "volumeHandle": _VOLUME,
            "volumeAttributes": {"encrypted": "true"},
            "nodeStageSecretRef": {"name": "vm-key", "namespace": NAMESPACE},
        },
        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [node]}]}},
    }
    lab.kube.create(VOLUME, {"metadata": {"name": _VOLUME}, "spec": spec})
    yield rig
    for kind, name, namespace in ((CLAIM, _CLAIM, _NAMESPACE), (VOLUME, _VOLUME, "")):
        _remove(lab, kind, name, namespace)
    rig.backend.delete(_VOLUME)
    lab.kube.delete(SECRET_KIND, "vm-key", NAMESPACE)


def test_an_encrypted_claim_becomes_an_image_when_it_is_closed_and_travels_as_it_is(lab: Lab, volume: Rig) -> None:
    disk = volume.disk(_VOLUME)
    used = os.open(disk, os.O_RDWR)
    try:
        assert ofdlock.try_lock(used)  # as the loop device of a staged volume
        lab.image("of-claim", {"claim": {"name": _CLAIM, "namespace": _NAMESPACE}}, copies=2)
        lab.wait_phase("of-claim", "Failed", f"volume {_VOLUME} is in use and only a closed one becomes an image")
        assert not lab.file("one", "of-claim").exists()
    finally:
        os.close(used)
    status = lab.wait_phase("of-claim")
    assert (status["encrypted"], status["format"], status["secret"]) == (True, "luks2", f"{NAMESPACE}/vm-key")
    assert status["luksUUID"] == identity(volume.backend.get(_VOLUME)).uuid
    assert sorted(lab.wait_copies("of-claim", 2)) == ["one", "two"]
    for node in ("one", "two"):
        assert lab.file(node, "of-claim").read_bytes() == disk.read_bytes()
    lab.delete_image("of-claim")
    assert disk.exists()


def test_a_secret_that_does_not_open_it_is_told_and_can_be_put_right(lab: Lab, volume: Rig) -> None:
    lab.secret("not-its-own", "another one")
    source = {"claim": {"name": _CLAIM, "namespace": _NAMESPACE}}
    lab.image("of-claim", source, secretRef={"name": "not-its-own", "namespace": NAMESPACE})
    said = f"image of-claim; put the passphrase it was last given back into the secret {NAMESPACE}/not-its-own"
    lab.wait_phase("of-claim", "Failed", said)
    right = base64.b64encode(SECRET["CRYPTO_KEY_VALUE"].encode()).decode()
    lab.kube.patch(SECRET_KIND, "not-its-own", {"data": {"CRYPTO_KEY_VALUE": right}}, NAMESPACE)
    assert lab.wait_phase("of-claim")["secret"] == f"{NAMESPACE}/not-its-own"
    lab.delete_image("of-claim")
    lab.kube.delete(SECRET_KIND, "not-its-own", NAMESPACE)
    assert volume.disk(_VOLUME).exists()


def test_a_volume_that_becomes_another_claims_is_not_exported_any_more(lab: Lab, volume: Rig) -> None:
    used = os.open(volume.disk(_VOLUME), os.O_RDWR)
    try:
        assert ofdlock.try_lock(used)
        lab.image("of-claim", {"claim": {"name": _CLAIM, "namespace": _NAMESPACE}})
        lab.wait_phase("of-claim", "Failed", "only a closed one becomes an image")
        lab.kube.patch(VOLUME, _VOLUME, {"spec": {"claimRef": {"name": "next", "uid": "next"}}})
    finally:
        os.close(used)
    lab.wait_phase("of-claim", "Pending", f"names the PersistentVolume {_VOLUME}, which is not bound to it")
    assert not lab.file("one", "of-claim").exists()
    lab.delete_image("of-claim")


def test_a_claim_that_names_another_claims_volume_has_no_image_made_of_that(lab: Lab, volume: Rig) -> None:
    resources = {"resources": {"requests": {"storage": "4Mi"}}, "accessModes": ["ReadWriteOnce"]}
    lab.kube.create(CLAIM, {"metadata": {"name": "thief"}, "spec": {"volumeName": _VOLUME, **resources}}, NAMESPACE)
    lab.image("stolen", {"claim": {"name": "thief", "namespace": NAMESPACE}})
    said = f"the claim {NAMESPACE}/thief names the PersistentVolume {_VOLUME}, which is not bound to it"
    lab.wait_phase("stolen", "Pending", said)
    assert not lab.file("one", "stolen").exists()
    assert volume.disk(_VOLUME).exists()
    lab.delete_image("stolen")
    _remove(lab, CLAIM, "thief", NAMESPACE)


def _remove(lab: Lab, kind: Kind, name: str, namespace: str) -> None:
    """Nobody runs the controllers that let go of it."""
    lab.kube.patch(kind, name, {"metadata": {"finalizers": None}}, namespace)
    lab.kube.delete(kind, name, namespace)
