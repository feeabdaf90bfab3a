"""Workers with the real launcher and real processes."""

import contextlib
import errno
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import pytest

from csi_driver.host import keyring, launcher
from csi_driver.host.commands import ProgramFailed
from csi_driver.host.handle import Handle
from csi_driver.host.held import held_descriptors
from csi_driver.host.holders import Holders
from csi_driver.host.locks import VolumeLocks
from csi_driver.host.workers import MOST_DESCRIPTORS, LauncherProcess, Workers, spawn_launcher
from csi_driver.model import errors
from csi_driver.model.errors import (
    CommandFailed,
    DeadlineExceeded,
    DriverError,
    FailedPrecondition,
    Unavailable,
    VolumeBusy,
)
from csi_driver.model.secret import Passphrase
from tests import worker_tasks as tasks
from tests.handles import handle_on

WARM = ("tests.worker_tasks",)
SECRET = b"hunter2-" * 4


class Crew:
    """Workers, and the pids of the launchers they started."""

    def __init__(self) -> None:
        self.launchers: list[int] = []
        self.workers = Workers(WARM, self._spawn)

    def _spawn(self, control: socket.socket, warm: Sequence[str]) -> LauncherProcess:
        process = spawn_launcher(control, warm)
        assert isinstance(process, subprocess.Popen)
        self.launchers.append(process.pid)
        return process


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    made = Crew()
    made.workers.start()
    yield made
    made.workers.stop()


@pytest.fixture
def workers(crew: Crew) -> Workers:
    return crew.workers


