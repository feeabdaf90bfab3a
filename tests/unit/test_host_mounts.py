from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.host.mountinfo import parse_mountinfo
from csi_driver.host.mounts import Mounts
from csi_driver.model.errors import NotFound
from tests.handles import bind_path

TABLE = b"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:21 / /proc rw,nosuid,nodev - proc proc rw
41 22 253:4 / /pods/a\\040b/mount rw,noatime shared:7 master:3 - ext4 /dev/mapper/luks-one rw,errors=remount-ro
42 41 253:5 / /pods/a\\040b/mount ro,relatime - xfs /dev/mapper/luks-two rw
43 22 253:4 /pods/other /pods/bound rw master:3 - ext4 /dev/mapper/luks-one rw
44 22 0:50 /pods/bound /elsewhere rw unbindable - btrfs /dev/mapper/luks-three rw,compress=zstd:3
"""


@pytest.fixture
def mountinfo(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    path.write_bytes(TABLE)
    return path


def test_every_field_of_a_line_is_read() -> None:
    mount = parse_mountinfo(TABLE)[2]
    assert (mount.mount_id, mount.parent_id, mount.device) == (41, 22, (253, 4))
    assert (mount.root, mount.mount_point, mount.fs_type) == ("/", "/pods/a b/mount", "ext4")
    assert mount.source == "/dev/mapper/luks-one"
    assert mount.options == {"rw", "noatime"}
    assert mount.super_options == {"rw", "errors=remount-ro"}
    assert mount.propagation == "shared,slave"


def test_of_two_mounts_on_one_point_the_upper_is_found(mountinfo: Path) -> None:
    found = Mounts(str(mountinfo)).at("/pods/a b/mount")
    assert found is not None
    assert found.source == "/dev/mapper/luks-two"


def test_the_upper_mount_is_found_whatever_the_order_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "mountinfo"
    path.write_bytes(b"".join(reversed(TABLE.splitlines(keepends=True))))
    found = Mounts(str(path)).at("/pods/a b/mount")
    assert found is not None
    assert found.mount_id == 42


def test_a_root_field_of_the_same_text_is_no_mount_point(mountinfo: Path) -> None:
    mounts = Mounts(str(mountinfo))
    found = mounts.at("/pods/bound")
    assert found is not None
    assert found.mount_id == 43
    assert mounts.at("/pods/other") is None


@pytest.mark.parametrize("path", ["/pods", "/pods/a b", "/pods/a b/mount/", "/pods/a\\040b/mount2", "/pro"])
def test_other_paths_are_not_mounted(mountinfo: Path, path: str) -> None:
    assert Mounts(str(mountinfo)).at(path) is None


def test_links_above_the_mount_point_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    path = tmp_path / "mountinfo"
    path.write_bytes(f"50 22 7:0 / {tmp_path}/real/mount rw - ext4 /dev/loop0 rw\n".encode())
    found = Mounts(str(path)).at(f"{tmp_path}/link/mount")
    assert found is not None
    assert found.mount_id == 50


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/etc", "shared"), ("/proc/self", "private"), ("/elsewhere", "unbindable"), ("/pods/bound/x", "slave")],
)
def test_propagation_is_that_of_the_mount_above(mountinfo: Path, path: str, expected: str) -> None:
    # /proc/self is a link: below /proc whatever it points to.
    assert Mounts(str(mountinfo)).propagation(path) == expected


def test_mounts_of_a_device_are_found_by_number(mountinfo: Path) -> None:
    assert [mount.mount_id for mount in Mounts(str(mountinfo)).table().of_device((253, 4))] == [41, 43]


def test_a_torn_line_is_left_out() -> None:
    assert len(parse_mountinfo(TABLE + b"45 22 0:5")) == 6


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1).map("/top/".__add__))
def test_every_path_that_the_kernel_escapes_is_found_again(tmp_path_factory: pytest.TempPathFactory, path: str) -> None:
    escaped = path.encode()
    for character in b"\\ \t\n":
        escaped = escaped.replace(bytes([character]), b"\\%03o" % character)
    table = tmp_path_factory.mktemp("table") / "mountinfo"
    table.write_bytes(TABLE + b"60 22 7:1 / " + escaped + b" rw - ext4 /dev/loop1 rw\n")
    found = Mounts(str(table)).at(path)
    assert found is not None
    assert (found.mount_id, found.mount_point) == (60, path)


def test_unmount_of_what_is_not_there_is_fine(tmp_path: Path) -> None:
    Mounts().unmount(str(tmp_path / "absent"))
    Mounts().unmount(str(tmp_path / "absent" / "below"))


def test_binding_to_what_is_not_there_names_both_ends(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for read_only in (False, True):
        with pytest.raises(NotFound, match=r"source could not be bind-mounted at .*/target"):
            bind_path(Mounts(), str(tmp_path / "source"), str(tmp_path / "target"), read_only=read_only)
