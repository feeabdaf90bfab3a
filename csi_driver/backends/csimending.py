"""What the controller of the backend `csi` puts right by itself: holders that are astray, deletions that were cut."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from csi_driver.backends.csiheaders import HeaderCopies
from csi_driver.backends.csiholders import HolderPods, astray_of, node_of, wants_holder
from csi_driver.backends.csirecords import Known, RecordObjects
from csi_driver.host.log import log
from csi_driver.kube.kinds import name_of
from csi_driver.model.errors import Aborted, DriverError, VolumeBusy


class Mending:
    """Makes holders and records agree. `undo` goes on with the deletion of a volume: of one that could not be made, and
    whose claim was deleted since, nobody asks again.
    """

    def __init__(
        self, records: RecordObjects, headers: HeaderCopies, holders: HolderPods, undo: Callable[[Known], None]
    ) -> None:
        self._records = records
        self._headers = headers
        self._holders = holders
        self._undo = undo
        self._said: dict[str, str] = {}

    def look(self, hold: Callable[[str], AbstractContextManager[None]], is_ending: Callable[[], bool]) -> None:
        """Look at every volume once; a lock that is busy waits for the next time.

        What keeps one from being mended is told, once, and the next one's turn comes.
        """
        known = {each.volume_id: each for each in self._records.all()}
        astray = astray_of(known.values(), self._holders.all())
        going = [each.volume_id for each in known.values() if each.spec.state == "Deleting"]
        wanting = {*astray, *going}
        self._said = {volume_id: said for volume_id, said in self._said.items() if volume_id in wanting}
        for volume_id in sorted(wanting):
            if is_ending():
                return
            before = self._said.pop(volume_id, "")
            try:
                with hold(volume_id):
                    said = self._mend(volume_id)
                if said not in ("", before):
                    log.warning("a holder had ended", volume_id=volume_id, error=said)
            except (VolumeBusy, Aborted):
                said = before  # it passes by itself
            except DriverError as error:
                said = str(error)
                if said != before:
                    log.warning("a volume cannot be mended", volume_id=volume_id, error=said)
            self._said[volume_id] = said
        self._headers.drop_unused(known.values())

    def _mend(self, volume_id: str) -> str:
        """Returns what a holder that had ended tells of it."""
        known = self._records.find(volume_id)
        if known is not None and known.spec.state == "Deleting":
            self._undo(known)
            return ""
        node = known.spec.node if known is not None else ""
        for pod in self._holders.of(volume_id):
            if (place := node_of(pod)) != node:
                log.warning("a holder that nobody asked for", volume_id=volume_id, pod=name_of(pod), node=place)
                self._holders.drop(volume_id, pod, wait=False)  # others wait for their turn
        # One that is made for a node that is off would stay until that is back, and keep the volume from all others.
        if known is not None and wants_holder(known) and self._holders.is_ready(node):
            return self._holders.begin(known, node)
        return ""
