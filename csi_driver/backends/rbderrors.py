"""What Ceph's libraries, and the kernel, answer when they fail, as errors of ours: by the number of the error."""

import os
from errno import EACCES, EINVAL, EPERM
from typing import Final

from csi_driver.backends.rbdplace import Cluster
from csi_driver.model.errors import (
    Aborted,
    CommandFailed,
    DeadlineExceeded,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
)

USER: Final = "userID"
KEY: Final = "userKey"


class CephMissing(NotFound):
    """No such image or object."""


class CephExists(Aborted):
    """It exists already: somebody else makes it at the same time."""


def silent(cluster: Cluster, what: str, seconds: float, error: DeadlineExceeded | None = None) -> DeadlineExceeded:
    """It did not answer in time; `error` says what became of the process that asked."""
    if error is not None and "did not start" in str(error):
        return error
    end = "it cannot be killed" if "cannot be killed" in str(error) else "it was killed" if error else "it gave up"
    return DeadlineExceeded(
        f"the Ceph cluster {cluster.id} ({','.join(cluster.monitors)}) did not answer {what} within {seconds:g} s "
        f"({end}); look at 'ceph status' and at the network between this node and its monitors and OSDs"
    )


def refused(cluster: Cluster, user: str, number: int) -> DriverError:
    """No session of that user can begin."""
    if number not in (EINVAL, EACCES, EPERM):
        return FailedPrecondition(
            f"no session with the Ceph cluster {cluster.id} can begin as client.{user}: {os.strerror(number)}; look at "
            f"'ceph status' and at the versions of librados on this node and of the cluster"
        )
    if number == EINVAL:
        return FailedPrecondition(
            f"the Ceph cluster {cluster.id} cannot be reached: no address is found for one of its monitors "
            f"({', '.join(cluster.monitors)}); correct them in --ceph-config, or let this node resolve their names"
        )
    return FailedPrecondition(
        f"the Ceph cluster {cluster.id} refuses client.{user}: {USER} or {KEY} in the secret is not one of that "
        f"cluster; 'ceph auth get client.{user}' tells the key"
    )


def no_pool(cluster: Cluster, what: str, pool: str) -> FailedPrecondition:
    """Its pool has gone, or has another name by now. It is not CephMissing: its volumes would count as deleted."""
    return FailedPrecondition(
        f"{what} in the Ceph cluster {cluster.id} failed: it has no pool {pool}; make it, correct the class, or give a "
        f"pool that was renamed its name again, as volumes are found by it"
    )


def meant(cluster: Cluster, user: str, what: str, number: int, said: str) -> DriverError:
    """What failed with the error of that number, as an error of ours."""
    text = f"{what} in the Ceph cluster {cluster.id} failed: {said}"
    match number:
        case 2:
            return CephMissing(f"{text}; look whether the pool or image was removed by hand")
        case 17:
            return CephExists(f"{text}; call again")
        case 39:
            return DeviceInUse(f"{text}; it has snapshots ('rbd snap ls --all'), remove them if nobody needs them")
        case 10:
            return DeviceInUse(f"{text}; images were cloned of its snapshots ('rbd children'), flatten them first")
        case 31:
            return DeviceInUse(f"{text}; it is in a group, take it out of that first ('rbd group image rm')")
        case 16:
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
