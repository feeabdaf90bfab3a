"""The machine that the other tests run in: what goes in and comes out of it, and that nothing of it stays."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine.guest_uml import Guest, GuestConfig, GuestError, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

BOOT = 30  # seconds that a boot may take here; it takes 2 on an idle machine
RUN = [sys.executable, "-m", "tests.machine.guest"]
ROOT = Path(__file__).parents[2]
EVERY_BYTE = bytes(range(256)) * 1024


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def left(scratch: Path) -> list[str]:
    """What is there of a guest: its folder, and every process that names it."""
    found = [str(scratch)] if scratch.exists() else []
    return found + [f"{pid}: {command}" for pid, command in processes_of(scratch).items()]


def processes_of(scratch: Path) -> dict[int, str]:
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            command = Path("/proc", entry, "cmdline").read_bytes()
            if os.fsencode(scratch) in command:
                found[int(entry)] = command.decode(errors="replace")
    return found


def sessions_of(scratch: Path) -> set[int]:
    found = set()
    for pid in processes_of(scratch):
        with contextlib.suppress(ProcessLookupError):  # a thread of the kernel's that has ended since
            found.add(os.getsid(pid))
    return found


def until_output(guest: Guest, wanted: bytes) -> None:
    deadline = time.monotonic() + BOOT
    while wanted not in guest.output():
        assert time.monotonic() < deadline, guest.output("stderr")
        time.sleep(0.02)


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Guest(GuestConfig(memory=512 << 20, disk_size=256 << 20)) as guest:
        yield guest


def test_output_and_exit_code_come_back_as_from_a_command_run_here() -> None:
    # The second runner finds device-mapper and runs the command itself.
    program = (
        "import sys; data = bytes(range(256)) * 1024; sys.stdout.buffer.write(data);"
        "sys.stderr.buffer.write(data[::-1]); sys.exit(7)"
    )
    command = [*RUN, "--", *RUN, "--", *python(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=BOOT)
    assert done.returncode == 7
    assert done.stdout == EVERY_BYTE
    assert done.stderr == EVERY_BYTE[::-1]


def test_it_is_a_machine_with_device_mapper_on_a_root_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("of the host")
    script = f"""
    test -c /dev/mapper/control && test -d /sys/module/dm_crypt && cat mine && pwd
    modprobe dm-flakey && test -d /sys/module/dm_flakey && ! modprobe no-such-module
    for folder in / {ROOT} {tmp_path}; do
        touch $folder/guest-was-here && exit 1
    done
    test $(stat -fc %T $MACHINE_STATE) = ext2/ext3 && echo $NAME >$MACHINE_OUT/result
    kill -TERM $$
    """
    (out := tmp_path / "out").mkdir()
    config = GuestConfig(disk_size=256 << 20, out=out, env={"NAME": "from the caller"}, cwd=tmp_path)
    with Guest(config) as guest:
        guest.start(["sh", "-c", script])
        assert guest.wait(BOOT) == 128 + signal.SIGTERM, guest.output("stderr")
        assert guest.output().decode() == f"of the host{tmp_path}\n"
        assert guest.output("stderr").count(b"Read-only file system") == 3
    assert (out / "result").read_text() == "from the caller\n"
    assert not any((folder / "guest-was-here").exists() for folder in (Path("/"), ROOT, tmp_path))


def test_what_was_synced_outlives_a_crash_and_a_command_that_is_not_there_is_told(guest: Guest) -> None:
    guest.start(
        python(
            "import os, time; os.chdir('/mnt/state');"
            "file = os.open('synced', os.O_CREAT | os.O_WRONLY); os.write(file, b'kept'); os.fsync(file);"
            "os.fsync(os.open('.', os.O_RDONLY)); open('unsynced', 'w').write('lost');"
            "print('written', flush=True); time.sleep(600)"
        )
    )
    until_output(guest, b"written\n")
    guest.kill()
    guest.start(["sh", "-c", "cd /mnt/state && cat synced && ! cat unsynced 2>/dev/null"])
    assert guest.wait(BOOT) == 0
    assert guest.output() == b"kept"
    guest.start(["no-such-command"])
    assert guest.wait(BOOT) == 127
    assert guest.output("stderr") == b"no-such-command: No such file or directory\n"


def test_a_folder_of_its_own_hides_the_hosts_but_for_what_it_must_see(tmp_path: Path) -> None:
    log = tmp_path / "kernel.log"
    config = GuestConfig(disk_size=256 << 20, own=["/var/lib"], shown=[Path("/var/lib/dpkg")], kernel_log=log)
    with Guest(config) as guest:
        for _ in range(2):
            guest.start(["sh", "-c", "ls /var/lib && test -e /var/lib/dpkg/status && touch /var/lib/new"])
            assert guest.wait(BOOT) == 0, guest.output("stderr")
            assert guest.output() == b"dpkg\n"
    assert log.read_text().count("Linux version") == 2


def test_a_time_limit_ends_it_tells_what_was_stuck_and_nothing_is_left(guest: Guest) -> None:
    scratch = guest.disk.parent
    guest.start(["sh", "-c", "fsfreeze --freeze $MACHINE_STATE && echo frozen && exec tee $MACHINE_STATE/file"])
    until_output(guest, b"frozen\n")
    assert left(scratch)
    with pytest.raises(GuestError, match=r"its command still ran after 3 s, in state D: tee \(\d+\) in \w+\.$"):
        guest.wait(3)
    guest.__exit__(None, None, None)
    assert left(scratch) == []


def test_nothing_is_left_of_one_with_a_terminal() -> None:
    """For each its kernel has a process with a session of its own, which nobody ends but the kernel."""
    ours, theirs = pty.openpty()
    try:
        with Guest(GuestConfig(memory=512 << 20, disk_size=256 << 20, terminal=theirs)) as guest:
            scratch = guest.disk.parent
            guest.start(["sleep", "600"])
            deadline = time.monotonic() + BOOT
            while len(sessions_of(scratch)) < 3:  # guard and kernel
                assert time.monotonic() < deadline, left(scratch)
                time.sleep(0.1)
        assert left(scratch) == []
    finally:
        os.close(ours)
        os.close(theirs)


def test_nothing_is_left_when_its_starter_is_killed(tmp_path: Path) -> None:
    starter = subprocess.Popen([*RUN, "sleep", "600"], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + BOOT
    while not (booting := list(tmp_path.glob("*/kernel.log"))):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    starter.kill()
    starter.wait(BOOT)
    scratch = booting[0].parent
    while left(scratch):
        assert time.monotonic() < deadline, left(scratch)
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("echo c >/proc/sysrq-trigger", "The guest's kernel panicked: sysrq triggered crash."),
        ("echo o >/proc/sysrq-trigger; sleep 60", "The guest went down before its command ended (linux.uml exited 0)."),
    ],
)
def test_a_kernel_that_goes_down_is_told_with_the_end_of_its_log(guest: Guest, command: str, sentence: str) -> None:
    guest.start(["sh", "-c", command])
    with pytest.raises(GuestError) as caught:
        guest.wait(BOOT)
    assert str(caught.value) == sentence
    assert "sysrq" in caught.value.log


def test_memory_that_runs_out_is_told(guest: Guest) -> None:
    guest.start(["sh", "-c", f"{sys.executable} -c 'kept = [b\"x\" * 2**20 for _ in range(2**10)]' || true"])
    with pytest.raises(
        GuestError, match=r"^The guest's 512 MiB of memory ran out and python.* was killed: give it more"
    ):
        guest.wait(10 * BOOT)  # before it kills, the kernel looks for memory: on a busy machine for long


def test_without_root_one_sentence_says_so() -> None:
    program = "import os, sys; from tests.machine.guest import main; os.seteuid(65534); sys.exit(main(['--', 'true']))"
    done = subprocess.run(python(program), cwd=ROOT, capture_output=True, text=True, check=False, timeout=BOOT)
    assert done.returncode == 1
    assert done.stderr == "The machine tests need root, for device-mapper or for the guest: run this as root.\n"
