"""What dies and comes back: kubelet, driver, apiserver, node. Pods go on or come back by themselves, what they synced
is there, nothing is formatted twice, and nothing is left when they are gone.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Callable

import pytest

from tests.cluster.api import Json
from tests.cluster.commands import ClusterError
from tests.cluster.driver import STATE, claim, pod
from tests.cluster.leftovers import record
from tests.cluster.pods import Pods

# Numbers, synced one by one, in a file per start of the node; /acked has the last one that was synced for sure.
_WRITER = """
file=/data/$(cat /proc/sys/kernel/random/boot_id); n=0
while :; do
    n=$((n + 1)); echo "record $n" >> $file; sync $file; echo $n > /acked.new; mv /acked.new /acked
    sleep 0.05
done
"""
_WRITING = {"command": ["sh", "-c", _WRITER]}
_KILLS = 3
_STATES = ("formatting", "encrypted", "making")
_BACK_SECONDS = 180
# Kubelet waits longer and longer before it starts a container again; a new pod begins anew.
_RESTARTS_WITHOUT_DELAY = 1


def _identities(pods: Pods, *claims: str) -> list[Json]:
    """What is recorded of the LUKS2 headers: UUID, and the digest of the volume key, which each format makes anew."""
    return [record(pods.node, pods.volume(name).id)["luks"] for name in claims]


def _acked(pods: Pods, name: str, more_than: int = 0) -> int:
    """Wait until a writer has synced more than so many records, and return how many."""

    def acked() -> int | None:
        try:
            number = int(pods.sh(name, "cat /acked"))
        except ClusterError:  # not written yet; or kubelet has just started and knows no pod
            return None
        return number if number > more_than else None

    return pods.cluster.wait(f"more than {more_than} records of pod {name}", acked)


def _restarts(one: Json) -> int:
    return sum(container["restartCount"] for container in one["status"]["containerStatuses"])


def test_pods_go_on_while_kubelet_restarts(pods: Pods) -> None:
    pods.claim()
    pods.start("writer", container=_WRITING)
    before, identities = _acked(pods, "writer"), _identities(pods, "data")
    pods.node.restart_kubelet()
    _acked(pods, "writer", before)
    assert _restarts(pods.get("writer")) == 0
    pods.end("writer")  # by a kubelet that did not mount it
    pods.start("reader")
    assert int(pods.sh("reader", "cat /data/*-* | wc -l")) > before
    assert _identities(pods, "data") == identities


def test_pods_go_on_while_the_driver_restarts(pods: Pods) -> None:
    pods.claim()
    pods.start("writer", container=_WRITING)
    before, identities = _acked(pods, "writer"), _identities(pods, "data")
    old = pods.driver.delete_pod(pods.node)
    pods.driver.wait_other_pod(pods.node, old)
    _acked(pods, "writer", before)
    assert _restarts(pods.get("writer")) == 0
    pods.end("writer")  # by a driver that did not mount it
    pods.claim("other")
    pods.start("reader")
    pods.start("new", "other")
    assert int(pods.sh("reader", "cat /data/*-* | wc -l")) > before
    assert _identities(pods, "data") == identities


def test_pods_start_and_go_on_while_the_apiserver_restarts(pods: Pods) -> None:
    pods.claim()
    pods.start("writer", container=_WRITING)
    before, identities = _acked(pods, "writer"), _identities(pods, "data")
    names = ["one", "two", "three"]
    for name in names:
        pods.claim(name)
    pods.cluster.apply([pod(name, name) for name in names], pods.namespace)
    pods.cluster.control_plane.restart_apiserver()
    for name in names:
        pods.cluster.pod_running(name, pods.namespace, _BACK_SECONDS)
        assert pods.sh(name, f"echo {name} > /data/name; cat /data/name") == name
    _acked(pods, "writer", before)
    assert _restarts(pods.get("writer")) == 0
    assert _identities(pods, "data") == identities


def _killed_amid(pods: Pods, names: list[str], state: str, delay: float) -> list[Json]:
    """Kill the driver so many seconds after the first of the claims' volumes was recorded in that state; the records
    right after that. Only the server is killed: what it started must not go on by itself, and must not be in the way.
    """
    claims = [pods.cluster.api.get("PersistentVolumeClaim", name, pods.namespace) for name in names]
    files = " ".join(f"{STATE}/loopfile/volumes/pvc-{one['metadata']['uid']}/record.json" for one in claims)
    script = f"""
        tries=0
        until grep -q {state} {files} 2>/dev/null; do
            tries=$((tries + 1)); [ $tries -lt 3000 ] || exit 3; sleep 0.01
        done
        sleep {delay:.3f}; pkill -KILL -o -f 'luks-csi serve'
        for file in {files}; do [ ! -e $file ] || {{ cat $file; echo; }}; done
    """
    return [json.loads(line)["volume"] for line in pods.node.run(script, 120).text.splitlines()]


@pytest.mark.timeout(3600)
def test_a_driver_that_is_killed_while_it_stages_starts_where_it_was(pods: Pods, tell: Callable[[str], None]) -> None:
    """COUNT kills at moments that SEED draws."""
    seed, count = int(os.environ.get("SEED") or random.randrange(1 << 32)), int(os.environ.get("COUNT") or _KILLS)
    tell(f"cluster kills: seed={seed} kills={count}")
    moments = random.Random(seed)
    found: Counter[str] = Counter()
    for kill in range(count):
        names = [f"v{kill}{letter}" for letter in "abc"]
        pods.cluster.apply([one for name in names for one in (claim(name), pod(name, name))], pods.namespace)
        killed = _killed_amid(pods, names, moments.choice(_STATES), moments.uniform(0, 0.3))
        found.update(f"{one['encryption']}+{one['file_system']}" for one in killed)
        pinned = [one["luks"] for one in killed if (one["luks"] or {}).get("digest")]
        for name in names:
            pods.cluster.pod_running(name, pods.namespace, _BACK_SECONDS)
        identities = _identities(pods, *names)
        assert all(one in identities for one in pinned), "formatted twice"
        for name in names:
            pods.sh(name, "echo kept > /data/file; sync /data/file")
            pods.end(name, name)
        for name in names:
            pods.start(name, name)
            assert pods.sh(name, "cat /data/file") == "kept"
            pods.end(name, name)
        assert _identities(pods, *names) == identities
        if _restarts(pods.driver.pod(pods.node)) > _RESTARTS_WITHOUT_DELAY:
            pods.driver.wait_other_pod(pods.node, pods.driver.delete_pod(pods.node))
    states = " ".join(f"{state}={number}" for state, number in sorted(found.items()))
    tell(f"cluster kills: volumes={3 * count} formatted_twice=0 lost=0 found at the kills: {states}")
    assert set(found) - {"prepared+none", "encrypted+made"}, "no kill has met a stage"


@pytest.mark.timeout(600)
def test_a_node_that_loses_power_comes_back_by_itself(pods: Pods) -> None:
    names = ["one", "two", "three"]
    for name in names:
        pods.claim(name)
        pods.start(name, name, container=_WRITING)
    identities, boot = _identities(pods, *names), pods.node.run("cat /proc/sys/kernel/random/boot_id").text
    # One more is just being made.
    pods.cluster.apply([claim("late"), pod("late", "late", container=_WRITING)], pods.namespace)
    pods.cluster.wait("late claim bound", lambda: pods.volume("late"))
    acked = {name: _acked(pods, name, 3) for name in names}
    (late,) = _identities(pods, "late")
    pods.node.cut()
    pods.node.boot()
    for name in [*names, "late"]:
        pods.cluster.pod_running(name, pods.namespace, _BACK_SECONDS)
    for name in names:
        assert _restarts(pods.get(name)) == 1
        found = pods.sh(name, f"head -n {acked[name]} /data/{boot}").splitlines()
        assert found == [f"record {number}" for number in range(1, acked[name] + 1)]
        _acked(pods, name)
    assert _identities(pods, *names) == identities
    assert not (late or {}).get("digest") or _identities(pods, "late") == [late], "formatted twice"
    _acked(pods, "late")
    for name in [*names, "late"]:
        pods.end(name, name)
