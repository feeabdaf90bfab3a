"""What commands print is fit for a terminal, whatever names and records hold."""

import ast
import json
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

import csi_driver.cli
from csi_driver.cli.output import show_json, show_table, show_text

HOSTILE = "caf\udce9 \x1b[31m\x9b\u202e"
SHOWN = r"caf\xe9 \x1b[31m\x9b\u202e"


def test_lines_show_names_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    show_text(f"image {HOSTILE} is deleted")
    show_text(f"unfinished: {HOSTILE}", err=True)
    out, err = capsys.readouterr()
    assert (out, err) == (f"image {SHOWN} is deleted\n", f"unfinished: {SHOWN}\n")


def test_tables_show_names_written_out_and_stay_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    show_table([(HOSTILE, HOSTILE), ("plain", "first\nsecond")], ("NAME", "FROM"))
    width = len(SHOWN) + 2
    assert capsys.readouterr().out.splitlines() == [
        "NAME".ljust(width) + "FROM",
        f"{SHOWN}  {SHOWN}",
        "plain".ljust(width) + "first",
        " " * width + "second",
    ]


def test_what_people_copy_from_a_table_stays_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = f"/var/lib/{'luks-csi-' * 20}/pvc-6a6e4b1b-e6e2-48d6-85e4-92e6dace1387"
    show_table([("removed", path), ("kept", f"look at {path} first")])
    assert capsys.readouterr().out.split() == ["removed", path, "kept", "look", "at", path, "first"]


def test_colours_are_ours_alone(capsys: pytest.CaptureFixture[str]) -> None:
    show_table([("ok", "\x1b[31mx"), ("warn", "y")], colours={"ok": "green"})
    assert capsys.readouterr().out == f"{click.unstyle('ok')}    \\x1b[31mx\nwarn  y\n", "no terminal, no colours"


@dataclass
class _Record:
    name: str


def test_json_keeps_what_can_be_encoded(capsys: pytest.CaptureFixture[str]) -> None:
    show_json([_Record("\x1b[31mä\n"), _Record("caf\udce9")])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert json.loads(out) == [{"name": "\x1b[31mä\n"}, {"name": r"caf\xe9"}]


@pytest.mark.parametrize("path", sorted(Path(csi_driver.cli.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_no_command_prints_past_what_makes_it_printable(path: Path) -> None:
    if path.name in {"output.py", "main.py"}:
        return
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert not called & {"click.echo", "click.secho", "print", "sys.stdout.write", "sys.stderr.write"}
