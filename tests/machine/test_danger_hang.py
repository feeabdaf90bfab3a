"""Devices and processes that hang, hold, or hide: every call ends in its time with words that help.

Field problems 12, 13, 14, 16 and 37.
"""

import gc
import os
import signal
import socket
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest

from csi_driver.host.commands import Commands
from csi_driver.host.workers import Workers
from csi_driver.model.errors import (
    Aborted,
    DeadlineExceeded,
    DeviceInUse,
    DeviceUnreadable,
    DriverError,
    FailedPrecondition,
)
from csi_driver.volumes.driver import WARM
from tests.machine.block_backend import BlockBackend, FaultyDevice
from tests.machine.node import BLOCK, CHEAP, DATA_OFFSET, LIMITS, MIB, SIZE, VOLUME, Node
from tests.machine.places import IN_GROUP, skip_elsewhere
from tests.machine.processes import first_pid, launcher_inside, wait_for

P = ParamSpec("P")
R = TypeVar("R")

SECONDS = 2.0
TIGHT = replace(LIMITS, format_seconds=SECONDS, unlock_seconds=SECONDS, mount_seconds=SECONDS)
# Besides the limit: 2 s for the kill, 3 s for a mapping to become free, up to 6 s of looking at all processes for who
# keeps it, 2 s for the device to close. The rest is for slow machines; without limits it would be for ever.


@pytest.fixture
def disk(folder: Path) -> Iterator[FaultyDevice]:
    skip_elsewhere("own disk")
    disk = FaultyDevice(folder / "disk", SIZE + DATA_OFFSET)
    yield disk
    disk.close()


class HangingWorkers(Workers):
    """The disk stops answering just before the work whose name begins with `step`."""

    def __init__(self, disk: FaultyDevice, step: str) -> None:
        super().__init__(WARM)
        self._disk, self.step = disk, step

    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.step and what.startswith(self.step):
            self.step = ""
            self._disk.suspend()
        return super().call(what, timeout, function, *args, **kwargs)


def succeeds_again(call: Callable[[], None]) -> None:
    """What kubelet's repetitions come to once the device answers."""

    def attempt() -> bool:
        try:
            call()
        except (Aborted, DeviceInUse, DeadlineExceeded):
            return False
        return True

    wait_for(attempt, "the end of what hung", 30)


@pytest.mark.parametrize("step", ["luks-blank", "luks-format", "mkfs.ext4", "luks-mount"])
def test_lh11510_a_device_that_hangs_ends_in_an_error(folder: Path, disk: FaultyDevice, step: str) -> None:
    """State D cannot be killed: the call ends all the same, names the device, and a later one succeeds."""
    workers = HangingWorkers(disk, step)
    try:
        backend = BlockBackend({VOLUME: disk.path})
        node = Node(folder, workers, TIGHT, backend)
        node.create()
        with pytest.raises(DeadlineExceeded, match=rf"(volume {VOLUME}|luks-{VOLUME}).*did not end within") as ended:
            node.stage()
        disk.resume()
        succeeds_again(node.stage)
        node.write()
        assert node.read() == "precious"
        succeeds_again(node.unstage)
        assert node.closed()
    finally:
        workers.stop()
    # A program that could not be killed was left to itself: of that, here, no warning.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del ended
        gc.collect()


@pytest.mark.parametrize("step", ["luks-open", "luks-umount"])
def test_lh13467_a_volume_with_data_whose_device_hangs(folder: Path, disk: FaultyDevice, step: str) -> None:
    workers = HangingWorkers(disk, "")
    try:
        node = Node(folder, workers, TIGHT, BlockBackend({VOLUME: disk.path}))
        node.staged_once()
        workers.step = step
        call: Callable[[], None] = node.stage
        if step == "luks-umount":
            node.stage()
            node.write("dirty")
            call = node.unstage
        with pytest.raises(DeadlineExceeded, match=f"volume {VOLUME}"):
            call()
        disk.resume()
        succeeds_again(node.unstage)
        succeeds_again(node.stage)
        assert node.read() == ("dirty" if step == "luks-umount" else "precious")
        succeeds_again(node.unstage)
        assert node.closed()
    finally:
        workers.stop()


def test_lh13561_a_stopped_worker_is_killed_in_its_time(folder: Path, own_workers: Callable[[], Workers]) -> None:
    node = Node(folder, own_workers(), TIGHT)
    node.create(parameters={"encrypted": "true", "pbkdfMemory": "16384", "pbkdfIterations": "16"})

    def stop() -> None:
        os.kill(wait_for(lambda: first_pid("luks-format"), "luksFormat"), signal.SIGSTOP)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(DeadlineExceeded, match=f"luks-format of volume {VOLUME} .* was killed"):
        node.stage()
    assert node.closed()
    patient = Node(folder, node.workers)
    patient.stage()
    patient.unstage()


