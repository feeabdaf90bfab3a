"""An agent's look at one copy: what is on the disk, and what it says of it."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from csi_driver.agent.agent import Agent
from csi_driver.agent.settings import AgentSettings
from csi_driver.agent.uploads import Uploads
from csi_driver.agent.work import Doing, Download, Failed, Made, Request
from csi_driver.images.library import ImageLibrary
from csi_driver.images.requests import Import
from csi_driver.kube.client import Kube
from csi_driver.kube.copies import copy_of
from csi_driver.kube.kinds import IMAGE, IMAGE_COPY, Json, name_of
from tests.image_clones import sha256
from tests.machine.image_lab import unmetered
from tests.operator_fakes import NOW, SilentApi


class Node:
    """A node that is to have a copy of an Image; its agent looks when it is told to."""

    def __init__(
        self, folder: Path, status: Json | None = None, maker: dict[str, Any] | None = None, **spec: object
    ) -> None:
        self.api = SilentApi()
        self.settings = AgentSettings(
            node="one", state_dir=folder, address="", listen=("", 0), tls_dir=folder, token_file=folder / "token",
            account="",
        )  # fmt: skip
        self.library = ImageLibrary(self.settings.images)
        self.uploads = Uploads(self.settings.images / "uploads")
        metadata = {"name": "disk", "uid": "uid-disk"}
        image = {"metadata": metadata, "spec": {"source": {"upload": {}}, **spec}, "status": status or {}}
        self.copy = self.api.put(IMAGE_COPY, copy_of(self.api.put(IMAGE, image), "one", make=True, **maker or {}))
        self.start()

    def start(self) -> None:
        """The agent begins, and sees what there is now."""
        self._agent = Agent(cast("Kube", self.api), self.settings, self.library, self.uploads)
        for informer in (self._agent.images, self._agent.copies):
            self.api.inform(informer)

    def see(self) -> None:
        """What changed in the API, at once."""
        for informer in (self._agent.images, self._agent.copies):
            for thing in self.api.all(informer.kind):
                informer.saw(thing)

    def forget(self) -> None:
        """A look at a copy that goes."""
        self._agent.reconcile(name_of(self.copy))

    def look(self, image: str = "disk") -> Json:
        """The status of an image's copy after a look."""
        (key,) = (name_of(copy) for copy in self.api.all(IMAGE_COPY) if copy["spec"]["image"] == image)
        self._agent.reconcile(key)
        found = self.api.get(IMAGE_COPY, key)
        assert found is not None
        status: Json = found["status"]
        return status


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Any]:
    made: list[Node] = []

    def make(status: Json | None = None, maker: dict[str, Any] | None = None, **spec: object) -> Node:
        made.append(Node(tmp_path, status, maker, **spec))
        return made[-1]

    yield make
    for node in made:
        node.api.end()


def put(node: Node, folder: Path, owner: str | None) -> None:
    (folder / "source").write_bytes(bytes(range(256)) * 16)
    node.library.import_(Import("disk", str(folder / "source"), owner=owner), unmetered)


@pytest.mark.parametrize(
    ("owner", "whose", "option"),
    [(None, "that was made by hand", ""), ("uid-earlier", "of an earlier Image", " --owned")],
)
def test_a_name_that_is_taken_is_told_with_what_helps_and_gone_on_with_when_it_is_free(
    nodes: Any, tmp_path: Path, owner: str | None, whose: str, option: str
) -> None:
    node = nodes()
    put(node, tmp_path, owner)
    status = node.look()
    assert (status["state"], status["elsewhere"], status["permanent"]) == ("Failed", True, False)
    assert f"this node has an image disk {whose} already that is not this Image's" in status["message"]
    assert f"luks-csi image delete disk{option}, or give" in status["message"]
    node.library.delete("disk", owned=bool(option))
    assert nodes().look()["state"] == "AwaitingUpload"  # that one does not wait a moment, as after a failure


