"""The Kubernetes API of the operator's controllers, in memory: versions, merge patches, finalizers, errors on wish."""

import copy
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from csi_driver.kube.informer import Informer
from csi_driver.kube.kinds import FINALIZER, Json, Kind, name_of
from csi_driver.kube.refusals import Conflict
from csi_driver.model.errors import AlreadyExists, NotFound

Key = tuple[str, str]
_NONE: Mapping[str, str] = {}
NOW = "2026-11-28T12:00:00+00:00"


@dataclass(frozen=True)
class Call:
    """A call that changes something."""

    verb: str
    kind: Kind
    name: str


class FakeApi:
    """Objects by kind, namespace and name. `before` is asked before each call and may raise; `calls` are the writes."""

    def __init__(self) -> None:
        self._things: dict[Kind, dict[Key, Json]] = {}
        self._versions = itertools.count(1)
        self.calls: list[Call] = []
        self.before: Callable[[Call], None] = lambda _call: None

    def get(self, kind: Kind, name: str, namespace: str = "") -> Json | None:
        assert name
        self.before(Call("get", kind, name))
        return copy.deepcopy(self._of(kind).get((namespace, name)))

    def all(self, kind: Kind) -> list[Json]:
        return copy.deepcopy([*self._of(kind).values()])

    def create(self, kind: Kind, thing: Json, namespace: str = "") -> Json:
        name = name_of(thing)
        self._called("create", kind, name)
        assert bool(namespace) == kind.namespaced
        if (namespace, name) in self._of(kind):
            raise AlreadyExists(f"{kind} {name} already exists")
        return self.put(kind, thing, namespace)

    def put(self, kind: Kind, thing: Json, namespace: str = "") -> Json:
        """Have an object there; somebody has made it."""
        made = copy.deepcopy(thing)
        number = next(self._versions)
        made["metadata"] = {
            "uid": f"uid-{number}",
            "resourceVersion": str(number),
            **({"namespace": namespace} if namespace else {}),
            **made["metadata"],
        }
        self._of(kind)[namespace, name_of(made)] = made
        return copy.deepcopy(made)

    def patch(self, kind: Kind, name: str, patch: Json, namespace: str = "", *, status: bool = False) -> Json:
        self._called("patch status" if status else "patch", kind, name)
        thing = self._of(kind).get((namespace, name))
        if thing is None:
            raise NotFound(f"there is no {kind} {name}")
        wanted = copy.deepcopy(patch)
        version = wanted.get("metadata", {}).pop("resourceVersion", None)
        if not wanted.get("metadata", {1: 1}):
            del wanted["metadata"]
        if version not in (None, thing["metadata"]["resourceVersion"]):
            raise Conflict(f"{kind} {name} was changed meanwhile")
        assert status == (wanted.keys() == {"status"}), "the status is a subresource"
        merge(thing, wanted)
        thing["metadata"]["resourceVersion"] = str(next(self._versions))
        self._drop(kind, (namespace, name))
        return copy.deepcopy(thing)

    def change(self, kind: Kind, name: str, patch: Json, namespace: str = "") -> Json:
        """Somebody else changes an object, his own or its status."""
        thing = self._of(kind)[namespace, name]
        merge(thing, copy.deepcopy(patch))
        thing["metadata"]["resourceVersion"] = str(next(self._versions))
        self._drop(kind, (namespace, name))
        return copy.deepcopy(thing)

    def delete(
        self, kind: Kind, name: str, namespace: str = "", *, grace_seconds: int | None = None, seen: Json | None = None
    ) -> None:
        self._called("delete", kind, name)
        there = self._of(kind).get((namespace, name))
        if seen and there and seen["metadata"]["resourceVersion"] != there["metadata"]["resourceVersion"]:
            raise Conflict(f"{kind} {name} was changed meanwhile")
        self.remove(kind, name, namespace)

    def remove(self, kind: Kind, name: str, namespace: str = "") -> None:
        """Somebody asks for its deletion."""
        thing = self._of(kind).get((namespace, name))
        if thing is not None:
            if "deletionTimestamp" not in thing["metadata"]:
                thing["metadata"] |= {"deletionTimestamp": NOW, "resourceVersion": str(next(self._versions))}
            self._drop(kind, (namespace, name))

    def lose(self, kind: Kind, name: str, namespace: str = "") -> None:
        """It is gone, whatever its finalizers."""
        del self._of(kind)[namespace, name]

    def finish(self, kind: Kind, name: str) -> None:
        """What held a cluster-scoped object that goes lets it go."""
        self.change(kind, name, {"metadata": {"finalizers": None}})

    def written(self) -> list[Call]:
        """The writes since this was asked last."""
        calls, self.calls = self.calls, []
        return calls

    def list(
        self, kind: Kind, namespace: str = "", labels: Mapping[str, str] = _NONE, fields: Mapping[str, str] = _NONE
    ) -> tuple[list[Json], str]:
        found = [each for (within, _), each in self._of(kind).items() if namespace in ("", within)]
        found = [each for each in found if labels.items() <= each["metadata"].get("labels", {}).items()]
        for field, value in fields.items():
            part, name = field.split(".")
            found = [each for each in found if each[part].get(name) == value]
        return copy.deepcopy(found), "1"

    def _of(self, kind: Kind) -> dict[Key, Json]:
        return self._things.setdefault(kind, {})

    def _called(self, verb: str, kind: Kind, name: str) -> None:
        assert name
        call = Call(verb, kind, name)
        self.before(call)
        self.calls.append(call)

    def _drop(self, kind: Kind, key: Key) -> None:
        metadata = self._of(kind)[key]["metadata"]
        if metadata.get("deletionTimestamp") and not metadata.get("finalizers"):
            del self._of(kind)[key]


