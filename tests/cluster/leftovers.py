"""What the driver and its volumes may leave on a node, looked for on the node itself: whatever the driver says."""

import hashlib
import json
import re
import time
from collections.abc import Collection, Iterator

from tests.cluster.api import Json
from tests.cluster.driver import STATE
from tests.cluster.node import Node

_PAUSE_SECONDS = 0.5
_CLEAN_SECONDS = 60  # kubelet's loops and a loop device's last user need a moment
_CLOSED_SECONDS = 60  # the pod may still be about to end

_KUBELET = "/var/lib/kubelet"
_PROGRAMS = r"mkfs|mke2fs|resize2fs|e2fsck|xfs_|btrfs$|cryptsetup|dmsetup"
_KERNEL_THREADS = "2"  # the parent of all of them
_LAUNCHER = "csi_driver.host.launcher"

# Names with blanks are none of ours, and what goes away meanwhile is no leftover.
_LOOK = f"""
for dm in /sys/block/dm-*/dm; do
    [ -e $dm ] && read -r name < $dm/name && read -r uuid < $dm/uuid && echo "mapping $name $uuid"
done
for name in $(ls /dev/mapper); do echo "node $name"; done
for loop in /sys/block/loop*/loop; do
    name=${{loop%/loop}}
    [ -e $loop ] && read -r file < $loop/backing_file && echo "loop ${{name##*/}} on $file"
done
cat /proc/[0-9]*/mountinfo | grep -e '/kubernetes.io[/~]csi/' -e ' /dev/mapper/luks-' | sed 's/^/mount /'
grep -e ' logon ' -e ' luks-csi:' /proc/keys | sed 's/^/key /'
ls -i {STATE}/locks | sed 's/^/lockfile /'
sed 's/^/lock /' /proc/locks
cd {STATE} && for file in loopfile/volumes/* loopfile/new/* loopfile/trash/* stages/*; do
    [ -e "$file" ] && echo "file {STATE}/$file"
done
cd {_KUBELET} && for file in pods/*/volumes/kubernetes.io~csi/* pods/*/volumeDevices/kubernetes.io~csi/* \\
    plugins/kubernetes.io/csi/*/* plugins/kubernetes.io/csi/volumeDevices/*/*; do
    case $file in */volumeDevices/staging | */volumeDevices/publish) ;; *)
        [ -e "$file" ] && echo "file {_KUBELET}/$file" ;;
    esac
done
ps -e -ww -o pid= -o ppid= -o stat= -o comm= -o args= | sed 's/^/process /'
true
"""

Facts = dict[str, list[str]]


def _look(node: Node) -> Facts:
    """What the script tells, by kind."""
    facts: Facts = {}
    for line in node.run(_LOOK).text.splitlines():
        kind, _, rest = line.partition(" ")
        facts.setdefault(kind, []).append(rest)
    return facts


def _mappings(facts: Facts) -> dict[str, str]:
    """The device-mapper UUID of each device-mapper device."""
    return {name: uuid for name, _, uuid in (one.partition(" ") for one in facts.get("mapping", []))}


def _open(facts: Facts) -> Iterator[str]:
    """Mappings, loop devices, mounts, keys."""
    mappings = _mappings(facts)
    yield from (f"mapping {name} with UUID {uuid}" for name, uuid in mappings.items())
    nodes = (name for name in facts.get("node", []) if name != "control" and name not in mappings)
    yield from (f"node /dev/mapper/{name} without its mapping" for name in nodes)
    yield from (f"loop device {one}" for one in facts.get("loop", []))
    mounts = set()
    for line in facts.get("mount", []):
        head, _, tail = line.partition(" - ")
        mounts.add(f"mount of {tail.split()[1]} at {head.split()[4]}")
    yield from sorted(mounts)
    # Fields of /proc/keys (proc(5)): serial, flags, usage, timeout, permissions, uid, gid, type, description.
    yield from (f"key {' '.join(line.split()[8:])}" for line in facts.get("key", []))


