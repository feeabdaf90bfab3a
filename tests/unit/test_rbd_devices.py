"""What is said when the kernel does not map an image."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from csi_driver.backends.rbddevices import MappedVolumes, Pin
from csi_driver.backends.rbderrors import CephMissing
from csi_driver.host import keyring, krbd
from csi_driver.host.files import Files
from csi_driver.host.krbd import MappedImages
from csi_driver.host.workers import Workers
from csi_driver.model.errors import CommandFailed, DeadlineExceeded, DriverError, FailedPrecondition
from tests.ceph_fakes import FakePool

PIN = Pin(fsid="f", namespace="", pool_number=1, image_id="1f", image="csi-vol-v.0123456789")


class Failing(Workers):
    """The kernel answers so."""

    def __init__(self, error: Exception) -> None:
        super().__init__(())
        self._error = error

    def call(self, what: str, timeout: float, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        raise self._error


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (errno.ENOENT, CephMissing, "look whether the pool or image was removed by hand"),
        (errno.EINVAL, FailedPrecondition, r"volume v\.0123456789 .* that it lacks .* does not know \(queue_depth=7\)"),
        (errno.ENXIO, FailedPrecondition, r"its log \(dmesg\) says"),
        (errno.ESHUTDOWN, FailedPrecondition, "fenced off"),
        (errno.ETIMEDOUT, DeadlineExceeded, r"did not answer mapping .* for volume v\.0123456789"),
        (errno.EIO, FailedPrecondition, r"its log \(dmesg\) says why"),
    ],
)
def test_what_the_kernel_answers_is_the_error_that_it_means(
    tmp_path: Path, answer: int, error: type[DriverError], said: str
) -> None:
    volumes = MappedVolumes(tmp_path, Files(), Failing(OSError(answer, os.strerror(answer))), MappedImages("/"), 1)
    volumes.prepare()
    with pytest.raises(error, match=said) as raised:
        volumes.map("v.0123456789", FakePool(), PIN, ("queue_depth=7",))
    assert type(raised.value) is error


def test_a_kernel_that_does_not_answer_is_told_with_its_cluster(tmp_path: Path) -> None:
    workers = Failing(DeadlineExceeded("rbd-map of … did not end and was killed"))
    volumes = MappedVolumes(tmp_path, Files(), workers, MappedImages("/"), 1)
    volumes.prepare()
    with pytest.raises(DeadlineExceeded, match=r"ceph-one \(192\.0\.2\.1:6789\) did not answer .* within 1 s"):
        volumes.map("v.0123456789", FakePool(), PIN, ())


def test_a_module_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def run(argv: tuple[str, ...], **_: float) -> None:
        tried.append(argv)
        raise FailedPrecondition("the program modprobe is not installed on this node")

    monkeypatch.setattr(krbd, "run_program", run)
    images = MappedImages(str(tmp_path / "none"))
    with pytest.raises(FailedPrecondition, match=r"module rbd is not loaded .* run 'modprobe rbd' there"):
        images.load()
    assert tried == [("modprobe", "rbd", "single_major=Y")]
    MappedImages(str(tmp_path)).load()
    assert len(tried) == 1


# --- what the kernel shows, played by files


class Sysfs:
    """A folder in the place of /sys/bus/rbd."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "devices").mkdir()
        (folder / "add_single_major").touch()

    def show(self, number: int, image: str, client: str, namespace: str = "") -> None:
        device = self.folder / "devices" / str(number)
        device.mkdir(exist_ok=True)
        told = {
            "cluster_fsid": "f", "pool_id": "1", "pool_ns": namespace, "image_id": "1f", "current_snap": "-",
            "major": "250", "minor": "16", "client_addr": client, "pool": "rbd", "name": image,
        }  # fmt: skip
        for name, content in told.items():
            (device / name).write_text(content + "\n")


class Kernel(MappedImages):
    """Does what the test says when it is asked to map."""

    def __init__(self, sysfs: Sysfs, mapping: Callable[[], None]) -> None:
        super().__init__(str(sysfs.folder))
        self._mapping = mapping
        self.told: list[tuple[str, str]] = []

    def _tell(self, name: str, text: str) -> None:
        self.told.append((name, text))
        self._mapping()


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sysfs:
    monkeypatch.setattr(keyring, "add_to_thread", lambda *_: 7)
    monkeypatch.setattr(keyring, "unlink_from_thread", lambda serial: None if serial == 7 else pytest.fail("not ours"))
    return Sysfs(tmp_path)


def test_a_number_that_was_anothers_a_moment_ago_is_the_new_devices(sysfs: Sysfs) -> None:
    """What had it is unmapped by another call while the kernel is at it."""
    sysfs.show(0, "csi-vol-other", "192.0.2.7:0/1")
    sysfs.show(1, "csi-vol-third", "192.0.2.7:0/2")
    kernel = Kernel(sysfs, lambda: sysfs.show(0, "one", "192.0.2.7:0/3"))
    found = kernel.map(FakePool().address("one", ("noshare",)))
    assert (found.number, found.client) == (0, "192.0.2.7:0/3")
    assert kernel.told == [("add_single_major", "192.0.2.1:6789 name=csi,key=client.csi,noshare rbd one -")]


def test_what_comes_meanwhile_of_another_name_or_namespace_is_not_taken(sysfs: Sysfs) -> None:
    def mapping() -> None:
        sysfs.show(2, "two", "192.0.2.7:0/3")
        sysfs.show(3, "one", "192.0.2.7:0/4", "tenant")

    sysfs.show(1, "one", "192.0.2.7:0/2")
    with pytest.raises(CommandFailed, match="was mapped and is gone"):
        Kernel(sysfs, mapping).map(FakePool().address("one", ()))


def test_a_kernel_that_takes_no_request_is_told_as_that(sysfs: Sysfs) -> None:
    (sysfs.folder / "add_single_major").unlink()
    images = MappedImages(str(sysfs.folder))
    with pytest.raises(FailedPrecondition, match=r"takes no request .*/add: No such file .* run it privileged"):
        images.map(FakePool().address("one", ()))
    (sysfs.folder / "add").touch()
    with pytest.raises(CommandFailed, match="was mapped and is gone"):
        images.map(FakePool().address("one", ()))
    assert (sysfs.folder / "add").read_text().endswith(" rbd one -")
