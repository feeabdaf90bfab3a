"""Longhorn's and Harvester's kinds in the operator: served where their definitions are there and are ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from csi_driver.kube.client import Kube
from csi_driver.kube.controller import Controller
from csi_driver.kube.informer import Informer
from csi_driver.kube.kinds import BACKING_IMAGE, CRD, MANAGED_BY, MANAGER, VIRTUAL_MACHINE_IMAGE, Json, Kind
from csi_driver.model.errors import FailedPrecondition
from csi_driver.operator.backing_images import BackingImages
from csi_driver.operator.events import Events
from csi_driver.operator.settings import OperatorSettings
from csi_driver.operator.virtual_machine_images import VirtualMachineImages

_KINDS: Final = (BACKING_IMAGE, VIRTUAL_MACHINE_IMAGE)


class Reads(Protocol):
    """The call of `Kube` that is made here, with its errors."""

    def get(self, kind: Kind, name: str, namespace: str = "") -> Json | None: ...


def check_crds(api: Reads) -> frozenset[Kind]:
    """Which of the two kinds are served here. Raises FailedPrecondition where one is somebody else's."""
    served = set()
    for kind in _KINDS:
        name = f"{kind.plural}.{kind.group}"
        found = api.get(CRD, name)
        if found is None:
            continue
        if (found["metadata"].get("labels") or {}).get(MANAGED_BY) != MANAGER:
            raise FailedPrecondition(
                f"the CustomResourceDefinition {name} lacks the label {MANAGED_BY}: {MANAGER}, so another program "
                f"looks after these objects; run this operator in a cluster without that one, or remove what is left "
                f"of it and apply deploy/kubernetes/compat"
            )
        served.add(kind)
    if VIRTUAL_MACHINE_IMAGE in served and BACKING_IMAGE not in served:
        raise FailedPrecondition(
            f"the kind {VIRTUAL_MACHINE_IMAGE} is here without {BACKING_IMAGE}, which does its work; apply "
            f"deploy/kubernetes/compat whole"
        )
    return frozenset(served)


class Translation(Protocol):
    """A controller of one of the two kinds."""

    @property
    def controller(self) -> Controller: ...

    @property
    def KINDS(self) -> Sequence[Kind]: ...  # noqa: N802

    def changed(self, kind: Kind, thing: Json) -> None: ...


@dataclass(frozen=True)
class Compat:
    """One of the two kinds in the operator: its controller, and what it watches beside the others."""

    controller: Controller
    informers: Sequence[Informer]


def compat(
    kube: Kube, served: frozenset[Kind], others: Mapping[Kind, Informer], settings: OperatorSettings, events: Events
) -> list[Compat]:
    """The parts for the kinds that `check_crds` has found, before anything starts. `others` are the informers of Image,
    ImageCopy and StorageClass.
    """
    namespace = settings.backing_image_namespace
    parts: list[Compat] = []
    seen = dict(others)
    for kind in _KINDS:
        if kind not in served:
            continue
        informer = Informer(kube, kind, namespace=namespace if kind == BACKING_IMAGE else "")
        seen[kind] = informer
        translation: Translation = (
            BackingImages(kube, seen, namespace, events)
            if kind == BACKING_IMAGE
            else VirtualMachineImages(kube, seen, namespace, settings.driver_name, events)
        )
        for each in translation.KINDS:
            seen[each].tell_too(partial(translation.changed, each))
        parts.append(Compat(translation.controller, (informer,)))
    return parts