def _locks(facts: Facts) -> Iterator[str]:
    names = dict(one.split() for one in facts.get("lockfile", []))
    for line in facts.get("lock", []):
        # Fields of /proc/locks (proc(5)): number, kind, mode, access, pid, device and inode.
        fields = line.replace("->", "").split()
        if fields[1] == "FLOCK" and (name := names.get(fields[5].rpartition(":")[2])):
            yield f"held lock {name} of process {fields[4]}"


def _processes(facts: Facts) -> Iterator[str]:
    """Workers and programs at work, and the launchers whose server is gone."""
    found = {}
    for line in facts.get("process", []):
        pid, parent, state, name, *rest = line.split(None, 4)
        found[pid] = (parent, state, name, "".join(rest))
    for pid, (parent, state, name, arguments) in found.items():
        ours = _LAUNCHER in arguments
        _, _, parent_name, parent_arguments = found.get(parent, ("", "", "", ""))
        orphaned = ours and parent_name != "luks-csi" and _LAUNCHER not in parent_arguments
        at_work = ours and name.startswith("luks-") and name != "luks-idle"
        if orphaned or at_work or (re.match(_PROGRAMS, name) and parent != _KERNEL_THREADS):
            yield f"process {pid} ({name}, state {state}, child of {parent_name or parent}): {arguments}"


def left_on(node: Node, but: Collection[str] = ()) -> list[str]:
    """Everything that no volume, or only those with the ids in `but`, should have left on a node, in words: mappings,
    loop devices, mounts in any mount namespace, volume keys, held locks, processes, files of the driver and folders of
    kubelet.
    """
    facts = _look(node)
    found = [*_open(facts), *_locks(facts), *_processes(facts), *(f"file {one}" for one in facts.get("file", []))]
    if not but:
        return found
    words = {word for volume_id in but for word in (volume_id, hashlib.sha256(volume_id.encode()).hexdigest())}
    words |= {luks_uuid(uuid) for name, uuid in _mappings(facts).items() if name.removeprefix("luks-") in but}
    return [line for line in found if not any(word in line for word in words)]


def luks_uuid(dm_uuid: str) -> str:
    """The LUKS UUID in CRYPT-LUKS2-UUID-NAME, in which it has no hyphens."""
    bare = dm_uuid.split("-")[2]
    return f"{bare[:8]}-{bare[8:12]}-{bare[12:16]}-{bare[16:20]}-{bare[20:]}"


def assert_clean(node: Node, but: Collection[str] = (), timeout: float = _CLEAN_SECONDS) -> None:
    """Wait until a node has nothing left of volumes and pods that are gone; those with the ids in `but` are still
    there. AssertionError names what stays.
    """
    deadline = time.monotonic() + timeout
    while left := left_on(node, but):
        assert time.monotonic() < deadline, "\n".join((f"{node.name} has, after {timeout:g} s:", *left))
        time.sleep(_PAUSE_SECONDS)


def record(node: Node, volume_id: str) -> Json:
    """What the driver has recorded of a volume of this node."""
    found: Json = json.loads(node.run(f"cat {STATE}/loopfile/volumes/{volume_id}/record.json").text)["volume"]
    return found


def opened(node: Node, volume_id: str) -> list[str]:
    """What of one volume is open on a node: mapping, loop devices, mounts, volume key, in words."""
    words = [volume_id, hashlib.sha256(volume_id.encode()).hexdigest()]
    if luks := record(node, volume_id).get("luks"):
        words.append(luks["uuid"])
    return [line for line in _open(_look(node)) if any(word in line for word in words)]


def assert_closed(node: Node, volume_id: str, timeout: float = _CLOSED_SECONDS) -> None:
    """Wait until nothing of a volume is open on a node, though calls for it may be repeated. AssertionError names
    what is.
    """
    deadline = time.monotonic() + timeout
    while left := opened(node, volume_id):
        assert time.monotonic() < deadline, "\n".join((f"{node.name} has open, after {timeout:g} s:", *left))
        time.sleep(_PAUSE_SECONDS)
