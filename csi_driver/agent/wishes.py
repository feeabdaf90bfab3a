"""What the agent tells the driver of its node, and what that waits for: images that volumes are to start from."""

import contextlib

from csi_driver.agent.settings import AgentSettings
from csi_driver.host.log import log
from csi_driver.host.regularly import Ending, Regularly
from csi_driver.images.cluster import ClusterImages
from csi_driver.kube.client import Kube
from csi_driver.kube.copies import State, copy_of, state_of
from csi_driver.kube.informer import Informer
from csi_driver.kube.kinds import IMAGE_COPY, is_going, uid_of
from csi_driver.model.errors import AlreadyExists

_SECONDS = 1.0


class Wishes:
    """Between the Images and copies that were seen and the files that driver and agent share."""

    def __init__(self, kube: Kube, settings: AgentSettings, images: Informer, copies: Informer) -> None:
        self._kube = kube
        self._settings = settings
        self._images = images
        self._copies = copies
        self._cluster = ClusterImages(settings.images)
        self._looks = Regularly("wishes", self.look, _SECONDS)

    def start(self) -> None:
        """Begin, when all Images are known: what was told of those that are gone is taken back."""
        for name in self._cluster.names():
            self.describe(name)
        self._looks.start()

    def ask_to_end(self) -> None:
        """Look no more."""
        self._looks.ask_to_end()

    def look(self, _ending: Ending) -> None:
        """Have a copy of each image that a volume of this node waits for."""
        for name in self._cluster.wanted():
            image = self._images.get(name)
            copies = [copy for copy in self._copies.all() if copy["spec"]["image"] == name]
            if image is None or is_going(image) or any(state_of(copy) is State.READY for copy in copies):
                self._cluster.brought(name)
            elif image.get("status", {}).get("phase") == "Ready" and not copies:
                log.info("copy wanted by a volume", image=name)
                with contextlib.suppress(AlreadyExists):
                    self._kube.create(IMAGE_COPY, copy_of(image, self._settings.node))

    def describe(self, name: str) -> None:
        """Tell the driver of an image of the cluster, and how far bringing it here is."""
        image = self._images.get(name)
        if image is None or is_going(image):
            return self._cluster.forget(name)
        status = image.get("status", {})
        here = next((copy for copy in self._copies.all() if copy["spec"]["image"] == name), None)
        told = here.get("status", {}) if here is not None else {}
        message = told.get("message") or status.get("message", "")
        ready = status.get("phase") == "Ready"
        return self._cluster.tell(name, uid_of(image), ready=ready, percent=told.get("progress"), message=message)
