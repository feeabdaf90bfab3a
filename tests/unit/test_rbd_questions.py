"""What Ceph's libraries answer when they fail is the error that it means."""

import errno
from collections.abc import Callable
from typing import Any

import pytest

from csi_driver.backends.librados import Refused
from csi_driver.backends.rbdclients import CephClients, Credentials
from csi_driver.backends.rbderrors import CephExists, CephMissing
from csi_driver.backends.rbdplace import Cluster
from csi_driver.backends.rbdpool import CephPool
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
PLACE = Cluster("ceph-one", ("192.0.2.1:6789",)).place("rbd")


class Failing(Workers):
    """Every question fails so."""

    def __init__(self, error: Exception) -> None:
        super().__init__(())
        self._error = error
        self.dismissed: list[str] = []

    def dismiss(self, kind: str) -> None:
        self.dismissed.append(kind)

    def call(self, what: str, timeout: float, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        raise self._error


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
        (
            Refused(errno.EOPNOTSUPP, "Not supported"),
            FailedPrecondition,
            r"no session .* can begin as client\.csi: Oper",
        ),
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
        CephPool(CephClients(Failing(failed), 1), PLACE, Credentials("csi", KEY)).rename("a", "b")
    assert type(raised.value) is error


def test_workers_whose_sessions_may_hang_as_long_are_let_go_of() -> None:
    workers = Failing(DeadlineExceeded("rados get did not end and was killed"))
    with pytest.raises(DeadlineExceeded):
        CephPool(CephClients(workers, 1), PLACE, Credentials("csi", KEY)).get("a")
    assert workers.dismissed == ["ceph"]
