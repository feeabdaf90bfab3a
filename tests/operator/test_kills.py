"""Operator, agents and nodes that end in the middle of something, and what goes on from there."""

import json
import os
import signal
from pathlib import Path

from csi_driver.images.base import MIB
from csi_driver.images.checkpoint import Operation
from csi_driver.kube.kinds import IMAGE, IMAGE_COPY, NODE, Json
from csi_driver.model.secret import Passphrase
from tests.image_clones import clone
from tests.image_server import ImageServer, serving
from tests.operator.lab import Lab, Process
from tests.operator.plants import program

_LARGE = 768 * MIB  # a clone's first checkpoint stands at a third of it
_HEADER = 16 * MIB
_MARK = b"not made again".ljust(4096)
_STANDS_STILL = """
import os, signal
from csi_driver.images import checkpoint
stored = checkpoint.store_checkpoint
def stored_once(files, path, what):
    stored(files, path, what)
    if what.chunks:
        os.kill(os.getpid(), signal.SIGSTOP)
checkpoint.store_checkpoint = stored_once
"""


def _wait_no_copy(lab: Lab, node: str) -> None:
    lab.wait(f"no copy on {node}", lambda: all(copy["spec"]["node"] != node for copy in lab.kube.list(IMAGE_COPY)[0]))


