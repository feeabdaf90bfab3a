"""How a cluster of Ceph is asked: by its libraries, in workers.

Not in the server: what hangs on a cluster is a process with a time limit, and no thread of ours. No configuration file
of the host is read, and no file written: the key is in memory alone.
"""

import base64
import errno
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from csi_driver.backends import librados
from csi_driver.backends.librados import Login, NoPool, Refused
from csi_driver.backends.rbderrors import KEY, USER, meant, no_pool, refused, silent
from csi_driver.backends.rbdplace import Cluster
from csi_driver.host.handle import Handle
from csi_driver.host.workers import Workers
from csi_driver.model.errors import DeadlineExceeded

R = TypeVar("R")

_KIND: Final = "ceph"
_AES: Final = b"\1\0"  # CEPH_CRYPTO_AES, the one that krbd knows
_KEY_HEAD: Final = 12  # CryptoKey of src/auth/Crypto.cc: type, seconds, nanoseconds, length


@dataclass(frozen=True)
class Credentials:
    """A user of a cluster and its key, which repr and comparison leave out."""

    user: str
    key: str = field(repr=False, compare=False)

    @property
    def is_key(self) -> bool:
        """Whether it has the form of a key of Ceph: the one type, a time, and a secret behind its length, in base64."""
        try:
            raw = base64.b64decode(self.key, validate=True)
        except ValueError:
            return False
        return len(raw) > _KEY_HEAD and raw[:2] == _AES and len(raw) == _KEY_HEAD + int.from_bytes(raw[10:12], "little")


class CephClients:
    """Asks one question at a time, each for at most `seconds`."""

    def __init__(self, workers: Workers, seconds: float) -> None:
        self._workers = workers
        self._seconds = seconds

    def ask(
        self,
        cluster: Cluster,
        credentials: Credentials,
        what: str,
        function: Callable[..., R],
        *args: object,
        seconds: float | None = None,
    ) -> R:
        """What a function of `librados` or `librbd` returns for those arguments behind its session.

        `what` is the question as Ceph's own programs are asked it. Raises CephMissing, CephExists, DeviceInUse,
        ResourceExhausted, FailedPrecondition (the cluster refuses us, or the library is missing), DeadlineExceeded,
        CommandFailed.
        """
        login, limit = Login(",".join(cluster.monitors), credentials.user, credentials.key), seconds or self._seconds
        with (
            _memory_file(librados.question(login, function, args, limit), what) as asked,
            _memory_file(b"", f"the answer of {what}") as into,
            self._workers.apart(_KIND),
        ):
            try:
                self._workers.call(what, limit, librados.answer, asked, into)
            except DeadlineExceeded as error:
                self._workers.dismiss(_KIND)  # each of their sessions would hang as long, be it that of another cluster
                raise silent(cluster, what, limit, error) from None
            except Refused as error:
                if error.errno == errno.ETIMEDOUT:
                    raise silent(cluster, what, limit) from None
                raise refused(cluster, credentials.user, error.errno or 0) from None
            except NoPool as error:
                raise no_pool(cluster, what, str(error.strerror)) from None
            except OSError as error:
                raise meant(cluster, credentials.user, what, error.errno or 0, str(error.strerror)) from None
            answer: R = pickle.loads(os.pread(into.fd, os.fstat(into.fd).st_size, 0))  # noqa: S301 - of our own child
            return answer


def _memory_file(content: bytes, name: str) -> Handle:
    """A file in memory alone with that content, which is what people are told instead of its path."""
    descriptor = os.memfd_create("luks-csi", os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    return Handle(descriptor, name)


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
