"""A server that is killed while its children work: they keep the volume's device, and nobody else gets its number.

Seen: a loop device whose server died was free at once, its number went to the next user, and mkfs or luksFormat, which
had the name, wrote over another volume or a stranger's disk; a mount put one volume's files at another's staging path.
Nothing here hangs on luck: the child is stopped before it does its work, and goes on when all others have theirs.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

import pytest

from csi_driver.host.commands import run_program
from csi_driver.host.devicemapper import DeviceMapper, Target
from csi_driver.host.workers import Workers
from csi_driver.keys.secret import read_secret
from csi_driver.model.errors import VolumeBusy
from csi_driver.model.settings import Settings
from csi_driver.volumes.driver import WARM, Driver, Host, build_driver
from csi_driver.volumes.stage import StageRequest
from tests.machine import disks
from tests.machine.fault_points import Injector
from tests.machine.fault_server import FaultServer, Outcome
from tests.machine.node import CHEAP, EXT4, LIMITS, MIB, SECRET, SIZE, VOLUME, Node, fingerprint
from tests.machine.places import IN_GROUP, host_on, settings_on
from tests.machine.processes import has_ended, run, stopped_below, wait_for
from tests.machine.test_danger_orphans import stage_when_free
from tests.worker_tasks import run_stopped_program, stop_first

P = ParamSpec("P")
R = TypeVar("R")

OTHER = "pvc-2"
PLAIN: Mapping[str, str] = {}


class StoppingWorkers(Workers):
    """The work whose name begins with `step`, in a program if it is one, stops before it begins."""

    def __init__(self, step: str) -> None:
        super().__init__((*WARM, stop_first.__module__))
        self._step = step

    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not what.startswith(self._step):
            return super().call(what, timeout, function, *args, **kwargs)
        if cast("object", function) is run_program:
            stopping = cast("Callable[P, R]", run_stopped_program)
            return super().call(what, timeout, stopping, *args, **kwargs)
        return super().call(what, timeout, stop_first, function, *args, **kwargs)


@contextmanager
def orphaned(node: Node, step: str) -> Iterator[int]:
    """The child of a server that stages the volume and is killed when the child is about to begin `step`."""

    def build(settings: Settings, _: Injector) -> Driver:
        return build_driver(settings, host_on(Host(workers=StoppingWorkers(step))))

    settings = Settings(
        node_id="node-1",
        endpoint=node.folder / "csi.sock",
        state_dir=node.state,
        free_space_floor=64 * MIB,
        limits=LIMITS,
    )
    settings = settings_on(settings)
    request = StageRequest(VOLUME, str(node.staging_path()), EXT4, read_secret(SECRET), {})
    node.staging_path().mkdir(parents=True)
    server = FaultServer(settings, build, node.folder / "killed.log")
    outcomes: list[Outcome] = []
    call = threading.Thread(target=lambda: outcomes.append(server.call(request)), daemon=True)
    call.start()
    orphan = None
    try:
        orphan = wait_for(lambda: stopped_below(server.pid), f"{step} to be about to begin")
        os.kill(server.pid, signal.SIGKILL)
        call.join(30)
        assert outcomes[0].died
        assert not has_ended(orphan)
        yield orphan
    finally:
        server.kill()
        if orphan is not None and not has_ended(orphan):
            os.kill(orphan, signal.SIGKILL)
            wait_for(lambda: has_ended(orphan), "the end of the orphan")


@contextmanager
def bystander(folder: Path) -> Iterator[tuple[Path, str]]:
    """A stranger's file system on the first free device of the kind that shows volumes: its file and the device."""
    file = folder / "bystander.img"
    with file.open("wb") as image:
        image.truncate(64 * MIB)
    run("mkfs.ext4", "-q", file)
    device = run("losetup", "--find", "--show", file)
    try:
        if not IN_GROUP:
            yield file, device
            return
        sectors, number = file.stat().st_size // 512, os.stat(device).st_rdev
        below = f"{os.major(number)}:{os.minor(number)} 0"
        try:
            yield file, DeviceMapper().create("bystander", "", [Target(0, sectors, "linear", below)]).path
        finally:
            DeviceMapper().remove("bystander")
    finally:
        run("losetup", "--detach", device)


@pytest.mark.parametrize(
    ("step", "parameters"),
    [
        ("luks-format", CHEAP),
        ("mkfs.ext4", CHEAP),
        ("luks-mount", CHEAP),
        ("mkfs.ext4", PLAIN),
        ("luks-mount", PLAIN),
    ],
    ids=["format", "mkfs", "mount", "plain-mkfs", "plain-mount"],
)
def test_what_a_killed_server_left_at_work_keeps_its_device(
    node: Node, folder: Path, step: str, parameters: Mapping[str, str]
) -> None:
    node.create(OTHER, parameters=PLAIN)
    node.create(parameters=parameters, size=2 * SIZE)
    with orphaned(node, step) as orphan, bystander(folder) as (file, device):
        before = fingerprint(file)
        with pytest.raises(VolumeBusy, match=rf"volume {VOLUME} is still at work in .*process {orphan} \("):
            node.stage()
        node.stage(OTHER)
        node.write("the other's", OTHER)
        kept = disks.is_in_use(node)
        os.kill(orphan, signal.SIGCONT)
        stage_when_free(node)
        assert sorted(path.name for path in node.staging_path().iterdir()) == ["lost+found"]
        node.write()
        os.sync()
        assert fingerprint(file) == before, f"{step} of a killed server wrote to {device}, which is not the volume's"
        assert node.read(OTHER) == "the other's"
        assert kept, "the device of the volume was free while a child was about to use it"
    for volume in (VOLUME, OTHER):
        node.unstage(volume)
        node.stage(volume)
    assert node.read() == "precious"
    assert node.read(OTHER) == "the other's"
    for volume in (VOLUME, OTHER):
        node.unstage(volume)