def test_lh13603_who_keeps_files_open_is_named(used: Node) -> None:
    used.stage()
    with (used.staging_path() / "file").open("rb"):
        words = rf"volume {VOLUME} cannot be unmounted .* kept busy by process {os.getpid()} \(.*\)"
        with pytest.raises(DeviceInUse, match=words):
            used.unstage()
    used.unstage()


def test_lh13603_a_holder_in_another_mount_namespace_is_named(used: Node) -> None:
    """A pod that started while the volume was mounted has the mount in its own namespace, for as long as it lives."""
    used.stage()
    with subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sleep", "300"]) as holder:
        try:
            wait_for(lambda: Path(f"/proc/{holder.pid}/comm").read_text() == "sleep\n", "the other namespace")
            with pytest.raises(DeviceInUse) as busy:
                used.unstage()
        finally:
            holder.kill()
    assert f"process {holder.pid} (sleep)" in str(busy.value)
    assert f"mounted at {used.staging_path()} in mount namespace mnt:[" in str(busy.value)
    used.unstage()
    assert used.closed()
    used.stage()
    assert used.read() == "precious"
    used.unstage()


def test_lh13603_who_has_the_device_open_is_named(used: Node) -> None:
    used.stage(capability=BLOCK)
    with (
        open(used.open_mapping().path, "rb", buffering=0),
        pytest.raises(DeviceInUse, match=rf"luks-{VOLUME} cannot be closed: .*process {os.getpid()} \(.* open as fd/"),
    ):
        used.unstage()
    used.unstage()


def test_bootc2089_nothing_waits_for_a_udev_that_does_not_answer(
    used: Node, own_workers: Callable[[], Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container sees the host's /run/udev and not its semaphores: libdevmapper would wait for a cookie for good."""
    monkeypatch.delenv("DM_DISABLE_UDEV", raising=False)
    control = Path("/run/udev/control")
    pretended = not control.exists()
    if pretended:
        control.parent.mkdir(exist_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as nobody:
            nobody.bind(str(control))
    try:
        alone = Node(used.folder, own_workers(), TIGHT)
        alone.stage()
        assert alone.read() == "precious"
        alone.unstage()
    finally:
        if pretended:
            control.unlink()


def test_osc_bsu835_run_cryptsetup_is_neither_needed_nor_made(used: Node) -> None:
    """A hardened pod has a read-only root: /run/cryptsetup is absent and cannot be made."""
    locks = "mkdir -p /run/lock/lvm && mount -o remount,ro /run && mount -t tmpfs none /run/lock/lvm"  # as in the pod
    script = f'mount -t tmpfs none /run && {locks if IN_GROUP else "mount -o remount,ro /run"} && exec "$@"'
    workers = Workers(WARM, launcher_inside("unshare", "--mount", "sh", "-c", script, "sh"))
    try:
        hardened = Node(used.folder, workers)
        assert not workers.call("luks-look", 20, os.path.exists, "/run/cryptsetup")
        hardened.stage(capability=BLOCK)
        hardened.unstage()
        hardened.create("pvc-2")
        hardened.stage("pvc-2", BLOCK)
        hardened.unstage("pvc-2")
    finally:
        workers.stop()


def test_lh7033_an_error_names_volume_device_cause_and_remedy(
    folder: Path, workers: Workers, disk: FaultyDevice
) -> None:
    """Not "exit status 5": an unreadable device below a volume that was used as a block device."""
    node = Node(folder, workers, backend=BlockBackend({VOLUME: disk.path}))
    node.create(capability=BLOCK)
    node.stage(capability=BLOCK)
    node.unstage()
    disk.fail(DATA_OFFSET, MIB)
    with pytest.raises(DeviceUnreadable) as failed:
        node.stage()
    for words in (VOLUME, "/dev/", "I/O error", "check"):
        assert words in str(failed.value).replace("Input/output", "I/O")
    assert node.closed()


def test_trident982_a_program_that_fails_is_quoted(folder: Path, workers: Workers, disk: FaultyDevice) -> None:
    node = Node(folder, workers, backend=BlockBackend({VOLUME: disk.path}))
    node.create(parameters={**CHEAP, "mkfsOptions": "-I 131072"})
    with pytest.raises(DriverError) as failed:
        node.stage()
    assert f"/dev/mapper/luks-{VOLUME}" in str(failed.value)
    assert "mkfs.ext4" in str(failed.value)
    assert "131072" in str(failed.value)
    assert node.closed()


def test_lh7033_a_program_that_is_not_installed_is_named(workers: Workers) -> None:
    with pytest.raises(FailedPrecondition, match=r"program mkfs\.none is not installed on this node; install"):
        Commands(workers).run(["mkfs.none"], timeout=1)
