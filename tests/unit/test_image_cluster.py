"""What agent and driver of a node tell each other by files: what is said is heard, and what is broken is a sentence."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from csi_driver.images.cluster import ClusterImage, ClusterImages
from csi_driver.model.errors import FailedPrecondition, InvalidArgument


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "images"


@pytest.fixture
def images(folder: Path) -> ClusterImages:
    return ClusterImages(folder)


def test_what_the_agent_tells_the_driver_finds(images: ClusterImages, folder: Path) -> None:
    assert images.find("debian") is None
    assert not images.has("debian")
    images.tell("debian", "uid-1", ready=True, here=False, percent=None, message="")
    images.tell("debian", "uid-1", ready=True, here=False, percent=43, message="12 MiB/s from\n node-2 \x1b[1m")
    assert images.has("debian")
    assert images.find("debian") == ClusterImage(
        uid="uid-1", ready=True, here=False, message="12 MiB/s from node-2 ?[1m", percent=43
    )
    assert ClusterImages(folder).names() == ["debian"]
    images.forget("debian")
    images.forget("debian")
    assert (images.find("debian"), list(images.names())) == (None, [])


def test_what_the_driver_wants_the_agent_sees_until_it_is_brought(images: ClusterImages, folder: Path) -> None:
    assert list(images.wanted()) == []
    images.brought("debian")
    for name in ("debian", "alpine", "debian"):
        images.want(name)
    assert images.wanted() == ["alpine", "debian"]
    images.brought("debian")
    assert ClusterImages(folder).wanted() == ["alpine"]


def test_the_last_volume_that_started_from_an_image_is_remembered_as_long_as_the_image(
    images: ClusterImages, folder: Path
) -> None:
    images.tell("debian", "uid-1", ready=True, here=False, percent=None, message="")
    assert images.last_used("debian") == ""
    images.use("debian")
    os.utime(folder / "used" / "debian", (0, 0))
    assert images.last_used("debian") == "1970-01-01T00:00:00+00:00"
    images.use("debian")
    assert ClusterImages(folder).last_used("debian") > "2026"
    images.forget("debian")
    assert images.last_used("debian") == ""
    for call in (images.use, images.last_used):
        with pytest.raises(InvalidArgument):
            call("../debian")


def test_several_volumes_may_want_an_image_at_once(images: ClusterImages) -> None:
    def want(_: int) -> None:
        images.want("debian")

    with ThreadPoolExecutor(8) as threads:
        for _ in range(50):
            list(threads.map(want, range(8)))
            assert images.wanted() == ["debian"]
            images.brought("debian")


def test_nobody_but_the_owner_may_look(images: ClusterImages, folder: Path) -> None:
    images.tell("debian", "uid-1", ready=False, here=False, percent=0, message="")
    images.want("debian")
    for path in (folder, folder / "cluster", folder / "wanted"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in (folder / "cluster" / "debian.json", folder / "wanted" / "debian"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_write_that_was_cut_changes_nothing_and_goes_with_the_next(images: ClusterImages, folder: Path) -> None:
    images.tell("debian", "uid-1", ready=True, here=False, percent=1, message="")
    cut = folder / "cluster" / ".debian.json.new"
    cut.write_bytes(b'{"uid":')
    assert images.names() == ["debian"]
    assert images.find("debian") == ClusterImage(uid="uid-1", ready=True, here=False, percent=1)
    images.forget("debian")
    assert not cut.exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", "Debian", ".debian", "x" * 64, "a\n"])
def test_what_is_no_images_name_is_refused_and_never_listed(images: ClusterImages, folder: Path, name: str) -> None:
    for call in (images.find, images.has, images.want, images.forget, images.brought):
        with pytest.raises(InvalidArgument, match=r"cannot be an image's name"):
            call(name)
    with pytest.raises(InvalidArgument, match=r"cannot be an image's name"):
        images.tell(name, "uid-1", ready=True, here=False, percent=None, message="")
    images.want("debian")
    images.tell("debian", "uid-1", ready=True, here=False, percent=None, message="")
    if "/" not in name and name not in ("", ".."):
        (folder / "wanted" / name).touch()
        (folder / "cluster" / f"{name}.json").touch()
    assert (images.wanted(), images.names()) == (["debian"], ["debian"])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing of the kind",
        b"[]",
        b'{"uid":"u"}',
        b'{"uid":7,"ready":true}',
        b'{"uid":"","ready":true}',
        b'{"uid":"u","ready":"yes"}',
        b'{"uid":"u","ready":true,"percent":101}',
        b'{"uid":"u","ready":true,"percent":-1}',
        b'{"uid":"u","ready":true,"message":"' + b"x" * 1025 + b'"}',
        b'{"uid":"\xff","ready":true}',
        b'{"x":' + b"[" * 10_000,
        b'{"uid":"u","ready":true}' + b" " * (1 << 14),
    ],
    ids=range(13),
)
def test_broken_content_is_a_sentence(images: ClusterImages, folder: Path, content: bytes) -> None:
    images.tell("debian", "uid-1", ready=True, here=False, percent=None, message="")
    (folder / "cluster" / "debian.json").write_bytes(content)
    with pytest.raises(FailedPrecondition, match=r"debian\.json \(.+\); start the image agent of this node anew"):
        images.find("debian")
    assert images.has("debian")
    images.tell("debian", "uid-1", ready=True, here=False, percent=None, message="")
    assert images.find("debian") == ClusterImage(uid="uid-1", ready=True, here=False)


def test_only_a_regular_file_is_read(images: ClusterImages, folder: Path) -> None:
    images.tell("debian", "uid-1", ready=True, here=False, percent=None, message="")
    path = folder / "cluster" / "debian.json"
    other = path.rename(folder / "other")
    path.symlink_to(other)
    with pytest.raises(FailedPrecondition, match=r"debian\.json cannot be used"):
        images.find("debian")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FailedPrecondition, match=r"it is no regular file"):
        images.find("debian")
    path.unlink()
    path.mkdir()
    with pytest.raises(FailedPrecondition, match=r"it is no regular file"):
        images.find("debian")


def test_folders_that_are_none_are_a_sentence(images: ClusterImages, folder: Path) -> None:
    folder.mkdir()
    for name in ("cluster", "wanted"):
        (folder / name).touch()
    for call in (images.names, images.wanted):
        with pytest.raises(FailedPrecondition, match=r"cannot be used \(.+\); run this as root"):
            call()
    for told in (images.find, images.want, images.forget, images.brought):
        with pytest.raises(FailedPrecondition, match=r"cannot be used"):
            told("debian")
    with pytest.raises(FailedPrecondition, match=r"cannot be used"):
        images.tell("debian", "uid-1", ready=True, here=False, percent=None, message="")


def test_a_message_that_is_too_long_is_cut(images: ClusterImages) -> None:
    images.tell("debian", "uid-1", ready=True, here=False, percent=None, message="x" * 5000)
    found = images.find("debian")
    assert found is not None
    assert found.message == "x" * 1024
