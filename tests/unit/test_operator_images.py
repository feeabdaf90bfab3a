"""The operator's look at one Image, where it has not yet seen what it has done itself."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from csi_driver.kube.client import Kube
from csi_driver.kube.copies import copy_of
from csi_driver.kube.kinds import CLAIM, FINALIZER, IMAGE, IMAGE_COPY, NODE, POD, VOLUME, Json, name_of
from csi_driver.kube.refusals import Conflict
from csi_driver.model.times import recorded
from csi_driver.operator.events import Events
from csi_driver.operator.images import AGENT_LABELS, Images
from csi_driver.operator.settings import OperatorSettings
from tests.operator_fakes import NOW, FakeApi, SilentApi

_NODES = ("one", "two")


@pytest.fixture
def api() -> Iterator[SilentApi]:
    api = SilentApi()
    for node in _NODES:
        api.put(NODE, {"metadata": {"name": node}})
        pod = {
            "metadata": {"name": f"node-{node}", "labels": AGENT_LABELS},
            "spec": {"nodeName": node},
            "status": {"containerStatuses": [{"name": "image-agent", "ready": True}]},
        }
        api.put(POD, pod, "luks-csi")
    yield api
    api.end()


def seeing(api: SilentApi, **settings: Any) -> Images:
    """The controller, when it has seen what there is now."""
    kube = cast("Kube", api)
    images = Images(kube, OperatorSettings(**settings), Events(kube, "operator"))
    for informer in images.informers:
        api.inform(informer)
    return images


def image(api: FakeApi, name: str, source: Json, **status: object) -> Json:
    metadata = {"name": name, "uid": f"uid-{name}", "finalizers": [FINALIZER]}
    return api.put(IMAGE, {"metadata": metadata, "spec": {"source": source}, "status": status})


def ready(api: FakeApi, of: Json, node: str, used: datetime | None = None) -> Json:
    facts = {"format": "raw", "fileSize": 1, "virtualSize": 1, "encrypted": False, "checksum": "00"}
    status = {"state": "Ready", "image": facts} | ({"lastUsed": recorded(used)} if used else {})
    return api.put(IMAGE_COPY, copy_of(of, node, make=node == "one") | {"status": status})


def deleted(api: FakeApi) -> list[str]:
    return [call.name for call in api.written() if (call.verb, call.kind) == ("delete", IMAGE_COPY)]


def disk(api: FakeApi) -> Json:
    return image(api, "disk", {"download": {"url": "https://example.org/d"}}, phase="Ready", virtualSize=1)


def test_what_a_clone_has_begun_to_be_made_of_a_moment_ago_is_kept(api: SilentApi) -> None:
    source = disk(api)
    ready(api, source, "one")
    image(api, "clone", {"clone": {"image": "disk"}})
    images = seeing(api)
    images.reconcile("clone")
    assert [call.name for call in api.written() if call.verb == "create"]
    assert len(images.copies.all()) == 1  # it has not seen that
    images.images.saw(api.change(IMAGE, "disk", {"metadata": {"deletionTimestamp": NOW}}))
    images.reconcile("disk")
    assert deleted(api) == []
    found = api.get(IMAGE, "disk")
    assert found is not None
    assert "image clone is being cloned from it" in found["status"]["message"]


@pytest.mark.parametrize(
    ("permanent", "tried", "is_kept"), [(False, [], True), (True, [], False), (None, ["one"], True), (None, [], False)]
)
def test_a_clone_that_is_tried_again_keeps_its_source(
    api: SilentApi,
    permanent: bool | None,  # noqa: FBT001
    tried: list[str],
    is_kept: bool,  # noqa: FBT001
) -> None:
    source = disk(api)
    ready(api, source, "one")
    entries = [{"node": node, "attempts": 3, "permanent": False, "message": "full"} for node in tried]
    clone = image(api, "clone", {"clone": {"image": "disk"}}, phase="Pending" if tried else "Failed", tried=entries)
    if permanent is not None:
        api.put(IMAGE_COPY, copy_of(clone, "one", make=True) | {"status": {"state": "Failed", "permanent": permanent}})
    api.change(IMAGE, "disk", {"metadata": {"deletionTimestamp": NOW}})
    seeing(api).reconcile("disk")
    assert (deleted(api) == []) == is_kept


def test_a_copy_goes_when_it_is_not_wanted_and_was_not_used_for_long_enough(api: SilentApi) -> None:
    now = datetime.now(UTC)
    source = disk(api)
    ready(api, source, "one", now - timedelta(days=1))
    unused = ready(api, source, "two", now - timedelta(days=2))
    assert seeing(api, unused_seconds=0.0).reconcile("disk") is None
    assert deleted(api) == []
    wait = seeing(api, unused_seconds=4 * 86400.0).reconcile("disk")
    assert wait is not None
    assert 86400 < wait < 3 * 86400  # the first one of them
    assert deleted(api) == []
    seeing(api, unused_seconds=3600.0).reconcile("disk")
    assert deleted(api) == [name_of(unused)]


def test_a_node_that_tells_nothing_any_more_has_no_agent(api: SilentApi) -> None:
    """Nobody takes back what the containers of its pods were: the pod of a DaemonSet stays, too."""
    now = datetime.now(UTC)
    source = disk(api)
    ready(api, source, "one", now - timedelta(days=5))
    ready(api, source, "two", now - timedelta(days=3))
    api.change(NODE, "two", {"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}})
    seeing(api, lost_seconds=0.0).reconcile("disk")
    assert deleted(api) == []
    api.change(NODE, "one", {"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}})
    seeing(api, lost_seconds=0.0).reconcile("disk")
    told = api.get(IMAGE, "disk")
    assert told is not None
    assert (told["status"]["phase"], told["status"]["conditions"][0]["reason"]) == ("Pending", "NodesLost")


def test_what_was_deleted_a_moment_ago_is_none_of_those_that_stay(api: SilentApi) -> None:
    """Its agent wrote when it was used last just before, and that is what the operator hears of first."""
    now = datetime.now(UTC)
    source = disk(api)
    first = name_of(ready(api, source, "one", now - timedelta(days=5)))
    ready(api, source, "two", now - timedelta(days=3))
    images = seeing(api)
    images.reconcile("disk")
    assert deleted(api) == [first]
    there = next(each for each in images.copies.all() if name_of(each) == first)
    used = {**there, "status": {**there["status"], "lastUsed": recorded(now)}}
    images.copies.saw(used | {"metadata": {**there["metadata"], "resourceVersion": "999"}})
    images.reconcile("disk")
    assert deleted(api) == []


def test_a_copy_that_was_used_a_moment_ago_stays(api: SilentApi) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=2)
    source = disk(api)
    first = name_of(ready(api, source, "one", long_ago - timedelta(days=1)))
    other = name_of(ready(api, source, "two", long_ago))
    images = seeing(api)

    def use(_call: object = None) -> None:
        api.before = lambda _call: None
        api.change(IMAGE_COPY, first, {"status": {"lastUsed": recorded(datetime.now(UTC))}})

    use()
    images.reconcile("disk")
    assert deleted(api) == [other]  # though it has not heard of that
    api.change(IMAGE_COPY, other, {"metadata": {"deletionTimestamp": None}})
    api.change(IMAGE_COPY, first, {"status": {"lastUsed": recorded(long_ago - timedelta(days=1))}})
    api.before = lambda call: use() if call.verb == "delete" else None
    with pytest.raises(Conflict):
        images.reconcile("disk")
    assert not any("deletionTimestamp" in copy["metadata"] for copy in api.all(IMAGE_COPY))


def test_a_lost_maker_that_told_something_a_moment_ago_gets_no_second_one_beside_it(api: SilentApi) -> None:
    wanted = image(api, "disk", {"download": {"url": "https://example.com/disk"}})
    lost = api.put(IMAGE_COPY, copy_of(wanted, "two", make=True) | {"status": {"state": "InProgress"}})
    api.lose(POD, "node-two", "luks-csi")
    images = seeing(api, lost_seconds=0)
    api.change(IMAGE_COPY, name_of(lost), {"status": {"progress": 50}})
    with pytest.raises(Conflict):
        images.reconcile("disk")
    assert [name_of(copy) for copy in api.all(IMAGE_COPY)] == [name_of(lost)]
    images = seeing(api, lost_seconds=0)
    images.reconcile("disk")
    there = [copy["spec"]["node"] for copy in api.all(IMAGE_COPY) if "deletionTimestamp" not in copy["metadata"]]
    assert len(there) == 1
    assert there != ["two"]


def tell_of_agent(api: SilentApi, images: Images, node: str, *, up: bool) -> None:
    status = {"containerStatuses": [{"name": "image-agent", "ready": up}]}
    images.pods.saw(api.change(POD, f"node-{node}", {"status": status}, "luks-csi"))


@pytest.mark.parametrize(("first", "second"), [_NODES, _NODES[::-1]])
def test_an_agent_that_comes_up_gets_no_second_maker_beside_one_begun_a_moment_ago(
    api: SilentApi, first: str, second: str
) -> None:
    """Whichever of the two nodes comes first for the image."""
    image(api, "disk", {"upload": {}})
    images = seeing(api)
    tell_of_agent(api, images, second, up=False)
    images.reconcile("disk")
    tell_of_agent(api, images, second, up=True)
    with contextlib.suppress(Conflict):
        images.reconcile("disk")
    assert [(copy["spec"]["node"], copy["spec"]["make"]) for copy in api.all(IMAGE_COPY)] == [(first, True)]


def test_what_a_node_has_tried_counts_once_though_the_end_of_its_copy_was_not_seen_yet(api: SilentApi) -> None:
    wanted = image(api, "disk", {"download": {"url": "https://example.com/disk"}})
    failed = {"state": "Failed", "attempts": 3, "elsewhere": True, "permanent": False, "message": "full"}
    api.put(IMAGE_COPY, copy_of(wanted, "one", make=True) | {"status": failed})
    images = seeing(api)
    images.reconcile("disk")
    for _ in range(3):
        with pytest.raises(Conflict):
            images.reconcile("disk")
    found = api.get(IMAGE, "disk")
    assert found is not None
    assert [(each["node"], each["attempts"]) for each in found["status"]["tried"]] == [("one", 3)]


def test_a_copy_that_a_clone_was_begun_of_a_moment_ago_is_in_use(api: SilentApi) -> None:
    source = disk(api)
    for node in _NODES:
        ready(api, source, node, datetime.now(UTC) - timedelta(days=2))
    image(api, "clone", {"clone": {"image": "disk"}})
    images = seeing(api)
    images.reconcile("clone")
    (begun,) = [copy["spec"]["node"] for copy in api.all(IMAGE_COPY) if copy["spec"]["image"] == "clone"]
    images.reconcile("disk")
    (left,) = [copy["spec"]["node"] for copy in api.all(IMAGE_COPY) if copy["spec"]["image"] == "disk"
               and "deletionTimestamp" not in copy["metadata"]]  # fmt: skip
    assert left == begun


def test_a_copy_that_a_clone_is_made_of_is_in_use(api: SilentApi) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=2)
    source = disk(api)
    ready(api, source, "two", long_ago - timedelta(days=1))
    other = ready(api, source, "one", long_ago)
    clone = image(api, "clone", {"clone": {"image": "disk"}})
    api.put(IMAGE_COPY, copy_of(clone, "two", make=True))
    assert seeing(api).reconcile("disk") is not None
    assert deleted(api) == [name_of(other)]


@pytest.mark.parametrize(
    ("owner", "is_its"),
    [
        (None, False),
        ({"namespace": "others", "name": "mine", "uid": "c-1"}, False),
        ({"namespace": "team", "name": "mine"}, False),  # meant for a claim of that name, and not bound
        ({"namespace": "team", "name": "mine", "uid": "c-0"}, False),  # of an earlier claim of that name
        ({"namespace": "team", "name": "mine", "uid": "c-1"}, True),
    ],
)
def test_a_claim_that_names_somebody_elses_volume_exports_nothing(
    api: SilentApi,
    owner: Json | None,
    is_its: bool,  # noqa: FBT001
) -> None:
    api.put(CLAIM, {"metadata": {"name": "mine", "uid": "c-1"}, "spec": {"volumeName": "pvc-others"}}, "team")
    driver = OperatorSettings().driver_name
    node = {"key": f"topology.{driver}/node", "operator": "In", "values": ["one"]}
    spec: Json = {
        "csi": {"driver": driver, "volumeHandle": "pvc-others"},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [node]}]}},
    }
    api.put(VOLUME, {"metadata": {"name": "pvc-others"}, "spec": spec | ({"claimRef": owner} if owner else {})})
    image(api, "stolen", {"claim": {"name": "mine", "namespace": "team"}})
    seeing(api).reconcile("stolen")
    assert bool(api.all(IMAGE_COPY)) == is_its
    told = api.get(IMAGE, "stolen")
    assert told is not None
    said = "the claim team/mine names the PersistentVolume pvc-others, which is not bound to it"
    assert told["status"]["message"].startswith(said) == (not is_its)


def test_what_nodes_and_pods_tell_at_once_is_looked_at_by_one_after_the_other(
    api: SilentApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the one that has seen less may be the last to keep what it saw, and a change back is none."""
    kube = cast("Kube", api)
    images = Images(kube, OperatorSettings(), Events(kube, "operator"))
    real, both, at_once = images.nodes.all, threading.Barrier(2), [0]

    def look() -> Sequence[Json]:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)
            at_once[0] += 1
        return real()

    monkeypatch.setattr(images.nodes, "all", look)
    threads = [threading.Thread(target=api.inform, args=(informer,)) for informer in (images.nodes, images.pods)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert at_once == [0]
