"""What goes wrong around Images: told in words, harmless, and made good when its cause has gone."""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from csi_driver.images.base import MIB
from csi_driver.kube.kinds import CLAIM, IMAGE, IMAGE_COPY, NODE, STORAGE_CLASS
from tests.image_server import Handler, ImageServer, serving
from tests.operator.lab import DRIVER, Lab, Process
from tests.operator.proxy import Proxy, proxy

_LUKS_CSI = str(Path(sys.executable).with_name("luks-csi"))


@pytest.fixture
def cut(lab: Lab) -> Iterator[Proxy]:
    """Operator and agents whose only way to the API is one that can be cut."""
    processes: tuple[Process, ...] = (lab.operator, *lab.agents.values())
    configs = {Path(process.environment["KUBECONFIG"]): process for process in processes}
    with proxy(lab.api.port) as way:
        before = {path: path.read_text() for path in configs}
        for path, process in configs.items():
            process.stop()
            path.write_text(before[path].replace(lab.api.address, way.address))
            process.start()
        yield way
        for path, process in configs.items():
            process.stop()
            path.write_text(before[path])
            process.start()


def test_who_is_cut_off_for_a_while_misses_nothing(lab: Lab, web: ImageServer, cut: Proxy) -> None:
    for name in ("stays", "goes"):
        lab.image(name, {"download": {"url": web.url()}})
        lab.wait_phase(name)
    cut.cut()
    lab.kube.delete(IMAGE, "goes")
    lab.image("comes", {"download": {"url": web.url()}})
    lab.kube.patch(IMAGE, "stays", {"spec": {"copies": 2}})
    lab.image("passes", {"download": {"url": web.url()}})
    lab.kube.delete(IMAGE, "passes")
    assert lab.kube.get(IMAGE, "passes") is None  # nobody has seen it
    cut.mend()
    lab.wait_phase("comes")
    lab.wait_copies("stays", 2)
    lab.wait("end of image goes", lambda: lab.kube.get(IMAGE, "goes") is None)
    assert not any(lab.file(node, "goes").exists() for node in ("one", "two"))
    for name in ("stays", "comes"):
        lab.delete_image(name)


def test_who_stood_still_for_a_while_misses_nothing(lab: Lab, web: ImageServer) -> None:
    processes = (lab.operator, *lab.agents.values())
    lab.image("still-goes", {"download": {"url": web.url()}})
    lab.wait_phase("still-goes")
    for process in processes:
        process.send(signal.SIGSTOP)
    lab.kube.delete(IMAGE, "still-goes")
    lab.image("still-comes", {"download": {"url": web.url()}}, copies=2)
    for process in processes:
        process.send(signal.SIGCONT)
    lab.wait_copies("still-comes", 2)
    lab.wait("end of image still-goes", lambda: lab.kube.get(IMAGE, "still-goes") is None)
    lab.delete_image("still-comes")


