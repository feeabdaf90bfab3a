"""How a cluster of Ceph is spoken to: questions by its libraries, in workers; what may take long by the program `rbd`.

Neither in the server: what hangs on a cluster is a process with a time limit, and no thread of ours. No configuration
file of the host is read, and no file written: monitors are an argument, the key is in memory alone, and a program gets
it as a descriptor.
"""

import base64
import errno
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Concatenate, Final, ParamSpec, TypeVar

from csi_driver.backends import librados
from csi_driver.backends.librados import Login, Refused
from csi_driver.backends.rbderrors import KEY, USER, meant, refused, told
from csi_driver.backends.rbdplace import Cluster
from csi_driver.host.commands import Commands, ProgramFailed
from csi_driver.host.handle import Handle
from csi_driver.host.workers import Workers
from csi_driver.model.errors import DeadlineExceeded

P = ParamSpec("P")
R = TypeVar("R")

_KIND: Final = "ceph"
_KEY_HEAD: Final = 12  # CryptoKey of src/auth/Crypto.cc: type, seconds, nanoseconds, length


@dataclass(frozen=True)
class Credentials:
    """A user of a cluster and its key, which repr and comparison leave out."""

    user: str
    key: str = field(repr=False, compare=False)

    @property
    def is_key(self) -> bool:
        """Whether it has the form of a key of Ceph: a type, a time, and a secret behind its length, in base64."""
        try:
            raw = base64.b64decode(self.key, validate=True)
        except ValueError:
            return False
        return len(raw) > _KEY_HEAD and len(raw) == _KEY_HEAD + int.from_bytes(raw[10:12], "little")


class CephClients:
    """Asks one question or runs one program at a time, each for at most `seconds`."""

    def __init__(self, workers: Workers, commands: Commands, seconds: float) -> None:
        self._workers = workers
        self._commands = commands
        self.seconds = seconds

    def ask(
        self,
        cluster: Cluster,
        credentials: Credentials,
        what: str,
        function: Callable[Concatenate[librados.Session, P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """What a function of `librados` or `librbd` returns; `what` is the question as Ceph's programs are asked it.

        Raises CephMissing, CephExists, DeviceInUse, ResourceExhausted, FailedPrecondition (the cluster refuses us, or
        the library is missing), DeadlineExceeded, CommandFailed.
        """
        login = Login(",".join(cluster.monitors), credentials.user, credentials.key)
        with (
            memory_file(librados.question(login, function, args, kwargs), what) as asked,
            memory_file(b"", f"the answer of {what}") as into,
            self._workers.apart(_KIND),
        ):
            try:
                self._workers.call(what, self.seconds, librados.answer, asked, into)
            except DeadlineExceeded as error:
                raise _silent(cluster, what, self.seconds, error) from None
            except Refused as error:
                if error.errno == errno.ETIMEDOUT:
                    raise _silent(cluster, what, self.seconds) from None
                raise refused(cluster, credentials.user, error.errno or 0) from None
            except OSError as error:
                raise meant(cluster, credentials.user, what, error.errno or 0, str(error.strerror)) from None
            answer: R = pickle.loads(content_of(into))  # noqa: S301 - of our own child
            return answer

    def run(
        self,
        cluster: Cluster,
        credentials: Credentials,
        program: str,
        *words: str | Handle,
        seconds: float | None = None,
    ) -> str:
        """All that a program says on standard output. Errors as `ask`."""
        limit = self.seconds if seconds is None else seconds
        monitors = ",".join(cluster.monitors)
        with (
            memory_file(credentials.key.encode(), f"the key of client.{credentials.user}") as key,
            memory_file(b"", f"the answer of {program}") as answer,
        ):
            access = ("-c", "/dev/null", "-m", monitors, "--id", credentials.user, "--keyfile", key)
            try:
                self._commands.run_into(answer, [program, *access, *words], timeout=limit)
            except DeadlineExceeded as error:
                raise _silent(cluster, _shown(program, words), limit, error) from None
            except ProgramFailed as failed:
                # Both: on standard error a client may have logged what did not matter, and said the error on the other.
                said = f"{content_of(answer).decode(errors='replace')}\n{failed.stderr}"
                said = said.replace(credentials.key, "…")  # Ceph quotes a key that it cannot decode
                raise told(cluster, credentials.user, _shown(program, words), failed.code, said) from None
            return content_of(answer).decode(errors="replace")


def _silent(cluster: Cluster, what: str, seconds: float, error: DeadlineExceeded | None = None) -> DeadlineExceeded:
    if error is not None and "did not start" in str(error):
        return error
    end = "it cannot be killed" if "cannot be killed" in str(error) else "it was killed" if error else "it gave up"
    return DeadlineExceeded(
        f"the Ceph cluster {cluster.id} ({','.join(cluster.monitors)}) did not answer {what} within {seconds:g} s "
        f"({end}); look at 'ceph status' and at the network between this node and its monitors and OSDs"
    )


def memory_file(content: bytes, name: str) -> Handle:
    """A file in memory alone with that content, which is what people are told instead of its path."""
    descriptor = os.memfd_create("luks-csi", os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    return Handle(descriptor, name)


def content_of(file: Handle) -> bytes:
    """All of a file in memory."""
    return os.pread(file.fd, os.fstat(file.fd).st_size, 0)


def _shown(program: str, words: Sequence[str | Handle]) -> str:
    return " ".join([program, *(str(word) for word in words)])[:200]


def pools_of(clients: CephClients, cluster: Cluster, credentials: Credentials) -> Sequence[str]:
    """The names of a cluster's pools."""
    return clients.ask(cluster, credentials, "rados lspools", librados.pools)


def read_credentials(folder: Path) -> Credentials | None:
    """A Secret that kubelet has mounted; None where it has not both entries. Raises OSError but for absent files."""
    try:
        user, key = ((folder / name).read_text().strip() for name in (USER, KEY))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Credentials(user, key) if user and key else None
