"""Programs: run without a shell, bounded in time, in a clean environment; their failures in one sentence."""

import contextlib
import os
import pickle
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from csi_driver.host.commands import Commands, ProgramFailed, run_program
from csi_driver.host.locks import VolumeLocks
from csi_driver.host.workers import Workers
from csi_driver.model.errors import CommandFailed, DeadlineExceeded, DriverError, FailedPrecondition
from tests import worker_tasks as tasks
from tests.fake_host import NoHolders
from tests.handles import handle_on
from tests.unit.test_workers import children, ended, wait_for


class Programs:
    """Shell scripts in a folder, to be run by their full name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, script: str, name: str = "program", mode: int = 0o755) -> str:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(mode)
        return str(path)


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path)


def test_what_a_program_said_comes_back(programs: Programs) -> None:
    found = run_program([programs.make("echo out; echo err >&2")], timeout=10)
    assert (found.code, found.stdout, found.stderr) == (0, "out\n", "err\n")


def test_a_long_answer_comes_back_whole(programs: Programs) -> None:
    """A report of some thousand logical volumes; an answer of a worker alone has 124 KiB."""
    workers = Workers(())
    commands = Commands(workers)
    try:
        told = commands.read([programs.make("seq 1 200000; echo err >&2")], timeout=60)
        assert told.split() == [str(number) for number in range(1, 200_001)]
        with pytest.raises(ProgramFailed, match=r"exit code 3: why$"):
            commands.read([programs.make("seq 1 9; echo why >&2; exit 3")], timeout=60)
    finally:
        workers.stop()


def test_arguments_arrive_as_they_are(programs: Programs, tmp_path: Path) -> None:
    arguments = ["$(touch pwned)", "; touch pwned", "a b", "", "*", "\n", "--", "`id`", "'", '"', "é", "\\"]
    found = run_program([programs.make('printf "%s\\0" "$@"'), *arguments], timeout=10)
    assert found.stdout.split("\0")[:-1] == arguments
    assert not (tmp_path / "pwned").exists()
    assert not Path("pwned").exists()


def test_exit_codes_mean_success_only_where_the_call_says_so(programs: Programs) -> None:
    program = programs.make('exit "$1"')
    assert run_program([program, "3"], timeout=10, ok_codes=(0, 3)).code == 3
    for code in (1, 2, 4, 255):
        with pytest.raises(ProgramFailed) as caught:
            run_program([program, str(code)], timeout=10, ok_codes=(0, 3))
        assert caught.value.code == code
    with pytest.raises(ProgramFailed):
        run_program([programs.make("exit 0")], timeout=10, ok_codes=(1,))


def test_a_failure_is_one_sentence_with_the_last_line_of_stderr(programs: Programs) -> None:
    program = programs.make("echo ignored; echo first >&2; echo 'No space left on device' >&2; echo >&2; exit 7")
    with pytest.raises(ProgramFailed) as caught:
        run_program([program, "a b"], timeout=10)
    assert str(caught.value) == f"{program} 'a b' ended with exit code 7: No space left on device"
    assert isinstance(caught.value, CommandFailed)
    assert caught.value.stderr == "first\nNo space left on device"
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 -- our own
    assert (str(again), again.code, again.argv) == (str(caught.value), 7, (program, "a b"))


def test_silence_and_signals_are_told_too(programs: Programs) -> None:
    with pytest.raises(ProgramFailed, match=r"exit code 1: nothing on stderr$"):
        run_program([programs.make("exit 1")], timeout=10)
    with pytest.raises(ProgramFailed, match=r"was ended by signal 9: nothing on stderr$"):
        run_program([programs.make("kill -9 $$")], timeout=10)


def test_what_is_no_text_does_not_hide_the_failure(programs: Programs) -> None:
    with pytest.raises(ProgramFailed, match="exit code 1: \ufffd\ufffd"):
        run_program([programs.make("printf '\\377\\376' >&2; exit 1")], timeout=10)


def test_much_output_does_not_stop_a_program(programs: Programs) -> None:
    program = programs.make("head -c 300000 /dev/zero | tr '\\0' x; head -c 300000 /dev/zero | tr '\\0' y >&2")
    found = run_program([program], timeout=20)
    assert (len(found.stdout), len(found.stderr)) == (16384, 16384)


def test_a_program_that_takes_too_long_is_killed_with_its_children(programs: Programs, tmp_path: Path) -> None:
    program = programs.make(
        f"trap '' TERM INT HUP; sleep 60 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/pid; wait"
    )
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=rf"^{re.escape(program)} did not end within 0.4 s and was killed$"):
        run_program([program], timeout=0.4)
    assert time.monotonic() - begun < 5
    pids = [int((tmp_path / name).read_text()) for name in ("pid", "child")]
    wait_for(lambda: all(map(ended, pids)))


def test_a_killed_program_does_not_keep_the_volume_locked(programs: Programs, tmp_path: Path) -> None:
    (tmp_path / "locks").mkdir()
    locks = VolumeLocks(tmp_path / "locks", NoHolders())
    with pytest.raises(DeadlineExceeded), locks.hold("pvc-1"):
        run_program([programs.make("sleep 60; echo")], timeout=0.3)
    wait_for(lambda: not _busy(locks))


def _busy(locks: VolumeLocks) -> bool:
    try:
        with locks.hold("pvc-1"):
            return False
    except DriverError:
        return True


def test_a_program_inherits_the_locks_of_its_call_and_nothing_else(programs: Programs, tmp_path: Path) -> None:
    lock, other = tmp_path / "locks" / "pvc-1", tmp_path / "other"
    lock.parent.mkdir()
    program = programs.make("for n in /proc/$$/fd/*; do readlink $n; done; exit 0")
    with other.open("w") as file:
        os.set_inheritable(file.fileno(), True)
        with VolumeLocks(lock.parent, NoHolders()).hold("pvc-1"):
            inside = run_program([program], timeout=10).stdout.splitlines()
        outside = run_program([program], timeout=10).stdout.splitlines()
    assert inside.count(str(lock)) == 1
    assert str(lock) not in outside
    assert str(other) not in inside


def test_the_environment_is_not_ours(programs: Programs) -> None:
    found = run_program([programs.make("cat /proc/$$/environ")], timeout=10).stdout.split("\0")
    assert sorted(found) == [
        "",
        "LC_ALL=C",
        "LVM_SUPPRESS_FD_WARNINGS=1",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "SHLVL=1",
    ]


def test_there_is_nothing_to_read_on_stdin_and_no_terminal(programs: Programs) -> None:
    program = programs.make('cat; [ "$(cut -d" " -f5,6 /proc/$$/stat | cut -d" " -f1)" = "$$" ] && echo own group')
    workers = Workers(())
    try:
        assert Commands(workers).run([program], timeout=60).stdout == "own group\n"
    finally:
        workers.stop()


def test_a_missing_program_is_told_with_what_to_do(tmp_path: Path) -> None:
    for name in (str(tmp_path / "absent"), "luks-csi-no-such-program"):
        with pytest.raises(
            FailedPrecondition, match=rf"program {re.escape(name)} is not installed on this node; install"
        ):
            run_program([name], timeout=10)


def test_a_program_that_cannot_be_run_is_told(programs: Programs, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    for name in (programs.make("exit 0", mode=0o644), str(tmp_path), str(broken)):
        with pytest.raises(CommandFailed, match=rf"program {re.escape(name)} cannot be started: "):
            run_program([name], timeout=10)


def test_programs_are_looked_for_where_they_would_be_run() -> None:
    assert Commands(Workers(())).has("sh")
    assert not Commands(Workers(())).has("luks-csi-no-such-program")


def test_no_process_and_no_descriptor_is_left(programs: Programs) -> None:
    before = len(os.listdir("/proc/self/fd")), children(os.getpid())
    for end in ("exit 0", "exit 1", "kill -9 $$", "sleep 60"):
        with contextlib.suppress(DriverError):
            run_program([programs.make(end)], timeout=0.2)
    assert (len(os.listdir("/proc/self/fd")), children(os.getpid())) == before


def test_a_program_gets_a_device_by_descriptor_and_errors_have_its_name(programs: Programs, tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.write_text("ours")
    program = programs.make('cat "$1"; echo "mkfs: $1 is odd" >&2; exit "$2"')
    with handle_on(path) as handle:
        path.rename(tmp_path / "elsewhere")
        path.write_text("a stranger's")
        found = run_program([program, handle, "0"], timeout=10)
        with pytest.raises(
            ProgramFailed, match=rf"device 3 ended with exit code 3: mkfs: {re.escape(str(path))} is odd$"
        ):
            run_program([program, handle, "3"], timeout=10)
    assert found.stdout == "ours"


def test_a_program_ends_with_the_worker_that_runs_it(programs: Programs, tmp_path: Path) -> None:
    program = programs.make(f"echo $$ $PPID > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pids; exec sleep 600")
    workers = Workers(())
    try:
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(workers.call, "luks-test", 600, run_program, [program], timeout=600)
            wait_for((tmp_path / "pids").exists)
            pid, worker = map(int, (tmp_path / "pids").read_text().split())
            os.kill(worker, signal.SIGKILL)
            with pytest.raises(CommandFailed, match="its worker process was killed"):
                call.result(60)
        wait_for(lambda: ended(pid))
    finally:
        workers.stop()


def test_a_program_whose_worker_was_killed_before_it_could_know_does_not_begin(
    programs: Programs, tmp_path: Path
) -> None:
    workers = Workers(())
    try:
        with pytest.raises(ProgramFailed, match="ended with exit code 1: nothing on stderr"):
            workers.call("luks-test", 60, tasks.run_as_its_parent_dies, [programs.make(f"echo > {tmp_path}/begun")])
    finally:
        workers.stop()
    assert not (tmp_path / "begun").exists()


def test_a_call_whose_worker_was_killed_waits_for_all_that_it_ran(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by make faults: lvm, killed in a system call, had shown a device after its caller had looked for one."""
    monkeypatch.setattr("csi_driver.host.workers._KILL_GRACE_SECONDS", 60.0)
    program = programs.make(
        "exec 3<&0  # a job in the background gets another standard input\n"
        f"(until [ -e {tmp_path}/gate ]; do sleep 0.05; done; echo > {tmp_path}/shown) <&3 &\n"
        f"echo $PPID > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; wait"
    )
    workers = Workers(())
    try:
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(workers.call, "luks-test", 600, run_program, [program], timeout=600)
            wait_for((tmp_path / "pid").exists)
            worker = int((tmp_path / "pid").read_text())
            os.kill(worker, signal.SIGKILL)
            wait_for(lambda: ended(worker))
            (tmp_path / "gate").touch()
            with pytest.raises(CommandFailed, match="its worker process was killed"):
                call.result(120)
            assert (tmp_path / "shown").exists()
    finally:
        workers.stop()
