"""A state directory that is not the one that it was is noticed, at start and while the driver runs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from csi_driver.cli.main import luks_csi
from csi_driver.host.files import Files
from csi_driver.host.mounts import Mounts
from csi_driver.model.errors import FailedPrecondition
from csi_driver.volumes.statedir import StateDirectory, server_state_dir

NOBODY = "/dev/null"
"""A table of mounts with nothing in it."""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "disk" / "state"


@pytest.fixture
def endpoint(tmp_path: Path) -> Path:
    return tmp_path / "run" / "csi.sock"


def started(state: Path, endpoint: Path, files: Files | None = None) -> StateDirectory:
    directory = StateDirectory(state, endpoint, files or Files(), Mounts(NOBODY), Mounts(NOBODY), require_mount=False)
    directory.start()
    return directory


def memory(endpoint: Path) -> Path:
    return endpoint.with_name("csi.sock.identity")


def test_the_first_start_makes_the_folder_and_remembers_it(state: Path, endpoint: Path) -> None:
    started(state, endpoint).check()
    assert [path.name for path in state.iterdir()] == ["identity"]
    assert [path.name for path in endpoint.parent.iterdir()] == ["csi.sock.identity"]
    made = msgspec.json.decode((state / "identity").read_bytes())
    assert made["version"] == 1
    assert len(made["id"]) == 36
    assert msgspec.json.decode(memory(endpoint).read_bytes()) == made | {"path": str(state)}
    started(state, endpoint).check()
    assert msgspec.json.decode((state / "identity").read_bytes()) == made


def test_a_folder_that_has_none_gets_its_identity(state: Path, endpoint: Path) -> None:
    """As version 0.1.0 left it."""
    (state / "loopfile" / "volumes").mkdir(parents=True)
    started(state, endpoint).check()
    made = msgspec.json.decode((state / "identity").read_bytes())
    assert msgspec.json.decode(memory(endpoint).read_bytes()) == made | {"path": str(state)}


def test_a_person_at_the_endpoint_finds_the_servers_state_directory_and_no_other(
    state: Path, endpoint: Path, tmp_path: Path
) -> None:
    usual = tmp_path / "usual"
    assert server_state_dir(endpoint, None, usual) == usual, "nothing is remembered"
    assert server_state_dir(endpoint, state, usual) == state
    started(state, endpoint)
    assert server_state_dir(endpoint, None, usual) == state
    started(usual, tmp_path / "other.sock")
    for wrong in (usual, tmp_path / "none"):
        with pytest.raises(FailedPrecondition, match="is not the state directory of the server"):
            server_state_dir(endpoint, wrong, usual)


def _hidden(state: Path) -> None:
    state.rename(state.with_name("hidden"))


def _empty(state: Path) -> None:
    _hidden(state)
    state.mkdir()


def _another(state: Path) -> None:
    _hidden(state)
    started(state, state.parent / "other.sock")


GONE = [(_hidden, "none"), (_empty, "none"), (_another, "[0-9a-f-]{36}")]


@pytest.mark.parametrize(("change", "found"), GONE)
def test_another_folder_in_its_place_is_refused_and_left_as_it_is(
    state: Path, endpoint: Path, change: Callable[[Path], None], found: str
) -> None:
    started(state, endpoint)
    change(state)
    before = sorted(state.parent.rglob("*"))
    said = (
        rf"{state} is not the one .*expected the identity [0-9a-f-]{{36}}, found {found}; .*remove {memory(endpoint)}"
    )
    with pytest.raises(FailedPrecondition, match=said):
        started(state, endpoint)
    assert sorted(state.parent.rglob("*")) == before
    shutil.rmtree(state, ignore_errors=True)
    state.with_name("hidden").rename(state)
    started(state, endpoint).check()


def test_a_new_folder_is_taken_once_the_old_one_is_forgotten(state: Path, endpoint: Path) -> None:
    started(state, endpoint)
    _empty(state)
    memory(endpoint).unlink()
    started(state, endpoint).check()
    made = msgspec.json.decode((state / "identity").read_bytes())
    assert msgspec.json.decode(memory(endpoint).read_bytes()) == made | {"path": str(state)}


@pytest.mark.parametrize("change", [_hidden, _empty, _another])
def test_while_the_driver_runs_the_folder_is_looked_at_too(
    state: Path, endpoint: Path, change: Callable[[Path], None]
) -> None:
    directory = started(state, endpoint)
    change(state)
    with pytest.raises(FailedPrecondition, match=rf"{state} is not the one that this driver was started with"):
        directory.check()
    shutil.rmtree(state, ignore_errors=True)
    state.with_name("hidden").rename(state)
    directory.check()


def test_what_was_not_started_has_nothing_to_be_held_against(state: Path, endpoint: Path) -> None:
    """As `luks-csi doctor` does it."""
    StateDirectory(state, endpoint, Files(), Mounts(NOBODY), Mounts(NOBODY), require_mount=True).check()
    assert not state.parent.exists()


def test_servers_with_one_folder_and_servers_with_one_folder_of_sockets_do_not_meet(
    state: Path, endpoint: Path
) -> None:
    started(state, endpoint)
    started(state, endpoint.with_name("second.sock")).check()
    other = state.with_name("other")
    started(other, endpoint.with_name("third.sock")).check()
    started(state, endpoint).check()
    assert (other / "identity").read_bytes() != (state / "identity").read_bytes()


@pytest.mark.parametrize(
    "command",
    [["image", "list"], ["image", "import", "source", "name"], ["orphans", "list"], ["orphans", "remove", "--yes"]],
)
def test_commands_beside_the_server_refuse_an_empty_folder_in_its_place(
    state: Path, endpoint: Path, tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / "source").touch()
    started(state, endpoint)
    _hidden(state)
    argv = [*command, "--state-dir", str(state), "--endpoint", str(endpoint)]
    state.mkdir()
    result = CliRunner().invoke(luks_csi, argv)
    assert isinstance(result.exception, FailedPrecondition)
    assert str(result.exception).startswith(f"the state directory {state} is not the one that this driver had")
    assert list(state.iterdir()) == []


def test_commands_beside_the_server_know_nothing_of_other_folders(state: Path, endpoint: Path, tmp_path: Path) -> None:
    started(state, endpoint)
    for folder in (state, tmp_path / "other"):
        argv = ["image", "list", "--state-dir", str(folder), "--endpoint", str(endpoint)]
        result = CliRunner().invoke(luks_csi, argv)
        assert (result.exit_code, result.output) == (0, f"no images in {folder / 'images'}\n")


def test_what_an_earlier_version_remembered_is_completed(state: Path, endpoint: Path) -> None:
    started(state, endpoint)
    complete = memory(endpoint).read_bytes()
    memory(endpoint).write_bytes((state / "identity").read_bytes())
    started(state, endpoint).check()
    assert memory(endpoint).read_bytes() == complete


def test_of_two_that_start_at_once_the_first_one_makes_the_identity(state: Path, endpoint: Path) -> None:
    class Overtaken(Files):
        """Another server is faster between the look and the new marker."""

        def fill(self, path: Path, content: bytes, *, durable: bool) -> None:
            super().fill(path, content, durable=durable)
            if path.name != "identity":
                (state / "identity").write_bytes(b'{"version":1,"id":"theirs"}')

    started(state, endpoint, Overtaken()).check()
    assert [path.name for path in state.iterdir()] == ["identity"]
    assert msgspec.json.decode(memory(endpoint).read_bytes())["id"] == "theirs"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read as the identity of a state directory"),
        (b'{"version":"1"}', "cannot be read as the identity of a state directory"),
        (b'{"version":2,"id":"x"}', "has version 2 and this driver knows 1; use the driver that wrote it"),
    ],
)
@pytest.mark.parametrize("where", ["marker", "memory"])
def test_an_identity_that_cannot_be_read_is_refused(
    state: Path, endpoint: Path, where: str, content: bytes, said: str
) -> None:
    started(state, endpoint)
    file = state / "identity" if where == "marker" else memory(endpoint)
    file.write_bytes(content)
    with pytest.raises(FailedPrecondition, match=rf"{file} {said}"):
        started(state, endpoint)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, state: Path, endpoint: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FailedPrecondition, match=rf"directory {tmp_path}/file cannot be made .*ENOTDIR|EEXIST"):
        started(tmp_path / "file", endpoint)
    with pytest.raises(FailedPrecondition, match=r"csi\.sock\.identity cannot be .*ENOTDIR"):
        started(state, tmp_path / "file" / "csi.sock")


# --- a mount is required ---------------------------------------------------------------------------------------------


DISK = "36 22 253:4 / {path} rw,relatime shared:1 - ext4 /dev/sdb1 rw\n"
FOLDER = "37 22 8:1 {path} {path} rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
ROOT = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"


@pytest.mark.parametrize(
    ("here", "there", "fits"),
    [
        (ROOT + DISK, ROOT + DISK, True),
        (ROOT, ROOT, False),
        (ROOT + FOLDER, ROOT, False),  # a container shows a folder of the node's root disk: always a mount, there
        (ROOT + FOLDER, ROOT + DISK, False),  # the disk came after the container
        (ROOT, ROOT + DISK, False),
    ],
)
def test_a_folder_that_must_be_a_mount_of_the_node(
    tmp_path: Path, state: Path, endpoint: Path, here: str, there: str, *, fits: bool
) -> None:
    state.mkdir(parents=True)
    tables = tmp_path / "here", tmp_path / "there"
    for table, content in zip(tables, (here, there), strict=True):
        table.write_text(content.format(path=state))
    mounts, node_mounts = (Mounts(str(table)) for table in tables)
    directory = StateDirectory(state, endpoint, Files(), mounts, node_mounts, require_mount=True)
    if fits:
        directory.start()
        directory.check()
        return
    with pytest.raises(FailedPrecondition, match=rf"{state} must be a mount of the node and is none; mount its disk"):
        directory.start()
    assert list(state.iterdir()) == []
    assert not endpoint.parent.exists()


def test_where_the_mounts_of_the_node_cannot_be_seen_a_mount_cannot_be_required(state: Path, endpoint: Path) -> None:
    state.mkdir(parents=True)
    directory = StateDirectory(state, endpoint, Files(), Mounts(), Mounts("/proc/1/none"), require_mount=True)
    with pytest.raises(FailedPrecondition, match="run the driver with the node's process ids"):
        directory.start()


def test_an_identity_that_is_no_utf8_is_told(state: Path, endpoint: Path) -> None:
    started(state, endpoint)
    (state / "identity").write_bytes(b'{"version":1,"id":"\xc7"}')
    with pytest.raises(FailedPrecondition, match="cannot be read as the identity of a state directory"):
        started(state, endpoint)
