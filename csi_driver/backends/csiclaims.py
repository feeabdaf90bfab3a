"""The claim below each volume: a raw block claim of another driver's class, in our namespace.

Only claims are made, enlarged and deleted; the other driver's controller is never called. A claim is the volume's by
the uid that its record pins.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from csi_driver.backends.csibelow import changed, is_waiting_for_node, read_direct, refuse_driver, refused_size, settled
from csi_driver.backends.csiheaders import LABEL
from csi_driver.backends.csipins import Direct, digest
from csi_driver.backends.csirecords import GROUP, KEEPS, Api, Known, drop_finalizer, looks
from csi_driver.host.log import log
from csi_driver.kube.kinds import (
    CLAIM,
    CSI_DRIVER,
    CSI_NODE,
    EVENT,
    MANAGED_BY,
    MANAGER,
    STORAGE_CLASS,
    VOLUME,
    Json,
    is_going,
    name_of,
    uid_of,
)
from csi_driver.model.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    OutOfRange,
    ResourceExhausted,
)
from csi_driver.model.sizes import read_size
from csi_driver.model.text import one_line

_OWNER: Final = f"{GROUP}/record"
"""Annotation of a claim: the uid of the VolumeRecord that it was made for."""
_SELECTED: Final = "volume.kubernetes.io/selected-node"
_FINAL: Final = re.compile(
    r"code = (InvalidArgument|Unimplemented|FailedPrecondition|OutOfRange|NotFound|PermissionDenied|Unauthenticated)"
)
"""Of a CSI driver below: repeating does not help."""
_NO_ROOM: Final = re.compile(r"code = (ResourceExhausted)")
_MOST_QUOTED: Final = 300
_MOST_PLACES: Final = 64


class Claims:
    """The claims of volumes in `namespace`; `driver_name` is our own.

    `wait_seconds` is how long one call waits for the other driver.
    """

    def __init__(self, api: Api, namespace: str, driver_name: str, wait_seconds: float = 8.0) -> None:
        self._api = api
        self._namespace = namespace
        self._driver_name = driver_name
        self._wait_seconds = wait_seconds

    def check_class(self, volume_id: str, name: str) -> Json:
        """The class that claims are made of. Raises FailedPrecondition where it is absent, InvalidArgument if ours."""
        found = self._api.get(STORAGE_CLASS, name)
        if found is None:
            raise FailedPrecondition(
                f"volume {volume_id} cannot be made: there is no StorageClass {name!r}, which the parameter "
                f"backingStorageClass names; make it, or correct the parameter in a new class"
            )
        if found.get("provisioner") == self._driver_name:
            raise InvalidArgument(
                f"the parameter backingStorageClass names {name!r}, a class of this driver itself "
                f"({self._driver_name}); name one of the driver that keeps the ciphertext"
            )
        return found

    def check_direct(self, volume_id: str, driver: str) -> None:
        """Raises FailedPrecondition where nodes cannot call that driver themselves."""
        refuse_driver(volume_id, driver, self._api.get(CSI_DRIVER, driver))

    def direct_of(self, volume_id: str, volume: Json) -> Direct:
        """What nodes tell the driver of a PersistentVolume. Raises FailedPrecondition where that is not enough."""
        found = read_direct(volume_id, volume)
        self.check_direct(volume_id, found.driver)
        return found

    def check_still(self, known: Known, direct: Direct) -> None:
        """Raises FailedPrecondition where it is not what `direct_of` would say any more."""
        volume = self._api.get(VOLUME, known.spec.volume_name)
        if volume is None or self.direct_of(known.volume_id, volume) != direct:
            raise changed(known.volume_id, known.spec.volume_name, direct)

    def ensure(self, known: Known, storage_class: Json, node: str) -> Json:
        """Make the volume's claim, or find the one that was made; for `node` where its class waits for one.

        A pod that waits for too long is given another node: the claim is told. Raises FailedPrecondition when the name
        is taken by another claim, it has gone, or the cluster does not admit it; ResourceExhausted where a quota does
        not, or the driver below is not on that node.
        """
        found = self.find(known.volume_id)
        chosen = {_SELECTED: node} if node and storage_class.get("volumeBindingMode") == "WaitForFirstConsumer" else {}
        if chosen and (found is None or not found["spec"].get("volumeName")):
            self._check_node(known, str(storage_class.get("provisioner")), node)
        if found is None and not known.spec.claim_uid:
            annotations = {_OWNER: known.uid, f"{GROUP}/volume-id": known.volume_id, **chosen}
            labels = {MANAGED_BY: MANAGER, LABEL: digest(known.volume_id)}
            spec = {
                "accessModes": ["ReadWriteOnce"],
                "volumeMode": "Block",
                "storageClassName": known.spec.backing_storage_class,
                "resources": {"requests": {"storage": str(known.spec.size)}},
            }
            metadata = {
                "name": name_for(known.volume_id),
                "annotations": annotations,
                "labels": labels,
                "finalizers": [KEEPS],
            }
            try:
                return self._api.create(CLAIM, {"metadata": metadata, "spec": spec}, self._namespace)
            except AlreadyExists:
                found = self.find(known.volume_id)
            except (FailedPrecondition, InvalidArgument, ResourceExhausted) as error:
                # InvalidArgument would be for good, and whoever refuses can change that.
                kind = ResourceExhausted if isinstance(error, ResourceExhausted) else FailedPrecondition
                raise kind(
                    f"volume {known.volume_id} cannot be made, as namespace {self._namespace} does not take the claim "
                    f"below it: {error}; this is tried again"
                ) from None
        if found is not None and not self._is_own(known, found):
            raise FailedPrecondition(
                f"volume {known.volume_id} cannot be made: the claim {self._where(known.volume_id)} is there and was "
                f"not made for it; it was left as it is, delete or rename it"
            )
        claim = self.check(known, found)
        is_told = chosen.items() <= claim["metadata"].get("annotations", {}).items()
        if is_told or claim["spec"].get("volumeName"):
            return claim
        wish = {"metadata": {"resourceVersion": claim["metadata"]["resourceVersion"], "annotations": chosen}}
        return self._api.patch(CLAIM, name_of(claim), wish, self._namespace)

    def _check_node(self, known: Known, driver: str, node: str) -> None:
        """A provisioner names no code when its driver is not on the node, and the pod would wait there for ever."""
        on_node = self._api.get(CSI_NODE, node)
        if on_node is None or self._api.get(CSI_DRIVER, driver) is None:
            return
        if driver not in [each["name"] for each in on_node["spec"].get("drivers") or ()]:
            raise ResourceExhausted(
                f"volume {known.volume_id} cannot be made for node {node}: the driver {driver} of class "
                f"{known.spec.backing_storage_class} below it is not there (CSINode {node}); install it there, or keep "
                f"the pods on nodes that have it"
            )

    def find(self, volume_id: str) -> Json | None:
        """What has the name of the volume's claim."""
        return self._api.get(CLAIM, name_for(volume_id), self._namespace)

    def check(self, known: Known, found: Json | None = None) -> Json:
        """The claim, seen to be the pinned one and to stay. Raises FailedPrecondition."""
        found = found or self.find(known.volume_id)
        where = self._where(known.volume_id)
        kept = f"its PersistentVolume was {known.spec.volume_name}" if known.spec.volume_name else "it was not bound"
        if found is None or known.spec.claim_uid not in ("", uid_of(found)):
            raise FailedPrecondition(
                f"the claim {where} below volume {known.volume_id} is gone or another one ({kept}), and with it the "
                f"volume's data unless that was retained; bind a claim of that name to it again and put its uid into "
                f"the VolumeRecord, or delete the volume"
            )
        if is_going(found):
            raise FailedPrecondition(
                f"somebody has asked for the deletion of the claim {where} below volume {known.volume_id}; its data is "
                f"still there ({kept}): let that be retained, bind a claim of that name to it anew and put its uid "
                f"into the VolumeRecord"
            )
        return found

    def bound(self, known: Known, claim: Json) -> Json:
        """The PersistentVolume of a claim that is bound, or is within a moment, and can be used.

        Raises Aborted while it is pending, saying what its events say; FailedPrecondition where it never will be, as
        the other driver has refused it; ResourceExhausted.
        """
        where, found = self._where(known.volume_id), None
        for is_last in looks(self._wait_seconds):
            found = self._volume_of(claim)
            if is_last or found is not None or _FINAL.search(self._said(claim)):
                break
            claim = self.check(known)
        if found is None:
            said = self._said(claim)
            told = f"the claim {where} below volume {known.volume_id}, of class {known.spec.backing_storage_class},"
            if _FINAL.search(said):
                raise FailedPrecondition(
                    f"{told} is refused: {said}; its driver must have raw block volumes, and room in its class for one "
                    f"of {known.spec.size} bytes"
                )
            if _NO_ROOM.search(said):
                raise ResourceExhausted(f"{told} has no room: {said}")
            raise Aborted(f"{told} is not bound yet ({said or 'nobody has looked at it'}); this is tried again")
        spec, name = found["spec"], name_of(found)
        if spec.get("volumeMode") != "Block":
            raise FailedPrecondition(
                f"the claim {where} below volume {known.volume_id} was bound to {name}, which is no raw block volume; "
                f"name a backingStorageClass whose driver has those"
            )
        if spec.get("csi", {}).get("driver") == self._driver_name:
            raise InvalidArgument(f"the claim {where} was bound to {name}, a volume of this driver itself")
        return found

    def size(self, volume: Json) -> int:
        """Bytes that a PersistentVolume has at least."""
        return _bytes(volume["spec"].get("capacity", {}).get("storage"))

    def grow(self, known: Known, size: int) -> None:
        """Have the claim enlarged. Raises Aborted while the other driver is at it, FailedPrecondition, OutOfRange where
        that refuses the size for good; a smaller one may be asked for then, as for any claim (KEP-1790).
        """
        claim = self.check(known)
        volume = self.bound(known, claim)
        if self.size(volume) >= size:
            return
        where = self._where(known.volume_id)
        storage_class = self._api.get(STORAGE_CLASS, known.spec.backing_storage_class)
        if storage_class is not None and not storage_class.get("allowVolumeExpansion"):
            raise FailedPrecondition(
                f"the claim {where} below volume {known.volume_id} cannot be enlarged: its class "
                f"{known.spec.backing_storage_class} does not say allowVolumeExpansion: true; set that if its driver "
                f"can do it"
            )
        if _bytes(claim["spec"]["resources"]["requests"].get("storage")) != size:
            version = claim["metadata"]["resourceVersion"]
            wish = {
                "metadata": {"resourceVersion": version},
                "spec": {"resources": {"requests": {"storage": str(size)}}},
            }
            self._api.patch(CLAIM, name_of(claim), wish, self._namespace)
        for _ in looks(self._wait_seconds):
            volume = self._api.get(VOLUME, name_of(volume)) or volume
            if self.size(volume) >= size:
                return
            claim = self.check(known)
            if _bytes(refused_size(claim)) == size:
                raise OutOfRange(
                    f"the claim {where} below volume {known.volume_id} cannot be enlarged from {self.size(volume)} to "
                    f"{size} bytes: its own driver refuses that ({self._said(claim, 'Resiz')}); ask for a smaller size"
                )
        raise Aborted(
            f"the claim {where} below volume {known.volume_id} is being enlarged from {self.size(volume)} to {size} "
            f"bytes by its own driver ({self._said(claim, 'Resiz') or 'which has said nothing yet'}); this is tried "
            f"again"
        )

    def settle(self, known: Known, size: int) -> None:
        """Say of a claim that no pod uses that its volume has been enlarged, as kubelet does: nodes see to the rest.

        Until somebody says it, its resizer enlarges it no further. Raises Aborted until that one has come so far.
        """
        for _ in looks(self._wait_seconds):
            claim = self.check(known)
            if _bytes(claim.get("status", {}).get("capacity", {}).get("storage")) >= size:
                return
            volume = self._volume_of(claim)
            if volume is not None and self.size(volume) >= size and is_waiting_for_node(claim):
                capacity = str(volume["spec"]["capacity"]["storage"])
                self._api.patch(CLAIM, name_of(claim), settled(claim, capacity), self._namespace, status=True)
                return
        raise Aborted(
            f"the claim {self._where(known.volume_id)} below volume {known.volume_id} is being enlarged to {size} "
            f"bytes by its own driver, which has not said yet that it is done; this is tried again"
        )

    def drop(self, known: Known) -> None:
        """Delete the claim; another one that has come to its name stays. Raises Aborted until it is gone."""
        found = self.find(known.volume_id)
        if found is None:
            return
        if not self._is_own(known, found):
            where = self._where(known.volume_id)
            log.warning("a claim was left alone: it is not the volume's", volume_id=known.volume_id, claim=where)
            return
        self._api.delete(CLAIM, name_of(found), self._namespace)
        drop_finalizer(self._api, CLAIM, name_of(found), self._namespace)
        if (left := self.find(known.volume_id)) is not None and uid_of(left) == uid_of(found):
            raise Aborted(
                f"the claim {self._where(known.volume_id)} below volume {known.volume_id} is being deleted and still "
                f"there ({', '.join(left['metadata'].get('finalizers', ())) or 'for a moment'}); this is tried again"
            )

    def _volume_of(self, claim: Json) -> Json | None:
        name = claim["spec"].get("volumeName")
        return self._api.get(VOLUME, name) if name and claim.get("status", {}).get("phase") == "Bound" else None

    @staticmethod
    def _is_own(known: Known, claim: Json) -> bool:
        """Whether it was made for that object, or is pinned by it."""
        owner = claim["metadata"].get("annotations", {}).get(_OWNER)
        return owner == known.uid or known.spec.claim_uid == uid_of(claim)

    def _where(self, volume_id: str) -> str:
        return f"{self._namespace}/{name_for(volume_id)}"

    def _said(self, claim: Json, reason: str = "") -> str:
        """What the last event of a claim that is no mere notice says."""
        return last_event(self._api, self._namespace, claim, reason)


