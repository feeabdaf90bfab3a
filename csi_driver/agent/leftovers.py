"""Files of Images that are gone: a node that was taken out of its cluster, and returns with its old disk, has them.

A copy is kept as an object until its agent has removed the file, but for the copies of a node that is gone for good. So
what is here without an object is left over of that; whose it is says the uid of the Image that each file carries.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from csi_driver.agent.settings import AgentSettings
from csi_driver.agent.uploads import Uploads
from csi_driver.host.files import Files, read_file
from csi_driver.host.log import log
from csi_driver.host.regularly import Ending, Regularly
from csi_driver.images.library import ImageLibrary
from csi_driver.kube.client import Kube
from csi_driver.kube.copies import copy_of
from csi_driver.kube.informer import Informer
from csi_driver.kube.kinds import IMAGE, IMAGE_COPY, NAMESPACE, Json, is_going, name_of, uid_of
from csi_driver.model.errors import AlreadyExists, DriverError, FailedPrecondition, NotFound

_SECONDS: Final = 20.0
_CLUSTER: Final = "kube-system"
"""The namespace whose uid tells one cluster from another."""

_Left = tuple[str, str]  # an image's name, the uid of its Image


class Leftovers:
    """Removes them when they have been left for `settings.leftover_seconds`, which is logged before. What belongs to an
    Image that is there gets an object again; what another cluster has left is left alone.
    """

    def __init__(
        self,
        kube: Kube,
        settings: AgentSettings,
        library: ImageLibrary,
        uploads: Uploads,
        images: Informer,
        copies: Informer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kube = kube
        self._settings = settings
        self._library = library
        self._uploads = uploads
        self._images = images
        self._copies = copies
        self._clock = clock
        self._since: dict[_Left, float] = {}
        self._is_ours: bool | None = None
        self._looks = Regularly("leftovers", self.look, min(_SECONDS, settings.leftover_seconds))

    def start(self) -> None:
        """Begin, when all Images and copies are known."""
        self._looks.start()

    def ask_to_end(self) -> None:
        """Look no more."""
        self._looks.ask_to_end()

    def look(self, ending: Ending) -> None:
        """Look once at all that is here."""
        if self._is_ours is None:
            self._is_ours = self._belongs()
        if not self._is_ours:
            return
        left = self._found() - {_of(copy) for copy in self._copies.all()}
        self._since = {each: since for each, since in self._since.items() if each in left}
        errors = []
        for each in sorted(left):
            if ending():
                return
            try:
                self._look_at(each)
            except DriverError as error:  # of one; the others are looked at all the same
                errors.append(error)
        if errors:
            raise errors[0]

    def _look_at(self, left: _Left) -> None:
        image = self._images.get(left[0])
        if image is not None and uid_of(image) == left[1] and self._is_whole(left):
            self._adopt(image)
        elif self._has_waited(left):
            self._remove(left)

    def _belongs(self) -> bool:
        """Whether the images of this node are this cluster's: it says so in a file, from the first time on."""
        found = self._kube.get(NAMESPACE, _CLUSTER)
        if found is None:
            raise FailedPrecondition(f"there is no namespace {_CLUSTER}, whose uid says which cluster this is")
        path, uid = self._settings.images / "of-cluster", uid_of(found)
        known = _read(path)
        if known is None:
            self._settings.images.mkdir(mode=0o700, parents=True, exist_ok=True)
            Files().write(path, uid.encode())
        elif known != uid:
            log.warning(
                "images of another cluster are left alone", cluster=known, this=uid,
                advice=f"remove them with luks-csi image delete --owned NAME, and then {path}",
            )  # fmt: skip
        return known in (None, uid)

    def _found(self) -> set[_Left]:
        return {*self._library.owned().items(), *self._uploads.owned().items()}

    def _is_whole(self, left: _Left) -> bool:
        try:
            return self._library.get(left[0]).owner == left[1]
        except NotFound:
            return False

    def _adopt(self, image: Json) -> None:
        """It may be the last file of its Image. Whether it is the right one is seen by its checksum, so not before the
        Image says that: another node may be making it.
        """
        if not is_going(image) and "checksum" in image.get("status", {}):
            log.info("file of an image found", image=name_of(image))
            with contextlib.suppress(AlreadyExists):
                self._kube.create(IMAGE_COPY, copy_of(image, self._settings.node))

    def _has_waited(self, left: _Left) -> bool:
        now = self._clock()
        if left not in self._since:
            self._since[left] = now
            log.warning(
                "files of an Image that is gone", image=left[0], uid=left[1],
                removed_in_seconds=self._settings.leftover_seconds,
            )  # fmt: skip
        return now - self._since[left] >= self._settings.leftover_seconds

    def _remove(self, left: _Left) -> None:
        """Unless the API, asked now, knows better than what was seen of it."""
        name, uid = left
        images, _ = self._kube.list(IMAGE, fields={"metadata.name": name})
        copies, _ = self._kube.list(IMAGE_COPY, fields={"spec.node": self._settings.node})
        if left in map(_of, copies) or (self._is_whole(left) and uid in map(uid_of, images)):
            return
        self._uploads.forget(name, uid)
        self._library.drop(name, uid)
        del self._since[left]
        log.warning("files of an Image that is gone were removed", image=name, uid=uid)


def _of(copy: Json) -> _Left:
    return copy["spec"]["image"], copy["spec"]["imageUID"]


def _read(path: Path) -> str | None:
    try:
        return read_file(path).decode(errors="replace")
    except FileNotFoundError:
        return None
