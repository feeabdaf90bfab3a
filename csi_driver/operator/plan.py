"""What is to be done for one Image: decided from what there is, without a call, the same each time it is asked.

The first copy is made on one node from the image's source; the others are pulled from nodes that have it. A file that
once was ready is never made anew: it would be another one, with another volume key. What fails by a node's own fault is
made on another one, when the first has let go of it: there are never two that make the same image.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from csi_driver.kube.copies import FACTS, State, copy_of, is_of, state_of
from csi_driver.kube.kinds import Json, has_finalizer, is_going, name_of, uid_of
from csi_driver.operator.advice import COPIES_LOST, lost, removed, upload_of
from csi_driver.operator.cloning import not_its_to_clone, refusal
from csi_driver.operator.standing import FAILED, Origin, condition

PENDING, IN_PROGRESS, READY, DELETING = "Pending", "InProgress", "Ready", "Deleting"

_STATUS_KEYS: Final = (
    "phase", "message", "progress", "bytesPerSecond", "copies", "nodes", "upload", "conditions", "observedGeneration",
    "tried", *FACTS,
)  # fmt: skip
_TRIES: Final = 3
"""How often a node that fails by its own fault tries, before another one does."""


@dataclass(frozen=True)
class World:
    """What else decides. `agents` are the nodes with an agent that is up, with their labels; `nodes` those there are;
    `lost` those without an agent for too long. `source` is the image that is cloned, `source_copies` its copies;
    `claim` tells volume and node of an exported claim, or why there is none. `users` keep the image from being deleted.
    `idle` are the names of copies that nobody has used for long enough, the one that has waited longest first.
    """

    now: str
    agents: Mapping[str, Mapping[str, str]]
    nodes: frozenset[str]
    lost: frozenset[str] = frozenset()
    source: Json | None = None
    source_copies: Sequence[Json] = ()
    claim: "Exported | str | None" = None
    users: Sequence[str] = ()
    idle: Sequence[str] = ()


@dataclass(frozen=True)
class Exported:
    """The volume of a claim, the node that it lies on, and the secret (name, namespace) that opens it, if one does."""

    volume: str
    node: str
    secret: Json | None = None


@dataclass
class Plan:
    """What to do: copies to make and delete, those whose nodes are gone to let go, the finalizer, the status."""

    create: list[Json] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)
    forget: list[str] = field(default_factory=list)
    finalizer: bool | None = None
    status: Json = field(default_factory=dict)


@dataclass
class _Outcome:
    """`tried` are the nodes that have failed by their own fault: node, attempts, whether that was for good, and the
    message. None leaves them as they are.
    """

    phase: str
    message: str
    reason: str
    tried: Sequence[Json] | None = None


def plan(image: Json, copies: Sequence[Json], world: World) -> Plan:
    """What brings an Image nearer to what it says. `copies` are those of its name."""
    ours = [copy for copy in copies if is_of(copy, image)]
    found = Plan()
    if is_going(image):
        outcome = _delete(image, ours, world, found)
    elif not has_finalizer(image):
        found.finalizer = True
        return found
    else:
        found.forget = [name_of(copy) for copy in ours if copy["spec"]["node"] not in world.nodes]
        there = [copy for copy in ours if not is_going(copy) and copy["spec"]["node"] in world.nodes]
        outcome = _keep(image, there, ours, world, found)
        ours = there
    found.status = _status(image, ours, outcome, world)
    return found


def _delete(image: Json, ours: Sequence[Json], world: World, found: Plan) -> _Outcome:
    name = name_of(image)
    if world.users:
        return _Outcome(DELETING, f"image {name} is kept until it is used no more: {'; '.join(world.users)}", "InUse")
    found.forget = [name_of(copy) for copy in ours if copy["spec"]["node"] not in world.nodes]
    found.delete = [name_of(copy) for copy in ours if not is_going(copy) and name_of(copy) not in found.forget]
    if not ours:
        found.finalizer = False
    return _Outcome(
        DELETING, removed([copy for copy in ours if name_of(copy) not in found.forget], world.agents), "Deleting"
    )


def _keep(image: Json, there: Sequence[Json], ours: Sequence[Json], world: World, found: Plan) -> _Outcome:
    near = [copy for copy in there if copy["spec"]["node"] not in world.lost]
    ready = [copy for copy in near if state_of(copy) is State.READY]
    if ready:
        return _spread(image, near, ready, world, found)
    if any(state_of(copy) is State.READY for copy in there):
        nodes = ", ".join(sorted(copy["spec"]["node"] for copy in there if state_of(copy) is State.READY))
        return _Outcome(PENDING, f"no node that has it answers ({nodes}); it is usable when one does", "NodesLost")
    if any("image" in copy.get("status", {}) for copy in there):
        return _Outcome(FAILED, _said(there) or "its file is gone from the node that had it", "FileLost")
    if "virtualSize" in image.get("status", {}):
        return _Outcome(FAILED, lost(image, world.nodes), COPIES_LOST)
    leaving = [copy["spec"]["node"] for copy in ours if is_going(copy) and copy["spec"].get("make")]
    if leaving := sorted(node for node in {*leaving} & world.nodes if node not in world.lost):
        said = f"another node makes it when {' and '.join(leaving)} has removed its part"
        return _Outcome(PENDING, "; ".join((*_failures(_tried(image)), said)), "Moving")
    return _make(image, near, there, world, found)


def _spread(image: Json, near: Sequence[Json], ready: Sequence[Json], world: World, found: Plan) -> _Outcome:
    """It is there; have as many copies as are wanted."""
    wanted = image["spec"].get("copies", 1)
    selected = image["spec"].get("nodeSelector", {})
    coming = [copy for copy in near if state_of(copy) is not State.FAILED and copy not in ready]
    counted = [copy for copy in (*ready, *coming) if _counts(world, copy["spec"]["node"], selected)]
    missing = wanted - len(counted)
    if missing > 0:
        taken = {copy["spec"]["node"] for copy in near}
        free = [node for node in _nodes(image, world) if node not in taken]
        found.create = [copy_of(image, node) for node in free[:missing]]
        missing -= len(found.create)
    _remove_idle(ready, selected, wanted, world, found)
    wanted = "one more copy is" if missing == 1 else f"{missing} more copies are"
    message = "" if missing <= 0 else f"{wanted} wanted and no other node can have one"
    return _Outcome(READY, message, "Ready")


def _remove_idle(ready: Sequence[Json], selector: Mapping[str, str], wanted: int, world: World, found: Plan) -> None:
    """Copies that are more than wanted, those first that nobody has used for longest.

    Only those whose nodes answer are reckoned with: one that is away may never come back.
    """
    fits = {
        name_of(copy): _fits(world, copy["spec"]["node"], selector)
        for copy in ready
        if copy["spec"]["node"] in world.agents
    }
    spare = sum(fits.values()) - wanted
    for name in (name for name in world.idle if name in fits and spare >= 0):
        if not fits[name] or spare:
            found.delete.append(name)
            spare -= fits[name]


def _make(image: Json, near: Sequence[Json], there: Sequence[Json], world: World, found: Plan) -> _Outcome:
    """There is none yet: one node makes it from its source."""
    makers = [copy for copy in near if copy["spec"].get("make")]
    if makers and _is_stale(image, makers[0], world):  # the claim has another volume now, or the volume another claim
        found.delete = [name_of(copy) for copy in makers]
        return _Outcome(PENDING, _no_claim(world) or "its claim has another volume now", "NoClaim")
    if makers:
        return _made_by(image, makers[0], world, found)
    if (held := _upload_on(image, there)) is not None:
        said = f"node {held}, which may have all of its upload, does not answer; it is made when it does"
        return _Outcome(PENDING, f"{said}, else delete the Image and make it anew", "NodesLost")
    outcome = _first(image, world, found)
    if any(copy["spec"]["make"] for copy in found.create):
        # One whose node has no agent any more is tidied up when that comes back. Until then it may be the only one.
        found.delete = [name_of(copy) for copy in there]
    return outcome


def _upload_on(image: Json, there: Sequence[Json]) -> str | None:
    """The node with an upload that may have come, all of it: nobody sends it again."""
    if "upload" not in image["spec"]["source"]:
        return None
    asked = (copy for copy in there if copy.get("status", {}).get("address"))  # told with the first AwaitingUpload
    come = (copy for copy in asked if state_of(copy) is not State.AWAITING_UPLOAD)
    return next((str(copy["spec"]["node"]) for copy in come), None)


def _first(image: Json, world: World, found: Plan) -> _Outcome:
    """Nobody is at work on it: who begins."""
    source = image["spec"]["source"]
    if "claim" in source:
        return _export(image, world, found)
    nodes = _makers(image, world)
    if not nodes and _tried(image):
        return _Outcome(FAILED, "; ".join(_failures(_tried(image))), "NotMade")
    if not nodes:
        return _Outcome(PENDING, "no node with an agent fits its nodeSelector", "NoNode")
    if "clone" in source:
        return _clone(image, nodes, world, found)
    return _begin(image, nodes[0], found)


def _made_by(image: Json, maker: Json, world: World, found: Plan) -> _Outcome:
    """How far the node is that makes it; one that fails by its own fault makes place for another one."""
    node, told = maker["spec"]["node"], maker.get("status", {})
    state, message = state_of(maker), told.get("message", "")
    is_full = state is State.AWAITING_UPLOAD and told.get("elsewhere")
    if state is State.FAILED or is_full:
        permanent, attempts = bool(told.get("permanent")), 1 if is_full else told.get("attempts", 0)
        others = [each for each in _tried(image) if each["node"] != node]
        this = {"node": node, "attempts": _attempts(image, node) + attempts, "permanent": permanent, "message": message}
        after, said = [*others, this], "; ".join(_failures([*others, this]))
        is_over = told.get("elsewhere") and (permanent or attempts >= _TRIES) and _can_move(image)
        if is_full or is_over:  # with an upload that there is no room for nothing is lost
            image = image | {"status": {**image.get("status", {}), "tried": after}}
            if any(other != node for other in _makers(image, world)):
                found.delete = [name_of(maker)]
                return _Outcome(PENDING, f"{said}; another node is to make it", "Moving", after)
        if is_full:
            return _Outcome(PENDING, f"{said}; then this goes on: {upload_of(image)}", "AwaitingUpload")
        return _Outcome(FAILED, said if permanent else f"{said}; it is tried again", "NotMade")
    if state is State.AWAITING_UPLOAD:
        return _Outcome(PENDING, f"waits for: {upload_of(image)}", "AwaitingUpload")
    if state is State.IN_PROGRESS:
        return _Outcome(IN_PROGRESS, f"node {node}: {message}", "InProgress")
    return _Outcome(PENDING, f"node {node} is to make it", "Scheduled")


def _can_move(image: Json) -> bool:
    """What was uploaded lies on its node, and so does a claim's volume."""
    return not image["spec"]["source"].keys().isdisjoint(("download", "clone"))


