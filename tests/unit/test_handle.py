import os
from pathlib import Path

import pytest

from csi_driver.host.handle import Handle, open_handle
from csi_driver.host.held import held_descriptors, holding
from csi_driver.host.workers import pack, unpack
from tests.handles import handle_on


def test_a_handle_opens_what_was_opened_and_has_the_name_that_people_know(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    with open_handle(str(tmp_path / "a"), os.O_RDONLY) as handle:
        os.replace(tmp_path / "a", tmp_path / "b")
        assert Path(handle).read_text() == "one"
        assert str(handle) == f"{tmp_path}/a"
    assert handle.fd == -1
    handle.close()


def test_a_link_at_the_end_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/null")
    with pytest.raises(OSError, match="symbolic links"):
        open_handle(str(tmp_path / "link"), os.O_RDONLY)


def test_a_device_is_known_by_its_number() -> None:
    with handle_on("/dev/null") as null:
        assert (null.number, null.major, null.minor) == ((1, 3), 1, 3)


def test_a_message_leaves_descriptors_to_be_sent_beside_it() -> None:
    with handle_on("/dev/null") as one, handle_on("/dev/zero") as other:
        message, descriptors = pack(("text", [one], {"device": other}))
        assert descriptors == [one.fd, other.fd]
    found = unpack(message, (70, 71))
    assert isinstance(found, tuple)
    text, listed, named = found
    assert text == "text"
    assert isinstance(listed[0], Handle)
    assert [(handle.fd, handle.name) for handle in (*listed, *named.values())] == [(70, "/dev/null"), (71, "/dev/zero")]
    listed[0].fd = named["device"].fd = -1


def test_what_is_held_is_held_for_the_length_of_a_block() -> None:
    with holding(5), holding(7, 8):
        assert held_descriptors() == (5, 7, 8)
    assert held_descriptors() == ()
