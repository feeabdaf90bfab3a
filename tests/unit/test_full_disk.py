"""What stage and expansion say when the storage below is full."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from csi_driver.backends.base import Space
from csi_driver.backends.loopfile import LoopfileBackend
from csi_driver.backends.records import RecordCodec
from csi_driver.model.errors import CommandFailed, DriverError, FailedPrecondition, NotFound, ResourceExhausted
from csi_driver.model.volume import VolumeParameters
from csi_driver.volumes.expand import ExpandRequest
from csi_driver.volumes.presence import Presences
from csi_driver.volumes.stage import StageRequest, Staging
from csi_driver.volumes.stages import Stages
from tests.fake_host import SteppedFiles, at_home
from tests.fake_kernel import KernelMounts, KernelWorkers
from tests.unit.test_staging_model import KEY, MOUNT, NO_KEY, Rig


def failing(at: str) -> Callable[[str], None]:
    def plan(step: str) -> None:
        if at in step:
            raise CommandFailed(f"{step}: Input/output error")

    return plan


class SmallBackend(LoopfileBackend):
    free: int | None = 0

    def space(self, parameters: VolumeParameters | None = None) -> Space:
        if self.free is None:
            raise FailedPrecondition("the storage does not say how full it is")
        return Space(1 << 30, self.free, 0)  # below the floor, in any case


def staging(rig: Rig, free: int | None) -> Staging:
    kernel = rig.kernel
    files, workers, mounts = SteppedFiles(kernel.step), KernelWorkers(kernel), KernelMounts(kernel)
    backend = SmallBackend(rig.folder / "loopfile", 0, files, kernel.loops, RecordCodec())
    backend.free = free
    stages = Stages(rig.folder / "stages", files)
    return Staging(
        backend,
        lambda: None,
        stages,
        Presences(backend, stages, rig.mappings, mounts),
        workers,
        rig.encryption,
        rig.file_systems,
        rig.mappings,
        rig.healing,
        rig.drift,
        rig.keys,
        rig.rekeying,
        at_home(backend),
    )


@pytest.mark.parametrize("at", ["format", "mkfs"])
def test_a_full_disk_is_told_where_the_device_says_input_output_error(tmp_path: Path, at: str) -> None:
    rig = Rig(tmp_path)
    rig.create("enc-1")
    request = StageRequest("enc-1", rig.staging_path("enc-1"), MOUNT, KEY, {})
    rig.kernel.plan = failing(at)
    for free in (1 << 29, None):
        with pytest.raises(CommandFailed, match=r"Input/output error$"):
            staging(rig, free).stage(request)
    with pytest.raises(ResourceExhausted, match=r"Input/output error; .* volume enc-1 is full .*, free space there$"):
        staging(rig, 1 << 20).stage(request)
    assert rig.kernel.traces("enc-1") == []


def test_an_enlargement_without_room_has_the_code_that_lets_kubelet_go_on(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.create("enc-1")
    rig.stage("enc-1")
    before = rig.record("enc-1")
    with pytest.raises(FailedPrecondition, match=r"no room for volume enc-1 .*, then start the pod anew"):
        rig.expansion.expand(ExpandRequest("enc-1", rig.staging_path("enc-1"), 1 << 50, 0, NO_KEY))
    assert rig.record("enc-1") == before
    assert rig.guarded("enc-1")
    rig.unstage("enc-1")


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.ENOSPC, ResourceExhausted, "free space on the file system that it"),
        (errno.EDQUOT, ResourceExhausted, "free space on the file system that it"),
        (errno.EROFS, NotFound, "cannot be made"),
    ],
)
def test_no_room_for_a_target_path_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[DriverError], words: str
) -> None:
    rig = Rig(tmp_path)
    rig.create("plain-1")
    rig.stage("plain-1")

    def refuse(path: str, _mode: int = 0) -> None:
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(kind, match=words):
        rig.publish("plain-1")
    assert len(rig.kernel.mounted) == 1
