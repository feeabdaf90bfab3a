"""What Ceph's programs say when they fail, on whichever stream, is the error that it means."""

import os
from collections.abc import Sequence

import pytest

from csi_driver.backends.rbderrors import CephExists, CephMissing
from csi_driver.backends.rbdplace import Cluster
from csi_driver.backends.rbdtool import CephPool, CephPrograms, Credentials
from csi_driver.host.commands import Commands, ProgramFailed
from csi_driver.host.handle import Handle
from csi_driver.host.workers import Workers
from csi_driver.model.errors import CommandFailed, DriverError, FailedPrecondition, ResourceExhausted

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


def pool(code: int, stdout: str, stderr: str) -> CephPool:
    place = Cluster("ceph-one", ("192.0.2.1:6789",)).place("rbd")
    return CephPool(CephPrograms(Saying(code, stdout, stderr), 1), place, Credentials("csi", KEY))


@pytest.mark.parametrize("logged", ["", LOGGED, f"{LOGGED}\n{LOGGED}"])
def test_a_key_of_a_map_that_is_not_there_is_none_whatever_else_a_client_logs(logged: str) -> None:
    assert pool(255, "No such key: rbd/luks-csi.volumes/pvc-1\n", logged).value("luks-csi.volumes", "pvc-1") is None


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "error"),
    [
        (2, "", f"rbd: error opening image a: (2) No such file or directory\n{LOGGED}", CephMissing),
        (17, "", f"{LOGGED}\nrbd: create error: (17) File exists", CephExists),
        (28, "", "rbd: resize error: (28) No space left on device", ResourceExhausted),
        (1, "half of an answer", LOGGED, CommandFailed),
        (1, "", "rados: couldn't connect to cluster: (13) Permission denied", FailedPrecondition),
    ],
)
def test_what_a_program_says_is_the_error_that_it_means(
    code: int, stdout: str, stderr: str, error: type[DriverError]
) -> None:
    with pytest.raises(error) as raised:
        pool(code, stdout, stderr).rename("a", "b")
    assert type(raised.value) is error


def test_a_key_that_ceph_quotes_is_shown_to_nobody() -> None:
    with pytest.raises(DriverError) as raised:
        pool(22, f"said {KEY}", f"failed: {KEY}").rename("a", "b")
    assert KEY not in str(raised.value)
