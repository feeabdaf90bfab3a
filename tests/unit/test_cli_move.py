"""`luks-csi volume move`: what is asked, what is handed on, what is told."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from csi_driver.cli.move import move
from csi_driver.cli.record import accept_record, record_rows
from csi_driver.model.settings import Settings
from csi_driver.model.volume import Move, MovePhase, Span, VolumeParameters, VolumeRecord
from csi_driver.volumes.driver import build_driver
from csi_driver.volumes.move import MoveRequest
from csi_driver.volumes.move_copy import Onlooker

MIB = 1 << 20


def record(moving: Move | None = None) -> VolumeRecord:
    return VolumeRecord(
        id="data", name="data", capacity_bytes=MIB, parameters=VolumeParameters(), move=moving, created="now"
    )


def going(phase: MovePhase = MovePhase.LEAVING, **more: Any) -> Move:
    return Move(phase=phase, id="m", other="/var/lib/other", volume_id="data", **more)


class FakeMoves:
    """Notes what it is asked for and moves nothing."""

    def __init__(self, here: str, present: VolumeRecord, asked: list[Any]) -> None:
        self.here = here
        self._present = present
        self._asked = asked

    def move(self, request: MoveRequest, there: str, onlooker: Onlooker) -> VolumeRecord:
        self._asked.append((request, there, onlooker.rate))
        with onlooker.meter("copying volume data", 64 * MIB) as progress:
            progress(64 * MIB)
        onlooker.tell("it is copied anew")
        return self._present

    def undo(self, volume_id: str, there: str, place: VolumeParameters | None) -> VolumeRecord:
        self._asked.append(("undo", volume_id, there, place))
        return self._present


def run(
    folder: Path, *arguments: str, present: VolumeRecord | None = None, backend: str = "lvm"
) -> tuple[Result, list[Any]]:
    asked: list[Any] = []

    def build(settings: Settings) -> Any:
        if settings.ceph_secret is not None:
            asked.append(settings.ceph_secret)
        moves = FakeMoves(settings.state_dir.name, present or record(), asked)
        return SimpleNamespace(
            settings=settings,
            backend=SimpleNamespace(name=backend, get=lambda _: present or record()),
            offline=lambda: SimpleNamespace(moves=moves),
            stop=lambda: None,
        )

    places = ["--state-dir", str(folder / "here"), "--endpoint", f"unix://{folder}/csi.sock"]
    return CliRunner().invoke(move, [*arguments, "--to-state-dir", str(folder / "there"), *places], obj=build), asked


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "identity").touch()
    return tmp_path


def test_it_is_handed_on_and_told(folder: Path) -> None:
    done, asked = run(folder, "data", "--yes", "--rate", "50Mi", "--to-thin-pool", "pool", "--keep")
    assert (done.exit_code, done.stdout) == (0, f"volume data is in {folder}/there (lvm)\n")
    assert "copying volume data: 100% of 64MiB" in done.stderr
    assert "it is copied anew" in done.stderr
    assert asked == [(MoveRequest("data", VolumeParameters(thin_pool="pool"), keep=True), "there", 50 * MIB)]
    done, asked = run(folder, "data", "--yes", "-o", "json")
    assert json.loads(done.stdout)["id"] == "data"
    assert asked == [(MoveRequest("data"), "there", None)]


def test_it_is_asked_before_it_begins_and_not_before_it_goes_on(folder: Path) -> None:
    done, asked = run(folder, "data")
    assert (done.exit_code, asked) == (2, [])
    assert "answer with --yes" in done.stderr
    done, asked = run(folder, "data", present=record(going()))
    assert done.exit_code == 0, done.output
    assert len(asked) == 1


def test_it_is_given_up(folder: Path) -> None:
    done, asked = run(folder, "data", "--undo")
    assert (done.exit_code, asked) == (2, [])
    done, asked = run(folder, "data", "--undo", "--yes")
    assert (done.exit_code, done.stdout) == (0, "volume data stays where it was\n")
    assert asked == [("undo", "data", "there", None)]


def test_to_ceph_it_goes_with_parameters_of_a_class_and_a_secret(folder: Path) -> None:
    ceph = ("--to-parameter", "clusterID=one", "--to-parameter", "pool=rbd", "--to-parameter", "mapOptions=a=b")
    done, asked = run(folder, "data", "--yes", *ceph, backend="rbd")
    assert (done.exit_code, asked) == (1, [])
    assert "the parameter mapOptions is 'a=b'" in str(done.exception)
    done, asked = run(folder, "data", "--yes", *ceph[:4], "--to-secret-dir", str(folder), backend="rbd")
    assert (done.exit_code, done.stdout) == (0, f"volume data is in {folder}/there (rbd)\n")
    place = VolumeParameters(cluster_id="one", pool="rbd")
    assert asked[-1] == (MoveRequest("data", place), "there", None)
    assert asked[-2] == folder
    done, asked = run(folder, "data", "--undo", "--yes", *ceph[:4], backend="rbd")
    assert asked == [("undo", "data", "there", place)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("data", "--to-parameter", "pool"), "'pool' must be NAME=VALUE"),
        (("data", "--to-parameter", "pool=rbd"), "says nothing of where the backend lvm puts it; it takes none"),
        (("../data",), "is no id of a volume"),
        (("data", "--undo", "--keep"), "--undo moves nothing"),
        (("data", "--rate", "0"), "no size that anything could have"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_asked(
    folder: Path, arguments: tuple[str, ...], said: str
) -> None:
    done, asked = run(folder, *arguments, "--yes")
    assert (done.exit_code, asked) == (2, [])
    assert said in " ".join(done.stderr.split())


def test_a_thin_pool_is_asked_for_where_there_are_some(folder: Path) -> None:
    done, asked = run(folder, "data", "--yes", "--to-thin-pool", "pool", backend="loopfile")
    assert (done.exit_code, asked) == (2, [])
    assert "says nothing of where the backend loopfile puts it" in " ".join(done.stderr.split())


def test_a_folder_that_no_server_had_is_no_target(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    arguments = ["data", "--yes", "--state-dir", str(tmp_path), "--to-state-dir", f"{tmp_path}/there"]
    done = CliRunner().invoke(move, arguments)
    assert "is no state directory that a server of this node has had" in str(done.exception)


@pytest.mark.parametrize(
    ("moving", "said"),
    [
        (going(), "being copied to /var/lib/other; it is here until that has ended"),
        (going(MovePhase.LEFT), "to /var/lib/other; what is here is its old copy"),
        (going(MovePhase.ARRIVING, size=200, copied=Span(end=50)), "being copied here from /var/lib/other, 25 %"),
        (going(MovePhase.ARRIVED), "copied here from /var/lib/other; the same command once more ends it"),
    ],
)
def test_show_says_where_it_is(moving: Move, said: str) -> None:
    assert ("moved", said) in record_rows(record(moving))


def test_what_came_from_a_node_that_is_lost_is_taken_when_somebody_says_so(tmp_path: Path) -> None:
    backend = build_driver(Settings(node_id="n", state_dir=tmp_path)).backend
    backend.prepare()
    backend.create(record(going(MovePhase.ARRIVED, node="node-1")), MIB)
    arguments = ["data", "--state-dir", str(tmp_path)]
    done = CliRunner().invoke(accept_record, arguments)
    assert done.exit_code == 2
    said = " ".join(done.stderr.split())
    assert "came from /var/lib/other of node node-1, which does not say that it has left: is that lost, or" in said
    assert backend.get("data").move is not None
    done = CliRunner().invoke(accept_record, [*arguments, "--yes"])
    assert done.exit_code == 0, done.output
    assert backend.get("data").move is None
