"""`luks-csi volume` against a client that only remembers what it was asked."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from csi_driver.backends.records import RecordCodec
from csi_driver.cli.serve import serve
from csi_driver.cli.volume import connect, volume
from csi_driver.model.volume import EncryptionState, FileSystemState, LuksIdentity, VolumeParameters, VolumeRecord
from csi_driver.rpc.client import CsiClient, RemoteError, RemoteVolume
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.context import volume_context
from csi_driver.volumes.usage import Usage

MIB = 1 << 20
DATA = RemoteVolume("data", 256 * MIB, {"encrypted": "true", "backend": "loopfile"}, {"topology.x/node": "n1"})
PASSPHRASE = "correct horse battery"
NOTHING: Mapping[str, str] = {}


class FakeClient(CsiClient):
    def __init__(self) -> None:
        self.made: list[tuple[object, ...]] = []
        self.there = [DATA]
        self.refusing: RemoteError | None = None
        self.counts = [Usage("bytes", 1000, 250, 700), Usage("inodes", 10, 1, 9)]

    def close(self) -> None:
        self.made.append(("close",))

    def note(self, *call: object) -> None:
        self.made.append(call)
        if self.refusing is not None:
            raise self.refusing

    def volume(self, volume_id: str) -> RemoteVolume:
        for each in self.there:
            if each.id == volume_id:
                return each
        raise RemoteError("NOT_FOUND", f"volume {volume_id} does not exist on this node")

    def volumes(self) -> Iterator[RemoteVolume]:
        yield from self.there

    def create_volume(
        self,
        name: str,
        capabilities: Sequence[Capability],
        required_bytes: int,
        *,
        limit_bytes: int = 0,
        parameters: Mapping[str, str] = NOTHING,
        secrets: Mapping[str, str] = NOTHING,
    ) -> RemoteVolume:
        self.note("create", name, tuple(capabilities), required_bytes, limit_bytes, dict(parameters), dict(secrets))
        return RemoteVolume(name, required_bytes, {"encrypted": parameters.get("encrypted", "false")}, {})

    def delete_volume(self, volume_id: str) -> None:
        self.note("delete", volume_id)

    def stage(
        self,
        volume: RemoteVolume,
        staging_path: Path,
        capability: Capability,
        secrets: Mapping[str, str] = NOTHING,
    ) -> None:
        assert staging_path.is_dir()
        self.note("stage", volume, staging_path, capability, dict(secrets))

    def unstage(self, volume_id: str, staging_path: Path) -> None:
        self.note("unstage", volume_id, staging_path)

    def publish(
        self,
        volume: RemoteVolume,
        staging_path: Path,
        target_path: Path,
        capability: Capability,
        *,
        read_only: bool = False,
    ) -> None:
        self.note("publish", volume, staging_path, target_path, capability, read_only)

    def unpublish(self, volume_id: str, target_path: Path) -> None:
        self.note("unpublish", volume_id, target_path)

    def expand_volume(self, volume_id: str, required_bytes: int) -> int:
        self.note("expand", volume_id, required_bytes)
        return required_bytes

    def expand_on_node(
        self, volume_id: str, path: Path, required_bytes: int, secrets: Mapping[str, str] = NOTHING
    ) -> int:
        self.note("expand_on_node", volume_id, path, required_bytes, dict(secrets))
        return required_bytes

    def usage(self, volume_id: str, path: Path) -> list[Usage]:
        self.note("usage", volume_id, path)
        return self.counts


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


def run(client: FakeClient, *arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(volume, [str(each) for each in arguments], input=stdin, obj=lambda _: client)


def calls(client: FakeClient) -> list[tuple[object, ...]]:
    assert client.made[-1] == ("close",)
    return client.made[:-1]


def test_list_shows_a_line_for_each_volume(client: FakeClient) -> None:
    client.there.append(RemoteVolume("odd", 1000, {"encrypted": "false", "backend": "loopfile"}, {}))
    done = run(client, "list")
    assert done.exit_code == 0
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["VOLUME", "CAPACITY", "ENCRYPTED", "BACKEND", "PLACE"],
        ["data", "256Mi", "true", "loopfile", "topology.x/node=n1"],
        ["odd", "1000", "false", "loopfile", "anywhere"],
    ]


def test_list_without_volumes_says_so(client: FakeClient) -> None:
    client.there = []
    assert run(client, "list").stdout == "no volumes\n"
    assert json.loads(run(client, "list", "--output", "json").stdout) == []


def test_json_has_the_field_names_of_the_csi_specification(client: FakeClient) -> None:
    assert json.loads(run(client, "list", "-o", "json").stdout) == [
        {
            "volume_id": "data",
            "capacity_bytes": 256 * MIB,
            "volume_context": {"encrypted": "true", "backend": "loopfile"},
            "accessible_topology": {"topology.x/node": "n1"},
        }
    ]


def test_create_sends_sizes_parameters_and_capability(client: FakeClient) -> None:
    done = run(
        client, "create", "data", "--size", "256Mi", "--limit", "1Gi", "--encrypted", "-p", "pbkdf=pbkdf2",
        "--fs-type", "xfs", "--mount-option", "noatime", "--access-mode", "RWOP",
    )  # fmt: skip
    wanted = Capability(AccessMode.SINGLE_NODE_SINGLE_WRITER, block=False, fs_type="xfs", mount_flags=("noatime",))
    parameters = {"pbkdf": "pbkdf2", "encrypted": "true"}
    assert calls(client) == [("create", "data", (wanted,), 256 * MIB, 1024 * MIB, parameters, {})]
    assert done.stdout == "encrypted volume data of 256Mi is there\n"


def test_create_of_a_plain_volume_says_that_it_is_not_encrypted(client: FakeClient) -> None:
    assert run(client, "create", "data", "--size", "1Gi").stdout == "volume, not encrypted, data of 1Gi is there\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create", "data"], "Missing option '--size'"),
        (["create", "data", "--size", "1GB"], "'1GB' is no size"),
        (["create", "data", "--size", "1Gi", "-p", "encrypted"], "must be NAME=VALUE"),
        (["create", "data", "--size", "1Gi", "-p", "a=1", "-p", "a=2"], "must be NAME=VALUE"),
        (["create", "data", "--size", "1Gi", "--encrypted", "-p", "encrypted=false"], "disagree"),
        (["create", "data", "--size", "1Gi", "--block", "--fs-type", "ext4"], "--block leaves no room"),
        (["create", "data", "--size", "1Gi", "--access-mode", "RWZ"], "'RWZ'"),
        (["list", "--endpoint", "csi.sock"], "must be the absolute path of a unix socket"),
        (["list", "--output", "yaml"], "'yaml'"),
        (["stage", "data"], "Missing argument 'PATH'"),
        (["delete", "data"], "answer with --yes"),
        (["nonsense"], "No such command"),
    ],
)
def test_a_command_line_that_cannot_be_right_ends_with_2(client: FakeClient, arguments: list[str], words: str) -> None:
    done = run(client, *arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert [call for call in client.made if call != ("close",)] == []


def test_what_the_server_refuses_is_told_with_its_code_and_ends_with_1(client: FakeClient) -> None:
    client.refusing = RemoteError("RESOURCE_EXHAUSTED", "no room for volume data in /var/lib/luks-csi")
    done = run(client, "create", "data", "--size", "1Gi")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr == "Error: no room for volume data in /var/lib/luks-csi (RESOURCE_EXHAUSTED)\n"
    assert client.made[-1] == ("close",)


def test_delete_asks_nothing_when_told_yes(client: FakeClient) -> None:
    assert run(client, "delete", "data", "--yes").stdout == "volume data is deleted\n"
    assert calls(client) == [("delete", "data")]


def test_delete_of_a_volume_that_is_not_there_is_a_mistake(client: FakeClient) -> None:
    done = run(client, "delete", "dta", "--yes")
    assert done.exit_code == 1
    assert "volume dta does not exist" in done.stderr
    assert calls(client) == []


def test_stage_makes_the_folder_and_takes_the_secret_from_a_mounted_one(client: FakeClient, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    (secret / "..2026").mkdir(parents=True)
    (secret / "..2026/CRYPTO_KEY_VALUE").write_text(PASSPHRASE + "\n")
    (secret / "..data").symlink_to("..2026")
    (secret / "CRYPTO_KEY_VALUE").symlink_to("..data/CRYPTO_KEY_VALUE")
    (secret / "CRYPTO_KEY_PROVIDER").write_text("secret")
    done = run(client, "stage", "data", tmp_path / "stage", "--secret-dir", secret)
    assert done.exit_code == 0
    entries = {"CRYPTO_KEY_VALUE": PASSPHRASE + "\n", "CRYPTO_KEY_PROVIDER": "secret"}
    wanted = Capability(AccessMode.SINGLE_NODE_WRITER, block=False)
    assert calls(client) == [("stage", DATA, tmp_path / "stage", wanted, entries)]
    assert PASSPHRASE not in done.output


def test_a_passphrase_comes_from_a_file_or_standard_input_without_its_last_newline(
    client: FakeClient, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(f" {PASSPHRASE}\n\n")
    for source, stdin in ((tmp_path / "key", None), ("-", f" {PASSPHRASE}\n\n")):
        run(client, "stage", "data", tmp_path / "stage", "--passphrase-file", source, stdin=stdin)
        assert calls(client)[-1][-1] == {"CRYPTO_KEY_VALUE": f" {PASSPHRASE}\n"}


def test_secrets_never_come_from_the_command_line_or_the_environment() -> None:
    settings = {parameter.name for parameter in serve.params}
    for command in volume.commands.values():
        for parameter in command.params:
            assert parameter.name not in ("passphrase", "secret", "secrets", "key")
            assert not parameter.envvar or parameter.name in settings


@pytest.mark.parametrize("content", [b"\xff\xfe binary", b"x" * (64 * 1024 + 1)])
def test_a_secret_that_csi_cannot_carry_is_refused_without_showing_it(
    client: FakeClient, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "key").write_bytes(content)
    done = run(client, "stage", "data", tmp_path / "stage", "--passphrase-file", tmp_path / "key")
    assert done.exit_code == 1
    assert "binary" not in done.output
    assert "xxx" not in done.output
    assert str(tmp_path / "key") in done.stderr
    assert client.made == []


def test_both_sources_of_a_secret_exclude_each_other(client: FakeClient, tmp_path: Path) -> None:
    (tmp_path / "key").touch()
    done = run(client, "stage", "data", "/s", "--passphrase-file", tmp_path / "key", "--secret-dir", tmp_path)
    assert (done.exit_code, client.made) == (2, [])


def test_a_failed_stage_takes_the_folder_away_that_it_made_and_no_other(client: FakeClient, tmp_path: Path) -> None:
    client.refusing = RemoteError("UNAUTHENTICATED", "the passphrase opens no key slot")
    (tmp_path / "mine").mkdir()
    for name in ("mine", "new"):
        assert run(client, "stage", "data", tmp_path / name).exit_code == 1
    assert os.listdir(tmp_path) == ["mine"]


def test_paths_are_made_absolute_where_the_user_stands(client: FakeClient) -> None:
    run(client, "unstage", "data", "stage")
    run(client, "publish", "data", "stage", "pod", "--read-only", "--block")
    run(client, "unpublish", "data", "pod/../pod")
    here = Path.cwd()
    block = Capability(AccessMode.SINGLE_NODE_WRITER, block=True)
    assert [call for call in client.made if call != ("close",)] == [
        ("unstage", "data", here / "stage"),
        ("publish", DATA, here / "stage", here / "pod", block, True),
        ("unpublish", "data", here / "pod"),
    ]


def test_expand_reaches_the_node_only_where_a_path_is_given(client: FakeClient) -> None:
    done = run(client, "expand", "data", "--size", "512Mi")
    assert calls(client) == [("expand", "data", 512 * MIB)]
    assert "give PATH to enlarge it where it is staged" in done.stdout
    client.made.clear()
    run(client, "expand", "data", "/pod", "--size", "512Mi")
    assert calls(client) == [("expand", "data", 512 * MIB), ("expand_on_node", "data", Path("/pod"), 512 * MIB, {})]


def test_stats_count_bytes_and_inodes(client: FakeClient) -> None:
    done = run(client, "stats", "data", "/pod")
    assert [line.split() for line in done.stdout.splitlines()[1:]] == [
        ["bytes", "1000", "250", "700", "25%"],
        ["inodes", "10", "1", "9", "10%"],
    ]
    found = json.loads(run(client, "stats", "data", "/pod", "-o", "json").stdout)
    assert found["usage"][0] == {"unit": "bytes", "total": 1000, "used": 250, "available": 700}


def test_stats_of_a_block_device_know_the_total_only(client: FakeClient) -> None:
    client.counts = [Usage("bytes", 4 * MIB, 0, 0)]
    assert run(client, "stats", "data", "/pod").stdout.splitlines()[1].split() == ["bytes", "4Mi", "-", "-", "-"]


def recorded(state_dir: Path) -> VolumeRecord:
    record = VolumeRecord(
        id="data",
        name="data",
        capacity_bytes=256 * MIB,
        parameters=VolumeParameters(encrypted=True, replicas=3, claim="shop/data"),
        encryption=EncryptionState.ENCRYPTED,
        luks=LuksIdentity(
            uuid="6a6e4b1b-e6e2-48d6-85e4-92e6dace1387",
            cipher="aes-xts-plain64",
            key_bits=512,
            sector_size=512,
            data_offset=16 * MIB,
        ),
        file_system=FileSystemState.MADE,
        made_fs_type="ext4",
        created="2026-11-20T00:00:00+00:00",
    )
    folder = state_dir / "loopfile/volumes/data"
    folder.mkdir(parents=True)
    (folder / "record.json").write_bytes(RecordCodec().encode(record))
    return record


def test_show_tells_what_is_recorded_on_the_node(client: FakeClient, tmp_path: Path) -> None:
    record = recorded(tmp_path)
    client.there = [RemoteVolume("data", 256 * MIB, volume_context(record, "loopfile"), {})]
    lines = run(client, "show", "data", "--state-dir", tmp_path).stdout
    for part in (
        "268435456 bytes",
        f"read from {tmp_path}",
        "6a6e4b1b-e6e2-48d6-85e4-92e6dace1387",
        "aes-xts-plain64, key of 512 bits, sectors of 512 bytes",
        "ext4",
        "1 (numberOfReplicas 3 was asked for)",
        "shop/data",
    ):
        assert part in lines
    found = json.loads(run(client, "show", "data", "--state-dir", tmp_path, "-o", "json").stdout)
    assert found["record"]["luks"]["data_offset"] == 16 * MIB
    assert found["record_source"] == f"read from {tmp_path}"


def test_show_elsewhere_says_that_the_record_is_not_shown(client: FakeClient, tmp_path: Path) -> None:
    lines = run(client, "show", "data", "--state-dir", tmp_path).stdout
    assert f"not shown: {tmp_path} holds no such volume" in " ".join(lines.split())
    assert "LUKS UUID" not in lines
    assert json.loads(run(client, "show", "data", "--state-dir", tmp_path, "-o", "json").stdout)["record"] is None


def test_show_of_a_damaged_record_says_what_is_wrong(client: FakeClient, tmp_path: Path) -> None:
    recorded(tmp_path)
    (tmp_path / "loopfile/volumes/data/record.json").write_bytes(b"{")
    lines = run(client, "show", "data", "--state-dir", tmp_path).stdout
    assert "not shown: the volume record" in lines


def test_no_server_is_one_sentence_on_standard_error_and_exit_code_1(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("luks-csi")
    done = subprocess.run(
        [program, "volume", "list", "--endpoint", tmp_path / "csi.sock"],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"luks-csi: no server can be reached at {tmp_path}/csi.sock: there is no such socket; start a server with "
        f"`luks-csi serve` or name its socket with --endpoint\n"
    )
    usage = subprocess.run([program, "volume", "show"], capture_output=True, text=True, check=False, timeout=30)
    assert (usage.returncode, usage.stderr) == (2, "luks-csi: Missing argument 'VOLUME'.\n")


def test_a_client_is_made_only_where_a_socket_answers(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "csi.sock"))
        server.listen()
        connect(tmp_path / "csi.sock").close()
    result = CliRunner().invoke(volume, ["list", "--endpoint", str(tmp_path / "csi.sock")])
    assert result.exit_code == 1
    assert "its server has ended" in result.stderr
