"""Keeps Images true: has their copies made, told of, and removed. It decides; the agents of the nodes do."""

import contextlib
import threading
import time
from collections.abc import Container, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from csi_driver.host.log import log
from csi_driver.kube.claims import volume_of
from csi_driver.kube.client import Kube
from csi_driver.kube.controller import Controller
from csi_driver.kube.copies import State, is_of, state_of
from csi_driver.kube.informer import Informer
from csi_driver.kube.kinds import (
    IMAGE,
    IMAGE_COPY,
    NODE,
    POD,
    STORAGE_CLASS,
    Json,
    has_finalizer,
    is_going,
    name_of,
    uid_of,
)
from csi_driver.kube.refusals import Conflict
from csi_driver.model.errors import AlreadyExists, NotFound
from csi_driver.model.times import recorded_now
from csi_driver.operator.events import Events
from csi_driver.operator.plan import READY, Exported, Plan, World, plan
from csi_driver.operator.settings import OperatorSettings
from csi_driver.operator.standing import FAILED, keep, sooner
from csi_driver.operator.users import users_of_image

AGENT_LABELS: Final = {"app.kubernetes.io/name": "luks-csi", "app.kubernetes.io/component": "node"}
_PROGRESS: Final = frozenset({"progress", "bytesPerSecond", "nodes", "message", "conditions"})
_WRITE_SECONDS: Final = 1.0
_CLAIM_SECONDS: Final = 10.0  # claims and their volumes are not watched


