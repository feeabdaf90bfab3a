"""Volumes on raw block claims of another CSI driver: encryption in front of the storage that a cluster has.

The claim is made, enlarged and deleted by the controller (`csiclaims`), which also has a holder pod bring it to a node
(`csiholders`, `csiholding`; put right by `csimending`); the node gets the device as an open descriptor (`csinode`).
Where the class says so, and the driver below wants no attaching, there is no holder, and the node calls that driver
(`csibelow`, `csidirect`). Records and header copies are objects of Kubernetes (`csirecords`, `csiheaders`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from csi_driver.backends.base import Fill, Listed, Space
from csi_driver.backends.csibelow import DIRECT
from csi_driver.backends.csiclaims import Claims, places_of
from csi_driver.backends.csiheaders import HeaderCopies
from csi_driver.backends.csiholders import HolderPods, node_of, refuse_open
from csi_driver.backends.csimending import Mending
from csi_driver.backends.csinode import NodeDevices
from csi_driver.backends.csirecords import Known, RecordObjects, Spec
from csi_driver.host.handle import Handle
from csi_driver.kube.kinds import name_of
from csi_driver.model.access import Access
from csi_driver.model.errors import (
    Aborted,
    DeadlineExceeded,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from csi_driver.model.volume import VolumeParameters, VolumeRecord, is_object_name, volume_id_for

_MOST_BYTES: Final = 1 << 60
"""What is said of room: only the other driver knows, and its claims tell."""


class CsiBackend:
    """Volumes on `claims`, given to nodes by `holders`; `devices` are those of this node.

    `remember` keeps, at the server's start, what commands beside it must know.
    """

    name = "csi"
    takes_many_nodes = False
    own_node = ""  # claims and holder pods are the controller's

    def __init__(
        self,
        records: RecordObjects,
        headers: HeaderCopies,
        claims: Claims,
        holders: HolderPods,
        devices: NodeDevices,
        *,
        is_node: bool,
        node_topology: str,
        remember: Callable[[], None] = lambda: None,
    ) -> None:
        self._records = records
        self._headers = headers
        self._claims = claims
        self._holders = holders
        self._devices = devices
        self._is_node = is_node
        self._node_topology = node_topology
        self._remember = remember
        self._wished: dict[str, str] = {}
        self._mending = Mending(records, headers, holders, partial(self._undo, wait=False))

    # What every backend does.

    def prepare(self) -> None:
        """Make the folder for pins and the sockets of holders, on a node."""
        self._remember()
        if self._is_node:
            self._devices.prepare()

    def create(self, record: VolumeRecord, size: int) -> VolumeRecord:
        """Have a claim made and bound. Raises Aborted while it is not: the call goes on with it."""
        volume_id, name = record.id, record.parameters.backing_storage_class
        if name is None:
            raise InvalidArgument(
                f"volume {volume_id} cannot be made: the parameter backingStorageClass must name the StorageClass of "
                f"the driver that is to keep the ciphertext"
            )
        if size > _MOST_BYTES:
            raise ResourceExhausted(f"there is no room for volume {volume_id}: no driver makes {size} bytes")
        storage_class = self._claims.check_class(volume_id, name)
        is_direct = record.parameters.backing_attach == DIRECT
        if is_direct:
            self._claims.check_direct(volume_id, str(storage_class.get("provisioner")))
        known = self._making(volume_id, Spec(state="Making", backing_storage_class=name, size=size))
        try:
            claim = self._claims.ensure(known, storage_class, self._wished.get(volume_id, ""))
            if not known.spec.claim_uid:
                known = self._records.write(known, claim_uid=claim["metadata"]["uid"])
            volume = self._claims.bound(known, claim)
            self._records.write(
                known,
                state="Ready",
                volume_name=name_of(volume),
                places=places_of(volume),
                direct=self._claims.direct_of(volume_id, volume) if is_direct else None,
                record=self._records.encode(record),
            )
        except (Aborted, DeadlineExceeded, Unavailable):
            raise
        except DriverError:
            # Nobody may ask again for a volume that could not be made; another controller may have made it meanwhile.
            with suppress(DriverError):
                self._undo(known)
            raise
        self._wished.pop(volume_id, None)
        return record

    def has(self, volume_id: str) -> bool:
        """On a node, whether it is attached there: it is asked of each lock, and must not want the API for that."""
        if self._is_node:
            return self._devices.is_known(volume_id)
        try:
            found = self._records.find(volume_id)
        except (Unavailable, FailedPrecondition):
            return True
        return found is not None and found.spec.state == "Ready"

    def get(self, volume_id: str) -> VolumeRecord:
        known = self._records.ready(volume_id)
        self._wished.pop(volume_id, None)  # one that is there has its place
        return self._records.decode(known)

    def update(self, record: VolumeRecord) -> VolumeRecord:
        """Write the record if it was made from the one that is there, in whatever version of the object."""
        while True:
            known = self._records.ready(record.id)
            if self._records.decode(known).revision != record.revision:
                raise Aborted(f"the record of volume {record.id} was changed by another writer; call again")
            updated = msgspec.structs.replace(record, revision=record.revision + 1)
            with suppress(Aborted):  # another field was written meanwhile, or the record, which is seen then
                self._records.write(known, record=self._records.encode(updated))
                return updated

    def delete(self, volume_id: str) -> None:
        """Delete claim, header copies and record. Raises DeviceInUse, Aborted while something of it is going."""
        self._wished.pop(volume_id, None)
        known = self._records.find(volume_id)
        if known is None:
            return
        if (staged := self._holders.staged(known)) is not None:
            raise DeviceInUse(
                f"volume {volume_id} cannot be deleted: it is open on node {staged.node} as {staged.device}; unpublish "
                f"and unstage it"
            )
        if known.spec.node:
            raise DeviceInUse(
                f"volume {volume_id} cannot be deleted: node {known.spec.node} may use it; take it away from there "
                f"(ControllerUnpublishVolume) first"
            )
        self._undo(known)

    def ids(self) -> Sequence[str]:
        """On a node, of the volumes that are attached there."""
        if self._is_node:
            return self._devices.ids()
        return [known.volume_id for known in self._records.all() if known.spec.state == "Ready"]

    def grow(self, volume_id: str, size: int) -> None:
        """Have the claim enlarged. Raises Aborted, with what its driver says, until it is."""
        known = self._records.ready(volume_id)
        if size <= known.spec.size:
            return
        if size > _MOST_BYTES:
            raise ResourceExhausted(f"there is no room for volume {volume_id}: no driver makes {size} bytes")
        if self._is_node:
            raise FailedPrecondition(
                f"volume {volume_id} has {known.spec.size} bytes below it and is to have {size}; enlarge its claim, as "
                f"a node cannot"
            )
        self._claims.grow(known, size)
        if known.spec.direct is not None:
            self._claims.settle(known, size)
        self._records.write(known, size=size)

    def storage(self, volume_id: str) -> AbstractContextManager[Handle]:
        """The device that this node has, or can get."""
        return self._devices.opened(volume_id)

    def open_storage(self, volume_id: str) -> Handle:
        """The same, if it is attached or has a holder. Samples are read of it: nobody knows what was ever written."""
        return self._devices.open(volume_id)

    def is_newest(self, record: VolumeRecord) -> bool:  # noqa: ARG002 - nothing tells
        """Nobody knows: a restored etcd has everything of its day."""
        return False

    def accept_record(self, volume_id: str) -> VolumeRecord:
        """It is taken for the newest one always."""
        return self.get(volume_id)

    def header_copy(self, volume_id: str) -> Path:
        return self._headers.path(volume_id)

    def has_header_copy(self, volume_id: str) -> bool:
        return self._headers.has(volume_id)

    def header_before(self, volume_id: str) -> Path:
        return self._headers.before(volume_id)

    def keep_header_copy(self, volume_id: str, fill: Fill) -> None:
        self._headers.keep(volume_id, fill)

    def attach(self, volume_id: str, *, lasting: bool) -> Handle:  # noqa: ARG002 - it always lasts
        """The device that the volume's holder, or the driver below, hands on; it stays this node's until `detach`.

        Raises Aborted while there is no holder yet, or it has not the size that it is to have, and what a driver below
        says.
        """
        return self._devices.attach(volume_id)

    def guard(self, volume_id: str) -> None:
        """Nothing is to be done: the mapping or mount has the device for itself (O_EXCL, open(2))."""

    def refresh(self, device: Handle) -> None:
        """Kubelet, or this, has the driver below enlarge it. Raises Aborted while it is shorter than recorded."""
        self._devices.check_size(device)

    def device_of(self, volume_id: str) -> Handle | None:
        return self._devices.device_of(volume_id)

    def is_device_of(self, volume_id: str, number: tuple[int, int]) -> bool:
        return self._devices.is_device_of(volume_id, number)

    def detach(self, volume_id: str) -> None:
        self._devices.detach(volume_id)

    def space(self, parameters: VolumeParameters | None = None) -> Space:  # noqa: ARG002 - nothing tells
        """What no driver reaches: only the other one knows."""
        return Space(_MOST_BYTES, _MOST_BYTES, _MOST_BYTES)

    def orphans(self) -> Sequence[str]:
        """Half-made and half-deleted volumes; nodes do not look for them."""
        if self._is_node:
            return []
        return [f"VolumeRecord/{known.volume_id}" for known in self._records.all() if known.spec.state != "Ready"]

    def remove_orphans(self, volume_id: str) -> Sequence[str]:
        known = self._records.find(volume_id) if not self._is_node else None
        if known is None or known.spec.state == "Ready":
            return []
        self._undo(known)
        return [f"VolumeRecord/{volume_id}"]

    # What storage outside the nodes does.

    def id_for(self, name: str, parameters: VolumeParameters) -> str:
        """The name where an object can have it. Raises InvalidArgument for what cannot be kept."""
        if parameters.backing_storage_class is None:
            raise InvalidArgument(
                "the parameter backingStorageClass is missing; it names the StorageClass of the driver that is to keep "
                "the ciphertext"
            )
        if parameters.erase_on_delete:
            raise InvalidArgument(
                "the parameter eraseOnDelete cannot be kept by the backend csi: no node has the device when a volume "
                "is deleted; leave it out, and let a KMS keep the key, which is destroyed with the volume"
            )
        found = volume_id_for(name)
        return found if is_object_name(found) else volume_id_for(f"\n{name}")

    def places(self, record: VolumeRecord) -> Sequence[Mapping[str, str]]:
        return self._records.ready(record.id).spec.places

    def use(self, volume_id: str, access: Access) -> None:
        """Only the place that a new volume is wished at matters; nothing else reaches the storage."""
        nodes = [place[self._node_topology] for place in access.topologies if self._node_topology in place]
        if nodes:
            self._wished[volume_id] = nodes[0]

    def publish(self, volume_id: str, node_id: str, *, many_nodes: bool) -> Mapping[str, str]:  # noqa: ARG002 - never
        known = self._records.ready(volume_id)
        self._holders.check_node(volume_id, node_id)
        if known.spec.node not in ("", node_id):
            raise FailedPrecondition(
                f"volume {volume_id} cannot be given to node {node_id}: node {known.spec.node} has it; let its pods "
                f"end there first"
            )
        self._claims.check(known)
        if known.spec.direct is not None:
            self._claims.check_still(known, known.spec.direct)
            if not known.spec.node:
                self._records.write(known, node=node_id)
            return {"driver": known.spec.direct.driver}
        for pod in self._holders.of(volume_id):
            if node_of(pod) != node_id:
                self._holders.drop(volume_id, pod)
        if not known.spec.node:
            known = self._records.write(known, node=node_id)  # before the holder: who finds one knows whose it is
        holder = self._holders.ensure(known, node_id)
        return {"holder": name_of(holder)}

    def unpublish(self, volume_id: str, node_id: str) -> None:
        """The record first: a node attaches nothing that is not its own by the record, so it cannot come between."""
        known = self._records.find(volume_id)
        if known is not None and known.spec.node and node_id in ("", known.spec.node):
            self._refuse_open(known, known.spec.node)
            self._records.write(known, node="", staged=None)
        for pod in self._holders.of(volume_id):
            if node_id in ("", node_of(pod)):
                self._holders.drop(volume_id, pod)

    def published(self, volume_id: str) -> Sequence[str]:
        node = self._records.ready(volume_id).spec.node
        return [node] if node else []

    def listed(self) -> Mapping[str, Callable[[], Listed]]:
        """As csi-attacher asks once a minute."""
        return {
            each.volume_id: partial(self._listed, each) for each in self._records.all() if each.spec.state == "Ready"
        }

    def _listed(self, known: Known) -> Listed:
        return Listed(self._records.decode(known), known.spec.places, [known.spec.node] if known.spec.node else [])

    def most_volumes(self) -> int:
        return self._devices.most_volumes()

    # What is mended.

    def mend(self, hold: Callable[[str], AbstractContextManager[None]], is_ending: Callable[[], bool]) -> None:
        """On a node, tell the records what was let go of; on the controller, mend holders and go on with deletions.

        `hold` is the volume's lock; one that is busy waits for the next time.
        """
        if self._is_node:
            self._devices.mend(hold, is_ending)
            return
        self._mending.look(hold, is_ending)

    def _refuse_open(self, known: Known, node: str) -> None:
        if (staged := self._holders.staged(known)) is not None:
            raise refuse_open(known.volume_id, node, staged.device)

    def _making(self, volume_id: str, wanted: Spec) -> Known:
        """The object of a volume in the making, as an earlier call left it if it was made for the same."""
        known = self._records.find(volume_id)
        if known is not None and known.spec.state == "Ready":
            raise FailedPrecondition(
                f"volume {volume_id} cannot be made: its VolumeRecord is there without a record that can be read and "
                f"its claim may hold data; restore the record from a backup or delete the volume"
            )
        if known is not None and (
            known.spec.state == "Deleting"
            or (known.spec.backing_storage_class, known.spec.size) != (wanted.backing_storage_class, wanted.size)
        ):
            self._undo(known)
            known = None
        return known or self._records.make(volume_id, wanted)

    def _undo(self, known: Known, *, wait: bool = True) -> None:
        """Delete all that there is of a volume as it was seen. Raises Aborted where it was written to since, and while
        it has a holder, for whose end it can `wait`.
        """
        known = self._records.write(known, state="Deleting")
        for pod in self._holders.of(known.volume_id):
            self._holders.drop(known.volume_id, pod, wait=wait)
        self._claims.drop(known)
        self._headers.drop(known.volume_id)
        self._records.remove(known)
