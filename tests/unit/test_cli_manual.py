"""Completion, the man page, version and colours: as people expect them of a command line."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import csi_driver
from csi_driver.cli.main import luks_csi
from csi_driver.cli.manual import man_page
from csi_driver.model.settings import Settings
from csi_driver.volumes.driver import build_driver
from tests.cli import run_cli
from tests.unit.test_docs import commands

PROGRAM = Path(sys.executable).with_name("luks-csi")


def completed(state_dir: Path, *words: str) -> list[str]:
    """What bash offers behind these words."""
    environment = {
        "PATH": os.environ["PATH"],
        "LUKS_CSI_STATE_DIR": str(state_dir),
        "_LUKS_CSI_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("luks-csi", *words)),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run([PROGRAM], capture_output=True, text=True, check=True, timeout=120, env=environment)
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    for folder in ("loopfile/volumes/data", "loopfile/volumes/other", "images/ready/debian"):
        (tmp_path / folder).mkdir(parents=True)
    assert list(build_driver(Settings(state_dir=tmp_path)).backend.ids()) == ["data", "other"]
    return tmp_path


def test_a_shell_completes_commands_options_and_names(state: Path) -> None:
    assert completed(state, "vol") == ["volume"]
    assert completed(state, "volume", "un") == ["unpublish", "unstage"]
    assert completed(state, "volume", "stage", "--passphrase") == ["--passphrase-file"]
    assert completed(state, "volume", "show", "d") == ["data"]
    assert completed(state, "volume", "check", "") == ["data", "other"]
    assert completed(state, "image", "inspect", "") == ["debian"]
    assert completed(state, "image", "clone", "--encryption", "") == ["ignore", "encrypt", "decrypt", "reencrypt"]
    assert completed(state / "nothing", "image", "inspect", "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_a_shell_is_printed(shell: str) -> None:
    done = run_cli("completion", shell)
    assert done.exit_code == 0
    assert f"_LUKS_CSI_COMPLETE={shell}_complete" in done.stdout


def test_bash_takes_its_completion() -> None:
    script = run_cli("completion", "bash").stdout + "\ncomplete -p luks-csi\n"
    done = subprocess.run(["bash", "--norc"], input=script, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.endswith("_luks_csi_completion luks-csi\n")
    assert done.stderr == ""


def test_the_man_page_has_every_command_and_option() -> None:
    text = run_cli("man").stdout
    assert text.splitlines() == list(man_page(luks_csi))
    plain = text.replace("\\-", "-")
    for name, command in commands():
        if not hasattr(command, "commands"):
            assert f".SS luks-csi {name}" in plain or name in ("volume", "image", "orphans"), name
    for option in ("--passphrase-file", "--encrypted", "--free-space-floor", "--verify", "--output"):
        assert f"{option}" in plain
    assert not [
        line
        for line in text.splitlines()
        if line.startswith(".") and not re.match(r"\.(TH|SH|SS|PP|TP|B|BR|I)\b", line)
    ]


def test_the_version_is_told() -> None:
    done = run_cli("--version")
    assert (done.exit_code, done.stdout) == (0, f"luks-csi {csi_driver.__version__}\n")


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True)]
)
def test_no_color_keeps_colours_from_a_terminal(environment: dict[str, str], coloured: bool) -> None:  # noqa: FBT001
    show = "from csi_driver.cli.output import show_table; show_table([('ok', 'x')], colours={'ok': 'green'})"
    show += "; from csi_driver.cli.logs import configure_logs; from csi_driver.model.settings import LogFormat"
    show += "; configure_logs(LogFormat.AUTO, 'info', 1); from csi_driver.host.log import log; log.info('serving')"
    ours, theirs = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    subprocess.run([sys.executable, "-c", show], stdout=theirs, env=kept | environment, check=True, timeout=120)
    os.close(theirs)
    seen = os.read(ours, 4096).decode()
    os.close(ours)
    assert "serving" in seen
    assert ("\x1b[" in seen) == coloured