def last_event(api: Api, namespace: str, thing: Json, reason: str = "") -> str:
    """The message of the latest warning about an object, or of its latest event; "" without any."""
    found, _ = api.list(EVENT, namespace, fields={"involvedObject.uid": uid_of(thing)})
    about = [each for each in found if reason in each.get("reason", "")]
    about.sort(key=lambda each: (each.get("type") == "Warning", _when(each)))
    return one_line(str(about[-1].get("message", "")), _MOST_QUOTED) if about else ""


def places_of(volume: Json) -> tuple[dict[str, str], ...]:
    """The topology segments of a PersistentVolume's node affinity, none where it is reached from everywhere.

    Raises FailedPrecondition for an affinity that segments cannot say.
    """
    required = volume["spec"].get("nodeAffinity", {}).get("required", {})
    places: list[dict[str, str]] = []
    for term in required.get("nodeSelectorTerms", ()):
        expressions: Sequence[Mapping[str, Any]] = term.get("matchExpressions", ())
        if term.get("matchFields") or any(each.get("operator") != "In" for each in expressions):
            raise FailedPrecondition(
                f"the node affinity of the volume {name_of(volume)} below says more than CSI can hand on (operators "
                f"other than In); choose another backingStorageClass"
            )
        values = [[(str(each["key"]), str(value)) for value in each.get("values", ())] for each in expressions]
        places += [dict(segments) for segments in itertools.product(*values) if segments]
    if len(places) > _MOST_PLACES:
        raise FailedPrecondition(f"the node affinity of the volume {name_of(volume)} below has too many places")
    return tuple(places)


def name_for(volume_id: str) -> str:
    """The name of the volume's claim."""
    return f"luks-{volume_id}"


def _when(event: Json) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp", ""))


def _bytes(quantity: object) -> int:
    try:
        return read_size(str(quantity))
    except ValueError:
        return 0
