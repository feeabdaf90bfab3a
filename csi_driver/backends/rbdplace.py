"""Where in which Ceph cluster a volume lies: Ceph-CSI's configuration of clusters, pools, and what an id tells of them.

The configuration is the file `config.json` of Ceph-CSI's ConfigMap `ceph-csi-config`: a list of clusters, each with
`clusterID`, `monitors` and, below `rbd`, `radosNamespace`. What else stands there is for other drivers.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from csi_driver.host.files import read_file
from csi_driver.model.errors import FailedPrecondition, InvalidArgument
from csi_driver.model.reading import decode
from csi_driver.model.volume import volume_id_for

_DIGEST: Final = 10  # hexadecimal digits: two of a hundred places are one in 2e8
_LONGEST_NAME: Final = 55  # with a dot and the digest 66 bytes, what an id may have
_HASHED: Final = 53
_NAME: Final = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,127}")
_MONITOR: Final = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9.:,\[\]/_-]{0,252}")


class _Rbd(msgspec.Struct, frozen=True):
    namespace: str = msgspec.field(name="radosNamespace", default="")
    network: str = msgspec.field(name="netNamespaceFilePath", default="")


class _Entry(msgspec.Struct, frozen=True):
    cluster_id: str = msgspec.field(name="clusterID")
    monitors: tuple[str, ...] = ()
    namespace: str = msgspec.field(name="radosNamespace", default="")  # where older configurations have it
    rbd: _Rbd = _Rbd()


@dataclass(frozen=True)
class Cluster:
    """A Ceph cluster as the configuration names it; `namespace` is the RADOS namespace of its images, "" for none."""

    id: str
    monitors: tuple[str, ...]
    namespace: str = ""

    def place(self, pool: str) -> "Place":
        """A pool of it. Raises InvalidArgument for a name that could be taken for something else."""
        if not _NAME.fullmatch(pool):
            raise InvalidArgument(
                f"the parameter pool is {pool!r}; it must be the name of a Ceph pool, of letters, digits, '_', '.', '-'"
            )
        return Place(self, pool)


@dataclass(frozen=True)
class Place:
    """Where images of a class lie."""

    cluster: Cluster
    pool: str

    @property
    def spec(self) -> str:
        """Pool and namespace as `rbd` takes them."""
        return f"{self.pool}/{self.cluster.namespace}" if self.cluster.namespace else self.pool

    @property
    def digest(self) -> str:
        """What the ids of its volumes end in: cluster, pool and namespace, whatever its monitors are."""
        return hashlib.sha256(f"{self.cluster.id}/{self.spec}".encode()).hexdigest()[:_DIGEST]

    def id_for(self, name: str) -> str:
        """The id of the volume of that name here: the name where it is short and safe, else a hash of it."""
        plain = volume_id_for(name)
        if plain != name or len(name) > _LONGEST_NAME:
            plain = f"x-{hashlib.sha256(name.encode()).hexdigest()[:_HASHED]}"
        return f"{plain}.{self.digest}"

    def __str__(self) -> str:
        return f"{self.spec} of the Ceph cluster {self.cluster.id}"


def digest_of(volume_id: str) -> str | None:
    """The digest of the place that an id tells; None for one that no volume of Ceph can have."""
    name, dot, digest = volume_id.rpartition(".")
    return digest if name and dot and re.fullmatch(rf"[0-9a-f]{{{_DIGEST}}}", digest) else None


def image_name(volume_id: str) -> str:
    """What the volume's image is called, as Ceph-CSI's are."""
    return f"csi-vol-{volume_id}"


class Clusters:
    """The configured clusters, read anew whenever the file has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: tuple[bytes, Sequence[Cluster]] | None = None

    def all(self) -> Sequence[Cluster]:
        """Every configured cluster. Raises FailedPrecondition where the file cannot be read or says what cannot be."""
        try:
            content = read_file(self._path)
        except OSError as error:
            raise FailedPrecondition(
                f"the configuration of Ceph clusters {self._path} cannot be read ({error.strerror}); mount the "
                f"ConfigMap ceph-csi-config there, or name another file with --ceph-config"
            ) from None
        if (kept := self._kept) is not None and kept[0] == content:
            return kept[1]
        try:
            entries = decode(content, list[_Entry])
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise FailedPrecondition(
                f"the configuration of Ceph clusters {self._path} cannot be understood ({error}); it must be a list of "
                f"clusters, each with clusterID and monitors"
            ) from None
        found = [self._cluster(entry) for entry in entries]
        self._kept = content, found
        return found

    def named(self, cluster_id: str) -> Cluster:
        """The cluster of that clusterID. Raises FailedPrecondition where it is not configured."""
        found = self.all()
        for cluster in found:
            if cluster.id == cluster_id:
                return cluster
        known = ", ".join(repr(cluster.id) for cluster in found) or "none"
        raise FailedPrecondition(
            f"the Ceph cluster {cluster_id!r} is not configured; {self._path} has {known}: add it there, or correct "
            f"the parameter clusterID"
        )

    def _cluster(self, entry: _Entry) -> Cluster:
        namespace = entry.rbd.namespace or entry.namespace
        if not entry.cluster_id or not entry.monitors or not all(map(_MONITOR.fullmatch, entry.monitors)):
            raise FailedPrecondition(
                f"the configuration of Ceph clusters {self._path} has a cluster {entry.cluster_id!r} with the monitors "
                f"{list(entry.monitors)}; each needs a clusterID and the addresses of its monitors"
            )
        if namespace and not _NAME.fullmatch(namespace):
            raise FailedPrecondition(
                f"the configuration of Ceph clusters {self._path} has the radosNamespace {namespace!r} for the cluster "
                f"{entry.cluster_id!r}; it must be of letters, digits, '_', '.', '-'"
            )
        if entry.rbd.network:
            raise FailedPrecondition(
                f"the configuration of Ceph clusters {self._path} has netNamespaceFilePath for the cluster "
                f"{entry.cluster_id!r}; this driver reaches Ceph by the host's network only, leave it out"
            )
        return Cluster(entry.cluster_id, entry.monitors, namespace)
