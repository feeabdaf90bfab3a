"""Swap, disks, memory and processes, told from psutil and, where it does not tell, from the kernel's own files."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from csi_driver.host.machine import Machine, process_facts


def device_of(path: Path) -> str:
    number = path.stat().st_dev
    return f"{os.major(number)}:{os.minor(number)}"


def machine_with(folder: Path, swap_file: Path, facts: dict[str, str]) -> Machine:
    """A machine with one swap file, on a device of which `facts` are below /sys/dev/block."""
    swaps = folder / "swaps"
    name = str(swap_file).replace(" ", "\\040")
    swaps.write_text(f"Filename\tType\tSize\tUsed\tPriority\n{name} file\t1024\t0\t-2\n")
    for path, content in facts.items():
        (folder / "block" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "block" / path).write_text(content)
    return Machine(swaps, folder / "block")


@pytest.fixture
def swap_file(tmp_path: Path) -> Path:
    path = tmp_path / "swap file"
    path.touch()
    return path


def test_swap_on_a_bare_disk_is_told(tmp_path: Path, swap_file: Path) -> None:
    machine = machine_with(tmp_path, swap_file, {f"{device_of(swap_file)}/size": "1"})
    assert machine.swap().plain == (str(swap_file),)


def test_swap_that_this_container_does_not_see_is_not_known_to_be_encrypted(tmp_path: Path) -> None:
    assert machine_with(tmp_path, tmp_path / "gone", {}).swap().plain == (f"{tmp_path}/gone",)


@pytest.mark.parametrize(
    ("facts", "safe"),
    [
        ({"dm/uuid": "CRYPT-PLAIN-cryptswap\n"}, True),
        ({"dm/uuid": "LVM-abc\n", "slaves/dm-0/dm/uuid": "CRYPT-LUKS2-x"}, True),
        ({"dm/uuid": "LVM-abc\n", "slaves/dm-0/dm/uuid": "CRYPT-LUKS2-x", "slaves/sda2/size": "1"}, False),
        ({"dm/uuid": "LVM-abc\n", "slaves/sda2/size": "1"}, False),
        ({"backing_dev": "none\n"}, True),
        ({"backing_dev": "/dev/sda3\n"}, False),
    ],
)
def test_swap_is_encrypted_where_everything_below_it_is(
    tmp_path: Path, swap_file: Path, facts: dict[str, str], *, safe: bool
) -> None:
    device = device_of(swap_file)
    machine = machine_with(tmp_path, swap_file, {f"{device}/{name}": content for name, content in facts.items()})
    assert machine.swap().plain == (() if safe else (str(swap_file),))


def test_this_machine_is_told_without_a_warning(tmp_path: Path) -> None:
    machine = Machine()
    assert machine.swap().total == int(Path("/proc/meminfo").read_text().split("SwapTotal:")[1].split()[0]) << 10
    assert machine.available_memory() > 0
    disk = machine.disk(tmp_path)
    status = os.statvfs(tmp_path)
    assert disk.total == status.f_blocks * status.f_frsize
    assert any((disk.device, disk.fs_type) == tuple(line.split()[i] for i in (0, 2))
               for line in Path("/proc/self/mounts").read_text().splitlines())  # fmt: skip


def test_the_driver_is_this_process_and_its_children() -> None:
    alone = Machine().own_processes()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        both = Machine().own_processes()
        assert child.pid in {each.pid for each in psutil.Process().children()}
    assert both.count == alone.count + 1
    assert both.resident > alone.resident > 0


def test_a_process_is_told_by_name_and_state() -> None:
    with subprocess.Popen(["sleep", "600"]) as child:
        try:
            while process_facts(child.pid).name != "sleep":
                pass
            assert process_facts(child.pid).state in ("sleeping", "running")
        finally:
            child.kill()
    assert process_facts(child.pid).name == "?"


def test_the_name_of_a_process_is_not_read_out_of_its_memory(tmp_path: Path) -> None:
    """What is longer than the kernel's own name is to be had there alone, and a process that hangs may lock it."""
    program = tmp_path / "a-name-longer-than-the-kernels"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "600"]) as child:
        try:
            while process_facts(child.pid).name != program.name[:15]:
                assert not process_facts(child.pid).name.startswith(program.name[:16])
        finally:
            child.kill()


def test_starting_a_server_loads_no_psutil(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import csi_driver.cli.serve, csi_driver.host.launcher, csi_driver.rpc.server
from csi_driver.model.settings import Settings
from csi_driver.volumes.driver import build_driver
folder = Path(sys.argv[1])
driver = build_driver(Settings(node_id="n", state_dir=folder / "state", endpoint=folder / "csi.sock"))
driver.start()
driver.health.obstacle()
driver.stop()
sys.exit("psutil" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