def _makers(image: Json, world: World) -> list[str]:
    """The nodes that may make it, those that have failed least first; not those that have failed for good."""
    for_good = {each["node"] for each in _tried(image) if each["permanent"]}
    nodes = [node for node in _nodes(image, world) if node not in for_good]
    return sorted(nodes, key=lambda node: _attempts(image, node))


def _tried(image: Json) -> Sequence[Json]:
    """The nodes that have failed by their own fault."""
    return image.get("status", {}).get("tried") or ()


def _attempts(image: Json, node: str) -> int:
    return next((int(each["attempts"]) for each in _tried(image) if each["node"] == node), 0)


def _failures(tried: Sequence[Json]) -> list[str]:
    return [f"node {each['node']}: {each['message']}" for each in tried]


def _begin(image: Json, node: str, found: Plan, volume: str | None = None, secret: Json | None = None) -> _Outcome:
    found.create = [copy_of(image, node, make=True, volume=volume, secret=secret)]
    return _Outcome(PENDING, f"node {node} is to make it", "Scheduled")


def _is_stale(image: Json, maker: Json, world: World) -> bool:
    """Whether it is made of a volume that is not the claim's any more."""
    if "claim" not in image["spec"]["source"]:
        return False
    claim = world.claim
    return not isinstance(claim, Exported) or claim.volume != maker["spec"].get("volume")


