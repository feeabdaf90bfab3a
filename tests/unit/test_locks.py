"""One holder per volume, over threads, processes and children that outlive their parents."""

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import pytest

from csi_driver.host.held import held_descriptors
from csi_driver.host.holders import Holders
from csi_driver.host.locks import VolumeLocks
from csi_driver.model.errors import VolumeBusy
from tests.fake_host import NoHolders


@pytest.fixture
def locks(tmp_path: Path) -> VolumeLocks:
    return VolumeLocks(tmp_path, Holders())


def is_free(locks: VolumeLocks, volume_id: str = "pvc-1") -> bool:
    try:
        with locks.hold(volume_id):
            return True
    except VolumeBusy:
        return False


def test_a_second_call_of_this_process_is_told_at_once(locks: VolumeLocks) -> None:
    with locks.hold("pvc-1"):
        said = r"^another call on volume pvc-1 is still at work; call again"
        with pytest.raises(VolumeBusy, match=said), locks.hold("pvc-1"):
            pass
        assert is_free(locks, "pvc-2")
    assert is_free(locks)


def test_a_thread_is_no_exception(locks: VolumeLocks) -> None:
    with locks.hold("pvc-1"), ThreadPoolExecutor(1) as pool:
        assert not pool.submit(is_free, locks).result()
    assert is_free(locks)


def test_a_lock_is_free_after_an_error(locks: VolumeLocks) -> None:
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with contextlib.suppress(error), locks.hold("pvc-1"):
            raise error
        assert is_free(locks)
        assert held_descriptors() == ()


def test_what_is_held_is_known_to_the_call_and_to_nobody_else(locks: VolumeLocks) -> None:
    assert held_descriptors() == ()
    with locks.hold("pvc-1"):
        (one,) = held_descriptors()
        with locks.hold("pvc-2"):
            assert held_descriptors()[0] == one
            assert len(held_descriptors()) == 2
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(held_descriptors).result() == ()
        assert held_descriptors() == (one,)
        assert copy_context().run(held_descriptors) == (one,)
    assert held_descriptors() == ()


def test_no_descriptor_is_left_open(locks: VolumeLocks) -> None:
    with locks.hold("pvc-1"):
        gc.collect()  # what other tests have left
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            assert not is_free(locks)
            assert is_free(locks, "pvc-2")
        assert len(os.listdir("/proc/self/fd")) <= before


HOLD = """
import sys, time
from pathlib import Path
from csi_driver.host.holders import Holders
from csi_driver.host.locks import VolumeLocks
with VolumeLocks(Path(sys.argv[1]), Holders()).hold("pvc-1"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_named_and_its_death_frees_the_volume(locks: VolumeLocks, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        said = rf"an earlier operation on volume pvc-1 is still at work in process {other.pid} \(python"
        with pytest.raises(VolumeBusy, match=said), locks.hold("pvc-1"):
            pass
        other.kill()
        other.wait(10)
    assert is_free(locks)


def test_a_child_that_outlives_its_call_keeps_the_volume(locks: VolumeLocks) -> None:
    with locks.hold("pvc-1"):
        child = subprocess.Popen(["sleep", "60"], pass_fds=held_descriptors())
        stranger = subprocess.Popen(["sleep", "60"])
    try:
        with pytest.raises(VolumeBusy, match=rf"in process {child.pid} \(sleep"), locks.hold("pvc-1"):
            pass
        child.kill()
        child.wait(10)
        assert is_free(locks)
    finally:
        for process in (child, stranger):
            process.kill()
            process.wait(10)


def test_a_lock_file_stays_for_a_volume_that_is_there_and_goes_with_one_that_is_not(tmp_path: Path) -> None:
    locks = VolumeLocks(tmp_path, NoHolders(), {"pvc-1"}.__contains__)
    for volume_id in ("pvc-1", "unknown"):
        with locks.hold(volume_id):
            assert (tmp_path / volume_id).exists()
    assert os.listdir(tmp_path) == ["pvc-1"]


def test_the_lock_file_of_a_gone_volume_stays_while_a_child_of_its_last_call_lives(tmp_path: Path) -> None:
    """A worker that hangs on the device of a volume that was deleted: the next one of that name must wait for it."""
    locks = VolumeLocks(tmp_path, Holders(), lambda _: False)
    with locks.hold("pvc-1"):
        child = subprocess.Popen(["sleep", "60"], pass_fds=held_descriptors())
    try:
        with pytest.raises(VolumeBusy, match=rf"in process {child.pid} \(sleep"), locks.hold("pvc-1"):
            pass
    finally:
        child.kill()
        child.wait(10)
    assert is_free(locks)
    assert not list(tmp_path.iterdir())


def test_a_removed_lock_file_does_not_let_a_later_call_in_beside_a_holder_of_the_new_one(
    locks: VolumeLocks, tmp_path: Path
) -> None:
    """Who opened the file before it was removed with its volume holds a lock on nothing."""
    with locks.hold("pvc-1"):
        late = os.open(tmp_path / "pvc-1", os.O_RDWR)
        (tmp_path / "pvc-1").unlink()
        with locks.hold("pvc-1"):  # a new volume of that name, as the old call is about to end
            assert os.fstat(late).st_ino != (tmp_path / "pvc-1").stat().st_ino
            assert not is_free(locks)
    os.close(late)


def test_a_link_in_place_of_a_lock_is_not_followed(locks: VolumeLocks, tmp_path: Path) -> None:
    (tmp_path / "pvc-1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"symbolic links"), locks.hold("pvc-1"):
        pass
    assert not (tmp_path / "elsewhere").exists()


class Room:
    """Counts who is in it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._inside = 0
        self.entered = 0
        self.most = 0

    def enter(self) -> None:
        with self._guard:
            self._inside += 1
            self.entered += 1
            self.most = max(self.most, self._inside)

    def leave(self) -> None:
        with self._guard:
            self._inside -= 1


def test_hammered_by_calls_that_delete_the_volume_there_is_never_a_second_holder(tmp_path: Path) -> None:
    locks, room, end = VolumeLocks(tmp_path, NoHolders(), lambda _: False), Room(), time.monotonic() + 1.0

    def work() -> None:
        while time.monotonic() < end:
            with contextlib.suppress(VolumeBusy), locks.hold("pvc-1"):
                room.enter()
                os.sched_yield()
                room.leave()
            os.sched_yield()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert room.entered > 50
    assert room.most == 1
