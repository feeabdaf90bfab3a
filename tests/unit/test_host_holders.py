import os
import subprocess
import sys
import threading
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


def test_a_process_whose_memory_map_nobody_can_read_holds_up_no_search(tmp_path: Path) -> None:
    """Such is one that waits in a page fault for a device that does not answer; one thread is left with it."""
    before = threading.active_count()
    for pid in (1, 2, 3):
        folder = tmp_path / str(pid)
        (folder / "ns").mkdir(parents=True)
        (folder / "ns" / "mnt").symlink_to("mnt:[1]")
        (folder / "mountinfo").write_bytes(b"")
    (tmp_path / "2" / "maps").write_bytes(b"7f00-7f01 r--p 00000000 fff:fffff 12 /file\n")
    (tmp_path / "1" / "maps").write_bytes(b"")
    os.mkfifo(tmp_path / "3" / "maps")
    try:
        for _ in range(4):
            found = Holders(str(tmp_path)).of_mount((0xFFF, 0xFFFFF))
            assert [(holder.pid, holder.what) for holder in found] == [(2, "has a file in it mapped into memory")]
        assert threading.active_count() <= before + 2
    finally:
        os.close(os.open(tmp_path / "3" / "maps", os.O_RDWR))