def _no_claim(world: World) -> str:
    return "" if isinstance(world.claim, Exported) else world.claim or "its claim has not been looked at"


def _export(image: Json, world: World, found: Plan) -> _Outcome:
    if not isinstance(world.claim, Exported):
        said = f"{_no_claim(world)}; it is looked at again, else make the image anew of another claim"
        return _Outcome(PENDING, said, "NoClaim")
    if world.claim.node not in world.agents:
        return _Outcome(PENDING, f"node {world.claim.node}, which has the claim's volume, has no agent now", "NoNode")
    named = image["spec"].get("secretRef")
    return _begin(image, world.claim.node, found, world.claim.volume, None if named else world.claim.secret)


def _clone(image: Json, nodes: Sequence[str], world: World, found: Plan) -> _Outcome:
    wanted, source = image["spec"]["source"]["clone"], world.source
    name = wanted["image"]
    if source is None or is_going(source):
        return _Outcome(PENDING, f"there is no image {name}; it is cloned when there is", "NoSource")
    status = source.get("status", {})
    if status.get("phase") != READY:
        return _Outcome(PENDING, f"waits for image {name}, which is {status.get('phase', PENDING)}", "SourceNotReady")
    if (why := not_its_to_clone(Origin.of(image), source)) is not None:  # before anything is told of what it is
        return _Outcome(PENDING, why, "NoSource")
    if (why := refusal(name, wanted.get("encryption", "ignore"), encrypted=status.get("encrypted", False))) is not None:
        return _Outcome(FAILED, why, "Refused")
    having = {
        copy["spec"]["node"]: copy
        for copy in world.source_copies
        if is_of(copy, source) and copy["spec"]["node"] in world.agents
    }
    failed = [having[node] for node in nodes if node in having and state_of(having[node]) is State.FAILED]
    usable = [node for node in nodes if node not in {copy["spec"]["node"] for copy in failed}]
    if not usable:
        return _Outcome(PENDING, f"image {name} cannot be brought: {_said(failed)}", "SourceNotHere")
    least = [node for node in usable if _attempts(image, node) == _attempts(image, usable[0])]
    for node in least:
        if node in having and not is_going(having[node]) and state_of(having[node]) is State.READY:
            return _begin(image, node, found)
    # None of them has the source: it is brought to one.
    if not any(node in having for node in least):
        found.create = [copy_of(source, least[0])]
    message = f"image {name} is being brought to a node that fits its nodeSelector"
    return _Outcome(PENDING, message, "SourceNotHere")