def wait_for(what: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def signal_all(pids: Sequence[int], number: int) -> None:
    """Send a signal to processes, some of which may have ended just now."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def napping(note: Path) -> int:
    wait_for(note.exists)
    return int(note.read_text())


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


# --- results and errors ----------------------------------------------------------------------------------------------


def test_a_function_runs_in_another_process_and_its_result_comes_back(crew: Crew) -> None:
    pid, parent, args, kwargs = crew.workers.call(
        "luks-test of it", 10, tasks.identity, 1, b"\0\n", key=Passphrase(b"x")
    )
    assert pid not in (os.getpid(), crew.launchers[-1])
    assert parent == crew.launchers[-1]
    assert (args, kwargs) == ((1, b"\0\n"), {"key": Passphrase(b"x")})


def test_the_largest_passphrase_fits(workers: Workers) -> None:
    assert workers.call("luks-test", 10, tasks.nap, 0, key=Passphrase(b"k" * 65536)) == 65536


def tree(kind: type[DriverError]) -> Iterator[type[DriverError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from tree(below)


OURS = [kind for kind in tree(DriverError) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", OURS)
def test_our_errors_come_back_as_what_they_are(workers: Workers, kind: type[DriverError]) -> None:
    with pytest.raises(kind, match=r"^volume pvc-1 has a problem$") as caught:
        workers.call("luks-test", 10, tasks.fail, kind("volume pvc-1 has a problem"))
    assert type(caught.value) is kind


def test_the_failure_of_a_program_comes_back_whole(workers: Workers) -> None:
    with pytest.raises(ProgramFailed, match=r"mkfs.ext4 /dev/x ended with exit code 1: no such device") as caught:
        workers.call("luks-test", 10, tasks.fail, ProgramFailed(["mkfs.ext4", "/dev/x"], 1, "no such device\n"))
    assert (caught.value.argv, caught.value.code) == (("mkfs.ext4", "/dev/x"), 1)


def test_an_error_of_the_system_comes_back_as_what_it_is(workers: Workers) -> None:
    with pytest.raises(PermissionError) as caught:
        workers.call("luks-test", 10, tasks.fail, PermissionError(errno.EPERM, "Operation not permitted", "/dev/loop3"))
    assert (caught.value.errno, caught.value.filename) == (errno.EPERM, "/dev/loop3")


def test_the_text_of_an_unforeseen_error_stays_where_it_is(workers: Workers) -> None:
    with pytest.raises(CommandFailed, match=r"^luks-open of pvc-1 failed: unforeseen ValueError$"):
        workers.call("luks-open of pvc-1", 10, tasks.fail_unforeseen, SECRET.decode())


@pytest.mark.parametrize("end", [tasks.die, tasks.leave, tasks.unpicklable])
def test_a_worker_that_ends_without_an_answer_is_told_and_the_next_call_works(
    workers: Workers, end: Callable[[], None]
) -> None:
    for _ in range(3):
        with pytest.raises(CommandFailed, match=r"^luks-open of pvc-1 failed: its worker process was killed"):
            workers.call("luks-open of pvc-1", 10, end)
        assert workers.call("luks-test", 10, tasks.identity, 1)[2] == (1,)


def test_a_worker_that_is_killed_before_it_read_the_request_is_told(workers: Workers) -> None:
    with workers.session():
        pid = workers.call("luks-test", 10, tasks.identity)[0]
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: stopped(pid))
        threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
        with pytest.raises(CommandFailed, match=r"killed before it could answer"):
            workers.call("luks-test", 10, tasks.identity)
        assert workers.call("luks-test", 10, tasks.identity)[0] != pid


def test_an_idle_worker_that_was_killed_is_given_to_nobody(crew: Crew) -> None:
    crew.workers.call("luks-test", 10, tasks.identity)
    launcher = crew.launchers[-1]
    with ThreadPoolExecutor(1) as pool:
        os.kill(launcher, signal.SIGSTOP)  # it hears of the request and of the deaths together
        try:
            wait_for(lambda: stopped(launcher))  # until then it may yet reap a worker that has ended
            idle = children(launcher)
            signal_all(idle, signal.SIGKILL)
            wait_for(lambda: all(map(ended, idle)))
            call = pool.submit(crew.workers.call, "luks-test", 10, tasks.identity)
            time.sleep(0.1)
        finally:
            os.kill(launcher, signal.SIGCONT)
        assert call.result(10)[1] == launcher


def test_a_worker_that_is_killed_as_it_gets_a_session_does_no_lasting_harm(crew: Crew) -> None:
    """The call that it was given to is told, the launcher goes on, and the next call works."""
    crew.workers.call("luks-test", 10, tasks.identity)
    launcher = crew.launchers[-1]
    stopped = children(launcher)  # on a busy machine the call may get a new worker, which is to live
    signal_all(stopped, signal.SIGSTOP)
    with contextlib.suppress(DriverError), ThreadPoolExecutor(1) as pool:
        call = pool.submit(crew.workers.call, "luks-test", 10, tasks.identity)
        time.sleep(0.1)
        signal_all(stopped, signal.SIGKILL)
        call.result(10)
    wait_for(lambda: all(ended(pid) for pid in stopped))  # a signal may be slower than the next call
    assert crew.workers.call("luks-test", 10, tasks.identity)[1] == launcher


def test_where_keyrings_are_refused_workers_work_and_are_kept() -> None:
    """As Kubernetes' own seccomp profile does, RuntimeDefault, for a controller that is not privileged."""
    workers = Workers(("tests.worker_tasks:lose_keyrings",))
    try:
        with pytest.raises(FailedPrecondition, match="may not use kernel keyrings"):
            workers.call("luks-test", 10, keyring.clear_thread)
        assert len({workers.call("luks-test", 10, tasks.identity)[0] for _ in range(3)}) == 1
    finally:
        workers.stop()


def test_a_call_that_is_interrupted_takes_its_worker_with_it(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = select.poll

    class Poll:
        def __init__(self) -> None:
            self._poll = real()
            self.register = self._poll.register

        def poll(self, timeout: float) -> list[tuple[int, int]]:
            if timeout == 17_000:
                raise KeyboardInterrupt
            return list(self._poll.poll(timeout))

    monkeypatch.setattr(select, "poll", Poll)
    with workers.session():
        for number in range(3):
            with pytest.raises(KeyboardInterrupt):
                workers.call("luks-test", 17, tasks.nap, 600, str(tmp_path / f"{number}"))
            assert workers.call("luks-test", 10, tasks.identity, number)[2] == (number,)
    for number in range(3):  # killed before it began, or in its sleep
        note = tmp_path / f"{number}"
        assert not note.exists() or ended(int(note.read_text()))


# --- time limits -----------------------------------------------------------------------------------------------------


def test_a_call_that_takes_too_long_is_killed_and_the_next_one_works(workers: Workers, tmp_path: Path) -> None:
    note = tmp_path / "note"
    begun = time.monotonic()
    with pytest.raises(
        DeadlineExceeded, match=r"^luks-open of pvc-1 did not end within its time limit and was killed$"
    ):
        workers.call("luks-open of pvc-1", 0.3, tasks.nap, 60, str(note))
    assert time.monotonic() - begun < 5
    wait_for(lambda: ended(napping(note)))
    assert workers.call("luks-test", 10, tasks.identity, 1)[2] == (1,)


def test_after_a_killed_call_a_session_goes_on_in_a_new_worker(workers: Workers) -> None:
    with workers.session():
        first = workers.call("luks-test", 10, tasks.identity)[0]
        with pytest.raises(DeadlineExceeded):
            workers.call("luks-test", 0.2, tasks.nap, 60)
        second = workers.call("luks-test", 10, tasks.identity)[0]
        assert second != first
        assert workers.call("luks-test", 10, tasks.identity)[0] == second


class InThisProcess:
    """A launcher that is a thread."""

    def __init__(self, control: socket.socket, warm: Sequence[str]) -> None:
        assert not warm
        self._thread = threading.Thread(target=self._serve, args=(control.dup(),), daemon=True)
        self._thread.start()

    def _serve(self, control: socket.socket) -> None:
        with control:
            launcher.serve(control)

    def poll(self) -> int | None:
        return None if self._thread.is_alive() else 0

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        return 0

    def kill(self) -> None:
        raise AssertionError("it ends by itself")


def test_a_node_without_processes_to_spare_is_told_as_that_and_the_launcher_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    workers = Workers((), InThisProcess)
    for _ in range(2):
        with pytest.raises(CommandFailed, match=r"a limit of processes, descriptors or memory is reached on"):
            workers.call("luks-test", 10, tasks.identity)
    workers.stop()


def test_a_limit_of_open_files_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    workers = Workers(())
    workers.start()
    try:
        with workers.session(), monkeypatch.context() as planted:
            assert workers.call("luks-test", 10, tasks.identity)  # which takes the idle one
            planted.setattr(socket, "socketpair", refuse)
            with ThreadPoolExecutor(1) as pool, pytest.raises(Unavailable, match=r"Too many open files; .*ulimit -n"):
                pool.submit(workers.call, "luks-test", 10, tasks.identity).result()
    finally:
        workers.stop()


# --- sessions --------------------------------------------------------------------------------------------------------


def test_a_session_has_one_worker_and_a_thread_of_another_call_has_another(workers: Workers) -> None:
    with workers.session():
        pids = {workers.call("luks-test", 10, tasks.identity)[0] for _ in range(5)}
        with ThreadPoolExecutor(1) as other:
            elsewhere = other.submit(workers.call, "luks-test", 10, tasks.identity).result(10)[0]
    assert len(pids) == 1
    assert elsewhere not in pids


def test_a_worker_is_named_after_its_work_and_used_again(workers: Workers) -> None:
    assert workers.call("luks-open of pvc-1", 10, tasks.comm) == "luks-open"
    pids = [workers.call("luks-test", 10, tasks.identity)[0] for _ in range(20)]
    assert len(set(pids)) == 1
    wait_for(lambda: any(_content(Path(f"/proc/{pid}/comm")) == b"luks-idle\n" for pid in pids))


def test_workers_apart_are_nobody_elses_and_keep_what_they_have(workers: Workers) -> None:
    def apart() -> int:
        with workers.apart("cluster"):
            return workers.call("luks-test", 10, tasks.identity)[0]

    with workers.session():
        own = workers.call("luks-test", 10, tasks.identity)[0]
        kept = apart()
        assert workers.call("luks-test", 10, tasks.identity)[0] == own
    assert {apart() for _ in range(5)} == {kept}
    workers.dismiss("cluster")
    assert apart() != kept
    assert kept not in {workers.call("luks-test", 10, tasks.identity)[0] for _ in range(5)}
    workers.dismiss("cluster")


def test_a_worker_cannot_be_dumped(workers: Workers) -> None:
    assert workers.call("luks-test", 10, tasks.hardening) == ((1, 1), 0)


def test_a_volume_key_does_not_outlive_the_call_in_the_worker(workers: Workers) -> None:
    try:
        keyring.clear_thread()
    except DriverError as error:
        pytest.skip(str(error))
    with workers.session():
        pid, found = workers.call("luks-test", 10, tasks.add_thread_key, "luks-csi-test")
        assert found
        assert workers.call("luks-test", 10, tasks.has_thread_key, "luks-csi-test") == (pid, False)


# --- locks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def locks(tmp_path: Path) -> VolumeLocks:
    (tmp_path / "locks").mkdir()
    return VolumeLocks(tmp_path / "locks", Holders())


def test_a_worker_inherits_the_locks_of_its_call_and_no_others(workers: Workers, locks: VolumeLocks) -> None:
    with locks.hold("pvc-2"), ThreadPoolExecutor(1) as pool, locks.hold("pvc-1"):
        ours = workers.call("luks-test", 10, tasks.open_files)
        others = pool.submit(workers.call, "luks-test", 10, tasks.open_files).result(10)
    held = [name for name in ours if "/locks/" in name]
    assert sorted(os.path.basename(name) for name in held) == ["pvc-1", "pvc-2"]
    assert not [name for name in others if "/locks/" in name]
    assert not [name for name in workers.call("luks-test", 10, tasks.open_files) if "/locks/" in name]


def test_a_lock_is_free_the_moment_its_call_returns(workers: Workers, locks: VolumeLocks) -> None:
    for _ in range(200):
        with locks.hold("pvc-1"):
            workers.call("luks-test", 10, tasks.identity)


def test_a_lock_is_free_after_calls_that_failed_or_were_killed(workers: Workers, locks: VolumeLocks) -> None:
    for number in range(5):
        with contextlib.suppress(DriverError), locks.hold("pvc-1"):
            workers.call("luks-test", 0.05, tasks.nap, 60)
        with contextlib.suppress(DriverError), locks.hold("pvc-1"):
            workers.call("luks-test", 10, tasks.die)
        with contextlib.suppress(DriverError), locks.hold("pvc-1"), workers.session():
            workers.call("luks-test", 10, tasks.identity, number)
            workers.call("luks-test", 10, tasks.fail, CommandFailed("no"))


SERVER = """
import sys
from pathlib import Path
from csi_driver.host.holders import Holders
from csi_driver.host.locks import VolumeLocks
from csi_driver.host.workers import Workers
from tests import worker_tasks
with VolumeLocks(Path(sys.argv[1]), Holders()).hold("pvc-1"):
    Workers(("tests.worker_tasks",)).call("luks-format of pvc-1", 60, worker_tasks.nap, 60, sys.argv[2])
"""


def test_the_volume_of_a_killed_server_stays_locked_until_its_worker_ends(locks: VolumeLocks, tmp_path: Path) -> None:
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(tmp_path / "locks"), str(tmp_path / "note")])
    try:
        worker = napping(tmp_path / "note")
    finally:
        server.kill()
        server.wait(10)
    try:
        said = rf"earlier operation on volume pvc-1 .*process {worker} \(luks-format\)"
        with pytest.raises(VolumeBusy, match=said), locks.hold("pvc-1"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
    wait_for(lambda: ended(worker))
    with locks.hold("pvc-1"):
        pass


def test_a_lock_of_which_a_starting_launcher_has_a_copy_is_waited_for(locks: VolumeLocks) -> None:
    forked = threading.Event()

    def spawn(control: socket.socket, warm: Sequence[str]) -> LauncherProcess:
        copies = [os.dup(descriptor) for descriptor in held_descriptors()]  # as a fork makes them of all
        forked.set()
        time.sleep(0.2)
        for copy in copies:
            os.close(copy)  # as the exec does
        return spawn_launcher(control, warm)

    workers = Workers((), spawn)
    try:
        with ThreadPoolExecutor(1) as pool:
            with locks.hold("pvc-1"):
                started = pool.submit(copy_context().run, workers.start)
                assert forked.wait(10)
            with locks.hold("pvc-1"):
                pass
            started.result(10)
    finally:
        workers.stop()


# --- devices ---------------------------------------------------------------------------------------------------------


def test_a_handle_goes_with_the_call_and_means_the_same_whatever_its_name_means_by_then(
    workers: Workers, tmp_path: Path
) -> None:
    path = tmp_path / "device"
    path.write_bytes(b"ours")
    with handle_on(path) as handle, workers.session():
        path.unlink()
        path.write_bytes(b"a stranger's")
        for _ in range(3):
            name, _, content = workers.call("luks-test", 10, tasks.read_through, handle)
            assert (name, content) == (str(path), b"ours")
        assert not [name for name in workers.call("luks-test", 10, tasks.open_files) if str(tmp_path) in name]


def test_nothing_is_done_where_not_all_descriptors_came(workers: Workers, locks: VolumeLocks, tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.write_bytes(b"ours")
    with handle_on(path) as handle, locks.hold("pvc-1"):
        many = [Handle(handle.fd, "a device")] * MOST_DESCRIPTORS
        with pytest.raises(CommandFailed, match=r"^luks-test of it failed: it cannot have as many files open; raise"):
            workers.call("luks-test of it", 10, tasks.identity, *many)
        assert workers.call("luks-test", 10, tasks.identity, 1)[2] == (1,)
    with locks.hold("pvc-1"):
        pass


DEVICE_SERVER = """
import sys
from csi_driver.host.workers import Workers
from tests import worker_tasks
from tests.handles import handle_on
device, note = sys.argv[1:]
Workers(("tests.worker_tasks",)).call("luks-test", 60, worker_tasks.read_through, handle_on(device), note, 60)
"""


def test_the_device_of_a_killed_server_stays_open_until_its_worker_ends(tmp_path: Path) -> None:
    (tmp_path / "device").touch()
    server = subprocess.Popen([sys.executable, "-c", DEVICE_SERVER, str(tmp_path / "device"), str(tmp_path / "note")])
    try:
        worker = napping(tmp_path / "note")
    finally:
        server.kill()
        server.wait(10)
    try:
        holders = [holder.pid for holder in Holders().of_file(tmp_path / "device")]
        assert worker in holders
    finally:
        os.kill(worker, signal.SIGKILL)
    wait_for(lambda: ended(worker))
    assert not Holders().of_file(tmp_path / "device")


# --- the launcher ----------------------------------------------------------------------------------------------------


def test_a_killed_launcher_is_replaced(crew: Crew) -> None:
    for _ in range(3):
        crew.workers.call("luks-test", 10, tasks.identity)
        before = crew.launchers[-1]
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: ended(crew.launchers[-1]))
        assert crew.workers.call("luks-test", 10, tasks.identity)[1] == crew.launchers[-1] != before


def test_a_call_in_flight_survives_the_death_of_the_launcher(crew: Crew, tmp_path: Path) -> None:
    crew.workers.call("luks-test", 10, tasks.identity)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(crew.workers.call, "luks-test", 10, tasks.nap, 0.5, str(tmp_path / "note"))
        worker = napping(tmp_path / "note")
        os.kill(crew.launchers[-1], signal.SIGKILL)
        assert call.result(10) == 0
    assert crew.workers.call("luks-test", 10, tasks.identity)[1] == crew.launchers[-1]
    wait_for(lambda: ended(worker))


def test_threads_that_find_the_launcher_dead_start_one_together(crew: Crew) -> None:
    crew.workers.call("luks-test", 10, tasks.identity)
    before = len(crew.launchers)
    os.kill(crew.launchers[-1], signal.SIGKILL)
    wait_for(lambda: ended(crew.launchers[-1]))
    with ThreadPoolExecutor(8) as pool:
        parents = set(pool.map(lambda _: crew.workers.call("luks-test", 20, tasks.identity)[1], range(16)))
    assert parents == {crew.launchers[-1]}
    assert len(crew.launchers) == before + 1


def test_stop_leaves_no_process_and_start_begins_anew() -> None:
    crew = Crew()
    pid = crew.workers.call("luks-test", 10, tasks.identity)[0]
    crew.workers.stop()
    crew.workers.stop()
    wait_for(lambda: ended(pid) and ended(crew.launchers[-1]))
    assert crew.workers.call("luks-test", 10, tasks.identity)[1] == crew.launchers[-1]
    crew.workers.stop()


def test_a_launcher_that_cannot_start_is_told() -> None:
    workers = Workers(WARM, lambda _control, _warm: subprocess.Popen(["false"]))
    with pytest.raises(CommandFailed, match=r"no worker process can be started|launcher was killed"):
        workers.call("luks-test", 10, tasks.identity)
    workers.stop()


# --- under load ------------------------------------------------------------------------------------------------------


def test_many_threads_get_their_own_answers(workers: Workers) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: workers.call("luks-test", 30, tasks.identity, n)[2], range(160)))
    assert answers == [(n,) for n in range(160)]


