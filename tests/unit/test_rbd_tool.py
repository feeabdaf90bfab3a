"""What Ceph's libraries and programs answer when they fail, and where, is the error that it means."""

import errno
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from csi_driver.backends.librados import Refused
from csi_driver.backends.rbderrors import CephExists, CephMissing
from csi_driver.backends.rbdplace import Cluster
from csi_driver.backends.rbdpool import CephPool
from csi_driver.backends.rbdtool import CephClients, Credentials
from csi_driver.host.commands import Commands, ProgramFailed
from csi_driver.host.handle import Handle
from csi_driver.host.workers import Workers
from csi_driver.model.errors import (
    CommandFailed,
    DeadlineExceeded,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    ResourceExhausted,
)

KEY = "AQBcX2pnAAAAABAAcXVpdGUgcmFuZG9tIGtleQ=="
LOGGED = "2026-11-29T15:19:42.454+0000 4d06e6c0 -1 monclient: get_auth_request but no auth handler is set up"


class Saying(Commands):
    """Every program fails, with that on its two streams."""

    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        super().__init__(Workers(()))
        self._code, self._stdout, self._stderr = code, stdout, stderr

    def run_into(self, output: Handle, argv: Sequence[str | Handle], *, timeout: float) -> None:
        os.write(output.fd, self._stdout.encode())
        raise ProgramFailed([str(each) for each in argv], self._code, self._stderr)


class Failing(Workers):
    """Every question fails so."""

    def __init__(self, error: Exception) -> None:
        super().__init__(())
        self._error = error

    def call(self, what: str, timeout: float, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        raise self._error


def pool(workers: Workers, commands: Commands) -> CephPool:
    place = Cluster("ceph-one", ("192.0.2.1:6789",)).place("rbd")
    return CephPool(CephClients(workers, commands, 1), place, Credentials("csi", KEY))


def saying(code: int, stdout: str, stderr: str) -> CephPool:
    return pool(Workers(()), Saying(code, stdout, stderr))


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "error"),
    [
        (2, "", f"rbd: error opening image a: (2) No such file or directory\n{LOGGED}", CephMissing),
        (17, "", f"{LOGGED}\nrbd: create error: (17) File exists", CephExists),
        (28, "", "rbd: resize error: (28) No space left on device", ResourceExhausted),
        (1, "half of an answer", LOGGED, CommandFailed),
        (1, "", "rbd: couldn't connect to the cluster!: (13) Permission denied", FailedPrecondition),
    ],
)
def test_what_a_program_says_is_the_error_that_it_means(
    code: int, stdout: str, stderr: str, error: type[DriverError]
) -> None:
    with pytest.raises(error) as raised:
        saying(code, stdout, stderr).map("a", ())
    assert type(raised.value) is error


def test_a_key_that_ceph_quotes_is_shown_to_nobody() -> None:
    with pytest.raises(DriverError) as raised:
        saying(22, f"said {KEY}", f"failed: {KEY}").map("a", ())
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("failed", "error", "text"),
    [
        (OSError(errno.ENOENT, "No such file or directory"), CephMissing, "removed by hand"),
        (OSError(errno.EEXIST, "File exists"), CephExists, "call again"),
        (OSError(errno.EBUSY, "Device or resource busy"), DeviceInUse, "a client that crashed"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ResourceExhausted, "raise its quota"),
        (OSError(errno.EACCES, "access denied"), FailedPrecondition, "needs the capabilities mon 'profile rbd'"),
        (OSError(errno.ESHUTDOWN, "Cannot send"), FailedPrecondition, "was fenced off"),
        (OSError(errno.EIO, "Input/output error"), CommandFailed, "'ceph status'"),
        (Refused(errno.EACCES, "Permission denied"), FailedPrecondition, "'ceph auth get client.csi' tells the key"),
        (Refused(errno.EINVAL, "Invalid argument"), FailedPrecondition, "no address is found for one of its monitors"),
        (Refused(errno.ETIMEDOUT, "Connection timed out"), DeadlineExceeded, "did not answer rbd rename rbd/a rbd/b"),
        (DeadlineExceeded("rbd rename did not end … and was killed"), DeadlineExceeded, "within 1 s .it was killed"),
        (DeadlineExceeded("rbd rename … cannot be killed"), DeadlineExceeded, "it cannot be killed"),
        (DeadlineExceeded("rbd rename did not start in time"), DeadlineExceeded, "did not start in time"),
        (FailedPrecondition("librbd.so.1 cannot be loaded"), FailedPrecondition, "librbd.so.1 cannot be loaded"),
    ],
)
def test_what_a_library_answers_is_the_error_that_it_means(
    failed: Exception, error: type[DriverError], text: str
) -> None:
    with pytest.raises(error, match=text) as raised:
        pool(Failing(failed), Commands(Workers(()))).rename("a", "b")
    assert type(raised.value) is error
    assert KEY not in str(raised.value)