def _nodes(image: Json, world: World) -> list[str]:
    """The nodes that may have it, in an order of its own: images spread over the nodes."""
    fits = [node for node in world.agents if _fits(world, node, image["spec"].get("nodeSelector", {}))]
    return sorted(fits, key=lambda node: hashlib.sha256(f"{uid_of(image)}/{node}".encode()).digest())


def _fits(world: World, node: str, selector: Mapping[str, str]) -> bool:
    labels = world.agents.get(node)
    return labels is not None and all(labels.get(name) == value for name, value in selector.items())


def _counts(world: World, node: str, selector: Mapping[str, str]) -> bool:
    """Whether a copy there is one of those that are wanted; an agent that starts anew takes nothing away."""
    return node not in world.agents or _fits(world, node, selector)


def _said(copies: Sequence[Json]) -> str:
    told = ({"node": copy["spec"]["node"], "message": _message(copy)} for copy in copies if _message(copy))
    return "; ".join(_failures([*told]))


def _message(copy: Json) -> str:
    return str(copy.get("status", {}).get("message", ""))


def _status(image: Json, copies: Sequence[Json], outcome: _Outcome, world: World) -> Json:
    before = image.get("status", {})
    ready = [copy for copy in copies if state_of(copy) is State.READY]
    wanted = image["spec"].get("copies", 1)
    facts = before if "checksum" in before or not ready else ready[0]["status"]["image"]
    maker = next((copy for copy in copies if copy["spec"].get("make")), None)
    told = maker.get("status", {}) if maker else {}
    awaiting = outcome.reason == "AwaitingUpload"
    status: Json = dict.fromkeys(_STATUS_KEYS) | {name: facts[name] for name in FACTS if name in facts}
    status |= {
        "observedGeneration": image["metadata"].get("generation"),
        "phase": outcome.phase,
        "message": outcome.message,
        "progress": 100 if outcome.phase == READY else told.get("progress", 0),
        "bytesPerSecond": told.get("bytesPerSecond") if outcome.phase == IN_PROGRESS else None,
        "copies": f"{len(ready)}/{wanted}",
        "nodes": sorted(map(_node, copies), key=lambda node: str(node["name"])),
        "tried": None if "checksum" in facts else outcome.tried or _tried(image) or None,
        "upload": {"node": maker["spec"]["node"], "address": told["address"]} if maker and awaiting else None,
    }
    complete = len(ready) >= wanted
    several = f"{len(ready)} of {wanted} copies are ready"
    status["conditions"] = [
        condition(before, "Ready", _truth(outcome.phase == READY), outcome.reason, outcome.message, world.now),
        condition(
            before, "CopiesComplete", _truth(complete), "Complete" if complete else "Incomplete", several, world.now
        ),
    ]
    return status


def _node(copy: Json) -> Json:
    told = copy.get("status", {})
    found: Json = {"name": copy["spec"]["node"], "state": state_of(copy)}
    if "progress" in told and found["state"] != State.READY:
        found["progress"] = told["progress"]
    if told.get("message"):
        found["message"] = told["message"]
    return found


def _truth(holds: bool) -> str:  # noqa: FBT001 - of a condition
    return "True" if holds else "False"
