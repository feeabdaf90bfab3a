"""Records of volumes as objects of Kubernetes, one VolumeRecord each, in the driver's namespace.

`spec.record` is the record as every backend keeps it. Beside it stands what is known of the claim below, and which node
has the volume. Who writes names the version that he has read. A finalizer keeps an object until its claim is gone.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, Literal, Protocol

import msgspec

from csi_driver.backends.csipins import Direct
from csi_driver.backends.records import RecordCodec
from csi_driver.kube.kinds import MANAGED_BY, MANAGER, VOLUME_RECORD, Json, Kind, name_of, uid_of
from csi_driver.model.errors import Aborted, AlreadyExists, FailedPrecondition, NotFound
from csi_driver.model.reading import convert
from csi_driver.model.volume import VolumeRecord

GROUP: Final = VOLUME_RECORD.group
KEEPS: Final = f"{GROUP}/claim"
"""Finalizer of a VolumeRecord, and of the claim below it: only a deletion of the volume takes it off."""
_TRIES: Final = 5
_PAUSE: Final = 0.2
_LONGEST_PAUSE: Final = 2.0


def looks(seconds: float) -> Iterator[bool]:
    """Look again and again for so long, less and less often: many calls wait at once. True is the last look."""
    deadline, pause = time.monotonic() + seconds, _PAUSE
    while time.monotonic() < deadline:
        yield False
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE)
    yield True


class Api(Protocol):
    """What is needed of the Kubernetes API; `csi_driver.kube.client.Kube` has it."""

    def get(self, kind: Kind, name: str, namespace: str = "") -> Json | None:
        """The object, None where there is none."""

    def list(
        self, kind: Kind, namespace: str = "", labels: Mapping[str, str] = ..., fields: Mapping[str, str] = ...
    ) -> tuple[list[Json], str]:
        """All of them, and the version of the collection."""

    def create(self, kind: Kind, thing: Json, namespace: str = "") -> Json:
        """Make an object. Raises AlreadyExists, InvalidArgument."""

    def patch(self, kind: Kind, name: str, patch: Json, namespace: str = "", *, status: bool = False) -> Json:
        """Merge into an object, or into its status. Raises Conflict, NotFound, InvalidArgument."""

    def delete(
        self, kind: Kind, name: str, namespace: str = "", *, grace_seconds: int | None = None, seen: Json | None = None
    ) -> None:
        """Ask for its deletion; absent is fine. Raises Conflict (Aborted) where it is no more as it was `seen`."""


class Staged(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The node that has the device attached: it may have a mapping open. `ticket` is of that very attachment."""

    node: str
    boot_id: str
    ticket: str
    device: str


