"""Every setting by option and environment, and what cannot be is refused in one sentence."""

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from csi_driver import __version__
from csi_driver.cli.main import COMMANDS, luks_csi
from csi_driver.cli.serve import serve, settings_of
from csi_driver.cli.setting import read_driver_name, read_node_id
from csi_driver.model.settings import Limits, LogFormat, Service, Settings

# Field, option, text, value.
GIVEN: tuple[tuple[str, str, str, object], ...] = (
    ("endpoint", "--endpoint", "unix:///run/x/csi.sock", Path("/run/x/csi.sock")),
    ("node_id", "--node-id", "node-1", "node-1"),
    ("driver_name", "--driver-name", "driver.longhorn.io", "driver.longhorn.io"),
    ("services", "--services", "node, identity", frozenset({Service.NODE, Service.IDENTITY})),
    ("state_dir", "--state-dir", "/state", Path("/state")),
    ("require_mount", "--require-mount", "true", True),
    ("kubelet_dir", "--kubelet-dir", "/kubelet", Path("/kubelet")),
    ("backend", "--backend", "loopfile", "loopfile"),
    ("volume_group", "--volume-group", "vg0", "vg0"),
    ("thin_pool_limit", "--thin-pool-limit", "90", 90),
    ("namespace", "--namespace", "luks", "luks"),
    ("holder_image", "--holder-image", "registry.example/luks-csi:1", "registry.example/luks-csi:1"),
    ("pod_name", "--pod-name", "luks-csi-controller-5d8f-x2x9z", "luks-csi-controller-5d8f-x2x9z"),
    ("driver_below", "--driver-below", "csi.example.com", "csi.example.com"),
    ("ceph_config", "--ceph-config", "/etc/ceph/clusters.json", Path("/etc/ceph/clusters.json")),
    ("ceph_secret", "--ceph-secret", "/etc/ceph-secret", Path("/etc/ceph-secret")),
    ("free_space_floor", "--free-space-floor", "512Mi", 512 << 20),
    ("threads", "--threads", "3", 3),
    ("grace_seconds", "--grace-seconds", "1.5", 1.5),
    ("log_format", "--log-format", "json", LogFormat.JSON),
    ("log_level", "--log-level", "debug", "debug"),
    ("http_address", "--http-address", "127.0.0.1:9090", "127.0.0.1:9090"),
    ("kms_config", "--kms-config", "/etc/kms.json", Path("/etc/kms.json")),
    ("kms_programs", "--kms-programs", "/opt/kms", Path("/opt/kms")),
    ("audit_file", "--audit-file", "/var/log/keys.jsonl", Path("/var/log/keys.jsonl")),
    ("addons_endpoint", "--addons-endpoint", "unix:///run/x/addons.sock", Path("/run/x/addons.sock")),
    ("limits.format_seconds", "--format-seconds", "10", 10.0),
    ("limits.unlock_seconds", "--unlock-seconds", "11", 11.0),
    ("limits.mount_seconds", "--mount-seconds", "12", 12.0),
    ("limits.pbkdf_memory_kib", "--pbkdf-memory-limit", "1Gi", 1 << 20),
    ("limits.unlocks_at_once", "--unlocks-at-once", "2", 2),
)
REFUSED = (
    ("--endpoint", "csi.sock"),
    ("--endpoint", "tcp://127.0.0.1:1"),
    ("--node-id", "a b"),
    ("--driver-name", "-x"),
    ("--services", ""),
    ("--services", "node,group"),
    ("--state-dir", "state"),
    ("--state-dir", "/a/../b"),
    ("--require-mount", "yes"),
    ("--kubelet-dir", "./kubelet"),
    ("--backend", "tape"),
    ("--namespace", "A_b"),
    ("--holder-image", "an image"),
    ("--pod-name", "A_b"),
    ("--driver-below", "-x"),
    ("--volume-group", "-x"),
    ("--volume-group", "luks-disks"),
    ("--volume-group", "a" * 41),
    ("--thin-pool-limit", "101"),
    ("--kms-config", "kms.json"),
    ("--audit-file", "/var/log/"),
    ("--addons-endpoint", "addons.sock"),
    ("--free-space-floor", "1GB"),
    ("--threads", "0"),
    ("--threads", "many"),
    ("--grace-seconds", "-1"),
    ("--grace-seconds", "nan"),
    ("--grace-seconds", "1e99"),
    ("--log-format", "xml"),
    ("--log-level", "loud"),
    ("--http-address", "9090"),
    ("--format-seconds", "0"),
    ("--pbkdf-memory-limit", "31Ki"),
    ("--pbkdf-memory-limit", "1000000"),
    ("--unlocks-at-once", "-2"),
)


def read(*arguments: str) -> Settings:
    return settings_of(serve.make_context("serve", list(arguments)).params)


def flat(settings: Settings) -> Mapping[str, Any]:
    found = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    limits = found.pop("limits")
    return {**found, **{f"limits.{field.name}": getattr(limits, field.name) for field in dataclasses.fields(limits)}}


def test_every_setting_has_an_option() -> None:
    assert {field for field, *_ in GIVEN} == set(flat(Settings()))


def test_without_options_the_settings_are_the_defaults() -> None:
    assert read("--node-id", "n") == Settings(node_id="n")
    assert read().limits == Limits()


@pytest.mark.parametrize(("field", "option", "text", "value"), GIVEN)
def test_a_setting_is_read_from_its_option(field: str, option: str, text: str, value: object) -> None:
    found = flat(read(option, text))
    assert found[field] == value
    assert type(found[field]) is type(value)


