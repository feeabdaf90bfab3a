"""The commands beside a server with the backend rbd know from its state directory what it was told."""

import json
from pathlib import Path

import pytest

from csi_driver.images.stopping import Stop
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.settings import Service, Settings
from csi_driver.volumes.driver import build_driver
from csi_driver.volumes.move import MoveRequest
from csi_driver.volumes.move_copy import Onlooker
from tests.backends.moving import Shown
from tests.cli import run_cli

HANDLE = "0001-0003-one-0000000000000007-8a710f4c-9d2c-4f77-8a4e-2f2f1d9b9c01"


def served(folder: Path, *, services: frozenset[Service] = frozenset(Service)) -> Path:
    """The state directory of a server that was started."""
    state, config = folder / "state", folder / "config.json"
    config.write_text(json.dumps([{"clusterID": "one", "monitors": ["192.0.2.1:6789"]}]))
    settings = Settings(state_dir=state, backend="rbd", ceph_config=config, node_id="node-7", services=services)
    build_driver(settings).backend.prepare()
    return state


def test_no_command_has_to_be_told_what_the_server_was_told(tmp_path: Path) -> None:
    state = served(tmp_path)
    told = json.loads((state / "rbd.json").read_text())
    assert told == {
        "ceph_config": str(tmp_path / "config.json"),
        "ceph_secret": None,
        "node_id": "node-7",
        "is_central": True,
    }
    backend = build_driver(Settings(state_dir=state)).backend
    assert backend.name == "rbd"
    with pytest.raises(FailedPrecondition, match=r"nobody told a user of the Ceph cluster one"):
        backend.ids()
    (tmp_path / "config.json").write_text("[]")
    assert backend.ids() == []


def test_beside_a_server_of_a_node_a_command_sees_what_that_sees(tmp_path: Path) -> None:
    state = served(tmp_path, services=frozenset({Service.NODE}))
    assert build_driver(Settings(state_dir=state)).backend.ids() == []  # no cluster is asked


def test_what_was_remembered_and_cannot_be_read_is_named(tmp_path: Path) -> None:
    state = served(tmp_path)
    (state / "rbd.json").write_text("{")
    with pytest.raises(FailedPrecondition, match=r"rbd.json cannot be read; start the server with --backend rbd"):
        build_driver(Settings(state_dir=state))


def test_a_volume_of_ceph_is_not_moved_away(tmp_path: Path) -> None:
    moves = build_driver(Settings(state_dir=served(tmp_path))).offline().moves
    (tmp_path / "other").mkdir()
    there = build_driver(Settings(state_dir=tmp_path / "other")).offline().moves.here
    onlooker = Onlooker(Shown(), lambda _: None, Stop(lambda: None), None)
    with pytest.raises(FailedPrecondition, match=r"of the backend rbd, which lies outside this node"):
        moves.move(MoveRequest("data.0123456789"), there, onlooker)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data", "pvc-1"), "'pvc-1' is no id of a volume of Ceph-CSI; name its volumeHandle"),
        (("data", HANDLE), "nobody told a user of the Ceph cluster one for this call"),
        (("data", HANDLE.replace("0003-one", "0003-two")), "the Ceph cluster 'two' is not configured"),
        (("data", HANDLE, "--kms", "a", "--kms-type", "vault"), "The image tells where its key is"),
        (("data", HANDLE, "--tenant", "a"), "The image tells where its key is"),
        (("DATA", HANDLE), "cannot be a volume's name here"),
    ],
)
def test_an_adoption_that_cannot_be_is_refused_before_any_cluster_is_asked(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    state = served(tmp_path)
    done = run_cli("volume", "adopt", *words, "--state-dir", state, "--endpoint", tmp_path / "csi.sock")
    assert done.exit_code in (1, 2)
    assert said in done.stderr
