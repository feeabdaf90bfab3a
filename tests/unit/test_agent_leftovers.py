"""Files that a node has without an object: removed where their Image is gone, found again where it is not."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from csi_driver.agent.leftovers import Leftovers
from csi_driver.agent.settings import AgentSettings
from csi_driver.agent.uploads import Uploads
from csi_driver.images.library import ImageLibrary
from csi_driver.images.requests import Import
from csi_driver.images.store import ImageRecord
from csi_driver.kube.client import Kube
from csi_driver.kube.copies import copy_of
from csi_driver.kube.informer import Informer
from csi_driver.kube.kinds import IMAGE, IMAGE_COPY, NAMESPACE, Json
from csi_driver.model.errors import FailedPrecondition, Unavailable
from tests.machine.image_lab import unmetered
from tests.operator_fakes import SilentApi

_STAY = 100.0


class Node:
    """A node of a cluster; `look` is one look at what is there, so many seconds after the last."""

    def __init__(self, folder: Path, api: SilentApi) -> None:
        self.settings = AgentSettings(
            node="one", state_dir=folder, address="", listen=("", 0), tls_dir=folder, token_file=folder / "token",
            account="", leftover_seconds=_STAY,
        )  # fmt: skip
        self.library = ImageLibrary(self.settings.images)
        self.uploads = Uploads(self.settings.images / "uploads")
        self.api = api
        self._now = 0.0
        self.start()

    def start(self) -> None:
        """The agent begins, and sees what there is now."""
        kube = cast("Kube", self.api)
        images, copies = Informer(kube, IMAGE), Informer(kube, IMAGE_COPY)
        for each in (images, copies):
            self.api.inform(each)
        self._left = Leftovers(kube, self.settings, self.library, self.uploads, images, copies, lambda: self._now)

    def look(self, after: float = 0.0) -> None:
        self._now += after
        self._left.look(lambda: False)

    def has(self, name: str, owner: str | None) -> ImageRecord:
        source = self.settings.state_dir / "disk"
        source.parent.mkdir(exist_ok=True)
        source.write_bytes(bytes(range(256)) * 16)
        return self.library.import_(Import(name, str(source), owner=owner), unmetered)

    def has_part(self, name: str, owner: str) -> None:
        def cut(folder: Path) -> tuple[Path, ImageRecord]:
            (folder / "part").write_bytes(b"half")
            raise Unavailable("cut")

        with pytest.raises(Unavailable):
            self.library.receive(name, owner, cut)


@pytest.fixture
def api() -> Iterator[SilentApi]:
    api = SilentApi()
    api.put(NAMESPACE, {"metadata": {"name": "kube-system", "uid": "this-cluster"}})
    yield api
    api.end()


@pytest.fixture
def node(tmp_path: Path, api: SilentApi) -> Node:
    return Node(tmp_path / "state", api)


def image(api: SilentApi, name: str, **status: str) -> Json:
    metadata = {"name": name, "uid": f"uid-{name}"}
    return api.put(IMAGE, {"metadata": metadata, "spec": {"source": {"upload": {}}}, "status": status})


def test_what_is_left_of_an_image_that_is_gone_goes_after_a_while(node: Node) -> None:
    node.has("gone", "uid-gone")
    node.has("by-hand", None)
    node.has_part("begun", "uid-begun")
    node.uploads.receive("sent", "uid-sent", 0, 4, 2, io.BytesIO(b"01"))
    node.look()
    node.look(_STAY - 1)
    assert node.library.names() == ["by-hand", "gone"]
    node.look(1)
    assert (node.library.names(), node.library.unfinished(), node.uploads.owned()) == (["by-hand"], [], {})


def test_a_new_image_of_the_name_does_not_keep_what_an_earlier_one_has_left(node: Node, api: SilentApi) -> None:
    node.has("disk", "uid-earlier")
    image(api, "disk")
    node.start()
    node.look()
    node.look(_STAY)
    assert node.library.names() == []
    assert api.all(IMAGE_COPY) == []


def test_the_file_of_an_image_that_is_there_becomes_its_copy_again(node: Node, api: SilentApi) -> None:
    node.has("disk", "uid-disk")
    image(api, "disk")
    node.start()
    node.look()
    assert api.all(IMAGE_COPY) == []  # another node may be making it, and that would be another file
    node.look(_STAY)
    assert node.library.names() == ["disk"]
    image(api, "disk", checksum="00")
    node.start()
    node.look()
    (copy,) = api.all(IMAGE_COPY)
    assert (copy["spec"]["node"], copy["spec"]["imageUID"], copy["spec"]["make"]) == ("one", "uid-disk", False)
    node.look(_STAY)
    node.look(_STAY)
    assert node.library.names() == ["disk"]


def test_what_came_without_being_seen_keeps_its_files(node: Node, api: SilentApi) -> None:
    node.has("disk", "uid-disk")
    node.has_part("begun", "uid-begun")
    node.look()
    image(api, "disk")
    api.put(IMAGE_COPY, copy_of(image(api, "begun"), "one", make=True))
    node.look(_STAY)
    assert (node.library.names(), node.library.unfinished()) == (["disk"], ["begun"])


def test_what_another_cluster_has_left_is_left_alone(node: Node, api: SilentApi) -> None:
    node.look()  # it is this cluster's from now on
    node.has("theirs", "uid-theirs")
    api.put(NAMESPACE, {"metadata": {"name": "kube-system", "uid": "another-cluster"}})
    node.start()
    node.look()
    node.look(_STAY)
    assert node.library.names() == ["theirs"]


def test_a_cluster_that_cannot_be_told_from_others_is_none_to_remove_for(node: Node, api: SilentApi) -> None:
    node.has("disk", "uid-disk")
    api.lose(NAMESPACE, "kube-system")
    with pytest.raises(FailedPrecondition, match="no namespace kube-system"):
        node.look()
    assert node.library.names() == ["disk"]