def test_a_copy_whose_record_cannot_be_read_is_not_ready_and_is_not_let_go_with_its_file(
    nodes: Any, tmp_path: Path
) -> None:
    node = nodes()
    put(node, tmp_path, "uid-disk")
    key, record = name_of(node.copy), node.library.file("disk").with_name("record.json")
    node.api.change(IMAGE_COPY, key, {"status": {"state": "Ready", "message": "", "image": {"checksum": "00"}}})
    node.see()
    whole = record.read_bytes()
    record.write_bytes(b"{")
    status = node.look()
    assert (status["state"], status.get("elsewhere"), status["attempts"]) == ("Failed", None, 1)
    assert "record.json cannot be read" in status["message"]
    assert "or remove the image with luks-csi image delete disk" in status["message"]
    node.see()
    assert node.look()["attempts"] == 1  # its own word of it is no new attempt
    record.write_bytes(whole)
    assert node.look()["state"] == "Ready"
    record.write_bytes(b"{")
    node.api.change(IMAGE_COPY, key, {"metadata": {"deletionTimestamp": NOW}})
    node.see()
    assert node.look()["message"].startswith("not removed yet: the image record ")
    node.library.delete("disk")
    node.forget()
    assert node.api.get(IMAGE_COPY, key) is None


def test_a_copy_that_was_given_up_is_pulled_when_what_was_in_the_way_is_gone(nodes: Any, tmp_path: Path) -> None:
    node = nodes(retries=0)
    put(node, tmp_path, "uid-disk")
    status = {"status": {"state": "Ready", "message": "", "image": {"checksum": "00"}}}
    node.api.change(IMAGE_COPY, name_of(node.copy), status)
    node.library.file("disk").with_name("record.json").write_bytes(b"{")
    node.start()
    assert node.look()["permanent"] is True
    node.library.delete("disk")
    node.start()
    assert node.look()["message"].startswith("no other node has image disk now; it is pulled when one does")


@pytest.mark.parametrize("more", [{}, {"volume": "pvc-1"}, {"secret": {"name": "key", "namespace": "n"}}])
def test_the_file_of_a_copy_that_stays_stays_when_its_maker_goes(
    nodes: Any, tmp_path: Path, more: dict[str, Any]
) -> None:
    node = nodes(maker=more)
    put(node, tmp_path, "uid-disk")
    node.api.put(IMAGE_COPY, copy_of(node.api.get(IMAGE, "disk"), "one"))
    node.api.change(IMAGE_COPY, name_of(node.copy), {"metadata": {"deletionTimestamp": NOW}})
    node.start()
    node.forget()
    assert node.api.get(IMAGE_COPY, name_of(node.copy)) is None
    assert node.library.names() == ["disk"]


def test_a_name_that_is_taken_is_one_attempt_for_each_pause(nodes: Any, tmp_path: Path) -> None:
    node = nodes()
    put(node, tmp_path, None)
    for _ in range(3):
        assert node.look()["attempts"] == 1
        node.see()


