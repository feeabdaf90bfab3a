"""What is said when the kernel does not map an image."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from csi_driver.backends.rbddevices import MappedVolumes, Pin
from csi_driver.backends.rbderrors import CephMissing
from csi_driver.host import krbd
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
        (errno.EINVAL, FailedPrecondition, r"volume v\.0123456789 .*lacks a feature .* an option \(queue_depth=7\)"),
        (errno.ENXIO, FailedPrecondition, r"its log \(dmesg\) says"),
        (errno.ESHUTDOWN, FailedPrecondition, "fenced off"),
        (errno.ETIMEDOUT, DeadlineExceeded, r"did not answer mapping .* for volume v\.0123456789"),
        (errno.EIO, CommandFailed, "look at 'ceph status'"),
    ],
)
def test_what_the_kernel_answers_is_the_error_that_it_means(
    tmp_path: Path, answer: int, error: type[DriverError], said: str
) -> None:
    volumes = MappedVolumes(tmp_path, Files(), Failing(OSError(answer, os.strerror(answer))), MappedImages(), 1)
    volumes.prepare()
    with pytest.raises(error, match=said) as raised:
        volumes.map("v.0123456789", FakePool(), PIN, ("queue_depth=7",))
    assert type(raised.value) is error


def test_a_kernel_that_does_not_answer_is_told_with_its_cluster(tmp_path: Path) -> None:
    workers = Failing(DeadlineExceeded("rbd-map of … did not end and was killed"))
    volumes = MappedVolumes(tmp_path, Files(), workers, MappedImages(), 1)
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
        images.map(FakePool().address("one", ()))
    assert tried == [("modprobe", "rbd", "single_major=Y")]
    MappedImages(str(tmp_path)).load()
    assert len(tried) == 1
