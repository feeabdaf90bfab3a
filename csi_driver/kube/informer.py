"""What there is of a kind, kept in memory and true to the API: listed, then watched, listed anew behind each watch.

Who is told of a change gets a name, not what happened: he looks at what there is now. So an event that was lost, or a
deletion in a moment without a watch, is made good by the next listing, which is compared with what was there before.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Final

from csi_driver.host.log import log
from csi_driver.kube.client import Kube
from csi_driver.kube.kinds import Json, Kind, name_of
from csi_driver.kube.refusals import Gone
from csi_driver.model.errors import DriverError

Key = tuple[str, str]
"""Namespace ("" where there is none) and name."""
Changed = Callable[[Json], None]
"""Called with an object that came, changed, or went, as it was last seen; from the informer's thread."""

_FIRST_SECONDS: Final = 0.5
_MOST_SECONDS: Final = 30.0


class Informer:
    """The objects of `kind` that the selectors let through, from `start` on; `changed` is told of each change.

    Of each object is kept what `kept` makes of it, which must leave name, namespace and resourceVersion.
    """

    def __init__(
        self,
        kube: Kube,
        kind: Kind,
        changed: Changed | None = None,
        *,
        namespace: str = "",
        labels: Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
        kept: Callable[[Json], Json] | None = None,
    ) -> None:
        self.kind = kind
        self._kube = kube
        self._kept = kept or (lambda thing: thing)
        self._told: list[Changed] = [changed] if changed else []
        self._where = {"namespace": namespace, "labels": labels or {}, "fields": fields or {}}
        self._things: dict[Key, Json] = {}
        self._own: set[Key] = set()  # of those that only `saw` told of
        self._guard = threading.Lock()
        self._synced = threading.Event()
        self._end = threading.Event()
        self._error = "not listed yet"
        self._thread = threading.Thread(target=self._run, name=f"informer {kind}", daemon=True)

    def start(self) -> None:
        """Begin; once."""
        self._thread.start()

    def tell_too(self, changed: Changed) -> None:
        """Tell somebody else of each change too; before `start`."""
        self._told.append(changed)

    def ask_to_end(self) -> None:
        """Tell of nothing any more; the thread ends with its connection."""
        self._end.set()

    def wait_synced(self, seconds: float) -> bool:
        """Whether all was listed once, within that time."""
        return self._synced.wait(seconds)

    @property
    def error(self) -> str:
        """Why what is known may be old, "" while it is not."""
        return self._error

    def get(self, name: str, namespace: str = "") -> Json | None:
        """The object as it was last seen; not to be changed."""
        with self._guard:
            return self._things.get((namespace, name))

    def all(self) -> list[Json]:
        """All of them, as they were last seen; not to be changed."""
        with self._guard:
            return [*self._things.values()]

    def saw(self, thing: Json) -> None:
        """Take what an own write has answered: nobody waits for its event.

        What somebody else changed just before is in it too, and is told by its own event, or by the next listing.
        """
        with self._guard:
            key = _key(thing)
            known = self._things.get(key)
            if known is not None and _version(known) < _version(thing):
                self._things[key] = thing
                self._own.add(key)

    def _run(self) -> None:
        wait = _FIRST_SECONDS
        while not self._end.is_set():
            try:
                things, version = self._kube.list(self.kind, **self._where)  # type: ignore[arg-type]
                self._replace([self._kept(thing) for thing in things])
                self._error = ""
                self._synced.set()
                told = False
                for event, thing in self._kube.watch(self.kind, version, **self._where):  # type: ignore[arg-type]
                    if self._end.is_set():
                        return
                    self._put(event, self._kept(thing))
                    told = True
                wait = _FIRST_SECONDS
                if not told:  # who ends each watch at once (a proxy, say) is not asked again and again
                    self._end.wait(wait)
            except Gone:
                self._end.wait(_FIRST_SECONDS)
            except DriverError as error:
                if self._end.is_set():
                    return
                self._error = str(error)
                log.warning("objects cannot be watched", kind=str(self.kind), error=str(error))
                self._end.wait(wait)
                wait = min(2 * wait, _MOST_SECONDS)
            except Exception as error:  # noqa: BLE001 - what nobody foresaw must not leave us blind
                self._error = f"{type(error).__name__} while it was watched"
                log.error("objects cannot be watched", kind=str(self.kind), error=type(error).__name__)
                self._end.wait(_MOST_SECONDS)

    def _replace(self, things: list[Json]) -> None:
        there = {_key(thing): thing for thing in things}
        with self._guard:
            before, self._things = self._things, there
            own, self._own = self._own, set()
            for key in own & there.keys():
                if _version(before[key]) > _version(there[key]):  # written since it was listed: its event is to come
                    there[key] = before[key]
                    self._own.add(key)
        for key, thing in there.items():
            known = before.pop(key, None)
            if known is None or _version(known) != _version(thing) or key in own:
                self._tell(thing)
        for thing in before.values():
            self._tell(thing)

    def _put(self, event: str, thing: Json) -> None:
        key = _key(thing)
        with self._guard:
            if event == "DELETED":
                self._things.pop(key, None)
            elif event in ("ADDED", "MODIFIED"):
                known = self._things.get(key)
                if known is not None and _version(known) > _version(thing):
                    return  # an own write was seen already
                self._things[key] = thing
            else:
                return
            self._own.discard(key)
        self._tell(thing)

    def _tell(self, thing: Json) -> None:
        for told in self._told:
            try:
                told(thing)
            except Exception as error:  # noqa: BLE001 - of one object, which must not hide the others
                log.error(
                    "a change could not be looked at",
                    kind=str(self.kind),
                    name=name_of(thing),
                    error=type(error).__name__,
                )


def _key(thing: Json) -> Key:
    return thing["metadata"].get("namespace", ""), name_of(thing)


def _version(thing: Json) -> int:
    """Comparable since Kubernetes 1.35 says so; etcd's has always been a number that grows."""
    text = str(thing["metadata"].get("resourceVersion", "0"))
    return int(text) if text.isdigit() else 0
