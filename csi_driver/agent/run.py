"""All that runs in the process of an agent: the copies of its node, and the server that gives and takes images."""

from typing import Final

from csi_driver.agent.access import Access
from csi_driver.agent.agent import Agent
from csi_driver.agent.rate import Rate
from csi_driver.agent.server import CopyServer
from csi_driver.agent.settings import AgentSettings
from csi_driver.agent.uploads import Uploads
from csi_driver.host.log import log
from csi_driver.images.library import ImageLibrary
from csi_driver.kube.client import Kube
from csi_driver.kube.kinds import name_of
from csi_driver.model.errors import FailedPrecondition

_SYNC_SECONDS: Final = 60.0


class NodeAgent:
    """Runs from `start` to `stop`; `library` is that of the node's images."""

    def __init__(self, kube: Kube, settings: AgentSettings, library: ImageLibrary) -> None:
        self._settings = settings
        uploads = Uploads(settings.images / "uploads")
        self._agent = Agent(kube, settings, library, uploads)
        uploads.came = self._uploaded
        self._server = CopyServer(
            settings.listen,
            settings.tls_dir,
            library,
            uploads,
            Access(kube, settings.account),
            self._agent.copies.all,
            self._agent.images.get,
            Rate(settings.rate),
            self._obstacle,
        )

    def start(self) -> None:
        """Begin. Raises FailedPrecondition when the API or the address cannot be used."""
        self._server.start()
        self._agent.start()
        for informer in (self._agent.images, self._agent.copies):
            if not informer.wait_synced(_SYNC_SECONDS):
                raise FailedPrecondition(f"the agent cannot see the objects {informer.kind}: {informer.error}")
        self._agent.wishes.start()
        self._agent.leftovers.start()
        log.info("image agent started", node=self._settings.node, address=self._settings.address)

    def stop(self) -> None:
        """End; what is under way is gone on with by the next agent."""
        self._server.stop()
        self._agent.stop()

    def _obstacle(self) -> str:
        """Why what is known of the cluster may be old."""
        informers = (self._agent.images, self._agent.copies)
        return "; ".join(f"{each.kind}: {each.error}" for each in informers if each.error)

    def _uploaded(self, name: str) -> None:
        for copy in self._agent.copies.all():
            if copy["spec"]["image"] == name:
                self._agent.controller.tell(name_of(copy))
