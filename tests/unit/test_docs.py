"""The docs name what there is: no parameter, option, error or finding is missing in them, and none is invented."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from csi_driver.cli import main as cli
from csi_driver.cli.image import Document
from csi_driver.cli.node_view import Seen
from csi_driver.cli.remote import document
from csi_driver.cli.serve import serve
from csi_driver.host import mountoptions
from csi_driver.keys import secret
from csi_driver.keys.fields import FIELDS
from csi_driver.luks import formats
from csi_driver.model import errors
from csi_driver.rpc import metrics, server
from csi_driver.rpc.client import RemoteVolume
from csi_driver.rpc.status import code_of
from csi_driver.volumes import finding, health, image_source, parameters, storage_health
from csi_driver.volumes.capability import AccessMode
from csi_driver.volumes.check import Checked
from csi_driver.volumes.condition import Condition
from csi_driver.volumes.image_source import _KEYS
from csi_driver.volumes.parameters import _IGNORED, _MKFS_FLAGS, _NAMES_OF_CLAIM, _ONE_VALUE, _READERS

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def section(text: str, heading: str) -> str:
    """What stands below a heading of second level, up to the next one."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {heading!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows but heads and rules."""
    lines = text.splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for above, line in zip(["", *lines], lines, strict=False)
        if line.startswith("|") and not set(line) <= set("|- ") and above.startswith("|")
    ]


def code_names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def first_names(text: str) -> list[str]:
    return [name for row in rows(text) for name in code_names(row[0])]


def same(told: list[str], there: set[str]) -> None:
    assert sorted(told) == sorted(there)


def test_every_parameter_and_no_other_is_told() -> None:
    same(first_names(section(page("parameters.md"), "Parameters")), set(_READERS))


def test_every_parameter_with_one_value_is_told_with_it() -> None:
    told = {
        name: "".join(code_names(value))
        for (names, value, *_) in rows(section(page("parameters.md"), "Parameters with one value"))
        for name in code_names(names)
    }
    assert told == {name: value for name, (value, _) in _ONE_VALUE.items()}


def test_every_ignored_parameter_and_no_other_is_told() -> None:
    ignored = section(page("parameters.md"), "Ignored parameters")
    same(first_names(ignored), set(_IGNORED))
    for name in _NAMES_OF_CLAIM:
        assert f"`{name}`" in ignored


def test_every_cipher_is_told_with_its_key_sizes() -> None:
    told = {
        code_names(cells[0])[0]: tuple(map(int, cells[1].split(", ")))
        for cells in rows(section(page("parameters.md"), "Ciphers and key sizes"))
    }
    assert told == dict(formats.CIPHER_KEY_BITS)


def test_every_value_of_a_parameter_with_few_values_is_told() -> None:
    told = {
        code_names(cells[0])[0]: code_names(cells[1]) for cells in rows(section(page("parameters.md"), "Parameters"))
    }
    assert told["hash"] == list(formats.HASHES)
    assert told["pbkdf"] == list(formats.PBKDFS)
    assert told["sectorSize"] == list(map(str, formats.SECTOR_SIZES))
    assert told["fstype"] == list(parameters.FILE_SYSTEMS)


def test_every_entry_of_a_secret_and_no_other_is_told() -> None:
    entries = {value for name, value in vars(secret).items() if name.isupper() and not name.startswith("_")}
    same(first_names(section(page("parameters.md"), "Secrets")), entries)


def test_every_type_of_an_images_source_is_told_with_its_parameters() -> None:
    told = {
        code_names(cells[0])[0]: tuple(code_names(cells[1]))
        for cells in rows(section(page("parameters.md"), "Volumes from images"))
    }
    assert told == dict(_KEYS)
    (values,) = [
        code_names(cells[1])
        for cells in rows(section(page("parameters.md"), "Parameters"))
        if image_source.TYPE in code_names(cells[0])
    ]
    assert values == list(image_source.TYPES)


def test_every_field_of_a_kms_entry_is_told() -> None:
    told = section(page("kms.md"), "Configuration")
    assert [name for name in sorted(set().union(*FIELDS.values())) if not re.search(rf"`{name}[`*]", told)] == []


def test_every_mkfs_option_and_no_other_is_told() -> None:
    told: dict[str, dict[str, tuple[str, ...] | None]] = {}
    for file_system, options, restricted in rows(section(page("parameters.md"), "mkfsOptions")):
        told[file_system] = dict.fromkeys(code_names(options))
        for part in filter(None, restricted.split(";")):
            option, *names = code_names(part)
            told[file_system][option] = tuple(names)
    assert told == {name: dict(options) for name, options in _MKFS_FLAGS.items()}


def test_every_mount_option_is_told_with_its_file_systems() -> None:
    told = rows(section(page("parameters.md"), "mountOptions"))
    same([name for row in told for name in code_names(row[0])], set(mountoptions.ALLOWED))
    for option, file_systems, values in told:
        (name,) = code_names(option)
        value = (
            (code_names(values) or [""])[0].split("[")[0]
            if name.endswith("=")
            else "=t" * (values == "an SELinux label")
        )
        wanted = parameters.FILE_SYSTEMS if file_systems == "all" else file_systems.split(", ")
        for file_system in parameters.FILE_SYSTEMS:
            takes = True
            try:
                mountoptions.parse_options([name + value], file_system)
            except errors.InvalidArgument:
                takes = False
            assert takes == (file_system in wanted), f"{name}{value} on {file_system}"


def test_every_access_mode_is_told() -> None:
    told = [name for cells in rows(section(page("parameters.md"), "Access modes")) for name in code_names(cells[1])]
    same(told, {mode.name for mode in AccessMode})


