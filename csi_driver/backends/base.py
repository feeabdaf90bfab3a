"""What a backend must offer: it keeps ciphertext and tags, and shows a volume as a block device of this node.

The contract, beside what each method says:

- *Who retries.* The caller of the call, that is Kubernetes. A backend tries nothing twice, but for what passes within
  milliseconds; it never waits for another call.
- *What is idempotent.* All that changes something may be cut at any step, by kill -9 or a power cut, and is repeated
  with the same arguments, or with others: what was left is taken up, or thrown away, by the next call for that volume.
- *What an error means.* DriverErrors only, but for OSErrors of a state directory that cannot be used. Aborted: the work
  goes on with the next call, and what was done counts. ResourceExhausted: nothing was made, and there is no room.
  FailedPrecondition and its kinds: nothing was changed, and repeating alone does not help. DeadlineExceeded and
  CommandFailed: nobody knows how far it came; the next call finds out.
- *What is whose.* By identity, never by name alone. What a backend did not make it does not touch, whatever its name.
- *Where it runs.* Nothing here forks. What may hang on a device, and every program, runs in a worker.

What not every backend can do is a Protocol of its own: `MakesFromFile`, `TakesOver`, `MovesVolumeKey`, `HasPools`,
`SharedStorage`, `ListsAtOnce`, `Mends`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

from msgspec import Struct

from csi_driver.host.files import Files
from csi_driver.host.handle import Handle
from csi_driver.model.access import Access
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.volume import VolumeParameters, VolumeRecord


class Space(Struct, frozen=True):
    """Room for volumes, in bytes: in all, free, and of that what is above the floor that is kept for what is there."""

    total: int
    free: int
    available: int


Fill = Callable[[str], None]
"""Gives the blank device in the making, at the path that it is told, its first content, durably."""


class Backend(Protocol):
    """Storage behind a narrow seam; docs/architecture.md, "Backends", tells what each promise is for.

    Callers hold the volume's lock for every call that changes it. Sizes are bytes of the device: capacity plus the
    data offset of the LUKS2 header.
    """

    @property
    def name(self) -> str:
        """The value of the StorageClass parameter `backend` that chooses it."""

    def prepare(self) -> None:
        """Make what is needed before the first volume; at each start of the server. Raises OSError, DriverError."""

    def create(self, record: VolumeRecord, size: int) -> VolumeRecord:
        """Make a blank device of `size` bytes with its record, wholly or not at all.

        Raises ResourceExhausted when there is no room for it, before anything is written.
        """

    def has(self, volume_id: str) -> bool:
        """Whether anything of the volume is there, readable or not."""

    def get(self, volume_id: str) -> VolumeRecord:
        """Return the record. Raises NotFound, FailedPrecondition (damaged, or older than the last one written)."""

    def update(self, record: VolumeRecord) -> VolumeRecord:
        """Write `record`, made from the revision it carries, durably; return it with its new revision.

        Raises Aborted when another writer was faster.
        """

    def delete(self, volume_id: str) -> None:
        """Remove device and record; absent is fine. Raises DeviceInUse while the device is attached."""

    def ids(self) -> Sequence[str]:
        """The ids of all volumes, sorted."""

    def grow(self, volume_id: str, size: int) -> None:
        """Make the device at least `size` bytes long. Raises ResourceExhausted, NotFound."""

    def storage(self, volume_id: str) -> AbstractContextManager[Handle]:
        """The volume's bytes, for work on a volume that is not staged, attached or not.

        While it is used, no guard hinders writing. Raises DeviceAbsent, FailedPrecondition.
        """

    def open_storage(self, volume_id: str) -> Handle:
        """The volume's bytes opened for reading alone, attached, guarded or not; a file tells what was ever written.

        Raises DeviceAbsent.
        """

    def is_newest(self, record: VolumeRecord) -> bool:
        """Whether it is known that no newer record of the volume was ever written; False where nobody knows."""

    def accept_record(self, volume_id: str) -> VolumeRecord:
        """Take the record that is there for the newest one, whatever was written since; returns it.

        Only a settled record, as nothing is ever formatted by one. Raises NotFound, FailedPrecondition.
        """

    def header_copy(self, volume_id: str) -> Path:
        """Where the copy of the volume's LUKS2 header is, if one is kept."""

    def has_header_copy(self, volume_id: str) -> bool:
        """Whether a copy of the volume's LUKS2 header is kept."""

    def keep_header_copy(self, volume_id: str, fill: Fill) -> None:
        """Keep beside the record what `fill` writes, durably, at the path that it is told; in place of an earlier copy.

        Raises ResourceExhausted, FailedPrecondition, and what `fill` raises.
        """

    def header_before(self, volume_id: str) -> Path:
        """Where the header that `luks-csi volume restore-header` overwrites is kept, on this node; see `kept_before`.

        It goes with the next copy that is kept, as it may have key slots that were removed, and with the volume.
        """

    def attach(self, volume_id: str, *, lasting: bool) -> Handle:
        """Show the volume as a block device of this node, checked to be this volume's and held open by the handle.

        Unless `lasting`, it goes away with its last user. Raises DeviceAbsent, DeviceInUse.
        """

    def guard(self, volume_id: str) -> None:
        """Keep others from opening the storage below the volume's attached device, until `detach` or `attach`.

        Without effect while nothing is attached. Raises FailedPrecondition.
        """

    def refresh(self, device: Handle) -> None:
        """Let an attached device show the size that `grow` gave it."""

    def device_of(self, volume_id: str) -> Handle | None:
        """The attached device of the volume, if there is one, held open."""

    def is_device_of(self, volume_id: str, number: tuple[int, int]) -> bool:
        """Whether the block device of that number is the volume's: by identity of what is below, not by name.

        That of storage which is to take its place (`MovesVolumeKey`) is the volume's too.
        """

    def detach(self, volume_id: str) -> None:
        """Let go of a lasting device, and of the guard; absent is fine, also when the volume is gone."""

    def space(self, parameters: VolumeParameters | None = None) -> Space:
        """Room for new volumes of a class with these parameters; None for one that says nothing."""

    def orphans(self) -> Sequence[str]:
        """Leftovers of killed calls, each as a path that ends in its volume's id, sorted.

        Nothing removes them but `remove_orphans` and a later call for the same volume.
        """

    def remove_orphans(self, volume_id: str) -> Sequence[str]:
        """Remove the leftovers of this volume and return their paths; what may still hold data stays."""


