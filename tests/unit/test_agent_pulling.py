"""What a pull needs of its node, and whom it believes."""

from pathlib import Path
from typing import cast

import pytest

from csi_driver.agent.pulling import pull
from csi_driver.agent.requests import Requests
from csi_driver.agent.settings import AgentSettings
from csi_driver.agent.uploads import Uploads
from csi_driver.agent.work import CloneWork, Export, Pull, Secret
from csi_driver.kube.client import Kube
from csi_driver.kube.copies import copy_of
from csi_driver.kube.kinds import CLAIM, IMAGE_COPY, SECRET, VOLUME, Json
from csi_driver.model.errors import FailedPrecondition, Unavailable
from tests.machine.image_lab import unmetered
from tests.operator_fakes import NOW, SilentApi

IMAGE: Json = {
    "metadata": {"name": "disk", "uid": "uid"},
    "spec": {"source": {"upload": {}}},
    "status": {"checksum": "00"},
}


@pytest.fixture
def settings(tmp_path: Path) -> AgentSettings:
    return AgentSettings(
        node="here", state_dir=tmp_path, address="", listen=("", 0), tls_dir=tmp_path, token_file=tmp_path / "token",
        account="",
    )  # fmt: skip


def test_before_there_are_certificates_it_is_tried_again(tmp_path: Path) -> None:
    """An error that counts as lasting would leave the node without a copy for good."""
    work = Pull(("127.0.0.1:1",), str(tmp_path / "ca.crt"), "token")
    with pytest.raises(Unavailable, match=r"nobody can be trusted yet: the certificates in .*ca\.crt cannot be used"):
        pull("disk", work, tmp_path, unmetered)


def test_a_clone_is_made_of_the_very_image_that_the_cluster_has(settings: AgentSettings) -> None:
    clone: Json = {"metadata": {"name": "clone", "uid": "c"}, "spec": {"source": {"clone": {"image": "disk"}}}}
    copy, images = copy_of(clone, "here", make=True), {"disk": IMAGE}
    uploads = Uploads(settings.images / "uploads")
    requests = Requests(cast("Kube", SilentApi()), settings, uploads, images.__getitem__)
    gone = Requests(cast("Kube", SilentApi()), settings, uploads, lambda _: None)
    with pytest.raises(FailedPrecondition, match="there is no image disk any more, of which this one is to be made"):
        gone.of(copy, clone, there=False)
    found = requests.of(copy, clone, there=False)
    assert found is not None
    assert found.work == CloneWork("disk", IMAGE["metadata"]["uid"], "ignore", None, None, None)


def test_a_volume_that_has_become_another_claims_is_not_exported(settings: AgentSettings) -> None:
    image: Json = {
        "metadata": {"name": "i", "uid": "i"},
        "spec": {"source": {"claim": {"name": "c", "namespace": "n"}}},
    }
    own = {"name": "key", "namespace": "n"}
    copy = copy_of(image, "here", make=True, volume="v", secret=own)
    api = SilentApi()
    requests = Requests(cast("Kube", api), settings, Uploads(settings.images / "uploads"), lambda _: None)
    with pytest.raises(FailedPrecondition, match="volume v is not exported: there is no claim n/c"):
        requests.of(copy, image, there=False)
    claim = {"metadata": {"name": "c", "uid": "of-c"}, "spec": {"volumeName": "pv"}}
    owner = {"namespace": "n", "name": "c", "uid": "of-c"}
    api.put(CLAIM, claim, "n")
    api.put(VOLUME, {"metadata": {"name": "pv"}, "spec": {"csi": {"volumeHandle": "v"}, "claimRef": owner}})
    with pytest.raises(FailedPrecondition, match="there is no secret n/key; make it"):
        requests.of(copy, image, there=False)
    api.put(SECRET, {"metadata": {"name": "key"}, "data": {"CRYPTO_KEY_VALUE": "eA=="}}, "n")
    found = requests.of(copy, image, there=False)
    assert found is not None
    assert isinstance(found.work, Export)
    assert (found.secret, found.opens) == ("n/key", Secret("n/key", {"CRYPTO_KEY_VALUE": "x"}))
    api.change(VOLUME, "pv", {"spec": {"claimRef": {"uid": "another"}}})
    with pytest.raises(FailedPrecondition, match="names the PersistentVolume pv, which is not bound to it"):
        requests.of(copy, image, there=False)
    api.change(VOLUME, "pv", {"spec": {"claimRef": owner, "csi": {"volumeHandle": "w"}}})
    with pytest.raises(FailedPrecondition, match="its claim has another volume now"):
        requests.of(copy, image, there=False)


def test_who_is_asked_is_who_keeps_it_and_a_token_that_cannot_be_read_is_told(settings: AgentSettings) -> None:
    api = SilentApi()
    requests = Requests(cast("Kube", api), settings, Uploads(settings.images / "uploads"), lambda _: None)
    own = copy_of(IMAGE, "here")
    for node in ("stays", "goes"):
        made = copy_of(IMAGE, node) | {"status": {"state": "Ready", "address": f"{node}:1"}}
        made["metadata"] = {**made["metadata"], **({"deletionTimestamp": NOW} if node == "goes" else {})}
        api.put(IMAGE_COPY, made)
    with pytest.raises(FailedPrecondition, match=r"token by which agents know each other cannot be read .*ENOENT"):
        requests.of(own, IMAGE, there=False)
    settings.token_file.write_bytes(b"\xff")
    with pytest.raises(FailedPrecondition, match="it is no text"):
        requests.of(own, IMAGE, there=False)
    settings.token_file.write_text("token\n")
    found = requests.of(own, IMAGE, there=False)
    assert found is not None
    assert found.work == Pull(("stays:1",), str(settings.tls_dir / "ca.crt"), "token", "00")
