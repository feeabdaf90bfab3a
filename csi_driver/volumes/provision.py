"""The controller's use cases: create, delete, find, list, enlarge volumes, and tell the room there is."""

import bisect
import re
from collections.abc import Callable, Mapping, Sequence

import msgspec

from csi_driver.backends.base import (
    Backend,
    Listed,
    ListsAtOnce,
    MakesFromFile,
    made_from_file,
    shared,
    takes_many_nodes,
)
from csi_driver.host.log import log
from csi_driver.keys.secret import SecretKey
from csi_driver.luks import formats
from csi_driver.luks.choice import luks_format
from csi_driver.model.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    InvalidToken,
    NotFound,
    ResourceExhausted,
)
from csi_driver.model.settings import Settings
from csi_driver.model.times import recorded_now
from csi_driver.model.volume import (
    EncryptionState,
    VolumeParameters,
    VolumeRecord,
    is_volume_id,
    volume_id_for,
)
from csi_driver.volumes import capability as capabilities
from csi_driver.volumes.capability import Capability
from csi_driver.volumes.context import check_context, volume_context
from csi_driver.volumes.from_image import BackingImages
from csi_driver.volumes.keys import VolumeKeys
from csi_driver.volumes.moved import is_here
from csi_driver.volumes.parameters import DEFAULT_FILE_SYSTEM, check_mkfs_options, read_parameters
from csi_driver.volumes.sizing import LARGEST_BYTES, check_range, choose_capacity, choose_sector, grow_device

_LONGEST_NAME = 128
_TOKEN_PREFIX = "after:"
# CSI spec, CreateVolumeRequest.name; `convert.any_volume_id` relies on NUL being among them.
_BANNED_IN_NAMES = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class CreateRequest(msgspec.Struct, frozen=True):
    """What CreateVolume brings; sizes in bytes, 0 means not said. `topologies` are the segments to choose from."""

    name: str
    required_bytes: int
    limit_bytes: int
    capabilities: tuple[Capability, ...]
    parameters: Mapping[str, str]
    key: SecretKey
    topologies: tuple[Mapping[str, str], ...] = ()


class VolumeView(msgspec.Struct, frozen=True):
    """A volume as the controller shows it.

    `places` are the topology segments from which it can be reached, none for every node; `published` are the ids of the
    nodes that have it, where the controller says who may.
    """

    record: VolumeRecord
    context: dict[str, str]
    places: Sequence[Mapping[str, str]]
    published: Sequence[str] = ()


class Capacity(msgspec.Struct, frozen=True):
    """Bytes that new volumes may take in all, and the largest that one of them may have."""

    available: int
    maximum: int