class SilentApi(FakeApi):
    """Tells what there is when it is asked, and of nothing that changes, until `end`."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = threading.Event()
        self._informers: list[Informer] = []

    def inform(self, informer: Informer) -> None:
        """Start one, and wait until it has seen what there is now."""
        self._informers.append(informer)
        informer.start()
        assert informer.wait_synced(60)

    def end(self) -> None:
        """End all that watches: an informer that only loses its watch lists again at once, and for ever."""
        for informer in self._informers:
            informer.ask_to_end()
        self._ended.set()

    def watch(self, *_: object, **__: object) -> Iterator[tuple[str, Json]]:
        self._ended.wait()
        yield from ()


class Cache:
    """What an informer knows of a kind: all that there is, or what there was when `freeze` was called."""

    def __init__(self, api: FakeApi, kind: Kind) -> None:
        self._api = api
        self._kind = kind
        self._frozen: list[Json] | None = None
        self.error = ""

    def freeze(self) -> None:
        self._frozen = self._api.all(self._kind)

    def thaw(self) -> None:
        self._frozen = None

    def get(self, name: str, namespace: str = "") -> Json | None:
        found = (each for each in self.all() if _key(each) == (namespace, name))
        return next(found, None)

    def all(self) -> list[Json]:
        return self._api.all(self._kind) if self._frozen is None else copy.deepcopy(self._frozen)

    def saw(self, thing: Json) -> None:
        if self._frozen is not None:
            self._frozen = [thing if _key(each) == _key(thing) else each for each in self._frozen]


def merge(thing: Json, patch: Json) -> None:
    """RFC 7386."""
    for name, value in patch.items():
        if value is None:
            thing.pop(name, None)
        elif isinstance(value, dict):
            inner = thing.get(name)
            thing[name] = inner if isinstance(inner, dict) else {}
            merge(thing[name], value)
        else:
            thing[name] = value


def conditions(thing: Json) -> dict[str, tuple[str, str, str]]:
    """Status, reason and message of each condition."""
    found: Iterator[Any] = iter(thing.get("status", {}).get("conditions", ()))
    return {each["type"]: (each["status"], each["reason"], each["message"]) for each in found}


def kept(thing: Json | None) -> bool:
    """Whether it is there and has our finalizer."""
    return thing is not None and FINALIZER in thing["metadata"].get("finalizers", ())


def _key(thing: Json) -> Key:
    return thing["metadata"].get("namespace", ""), name_of(thing)


class EventList:
    """Events; `lines` are KIND NAME: REASON: MESSAGE, with a ! before what warns."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def tell(self, kind: Kind, thing: Json, reason: str, message: str, *, warning: bool = False) -> None:
        self.lines.append(f"{'! ' if warning else ''}{kind} {name_of(thing)}: {reason}: {message}")