def test_every_command_and_no_other_is_told() -> None:
    there = {f"luks-csi {name}" for name, command in commands() if not isinstance(command, click.Group)}
    same(first_names(section(page("configuration.md"), "Commands")), there)


def test_every_key_of_json_is_told() -> None:
    told = section(page("command-line.md"), "Output for programs")
    parts = dict(zip(*[iter(re.split(r"^### (.*)\n", told, flags=re.MULTILINE)[1:])] * 2, strict=True))
    nowhere = Condition(None, (), None, "closed")
    volume = document(RemoteVolume("data", 1, {}), Seen(None, "", nowhere))
    same(first_names(parts["Volumes"]), set(volume))
    same(first_names(parts["Images"]), {field.name for field in dataclasses.fields(Document)})
    others = {cells[0]: code_names(cells[2]) for cells in rows(parts["Others"])}
    kinds = {"finding": finding.Finding, "check": Checked}
    for noun, kind in kinds.items():
        assert others.pop(noun) == [field.name for field in dataclasses.fields(kind)]
    assert others.keys() == {"leftover", "usage", "key", "key that is left", "rewrapped key", "KMS"}, (
        "tested where they are printed"
    )


def test_every_setting_is_told_with_its_variable_and_default() -> None:
    told = {
        code_names(cells[0])[0]: (*code_names(cells[1]), (code_names(cells[2]) or [""])[0])
        for cells in rows(section(page("configuration.md"), "Settings"))
    }
    there = {
        option.opts[0]: (option.envvar, option.default) for option in serve.params if isinstance(option, click.Option)
    }
    assert told == there


def test_every_error_is_told_with_its_code() -> None:
    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.DriverError) and kind is not errors.DriverError
    }
    told = {code_names(cells[1])[0]: cells[2] for cells in rows(section(page("architecture.md"), "Errors"))}
    assert told == {name: code_of(kind("")).name for name, kind in classes.items()}
    same(first_names(section(page("operations.md"), "Reading errors")), set(classes))


def test_every_finding_of_the_doctor_is_told() -> None:
    calls = [
        node
        for module in (health, storage_health)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "look_at"
    ]
    there = {ast.literal_eval(call.args[0]): "no" if call.keywords else "yes" for call in calls}
    told = {code_names(cells[0])[0]: cells[1] for cells in rows(section(page("configuration.md"), "Doctor"))}
    assert told == there
    probed = [cells[0] for cells in rows(section(page("configuration.md"), "Probe"))]
    same(probed, {name for name, fatal in there.items() if fatal == "yes"})


def test_every_metric_is_told() -> None:
    sources = [inspect.getsource(module) for module in (metrics, server)]
    there = set(re.findall(r'"(luks_csi_\w+)"', "".join(sources)))
    same(first_names(section(page("configuration.md"), "Metrics")), there)


def test_every_log_event_is_told() -> None:
    calls = [
        node
        for source in (ROOT / "csi_driver").rglob("*.py")
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in {"debug", "info", "warning", "error", "log"}
    ]
    texts = [argument for call in calls for argument in call.args if isinstance(argument, ast.Constant)]
    events = {text.value for text in texts if isinstance(text.value, str)}
    same(first_names(section(page("configuration.md"), "Logs")), events)


def test_every_variable_that_is_named_exists() -> None:
    variables = {
        str(option.envvar) for _, command in commands() for option in command.params if hasattr(option, "envvar")
    }
    for path in PAGES:
        assert set(re.findall(r"LUKS_CSI_[A-Z_]+", path.read_text())) <= variables, path.name


def test_every_command_that_is_named_exists() -> None:
    named = dict(commands())
    for path in PAGES:
        for words in re.findall(r"(?<!-n )luks-csi((?: [a-z][a-z-]*)+)", "\n".join(code_in(path.read_text()))):
            name = ""
            for word in words.split():
                name = f"{name} {word}".strip()
                assert name in named, f"{path.name}: luks-csi{words}"
                if not isinstance(named[name], click.Group):
                    break  # what follows are its arguments


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in PAGES:
        for words in re.findall(r"\bmake((?: [a-z-]+)+)", "\n".join(code_in(path.read_text()))):
            assert set(words.split()) <= targets, f"{path.name}: make{words}"


def test_every_source_file_that_is_named_exists() -> None:
    for path in PAGES:
        for name in re.findall(r"`((?:csi_driver/)?[a-z]+/[\w/]*\w\.py)`", path.read_text()):
            assert (ROOT / name).exists() or (ROOT / "csi_driver" / name).exists(), f"{path.name}: {name}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        found = path.parent / name if name else path
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found.read_text()), target


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings get on GitHub."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_in(text: str) -> list[str]:
    """What stands in code blocks and between backticks."""
    blocks = re.findall(r"^ *```.*?\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [*blocks, *code_names(re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))]


def commands(command: click.Command = cli.luks_csi, name: str = "") -> Iterator[tuple[str, click.Command]]:
    """Each command below `command`, by the words that call it."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for word in command.list_commands(context):
            found = command.get_command(context, word)
            assert found is not None
            yield f"{name} {word}".strip(), found
            yield from commands(found, f"{name} {word}".strip())


def test_every_test_that_shows_a_rule_is_there() -> None:
    names = set(re.findall(r"`(test_\w+)`", section(page("conformance.md"), "Rules of the documents on images")))
    tests = "".join(path.read_text() for path in (ROOT / "tests/operator").glob("test_*.py"))
    assert names
    assert [name for name in sorted(names) if f"def {name}(" not in tests] == []