@runtime_checkable
class MakesFromFile(Protocol):
    """A backend whose volumes are files while they are made: images are cloned into them."""

    def create_filled(self, record: VolumeRecord, size: int, fill: Fill) -> VolumeRecord:
        """As `Backend.create`, with what `fill` writes. Raises what that raises too."""


class ForeignVolume(Struct, frozen=True):
    """A volume of another driver, which calls it `handle`: where it lies, and as which volume it would be ours.

    `storage` and `storage_id` are name and identity of what it lies in, `size` bytes long. `kms_id` has its key, or
    `wrapped` it, for the namespace `tenant`; "" where the passphrase of a secret opens it. It `is_ours` once taken.
    """

    handle: str
    volume_id: str
    where: str
    storage: str
    storage_id: str
    size: int
    parameters: VolumeParameters
    kms_id: str
    wrapped: str
    tenant: str
    is_ours: bool


class ForeignVolumes(Protocol):
    """Volumes that another driver made in the same storage. Callers hold the lock of the volume that is to be."""

    def find(self, handle: str, name: str) -> ForeignVolume:
        """The volume of that id, which is to be `name` or is it. No lock need be held.

        Raises InvalidArgument, NotFound, AlreadyExists, Aborted, FailedPrecondition.
        """

    def looked_at(self, foreign: ForeignVolume) -> AbstractContextManager[Handle]:
        """Its device, for reading alone. Raises DeviceInUse while anybody has it open."""

    def take(self, foreign: ForeignVolume, record: VolumeRecord) -> None:
        """Make it the volume of that record, wholly or not at all; what lies in it stays as it is. Repeating is fine.

        Raises DeviceInUse, AlreadyExists, Aborted.
        """


@runtime_checkable
class TakesOver(Protocol):
    """A backend whose storage may have volumes of another driver, which become ours where they lie."""

    @property
    def foreign(self) -> ForeignVolumes:
        """Those volumes."""


@runtime_checkable
class MovesVolumeKey(Protocol):
    """A backend that can keep other storage beside a volume's own and put it in that place in one durable step."""

    def make_next(self, volume_id: str, size: int) -> None:
        """Make blank storage of `size` bytes that may take the place of the volume's own; an earlier one goes.

        Whoever calls it knows that nothing was moved to an earlier one. Raises ResourceExhausted, FailedPrecondition.
        """

    def drop_next(self, volume_id: str) -> None:
        """Remove that storage, to which nothing was moved; absent is fine."""

    def attach_next(self, volume_id: str) -> Handle:
        """Show that storage as a block device, as `attach` does the volume's own. Raises DeviceAbsent, DeviceInUse."""

    def has_next(self, volume_id: str, header: int = 0) -> bool:
        """Whether that storage is there; with `header`, whether anything was written behind its first so many bytes."""

    def take_next(self, volume_id: str) -> None:
        """Put it in the place of the volume's own, which goes, in one durable step; devices on it stay what they are.

        Raises FailedPrecondition.
        """


@runtime_checkable
class StandsOnClusters(Protocol):
    """A backend whose volumes lie in clusters that others run, each of which may be away or refuse this driver."""

    def reached(self) -> str:
        """Which clusters answer, for a person. Raises DriverError for the first one that does not."""


@runtime_checkable
class HasPools(Protocol):
    """A backend whose volumes share room that may run out beneath them."""

    def full_pools(self) -> Sequence[str]:
        """What is wrong with each pool with volumes that is fuller than its limit, and what to do: for a person."""

    def fullest_pool(self) -> int:
        """Percent that are used of what is scarcest in the fullest pool with volumes; 0 without any."""

    def ailment(self, volume_id: str) -> str | None:
        """The same of the pool that the volume is in; None where all is well."""