def _stopping(folder: Path) -> dict[str, str]:
    """An environment of an agent whose children stand still behind the first checkpoint that has anything."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_STANDS_STILL)
    return {"PYTHONPATH": str(folder)}


def test_a_clone_whose_agent_was_killed_goes_on_behind_its_checkpoint(lab: Lab, tmp_path: Path) -> None:
    lab.secret("large-key", "a passphrase")
    with serving(bytes(_LARGE)) as server:
        lab.image("large", {"download": {"url": server.url()}})
        lab.wait_phase("large")
    (node,) = lab.wait_copies("large", 1)
    agent, name = lab.agents[node], "large-encrypted"
    folder, environment = lab.images_of(node) / "new" / name, agent.environment
    agent.stop()
    agent.environment = environment | _stopping(tmp_path / "stopping")
    agent.start()
    lab.clone(name, "large", "encrypt", "large-key")
    checkpoint = folder / "checkpoint.json"
    lab.wait("checkpoint", lambda: checkpoint.exists() and json.loads(checkpoint.read_text())["chunks"])
    agent.kill()
    assert not (folder / "record.json").exists()
    agent.environment = environment
    with (folder / "part").open("r+b") as part:  # behind the header: what is made anew overwrites it
        part.seek(_HEADER)
        part.write(_MARK)
    agent.start()
    lab.wait_phase(name)
    with lab.file(node, name).open("rb") as file:
        file.seek(_HEADER)
        assert file.read(len(_MARK)) == _MARK, "it was begun anew"
    opened = clone(Operation.DECRYPT, lab.file(node, name), tmp_path / "opened", opened_by=Passphrase(b"a passphrase"))
    with opened.part.open("rb") as file:
        file.seek(len(_MARK))
        while piece := file.read(MIB):
            assert not any(piece)
    opened.part.unlink()
    for each in (name, "large"):
        lab.delete_image(each)


def _read_so_far(pid: int) -> int:
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["rchar"])


def test_a_copy_whose_agent_was_killed_goes_on_where_it_was(lab: Lab) -> None:
    content = os.urandom(MIB) * 160
    lab.node("giver", "--rate-limit=64Mi", group="pulled")
    with serving(content) as server:
        lab.image("travels", {"download": {"url": server.url()}}, nodeSelector={"group": "pulled"})
        lab.wait_phase("travels")
    taker = lab.node("taker", group="pulled")
    before = _read_so_far(lab.agents["giver"].pid)
    lab.kube.patch(IMAGE, "travels", {"spec": {"copies": 2}})
    part = lab.images_of("taker") / "new" / "travels" / "pulled.part"
    state = part.with_name("pulled.part.json")
    lab.wait("durable part of the copy", state.exists)
    taker.kill()
    there, durable = part.stat().st_size, json.loads(state.read_text())["received"]
    assert 0 < durable <= there < len(content)
    taker.start()
    lab.wait_copies("travels", 2)
    assert lab.file("taker", "travels").read_bytes() == content
    sent = _read_so_far(lab.agents["giver"].pid) - before
    on_the_way = 32 * MIB  # what buffers held when it was killed, tokens and questions
    assert sent < there + on_the_way + len(content) - durable, f"{sent} bytes were sent"
    lab.delete_image("travels")
    for node in ("giver", "taker"):
        lab.forget_node(node)


def _lives_through(lab: Lab, mortal: Process, name: str, content: bytes) -> None:
    """Until the image was made on both nodes and deleted; the operator lives on where the mortal one has ended."""
    deleted = False

    def at_the_end() -> bool:
        nonlocal deleted
        if not mortal.is_up and not lab.operator.is_up:
            lab.operator.start()
        if not deleted and lab.status(name).get("copies") == "2/2":
            assert {lab.file(node, name).read_bytes() for node in ("one", "two")} == {content}
            lab.kube.delete(IMAGE, name)
            deleted = True
        return deleted and lab.kube.get(IMAGE, name) is None

    lab.wait(f"end of {name}", at_the_end)
    assert mortal.code in (None, -signal.SIGKILL), "it did not end behind a write"


def test_an_operator_killed_behind_each_of_its_writes_comes_to_the_same_end(lab: Lab, web: ImageServer) -> None:
    lab.operator.stop()
    writes = 0
    survived = False
    while not survived:
        writes += 1
        mortal = lab.planted(program(f"mortal:{writes}"))
        mortal.start()
        name = f"written-{writes}"
        lab.image(name, {"download": {"url": web.url(f"/{name}")}}, copies=2)
        _lives_through(lab, mortal, name, web.content)
        assert not any(lab.file(node, name).exists() for node in ("one", "two"))
        assert [request["path"] for request in web.requests].count(f"/{name}") == 1
        survived = mortal.is_up
        mortal.stop()
        lab.operator.stop()
    assert writes > 8, "a life has more writes than that"
    assert lab.kube.list(IMAGE_COPY)[0] == []
    lab.operator.start()


def test_copies_of_a_lost_node_are_made_anew_and_it_may_come_back_or_go_for_good(lab: Lab, web: ImageServer) -> None:
    for node in ("a", "b", "c"):
        lab.node(node, kept="here")
    lab.image("kept", {"download": {"url": web.url()}}, copies=2, nodeSelector={"kept": "here"})
    lost, other = lab.wait_copies("kept", 2)
    (spare,) = {"a", "b", "c"} - {lost, other}
    lab.agents[lost].kill()
    lab.pod_up(lost, up=False)

    def made_anew() -> bool:
        return spare in [each["name"] for each in lab.status("kept")["nodes"] if each["state"] == "Ready"]

    lab.wait("copy on the spare node", made_anew)
    lab.agents[lost].start()
    lab.pod_up(lost, up=True)
    assert sorted(lab.wait_copies("kept", 3)) == ["a", "b", "c"]
    assert lab.status("kept")["copies"] == "3/2"
    # Again, and for good: when the node goes, its agent has long been gone.
    lab.agents[lost].kill()
    lab.pod_up(lost, up=False)
    lab.image("quiet", {"download": {"url": web.url()}}, nodeSelector={"kept": "here"})
    lab.wait_phase("quiet")  # the operator knows that the agent is gone
    lab.forget_node(lost)
    _wait_no_copy(lab, lost)
    assert len(web.requests) == 2
    for image in ("kept", "quiet"):
        lab.delete_image(image)
    for node in (other, spare):
        lab.forget_node(node)


def test_a_node_that_was_taken_out_and_returns_gives_back_what_is_wanted_and_removes_what_is_not(
    lab: Lab, web: ImageServer
) -> None:
    lab.node("returns", away="for-long")
    for name in ("still-there", "gone-meanwhile"):
        lab.image(name, {"download": {"url": web.url()}}, nodeSelector={"away": "for-long"})
        lab.wait_phase(name)
    lab.forget_node("returns")
    lab.wait_phase("still-there", "Failed", "the nodes that had it are gone")
    lab.delete_image("gone-meanwhile")
    assert lab.file("returns", "gone-meanwhile").exists()
    lab.node("returns", "--leftover-seconds=1", away="for-long")
    lab.wait_phase("still-there")  # with its last file, which nobody has made anew
    lab.wait("end of what is left", lambda: not lab.file("returns", "gone-meanwhile").exists())
    assert lab.file("returns", "still-there").read_bytes() == web.content
    assert len(web.requests) == 2
    lab.delete_image("still-there")
    lab.forget_node("returns")


def test_a_copy_that_nobody_wants_any_more_goes(lab: Lab, web: ImageServer) -> None:
    lab.image("fewer", {"download": {"url": web.url()}}, copies=2)
    lab.wait_copies("fewer", 2)
    lab.operator.stop()
    short = lab.operator_with("--unused-seconds=1")
    short.start()
    try:
        lab.kube.patch(IMAGE, "fewer", {"spec": {"copies": 1}})
        (kept,) = lab.wait_copies("fewer", 1)
        (other,) = {"one", "two"} - {kept}
        lab.wait("end of the other file", lambda: not lab.file(other, "fewer").exists())
        assert lab.file(kept, "fewer").read_bytes() == web.content
    finally:
        short.stop()
        lab.operator.start()
    lab.delete_image("fewer")


def test_a_deletion_ends_when_the_node_that_it_waits_for_goes(lab: Lab, web: ImageServer) -> None:
    lab.node("dying", dying="yes")
    lab.image("held", {"download": {"url": web.url()}}, nodeSelector={"dying": "yes"})
    lab.wait_phase("held")
    lab.agents["dying"].kill()
    lab.pod_up("dying", up=False)
    lab.wait_phase("held", "Pending", "no node that has it answers (dying)")
    lab.kube.delete(IMAGE, "held")
    lab.wait_phase("held", "Deleting")
    lab.kube.delete(NODE, "dying")
    lab.wait("end of image held", lambda: lab.kube.get(IMAGE, "held") is None)
    lab.api.ask("DELETE", "/api/v1/namespaces/luks-csi/pods/node-dying?gracePeriodSeconds=0")
    del lab.agents["dying"]


def test_what_was_lost_with_its_last_copy_is_told_and_never_made_anew(lab: Lab, web: ImageServer) -> None:
    def condition(status: Json) -> str:
        return next(str(each["reason"]) for each in status["conditions"] if each["type"] == "Ready")

    lab.node("only", last="copy")
    lab.image("lost", {"download": {"url": web.url()}}, nodeSelector={"last": "copy"})
    lab.wait_phase("lost")
    lab.forget_node("only")
    status = lab.wait_phase("lost", "Failed", "gone", "delete it and make it anew")
    assert condition(status) == "CopiesLost"
    lab.node("another", last="copy")
    lab.image("after", {"download": {"url": web.url("/after")}}, nodeSelector={"last": "copy"})
    lab.wait_phase("after")  # that node works
    assert condition(lab.wait_phase("lost", "Failed")) == "CopiesLost"
    assert [request["path"] for request in web.requests] == ["/image", "/after"]
    for image in ("lost", "after"):
        lab.delete_image(image)
    lab.forget_node("another")
