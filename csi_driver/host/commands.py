"""The one way to run an external program: in a worker, which holds the volume's lock and devices meanwhile."""

import contextlib
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Self

from msgspec import Struct

from csi_driver.host import blockdev
from csi_driver.host.blockdev import name_of
from csi_driver.host.handle import Handle
from csi_driver.host.held import held_descriptors
from csi_driver.host.syscalls import libc
from csi_driver.host.workers import Workers
from csi_driver.model.errors import CommandFailed, DeadlineExceeded, FailedPrecondition

_KILL_GRACE_SECONDS = 2.0
_MOST_OUTPUT = 16 * 1024
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_ENVIRONMENT: Mapping[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C",
    "SHLVL": "1",  # else bash(1) takes a socket as its standard input for rshd's, and reads ~/.bashrc
    "LVM_SUPPRESS_FD_WARNINGS": "1",  # lvm(8): of the volume's lock and devices, which it closes
}


class Completed(Struct, frozen=True):
    """What a program that ended in an expected way left behind."""

    code: int
    stdout: str
    stderr: str


class ProgramFailed(CommandFailed):
    """A program ended with an exit code that does not mean success; `code` and `stderr` say more."""

    def __init__(self, argv: Sequence[str], code: int, stderr: str) -> None:
        self.argv = tuple(argv)
        self.code = code
        self.stderr = stderr.strip()
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        said = self.stderr.splitlines()[-1] if self.stderr else "nothing on stderr"
        super().__init__(f"{shlex.join(argv)} {ended}: {said}")

    def __reduce__(self) -> tuple[type[Self], tuple[Sequence[str], int, str]]:
        return type(self), (self.argv, self.code, self.stderr)  # so that it can come out of a worker


class Commands:
    """Runs programs in workers: never a shell, always a time limit, a scrubbed environment."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def has(self, program: str) -> bool:
        """Whether `run` would find the program."""
        import shutil  # noqa: PLC0415 - a server that starts asks for no program

        return shutil.which(program, path=_ENVIRONMENT["PATH"]) is not None

    def run(
        self,
        argv: Sequence[str | Handle],
        *,
        timeout: float,
        ok_codes: Sequence[int] = (0,),
        by_name: bool = False,
    ) -> Completed:
        """`run_program` in a worker. The server itself never forks for it: a child would share locks of other calls."""
        limit = timeout + 2 * _KILL_GRACE_SECONDS
        return self._workers.call(
            f"{argv[0]} on {argv[-1]}",
            limit,
            run_program,
            tuple(argv),
            timeout=timeout,
            ok_codes=tuple(ok_codes),
            by_name=by_name,
        )

    def read(self, argv: Sequence[str], *, timeout: float) -> str:
        """`run` for a long answer of a program whose second word is what it does: all of its standard output."""
        limit, what = timeout + 2 * _KILL_GRACE_SECONDS, f"{shlex.join(argv[:2])} on {argv[-1]}"
        with Handle(os.memfd_create("output", os.MFD_CLOEXEC), "its output") as output:
            self._workers.call(what, limit, run_program, tuple(argv), timeout=timeout, output=output)
            return blockdev.read_at(output.fd, 0, os.fstat(output.fd).st_size).decode(errors="replace")


def run_program(
    argv: Sequence[str | Handle],
    *,
    timeout: float,
    ok_codes: Sequence[int] = (0,),
    by_name: bool = False,
    output: Handle | None = None,
) -> Completed:
    """Run `argv` for at most `timeout` seconds.

    The program inherits what the running call holds, its lock and devices, and finds a Handle under the path of its
    descriptor; errors call it by its name. `by_name` is for those that hand the path on to somebody who keeps it: they
    get a name that is seen to mean the device, which they hold as well. It ends with this process. Of each stream the
    last 16 KiB are kept, which an answer of a worker must have room for; where there is a file `output`, all of its
    standard output goes there. Raises FailedPrecondition when it is not installed, ProgramFailed for an exit code
    outside `ok_codes`, DeadlineExceeded when it had to be killed.
    """
    shown = [str(one) for one in argv]
    handles = [one for one in argv if isinstance(one, Handle)]
    try:
        process = subprocess.Popen(
            [(name_of(one) if by_name else one.path) if isinstance(one, Handle) else one for one in argv],
            stdin=None,  # the worker's, by which is seen when the program has ended: the launcher's `_fork`
            stdout=subprocess.PIPE if output is None else output.fd,
            stderr=subprocess.PIPE,
            env=_ENVIRONMENT,
            pass_fds={*held_descriptors(), *(handle.fd for handle in handles)},
            start_new_session=True,
            # The kernel looks at the thread that forked: a worker has one, which lives as long as the process.
            preexec_fn=partial(_end_with, os.getpid()) if threading.active_count() == 1 else None,  # noqa: PLW1509 -- just for that
        )
    except FileNotFoundError:
        raise FailedPrecondition(
            f"the program {shown[0]} is not installed on this node; install the package that holds it"
        ) from None
    except OSError as error:
        raise CommandFailed(f"the program {shown[0]} cannot be started: {error.strerror}") from None
    with contextlib.ExitStack() as pipes:
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipes.enter_context(pipe)
        try:
            said = process.communicate(timeout=timeout)
            stdout, stderr = (_text((each or b"")[-_MOST_OUTPUT:], handles) for each in said)
        except subprocess.TimeoutExpired:
            raise _killed(process, shown, timeout) from None
    if process.returncode not in ok_codes:
        raise ProgramFailed(shown, process.returncode, stderr)
    return Completed(process.returncode, stdout, stderr)


def _end_with(parent: int) -> None:
    """A worker is killed at its time limit, and what it runs must not go on without anybody who waits for it."""
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it was killed before that


def _text(output: bytes, handles: Sequence[Handle]) -> str:
    """The end of what a program said, with the names that people know."""
    text = output.decode(errors="replace")
    for handle in handles:
        text = text.replace(handle.path, handle.name)
    return text


def _killed(process: "subprocess.Popen[bytes]", argv: Sequence[str], timeout: float) -> DeadlineExceeded:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a script's children too: they hold the volume's lock
    try:
        process.wait(_KILL_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return DeadlineExceeded(
            f"{shlex.join(argv)} did not end within {timeout:g} s and cannot be killed (pid {process.pid}): "
            f"its device does not answer; look at the kernel log and the storage below it"
        )
    return DeadlineExceeded(f"{shlex.join(argv)} did not end within {timeout:g} s and was killed")