@runtime_checkable
class SharedStorage(Protocol):
    """A backend whose volumes lie outside the nodes: a central controller makes them and says who may have one.

    What is in `Backend` holds on controller and nodes alike, with these differences. An attached device stays until
    `detach`, `lasting` or not. `ids` on a node are those of the volumes that are attached to it. What needs no record
    on a node, which is to publish a complete stage, unpublish and unstage, must not need the storage to answer.
    """

    @property
    def takes_many_nodes(self) -> bool:
        """Whether a block volume may be used on several nodes at once, as live migration does."""

    @property
    def own_node(self) -> str:
        """The node's name, where a command on it makes and attaches volumes without a controller; "" where none can."""

    def id_for(self, name: str, parameters: VolumeParameters) -> str:
        """The id of the volume that CreateVolume calls `name`: an `is_volume_id`; it may tell where the volume lies.

        Raises InvalidArgument where the parameters lack what says where.
        """

    def places(self, record: VolumeRecord) -> Sequence[Mapping[str, str]]:
        """The topology segments from which it can be reached; none means from every node."""

    def use(self, volume_id: str, access: Access) -> None:
        """Take what a call brought to reach the volume; kept in memory, for the calls that bring nothing, until
        `detach` or `delete`. Called, under the volume's lock where there is one, before anything else of the call.
        """

    def publish(self, volume_id: str, node_id: str, *, many_nodes: bool) -> Mapping[str, str]:
        """Let a node have the volume, durably; returns the publish context. Repeating is fine.

        With `many_nodes` others may have it as well. Raises NotFound (also for a node that is known not to be),
        FailedPrecondition naming the node that has it, Aborted while it is being made ready.
        """

    def unpublish(self, volume_id: str, node_id: str) -> None:
        """Take it away from a node, from all with ""; absent is fine. Behind it that node writes nothing any more.

        Raises FailedPrecondition where the node may still write and cannot be kept from it.
        """

    def published(self, volume_id: str) -> Sequence[str]:
        """The ids of the nodes that have it, sorted."""

    def most_volumes(self) -> int:
        """How many volumes this node can have at once; 0 where nothing says."""


class Listed(Struct, frozen=True):
    """A volume in a list: its record, `SharedStorage.places` and `SharedStorage.published`."""

    record: VolumeRecord
    places: Sequence[Mapping[str, str]]
    published: Sequence[str]


@runtime_checkable
class ListsAtOnce(Protocol):
    """Shared storage whose list costs less than `Backend.get` and `SharedStorage.published` of each volume."""

    def listed(self) -> Mapping[str, Callable[[], Listed]]:
        """What tells of each volume, by the ids, sorted; it raises as `Backend.get` does."""


@runtime_checkable
class Mends(Protocol):
    """A backend with something beside the calls to look after, as what it stands on may be changed by others."""

    def mend(self, hold: Callable[[str], AbstractContextManager[None]], is_ending: Callable[[], bool]) -> None:
        """Make good what was changed, or was left of calls that were cut; now and then, on controller and nodes.

        `hold` is a volume's lock, which raises VolumeBusy.
        """


def kept_before(first: Path) -> list[Path]:
    """The headers that were overwritten, oldest first: the file at `first`, and those with a number behind its name."""
    found: list[Path] = []
    while (path := next_before(first, len(found))).exists():
        found.append(path)
    return found


def drop_before(first: Path, files: Files) -> None:
    """Remove the headers that `kept_before` tells, the first one last: a cut removal is gone on with."""
    for old in reversed(kept_before(first)):
        files.remove(old)


def next_before(first: Path, kept: int) -> Path:
    """Where the next one is kept, where there are `kept` already."""
    return first.with_name(f"{first.name}.{kept}") if kept else first


def made_from_file(backend: Backend, volume_id: str) -> MakesFromFile:
    """The backend, if its volumes can start with content. Raises FailedPrecondition."""
    if isinstance(backend, MakesFromFile):
        return backend
    raise FailedPrecondition(
        f"volume {volume_id} cannot start from an image or a disk: the backend {backend.name} makes blank volumes "
        f"only; use a driver with the backend loopfile for it"
    )


def shared(backend: Backend) -> SharedStorage | None:
    """The backend, if its volumes lie outside the nodes."""
    return backend if isinstance(backend, SharedStorage) else None


def takes_many_nodes(backend: Backend) -> bool:
    """Whether its block volumes may be used on several nodes at once."""
    return isinstance(backend, SharedStorage) and backend.takes_many_nodes


def movable(backend: Backend) -> MovesVolumeKey | None:
    """The backend, if it keeps storage beside a volume's own."""
    return backend if isinstance(backend, MovesVolumeKey) else None


def storage_beside(backend: Backend, volume_id: str) -> MovesVolumeKey:
    """As `movable`. Raises FailedPrecondition where it does not."""
    if (found := movable(backend)) is not None:
        return found
    raise FailedPrecondition(
        f"volume {volume_id} cannot be moved to another volume key: the backend {backend.name} has no storage beside a "
        f"volume's own; make a new volume, which has a key of its own, and copy the files"
    )
