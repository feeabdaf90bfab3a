"""What Ceph's libraries and programs say when they fail, as errors of ours: by the number of the error.

Of a program it is in the text.
"""

import re
from errno import EACCES, EINVAL, ENOENT
from typing import Final

from csi_driver.backends.rbdplace import Cluster
from csi_driver.model.errors import (
    Aborted,
    CommandFailed,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
)

USER: Final = "userID"
KEY: Final = "userKey"

_ERRNO: Final = re.compile(r"\((\d+)\) ")
_NAMELESS: Final = re.compile(r"unable to parse addrs|server name not found")
_LOGGED: Final = re.compile(r"\d{4}-\d\d-\d\dT")
_REFUSED: Final = re.compile(
    r"handle_auth_bad_method|failed to decode key|failed to fetch mon config|connect(ing)? to the cluster"
)


class CephMissing(NotFound):
    """No such pool, image or object."""


class CephExists(Aborted):
    """It exists already: somebody else makes it at the same time."""


def told(cluster: Cluster, user: str, what: str, code: int, text: str) -> DriverError:
    """What a program said when it ended with that code, as an error of ours."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not _LOGGED.match(line)]
    said = lines[-1] if lines else (text.splitlines() or [f"exit code {code}"])[-1]
    found = next((int(match[1]) for line in reversed(lines) if (match := _ERRNO.search(line))), code)
    if _NAMELESS.search(text):
        return refused(cluster, user, ENOENT)
    if _REFUSED.search(text):
        return refused(cluster, user, EACCES)
    if found == 1 and "ermi" not in said:
        found = 0  # an exit code, and no EPERM
    return meant(cluster, user, what, found, said)


def refused(cluster: Cluster, user: str, number: int) -> DriverError:
    """No session of that user can begin."""
    if number in (ENOENT, EINVAL):
        return FailedPrecondition(
            f"the Ceph cluster {cluster.id} cannot be reached: no address is found for one of its monitors "
            f"({', '.join(cluster.monitors)}); correct them in --ceph-config, or let this node resolve their names"
        )
    return FailedPrecondition(
        f"the Ceph cluster {cluster.id} refuses client.{user}: {USER} or {KEY} in the secret is not one of that "
        f"cluster; 'ceph auth get client.{user}' tells the key"
    )


def meant(cluster: Cluster, user: str, what: str, number: int, said: str) -> DriverError:
    """What failed with the error of that number, as an error of ours."""
    text = f"{what} in the Ceph cluster {cluster.id} failed: {said}"
    match number:
        case 2:
            return CephMissing(f"{text}; look whether the pool or image was removed by hand")
        case 17:
            return CephExists(f"{text}; call again")
        case 16 | 39:
            return DeviceInUse(f"{text}; unmap it where it is mapped, or wait 30 s for a client that crashed")
        case 28 | 122:
            return ResourceExhausted(f"{text}; free space in the pool or raise its quota")
        case 1 | 13:
            return FailedPrecondition(
                f"{text}; client.{user} needs the capabilities mon 'profile rbd', osd 'profile rbd' and "
                f"mgr 'profile rbd'"
            )
        case 108:
            return FailedPrecondition(
                f"{text}; this node's client was fenced off, unstage the volume and stage it anew"
            )
    return CommandFailed(f"{text}; look at 'ceph status'")
