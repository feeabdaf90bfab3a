"""What a pull needs of its node, and whom it believes."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from csi_driver.agent.access import Access
from csi_driver.agent.pulling import pull
from csi_driver.agent.rate import Rate
from csi_driver.agent.requests import Requests
from csi_driver.agent.server import CopyServer
from csi_driver.agent.settings import AgentSettings
from csi_driver.agent.uploads import Uploads
from csi_driver.agent.work import CloneWork, Export, Pull, Secret
from csi_driver.images.library import ImageLibrary
from csi_driver.images.requests import Import
from csi_driver.images.store import ImageRecord
from csi_driver.kube.client import Kube
from csi_driver.kube.copies import copy_of
from csi_driver.kube.kinds import CLAIM, IMAGE_COPY, SECRET, VOLUME, Json
from csi_driver.model.errors import FailedPrecondition, Unavailable
from tests.image_clones import sha256
from tests.machine.image_lab import unmetered
from tests.operator_fakes import NOW, SilentApi
from tests.unit.test_agent_server import mount

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


@contextlib.contextmanager
def peer(folder: Path, source: Path) -> Iterator[tuple[str, Path]]:
    """An agent that has the image: where it is asked, and its file."""
    library = ImageLibrary(folder / "images")
    library.import_(Import("disk", str(source), owner="uid"), unmetered)
    copy = copy_of({"metadata": {"name": "disk", "uid": "uid"}}, "there")
    copy["status"] = {"state": "Ready", "image": {"checksum": sha256(source.read_bytes()).digest}}
    access = cast("Access", SimpleNamespace(check_agent=lambda _token: None))
    uploads = Uploads(folder / "uploads")
    served = CopyServer(
        ("127.0.0.1", 0), source.parent, library, uploads, access, lambda: [copy], lambda _: None, Rate(0)
    )
    served.start()
    try:
        yield f"127.0.0.1:{served.port}", library.file("disk")
    finally:
        served.stop()


def test_a_copy_that_has_rotted_keeps_nobody_from_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi_driver.agent.pulling._WAIT_SECONDS", 0.0)
    mount(tmp_path)
    source, folder = tmp_path / "disk.raw", tmp_path / "pulled"
    source.write_bytes(bytes(range(256)) * 4096)
    digest = sha256(source.read_bytes()).digest
    folder.mkdir()
    with peer(tmp_path / "rotten", source) as (bad, file), peer(tmp_path / "good", source) as (good, _):
        with file.open("r+b") as rotten:
            rotten.seek(5000)
            rotten.write(b"rotten")

        def pulled(*peers: str) -> tuple[Path, ImageRecord]:
            return pull("disk", Pull(peers, str(tmp_path / "ca.crt"), "token", digest), folder, unmetered)

        with pytest.raises(Unavailable) as told:
            pulled(bad, "127.0.0.1:1", bad)
        wrong = f"{bad}: https://.*/v1/copies/disk/file has the checksum sha256:[0-9a-f]*, expected sha256:{digest}"
        away = "127.0.0.1:1: it offers no copy: .*refused"
        assert re.fullmatch(f"image disk could be pulled from no node: {wrong}; {away}; {wrong}", str(told.value))
        assert pulled(bad, good)[0].read_bytes() == source.read_bytes()


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
