"""What the agent tells the driver of its node, and what that waits for: images that volumes are to start from.

One thread looks at what is, each second, and makes the files say it: what failed is tried again, what changes often is
told once a second, and a file that somebody took away comes back.
"""

import contextlib
from typing import Any

from csi_driver.agent.settings import AgentSettings
from csi_driver.host.log import log
from csi_driver.host.regularly import Ending, Regularly
from csi_driver.images.cluster import ClusterImages
from csi_driver.kube.client import Kube
from csi_driver.kube.copies import State, copy_of, is_of, state_of
from csi_driver.kube.informer import Informer
from csi_driver.kube.kinds import IMAGE_COPY, Json, is_going, name_of, uid_of
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
        self._told: dict[str, dict[str, Any]] = {}
        self._looks = Regularly("wishes", self.look, _SECONDS)

    def start(self) -> None:
        """Begin, when all Images are known: what was told of those that are gone is taken back."""
        self._looks.start()

    def ask_to_end(self) -> None:
        """Look no more."""
        self._looks.ask_to_end()

    def last_used(self, name: str) -> str:
        """When a volume of this node last started from an image, as it is recorded; "" where nobody knows of any."""
        return self._cluster.last_used(name)

    def look(self, _ending: Ending) -> None:
        """Tell of every image, and have a copy of each that a volume of this node waits for."""
        images = {name_of(image): image for image in self._images.all() if not is_going(image)}
        copies = {
            name: copy
            for copy in self._copies.all()
            if (name := copy["spec"]["image"]) in images and is_of(copy, images[name]) and not is_going(copy)
        }
        self._tell(images, copies)
        for name in self._cluster.wanted():
            image, copy = images.get(name), copies.get(name)
            if image is None or (copy is not None and state_of(copy) is State.READY):
                self._cluster.brought(name)
            elif copy is None and image.get("status", {}).get("phase") == "Ready":
                log.info("copy wanted by a volume", image=name)
                with contextlib.suppress(AlreadyExists):
                    self._kube.create(IMAGE_COPY, copy_of(image, self._settings.node))

    def _tell(self, images: dict[str, Json], copies: dict[str, Json]) -> None:
        there = {*self._cluster.names()}
        for name in there - {*images}:
            self._told.pop(name, None)
            self._cluster.forget(name)
        for name, image in images.items():
            status, copy = image.get("status", {}), copies.get(name, {})
            here = copy.get("status", {})
            told = {
                "uid": uid_of(image),
                "ready": status.get("phase") == "Ready",
                "here": state_of(copy) is State.READY,
                "percent": here.get("progress"),
                "message": here.get("message") or status.get("message", ""),
            }
            if name not in there or self._told.get(name) != told:
                self._cluster.tell(name, **told)
                self._told[name] = told