class Provisioning:
    """Makes and removes volumes on this node's backend; callers hold the volume's lock where it changes.

    `check_state` raises FailedPrecondition when the backend's folder is not the one that it was: then nothing changes.
    `release` takes down what is left of a volume on this node before it is deleted (`Staging.release`).
    """

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        images: BackingImages,
        check_state: Callable[[], None],
        release: Callable[[str], None],
        keys: VolumeKeys,
    ) -> None:
        self._settings = settings
        self._backend = backend
        self._images = images
        self._check_state = check_state
        self._release = release
        self._keys = keys

    def create(self, request: CreateRequest) -> VolumeView:
        """Make the volume of that name, or find it. Nothing is formatted yet: the volume is only tagged, or cloned.

        Raises InvalidArgument, FailedPrecondition (the secret), OutOfRange, AlreadyExists (same name, other
        properties), ResourceExhausted (no room, or none of the wished topologies is this node); for a volume from an
        image what `BackingImages` raises.
        """
        if not request.name or len(request.name.encode()) > _LONGEST_NAME or _BANNED_IN_NAMES.search(request.name):
            raise InvalidArgument(f"a volume's name must have 1 to {_LONGEST_NAME} bytes and no control characters")
        capabilities.check(request.capabilities, many_nodes=takes_many_nodes(self._backend))
        parameters = self._parameters(request)
        random_key = parameters.kms_id is not None or parameters.generate_key
        chosen = luks_format(parameters, request.key, self._settings.limits.pbkdf_memory_kib, random_key=random_key)
        self._check_topology(request.topologies)
        volume_id = self._id_for(request.name, parameters)
        check_range(request.required_bytes, request.limit_bytes)
        self._check_state()
        try:
            found = self._backend.get(volume_id)
        except NotFound:
            return self._view(self._make(request, volume_id, parameters, chosen.cipher))
        _check_same(found, request, parameters)
        return self._view(self._images.finish(self._backend, found, request.key))  # it needs its image no more

    def new_id(self, name: str, given: Mapping[str, str]) -> str:
        """The id of the volume that CreateVolume calls `name`, made with these parameters. Raises InvalidArgument."""
        return volume_id_for(name) if shared(self._backend) is None else self._id_for(name, self._read(given))

    def delete(self, volume_id: str) -> None:
        """Remove the volume; an unknown one is fine, no key is needed.

        One that was left staged, published nowhere and used by nobody, is unstaged first. Raises DeviceInUse while it
        is used, FailedPrecondition.
        """
        self._check_state()
        record, left = None, True
        try:
            record = self._backend.get(volume_id)
        except NotFound:
            pass
        except FailedPrecondition as error:
            left = False  # no key is needed, and which are to stay nobody knows
            log.warning(
                "a key of its own stays in its KMS, if the volume had one", volume_id=volume_id, error=str(error)
            )
        if record is not None and not is_here(record):
            # It is open, if it is, by the driver that has it now; and its key opens it there.
            self._keys.hand_over(record)
            self._backend.delete(volume_id)
        else:
            self._release(volume_id)
            leaving = self._keys.leave(volume_id, record)
            self._backend.delete(volume_id)
            for entry in leaving if left else ():
                self._keys.destroy_left(entry)
        log.info("volume deleted", volume_id=volume_id)

    def get(self, volume_id: str) -> VolumeView:
        """Find a volume. Raises NotFound."""
        if not is_volume_id(volume_id):
            raise NotFound(f"volume {volume_id!r} does not exist: it is no id of this driver")
        return self._view(self._backend.get(volume_id))

    def list(self, max_entries: int, starting_token: str) -> tuple[list[VolumeView], str]:
        """A page of volumes in the order of their ids, and the token of the next page ("" after the last).

        A token names the last id given out, so pages stay right while volumes come and go. Raises InvalidToken.
        """
        if max_entries < 0:
            raise InvalidArgument(f"max_entries is {max_entries}; it must not be negative")
        at_once = self._backend.listed() if isinstance(self._backend, ListsAtOnce) else None
        ids = self._backend.ids() if at_once is None else [*at_once]
        start = bisect.bisect_right(ids, _last_id(starting_token)) if starting_token else 0
        end = len(ids) if max_entries == 0 else start + max_entries
        views = []
        for volume_id in ids[start:end]:
            try:
                if at_once is None:
                    views.append(self._view(self._backend.get(volume_id)))
                else:
                    views.append(self._shown(at_once[volume_id]()))
            except NotFound:
                continue  # deleted since the listing
            except FailedPrecondition as error:
                log.warning("volume left out of the list", volume_id=volume_id, error=str(error))
        return views, f"{_TOKEN_PREFIX}{ids[end - 1]}" if end < len(ids) else ""

    def capacity(
        self, given: Mapping[str, str], topology: Mapping[str, str] | None, wanted: Sequence[Capability]
    ) -> Capacity:
        """Room for volumes of these parameters, as a pod would see it; 0 where such a volume cannot be.

        Of parameters that no volume can have it is without an end: where none is told nobody asks CreateVolume, which
        says what is wrong. Parameters that name a claim are asked for before this node takes it
        (`BackingImages.let_others_go_first`).
        """
        try:
            return self._room(self._read(given), topology, wanted)
        except InvalidArgument:
            return self._room(None, topology, wanted)

    def _room(
        self, parameters: VolumeParameters | None, topology: Mapping[str, str] | None, wanted: Sequence[Capability]
    ) -> Capacity:
        is_elsewhere = topology and topology.get(self._settings.topology_key) != self._settings.node_id
        if is_elsewhere and shared(self._backend) is None:
            return Capacity(0, 0)
        many_nodes = takes_many_nodes(self._backend)
        if any(capabilities.refusal(capability, many_nodes=many_nodes) for capability in wanted):
            return Capacity(0, 0)
        if parameters is None:
            return Capacity(LARGEST_BYTES, LARGEST_BYTES)
        if parameters.backing_image is not None and not (
            isinstance(self._backend, MakesFromFile) and self._images.is_here(parameters.backing_image)
        ):
            return Capacity(0, 0)
        if parameters.backing_image is not None and parameters.claim is not None:
            self._images.let_others_go_first(parameters.backing_image)
        overhead = formats.DATA_OFFSET if parameters.encrypted else 0
        room = max(0, self._backend.space(parameters).available - overhead)
        return Capacity(room, min(room, LARGEST_BYTES))

    def refusal(
        self,
        volume_id: str,
        context: Mapping[str, str],
        parameters: Mapping[str, str],
        wanted: Sequence[Capability],
    ) -> str | None:
        """Why the volume does not have these capabilities and properties; None when it has. Raises NotFound."""
        record = self.get(volume_id).record
        check_context(record, context)
        for capability in wanted:
            if reason := capabilities.refusal(capability, many_nodes=takes_many_nodes(self._backend)):
                return reason
            fs_type = record.made_fs_type or record.parameters.fs_type
            if not capability.block and None not in (fs_type, capability.fs_type) and fs_type != capability.fs_type:
                return f"volume {volume_id} has the file system {fs_type}, not {capability.fs_type}"
        if parameters:
            asked = read_parameters(parameters, self._backend.name)
            if asked.fs_type is None:  # the volume's may have come with its capability
                asked = msgspec.structs.replace(asked, fs_type=record.parameters.fs_type)
            if not _is_same_class(record.parameters, asked):
                return f"volume {volume_id} was made with other parameters"
        return None

    def expand(self, volume_id: str, required_bytes: int, limit_bytes: int) -> int:
        """Enlarge the device and the recorded capacity; returns the capacity in bytes. It never shrinks.

        Raises NotFound, OutOfRange, ResourceExhausted. The node does the rest (NodeExpandVolume).
        """
        self._check_state()
        record = self.get(volume_id).record
        return grow_device(self._backend, record, required_bytes, limit_bytes).capacity_bytes

    def _read(self, given: Mapping[str, str]) -> VolumeParameters:
        parameters = read_parameters(given, self._backend.name)
        if parameters.backend not in (None, self._backend.name):
            raise InvalidArgument(
                f"the parameter backend is {parameters.backend!r} and this driver serves {self._backend.name!r}; "
                f"correct it or leave it out"
            )
        for name, value, backend in (
            ("thinPool", parameters.thin_pool, "lvm"),
            ("backingStorageClass", parameters.backing_storage_class, "csi"),
            ("backingAttach", parameters.backing_attach, "csi"),
        ):
            if value is not None and self._backend.name != backend:
                raise InvalidArgument(
                    f"the parameter {name} is {value!r} and means nothing for the backend {self._backend.name}; leave "
                    f"it out"
                )
        return parameters

    def _parameters(self, request: CreateRequest) -> VolumeParameters:
        parameters = self._read(request.parameters)
        for fs_type in {capability.fs_type for capability in request.capabilities if not capability.block} - {None}:
            if parameters.fs_type not in (None, fs_type):
                raise InvalidArgument(
                    f"the parameter fstype is {parameters.fs_type} and the volume's capability says {fs_type}; make "
                    f"them equal or leave one out"
                )
            parameters = msgspec.structs.replace(parameters, fs_type=fs_type)
        if any(not capability.block for capability in request.capabilities):
            check_mkfs_options(parameters.fs_type or DEFAULT_FILE_SYSTEM, parameters.mkfs_options)
        return parameters

    def _id_for(self, name: str, parameters: VolumeParameters) -> str:
        outside = shared(self._backend)
        return volume_id_for(name) if outside is None else outside.id_for(name, parameters)

    def _check_topology(self, topologies: Sequence[Mapping[str, str]]) -> None:
        """Refuse what must be made on another node; storage outside the nodes is told the wish, see `Access`."""
        if shared(self._backend) is not None:
            return
        here = {self._settings.topology_key: self._settings.node_id}
        if topologies and not any(all(here.get(k) == v for k, v in segments.items()) for segments in topologies):
            raise ResourceExhausted(
                f"the volume cannot be made on node {self._settings.node_id}: none of the wished topologies is this "
                f"node's {self._settings.topology_key}"
            )

    def _make(self, request: CreateRequest, volume_id: str, parameters: VolumeParameters, cipher: str) -> VolumeRecord:
        if parameters.backing_image is not None:
            made_from_file(self._backend, volume_id)
        image = self._images.find(volume_id, parameters, request.key)
        if image is None:
            parameters = msgspec.structs.replace(parameters, sector_size=choose_sector(request, parameters))
        capacity = choose_capacity(request, parameters, image)
        if parameters.encrypted:
            formats.check_capacity(image.luks.cipher if image and image.luks else cipher, capacity)
        with self._keys.making(volume_id, parameters, request.key, lambda: self._backend.has(volume_id)) as key:
            record = VolumeRecord(
                id=volume_id,
                name=request.name,
                capacity_bytes=capacity,
                parameters=parameters,
                encryption=EncryptionState.PREPARED if parameters.encrypted else None,
                key=key,
                created=recorded_now(),
            )
            if image is not None:
                record = self._images.make(self._backend, record, image, request.key)
            else:
                record = self._backend.create(record, capacity + (formats.DATA_OFFSET if parameters.encrypted else 0))
        log.info("volume created", volume_id=volume_id, capacity_bytes=capacity, encrypted=parameters.encrypted)
        return record

    def _view(self, record: VolumeRecord) -> VolumeView:
        if (outside := shared(self._backend)) is None:
            return self._shown(Listed(record, [{self._settings.topology_key: self._settings.node_id}], ()))
        return self._shown(Listed(record, outside.places(record), outside.published(record.id)))

    def _shown(self, found: Listed) -> VolumeView:
        context = volume_context(found.record, self._backend.name)
        return VolumeView(found.record, context, found.places, found.published)


def _check_same(found: VolumeRecord, request: CreateRequest, parameters: VolumeParameters) -> None:
    differences = []
    if found.name != request.name:
        differences.append(f"the name {found.name!r}")
    if found.capacity_bytes < request.required_bytes or (
        request.limit_bytes and found.capacity_bytes > request.limit_bytes
    ):
        differences.append(f"{found.capacity_bytes} bytes")
    if not _is_same_class(found.parameters, parameters):
        differences.append("other parameters or another file system")
    if differences:
        raise AlreadyExists(
            f"volume {found.id} exists with {' and '.join(differences)}; delete it or choose another name"
        )


def _is_same_class(made: VolumeParameters, asked: VolumeParameters) -> bool:
    """Whether a volume was made by such a class, whoever claimed it; what the class left open may be anything."""
    sector_size = made.sector_size if asked.sector_size is None else asked.sector_size
    return msgspec.structs.replace(asked, claim=made.claim, sector_size=sector_size) == made


def _last_id(token: str) -> str:
    last = token.removeprefix(_TOKEN_PREFIX)
    if not token.startswith(_TOKEN_PREFIX) or not is_volume_id(last):
        raise InvalidToken(f"the starting token {token!r} was not given out by this driver; start without one")
    return last
