"""A claim's content as an Image: an encrypted volume stays encrypted, on every node, and waits until nobody uses it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.host import ofdlock
from csi_driver.kube.kinds import CLAIM, VOLUME
from tests.image_clones import make_source
from tests.operator.lab import DRIVER, Lab
from tests.unit.test_volume_from_image import SEALED, Rig, identity
from tests.volume_images import encrypted_image, put_image

_CLAIM, _VOLUME, _NAMESPACE = "exported", "pvc-exported", "default"
_SIZE = 2 << 20


@pytest.fixture
def volume(lab: Lab, tmp_path: Path) -> Iterator[Rig]:
    """A closed, encrypted volume of node one, with its claim."""
    state = lab.folder / "one"
    put_image(state, "sealed", encrypted_image(make_source(tmp_path / "source", _SIZE), tmp_path / "sealed"))
    rig = Rig(state)
    rig.create(SEALED, _VOLUME)
    rig.delete_image("sealed")
    resources = {"resources": {"requests": {"storage": "4Mi"}}, "accessModes": ["ReadWriteOnce"]}
    claim = {"metadata": {"name": _CLAIM}, "spec": {"volumeName": _VOLUME, **resources}}
    lab.kube.create(CLAIM, claim, _NAMESPACE)
    node = {"key": f"topology.{DRIVER}/node", "operator": "In", "values": ["one"]}
    spec = {
        "capacity": {"storage": "4Mi"},
        "accessModes": ["ReadWriteOnce"],
        "csi": {"driver": DRIVER, "volumeHandle": _VOLUME},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [node]}]}},
    }
    lab.kube.create(VOLUME, {"metadata": {"name": _VOLUME}, "spec": spec})
    yield rig
    lab.kube.delete(CLAIM, _CLAIM, _NAMESPACE)
    lab.kube.delete(VOLUME, _VOLUME)
    rig.backend.delete(_VOLUME)


def test_an_encrypted_claim_becomes_an_image_when_it_is_closed_and_travels_as_it_is(lab: Lab, volume: Rig) -> None:
    disk = volume.disk(_VOLUME)
    used = os.open(disk, os.O_RDWR)
    try:
        assert ofdlock.try_lock(used)  # as the loop device of a staged volume
        secret = {"name": "vm-key", "namespace": "images"}
        lab.image("of-claim", {"claim": {"name": _CLAIM, "namespace": _NAMESPACE}}, secretRef=secret, copies=2)
        lab.wait_phase("of-claim", "Failed", f"volume {_VOLUME} is in use and only a closed one becomes an image")
        assert not lab.file("one", "of-claim").exists()
    finally:
        os.close(used)
    status = lab.wait_phase("of-claim")
    assert (status["encrypted"], status["format"], status["secret"]) == (True, "luks2", "images/vm-key")
    assert status["luksUUID"] == identity(volume.backend.get(_VOLUME)).uuid
    assert sorted(lab.wait_copies("of-claim", 2)) == ["one", "two"]
    for node in ("one", "two"):
        assert lab.file(node, "of-claim").read_bytes() == disk.read_bytes()
    lab.delete_image("of-claim")
    assert disk.exists()
