"""Images from wish to file: each source, each way of cloning, copies, and what ends them."""

import hashlib
import shutil

import pytest

from csi_driver.kube.kinds import IMAGE, IMAGE_COPY
from csi_driver.model.errors import InvalidArgument
from tests.image_server import ImageServer, sha512
from tests.operator.lab import Lab


def test_an_image_is_downloaded_encrypted_decrypted_and_the_source_may_go(lab: Lab, web: ImageServer) -> None:
    lab.secret("disk-key")
    lab.image("disk", {"download": {"url": web.url()}}, checksum=sha512(web.content))
    lab.clone("disk-encrypted", "disk", "encrypt", "disk-key")
    status = lab.wait_phase("disk-encrypted")
    assert (status["encrypted"], status["format"], status["secret"]) == (True, "luks2", "luks-csi/disk-key")
    assert status["virtualSize"] == len(web.content)
    lab.delete_image("disk")
    lab.clone("disk-again", "disk-encrypted", "decrypt", "disk-key")
    plain = lab.wait_phase("disk-again")
    assert (plain["encrypted"], plain["checksum"]) == (False, hashlib.sha256(web.content).hexdigest())
    (node,) = lab.wait_copies("disk-again", 1)
    assert lab.file(node, "disk-again").read_bytes() == web.content
    for name in ("disk-encrypted", "disk-again"):
        lab.delete_image(name)
    copies = [each["spec"]["image"] for each in lab.kube.list(IMAGE_COPY)[0]]
    assert not [name for name in copies if name.startswith("disk")]
    for each in ("one", "two"):
        assert not list((lab.images_of(each) / "ready").glob("disk*"))


def test_a_download_that_cannot_happen_says_why(lab: Lab, web: ImageServer) -> None:
    lab.image("wrong", {"download": {"url": web.url()}}, checksum="0" * 128)
    status = lab.wait_phase("wrong", "Failed", "checksum", "expected sha512:000")
    assert [each["reason"] for each in status["conditions"] if each["type"] == "Ready"] == ["NotMade"]
    lab.delete_image("wrong")


@pytest.mark.parametrize("limit", [9223372036854775807, "99999999999Ti", "9007199254740993", "1Ei", "much"])
def test_a_limit_that_no_image_can_have_is_refused(lab: Lab, limit: int | str) -> None:
    with pytest.raises(InvalidArgument, match=r"spec\.limit"):
        lab.image("limitless", {"upload": {}}, limit=limit)


def test_another_node_gets_its_copy_and_the_same_bytes(lab: Lab, web: ImageServer) -> None:
    lab.image("both", {"download": {"url": web.url()}}, copies=2)
    assert sorted(lab.wait_copies("both", 2)) == ["one", "two"]
    assert len(web.requests) == 1
    assert lab.file("one", "both").read_bytes() == lab.file("two", "both").read_bytes() == web.content
    assert lab.status("both")["copies"] == "2/2"
    lab.delete_image("both")
    assert lab.kube.get(IMAGE, "both") is None


def test_a_file_that_somebody_took_away_is_pulled_again(lab: Lab, web: ImageServer) -> None:
    lab.image("taken", {"download": {"url": web.url()}}, copies=2)
    lab.wait_copies("taken", 2)
    agent = lab.agents["one"]
    agent.stop()
    shutil.rmtree(lab.file("one", "taken").parent)
    agent.start()
    lab.wait("the file again", lambda: lab.file("one", "taken").exists() and lab.status("taken")["copies"] == "2/2")
    assert lab.file("one", "taken").read_bytes() == web.content
    assert len(web.requests) == 1
    lab.delete_image("taken")
