import os
import subprocess
import sys
from pathlib import Path

from csi_driver.host.holders import Holder, Holders, describe


def test_a_process_is_told_with_its_number_and_name() -> None:
    assert describe([Holder(7, "mkfs.ext4", "sleeping", "has /dev/dm-0 open as fd/3")]) == (
        "process 7 (mkfs.ext4): has /dev/dm-0 open as fd/3"
    )


def test_a_process_that_cannot_be_killed_is_told() -> None:
    assert "state D" in describe([Holder(7, "dd", "disk-sleep", "x")])
    assert "state D" not in describe([Holder(7, "dd", "running", "x")])


def test_the_kernel_has_no_number() -> None:
    assert describe([Holder(0, "", "", "device /dev/dm-1 is on top of it")]) == "device /dev/dm-1 is on top of it"


def test_only_the_first_few_are_told() -> None:
    text = describe([Holder(n, "sh", "sleeping", "x") for n in range(1, 9)], limit=3)
    assert text.count("process") == 3
    assert text.endswith("and 5 more")
    assert "more" not in describe([Holder(n, "sh", "sleeping", "x") for n in range(1, 4)], limit=3)


def test_nobody_is_told_as_well() -> None:
    assert describe([]) == "a user that could not be found"


def test_processes_with_a_file_open_are_found(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    code = "import sys; file = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        with path.open("rb"):
            found = {holder.pid: holder for holder in Holders().of_file(path)}
        assert set(found) == {os.getpid(), child.pid}
        assert str(path) in found[child.pid].what
        assert found[child.pid].state in ("sleeping", "running")
    assert Holders().of_file(path) == []


def test_a_hard_link_is_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    os.link(path, tmp_path / "other")
    with path.open("rb"):
        assert [holder.pid for holder in Holders().of_file(tmp_path / "other")] == [os.getpid()]


def test_an_absent_file_has_no_holders(tmp_path: Path) -> None:
    assert Holders().of_file(tmp_path / "absent") == []


def test_a_device_that_does_not_exist_has_no_holders() -> None:
    assert Holders().of_device(4095, 1048575) == []
    assert Holders().of_mount((4095, 1048575)) == []
