"""The client of the API: a name that a user has put into an object leads to no other object."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csi_driver.kube.client import Kube
from csi_driver.kube.kinds import IMAGE, SECRET
from csi_driver.model.errors import FailedPrecondition, InvalidArgument, Unavailable

NAMES = ["", "a/b", "../secrets", "a?b", "a#b", "a%2fb", "..", ".", "a b", "a\n", "-a", "a" * 254, "*"]


@pytest.fixture
def kube(tmp_path: Path) -> Iterator[Kube]:
    """A client of an API that nobody can reach: what it is asked for raises Unavailable."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "c",
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    kube = Kube.of(tmp_path / "kubeconfig")
    yield kube
    kube.close()


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_a_name_is_not_asked_for(kube: Kube, name: str) -> None:
    assert kube.get(IMAGE, name) is None
    assert kube.get(SECRET, "good", name or "/") is None
    calls: list[Callable[[], object]] = [lambda: kube.patch(IMAGE, name, {}), lambda: kube.delete(IMAGE, name)]
    for call in calls:
        with pytest.raises(InvalidArgument, match="no Image can have the name"):
            call()


@pytest.mark.parametrize("name", NAMES)
def test_no_token_is_asked_for_what_cannot_be_an_account(kube: Kube, name: str) -> None:
    with pytest.raises(InvalidArgument, match="can have the name"):
        kube.account_token("default", name, "audience")
    with pytest.raises(InvalidArgument, match="can have the name"):
        kube.account_token(name, "default", "audience")


def test_a_token_that_cannot_be_read_is_told_with_its_file(kube: Kube, tmp_path: Path) -> None:
    config = json.loads((tmp_path / "kubeconfig").read_text())
    config["users"][0]["user"] = {"tokenFile": str(tmp_path / "token")}
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    other = Kube.of(tmp_path / "kubeconfig")
    try:
        with pytest.raises(FailedPrecondition, match=r"cannot be read from .*/token \(ENOENT"):
            _ = other.own_token
        (tmp_path / "token").write_bytes(b"\xff")
        with pytest.raises(FailedPrecondition, match="it is no text"):
            _ = other.own_token
        (tmp_path / "token").write_text("t\n")
        assert other.own_token == "t"
    finally:
        other.close()
    assert kube.own_token == "t"


@pytest.mark.parametrize("name", ["a", "vmi-1", "system:controller", "Upper_case.1", "a" * 253])
def test_what_can_be_one_is(kube: Kube, name: str) -> None:
    with pytest.raises(Unavailable):
        kube.get(IMAGE, name)