def test_given_up_is_given_up_wherever_it_was_tried(nodes: Any, tmp_path: Path) -> None:
    tried = {"tried": [{"node": "two", "attempts": 4, "permanent": False, "message": "full"}]}
    for retries, permanent in ((5, False), (4, True)):
        node = nodes(status=tried, retries=retries)
        if not permanent:
            put(node, tmp_path, None)
        status = node.look()
        assert status["permanent"] is permanent
        # What was given up is not moved on to yet another node.
        assert status.get("elsewhere") == (None if permanent else True)
        assert ("given up after 5 attempts" in status["message"]) is permanent


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The jobs that were begun, in place of their processes; `result` ends one."""
    begun: list[Any] = []

    class Begun:
        def __init__(self, request: Request, *_: object) -> None:
            self.request, self.result, self.doing = request, None, Doing("checking", 0, None)
            self.downloads, self.bytes_per_second = isinstance(request.work, Download), 0
            begun.append(self)

    monkeypatch.setattr("csi_driver.agent.agent.Job", Begun)
    return begun


def test_another_file_than_the_image_has_is_pulled_once_it_is_removed_and_never_made_anew(
    nodes: Any, jobs: list[Any], tmp_path: Path
) -> None:
    """Of the node that was to make it too: made anew from its source it would be another file again."""
    node = nodes({"phase": "Ready", "checksum": "ab" * 32, "virtualSize": 4096})
    put(node, tmp_path, "uid-disk")
    node.look()
    jobs[0].result = Made(node.library.get("disk"), "cd" * 32)
    status = node.look()
    assert (status["state"], status["permanent"]) == ("Failed", True)
    assert (
        "remove it there with luks-csi image delete disk --owned, it is pulled from another node" in status["message"]
    )
    node.library.delete("disk", owned=True)
    node.start()  # it does not wait a moment, as after a failure
    status = node.look()
    assert (status["state"], status.get("permanent")) == ("Failed", False)
    assert "no other node has image disk" in status["message"]


def test_what_was_announced_of_an_upload_is_what_it_must_be(nodes: Any, jobs: list[Any]) -> None:
    for number, (spec, expected) in enumerate((({}, str(sha256(b"disk"))), ({"checksum": "00" * 32}, "00" * 32))):
        node = nodes(**spec)
        node.uploads.receive("disk", "uid-disk", 0, 4, 4, io.BytesIO(b"disk"), announced=sha256(b"disk"))
        assert node.look()["state"] == "InProgress"
        assert jobs[number].request.work.checksum == expected


def test_a_limit_that_is_no_size_fails_for_good(nodes: Any) -> None:
    status = nodes(limit=9223372036854775807).look()
    assert (status["state"], status["permanent"]) == ("Failed", True)
    assert status["message"].startswith("spec.limit of the Image, 9223372036854775807, is no size")


TOO_LARGE = "image disk: its virtual size is 9 bytes and at most 4 are allowed; raise the limit if the image is meant"
WORDS = "; what an Image is made of does not change: delete it and make it anew"


def test_a_failure_for_good_lasts_until_the_image_changes(nodes: Any, jobs: list[Any]) -> None:
    node = nodes(limit="4")
    node.api.change(IMAGE, "disk", {"metadata": {"generation": 1}})
    node.see()
    node.uploads.receive("disk", "uid-disk", 0, 4, 4, io.BytesIO(b"disk"))
    node.look()
    jobs[0].result = Failed(TOO_LARGE, permanent=True)
    status = node.look()
    assert (status["permanent"], status["observedGeneration"]) == (True, 1)
    assert status["message"] == TOO_LARGE.replace("raise the limit", "raise spec.limit of the Image")
    node.see()
    assert node.look()["state"] == "Failed"
    assert len(jobs) == 1
    node.api.change(IMAGE, "disk", {"metadata": {"generation": 2}, "spec": {"limit": "1Gi"}})
    node.see()
    status = node.look()  # at once, whatever the pause between two tries
    assert status["state"] == "InProgress"
    assert status.keys().isdisjoint(("permanent", "observedGeneration"))
    assert jobs[1].request.work.limit == 1 << 30


def test_a_failure_for_good_of_an_upload_says_that_an_image_does_not_change(nodes: Any, jobs: list[Any]) -> None:
    node = nodes()
    node.uploads.receive("disk", "uid-disk", 0, 4, 4, io.BytesIO(b"disk"))
    node.look()
    jobs[0].result = Failed("image disk is no disk", permanent=True)
    assert node.look()["message"] == f"image disk is no disk{WORDS}"


def test_downloads_that_do_not_end_keep_no_other_image_waiting(nodes: Any, jobs: list[Any]) -> None:
    node = nodes()
    for name in ("a", "b", "c"):
        metadata = {"name": name, "uid": f"uid-{name}"}
        image = {"metadata": metadata, "spec": {"source": {"download": {"url": "https://drips/"}}}, "status": {}}
        node.api.put(IMAGE_COPY, copy_of(node.api.put(IMAGE, image), "one", make=True))
    node.start()
    node.uploads.receive("disk", "uid-disk", 0, 4, 4, io.BytesIO(b"disk"))
    states = {name: node.look(name)["state"] for name in ("a", "b", "c", "disk")}
    assert states == {"a": "InProgress", "b": "InProgress", "c": "Pending", "disk": "InProgress"}
    jobs[0].result = Failed("the server is away")
    node.look("a")
    assert node.look("c")["state"] == "InProgress"
