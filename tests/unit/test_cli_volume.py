"""`luks-csi volume` against a client that only remembers what it was asked."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from click.testing import Result

from csi_driver.backends.records import RecordCodec
from csi_driver.cli.node_view import Seen, see
from csi_driver.cli.remote import Reach, connect
from csi_driver.cli.serve import serve
from csi_driver.cli.volume import volume
from csi_driver.model.volume import EncryptionState, FileSystemState, LuksIdentity, VolumeParameters, VolumeRecord
from csi_driver.rpc.client import CsiClient, RemoteError, RemoteVolume
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.condition import Condition
from csi_driver.volumes.context import volume_context
from csi_driver.volumes.usage import Usage
from tests.cli import run_cli

MIB = 1 << 20
DATA = RemoteVolume("data", 256 * MIB, {"encrypted": "true", "backend": "loopfile"}, ({"topology.x/node": "n1"},))
PASSPHRASE = "correct horse battery"
NOTHING: Mapping[str, str] = {}
CLOSED = Condition(None, (), None, "closed")
IN_USE = Condition("/stage", ("/pod", "/other"), healthy=True, health="well")


class FakeClient(CsiClient):
    def __init__(self) -> None:
        self.made: list[tuple[object, ...]] = []
        self.there = [DATA]
        self.refusing: RemoteError | None = None
        self.seen: dict[str, Condition] = {}
        self.record: VolumeRecord | None = None
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
        return RemoteVolume(name, required_bytes, {"encrypted": parameters.get("encrypted", "false")})

    def delete_volume(self, volume_id: str, secrets: Mapping[str, str] = NOTHING) -> None:
        self.note("delete", volume_id)

    def stage(
        self,
        volume: RemoteVolume,
        staging_path: Path,
        capability: Capability,
        secrets: Mapping[str, str] = NOTHING,
        publish_context: Mapping[str, str] = NOTHING,
    ) -> None:
        assert staging_path.is_dir()
        self.note("stage", volume, staging_path, capability, dict(secrets))

    def detach(self, volume_id: str, node_id: str, secrets: Mapping[str, str] = NOTHING) -> None:
        self.note("detach", volume_id, node_id)

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

    def expand_volume(self, volume_id: str, required_bytes: int, secrets: Mapping[str, str] = NOTHING) -> int:
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


def run(client: FakeClient, *arguments: object, stdin: str | bytes | None = None, look: bool = False) -> Result:
    """A command, with what `client` tells of the server and, unless it is to look itself, of the node."""

    def told(volume_id: str, _endpoint: Path, _state_dir: Path | None) -> Seen:
        return Seen(client.record, "told by the test", client.seen.get(volume_id, CLOSED))

    return run_cli("volume", *arguments, stdin=stdin, obj=Reach(lambda _: client, see if look else told))


def calls(client: FakeClient) -> list[tuple[object, ...]]:
    assert client.made[-1] == ("close",)
    return client.made[:-1]


def test_list_shows_a_line_for_each_volume_and_where_it_is(client: FakeClient) -> None:
    client.there += [RemoteVolume(name, 1000, {"encrypted": "false"}) for name in ("odd", "sick")]
    client.seen = {"data": IN_USE, "sick": Condition("/sick", (), healthy=False, health="went read-only; mend it")}
    done = run(client, "list")
    assert done.exit_code == 0
    assert [re.split("  +", line.strip()) for line in done.stdout.splitlines()] == [
        ["VOLUME", "CAPACITY", "ENCRYPTED", "STATE", "WHERE AND HOW"],
        ["data", "256Mi", "yes", "published", "staged at /stage"],
        ["published at /pod"],
        ["published at /other"],
        ["odd", "1000", "no", "closed", "-"],
        ["sick", "1000", "no", "SICK", "went read-only; mend it"],
        ["staged at /sick"],
    ]


def test_a_volume_is_taken_back_from_the_node_that_has_it_and_from_no_other(client: FakeClient) -> None:
    client.there = [RemoteVolume("data", MIB, {"encrypted": "true", "backend": "rbd"}, published=("n1",))]
    assert ["given to", "n1"] in [
        re.split("  +", line.strip()) for line in run(client, "show", "data").stdout.splitlines()
    ]
    done = run(client, "detach", "data", "n2", "--yes")
    assert "was not given to node n2: node n1 has it" in done.stderr
    assert run(client, "detach", "data", "n1", stdin="n\n").exit_code != 0
    assert ("detach", "data", "n1") not in client.made
    done = run(client, "detach", "data", "n1", "--yes")
    assert done.stdout == "volume data is no longer given to node n1\n"
    assert calls(client)[-1] == ("detach", "data", "n1")


def test_list_without_volumes_says_so(client: FakeClient) -> None:
    client.there = []
    assert run(client, "list").stdout == "no volumes\n"
    assert json.loads(run(client, "list", "--output", "json").stdout) == []


VOLUME = {
    "volume_id": "data",
    "capacity_bytes": 256 * MIB,
    "volume_context": {"encrypted": "true", "backend": "loopfile"},
    "accessible_topology": [{"topology.x/node": "n1"}],
    "published_node_ids": [],
    "staged_at": "/stage",
    "published_at": ["/pod", "/other"],
    "healthy": True,
    "health": "well",
    "record": None,
    "record_source": "told by the test",
}
"""The schema of the noun, with the field names of the CSI specification where it has them."""


@pytest.mark.parametrize(
    "words",
    [
        ("list",),
        ("show", "data"),
        ("create", "data", "--size", "256Mi", "--encrypted"),
        ("stage", "data", "{}/stage", "--passphrase-file", "-"),
        ("unstage", "data", "/stage"),
        ("publish", "data", "/stage", "/pod"),
        ("unpublish", "data", "/pod"),
        ("expand", "data", "/pod", "--size", "512Mi"),
    ],
)
def test_every_command_that_tells_of_a_volume_has_its_one_schema(
    client: FakeClient, tmp_path: Path, words: tuple[str, ...]
) -> None:
    client.seen = {"data": IN_USE}
    done = run(client, *(word.format(tmp_path) for word in words), "-o", "json", stdin=PASSPHRASE)
    found = json.loads(done.stdout)
    (found,) = found if words == ("list",) else [found]
    assert {**found, "volume_context": {}, "accessible_topology": []} == {
        **VOLUME,
        "volume_context": {},
        "accessible_topology": [],
    }
    if words[0] != "create":
        assert found == VOLUME


def test_what_the_node_does_not_show_is_null_in_json_and_said_in_the_list(client: FakeClient) -> None:
    blind = Reach(lambda _: client, lambda *_: Seen(None, "not shown: elsewhere", None, "no root"))
    (found,) = json.loads(run_cli("volume", "list", "-o", "json", obj=blind).stdout)
    assert (found["staged_at"], found["published_at"], found["healthy"]) == (None, None, None)
    assert found["health"] == "not seen: no root"
    assert "unknown  not seen: no root" in run_cli("volume", "list", obj=blind).stdout
    for words in (("unstage", "data", "/s"), ("unpublish", "data", "/s"), ("expand", "data", "/s", "--size", "1Gi")):
        done = run_cli("volume", *words, obj=blind)
        assert (done.exit_code, done.stderr) == (
            1,
            "luks-csi: where volume data is cannot be seen: no root\n",
        )
    assert calls(client) == [("close",)] * (len(client.made) - 1)


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
        (["create", "data", "--size", "0"], "write at least one byte"),
        (["create", "data", "--size", "1Gi", "--limit", "0Mi"], "write at least one byte"),
        (["expand", "data", "--size", "0"], "write at least one byte"),
        (["create", "Data", "--size", "1Gi"], "'Data' cannot be a volume's name here; use at most 64 small letters"),
        (["create", "data", "--size", "1Gi", "--passphrase-file", "-"], "add --encrypted"),
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
    assert done.stderr == "luks-csi: no room for volume data in /var/lib/luks-csi (RESOURCE_EXHAUSTED)\n"
    assert client.made[-1] == ("close",)


def test_delete_asks_nothing_when_told_yes(client: FakeClient) -> None:
    assert run(client, "delete", "data", "--yes").stdout == "volume data is deleted\n"
    assert calls(client) == [("delete", "data")]


def test_delete_tells_of_a_volume_that_is_closed(client: FakeClient) -> None:
    found = json.loads(run(client, "delete", "data", "--yes", "-o", "json").stdout)
    closed: dict[str, object] = {"staged_at": None, "published_at": [], "healthy": None, "health": "closed"}
    assert found == {**VOLUME, **closed, "volume_context": found["volume_context"]}


@pytest.mark.parametrize(
    ("condition", "where"),
    [
        (IN_USE, f"staged at {IN_USE.staged_at}"),
        (Condition("/stage", (), healthy=True, health="well"), "staged at /stage"),
        (Condition(None, (), healthy=False, health="open, and no stage is recorded; unstage it"), "open"),
    ],
)
def test_delete_takes_no_volume_that_somebody_may_be_in(client: FakeClient, condition: Condition, where: str) -> None:
    client.seen = {"data": condition}
    done = run(client, "delete", "data", "--yes")
    assert done.exit_code == 1
    assert f"volume data is {where} on this node; end what uses it and unstage it" in done.stderr
    assert calls(client) == []


def test_delete_says_where_it_cannot_see_whether_it_is_in_use(client: FakeClient) -> None:
    blind = Reach(lambda _: client, lambda *_: Seen(None, "not shown: elsewhere", None, "no root"))
    asked = run_cli("volume", "delete", "data", obj=blind)
    assert "Whether it is in use cannot be seen here: no root. There is no terminal" in " ".join(asked.stderr.split())
    assert calls(client) == []
    assert run_cli("volume", "delete", "data", "--yes", obj=blind).exit_code == 0


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
    assert calls(client) == []


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
    client.seen["data"] = Condition(f"{Path.cwd()}/stage", (f"{Path.cwd()}/pod",), healthy=True, health="well")
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
    assert "where it is staged give PATH" in done.stdout
    client.made.clear()
    client.seen["data"] = IN_USE
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
    client.there = [RemoteVolume("data", 256 * MIB, volume_context(record, "loopfile"))]
    lines = " ".join(run(client, "show", "data", "--state-dir", tmp_path, look=True).stdout.split())
    for part in (
        "268435456 bytes",
        "health closed",
        f"read from {tmp_path}",
        "6a6e4b1b-e6e2-48d6-85e4-92e6dace1387",
        "aes-xts-plain64, key of 512 bits, sectors of 512 bytes",
        "ext4",
        "1 (numberOfReplicas 3 was asked for)",
        "shop/data",
    ):
        assert part in lines
    found = json.loads(run(client, "show", "data", "--state-dir", tmp_path, "-o", "json", look=True).stdout)
    assert found["record"]["luks"]["data_offset"] == 16 * MIB
    assert found["record_source"] == f"read from {tmp_path}"


def test_show_elsewhere_says_that_the_record_is_not_shown(client: FakeClient, tmp_path: Path) -> None:
    lines = run(client, "show", "data", "--state-dir", tmp_path, look=True).stdout
    assert f"not shown: {tmp_path} holds no such volume" in " ".join(lines.split())
    assert "LUKS UUID" not in lines
    assert (
        json.loads(run(client, "show", "data", "--state-dir", tmp_path, "-o", "json", look=True).stdout)["record"]
        is None
    )


def test_show_of_a_damaged_record_says_what_is_wrong(client: FakeClient, tmp_path: Path) -> None:
    recorded(tmp_path)
    (tmp_path / "loopfile/volumes/data/record.json").write_bytes(b"{")
    lines = run(client, "show", "data", "--state-dir", tmp_path, look=True).stdout
    assert "not shown: the volume record" in lines


def test_no_server_is_one_sentence_on_standard_error_and_exit_code_1(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("luks-csi")
    done = subprocess.run(
        [program, "volume", "list", "--endpoint", tmp_path / "csi.sock"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"luks-csi: no server can be reached at {tmp_path}/csi.sock: there is no such socket; start a server with "
        f"`luks-csi serve` or name its socket with --endpoint\n"
    )
    usage = subprocess.run([program, "volume", "show"], capture_output=True, text=True, check=False, timeout=120)
    assert (usage.returncode, usage.stderr) == (2, "luks-csi: Missing argument 'VOLUME'.\n")


def test_a_client_is_made_only_where_a_socket_answers(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "csi.sock"))
        server.listen()
        connect(tmp_path / "csi.sock").close()
    result = run_cli("volume", "list", "--endpoint", tmp_path / "csi.sock")
    assert result.exit_code == 1
    assert "its server has ended" in result.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("unstage", "data", "/wrong"),
            "volume data is not staged at /wrong: it is staged at /stage, published at /pod",
        ),
        (("unstage", "data", "/pod"), "volume data is not staged at /pod"),
        (("unstage", "gone", "/stage"), "volume gone does not exist"),
        (("unstage", "closed", "/stage"), "volume closed is not staged at /stage: it is not staged; nothing was done"),
        (("unpublish", "data", "/wrong"), "volume data is not published at /wrong: it is staged at /stage"),
        (("unpublish", "data", "/stage"), "volume data is not published at /stage"),
        (("unpublish", "nope", "/pod"), "volume nope does not exist"),
        (("expand", "data", "/wrong", "--size", "1Gi"), "volume data is neither staged nor published at /wrong"),
        (("expand", "nope", "--size", "1Gi"), "volume nope does not exist"),
    ],
)
def test_wrong_paths_and_names_change_nothing_and_are_told(
    client: FakeClient, words: tuple[str, ...], sentence: str
) -> None:
    client.there.append(RemoteVolume("closed", 1000, {}))
    client.seen["data"] = IN_USE
    done = run(client, *words)
    assert (done.exit_code, done.stdout) == (1, "")
    assert sentence in done.stderr
    assert calls(client) == []


def test_a_volume_is_taken_down_without_its_record_and_through_a_link(client: FakeClient, tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "link").symlink_to("stage")
    client.there = []
    client.seen["data"] = Condition(f"{tmp_path}/stage", (), healthy=False, health="open")
    assert run(client, "unstage", "data", tmp_path / "link").exit_code == 0
    client.seen["data"] = Condition(None, (), healthy=False, health="open, and no stage is recorded; unstage it")
    assert run(client, "unstage", "data", "/anywhere").exit_code == 0
    assert calls(client)[-1] == ("unstage", "data", Path("/anywhere"))


def test_a_secret_for_a_volume_that_is_not_encrypted_is_refused(client: FakeClient, tmp_path: Path) -> None:
    client.there = [RemoteVolume("data", 256 * MIB, {"encrypted": "false"})]
    for words in (("stage", "data", tmp_path / "stage"), ("expand", "data", "--size", "1Gi")):
        done = run(client, *words, "--passphrase-file", "-", stdin=PASSPHRASE)
        assert (done.exit_code, done.stdout) == (1, "")
        assert "volume data is not encrypted, so a passphrase protects nothing in it" in done.stderr
    assert calls(client) == [("close",)]
    assert not (tmp_path / "stage").exists()


def test_an_encrypted_volume_wants_its_passphrase_in_the_words_of_the_command_line(client: FakeClient) -> None:
    done = run(client, "stage", "data", "/stage")
    assert "volume data is encrypted: give its passphrase with --passphrase-file FILE" in done.stderr
    assert calls(client) == []


def test_an_empty_passphrase_is_told(client: FakeClient, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("\n")
    for source in (tmp_path / "key", "-"):
        done = run(client, "stage", "data", tmp_path / "stage", "--passphrase-file", source, stdin="\n")
        assert done.exit_code == 1
        assert "is empty" in done.stderr
    assert calls(client) == [("close",)]


def test_failures_are_json_where_that_is_asked_for(client: FakeClient) -> None:
    client.refusing = RemoteError("RESOURCE_EXHAUSTED", "no room for volume data")
    for words, code, exit_code in (
        (("create", "data", "--size", "1Gi", "-o", "json"), "RESOURCE_EXHAUSTED", 1),
        (("--output=json", "unstage", "data", "/x"), "INVALID_ARGUMENT", 2),
        (("unstage", "data", "/x", "--output", "json"), "NOT_FOUND", 1),
        (("unstage", "data", "/x", "-ojson", "--nonsense"), "INVALID_ARGUMENT", 2),
        (("delete", "data", "-o", "json"), "INVALID_ARGUMENT", 2),
    ):
        done = run(client, *words)
        failure = json.loads(done.stderr)["error"]
        assert (failure["code"], failure["exit_code"], done.exit_code) == (code, exit_code, exit_code)
        assert failure["message"]
        assert (done.stdout, done.stderr.count("\n")) == ("", 1)