class Images:
    """The controller of Images; `told` hears of every Image that changed, for the kinds that stand for one."""

    def __init__(self, kube: Kube, settings: OperatorSettings, events: Events) -> None:
        self._kube = kube
        self._settings = settings
        self._events = events
        self.controller = Controller("images", self.reconcile)
        self.images = Informer(kube, IMAGE, self._image_changed)
        self.copies = Informer(kube, IMAGE_COPY, self._copy_changed)
        self.pods = Informer(kube, POD, self._nodes_changed, namespace=settings.namespace, labels=AGENT_LABELS)
        self.nodes = Informer(kube, NODE, self._nodes_changed)
        self.classes = Informer(kube, STORAGE_CLASS, self._class_changed)
        self._seen_nodes: tuple[frozenset[str], Mapping[str, Mapping[str, str]]] = frozenset(), {}
        self._nodes_guard = threading.Lock()  # two informers tell of them
        self._since: dict[str, float] = {}
        self._written: dict[str, float] = {}

    @property
    def informers(self) -> Sequence[Informer]:
        """All that it watches."""
        return self.images, self.copies, self.pods, self.nodes, self.classes

    def reconcile(self, name: str) -> float | None:
        """Bring one Image nearer to what it says."""
        image = self.images.get(name)
        if image is None:
            self._written.pop(name, None)
            self._let_go([copy for copy in self._copies(name) if self._is_over(copy)])
            return None
        every = self.copies.all()
        idle, idle_later = self._idle(image, every)
        if idle:  # what was begun or deleted a moment ago, by this operator too, may not be among those that were seen
            every = self._kube.list(IMAGE_COPY)[0]
            idle, idle_later = self._idle(image, every)
        copies = [copy for copy in every if copy["spec"]["image"] == name]
        agents = self._agents()
        lost, look_again = self._lost(copies, agents)
        world = World(
            now=recorded_now(), agents=agents, nodes=frozenset(map(name_of, self.nodes.all())), lost=lost,
            **self._of_source(image), users=self._users(image) if is_going(image) else (), idle=idle,
        )  # fmt: skip
        found = plan(image, copies, world)
        if not idle and (found.delete or any(copy["spec"]["make"] for copy in found.create)):
            self._refuse_unseen(name, copies)
        later = self._write(image, found)
        self._do(image, copies, found)
        claim = _CLAIM_SECONDS if world.claim is not None else None
        return sooner(later, look_again, idle_later, claim)

    def _refuse_unseen(self, name: str, seen: Sequence[Json]) -> None:
        """Raise Conflict where what was begun, told or deleted a moment ago, by this operator too, was not seen yet.

        Two nodes would make the image, and what failed would count twice.
        """
        there = [copy for copy in self._kube.list(IMAGE_COPY)[0] if copy["spec"]["image"] == name]
        if _versions(there) != _versions(seen):
            raise Conflict(f"the copies of image {name} were changed meanwhile; they are looked at again")

    def _do(self, image: Json, copies: Sequence[Json], found: Plan) -> None:
        for copy in copies:  # before another one begins what it was making: that it is no more as it was seen ends this
            if name_of(copy) in found.delete:
                self._kube.delete(IMAGE_COPY, name_of(copy), seen=copy)
        for copy in found.create:
            with contextlib.suppress(AlreadyExists):
                self._kube.create(IMAGE_COPY, copy)
                log.info(
                    "copy wanted", image=copy["spec"]["image"], node=copy["spec"]["node"], make=copy["spec"]["make"]
                )
        self._let_go([copy for copy in copies if name_of(copy) in found.forget])
        if found.finalizer is not None:
            keep(self._kube, IMAGE, self.images, image, kept=found.finalizer)

    def _write(self, image: Json, found: Plan) -> float | None:
        """Write what changed in the status; what only tells how far it is once a second. Seconds until that may be."""
        before = image.get("status", {})
        patch = {name: value for name, value in found.status.items() if before.get(name) != value}
        if not patch:
            return None
        name = name_of(image)
        wait = self._written.get(name, 0.0) + _WRITE_SECONDS - time.monotonic()
        if patch.keys() <= _PROGRESS and before.get("phase") == found.status["phase"] and wait > 0:
            return wait
        with contextlib.suppress(NotFound):
            self.images.saw(self._kube.patch(IMAGE, name, {"status": patch}, status=True))
            self._written[name] = time.monotonic()
            self._tell_event(image, found.status)
        return None

    def _tell_event(self, image: Json, status: Json) -> None:
        before = image.get("status", {})
        phase, message = status["phase"], status["message"]
        if phase == READY and before.get("phase") != READY:
            self._events.tell(IMAGE, image, "Ready", f"image {name_of(image)} is ready")
        elif phase == FAILED and (before.get("phase"), before.get("message")) != (phase, message):
            self._events.tell(IMAGE, image, "Failed", message, warning=True)

    def _let_go(self, copies: Sequence[Json]) -> None:
        """Of copies whose node is gone for good nothing is left that an agent could remove."""
        for copy in copies:
            with contextlib.suppress(NotFound):
                if has_finalizer(copy):
                    self._kube.patch(IMAGE_COPY, name_of(copy), {"metadata": {"finalizers": None}})
                self._kube.delete(IMAGE_COPY, name_of(copy))

    def _is_over(self, copy: Json) -> bool:
        return copy["spec"]["node"] not in set(map(name_of, self.nodes.all())) and is_going(copy)

    def _copies(self, name: str) -> list[Json]:
        return [copy for copy in self.copies.all() if copy["spec"]["image"] == name]

    def _agents(self) -> dict[str, Mapping[str, str]]:
        """Nodes with an agent that is up, and their labels."""
        labels = {name_of(node): node["metadata"].get("labels", {}) for node in self.nodes.all() if not is_silent(node)}
        up = {pod["spec"].get("nodeName", "") for pod in self.pods.all() if is_up(pod)}
        return {node: labels[node] for node in sorted(up) if node in labels}

    def _lost(self, copies: Sequence[Json], agents: Container[str]) -> tuple[frozenset[str], float | None]:
        """The nodes of copies that have had no agent for too long, and when the next one has been so."""
        now, lost, waits = time.monotonic(), set(), []
        for node in {copy["spec"]["node"] for copy in copies}:
            if node in agents:
                self._since.pop(node, None)
                continue
            left = self._since.setdefault(node, now) + self._settings.lost_seconds - now
            if left <= 0:
                lost.add(node)
            else:
                waits.append(left)
        return frozenset(lost), min(waits, default=None)

    def _of_source(self, image: Json) -> dict[str, Any]:
        source = image["spec"]["source"]
        if "clone" in source:
            name = source["clone"]["image"]
            return {"source": self.images.get(name), "source_copies": self._copies(name)}
        if "claim" in source and "virtualSize" not in image.get("status", {}):
            return {"claim": self._exported(source["claim"])}
        return {}

    def _exported(self, reference: Json) -> Exported | str:
        namespace, name = reference["namespace"], reference["name"]
        volume = volume_of(self._kube, namespace, name)
        if isinstance(volume, str):
            return volume
        csi = volume["spec"].get("csi", {})
        if csi.get("driver") != self._settings.driver_name:
            return f"the volume of claim {namespace}/{name} is not one of {self._settings.driver_name}"
        is_encrypted = (csi.get("volumeAttributes") or {}).get("encrypted") == "true"
        secret = csi.get("nodeStageSecretRef") if is_encrypted else None
        terms = volume["spec"].get("nodeAffinity", {}).get("required", {}).get("nodeSelectorTerms", [])
        for term in terms:
            for expression in term.get("matchExpressions", []):
                if expression["key"] == f"topology.{self._settings.driver_name}/node" and expression.get("values"):
                    return Exported(csi["volumeHandle"], expression["values"][0], secret)
        return f"the volume of claim {namespace}/{name} lies on no node that its PersistentVolume names"

    def _users(self, image: Json) -> list[str]:
        """Who keeps an image from being deleted, in words.

        A clone that this operator has begun a moment ago may not be among the copies that were seen: whose end it would
        be is asked of the API.
        """
        found = self._users_among(image, self.copies.all())
        return found or self._users_among(image, self._kube.list(IMAGE_COPY)[0])

    def _users_among(self, image: Json, copies: Sequence[Json]) -> list[str]:
        return users_of_image(name_of(image), self._settings.driver_name, self.classes.all(), self.images.all(), copies)

    def _idle(self, image: Json, copies: Sequence[Json]) -> tuple[list[str], float | None]:
        """Which of all `copies` are its, ready and of no use for long enough, the longest first; when the next one is.

        One beyond what is wanted: nobody has to look again for the others.
        """
        seconds, wanted = self._settings.unused_seconds, image["spec"].get("copies", 1)
        ready = [copy for copy in copies if is_of(copy, image) and state_of(copy) is State.READY and not is_going(copy)]
        if not seconds or len(ready) <= wanted:
            return [], None
        read = self._read_on(name_of(image), copies)
        now, since, waits = datetime.now(UTC), {}, [_CLAIM_SECONDS] if read else []
        for copy in ready:
            used = datetime.fromisoformat(copy["status"].get("lastUsed") or copy["metadata"]["creationTimestamp"])
            left = seconds - (now - used).total_seconds()
            if left > 0:
                waits.append(left)
            elif copy["spec"]["node"] not in read:
                since[name_of(copy)] = used
        return sorted(since, key=lambda name: since[name]), min(waits, default=None)

    def _read_on(self, source: str, copies: Sequence[Json]) -> set[str]:
        """The nodes that make something of an image."""
        clones = {name_of(image) for image in self.images.all() if _cloned(image) == source}
        return {
            copy["spec"]["node"] for copy in copies
            if copy["spec"]["image"] in clones and copy["spec"].get("make") and state_of(copy) is not State.READY
        }  # fmt: skip

    def _image_changed(self, image: Json) -> None:
        self.controller.tell(name_of(image))
        if (source := _cloned(image)) is not None:
            self.controller.tell(source)
        self._tell_clones(name_of(image))

    def _copy_changed(self, copy: Json) -> None:
        self.controller.tell(copy["spec"]["image"])
        self._tell_clones(copy["spec"]["image"])

    def _tell_clones(self, source: str) -> None:
        for image in self.images.all():
            if _cloned(image) == source:
                self.controller.tell(name_of(image))

    def _nodes_changed(self, _thing: Json) -> None:
        """A node that had no agent any more may go, too: then what is told of its copies is over."""
        with self._nodes_guard:
            seen = frozenset(map(name_of, self.nodes.all())), self._agents()
            is_new, self._seen_nodes = seen != self._seen_nodes, seen
        if is_new:
            names = {copy["spec"]["image"] for copy in self.copies.all()} | {*map(name_of, self.images.all())}
            for name in names:
                self.controller.tell(name)

    def _class_changed(self, storage_class: Json) -> None:
        name = (storage_class.get("parameters") or {}).get("backingImage")
        if name and self.images.get(name) is not None:
            self.controller.tell(name)


def _versions(copies: Sequence[Json]) -> set[tuple[str, str]]:
    return {(uid_of(copy), copy["metadata"]["resourceVersion"]) for copy in copies}


def _cloned(image: Json) -> str | None:
    """The image that it is a clone of."""
    name: str | None = image["spec"]["source"].get("clone", {}).get("image")
    return name


def is_silent(node: Json) -> bool:
    """Whether its kubelet tells nothing any more: the containers of its pods stay "ready" in the API, dead or not."""
    conditions = node.get("status", {}).get("conditions", ())
    return any((each["type"], each["status"]) == ("Ready", "Unknown") for each in conditions)


def is_up(pod: Json) -> bool:
    """Whether its agent can be asked, if its node is not silent: it stays, and its container image-agent is ready."""
    if is_going(pod):
        return False
    statuses = pod.get("status", {}).get("containerStatuses", [])
    return any(each["name"] == "image-agent" and each.get("ready") for each in statuses)
