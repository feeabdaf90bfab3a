"""docs/tutorial.md, done as it stands there: the commands, and what the text says of them."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.cli.serve import serve
from tests.machine.leaks import Facts

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy/systemd/luks-csi.service"
STATE = "/var/lib/luks-csi"
_OF_THE_MACHINE = ("Install", "The server")  # they change the machine itself: read below, and not run


def sections() -> dict[str, str]:
    """The commands below each heading."""
    text = (ROOT / "docs/tutorial.md").read_text()
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)[1:]
    return {
        heading: "\n".join(re.findall(r"^```sh\n(.*?)^```", body, re.MULTILINE | re.DOTALL))
        for heading, body in zip(parts[::2], parts[1::2], strict=True)
    }


def exec_start() -> list[str]:
    (line,) = re.findall(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
    return str(line).split()


@pytest.fixture
def environment(folder: Path) -> Iterator[dict[str, str]]:
    """A server as the unit starts it, but for where it keeps things."""
    place = {
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "LUKS_CSI_STATE_DIR": str(folder / "state"),
        "LUKS_CSI_ENDPOINT": str(folder / "csi.sock"),
        "LUKS_CSI_NODE_ID": "node-1",
        "LUKS_CSI_FREE_SPACE_FLOOR": "64Mi",
    }
    server = subprocess.Popen(["luks-csi", *exec_start()[1:]], env=place)
    try:
        while not (folder / "csi.sock").exists():
            assert server.poll() is None
            time.sleep(0.05)
        yield place
    finally:
        server.terminate()
        assert server.wait(60) == 0


def test_it_is_done_from_the_first_volume_to_the_end(folder: Path, environment: dict[str, str]) -> None:
    before = Facts.now(folder)
    told = sections()
    assert list(told)[:2] == list(_OF_THE_MACHINE)
    said = {}
    for heading, commands in told.items():
        if heading in _OF_THE_MACHINE:
            continue
        places = {STATE: environment["LUKS_CSI_STATE_DIR"], "/mnt": str(folder)}
        script = re.sub("|".join(places), lambda found: places[found[0]], commands)  # noqa: B023 - called here
        done = subprocess.run(
            ["bash", "-ec", script],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{heading}: {done.stderr}"
        said[heading] = done.stdout
    assert "buy oak" in said["A first volume"]
    assert "published at" in said["A first volume"]
    assert "volume notes has 2Gi" in said["Enlarge it"]
    assert re.search(r"^health +closed$", said["Close it"], re.MULTILINE)
    assert "buy oak" in said["Another passphrase"]
    assert said["Clean up"].endswith("volume notes is deleted\n")
    assert [path.name for path in folder.iterdir() if path.suffix in {".key", ".bytes", ".header"}] == ["new.key"]
    assert not [line for line in Facts.now(folder).more_than(before) if not line.startswith("files:")]


def test_the_unit_starts_what_there_is() -> None:
    program, command, *options = exec_start()
    assert (program, command) == ("/opt/luks-csi/bin/luks-csi", "serve")
    known = {name for parameter in serve.params for name in parameter.opts}
    assert {option.partition("=")[0] for option in options} <= known
    install = sections()["Install"]
    assert "python3 -m venv /opt/luks-csi" in install
    assert str(UNIT.relative_to(ROOT)) in sections()["The server"]
