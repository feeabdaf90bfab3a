"""How a volume's pool is reached: where its id says that it lies, and as which user of the cluster.

The user comes with the calls, as Ceph-CSI's classes have it: `userID` and `userKey` of the secret. It is kept in memory
alone, for the calls that bring none, and forgotten when the volume is detached or deleted; the session of a worker that
began with it lasts until the worker ends, or four others were used since. A Secret that is mounted for the server
serves those that never bring one: lists, capacity, rotation.
"""

import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from csi_driver.backends.rbdclients import CephClients, Credentials, pools_of, read_credentials
from csi_driver.backends.rbderrors import KEY, USER
from csi_driver.backends.rbdplace import Cluster, Clusters, Place, digest_of
from csi_driver.backends.rbdpool import CephPool, PoolRoom
from csi_driver.model.access import Access
from csi_driver.model.errors import DriverError, FailedPrecondition, InvalidArgument, NotFound
from csi_driver.model.volume import VolumeParameters

_LOOK_SECONDS: Final = 10.0
_USER: Final = re.compile(r"[^\s,=\x00-\x1f\x7f]{1,128}")


class CephAccess:
    """The pools of volumes. `secrets` are folders of Secrets; the first one with a user of Ceph is the server's own."""

    def __init__(self, clusters: Clusters, clients: CephClients, secrets: Sequence[Path]) -> None:
        self._clusters = clusters
        self._clients = clients
        self._secrets = secrets
        self._guard = threading.Lock()
        self._brought: dict[str, Credentials] = {}
        self._places: dict[str, tuple[str, str]] = {}  # cluster and pool, by the digest that ids end in

    def use(self, volume_id: str, access: Access) -> None:
        """Keep the user that a call brought for the volume. Raises FailedPrecondition where half of it is missing."""
        user, key = access.secrets.get(USER, ""), access.secrets.get(KEY, "")
        if not user and not key:
            return
        if not user or not key:
            raise FailedPrecondition(
                f"the secret for volume {volume_id} has {USER if user else KEY} and not {KEY if user else USER}; a "
                f"user of Ceph needs both, give the secret the other one"
            )
        with self._guard:
            self._brought[volume_id] = _checked(Credentials(user, key), f"the secret for volume {volume_id}")

    def forget(self, volume_id: str) -> None:
        """Forget what calls brought for the volume."""
        with self._guard:
            self._brought.pop(volume_id, None)

    def knows(self, volume_id: str) -> bool:
        """Whether there is a user for the volume, without a look at its cluster."""
        try:
            return self._credentials(volume_id, "") is not None
        except DriverError:
            return False

    def place_of(self, parameters: VolumeParameters) -> Place:
        """Where volumes of a class lie. Raises InvalidArgument, FailedPrecondition."""
        if not parameters.cluster_id or not parameters.pool:
            lacking = "pool" if parameters.cluster_id else "clusterID"
            raise InvalidArgument(
                f"the parameter {lacking} is missing: a class of the backend rbd says by clusterID and pool where its "
                f"volumes lie; add it"
            )
        return self._clusters.named(parameters.cluster_id).place(parameters.pool)

    def pool(self, volume_id: str, place: Place | None = None) -> CephPool:
        """The volume's pool, with the user that is known for it. Raises NotFound for what is no id of Ceph's."""
        place = place or self._find(volume_id)
        return CephPool(self._clients, place, self._credentials(volume_id, place.cluster.id))

    def numbered(self, cluster_id: str, number: int) -> CephPool:
        """The pool of that number, with the server's own user. Raises FailedPrecondition."""
        cluster = self._clusters.named(cluster_id)
        for room in self._own(Place(cluster, "")).rooms():
            if room.number == number:
                return self.pool("", cluster.place(room.name))
        raise FailedPrecondition(
            f"the Ceph cluster {cluster_id} has no pool with the number {number}; compare the id that names it, and "
            f"the cluster in --ceph-config"
        )

    def every_pool(self) -> Iterator[CephPool]:
        """All pools of all configured clusters, with the server's own user."""
        for cluster in self._clusters.all():
            for place in self._of_cluster("", cluster):
                yield self._own(place)

    def rooms(self, parameters: VolumeParameters | None) -> Sequence[PoolRoom]:
        """The room of a class's pool for data, by the server's own user; without a class of every pool.

        Raises InvalidArgument, FailedPrecondition.
        """
        if parameters is None or parameters.pool is None:
            pools = (self._own(Place(cluster, "")) for cluster in self._clusters.all())
            return [room for pool in pools for room in pool.rooms()]
        pool = self._own(self.place_of(parameters))
        return [pool.room_of(pool.rooms(), parameters.data_pool or parameters.pool)]

    def reached(self) -> str:
        """Each configured cluster with its fsid, asked as the server's own user. Raises as `CephClients.ask`."""
        if self._own_credentials() is None:
            return "the server has no user of its own: each call brings one"
        pools = [self._own(Place(cluster, "")) for cluster in self._clusters.all()]
        told = (f"{pool.place.cluster.id} ({pool.cluster_uuid(_LOOK_SECONDS)})" for pool in pools)
        return ", ".join(told) or "no cluster is configured"

    def _own(self, place: Place) -> CephPool:
        """With the server's own user."""
        return CephPool(self._clients, place, self._credentials("", place.cluster.id))

    def _credentials(self, volume_id: str, cluster: str) -> Credentials:
        with self._guard:
            if (brought := self._brought.get(volume_id)) is not None:
                return brought
        if (own := self._own_credentials()) is not None:
            return own
        what = f"volume {volume_id}" if volume_id else "this call"
        raise FailedPrecondition(
            f"nobody told a user of the Ceph cluster {cluster} for {what}: name a secret with {USER} and {KEY} in its "
            f"class, or mount one for the server with --ceph-secret"
        )

    def _own_credentials(self) -> Credentials | None:
        """The server's own user. Raises FailedPrecondition where it is none of Ceph's, or cannot be read."""
        for folder in self._secrets:
            try:
                own = read_credentials(folder)
            except OSError as error:
                raise FailedPrecondition(
                    f"the secret of the server in {folder} cannot be read ({error.strerror}); mount it there"
                ) from None
            if own is not None:
                return _checked(own, f"the secret in {folder}")
        return None

    def _find(self, volume_id: str) -> Place:
        digest = digest_of(volume_id)
        if digest is None:
            raise NotFound(f"volume {volume_id} does not exist: its id names no pool of Ceph")
        if (known := self._places.get(digest)) is not None:
            place = self._clusters.named(known[0]).place(known[1])
            if place.digest == digest:
                return place
        failed: DriverError | None = None
        clusters = self._clusters.all()
        for cluster in clusters:
            try:
                places = self._of_cluster(volume_id, cluster)
            except DriverError as error:
                failed = error
                continue
            for place in places:
                self._places[place.digest] = cluster.id, place.pool
                if place.digest == digest:
                    return place
        if failed is not None:
            raise failed
        raise FailedPrecondition(
            f"none of the configured Ceph clusters ({', '.join(cluster.id for cluster in clusters) or 'none'}) has the "
            f"pool in which volume {volume_id} lies; add its cluster and namespace to --ceph-config"
        )

    def _of_cluster(self, volume_id: str, cluster: Cluster) -> Sequence[Place]:
        places = []
        for name in pools_of(self._clients, cluster, self._credentials(volume_id, cluster.id)):
            try:
                places.append(cluster.place(name))
            except InvalidArgument:
                continue  # no class could name it
        return places


def _checked(credentials: Credentials, where: str) -> Credentials:
    """Before libraries and kernel read what is none: a user with a comma would be options of the mapping."""
    if not _USER.fullmatch(credentials.user):
        raise FailedPrecondition(f"{where} has a {USER} that is no user of Ceph; a blank or one of ',=' is in none")
    if not credentials.is_key:
        raise FailedPrecondition(
            f"{where} has a {KEY} that is no key of Ceph, or of a kind that the kernel does not know (it knows aes); "
            f"'ceph auth get-key client.{credentials.user}' tells it"
        )
    return credentials