@pytest.mark.parametrize(("field", "option", "text", "value"), GIVEN)
def test_a_setting_is_read_from_the_environment(field: str, option: str, text: str, value: object) -> None:
    variable = "LUKS_CSI_" + option.removeprefix("--").replace("-", "_").upper()
    with CliRunner(env={variable: text}).isolation():
        found = flat(read())
    assert found[field] == value


def test_a_required_mount_needs_no_value() -> None:
    assert read("--require-mount", "--node-id", "n").require_mount
    assert not read("--require-mount", "false").require_mount
    assert not read().require_mount


@pytest.mark.parametrize(("option", "text"), REFUSED)
def test_what_cannot_be_is_refused_and_both_names_are_told(option: str, text: str) -> None:
    with pytest.raises(click.UsageError) as raised:
        read(option, text)
    told = raised.value.format_message()
    assert raised.value.exit_code == 2
    assert option in told
    assert "LUKS_CSI_" in told
    assert "\n" not in told


@pytest.mark.parametrize("text", ["a", "Node-1", "a" * 63, "1.2_3"])
def test_node_ids(text: str) -> None:
    assert read_node_id(text) == text


@pytest.mark.parametrize("text", ["a" * 64, "-a", "a-", ".a", "a/b", "ä", "a\n"])
def test_node_ids_that_are_no_label_value_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="label value"):
        read_node_id(text)


@pytest.mark.parametrize("text", ["a", "rbd.csi.ceph.com", "a" * 54])
def test_driver_names(text: str) -> None:
    assert read_driver_name(text) == text
    prefix, _, name = Settings(driver_name=text).topology_key.partition("/")
    assert name
    assert len(prefix) <= 63


@pytest.mark.parametrize("text", ["", "a" * 55, "-a", "a.", "a..b", "a_b", "Luks", "a.-b", "a/b"])
def test_driver_names_that_csi_or_kubernetes_forbid_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="domain name"):
        read_driver_name(text)


# The command as a process


def run(
    *arguments: str, code: str = "from csi_driver.cli.main import main; main()"
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_version() -> None:
    found = run("--version")
    assert (found.returncode, found.stdout) == (0, f"luks-csi {__version__}\n")


def test_help_names_every_command() -> None:
    found = run("--help")
    assert found.returncode == 0
    assert all(name in found.stdout for name in COMMANDS)


def test_every_command_can_be_loaded() -> None:
    context = click.Context(luks_csi)
    assert [type(luks_csi.get_command(context, name)) for name in COMMANDS] != []
    assert all(isinstance(luks_csi.get_command(context, name), click.Command) for name in COMMANDS)


@pytest.mark.parametrize("arguments", [("servee",), ("serve", "--endpoint", "x"), ("serve", "more"), ("serve", "--no")])
def test_a_wrong_command_line_is_one_sentence_and_exit_2(arguments: tuple[str, ...]) -> None:
    found = run(*arguments)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("luks-csi: ")
    assert len(found.stderr.splitlines()) == 1


def test_one_socket_is_not_for_two_servers() -> None:
    found = run("serve", "--endpoint", "unix:///run/x/csi.sock", "--addons-endpoint", "/run/x/csi.sock")
    assert found.returncode == 2
    assert found.stderr == ("luks-csi: --addons-endpoint and --endpoint name one socket; give each of them its own\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--backend=csi", "--services=controller"),
        ("--backend=csi", "--services=node", "--pod-name=own"),
        ("--backend=csi", "--services=node", "--holder-image=image"),
        ("--pod-name=own",),
        ("--backend=rbd", "--services=controller", "--holder-image=image"),
    ],
)
def test_the_controller_of_the_backend_csi_alone_is_told_the_image_of_holders(arguments: tuple[str, ...]) -> None:
    found = run("serve", *arguments)
    assert found.returncode == 2
    assert found.stderr == (
        "luks-csi: the controller of --backend csi, and no other server, has --holder-image, or --pod-name for the "
        "image of its own pod; give one of them there alone\n"
    )


@pytest.mark.parametrize(
    "arguments", [("--pod-name=own",), ("--holder-image=image",), ("--pod-name=own", "--holder-image=image")]
)
def test_the_image_of_holders_is_told_in_one_way_at_least(arguments: tuple[str, ...]) -> None:
    program = (
        "import csi_driver.volumes.driver as driver\n"
        "def build(settings, host):\n"
        "    print(settings.pod_name, settings.holder_image)\n"
        "    raise SystemExit(0)\n"
        "driver.build_driver = build\n"
        "from csi_driver.cli.main import main; main()\n"
    )
    found = run("serve", "--backend=csi", "--services=controller", *arguments, code=program)
    assert found.stdout.split() == [each.partition("=")[2] for each in arguments], found.stderr


def test_the_command_line_is_read_before_anything_slow_is_loaded() -> None:
    found = run(
        code="import sys, csi_driver.cli.main, csi_driver.cli.serve; "
        "print([name for name in ('grpc', 'google', 'prometheus_client', 'rich') if name in sys.modules])"
    )
    assert (found.stdout, found.stderr) == ("[]\n", "")


def test_the_server_starts_without_what_only_some_calls_need() -> None:
    program = (
        "import sys, csi_driver.cli.serve, csi_driver.volumes.driver, csi_driver.rpc.server;"
        "print(sorted({'http.client', 'prometheus_client', 'structlog'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"