def test_nothing_leaks(crew: Crew) -> None:
    def count() -> tuple[int, int, int]:
        launcher = crew.launchers[-1]
        return len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{launcher}/fd")), len(children(launcher))

    def use(number: int) -> None:
        with contextlib.suppress(DriverError):
            crew.workers.call("luks-test", 10, tasks.die if number % 50 == 0 else tasks.identity)
        if number % 100 == 0:
            with contextlib.suppress(DriverError):
                crew.workers.call("luks-test", 0.05, tasks.nap, 60)

    for number in range(1, 20):
        use(number)
    wait_for(lambda: len(children(crew.launchers[-1])) <= 2)
    before = count()
    for number in range(1, 501):
        use(number)
    wait_for(lambda: all(now <= then + 1 for now, then in zip(count(), before, strict=True)))
    assert count()[2] <= 2


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_a_secret_shows_in_no_command_line_environment_or_name(workers: Workers, tmp_path: Path) -> None:
    note = tmp_path / "note"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(workers.call, "luks-open of pvc-1", 20, tasks.nap, 0.5, str(note), Passphrase(SECRET))
        worker = napping(note)
        shown = b"".join(
            _content(path)
            for process in Path("/proc").glob("[0-9]*")
            for path in (process / "cmdline", process / "comm", process / "environ")
        )
        assert call.result(20) == len(SECRET)
    assert str(worker)
    assert b"csi_driver.host.launcher" in shown
    for form in (SECRET, SECRET.hex().encode(), repr(SECRET).encode(), pickle.dumps(SECRET)):
        assert form not in shown


def _content(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""