class HeaderPointer(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Which copy of the LUKS2 header is the last one: the SHA-256 of its content, and how many pieces it has."""

    digest: str
    pieces: int


class Spec(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The spec of a VolumeRecord; sizes are bytes of the device.

    One that is `Making` has no claim yet, or one that is not bound. `claim_uid` and `volume_name` pin the claim and its
    PersistentVolume; `places` are the topology segments from which that can be reached. `node` may have the volume.
    With `direct` nodes call the driver below themselves, and no holder pod is made.
    """

    state: Literal["Making", "Ready", "Deleting"]
    backing_storage_class: str
    size: int
    record: str = ""
    claim_uid: str = ""
    volume_name: str = ""
    places: tuple[dict[str, str], ...] = ()
    direct: Direct | None = None
    node: str = ""
    staged: Staged | None = None
    header: HeaderPointer | None = None


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """A VolumeRecord as it was read."""

    volume_id: str
    uid: str
    version: str
    spec: Spec


class RecordObjects:
    """The VolumeRecords in `namespace`."""

    def __init__(self, api: Api, namespace: str, codec: RecordCodec) -> None:
        self._api = api
        self._namespace = namespace
        self._codec = codec

    def find(self, volume_id: str) -> Known | None:
        """The object of that volume, in whatever state. Raises FailedPrecondition when it cannot be read."""
        found = self._api.get(VOLUME_RECORD, volume_id, self._namespace)
        return self._known(found) if found is not None else None

    def ready(self, volume_id: str) -> Known:
        """The object of a volume that was made to its end. Raises NotFound, FailedPrecondition."""
        found = self.find(volume_id)
        if found is None or found.spec.state != "Ready":
            raise NotFound(f"volume {volume_id} does not exist: namespace {self._namespace} has no VolumeRecord of it")
        return found

    def all(self) -> Sequence[Known]:
        """All that can be read, in the order of the volumes' ids."""
        found, _ = self._api.list(VOLUME_RECORD, self._namespace)
        read = []
        for each in sorted(found, key=name_of):
            try:
                read.append(self._known(each))
            except FailedPrecondition:
                continue  # whoever asks for that volume is told
        return read

    def make(self, volume_id: str, spec: Spec) -> Known:
        """A new object. Raises Aborted when another caller has made one just now."""
        metadata = {"name": volume_id, "finalizers": [KEEPS], "labels": {MANAGED_BY: MANAGER}}
        thing: Json = {"metadata": metadata, "spec": msgspec.to_builtins(spec)}
        try:
            return self._known(self._api.create(VOLUME_RECORD, thing, self._namespace))
        except AlreadyExists:
            raise Aborted(f"volume {volume_id} is being made by another call; call again") from None

    def write(self, known: Known, **changes: object) -> Known:
        """Change fields of the object that was read. Raises Conflict (Aborted) when it was changed meanwhile."""
        values = msgspec.to_builtins(msgspec.structs.replace(known.spec, **changes))
        names = [each.encode_name for each in msgspec.structs.fields(Spec) if each.name in changes]
        changed = {name: values[name] for name in names}
        patch = {"metadata": {"resourceVersion": known.version}, "spec": changed}
        return self._known(self._api.patch(VOLUME_RECORD, known.volume_id, patch, self._namespace))

    def change(self, volume_id: str, check: Callable[[Known], None] = lambda _: None, **changes: object) -> Known:
        """The same for the newest version, if it passes `check`, as nobody else writes these fields.

        Raises NotFound, Aborted, and what `check` raises.
        """
        for left in reversed(range(_TRIES)):
            known = self.ready(volume_id)
            check(known)
            try:
                return self.write(known, **changes)
            except Aborted:
                if not left:
                    raise
        raise AssertionError("a loop without an end")

    def remove(self, known: Known) -> None:
        """Let the object go, and the record with it; another one of its name stays. Raises Conflict (Aborted)."""
        found = self._api.get(VOLUME_RECORD, known.volume_id, self._namespace)
        if found is None or uid_of(found) != known.uid:
            return
        self._api.delete(VOLUME_RECORD, known.volume_id, self._namespace, seen=found)
        drop_finalizer(self._api, VOLUME_RECORD, known.volume_id, self._namespace)

    def decode(self, known: Known) -> VolumeRecord:
        """The record. Raises FailedPrecondition."""
        where = f"in the VolumeRecord {self._namespace}/{known.volume_id}"
        record = self._codec.decode(known.spec.record.encode(), where)
        if record.id != known.volume_id:
            raise FailedPrecondition(
                f"the volume record {where} is that of volume {record.id}; put each volume's own record back"
            )
        return record

    def encode(self, record: VolumeRecord) -> str:
        """The record as `spec.record` has it."""
        return self._codec.encode(record).decode()

    def _known(self, thing: Json) -> Known:
        name, metadata = name_of(thing), thing["metadata"]
        try:
            spec = convert(thing.get("spec"), Spec)
        except msgspec.ValidationError as error:
            raise FailedPrecondition(
                f"the VolumeRecord {self._namespace}/{name} cannot be read ({error}); restore it from a backup, its "
                f"volume was not touched"
            ) from None
        return Known(volume_id=name, uid=uid_of(thing), version=str(metadata["resourceVersion"]), spec=spec)


def drop_finalizer(api: Api, kind: Kind, name: str, namespace: str) -> None:
    """Take our finalizer off an object; absent is fine. Raises Aborted when it was changed meanwhile."""
    found = api.get(kind, name, namespace)
    if found is None or KEEPS not in found["metadata"].get("finalizers", ()):
        return
    left = [each for each in found["metadata"]["finalizers"] if each != KEEPS]
    version = found["metadata"]["resourceVersion"]
    try:
        api.patch(kind, name, {"metadata": {"resourceVersion": version, "finalizers": left or None}}, namespace)
    except NotFound:
        return
