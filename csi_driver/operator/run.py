"""The operator: its controllers, what they watch, and its end."""

from collections.abc import Sequence
from typing import Final, Protocol

from csi_driver.host.log import log
from csi_driver.kube.client import Kube
from csi_driver.kube.controller import Controller
from csi_driver.kube.informer import Informer
from csi_driver.kube.kinds import CLAIM, VOLUME
from csi_driver.model.errors import FailedPrecondition
from csi_driver.operator.admission.admission import Admission
from csi_driver.operator.admission.lookups import ApiCluster
from csi_driver.operator.certificates import Certificates
from csi_driver.operator.compat import check_crds, compat
from csi_driver.operator.events import Events
from csi_driver.operator.images import Images
from csi_driver.operator.settings import OperatorSettings
from csi_driver.operator.users import claim_kept, secrets_kept

_SYNC_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 20.0


class Part(Protocol):
    """A controller and what it watches."""

    @property
    def controller(self) -> Controller: ...

    @property
    def informers(self) -> Sequence[Informer]: ...


class Operator:
    """Runs from `start` to `stop`, with admission webhooks where it has an address (host, port) to `listen` at.

    Raises FailedPrecondition where Longhorn's or Harvester's kinds are their own.
    """

    def __init__(self, kube: Kube, settings: OperatorSettings, listen: tuple[str, int] | None = None) -> None:
        self._kube = kube
        self._settings = settings
        self._events = Events(kube, "luks-csi-operator")
        self.images = Images(kube, settings, self._events)
        self.certificates = Certificates(kube, settings.namespace)
        self._certifying = Controller("certificates", self.certificates.reconcile)
        images = self.images
        others = {informer.kind: informer for informer in (images.images, images.copies, images.classes)}
        served = check_crds(kube)
        foreign = compat(kube, served, others, settings, self._events)
        self._parts: list[Part] = [images, *foreign]
        self._informers = [informer for part in self._parts for informer in part.informers]
        self.admission: Admission | None = None
        if listen is not None:
            self._informers += [Informer(kube, VOLUME, kept=secrets_kept), Informer(kube, CLAIM, kept=claim_kept)]
            cluster = ApiCluster(kube, {informer.kind: informer.all for informer in self._informers})
            self.admission = Admission(settings, cluster, self.certificates.context, listen)

    def start(self) -> None:
        """Watch, and when all is known, act. Raises FailedPrecondition when something cannot be watched."""
        for informer in self._informers:
            informer.start()
        for informer in self._informers:
            if not informer.wait_synced(_SYNC_SECONDS):
                raise FailedPrecondition(f"the operator cannot see the objects {informer.kind}: {informer.error}")
        for part in self._parts:
            part.controller.start()
        self._certifying.start()
        self._certifying.tell("all")
        if self.admission is not None:
            self.admission.start()
        log.info("operator started", namespace=self._settings.namespace)

    def obstacle(self) -> str | None:
        """Why what is known may be old, or certificates are not in place; None while all is well."""
        errors = {f"{each.kind}: {each.error}" for each in self._informers if each.error}
        if self.certificates.error:
            errors.add(f"certificates: {self.certificates.error}")
        return "; ".join(sorted(errors)) or None

    def stop(self) -> None:
        """Begin nothing any more, and wait for what is under way."""
        if self.admission is not None:
            self.admission.ask_to_end()
        self._certifying.ask_to_end()
        for part in self._parts:
            part.controller.ask_to_end()
        for informer in self._informers:
            informer.ask_to_end()
        for part in self._parts:
            part.controller.join(_STOP_SECONDS)