def test_an_image_that_somebody_made_by_hand_is_not_touched(lab: Lab, web: ImageServer, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(os.urandom(MIB))
    for node in ("one", "two"):
        state = f"--state-dir={lab.folder / node}"
        subprocess.run([_LUKS_CSI, "image", "import", str(tmp_path / "disk"), "by-hand", state], check=True)
    before = {node: lab.file(node, "by-hand").stat() for node in ("one", "two")}
    lab.image("by-hand", {"download": {"url": web.url()}})
    lab.wait_phase("by-hand", "Failed", "already that is not this Image's", "luks-csi image delete by-hand")
    lab.delete_image("by-hand")
    assert {node: lab.file(node, "by-hand").stat() for node in ("one", "two")} == before
    for node in ("one", "two"):
        state = f"--state-dir={lab.folder / node}"
        subprocess.run([_LUKS_CSI, "image", "delete", "by-hand", "--yes", state], check=True)


def test_a_full_disk_is_told_and_another_node_is_not_troubled(lab: Lab, small: str) -> None:
    with serving(os.urandom(8 * MIB)) as server:
        lab.image("big", {"download": {"url": server.url()}}, nodeSelector={"room": "little"})
        lab.wait_phase("big", "Failed", f"node {small}: ")
        said = lab.status("big")["message"]
        assert said.endswith("make room; it is tried again"), said
        lab.image("big-elsewhere", {"download": {"url": server.url()}}, nodeSelector={"room": "enough"})
        lab.wait_phase("big-elsewhere", "Pending", "no node with an agent fits its nodeSelector")
        lab.kube.patch(NODE, "two", {"metadata": {"labels": {"room": "enough"}}})
        lab.wait_phase("big-elsewhere")
    assert lab.wait_copies("big-elsewhere", 1) == ["two"]
    for name in ("big", "big-elsewhere"):
        lab.delete_image(name)


def test_what_a_full_node_cannot_make_another_one_makes_and_the_source_comes_to_it(lab: Lab, small: str) -> None:
    """A clone of two MiB has no room beside its source in four, of which a part is kept."""
    lab.secret("moved-key")
    with serving(os.urandom(2 * MIB)) as server:
        lab.image("stays", {"download": {"url": server.url()}}, nodeSelector={"room": "little"})
        lab.wait_phase("stays")
        assert lab.wait_copies("stays", 1) == [small]
        lab.kube.patch(NODE, "one", {"metadata": {"labels": {"spare": "room"}}})
        lab.clone("moves", "stays", "encrypt", "moved-key", nodeSelector={"spare": "room"})
        lab.wait("word of the node that is full", lambda: any(
            each["node"] == small and each["attempts"] >= 3 for each in lab.status("moves").get("tried") or ()
        ))  # fmt: skip
        lab.wait_phase("moves")
    assert lab.wait_copies("moves", 1) == ["one"]
    assert "tried" not in lab.status("moves")
    assert sorted(lab.wait_copies("stays", 2)) == sorted(["one", small])
    assert len(server.requests) == 1
    for name in ("moves", "stays"):
        lab.delete_image(name)
    lab.kube.patch(NODE, "one", {"metadata": {"labels": {"spare": None}}})


def test_a_secret_that_is_missing_or_wrong_is_told_and_one_that_comes_is_used(lab: Lab, web: ImageServer) -> None:
    lab.image("plain", {"download": {"url": web.url()}})
    lab.clone("sealed", "plain", "encrypt", "comes-later")
    lab.wait_phase("sealed", "Failed", "there is no secret luks-csi/comes-later")
    lab.secret("comes-later", right := secrets.token_hex(16))
    lab.wait_phase("sealed")
    lab.secret("wrong", wrong := secrets.token_hex(16))
    lab.clone("opened", "sealed", "decrypt", "wrong")
    lab.wait_phase("opened", "Failed", "image sealed", "passphrase")
    lab.clone("twice", "sealed", "encrypt", "wrong")
    lab.wait_phase("twice", "Failed", "image sealed is encrypted already")
    for name in ("opened", "twice", "sealed", "plain"):
        lab.delete_image(name)
    for process in (lab.operator, *lab.agents.values()):
        assert not any(each in process.log.read_text() for each in (right, wrong))


def test_what_is_being_cloned_is_not_deleted_before_that_has_ended(lab: Lab, web: ImageServer) -> None:
    lab.image("source", {"download": {"url": web.url()}})
    lab.wait_phase("source")
    for agent in lab.agents.values():
        agent.send(signal.SIGSTOP)  # so that the clone cannot have ended
    lab.clone("taken", "source")
    lab.wait("begin of the clone", lambda: [
        copy for copy in lab.kube.list(IMAGE_COPY)[0] if copy["spec"]["image"] == "taken"
    ])  # fmt: skip
    lab.kube.delete(IMAGE, "source")
    lab.wait_phase("source", "Deleting", "image taken is being cloned from it")
    for agent in lab.agents.values():
        agent.send(signal.SIGCONT)
    lab.wait_phase("taken")
    lab.wait("end of image source", lambda: lab.kube.get(IMAGE, "source") is None)
    (node,) = lab.wait_copies("taken", 1)
    assert lab.file(node, "taken").read_bytes() == web.content
    lab.delete_image("taken")


def test_an_image_of_a_storage_class_is_kept_until_that_goes(lab: Lab, web: ImageServer) -> None:
    lab.image("of-class", {"download": {"url": web.url()}})
    lab.wait_phase("of-class")
    parameters = {"provisioner": DRIVER, "parameters": {"backingImage": "of-class"}}
    lab.kube.create(STORAGE_CLASS, {"metadata": {"name": "from-image"}, **parameters})
    lab.kube.create(STORAGE_CLASS, {"metadata": {"name": "others"}, **parameters, "provisioner": "another.one"})
    lab.wait("copy", lambda: lab.wait_copies("of-class", 1))
    lab.kube.delete(IMAGE, "of-class")
    lab.wait_phase("of-class", "Deleting", "StorageClass from-image names it")
    lab.wait_copies("of-class", 1)
    lab.kube.delete(STORAGE_CLASS, "from-image")
    lab.wait("end of image of-class", lambda: lab.kube.get(IMAGE, "of-class") is None)
    lab.kube.delete(STORAGE_CLASS, "others")


def test_copies_and_clones_go_where_the_node_selector_says_and_fewer_wanted_ones_stay(
    lab: Lab, web: ImageServer
) -> None:
    for node in ("one", "two"):
        lab.kube.patch(NODE, node, {"metadata": {"labels": {"number": node}}})
    lab.image("there", {"download": {"url": web.url()}}, nodeSelector={"number": "one"}, copies=2)
    lab.wait_phase("there", "Ready", "one more copy is wanted and no other node can have one")
    assert lab.wait_copies("there", 1) == ["one"]
    lab.clone("other-side", "there", nodeSelector={"number": "two"})
    lab.wait_phase("other-side")
    assert lab.wait_copies("other-side", 1) == ["two"]
    assert len(web.requests) == 1
    lab.kube.patch(IMAGE, "other-side", {"spec": {"nodeSelector": None, "copies": 2}})
    assert sorted(lab.wait_copies("other-side", 2)) == ["one", "two"]
    lab.kube.patch(IMAGE, "other-side", {"spec": {"copies": 1}})
    lab.wait("copies 2/1", lambda: lab.status("other-side")["copies"] == "2/1")
    assert sorted(lab.wait_copies("other-side", 2)) == ["one", "two"]
    for name in ("other-side", "there"):
        lab.delete_image(name)


def test_a_claim_that_comes_later_is_found(lab: Lab) -> None:
    lab.image("of-later", {"claim": {"name": "later", "namespace": "default"}})
    lab.wait_phase("of-later", "Pending", "there is no claim default/later")
    resources = {"resources": {"requests": {"storage": "1Mi"}}, "accessModes": ["ReadWriteOnce"]}
    lab.kube.create(CLAIM, {"metadata": {"name": "later"}, "spec": resources}, "default")
    lab.wait_phase("of-later", "Pending", "the claim default/later is not bound yet")
    lab.delete_image("of-later")
    lab.kube.delete(CLAIM, "later", "default")


def test_an_image_that_waits_for_its_turn_gets_it_when_another_one_is_deleted(lab: Lab) -> None:
    def stuck(handler: Handler) -> None:
        handler.head(200, Content_Length=2 * MIB, ETag='"1"')
        handler.wfile.write(bytes(MIB))
        handler.server.ended.wait()

    lab.node("busy", "--jobs=1", busy="yes")
    with serving(os.urandom(MIB)) as server:
        server.answers.append(stuck)
        lab.image("first", {"download": {"url": server.url()}}, nodeSelector={"busy": "yes"})
        lab.wait_phase("first", "InProgress", "downloading")
        lab.image("second", {"download": {"url": server.url()}}, nodeSelector={"busy": "yes"})

        def waits() -> bool:
            # Told of the Image, too: what its agent sees of that is no reason any more to look again.
            said = [each.get("message") for each in lab.status("second").get("nodes", [])]
            return said == ["waits for other images that this node is at work on"]

        lab.wait("second image to wait", waits)
        lab.delete_image("first")
        lab.wait_phase("second")
    lab.delete_image("second")
    lab.forget_node("busy")
    assert not list((lab.folder / "busy" / "images" / "new").glob("*"))


def test_how_far_it_is_is_told_once_a_second_at_most(lab: Lab, web: ImageServer) -> None:
    _, version = lab.kube.list(IMAGE_COPY)
    lab.image("told", {"download": {"url": web.url()}})
    lab.wait_phase("told")
    told, begun, ended = 0, 0.0, 0.0
    for _, copy in lab.kube.watch(IMAGE_COPY, version):
        state = copy.get("status", {}).get("state")
        if copy["spec"]["image"] != "told" or state is None:
            continue
        at = max(
            datetime.fromisoformat(each["time"]).timestamp()
            for each in copy["metadata"]["managedFields"] if each.get("subresource") == "status"
        )  # fmt: skip
        if state == "Ready":
            break
        told, begun, ended = told + 1, begun or at, at
    assert 0 < told <= ended - begun + 1, f"{told} words in {ended - begun} s"
    lab.delete_image("told")


def test_nobody_has_a_node_fetch_from_itself_or_from_its_clouds_metadata(lab: Lab, web: ImageServer) -> None:
    lab.node("strict", "--allow-local=false", strict="yes")
    for name, url, why in (
        ("of-node", web.url(), "a loopback address"),
        ("of-metadata", "http://169.254.169.254/latest/meta-data", "a cloud's metadata address"),
        ("of-number", "http://2852039166/latest/meta-data", "a cloud's metadata address"),
    ):
        lab.image(name, {"download": {"url": url}}, nodeSelector={"strict": "yes"})
        lab.wait_phase(name, "Failed", why, "refused; images are not fetched from there")
        assert not lab.file("strict", name).exists()
        lab.delete_image(name)
    assert web.requests == []
    lab.forget_node("strict")
