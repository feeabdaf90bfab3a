"""The one way to run an external program."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from csi_driver.host.locks import held_descriptors
from csi_driver.model.errors import CommandFailed, DeadlineExceeded, FailedPrecondition

_KILL_GRACE_SECONDS = 2.0
_ENVIRONMENT: Mapping[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C",
}


@dataclass(frozen=True)
class Completed:
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
    """Runs programs: never a shell, always a time limit, a scrubbed environment."""

    def has(self, program: str) -> bool:
        """Whether `run` would find the program."""
        return shutil.which(program, path=_ENVIRONMENT["PATH"]) is not None

    def run(self, argv: Sequence[str], *, timeout: float, ok_codes: Sequence[int] = (0,)) -> Completed:
        """Run `argv` for at most `timeout` seconds.

        The program inherits the volume locks of the running call. Raises FailedPrecondition when it is not installed,
        ProgramFailed for an exit code outside `ok_codes`, DeadlineExceeded when it had to be killed.
        """
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_ENVIRONMENT,
                pass_fds=held_descriptors(),
                start_new_session=True,
            )
        except FileNotFoundError:
            raise FailedPrecondition(
                f"the program {argv[0]} is not installed on this node; install the package that holds it"
            ) from None
        except OSError as error:
            raise CommandFailed(f"the program {argv[0]} cannot be started: {error.strerror}") from None
        with contextlib.ExitStack() as pipes:
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipes.enter_context(pipe)
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                raise _killed(process, argv, timeout) from None
        if process.returncode not in ok_codes:
            raise ProgramFailed(argv, process.returncode, stderr.decode(errors="replace"))
        return Completed(process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace"))


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
