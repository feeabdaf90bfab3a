"""What stage says when the device fails because the storage below it is full."""

from collections.abc import Callable
from pathlib import Path

import pytest

from csi_driver.backends.loopfile import LoopfileBackend
from csi_driver.backends.records import RecordCodec
from csi_driver.model.errors import CommandFailed, ResourceExhausted
from csi_driver.model.settings import Limits
from csi_driver.volumes.filesystem import FileSystems
from csi_driver.volumes.stage import StageRequest, Staging
from csi_driver.volumes.stages import Stages
from tests.fake_host import NoHolders, SteppedFiles
from tests.fake_kernel import KernelCommands, KernelMounts, KernelWorkers
from tests.unit.test_staging_model import KEY, MOUNT, Rig

_NOTHING_IS_FREE = 1 << 62


def failing(at: str) -> Callable[[str], None]:
    def plan(step: str) -> None:
        if at in step:
            raise CommandFailed(f"{step}: Input/output error")

    return plan


def staging(rig: Rig, floor: int) -> Staging:
    kernel = rig.kernel
    files, workers, mounts = SteppedFiles(kernel.step), KernelWorkers(kernel), KernelMounts(kernel)
    return Staging(
        LoopfileBackend(rig.folder / "loopfile", floor, files, kernel.loops, RecordCodec()),
        Stages(rig.folder / "stages", files),
        workers,
        rig.encryption,
        FileSystems(workers, KernelCommands(kernel), mounts, Limits()),
        rig.mappings,
        mounts,
        NoHolders(),
    )


@pytest.mark.parametrize("at", ["format", "mkfs"])
def test_a_full_disk_is_told_where_the_device_says_input_output_error(tmp_path: Path, at: str) -> None:
    rig = Rig(tmp_path)
    rig.create("enc-1")
    request = StageRequest("enc-1", rig.staging_path("enc-1"), MOUNT, KEY, {})
    rig.kernel.plan = failing(at)
    with pytest.raises(CommandFailed, match=r"Input/output error$"):
        staging(rig, 0).stage(request)
    with pytest.raises(ResourceExhausted, match=r"Input/output error; .* volume enc-1 .*, free space there$"):
        staging(rig, _NOTHING_IS_FREE).stage(request)
    assert rig.kernel.traces("enc-1") == []
