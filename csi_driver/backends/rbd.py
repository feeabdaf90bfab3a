"""Volumes as images of Ceph RBD, mapped by the kernel (krbd).

csi-vol-<id>       the image; what is known of it lies beside it in its pool: `csi_driver.backends.rbdrecords`
<folder>/attached  which images this node has mapped: `csi_driver.backends.rbddevices`
<folder>/headers   copies of headers that somebody asked for here: `csi_driver.backends.rbdheaders`
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec

from csi_driver.backends.base import Fill, Listed, Space
from csi_driver.backends.rbdaccess import CephAccess
from csi_driver.backends.rbddevices import BorrowedDevice, MappedVolumes, Pin
from csi_driver.backends.rbderrors import CephMissing
from csi_driver.backends.rbdforeign import CsiVolumes, cut_short
from csi_driver.backends.rbdheaders import HeaderCopies
from csi_driver.backends.rbdimages import Images, rounded
from csi_driver.backends.rbdnodes import NodeAttachments, whole
from csi_driver.backends.rbdplace import digest_of, image_name
from csi_driver.backends.rbdpool import CephPool
from csi_driver.backends.rbdrecords import VolumeLogs, VolumeState
from csi_driver.backends.records import RecordCodec
from csi_driver.host.files import Files
from csi_driver.host.handle import Handle
from csi_driver.host.log import log
from csi_driver.model.access import Access
from csi_driver.model.errors import (
    Aborted,
    DeviceAbsent,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    NotFound,
)
from csi_driver.model.volume import VolumeParameters, VolumeRecord


class RbdBackend:
    """Images in the clusters that `access` knows. `is_central`: this server makes volumes, and lists them all.

    `remember` keeps, at the server's start, what commands beside it must know.
    """

    name = "rbd"
    takes_many_nodes = True

    def __init__(
        self,
        folder: Path,
        access: CephAccess,
        logs: VolumeLogs,
        images: Images,
        nodes: NodeAttachments,
        devices: MappedVolumes,
        codec: RecordCodec,
        files: Files,
        *,
        is_central: bool,
        remember: Callable[[], None] = lambda: None,
    ) -> None:
        self._headers = HeaderCopies(folder / "headers", access, logs, files)
        self._access = access
        self._logs = logs
        self._images = images
        self._nodes = nodes
        self._devices = devices
        self._codec = codec
        self._is_central, self._remember = is_central, remember
        self.reached = access.reached
        self.foreign = CsiVolumes(access, logs, devices, codec)

    # --- storage outside the nodes

    @property
    def own_node(self) -> str:
        return self._nodes.node_id

    def id_for(self, name: str, parameters: VolumeParameters) -> str:
        return self._access.place_of(parameters).id_for(name)

    def places(self, record: VolumeRecord) -> Sequence[Mapping[str, str]]:  # noqa: ARG002 - a cluster is everywhere
        return ()

    def use(self, volume_id: str, access: Access) -> None:
        self._access.use(volume_id, access)

    def most_volumes(self) -> int:
        """The kernel has numbers for more images than a node can carry (drivers/block/rbd.c, single_major)."""
        return 0

    def publish(self, volume_id: str, node_id: str, *, many_nodes: bool) -> Mapping[str, str]:
        """Write it down beside the image, which is where whoever maps it looks."""
        self._nodes.give(self._access.pool(volume_id), volume_id, node_id, many_nodes=many_nodes)
        return {}

    def unpublish(self, volume_id: str, node_id: str) -> None:
        """Take it away, with the cluster's blocklist where the node did not let go of it."""
        if digest_of(volume_id) is not None:
            self._nodes.take(self._access.pool(volume_id), volume_id, node_id)

    def published(self, volume_id: str) -> Sequence[str]:
        return sorted(self._state(volume_id).nodes)

    def listed(self) -> Mapping[str, Callable[[], Listed]]:
        """The names of every pool; the state of a volume is read once, when it is told of."""
        return {volume_id: partial(self._listed, volume_id) for volume_id in self.ids()}

    def _listed(self, volume_id: str) -> Listed:
        state = self._state(volume_id)
        return Listed(self._record(volume_id, state), (), sorted(state.nodes))

    # --- the life of a volume

    def prepare(self) -> None:
        """Make the folders; no cluster is asked."""
        self._devices.prepare()
        self._headers.prepare()
        self._remember()

    def create(self, record: VolumeRecord, size: int) -> VolumeRecord:
        """Say that it is being made, make the image, then write which it is together with the record."""
        volume_id, parameters = record.id, record.parameters
        pool = self._access.pool(volume_id, self._access.place_of(parameters))
        if pool.place.digest != digest_of(volume_id):
            raise FailedPrecondition(f"volume {volume_id} cannot be made in {pool.place}: its id names another pool")
        state = self._logs.state(pool, volume_id)
        if state is not None and state.record is not None:
            raise FailedPrecondition(
                f"volume {volume_id} cannot be made: its image {image_name(volume_id)} is in {pool.place} and may hold "
                f"data; delete the volume"
            )
        number = self._images.check_room(pool, volume_id, parameters, size)
        cluster, written = pool.cluster_uuid(), self._codec.encode(record).decode()
        made = VolumeState(cluster=cluster, pool_number=number, record=written)
        self._images.make(pool, volume_id, state, parameters, size, made)
        self._images.describe(pool, record)
        return record

    def has(self, volume_id: str) -> bool:
        try:
            self._state(volume_id)
        except NotFound:
            return False
        return True

    def get(self, volume_id: str) -> VolumeRecord:
        return self._record(volume_id, self._state(volume_id))

    def update(self, record: VolumeRecord) -> VolumeRecord:
        """By compare-and-swap in the cluster; then Ceph-CSI's keys of the image are made to say the same."""
        updated = msgspec.structs.replace(record, revision=record.revision + 1)
        before: list[VolumeRecord] = []

        def swap(state: VolumeState | None) -> VolumeState:
            state = whole(record.id, state)
            found = self._record(record.id, state)
            if found.revision != record.revision:
                raise Aborted(f"the record of volume {record.id} was changed by another writer; call again")
            before[:] = [found]
            return msgspec.structs.replace(state, record=self._codec.encode(updated).decode())

        pool = self._access.pool(record.id)
        self._logs.change(pool, record.id, swap)
        if before[0].encryption != updated.encryption:
            self._images.describe(pool, updated)
        return updated

    def delete(self, volume_id: str) -> None:
        """Take the record away in one step, then the image, then what is known of it.

        Raises DeviceInUse while a client has the image open or a node has the volume.
        """
        if digest_of(volume_id) is None:
            return
        pool = self._access.pool(volume_id)
        state = self._logs.state(pool, volume_id)
        if state is not None:
            erase = 0
            if state.record is not None:
                if self._devices.pin(volume_id) is not None:
                    self._release(pool, volume_id)
                state = self._nodes.take_from_commands(pool, volume_id)
                self._images.refuse_used(pool, volume_id, state)
                erase = self._to_erase(volume_id, state)
            self._images.remove(pool, volume_id, self._images.mark_removed(pool, volume_id, erase))
        elif self._logs.is_named(pool, volume_id) and pool.info(image_name(volume_id)) is not None:
            raise FailedPrecondition(
                f"volume {volume_id} cannot be deleted: {pool.place} has an image {image_name(volume_id)}, and the log "
                f"of the volume is empty or gone; restore that object, or remove the image by hand"
            )
        self._logs.forget(pool, volume_id)
        self._access.forget(volume_id)
        self._devices.forget(volume_id)
        self._headers.drop(volume_id)

    def ids(self) -> Sequence[str]:
        """On a node those that are mapped on it, else those of every pool of the configured clusters."""
        if not self._is_central:
            return self._devices.ids()
        return sorted(
            volume_id
            for pool in self._access.every_pool()
            for volume_id in self._logs.ids(pool)
            if digest_of(volume_id) == pool.place.digest
        )

    def grow(self, volume_id: str, size: int) -> None:
        pool, state = self._access.pool(volume_id), self._state(volume_id)
        image = image_name(volume_id)
        found = pool.info(image)
        if found is None or found.id != state.image_id:
            raise self._absent(pool, volume_id, state)
        if found.size < (size := rounded(size)):
            parameters = self._record(volume_id, state).parameters
            self._images.check_room(pool, volume_id, parameters, size - found.size)
            pool.resize(image, size)

    @contextmanager
    def storage(self, volume_id: str) -> Iterator[Handle]:
        """The image, mapped for the length of the block if it is not mapped already."""
        with self.open_storage(volume_id) as handle:
            yield handle

    def open_storage(self, volume_id: str) -> Handle:
        """The image as a device, of which samples are read; mapped as long as the handle is open where it is not."""
        if (handle := self.device_of(volume_id)) is not None:
            return handle
        return BorrowedDevice(self.attach(volume_id, lasting=False), lambda: self.detach(volume_id))

    def is_newest(self, record: VolumeRecord) -> bool:
        """Records are with their image and have one order: what is there is the newest."""
        return self.get(record.id).revision == record.revision

    def accept_record(self, volume_id: str) -> VolumeRecord:
        record = self.get(volume_id)
        if not record.is_settled:
            raise FailedPrecondition(
                f"the record of volume {volume_id} cannot be taken: by what it says the volume would be formatted; "
                f"restore a newer record or read the data by hand"
            )
        return record

    def header_copy(self, volume_id: str) -> Path:
        """Fetched from the cluster, where it is kept beside the image."""
        return self._headers.path(volume_id)

    def has_header_copy(self, volume_id: str) -> bool:
        return self._headers.has(volume_id)

    def header_before(self, volume_id: str) -> Path:
        return self._headers.before(volume_id)

    def keep_header_copy(self, volume_id: str, fill: Fill) -> None:
        self._headers.keep(volume_id, fill)

    # --- devices

    def attach(self, volume_id: str, *, lasting: bool) -> Handle:  # noqa: ARG002 - it stays until `detach`
        """Map it by a client of its own, and write that client's address down before the device is used.

        While the volume is for one node, or might still be formatted, nobody else may have it open: who does is told,
        and it is let go of again. Of two that come at once each sees the other, as each looks behind his own mapping.
        """
        try:
            pool, state = self._access.pool(volume_id), self._state(volume_id)
        except NotFound as error:
            raise DeviceAbsent(str(error)) from None
        record, mine = self._record(volume_id, state), self._nodes.mine(volume_id, state)
        pin = self._pin(pool, volume_id, state)
        mapped = self._devices.mapped(volume_id)
        if mapped is not None and mapped.client != mine.client:
            self._devices.unmap(volume_id, mapped)  # fenced off, perhaps, when the volume was taken from this node
            mapped = None
        is_new = mapped is None
        try:
            if mapped is None:
                self._nodes.fence_earlier_boot(pool, volume_id, mine)
                mapped = self._devices.map(volume_id, pool, pin, record.parameters.map_options)
            if not (mine.many_nodes and record.is_settled):
                self._nodes.refuse_others(pool, volume_id, mapped.client)
            self._nodes.may_write(pool, volume_id, mapped.client, mine)
            return self._devices.open(mapped)
        except BaseException as error:
            if is_new:
                self._let_go(volume_id)
            if isinstance(error, CephMissing):
                raise cut_short(volume_id, state, self._lacking(pool, volume_id, state, error)) from None
            raise

    def guard(self, volume_id: str) -> None:
        """A node has one device of an image, and the cluster knows who else has it open.

        Raises FailedPrecondition where that device was fenced off.
        """
        if (mapped := self._devices.mapped(volume_id)) is not None:
            self._nodes.refuse_fenced(volume_id, self._state(volume_id), mapped.path, mapped.client)

    def refresh(self, device: Handle) -> None:
        self._devices.refresh(device)

    def device_of(self, volume_id: str) -> Handle | None:
        mapped = self._devices.mapped(volume_id)
        return self._devices.open(mapped) if mapped is not None else None

    def is_device_of(self, volume_id: str, number: tuple[int, int]) -> bool:
        return self._devices.is_of(volume_id, number)

    def detach(self, volume_id: str) -> None:
        """Unmap it; then the cluster is told that this node writes no more, if anybody can tell it."""
        if self._devices.pin(volume_id) is None:
            return
        if (mapped := self._devices.mapped(volume_id)) is not None:
            self._devices.unmap(volume_id, mapped)
        if self._access.knows(volume_id):
            try:
                self._nodes.writes_no_more(self._access.pool(volume_id), volume_id)
            except DriverError as error:
                # Who takes the volume from this node will put the client on the blocklist, where it hits nobody.
                log.warning("a cluster was not told that a volume was unmapped", volume_id=volume_id, error=str(error))
        self._devices.forget(volume_id)
        self._access.forget(volume_id)

    # --- room and leftovers

    def space(self, parameters: VolumeParameters | None = None) -> Space:
        """What the cluster says can still be written to the class's pool, its quota and copies counted in.

        Without a class it is the roomiest pool: pools share disks, and a sum would count those twice.
        """
        rooms = self._access.rooms(parameters)
        spaces = (Space(each.used + each.available, each.available, each.available) for each in rooms)
        return max(spaces, key=lambda space: space.available, default=Space(0, 0, 0))

    def orphans(self) -> Sequence[str]:
        """Volumes in the making, or half removed; a node has none."""
        return sorted(
            self._orphan(volume_id) for volume_id in self.ids() if self._is_central and not self.has(volume_id)
        )

    def remove_orphans(self, volume_id: str) -> Sequence[str]:
        if not self._is_central or self.has(volume_id) or volume_id not in self.ids():
            return []
        pool = self._access.pool(volume_id)
        self._images.remove(pool, volume_id, self._images.mark_removed(pool, volume_id, None))
        self._logs.forget(pool, volume_id)
        return [self._orphan(volume_id)]

    def _orphan(self, volume_id: str) -> str:
        return f"{self._access.pool(volume_id).place.spec}/{volume_id}"

    def _release(self, pool: CephPool, volume_id: str) -> None:
        """Let go of a volume that is to be deleted, where this node has it mapped and nobody uses it."""
        try:
            self.detach(volume_id)
        except DeviceInUse:
            mapped = self._devices.mapped(volume_id)
            raise DeviceInUse(
                f"volume {volume_id} cannot be deleted: its image {pool.place.spec}/{image_name(volume_id)} is still "
                f"in use as {mapped.path if mapped else '/dev/rbd*'}; unpublish and unstage it first"
            ) from None

    def _to_erase(self, volume_id: str, state: VolumeState) -> int:
        try:
            record = self._record(volume_id, state)
        except DriverError:
            return 0  # it must go, readable or not
        return record.luks.data_offset if record.luks is not None and record.parameters.erase_on_delete else 0

    def _state(self, volume_id: str) -> VolumeState:
        return whole(volume_id, self._logs.state(self._access.pool(volume_id), volume_id))

    def _record(self, volume_id: str, state: VolumeState) -> VolumeRecord:
        record = self._codec.decode((state.record or "").encode(), f"beside the image {image_name(volume_id)}")
        if record.id != volume_id:
            raise FailedPrecondition(f"the record of volume {volume_id} is that of volume {record.id}; restore its own")
        return record

    def _pin(self, pool: CephPool, volume_id: str, state: VolumeState) -> Pin:
        if state.image_id is None or state.pool_number is None or state.cluster is None:
            raise self._absent(pool, volume_id, state)
        return Pin(
            fsid=state.cluster,
            namespace=pool.place.cluster.namespace,
            pool_number=state.pool_number,
            image_id=state.image_id,
            image=image_name(volume_id),
        )

    def _let_go(self, volume_id: str) -> None:
        """After an error: what was mapped for the call goes again."""
        try:
            self.detach(volume_id)
        except DriverError as error:
            log.warning("something was left behind after an error", volume_id=volume_id, error=str(error))

    def _lacking(self, pool: CephPool, volume_id: str, state: VolumeState, error: CephMissing) -> DriverError:
        """NOT_FOUND would say that there is no such volume: whether its image is gone, or what else is."""
        with suppress(CephMissing):
            found = pool.info(image_name(volume_id))
            if found is None or found.id != state.image_id:
                return self._absent(pool, volume_id, state)
        return DeviceAbsent(str(error))

    def _absent(self, pool: CephPool, volume_id: str, state: VolumeState) -> DeviceAbsent:
        return DeviceAbsent(
            f"volume {volume_id} has no image {image_name(volume_id)} with the id {state.image_id} in {pool.place}; "
            f"restore it, or put back the one that had the name"
        )
